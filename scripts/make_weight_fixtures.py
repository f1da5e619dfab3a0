"""Writes the fixtures of the weights tests: one tiny tower per family in every naming, and recorded resizes.

usage: python scripts/make_weight_fixtures.py [OUT_DIR]     (default: maskalign-core/tests/fixtures/weights)

Needs torch and safetensors. Weights are multiples of 1/64 that bfloat16 and float16 hold exactly, so that one tower is the
same in every number format.
"""
import argparse
import json
import sys
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "maskalign-core/tests/fixtures/weights"
C, M, P, GRID, DEPTH, E = 8, 16, 2, 3, 2, 6
generator = torch.Generator().manual_seed(2211)


def draw(*shape):
    return torch.randint(-127, 128, shape, generator=generator) / 64


def tower(family):
    """A tower in the canonical naming (timm's)."""
    t = {"cls_token": draw(1, 1, C), "pos_embed": draw(1, 1 + GRID * GRID, C), "patch_embed.proj.weight": draw(C, 3, P, P)}
    if family == "clip":
        t |= {"norm_pre.weight": draw(C), "norm_pre.bias": draw(C), "head.weight": draw(E, C)}
    else:
        t["patch_embed.proj.bias"] = draw(C)
    for i in range(DEPTH):
        shapes = {"norm1": (C,), "attn.qkv": (3 * C, C), "attn.proj": (C, C), "norm2": (C,), "mlp.fc1": (M, C), "mlp.fc2": (C, M)}
        for name, shape in shapes.items():
            t[f"blocks.{i}.{name}.weight"] = draw(*shape)
            t[f"blocks.{i}.{name}.bias"] = draw(shape[0])
        if family == "dinov2":
            t |= {f"blocks.{i}.ls1.gamma": draw(C), f"blocks.{i}.ls2.gamma": draw(C)}
    return t | {"norm.weight": draw(C), "norm.bias": draw(C)}


def renamed(tower, top, block_prefix, block, split):
    """`top` and `block` map our stems to theirs; `split` names query, key and value where they are apart."""
    out = {}
    for name, value in tower.items():
        if name.startswith("blocks."):
            _, i, rest = name.split(".", 2)
            stem, _, kind = rest.rpartition(".")
            if stem == "attn.qkv" and split:
                for theirs, part in zip(split, value.chunk(3)):
                    out[f"{block_prefix}{i}.{theirs}.{kind}"] = part
            elif rest in block:
                out[f"{block_prefix}{i}.{block[rest]}"] = value
            else:
                out[f"{block_prefix}{i}.{block[stem]}.{kind}"] = value
        elif name in top:
            out[top[name]] = value
        else:
            stem, _, kind = name.rpartition(".")
            out[f"{top[stem]}.{kind}"] = value
    return out


def openai(t):
    out = renamed(
        t,
        {"cls_token": "class_embedding", "pos_embed": "positional_embedding", "patch_embed.proj": "conv1", "norm_pre": "ln_pre",
         "norm": "ln_post", "head.weight": "proj"},
        "transformer.resblocks.",
        {"norm1": "ln_1", "norm2": "ln_2", "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
         "attn.qkv.weight": "attn.in_proj_weight", "attn.qkv.bias": "attn.in_proj_bias"},
        None)
    out["class_embedding"] = out["class_embedding"].reshape(C)
    out["positional_embedding"] = out["positional_embedding"][0]
    out["proj"] = out["proj"].t().contiguous()
    return out


def hf_clip(t):
    out = renamed(
        t,
        {"cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding.weight",
         "patch_embed.proj": "embeddings.patch_embedding", "norm_pre": "pre_layrnorm", "norm": "post_layernorm",
         "head.weight": "visual_projection.weight"},
        "encoder.layers.",
        {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"},
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])
    out["embeddings.class_embedding"] = out["embeddings.class_embedding"].reshape(C)
    out["embeddings.position_embedding.weight"] = out["embeddings.position_embedding.weight"][0]
    return out


HF_TOP = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
          "patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
HF_SPLIT = [f"attention.attention.{n}" for n in ("query", "key", "value")]


