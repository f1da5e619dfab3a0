#!/usr/bin/env bash
# Reports in headless Chromium: of one run, of several, the page of images that are alike, and the charts in a run's directory. Needs Node.js and Chromium.
set -euo pipefail
cd "$(dirname "$0")/.."
chromium="$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)"
if [ -z "$chromium" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get install --yes --quiet chromium >/dev/null 2>&1 || true
  chromium="$(command -v chromium || true)"
fi
[ -n "$chromium" ] || { echo "SKIPPED: there is no Chromium"; exit 0; }
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
(cd tests/browser && npm ci --no-progress --loglevel=error)

cargo build --release --quiet --bin maskalign
maskalign="${CARGO_TARGET_DIR:-target}/release/maskalign"
"$maskalign" run tests/tensorboard/recipe.yaml -q --threads 2 --out "$work/one"
"$maskalign" run tests/tensorboard/recipe.yaml -q --threads 2 --out "$work/two" --set seed=1 --steps 12
"$maskalign" report "$work/one" "$work/two" --out "$work/both.html"
"$maskalign" features "$work/one" tests/fixtures/images --out "$work/features"
CHROMIUM="$chromium" node tests/browser/check.js "$work/one/report.html" "$work/both.html" "$work/features/neighbours.html" \
  "$work"/one/pictures/*.svg
