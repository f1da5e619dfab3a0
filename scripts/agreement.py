#!/usr/bin/env python3
"""Whole runs of MaskAlign beside the same runs in PyTorch: makes the numbers and the tables of docs/agreement.md.

    cargo build --release --bin maskalign
    pip install torch torchvision timm safetensors pyyaml blake3
    python scripts/agreement.py losses            # the first 50 losses, from shared weights, crops and masks
    python scripts/agreement.py runs --side maskalign
    python scripts/agreement.py runs --side pytorch
    python scripts/agreement.py table             # writes the tables; needs the standard library alone

The PyTorch side reads the numbers of a recipe from `maskalign show --resolved` and nothing else of this project: towers,
stochastic depth, layer decay and its groups are timm's, crops and flips torchvision's, resizing Pillow's, AdamW, clipping,
BatchNorm and the losses PyTorch's.

`losses` needs the draws of a run. A stream of random numbers is ChaCha with 8 rounds, and its key is the BLAKE3 hash of
seed, epoch, image and purpose, so they can be drawn again here. The initial weights are in the checkpoint after the first
step, whose learning rate is 0 at the beginning of the warm-up.

Fashion-MNIST is Debian's package dataset-fashion-mnist (or $FASHION_MNIST_DIR).
"""

import argparse
import functools
import gzip
import json
import math
import os
import pathlib
import statistics
import struct
import subprocess
import sys
import tempfile

from tables import rows_of, write_rows, write_tables

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "agreement.md"
RUNS = ROOT / "docs" / "agreement_runs.csv"
LOSSES = ROOT / "docs" / "agreement_losses.csv"
JOBS = ("finetune", "maskalign", "mae")
# What each job measures, and what the tables call it.
MEASURES = {
    "finetune": [("accuracy", "fine-tuning from random initialisation, accuracy")],
    "maskalign": [("knn", "MaskAlign, k-NN"), ("probe", "MaskAlign, linear probe")],
    "mae": [("knn", "MAE, k-NN"), ("probe", "MAE, linear probe")],
}
# Fixed beforehand.
SEEDS = range(5)
MOST_POINTS = 1.0
STEPS = 50
MOST_LOSS = 1e-4


# ---------------------------------------------------------------------------------------------------- recipes and data


def recipe(options, job):
    """The recipe of a job with every default filled in, as `maskalign show` prints it."""
    import yaml

    file = ROOT / "recipes" / "agreement" / f"{job}.yaml"
    shown = subprocess.run([options.maskalign, "show", file, "--resolved"], capture_output=True, text=True, check=True)
    return yaml.safe_load(shown.stdout)


def read_idx(path):
    import numpy

    data = gzip.decompress(pathlib.Path(path).read_bytes())
    dims = struct.unpack(f">{data[3]}I", data[4 : 4 + 4 * data[3]])
    return numpy.frombuffer(data, numpy.uint8, offset=4 + 4 * data[3]).reshape(dims).copy()


def dataset(data):
    """Grey images and labels, as arrays of bytes."""
    if data["dataset"]["type"] == "sample":
        folder = ROOT / "maskalign-core" / "data" / "fashion_mnist"
        files = [folder / f"{data['dataset']['split']}-{what}.idx.gz" for what in ("images", "labels")]
    else:
        files = [data["dataset"]["images"], data["dataset"]["labels"]]
    return [read_idx(file) for file in files]


# ---------------------------------------------------------------------------------------------------- random draws


