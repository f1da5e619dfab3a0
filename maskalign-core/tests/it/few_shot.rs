//! Few-shot classification by a tower's features, recorded from timm and scikit-learn by
//! `tests/fixtures/stages/make_few_shot.py`.

use std::{collections::BTreeMap, path::Path};

use maskalign_core::stages::FewShot;
use serde_json::Value;

use crate::support::on_student;

const TOWER: &str = "tests/fixtures/stages/knn_tower.safetensors";

fn results(rest: &str) -> Result<Value, Vec<String>> {
    let recipe = format!(
        "{{ name: few, stages: {{ few: {{ type: few_shot, student: {{ stage: pretrain }},
        train: {{ dataset: {{ type: sample, split: train, limit: 300 }} }},
        test: {{ dataset: {{ type: sample, split: test, limit: 120 }} }}, {rest} }} }} }}"
    );
    on_student::<FewShot>(&recipe, TOWER, 3)
}

/// The same subsets, features and classifiers: the same images are found.
#[test]
fn subsets_and_accuracies_are_those_of_timm_and_scikit_learn() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/stages/few_shot.json");
    let recorded: BTreeMap<String, Value> = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    for (view, expected) in recorded {
        let (pooling, tap) = view.split_once(", ").unwrap();
        let levels = expected.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(", ");
        let got = results(&format!(
            "pooling: {pooling}, tap: {tap}, levels: [{levels}], shares: [0.1, 1.0], baselines: [untrained], batch: 32"
        ));
        let got = got.unwrap();
        for (level, sizes) in expected.as_object().unwrap() {
            for (size, right) in sizes.as_object().unwrap() {
                let right: Vec<f64> = right.as_array().unwrap().iter().map(|n| n.as_f64().unwrap() / 120.0).collect();
                let mean = right.iter().sum::<f64>() / 3.0;
                let deviation = (right.iter().map(|share| (share - mean).powi(2)).sum::<f64>() / 2.0).sqrt();
                for (name, theirs) in [("accuracy", mean), ("deviation", deviation)] {
                    let ours = got["student"][level][size][name].as_f64().unwrap();
                    assert!((ours - theirs).abs() < 1e-9, "{view}: level {level}, {size}: {name} {ours}, {theirs}");
                }
            }
            assert_ne!(got["untrained"][level], got["student"][level]);
        }
    }
}

#[test]
fn what_cannot_be_drawn_is_refused() {
    let refusals = |rest: &str| results(rest).unwrap_err().join("; ");
    let many = refusals("shots: [1, 40]");
    assert!(many.contains("`shots.1`: 40 images of each class, but class `") && many.contains("` has "), "{many}");
    let none = refusals("shots: [], shares: []");
    assert!(none.contains("`shots`: neither a number of images nor a share of them is asked for"), "{none}");
}
