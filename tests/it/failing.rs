//! A step whose loss or gradient is not finite is kept, explained and made again.

use std::{collections::BTreeMap, fs, path::Path};

use maskalign_core::weights::{self, write_safetensors};
use serde_json::Value;

use crate::support::{Sandbox, ends, files_below};

fn read_json(path: &Path) -> Value {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).expect("JSON")
}

/// Every file of a folder, by its path.
fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    files_below(folder).into_iter().map(|file| (file.clone(), fs::read(folder.join(&file)).expect("it"))).collect()
}

/// A replay and its two records.
fn replay(sandbox: &Sandbox, run: &str, flags: &[&str], code: i32) -> (Value, Value) {
    let output = sandbox.run(["runs", "replay", run, "--json"].iter().chain(flags));
    assert_eq!(output.status.code(), Some(code), "{}", String::from_utf8_lossy(&output.stderr));
    let both: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    (both["then"].clone(), both["now"].clone())
}

/// A teacher whose weights are finite and too large: its first block overflows in the first step.
#[test]
fn the_block_that_overflows_is_named() {
    let sandbox = Sandbox::new();
    let work = sandbox.work();
    let teacher = "stages.pretrain.student={type: vit, arch: {dim: 16, depth: 2, heads: 2, patch: 7}}";
    let trained =
        sandbox.run(["run", "good.yaml", "--set", teacher, "--set", "~stages.knn", "--steps", "1", "--out", "t", "-q"]);
    ends(&trained, 0, &[]);
    let file = work.join("teacher.safetensors");
    ends(
        &sandbox.run(["export", "t", "--stage", "pretrain", "--format", "timm", "--out", "teacher.safetensors"]),
        0,
        &[],
    );
    let whole = fs::read(&file).expect("weights");
    let mut tensors = weights::read(&file).expect("weights");
    tensors.get_mut("blocks.0.mlp.fc2.weight").expect("it").data.fill(3e38);
    write_safetensors(&file, &tensors, None).expect("written");
    let data = "stages.pretrain.data={dataset: {type: sample, split: train, limit: 64}}";
    let output = sandbox.run(["run", "aligned.yaml", "--set", data, "--out", "run", "-q"]);
    ends(
        &output,
        1,
        &[
            "at step 0",
            "it began in `",
            "` of `teachers.small.blocks.0`: ",
            "failed-00000000.json",
            "maskalign runs replay run",
            "no checkpoint is good",
        ],
    );
    let kept = read_json(&work.join("run/checkpoints/pretrain/failed-00000000.json"));
    let names = kept["first"]["parameters"].as_array().expect("names");
    assert!(names.contains(&Value::from("teachers.small.blocks.0.mlp.fc2.weight")), "{names:?}");
    assert_eq!((&kept["parameters"], &kept["repeats"]), (&Value::Array(Vec::new()), &Value::Bool(true)));
    let before = contents(&work.join("run"));
    let (then, now) = replay(&sandbox, "run", &[], 0);
    assert_eq!(then, now, "the same machine, the same step");
    assert!(before == contents(&work.join("run")), "a replay writes nothing");

    // With the teacher as it was, nothing is wrong with the step.
    fs::write(&file, whole).expect("written");
    let (_, now) = replay(&sandbox, "run", &[], 1);
    assert_eq!((&now["repeats"], &now["first"]), (&Value::Bool(false), &Value::Null));
    assert!(now["value"].is_number(), "{now}");
}

#[test]
fn a_rate_that_is_too_high_leaves_a_step_that_can_be_made_again() {
    let sandbox = Sandbox::new();
    let run = sandbox.work().join("run");
    // One fails by its loss, the other by a gradient, both after updates.
    for (rate, what, pass) in [("1e20", "loss", "forward"), ("1e4", "norm of the gradients", "backward")] {
        let rate = format!("stages.pretrain.optimizer.base_lr={rate}");
        let output = sandbox.run(["run", "tiny.yaml", "--out", "run", "--force", "-q", "--set", &rate]);
        ends(&output, 1, &[&format!("the {what} is NaN at step"), "it began in"]);
        let folder = run.join("checkpoints/pretrain");
        let kept: Vec<String> = files_below(&folder).into_iter().filter(|file| file.starts_with("failed-")).collect();
        assert_eq!(kept.len(), 2, "of this run alone: {kept:?}");
        for flags in [&[][..], &["--threads", "1"], &["--threads", "3", "--recompute"]] {
            let (then, now) = replay(&sandbox, "run", flags, 0);
            assert_eq!((&now["what"], &now["first"]["pass"]), (&what.into(), &pass.into()));
            // Blocks that are computed again show their operators twice.
            let whole = !flags.contains(&"--recompute");
            assert!(!whole || then == now, "{flags:?}: {then} {now}");
            assert_eq!(then["micro_batches"], now["micro_batches"]);
        }
        let parts = replay(&sandbox, "run", &[], 0).1["micro_batches"].as_array().expect("a list").len();
        assert_eq!(parts, if what == "loss" { 1 } else { 2 }, "what follows a loss that is not finite is not computed");
        ends(&sandbox.run(["runs", "check", "run"]), 0, &[]);
    }
    let output = sandbox.run(["runs", "list", "run"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("failed") && text.contains("maskalign runs replay"), "{text}");
    let output = sandbox.run(["runs", "replay", "run"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for part in ["the norm of the gradients is NaN again", "not finite", "micro-batch 1", "term pixels: "] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let state = files_below(&run).into_iter().find(|file| file.contains("failed-") && file.ends_with("safetensors"));
    let state = run.join(state.expect("the state"));
    let mut bytes = fs::read(&state).expect("it");
    *bytes.last_mut().expect("bytes") ^= 1;
    fs::write(&state, bytes).expect("written");
    ends(&sandbox.run(["runs", "replay", "run"]), 2, &["its content differs from its checksum"]);
    ends(&sandbox.run(["runs", "check", "run"]), 1, &[]);
}

/// A stage that builds on an earlier one, and a run in which nothing failed.
#[test]
fn a_later_stage_is_replayed_on_what_the_earlier_one_left() {
    let sandbox = Sandbox::new();
    let rate = ["--set", "stages.finetune.optimizer.base_lr=1e25"];
    let output = sandbox.run(["run", "tiny.yaml", "--out", "run", "-q"].iter().chain(&rate));
    ends(&output, 1, &["it began in"]);
    let (then, now) = replay(&sandbox, "run", &[], 0);
    assert_eq!((&then, &now["stage"]), (&now, &"finetune".into()));
    ends(&sandbox.run(["runs", "replay", "run", "--stage", "pretrain"]), 2, &["no step of stage `pretrain`"]);
    ends(
        &sandbox.run(["runs", "replay", "run", "--stage", "fine"]),
        2,
        &["no stage `fine`", "pretrain, finetune, knn"],
    );
    ends(&sandbox.run(["runs", "replay", "elsewhere"]), 2, &["elsewhere"]);
    ends(&sandbox.run(["run", "tiny.yaml", "--out", "good", "--steps", "2", "-q"]), 0, &[]);
    ends(&sandbox.run(["runs", "replay", "good"]), 2, &["no step of the run in good was kept"]);
}
