//! A run that is killed at any moment and resumed ends as if nothing had happened.
//!
//! Needs the feature `failpoints`: `cargo test -p maskalign-tests --features failpoints kill::`.

use std::fs;

use crate::support::{Sandbox, ends, files_below, run_record};

/// Runs or resumes until a fail point ends the process.
fn killed_at(sandbox: &Sandbox, arguments: &[&str], place: &str) {
    let output = sandbox.command(arguments).env("MASKALIGN_FAIL", place).output().expect("it starts");
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{place} was not reached");
    assert!(output.status.code().is_none() || cfg!(not(unix)), "{place}: ended by itself\n{err}");
}

fn finished(sandbox: &Sandbox, arguments: &[&str], what: &str) {
    let output = sandbox.run(arguments);
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{what}: {err}");
}

fn places() -> Vec<String> {
    let mut all = Vec::new();
    // How often each kind of file is written: 3 stages; checkpoints of two of them after steps 2, 4, 6 of 8; the
    // manifest at the beginning and at the end.
    for (what, times) in
        [("recipe", 1), ("manifest", 2), ("checkpoint", 4), ("final", 3), ("done", 3), ("summary", 3), ("marks", 3)]
    {
        for moment in ["write", "sync", "rename", "renamed"] {
            all.extend((1..=times).map(|time| format!("{what}.{moment}:{time}")));
        }
    }
    // Four steps, an evaluation, and that again; then the eight steps of fine-tuning, and three results of k-NN.
    all.extend([1, 2, 3, 4, 5, 6, 9, 10, 11, 18, 19, 20, 21].map(|time| format!("metrics.append:{time}")));
    all.extend([1, 2, 3].map(|time| format!("stage.after:{time}")));
    all
}

#[test]
fn a_killed_run_goes_on_exactly() {
    let sandbox = Sandbox::new();
    let run = ["run", "tiny.yaml", "--out", "whole", "--threads", "1", "-q"];
    finished(&sandbox, &run, "uninterrupted");
    let whole = run_record(&sandbox.work().join("whole"));
    // 16 steps, nearest neighbours after each of two epochs, and those of three towers at the end.
    assert_eq!(whole.steps.len(), 21);
    assert_eq!(whole.finals.len(), 3);
    let files = files_below(&sandbox.work().join("whole"));
    for place in places() {
        let dir = sandbox.work().join("killed");
        killed_at(&sandbox, &["run", "tiny.yaml", "--out", "killed", "--threads", "1", "-q"], &place);
        finished(&sandbox, &["run", "tiny.yaml", "--resume", "killed", "--threads", "1", "-q"], &place);
        whole.assert_same(&run_record(&dir), &place);
        assert_eq!(files_below(&dir), files, "{place}: other files are left");
        fs::remove_dir_all(&dir).expect("removed");
    }
}

#[test]
fn a_run_survives_kill_upon_kill() {
    let sandbox = Sandbox::new();
    finished(&sandbox, &["run", "tiny.yaml", "--out", "whole", "-q"], "uninterrupted");
    killed_at(&sandbox, &["run", "tiny.yaml", "--out", "killed", "-q"], "metrics.append:4");
    let resume = ["run", "tiny.yaml", "--resume", "killed", "-q"];
    for place in [
        "manifest.rename:1",
        "metrics.append:1",
        "checkpoint.write:1",
        "checkpoint.renamed:2",
        "final.sync:1",
        "done.write:1",
    ] {
        killed_at(&sandbox, &resume, place);
    }
    for place in ["metrics.append:7", "stage.after:1", "summary.rename:1", "manifest.write:2"] {
        killed_at(&sandbox, &resume, place);
    }
    finished(&sandbox, &resume, "the last");
    let [whole, killed] = ["whole", "killed"].map(|dir| run_record(&sandbox.work().join(dir)));
    whole.assert_same(&killed, "kill upon kill");
}

