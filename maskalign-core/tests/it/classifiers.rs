//! Classifiers as timm, MAE and Hugging Face save them, recorded by `tests/fixtures/stages/make_classifiers.py`.

use std::collections::BTreeMap;

use maskalign_core::stages::Evaluate;
use serde_json::{Value, json};

use crate::support::on_student;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/stages/classifiers");
const TOWER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/stages/knn_tower.safetensors");

/// The results of `evaluate` with these options beside its images, or its refusals.
fn evaluated(options: &str) -> Result<Value, Vec<String>> {
    let images = format!(
        "data: {{ dataset: {{ type: image_folder, root: {FOLDER}/images }}, transforms: [{{ type: center_crop, size: 28 }}] }}"
    );
    let images = if options.contains("data:") { String::new() } else { format!(", {images}") };
    let recipe = format!("{{ name: judged, stages: {{ judged: {{ type: evaluate, batch: 5, {options}{images} }} }} }}");
    on_student::<Evaluate>(&recipe, TOWER.trim_start_matches(env!("CARGO_MANIFEST_DIR")).trim_start_matches('/'), 3)
}

/// A tower with these weights. Without a configuration beside them a recipe gives the sizes.
fn tower(weights: &str) -> String {
    let arch = if weights.contains(".pth") { "arch: { dim: 16, depth: 2, heads: 2, patch: 7 }, " } else { "" };
    format!("classifier: {{ type: vit, {arch}weights: {FOLDER}/{weights} }}")
}

#[test]
fn they_find_what_their_programs_find() {
    let expected: BTreeMap<String, Value> =
        serde_json::from_str(&std::fs::read_to_string(format!("{FOLDER}/expected.json")).unwrap()).unwrap();
    assert_eq!(expected.len(), 5);
    let by_head = |weights: &str| format!("{}, head: {{ weights: {FOLDER}/{weights} }}", tower("token"));
    for (name, theirs) in &expected {
        let results = evaluated(&tower(name)).unwrap_or_else(|refusals| panic!("{name}: {refusals:?}"));
        let mut confusion: BTreeMap<String, BTreeMap<String, usize>> = BTreeMap::new();
        for (image, found) in theirs["found"].as_array().unwrap().iter().enumerate() {
            *confusion
                .entry(format!("class_{}", image / 2))
                .or_default()
                .entry(format!("class_{found}"))
                .or_default() += 1;
        }
        assert_eq!(results["confusion"], json!(confusion), "{name}");
        let number = |key: &str| results[key].as_f64().unwrap();
        assert!((number("top_5_accuracy") - theirs["in_five"].as_f64().unwrap() / 12.0).abs() < 1e-12, "{name}");
        let error = theirs["calibration_error"].as_f64().unwrap();
        assert!((number("calibration_error") - error).abs() < 1e-6, "{name}: {results}, {error}");
    }
    // A head in a file of its own is the same as one beside its tower, and another one is another.
    assert_eq!(evaluated(&by_head("token")), evaluated(&tower("token")));
    assert_ne!(evaluated(&by_head("probed.pth")), evaluated(&tower("token")));
    // What the weights do not say may be said; what they say is taken from there.
    let mean = format!("{}, head: {{ pooling: mean }}", tower("token"));
    assert_ne!(evaluated(&mean).unwrap(), evaluated(&tower("token")).unwrap());
    let said = format!("{}, head: {{ pooling: mean, tap: norm }}", tower("mean"));
    assert_eq!(evaluated(&said), evaluated(&tower("mean")));
}

#[test]
fn what_is_no_classifier_or_another_one_is_refused_at_its_place() {
    let refused = |options: &str, place: &str, says: &[&str]| {
        let refusals = evaluated(options).expect_err(options).join("; ");
        assert!(refusals.contains(&format!("`{place}`")), "{options}: {refusals}");
        for words in says {
            assert!(refusals.contains(words), "{options}: {refusals} lacks `{words}`");
        }
    };
    let bare = format!(
        "classifier: {{ type: vit, arch: {{ dim: 24, depth: 3, heads: 3, patch: 7 }}, positions: learned, weights: {TOWER} }}"
    );
    refused(&bare, "classifier.weights", &["knn_tower.safetensors holds no classifier", "`head: { weights: PATH }`"]);
    refused(
        &format!("{bare}, head: {{ weights: {FOLDER}/tuned.pth }}"),
        "head.weights",
        &["tuned.pth reads 16 values, and the tower gives 24"],
    );
    refused(&format!("{bare}, head: {{ weights: nowhere }}"), "head.weights", &["there is no file `nowhere`"]);
    refused(&format!("{bare}, head: {{ weights: {TOWER} }}"), "head.weights", &["holds no classifier"]);
    refused(
        "classifier: { type: vit, arch: { dim: 16, depth: 2, heads: 2, patch: 7 } }",
        "classifier.weights",
        &["a classifier without weights has random values", "`{stage: NAME}`"],
    );
    refused(
        "classifier: { type: vit, weights: { stage: pretrain } }",
        "classifier.weights",
        &["the student of stage `pretrain` alone is meant here", "`classifier: { stage: pretrain }`"],
    );
    refused(
        "classifier: { stage: pretrain }",
        "classifier.stage",
        &["no earlier stage `pretrain` leaves a classifier"],
    );
    refused(
        "classifier: { stage: x }, head: { pooling: cls }",
        "head",
        &["an earlier stage has its own", "leave `head` out"],
    );
    refused(
        &format!("{}, head: {{ pooling: cls }}", tower("tuned.pth")),
        "head.pooling",
        &["a norm of averaged tokens (`fc_norm`)", "leave `pooling` out"],
    );
    refused(
        &format!("{}, head: {{ tap: norm }}", tower("tuned.pth")),
        "head.tap",
        &["the weights of the tower have no final norm"],
    );
    let others = "data: { dataset: { type: sample, split: test, limit: 20 } }";
    refused(
        &format!("{}, {others}", tower("token")),
        "data.dataset",
        &["10 classes, but the classifier tells 6 apart", "one folder for each, empty or not"],
    );
}
