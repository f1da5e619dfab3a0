#!/usr/bin/env python3
"""Makes the embedded sample of Fashion-MNIST, byte for byte. Standard library only.

usage: python3 scripts/make_sample.py [--source DIR] [--out DIR] [--check]

The source is Debian's package dataset-fashion-mnist (apt-get install dataset-fashion-mnist). The training part of the
sample comes from the training part of the source, the test part from the test part. Every image occurs once: copies of
an earlier image are left out, and a test image that also occurs anywhere among the 60,000 training images of the source
is left out too, so that a model trained on the whole source has not seen the sample's test part either.
Classes take turns (0, 1, ..., 9, 0, 1, ...), so that the first N images of either part are balanced as well.

--check writes nothing and exits 1 if what is in --out differs from what would be written.
Another implementation of deflate than zlib's own may compress to other bytes: --check says so where only that differs.
"""
import argparse
import gzip
import hashlib
import struct
import sys
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
CLASSES = 10
# What fits, with the licence, in 3,000,000 bytes.
PARTS = {"train": ("train", 560), "test": ("t10k", 100)}


def read_idx(path):
    data = gzip.decompress(path.read_bytes())
    dims = data[3]
    shape = struct.unpack(f">{dims}I", data[4 : 4 + 4 * dims])
    return shape, data[4 + 4 * dims :]


def read_part(source, prefix):
    shape, pixels = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
    _, labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
    size = shape[1] * shape[2]
    return shape[1:], [pixels[i * size : (i + 1) * size] for i in range(shape[0])], labels


def choose(images, labels, per_class, seen):
    queues = [[] for _ in range(CLASSES)]
    for image, label in zip(images, labels):
        key = hashlib.sha256(image).digest()
        if key not in seen:
            seen.add(key)
            queues[label].append(image)
    return [(queues[c][turn], c) for turn in range(per_class) for c in range(CLASSES)]


def compress(data):
    """One gzip member without a name or a time: equal data give equal bytes."""
    body = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    tail = struct.pack("<2I", zlib.crc32(data), len(data) & 0xFFFFFFFF)
    return b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff" + body.compress(data) + body.flush() + tail


def make(source):
    files = {}
    size, train_images, train_labels = read_part(source, PARTS["train"][0])
    _, test_images, test_labels = read_part(source, PARTS["test"][0])
    whole_train = {hashlib.sha256(image).digest() for image in train_images}
    chosen = {
        "train": choose(train_images, train_labels, PARTS["train"][1], set()),
        "test": choose(test_images, test_labels, PARTS["test"][1], whole_train),
    }
    for part, rows in chosen.items():
        header = struct.pack(">4I", 0x803, len(rows), *size)
        files[f"{part}-images.idx.gz"] = header + b"".join(image for image, _ in rows)
        files[f"{part}-labels.idx.gz"] = struct.pack(">2I", 0x801, len(rows)) + bytes(label for _, label in rows)
    return files


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    a.add_argument("--out", type=Path, default=HERE.parent / "maskalign-core/data/fashion_mnist")
    a.add_argument("--check", action="store_true")
    a = a.parse_args()
    differs = False
    for name, data in make(a.source).items():
        path, packed = a.out / name, compress(data)
        if not a.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(packed)
            print(f"{path}: {len(packed)} bytes")
        elif not path.exists() or path.read_bytes() != packed:
            differs = True
            same = path.exists() and gzip.decompress(path.read_bytes()) == data
            print(f"{path}: {'same data, compressed differently' if same else 'differs'}")
    sys.exit(1 if differs else 0)


if __name__ == "__main__":
    main()
