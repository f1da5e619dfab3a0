//! Runs of the command: what they leave, and how they end.

use std::{
    fs,
    path::Path,
    process::{Child, Command},
    thread::sleep,
    time::{Duration, Instant},
};

#[cfg(unix)]
use crate::support::after_records;
use crate::support::{Sandbox, run_record};
use serde_json::Value;

fn json(path: &Path) -> Value {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn a_run_leaves_its_directory_and_prints_its_results() {
    let sandbox = Sandbox::new();
    let output = sandbox.run(["run", "good.yaml", "--steps", "2", "--out", "run", "--threads", "1"]);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{err}");
    assert!(out.contains("pixels") && out.contains(" %") && out.contains("run directory: run"), "{out}");
    assert!(err.contains("step 2 of 2"), "{err}");
    assert!(!out.contains("step 2 of 2"), "progress is no result");
    let run = sandbox.work().join("run");
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).expect("metrics");
    let records: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).expect("a record")).collect();
    let (steps, others): (Vec<Value>, Vec<Value>) = records.into_iter().partition(|record| record["loss"].is_number());
    assert_eq!(steps.len(), 2);
    let effective = 8.0;
    for step in &steps {
        let phases = step["seconds"].as_object().expect("phases").values();
        let all: f64 = phases.map(|seconds| seconds.as_f64().expect("a number")).sum();
        let whole = effective / step["images_per_s"].as_f64().expect("a rate");
        assert!(all > 0.0 && all <= whole, "the phases are parts of the step: {step}");
    }
    let summary = json(&run.join("summary.json"));
    let measured: Vec<&Value> = others.iter().filter(|record| record["stage"] == "knn").collect();
    assert_eq!(measured.len(), summary["knn"].as_object().expect("named results").len());
    assert_eq!(measured[0]["pixels"], summary["knn"]["pixels"]);
    assert_eq!(summary["pretrain"]["steps"], 2);
    assert!(summary["knn"]["pixels"]["accuracy"].as_f64().expect("a share") > 0.2, "{summary}");
    let manifest = json(&run.join("manifest.json"));
    assert_eq!(manifest["command_line"][1], "run");
    assert!(manifest["ended"].is_string());

    let again = sandbox.run(["run", "good.yaml", "--steps", "2", "--out", "run"]);
    assert_eq!(again.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&again.stderr).contains("--resume run"));
    let resumed = sandbox.run(["run", "--resume", "run", "--steps", "2", "-q"]);
    assert_eq!(resumed.status.code(), Some(0), "{}", String::from_utf8_lossy(&resumed.stderr));
    assert_eq!(resumed.stdout, output.stdout, "a finished run prints the same results");
    assert_eq!(String::from_utf8_lossy(&resumed.stderr), "", "-q");
    let other = sandbox.run(["run", "good.yaml", "--set", "seed=7", "--resume", "run"]);
    assert_eq!(other.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&other.stderr).contains("seed: 0 -> 7"));
}

