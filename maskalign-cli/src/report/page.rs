//! The page: runs side by side, results, curves, recipes.

use std::{collections::BTreeSet, fmt::Write as _};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use maskalign_core::{
    chart::{self, Curve, escape},
    run::{PictureFormat, PictureRecord},
};
use maskalign_registry::diff;
use serde_json::{Map, Value};

use super::run::{Run, run_name};
use crate::{progress::number, recipes, table::percent};

/// Numbers of a step that have charts of their own, and how they are called there; further ones have a chart each.
const STEP: [(&str, &str); 3] = [("loss", "Loss"), ("lr", "Learning rate"), ("gradient_norm", "Norm of the gradients")];
/// Results that a picture shows.
const PICTURED: [&str; 1] = ["confusion"];
/// Results of each class.
const BY_CLASS: [&str; 2] = ["classes", "by_class"];
/// So many classes are listed one by one; of more the lowest few.
const MOST_CLASSES: usize = 10;
const LOWEST: usize = 5;
/// Numbers of a step that no chart shows.
const NOT_DRAWN: [&str; 3] = ["images_per_s", "skipped", "step"];

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #5f6368; --line: #d5d8dc; --ground: #ffffff; --panel: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #a5abb3; --line: #3c4248; --ground: #15181b; --panel: #1e2226; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--ground); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0 0 .25rem; }
p { margin: .25rem 0 .75rem; } .soft { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { text-align: right; white-space: nowrap; } th { font-weight: 600; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; padding: .75rem; background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; }
img { display: block; width: 100%; height: auto; border-radius: .25rem; }
img.pixels { image-rendering: pixelated; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--ink); }
svg [stroke='#000000'] { stroke: var(--soft); }
svg [stroke^='#0000'] { stroke-opacity: .6; }
pre { overflow-x: auto; padding: .75rem; background: var(--panel); border: 1px solid var(--line); border-radius: .5rem;
      font-size: .85rem; }
summary { cursor: pointer; }
figcaption { margin-top: .4rem; font-size: .9rem; }
code { overflow-wrap: anywhere; }
";

/// What the runs are called: the names of their directories, or their paths where those are the same.
pub(super) fn names(runs: &[Run]) -> Vec<String> {
    let names: Vec<String> = runs.iter().map(|run| run_name(&run.path)).collect();
    match names.iter().collect::<BTreeSet<_>>().len() == runs.len() {
        true => names,
        false => runs.iter().map(|run| run.path.display().to_string()).collect(),
    }
}

/// The page.
pub(super) fn render(names: &[String], runs: &[Run]) -> String {
    let title = names.join(", ");
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title} - MaskAlign report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n\
         <h1>{title}</h1>\n",
        title = escape(&title)
    );
    page.push_str(&about(names, runs));
    page.push_str(&results(names, runs));
    page.push_str(&pictures(names, runs));
    for stage in in_order(runs, |run| run.stages.iter().map(|(name, _)| name.clone()).collect()) {
        page.push_str(&curves(&stage, names, runs));
    }
    page.push_str(&recipes(names, runs));
    page.push_str("</body>\n</html>\n");
    page
}

/// Names of several runs, each once, in the order in which they come.
fn in_order<T: PartialEq>(runs: &[Run], of: impl Fn(&Run) -> Vec<T>) -> Vec<T> {
    let mut all = Vec::new();
    for name in runs.iter().flat_map(of) {
        if !all.contains(&name) {
            all.push(name);
        }
    }
    all
}

