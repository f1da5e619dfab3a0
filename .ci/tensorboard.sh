#!/usr/bin/env bash
# A run that is killed and goes on, as the Python package `tensorboard` reads it: every step once, with the values of
# metrics.jsonl. Needs the package, which it installs into a folder of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
if ! { python3 -m venv "$work/venv" && "$work/venv/bin/pip" install --quiet tensorboard; }; then
  echo "SKIPPED: the Python package tensorboard cannot be installed"
  exit 0
fi

cargo build --release --quiet --bin maskalign
maskalign="${CARGO_TARGET_DIR:-target}/release/maskalign"
run="$work/run"
quick=(-q --threads 2 --tensorboard)
# Every sixth step is a checkpoint: a run that is killed later than the first has made steps that it will make again.
"$maskalign" run tests/tensorboard/recipe.yaml "${quick[@]}" --out "$run" &
running=$!
until [ "$(wc -l 2>/dev/null < "$run/metrics.jsonl" || echo 0)" -ge 9 ]; do
  kill -0 "$running" || { echo "the run ended before it could be killed" >&2; exit 1; }
  sleep 0.02
done
kill -KILL "$running"
wait "$running" || true
"$maskalign" run --resume "$run" "${quick[@]}"
"$work/venv/bin/python" tests/tensorboard/check.py "$run"

# What the run made goes with it.
"$maskalign" run tests/tensorboard/recipe.yaml -q --steps 1 --out "$run" --force
[ ! -e "$run/tensorboard" ] || { echo "--force left the folder tensorboard" >&2; exit 1; }
