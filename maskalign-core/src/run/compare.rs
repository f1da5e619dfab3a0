//! What runs have measured, and where recipes differ.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value};

use super::directory::RunDir;
use super::metrics::record;
use crate::files::{RunError, open_plain};

/// Which of two values of a metric is the better one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aim {
    /// The lower one, as of a loss.
    Lowest,
    /// The higher one, as of an accuracy.
    Highest,
}

/// Which value of a metric is the best, by its name; nothing where that does not tell.
pub fn aim(metric: &str) -> Option<Aim> {
    const HIGHEST: [&str; 7] = ["accuracy", "by_k", "top1", "top5", "precision", "recall", "map"];
    const LOWEST: [&str; 2] = ["loss", "error"];
    let is_named = |words: &[&str]| {
        let of_segment =
            |segment: &str| words.iter().any(|word| segment == *word || segment.split('_').any(|part| part == *word));
        metric.split('.').any(of_segment)
    };
    match (is_named(&HIGHEST), is_named(&LOWEST)) {
        (true, _) => Some(Aim::Highest),
        (false, true) => Some(Aim::Lowest),
        (false, false) => None,
    }
}

/// A record of `metrics.jsonl`, whose nested values stand under paths: `knn.accuracy`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Record {
    /// The values, `stage` among them, in the order in which they were written.
    pub values: Map<String, Value>,
}

impl Record {
    fn of(line: &[u8]) -> Option<Record> {
        let mut values = Map::new();
        for (name, value) in record(line)?.as_object()? {
            flatten(name.clone(), value, &mut values);
        }
        values.get("stage")?.as_str()?;
        Some(Record { values })
    }

    /// The stage that it is of.
    pub fn stage(&self) -> &str {
        self.values.get("stage").and_then(Value::as_str).unwrap_or_default()
    }
}

fn flatten(path: String, value: &Value, out: &mut Map<String, Value>) {
    match value {
        Value::Object(entries) => {
            entries.iter().for_each(|(name, value)| flatten(format!("{path}.{name}"), value, out));
        }
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(i, item)| flatten(format!("{path}.{i}"), item, out));
        }
        value => {
            out.insert(path, value.clone());
        }
    }
}

/// What of `metrics.jsonl` is no record.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct BadLines {
    /// The lines, counted from 1.
    pub lines: Vec<u64>,
    /// Whether the last line has no end: a process is writing it, or was killed over it.
    pub torn: bool,
}

/// Reads the metrics of a run, record by record, while `read` wants more. A run without metrics has none.
///
/// # Errors
/// The folder is no run's, the run is of an earlier version, or its metrics cannot be read.
pub fn read_records(path: &Path, read: &mut dyn FnMut(Record) -> bool) -> Result<BadLines, RunError> {
    let run = known_run(path)?;
    let metrics = run.metrics_path();
    let reading = |source| RunError::reading("metrics", &metrics, source);
    let file = match open_plain(&metrics, OpenOptions::new().read(true)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BadLines::default()),
        opened => opened.map_err(reading)?,
    };
    let mut reader = BufReader::new(file);
    let (mut line, mut number) = (Vec::new(), 0);
    let mut bad = BadLines::default();
    loop {
        line.clear();
        if reader.read_until(b'\n', &mut line).map_err(reading)? == 0 {
            return Ok(bad);
        }
        number += 1;
        match Record::of(&line) {
            Some(record) => {
                if !read(record) {
                    return Ok(bad);
                }
            }
            // What is being written now is not torn.
            None if !line.ends_with(b"\n") => bad.torn = !run.is_in_use(),
            None => bad.lines.push(number),
        }
    }
}

/// What was measured along a stage: epochs and values, by the path of the number in a line of `metrics.jsonl`, such as
/// `terms.align`.
pub type Series = BTreeMap<String, Vec<(f64, f64)>>;

/// Reads what was measured along the stages of a run, in the order in which they ran, of the stages and paths that are
/// `wanted`. Rows without a step are results, and no part of it.
///
/// # Errors
/// As [`read_records`].
pub fn read_series(
    path: &Path,
    wanted: &dyn Fn(&str, &str) -> bool,
) -> Result<(Vec<(String, Series)>, BadLines), RunError> {
    let mut stages: Vec<(String, Series)> = Vec::new();
    let bad = read_records(path, &mut |record| {
        if !record.values.contains_key("step") {
            return true;
        }
        let (stage, epoch) = (record.stage(), record.values.get("epoch").and_then(Value::as_f64).unwrap_or_default());
        for (path, value) in record.values.iter().filter(|(path, _)| *path != "epoch" && *path != "step") {
            let Some(number) = value.as_f64().filter(|_| wanted(stage, path)) else { continue };
            let at = stages.iter().position(|(known, _)| known == stage).unwrap_or_else(|| {
                stages.push((stage.to_owned(), Series::new()));
                stages.len() - 1
            });
            stages[at].1.entry(path.clone()).or_default().push((epoch, number));
        }
        true
    })?;
    Ok((stages, bad))
}

