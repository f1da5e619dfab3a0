#!/usr/bin/env bash
# Packages every crate that is published, installs the command from the unpacked packages, patched to each other as if
# they had come from a registry, and runs it where no checkout is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
target=${CARGO_TARGET_DIR:-target}
mkdir -p "$target"
target=$(cd "$target" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "== cargo package"
rm -rf "$target/package"
# Verification would build each crate alone, without this workspace's profiles; the installation below builds them all.
cargo package --workspace --exclude maskalign-tests --no-verify --allow-dirty --quiet
mkdir "$work/packages"
for package in "$target"/package/*.crate; do
    tar -xzf "$package" -C "$work/packages"
    # The limit of crates.io.
    [ "$(stat -c %s "$package")" -le $((10 << 20)) ] || { echo "$package is larger than 10 MiB" >&2; exit 1; }
done
core=$(echo "$work"/packages/maskalign-core-*)
diff -r recipes "$core/recipes" || { echo "the package's recipes are not those of recipes/" >&2; exit 1; }

echo "== cargo install"
cli=$(echo "$work"/packages/maskalign-cli-*)
mkdir "$cli/.cargo"
{
    echo "[patch.crates-io]"
    for folder in "$work"/packages/*; do
        name=$(basename "$folder")
        echo "${name%-[0-9]*} = { path = \"$folder\" }"
    done
} > "$cli/.cargo/config.toml"
# The dependencies are those that the workspace's release build made: the same versions, the same profile.
cp Cargo.lock "$cli/Cargo.lock"
(cd "$cli" && CARGO_TARGET_DIR="$target" cargo install --path . --root "$work" --no-track --quiet)

cd "$work"
bin/maskalign list recipes > listed
grep -q quickstart listed
bin/maskalign validate quickstart
bin/maskalign run quickstart --steps 2 --out run -q
echo "packages: all well"
