//! `run --from`: runs that go on from others under changed recipes.

use std::fs;

use serde_json::Value;

use crate::support::{RunRecord, Sandbox, ends, run_record};

const FEW: [&str; 4] = ["-q", "--threads", "1", "--out"];

fn run(sandbox: &Sandbox, out: &str, arguments: &[&str]) {
    ends(&sandbox.run([&["run"], arguments, &FEW, &[out]].concat()), 0, &[]);
}

fn record(sandbox: &Sandbox, name: &str) -> RunRecord {
    run_record(&sandbox.work().join(name))
}

fn manifest(sandbox: &Sandbox, name: &str) -> Value {
    let text = fs::read_to_string(sandbox.work().join(name).join("manifest.json")).expect("a manifest");
    serde_json::from_str(&text).expect("JSON")
}

fn steps_of(record: &RunRecord, stage: &str) -> Vec<Value> {
    record.steps.iter().filter(|step| step["stage"] == stage && step["loss"].is_number()).cloned().collect()
}

#[test]
fn a_fork_with_nothing_changed_is_the_uninterrupted_run() {
    let sandbox = Sandbox::new();
    run(&sandbox, "whole", &["tiny.yaml"]);
    let whole = record(&sandbox, "whole");
    // In the middle of each stage that trains, and behind all of them.
    for (from, out) in [("whole@6", "six"), ("whole@finetune:4", "tuning"), ("whole", "all")] {
        run(&sandbox, out, &["--from", from]);
        whole.assert_same(&record(&sandbox, out), from);
        ends(&sandbox.run(["runs", "check", out]), 0, &[]);
    }
    let origin = &manifest(&sandbox, "tuning")["origin"];
    assert!(origin["run"].as_str().expect("a path").ends_with("whole"), "{origin}");
    assert_eq!(origin["fingerprint"], manifest(&sandbox, "whole")["fingerprint"]);
    assert_eq!((&origin["stage"], &origin["step"]), (&"finetune".into(), &4.into()));
    assert_eq!(origin["finished_stages"], serde_json::json!(["pretrain"]));
    // A run that was ended early goes on where it stands.
    run(&sandbox, "part", &["tiny.yaml", "--steps", "5"]);
    run(&sandbox, "rest", &["--from", "part"]);
    whole.assert_same(&record(&sandbox, "rest"), "ended early, and forked");
    assert!(manifest(&sandbox, "part")["origin"].is_null());
}

#[test]
fn a_fork_goes_on_under_a_changed_recipe() {
    let sandbox = Sandbox::new();
    run(&sandbox, "first", &["tiny.yaml"]);
    let longer = ["--from", "first", "--set", "stages.pretrain.epochs=3"];
    run(&sandbox, "longer", &longer);
    let (first, second) = (record(&sandbox, "first"), record(&sandbox, "longer"));
    let (before, after) = (steps_of(&first, "pretrain"), steps_of(&second, "pretrain"));
    assert_eq!((before.len(), after.len()), (8, 12));
    assert_eq!(after[..8], before, "what was done stays");
    // The first new loss is that of the weights that were there: whatever the new length, and not those of a run of it.
    run(&sandbox, "longest", &["--from", "first", "--set", "stages.pretrain.epochs=4"]);
    run(&sandbox, "anew", &["tiny.yaml", "--set", "stages.pretrain.epochs=3"]);
    let loss_of = |run: &str| steps_of(&record(&sandbox, run), "pretrain")[8]["loss"].clone();
    assert_eq!(after[8]["loss"], loss_of("longest"));
    assert_ne!(after[8]["loss"], loss_of("anew"));
    assert_eq!(steps_of(&second, "finetune").len(), 8, "what follows begins anew");
    let origin = &manifest(&sandbox, "longer")["origin"];
    assert_eq!((&origin["stage"], &origin["step"]), (&"pretrain".into(), &8.into()));
    assert_eq!(origin["differences"], serde_json::json!(["stages.pretrain.epochs: 2.0 -> 3.0"]));
    // A fork is a run: it is stopped and continued to the same bits, and keeps its origin.
    run(&sandbox, "stopped", &[&longer[..], &["--steps", "10"]].concat());
    ends(&sandbox.run(["run", "--resume", "stopped", "-q"]), 0, &[]);
    second.assert_same(&record(&sandbox, "stopped"), "stopped and continued");
    assert_eq!(&manifest(&sandbox, "stopped")["origin"], origin);
    // What comes before the change is taken over.
    run(&sandbox, "tuned", &["--from", "first", "--set", "stages.finetune.epochs=3"]);
    let tuned = record(&sandbox, "tuned");
    assert_eq!(tuned.summary["pretrain"], first.summary["pretrain"]);
    assert_eq!(steps_of(&tuned, "pretrain"), before);
    assert_eq!(steps_of(&tuned, "finetune").len(), 12);
    assert_eq!(steps_of(&tuned, "finetune")[..8], steps_of(&first, "finetune"));
    run(&sandbox, "judged", &["--from", "first", "--set", "stages.knn.k=[3]"]);
    assert_eq!(record(&sandbox, "judged").summary["finetune"], first.summary["finetune"]);
    let again = [&["run"], &longer[..], &["--out", "longer", "--resume-or-start", "-q"]].concat();
    let again = sandbox.run(again);
    ends(&again, 0, &[]);
    assert!(String::from_utf8_lossy(&again.stdout).contains("the run is done"));
}

