//! `report.html`: whole, self-contained, and true to what was measured.

use std::fs;

use serde_json::Value;

use crate::support::Sandbox;

fn run(sandbox: &Sandbox, arguments: &[&str]) {
    let output = sandbox.run([&["run"], arguments, &["-q"]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The elements of a page, checked to be nested as they are opened.
fn elements(page: &str) -> Vec<String> {
    let mut open: Vec<String> = Vec::new();
    let mut all = Vec::new();
    let mut rest = page.strip_prefix("<!doctype html>").expect("a page");
    while let Some(at) = rest.find('<') {
        let end = at + rest[at..].find('>').expect("a closed tag");
        let tag = &rest[at + 1..end];
        rest = &rest[end + 1..];
        if tag.starts_with('!') || tag.starts_with('?') {
            continue;
        }
        match tag.strip_prefix('/') {
            Some(name) => assert_eq!(open.pop().as_deref(), Some(name), "at {}", &rest[..rest.len().min(80)]),
            None => {
                let name = tag.split([' ', '\n', '/']).next().unwrap_or_default().to_owned();
                if !tag.ends_with('/') && name != "meta" {
                    open.push(name.clone());
                }
                all.push(name);
            }
        }
    }
    assert!(open.is_empty(), "{open:?} are not closed");
    all
}

#[test]
fn a_run_ends_with_a_page_of_its_own() {
    let sandbox = Sandbox::new();
    let output = sandbox.run(["run", "good.yaml", "--out", "run", "-q"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&output.stdout).ends_with("report: run/report.html\n"));
    let page = fs::read_to_string(sandbox.work().join("run/report.html")).expect("a page");
    let all = elements(&page);
    assert!(all.iter().filter(|name| *name == "svg").count() >= 4, "loss, rate, gradients, seconds");
    // Nothing is fetched: no address but the name of SVG's elements.
    assert_eq!(page.matches("://").count(), page.matches("http://www.w3.org/2000/svg").count());
    assert!(!page.contains("<script") && !page.contains("<link"));
    let shown = |name: &str| fs::read(sandbox.work().join("run/pictures").join(name)).expect("a picture");
    let pixels =
        ["pretrain.masks", "pretrain.attention-student", "pretrain.features", "pretrain.reconstructions-pixels"];
    for picture in pixels.into_iter().chain(["knn.neighbours"]) {
        assert_eq!(shown(&format!("{picture}.png"))[..8], *b"\x89PNG\r\n\x1a\n");
    }
    assert_eq!(page.matches("src=\"data:image/png;base64,").count(), 5, "and each is in the page");
    for chart in ["pretrain.curve-loss", "pretrain.curve-rate", "knn.map"] {
        let file = String::from_utf8(shown(&format!("{chart}.svg"))).expect("text");
        elements(&format!("<!doctype html>{file}"));
    }
    assert_eq!(page.matches("src=\"data:image/svg+xml;base64,").count(), 1, "curves are drawn in the page");
    let summary: Value =
        serde_json::from_str(&fs::read_to_string(sandbox.work().join("run/summary.json")).expect("results"))
            .expect("JSON");
    let accuracy = summary["knn"]["pixels"]["accuracy"].as_f64().expect("a share");
    assert!(page.contains(&format!("{:.1} %", 100.0 * accuracy)), "the page shows the result");
    assert!(
        page.contains("finished") && page.contains("with every default") && page.contains("prefers-color-scheme: dark")
    );
    // One number stands for the loss wherever it is told.
    let loss = maskalign_core::chart::short(summary["pretrain"]["loss"].as_f64().expect("a loss"));
    assert!(
        page.contains(&format!(">{loss}, mean of the last epoch<")) && page.contains(&format!(" to {loss}, mean of")),
        "{loss}"
    );
    assert!(
        page.contains("What the student sees in training") && page.contains("the most of an image"),
        "titles and a scale"
    );
    assert!(
        page.contains("pixels themselves") && page.contains("maskalign export run --stage pretrain"),
        "columns, and what next"
    );
    assert!(!page.contains('`'), "no backtick is shown as one");
}

#[test]
fn several_runs_stand_side_by_side() {
    let sandbox = Sandbox::new();
    run(&sandbox, &["good.yaml", "--out", "one"]);
    run(&sandbox, &["good.yaml", "--out", "two", "--set", "seed=7", "--set", "stages.pretrain.epochs=2"]);
    // A run that is not finished has a page too.
    run(&sandbox, &["good.yaml", "--out", "three", "--steps", "2"]);
    fs::remove_file(sandbox.work().join("three/summary.json")).expect("removed");
    let output = sandbox.run(["report", "one", "two", "three", "--out", "all.html"]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "all.html\n");
    let page = fs::read_to_string(sandbox.work().join("all.html")).expect("a page");
    elements(&page);
    assert!(page.contains("seed: 0 -&gt; 7") && page.contains("stages.pretrain.epochs: 1.0 -&gt; 2.0"), "what differs");
    // Each curve is named after its run, with what it ends at.
    for name in ["one", "two", "three"] {
        assert!(page.contains(&format!("{name}: from")), "{name}");
    }
}

#[test]
fn where_a_run_was_resumed_or_forked_is_said() {
    let sandbox = Sandbox::new();
    run(&sandbox, &["tiny.yaml", "--out", "one", "--steps", "5"]);
    run(&sandbox, &["--resume", "one"]);
    let page = |name: &str| fs::read_to_string(sandbox.work().join(name).join("report.html")).expect("a page");
    assert!(page("one").contains(", in pretrain after step 5<"), "{}", page("one"));
    run(&sandbox, &["--from", "one@6", "--set", "stages.pretrain.epochs=3", "--out", "two"]);
    let two = page("two");
    assert!(two.contains("one: pretrain after step 6<br/>stages.pretrain.epochs: 2.0 -&gt; 3.0"), "{two}");
    elements(&two);
    let said = sandbox.run(["run", "--from", "one@6", "--set", "stages.pretrain.epochs=3", "--out", "three"]);
    assert!(String::from_utf8_lossy(&said.stderr).contains("it may jump"), "the rate");
}

#[test]
fn what_is_no_run_is_refused() {
    let sandbox = Sandbox::new();
    fs::create_dir(sandbox.work().join("empty")).expect("a folder");
    for (arguments, says) in [
        (vec!["report", "nowhere"], "nowhere is not a run directory"),
        (vec!["report", "empty"], "empty is not a run directory"),
        (vec!["report", "good.yaml"], "good.yaml is not a run directory"),
    ] {
        let output = sandbox.run(arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(says), "{said}");
    }
    run(&sandbox, &["good.yaml", "--out", "run", "--steps", "2"]);
    let file = sandbox.work().join("run/metrics.jsonl");
    let text = fs::read_to_string(&file).expect("metrics");
    fs::write(&file, format!("{{ torn\n{text}")).expect("written");
    let output = sandbox.run(["report", "run", "--out", "new.html"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("line 1 of run/metrics.jsonl is damaged"));
    assert!(!sandbox.work().join("new.html").exists());
}
