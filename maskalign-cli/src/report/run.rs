//! What a report takes from a run directory.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use maskalign_core::run::{PictureRecord, pictures};
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
    /// Epochs and values, by the path of the number in a line of `metrics.jsonl`, such as `terms/align`.
    pub(super) series: BTreeMap<String, Vec<(f64, f64)>>,
}

impl Run {
    pub(super) fn read(path: &Path) -> Result<Run, Failure> {
        if !path.is_dir() {
            return Err(Failure::mistake(format!("{} is not a run directory", path.display()))
                .help("name the directory that `maskalign run` made, such as runs/quickstart-20230618-093000"));
        }
        if !path.join(".maskalign-run").is_file() {
            return Err(Failure::mistake(format!(
                "{} is not a run directory: nothing there is of a run",
                path.display()
            ))
            .help("name the directory that `maskalign run` made, not the folder around it"));
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
        let mut stages: Vec<(String, Stage)> = Vec::new();
        for (index, line) in text("metrics.jsonl")?.unwrap_or_default().split_inclusive('\n').enumerate() {
            if !line.ends_with('\n') {
                // A run that is still going writes it, or a kill cut it: either way it is no record yet.
                break;
            }
            let record: Value = serde_json::from_str(line).map_err(|error| {
                let file = path.join("metrics.jsonl");
                Failure::mistake(format!("line {} of {} is damaged: {error}", index + 1, file.display()))
                    .help(check(path))
            })?;
            if record.get("step").is_none() {
                // A row of results, which the summary has: no curve.
                continue;
            }
            let name = record["stage"].as_str().unwrap_or_default();
            let at = stages.iter().position(|(known, _)| known == name).unwrap_or_else(|| {
                stages.push((name.to_owned(), Stage::default()));
                stages.len() - 1
            });
            stages[at].1.add(&record);
        }
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
    fn add(&mut self, record: &Value) {
        let epoch = record["epoch"].as_f64().unwrap_or_default();
        let mut open: Vec<(String, &Value)> = vec![(String::new(), record)];
        while let Some((path, value)) = open.pop() {
            match value {
                Value::Object(members) => open.extend(members.iter().map(|(name, value)| {
                    let path = if path.is_empty() { name.clone() } else { format!("{path}/{name}") };
                    (path, value)
                })),
                value => {
                    if let Some(number) = value.as_f64().filter(|_| path != "epoch" && path != "step") {
                        self.series.entry(path).or_default().push((epoch, number));
                    }
                }
            }
        }
    }
}