class Keyed:
    """A stream of MaskAlign: ChaCha8 keyed by the BLAKE3 hash of (seed, epoch, sample, purpose)."""

    def __init__(self, seed, purpose, epoch, sample, words):
        import blake3
        import numpy

        key = struct.pack("<3Q", seed, epoch, sample) + purpose.encode()
        key = numpy.frombuffer(blake3.blake3(key).digest(), "<u4")
        blocks = -(-words // 8)
        counter = numpy.arange(blocks, dtype=numpy.uint32)
        state = [numpy.full(blocks, word, numpy.uint32) for word in struct.unpack("<4I", b"expand 32-byte k")]
        state += [numpy.full(blocks, word, numpy.uint32) for word in key]
        state += [counter] + [numpy.zeros(blocks, numpy.uint32)] * 3
        x = [word.copy() for word in state]

        def quarter(a, b, c, d):
            for first, second, mixed, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
                x[first] += x[second]
                x[mixed] ^= x[first]
                x[mixed] = (x[mixed] << numpy.uint32(turn)) | (x[mixed] >> numpy.uint32(32 - turn))

        for _ in range(4):
            for column in range(4):
                quarter(column, 4 + column, 8 + column, 12 + column)
            for diagonal in range(4):
                quarter(diagonal, 4 + (diagonal + 1) % 4, 8 + (diagonal + 2) % 4, 12 + (diagonal + 3) % 4)
        out = numpy.stack([word + start for word, start in zip(x, state)], 1).astype("<u4")
        self.words = iter(out.reshape(-1).view("<u8").tolist())

    def uniform(self):
        return (next(self.words) >> 11) * 2.0**-53

    def below(self, n):
        """Lemire's method."""
        product = next(self.words) * n
        while product % 2**64 < n and product % 2**64 < (2**64 - n) % n:
            product = next(self.words) * n
        return product >> 64

    def permutation(self, n):
        order = list(range(n))
        for last in range(n - 1, 0, -1):
            chosen = self.below(last + 1)
            order[last], order[chosen] = order[chosen], order[last]
        return order


class SharedDraws:
    """The draws of a run of MaskAlign with this seed."""

    def __init__(self, seed):
        self.seed = seed

    def order(self, epoch, count):
        return Keyed(self.seed, "shuffle", epoch, 0, count + 64).permutation(count)

    def crop(self, options, width, height, epoch, index):
        """(top, left, height, width) and whether the image is mirrored."""
        stream = Keyed(self.seed, "augment", epoch, index, 48)
        crop, flip = options
        low, high = (math.log(ratio) for ratio in crop["ratio"])
        least, most = crop["scale"]
        for _ in range(10):
            area = width * height * (least + (most - least) * stream.uniform())
            shape = math.exp(low + (high - low) * stream.uniform())
            w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
            if 0 < w <= width and 0 < h <= height:
                top = stream.below(height - h + 1)
                left = stream.below(width - w + 1)
                return (top, left, h, w), stream.uniform() < flip["p"]
        return (0, 0, height, width), stream.uniform() < flip["p"]

    def visible(self, kept, patches, attention, epoch, indices):
        import torch

        rows = []
        for row, index in enumerate(indices):
            stream = Keyed(self.seed, "mask", epoch, index, 2 * patches)
            if attention is None:
                order = stream.permutation(patches)
            else:
                # The largest of log weight + Gumbel noise: a draw without replacement in proportion to the weights.
                noise = [-math.log(-math.log(max(stream.uniform(), sys.float_info.min))) for _ in range(patches)]
                keys = [math.log(weight) + more for weight, more in zip(attention[row].tolist(), noise)]
                order = sorted(range(patches), key=lambda i: (-keys[i], i))
            rows.append(order[:kept])
        return torch.tensor(rows)

    def branches(self, rate, depth, epoch, indices):
        """For each block the factors of both branches, for each image."""
        import torch

        factors = torch.empty(depth, 2, len(indices))
        for column, index in enumerate(indices):
            stream = Keyed(self.seed, "drop path", epoch, index, 2 * depth)
            for block in range(depth):
                dropped = rate * block / max(depth - 1, 1)
                for branch in range(2):
                    factors[block, branch, column] = 0.0 if stream.uniform() < dropped else 1 / (1 - dropped)
        return factors


class OwnDraws:
    """Draws of PyTorch's and torchvision's own."""

    def __init__(self, seed):
        import torch

        torch.manual_seed(seed)

    def order(self, _, count):
        import torch

        return torch.randperm(count).tolist()

    def crop(self, options, width, height, *_):
        import torch
        from torchvision.transforms import RandomResizedCrop

        crop, flip = options
        # It looks at the size alone.
        image = torch.empty(1, height, width)
        box = RandomResizedCrop.get_params(image, crop["scale"], crop["ratio"])
        return box, float(torch.rand(())) < flip["p"]

    def visible(self, kept, patches, attention, _, indices):
        import torch

        if attention is None:
            return torch.rand(len(indices), patches).argsort(1)[:, :kept]
        return torch.multinomial(attention, patches)[:, :kept]

    def branches(self, *_):
        """timm draws them."""
        return None


# ---------------------------------------------------------------------------------------------------- models


def towers():
    """What needs torch, as one namespace, so that the tables can be made without it."""
    import timm
    import torch
    from timm.models.vision_transformer import Block
    from torch import nn
    from torch.nn import functional as F

    def xavier(module):
        """Xavier-uniform for linear layers and for the patch embedding as a matrix, zero biases."""
        for layer in module.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(layer.weight.data.view(len(layer.weight), -1))
                nn.init.zeros_(layer.bias)

    def truncated(parameter, std):
        nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)

    def sincos(dim, side):
        """MAE's positions: half of the channels for the column, half for the row; sines, then cosines."""
        rates = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
        row, column = (torch.arange(side * side) // side).double(), (torch.arange(side * side) % side).double()
        angles = [place[:, None] * rates for place in (column, row)]
        table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1)
        return torch.cat([torch.zeros(1, dim, dtype=torch.float64), table]).float()[None]

    class Given(nn.Module):
        """Stochastic depth by given factors."""

        factors = None

        def forward(self, x):
            return x * self.factors[:, None, None] if self.training else x

    class Tower(timm.models.VisionTransformer):
        """timm's, which also shows its levels and sees a choice of patches."""

        def __init__(self, arch, size, drop_path=0.0, **more):
            super().__init__(
                img_size=size, patch_size=arch["patch"], embed_dim=arch["dim"], depth=arch["depth"],
                num_heads=arch["heads"], mlp_ratio=arch["mlp"] / arch["dim"], drop_path_rate=drop_path,
                **{"num_classes": 0, "global_pool": "token", **more},
            )
            self.rate, self.patches = drop_path, (size // arch["patch"]) ** 2
            self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
            self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)

        def initialise(self, positions):
            xavier(self)
            nn.init.normal_(self.cls_token, std=0.02)
            if positions == "learned":
                truncated(self.pos_embed, 0.02)
            else:
                self.pos_embed.data = sincos(self.embed_dim, math.isqrt(self.patches))
                self.pos_embed.requires_grad_(False)

        def normalise(self, images):
            return (images - self.mean) / self.std

        def take_factors(self, factors):
            if factors is None:
                return
            for block, (first, second) in zip(self.blocks, factors):
                if not isinstance(block.drop_path1, Given):
                    block.drop_path1, block.drop_path2 = Given(), Given()
                block.drop_path1.factors, block.drop_path2.factors = first, second

        def start(self, images, visible=None):
            x = self.patch_embed(self.normalise(images)) + self.pos_embed[:, 1:]
            if visible is not None:
                x = x.gather(1, visible[..., None].expand(-1, -1, x.shape[-1]))
            return torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)

        def levels(self, images, visible=None):
            x, levels = self.start(images, visible), []
            for block in self.blocks:
                x = block(x)
                levels.append(x)
            return levels

        def class_attention(self, before_last):
            """Of the last block, over the patches, the mean of its heads."""
            attention = self.blocks[-1].attn
            batch, tokens, dim = before_last.shape
            qkv = attention.qkv(self.blocks[-1].norm1(before_last))
            q, k, _ = qkv.view(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
            scores = q[:, :, :1] @ k.transpose(-1, -2) * (dim // attention.num_heads) ** -0.5
            return scores.softmax(-1)[:, :, 0, 1:].mean(1)

    class Finetune(nn.Module):
        def __init__(self, stage, size):
            super().__init__()
            student = stage["student"]
            self.student = Tower(
                student["arch"], size, float(student["drop_path"]), global_pool="avg", num_classes=10
            )
            self.student.initialise(student["positions"])
            truncated(self.student.head.weight, float(stage["head_std"]))
            self.smoothing = float(stage["label_smoothing"])

        def loss(self, images, labels, draws, epoch, indices):
            self.student.take_factors(draws.branches(self.student.rate, len(self.student.blocks), epoch, indices))
            return F.cross_entropy(self(images), labels, label_smoothing=self.smoothing)

        def forward(self, images):
            return self.student(self.student.normalise(images))

        def names(self):
            """Parameters by the names that MaskAlign's checkpoints have."""
            return dict(self.student.named_parameters())

    class Aligned(nn.Module):
        """MaskAlign (arXiv 2211.08887)."""

        def __init__(self, stage, size):
            super().__init__()
            student, objective = stage["student"], stage["objectives"]["align"]
            teacher = stage["teachers"]["teacher"]["arch"]
            self.student = Tower(student["arch"], size, float(student["drop_path"]))
            self.student.initialise(student["positions"])
            self.teacher = Tower(teacher, size).eval().requires_grad_(False)
            load_teacher(self.teacher)
            self.compared = range(teacher["depth"] - objective["target"]["levels"]["last"], teacher["depth"])
            self.mix = nn.Parameter(torch.full((teacher["depth"], student["arch"]["depth"]), 1 / student["arch"]["depth"]))
            self.heads = nn.ModuleList(nn.Linear(student["arch"]["dim"], teacher["dim"]) for _ in range(teacher["depth"]))
            xavier(self.heads)
            self.weight, self.kept = float(objective["weight"]), kept(stage, self.student.patches)

        def loss(self, images, _, draws, epoch, indices):
            self.student.take_factors(draws.branches(self.student.rate, len(self.student.blocks), epoch, indices))
            with torch.no_grad():
                targets = self.teacher.levels(images)
                attention = self.teacher.class_attention(targets[-2])
                visible = draws.visible(self.kept, self.student.patches, attention, epoch, indices)
                rows = torch.cat([torch.zeros_like(visible[:, :1]), visible + 1], 1)[..., None]
            levels = torch.stack(self.student.levels(images, visible))
            total = 0.0
            for i in self.compared:
                mixed = torch.einsum("l,lbtc->btc", self.mix[i], levels)
                target = F.layer_norm(targets[i], targets[i].shape[-1:])
                target = target.gather(1, rows.expand(-1, -1, target.shape[-1]))
                total = total + F.smooth_l1_loss(self.heads[i](mixed), target) / len(self.compared)
            return self.weight * total

        def names(self):
            own = {name: p for name, p in self.student.named_parameters() if not name.startswith("head")}
            own["distill_weights"] = self.mix
            own.update({f"distill_heads.{name}": p for name, p in self.heads.named_parameters()})
            return own

    class Masked(nn.Module):
        """MAE (arXiv 2111.06377), with the pixels of a patch normalised."""

        def __init__(self, stage, size):
            super().__init__()
            student, decoder = stage["student"], stage["objectives"]["pixels"]["aligner"]
            self.student = Tower(student["arch"], size, float(student["drop_path"]))
            self.student.initialise(student["positions"])
            self.patch, dim = student["arch"]["patch"], decoder["dim"]
            norm = functools.partial(nn.LayerNorm, eps=1e-6)
            self.decoder_embed = nn.Linear(student["arch"]["dim"], dim)
            self.decoder_blocks = nn.ModuleList(
                Block(dim, decoder["heads"], 4.0, qkv_bias=True, norm_layer=norm) for _ in range(decoder["depth"])
            )
            self.decoder_norm, self.decoder_pred = norm(dim), nn.Linear(dim, 3 * self.patch**2)
            xavier(self.decoder_embed), xavier(self.decoder_blocks), xavier(self.decoder_pred)
            self.mask_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
            self.decoder_pos_embed = nn.Parameter(sincos(dim, math.isqrt(self.student.patches)), requires_grad=False)
            self.kept = kept(stage, self.student.patches)

        def loss(self, images, _, draws, epoch, indices):
            self.student.take_factors(draws.branches(self.student.rate, len(self.student.blocks), epoch, indices))
            patches = self.student.patches
            visible = draws.visible(self.kept, patches, None, epoch, indices)
            x = self.decoder_embed(self.student.norm(self.student.levels(images, visible)[-1]))
            full = self.mask_token.expand(len(x), patches, -1)
            full = full.scatter(1, visible[..., None].expand(-1, -1, x.shape[-1]), x[:, 1:])
            x = torch.cat([x[:, :1], full], 1) + self.decoder_pos_embed
            for block in self.decoder_blocks:
                x = block(x)
            predicted = self.decoder_pred(self.decoder_norm(x))[:, 1:]
            # Values of a patch are ordered row, column, channel.
            cut = F.unfold(self.student.normalise(images), self.patch, stride=self.patch).transpose(1, 2)
            pixels = cut.unflatten(2, (3, self.patch**2)).transpose(2, 3).flatten(2)
            pixels = (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, keepdim=True) + 1e-6).sqrt()
            masked = torch.ones(len(x), patches).scatter(1, visible, 0.0)
            return (((predicted - pixels) ** 2).mean(-1) * masked).sum() / masked.sum()

        def names(self):
            own = {name: p for name, p in self.student.named_parameters() if not name.startswith("head")}
            own.update({name: p for name, p in self.named_parameters() if not name.startswith("student.")})
            return own

    def kept(stage, patches):
        return int(patches * (1 - float(stage["masker"]["ratio"])))

    def load_teacher(teacher):
        from safetensors.torch import load_file

        values = load_file(ROOT / "maskalign-core" / "data" / "quickstart_teacher.safetensors")
        wanted = teacher.state_dict()
        teacher.load_state_dict({name: values[name].view(p.shape) for name, p in wanted.items()})

    return argparse.Namespace(Finetune=Finetune, Aligned=Aligned, Masked=Masked, truncated=truncated, torch=torch)


# ---------------------------------------------------------------------------------------------------- training


def rate(schedule, peak, epoch, epochs):
    """A linear warm-up, then half a cosine (MAE's `adjust_learning_rate`)."""
    warmup, least = float(schedule["warmup_epochs"]), float(schedule["min_lr"])
    if epoch < warmup:
        return peak * epoch / warmup
    return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def adamw(model, options, layer_decay):
    """timm's groups: by layer where rates differ, with vectors and `no_decay` apart."""
    import torch
    from timm.optim import param_groups_layer_decay

    decay, spared = float(options["weight_decay"]), options["no_decay"]
    if layer_decay != 1.0:
        groups = param_groups_layer_decay(model.student, decay, no_weight_decay_list=spared, layer_decay=layer_decay)
    else:
        trained = {name: p for name, p in model.names().items() if p.requires_grad}
        plain = [p for name, p in trained.items() if p.ndim <= 1 or name in spared]
        others = [p for name, p in trained.items() if not (p.ndim <= 1 or name in spared)]
        groups = [{"params": plain, "weight_decay": 0.0}, {"params": others, "weight_decay": decay}]
    betas = tuple(float(beta) for beta in options["betas"])
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=float(options["eps"]))