/// Each objective's part of the loss is recorded, and each level's distance: what they are is known where the weights are.
#[test]
fn the_terms_of_a_loss_are_recorded() {
    let sandbox = Sandbox::new();
    let objective = |level: &str, weight: &str| {
        format!(
            "{{ target: {{ type: features, teacher: teacher, levels: {level} }}, tokens: [visible], aligner: {{ type: dynamic, fusion: sum }}, \
             loss: {{ type: mse }}, weight: {weight} }}"
        )
    };
    let recipe = format!(
        "name: terms\nextends: quickstart\nstages:\n  pretrain:\n    epochs: 2\n    objectives:\n      align: {}\n      more: {}\n",
        objective("{ last: 3 }", "0.5"),
        objective("[0]", "3"),
    );
    fs::write(sandbox.work().join("terms.yaml"), recipe).expect("written");
    let output = sandbox.run(["run", "terms.yaml", "--set", "~stages.knn", "--steps", "3", "--out", "run", "-q"]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let metrics = fs::read_to_string(sandbox.work().join("run/metrics.jsonl")).expect("metrics");
    for line in metrics.lines() {
        let line: Value = serde_json::from_str(line).expect("a record");
        let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{line}"));
        let (align, more, loss) = (&line["terms"]["align"], &line["terms"]["more"], &line["loss"]);
        assert!((number(align) + number(more) - number(loss)).abs() < 1e-6 * number(loss), "{line}");
        let levels = line["levels"]["align"].as_object().expect("several levels");
        assert_eq!(levels.keys().collect::<Vec<_>>(), ["3", "4", "5"]);
        let mean = levels.values().map(number).sum::<f64>() / 3.0;
        assert!((0.5 * mean - number(align)).abs() < 1e-6 * number(align), "{line}");
        assert!(line["levels"]["more"].is_null() && line["lr_groups"].is_null(), "{line}");
    }
}

/// What is measured while a stage trains stands among the steps, once, also where the run was stopped in between.
#[test]
fn evaluations_in_the_course_of_training_are_in_the_metrics() {
    let sandbox = Sandbox::new();
    let lines = |run: &str| -> Vec<Value> {
        let text = fs::read_to_string(sandbox.work().join(run).join("metrics.jsonl")).expect("metrics");
        text.lines().map(|line| serde_json::from_str(line).expect("a record")).collect()
    };
    let run = |arguments: &[&str]| {
        let output = sandbox.run([&["run"], arguments, &["-q"]].concat());
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    };
    run(&["tiny.yaml", "--out", "whole"]);
    let whole = lines("whole");
    let evaluations: Vec<&Value> = whole.iter().filter(|line| line["knn"].is_object()).collect();
    let summary = json(&sandbox.work().join("whole/summary.json"));
    let measured = summary["pretrain"]["knn"].as_array().expect("one an epoch");
    assert_eq!(evaluations.len(), measured.len());
    for (line, measured) in evaluations.iter().zip(measured) {
        assert_eq!(line["stage"], "pretrain");
        assert_eq!(line["knn"]["accuracy"], measured["accuracy"]);
        assert_eq!(line["epoch"].as_f64(), measured["epoch"].as_f64());
    }
    assert!(whole.iter().filter(|line| line["loss"].is_number()).count() > evaluations.len());
    run(&["tiny.yaml", "--out", "parts", "--steps", "5"]);
    run(&["--resume", "parts"]);
    let untimed = |lines: Vec<Value>| -> Vec<Value> {
        let untimed = |mut line: Value| {
            let fields = line.as_object_mut().expect("an object");
            fields.retain(|name, _| name != "images_per_s" && name != "seconds");
            line
        };
        lines.into_iter().map(untimed).collect()
    };
    assert_eq!(untimed(lines("parts")), untimed(whole));
}

/// Each level is a row of the summary, of the metrics and of what is printed, by any number of threads.
#[test]
fn levels_are_rows() {
    let sandbox = Sandbox::new();
    let run = |out: &str, threads: &str| {
        let levels = ["--set", "stages.knn.levels=[embed, -1]", "--threads", threads];
        let output = sandbox.run([&["run", "tiny.yaml", "--out", out][..], &levels].concat());
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        (json(&sandbox.work().join(out).join("summary.json")), output)
    };
    let (summary, output) = run("one", "1");
    assert_eq!(run("two", "2").0, summary, "the number of threads changes nothing");
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    let progress = String::from_utf8_lossy(&output.stderr).into_owned();
    let metrics = fs::read_to_string(sandbox.work().join("one/metrics.jsonl")).expect("metrics");
    let records: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).expect("a record")).collect();
    let rows: Vec<&Value> = records.iter().filter(|record| record["stage"] == "knn").collect();
    assert_eq!(rows.len(), 5, "pixels, and two levels of two towers: {rows:?}");
    for tower in ["untrained", "student"] {
        for level in ["embed", "1"] {
            let accuracy = summary["knn"][tower][level]["accuracy"].as_f64().expect("a share");
            assert!(rows.iter().any(|row| row[tower][level]["accuracy"] == accuracy), "{tower}, {level}: {rows:?}");
            assert!(printed.contains(&format!("{tower} {level} ")), "{printed}");
            assert!(progress.contains(&format!("knn: {tower} {level} accuracy")), "{progress}");
        }
    }
}

/// What `evaluate` reads from the run directory is the classifier that its stage measured itself, in a run that went through
/// and in one that went on.
#[test]
fn classifiers_are_evaluated_as_they_were_left() {
    let sandbox = Sandbox::new();
    let data = "{dataset: {type: sample, split: test, limit: 20}}";
    let probe = format!(
        "stages.probe={{type: linear_probe, epochs: 2, data: {{dataset: {{type: sample, split: train, limit: 64}}}}, \
         eval: {data}, student: {{type: vit, weights: {{stage: pretrain}}}}, optimizer: {{type: lars, base_lr: 1}}, \
         schedule: {{type: cosine}}, batch: {{effective: 16}}}}"
    );
    let evaluate = |name: &str, stage: &str| {
        format!("stages.{name}={{type: evaluate, classifier: {{stage: {stage}}}, data: {data}, batch: 6}}")
    };
    let sets = [probe, evaluate("tuned", "finetune"), evaluate("probed", "probe")];
    let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set.as_str()]).collect();
    let output = sandbox.run([&["run", "tiny.yaml", "--out", "run"], &sets[..]].concat());
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let path = sandbox.work().join("run/summary.json");
    let summary = json(&path);
    for (evaluated, stage) in [("tuned", "finetune"), ("probed", "probe")] {
        let evaluated = &summary[evaluated];
        assert_eq!(evaluated["accuracy"], summary[stage]["accuracy"], "{summary}");
        assert!(evaluated["top_5_accuracy"].as_f64() >= evaluated["accuracy"].as_f64());
        let by_class = evaluated["classes"].as_object().expect("classes by name");
        assert_eq!(by_class["Sandal"]["images"], 2, "the classes take turns");
        let confused = evaluated["confusion"].as_object().expect("classes by name").values();
        let images = confused.flat_map(|row| row.as_object().expect("counts").values());
        assert_eq!(images.map(|count| count.as_u64().expect("a count")).sum::<u64>(), 20);
    }
    assert!(printed.contains("confusion") && printed.contains("top_5_accuracy"), "{printed}");
    for stage in ["tuned", "probed"] {
        fs::remove_dir_all(sandbox.work().join("run/checkpoints").join(stage)).expect("removed");
    }
    fs::remove_file(&path).expect("removed");
    let output = sandbox.run(["run", "--resume", "run"]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(json(&path), summary);
}