/// With what and when the runs were made.
fn about(names: &[String], runs: &[Run]) -> String {
    type Row = (&'static str, fn(&Run) -> String);
    const ROWS: [Row; 8] = [
        ("state", |run| run.state().to_owned()),
        ("begun", |run| text(&run.manifest["started"])),
        ("ended", |run| text(&run.manifest["ended"])),
        ("computed on", |run| {
            format!(
                "{}, {} threads, {}",
                text(&run.manifest["device"]),
                text(&run.manifest["threads"]),
                text(&run.manifest["isa"])
            )
        }),
        ("peak memory", |run| {
            run.manifest["peak_memory_mib"].as_f64().map_or(String::new(), |mib| format!("{mib:.0} MiB"))
        }),
        ("seed", |run| text(&run.manifest["seed"])),
        ("fingerprint", |run| text(&run.manifest["fingerprint"]).chars().take(12).collect()),
        ("command", |run| {
            let words = run.manifest["command_line"].as_array().into_iter().flatten().map(text);
            words.collect::<Vec<_>>().join(" ")
        }),
    ];
    let mut table = head(names);
    for (name, cell) in ROWS {
        let cells: Vec<String> = runs.iter().map(cell).collect();
        if cells.iter().any(|cell| !cell.is_empty()) {
            let cells: Vec<String> = cells.iter().map(|cell| format!("<td>{}</td>", escape(cell))).collect();
            let _ = writeln!(table, "<tr><th scope=\"row\">{name}</th>{}</tr>", cells.concat());
        }
    }
    format!("<div class=\"wide\"><table>\n{table}</table></div>\n")
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// The row of the runs' names, where there are several.
fn head(names: &[String]) -> String {
    match names {
        [_] => String::new(),
        names => {
            let cells: Vec<String> =
                names.iter().map(|name| format!("<th scope=\"col\">{}</th>", escape(name))).collect();
            format!("<tr><td></td>{}</tr>\n", cells.concat())
        }
    }
}

/// Each stage's results, by run.
fn results(names: &[String], runs: &[Run]) -> String {
    let stages = in_order(runs, |run| run.results.keys().cloned().collect());
    if stages.is_empty() {
        return "<h2>Results</h2>\n<p class=\"soft\">No stage is finished yet.</p>\n".to_owned();
    }
    let mut table = head(names);
    for stage in stages {
        let _ =
            writeln!(table, "<tr><th scope=\"rowgroup\" colspan=\"{}\">{}</th></tr>", names.len() + 1, escape(&stage));
        for path in in_order(runs, |run| listed(run.results.get(&stage))) {
            let cell = |run: &Run| {
                let value = run.results.get(&stage).and_then(|results| at(results, &path));
                let value = value.filter(|value| !value.is_null());
                let value = value.map(|value| number(&path.join("."), value));
                format!("<td class=\"number\">{}</td>", escape(&value.unwrap_or_default()))
            };
            let cells: String = runs.iter().map(cell).collect();
            let _ = writeln!(table, "<tr><td>{}</td>{cells}</tr>", escape(&path.join(" ")));
        }
        for note in in_order(runs, |run| left_out(run.results.get(&stage))) {
            let _ =
                writeln!(table, "<tr><td class=\"soft\" colspan=\"{}\">{}</td></tr>", names.len() + 1, escape(&note));
        }
    }
    format!("<h2>Results</h2>\n<div class=\"wide\"><table>\n{table}</table></div>\n")
}

/// The keys that lead to each number of a stage's results that is listed: not those that a picture shows, nor lists, which are
/// shown as curves; of many classes those with the lowest numbers.
fn listed(results: Option<&Value>) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    if let Some(results) = results {
        list(&mut Vec::new(), results, &mut found);
    }
    found
}

fn list(path: &mut Vec<String>, value: &Value, found: &mut Vec<Vec<String>>) {
    match value {
        Value::Object(entries) => {
            let is_by_class = path.last().is_some_and(|name| BY_CLASS.contains(&name.as_str()));
            let shown = if is_by_class { lowest(entries) } else { entries.keys().collect() };
            for (key, value) in entries.iter().filter(|(key, _)| shown.contains(key)) {
                if !PICTURED.contains(&key.as_str()) {
                    path.push(key.clone());
                    list(path, value, found);
                    path.pop();
                }
            }
        }
        Value::Array(_) | Value::Null => {}
        _ => found.push(path.clone()),
    }
}

/// Of many classes those with the lowest numbers, else all.
fn lowest(classes: &Map<String, Value>) -> Vec<&String> {
    let score = |value: &Value| value.as_f64().or_else(|| value.get("accuracy")?.as_f64()).unwrap_or(f64::INFINITY);
    let mut sorted: Vec<(&String, f64)> = classes.iter().map(|(name, value)| (name, score(value))).collect();
    if sorted.len() > MOST_CLASSES {
        sorted.sort_by(|a, b| a.1.total_cmp(&b.1));
        sorted.truncate(LOWEST);
    }
    sorted.into_iter().map(|(name, _)| name).collect()
}

/// What is said of classes that are not listed.
fn left_out(results: Option<&Value>) -> Vec<String> {
    let mut found = Vec::new();
    let mut open: Vec<(String, &Value)> = results.map(|results| (String::new(), results)).into_iter().collect();
    while let Some((path, value)) = open.pop() {
        for (key, value) in value.as_object().into_iter().flatten() {
            let path = if path.is_empty() { key.clone() } else { format!("{path} {key}") };
            match value.as_object() {
                Some(classes) if BY_CLASS.contains(&key.as_str()) && classes.len() > MOST_CLASSES => found
                    .push(format!("{path}: the {LOWEST} lowest of {}; all of them are in summary.json", classes.len())),
                _ => open.push((path, value)),
            }
        }
    }
    found
}

/// What these keys lead to.
fn at<'v>(value: &'v Value, path: &[String]) -> Option<&'v Value> {
    path.iter().try_fold(value, |value, key| value.get(key))
}

