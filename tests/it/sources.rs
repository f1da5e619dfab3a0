//! Where the students of judging stages come from: an earlier stage, a run directory, an exported folder, a file.

use std::fs;

use serde_json::Value;

use crate::support::{Sandbox, ends};

/// The images in the program, a few of them.
const SIDES: &str = "train: { dataset: { type: sample, split: train, limit: 200 } }, \
                     test: { dataset: { type: sample, split: test, limit: 100 } }";

/// A sandbox with a run of one short pre-training in `run`, whose training reaches three of four blocks, and of stages that
/// judge its student.
fn sandbox() -> Sandbox {
    let sandbox = Sandbox::new();
    let recipe = format!(
        "name: judged
stages:
  pretrain:
    type: pretrain
    epochs: 1
    data: {{ dataset: {{ type: sample, split: train, limit: 128 }} }}
    student: {{ type: vit, arch: {{ dim: 32, depth: 4, heads: 2, mlp: 72, patch: 7 }}, layer_scale: 0.1, statistics: inception }}
    teachers: {{ teacher: {{ type: vit, arch: {{ dim: 96, depth: 6, heads: 3, patch: 4 }}, image_size: 16,
      weights: 'embedded://quickstart_teacher' }} }}
    masker: {{ type: random, ratio: 0.5 }}
    objectives:
      align: {{ target: {{ type: features, teacher: teacher, levels: {{ last: 1 }} }}, tokens: [visible],
        aligner: {{ type: dynamic, fusion: simple, head: linear, levels: [2] }}, loss: {{ type: smooth_l1 }} }}
    optimizer: {{ type: adamw, base_lr: 1.0e-2 }}
    schedule: {{ type: constant }}
    batch: {{ effective: 16 }}
{}",
        stages("{ stage: pretrain }")
    );
    fs::write(sandbox.work().join("judged.yaml"), recipe).expect("written");
    ends(&sandbox.run(["run", "judged.yaml", "--out", "run", "-q"]), 0, &[]);
    sandbox
}

/// Stages that judge a student, as a recipe has them.
fn stages(student: &str) -> String {
    format!(
        "  knn: {{ type: knn, {SIDES}, student: {student}, k: [5] }}
  few_shot: {{ type: few_shot, {SIDES}, student: {student}, levels: all, shares: [] }}
  quality: {{ type: quality, data: {{ dataset: {{ type: sample, split: test, limit: 100 }} }}, student: {student} }}
  retrieval: {{ type: retrieval, gallery: {{ dataset: {{ type: sample, split: train, limit: 200 }} }},
    queries: {{ dataset: {{ type: sample, split: test, limit: 50 }} }}, student: {student} }}
"
    )
}

fn summary(sandbox: &Sandbox, run: &str) -> Value {
    let text = fs::read_to_string(sandbox.work().join(run).join("summary.json")).expect("a summary");
    serde_json::from_str(&text).expect("JSON")
}

fn write(sandbox: &Sandbox, text: &str) {
    fs::write(sandbox.work().join("later.yaml"), format!("name: later\nstages:\n{text}")).expect("written");
}

/// Sizes, scales, statistics and what training reached come with the student, and so do its results.
#[test]
fn a_student_is_judged_alike_wherever_it_comes_from() {
    let sandbox = sandbox();
    ends(&sandbox.run(["export", "run", "--out", "exported/"]), 0, &[]);
    let there = summary(&sandbox, "run");
    let checkpoint = "run/checkpoints/pretrain/step-00000008.safetensors";
    let places =
        ["run", "run/checkpoints/pretrain", "run/checkpoints/pretrain/final.safetensors", checkpoint, "exported"];
    for (at, place) in places.into_iter().enumerate() {
        write(&sandbox, &stages(&format!("{{ type: vit, weights: {place} }}")));
        let run = format!("later{at}");
        ends(&sandbox.run(["run", "later.yaml", "--out", &run, "-q"]), 0, &[]);
        let here = summary(&sandbox, &run);
        for stage in ["knn", "few_shot", "quality", "retrieval"] {
            assert_eq!(here[stage]["student"], there[stage]["student"], "{place}: {stage}");
        }
        let manifest = fs::read_to_string(sandbox.work().join(&run).join("manifest.json")).expect("a manifest");
        assert!(manifest.contains(".safetensors"), "the file that was read is recorded: {manifest}");
    }
    let levels = there["few_shot"]["student"].as_object().expect("levels");
    assert_eq!(levels.keys().collect::<Vec<_>>(), ["0", "1", "2"], "the last block was not trained");
}

