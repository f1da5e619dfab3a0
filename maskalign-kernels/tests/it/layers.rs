//! The order of this crate's modules.

use std::path::Path;

#[path = "../../../maskalign-registry/tests/it/layers.rs"]
mod source;

/// The crate's modules, the lowest first.
const LAYERS: &[&str] = &[
    "arch",
    "vmath",
    "memory",
    "sync",
    "pool",
    "arena",
    "share",
    "gemm",
    "double",
    "elementwise",
    "norm",
    "batch_norm",
    "attention",
    "loss",
    "optim",
    "block",
];

#[test]
fn a_module_uses_only_those_below_it() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    assert_eq!(source::faults(&src, LAYERS), [""; 0]);
}