/// A run's directory to read from, unless an earlier version made the run.
fn known_run(path: &Path) -> Result<RunDir, RunError> {
    let run = RunDir::look_at(path)?;
    match run.read_manifest() {
        Err(error @ RunError::Outdated { .. }) => Err(error),
        _ => Ok(run),
    }
}

/// The columns of a table of records: where the record stands, then what each step has, then the rest by name.
pub fn columns(names: impl IntoIterator<Item = String>) -> Vec<String> {
    const FIRST: [&str; 8] = ["stage", "step", "epoch", "loss", "lr", "gradient_norm", "images_per_s", "skipped"];
    let names: BTreeSet<String> = names.into_iter().collect();
    let first = FIRST.into_iter().filter(|name| names.contains(*name)).map(str::to_owned);
    let rest = names.iter().filter(|name| !FIRST.contains(&name.as_str())).cloned();
    first.chain(rest).collect()
}

/// What a run measured under one name.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Metric {
    /// The stage.
    pub stage: String,
    /// Its name, as a path.
    pub name: String,
    /// The last value; of what each step has, the mean of the last epoch.
    pub last: f64,
    /// The best one, where the name tells which that is.
    pub best: Option<f64>,
}

impl Metric {
    fn add(&mut self, value: f64) {
        self.last = value;
        self.best = self.best.map(|best| match aim(&self.name) {
            Some(Aim::Lowest) => best.min(value),
            _ => best.max(value),
        });
    }
}

/// The metrics of a run: what was recorded while it trained, then the results of its stages that were not. Where a step
/// stood, rates and times are none. What each step has (a loss, its terms) counts as its mean over an epoch: the best of
/// single batches would be a matter of luck.
///
/// # Errors
/// As [`read_records`]; the results are damaged.
pub fn measured(path: &Path) -> Result<(Vec<Metric>, BadLines), RunError> {
    let mut all: Vec<Measured> = Vec::new();
    let bad = read_records(path, &mut |record| {
        let stage = record.stage();
        // What an update has; anything else is a measurement.
        let is_step = record.values.contains_key("loss");
        let epoch = record.values.get("epoch").and_then(Value::as_f64).filter(|_| is_step).map(f64::floor);
        for (name, value) in record.values.iter().filter(|(name, _)| is_measure(name)) {
            let Some(value) = value.as_f64() else { continue };
            match all.iter_mut().find(|known| known.name == *name && known.stage == stage) {
                Some(known) => known.add(epoch, value),
                None => all.push(Measured::first(stage, name, epoch, value)),
            }
        }
        true
    })?;
    let mut metrics: Vec<Metric> = all.into_iter().filter_map(Measured::metric).collect();
    for metric in results(path)? {
        if !metrics.iter().any(|known| known.name == metric.name && known.stage == metric.stage) {
            metrics.push(metric);
        }
    }
    Ok((metrics, bad))
}

/// The values of a metric so far.
struct Measured {
    stage: String,
    name: String,
    metric: Option<Metric>,
    /// The epoch that goes on, where steps have the metric, with the sum and the number of the values in it.
    epoch: Option<f64>,
    sum: f64,
    count: f64,
}

impl Measured {
    fn first(stage: &str, name: &str, epoch: Option<f64>, value: f64) -> Measured {
        Measured { stage: stage.to_owned(), name: name.to_owned(), metric: None, epoch, sum: value, count: 1.0 }
    }

    /// Adds a value: of a step, or without an epoch by itself.
    fn add(&mut self, epoch: Option<f64>, value: f64) {
        if epoch.is_none() || self.epoch != epoch {
            self.take();
            (self.epoch, self.sum, self.count) = (epoch, 0.0, 0.0);
        }
        (self.sum, self.count) = (self.sum + value, self.count + 1.0);
    }

    /// Takes the mean of the epoch that went on as a value.
    fn take(&mut self) {
        let mean = self.sum / self.count;
        match &mut self.metric {
            Some(metric) => metric.add(mean),
            None => self.metric = Some(first(&self.stage, &self.name, mean)),
        }
    }

    fn metric(mut self) -> Option<Metric> {
        self.take();
        self.metric
    }
}