/// What a scheduler runs each time it gives a job its turn.
#[test]
fn one_command_starts_a_run_goes_on_with_it_and_knows_when_it_is_done() {
    let sandbox = Sandbox::new();
    let run = |more: &[&str]| {
        let output = sandbox.run([&["run", "tiny.yaml", "--out", "job", "--resume-or-start", "-q"], more].concat());
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        (output, text)
    };
    let (output, text) = run(&["--steps", "3"]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!text.contains("the run is done"), "{text}");
    let (output, first) = run(&[]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let manifest = sandbox.work().join("job/manifest.json");
    assert_eq!(json(&manifest)["resumed"].as_array().expect("a list").len(), 1);
    let (output, text) = run(&[]);
    assert_eq!(output.status.code(), Some(0));
    assert!(text.contains("the run is done") && first.contains(text.trim_end_matches("the run is done\n")), "{text}");
    assert_eq!(json(&manifest)["resumed"].as_array().expect("a list").len(), 1, "nothing was resumed");
    let whole = sandbox.run(["run", "tiny.yaml", "--out", "whole", "-q"]);
    assert_eq!(whole.status.code(), Some(0));
    let record = |name: &str| run_record(&sandbox.work().join(name));
    record("whole").assert_same(&record("job"), "started, and continued by the same command");
    let (output, _) = run(&["--set", "seed=7"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("seed: 5 -> 7"));
    fs::create_dir(sandbox.work().join("empty")).expect("a folder");
    let empty = ["run", "good.yaml", "--out", "empty", "--resume-or-start", "--steps", "1", "-q"];
    assert_eq!(sandbox.run(empty).status.code(), Some(0));
}

#[test]
fn a_refused_recipe_leaves_no_directory() {
    let sandbox = Sandbox::new();
    let output = sandbox.run(["run", "good.yaml", "--set", "stages.pretrain.masker.ratio=1", "--out", "run"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(!sandbox.work().join("run").exists());
}

#[test]
fn a_student_is_exported_under_other_names() {
    let sandbox = Sandbox::new();
    let run = sandbox.run(["run", "good.yaml", "--steps", "1", "--out", "run", "-q"]);
    assert_eq!(run.status.code(), Some(0), "{}", String::from_utf8_lossy(&run.stderr));
    for (format, name) in
        [("timm", "blocks.0.attn.qkv.weight"), ("hf_vit", "encoder.layer.0.attention.attention.query.weight")]
    {
        let output = sandbox.run(["export", "run", "--stage", "pretrain", "--format", format, "--out", format]);
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        let bytes = fs::read(sandbox.work().join(format)).expect("a file");
        assert!(String::from_utf8_lossy(&bytes).contains(name), "{format}");
        assert!(!String::from_utf8_lossy(&bytes[..4096]).contains("decoder"), "{format}");
    }
}

#[cfg(unix)]
mod signals {
    use super::*;

    fn signal(child: &Child, name: &str) {
        let sent = Command::new("kill").args([format!("-{name}"), child.id().to_string()]).status().expect("kill");
        assert!(sent.success());
    }

    const LONG: [&str; 8] =
        ["run", "good.yaml", "--set", "stages.pretrain.epochs=10000", "--out", "run", "--threads", "1"];

    /// A run that would go on for hours, after its first steps.
    fn long_run(sandbox: &Sandbox) -> Child {
        after_two_steps(sandbox, sandbox.command(LONG))
    }

    fn after_two_steps(sandbox: &Sandbox, command: Command) -> Child {
        after_records(command, &sandbox.work().join("run"), 2)
    }

    #[test]
    fn stopped_runs_save_their_state_and_say_how_to_go_on() {
        // What `nohup` started ignores SIGHUP, and so does what it starts.
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap_or("0").trim().to_owned();
        let ignores_hang_up = u64::from_str_radix(&mask, 16).is_ok_and(|mask| mask & 1 == 1);
        for (name, code) in [("TERM", 143), ("INT", 130), ("HUP", 129)] {
            if name == "HUP" && ignores_hang_up {
                continue;
            }
            let sandbox = Sandbox::new();
            let child = long_run(&sandbox);
            signal(&child, name);
            let output = child.wait_with_output().expect("it ends");
            let err = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(code), "{err}");
            assert!(err.contains("--resume run"), "{err}");
            let checkpoints = sandbox.work().join("run/checkpoints/pretrain");
            assert!(checkpoints.read_dir().expect("a folder").count() > 0);
            let metrics = fs::read_to_string(sandbox.work().join("run/metrics.jsonl")).expect("metrics");
            let done = metrics.lines().count() + 1;
            let resumed = sandbox.run(["run", "--resume", "run", "--steps", &done.to_string(), "-q"]);
            assert_eq!(resumed.status.code(), Some(0), "{}", String::from_utf8_lossy(&resumed.stderr));
            let metrics = fs::read_to_string(sandbox.work().join("run/metrics.jsonl")).expect("metrics");
            let updates = metrics.lines().map(json_line).filter(|record| record["loss"].is_number());
            let steps: Vec<u64> = updates.map(|record| record["step"].as_u64().expect("a step")).collect();
            assert_eq!(steps, (0..done as u64).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_run_that_is_asked_to_save_goes_on() {
        let sandbox = Sandbox::new();
        let seldom = ["--set", "stages.pretrain.checkpoints={every_epochs: 10000}"];
        let mut child = after_two_steps(&sandbox, sandbox.command([&LONG[..], &seldom].concat()));
        let checkpoints = sandbox.work().join("run/checkpoints/pretrain");
        let saved = || checkpoints.read_dir().map_or(0, Iterator::count);
        assert_eq!(saved(), 0);
        signal(&child, "USR1");
        let limit = Instant::now() + Duration::from_secs(60);
        while saved() == 0 {
            assert!(child.try_wait().expect("a process").is_none(), "it goes on");
            assert!(Instant::now() < limit, "nothing was saved");
            sleep(Duration::from_millis(5));
        }
        let steps = || fs::read_to_string(sandbox.work().join("run/metrics.jsonl")).map_or(0, |m| m.lines().count());
        let then = steps();
        while steps() <= then + 1 {
            assert!(Instant::now() < limit, "no step follows");
            sleep(Duration::from_millis(5));
        }
        // A scheduler's signal reaches a run twice: from the scheduler, and from what started the run.
        signal(&child, "TERM");
        signal(&child, "TERM");
        let output = child.wait_with_output().expect("it ends");
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(143), "{err}");
        assert!(err.contains("SIGUSR1: saving") && err.contains("--resume run"), "{err}");
    }

    /// Whether threads of its own read the images or none do.
    #[test]
    fn a_run_whose_images_stop_coming_ends_all_the_same() {
        for workers in ["0", "2"] {
            let sandbox = Sandbox::new();
            let mut command = Command::new(env!("CARGO_BIN_EXE_maskalign-stuck"));
            command.args(["run", "good.yaml", "--out", "run", "--threads", "1", "--workers", workers, "--set"]);
            command.arg("stages.pretrain.data.dataset={type: stuck, answers: 24}").current_dir(sandbox.work());
            let child = after_two_steps(&sandbox, command);
            // The third step is made, and the fourth waits.
            sleep(Duration::from_secs(2));
            let asked = Instant::now();
            signal(&child, "TERM");
            let output = child.wait_with_output().expect("it ends");
            let err = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(143), "{err}");
            assert!(err.contains("no image came for 10 s") && err.contains("--resume"), "{err}");
            assert!(asked.elapsed() < Duration::from_secs(60), "{:?}", asked.elapsed());
        }
    }

    /// As `nohup` starts one.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_run_that_is_to_outlive_its_terminal_does() {
        let sandbox = Sandbox::new();
        let binary = sandbox.command(LONG);
        let mut command = Command::new("sh");
        command.args(["-c", "trap '' HUP; exec \"$0\" \"$@\""]).arg(binary.get_program()).args(LONG);
        command.current_dir(sandbox.work());
        let child = after_two_steps(&sandbox, command);
        signal(&child, "HUP");
        sleep(Duration::from_millis(500));
        signal(&child, "TERM");
        let output = child.wait_with_output().expect("it ends");
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(143), "{err}");
        assert!(!err.contains("SIGHUP"), "{err}");
    }

    fn json_line(line: &str) -> Value {
        serde_json::from_str(line).expect("a whole line")
    }
}
