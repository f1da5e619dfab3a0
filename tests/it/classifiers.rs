//! `evaluate` takes a classifier from wherever it is, and says the same of it.

use std::fs;

use serde_json::Value;

use crate::support::{Sandbox, ends, run_record};

const TRAINED: &str = "data: { dataset: { type: sample, split: train, limit: 200 } }
    optimizer: { type: adamw, base_lr: 1.0e-1 }
    schedule: { type: cosine }
    batch: { effective: 20 }
    epochs: 2";
const TOWER: &str = "arch: { dim: 24, depth: 2, heads: 2, patch: 7 }";
const JUDGED: &str = "data: { dataset: { type: sample, split: test, limit: 60 } }";

fn run(sandbox: &Sandbox, name: &str, stages: &str) {
    let recipe = format!("name: {name}\nseed: 5\nstages:\n{stages}");
    let recipe = recipe.replace("TRAINED", TRAINED).replace("TOWER", TOWER).replace("JUDGED", JUDGED);
    fs::write(sandbox.work().join(format!("{name}.yaml")), recipe).expect("written");
    ends(&sandbox.run(["run", &format!("{name}.yaml"), "--out", name, "-q"]), 0, &[]);
}

/// A run that fine-tunes or pre-trains and probes, and judges what it trained.
fn judged_in(sandbox: &Sandbox, name: &str, stages: &str) -> Value {
    run(sandbox, name, stages);
    run_record(&sandbox.work().join(name)).summary["judge"].clone()
}

/// The results, or the message, of a recipe that judges alone.
fn judge(sandbox: &Sandbox, options: &str) -> Result<Value, String> {
    let recipe = format!("name: apart\nstages:\n  judge:\n    type: evaluate\n    {JUDGED}\n    {options}\n");
    fs::write(sandbox.work().join("apart.yaml"), recipe).expect("written");
    let output = sandbox.run(["run", "apart.yaml", "--out", "apart", "--force", "-q"]);
    match output.status.code() {
        Some(0) => Ok(run_record(&sandbox.work().join("apart")).summary["judge"].clone()),
        Some(2) => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        code => panic!("{code:?}: {}", String::from_utf8_lossy(&output.stderr)),
    }
}

const TUNED: &str = "
  tune: { type: finetune, student: { type: vit, TOWER, POOLED }, pooling: POOLING, head_std: 0.1, TRAINING }
  judge: { type: evaluate, classifier: { stage: tune }, JUDGED }
";

/// The options of training in one line.
fn flow(text: &str) -> String {
    text.replace("TRAINING", &TRAINED.replace("\n    ", ", "))
}

#[test]
fn a_fine_tuned_student_is_judged_from_its_run_and_from_its_export() {
    let sandbox = Sandbox::new();
    for (name, pooling, pooled) in
        [("mean", "mean", "eps: 1.0e-6"), ("cls", "cls", "eps: 1.0e-3"), ("none", "mean", "cls_token: false")]
    {
        let stages = flow(TUNED).replace("POOLING", pooling).replace("POOLED", pooled);
        let within = judged_in(&sandbox, name, &stages);
        assert!(within["accuracy"].as_f64().expect("a number") > 0.1, "{within}");
        let export = format!("{name}-exported/");
        ends(&sandbox.run(["export", name, "--out", &export]), 0, &[]);
        for weights in
            [name, &format!("{name}/checkpoints/tune"), &format!("{name}/checkpoints/tune/final.safetensors"), &export]
        {
            let apart = judge(&sandbox, &format!("classifier: {{ type: vit, weights: {weights} }}"));
            assert_eq!(apart, Ok(within.clone()), "{weights}");
        }
    }
}

const PROBED: &str = "
  pre:
    type: pretrain
    student: { type: vit, TOWER }
    masker: { type: random, ratio: 0.5 }
    objectives: { pixels: { target: { type: pixels }, tokens: [masked], loss: { type: mse },
      aligner: { type: decoder, dim: 16, depth: 1, heads: 2 } } }
    TRAINED
  probe: { type: linear_probe, student: { type: vit, weights: { stage: pre } }, VIEW, TRAINING }
  judge: { type: evaluate, classifier: { stage: probe }, JUDGED }
