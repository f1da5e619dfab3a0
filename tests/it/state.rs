//! Run directories that are no longer as the run wrote them: what is damaged is named, repaired where that is exact, and
//! refused where it is not.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::support::{RunRecord, Sandbox, ends, files_below, run_record};

/// A sandbox with a whole run of `tiny.yaml` in `whole`, and one in `run` whose stages ended after four of eight steps.
fn sandbox() -> (Sandbox, RunRecord, PathBuf) {
    let sandbox = Sandbox::new();
    ends(&sandbox.run(["run", "tiny.yaml", "--out", "whole", "-q"]), 0, &[]);
    ends(&sandbox.run(["run", "tiny.yaml", "--out", "run", "-q", "--steps", "4"]), 0, &[]);
    let (whole, run) = (run_record(&sandbox.work().join("whole")), sandbox.work().join("run"));
    copy(&run, &sandbox.work().join("backup"));
    (sandbox, whole, run)
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder").flatten() {
        match entry.path().is_dir() {
            true => copy(&entry.path(), &to.join(entry.file_name())),
            false => drop(fs::copy(entry.path(), to.join(entry.file_name())).expect("a copy")),
        }
    }
}

fn restore(sandbox: &Sandbox) {
    let run = sandbox.work().join("run");
    fs::remove_dir_all(&run).expect("removed");
    copy(&sandbox.work().join("backup"), &run);
}

fn edit(path: &Path, from: &str, to: &str) {
    let bytes = fs::read(path).expect("a file");
    let at = bytes.windows(from.len()).position(|part| part == from.as_bytes()).expect("what is to be replaced");
    fs::write(path, [&bytes[..at], to.as_bytes(), &bytes[at + from.len()..]].concat()).expect("written");
}

