"""Reads a run's TensorBoard file with TensorBoard's own reader and compares it with metrics.jsonl.

    python tests/tensorboard/check.py RUN
"""

import json
import pathlib
import struct
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def numbers(tag, value):
    """Every number under a value, with its tag."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from numbers(f"{tag}/{name}", inner)
    elif isinstance(value, (int, float)):
        yield tag, struct.unpack("f", struct.pack("f", value))[0]


run = pathlib.Path(sys.argv[1])
expected = {}
for line in (run / "metrics.jsonl").read_text().splitlines():
    record = json.loads(line)
    for name, value in record.items():
        if name not in ("stage", "step", "epoch"):
            for tag, number in numbers(f"{record['stage']}/{name}", value):
                expected.setdefault(tag, []).append((record.get("step", 0), number))

# 0: all of them, without a sample's gaps. What TensorBoard would forget, were it there twice, is counted too.
events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0}, purge_orphaned_data=False)
events.Reload()
found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
assert found == expected, f"TensorBoard reads {found}, where metrics.jsonl has {expected}"
for tag in ("pretrain/loss", "pretrain/lr", "pretrain/gradient_norm", "pretrain/images_per_s", "pretrain/knn/accuracy"):
    assert tag in found, f"{tag} is missing from {sorted(found)}"
for level in ("embed", "1"):
    assert len(found[f"knn/student/{level}/accuracy"]) == 1, f"level {level} is not there once"
for stage, count in (("pretrain", 40), ("finetune", 10)):
    steps = [step for step, _ in found[f"{stage}/loss"]]
    assert steps == list(range(count)), f"steps {steps} of {stage}"

# Pictures of pixels are there once, as the files beside them.
images = {tag: [image.encoded_image_string for image in events.Images(tag)] for tag in events.Tags()["images"]}
pictures = json.loads((run / "pictures/pictures.json").read_text())
files = {
    f"{picture['stage']}/{picture['name']}": [(run / f"pictures/{picture['stage']}.{picture['name']}.png").read_bytes()]
    for picture in pictures
    if picture.get("format", "png") == "png"
}
assert images == files, f"TensorBoard reads the images {sorted(images)}, where the run has {sorted(files)}"
for tag in ("pretrain/masks", "pretrain/attention-student", "pretrain/reconstructions-pixels", "knn/neighbours"):
    assert tag in images, f"{tag} is missing from {sorted(images)}"
print(f"tensorboard: {len(found)} tags, every step once; {len(images)} images")
