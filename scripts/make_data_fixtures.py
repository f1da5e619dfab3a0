#!/usr/bin/env python3
"""Records what Pillow and torchvision do, for the tests of datasets, transforms and decoding.

usage: python3 scripts/make_data_fixtures.py        (needs: pip install pillow torch torchvision timm)

Writes maskalign-core/tests/fixtures/data (oracle.json, decode/) and tests/fixtures/{images,bad_images}.
"""
import io
import json
import math
import random
import tempfile
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import PIL
import timm
import torch
import torchvision
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "maskalign-core/tests/fixtures/data"
MODES = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}


def noise(width, height):
    """The upper bytes of a linear congruential generator, the same in the tests."""
    state, values = 1, bytearray()
    for _ in range(width * height * 3):
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        values.append(state >> 24)
    return Image.frombytes("RGB", (width, height), bytes(values))


def described(image):
    return {"size": list(image.size), "crc32": zlib.crc32(image.tobytes())}


def resize_cases():
    cases = []
    boxes = [
        # image, box (left, top, width, height), new size
        ((500, 375), (0, 0, 500, 375), (224, 224)),
        ((500, 375), (31, 17, 391, 287), (224, 224)),
        ((64, 48), (0, 0, 64, 48), (224, 224)),
        ((224, 224), (0, 0, 224, 224), (196, 196)),
        ((97, 53), (5, 3, 31, 47), (31, 16)),
        ((97, 53), (5, 3, 31, 47), (40, 47)),
        ((97, 53), (5, 3, 31, 47), (31, 47)),
        ((97, 53), (96, 52, 1, 1), (7, 5)),
        ((97, 53), (0, 10, 97, 1), (9, 3)),
        ((97, 53), (10, 0, 1, 53), (3, 9)),
        ((97, 53), (0, 0, 97, 53), (1, 1)),
        ((28, 28), (3, 2, 20, 23), (28, 28)),
        ((1, 1), (0, 0, 1, 1), (1, 1)),
        ((1, 1), (0, 0, 1, 1), (64, 33)),
        ((700, 11), (0, 0, 700, 11), (13, 29)),
        ((33, 19), (0, 0, 33, 19), (11, 10)),
        # Height shrinks by twice what width does, and by one pixel more or less: where Pillow 13 changes the order.
        ((300, 400), (0, 0, 300, 400), (250, 300)),
        ((300, 400), (0, 0, 300, 400), (250, 299)),
        ((300, 400), (0, 0, 300, 400), (250, 301)),
        ((40, 90), (2, 3, 30, 80), (33, 79)),
    ]
    for mode in MODES:
        for size, (left, top, width, height), new in boxes:
            crop = noise(*size).crop((left, top, left + width, top + height))
            filtered = crop.resize(new, getattr(Image, mode.upper()))
            box = {"left": left, "top": top, "width": width, "height": height}
            cases.append({"image": size, "crop": box, "interpolation": mode, **described(filtered)})
    return cases


def transform_cases():
    cases = []
    for size in [(500, 375), (375, 500), (33, 19), (19, 33), (1, 1), (5, 200)]:
        for option in [224, [20, 30], [31, 8], 7]:
            for mode in MODES:
                out = transforms.Resize(option, MODES[mode])(noise(*size))
                cases.append({"image": size, "resize": {"size": option, "interpolation": mode}, **described(out)})
            out = transforms.CenterCrop(option)(noise(*size))
            cases.append({"image": size, "center_crop": {"size": option}, **described(out)})
    return cases


def augment_cases():
    """timm's operations by name, at magnitudes and in both directions, with the settings of fine-tuning."""
    from timm.data import auto_augment

    hparams = {"img_mean": (124, 116, 104), "interpolation": Image.BICUBIC}
    size, cases = (53, 37), []
    images = {"noise": noise(*size), "smooth": noise(7, 5).resize(size, Image.BICUBIC)}
    for name in auto_augment._RAND_INCREASING_TRANSFORMS:
        for magnitude in [3.7, 9, 9.9]:
            for sign in [1, -1]:
                op = auto_augment.AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=hparams)
                for kind, image in images.items():
                    # What draws the direction: a number above one half makes it negative.
                    with mock.patch.object(random, "random", return_value=0.0 if sign > 0 else 1.0):
                        out = op(image)
                    case = {"op": name, "magnitude": magnitude, "sign": sign, "kind": kind}
                    cases.append({**case, "image": size, "crc32": described(out)["crc32"]})
    return cases


