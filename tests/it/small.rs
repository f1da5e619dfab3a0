//! Papers' recipes in small: each trains for two epochs and leaves a student that is better than the untrained one.

use std::fs;

use crate::support::{Sandbox, files_in, here};
use serde_json::Value;

#[test]
fn every_paper_in_small_beats_the_untrained_student() {
    let recipes = files_in(&here().join("../recipes/small"));
    assert!(!recipes.is_empty());
    for recipe in recipes {
        let sandbox = Sandbox::new();
        let recipe = recipe.to_str().expect("UTF-8");
        let output = sandbox.run(["run", recipe, "--out", "run", "--threads", "2", "--device", "cpu", "-q"]);
        assert_eq!(output.status.code(), Some(0), "{recipe}: {}", String::from_utf8_lossy(&output.stderr));
        let summary = fs::read(sandbox.work().join("run/summary.json")).expect("a summary");
        let summary: Value = serde_json::from_slice(&summary).expect("JSON");
        assert_eq!(summary["pretrain"]["epochs"], 2.0, "{recipe}");
        let accuracy = |whose: &str| summary["knn"][whose]["accuracy"].as_f64().expect("an accuracy");
        let (student, untrained) = (accuracy("student"), accuracy("untrained"));
        assert!(student > untrained + 0.02, "{recipe}: {student}, untrained {untrained}");
    }
}
