//! Files that the command is given, or asked to write: cases, weights, exports, traces, run directories.

use std::{fs, path::Path};

use crate::support::{Sandbox, ends, files_in, here};
use maskalign_core::weights;
use serde_json::Value;

/// A sandbox with a run of `tiny.yaml` in `run`: pre-training, fine-tuning, nearest neighbours.
fn sandbox() -> Sandbox {
    let sandbox = Sandbox::new();
    ends(&sandbox.run(["run", "tiny.yaml", "--out", "run", "-q"]), 0, &[]);
    sandbox
}

#[test]
fn a_case_that_cannot_be_read_does_not_end_the_others() {
    let sandbox = Sandbox::new();
    let good = here().join("fixtures/cases/mae.safetensors").display().to_string();
    fs::write(sandbox.work().join("bad"), "no case").expect("written");
    let output = sandbox.run(["verify", "bad", &good, "missing", "--json"]);
    ends(&output, 2, &[]);
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let passed: Vec<bool> = report["cases"].as_array().expect("cases").iter().map(|c| c["passed"] == true).collect();
    assert_eq!((report["passed"].as_bool(), passed), (Some(false), vec![false, true, false]));
    assert!(report["cases"][0]["diagnostics"][0]["message"].as_str().is_some_and(|m| m.contains("bad")), "{report}");

    let output = sandbox.run(["verify", "bad", &good]);
    ends(&output, 2, &["bad: not replayed"]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("agrees"));
    ends(&sandbox.run(["verify", &good, "--set", "stages.pretrain.batch.effective=8"]), 2, &["the case has 4"]);
    ends(&sandbox.run(["verify", &good, "--set", "stages.pretrain.student.eps=0.1"]), 1, &[]);
}

#[test]
fn an_export_that_would_load_nowhere_is_refused() {
    let sandbox = sandbox();
    let export = |more: &[&str]| sandbox.run(["export", "run", "--stage", "pretrain"].iter().chain(more));
    for format in ["openai", "hf_clip"] {
        let says = ["`norm_pre.weight`", "1 not expected: `patch_embed.proj.bias`", "`timm` names every tower"];
        ends(&export(&["--format", format, "--out", "s"]), 2, &says);
    }
    ends(&export(&["--format", "hf_dinov2", "--out", "s"]), 2, &["missing: ", "`blocks.0.ls1.gamma`"]);
    assert!(!sandbox.work().join("s").exists());

    ends(&export(&["--out", "nowhere/s"]), 2, &["there is no folder nowhere"]);
    fs::create_dir(sandbox.work().join("folder")).expect("a folder");
    ends(&export(&["--out", "folder", "--force"]), 2, &["folder is a folder"]);
    ends(&export(&["--out", "tiny.yaml"]), 2, &["tiny.yaml is there already", "--force"]);
    let checkpoint = "run/checkpoints/pretrain/final.safetensors";
    ends(&export(&["--out", checkpoint, "--force"]), 2, &["a run's own checkpoints"]);
    ends(&sandbox.run(["export", "tiny.yaml", "--out", "s"]), 2, &["tiny.yaml is damaged", "a run directory"]);
    ends(&sandbox.run(["export", "run/checkpoints/knn/final.safetensors", "--out", "s"]), 2, &["holds no student"]);
}

/// A stage that only evaluates is none to choose from.
#[test]
fn an_export_takes_the_one_stage_that_trains() {
    let sandbox = sandbox();
    let export = |more: &[&str]| sandbox.run(["export", "run", "--out", "s"].iter().chain(more));
    let forget = |stage: &str| fs::remove_dir_all(sandbox.work().join("run/checkpoints").join(stage)).expect("removed");
    ends(&export(&[]), 2, &["which stage of run?", "finished stages: finetune, pretrain\n"]);
    // A damaged one is still one to name.
    fs::write(sandbox.work().join("run/checkpoints/pretrain/final.safetensors"), "x").expect("written");
    ends(&export(&[]), 2, &["which stage of run?", "finished stages: finetune, pretrain\n"]);
    forget("pretrain");
    ends(&export(&["--stage", "pretrain"]), 2, &["no finished stage `pretrain`", "finished stages: finetune, knn"]);
    ends(&export(&[]), 0, &[]);
    forget("finetune");
    ends(&export(&["--force"]), 2, &["holds no student"]);
    forget("knn");
    ends(&export(&["--force"]), 2, &["left a student", "checkpoints/STAGE/step-N.safetensors"]);
}