def hf_vit(t):
    return renamed(t, HF_TOP, "encoder.layer.",
                   {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
                    "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}, HF_SPLIT)


def hf_dinov2(t):
    return renamed(t, HF_TOP, "encoder.layer.",
                   {"norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1",
                    "mlp.fc2": "mlp.fc2", "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}, HF_SPLIT)


def under(prefix, tensors):
    return {prefix + name: value for name, value in tensors.items()}


def half(tensors, dtype):
    return {name: value.to(dtype) for name, value in tensors.items()}


def save(name, tensors, **metadata):
    tensors = {k: v.clone().contiguous() for k, v in tensors.items()}
    save_file(tensors, OUT / name, metadata or None)


class Node(torch.nn.Module):
    """A module whose state dictionary is what it is given, for TorchScript."""

    def __init__(self, tensors):
        super().__init__()
        children = {}
        for name, value in tensors.items():
            head, _, rest = name.partition(".")
            if rest:
                children.setdefault(head, {})[rest] = value
            else:
                setattr(self, head, torch.nn.Parameter(value, requires_grad=False))
        for head, inner in children.items():
            self.add_module(head, Node(inner))

    def forward(self, x):
        return x


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    clip, vit, dinov2 = tower("clip"), tower("vit"), tower("dinov2")
    text = {"positional_embedding": draw(4, C), "text_projection": draw(C, E), "logit_scale": draw(1)[0],
            "token_embedding.weight": draw(5, C), "ln_final.weight": draw(C), "ln_final.bias": draw(C),
            "transformer.resblocks.0.ln_1.weight": draw(C)}

    save("clip_timm.safetensors", clip | {"head.bias": torch.zeros(E)})
    save("clip_open_clip.safetensors", half(under("visual.", openai(clip)) | text, torch.float16), format="pt")
    save("clip_openai_bare.safetensors", half(openai(clip), torch.bfloat16))
    hf = hf_clip(clip)
    projection = {"visual_projection.weight": hf.pop("visual_projection.weight")}
    ids = torch.arange(10)[None]
    save("clip_hf.safetensors", under("vision_model.", hf | {"embeddings.position_ids": ids}) | projection |
         {"text_model.embeddings.token_embedding.weight": draw(5, C), "text_projection.weight": draw(E, C),
          "logit_scale": draw(1)[0]}, format="pt")
    save("clip_hf_bare.safetensors", {k: v.double() for k, v in (hf | projection).items()})

    save("vit_timm.safetensors", vit)
    save("vit_hf.safetensors", hf_vit(vit) | {"pooler.dense.weight": draw(C, C), "pooler.dense.bias": draw(C)}, format="pt")
    save("dinov2_timm.safetensors", dinov2 | {"mask_token": draw(1, C)})
    save("dinov2_hf.safetensors", under("dinov2.", hf_dinov2(dinov2) | {"embeddings.mask_token": draw(1, C)}), format="pt")

    # PyTorch files. The MaskAlign checkpoint is as the official code saves it: with the teacher, an optimizer and arguments.
    student = vit | {"distill_weights": draw(DEPTH, DEPTH), "distill_heads.0.weight": draw(C, C), "distill_heads.0.bias": draw(C)}
    frozen = {"clip_model.visual.conv1.weight": draw(C, 3, P, P), "clip_model.visual.class_embedding": draw(C)}
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": draw(C)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]}
    arguments = argparse.Namespace(lr=1e-3, model="vit", epochs=200, dist_on_itp=False, resume=None, big=2**40)
    torch.save({"model": OrderedDict(student | frozen), "optimizer": optimizer, "epoch": 3, "args": arguments}, OUT / "maskalign.pth")

    # DINO's full checkpoint; the student differs, so taking it would show.
    teacher = under("backbone.", vit) | {"head.mlp.0.weight": draw(C, C), "head.last_layer.weight_g": draw(C, 1)}
    wrong = under("module.backbone.", {"cls_token": draw(1, 1, C)})
    torch.save({"student": OrderedDict(wrong), "teacher": OrderedDict(teacher), "epoch": 1}, OUT / "dino_full.pth")

    # Views: transposed, sliced, expanded, sharing one storage; parameters; every number format.
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    views = OrderedDict(
        base=base, transposed=base.t(), sliced=base[1:3, ::2], expanded=base[:1, :1].expand(3, 2), scalar=base[2, 3],
        parameter=torch.nn.Parameter(base[0]), empty=torch.zeros(0, 3),
        half=torch.tensor([1.5, -2.0]).half(), brain=torch.tensor([1.5, -2.0]).bfloat16(), double=torch.tensor([1.5, -2.0]).double(),
        long=torch.tensor([7, -8]), int=torch.tensor([7, -8], dtype=torch.int32), short=torch.tensor([7, -8], dtype=torch.int16),
        char=torch.tensor([7, -8], dtype=torch.int8), byte=torch.tensor([7, 200], dtype=torch.uint8), bool=torch.tensor([True, False]))
    torch.save(views, OUT / "views.pth")
    torch.save(views, OUT / "views_protocol4.bin", pickle_protocol=4)
    torch.save({"w": torch.zeros(1), "code": print}, OUT / "refused.pth")
    torch.jit.script(Node(half(under("visual.", openai(clip)), torch.float16))).save(str(OUT / "clip_torchscript.pt"))

    # A file in shards.
    names = sorted(vit)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    (OUT / "sharded").mkdir(exist_ok=True)
    for file, part in shards.items():
        save(f"sharded/{file}", {name: vit[name] for name in part})
    index = {"metadata": {"total_size": 0}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (OUT / "sharded/model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")

    # Resizes by F.interpolate(mode="bicubic", align_corners=False).
    resizes = {}
    positions = torch.randn(1, 1 + 8 * 8, 5, generator=generator)
    resizes["positions"] = positions
    for grid in (6, 13):
        planes = positions[:, 1:].reshape(1, 8, 8, 5).permute(0, 3, 1, 2)
        planes = F.interpolate(planes, (grid, grid), mode="bicubic", align_corners=False)
        resizes[f"positions_{grid}"] = torch.cat([positions[:, :1], planes.permute(0, 2, 3, 1).flatten(1, 2)], 1)
    images = torch.rand(2, 3, 16, 12, generator=generator)
    resizes["images"] = images
    for h, w in ((14, 10), (9, 25), (1, 1)):
        resizes[f"images_{h}x{w}"] = F.interpolate(images, (h, w), mode="bicubic", align_corners=False)
    save("resizes.safetensors", resizes)


main()
