//! What each verb prints, and its exit code.
//!
//! A case is a file `cli/NAME.txt`: lines `$ maskalign ...`, each run in the same temporary folder beside copies of
//! `cli/recipes`, and behind each what it printed. `SNAPSHOTS=overwrite` rewrites what was printed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
};

use crate::support::{Sandbox, assert_committed, compare, files_in, here};

/// Runs a case and gives its file as it should be.
fn replay(case: &str) -> String {
    let sandbox = Sandbox::new();
    let mut out = String::new();
    for line in case.lines() {
        if line.starts_with('#') {
            out.push_str(&format!("{line}\n"));
        }
        let Some(typed) = line.strip_prefix("$ ") else {
            continue;
        };
        if out.lines().last().is_some_and(|line| !line.starts_with('#')) {
            out.push('\n');
        }
        let words = shlex::split(typed).expect("a command line");
        let variables = words.iter().take_while(|word| *word != "maskalign").count();
        let mut command = sandbox.command(&words[variables + 1..]);
        command.envs(words[..variables].iter().filter_map(|word| word.split_once('=')));
        let output = command.output().expect("the command starts");
        let code = output.status.code().map_or("none".to_string(), |code| code.to_string());
        out.push_str(&format!("{line}\nexit code {code}\n"));
        for (name, bytes) in [("stdout", output.stdout), ("stderr", output.stderr)] {
            let text = String::from_utf8(bytes).expect("UTF-8");
            if text.is_empty() {
                continue;
            }
            out.push_str(&format!("{name}\n"));
            for line in sandbox.redact(&text).lines() {
                out.push_str(format!("    {line}").trim_end());
                out.push('\n');
            }
        }
    }
    out
}

#[test]
fn every_case_prints_what_is_committed() {
    let cases = files_in(&here().join("cli"));
    assert!(cases.len() >= 10, "{} cases", cases.len());
    let stale = |file: &PathBuf| compare(file, replay(&fs::read_to_string(file).expect("text"))).err();
    let stale: Vec<String> = cases.iter().filter_map(stale).map(|stale| stale.to_string()).collect();
    assert!(stale.is_empty(), "{}", stale.join("\n"));
}

#[test]
fn the_committed_schema_is_the_one_of_this_binary() {
    let output = Sandbox::new().run(["schema"]);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    assert!(text.ends_with("}\n"));
    assert_committed(&here().join("../recipes/recipe.schema.json"), text);
}

#[test]
fn every_shipped_recipe_validates_by_its_name() {
    let sandbox = Sandbox::new();
    let output = sandbox.run(["list", "recipes", "--format", "json"]);
    let listed: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let names: Vec<&str> = listed.as_array().expect("a list").iter().filter_map(|r| r["name"].as_str()).collect();
    let shipped = files_in(&here().join("../recipes"));
    let shipped: Vec<&str> = shipped
        .iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "yaml"))
        .filter_map(|path| path.file_stem()?.to_str())
        .collect();
    assert_eq!(names, shipped, "every recipe of the repository is embedded, and nothing else");
    let output = sandbox.run(["validate", "--no-environment"].iter().chain(&names));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A recipe that `show --resolved` printed is the same recipe.
#[test]
fn a_resolved_recipe_resolves_to_itself() {
    let sandbox = Sandbox::new();
    let first = sandbox.run(["show", "good.yaml", "--resolved"]);
    assert!(first.status.success());
    fs::write(sandbox.work().join("resolved.yaml"), &first.stdout).expect("written");
    let second = sandbox.run(["show", "resolved.yaml", "--resolved"]);
    assert_eq!(String::from_utf8_lossy(&second.stdout), String::from_utf8_lossy(&first.stdout));
}

#[test]
fn mistakes_are_data_too() {
    let sandbox = Sandbox::new();
    let output = sandbox.run(["validate", "unknown_key.yaml", "good.yaml", "--format", "json"]);
    assert_eq!(output.status.code(), Some(2));
    let data: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(data["valid"], false);
    let mistake = &data["recipes"][0]["diagnostics"][0];
    assert_eq!((&mistake["code"], &mistake["file"]), (&"unknown-key".into(), &"unknown_key.yaml".into()));
    assert!(mistake["line"].is_u64() && mistake["column"].is_u64(), "{mistake}");
    assert_eq!(data["recipes"][1]["valid"], true);
    assert!(data["recipes"][1]["stages"]["pretrain"]["memory"].is_u64());
}

/// As in `maskalign list | head -1`.
#[test]
fn a_closed_pipe_is_no_failure() {
    let sandbox = Sandbox::new();
    let mut child =
        sandbox.command(["schema"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("it ends");
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]));
}

#[test]
fn colour_changes_no_text() {
    let sandbox = Sandbox::new();
    let plain = sandbox.run(["validate", "unknown_key.yaml"]);
    let forced =
        sandbox.command(["validate", "unknown_key.yaml"]).env("CLICOLOR_FORCE", "1").output().expect("it starts");
    let forced = String::from_utf8(forced.stderr).expect("UTF-8");
    assert!(forced.contains("\u{1b}["), "{forced}");
    let mut stripped = String::new();
    for (index, part) in forced.split("\u{1b}[").enumerate() {
        stripped.push_str(if index == 0 { part } else { part.split_once('m').expect("a colour").1 });
    }
    assert_eq!(stripped, String::from_utf8_lossy(&plain.stderr));
    let silenced = sandbox
        .command(["validate", "unknown_key.yaml"])
        .env("CLICOLOR_FORCE", "1")
        .env("NO_COLOR", "1")
        .output()
        .expect("it starts");
    assert_eq!(silenced.stderr, plain.stderr);
}

#[test]
fn every_shell_gets_completions() {
    let sandbox = Sandbox::new();
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let output = sandbox.run(["completions", shell]);
        assert!(output.status.success(), "{shell}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("validate"), "{shell}");
    }
}

/// A generated plugin has everything in place; building it is CI's.
#[test]
fn a_new_plugin_points_at_the_checkout() {
    let sandbox = Sandbox::new();
    let checkout = here().parent().expect("the workspace");
    let output = sandbox.run(["new", "plugin", "lattice", "--path", checkout.to_str().expect("UTF-8")]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let manifest = fs::read_to_string(sandbox.work().join("lattice/Cargo.toml")).expect("a manifest");
    for name in ["maskalign-core", "maskalign-cli"] {
        let line = manifest.lines().find(|line| line.starts_with(name)).expect("a dependency");
        let path = line.split('"').nth(1).expect("a path");
        assert!(Path::new(path).join("Cargo.toml").is_file(), "{line}");
    }
}
