//! Weights in this crate's naming are read as those of the built-in ones, and written.

use lattice_plugin as _;
use maskalign_core::weights::{Family, HostTensor, naming, read, to_canonical, to_family};

#[test]
fn a_tower_comes_and_goes_in_this_crates_naming() {
    let file = "../../maskalign-core/tests/fixtures/weights/vit_timm.safetensors";
    let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    let tower = to_canonical(read(&file).expect("a fixture"), Family::Vit).expect("a tower").tensors;
    let mut theirs = to_family(&tower, naming("lattice").expect("registered")).expect("a place for each tensor");
    assert!(theirs.contains_key("layers.1.key.weight") && !theirs.contains_key("blocks.1.attn.qkv.weight"));
    theirs.insert("steps_done".into(), HostTensor { shape: vec![1], data: vec![7.0] });
    let found = to_canonical(theirs, Family::Vit).expect("recognised");
    assert_eq!((found.naming, found.ignored), ("Lattice", vec![("steps_done".into(), "a counter")]));
    assert_eq!(found.tensors, tower);
}
