//! Stages that judge a student in the course of pre-training.

use std::{collections::BTreeMap, fs};

use maskalign_core::weights::{TensorMap, read};
use serde_json::{Value, json};

use crate::support::{Sandbox, ends, run_record};

/// The options of the stages that judge, in the course of training and after it.
const STAGES: [(&str, &str); 5] = [
    ("neighbours", "type: knn, k: [1, 5], levels: all, train: TRAIN, test: TEST"),
    ("few", "type: few_shot, shots: [1, 2], shares: [], train: TRAIN, test: TEST"),
    ("rank", "type: quality, pooling: cls, data: TEST"),
    ("found", "type: retrieval, gallery: TRAIN, queries: TEST"),
    (
        "probe",
        "type: linear_probe, epochs: 3, data: TRAIN, eval: TEST, base_lrs: [0.5, 2.0], pooling: mean, \
         optimizer: { type: lars, base_lr: 1.0 }, schedule: { type: cosine, warmup_epochs: 1 }, batch: { effective: 20 }",
    ),
];

/// The student of a stage of its own: a probe takes it with its weights.
fn student(options: &str) -> &'static str {
    match options.starts_with("type: linear_probe") {
        true => "{ type: vit, arch: { dim: 24, depth: 2, heads: 2, patch: 7 }, weights: { stage: pretrain } }",
        false => "{ stage: pretrain }",
    }
}

/// Pre-training of four epochs that is judged on its way, and the same stages once more after it.
fn recipe(evaluations: &str) -> String {
    let after = STAGES.iter().fold(String::new(), |after, (name, options)| {
        after + &format!("  {name}: {{ {options}, student: {} }}\n", student(options))
    });
    format!(
        "name: judged
seed: 3
stages:
  pretrain:
    type: pretrain
    epochs: 4
    data: {{ dataset: {{ type: sample, split: train, limit: 64 }}, transforms: [{{ type: horizontal_flip }}] }}
    student: {{ type: vit, arch: {{ dim: 24, depth: 2, heads: 2, patch: 7 }}, drop_path: 0.2 }}
    masker: {{ type: random, ratio: 0.5 }}
    objectives:
      pixels: {{ target: {{ type: pixels }}, tokens: [masked], aligner: {{ type: decoder, dim: 16, depth: 1, heads: 2 }},
        loss: {{ type: mse }} }}
    optimizer: {{ type: adamw, base_lr: 1.0e-2 }}
    schedule: {{ type: cosine }}
    batch: {{ effective: 16 }}
    checkpoints: {{ every_steps: 3 }}
{evaluations}{after}"
    )
    .replace("TRAIN", "{ dataset: { type: sample, split: train, limit: 60 } }")
    .replace("TEST", "{ dataset: { type: sample, split: test, limit: 40 } }")
}

/// Every second epoch, but for the first of the stages: every epoch.
fn evaluations() -> String {
    let line = |(at, (name, options)): (usize, &(&str, &str))| {
        let every = if at == 0 { 1 } else { 2 };
        format!("      {name}: {{ every_epochs: {every}, stage: {{ {options} }} }}\n")
    };
    format!("    evaluations:\n{}", STAGES.iter().enumerate().map(line).collect::<String>())
}

fn write(sandbox: &Sandbox, evaluations: &str) {
    fs::write(sandbox.work().join("judged.yaml"), recipe(evaluations)).expect("written");
}

fn weights(sandbox: &Sandbox, run: &str) -> TensorMap {
    read(&sandbox.work().join(run).join("checkpoints/pretrain/final.safetensors")).expect("weights")
}