def batches(stage, images, labels, draws, steps=None):
    """(epoch with its fraction, epoch, places, images in [0, 1], labels), step by step."""
    import numpy
    import torch
    from PIL import Image

    size, count = stage["batch"]["effective"], len(images)
    per_epoch = count // size
    transforms = stage["data"]["transforms"]
    order, drawn = None, None
    for step in range(steps or round(float(stage["epochs"]) * per_epoch)):
        epoch, at = divmod(step, per_epoch)
        if drawn != epoch:
            order, drawn = draws.order(epoch, count), epoch
        indices = order[at * size : (at + 1) * size]
        chosen = images[indices]
        if transforms:
            made = []
            for index, image in zip(indices, chosen):
                (top, left, height, width), mirrored = draws.crop(transforms, image.shape[1], image.shape[0], epoch, index)
                image = Image.fromarray(image[top : top + height, left : left + width])
                image = image.resize((transforms[0]["size"],) * 2, Image.BICUBIC)
                made.append(numpy.asarray(image)[:, ::-1] if mirrored else numpy.asarray(image))
            chosen = numpy.stack(made)
        pixels = torch.from_numpy(chosen.astype(numpy.float32) / 255)[:, None].expand(-1, 3, -1, -1)
        yield step / per_epoch, epoch, indices, pixels, torch.from_numpy(labels[indices].astype(numpy.int64))


