//! What can be said of a run at a glance, without its checkpoints being read.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value};

use super::compare::{Aim, aim};
use super::directory::{RunDir, is_run};
use super::metrics::record;
use crate::files::{RunError, open_plain};

/// How deep runs are looked for.
const DEEPEST: usize = 8;
/// So much of the end of `metrics.jsonl` is read: more than a record takes.
const END: u64 = 64 * 1024;

/// Whether a run goes on, and if not, why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// It ended.
    Finished,
    /// A process has its lock.
    Running,
    /// It was ended early; `--resume` goes on with it.
    Stopped,
    /// A loss or a gradient was not finite; `--resume` would come to that step again.
    Failed,
    /// A file is not as it was written.
    Damaged,
    /// An earlier version made it.
    Outdated,
}

impl RunState {
    /// The state in a word.
    pub fn word(self) -> &'static str {
        match self {
            RunState::Finished => "finished",
            RunState::Running => "running",
            RunState::Stopped => "stopped",
            RunState::Failed => "failed",
            RunState::Damaged => "damaged",
            RunState::Outdated => "outdated",
        }
    }
}

/// How far a stage that trains has come.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Position {
    /// The stage.
    pub stage: String,
    /// Updates that were made.
    pub steps: u64,
    /// The fractional epoch at which the last of them began.
    pub epoch: f64,
}

/// A result that stands for a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Headline {
    /// The stage that gave it.
    pub stage: String,
    /// Its name among the results of the stage, as a path.
    pub name: String,
    /// The number.
    pub value: f64,
}

/// A run at a glance.
#[derive(Debug, Clone, Serialize)]
pub struct Overview {
    /// Its directory, whose name JSON may not be able to hold.
    #[serde(skip)]
    pub path: PathBuf,
    /// Whether it goes on.
    pub state: RunState,
    /// What is damaged, if something is.
    pub fault: Option<String>,
    /// When it began, RFC 3339 in UTC; absent where that is not known.
    pub started: Option<String>,
    /// When it ended.
    pub ended: Option<String>,
    /// Its finished stages, in the order in which they finished.
    pub finished_stages: Vec<String>,
    /// Where the stage that it trains, or was stopped in, stands.
    pub position: Option<Position>,
    /// The best accuracy of its results, else the lowest loss.
    pub best: Option<Headline>,
    /// The text of `recipe.resolved.yaml`.
    #[serde(skip)]
    pub recipe: Option<String>,
}

