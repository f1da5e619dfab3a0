//! Bad input ends with one clear message at its place, the right exit code and nothing half-written.

use std::{fs, path::Path, process::Output};

use crate::support::{Sandbox, files_in, here, run_record};
use maskalign_core::weights::{self, HostTensor, TensorMap, write_safetensors};

fn copy_folder(from: &Path, to: &Path) {
    for class in ["blobs", "stripes"] {
        fs::create_dir_all(to.join(class)).expect("a folder");
        for file in files_in(&from.join(class)) {
            fs::copy(&file, to.join(class).join(file.file_name().expect("a name"))).expect("a copy");
        }
    }
}

fn write_weights(path: &Path, tensors: &TensorMap) {
    write_safetensors(path, tensors, None).expect("written");
}

/// A sandbox with `images`, `bad` (six files, two of them broken) and `teacher.safetensors`.
fn sandbox() -> (Sandbox, TensorMap) {
    let sandbox = Sandbox::new();
    let work = sandbox.work();
    copy_folder(&here().join("fixtures/images"), &work.join("images"));
    copy_folder(&here().join("fixtures/bad_images"), &work.join("bad"));
    let teacher = "stages.pretrain.student={type: vit, arch: {dim: 16, depth: 2, heads: 2, patch: 7}}";
    let run =
        sandbox.run(["run", "good.yaml", "--set", teacher, "--set", "~stages.knn", "--steps", "1", "--out", "t", "-q"]);
    assert_eq!(run.status.code(), Some(0), "{}", String::from_utf8_lossy(&run.stderr));
    let export = ["export", "t", "--stage", "pretrain", "--format", "timm", "--out", "teacher.safetensors"];
    assert_eq!(sandbox.run(export).status.code(), Some(0));
    let tensors = weights::read(&work.join("teacher.safetensors")).expect("weights");
    (sandbox, tensors)
}

/// Runs `aligned.yaml` with a change.
fn aligned(sandbox: &Sandbox, set: &str, out: &str) -> Output {
    let sets: &[&str] = if set.is_empty() { &[] } else { &["--set", set] };
    sandbox.run(["run", "aligned.yaml", "--out", out, "-q"].iter().chain(sets))
}

/// Holds an end against what it should be; nothing panicked and nothing is half-written.
fn refused(sandbox: &Sandbox, output: &Output, code: i32, says: &[&str]) {
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{says:?}: {err}");
    assert!(!err.contains("panicked") && !err.contains("internal error"), "{err}");
    assert!(!err.contains('\u{fffd}'), "a message with unprintable characters: {err}");
    let messages = err.lines().filter(|line| line.starts_with("error:") || line.contains(" error[")).count();
    assert_eq!(messages, 1, "one message: {err}");
    for part in says {
        assert!(err.contains(part), "expected `{part}` in: {err}");
    }
    let mut open = vec![sandbox.work()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).expect("a folder").flatten() {
            assert!(!entry.file_name().to_string_lossy().ends_with(".tmp"), "{} is left", entry.path().display());
            if entry.path().is_dir() {
                open.push(entry.path());
            }
        }
    }
}

#[test]
fn the_recipe_of_these_tests_runs() {
    let (sandbox, _) = sandbox();
    let output = aligned(&sandbox, "", "run");
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let manifest = fs::read_to_string(sandbox.work().join("run/manifest.json")).expect("a manifest");
    assert!(manifest.contains("teacher.safetensors") && manifest.contains("blake3"), "{manifest}");
}

#[test]
fn mistakes_in_a_recipe_leave_no_directory() {
    let (sandbox, _) = sandbox();
    fs::create_dir(sandbox.work().join("empty")).expect("a folder");
    let cases: [(&str, &[&str]); 8] = [
        ("stages.pretrain.data.dataset.root=nowhere", &["--set:1:35", "no folder `nowhere`"]),
        ("stages.pretrain.data.dataset.root=empty", &["--set:1:35", "no images in `empty`"]),
        (
            "stages.pretrain.teachers.small.weights=nothing.safetensors",
            &["--set:1:40", "no file `nothing.safetensors`"],
        ),
        ("stages.pretrain.student.arch.patch=5", &["28 pixels", "patches of 5"]),
        ("stages.pretrain.teachers.small.arch.patch=4", &["aligned.yaml:"]),
        ("stages.pretrain.student.arch.depth=3", &["`linear` needs", "3 and 2", "fusion: sum"]),
        ("stages.pretrain.objectives.align.target.levels.last=5", &["the last 5 levels of a tower of 2"]),
        ("stages.pretrain.batch.effective=200", &["200 images", "dataset of 8"]),
    ];
    for (set, says) in cases {
        let linear = "stages.pretrain.objectives.align.aligner.fusion=linear";
        let mut arguments = vec!["run", "aligned.yaml", "--out", "run", "-q", "--set", set];
        if set.ends_with("depth=3") {
            arguments.extend(["--set", linear]);
        }
        refused(&sandbox, &sandbox.run(&arguments), 2, says);
        assert!(!sandbox.work().join("run").exists(), "{set}: a directory is left");
    }
    refused(&sandbox, &sandbox.run(["run", "nothing.yaml"]), 2, &["no recipe `nothing.yaml`"]);
}