/// A best state that checkpoints count on, and one that later gives way to a better one.
#[test]
fn a_run_that_keeps_its_best_state_is_killed_and_goes_on_exactly() {
    let sandbox = Sandbox::new();
    let keeps = ["~stages.knn", "stages.finetune.best={metric: loss}", "stages.finetune.epochs=4"];
    let sets: Vec<&str> = keeps.iter().flat_map(|set| ["--set", set]).collect();
    let run = |out: &'static str| [&["run", "tiny.yaml", "--out", out, "--threads", "1", "-q"], &sets[..]].concat();
    finished(&sandbox, &run("whole"), "uninterrupted");
    let dir = sandbox.work().join("whole");
    let (whole, files) = (run_record(&dir), files_below(&dir));
    let course = whole.summary["finetune"]["eval"].as_array().expect("measurements").len();
    assert_eq!(course, 4, "{}", whole.summary["finetune"]);
    let moments = ["write", "sync", "rename", "renamed"];
    let places = moments.iter().flat_map(|moment| (1..=2).map(move |time| format!("best.{moment}:{time}")));
    // And around what follows it: the checkpoint that counts on it, and what the stage leaves.
    let around = ["checkpoint.write:5", "checkpoint.renamed:5", "final.write:2", "final.renamed:2", "done.write:2"];
    for place in places.chain(around.map(String::from)) {
        killed_at(&sandbox, &run("killed"), &place);
        finished(&sandbox, &["run", "--resume", "killed", "--threads", "1", "-q"], &place);
        let dir = sandbox.work().join("killed");
        whole.assert_same(&run_record(&dir), &place);
        assert_eq!(files_below(&dir), files, "{place}: other files are left");
        fs::remove_dir_all(&dir).expect("removed");
    }
}

/// Nothing of a fork counts before all that it takes over is there: the same command begins it anew.
#[test]
fn a_fork_that_is_killed_at_its_beginning_begins_anew() {
    let sandbox = Sandbox::new();
    let keeps = ["stages.finetune.best={metric: loss}", "stages.finetune.epochs=3"];
    let sets: Vec<&str> = keeps.iter().flat_map(|set| ["--set", set]).collect();
    let first = [&["run", "tiny.yaml", "--out", "first", "--threads", "1", "-q"], &sets[..]].concat();
    finished(&sandbox, &first, "the first run");
    let fork = |out: &'static str| ["run", "--from", "first@finetune:12", "--out", out, "--threads", "1", "-q"];
    finished(&sandbox, &fork("whole"), "uninterrupted");
    let dir = sandbox.work().join("whole");
    let (whole, files) = (run_record(&dir), files_below(&dir));
    whole.assert_same(&run_record(&sandbox.work().join("first")), "a fork with nothing changed");
    let mut again =
        vec![fork("killed").to_vec(), [&fork("killed")[..], &["--resume-or-start"]].concat()].into_iter().cycle();
    for place in [
        "final.write:1",
        "final.renamed:1",
        "done.write:1",
        "done.renamed:1",
        "summary.renamed:1",
        "marks.renamed:1",
        "best.write:1",
        "best.renamed:1",
        "checkpoint.write:1",
        "checkpoint.renamed:1",
        "recipe.write:1",
        "recipe.renamed:1",
        "manifest.write:1",
        "manifest.renamed:1",
    ] {
        killed_at(&sandbox, &fork("killed"), place);
        let resumed = sandbox.run(["run", "--resume", "killed", "-q"]);
        let says = ["is a fork that was ended while it took over", "`maskalign run --from RUN --out killed`"];
        ends(&resumed, 2, &says);
        finished(&sandbox, &again.next().expect("one of two"), place);
        let dir = sandbox.work().join("killed");
        whole.assert_same(&run_record(&dir), place);
        assert_eq!(files_below(&dir), files, "{place}: other files are left");
        fs::remove_dir_all(&dir).expect("removed");
    }
    // Before it took anything over it left nothing at all.
    for again in [&fork("killed")[..], &[&fork("killed")[..], &["--resume-or-start"]].concat()] {
        killed_at(&sandbox, &fork("killed"), "fork.before:1");
        finished(&sandbox, again, "killed before anything was taken over");
        whole.assert_same(&run_record(&sandbox.work().join("killed")), "killed before anything was taken over");
        fs::remove_dir_all(sandbox.work().join("killed")).expect("removed");
    }
    // Once it has begun, it is a run as any other.
    killed_at(&sandbox, &fork("killed"), "metrics.append:1");
    finished(&sandbox, &["run", "--resume", "killed", "--threads", "1", "-q"], "resumed");
    whole.assert_same(&run_record(&sandbox.work().join("killed")), "killed after its beginning");
    ends(&sandbox.run(fork("killed")), 2, &["not empty"]);
}
