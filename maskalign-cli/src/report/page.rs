//! The page: runs side by side, results, curves, recipes.

use std::{collections::BTreeSet, fmt::Write as _};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use maskalign_core::{
    chart::{self, Curve, End, escape},
    run::{Origin, PictureFormat, PictureRecord, Resumption, StageRecord},
};
use maskalign_registry::diff;
use serde_json::{Map, Value};

use super::{
    next_commands,
    run::{Run, run_name},
    words::{explained, picture_title, tower_of},
};
use crate::{
    progress::number,
    recipes,
    table::{clock, count, percent},
};

/// Numbers of a step that have charts of their own, and how they are called there; further ones have a chart each.
const STEP: [(&str, &str); 3] = [("loss", "Loss"), ("lr", "Learning rate"), ("gradient_norm", "Norm of the gradients")];
/// Numbers of a step by part: where they stand, and what their chart is called.
const PARTS: [(&str, &str); 4] = [
    ("terms.", "Terms of the loss"),
    ("levels.", "Distance by level"),
    ("lr_groups.", "Learning rate by layer"),
    ("seconds.", "Seconds of a step by phase"),
];
/// The phases of a step, and what they are called.
const PHASES: [(&str, &str); 6] = [
    ("data", "waiting for images"),
    ("teacher", "teachers and targets"),
    ("mask", "drawing masks"),
    ("student", "forward"),
    ("backward", "backward"),
    ("optimizer", "update of the weights"),
];
/// A phase that takes less of a step's time than this is not drawn.
const LEAST_SHARE: f64 = 0.01;
/// Letters of a difference between recipes that are shown; a stage that was added is longer.
const MOST_LETTERS: usize = 160;
/// Towers that are compared in columns; more are listed.
const MOST_COLUMNS: usize = 4;
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
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; } figure h3 { margin-top: 0; }
th[scope=row] { white-space: nowrap; }
p { margin: .25rem 0 .75rem; } .soft { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { text-align: right; white-space: nowrap; } th { font-weight: 600; }
.facts td { min-width: 9rem; overflow-wrap: anywhere; }
.charts { columns: 26rem; column-gap: 1rem; }
figure { break-inside: avoid; margin: 0 0 1rem; padding: .75rem; background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; }
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
td .soft { display: block; max-width: 34rem; font-size: .85rem; }
details { margin: .5rem 0; }
.scale { display: flex; align-items: center; gap: .5rem; margin-top: .4rem; font-size: .85rem; }
.scale div { flex: 1; height: .7rem; border-radius: .2rem; }
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
    page.push_str(&next(runs));
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

/// What is said of each run in a row of a table.
type Row = (&'static str, fn(&Run) -> String);

/// What the runs did, when and with what.
fn about(names: &[String], runs: &[Run]) -> String {
    const FIRST: [Row; 5] = [
        ("state", |run| run.state().to_owned()),
        ("trained", |run| {
            let stages = run.record.stages.iter().filter(|stage| stage.trainable > 0);
            stages.map(|stage| trained(run, stage)).collect::<Vec<_>>().join("\n")
        }),
        ("took", took),
        ("goes on from", |run| run.record.origin.as_ref().map(from).unwrap_or_default()),
        ("resumed", |run| run.record.resumed.iter().map(resumed).collect::<Vec<_>>().join("\n")),
    ];
    const MORE: [Row; 7] = [
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
        ("seed of what is drawn at random", |run| text(&run.manifest["seed"])),
        ("fingerprint, the same of all runs of one recipe", |run| {
            text(&run.manifest["fingerprint"]).chars().take(12).collect()
        }),
        ("command", |run| {
            let words = run.manifest["command_line"].as_array().into_iter().flatten().map(text);
            words.collect::<Vec<_>>().join(" ")
        }),
    ];
    let table = |rows: &[Row]| {
        let mut table = head(names);
        for (name, cell) in rows {
            let cells: Vec<String> = runs.iter().map(cell).collect();
            if cells.iter().any(|cell| !cell.is_empty()) {
                let cell = |cell: &String| format!("<td>{}</td>", escape(cell).replace('\n', "<br/>"));
                let cells: String = cells.iter().map(cell).collect();
                let _ = writeln!(table, "<tr><th scope=\"row\">{name}</th>{cells}</tr>");
            }
        }
        format!("<div class=\"wide\"><table class=\"facts\">\n{table}</table></div>\n")
    };
    format!(
        "{}<details><summary>When, where and with what it was computed</summary>\n{}</details>\n",
        table(&FIRST),
        table(&MORE)
    )
}

/// What a stage trained, and for how long.
fn trained(run: &Run, stage: &StageRecord) -> String {
    let mut parts = vec![format!("{} parameters", count(stage.trainable))];
    if let Some(images) = stage.images {
        let size = stage.image_size.map_or(String::new(), |side| format!(" of {side} x {side} pixels"));
        parts.push(format!("on {} images{size}", count(images)));
    }
    let result = |name: &str| run.results.get(&stage.name)?.get(name);
    if let (Some(steps), Some(epochs)) = (result("steps"), result("epochs")) {
        parts.push(format!("{} epochs, {} updates", number("epochs", epochs), number("steps", steps)));
    }
    format!("{}: {}", stage.name, parts.join(", "))
}

/// How long a run took, and its steps alone.
fn took(run: &Run) -> String {
    let in_steps: f64 = run
        .stages
        .iter()
        .flat_map(|(_, series)| series)
        .filter(|(path, _)| path.starts_with("seconds."))
        .flat_map(|(_, points)| points.iter().map(|(_, seconds)| seconds))
        .sum();
    let taken = if run.record.origin.is_some() { ", those taken over among them" } else { "" };
    let steps = (in_steps > 0.0).then(|| format!("{} in steps of training{taken}", clock(in_steps)));
    let pauses = if run.record.resumed.is_empty() { "" } else { " with the pauses before it was resumed" };
    let whole = run.record.seconds().map(|seconds| format!("{} from begin to end{pauses}", clock(seconds)));
    whole.into_iter().chain(steps).collect::<Vec<_>>().join(", ")
}

/// What a fork goes on from, and what differs.
fn from(origin: &Origin) -> String {
    let stages = origin.finished_stages.iter().map(|stage| format!("{stage} as it ended"));
    let on = origin.stage.iter().zip(origin.step).map(|(stage, step)| format!("{stage} after step {}", count(step)));
    let what: Vec<String> = stages.chain(on).collect();
    let head = format!("{}: {}", origin.run.display(), what.join(", "));
    let cut = |line: &String| match line.chars().count() > MOST_LETTERS {
        true => line.chars().take(MOST_LETTERS).chain("...".chars()).collect(),
        false => line.clone(),
    };
    std::iter::once(head).chain(origin.differences.iter().map(cut)).collect::<Vec<_>>().join("\n")
}

fn resumed(resumption: &Resumption) -> String {
    let place = match (&resumption.stage, resumption.step) {
        (Some(stage), Some(step)) => format!(", in {stage} after step {}", count(step)),
        (Some(stage), None) => format!(", at the beginning of {stage}"),
        _ => String::new(),
    };
    let lost = resumption.lost_metrics.map_or(String::new(), |lost| format!(", {} measurements lost", count(lost)));
    format!("{}{place}{lost}", resumption.at)
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// The row of the names of columns, where there are several.
fn head(names: &[String]) -> String {
    match names {
        [] | [_] => String::new(),
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
    let mut tables = String::new();
    for stage in stages {
        let paths = in_order(runs, |run| listed(run.results.get(&stage)));
        let found = |run: &Run, path: &[String]| {
            let value = run.results.get(&stage).and_then(|results| at(results, path));
            value.filter(|value| !value.is_null()).map(|value| number(&path.join("."), value)).unwrap_or_default()
        };
        let towers: Vec<String> = match runs {
            [only] => columns(&paths, only.results.get(&stage)),
            _ => Vec::new(),
        };
        let (heads, rows): (Vec<String>, Vec<(Vec<String>, Vec<String>)>) = match (&towers[..], runs) {
            ([], _) => {
                let row = |path: &Vec<String>| (path.clone(), runs.iter().map(|run| found(run, path)).collect());
                (if runs.len() > 1 { names.to_vec() } else { Vec::new() }, paths.iter().map(row).collect())
            }
            (towers, _) => {
                let mut below: Vec<Vec<String>> = Vec::new();
                for path in &paths {
                    if !below.iter().any(|known| known[..] == path[1..]) {
                        below.push(path[1..].to_vec());
                    }
                }
                let cell = |tower: &String, path: &[String]| {
                    let path: Vec<String> = std::iter::once(tower.clone()).chain(path.iter().cloned()).collect();
                    found(&runs[0], &path)
                };
                let row = |path: Vec<String>| {
                    let cells = towers.iter().map(|tower| cell(tower, &path)).collect();
                    (path, cells)
                };
                (towers.iter().map(|tower| tower_of(tower)).collect(), below.into_iter().map(row).collect())
            }
        };
        let mut table = head(&heads);
        for (path, cells) in rows {
            let last = path.last().map_or("", String::as_str);
            let meaning = explained(last, scaled_by_patch(runs, &stage))
                .map_or(String::new(), |text| format!("<span class=\"soft\">{text}</span>"));
            let cells: Vec<String> =
                cells.iter().map(|cell| format!("<td class=\"number\">{}</td>", escape(cell))).collect();
            let cells = cells.concat();
            let _ = writeln!(table, "<tr><td>{}{meaning}</td>{cells}</tr>", escape(&path.join(" ")));
        }
        for note in in_order(runs, |run| left_out(run.results.get(&stage))) {
            let columns = heads.len().max(1) + 1;
            let _ = writeln!(table, "<tr><td class=\"soft\" colspan=\"{columns}\">{}</td></tr>", escape(&note));
        }
        let kind = kind_of(runs, &stage)
            .map_or(String::new(), |kind| format!(" <span class=\"soft\">{}</span>", escape(&kind)));
        let _ =
            write!(tables, "<h3>{}{kind}</h3>\n<div class=\"wide\"><table>\n{table}</table></div>\n", escape(&stage));
    }
    format!("<h2>Results by stage</h2>\n{tables}")
}

/// Whether a stage's loss is the squared error of pixels that are scaled patch by patch, whose level without any knowledge is
/// known.
fn scaled_by_patch(runs: &[Run], stage: &str) -> bool {
    let of = |run: &Run| {
        let recipe = recipes::resolved(&run.recipe).ok()?;
        let objectives = recipe.get("stages")?.get(stage)?.get("objectives")?.as_object()?.clone();
        let is = |value: &Value, path: &[&str], text: &str| {
            path.iter().try_fold(value, |value, key| value.get(key)).and_then(Value::as_str) == Some(text)
        };
        let only = objectives.values().next().filter(|_| objectives.len() == 1)?;
        let weight = only.get("weight").and_then(Value::as_f64).unwrap_or(1.0);
        Some(
            is(only, &["target", "type"], "pixels")
                && is(only, &["target", "normalize"], "standardize")
                && is(only, &["loss", "type"], "mse")
                && weight == 1.0,
        )
    };
    runs.iter().all(|run| of(run).unwrap_or(false))
}

/// The type of a stage, where its name does not say it.
fn kind_of(runs: &[Run], stage: &str) -> Option<String> {
    let recipe = runs.iter().find_map(|run| recipes::resolved(&run.recipe).ok())?;
    let kind = recipe.get("stages")?.get(stage)?.get("type")?.as_str()?.to_owned();
    (kind != stage).then_some(kind)
}

/// The towers that a stage compares, where its results are nothing else, and few enough for columns.
fn columns(paths: &[Vec<String>], results: Option<&Value>) -> Vec<String> {
    let mut towers: Vec<String> = Vec::new();
    for path in paths {
        let [tower, _, ..] = &path[..] else { return Vec::new() };
        if !towers.contains(tower) {
            towers.push(tower.clone());
        }
    }
    let are_towers =
        towers.iter().all(|tower| results.and_then(|results| results.get(tower)).is_some_and(Value::is_object));
    let named = towers.iter().any(|tower| ["student", "pixels", "untrained"].contains(&tower.as_str()));
    if are_towers && named && (2..=MOST_COLUMNS).contains(&towers.len()) { towers } else { Vec::new() }
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
            let scale = if name.starts_with("attention") { scale() } else { String::new() };
            let _ = writeln!(
                figures,
                "<figure><h3>{} <span class=\"soft\">{}</span></h3>\n<img{} alt=\"{}\" src=\"data:{};base64,{}\"/>\n\
                 {scale}<figcaption class=\"soft\">{}.</figcaption></figure>",
                escape(&format!("{of}{}", picture_title(name))),
                escape(stage),
                if *format == PictureFormat::Png { " class=\"pixels\"" } else { "" },
                escape(&caption.replace('`', "")),
                format.media_type(),
                BASE64_STANDARD.encode(file),
                rich(caption.trim_end_matches('.')),
            );
        }
    }
    match figures.is_empty() {
        true => figures,
        false => format!("<h2>Pictures</h2>\n<div class=\"charts\">\n{figures}</div>\n"),
    }
}

/// Text as HTML shows it, with what stands between backticks as code.
fn rich(text: &str) -> String {
    let parts = escape(text);
    let parts: Vec<&str> = parts.split('`').collect();
    // A backtick without a second one is one.
    let pairs = (parts.len() - 1) / 2 * 2;
    let mut out = String::new();
    for (at, part) in parts.iter().enumerate() {
        match at {
            0 => {}
            at if at > pairs => out.push('`'),
            at if at % 2 == 1 => out.push_str("<code>"),
            _ => out.push_str("</code>"),
        }
        out.push_str(part);
    }
    out
}

/// The scale of pictures of attention.
fn scale() -> String {
    let stops: Vec<String> = (0..=8_u8)
        .map(|stop| {
            let [red, green, blue] = chart::heat(f32::from(stop) / 8.0);
            format!("rgb({red},{green},{blue})")
        })
        .collect();
    format!(
        "<div class=\"scale\"><span class=\"soft\">none</span><div style=\"background:linear-gradient(to right,{})\"></div>\
         <span class=\"soft\">the most of an image</span></div>\n",
        stops.join(",")
    )
}

/// The curves of a stage.
fn curves(stage: &str, names: &[String], runs: &[Run]) -> String {
    let paths = in_order(runs, |run| run.stage(stage).map_or(Vec::new(), |series| series.keys().cloned().collect()));
    let of = |path: &str| -> Vec<Curve> {
        let curve = |(name, run): (&String, &Run)| {
            let points = run.stage(stage)?.get(path)?.clone();
            Some(Curve { name: name.clone(), points, end: end_of(path) })
        };
        names.iter().zip(runs).filter_map(curve).collect()
    };
    let mut charts: Vec<(String, Vec<Curve>, String)> = Vec::new();
    for (path, title) in STEP {
        let mut drawn = of(path);
        if let ([only], [_]) = (&mut drawn[..], runs) {
            only.name = title.to_lowercase();
        }
        charts.push((title.to_owned(), drawn, String::new()));
    }
    for (prefix, title) in PARTS {
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
            let parts: Vec<Curve> = parts.iter().flat_map(named).collect();
            let (parts, note) = if prefix == "seconds." { phases(parts) } else { (parts, String::new()) };
            charts.push((title.to_owned(), parts, note));
        }
    }
    for path in &paths {
        let is_step = STEP.iter().any(|(name, _)| name == path) || NOT_DRAWN.contains(&path.as_str());
        if !is_step && !PARTS.iter().any(|(prefix, _)| path.starts_with(prefix)) {
            charts.push((path.replace('.', " "), of(path), String::new()));
        }
    }
    let mut figures = String::new();
    for (title, curves, note) in charts {
        let Some(drawn) = chart::curves(&title, &curves) else { continue };
        let last = match &curves[..] {
            [only] => at_end(&title, only).map_or(String::new(), |text| format!(" <span class=\"soft\">{text}</span>")),
            _ => String::new(),
        };
        let note = match note.is_empty() {
            true => note,
            false => format!("\n<figcaption class=\"soft\">{}</figcaption>", escape(&note)),
        };
        let _ = writeln!(figures, "<figure><h3>{}{last}</h3>\n{}{note}</figure>", escape(&title), drawn.inline());
    }
    if figures.is_empty() {
        return String::new();
    }
    format!("<h2>Curves of stage {}</h2>\n<div class=\"charts\">\n{figures}</div>\n", escape(stage))
}

/// What stands for the end of a curve: each step has its own of what a batch decides.
fn end_of(path: &str) -> End {
    let wavers = ["loss", "gradient_norm"].contains(&path)
        || ["terms.", "levels.", "seconds."].iter().any(|p| path.starts_with(p));
    if wavers { End::MeanOfEpoch } else { End::Last }
}

/// What is said of a single curve's end; of a rate its peak, since schedules end at nothing.
fn at_end(title: &str, curve: &Curve) -> Option<String> {
    if title == "Learning rate" {
        let most = curve.points.iter().map(|(_, rate)| *rate).filter(|rate| rate.is_finite()).reduce(f64::max)?;
        return Some(format!("{} at most", chart::short(most)));
    }
    let value = curve.at_end()?;
    let value = if title.contains("accuracy") { percent(value) } else { chart::short(value) };
    Some(match curve.end {
        End::Last => format!("{value} at the end"),
        End::MeanOfEpoch => format!("{value}, mean of the last epoch"),
    })
}

/// The phases of a step under the names that people have for them, without those that take next to no time, and what is said
/// of these.
fn phases(curves: Vec<Curve>) -> (Vec<Curve>, String) {
    let seconds = |curve: &Curve| curve.points.iter().map(|(_, seconds)| seconds).sum::<f64>();
    let all: f64 = curves.iter().map(seconds).sum();
    let named = curves.into_iter().map(|curve| {
        let name = PHASES
            .iter()
            .find(|(phase, _)| *phase == curve.name)
            .map_or(curve.name.clone(), |(_, name)| (*name).to_owned());
        Curve { name, ..curve }
    });
    let (drawn, small): (Vec<Curve>, Vec<Curve>) = named.partition(|curve| seconds(curve) >= LEAST_SHARE * all);
    let small: Vec<String> = small.into_iter().map(|curve| curve.name).collect();
    let note = match small.is_empty() {
        true => String::new(),
        false => format!("Less than {} of the time each: {}.", percent(LEAST_SHARE), small.join(", ")),
    };
    (drawn, note)
}

/// What can be done next with a run.
fn next(runs: &[Run]) -> String {
    let [run] = runs else { return String::new() };
    let exported =
        run.record.stages.iter().rev().find(|stage| stage.image_size.is_some()).map(|stage| stage.name.as_str());
    let commands = next_commands(&run.path, exported, run.is_finished());
    let lines: Vec<String> = commands.iter().map(|(command, what)| format!("# {what}\n{command}")).collect();
    format!("<h2>Next</h2>\n<pre>{}</pre>\n", escape(&lines.join("\n")))
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

    #[test]
    fn what_stands_between_backticks_is_code() {
        assert_eq!(rich("a `b<c` and `d`"), "a <code>b&lt;c</code> and <code>d</code>");
        assert_eq!(rich("one ` alone"), "one ` alone");
        assert_eq!(rich("`a` and ` alone"), "<code>a</code> and ` alone");
    }

    #[test]
    fn towers_stand_in_columns_and_other_results_do_not() {
        let compared = json!({ "untrained": { "rankme": 3.0 }, "student": { "rankme": 9.0, "alignment": 0.5 } });
        assert_eq!(columns(&listed(Some(&compared)), Some(&compared)), ["untrained", "student"]);
        for other in [
            json!({ "loss": 0.5, "steps": 3 }),
            json!({ "student": { "accuracy": 0.5 } }),
            json!({ "cat": { "a": 1 }, "dog": { "a": 1 } }),
        ] {
            assert!(columns(&listed(Some(&other)), Some(&other)).is_empty(), "{other}");
        }
    }

    #[test]
    fn phases_that_take_no_time_are_not_drawn() {
        let curve = |name: &str, seconds: f64| Curve {
            name: name.to_owned(),
            points: vec![(0.0, seconds), (1.0, seconds)],
            end: End::MeanOfEpoch,
        };
        let (drawn, note) =
            phases(vec![curve("data", 1e-5), curve("teacher", 1e-4), curve("student", 0.1), curve("backward", 0.2)]);
        let names: Vec<&str> = drawn.iter().map(|curve| curve.name.as_str()).collect();
        assert_eq!(names, ["forward", "backward"]);
        assert_eq!(note, "Less than 1.0 % of the time each: waiting for images, teachers and targets.");
    }
}