#[test]
fn a_classifier_is_exported_with_its_student() {
    let sandbox = sandbox();
    let names = |stage: &str, format: &str| {
        let file = format!("{stage}_{format}");
        let output = sandbox.run(["export", "run", "--stage", stage, "--format", format, "--out", &file]);
        ends(&output, 0, &[]);
        let names: Vec<String> = weights::read(&sandbox.work().join(file))
            .expect("weights")
            .into_keys()
            .filter(|n| !n.contains('0'))
            .collect();
        (names.into_iter().filter(|n| !n.contains('1')).collect::<Vec<_>>().join(" "), output)
    };
    let tower = "cls_token norm.bias norm.weight patch_embed.proj.bias patch_embed.proj.weight pos_embed";
    assert_eq!(names("pretrain", "timm").0, tower);
    let classifier = "cls_token fc_norm.bias fc_norm.weight head.bias head.weight patch_embed.proj.bias \
                      patch_embed.proj.weight pos_embed";
    assert_eq!(names("finetune", "timm").0, classifier);
    let (hf, output) = names("finetune", "hf_vit");
    assert!(hf.contains("layernorm.weight") && !hf.contains("head"), "{hf}");
    ends(&output, 0, &["the classifier is left out"]);
}

/// Unix allows names that are no text: of folders that a run starts in, writes to and is exported to, and of recipes.
#[cfg(target_os = "linux")]
#[test]
fn names_that_are_not_unicode_work() {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _};

    let name = |bytes: &'static [u8]| OsStr::from_bytes(bytes);
    let sandbox = Sandbox::new();
    let folder = sandbox.work().join(name(b"caf\xe9"));
    fs::create_dir(&folder).expect("a folder");
    fs::copy(sandbox.work().join("tiny.yaml"), folder.join(name(b"tin\xff.yaml"))).expect("a copy");
    let run = |arguments: &[&OsStr]| {
        let output = sandbox.command(arguments).current_dir(&folder).output().expect("it starts");
        ends(&output, 0, &[]);
    };
    let [verb, out, quiet] = ["run", "--out", "-q"].map(OsStr::new);
    let (recipe, dir) = (name(b"tin\xff.yaml"), name(b"r\xe9"));
    run(&[OsStr::new("validate"), recipe]);
    run(&[verb, recipe, out, dir, OsStr::new("--steps"), OsStr::new("3"), quiet]);
    run(&[verb, OsStr::new("--resume"), dir, quiet]);
    run(&[OsStr::new("export"), dir, OsStr::new("--stage"), OsStr::new("pretrain"), out, name(b"s\xe9")]);
    run(&[verb, recipe, out, dir, OsStr::new("--force"), quiet]);
    assert!(folder.join(name(b"s\xe9")).is_file() && folder.join(dir).join("summary.json").is_file());
}

/// In every naming that has a place for it, a classifier of averaged tokens (which has no final norm) included.
#[test]
fn what_is_exported_loads_again() {
    let sandbox = sandbox();
    ends(&sandbox.run(["run", "moving.yaml", "--out", "moving", "-q"]), 0, &[]);
    for (run, stage, format, arch) in [
        ("run", "pretrain", "timm", "arch: {dim: 24, depth: 2, heads: 2, patch: 7}"),
        ("run", "pretrain", "hf_vit", "arch: {dim: 24, depth: 2, heads: 2, patch: 7}"),
        ("run", "finetune", "timm", "arch: {dim: 24, depth: 2, heads: 2, patch: 7}"),
        ("run", "finetune", "hf_vit", "arch: {dim: 24, depth: 2, heads: 2, patch: 7}"),
        ("moving", "pretrain", "timm", "arch: {dim: 16, depth: 2, heads: 2, patch: 7}, layer_scale: 1"),
        ("moving", "pretrain", "hf_dinov2", "arch: {dim: 16, depth: 2, heads: 2, patch: 7}, layer_scale: 1"),
    ] {
        let file = format!("{run}_{stage}_{format}.safetensors");
        ends(&sandbox.run(["export", run, "--stage", stage, "--format", format, "--out", &file]), 0, &[]);
        let student = format!("stages.finetune.student={{type: vit, {arch}, weights: {file}}}");
        let again = ["run", "tiny.yaml", "--steps", "1", "--out", "again", "--force", "-q"];
        let only = ["--set", "~stages.pretrain", "--set", "~stages.knn", "--set", &student];
        ends(&sandbox.run(again.iter().chain(&only)), 0, &[]);
    }
}

