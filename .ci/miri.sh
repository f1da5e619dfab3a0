#!/usr/bin/env bash
# The kernels' unsafe code under miri, where the nightly toolchain has it: the pool, the split of outputs among tasks,
# the arena and small sizes of every operator. Says aloud where it is skipped. The portable code alone runs there: miri
# has neither inline assembly nor most vector instructions.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! cargo +nightly miri --version >/dev/null 2>&1; then
  echo "SKIPPED: miri is not installed (rustup component add --toolchain nightly miri rust-src)"
  exit 0
fi
if ! cargo +nightly miri setup >/dev/null 2>&1; then
  echo "SKIPPED: miri has no standard library to run (rustup component add --toolchain nightly rust-src)"
  exit 0
fi

for rules in "" "-Zmiri-tree-borrows"; do
  echo "miri ${rules:-with stacked borrows}"
  # Isolation would hide the processor and the clock, which the pool's tests sleep by.
  MIRIFLAGS="-Zmiri-disable-isolation $rules" MASKALIGN_ISA=scalar \
    cargo +nightly miri test -p maskalign-kernels --lib -- pool_tests arena:: soundness
done
