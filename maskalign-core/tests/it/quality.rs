//! Measures of a tower's features, recorded from timm, numpy and PyTorch by `tests/fixtures/stages/make_quality.py`.

use std::{collections::BTreeMap, path::Path};

use maskalign_core::stages::Quality;
use serde_json::Value;

use crate::support::on_student;

const TOWER: &str = "tests/fixtures/stages/knn_tower.safetensors";

fn results(rest: &str) -> Result<Value, Vec<String>> {
    let recipe = format!(
        "{{ name: quality, stages: {{ quality: {{ type: quality, student: {{ stage: pretrain }},
        data: {{ dataset: {{ type: sample, split: test, limit: 120 }} }}, {rest} }} }} }}"
    );
    on_student::<Quality>(&recipe, TOWER, 3)
}

#[test]
fn a_towers_features_measure_as_in_timm_and_numpy() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/stages/quality_levels.json");
    let recorded: BTreeMap<String, Value> = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    for (view, expected) in recorded {
        let (pooling, tap) = view.split_once(", ").unwrap();
        let levels = if pooling == "mean" { "[embed, 0, 1, 2]" } else { "all" };
        let got = results(&format!("pooling: {pooling}, tap: {tap}, levels: {levels}, batch: 32")).unwrap();
        for (level, measures) in expected.as_object().unwrap() {
            for (name, theirs) in measures.as_object().unwrap() {
                let (ours, theirs) = (got["student"][level][name].as_f64().unwrap(), theirs.as_f64().unwrap());
                assert!(
                    (ours - theirs).abs() <= 1e-5 * theirs.abs(),
                    "{view}: level {level}, {name} {ours}, recorded {theirs}"
                );
            }
        }
    }
}

#[test]
fn some_of_the_images_are_spread_over_all() {
    let all = results("batch: 8").unwrap();
    let some = results("images: 30, batch: 8").unwrap();
    assert_ne!(all, some);
    assert_eq!(results("images: 500, batch: 8").unwrap(), all, "there are no more than 120");
}

#[test]
fn pixels_are_refused() {
    let refusals = results("baselines: [pixels]").unwrap_err().join("; ");
    assert!(refusals.contains("`baselines`: pixels are as wide as images"), "{refusals}");
}