def train(model, stage, images, labels, draws, steps=None):
    """The losses of the steps."""
    import torch

    options = stage["optimizer"]
    size = stage["batch"]["effective"]
    peak = float(options["base_lr"]) * size / options["base_batch"]
    optimizer = adamw(model, options, float(stage.get("layer_decay", 1.0)))
    model.train()
    losses = []
    for at, epoch, indices, pixels, classes in batches(stage, images, labels, draws, steps):
        lr = rate(stage["schedule"], peak, at, float(stage["epochs"]))
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        loss = model.loss(pixels, classes, draws, epoch, indices)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if options["clip_norm"]:
            torch.nn.utils.clip_grad_norm_(list(model.parameters()), float(options["clip_norm"]))
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def in_parts(images, forward):
    import torch

    parts = torch.from_numpy(images).split(250)
    with torch.inference_mode():
        return torch.cat([forward((part / 255)[:, None].expand(-1, 3, -1, -1)) for part in parts])


def knn(stage, train_features, train_labels, test_features, test_labels):
    """DINO's votes: exp(cosine / 0.07) of the nearest."""
    import torch
    from torch.nn import functional as F

    train_features, test_features = F.normalize(train_features, dim=1), F.normalize(test_features, dim=1)
    similar, places = (test_features @ train_features.T).topk(stage["k"][0], 1)
    votes = torch.zeros(len(test_features), 10)
    votes.scatter_add_(1, train_labels[places], (similar / 0.07).exp())
    return (votes.argmax(1) == test_labels).float().mean().item()