#[test]
fn a_runs_own_files_are_weights_like_any_others() {
    let sandbox = sandbox();
    let student = "stages.pretrain.student={type: vit, arch: {dim: 24, depth: 2, heads: 2, patch: 7}, weights: ";
    for file in ["pretrain/step-00000008", "pretrain/final", "finetune/step-00000008", "finetune/final"] {
        let file = format!("run/checkpoints/{file}.safetensors");
        for verb in
            [vec!["validate", "tiny.yaml"], vec!["run", "tiny.yaml", "--steps", "1", "--out", "again", "--force"]]
        {
            let set = format!("{student}{file}}}");
            ends(&sandbox.run(verb.into_iter().chain(["--set", &set, "--set", "~stages.pretrain.knn"])), 0, &[]);
        }
    }
    let knn = format!("{student}run/checkpoints/knn/final.safetensors}}");
    ends(&sandbox.run(["validate", "tiny.yaml", "--set", &knn]), 2, &["the stage `knn`", "trains no student"]);
}

#[test]
fn weights_that_do_not_fit_are_known_before_the_run_directory_is_made() {
    let sandbox = sandbox();
    fs::write(sandbox.work().join("garbage"), "no weights at all").expect("written");
    let arch = |dim: usize, weights: &str| {
        format!(
            "stages.pretrain.student={{type: vit, arch: {{dim: {dim}, depth: 2, heads: 2, patch: 7}}, weights: {weights}}}"
        )
    };
    let own = "run/checkpoints/pretrain/final.safetensors";
    // A checkpoint says what it holds; another file has names and shapes alone.
    let tensors = weights::read(&sandbox.work().join(own)).expect("weights");
    weights::write_safetensors(&sandbox.work().join("plain"), &tensors, None).expect("written");
    for (set, says) in [
        (arch(24, "garbage"), "neither safetensors nor"),
        (arch(32, own), "`arch` has 32 channels, 128 channels inside the MLP, and the tower in `weights` 24, 96"),
        (arch(32, "plain"), "the weights in plain do not fit:"),
        (arch(32, "plain"), "`blocks.0.norm1.bias` is [24], expected [32]"),
        (
            "stages.finetune.student={type: vit, arch: {dim: 24, depth: 2, heads: 2, patch: 7}, weights: nothing}"
                .into(),
            "no file `nothing`",
        ),
    ] {
        let alone: &[&str] = match set.contains("finetune") {
            true => &[],
            false => &["--set", "~stages.finetune", "--set", "~stages.knn"],
        };
        let with = |verb: &[&str]| sandbox.run(verb.iter().chain(&["tiny.yaml", "--set", &set]).chain(alone));
        ends(&with(&["validate"]), 2, &[says]);
        ends(&with(&["validate", "--no-environment"]), 0, &[]);
        ends(&with(&["run", "--out", "again", "-q"]), 2, &[says]);
        assert!(!sandbox.work().join("again").exists());
    }
    // Positions of other images are resized.
    let larger = ["--set", "stages.pretrain.data.transforms=[{type: resize, size: [42, 42]}]"];
    let run = ["validate", "tiny.yaml", "--set", &arch(24, own), "--set", "~stages.pretrain.knn"];
    ends(&sandbox.run(run.iter().chain(&larger)), 0, &[]);
    // Values are read when the stage begins; a refusal leaves the place free for the corrected weights.
    let path = sandbox.work().join("nan");
    let mut tensors = weights::read(&sandbox.work().join(own)).expect("weights");
    tensors.get_mut("norm.bias").expect("there").data[0] = f32::NAN;
    weights::write_safetensors(&path, &tensors, None).expect("written");
    let retry = |weights: &str| {
        let set = arch(24, weights);
        sandbox.run(["run", "tiny.yaml", "--set", &set, "--out", "again", "-q", "--steps", "1"])
    };
    ends(&retry("nan"), 2, &["nan: weights of family vit", "`norm.bias` in 1 of 24 values"]);
    assert!(!sandbox.work().join("again").exists());
    ends(&retry(own), 0, &[]);
}