#[test]
fn weights_that_do_not_fit_are_refused_by_name() {
    let (sandbox, good) = sandbox();
    let work = sandbox.work();
    let with = |change: &dyn Fn(&mut TensorMap)| {
        let mut tensors = good.clone();
        change(&mut tensors);
        write_weights(&work.join("teacher.safetensors"), &tensors);
        let output = aligned(&sandbox, "", "run");
        let _ = fs::remove_dir_all(work.join("run"));
        output
    };
    let name = "blocks.0.attn.qkv.weight";
    let missing = with(&|t| drop(t.remove(name)));
    refused(&sandbox, &missing, 2, &["aligned.yaml:", "1 missing", name]);
    let renamed = with(&|t| {
        let tensor = t.remove(name).expect("there");
        t.insert("blocks.0.attn.qkv.wight".into(), tensor);
    });
    refused(&sandbox, &renamed, 2, &["1 missing", "1 not expected", "nearest name there: `blocks.0.attn.qkv.wight`"]);
    let extra = with(&|t| drop(t.insert("neck.weight".into(), HostTensor { shape: vec![16], data: vec![1.0; 16] })));
    refused(&sandbox, &extra, 2, &["not expected", "neck.weight"]);
    let misshapen =
        with(&|t| drop(t.insert("norm.weight".into(), HostTensor { shape: vec![17], data: vec![1.0; 17] })));
    refused(&sandbox, &misshapen, 2, &["`norm.weight` is [17], expected [16]"]);
    let non_finite = with(&|t| t.get_mut("norm.weight").expect("there").data[3] = f32::NAN);
    refused(&sandbox, &non_finite, 2, &["not finite", "`norm.weight` in 1 of 16 values"]);

    write_weights(&work.join("teacher.safetensors"), &good);
    let whole = fs::read(work.join("teacher.safetensors")).expect("bytes");
    for (bytes, says) in [
        (&whole[..whole.len() / 2], "truncated"),
        (&whole[..5], "safetensors"),
        (&[][..], "empty"),
        (&b"no weights at all"[..], "safetensors"),
    ] {
        fs::write(work.join("teacher.safetensors"), bytes).expect("written");
        refused(&sandbox, &aligned(&sandbox, "", "run"), 2, &["aligned.yaml:", says]);
        let _ = fs::remove_dir_all(work.join("run"));
    }
}

#[test]
fn broken_images_end_a_run_or_are_skipped_and_counted() {
    let (sandbox, _) = sandbox();
    let bad = "stages.pretrain.data.dataset.root=bad";
    let failed = sandbox.run(["run", "aligned.yaml", "--set", bad, "--out", "fail", "-q", "--threads", "1"]);
    refused(&sandbox, &failed, 2, &["on_error: skip"]);
    let err = String::from_utf8_lossy(&failed.stderr);
    assert!(
        err.contains("bad/stripes/a_truncated.jpg is truncated") || err.contains("bad/blobs/text.jpg is not an image"),
        "{err}"
    );

    let skip = ["--set", "stages.pretrain.data.on_error=skip", "--set", bad];
    let skipped = sandbox.run(["run", "aligned.yaml", "--out", "skip"].iter().chain(&skip));
    let err = String::from_utf8_lossy(&skipped.stderr);
    assert_eq!(skipped.status.code(), Some(0), "{err}");
    for part in ["bad/stripes/a_truncated.jpg is truncated", "bad/blobs/text.jpg is not an image", "2 images skipped"] {
        assert!(err.contains(part), "{err}");
    }
    let record = run_record(&sandbox.work().join("skip"));
    assert_eq!(record.steps.last().expect("steps")["skipped"], 2);
}

/// A run goes on exactly or not at all: other images or other weights are another run.
#[test]
fn a_run_does_not_go_on_with_other_data_or_weights() {
    let (sandbox, good) = sandbox();
    let run = aligned(&sandbox, "", "run");
    assert_eq!(run.status.code(), Some(0), "{}", String::from_utf8_lossy(&run.stderr));
    let resume = || sandbox.run(["run", "--resume", "run", "-q"]);
    let work = sandbox.work();
    let image = files_in(&work.join("images/blobs")).remove(0);
    let content = fs::read(&image).expect("an image");
    fs::remove_file(&image).expect("removed");
    refused(&sandbox, &resume(), 2, &["data of `pretrain`: 8 images then, 7 now", "start a new run"]);
    fs::write(&image, content).expect("written");
    let mut other = good.clone();
    other.get_mut("norm.weight").expect("there").data[0] += 1.0;
    write_weights(&work.join("teacher.safetensors"), &other);
    refused(&sandbox, &resume(), 2, &["teacher.safetensors: its content has changed"]);
    write_weights(&work.join("teacher.safetensors"), &good);
    assert_eq!(resume().status.code(), Some(0));
}