/// What a run in one go measures is what a stage measures afterwards; an interrupted one has the same files, and training
/// is the same without.
#[test]
fn students_in_training_are_judged_exactly() {
    let sandbox = Sandbox::new();
    write(&sandbox, &evaluations());
    ends(&sandbox.run(["run", "judged.yaml", "--out", "whole", "--tensorboard"]), 0, &["few"]);
    let work = sandbox.work();
    let whole = run_record(&work.join("whole"));

    let mut courses: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
    for record in whole.steps.iter().filter(|record| record["stage"] == "pretrain") {
        for (name, _) in STAGES.iter().filter(|(name, _)| record.get(name).is_some()) {
            assert_eq!(record["step"].as_f64(), record["epoch"].as_f64().map(|epoch| 4.0 * epoch), "{record}");
            courses.entry(name).or_default().push(record);
        }
    }
    for (at, (name, _)) in STAGES.iter().enumerate() {
        let epochs: Vec<f64> = courses[name].iter().map(|record| record["epoch"].as_f64().expect("a number")).collect();
        assert_eq!(epochs, if at == 0 { vec![1.0, 2.0, 3.0, 4.0] } else { vec![2.0, 4.0] }, "{name}");
        let last = courses[name].last().expect("records");
        let own = &whole.summary[*name];
        assert_eq!(&last[*name], own.get("student").unwrap_or(own), "{name}: the stage after training says the same");
        let course = whole.summary["pretrain"][*name].as_array().expect("a list");
        assert_eq!(course.len(), epochs.len());
        assert_eq!(course.last().expect("rows")["epoch"], 4);
        assert_ne!(courses[name][0][*name], last[*name], "{name}: training changes it");
    }
    let events =
        fs::read_dir(work.join("whole/tensorboard")).expect("a folder").next().expect("a file").expect("its name");
    let events = fs::read(events.path()).expect("a file");
    for tag in [
        "pretrain/few/1_per_class/accuracy",
        "pretrain/rank/rankme",
        "pretrain/found/map",
        "pretrain/neighbours/1/accuracy",
    ] {
        assert!(events.windows(tag.len()).any(|part| part == tag.as_bytes()), "TensorBoard has no {tag}");
    }
    let page = fs::read_to_string(work.join("whole/report.html")).expect("a report");
    assert!(page.contains("rank.rankme") || page.contains("rank rankme"), "the report shows what was judged");

    // Ended in the midst of an epoch and at the end of one that is judged.
    for steps in ["6", "8"] {
        let run = format!("part{steps}");
        ends(&sandbox.run(["run", "judged.yaml", "--out", &run, "--tensorboard", "-q", "--steps", steps]), 0, &[]);
        ends(&sandbox.run(["run", "--resume", &run, "--tensorboard", "-q"]), 0, &[]);
        let resumed = run_record(&work.join(&run));
        assert_eq!(resumed.finals, whole.finals, "{steps}");
        assert_eq!(resumed.steps, whole.steps, "{steps}");
        assert_eq!(resumed.summary, whole.summary, "{steps}");
    }

    write(&sandbox, "");
    ends(&sandbox.run(["run", "judged.yaml", "--out", "plain", "-q"]), 0, &[]);
    assert_eq!(weights(&sandbox, "plain"), weights(&sandbox, "whole"), "looking changes nothing");
}

#[test]
fn what_judges_is_outlined_and_what_cannot_is_refused() {
    let sandbox = Sandbox::new();
    write(&sandbox, &evaluations());
    let memory = |text: &[u8]| {
        let report: Value = serde_json::from_slice(text).expect("JSON");
        report["recipes"][0]["stages"]["pretrain"]["memory"].as_u64().expect("bytes")
    };
    let validated = sandbox.run(["validate", "judged.yaml"]);
    ends(&validated, 0, &[]);
    let said = String::from_utf8_lossy(&validated.stdout).into_owned();
    assert!(said.contains("evaluation few") && said.contains("few_shot, every 2 epochs"), "{said}");
    let with = memory(&sandbox.run(["validate", "judged.yaml", "--format", "json"]).stdout);
    write(&sandbox, "");
    assert!(with > memory(&sandbox.run(["validate", "judged.yaml", "--format", "json"]).stdout));

    let refused = |entry: &str, says: &[&str]| {
        write(&sandbox, &format!("    evaluations: {{ {entry} }}\n"));
        ends(&sandbox.run(["validate", "judged.yaml"]), 2, says);
    };
    let quality = "type: quality, data: TEST";
    refused(&format!("a: {{ every_epochs: 5, stage: {{ {quality} }} }}"), &["5 epochs are more than the stage's 4"]);
    refused(&format!("loss: {{ every_epochs: 1, stage: {{ {quality} }} }}"), &["`loss` is the name of another number"]);
    let trained = ["the student that is trained is judged alone", "a stage of its own after the training"];
    refused(
        &format!("a: {{ every_epochs: 1, stage: {{ {quality}, student: {{ type: vit, weights: x }} }} }}"),
        &trained,
    );
    refused(&format!("a: {{ every_epochs: 1, stage: {{ {quality}, baselines: [untrained] }} }}"), &trained);
    refused(
        &format!("a: {{ every_epochs: 1, stage: {{ {quality}, levels: [2] }} }}"),
        &["level 2 of a tower of 2 blocks"],
    );
    let probe = STAGES[4].1;
    for (option, said) in [("student: { type: vit }", "`student`"), ("best: { metric: accuracy }", "`best`")] {
        refused(
            &format!("a: {{ every_epochs: 1, stage: {{ {probe}, {option} }} }}"),
            &["a probe in training judges the student that is trained", said],
        );
    }
    let without = probe.replace("eval: TEST, ", "");
    refused(&format!("a: {{ every_epochs: 1, stage: {{ {without} }} }}"), &["no images to judge the student on"]);
    let evaluate = "a: { every_epochs: 1, stage: { type: evaluate, classifier: { stage: x }, data: TEST } }";
    refused(
        evaluate,
        &[
            "this stage judges no student in training",
            "`knn`, `linear_probe`, `few_shot`, `quality` and `retrieval` do",
        ],
    );
    let unlabelled = json!({ "every_epochs": 1, "stage": { "type": "few_shot" } });
    refused(&format!("a: {unlabelled}"), &["train"]);
}
