//! Every built-in component does what components of its kind must do.

use maskalign_testkit::conformance::{Kind, check, check_all, check_as};

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

/// The examples of towers are as large as the papers': these are small enough for gradients and both tables of operators.
#[test]
fn towers_conform_at_small_sizes() {
    let arch = "arch: { dim: 12, depth: 3, heads: 3, mlp: 20, patch: 7 }";
    for options in [
        "",
        ", positions: learned",
        ", cls_token: false",
        ", image_size: 21",
        ", masked_patches: mask_token, layer_scale: 0.1",
        ", masked_patches: mask_token, cls_token: false, positions: learned",
    ] {
        passes(check_as(Kind::Student, &format!("{{ type: vit, {arch}{options} }}")));
    }
    for teacher in ["clip", "dino", "dinov2", "vit"] {
        for options in ["", ", image_size: 21"] {
            let text = format!("{{ type: {teacher}, {arch}, weights: nowhere.safetensors{options} }}");
            passes(check_as(Kind::Teacher, &text));
        }
    }
}

#[test]
fn every_normalisation_and_tap_of_targets_conforms() {
    for normalize in ["none", "l2", "whiten", "standardize", "standardize_batch"] {
        passes(check_as(Kind::Target, &format!("{{ type: pixels, normalize: {normalize} }}")));
        for rest in
            ["levels: [0, -1]", "tap: norm, levels: { last: 2 }", "tap: projection, levels: [-1]", "combine: mean"]
        {
            let text = format!("{{ type: features, teacher: t, normalize: {normalize}, {rest} }}");
            passes(check_as(Kind::Target, &text));
        }
    }
}

#[test]
fn datasets_of_files_conform() {
    let here = env!("CARGO_MANIFEST_DIR");
    let folder = format!("{here}/../tests/fixtures/images");
    passes(check_as(Kind::Dataset, &format!("{{ type: image_folder, root: {folder:?} }}")));
    let sample = |file: &str| format!("{here}/../maskalign-core/data/fashion_mnist/test-{file}.idx.gz");
    let (images, labels) = (sample("images"), sample("labels"));
    passes(check_as(Kind::Dataset, &format!("{{ type: idx, images: {images:?}, labels: {labels:?} }}")));
    let list = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(list.path(), "blobs/0.jpg\t0\nstripes/1.jpg\t1\n").expect("written");
    let list = list.path();
    passes(check_as(Kind::Dataset, &format!("{{ type: image_list, file: {list:?}, root: {folder:?} }}")));
}

/// An evaluating stage is given a small student for the stage that it names.
#[test]
fn stages_conform_on_an_earlier_stages_student() {
    let sides = "train: { dataset: { type: sample, split: train } }, test: { dataset: { type: sample, split: test } }";
    for rest in
        ["", ", baselines: [untrained, pixels], pooling: cls, tap: norm", ", k: [1, 5]", ", levels: [embed, 0, -1]"]
    {
        passes(check_as(Kind::Stage, &format!("{{ type: knn, student: {{ stage: pretrain }}, {sides}{rest} }}")));
    }
    for rest in ["", ", baselines: [untrained], levels: [embed, -1], images: 20", ", pooling: cls, tap: norm"] {
        passes(check_as(
            Kind::Stage,
            &format!(
                "{{ type: quality, student: {{ stage: pretrain }},
                data: {{ dataset: {{ type: sample, split: test }} }}{rest} }}"
            ),
        ));
    }
    for rest in ["", ", levels: all, baselines: [pixels, untrained]"] {
        passes(check_as(
            Kind::Stage,
            &format!(
                "{{ type: retrieval, student: {{ stage: pretrain }}, gallery: {{ dataset: {{ type: sample, split: train }} }},
                queries: {{ dataset: {{ type: sample, split: test }} }}{rest} }}"
            ),
        ));
    }
    for rest in ["", ", levels: all, baselines: [pixels, untrained], shots: [3], shares: []"] {
        passes(check_as(Kind::Stage, &format!("{{ type: few_shot, student: {{ stage: pretrain }}, {sides}{rest} }}")));
    }
    let evaluated = "data: { dataset: { type: sample, split: test } }, batch: 7";
    passes(check_as(Kind::Stage, &format!("{{ type: evaluate, classifier: {{ stage: finetune }}, {evaluated} }}")));
    let training = "epochs: 2, data: { dataset: { type: sample, split: train } }, schedule: { type: cosine },
        eval: { dataset: { type: sample, split: test } }, student: { type: vit, weights: { stage: pretrain } }";
    for rest in ["", ", pooling: mean, tap: block", ", base_lrs: [0.01, 0.1]"] {
        passes(check_as(
            Kind::Stage,
            &format!(
                "{{ type: linear_probe, {training}, optimizer: {{ type: lars, base_lr: 0.1 }},
                batch: {{ effective: 16, micro: 8 }}{rest} }}"
            ),
        ));
    }
    passes(check_as(
        Kind::Stage,
        &format!(
            "{{ type: finetune, {training}, optimizer: {{ type: adamw, base_lr: 1.0e-3 }}, batch: {{ effective: 16 }} }}"
        ),
    ));
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