/// What fine-tunes or probes takes its student from the same places.
#[test]
fn training_stages_take_a_run_directory_and_an_exported_folder() {
    let sandbox = sandbox();
    ends(&sandbox.run(["export", "run", "--out", "exported/"]), 0, &[]);
    for place in ["run", "exported"] {
        let training = format!(
            "epochs: 1, data: {{ dataset: {{ type: sample, split: train, limit: 64 }} }},
    eval: {{ dataset: {{ type: sample, split: test, limit: 32 }} }}, student: {{ type: vit, weights: {place} }},
    optimizer: {{ type: adamw, base_lr: 1.0e-3 }}, schedule: {{ type: constant }}, batch: {{ effective: 16 }}"
        );
        write(
            &sandbox,
            &format!(
                "  probe: {{ type: linear_probe, {training} }}\n  tune: {{ type: finetune, {training} }}
  evaluate: {{ type: evaluate, classifier: {{ stage: tune }}, data: {{ dataset: {{ type: sample, split: test, limit: 32 }} }} }}\n"
            ),
        );
        ends(&sandbox.run(["run", "later.yaml", "--out", &format!("{place}-later"), "-q"]), 0, &[]);
        // The classifier comes with its number of classes.
        ends(
            &sandbox.run(["export", &format!("{place}-later"), "--stage", "tune", "--out", &format!("{place}-tuned/")]),
            0,
            &[],
        );
        let config = fs::read_to_string(sandbox.work().join(format!("{place}-tuned/config.json"))).expect("a file");
        let config: Value = serde_json::from_str(&config).expect("JSON");
        assert_eq!((&config["num_classes"], &config["global_pool"]), (&10.into(), &"avg".into()), "{config:#}");
        assert_eq!(config["model_args"]["mlp_ratio"], 2.25);
    }
}

#[test]
fn a_student_that_cannot_be_had_is_refused_where_it_is_named() {
    let sandbox = sandbox();
    let refused = |student: &str, says: &[&str]| {
        write(&sandbox, &format!("  knn: {{ type: knn, {SIDES}, student: {student} }}\n"));
        ends(&sandbox.run(["validate", "later.yaml"]), 2, says);
    };
    refused(
        "{ type: vit, arch: { dim: 384, depth: 2, heads: 6, patch: 7 } }",
        &["a student without weights has random values", "{stage: NAME}"],
    );
    refused("{ type: vit, weights: nowhere }", &["there is no file `nowhere`"]);
    refused(
        "{ type: vit, weights: run, arch: { dim: 384, depth: 2, heads: 6, patch: 7 } }",
        &["`arch` has 384 channels", "final.safetensors"],
    );
    refused("{ stage: pretrain }", &["pretrain"]);
    refused("run", &["student", "mapping"]);
    refused("{ type: vit, weights: run }, baselines: [untrained]", &["`untrained` is the student of an earlier stage"]);
    refused(
        "{ type: vit, weights: run }, levels: [3]",
        &["level 3 of a tower of 3 blocks", "training reaches 3 of the 4"],
    );
    // Several students, or none yet.
    let work = sandbox.work();
    let stage = |name: &str| work.join("run/checkpoints").join(name);
    fs::create_dir(stage("other")).expect("a folder");
    fs::copy(stage("pretrain").join("final.safetensors"), stage("other").join("final.safetensors")).expect("copied");
    let several = ["the stages `other`, `pretrain` left students; name one of them: run/checkpoints/other"];
    refused("{ type: vit, weights: run, arch: { dim: 384, depth: 2, heads: 6, patch: 7 } }", &several);
    for name in ["other", "pretrain"] {
        fs::remove_file(stage(name).join("final.safetensors")).expect("removed");
    }
    refused(
        "{ type: vit, weights: run, arch: { dim: 384, depth: 2, heads: 6, patch: 7 } }",
        &["no stage has left a student", "step-N.safetensors"],
    );
    refused(
        "{ type: vit, weights: run/checkpoints/pretrain, arch: { dim: 384, depth: 2, heads: 6, patch: 7 } }",
        &["the stage has not ended"],
    );
    fs::create_dir(work.join("empty")).expect("a folder");
    refused(
        "{ type: vit, weights: empty, arch: { dim: 384, depth: 2, heads: 6, patch: 7 } }",
        &["holds none of model.safetensors", "and no run"],
    );
}

#[test]
fn an_export_says_which_folders_it_writes() {
    let sandbox = sandbox();
    let export = |more: &[&str]| sandbox.run(["export", "run"].iter().chain(more));
    ends(&export(&["--out", "exported/"]), 0, &[]);
    ends(&export(&["--out", "exported/"]), 2, &["exported/model.safetensors is there already"]);
    ends(&export(&["--out", "exported/", "--force"]), 0, &[]);
    ends(&export(&["--out", "exported"]), 2, &["exported is a folder", "`exported/`"]);
    ends(&export(&["--out", "other/", "--format", "hf_dinov2"]), 2, &["in timm's format alone"]);
    ends(&export(&["--out", "run/checkpoints/pretrain/", "--force"]), 2, &["a run's own checkpoints"]);
}
