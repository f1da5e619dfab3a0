//! `runs list`, `runs metrics` and `runs compare`: tables of runs, committed as `run_tables/NAME.txt`.
//!
//! `SNAPSHOTS=overwrite` rewrites them. The runs are real; their numbers, which have other last bits on other processors,
//! are replaced by fixed ones.

use std::fs;

use serde_json::Value;

use crate::support::{Sandbox, assert_committed, ends, here};

const METRICS: &str = "\
{\"stage\":\"pretrain\",\"step\":0,\"epoch\":0.0,\"loss\":2.5,\"lr\":0.001,\"gradient_norm\":3.25,\"images_per_s\":900.5,\"skipped\":0}
{\"stage\":\"pretrain\",\"step\":1,\"epoch\":0.5,\"loss\":1.125,\"lr\":0.0005,\"gradient_norm\":2.0,\"images_per_s\":910.25,\"skipped\":0}
{\"stage\":\"pretrain\",\"step\":2,\"epoch\":1.0,\"knn\":{\"accuracy\":0.25}}
{\"stage\":\"pretrain\",\"step\":2,\"epoch\":1.0,\"loss\":1.5,\"lr\":0.00025,\"gradient_norm\":1.0,\"images_per_s\":905.0,\"skipped\":1}
{\"stage\":\"finetune\",\"step\":0,\"epoch\":0.0,\"loss\":2.0,\"lr\":0.001,\"gradient_norm\":null,\"images_per_s\":800.0,\"skipped\":0}
";

/// A run of `recipe` in `runs/NAME`, ended early, with fixed numbers.
fn run(sandbox: &Sandbox, name: &str, recipe: &str, flags: &[&str]) {
    let out = format!("runs/{name}");
    let arguments = [&["run", recipe, "-q", "--steps", "2", "--threads", "1", "--out", &out], flags].concat();
    ends(&sandbox.run(arguments), 0, &[]);
    write(sandbox, name, "metrics.jsonl", METRICS);
    let summary = "{ \"pretrain\": { \"steps\": 3, \"loss\": 1.5 }, \"knn\": { \"pixels\": { \"accuracy\": 0.75 }, \
                   \"student\": { \"accuracy\": 0.5 } } }";
    write(sandbox, name, "summary.json", summary);
}

fn write(sandbox: &Sandbox, name: &str, file: &str, text: &str) {
    fs::write(sandbox.work().join("runs").join(name).join(file), text).expect("written");
}

fn read(sandbox: &Sandbox, file: &str) -> String {
    fs::read_to_string(sandbox.work().join("runs").join(file)).expect("a file")
}

/// Makes the manifest one of a run that has not ended.
fn reopen(sandbox: &Sandbox, name: &str) {
    // The checksum is made as the run makes it: BLAKE3 of the JSON without it.
    let mut manifest: Value = serde_json::from_str(&read(sandbox, &format!("{name}/manifest.json"))).expect("JSON");
    let entries = manifest.as_object_mut().expect("a mapping");
    entries.shift_remove("blake3");
    entries["ended"] = Value::Null;
    let checksum = blake3::hash(&serde_json::to_vec(&entries).expect("JSON")).to_hex().to_string();
    entries.insert("blake3".into(), checksum.into());
    write(sandbox, name, "manifest.json", &manifest.to_string());
}

/// What commands print, without dates.
fn printed(sandbox: &Sandbox, lines: &[&str]) -> String {
    let mut out = String::new();
    for line in lines {
        let words = shlex::split(line).expect("a command line");
        let output = sandbox.run(&words[1..]);
        out.push_str(&format!("$ {line}\nexit code {}\n", output.status.code().expect("it ended")));
        for (name, bytes) in [("stdout", output.stdout), ("stderr", output.stderr)] {
            let text = sandbox.redact(&String::from_utf8(bytes).expect("UTF-8"));
            if !text.is_empty() {
                out.push_str(&format!("{name}\n"));
            }
            for line in text.lines() {
                out.push_str(format!("    {}", undated(line)).trim_end());
                out.push('\n');
            }
        }
    }
    out
}

/// A line with every date and time as `2023-06-18 09:30` or `2023-06-18T09:30:00Z`.
fn undated(line: &str) -> String {
    let of_shape = |text: &str, shape: &str| {
        text.len() >= shape.len()
            && text
                .bytes()
                .zip(shape.bytes())
                .all(|(c, s)| if s.is_ascii_digit() { c.is_ascii_digit() } else { c == s })
    };
    let mut out = String::new();
    let mut rest = line;
    while let Some(c) = rest.chars().next() {
        match ["2023-06-18T09:30:00Z", "2023-06-18 09:30"].into_iter().find(|shape| of_shape(rest, shape)) {
            Some(shape) => {
                out.push_str(shape);
                rest = &rest[shape.len()..];
            }
            None => {
                out.push(c);
                rest = &rest[c.len_utf8()..];
            }
        }
    }
    out
}

fn committed(name: &str, text: String) {
    assert_committed(&here().join("run_tables").join(name), text);
}

#[test]
fn runs_are_listed_with_state_progress_and_best_result() {
    let sandbox = Sandbox::new();
    let missing = printed(&sandbox, &["maskalign runs list", "maskalign runs list recipes"]);
    fs::create_dir(sandbox.work().join("runs")).expect("a folder");
    let empty = printed(&sandbox, &["maskalign runs list"]);
    run(&sandbox, "good-first", "good.yaml", &[]);
    run(&sandbox, "good-stopped", "good.yaml", &[]);
    reopen(&sandbox, "good-stopped");
    write(&sandbox, "good-stopped", "summary.json", "{}");
    let two: String = METRICS.split_inclusive('\n').take(2).collect();
    write(&sandbox, "good-stopped", "metrics.jsonl", &two);
    run(&sandbox, "good-torn", "good.yaml", &[]);
    write(&sandbox, "good-torn", "summary.json", "{ \"pre");
    let listed = printed(&sandbox, &["maskalign runs list"]);
    run(&sandbox, "deep/other", "good.yaml", &[]);
    let manifest: Value = serde_json::from_str(&read(&sandbox, "deep/other/manifest.json")).expect("JSON");
    let mut old = manifest.as_object().expect("a mapping").clone();
    old.shift_remove("blake3");
    write(&sandbox, "deep/other", "manifest.json", &Value::Object(old).to_string());
    // A run that goes on holds the lock of its marker.
    let marker =
        fs::OpenOptions::new().read(true).write(true).open(sandbox.work().join("runs/good-first/.maskalign-run"));
    let marker = marker.expect("a marker");
    marker.lock().expect("the lock");
    let rest = printed(&sandbox, &["maskalign runs list", "maskalign runs list runs/good-stopped --json"]);
    drop(marker);
    committed("list.txt", missing + &empty + &listed + &rest);
}

#[test]
fn the_metrics_of_a_run_are_columns() {
    let sandbox = Sandbox::new();
    run(&sandbox, "a", "good.yaml", &[]);
    let mut text = printed(
        &sandbox,
        &[
            "maskalign runs metrics runs/a",
            "maskalign runs metrics runs/a --csv",
            "maskalign runs metrics runs/a --csv --stage finetune",
            "maskalign runs metrics runs/a --json --stage finetune",
            "maskalign runs metrics runs/a --stage pretain",
            "maskalign runs metrics runs",
            "maskalign runs metrics runs/b",
        ],
    );
    write(&sandbox, "a", "metrics.jsonl", &METRICS.replacen("{\"stage\":\"pretrain\",\"step\":1,", "{\"step\":1,", 1));
    text += &printed(&sandbox, &["maskalign runs metrics runs/a --csv --stage pretrain"]);
    write(&sandbox, "a", "metrics.jsonl", &METRICS[..METRICS.len() - 9]);
    text += &printed(&sandbox, &["maskalign runs metrics runs/a --json --stage pretrain"]);
    let step =
        |step: usize| format!("{{\"stage\":\"pretrain\",\"step\":{step},\"epoch\":{},\"loss\":1.0}}\n", step / 10);
    write(&sandbox, "a", "metrics.jsonl", &(0..1000).map(step).collect::<String>());
    text += &printed(&sandbox, &["maskalign runs metrics runs/a"]);
    fs::remove_file(sandbox.work().join("runs/a/metrics.jsonl")).expect("removed");
    text += &printed(&sandbox, &["maskalign runs metrics runs/a", "maskalign runs metrics runs/a --json"]);
    committed("metrics.txt", text);
}

#[test]
fn runs_are_compared_by_recipe_and_by_result() {
    let sandbox = Sandbox::new();
    run(&sandbox, "a", "good.yaml", &[]);
    let changes = ["--set", "seed=1", "--set", "stages.pretrain.masker={type: random, visible: 6}"];
    run(&sandbox, "b", "good.yaml", &changes);
    run(&sandbox, "c", "good.yaml", &["--set", "~stages.knn"]);
    write(&sandbox, "b", "metrics.jsonl", &METRICS.replace("1.125", "0.875"));
    write(&sandbox, "c", "metrics.jsonl", "");
    write(&sandbox, "c", "summary.json", "{}");
    let mut text = printed(
        &sandbox,
        &[
            "maskalign runs compare runs/a runs/b",
            "maskalign runs compare runs/a runs/b runs/c --markdown",
            "maskalign runs compare runs/a runs/a",
            "maskalign runs compare runs/a runs/b --json",
            "maskalign runs compare runs/a",
            "maskalign runs compare runs/a runs/gone",
        ],
    );
    write(&sandbox, "c", "recipe.resolved.yaml", "name: [");
    text += &printed(&sandbox, &["maskalign runs compare runs/a runs/c"]);
    fs::remove_file(sandbox.work().join("runs/c/recipe.resolved.yaml")).expect("removed");
    text += &printed(&sandbox, &["maskalign runs compare runs/a runs/c"]);
    write(&sandbox, "c", "manifest.json", "{}");
    text += &printed(&sandbox, &["maskalign runs compare runs/a runs/c"]);
    committed("compare.txt", text);
}

/// What `--csv` prints is what another reader of CSV takes for the same numbers.
#[test]
fn the_columns_hold_every_number_as_it_was_recorded() {
    let sandbox = Sandbox::new();
    ends(&sandbox.run(["run", "tiny.yaml", "-q", "--out", "runs/tiny", "--threads", "1"]), 0, &[]);
    let output = sandbox.run(["runs", "metrics", "runs/tiny", "--csv"]);
    ends(&output, 0, &[]);
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let mut lines = text.lines().map(|line| line.split(',').collect::<Vec<_>>());
    let names = lines.next().expect("a heading");
    assert_eq!(names[..3], ["stage", "step", "epoch"]);
    let records = read(&sandbox, "tiny/metrics.jsonl");
    let mut seen = 0;
    for (record, cells) in records.lines().zip(lines) {
        let record: Value = serde_json::from_str(record).expect("a record");
        for (name, cell) in names.iter().zip(cells) {
            let value = record.pointer(&format!("/{}", name.replace('.', "/"))).unwrap_or(&Value::Null);
            match value {
                Value::Null => assert_eq!(cell, "", "{name}"),
                Value::String(text) => assert_eq!(cell, text),
                number => assert_eq!(cell.parse::<f64>().ok(), number.as_f64(), "{name}"),
            }
        }
        seen += 1;
    }
    assert_eq!(seen, text.lines().count() - 1);
    assert!(names.contains(&"knn.accuracy"), "{names:?}");
}
