//! What must not change a run's result does not; and what a run may delete.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use maskalign_core::weights::{TensorFile, TensorMap};

#[cfg(unix)]
use crate::support::after_records;
use crate::support::{Sandbox, ends, files_below, here, run_record};

fn run(sandbox: &Sandbox, arguments: &[&str]) {
    let output = sandbox.run(["run", "tiny.yaml", "-q"].iter().chain(arguments));
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn threads_workers_and_recomputation_change_nothing() {
    let sandbox = Sandbox::new();
    run(&sandbox, &["--out", "one", "--threads", "1"]);
    let one = run_record(&sandbox.work().join("one"));
    let others: [(&str, &[&str]); 4] = [
        ("two threads", &["--threads", "2"]),
        ("three threads", &["--threads", "3", "--workers", "2"]),
        ("workers", &["--threads", "1", "--workers", "3"]),
        ("recompute", &["--threads", "1", "--recompute"]),
    ];
    for (what, flags) in others {
        let out = what.replace(' ', "_");
        run(&sandbox, &[&["--out", &out], flags].concat());
        one.assert_same(&run_record(&sandbox.work().join(&out)), what);
    }
}

/// A run that `--steps` ended goes on with more steps, and what was built on the shorter stage is made again.
#[test]
fn a_run_ended_by_steps_goes_on() {
    let sandbox = Sandbox::new();
    run(&sandbox, &["--out", "whole"]);
    run(&sandbox, &["--out", "run", "--steps", "3"]);
    let dir = sandbox.work().join("run");
    let short = run_record(&dir);
    assert_eq!(short.summary["pretrain"]["steps"], 3);
    run(&sandbox, &["--resume", "run", "--steps", "3"]);
    short.assert_same(&run_record(&dir), "the same end");
    run(&sandbox, &["--resume", "run", "--steps", "5"]);
    assert_eq!(run_record(&dir).summary["finetune"]["steps"], 5);
    run(&sandbox, &["--resume", "run"]);
    run_record(&sandbox.work().join("whole")).assert_same(&run_record(&dir), "three steps, five, all");
}

/// What follows the parameters, and what a forward pass follows, is in the checkpoints.
#[test]
fn a_moving_teacher_and_a_probe_go_on_exactly() {
    let sandbox = Sandbox::new();
    let run = |arguments: &[&str]| {
        let output = sandbox.run(["run", "moving.yaml", "-q"].iter().chain(arguments));
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    run(&["--out", "whole"]);
    run(&["--out", "run", "--steps", "3"]);
    run(&["--resume", "run"]);
    let [whole, resumed] = ["whole", "run"].map(|dir| sandbox.work().join(dir));
    run_record(&whole).assert_same(&run_record(&resumed), "three steps, then all");
    for stage in ["pretrain", "probe"] {
        let last =
            |dir: &Path| fs::read(dir.join(format!("checkpoints/{stage}/step-00000008.safetensors"))).expect("it");
        assert!(last(&whole) == last(&resumed), "{stage}: the last checkpoints differ");
    }
    let checkpoint = fs::read(whole.join("checkpoints/pretrain/step-00000008.safetensors")).expect("it");
    let holds = |name: &str| checkpoint.windows(name.len()).any(|bytes| bytes == name.as_bytes());
    assert!(holds("model.teachers.ema.blocks.1.mlp.fc2.weight"), "the teacher's state is in the checkpoint");
    let output = sandbox.run(["export", "run", "--stage", "pretrain", "--out", "student.safetensors"]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let exported = fs::read(sandbox.work().join("student.safetensors")).expect("it");
    let text = String::from_utf8_lossy(&exported[..exported.len().min(4096)]).into_owned();
    assert!(text.contains("blocks.0.ls1.gamma") && !text.contains("mask_token"), "{text}");
}

/// dBOT: the student of one stage is the teacher of the next, whose student is drawn anew. Interrupted in the second stage.
#[test]
fn a_student_that_becomes_a_teacher_goes_on_exactly() {
    let sandbox = Sandbox::new();
    let recipe = here().join("../recipes/small/dbot.yaml");
    let sets = [
        "stages.pretrain.data.dataset.limit=64",
        "stages.second.data.dataset.limit=64",
        "stages.second.epochs=3",
        "~stages.knn",
    ];
    let run = |arguments: &[&str]| {
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        let recipe = recipe.to_str().expect("UTF-8");
        let output = sandbox.run(["run", recipe, "-q"].into_iter().chain(sets).chain(arguments.iter().copied()));
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    run(&["--out", "whole"]);
    // As long as the first stage, and less than the second.
    run(&["--out", "run", "--steps", "8"]);
    run(&["--resume", "run"]);
    let [whole, resumed] = ["whole", "run"].map(|dir| sandbox.work().join(dir));
    let record = run_record(&whole);
    assert_eq!((&record.summary["pretrain"]["steps"], &record.summary["second"]["steps"]), (&8.into(), &12.into()));
    record.assert_same(&run_record(&resumed), "eight steps, then all");
    let file = |dir: &Path, file: &str| fs::read(dir.join("checkpoints").join(file)).expect(file);
    for last in ["pretrain/step-00000008.safetensors", "second/step-00000012.safetensors"] {
        assert!(file(&whole, last) == file(&resumed, last), "{last}: the last checkpoints differ");
    }
    assert!(file(&whole, "pretrain/final.safetensors") != file(&whole, "second/final.safetensors"));
}

/// Layers that are frozen stay so, and the others go on, where a run is interrupted after the first were.
#[test]
fn frozen_layers_go_on_exactly() {
    let sandbox = Sandbox::new();
    let recipe = here().join("../recipes/small/vitfreeze.yaml");
    let sets = [
        "stages.pretrain.data.dataset.limit=64",
        "stages.pretrain.checkpoints={every_steps: 1, keep_last: 9}",
        "~stages.knn",
    ];
    let run = |arguments: &[&str]| {
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        let recipe = recipe.to_str().expect("UTF-8");
        let output = sandbox.run(["run", recipe, "-q"].into_iter().chain(sets).chain(arguments.iter().copied()));
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    run(&["--out", "whole"]);
    run(&["--out", "run", "--steps", "6"]);
    run(&["--resume", "run"]);
    let [whole, resumed] = ["whole", "run"].map(|dir| sandbox.work().join(dir));
    let record = run_record(&whole);
    record.assert_same(&run_record(&resumed), "six steps, then all");
    let state = |step: u64| {
        let file = whole.join(format!("checkpoints/pretrain/step-{step:08}.safetensors"));
        TensorFile::open(&file).and_then(|file| file.read_all()).expect("a checkpoint")
    };
    let [before, six, last] = [1, 6, 8].map(state);
    let same = |a: &TensorMap, b: &TensorMap, name: &str| a[name].data == b[name].data;
    // 0.512 of what follows the warm-up is less than half of eight steps.
    for name in ["model.patch_embed.proj.weight", "model.blocks.0.mlp.fc1.weight", "model.fine.decoder_pred.weight"] {
        assert!(!same(&before, &six, name) && same(&six, &last, name), "{name} is trained, then frozen");
    }
    for name in ["model.cls_token", "model.blocks.2.mlp.fc1.weight", "model.last.decoder_pred.weight"] {
        assert!(!same(&six, &last, name), "{name} is trained to the end");
    }
}

/// Crops, masks by a moving teacher's attention, its head and its centres are those of a run that was not interrupted; a view
/// that nobody compares is not cut, and changes nothing.
#[test]
fn views_of_a_moving_teacher_go_on_exactly() {
    let sandbox = Sandbox::new();
    let run = |arguments: &[&str]| {
        let output = sandbox.run(["run", "views.yaml"].iter().chain(arguments));
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {err}");
        err
    };
    let said = run(&["--out", "whole", "--threads", "1"]);
    assert!(said.contains("no objective compares view `idle`: it is not cut"), "{said}");
    run(&["-q", "--out", "run", "--steps", "3"]);
    run(&["-q", "--resume", "run"]);
    run(&["-q", "--out", "less", "--set", "stages.pretrain.data.views.idle=null"]);
    let [whole, resumed, less] = ["whole", "run", "less"].map(|dir| sandbox.work().join(dir));
    run_record(&whole).assert_same(&run_record(&resumed), "three steps, then all");
    let last = |dir: &Path| fs::read(dir.join("checkpoints/pretrain/step-00000008.safetensors")).expect("it");
    assert!(last(&whole) == last(&resumed), "the last checkpoints differ");
    let values = |dir: &Path| -> TensorMap {
        let file = dir.join("checkpoints/pretrain/step-00000008.safetensors");
        TensorFile::open(&file).and_then(|file| file.read_all()).expect("tensors")
    };
    let (all, fewer) = (values(&whole), values(&less));
    assert!(all == fewer, "a view that is not compared changes something");
    for name in ["teachers.ema.cls.mlp.0.weight", "teachers.ema.cls.center", "teachers.ema.patches.center"] {
        let values = &all[&format!("model.{name}")].data;
        assert!(values.iter().any(|value| *value != 0.0), "{name} has not moved");
    }
    assert!(!all.contains_key("model.patches.mlp.0.weight"), "the map is shared");
}

/// Fine-tuning and probing that leave the best state of a moving average, and give up early.
const KEPT: [&str; 7] = [
    "stages.pretrain.epochs=1",
    "stages.finetune.epochs=12",
    "stages.finetune.optimizer.base_lr=0.2",
    "stages.finetune.ema={momentum: 0.5}",
    "stages.finetune.best={patience_epochs: 2}",
    "stages.probe={type: linear_probe, epochs: 2.5, data: {dataset: {type: sample, split: train, limit: 64}}, \
     eval: {dataset: {type: sample, split: test, limit: 20}}, student: {type: vit, weights: {stage: pretrain}}, \
     optimizer: {type: lars, base_lr: 1}, schedule: {type: cosine}, batch: {effective: 16}, ema: {momentum: 0.9}, \
     best: {metric: top_5_accuracy, every_epochs: 2}, checkpoints: {every_steps: 3}}",
    "stages.evaluate={type: evaluate, classifier: {stage: finetune}, data: {dataset: {type: sample, split: test, limit: 20}}}",
];

/// What of a run's checkpoints must be the same, however it came about: all but what only goes on from it.
fn checkpoints(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = files_below(&dir.join("checkpoints"));
    let read = |name: String| (name.clone(), fs::read(dir.join("checkpoints").join(name)).expect("a file"));
    files.into_iter().map(read).collect()
}

#[test]
fn the_best_state_and_an_early_end_are_those_of_a_run_that_was_not_interrupted() {
    let sandbox = Sandbox::new();
    let run = |arguments: &[&str]| {
        let sets = KEPT.iter().flat_map(|set| ["--set", set]);
        let output = sandbox.run(["run", "tiny.yaml", "-q"].into_iter().chain(sets).chain(arguments.iter().copied()));
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    run(&["--out", "whole"]);
    let dir = sandbox.work().join("whole");
    let whole = run_record(&dir);
    let (summary, left) = (&whole.summary, checkpoints(&dir));

    let tuned = &summary["finetune"];
    let (best, measured) = (&tuned["best"], tuned["eval"].as_array().expect("one an epoch"));
    let accuracies: Vec<f64> = measured.iter().map(|epoch| epoch["accuracy"].as_f64().expect("a share")).collect();
    let most = accuracies.iter().copied().fold(0.0, f64::max);
    let at = accuracies.iter().position(|accuracy| *accuracy == most).expect("one of them");
    assert!(at > 0, "the first is not the best in this recipe: {accuracies:?}");
    assert_eq!((best["accuracy"].as_f64(), best["epoch"].as_u64()), (Some(most), Some(at as u64 + 1)), "{tuned}");
    assert_eq!(best["step"], 4 * (at + 1));
    assert_eq!((tuned["stopped_early"].as_bool(), measured.len()), (Some(true), at + 3), "two epochs more: {tuned}");
    assert_eq!(tuned["steps"], 4 * (at + 3));
    assert_eq!(tuned["accuracy"], best["accuracy"]);
    assert_eq!(summary["evaluate"]["accuracy"], best["accuracy"], "later stages take what was the best");
    let probe = &summary["probe"];
    let epochs: Vec<f64> =
        probe["eval"].as_array().expect("some").iter().map(|at| at["epoch"].as_f64().expect("it")).collect();
    assert_eq!(epochs, [2.0, 2.5], "the end is measured too");
    assert!(probe["stopped_early"].is_null());
    let manifest = fs::read_to_string(dir.join("manifest.json")).expect("a manifest");
    let manifest: serde_json::Value = serde_json::from_str(&manifest).expect("JSON");
    assert_eq!(manifest["best"][0]["stage"], "finetune");
    assert_eq!(manifest["best"][0]["value"].as_f64(), Some(most));
    assert_eq!(manifest["best"][0]["stopped_early"], true);

    // What is left is the best file's, tensor for tensor.
    let tensors = |name: &str| {
        let bytes = &left[name];
        let header = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
        bytes[8 + header..].to_vec()
    };
    let best_file = format!("finetune/best-{:08}.safetensors", best["step"].as_u64().expect("a step"));
    assert!(tensors(&best_file) == tensors("finetune/final.safetensors"));
    let files = |stage: &str| left.keys().filter(|name| name.starts_with(stage)).count();
    assert_eq!((files("finetune/best-"), files("probe/best-")), (1, 1), "{:?}", left.keys());

    // In the midst of an epoch, at its end, before the best state, at it, and after it.
    let step = best["step"].as_u64().expect("a step");
    for stops in [vec![1], vec![step - 1, step, step + 1], vec![4, step + 5, step + 8]] {
        let name = format!("parts{}", stops[0]);
        let _ = fs::remove_dir_all(sandbox.work().join(&name));
        let mut begin = ["--out", &name];
        for end in &stops {
            run(&[&begin[..], &["--steps", &end.to_string()]].concat());
            begin[0] = "--resume";
        }
        run(&["--resume", &name]);
        let dir = sandbox.work().join(&name);
        whole.assert_same(&run_record(&dir), &format!("{stops:?}"));
        let parts = checkpoints(&dir);
        assert_eq!(parts.keys().collect::<Vec<_>>(), left.keys().collect::<Vec<_>>(), "{stops:?}");
        for (name, bytes) in &left {
            assert!(parts[name] == *bytes, "{stops:?}: {name}");
        }
    }
    // A stage that ended early is finished.
    let before = checkpoints(&dir);
    run(&["--resume", "whole"]);
    assert!(checkpoints(&dir) == before);

    fs::remove_file(dir.join("checkpoints").join(&best_file)).expect("removed");
    fs::remove_file(dir.join("checkpoints/finetune/done.json")).expect("removed");
    let sets = KEPT.iter().flat_map(|set| ["--set", set]);
    let gone = sandbox.run(["run", "tiny.yaml", "--resume", "whole", "-q"].into_iter().chain(sets));
    ends(&gone, 2, &[&best_file, "the best state of the stage is gone", "put back a copy"]);
}

/// With a momentum of 0 the average is what was trained, and the run is the one without an average.
#[test]
fn an_average_of_the_last_state_alone_changes_nothing() {
    let sandbox = Sandbox::new();
    run(&sandbox, &["--out", "plain"]);
    run(&sandbox, &["--out", "average", "--set", "stages.finetune.ema={momentum: 0}"]);
    run(&sandbox, &["--out", "still", "--set", "stages.finetune.ema={momentum: 0.999999}"]);
    let [plain, average, still] = ["plain", "average", "still"].map(|dir| run_record(&sandbox.work().join(dir)));
    assert_eq!(average.steps, plain.steps);
    assert_eq!(average.summary, plain.summary);
    assert_eq!(still.summary["pretrain"], plain.summary["pretrain"]);
    assert_eq!(still.summary["finetune"]["loss"], plain.summary["finetune"]["loss"], "what is trained is the same");
    assert_ne!(still.finals["finetune"], plain.finals["finetune"], "what is left is not");
}

#[test]
fn a_resumed_run_keeps_its_recipe() {
    let sandbox = Sandbox::new();
    run(&sandbox, &["--out", "one"]);
    let again = sandbox.run(["run", "tiny.yaml", "--out", "one"]);
    assert_eq!(again.status.code(), Some(2), "a directory that is not empty");
    let other = sandbox.run(["run", "tiny.yaml", "--set", "stages.pretrain.masker.ratio=0.5", "--resume", "one"]);
    assert_eq!(other.status.code(), Some(2));
    let err = String::from_utf8_lossy(&other.stderr);
    assert!(err.contains("stages.pretrain.masker.ratio: 0.75 -> 0.5"), "{err}");
}

#[test]
fn force_deletes_what_a_run_made_and_nothing_else() {
    let sandbox = Sandbox::new();
    run(&sandbox, &["--out", "run"]);
    let first = run_record(&sandbox.work().join("run"));
    let dir = sandbox.work().join("run");
    fs::write(dir.join("notes.txt"), "mine").expect("written");
    fs::write(dir.join("checkpoints/pretrain/mine.safetensors"), "mine").expect("written");
    fs::write(dir.join("checkpoints/pretrain/step-99999999.safetensors"), "a run's, by its name").expect("written");
    run(&sandbox, &["--out", "run", "--force"]);
    assert_eq!(fs::read_to_string(dir.join("notes.txt")).expect("kept"), "mine");
    assert_eq!(fs::read_to_string(dir.join("checkpoints/pretrain/mine.safetensors")).expect("kept"), "mine");
    assert!(!dir.join("checkpoints/pretrain/step-99999999.safetensors").exists());
    first.assert_same(&run_record(&dir), "--force");

    fs::create_dir(sandbox.work().join("home")).expect("a folder");
    fs::write(sandbox.work().join("home/thesis.tex"), "mine").expect("written");
    let refused = sandbox.run(["run", "tiny.yaml", "--out", "home", "--force"]);
    assert_eq!(refused.status.code(), Some(2), "a folder that no run made");
    assert_eq!(fs::read_dir(sandbox.work().join("home")).expect("a folder").count(), 1);
}

#[cfg(unix)]
#[test]
fn stopped_runs_go_on_exactly() {
    let sandbox = Sandbox::new();
    // Long enough for a signal to come in its midst.
    let longer = ["--set", "stages.pretrain.epochs=60"];
    run(&sandbox, &[&longer[..], &["--out", "whole"]].concat());
    let whole = run_record(&sandbox.work().join("whole"));
    for (name, code) in [("TERM", 143), ("INT", 130)] {
        let command = sandbox.command(["run", "tiny.yaml", "-q", "--out", name].iter().chain(&longer));
        let child = after_records(command, &sandbox.work().join(name), 3);
        let sent = Command::new("kill").args([format!("-{name}"), child.id().to_string()]).status().expect("kill");
        assert!(sent.success());
        let output = child.wait_with_output().expect("it ends");
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{err}");
        // Evaluations have lines of their own; a step's has a loss.
        let metrics = fs::read_to_string(sandbox.work().join(name).join("metrics.jsonl")).expect("metrics");
        let done = metrics.lines().filter(|line| line.contains("\"loss\"")).count();
        let saved = sandbox.work().join(name).join(format!("checkpoints/pretrain/step-{done:08}.safetensors"));
        assert!(saved.exists(), "the state after step {done} is saved");
        run(&sandbox, &[&longer[..], &["--resume", name]].concat());
        whole.assert_same(&run_record(&sandbox.work().join(name)), name);
    }
}
