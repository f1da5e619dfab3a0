//! The run directory: its files, its lock, and what is kept or removed when a run starts or resumes.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Component, Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::clock::utc;
use super::manifest::Manifest;
use super::metrics::Metrics;
use crate::files::{RunError, atomic_write, target_of_temporary};
use crate::weights::TensorRef;
use crate::weights::{Checkpoint, CheckpointHeader, Retention};

const MARKER: &str = ".maskalign-run";
const MARKER_LINE: &str = "A MaskAlign run. The lines below name files it made besides the usual ones.\n";
const RECIPE: &str = "recipe.resolved.yaml";
const MANIFEST: &str = "manifest.json";
const METRICS: &str = "metrics.jsonl";
const SUMMARY: &str = "summary.json";
const CHECKPOINTS: &str = "checkpoints";
const FINAL: &str = "final.safetensors";
const DONE: &str = "done.json";
const TENSORBOARD: &str = "tensorboard";
/// TensorBoard finds files by the middle of their names.
const EVENTS: &str = "events.out.tfevents.0.maskalign";

/// What to do with what a run's directory holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Refuse a directory that is not empty.
    Fresh,
    /// Delete what an earlier run made, and nothing else.
    Force,
    /// Keep all, remove what a kill left half written.
    Resume,
}

/// A run's directory, locked for this process while the value lives.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    marker: File,
    found: Found,
}

/// What was there when a run's directory was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Nothing,
    EmptyFolder,
    Run,
}

/// What `done.json` holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FinishedStage {
    /// Optimizer steps done.
    pub step: u64,
    /// Fingerprint of the recipe.
    pub fingerprint: String,
    /// Records in `metrics.jsonl` when the stage ended.
    pub metrics_records: u64,
    /// The stage's results, as in `summary.json`.
    pub results: Value,
}