def erasing_law():
    """Means over 40,000 boxes of timm's RandomErasing on 96 x 96 pixels."""
    from timm.data.random_erasing import RandomErasing

    random.seed(0)
    erase = RandomErasing(probability=1.0, mode="const", device="cpu")
    rows = []
    for _ in range(40_000):
        image = torch.ones(1, 96, 96)
        erase(image)
        rows_hit, columns_hit = (image[0] == 0).any(1).nonzero(), (image[0] == 0).any(0).nonzero()
        top, left = int(rows_hit[0]), int(columns_hit[0])
        h, w = len(rows_hit), len(columns_hit)
        rows.append((h * w / 96**2, math.log(h / w), top + h / 2, left + w / 2))
    rows = np.array(rows)
    names = ["area", "log_aspect", "center_y", "center_x"]
    return {"size": 96, "mean": dict(zip(names, rows.mean(0).tolist())), "std": dict(zip(names, rows.std(0).tolist()))}


def box_law():
    """Means over 40,000 draws of RandomResizedCrop, and the boxes where no draw can fit."""
    torch.manual_seed(0)
    laws = []
    for size, scale, ratio in [
        ((500, 375), (0.08, 1.0), (3 / 4, 4 / 3)),
        ((500, 375), (0.2, 1.0), (3 / 4, 4 / 3)),
        ((300, 100), (0.2, 1.0), (3 / 4, 4 / 3)),
        ((28, 28), (0.5, 0.9), (0.5, 1.5)),
    ]:
        width, height = size
        image = torch.empty(3, height, width)
        rows = []
        for _ in range(40_000):
            i, j, h, w = transforms.RandomResizedCrop.get_params(image, scale, ratio)
            rows.append((h * w / (height * width), math.log(w / h), (i + h / 2) / height, (j + w / 2) / width, i, j))
        rows = np.array(rows)
        names = ["area", "log_shape", "center_y", "center_x", "top", "left"]
        laws.append({
            "image": size, "scale": scale, "ratio": ratio,
            "mean": dict(zip(names, rows.mean(0).tolist())), "std": dict(zip(names, rows.std(0).tolist())),
        })
    middles = []
    for size in [(1000, 10), (10, 1000), (401, 100), (100, 401), (7, 2), (2, 7)]:
        width, height = size
        i, j, h, w = transforms.RandomResizedCrop.get_params(torch.empty(3, height, width), (1.0, 1.0), (3 / 4, 4 / 3))
        middles.append({"image": size, "crop": {"left": j, "top": i, "width": w, "height": h}})
    return {"laws": laws, "middles": middles}