/// The results of a run's finished stages: every number of `summary.json` that says how good something is. What was measured
/// in the course of a stage, which is a list there, is none of them.
///
/// # Errors
/// The folder is no run's, the run is of an earlier version, or its results are damaged.
pub fn results(path: &Path) -> Result<Vec<Metric>, RunError> {
    let mut metrics = Vec::new();
    for (stage, results) in known_run(path)?.read_summary()? {
        let mut open = vec![(String::new(), results)];
        while let Some((name, value)) = open.pop() {
            match value {
                Value::Object(entries) => {
                    let below = |key: String| if name.is_empty() { key } else { format!("{name}.{key}") };
                    // The last one put in is taken out first.
                    open.extend(entries.into_iter().map(|(key, value)| (below(key), value)).rev());
                }
                value => metrics
                    .extend(value.as_f64().filter(|_| is_measure(&name)).map(|value| first(&stage, &name, value))),
            }
        }
    }
    Ok(metrics)
}

fn first(stage: &str, name: &str, value: f64) -> Metric {
    Metric { stage: stage.to_owned(), name: name.to_owned(), last: value, best: aim(name).map(|_| value) }
}

/// Whether a number says how good something is, and not where it was measured or how fast.
fn is_measure(name: &str) -> bool {
    const OTHERS: [&str; 8] = ["stage", "step", "steps", "epoch", "epochs", "lr", "gradient_norm", "skipped"];
    let last = name.rsplit('.').next().unwrap_or(name);
    let is_time = name.split('.').any(|part| part.contains("seconds")) || last.ends_with("_per_s");
    !OTHERS.contains(&last) && !is_time && !name.starts_with("lr")
}

/// A value that is not the same in all recipes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    /// Keys and indices from the root, joined by dots.
    pub path: String,
    /// The value in each recipe; absent where it has none.
    pub values: Vec<Option<Value>>,
}

/// Where recipes differ: each value, or the order of keys, by path in the order of the first recipe.
pub fn differences(recipes: &[&Value]) -> Vec<Difference> {
    let mut found = Vec::new();
    let all: Vec<Option<&Value>> = recipes.iter().map(|recipe| Some(*recipe)).collect();
    differ("", &all, &mut found);
    found
}

fn differ(path: &str, values: &[Option<&Value>], found: &mut Vec<Difference>) {
    let keys = keys_of(values);
    // What is whole in some and missing in others is one difference.
    let there: Vec<&Value> = values.iter().flatten().copied().filter(|value| !value.is_null()).collect();
    let is_missing = there.len() < values.len() && there.windows(2).all(|pair| pair[0] == pair[1]);
    if keys.is_empty() || is_missing {
        if values.windows(2).any(|pair| pair[0] != pair[1]) {
            let values = values.iter().map(|value| value.cloned()).collect();
            found.push(Difference { path: path.to_owned(), values });
        }
        return;
    }
    for key in &keys {
        let below: Vec<Option<&Value>> = values.iter().map(|value| value.and_then(|value| child(value, key))).collect();
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        differ(&path, &below, found);
    }
    // Equality of mappings does not see the order.
    let orders: Vec<Option<Value>> = values.iter().map(|value| value.map(|value| shared_keys(value, values))).collect();
    if orders.windows(2).any(|pair| matches!(pair, [Some(a), Some(b)] if a != b)) {
        found.push(Difference { path: format!("{path} (order)"), values: orders });
    }
}

fn child<'v>(value: &'v Value, key: &str) -> Option<&'v Value> {
    match value {
        Value::Array(items) => items.get(key.parse::<usize>().ok()?),
        value => value.get(key),
    }
}

/// The keys of all values, where each is a mapping, or each a list of such; else none. What is null has none.
fn keys_of(values: &[Option<&Value>]) -> Vec<String> {
    let mut keys: Vec<String> = Vec::new();
    let (mut maps, mut lists) = (0, 0);
    for value in values.iter().flatten() {
        let own: Vec<String> = match value {
            Value::Null => continue,
            Value::Object(entries) => {
                maps += 1;
                entries.keys().cloned().collect()
            }
            Value::Array(items) if items.iter().any(Value::is_object) => {
                lists += 1;
                (0..items.len()).map(|i| i.to_string()).collect()
            }
            _ => return Vec::new(),
        };
        let new: Vec<String> = own.into_iter().filter(|key| !keys.contains(key)).collect();
        keys.extend(new);
    }
    // A mapping has nothing to do with a list.
    if maps > 0 && lists > 0 { Vec::new() } else { keys }
}

