//! `maskalign sweep`: the runs of a grid, and what becomes of them.

use std::{fs, path::Path};

use serde_json::Value;

use crate::support::{Sandbox, ends, run_record};

const RATIOS: &str = "stages.pretrain.masker.ratio=0.5,0.75";

fn sweep<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&["sweep", "good.yaml", "--steps", "2", "--threads", "2", "--out", "sweep"], more].concat()
}

fn folders(path: &Path) -> Vec<String> {
    let entries = fs::read_dir(path).expect("a folder").flatten().filter(|entry| entry.path().is_dir());
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn accuracy(run: &Path) -> f64 {
    let summary: Value =
        serde_json::from_str(&fs::read_to_string(run.join("summary.json")).expect("a summary")).expect("JSON");
    summary["knn"]["student"]["accuracy"].as_f64().expect("a share")
}

/// The lines of CSV for a result, as cells.
fn lines(out: &[u8], result: &str) -> Vec<Vec<String>> {
    let text = String::from_utf8_lossy(out).into_owned();
    let cells = text.lines().map(|line| line.split(',').map(str::to_owned).collect::<Vec<_>>());
    cells.filter(|cells| cells.iter().any(|cell| cell == result)).collect()
}

#[test]
fn every_combination_runs_once_and_is_averaged_over_seeds() {
    let sandbox = Sandbox::new();
    let folder = sandbox.work().join("sweep");
    let arguments = sweep(&["--grid", RATIOS, "--seeds", "0..2", "--jobs", "2", "--format", "csv"]);
    let output = sandbox.run(&arguments);
    ends(&output, 0, &["1 of 4, ratio=0.5,seed=0: starts", "4 of 4, ratio=0.75,seed=1: done in"]);
    let names = ["ratio=0.5,seed=0", "ratio=0.5,seed=1", "ratio=0.75,seed=0", "ratio=0.75,seed=1"];
    assert_eq!(folders(&folder), names);
    let found = lines(&output.stdout, "student.accuracy");
    assert_eq!(found.len(), 2);
    for (cells, ratio) in found.iter().zip(["0.5", "0.75"]) {
        let [a, b] = [0, 1].map(|seed| accuracy(&folder.join(format!("ratio={ratio},seed={seed}"))));
        let number = |at: usize| cells[at].parse::<f64>().expect("a number");
        assert_eq!((cells[0].as_str(), cells[1].as_str(), cells[3].as_str()), (ratio, "knn", "2"));
        // Of two numbers, the standard error is half of what they differ by.
        assert!((number(4) - f64::midpoint(a, b)).abs() < 1e-12 && (number(5) - (a - b).abs() / 2.0).abs() < 1e-12);
    }
    let alone = ["--set", "stages.pretrain.masker.ratio=0.75", "--set", "seed=1", "--out", "alone"];
    ends(&sandbox.run([&["run", "good.yaml", "--steps", "2", "-q"][..], &alone].concat()), 0, &[]);
    let record = run_record(&sandbox.work().join("alone"));
    record.assert_same(&run_record(&folder.join(names[3])), "a run of the sweep is the run by itself");

    let manifest = folder.join(names[0]).join("manifest.json");
    let before = fs::read(&manifest).expect("a manifest");
    let again = sandbox.run(&arguments);
    ends(&again, 0, &["4 of 4 runs are done already"]);
    assert_eq!((again.stdout, fs::read(&manifest).expect("a manifest")), (output.stdout, before));
    let more = sandbox.run(sweep(&["--grid", RATIOS, "--seeds", "0..3", "--format", "markdown"]));
    ends(&more, 0, &["4 of 6 runs are done already", "3 of 6, ratio=0.5,seed=2: starts"]);
    let table = String::from_utf8_lossy(&more.stdout).into_owned();
    assert!(table.contains("| ratio | runs | pretrain loss | knn pixels.accuracy |"), "{table}");
    assert!(table.contains("| 0.75 | 3 |") && table.contains(" ± "), "{table}");
    let listed = sandbox.run(sweep(&["--grid", RATIOS, "--seeds", "0..4", "--dry-run"]));
    ends(&listed, 0, &[]);
    assert!(String::from_utf8_lossy(&listed.stdout).contains("8 runs, 6 of them done"));
    assert_eq!(folders(&folder).len(), 6, "a dry run starts nothing");
    let as_json = sandbox.run(sweep(&["--grid", RATIOS, "--seeds", "0..2", "--format", "json"]));
    let rows: Value = serde_json::from_slice(&as_json.stdout).expect("JSON");
    assert_eq!((&rows[1]["values"]["stages.pretrain.masker.ratio"], &rows[1]["done"]), (&"0.75".into(), &2.into()));
}

#[test]
fn nothing_starts_where_a_combination_has_a_mistake() {
    let sandbox = Sandbox::new();
    let wrong = ["--grid", "stages.pretrain.masker.ratio=0.5, 2", "--grid", "stages.pretrain.student.arch.heads=2,5"];
    let output = sandbox.run(sweep(&wrong));
    ends(&output, 2, &["--grid:1:35", "in 2 of 4 combinations", "--grid:1:38", "in 1 of 4 combinations"]);
    assert!(!sandbox.work().join("sweep").exists());
    let twice = sandbox.run(sweep(&["--grid", "stages.pretrain.masker.ratio=0.5,0.50"]));
    ends(&twice, 2, &["are the same recipe"]);
}

#[test]
fn a_directory_of_another_recipe_is_not_taken_for_a_run_of_the_sweep() {
    let sandbox = Sandbox::new();
    ends(&sandbox.run(sweep(&["--seeds", "0,1", "-q"])), 0, &[]);
    let other = sandbox.run(sweep(&["--seeds", "0..3", "--set", "stages.knn.k=[5]"]));
    ends(&other, 2, &["the run in sweep/seed=0 is of another recipe", "stages.knn.k", "seed=1"]);
    assert!(!sandbox.work().join("sweep/seed=2").exists(), "nothing is started");
    fs::create_dir(sandbox.work().join("sweep/seed=2")).expect("a folder");
    fs::write(sandbox.work().join("sweep/seed=2/mine"), "mine").expect("written");
    let foreign = sandbox.run(sweep(&["--seeds", "0..3"]));
    ends(&foreign, 2, &["sweep/seed=2 is there already, and is no run"]);
}

#[test]
fn a_run_that_fails_does_not_keep_others_from_running() {
    let sandbox = Sandbox::new();
    let rates = "stages.pretrain.optimizer.base_lr=1e30,1e-3";
    let output = sandbox.run(["sweep", "good.yaml", "--grid", rates, "--out", "sweep", "--steps", "4"]);
    ends(&output, 1, &["1 of 2 runs failed", "base_lr=1e30", "sweep/base_lr=1e30.log", "the loss is NaN"]);
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(table.contains("0 of 1") && table.contains("1e-3     1 "), "{table}");
}

#[cfg(unix)]
#[test]
fn a_sweep_that_is_stopped_goes_on_to_the_same_bits() {
    use std::{process::Command, thread::sleep, time::Duration};

    use crate::support::after_records;

    let sandbox = Sandbox::new();
    let arguments =
        ["sweep", "good.yaml", "--set", "stages.pretrain.epochs=10000", "--seeds", "0..3", "--jobs", "2", "--out"];
    let first = sandbox.work().join("sweep/seed=0");
    let mut child = after_records(sandbox.command([&arguments[..], &["sweep"]].concat()), &first, 2);
    let metrics = |seed: usize| {
        let path = sandbox.work().join(format!("sweep/seed={seed}/metrics.jsonl"));
        fs::read_to_string(path).map_or(0, |text| text.lines().count())
    };
    while metrics(1) < 2 {
        assert!(child.try_wait().expect("a process").is_none(), "it goes on");
        sleep(Duration::from_millis(5));
    }
    let sent = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().expect("kill");
    assert!(sent.success());
    let output = child.wait_with_output().expect("it ends");
    ends(&output, 143, &["0 of 3 runs are done", "the same command goes on"]);
    let steps = (metrics(0).max(metrics(1)) + 3).to_string();
    assert!(!sandbox.work().join("sweep/seed=2").exists());
    for seed in 0..2 {
        let checkpoints = sandbox.work().join(format!("sweep/seed={seed}/checkpoints/pretrain"));
        assert!(checkpoints.read_dir().expect("a folder").count() > 0, "its state is saved");
    }
    let on = sandbox.run([&arguments[..], &["sweep", "--steps", &steps]].concat());
    ends(&on, 0, &["1 of 3, seed=0: goes on"]);
    ends(&sandbox.run([&arguments[..], &["whole", "--steps", &steps]].concat()), 0, &[]);
    for seed in 0..3 {
        let whole = run_record(&sandbox.work().join(format!("whole/seed={seed}")));
        whole.assert_same(&run_record(&sandbox.work().join(format!("sweep/seed={seed}"))), "stopped and continued");
    }
}
