#!/usr/bin/env bash
# Times MaskAlign and a PyTorch peer in turn and prints a table of medians with their spread.
#   scripts/compare_with_pytorch.sh PEER.py [ROUNDS]
# PEER.py takes --job, --arch, --batch, --steps, --threads and prints one line of JSON with images_per_s_median and
# peak_mib; it needs `pip install torch`.
set -euo pipefail
peer="${1:?usage: $0 PEER.py [ROUNDS]}"
rounds="${2:-3}"
cd "$(dirname "$0")/.."
cargo build --release --quiet --bin maskalign
ours="${CARGO_TARGET_DIR:-target}/release/maskalign"
python3 - "$peer" "$rounds" "$ours" <<'PY'
import json, os, statistics, subprocess, sys

peer, rounds, ours = sys.argv[1], int(sys.argv[2]), sys.argv[3]
rows = [
    ("ViT-B pretrain, batch 16", "maskalign_vitb_clip", "pretrain", "base", 16, 3),
    ("ViT-Ti pretrain, batch 32", "bench_vitti", "pretrain", "tiny", 32, 8),
    ("ViT-B finetune, batch 8", "maskalign_vitb_clip", "finetune", "base", 8, 3),
    ("ViT-B features, batch 32", "maskalign_vitb_clip", "features", "base", 32, 3),
]
only = os.environ.get("ONLY")

def last_json(command):
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(out.strip().splitlines()[-1])

def spread(values):
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"

print("| job | MaskAlign, images/s | PyTorch, images/s | ratio | memory, MiB | PyTorch, MiB | share of peak |")
print("|---|---|---|---|---|---|---|")
for name, recipe, job, arch, batch, steps in rows:
    if only and only not in name:
        continue
    a, b, ratios = [], [], []
    for _ in range(rounds):
        mine = last_json([ours, "bench", f"recipes/{recipe}.yaml", "--job", job, "--batch", str(batch), "--steps", str(steps), "--threads", "2", "--json"])
        theirs = last_json([sys.executable, peer, "--job", job, "--arch", arch, "--batch", str(batch), "--steps", str(steps), "--threads", "2"])
        a.append(mine); b.append(theirs)
        ratios.append(mine["images_per_s_median"] / theirs["images_per_s_median"])
    speed = lambda rs: [r["images_per_s_median"] for r in rs]
    share = [100 * r["gflops"] / r["peak_gflops"] for r in a if r.get("peak_gflops")]
    print(f"| {name} | {spread(speed(a))} | {spread(speed(b))} | {spread(ratios)} | {a[0]['peak_mib']:.0f} | {b[0]['peak_mib']:.0f} | {spread(share)} % |", flush=True)
PY