#[test]
fn a_header_that_was_edited_is_passed_over_or_refused_and_never_gone_on_from() {
    let (sandbox, whole, run) = sandbox();
    let newest = run.join("checkpoints/pretrain/step-00000004.safetensors");
    edit(&newest, r#"\"step\":4"#, r#"\"step\":5"#);
    let output = sandbox.run(["run", "--resume", "run"]);
    ends(&output, 0, &["step-00000004.safetensors is damaged", "checksum", "goes on from step 2", ".set-aside"]);
    whole.assert_same(&run_record(&run), "an older checkpoint");
    ends(&sandbox.run(["runs", "check", "run"]), 0, &[]);

    for spoil in [
        &(|| fs::rename(&newest, newest.with_file_name("step-00000006.safetensors")).expect("renamed")) as &dyn Fn(),
        &|| edit(&newest, r#"\"metrics_records\":5"#, r#"\"metrics_records\":4"#),
        &|| fs::write(&newest, "").expect("written"),
    ] {
        restore(&sandbox);
        fs::remove_file(newest.with_file_name("step-00000002.safetensors")).expect("removed");
        spoil();
        let before = files_below(&run);
        let refused = sandbox.run(["run", "--resume", "run", "-q"]);
        ends(&refused, 2, &["no checkpoint of the stage can be gone on from", "put back a copy"]);
        assert_eq!(files_below(&run), before);
    }
}

#[test]
fn metrics_that_were_edited_are_made_again_or_refused() {
    let (sandbox, whole, run) = sandbox();
    let metrics = run.join("metrics.jsonl");
    let text = fs::read_to_string(&metrics).expect("metrics");
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    // Past the last record, what is there is nobody's.
    fs::write(&metrics, format!("{text}{{\"stage\":\"pre")).expect("written");
    ends(&sandbox.run(["runs", "check", "run"]), 1, &["not whole: 1 of"]);
    ends(&sandbox.run(["run", "--resume", "run", "--steps", "4"]), 0, &["a torn line"]);
    assert_eq!(fs::read_to_string(&metrics).expect("metrics"), text);
    ends(&sandbox.run(["runs", "check", "run"]), 0, &[]);

    // Steps 0 to 3 and an evaluation are `pretrain`'s. Line 3 is made after the checkpoint of step 2.
    let spoiled = [
        ("deleted", [&lines[..2], &lines[3..]].concat().concat(), "in line 3, step 3 follows step 1"),
        ("doubled", [&lines[..3], &lines[2..]].concat().concat(), "line 4 is line 3 again"),
        ("garbled", text.replacen(lines[2], "garbled\n", 1), "line 3 is no record"),
    ];
    for (what, spoiled, says) in spoiled {
        restore(&sandbox);
        fs::write(&metrics, &spoiled).expect("written");
        // The stages that built on it are known to be finished by records that are lost: nothing is done.
        ends(&sandbox.run(["runs", "check", "run"]), 1, &["not whole"]);
        ends(&sandbox.run(["run", "--resume", "run", "-q", "--steps", "4"]), 2, &[says, "put back copies"]);
        assert_eq!(fs::read_to_string(&metrics).expect("metrics"), spoiled, "{what}");
        // A stage that goes on does so from a checkpoint before it.
        let output = sandbox.run(["run", "--resume", "run"]);
        ends(&output, 0, &[says, "goes on from step 2", "metrics.jsonl.set-aside"]);
        whole.assert_same(&run_record(&run), what);
        assert_eq!(fs::read_to_string(run.join("metrics.jsonl.set-aside")).expect("kept"), spoiled, "{what}");
    }
    restore(&sandbox);
    fs::write(&metrics, lines[1..].concat()).expect("written");
    let says = ["metrics.jsonl is damaged: in line 1", "put back copies", "--accept-lost-metrics"];
    ends(&sandbox.run(["run", "--resume", "run", "-q"]), 2, &says);
    assert_eq!(fs::read_to_string(&metrics).expect("metrics"), lines[1..].concat());
    // Without a copy, what is valid is kept, and only that is missing in the end.
    let accepted = sandbox.run(["run", "--resume", "run", "--accept-lost-metrics"]);
    ends(&accepted, 0, &["1 of its records are lost", "goes on from step 4"]);
    let mut ended = run_record(&run);
    ended.steps.insert(0, whole.steps[0].clone());
    whole.assert_same(&ended, "but for a line");
    ends(&sandbox.run(["runs", "check", "run"]), 0, &[]);
    let manifest = fs::read_to_string(run.join("manifest.json")).expect("a manifest");
    assert!(manifest.contains("\"lost_metrics\": 1"), "{manifest}");
    ends(&sandbox.run(["run", "--resume", "run", "-q"]), 0, &[]);
}

#[test]
fn a_check_names_every_file_that_is_damaged_or_gone() {
    let (sandbox, _, run) = sandbox();
    let check = |code: i32| {
        let output = sandbox.run(["runs", "check", "run", "--format", "json"]);
        assert_eq!(output.status.code(), Some(code), "{}", String::from_utf8_lossy(&output.stderr));
        let found: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(found["whole"], code == 0);
        let items = found["items"].as_array().expect("items").iter();
        items
            .filter(|item| item["whole"] == false)
            .map(|item| item["name"].as_str().expect("a name").to_owned())
            .collect()
    };
    let broken: Vec<String> = check(0);
    assert!(broken.is_empty(), "{broken:?}");
    let all = files_below(&run);
    // The page and the pictures steer nothing: a finished run makes its page anew, and a stage its pictures.
    let is_shown = |name: &str| name == "report.html" || name.starts_with("pictures");
    for name in all.iter().filter(|name| *name != ".maskalign-run" && !is_shown(name)) {
        let path = run.join(name);
        let whole = fs::read(&path).expect("a file");
        match name.as_str() {
            "recipe.resolved.yaml" => edit(&path, "seed: 5", "seed: 6"),
            "summary.json" => edit(&path, "accuracy", "accuracv"),
            _ => {
                let mut changed = whole.clone();
                let at = changed.len() / 2;
                changed[at] ^= 1;
                fs::write(&path, changed).expect("written");
            }
        }
        let broken: Vec<String> = check(1);
        let steered = name == "metrics.jsonl" || name == "metrics.marks.json";
        assert!(broken.contains(name) && (steered || broken.len() == 1), "{name}: {broken:?}");
        // Old checkpoints are deleted in the course of a run; all else stays.
        if !name.contains("step-") {
            fs::remove_file(&path).expect("removed");
            assert!(!check(1).is_empty(), "{name} is gone");
        }
        fs::write(&path, whole).expect("written");
    }
    assert!(check(0).is_empty());
    ends(&sandbox.run(["runs", "check", "tiny.yaml"]), 2, &["not a run directory"]);
    ends(&sandbox.run(["runs", "check", "nowhere"]), 2, &["not a run directory"]);
}

/// As the version before checksums left one.
#[test]
fn a_run_of_an_earlier_version_is_answered() {
    let (sandbox, _, run) = sandbox();
    for name in files_below(&run)
        .iter()
        .filter(|name| Path::new(name).extension() == Some("json".as_ref()))
        .filter(|name| *name != "summary.json" && !name.starts_with("pictures"))
    {
        let path = run.join(name);
        let text = fs::read_to_string(&path).expect("a file");
        let mut entries: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        entries.as_object_mut().expect("an object").shift_remove("blake3");
        fs::write(&path, entries.to_string()).expect("written");
    }
    let before = files_below(&run);
    let output = sandbox.run(["run", "--resume", "run", "-q"]);
    ends(&output, 2, &["is of an earlier version of MaskAlign", "start a new one"]);
    assert_eq!(files_below(&run), before);
    let checked = sandbox.run(["runs", "check", "run"]);
    ends(&checked, 1, &["not whole"]);
    let found = String::from_utf8_lossy(&checked.stdout);
    assert!(found.contains("an earlier version wrote it, without a checksum"), "{found}");
    ends(&sandbox.run(["export", "run", "--stage", "pretrain", "--out", "student"]), 0, &[]);
}

#[cfg(unix)]
mod places {
    use std::{
        os::unix::fs::symlink,
        process::{Child, Command},
    };

    use super::*;
    use crate::support::after_records;

    #[test]
    fn links_in_a_run_directory_are_refused_and_what_they_lead_to_stays() {
        let (sandbox, _, run) = sandbox();
        let mine = sandbox.work().join("mine");
        for place in ["metrics.jsonl", "checkpoints/pretrain", "checkpoints", "checkpoints/pretrain/done.json"] {
            restore(&sandbox);
            let path = run.join(place);
            let _ = fs::remove_dir_all(&mine);
            fs::create_dir(&mine).expect("a folder");
            fs::rename(&path, mine.join("moved")).expect("moved");
            symlink(mine.join("moved"), &path).expect("a link");
            copy(&mine, &sandbox.work().join("before"));
            let resumed = sandbox.run(["run", "--resume", "run", "-q"]);
            ends(&resumed, 2, &["is a link, and not the run's own", place.rsplit('/').next().expect("a name")]);
            ends(&sandbox.run(["runs", "check", "run"]), 2, &["is a link"]);
            if mine.join("moved").is_dir() {
                ends(&sandbox.run(["run", "tiny.yaml", "--out", "run", "--force", "-q"]), 2, &["is a link"]);
            }
            for name in files_below(&mine) {
                let before = fs::read(sandbox.work().join("before").join(&name)).expect("a file");
                assert_eq!(fs::read(mine.join(&name)).expect("a file"), before, "{place}: {name}");
            }
            fs::remove_dir_all(sandbox.work().join("before")).expect("removed");
        }
        // The directory itself may be reached by a link.
        restore(&sandbox);
        symlink(&run, sandbox.work().join("latest")).expect("a link");
        ends(&sandbox.run(["run", "--resume", "latest", "-q"]), 0, &[]);
    }

    #[test]
    fn a_newest_checkpoint_that_is_a_folder_is_passed_over() {
        let (sandbox, whole, run) = sandbox();
        let newest = run.join("checkpoints/pretrain/step-00000006.safetensors");
        fs::create_dir(&newest).expect("a folder");
        fs::write(newest.join("mine"), "mine").expect("written");
        ends(&sandbox.run(["run", "--resume", "run"]), 0, &["is a folder", "goes on from step 4"]);
        whole.assert_same(&run_record(&run), "a folder");
        assert!(run.join("checkpoints/pretrain/step-00000006.safetensors.set-aside/mine").is_file());
    }

    /// A run that would go on for hours, after its first checkpoint.
    fn long_run(sandbox: &Sandbox) -> Child {
        let long = ["run", "tiny.yaml", "--set", "stages.pretrain.epochs=10000", "--set", "~stages.pretrain.knn"];
        let command = sandbox.command(long.iter().chain(&["--out", "run", "--threads", "1", "-q"]));
        after_records(command, &sandbox.work().join("run"), 4)
    }

    #[test]
    fn a_run_whose_directory_is_taken_away_ends_and_writes_nothing_in_its_place() {
        let taken: [(&str, &dyn Fn(&Path)); 5] = [
            ("renamed", &|run| fs::rename(run, run.with_file_name("elsewhere")).expect("renamed")),
            ("removed", &|run| {
                while run.exists() {
                    // It goes on writing meanwhile.
                    let _ = fs::remove_dir_all(run);
                }
            }),
            ("replaced", &|run| {
                fs::rename(run, run.with_file_name("elsewhere")).expect("renamed");
                copy(&run.with_file_name("elsewhere"), run);
            }),
            ("without its metrics", &|run| fs::remove_file(run.join("metrics.jsonl")).expect("removed")),
            ("with others", &|run| {
                let metrics = run.join("metrics.jsonl");
                fs::copy(&metrics, run.join("copy")).expect("a copy");
                fs::rename(run.join("copy"), metrics).expect("renamed");
            }),
        ];
        for (what, take) in taken {
            let sandbox = Sandbox::new();
            let run = sandbox.work().join("run");
            let child = long_run(&sandbox);
            take(&run);
            // A file that was being written when it was copied is nobody's.
            let whole = |run: &Path| {
                files_below(run)
                    .into_iter()
                    .filter(|name| Path::new(name).extension() != Some("tmp".as_ref()))
                    .collect::<Vec<_>>()
            };
            let left = if run.exists() { whole(&run) } else { Vec::new() };
            let output = child.wait_with_output().expect("it ends by itself");
            ends(&output, 1, &["removed, renamed or replaced while the run went on"]);
            match what {
                "renamed" | "removed" => assert!(!run.exists(), "{what}"),
                "replaced" => assert_eq!(whole(&run), left),
                _ => {}
            }
            if what == "renamed" {
                fs::rename(run.with_file_name("elsewhere"), &run).expect("renamed");
                let steps = ["run", "--resume", "run", "-q", "--steps", "4"];
                ends(&sandbox.run(steps), 0, &[]);
            }
        }
    }

    #[test]
    fn a_replacement_that_failed_half_way_is_not_gone_on_with() {
        let (sandbox, whole, run) = sandbox();
        // What cannot be deleted: no file may be, in a folder that is a mount, immutable or read-only; here the disk is as
        // it would be left.
        let marker = run.join(".maskalign-run");
        let text = fs::read_to_string(&marker).expect("a marker");
        fs::write(&marker, format!("{text}/ is being replaced\n")).expect("written");
        fs::remove_file(run.join("metrics.jsonl")).expect("removed");
        ends(&sandbox.run(["run", "--resume", "run", "-q"]), 2, &["was being replaced", "--force"]);
        ends(&sandbox.run(["runs", "check", "run"]), 2, &["was being replaced"]);
        ends(&sandbox.run(["run", "tiny.yaml", "--out", "run", "--force", "-q"]), 0, &[]);
        whole.assert_same(&run_record(&run), "replaced");
        let leftover = Command::new("find").arg(&run).args(["-name", "*.tmp"]).output().expect("find");
        assert!(leftover.stdout.is_empty());
    }
}

/// The sets of this machine, the best first, as `doctor` names them.
fn instruction_sets(sandbox: &Sandbox) -> Vec<String> {
    let output = sandbox.run(["doctor"]);
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find_map(|line| line.strip_prefix("instruction sets")).expect("a line");
    line.split_whitespace().map(str::to_owned).collect()
}

#[test]
fn other_kernels_are_refused_or_accepted_for_good() {
    let (sandbox, whole, run) = sandbox();
    let sets = instruction_sets(&sandbox);
    let (best, portable) = (&sets[0], sets.last().expect("a set"));
    assert_eq!(portable, "scalar");
    let on = |isa: &str, arguments: &[&str]| {
        let resume = ["run", "--resume", "run", "-q"];
        sandbox.command(resume.iter().chain(arguments)).env("MASKALIGN_ISA", isa).output().expect("it starts")
    };
    let before = files_below(&run);
    // Nothing is left to compute: results are shown anywhere.
    ends(&on(portable, &["--steps", "4"]), 0, &[]);
    if best != portable {
        let says = [format!("`fused, {best}`"), "`fused, scalar`".into(), "--accept-other-kernels".into()];
        ends(&on(portable, &[]), 2, &says.each_ref().map(String::as_str));
        assert_eq!(files_below(&run), before);
        ends(&on(portable, &["--accept-other-kernels"]), 0, &["goes on with `fused, scalar`"]);
        let manifest = fs::read_to_string(run.join("manifest.json")).expect("a manifest");
        let manifest: serde_json::Value = serde_json::from_str(&manifest).expect("JSON");
        let went_on: Vec<&serde_json::Value> =
            manifest["resumed"].as_array().expect("a list").iter().map(|resumed| &resumed["isa"]).collect();
        assert_eq!(manifest["isa"], format!("fused, {best}"));
        assert_eq!(went_on, [&serde_json::Value::Null, &"fused, scalar".into()]);
        restore(&sandbox);
        ends(&on(best, &[]), 0, &[]);
        whole.assert_same(&run_record(&run), "as it began");
    }
    let missing = if cfg!(target_arch = "x86_64") { "neon" } else { "avx2" };
    for isa in [missing, "sse9"] {
        let says =
            [format!("`MASKALIGN_ISA={isa}` names no instruction set of this machine: it has {}", sets.join(", "))];
        let new = sandbox.command(["run", "tiny.yaml", "--out", "new"]).env("MASKALIGN_ISA", isa).output();
        for output in [new.expect("it starts"), on(isa, &[])] {
            ends(&output, 2, &says.each_ref().map(String::as_str));
        }
        assert!(!sandbox.work().join("new").exists());
    }
}
