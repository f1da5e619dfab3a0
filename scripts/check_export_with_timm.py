"""Loads what `maskalign export --format timm` wrote into timm's VisionTransformer, strictly.

    pip install torch timm safetensors
    maskalign export runs/vitb --stage finetune --out student.safetensors
    python scripts/check_export_with_timm.py student.safetensors --heads 12

What the two compute is compared by maskalign-core/tests/timm.rs.
"""

import argparse

import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

parser = argparse.ArgumentParser()
parser.add_argument("file")
parser.add_argument("--heads", type=int, required=True)
options = parser.parse_args()

weights = load_file(options.file)
dim, _, patch, _ = weights["patch_embed.proj.weight"].shape
class_token = "cls_token" in weights
patches = weights["pos_embed"].shape[1] - class_token
pooled = "fc_norm.weight" in weights or not class_token
classes = len(weights["head.weight"]) if "head.weight" in weights else 0
model = VisionTransformer(
    img_size=patch * round(patches**0.5),
    patch_size=patch,
    embed_dim=dim,
    depth=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
    num_heads=options.heads,
    mlp_ratio=len(weights["blocks.0.mlp.fc1.weight"]) / dim,
    class_token=class_token,
    global_pool="avg" if pooled else "token",
    fc_norm="fc_norm.weight" in weights,
    num_classes=classes,
)
model.load_state_dict(weights, strict=True)
with torch.no_grad():
    answer = model.eval()(torch.randn(2, 3, *model.patch_embed.img_size))
assert answer.isfinite().all()
print(f"timm takes all {len(weights)} tensors and answers {list(answer.shape)}")