impl RunDir {
    /// `runs/NAME-20230618-093000` (UTC), or with `-2` and so on appended where that exists.
    pub fn default_path(name: &str, now: SystemTime) -> PathBuf {
        let name: String = name
            .trim_start_matches('.')
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || "_-.".contains(c) { c } else { '-' })
            .collect();
        let base = format!("{name}-{}", utc(now, "%Y%m%d-%H%M%S"));
        let runs = Path::new("runs");
        let mut path = runs.join(&base);
        let mut count = 2;
        while path.exists() {
            path = runs.join(format!("{base}-{count}"));
            count += 1;
        }
        path
    }

    /// Opens a directory for a run, creating it unless it is to be resumed.
    ///
    /// A directory that is neither empty nor a run's is refused in every mode. An empty one may be resumed: a run may
    /// have been killed before it wrote anything.
    pub fn create(path: impl Into<PathBuf>, mode: Mode) -> Result<RunDir, RunError> {
        let path = path.into();
        if mode == Mode::Resume && !path.is_dir() {
            return Err(RunError::NothingToResume { path });
        }
        let is_new = !path.exists();
        fs::create_dir_all(&path).map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => RunError::NotAFolder { path: path.clone() },
            _ => RunError::Io { action: "create the run directory".into(), path: path.clone(), source },
        })?;
        let empty = fs::read_dir(&path).map_err(|e| RunError::reading("run directory", &path, e))?.next().is_none();
        let marked = is_plain_file(&path.join(MARKER));
        match mode {
            _ if empty => {}
            Mode::Fresh => return Err(RunError::NotEmpty { path }),
            Mode::Force | Mode::Resume if !marked => {
                return Err(RunError::NotARun { path, marker: MARKER });
            }
            Mode::Force | Mode::Resume => {}
        }
        let found = match (is_new, empty) {
            (true, _) => Found::Nothing,
            (false, true) => Found::EmptyFolder,
            (false, false) => Found::Run,
        };
        let mut run = RunDir { marker: open_marker(&path)?, path, found };
        match mode {
            Mode::Fresh => {}
            Mode::Force => run.delete_previous_run()?,
            Mode::Resume => run.delete_leftovers()?,
        }
        run.begin_marker()?;
        Ok(run)
    }

    /// Leaves the place as it was found where nothing was trained yet: a run that is refused is no run. What an earlier
    /// run left is not touched.
    pub fn withdraw(mut self) -> Result<(), RunError> {
        let trained = fs::metadata(self.metrics_path()).is_ok_and(|metrics| metrics.len() > 0);
        if self.found == Found::Run || trained || !self.stage_folders()?.is_empty() {
            return Ok(());
        }
        self.delete_previous_run()?;
        delete(&self.path.join(MARKER))?;
        if self.found == Found::Nothing {
            // Something else may have been put there in the meantime.
            let _ = fs::remove_dir(&self.path);
        }
        Ok(())
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `recipe.resolved.yaml`.
    pub fn recipe_path(&self) -> PathBuf {
        self.path.join(RECIPE)
    }

    /// `manifest.json`.
    pub fn manifest_path(&self) -> PathBuf {
        self.path.join(MANIFEST)
    }

    /// `metrics.jsonl`.
    pub fn metrics_path(&self) -> PathBuf {
        self.path.join(METRICS)
    }

    /// `tensorboard/events.out.tfevents.0.maskalign`.
    pub fn tensorboard_path(&self) -> PathBuf {
        self.path.join(TENSORBOARD).join(EVENTS)
    }

    /// `summary.json`.
    pub fn summary_path(&self) -> PathBuf {
        self.path.join(SUMMARY)
    }

    /// `checkpoints/STAGE/step-00001234.safetensors`. An error if the stage's name cannot be a folder's.
    pub fn checkpoint_path(&self, stage: &str, step: u64) -> Result<PathBuf, RunError> {
        Ok(self.stage_folder(stage)?.join(format!("step-{step:08}.safetensors")))
    }

    /// `checkpoints/STAGE/final.safetensors`. An error if the stage's name cannot be a folder's.
    pub fn final_path(&self, stage: &str) -> Result<PathBuf, RunError> {
        Ok(self.stage_folder(stage)?.join(FINAL))
    }

    /// Notes a file, by its path inside the directory, that the run makes besides the usual ones: `Mode::Force` may
    /// then delete it. Note it before it is made.
    pub fn record(&mut self, inside: &str) -> Result<(), RunError> {
        if !is_inside(inside) || inside.contains('\n') {
            return Err(RunError::Name { what: "file of a run", name: inside.to_owned() });
        }
        let path = self.path.join(MARKER);
        self.marker
            .write_all(format!("{inside}\n").as_bytes())
            .and_then(|()| self.marker.sync_data())
            .map_err(|source| RunError::writing("list of files", &path, source))
    }

    /// Writes `recipe.resolved.yaml`.
    pub fn write_recipe(&self, text: &str) -> Result<(), RunError> {
        atomic_write(&self.recipe_path(), "recipe", |file| file.write_all(text.as_bytes()))
    }

    /// Reads `recipe.resolved.yaml`; `None` if the run was killed before it was written.
    pub fn read_recipe(&self) -> Result<Option<String>, RunError> {
        read_if_there(&self.recipe_path(), "recipe")
    }

    /// Writes `manifest.json`.
    pub fn write_manifest(&self, manifest: &Manifest) -> Result<(), RunError> {
        write_json(&self.manifest_path(), "manifest", manifest)
    }

    /// Reads `manifest.json`; `None` if the run was killed before it was written.
    pub fn read_manifest(&self) -> Result<Option<Manifest>, RunError> {
        read_json(&self.manifest_path(), "manifest")
    }

    /// Opens `metrics.jsonl` and keeps its first `records` records: those of the checkpoint that the run goes on from.
    pub fn metrics(&self, records: u64) -> Result<Metrics, RunError> {
        Metrics::open(&self.metrics_path(), records)
    }

    /// Writes a checkpoint of `header.stage` at `header.step` and returns its path.
    pub fn save_checkpoint(&self, header: &CheckpointHeader, tensors: &[TensorRef<'_>]) -> Result<PathBuf, RunError> {
        let path = self.checkpoint_path(&header.stage, header.step)?;
        self.create_stage_folder(&header.stage)?;
        Checkpoint::save(&path, "checkpoint", header, tensors)?;
        Ok(path)
    }

    /// The checkpoints of a stage in ascending order of steps, whether they can be read or not.
    pub fn checkpoints(&self, stage: &str) -> Result<Vec<(u64, PathBuf)>, RunError> {
        let folder = self.stage_folder(stage)?;
        let mut found: Vec<_> =
            file_names(&folder)?.into_iter().filter_map(|name| Some((step_of(&name)?, folder.join(&name)))).collect();
        found.sort();
        Ok(found)
    }

    /// The newest checkpoint of a stage that can be read. Damaged ones are passed over and logged.
    pub fn latest_checkpoint(&self, stage: &str) -> Result<Option<Checkpoint>, RunError> {
        for (_, path) in self.checkpoints(stage)?.into_iter().rev() {
            match Checkpoint::load(&path) {
                Ok(checkpoint) => return Ok(Some(checkpoint)),
                Err(error @ RunError::Damaged { .. }) => {
                    tracing::warn!("{error}: going back to the checkpoint before it");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Deletes the checkpoints of a stage that need not stay.
    pub fn prune_checkpoints(&self, stage: &str, retention: Retention) -> Result<(), RunError> {
        let checkpoints = self.checkpoints(stage)?;
        retention.to_delete(&checkpoints).try_for_each(delete)
    }

    /// Writes what a stage leaves: `final.safetensors`, then `done.json`, then its entry in `summary.json`.
    ///
    /// `results` may hold timings: they stay out of `final.safetensors`, whose bytes depend on the state alone.
    pub fn finish_stage(
        &self,
        header: &CheckpointHeader,
        tensors: &[TensorRef<'_>],
        results: Value,
    ) -> Result<(), RunError> {
        let folder = self.create_stage_folder(&header.stage)?;
        Checkpoint::save(&folder.join(FINAL), "final", header, tensors)?;
        let finished = FinishedStage {
            step: header.step,
            fingerprint: header.fingerprint.clone(),
            metrics_records: header.metrics_records,
            results,
        };
        write_json(&folder.join(DONE), "done", &finished)?;
        self.add_to_summary(&header.stage, &finished.results)
    }

    /// The record of a stage that is finished and what it left, so that a resumed run skips it; `None` if it is not, or
    /// if its weights are gone or damaged.
    ///
    /// Completes `summary.json` if a kill came between the two.
    pub fn finished_stage(&self, stage: &str) -> Result<Option<(FinishedStage, Checkpoint)>, RunError> {
        let folder = self.stage_folder(stage)?;
        let Some(finished) = read_json::<FinishedStage>(&folder.join(DONE), "record of a finished stage")? else {
            return Ok(None);
        };
        let left = match Checkpoint::load(&folder.join(FINAL)) {
            Ok(left) => left,
            Err(error) if error.is_lost_content() => {
                tracing::warn!("{error}: stage `{stage}` goes on from its last checkpoint");
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        self.add_to_summary(stage, &finished.results)?;
        Ok(Some((finished, left)))
    }

    /// Whether a stage has left its record.
    pub fn is_finished(&self, stage: &str) -> Result<bool, RunError> {
        Ok(self.stage_folder(stage)?.join(DONE).is_file())
    }

    /// Makes a stage unfinished again, so that it goes on from its last checkpoint.
    pub fn reopen_stage(&self, stage: &str) -> Result<(), RunError> {
        let folder = self.stage_folder(stage)?;
        // Without its record a stage is unfinished, whatever else is there.
        delete(&folder.join(DONE))?;
        delete(&folder.join(FINAL))?;
        let mut summary = self.read_summary()?;
        if summary.shift_remove(stage).is_some() {
            write_json(&self.summary_path(), "summary", &summary)?;
        }
        Ok(())
    }

    /// Deletes all that a stage made: what it began with has changed.
    pub fn discard_stage(&self, stage: &str) -> Result<(), RunError> {
        self.reopen_stage(stage)?;
        self.checkpoints(stage)?.iter().try_for_each(|(_, path)| delete(path))
    }

    /// `summary.json`: each finished stage's results under its name, in the order they finished.
    pub fn read_summary(&self) -> Result<Map<String, Value>, RunError> {
        Ok(read_json(&self.summary_path(), "summary")?.unwrap_or_default())
    }

    fn add_to_summary(&self, stage: &str, results: &Value) -> Result<(), RunError> {
        let mut summary = self.read_summary()?;
        if summary.get(stage) != Some(results) {
            summary.insert(stage.to_owned(), results.clone());
            write_json(&self.summary_path(), "summary", &summary)?;
        }
        Ok(())
    }

    fn stage_folder(&self, stage: &str) -> Result<PathBuf, RunError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        if stage.is_empty() || stage.starts_with('.') || !stage.chars().all(plain) {
            return Err(RunError::Name { what: "stage", name: stage.to_owned() });
        }
        Ok(self.path.join(CHECKPOINTS).join(stage))
    }

    fn create_stage_folder(&self, stage: &str) -> Result<PathBuf, RunError> {
        let folder = self.stage_folder(stage)?;
        fs::create_dir_all(&folder).map_err(|source| RunError::writing("folder", &folder, source))?;
        Ok(folder)
    }

    /// Writes the marker's first line unless it is there.
    fn begin_marker(&mut self) -> Result<(), RunError> {
        let path = self.path.join(MARKER);
        let mut begin = || -> io::Result<()> {
            if self.marker.metadata()?.len() == 0 {
                self.marker.write_all(MARKER_LINE.as_bytes())?;
                self.marker.sync_all()?;
            }
            Ok(())
        };
        begin().map_err(|source| RunError::writing("run directory's marker", &path, source))
    }

    /// Deletes every file that a run is known to make or has noted, then the folders that are empty.
    fn delete_previous_run(&mut self) -> Result<(), RunError> {
        let path = self.path.join(MARKER);
        let mut recorded = String::new();
        self.marker
            .rewind()
            .and_then(|()| self.marker.read_to_string(&mut recorded))
            .map_err(|source| RunError::reading("run directory's marker", &path, source))?;
        self.delete_leftovers()?;
        for name in [RECIPE, MANIFEST, METRICS, SUMMARY] {
            delete(&self.path.join(name))?;
        }
        for line in recorded.lines().skip(1).filter(|line| is_inside(line)) {
            if has_plain_folders(&self.path, line) {
                delete(&self.path.join(line))?;
            }
        }
        for folder in self.stage_folders()? {
            for name in file_names(&folder)? {
                if name == FINAL || name == DONE || step_of(&name).is_some() {
                    delete(&folder.join(name))?;
                }
            }
            // A folder that holds something else stays.
            let _ = fs::remove_dir(&folder);
        }
        let _ = fs::remove_dir(self.path.join(CHECKPOINTS));
        let tensorboard = self.path.join(TENSORBOARD);
        if is_plain_folder(&tensorboard) {
            delete(&tensorboard.join(EVENTS))?;
            let _ = fs::remove_dir(&tensorboard);
        }
        self.marker.set_len(0).map_err(|source| RunError::writing("run directory's marker", &path, source))
    }

    /// Deletes temporary files that a kill left.
    fn delete_leftovers(&self) -> Result<(), RunError> {
        let delete_in = |folder: &Path, known: &dyn Fn(&str) -> bool| {
            for name in file_names(folder)? {
                if target_of_temporary(&name).is_some_and(known) {
                    delete(&folder.join(name))?;
                }
            }
            Ok::<_, RunError>(())
        };
        delete_in(&self.path, &|name| [RECIPE, MANIFEST, SUMMARY].contains(&name))?;
        for folder in self.stage_folders()? {
            delete_in(&folder, &|name| name == FINAL || name == DONE || step_of(name).is_some())?;
        }
        Ok(())
    }

    /// The folders in `checkpoints/`; links are not followed, lest files elsewhere be deleted.
    fn stage_folders(&self) -> Result<Vec<PathBuf>, RunError> {
        let folder = self.path.join(CHECKPOINTS);
        if !is_plain_folder(&folder) {
            return Ok(Vec::new());
        }
        let entries = fs::read_dir(&folder).map_err(|e| RunError::reading("folder", &folder, e))?;
        let mut found = Vec::new();
        for entry in entries {
            let path = entry.map_err(|e| RunError::reading("folder", &folder, e))?.path();
            if is_plain_folder(&path) {
                found.push(path);
            }
        }
        Ok(found)
    }
}

fn open_marker(folder: &Path) -> Result<File, RunError> {
    let path = folder.join(MARKER);
    let marker = OpenOptions::new()
        .create(true)
        .read(true)
        .append(true)
        .open(&path)
        .map_err(|source| RunError::writing("run directory's marker", &path, source))?;
    // A process that was killed a moment ago may still be on its way out with the lock.
    let mut locked = marker.try_lock();
    for _ in 0..20 {
        if !matches!(locked, Err(TryLockError::WouldBlock)) {
            break;
        }
        thread::sleep(Duration::from_millis(25));
        locked = marker.try_lock();
    }
    match locked {
        Ok(()) => Ok(marker),
        Err(TryLockError::WouldBlock) => Err(RunError::InUse { path: folder.to_owned() }),
        Err(TryLockError::Error(error)) => {
            // Some network file systems know no locks; a run there is only less guarded.
            tracing::warn!("cannot lock {}: {error}", path.display());
            Ok(marker)
        }
    }
}

/// `step-00001234.safetensors` -> 1234.
fn step_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("step-")?.strip_suffix(".safetensors")?;
    (digits.len() >= 8 && digits.bytes().all(|b| b.is_ascii_digit())).then(|| digits.parse().ok())?
}

/// Whether a folder is a run's `checkpoints` or inside it.
pub fn is_in_checkpoints(folder: &Path) -> bool {
    let whole = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    whole.ancestors().any(|folder| folder.ends_with(CHECKPOINTS) && is_plain_file(&folder.with_file_name(MARKER)))
}

/// Whether a relative path stays inside the folder it is joined to.
fn is_inside(path: &str) -> bool {
    !path.is_empty() && Path::new(path).components().all(|part| matches!(part, Component::Normal(_)))
}

/// Whether no folder on the way from `root` to `root/inside` is a link.
fn has_plain_folders(root: &Path, inside: &str) -> bool {
    let mut folders = Path::new(inside).ancestors().skip(1).filter(|folder| !folder.as_os_str().is_empty());
    folders.all(|folder| is_plain_folder(&root.join(folder)))
}

fn is_plain_folder(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir())
}

fn is_plain_file(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_file())
}

/// The names in a folder that are UTF-8, sorted; none if there is no such folder.
fn file_names(folder: &Path) -> Result<BTreeSet<String>, RunError> {
    let reading = |error| RunError::reading("folder", folder, error);
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        Err(error) => return Err(reading(error)),
    };
    let mut names = BTreeSet::new();
    for entry in entries {
        names.extend(entry.map_err(reading)?.file_name().into_string().ok());
    }
    Ok(names)
}

fn delete(path: &Path) -> Result<(), RunError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(RunError::Io { action: "delete".into(), path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

fn write_json(path: &Path, what: &str, value: &impl Serialize) -> Result<(), RunError> {
    atomic_write(path, what, |file| {
        serde_json::to_writer_pretty(&mut *file, value)?;
        file.write_all(b"\n")
    })
}

fn read_if_there(path: &Path, what: &str) -> Result<Option<String>, RunError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(RunError::reading(what, path, error)),
    }
}

fn read_json<T: for<'de> Deserialize<'de>>(path: &Path, what: &str) -> Result<Option<T>, RunError> {
    let Some(text) = read_if_there(path, what)? else {
        return Ok(None);
    };
    serde_json::from_str(&text)
        .map(Some)
        .map_err(|error| RunError::damaged(path, format!("the {what} does not parse: {error}")))
}

#[cfg(test)]
mod tests {
    use crate::weights::TensorData;
    use std::time::{Duration, UNIX_EPOCH};

    use serde_json::json;

    use super::*;

    fn header(stage: &str, step: u64) -> CheckpointHeader {
        CheckpointHeader {
            stage: stage.into(),
            step,
            fingerprint: "f".into(),
            metrics_records: step,
            student: Vec::new(),
            meta: Value::Null,
        }
    }

    fn save(run: &RunDir, stage: &str, step: u64) -> PathBuf {
        let data = [step as f32];
        let tensors = [TensorRef { name: "model.w".into(), shape: vec![1], data: TensorData::Host(&data) }];
        run.save_checkpoint(&header(stage, step), &tensors).unwrap()
    }

    #[test]
    fn a_folder_with_something_in_it_is_refused_unless_a_run_made_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mine");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("manifest.json"), "my own").unwrap();
        assert!(matches!(RunDir::create(&path, Mode::Fresh), Err(RunError::NotEmpty { .. })));
        assert!(matches!(RunDir::create(&path, Mode::Force), Err(RunError::NotARun { .. })));
        assert!(matches!(RunDir::create(&path, Mode::Resume), Err(RunError::NotARun { .. })));
        assert_eq!(fs::read_to_string(path.join("manifest.json")).unwrap(), "my own");
        let error = RunDir::create(folder.path().join("absent"), Mode::Resume).unwrap_err();
        assert!(matches!(error, RunError::NothingToResume { .. }) && error.is_user_mistake());
    }

    #[test]
    fn a_run_that_was_killed_before_it_wrote_anything_can_be_resumed() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::create(folder.path(), Mode::Resume).unwrap();
        assert_eq!(run.read_recipe().unwrap(), None);
        assert!(run.read_manifest().unwrap().is_none());
        assert!(run.latest_checkpoint("pretrain").unwrap().is_none());
    }

    #[test]
    fn force_deletes_what_the_run_made_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let outside = folder.path().join("outside");
        fs::write(&outside, "keep").unwrap();
        let path = folder.path().join("run");
        let mut run = RunDir::create(&path, Mode::Fresh).unwrap();
        run.write_recipe("seed: 1\n").unwrap();
        run.write_manifest(&Manifest::default()).unwrap();
        run.metrics(0).unwrap().append(&json!({ "step": 0 })).unwrap();
        save(&run, "pretrain", 5);
        save(&run, "probe", 5);
        run.finish_stage(&header("pretrain", 5), &[], json!({ "loss": 1 })).unwrap();
        fs::create_dir(path.join("tensorboard")).unwrap();
        fs::write(run.tensorboard_path(), "events").unwrap();
        run.record("export/student.safetensors").unwrap();
        fs::create_dir(path.join("export")).unwrap();
        fs::write(path.join("export/student.safetensors"), "s").unwrap();
        fs::write(path.join("notes.txt"), "mine").unwrap();
        fs::write(path.join("checkpoints/pretrain/copy.safetensors"), "mine").unwrap();
        fs::write(path.join("checkpoints/probe/.step-00000007.safetensors.tmp"), "torn").unwrap();
        assert!(run.record("../outside").is_err());
        drop(run);
        let mut marker = OpenOptions::new().append(true).open(path.join(MARKER)).unwrap();
        marker.write_all(format!("../outside\n{}\n", outside.display()).as_bytes()).unwrap();

        let run = RunDir::create(&path, Mode::Force).unwrap();
        assert!(run.read_recipe().unwrap().is_none());
        assert!(run.checkpoints("pretrain").unwrap().is_empty());
        assert!(!path.join("checkpoints/probe").exists());
        assert!(!path.join("tensorboard").exists());
        assert!(!path.join("export/student.safetensors").exists());
        assert_eq!(fs::read_to_string(path.join("notes.txt")).unwrap(), "mine");
        assert_eq!(fs::read_to_string(path.join("checkpoints/pretrain/copy.safetensors")).unwrap(), "mine");
        assert_eq!(fs::read_to_string(&outside).unwrap(), "keep");
        assert_eq!(fs::read_to_string(path.join(MARKER)).unwrap(), MARKER_LINE);
    }

    #[cfg(unix)]
    #[test]
    fn force_follows_no_links() {
        let folder = tempfile::tempdir().unwrap();
        let elsewhere = folder.path().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        fs::write(elsewhere.join("final.safetensors"), "keep").unwrap();
        let path = folder.path().join("run");
        let mut run = RunDir::create(&path, Mode::Fresh).unwrap();
        run.record("link/final.safetensors").unwrap();
        drop(run);
        fs::create_dir(path.join(CHECKPOINTS)).unwrap();
        std::os::unix::fs::symlink(&elsewhere, path.join("checkpoints/pretrain")).unwrap();
        std::os::unix::fs::symlink(&elsewhere, path.join("link")).unwrap();
        RunDir::create(&path, Mode::Force).unwrap();
        assert!(elsewhere.join("final.safetensors").exists());
    }

    #[test]
    fn a_run_in_use_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let _run = RunDir::create(folder.path(), Mode::Fresh).unwrap();
        assert!(matches!(RunDir::create(folder.path(), Mode::Resume), Err(RunError::InUse { .. })));
        assert!(matches!(RunDir::create(folder.path(), Mode::Force), Err(RunError::InUse { .. })));
    }

    #[test]
    fn a_damaged_newest_checkpoint_is_reported_and_the_one_before_it_used() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::create(folder.path(), Mode::Fresh).unwrap();
        save(&run, "pretrain", 9);
        save(&run, "pretrain", 10);
        let newest = save(&run, "pretrain", 100_000_000);
        let whole = fs::read(&newest).unwrap();
        fs::write(&newest, &whole[..whole.len() - 1]).unwrap();
        let checkpoint = run.latest_checkpoint("pretrain").unwrap().unwrap();
        assert_eq!(checkpoint.header, header("pretrain", 10));
        assert_eq!(checkpoint.tensors["model.w"].data, [10.0]);
    }

    #[test]
    fn pruning_keeps_the_last_and_every_nth() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::create(folder.path(), Mode::Fresh).unwrap();
        for step in 1..=6 {
            save(&run, "pretrain", step);
        }
        run.prune_checkpoints("pretrain", Retention { keep_last: 2, keep_every: Some(3) }).unwrap();
        let steps: Vec<_> = run.checkpoints("pretrain").unwrap().into_iter().map(|(step, _)| step).collect();
        assert_eq!(steps, [3, 5, 6]);
    }

    #[test]
    fn a_resume_removes_what_a_kill_left_and_completes_the_summary() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::create(folder.path(), Mode::Fresh).unwrap();
        run.finish_stage(&header("pretrain", 4), &[], json!({ "loss": 0.5 })).unwrap();
        run.finish_stage(&header("knn", 0), &[], json!({ "accuracy": { "student": 83.0 } })).unwrap();
        drop(run);
        fs::remove_file(folder.path().join(SUMMARY)).unwrap();
        let torn = folder.path().join("checkpoints/knn/.final.safetensors.tmp");
        fs::write(&torn, "torn").unwrap();

        let run = RunDir::create(folder.path(), Mode::Resume).unwrap();
        assert!(!torn.exists());
        assert_eq!(run.finished_stage("finetune").unwrap(), None);
        let (finished, _) = run.finished_stage("pretrain").unwrap().unwrap();
        assert_eq!((finished.step, finished.metrics_records), (4, 4));
        run.finished_stage("knn").unwrap().unwrap();
        assert_eq!(
            Value::Object(run.read_summary().unwrap()),
            json!({ "pretrain": { "loss": 0.5 }, "knn": { "accuracy": { "student": 83.0 } } })
        );
    }

    #[test]
    fn a_stage_whose_weights_are_gone_or_damaged_is_not_finished() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::create(folder.path(), Mode::Fresh).unwrap();
        let weights = [1.0; 4];
        let tensors = [TensorRef { name: "w".into(), shape: vec![4], data: TensorData::Host(&weights) }];
        run.finish_stage(&header("pretrain", 4), &tensors, json!({})).unwrap();
        let path = run.final_path("pretrain").unwrap();
        let whole = fs::read(&path).unwrap();
        assert!(run.finished_stage("pretrain").unwrap().is_some());
        let mut flipped = whole.clone();
        *flipped.last_mut().unwrap() ^= 1;
        for damaged in [&whole[..whole.len() - 1], &flipped] {
            fs::write(&path, damaged).unwrap();
            assert_eq!(run.finished_stage("pretrain").unwrap(), None);
        }
        fs::remove_file(&path).unwrap();
        assert_eq!(run.finished_stage("pretrain").unwrap(), None);
    }

    #[test]
    fn final_weights_do_not_depend_on_the_results() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::create(folder.path(), Mode::Fresh).unwrap();
        run.finish_stage(&header("knn", 0), &[], json!({ "seconds": 1.5 })).unwrap();
        let first = fs::read(run.final_path("knn").unwrap()).unwrap();
        run.finish_stage(&header("knn", 0), &[], json!({ "seconds": 2.5 })).unwrap();
        assert_eq!(first, fs::read(run.final_path("knn").unwrap()).unwrap());
        assert_eq!(run.read_summary().unwrap()["knn"], json!({ "seconds": 2.5 }));
    }

    #[test]
    fn a_run_that_is_withdrawn_leaves_the_place_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let new = folder.path().join("new");
        let run = RunDir::create(&new, Mode::Fresh).unwrap();
        run.write_recipe("name: a").unwrap();
        run.withdraw().unwrap();
        assert!(!new.exists());

        let run = RunDir::create(folder.path(), Mode::Resume).unwrap();
        run.withdraw().unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);

        let run = RunDir::create(folder.path(), Mode::Fresh).unwrap();
        let checkpoint = save(&run, "pretrain", 1);
        run.withdraw().unwrap();
        assert!(checkpoint.is_file(), "it was trained");
        let run = RunDir::create(folder.path(), Mode::Resume).unwrap();
        run.withdraw().unwrap();
        assert!(checkpoint.is_file() && folder.path().join(MARKER).is_file(), "it is an earlier run's");
    }

    #[test]
    fn a_file_is_no_place_for_a_run() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "mine").unwrap();
        for path in [file.clone(), file.join("run")] {
            let error = RunDir::create(&path, Mode::Fresh).unwrap_err();
            assert!(error.is_user_mistake(), "{error}");
        }
        assert_eq!(fs::read(&file).unwrap(), b"mine");
    }

    #[test]
    fn the_folders_of_checkpoints_are_known() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::create(folder.path().join("run"), Mode::Fresh).unwrap();
        save(&run, "pretrain", 1);
        assert!(is_in_checkpoints(&run.path().join("checkpoints/pretrain")));
        assert!(is_in_checkpoints(&run.path().join("checkpoints")));
        assert!(!is_in_checkpoints(run.path()));
        fs::create_dir(folder.path().join("checkpoints")).unwrap();
        assert!(!is_in_checkpoints(&folder.path().join("checkpoints")), "no run's");
    }

    #[test]
    fn a_stage_cannot_be_named_out_of_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::create(folder.path(), Mode::Fresh).unwrap();
        for name in ["", "..", "a/b", ".hidden", "a\\b", "C:"] {
            assert!(matches!(run.final_path(name), Err(RunError::Name { .. })), "{name}");
        }
    }

    #[test]
    fn the_default_path_holds_name_and_time() {
        let now = UNIX_EPOCH + Duration::from_secs(1_687_080_600);
        assert_eq!(RunDir::default_path("quick start/1", now), Path::new("runs/quick-start-1-20230618-093000"));
    }
}
