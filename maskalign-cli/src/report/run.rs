//! What a report takes from a run directory.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use maskalign_core::run::{PictureRecord, Record, pictures, read_records};
use serde_json::{Map, Value};

use crate::failure::Failure;

/// A run, as its directory tells it.
pub(super) struct Run {
    /// The directory.
    pub(super) path: PathBuf,
    /// `manifest.json`.
    pub(super) manifest: Value,
    /// The recipe with every default, as YAML.
    pub(super) recipe: String,
    /// Each finished stage's results.
    pub(super) results: Map<String, Value>,
    /// What stages show, with each picture's file.
    pub(super) pictures: Vec<(PictureRecord, Vec<u8>)>,
    /// What was measured, by stage, in the order in which they ran.
    pub(super) stages: Vec<(String, Stage)>,
}

/// What was measured in a stage.
#[derive(Default)]
pub(super) struct Stage {
    /// Epochs and values, by the path of the number in a line of `metrics.jsonl`, such as `terms.align`.
    pub(super) series: BTreeMap<String, Vec<(f64, f64)>>,
}

/// What a run is called: the name of its directory.
pub(crate) fn run_name(run: &Path) -> String {
    let whole = run.canonicalize().unwrap_or_else(|_| run.to_owned());
    whole.file_name().map_or_else(|| run.display().to_string(), |name| name.to_string_lossy().into_owned())
}

impl Run {
    pub(super) fn read(path: &Path) -> Result<Run, Failure> {
        let mut stages: Vec<(String, Stage)> = Vec::new();
        let bad = read_records(path, &mut |record| {
            // A row of results without a step is in the summary: no curve.
            if record.values.contains_key("step") {
                let name = record.stage();
                let at = stages.iter().position(|(known, _)| known == name).unwrap_or_else(|| {
                    stages.push((name.to_owned(), Stage::default()));
                    stages.len() - 1
                });
                stages[at].1.add(&record);
            }
            true
        })?;
        // A last line without its end is no record yet: a run that is still going writes it, or a kill cut it.
        if let Some(line) = bad.lines.first() {
            let file = path.join("metrics.jsonl");
            return Err(Failure::mistake(format!("line {line} of {} is damaged: it is no record", file.display()))
                .help(check(path)));
        }
        let text = |name: &str| match fs::read_to_string(path.join(name)) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => {
                Err(Failure::mistake(format!("cannot read {}: {error}", path.join(name).display())).help(check(path)))
            }
        };
        let json = |name: &str| -> Result<Value, Failure> {
            let Some(text) = text(name)? else { return Ok(Value::Null) };
            serde_json::from_str(&text).map_err(|error| {
                Failure::mistake(format!("{} is damaged: {error}", path.join(name).display())).help(check(path))
            })
        };
        let (manifest, summary) = (json("manifest.json")?, json("summary.json")?);
        let results = match summary {
            Value::Object(results) => results,
            _ => Map::new(),
        };
        let shown = pictures(path).into_iter().filter_map(|record| {
            let file = fs::read(record.path(path)?).ok()?;
            Some((record, file))
        });
        let pictures = shown.collect();
        Ok(Run {
            path: path.to_owned(),
            manifest,
            recipe: text("recipe.resolved.yaml")?.unwrap_or_default(),
            results,
            pictures,
            stages,
        })
    }

    /// The stage of that name.
    pub(super) fn stage(&self, name: &str) -> Option<&Stage> {
        self.stages.iter().find(|(known, _)| known == name).map(|(_, stage)| stage)
    }

    /// How it stands, in words.
    pub(super) fn state(&self) -> &'static str {
        match self.manifest["ended"].as_str() {
            Some(_) => "finished",
            None => "not finished",
        }
    }
}

fn check(path: &Path) -> String {
    format!("`maskalign runs check {}` says what is whole", path.display())
}

impl Stage {
    fn add(&mut self, record: &Record) {
        let epoch = record.values.get("epoch").and_then(Value::as_f64).unwrap_or_default();
        for (path, value) in record.values.iter().filter(|(path, _)| *path != "epoch" && *path != "step") {
            if let Some(number) = value.as_f64() {
                self.series.entry(path.clone()).or_default().push((epoch, number));
            }
        }
    }
}
