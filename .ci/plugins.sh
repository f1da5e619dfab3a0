#!/usr/bin/env bash
# A crate outside the workspace, and one that `maskalign new plugin` writes: built, tested, and trained with.
set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# The dependencies of both are the workspace's: one folder for all.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$checkout/target}
binaries=$CARGO_TARGET_DIR/debug
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Dependencies are shared where they are optimised alike: the workspace's profile. MaskAlign's own crates are compiled
# again for each workspace, and nothing here runs long enough to repay optimising them.
sed -n '/^\[profile\.dev/,/^\[profile\.release/{/^\[profile\.release/!p}' "$checkout/Cargo.toml" > "$work/profile.toml"
quick=(--config "$work/profile.toml")
for crate in core cli registry; do
    quick+=(--config "profile.dev.package.maskalign-$crate.opt-level=0")
done

# says WHAT TEXT FILE: the file has the text.
says() {
    grep -qF -- "$2" "$3" || { echo "$1 does not say \"$2\":" >&2; cat "$3" >&2; exit 1; }
}

echo "== tests/plugin"
cd "$checkout/tests/plugin"
# The versions of the workspace, without a lock file of the plugin's own.
cp "$checkout/Cargo.lock" Cargo.lock
trap 'rm -rf "$work" "$checkout/tests/plugin/Cargo.lock"' EXIT
cargo test "${quick[@]}"
cargo build "${quick[@]}"
plugin=$binaries/lattice-plugin

"$plugin" list > "$work/list"
"$plugin" schema > "$work/schema"
for component in masker.lattice loss.blend aligner.pointwise dataset.bars; do
    name=${component#*.}
    says list "$name" "$work/list"
    says schema "\"$name\"" "$work/schema"
    "$plugin" explain "$component" > "$work/explain"
    says "explain $component" lattice-plugin "$work/explain"
done
"$plugin" validate recipe.yaml
code=0
"$plugin" validate recipe.yaml --set stages.pretrain.masker.type=latice 2> "$work/misspelt" || code=$?
[ "$code" = 2 ]
says "the error for a misspelt masker" 'did you mean `lattice`?' "$work/misspelt"
"$plugin" run recipe.yaml --device cpu --steps 2 --out "$work/run"

echo "== maskalign new plugin"
cd "$work"
"$plugin" new plugin demo-mask --path "$checkout"
cd demo-mask
cp "$checkout/Cargo.lock" Cargo.lock
cargo test "${quick[@]}"
"$binaries/demo-mask" run recipe.yaml --device cpu --steps 2 --out "$work/demo-run"
"$binaries/demo-mask" explain masker.demo_mask > "$work/explain"
says "explain masker.demo_mask" cell "$work/explain"

echo "== two crates with one name"
# The new crate's masker takes the name of the other crate's, and both are linked in.
sed -i 's|"demo_mask" => |"lattice" => |; s|type: demo_mask|type: lattice|' src/lib.rs
sed -i "s|^\[dependencies\]|[dependencies]\nlattice-plugin = { path = \"$checkout/tests/plugin\" }|" Cargo.toml
sed -i 's|^use demo_mask as _;|use demo_mask as _;\nuse lattice_plugin as _;|' src/main.rs
cargo build "${quick[@]}"
code=0
"$binaries/demo-mask" list 2> "$work/twice" || code=$?
[ "$code" = 2 ]
says "the error for two of one name" 'crates `demo-mask` and `lattice-plugin`' "$work/twice"
echo "plugins: all well"