def classifier(stage, torch, truncated, width):
    """A linear layer behind a BatchNorm."""
    nn = torch.nn
    head = nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=1e-6), nn.Linear(width, 10))
    truncated(head[1].weight, float(stage["head_std"]))
    nn.init.zeros_(head[1].bias)
    return head


def train_probe(stage, torch, head, draws, features, labels, steps=None):
    """Trains the classifier by LARS as MAE's probe is, and gives its losses. Images are not augmented, so that the frozen
    student's features are computed once."""
    options, size = stage["optimizer"], stage["batch"]["effective"]
    peak = float(options["base_lr"]) * size / options["base_batch"]
    momentum, trust = float(options["momentum"]), float(options["trust_coefficient"])
    directions = {p: torch.zeros_like(p) for p in head.parameters()}
    per_epoch, losses = len(features) // size, []
    for step in range(steps or round(float(stage["epochs"]) * per_epoch)):
        epoch, at = divmod(step, per_epoch)
        if at == 0:
            order = draws.order(epoch, len(features))
        chosen = order[at * size : (at + 1) * size]
        loss = torch.nn.functional.cross_entropy(head(features[chosen]), labels[chosen])
        head.zero_grad()
        loss.backward()
        losses.append(loss.item())
        lr = rate(stage["schedule"], peak, step / per_epoch, float(stage["epochs"]))
        with torch.no_grad():
            for p, direction in directions.items():
                gradient, length = p.grad, p.grad.norm()
                if p.ndim > 1 and p.norm() > 0 and length > 0:
                    gradient = gradient * (trust * p.norm() / length)
                direction.mul_(momentum).add_(gradient)
                p.sub_(lr * direction)
    head.eval()
    return losses


