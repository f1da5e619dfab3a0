//! What a report takes from a run directory.

use std::{
    fs,
    path::{Path, PathBuf},
};

use maskalign_core::run::{CURVE, Manifest, PictureRecord, Series, pictures, read_series};
use serde_json::{Map, Value};

use crate::failure::Failure;

/// A run, as its directory tells it.
pub(super) struct Run {
    /// The directory.
    pub(super) path: PathBuf,
    /// `manifest.json`.
    pub(super) manifest: Value,
    /// The same as it is known here; what is not is empty.
    pub(super) record: Manifest,
    /// The recipe with every default, as YAML.
    pub(super) recipe: String,
    /// Each finished stage's results.
    pub(super) results: Map<String, Value>,
    /// What stages show besides curves, with each picture's file.
    pub(super) pictures: Vec<(PictureRecord, Vec<u8>)>,
    /// What was measured, by stage, in the order in which they ran.
    pub(super) stages: Vec<(String, Series)>,
}

/// What a run is called: the name of its directory.
pub(crate) fn run_name(run: &Path) -> String {
    let whole = run.canonicalize().unwrap_or_else(|_| run.to_owned());
    whole.file_name().map_or_else(|| run.display().to_string(), |name| name.to_string_lossy().into_owned())
}

impl Run {
    pub(super) fn read(path: &Path) -> Result<Run, Failure> {
        let (stages, bad) = read_series(path, &|_, _| true)?;
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
        // Curves are drawn anew, of several runs together.
        let kept = pictures(path).into_iter().filter(|record| !record.name.starts_with(CURVE));
        let shown = kept.filter_map(|record| {
            let file = fs::read(record.path(path)?).ok()?;
            Some((record, file))
        });
        let pictures = shown.collect();
        Ok(Run {
            path: path.to_owned(),
            record: serde_json::from_value(manifest.clone()).unwrap_or_default(),
            manifest,
            recipe: text("recipe.resolved.yaml")?.unwrap_or_default(),
            results,
            pictures,
            stages,
        })
    }

    /// The stage of that name.
    pub(super) fn stage(&self, name: &str) -> Option<&Series> {
        self.stages.iter().find(|(known, _)| known == name).map(|(_, stage)| stage)
    }

    /// Whether it ended.
    pub(super) fn is_finished(&self) -> bool {
        self.manifest["ended"].is_string()
    }

    /// How it stands, in words.
    pub(super) fn state(&self) -> &'static str {
        if self.is_finished() { "finished" } else { "not finished" }
    }
}

fn check(path: &Path) -> String {
    format!("`maskalign runs check {}` says what is whole", path.display())
}