/// Labels are numbers of folders: two folders of other names would be compared by number alone.
#[test]
fn evaluation_on_other_classes_or_none_is_refused() {
    let (sandbox, _) = sandbox();
    let work = sandbox.work();
    copy_folder(&here().join("fixtures/images"), &work.join("renamed"));
    fs::rename(work.join("renamed/blobs"), work.join("renamed/zebras")).expect("renamed");
    fs::create_dir(work.join("flat")).expect("a folder");
    fs::copy(files_in(&work.join("images/blobs")).remove(0), work.join("flat/one.png")).expect("a copy");
    let data = |root: &str| {
        format!("{{dataset: {{type: image_folder, root: {root}}}, transforms: [{{type: resize, size: [28, 28]}}]}}")
    };
    for (root, says) in [("renamed", "class 0 is `stripes`, but `blobs` in `train`"), ("flat", "no labels")] {
        let knn = format!(
            "stages={{k: {{type: knn, train: {}, test: {}, baselines: [pixels]}}}}",
            data("images"),
            data(root)
        );
        let output = sandbox.run(["validate", "good.yaml", "--set", &knn]);
        refused(&sandbox, &output, 2, &[says]);
    }
}

#[test]
fn a_loss_that_is_not_finite_ends_the_run() {
    let sandbox = Sandbox::new();
    let sets =
        ["--set", "stages.pretrain.optimizer.base_lr=1e30", "--set", "~stages.pretrain.optimizer.clip_norm", "-q"];
    let output = sandbox.run(["run", "tiny.yaml", "--out", "run"].iter().chain(&sets));
    refused(&sandbox, &output, 1, &["the loss is", "at step 2", "learning rate 3.1", "base_lr"]);
    // Warm-up begins at 0: the state after one step is the initial one, and the one after two is not good.
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(err.contains("no checkpoint is good"), "{err}");
    let each = ["--set", "stages.pretrain.checkpoints.every_steps=1"];
    let output = sandbox.run(["run", "tiny.yaml", "--out", "each"].iter().chain(&sets).chain(&each));
    refused(&sandbox, &output, 1, &["the last good checkpoint is each/checkpoints/pretrain/step-00000001.safetensors"]);
}

/// Needs a file system of its own, which only root may mount.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_nothing_half_written() {
    use std::{io::Write, process::Command};

    let sandbox = Sandbox::new();
    let disk = sandbox.work().join("disk");
    fs::create_dir(&disk).expect("a folder");
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=200k", "tmpfs"]).arg(&disk).output();
    if !mounted.is_ok_and(|output| output.status.success()) {
        // Not `eprintln!`, which the test harness keeps for failures.
        let _ =
            writeln!(std::io::stderr(), "skipped: a file system that is small enough to fill cannot be mounted here");
        return;
    }
    let output = sandbox.run(["run", "tiny.yaml", "--out", "disk/run", "-q"]);
    let files = files_in(&disk.join("run"));
    let unmounted = Command::new("umount").arg(&disk).status();
    refused(&sandbox, &output, 1, &["no space left", "checkpoint", "--resume"]);
    assert!(files.iter().all(|file| !file.to_string_lossy().ends_with(".tmp")), "{files:?}");
    assert!(unmounted.is_ok_and(|status| status.success()));
}

#[test]
fn prototypes_that_have_no_room_are_refused_before_the_first_step() {
    let sandbox = Sandbox::new();
    let sets = [
        "stages.pretrain.objectives.cls.target.prototypes=1000000",
        "stages.pretrain.objectives.patches.target.prototypes=1000000",
        "stages.pretrain.objectives.cls.aligner.bottleneck=65536",
    ];
    let sets = sets.iter().flat_map(|set| ["--set", set]);
    let output = sandbox.run(["run", "views.yaml", "--out", "run", "-q"].into_iter().chain(sets));
    refused(&sandbox, &output, 2, &["1000000", "with 1000000 prototypes the head", "GiB are free", "choose fewer"]);
    assert!(!sandbox.work().join("run").exists(), "nothing is left");
}

#[test]
fn assignments_of_a_teacher_that_does_not_follow_are_refused() {
    let (sandbox, _) = sandbox();
    let sets = [
        "stages.pretrain.teachers.ema={type: vit, weights: teacher.safetensors, arch: {dim: 16, depth: 2, heads: 2, patch: 7}}",
        "stages.pretrain.objectives.patches=null",
        "stages.pretrain.student.positions=sincos",
    ];
    let sets = sets.iter().flat_map(|set| ["--set", set]);
    let output = sandbox.run(["run", "views.yaml", "--out", "run", "-q"].into_iter().chain(sets));
    refused(&sandbox, &output, 2, &["`ema` does not follow the student", "type: ema"]);
}
