//! What must not change a run's result does not; and what a run may delete.

use std::{fs, path::Path, process::Command};

#[cfg(unix)]
use crate::support::after_records;
use crate::support::{Sandbox, run_record};

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