def probe(stage, torch, truncated, draws, train_features, train_labels, test_features, test_labels):
    head = classifier(stage, torch, truncated, train_features.shape[1])
    train_probe(stage, torch, head, draws, train_features, train_labels)
    with torch.inference_mode():
        return (head(test_features).argmax(1) == test_labels).float().mean().item()


# ---------------------------------------------------------------------------------------------------- the commands


def build(tools, job, stage, images):
    kind = {"finetune": tools.Finetune, "maskalign": tools.Aligned, "mae": tools.Masked}[job]
    return kind(stage, images.shape[1])


def in_pytorch(options, job, seed):
    tools = towers()
    torch = tools.torch
    torch.set_num_threads(options.threads)
    whole = recipe(options, job)["stages"]
    draws = OwnDraws(seed)
    stage = whole["train" if job == "finetune" else "pretrain"]
    images, labels = dataset(stage["data"])
    model = build(tools, job, stage, images)
    train(model, stage, images, labels, draws)
    classes = lambda labels: torch.from_numpy(labels.astype("int64"))
    if job == "finetune":
        images, labels = dataset(stage["eval"])
        right = in_parts(images, model).argmax(1) == classes(labels)
        return {"accuracy": right.float().mean().item()}
    model.eval()
    last = lambda images: model.student.levels(images)[-1]
    both = lambda images: (lambda x: torch.cat([x[:, 1:].mean(1), model.student.norm(x[:, 0])], 1))(last(images))
    searched, sought = dataset(whole["knn"]["train"]), dataset(whole["knn"]["test"])
    features = [in_parts(images, both) for images, _ in (searched, sought)]
    targets = [classes(labels) for _, labels in (searched, sought)]
    (mean, cls), (test_mean, test_cls) = (part.clone().chunk(2, 1) for part in features)
    return {
        "knn": knn(whole["knn"], mean, targets[0], test_mean, targets[1]),
        "probe": probe(whole["probe"], torch, tools.truncated, draws, cls, targets[0], test_cls, targets[1]),
    }


