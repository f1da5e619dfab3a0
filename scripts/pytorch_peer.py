"""The same steps in PyTorch, eager and in float32, to be timed beside `maskalign bench`.

    pip install torch
    python scripts/pytorch_peer.py --job pretrain --arch base --batch 16 --steps 3 --threads 2

Random weights and new random images every step, as there. The jobs:

* pretrain: MaskAlign's step (arXiv 2211.08887). A CLIP ViT, frozen, sees the whole image; 30 % of the patches are drawn
  by its last class attention; a ViT of the same size sees those; a learned mix of its levels and a linear head for each
  of the last five are compared with the teacher's normalised levels; AdamW.
* finetune: the whole image, mean of the patch tokens, a norm, 1000 classes, AdamW.
* features: the whole image, forward only.

The last line printed is JSON: `images_per_s_best`, `images_per_s_median` and `peak_mib`.
"""

import argparse
import json
import resource
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F

WIDTHS = {"base": (768, 12), "tiny": (192, 3)}
DEPTH, PATCH, SIDE = 12, 16, 224
PATCHES = (SIDE // PATCH) ** 2
COMPARED = range(DEPTH - 5, DEPTH)


class QuickGelu(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, dim, heads, act, eps, drop_path):
        super().__init__()
        self.heads, self.drop_path = heads, drop_path
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), act, nn.Linear(4 * dim, dim))

    def forward(self, x, with_attention=False):
        batch, tokens, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = None
        if with_attention:
            # The class token's row alone is wanted, over the patches and averaged over the heads.
            scores = q[:, :, :1] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            seen = scores.softmax(-1)[:, :, 0, 1:].mean(1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim)
        x = x + self.dropped(self.proj(mixed))
        x = x + self.dropped(self.mlp(self.norm2(x)))
        return x, seen

    def dropped(self, branch):
        if not self.training or self.drop_path == 0:
            return branch
        kept = torch.empty(len(branch), 1, 1).bernoulli_(1 - self.drop_path)
        return branch * (kept / (1 - self.drop_path))


class Tower(nn.Module):
    def __init__(self, arch, clip, drop_path=0.0):
        super().__init__()
        dim, heads = WIDTHS[arch]
        self.embed = nn.Conv2d(3, dim, PATCH, PATCH, bias=not clip)
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, PATCHES + 1, dim), requires_grad=False)
        self.first = nn.LayerNorm(dim) if clip else nn.Identity()
        act, eps = (QuickGelu(), 1e-5) if clip else (nn.GELU(), 1e-6)
        self.blocks = nn.ModuleList(Block(dim, heads, act, eps, drop_path * i / (DEPTH - 1)) for i in range(DEPTH))

    def forward(self, images, visible=None):
        """The tokens after each block, and the last block's class attention where every patch is seen."""
        x = self.embed(images).flatten(2).transpose(1, 2) + self.positions[:, 1:]
        if visible is not None:
            x = x.gather(1, visible[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([(self.cls + self.positions[:, :1]).expand(len(x), -1, -1), x], 1)
        x = self.first(x)
        levels, seen = [], None
        for i, block in enumerate(self.blocks):
            x, seen = block(x, with_attention=not self.training and visible is None and i == DEPTH - 1)
            levels.append(x)
        return levels, seen


class Pretrain(nn.Module):
    def __init__(self, arch):
        super().__init__()
        dim, _ = WIDTHS[arch]
        self.student, self.teacher = Tower(arch, clip=False, drop_path=0.1), Tower(arch, clip=True)
        self.teacher.requires_grad_(False)
        self.mix = nn.Parameter(torch.eye(DEPTH) + 0.01)
        self.heads = nn.ModuleList(nn.Linear(dim, dim) for _ in COMPARED)

    def forward(self, images):
        with torch.no_grad():
            self.teacher.eval()
            targets, seen = self.teacher(images)
            visible = torch.multinomial(seen, PATCHES)[:, : int(PATCHES * (1 - 0.7))]
            rows = torch.cat([torch.zeros_like(visible[:, :1]), visible + 1], 1)
        levels, _ = self.student(images, visible)
        loss = 0.0
        for head, i in zip(self.heads, COMPARED):
            mixed = sum(weight * level for weight, level in zip(self.mix[i], levels))
            whitened = F.layer_norm(targets[i], targets[i].shape[-1:])
            target = whitened.gather(1, rows[..., None].expand(-1, -1, whitened.shape[-1]))
            loss = loss + 2 * F.smooth_l1_loss(head(mixed), target) / len(COMPARED)
        return loss


class Finetune(nn.Module):
    def __init__(self, arch):
        super().__init__()
        dim, _ = WIDTHS[arch]
        self.student, self.norm, self.head = Tower(arch, clip=False, drop_path=0.2), nn.LayerNorm(dim), nn.Linear(dim, 1000)

    def forward(self, images):
        levels, _ = self.student(images)
        logits = self.head(self.norm(levels[-1][:, 1:].mean(1)))
        return F.cross_entropy(logits, torch.full_like(logits, 1e-3))


class Features(nn.Module):
    def __init__(self, arch):
        super().__init__()
        self.student = Tower(arch, clip=False)

    @torch.no_grad()
    def forward(self, images):
        # Training mode would change nothing here but the unused attention.
        levels, _ = self.student(images)
        return levels[-1][:, 1:].mean(1)


JOBS = {"pretrain": Pretrain, "finetune": Finetune, "features": Features}


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--job", choices=JOBS, default="pretrain")
    options.add_argument("--arch", choices=WIDTHS, default="base")
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--steps", type=int, default=3, help="steps that count; one more comes first")
    options.add_argument("--threads", type=int, default=2)
    options = options.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = JOBS[options.job](options.arch).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    seconds = []
    for _ in range(options.steps + 1):
        images = torch.randn(options.batch, 3, SIDE, SIDE)
        begin = time.perf_counter()
        loss = model(images)
        if options.job != "features":
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        seconds.append(time.perf_counter() - begin)
    counted = seconds[1:]
    print(json.dumps({
        "job": options.job,
        "arch": options.arch,
        "batch": options.batch,
        "threads": options.threads,
        "torch": torch.__version__,
        "images_per_s_best": options.batch / min(counted),
        "images_per_s_median": options.batch / statistics.median(counted),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }))


if __name__ == "__main__":
    main()
