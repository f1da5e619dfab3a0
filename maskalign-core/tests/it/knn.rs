//! k-NN of a tower's levels, recorded from timm and scikit-learn by `tests/fixtures/stages/make_knn.py`.

use std::{collections::BTreeMap, path::Path};

use maskalign_core::stages::Knn;
use serde_json::Value;

use crate::support::on_student;

const TOWER: &str = "tests/fixtures/stages/knn_tower.safetensors";
const ARCH: &str = "arch: { dim: 24, depth: 3, heads: 3, patch: 7 }";

/// A recipe's stage, with a student whose training reaches some of its blocks, and with the same tower as a teacher.
fn recipe(rest: &str) -> String {
    let weights = Path::new(env!("CARGO_MANIFEST_DIR")).join(TOWER);
    format!(
        "{{ name: levels, stages: {{ knn: {{ type: knn, k: [1, 5, 20], student: {{ stage: pretrain }},
        train: {{ dataset: {{ type: sample, split: train, limit: 300 }} }},
        test: {{ dataset: {{ type: sample, split: test, limit: 120 }} }},
        teachers: {{ tower: {{ type: vit, {ARCH}, weights: '{}' }} }}, {rest} }} }} }}",
        weights.display()
    )
}

/// What a recipe gives, or its refusals.
fn results(rest: &str, blocks: usize) -> Result<Value, Vec<String>> {
    on_student::<Knn>(&recipe(rest), TOWER, blocks)
}

#[test]
fn levels_are_measured_as_timm_and_scikit_learn_measure_them() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/stages/knn_levels.json");
    let recorded: BTreeMap<String, Value> = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    for (view, expected) in recorded {
        let (pooling, tap) = view.split_once(", ").unwrap();
        let levels = if pooling == "mean" { "[embed, 0, 1, -1]" } else { "all" };
        // The batch divides neither number of images.
        let got = results(&format!("pooling: {pooling}, tap: {tap}, levels: {levels}, batch: 32"), 3).unwrap();
        for tower in ["student", "tower"] {
            let names: Vec<&String> = got[tower].as_object().unwrap().keys().collect();
            assert_eq!(names, expected.as_object().unwrap().keys().collect::<Vec<_>>(), "{view}: levels of {tower}");
            for (level, counts) in expected.as_object().unwrap() {
                for (k, count) in counts.as_object().unwrap() {
                    let share = got[tower][level]["by_k"][k].as_f64().unwrap();
                    let right = count.as_f64().unwrap();
                    assert_eq!((120.0 * share).round(), right, "{view}: {tower}, level {level}, k {k}");
                }
                assert_eq!(got[tower][level]["accuracy"], got[tower][level]["by_k"]["1"], "that of the first number");
            }
        }
        // Without `levels` the last one is measured.
        let last = results(&format!("pooling: {pooling}, tap: {tap}"), 3).unwrap();
        assert_eq!(last["student"], got["student"]["2"], "{view}");
        assert_eq!(last["tower"], got["tower"]["2"], "{view}");
        // What training does not reach is left out.
        let shorter = results(&format!("pooling: {pooling}, tap: {tap}, levels: {{ last: 2 }}"), 2).unwrap();
        assert_eq!(shorter["student"]["1"], got["student"]["1"], "{view}");
        assert!(shorter["student"].get("2").is_none() && shorter["tower"].get("2").is_some(), "{shorter}");
    }
}

/// A file in timm's naming, without a stage before.
#[test]
fn a_student_with_weights_of_its_own_is_measured_as_in_a_stage() {
    let weights = Path::new(env!("CARGO_MANIFEST_DIR")).join(TOWER);
    let own = format!("student: {{ type: vit, positions: learned, {ARCH}, weights: '{}' }}", weights.display());
    let recipe = recipe("pooling: cls, tap: norm, levels: all");
    let got = on_student::<Knn>(&recipe.replace("student: { stage: pretrain }", &own), TOWER, 3).unwrap();
    assert_eq!(got["student"], on_student::<Knn>(&recipe, TOWER, 3).unwrap()["student"]);
}

#[test]
fn levels_that_say_nothing_are_refused() {
    let refusals = |rest: &str, blocks| results(rest, blocks).unwrap_err().join("; ");
    let embed = refusals("levels: [0, embed], pooling: cls", 3);
    assert!(embed.contains("`levels.1`: before the first block, the class token is the same"), "{embed}");
    let beyond = refusals("levels: [2]", 2);
    assert!(beyond.contains("`levels.0`: the student: level 2 of a tower of 2 blocks"), "{beyond}");
    let nothing = refusals("levels: all", 0);
    assert!(nothing.contains("`levels`: the student has no block that was trained"), "{nothing}");
    let deep = refusals("levels: { last: 4 }", 3);
    assert!(deep.contains("`levels.last`: teacher `tower`: the last 4 levels of a tower of 3"), "{deep}");
}