/// The keys of a mapping that every other has too, in its order.
fn shared_keys(value: &Value, all: &[Option<&Value>]) -> Value {
    let has = |key: &&String| all.iter().flatten().all(|value| value.get(key.as_str()).is_some());
    let keys = value.as_object().into_iter().flat_map(Map::keys);
    keys.filter(has).cloned().collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;
    use crate::run::Mode;

    #[test]
    fn what_differs_is_named_by_its_path_and_what_is_equal_is_not() {
        let one = json!({ "seed": 0, "stages": {
            "pretrain": { "type": "pretrain", "epochs": 1.0, "tokens": ["cls"], "transforms": [{ "type": "flip", "p": 0.5 }] },
            "knn": { "type": "knn", "k": [20] },
        } });
        let mut two = one.clone();
        two["stages"]["pretrain"]["epochs"] = json!(2.0);
        two["stages"]["pretrain"]["tokens"] = json!(["cls", "visible"]);
        two["stages"]["pretrain"]["transforms"] = json!([{ "type": "flip", "p": 0.25 }, { "type": "resize" }]);
        two["stages"]["pretrain"]["masker"] = json!({ "type": "random" });
        let found = differences(&[&one, &two, &one]);
        let found: Vec<(&str, String)> =
            found.iter().map(|found| (found.path.as_str(), json!(found.values).to_string())).collect();
        let expected = [
            ("stages.pretrain.epochs", "[1.0,2.0,1.0]"),
            ("stages.pretrain.tokens", r#"[["cls"],["cls","visible"],["cls"]]"#),
            ("stages.pretrain.transforms.0.p", "[0.5,0.25,0.5]"),
            ("stages.pretrain.transforms.1", r#"[null,{"type":"resize"},null]"#),
            ("stages.pretrain.masker", r#"[null,{"type":"random"},null]"#),
        ];
        assert_eq!(found, expected.map(|(path, values)| (path, values.to_owned())));
        assert!(differences(&[&one, &one]).is_empty());
        let order = json!({ "stages": { "b": { "x": 1 }, "a": { "x": 1 } } });
        let other = json!({ "stages": { "a": { "x": 1 }, "b": { "x": 1 } } });
        let found = differences(&[&order, &other]);
        assert_eq!((found.len(), found[0].path.as_str()), (1, "stages (order)"));
        assert_eq!(found[0].values, [Some(json!(["b", "a"])), Some(json!(["a", "b"]))]);
    }

    #[test]
    fn a_metric_has_its_last_and_its_best_value() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::create(folder.path(), Mode::Fresh).unwrap();
        let text = "{\"stage\":\"a\",\"step\":0,\"epoch\":0.0,\"loss\":3.0,\"lr\":0.1}\n\
                    {\"stage\":\"a\",\"step\":1,\"epoch\":0.5,\"loss\":1.0,\"lr\":0.2}\n\
                    garbled\n\
                    {\"stage\":\"a\",\"step\":2,\"epoch\":1.0,\"knn\":{\"accuracy\":0.5,\"rank\":7}}\n\
                    {\"step\":2,\"loss\":1}\n\
                    {\"stage\":\"a\",\"step\":2,\"epoch\":1.0,\"loss\":2.5}\n\
                    {\"stage\":\"a\",\"st";
        fs::write(run.metrics_path(), text).unwrap();
        let summary = json!({
            "a": { "loss": 2.5, "steps": 3, "knn": [{ "accuracy": 0.5 }] },
            "b": { "student": { "accuracy": 0.25 }, "pixels": { "accuracy": 0.5 }, "seconds": 3.0 },
        });
        fs::write(run.summary_path(), summary.to_string()).unwrap();
        assert!(!measured(folder.path()).unwrap().1.torn, "it is being written");
        drop(run);
        let (metrics, bad) = measured(folder.path()).unwrap();
        let found: Vec<(&str, &str, f64, Option<f64>)> =
            metrics.iter().map(|m| (m.stage.as_str(), m.name.as_str(), m.last, m.best)).collect();
        let expected = [
            // The mean of the first epoch is better than the second, and no single step counts.
            ("a", "loss", 2.5, Some(2.0)),
            ("a", "knn.accuracy", 0.5, Some(0.5)),
            ("a", "knn.rank", 7.0, None),
            ("b", "student.accuracy", 0.25, Some(0.25)),
            ("b", "pixels.accuracy", 0.5, Some(0.5)),
        ];
        assert_eq!(found, expected);
        assert_eq!(bad, BadLines { lines: vec![3, 5], torn: true });
    }

    #[test]
    fn columns_have_one_order() {
        let names = ["skipped", "knn.accuracy", "step", "stage", "aaa", "loss"].map(str::to_owned);
        assert_eq!(columns(names), ["stage", "step", "loss", "skipped", "aaa", "knn.accuracy"]);
    }

    #[test]
    fn the_better_value_is_known_by_the_name() {
        for name in ["accuracy", "knn.accuracy", "student.by_k.20", "top1", "val_accuracy"] {
            assert_eq!(aim(name), Some(Aim::Highest), "{name}");
        }
        assert_eq!(
            (aim("loss"), aim("calibration_error"), aim("knn.rank")),
            (Some(Aim::Lowest), Some(Aim::Lowest), None)
        );
    }
}