def in_maskalign(options, job, seed):
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "run"
        command = [options.maskalign, "run", ROOT / "recipes" / "agreement" / f"{job}.yaml", "--set", f"seed={seed}"]
        command += ["--threads", str(options.threads), "--quiet", "--out", out]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((out / "summary.json").read_text())
    if job == "finetune":
        return {"accuracy": summary["train"]["accuracy"]}
    return {"knn": summary["knn"]["student"]["accuracy"], "probe": summary["probe"]["accuracy"]}


def runs(options):
    """Adds what is not there yet: a line for each side, job, seed and measure."""
    side = {"maskalign": in_maskalign, "pytorch": in_pytorch}[options.side]
    for job in options.jobs:
        for seed in SEEDS:
            done = {(row["side"], row["job"], row["seed"]) for row in rows_of(options.csv)}
            if (options.side, job, str(seed)) in done:
                continue
            measured = side(options, job, seed)
            # Read again: the other side may be running too.
            rows = rows_of(options.csv)
            for measure, accuracy in measured.items():
                rows.append(dict(side=options.side, job=job, seed=seed, measure=measure, accuracy=f"{accuracy:.4f}"))
                print(*rows[-1].values(), flush=True)
            write_rows(options.csv, rows)


def losses(options):
    """The first losses of a run of each job, and those of the PyTorch side from its weights and draws."""
    from safetensors.torch import load_file

    tools = towers()
    torch = tools.torch
    torch.set_num_threads(options.threads)
    rows = []
    for job in options.jobs:
        whole = recipe(options, job)["stages"]
        name = "train" if job == "finetune" else "pretrain"
        trained = [stage for stage in (name, "probe") if stage in whole]
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder) / "run"
            command = [options.maskalign, "run", ROOT / "recipes" / "agreement" / f"{job}.yaml", "--steps", str(STEPS)]
            for stage in trained:
                command += ["--set", f"stages.{stage}.checkpoints={{every_steps: 1, keep_last: {STEPS}}}"]
            command += ["--set", "stages.train.eval=null"] if job == "finetune" else ["--set", "stages.knn=null"]
            command += [] if job == "finetune" else ["--set", "stages.probe.eval=null"]
            command += ["--threads", str(options.threads), "--quiet", "--out", out]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            ours = {stage: [line["loss"] for line in lines if line["stage"] == stage and "loss" in line] for stage in trained}
            first = {stage: load_file(out / "checkpoints" / stage / "step-00000001.safetensors") for stage in trained}
        images, labels = dataset(whole[name]["data"])
        model = build(tools, job, whole[name], images)
        with torch.no_grad():
            for parameter, tensor in model.names().items():
                value = first[name][f"model.{parameter}"].view(tensor.shape)
                if not tensor.requires_grad:
                    assert torch.allclose(tensor, value, atol=1e-6), f"{parameter} is another one"
                tensor.copy_(value)
        theirs = {name: train(model, whole[name], images, labels, SharedDraws(0), STEPS)}
        if "probe" in trained:
            # The student is the one that PyTorch trained, its classifier's first weights are shared.
            images, labels = dataset(whole["probe"]["data"])
            features = in_parts(images, lambda images: model.student.norm(model.student.levels(images)[-1][:, 0]))
            head = classifier(whole["probe"], torch, tools.truncated, features.shape[1])
            with torch.no_grad():
                for parameter in ("weight", "bias"):
                    value = first["probe"][f"model.head.1.{parameter}"]
                    getattr(head[1], parameter).copy_(value)
            labels = torch.from_numpy(labels.astype("int64"))
            theirs["probe"] = train_probe(whole["probe"], torch, head, SharedDraws(0), features.clone(), labels, STEPS)
        for stage in trained:
            what = job if stage == name else f"{job}, probe"
            assert len(ours[stage]) == len(theirs[stage]) == STEPS
            for step, (our, their) in enumerate(zip(ours[stage], theirs[stage])):
                rows.append(dict(job=what, step=step, maskalign=f"{our:.9g}", pytorch=f"{their:.9g}"))
            most = max(abs(our - their) for our, their in zip(ours[stage], theirs[stage]))
            print(f"{what}: loss {ours[stage][0]:.5f} to {ours[stage][-1]:.5f}, largest difference {most:.2e}", flush=True)
    write_rows(options.losses_csv, rows)