/// The run directories in a folder and below it, sorted by path; the folder itself, where it is one.
///
/// Links are not followed, nothing is looked for in run directories or hidden folders, and folders that may not be read
/// are passed over.
///
/// # Errors
/// The folder itself cannot be read.
pub fn find(folder: &Path) -> Result<Vec<PathBuf>, RunError> {
    if is_run(folder) {
        return Ok(vec![folder.to_owned()]);
    }
    let mut found = Vec::new();
    let mut open = vec![(folder.to_owned(), 0)];
    while let Some((folder, depth)) = open.pop() {
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if depth == 0 => return Err(RunError::reading("folder", &folder, error)),
            Err(_) => continue,
        };
        for entry in entries.flatten() {
            let is_hidden = entry.file_name().to_string_lossy().starts_with('.');
            if is_hidden || !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            match is_run(&entry.path()) {
                true => found.push(entry.path()),
                false if depth < DEEPEST => open.push((entry.path(), depth + 1)),
                false => {}
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Looks at a run. Nothing is changed, and nothing is locked.
///
/// # Errors
/// The folder is no run's, or cannot be read.
pub fn overview(path: &Path) -> Result<Overview, RunError> {
    let mut overview = Overview {
        path: path.to_owned(),
        state: RunState::Stopped,
        fault: None,
        started: None,
        ended: None,
        finished_stages: Vec::new(),
        position: None,
        best: None,
        recipe: None,
    };
    let run = match RunDir::look_at(path) {
        Ok(run) => run,
        Err(error @ RunError::NotARun { .. }) => return Err(error),
        Err(error) => {
            overview.note(error);
            return Ok(overview);
        }
    };
    if run.is_in_use() {
        overview.state = RunState::Running;
    }
    match run.read_manifest() {
        Ok(None) => {}
        Ok(Some(manifest)) => {
            (overview.started, overview.ended) = (Some(manifest.started), manifest.ended);
            if overview.ended.is_some() && overview.state == RunState::Stopped {
                overview.state = RunState::Finished;
            }
        }
        Err(error) => overview.note(error),
    }
    if overview.state == RunState::Stopped && run.has_failed()? {
        overview.state = RunState::Failed;
    }
    match run.read_recipe() {
        Ok(recipe) => overview.recipe = recipe,
        Err(error) => overview.note(error),
    }
    match run.read_summary() {
        Ok(results) => {
            overview.finished_stages = results.keys().cloned().collect();
            overview.best = headline(&results);
        }
        Err(error) => overview.note(error),
    }
    match position(&run.metrics_path()) {
        Ok(position) => {
            overview.position = position.filter(|at| !overview.finished_stages.contains(&at.stage));
        }
        Err(error) => overview.note(RunError::reading("metrics", &run.metrics_path(), error)),
    }
    let lost = [(overview.recipe.is_none(), run.recipe_path()), (overview.started.is_none(), run.manifest_path())];
    for (is_lost, path) in lost {
        if is_lost && overview.fault.is_none() && run.is_trained()? {
            overview.note(RunError::damaged(&path, "it is gone"));
        }
    }
    Ok(overview)
}

impl Overview {
    /// Keeps the first thing that is wrong. A run that goes on may be writing what looks damaged.
    fn note(&mut self, error: RunError) {
        if self.fault.is_some() || self.state == RunState::Running {
            return;
        }
        self.state = match &error {
            RunError::Outdated { .. } => RunState::Outdated,
            _ => RunState::Damaged,
        };
        self.fault = Some(error.to_string());
    }
}

/// The last whole record of an update.
fn position(metrics: &Path) -> io::Result<Option<Position>> {
    let mut file: File = match open_plain(metrics, OpenOptions::new().read(true)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(END)))?;
    let mut end = Vec::new();
    file.take(END).read_to_end(&mut end)?;
    let at = |line: &[u8]| {
        let record = record(line).filter(|record| record.get("loss").is_some())?;
        Some(Position {
            stage: record.get("stage")?.as_str()?.to_owned(),
            steps: record.get("step")?.as_u64()? + 1,
            epoch: record.get("epoch")?.as_f64()?,
        })
    };
    Ok(end.split_inclusive(|byte| *byte == b'\n').rev().find_map(at))
}

/// The best accuracy among results, else the lowest loss. Where a stage compares its student with others, the student's.
fn headline(results: &Map<String, Value>) -> Option<Headline> {
    let mut found: Vec<(Aim, Headline)> = Vec::new();
    for (stage, result) in results {
        let own = result.get("student").map(|own| ("student.", own));
        let (prefix, result) = own.unwrap_or(("", result));
        let mut open = vec![(String::new(), result)];
        while let Some((name, value)) = open.pop() {
            match value {
                Value::Object(entries) => {
                    let below = |(key, value)| {
                        (if name.is_empty() { String::clone(key) } else { format!("{name}.{key}") }, value)
                    };
                    open.extend(entries.iter().map(below));
                }
                Value::Array(items) => open.extend(items.iter().map(|item| (name.clone(), item))),
                value => {
                    if let (Some(aim), Some(value)) = (aim(&name), value.as_f64()) {
                        found.push((aim, Headline { stage: stage.clone(), name: format!("{prefix}{name}"), value }));
                    }
                }
            }
        }
    }
    // Towers that a stage only compares with others stand under names of their own.
    let highest = found.iter().filter(|(aim, _)| *aim == Aim::Highest).map(|(_, found)| found);
    let highest = highest.max_by(|a, b| a.value.total_cmp(&b.value));
    let lowest = found.iter().filter(|(aim, _)| *aim == Aim::Lowest).map(|(_, found)| found);
    highest.or_else(|| lowest.min_by(|a, b| a.value.total_cmp(&b.value))).cloned()
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use serde_json::json;

    use super::*;
    use crate::run::{Manifest, Mode};

    fn best(results: Value) -> Option<(String, String, f64)> {
        let Value::Object(results) = results else { panic!("results are a mapping") };
        headline(&results).map(|best| (best.stage, best.name, best.value))
    }

    #[test]
    fn the_headline_is_the_students_best_accuracy_else_the_lowest_loss() {
        let knn =
            json!({ "pixels": { "accuracy": 0.8 }, "student": { "accuracy": 0.7 }, "teacher": { "accuracy": 0.9 } });
        let pretrain = json!({ "loss": 0.2, "steps": 9, "knn": [{ "epoch": 1, "accuracy": 0.75 }] });
        let tuned = json!({ "loss": 0.1, "accuracy": 0.72 });
        assert_eq!(best(json!({ "knn": knn })), Some(("knn".into(), "student.accuracy".into(), 0.7)));
        let all = json!({ "pretrain": pretrain, "knn": knn, "tune": tuned });
        assert_eq!(best(all), Some(("pretrain".into(), "knn.accuracy".into(), 0.75)));
        let losses = json!({ "one": { "loss": 0.3 }, "two": { "loss": 0.2, "seconds": 0.1 } });
        assert_eq!(best(losses), Some(("two".into(), "loss".into(), 0.2)));
        assert_eq!(best(json!({ "one": { "steps": 3 }, "two": null })), None);
    }

    #[test]
    fn runs_are_found_below_a_folder_and_not_inside_each_other() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["b", "deep/er/a", "deep/er/a/inner", ".hidden/c"] {
            RunDir::create(at(name), Mode::Fresh).unwrap();
        }
        fs::create_dir(at("empty")).unwrap();
        assert_eq!(find(folder.path()).unwrap(), [at("b"), at("deep/er/a")]);
        assert_eq!(find(&at("b")).unwrap(), [at("b")]);
        assert!(matches!(find(&at("gone")), Err(RunError::Io { .. })));
        assert!(matches!(overview(&at("empty")), Err(RunError::NotARun { .. })));
    }

    #[test]
    fn a_run_is_running_stopped_finished_or_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let run = RunDir::create(path, Mode::Fresh).unwrap();
        let state = || overview(path).unwrap().state;
        assert_eq!(state(), RunState::Running);
        let mut manifest = Manifest { started: "2023-06-18T09:30:00Z".into(), ..Manifest::default() };
        run.write_manifest(&manifest).unwrap();
        run.write_recipe("name: x\n").unwrap();
        let mut metrics = File::create(run.metrics_path()).unwrap();
        for step in 0..3 {
            let record = json!({ "stage": "train", "step": step, "epoch": 0.5 * f64::from(step), "loss": 1.0 });
            writeln!(metrics, "{record}").unwrap();
        }
        write!(metrics, "{{\"stage\":\"train\",\"step\":3,\"epo").unwrap();
        manifest.ended = Some("2023-06-18T09:31:00Z".into());
        let ended = RunDir::create(folder.path().join("ended"), Mode::Fresh).unwrap();
        ended.write_manifest(&manifest).unwrap();
        drop((run, ended));
        let stopped = overview(path).unwrap();
        assert_eq!((stopped.state, stopped.fault), (RunState::Stopped, None));
        assert_eq!(stopped.position, Some(Position { stage: "train".into(), steps: 3, epoch: 1.0 }));
        assert_eq!(overview(&path.join("ended")).unwrap().state, RunState::Finished);
        let file = path.join("manifest.json");
        let text = fs::read_to_string(&file).unwrap();
        fs::write(&file, text.replace("09:30", "09:40")).unwrap();
        let damaged = overview(path).unwrap();
        assert_eq!(damaged.state, RunState::Damaged);
        assert!(damaged.fault.unwrap().contains("its content differs from its checksum"));
        fs::write(&file, "{}").unwrap();
        assert_eq!(state(), RunState::Outdated);
    }
}