#[test]
fn what_cannot_go_on_is_refused_at_its_place() {
    let sandbox = Sandbox::new();
    run(&sandbox, "first", &["tiny.yaml"]);
    let refused = |more: &[&str], says: &[&str]| {
        let output = sandbox.run([&["run", "--out", "other"], more].concat());
        ends(&output, 2, says);
        assert!(!sandbox.work().join("other").exists(), "{more:?}");
    };
    let alone = ["--set", "stages.finetune=null", "--set", "stages.knn=null"];
    let set = |value: &'static str, says: &[&str]| {
        refused(&[&["--from", "first", "--set", value], &alone[..]].concat(), says);
    };
    set("stages.pretrain.student.arch.dim=48", &["stages.pretrain.student.arch.dim=48", "in the checkpoint of step 8"]);
    set("stages.pretrain.student.arch.depth=3", &["stages.pretrain.student.arch.depth=3", "is not in the checkpoint"]);
    let adds = "stages.pretrain.objectives.more={target: {type: pixels}, tokens: [masked], loss: {type: mse}, aligner: \
                {type: decoder, dim: 16, depth: 1, heads: 2}}";
    set(adds, &["decoder_embed.weight` is not in the checkpoint of step 8"]);
    set(
        "stages.pretrain.optimizer={type: lars, base_lr: 1}",
        &["the checkpoint has the state of `adamw`", "optimizer"],
    );
    set("stages.pretrain.epochs=1", &["stages.pretrain.epochs=1", "after step 8", "the stage ends after 4"]);
    set("stages.pretrain.batch.effective=32", &["batch.effective=32", "an epoch has 2 now"]);
    refused(&["--from", "first@8"], &["step 8 is a checkpoint of `pretrain` and of `finetune`", "first@pretrain:8"]);
    refused(&["--from", "first@5"], &["no checkpoint at step 5", "pretrain: 6, 8; finetune: 4, 8"]);
    refused(&["--from", "first@finetune:6"], &["no checkpoint of stage `finetune` at step 6"]);
    refused(&["--from", "first@x"], &["expected RUN, RUN@STEP or RUN@STAGE:STEP"]);
    refused(&["--from", "gone"], &["gone"]);
    let changed = ["--from", "first@finetune:4", "--set", "stages.pretrain.epochs=3"];
    refused(&changed, &["stages.pretrain.epochs=3", "step 4 of `finetune` was reached after this stage"]);
    refused(&["good.yaml", "--from", "first"], &["student"]);
    let itself = sandbox.run(["run", "--from", "first", "--out", "first", "--force"]);
    ends(&itself, 2, &["is the run to go on from"]);
    assert!(sandbox.work().join("first/summary.json").is_file());
}

#[test]
fn a_fork_takes_the_best_state_along() {
    let sandbox = Sandbox::new();
    let keeps = [
        "stages.finetune.best={metric: accuracy, patience_epochs: 2}",
        "stages.finetune.epochs=6",
        "stages.finetune.optimizer.base_lr=0.3",
    ];
    let sets: Vec<&str> = keeps.iter().flat_map(|set| ["--set", set]).collect();
    run(&sandbox, "whole", &[&["tiny.yaml"], &sets[..]].concat());
    let whole = record(&sandbox, "whole");
    let tuned = &whole.summary["finetune"];
    assert_eq!((&tuned["stopped_early"], &tuned["best"]["step"]), (&true.into(), &12.into()), "{tuned}");
    // From behind the best state, and from a stage that ended before its last step.
    for (from, out) in [("whole@finetune:16", "inside"), ("whole", "behind")] {
        run(&sandbox, out, &["--from", from]);
        whole.assert_same(&record(&sandbox, out), from);
        ends(&sandbox.run(["runs", "check", out]), 0, &[]);
    }
    assert_eq!(
        manifest(&sandbox, "behind")["origin"]["finished_stages"],
        serde_json::json!(["pretrain", "finetune", "knn"])
    );
}