/// What stages show.
fn pictures(names: &[String], runs: &[Run]) -> String {
    let mut figures = String::new();
    for (run_name, run) in names.iter().zip(runs) {
        for (PictureRecord { stage, name, caption, format }, file) in &run.pictures {
            let of = if runs.len() > 1 { format!("{run_name}: ") } else { String::new() };
            let _ = writeln!(
                figures,
                "<figure><h3>{}</h3>\n<img{} alt=\"{caption}\" src=\"data:{};base64,{}\"/>\n<figcaption class=\"soft\">{caption}</figcaption></figure>",
                escape(&format!("{of}{stage} {}", name.replace('-', " "))),
                if *format == PictureFormat::Png { " class=\"pixels\"" } else { "" },
                format.media_type(),
                BASE64_STANDARD.encode(file),
                caption = escape(caption),
            );
        }
    }
    match figures.is_empty() {
        true => figures,
        false => format!("<h2>Pictures</h2>\n<div class=\"charts\">\n{figures}</div>\n"),
    }
}

/// The curves of a stage.
fn curves(stage: &str, names: &[String], runs: &[Run]) -> String {
    let paths = in_order(runs, |run| run.stage(stage).map_or(Vec::new(), |series| series.keys().cloned().collect()));
    let of = |path: &str| -> Vec<Curve> {
        let curve = |(name, run): (&String, &Run)| {
            let points = run.stage(stage)?.get(path)?.clone();
            Some(Curve { name: name.clone(), points })
        };
        names.iter().zip(runs).filter_map(curve).collect()
    };
    let mut charts: Vec<(String, Vec<Curve>)> = Vec::new();
    for (path, title) in STEP {
        let mut drawn = of(path);
        if let ([only], [_]) = (&mut drawn[..], runs) {
            only.name = title.to_lowercase();
        }
        charts.push((title.to_owned(), drawn));
    }
    for (prefix, title) in [
        ("terms.", "Terms of the loss"),
        ("levels.", "Distance by level"),
        ("lr_groups.", "Learning rate by layer"),
        ("seconds.", "Seconds of a step by phase"),
    ] {
        let parts: Vec<&String> = paths.iter().filter(|path| path.starts_with(prefix)).collect();
        // One term is the loss itself; of several runs the charts would hold too much.
        if parts.len() > 1 && runs.len() == 1 {
            let named = |path: &&String| {
                let mut curves = of(path);
                for curve in &mut curves {
                    curve.name = path[prefix.len()..].replace('.', " ");
                }
                curves
            };
            charts.push((title.to_owned(), parts.iter().flat_map(named).collect()));
        }
    }
    for path in &paths {
        let is_step = STEP.iter().any(|(name, _)| name == path) || NOT_DRAWN.contains(&path.as_str());
        if !is_step && !["terms.", "levels.", "lr_groups.", "seconds."].iter().any(|prefix| path.starts_with(prefix)) {
            charts.push((path.replace('.', " "), of(path)));
        }
    }
    let mut figures = String::new();
    for (title, curves) in charts {
        let Some(drawn) = chart::curves(&title, &curves) else { continue };
        let last = match &curves[..] {
            [only] => only.points.last().map_or(String::new(), |(_, value)| {
                let value = if title.contains("accuracy") { percent(*value) } else { chart::short(*value) };
                format!(" <span class=\"soft\">{value} at the end</span>")
            }),
            _ => String::new(),
        };
        let _ = writeln!(figures, "<figure><h3>{}{last}</h3>\n{}</figure>", escape(&title), drawn.inline());
    }
    if figures.is_empty() {
        return String::new();
    }
    format!("<h2>{}</h2>\n<div class=\"charts\">\n{figures}</div>\n", escape(stage))
}