def tables():
    """The tables of the page, from the committed values."""
    measured = {}
    for row in rows_of(RUNS):
        measured.setdefault((row["job"], row["measure"], row["side"]), []).append(100 * float(row["accuracy"]))
    text = "| what | seeds | MaskAlign, % | PyTorch, % | difference of the means | within 1 point |\n|---|---|---|---|---|---|\n"
    for job in JOBS:
        for measure, name in MEASURES[job]:
            sides = [measured.get((job, measure, side), []) for side in ("maskalign", "pytorch")]
            if any(len(values) < 2 for values in sides):
                continue
            means, errors = zip(*((statistics.mean(v), statistics.stdev(v) / len(v) ** 0.5) for v in sides))
            cells = [f"{mean:.2f} ± {error:.2f}" for mean, error in zip(means, errors)]
            gap = means[0] - means[1]
            error = math.hypot(*errors)
            verdict = "yes" if abs(gap) <= MOST_POINTS else "**no**"
            seeds = " and ".join(sorted({str(len(values)) for values in sides}))
            text += f"| {name} | {seeds} | {' | '.join(cells)} | {gap:+.2f} ± {error:.2f} | {verdict} |\n"
    text += "\n| job | first loss | loss of step 50 | largest difference | within 1e-4 |\n|---|---|---|---|---|\n"
    losses = rows_of(LOSSES)
    for job in dict.fromkeys(row["job"] for row in losses):
        pairs = [(float(row["maskalign"]), float(row["pytorch"])) for row in losses if row["job"] == job]
        if pairs:
            most = max(abs(our - their) for our, their in pairs)
            verdict = "yes" if most <= MOST_LOSS else "**no**"
            text += f"| {job} | {pairs[0][0]:.5f} | {pairs[-1][0]:.5f} | {most:.1e} | {verdict} |\n"
    return text


def table(options):
    """Writes the tables between the page's two marks, or with --check says whether they are those."""
    write_tables(PAGE, "agreement.py", tables(), options.check)


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    built = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "maskalign"
    options.add_argument("command", choices=["losses", "runs", "table"])
    options.add_argument("--maskalign", default=built, help="the binary")
    options.add_argument("--side", choices=["maskalign", "pytorch"], default="maskalign")
    options.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--csv", type=pathlib.Path, default=RUNS, help="where `runs` adds its values")
    options.add_argument("--losses-csv", type=pathlib.Path, default=LOSSES, help="where `losses` writes its values")
    options.add_argument("--check", action="store_true", help="with `table`: write nothing, fail where the page differs")
    options = options.parse_args()
    {"losses": losses, "runs": runs, "table": table}[options.command](options)


if __name__ == "__main__":
    main()