/// What only a file would tell is no mistake where files are not looked at: the stage and those that build on it are named.
#[test]
fn stages_that_files_would_tell_more_of_are_left_out_without_the_environment() {
    let sandbox = Sandbox::new();
    fs::write(
        sandbox.work().join("open.yaml"),
        "name: open\nextends: tiny.yaml\nstages:\n  pretrain:\n    student: { type: vit, weights: \"hf://a/b\" }\n",
    )
    .expect("written");
    let output = sandbox.run(["validate", "open.yaml", "--no-environment", "--set", "~stages.pretrain.student.arch"]);
    ends(&output, 0, &[]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("`pretrain` is not planned: the sizes of the tower are those of its weights"), "{said}");
    assert!(said.contains("`knn` is not planned: it builds on a stage"), "{said}");
    let wrong = ["validate", "open.yaml", "--no-environment", "--set", "~stages.pretrain.student.arch"];
    let wrong = sandbox.run(wrong.iter().chain(&["--set", "stages.pretrain.optimizer.betas=[0.9, 2.0]"]));
    assert_eq!(wrong.status.code(), Some(2), "other mistakes are told: {}", String::from_utf8_lossy(&wrong.stdout));
    let output = sandbox.run(["validate", "open.yaml", "--set", "~stages.pretrain.student.arch"]);
    ends(&output, 2, &["`hf://a/b` is not in the local hub cache"]);
}

#[test]
fn a_trace_replaces_nothing_and_waits_for_the_recipe() {
    let sandbox = Sandbox::new();
    let work = sandbox.work();
    let recipe = fs::read(work.join("tiny.yaml")).expect("a recipe");
    let traced = |file: &str, set: &str| {
        sandbox.run(["run", "good.yaml", "--steps", "1", "-q", "--out", "run", "--trace", file, "--set", set])
    };
    ends(&traced("tiny.yaml", "seed=1"), 2, &["cannot write the trace tiny.yaml", "not empty", "--trace"]);
    assert_eq!(fs::read(work.join("tiny.yaml")).expect("a recipe"), recipe);
    ends(&traced("nowhere/trace.json", "seed=1"), 2, &["its folder does not exist"]);
    ends(&traced("trace.json", "stages.pretrain.masker.ratio=1"), 2, &["ratio"]);
    assert!(!work.join("trace.json").exists() && !work.join("run").exists());
    ends(&traced("trace.json", "seed=1"), 0, &[]);
    let trace: Value = serde_json::from_slice(&fs::read(work.join("trace.json")).expect("a trace")).expect("JSON");
    assert!(trace.as_array().is_some_and(|events| events.iter().any(|event| event["name"] == "backward")));
}

#[test]
fn a_run_directory_is_made_where_one_can_be() {
    let sandbox = Sandbox::new();
    let work = sandbox.work();
    ends(&sandbox.run(["run", "good.yaml", "--out", "tiny.yaml"]), 2, &["a file is in its place", "--out"]);
    ends(&sandbox.run(["run", "good.yaml", "--out", "tiny.yaml/run"]), 2, &["a file is in its place"]);
    fs::create_dir(work.join("empty")).expect("a folder");
    ends(&sandbox.run(["run", "--resume", "empty"]), 2, &["before it wrote its recipe"]);
    assert_eq!(files_in(&work.join("empty")), Vec::<std::path::PathBuf>::new());
}

#[test]
fn a_run_that_is_resumed_elsewhere_is_told_where_it_was_started() {
    let sandbox = Sandbox::new();
    let work = sandbox.work();
    let images = here().join("fixtures/images");
    for class in ["blobs", "stripes"] {
        fs::create_dir_all(work.join("images").join(class)).expect("a folder");
        for file in files_in(&images.join(class)) {
            fs::copy(&file, work.join("images").join(class).join(file.file_name().expect("a name"))).expect("a copy");
        }
    }
    let sets = [
        "--set",
        "stages.pretrain.data={dataset: {type: image_folder, root: images}, transforms: [{type: resize, size: [28, 28]}]}",
        "--set",
        "stages.pretrain.batch.effective=2",
        "--set",
        "~stages.knn",
    ];
    let run = ["run", "good.yaml", "--out", "run", "--steps", "1", "-q"];
    ends(&sandbox.run(run.iter().chain(&sets)), 0, &[]);
    let elsewhere =
        sandbox.command(["run", "--resume", "work/run", "-q"]).current_dir(work.parent().expect("a parent")).output();
    let started = format!("the run was started in {}", work.canonicalize().expect("a path").display());
    ends(&elsewhere.expect("it starts"), 2, &["there is no folder `images`", &started]);
    ends(&sandbox.run(["run", "--resume", "run", "-q", "--steps", "2"]), 0, &[]);
    assert!(Path::new(&work).join("run/manifest.json").is_file());
}