def folder_order():
    paths = [
        "b/2.jpg", "b/10.JPG", "b/1.png", "a/x.jpeg", "a/z/deep.jpg", "a/z-other/beside.jpg", "a/z/y/deeper.webp",
        "a/Z/upper.bmp", "B/upper.ppm", "a/notes.txt", "a-b/dash.tif", "a.b/dot.tiff", "10/ten.pgm", "9/nine.jpg",
        "é/accent.jpg", "a/.hidden.jpg", "a/jpg", "a/no.jpg.txt", "beside.jpg",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for path in paths:
            target = Path(folder, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(b"")
        data = torchvision.datasets.ImageFolder(folder)
        samples = [[str(Path(path).relative_to(folder)), label] for path, label in data.samples]
    return {"paths": paths, "classes": data.classes, "samples": samples}


def decode_fixtures():
    """One small file a format and mode, beside what Pillow's convert("RGB") gives for it."""
    folder = CORE / "decode"
    folder.mkdir(parents=True, exist_ok=True)
    width, height = 13, 9
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([x * 19, y * 27, 255 - x * 9 - y * 12], -1).clip(0, 255).astype(np.uint8)
    rgb = Image.fromarray(smooth)
    sharp = noise(width, height)
    alpha = Image.fromarray((x * 18).astype(np.uint8))
    grey_alpha = Image.merge("LA", (sharp.convert("L"), alpha))
    rgba = sharp.copy()
    rgba.putalpha(alpha)
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = sharp.quantize(16)
    files = {
        "rgb.jpg": (rgb, {"quality": 90}),
        "rgb444.jpg": (rgb, {"quality": 90, "subsampling": 0}),
        "progressive.jpg": (rgb, {"quality": 90, "progressive": True}),
        "restarts.jpg": (rgb, {"quality": 90, "restart_marker_blocks": 1}),
        "rotated_by_exif.jpg": (rgb, {"quality": 90, "exif": exif}),
        "grey.jpg": (rgb.convert("L"), {"quality": 90}),
        "cmyk.jpg": (rgb.convert("CMYK"), {"quality": 95}),
        "rgb.png": (sharp, {}),
        "grey.png": (sharp.convert("L"), {}),
        "bilevel.png": (sharp.convert("1"), {}),
        "grey_alpha.png": (grey_alpha, {}),
        "rgba.png": (rgba, {}),
        "palette.png": (palette, {}),
        "palette_transparent.png": (palette, {"transparency": 3}),
        "rgb.bmp": (sharp, {}),
        "rgb.ppm": (sharp, {}),
        "grey.pgm": (sharp.convert("L"), {}),
        "rgb.tiff": (sharp, {}),
        "lzw.tiff": (sharp, {"compression": "tiff_lzw"}),
        "lossless.webp": (sharp, {"lossless": True}),
        "one_pixel.png": (sharp.crop((0, 0, 1, 1)), {}),
        "one_pixel.jpg": (rgb.crop((3, 3, 4, 4)), {"quality": 90}),
    }
    for name, (image, options) in files.items():
        image.save(folder / name, **options)
    import struct

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    deep = (np.asarray(sharp).astype(np.uint16) << 8 | 0x9C).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    (folder / "rgb16.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", width, height, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    for name in [*files, "rgb16.png"]:
        (folder / f"{name}.rgb").write_bytes(Image.open(folder / name).convert("RGB").tobytes())


def end_to_end_images():
    """Photo-like files of several sizes in two classes, and a folder with bad ones among them."""
    rng = np.random.default_rng(0)
    sizes = {"blobs": [(120, 90), (90, 120), (101, 77), (64, 64)], "stripes": [(96, 96), (130, 85), (75, 111), (40, 30)]}

    def picture(kind, width, height):
        y, x = np.mgrid[0:height, 0:width] / max(width, height)
        angle, phase = rng.uniform(0, math.pi), rng.uniform(0, 6)
        if kind == "stripes":
            wave = np.sin(25 * (x * math.cos(angle) + y * math.sin(angle)) + phase)
        else:
            centers = rng.uniform(0, 1, (3, 2))
            wave = sum(np.exp(-40 * ((x - a) ** 2 + (y - b) ** 2)) for a, b in centers) * 2 - 1
        color = rng.uniform(60, 195, 3) + rng.uniform(40, 60, 3) * wave[..., None] + rng.normal(0, 4, (height, width, 3))
        return Image.fromarray(color.clip(0, 255).astype(np.uint8))

    out = ROOT / "tests/fixtures"
    for kind, each in sizes.items():
        (out / "images" / kind).mkdir(parents=True, exist_ok=True)
        for number, size in enumerate(each):
            picture(kind, *size).save(out / "images" / kind / f"{number}.jpg", quality=85)
    bad = out / "bad_images"
    for kind in sizes:
        (bad / kind).mkdir(parents=True, exist_ok=True)
        for number in range(2):
            picture(kind, 60, 50).save(bad / kind / f"good_{number}.jpg", quality=80)
    whole = io.BytesIO()
    picture("stripes", 80, 60).save(whole, "jpeg", quality=85)
    (bad / "stripes" / "a_truncated.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) * 2 // 3])
    (bad / "blobs" / "text.jpg").write_text("This is not an image.\n")


def main():
    random.seed(0)
    CORE.mkdir(parents=True, exist_ok=True)
    oracle = {
        "recorded_with": {"pillow": PIL.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__},
        "resize": resize_cases(),
        "transforms": transform_cases(),
        "erasing_law": erasing_law(),
        "augment": augment_cases(),
        "box_law": box_law(),
        "image_folder": folder_order(),
    }
    (CORE / "oracle.json").write_text(json.dumps(oracle, indent=1, ensure_ascii=False) + "\n")
    decode_fixtures()
    end_to_end_images()


if __name__ == "__main__":
    main()
