//! Every built-in component does what components of its kind must do.

use maskalign_core::conformance::{Kind, check, check_all, check_as};

fn passes(result: Result<(), Vec<String>>) {
    if let Err(faults) = result {
        panic!("{}", faults.join("\n"));
    }
}

#[test]
fn every_built_in_component_conforms() {
    passes(check_all(None));
}

#[test]
fn every_head_and_fusion_of_the_dynamic_alignment_conforms() {
    for fusion in ["simple", "linear", "sum"] {
        for head in ["linear", "norm_linear", "linear_norm", "mlp", "mlp2"] {
            passes(check_as(Kind::Aligner, &format!("{{ type: dynamic, fusion: {fusion}, head: {head} }}")));
        }
    }
    passes(check_as(Kind::Aligner, "{ type: dynamic, fusion: sum, levels: { last: 2 }, tap: norm }"));
}

#[test]
fn every_attention_of_the_decoder_conforms() {
    for attention in ["full", "masked_queries", "cross"] {
        passes(check_as(
            Kind::Aligner,
            &format!("{{ type: decoder, dim: 8, depth: 2, heads: 2, attention: {attention} }}"),
        ));
    }
    for levels in ["levels: [embed, 0, -1], tap: block", "levels: all", "levels: [1], tap: block"] {
        passes(check_as(
            Kind::Aligner,
            &format!("{{ type: decoder, dim: 8, depth: 2, heads: 2, attention: cross, {levels} }}"),
        ));
    }
}

#[test]
fn losses_conform_at_other_options() {
    for beta in ["0.1", "3.0"] {
        passes(check_as(Kind::Loss, &format!("{{ type: smooth_l1, beta: {beta} }}")));
    }
}

#[test]
fn a_dataset_of_files_conforms() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/images");
    passes(check_as(Kind::Dataset, &format!("{{ type: image_folder, root: {folder:?} }}")));
}

#[test]
fn what_is_not_registered_is_a_fault() {
    let faults = check(Kind::Masker, "atention").expect_err("no such masker");
    assert!(faults[0].contains("no masker is named `atention`"), "{faults:?}");
    let faults = check_all(Some("no-such-crate")).expect_err("no such crate");
    assert!(faults[0].contains("registers no component"), "{faults:?}");
    let faults = check_as(Kind::Loss, "{ type: smooth_l1, bta: 1 }").expect_err("no such option");
    assert!(faults[0].contains("beta"), "{faults:?}");
}