";

#[test]
fn a_probed_student_is_judged_from_its_run_as_the_probe_read_it() {
    let sandbox = Sandbox::new();
    for (name, view) in [("norm", "pooling: cls"), ("block", "pooling: mean, tap: block")] {
        let within = judged_in(&sandbox, name, &flow(PROBED).replace("VIEW", view));
        for weights in [name, &format!("{name}/checkpoints/pre")] {
            let apart = judge(&sandbox, &format!("classifier: {{ type: vit, weights: {weights} }}"));
            assert_eq!(apart, Ok(within.clone()), "{weights}");
        }
        ends(&sandbox.run(["export", name, "--stage", "pre", "--out", &format!("{name}-exported/")]), 0, &[]);
        for head in [name, &format!("{name}/checkpoints/probe")] {
            let options = format!("{{ type: vit, weights: {name}-exported }}\n    head: {{ weights: {head} }}");
            assert_eq!(judge(&sandbox, &format!("classifier: {options}")), Ok(within.clone()), "{head}");
        }
    }
    let refused = |options: &str, says: &[&str]| {
        let said = judge(&sandbox, options).expect_err(options);
        for words in says {
            assert!(said.contains(words), "{options}: {said} lacks `{words}`");
        }
    };
    // What the probe read is in the recipe of its run; without it, it has to be said.
    let recipe = sandbox.work().join("block/recipe.resolved.yaml");
    fs::rename(&recipe, recipe.with_extension("away")).expect("renamed");
    let head = "classifier: { type: vit, weights: block-exported }\n    head: { weights: block";
    refused(&format!("{head} }}"), &["the recipe of the run", "is not there", "say what its linear probe read"]);
    let within = run_record(&sandbox.work().join("block")).summary["judge"].clone();
    assert_eq!(judge(&sandbox, &format!("{head}, pooling: mean, tap: block }}")), Ok(within));
    // A student alone is no classifier, and which of several is meant has to be said.
    refused(
        "classifier: { type: vit, weights: norm-exported }",
        &["apart.yaml:", "norm-exported holds no classifier", "finetune"],
    );
    let two = PROBED.replace(
        "  judge:",
        "  again: { type: linear_probe, student: { type: vit, weights: { stage: pre } }, VIEW, TRAINING }\n  judge:",
    );
    run(&sandbox, "two", &flow(&two).replace("VIEW", "pooling: cls"));
    refused("classifier: { type: vit, weights: two }", &["the stages `again`, `probe`", "two/checkpoints/probe"]);
    let said = judge(&sandbox, "classifier: { type: vit, weights: two }\n    head: { weights: two/checkpoints/probe }");
    assert_eq!(said, Ok(run_record(&sandbox.work().join("two")).summary["judge"].clone()));
}

#[test]
fn a_run_without_what_is_asked_for_is_refused() {
    let sandbox = Sandbox::new();
    ends(&sandbox.run(["run", "tiny.yaml", "--out", "run", "-q"]), 0, &[]);
    let refused = |weights: &str, says: &[&str]| {
        let said = judge(&sandbox, &format!("classifier: {{ type: vit, weights: {weights} }}")).expect_err(weights);
        for words in says {
            assert!(said.contains(words), "{weights}: {said} lacks `{words}`");
        }
    };
    // Pre-training and fine-tuning both left a student.
    refused("run", &["the stages `finetune`, `pretrain` left students", "name one of them"]);
    refused("run/checkpoints/pretrain", &["holds no classifier", "`finetune` or `linear_probe`"]);
    refused("run/checkpoints/knn, arch: { dim: 24, depth: 2, heads: 2, patch: 7 }", &["trains no student"]);
    fs::remove_file(sandbox.work().join("run/checkpoints/finetune/final.safetensors")).expect("removed");
    refused("run/checkpoints/finetune", &["the stage has not ended"]);
}