/// The recipes: what differs, and each in full.
fn recipes(names: &[String], runs: &[Run]) -> String {
    let mut text = "<h2>Recipe</h2>\n".to_owned();
    if let [first, rest @ ..] = runs {
        for (name, other) in names[1..].iter().zip(rest) {
            let (Ok(one), Ok(two)) = (recipes::resolved(&first.recipe), recipes::resolved(&other.recipe)) else {
                continue;
            };
            let lines = diff(&one, &two).join("\n");
            let lines = if lines.is_empty() { "nothing".to_owned() } else { lines };
            let _ = writeln!(
                text,
                "<h3>What changes from {} to {}</h3>\n<pre>{}</pre>",
                escape(&names[0]),
                escape(name),
                escape(&lines)
            );
        }
    }
    for (name, run) in names.iter().zip(runs) {
        let _ = writeln!(
            text,
            "<details><summary>{}, with every default</summary>\n<pre>{}</pre></details>",
            escape(name),
            escape(&run.recipe)
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn of_many_classes_the_lowest_are_listed_and_what_a_picture_shows_is_not() {
        let classes = |count: usize| -> Value {
            (0..count)
                .map(|class| (format!("c.{class}"), json!({ "images": 9, "accuracy": 1.0 - class as f64 / 99.0 })))
                .collect()
        };
        let results = |count| json!({ "accuracy": 0.5, "best": null, "classes": classes(count), "confusion": { "c.0": { "c.0": 3 } } });
        let paths = |count: usize| listed(Some(&results(count)));
        assert_eq!(paths(10).len(), 1 + 2 * 10);
        let many = paths(1000);
        assert_eq!(many.len(), 1 + 2 * LOWEST, "{many:?}");
        assert_eq!(many[1], ["classes", "c.995", "images"]);
        assert_eq!(at(&results(1000), &many[2]), Some(&json!(1.0 - 995.0 / 99.0)));
        assert_eq!(left_out(Some(&results(1000))), ["classes: the 5 lowest of 1000; all of them are in summary.json"]);
        assert!(left_out(Some(&results(10))).is_empty() && listed(None).is_empty());
        let ranked = json!({ "student": { "map": 0.25, "by_class": (0..11).map(|i| (i.to_string(), json!(i))).collect::<Value>() } });
        assert_eq!(listed(Some(&ranked)).len(), 1 + LOWEST);
        assert_eq!(left_out(Some(&ranked)).len(), 1);
    }
}
