#!/usr/bin/env python3
"""Times MaskAlign and a PyTorch peer in turn, and prints the tables of docs/performance.md.

    cargo build --release --bin maskalign
    pip install torch
    python scripts/compare_with_pytorch.py --rounds 5

Each figure is the median over the rounds, with the least and the greatest in brackets; a ratio is taken within a round,
so that a machine whose speed drifts says the same. Another peer (`--peer`) takes `--job --arch --batch --steps
--threads` and ends with a line of JSON that has `images_per_s_median` and `peak_mib`.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent

# name, recipe, job, the peer's architecture, batch, steps that count
AGAINST_THE_PEER = [
    ("ViT-B/16 student, CLIP-B/16 teacher, batch 16", "maskalign_vitb_clip", "pretrain", "base", 16, 3),
    ("ViT-Ti student and teacher, batch 32", "bench_vitti", "pretrain", "tiny", 32, 8),
    ("ViT-B fine-tuning, batch 8", "maskalign_vitb_clip", "finetune", "base", 8, 3),
    ("ViT-B features, batch 32", "maskalign_vitb_clip", "features", "base", 32, 3),
]

# name, options of both, options of each side, what is compared
AGAINST_ITSELF = [
    ("two threads against one, ViT-B, batch 16", ["--batch", "16"], ["--threads", "2"], ["--threads", "1"]),
    ("`--recompute`, ViT-B, batch 64", ["--batch", "64", "--threads", "2"], ["--recompute"], []),
]


def last_json(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def spread(values, digits=2):
    middle, least, greatest = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({least:.{digits}f} to {greatest:.{digits}f})"


def speeds(reports):
    return [report["images_per_s_median"] for report in reports]


def peak_mib(reports):
    return f"{max(report['peak_mib'] for report in reports):.0f}"


class Bench:
    def __init__(self, options):
        self.options = options

    def ours(self, recipe, *flags):
        return last_json([self.options.maskalign, "bench", recipe, "--json", *flags])

    def in_turn(self, first, second):
        """The reports of both for each round, one after the other."""
        pairs = [(first(), second()) for _ in range(self.options.rounds)]
        return list(zip(*pairs))

    def wanted(self, name):
        return not self.options.only or self.options.only in name

    def against_the_peer(self):
        print("| job | MaskAlign, images/s | PyTorch, images/s | ratio | share of the peak, % | memory, MiB | PyTorch, MiB |")
        print("|---|---|---|---|---|---|---|")
        for name, recipe, job, arch, batch, steps in AGAINST_THE_PEER:
            if not self.wanted(name):
                continue
            same = ["--job", job, "--batch", str(batch), "--steps", str(steps), "--threads", str(self.options.threads)]
            ours, theirs = self.in_turn(
                lambda: self.ours(recipe, *same),
                lambda: last_json([sys.executable, self.options.peer, "--arch", arch, *same]),
            )
            ratios = [a / b for a, b in zip(speeds(ours), speeds(theirs))]
            share = [100 * report["peak_share"] for report in ours if report["peak_share"]]
            cells = [name, spread(speeds(ours)), spread(speeds(theirs)), spread(ratios), spread(share, 0)]
            print("|", " | ".join([*cells, peak_mib(ours), peak_mib(theirs)]), "|", flush=True)

    def against_itself(self):
        print("\n| what | images/s | without, images/s | ratio | memory, MiB | without, MiB |")
        print("|---|---|---|---|---|---|")
        for name, same, with_it, without in AGAINST_ITSELF:
            if not self.wanted(name):
                continue
            run = lambda flags: lambda: self.ours("maskalign_vitb_clip", "--steps", "1", *same, *flags)
            one, other = self.in_turn(run(with_it), run(without))
            ratios = [a / b for a, b in zip(speeds(one), speeds(other))]
            cells = [name, spread(speeds(one)), spread(speeds(other)), spread(ratios), peak_mib(one), peak_mib(other)]
            print("|", " | ".join(cells), "|", flush=True)

    def start(self):
        """Seconds from the start of the process to the end of the quickstart's first step."""
        if not self.wanted("start"):
            return
        seconds = []
        for _ in range(self.options.rounds):
            with tempfile.TemporaryDirectory() as folder:
                command = [self.options.maskalign, "run", "quickstart", "--steps", "1", "--out", f"{folder}/run"]
                begin = time.perf_counter()
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                for line in process.stderr:
                    if "step 1 of" in line:
                        seconds.append(time.perf_counter() - begin)
                process.wait()
        print(f"\nStart to the end of the quickstart's first step, seconds: {spread(seconds)}")


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    built = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "maskalign"
    options.add_argument("--maskalign", default=built, help="the binary to time")
    options.add_argument("--peer", default=ROOT / "scripts" / "pytorch_peer.py", help="the script to time it against")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--only", help="rows whose name contains this")
    bench = Bench(options.parse_args())
    bench.against_the_peer()
    bench.against_itself()
    bench.start()


if __name__ == "__main__":
    main()
