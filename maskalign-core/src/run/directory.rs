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
use super::failed::FailedStep;
use super::manifest::{Manifest, STOPPED_EARLY};
use super::metrics::{self, Marks, Metrics, MetricsMark, Salvaged, Stood, Tail};
use super::pictures::{self, PICTURES, PictureRecord};
use super::seal::{Broken, seal, unseal};
use crate::files::{
    RunError, atomic_write, create_folders, is_at, is_plain_folder, open_folder, open_plain, sync_parent,
    target_of_temporary,
};
use crate::weights::TensorRef;
use crate::weights::{Checkpoint, CheckpointHeader, Retention, Sealed};

const MARKER: &str = ".maskalign-run";
const MARKER_LINE: &str = "A MaskAlign run. The lines below name files it made besides the usual ones.\n";
/// Ends the marker of a run of which a part may be deleted. It can name no file of the run.
const REPLACED_LINE: &str = "/ is being replaced";
/// Says in the marker that a fork takes over what it goes on from, and that it has: the manifest says from where.
const FORKING_LINE: &str = "/ takes over another run";
const FORKED_LINE: &str = "/ has taken over another run";
const RECIPE: &str = "recipe.resolved.yaml";
const MANIFEST: &str = "manifest.json";
const METRICS: &str = "metrics.jsonl";
const MARKS: &str = "metrics.marks.json";
const SUMMARY: &str = "summary.json";
const CHECKPOINTS: &str = "checkpoints";
const FINAL: &str = "final.safetensors";
const DONE: &str = "done.json";
const BEST: &str = "best-";
const FAILED: &str = "failed-";
const TENSORBOARD: &str = "tensorboard";
const REPORT: &str = "report.html";
/// Behind the name of a checkpoint that cannot be gone on from.
const SET_ASIDE: &str = ".set-aside";
/// TensorBoard finds files by the middle of their names.
const EVENTS: &str = "events.out.tfevents.0.maskalign";

const RESTORE_METRICS: &str = "put back copies of `metrics.jsonl` and `metrics.marks.json`, or go on with what is valid in \
                               them with `--accept-lost-metrics`";

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
    /// Open as long as the run goes on, so that another in its place can be told from it.
    folder: Option<File>,
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

impl FinishedStage {
    /// Whether nothing is left to do of `steps` steps.
    pub fn is_complete(&self, steps: u64) -> bool {
        self.step >= steps || self.results.get(STOPPED_EARLY) == Some(&Value::Bool(true))
    }
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
    /// A directory that is neither empty nor a run's is refused in every mode, and so are links where a run has files and
    /// folders of its own. An empty one may be resumed: a run may
    /// have been killed before it wrote anything. A fork that was killed before it had taken over what it goes on from cannot
    /// be resumed, and counts as empty for a fresh run, as one that wrote nothing does: nothing was trained in it.
    pub fn create(path: impl Into<PathBuf>, mode: Mode) -> Result<RunDir, RunError> {
        let path = path.into();
        if mode == Mode::Resume && !path.is_dir() {
            return Err(RunError::NothingToResume { path });
        }
        let is_new = !path.exists();
        create_folders(&path).map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => RunError::NotAFolder { path: path.clone() },
            _ => RunError::Io { action: "create the run directory".into(), path: path.clone(), source },
        })?;
        let entries = fs::read_dir(&path).map_err(|e| RunError::reading("run directory", &path, e))?.take(2).count();
        let marked = is_plain_file(&path.join(MARKER));
        // A run that was killed before it wrote anything leaves its marker.
        let (empty, bare) = (entries == 0, marked && entries == 1);
        match mode {
            _ if empty => {}
            Mode::Fresh if bare || marked && is_half_forked(&path) => refuse_links(&path, mode)?,
            Mode::Fresh => return Err(RunError::NotEmpty { path }),
            Mode::Force | Mode::Resume if !marked => {
                return Err(RunError::NotARun { path, marker: MARKER });
            }
            Mode::Force | Mode::Resume => refuse_links(&path, mode)?,
        }
        let found = match (is_new, empty) {
            (true, _) => Found::Nothing,
            (false, true) => Found::EmptyFolder,
            (false, false) if mode == Mode::Fresh || bare => Found::EmptyFolder,
            (false, false) => Found::Run,
        };
        let folder = open_folder(&path).map_err(|source| RunError::reading("run directory", &path, source))?;
        let mut run = RunDir { folder, marker: open_marker(&path)?, path, found };
        match mode {
            Mode::Fresh if empty => {}
            Mode::Fresh | Mode::Force => run.delete_previous_run()?,
            Mode::Resume if run.is_half_replaced()? => return Err(RunError::HalfReplaced { path: run.path }),
            Mode::Resume if takes_over(&run.read_marker()?) => return Err(RunError::HalfForked { path: run.path }),
            Mode::Resume => run.delete_leftovers()?,
        }
        run.begin_marker()?;
        Ok(run)
    }

    /// A run's directory to read from: it is not locked, and nothing in it is changed.
    ///
    /// # Errors
    /// The folder is no run's; links where a run has files of its own; an earlier process began to delete it.
    pub fn look_at(path: &Path) -> Result<RunDir, RunError> {
        let marker = open_plain(&path.join(MARKER), OpenOptions::new().read(true));
        let marker = marker.map_err(|_| RunError::NotARun { path: path.to_owned(), marker: MARKER })?;
        let folder = open_folder(path).map_err(|source| RunError::reading("run directory", path, source))?;
        refuse_links(path, Mode::Resume)?;
        let mut run = RunDir { folder, marker, path: path.to_owned(), found: Found::Run };
        match run.is_half_replaced()? {
            true => Err(RunError::HalfReplaced { path: run.path }),
            false => Ok(run),
        }
    }

    /// Whether no run was there when the directory was opened.
    pub fn is_new(&self) -> bool {
        self.found != Found::Run
    }

    /// Whether another process has the lock. It is not kept, so that a run may begin.
    pub fn is_in_use(&self) -> bool {
        let in_use = matches!(self.marker.try_lock_shared(), Err(TryLockError::WouldBlock));
        let _ = self.marker.unlock();
        in_use
    }

    /// Whether a stage has left a checkpoint or its record.
    pub(crate) fn is_trained(&self) -> Result<bool, RunError> {
        for folder in self.stage_folders()? {
            if file_names(&folder)?.iter().any(|name| is_stages(name)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Checks that the path still leads to the directory that was opened. Every write asks.
    ///
    /// # Errors
    /// It was removed, renamed or replaced in the meantime.
    pub(crate) fn still_there(&self) -> Result<(), RunError> {
        let folder = self.folder.iter().map(|folder| (folder, self.path.clone()));
        for (opened, path) in folder.chain([(&self.marker, self.path.join(MARKER))]) {
            if !is_at(opened, &path).map_err(|source| RunError::reading("run directory", &path, source))? {
                return Err(RunError::Removed { path });
            }
        }
        Ok(())
    }

    /// Writes in the directory, where it is still there. What is missing of it then was taken away.
    fn writing<T>(&self, write: impl FnOnce() -> Result<T, RunError>) -> Result<T, RunError> {
        self.still_there()?;
        match write() {
            Err(RunError::Io { path, source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Err(RunError::Removed { path })
            }
            written => self.still_there().and(written),
        }
    }

    /// Checks that what stages left in the course of this run is still there.
    ///
    /// # Errors
    /// Something was removed.
    pub(crate) fn still_has<'a>(&self, stages: impl Iterator<Item = &'a String>) -> Result<(), RunError> {
        self.still_there()?;
        for stage in stages {
            let folder = self.stage_folder(stage)?;
            if let Some(name) = [DONE, FINAL].into_iter().find(|name| !is_plain_file(&folder.join(name))) {
                return Err(RunError::Removed { path: folder.join(name) });
            }
        }
        Ok(())
    }

    /// Leaves the place as it was found where nothing was trained yet: a run that is refused is no run. What an earlier
    /// run left is not touched.
    pub fn withdraw(mut self) -> Result<(), RunError> {
        if self.still_there().is_err() {
            // What is there now is not this run's.
            return Ok(());
        }
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

    /// `report.html`.
    pub fn report_path(&self) -> PathBuf {
        self.path.join(REPORT)
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
        self.still_there()?;
        self.marker
            .write_all(format!("{inside}\n").as_bytes())
            .and_then(|()| self.marker.sync_data())
            .map_err(|source| RunError::writing("list of files", &path, source))
    }

    /// Writes `recipe.resolved.yaml`.
    pub fn write_recipe(&self, text: &str) -> Result<(), RunError> {
        self.writing(|| atomic_write(&self.recipe_path(), "recipe", |file| file.write_all(text.as_bytes())))
    }

    /// Reads `recipe.resolved.yaml`; `None` if the run was killed before it was written.
    pub fn read_recipe(&self) -> Result<Option<String>, RunError> {
        read_if_there(&self.recipe_path(), "recipe")
    }

    /// Writes `manifest.json`. A fork has begun with it: it says where the run goes on from.
    pub fn write_manifest(&self, manifest: &Manifest) -> Result<(), RunError> {
        self.writing(|| write_json(&self.manifest_path(), "manifest", manifest))?;
        match is_half_forked(&self.path) {
            true => self.note_in_marker(FORKED_LINE),
            false => Ok(()),
        }
    }

    /// Notes that the directory takes over what a fork goes on from. Until the manifest is written, it is no run.
    pub(crate) fn begin_fork(&self) -> Result<(), RunError> {
        self.note_in_marker(FORKING_LINE)
    }

    /// Adds a line to the marker.
    fn note_in_marker(&self, line: &str) -> Result<(), RunError> {
        let mut marker = &self.marker;
        self.writing(|| {
            let noted = marker.write_all(format!("{line}\n").as_bytes()).and_then(|()| marker.sync_all());
            noted.map_err(|source| RunError::writing("run directory's marker", &self.path.join(MARKER), source))
        })
    }

    /// Reads `manifest.json`; `None` if the run was killed before it was written.
    pub fn read_manifest(&self) -> Result<Option<Manifest>, RunError> {
        let manifest = read_json(&self.manifest_path(), "manifest");
        manifest.map_err(|error| error.advised("put back a copy of it, or start a new run"))
    }

    /// Opens `metrics.jsonl` and keeps its first `records` records: those of the checkpoint that the run goes on from.
    ///
    /// # Errors
    /// These records are not as they were written; the file is left as it is.
    pub fn metrics(&self, records: u64) -> Result<Metrics, RunError> {
        self.still_there()?;
        let mut marks = self.marks()?;
        let metrics = Metrics::open(&self.metrics_path(), &self.mark_at(&marks, records)?, &marks);
        let metrics = metrics.map_err(|error| error.advised(RESTORE_METRICS))?;
        let known = marks.marks.len();
        marks.marks.retain(|mark| mark.records <= records);
        if marks.marks.len() < known {
            self.writing(|| write_json(&self.marks_path(), "marks", &marks))?;
        }
        Ok(metrics)
    }

    /// Notes where `metrics.jsonl` stands, before a checkpoint that counts its records is written.
    pub fn mark_metrics(&self, mark: MetricsMark) -> Result<(), RunError> {
        self.still_there()?;
        let mut marks = self.marks()?;
        if mark.records == 0 || marks.marks.last() == Some(&mark) {
            return Ok(());
        }
        marks.marks.retain(|earlier| earlier.records < mark.records);
        marks.marks.push(mark);
        self.writing(|| write_json(&self.marks_path(), "marks", &marks))
    }

    /// Checks that the first `records` records of `metrics.jsonl` are as they were written.
    pub(crate) fn check_metrics(&self, records: u64) -> Result<(), RunError> {
        let marks = self.marks()?;
        let checked = metrics::check(&self.metrics_path(), &self.mark_at(&marks, records)?, &marks);
        checked.map(drop).map_err(|error| error.advised(RESTORE_METRICS))
    }

    /// Takes over the first `records` records of another run, with the marks up to there.
    ///
    /// # Errors
    /// These records are not as they were written.
    pub(crate) fn take_metrics(&self, from: &RunDir, records: u64) -> Result<(), RunError> {
        from.check_metrics(records)?;
        if records == 0 {
            return Ok(());
        }
        let mut marks = from.marks()?;
        let length = from.mark_at(&marks, records)?.bytes;
        marks.marks.retain(|mark| mark.records <= records);
        let (source, path) = (from.metrics_path(), self.metrics_path());
        let reading = |error| RunError::reading("metrics", &source, error);
        let mut file = open_plain(&source, OpenOptions::new().read(true)).map_err(reading)?;
        self.writing(|| {
            atomic_write(&path, "metrics", |out| io::copy(&mut (&mut file).take(length), out).map(drop))?;
            write_json(&self.marks_path(), "marks", &marks)
        })
    }

    /// Keeps what is valid in `metrics.jsonl` where it is damaged before a checkpoint, and a copy of the whole. Gives the
    /// number of records that are lost; `None` where nothing is.
    pub(crate) fn salvage_metrics(&self) -> Result<Option<u64>, RunError> {
        let mut stood = Vec::new();
        for stage in self.stages()? {
            if let Some(done) = self.read_done(&stage)? {
                stood.push(Stood { records: done.metrics_records, stage: stage.clone(), step: done.step });
            }
            for (step, path) in self.checkpoints(&stage)? {
                match load(&path).and_then(|checkpoint| {
                    agrees(&path, &checkpoint.header, &stage, step)?;
                    Ok(checkpoint.header.metrics_records)
                }) {
                    Ok(records) => stood.push(Stood { records, stage: stage.clone(), step }),
                    Err(error) if error.is_lost_content() => {}
                    Err(error) => return Err(error),
                }
            }
        }
        stood.retain(|at| at.records > 0);
        // Of two at one record, the one that made steps tells which.
        stood.sort_by_key(|at| (at.records, std::cmp::Reverse(at.step)));
        stood.dedup_by_key(|at| at.records);
        if stood.iter().all(|at| self.check_metrics(at.records).is_ok()) {
            return Ok(None);
        }
        self.keep_damaged_metrics()?;
        let path = self.metrics_path();
        let Salvaged { text, marks, lost } = metrics::salvage(&path, &stood)?;
        self.writing(|| {
            atomic_write(&path, "metrics", |file| file.write_all(&text))?;
            write_json(&self.marks_path(), "marks", &marks)
        })?;
        tracing::warn!("{} was damaged: {lost} of its records are lost, and the others are kept", path.display());
        Ok(Some(lost))
    }

    fn marks_path(&self) -> PathBuf {
        self.path.join(MARKS)
    }

    fn marks(&self) -> Result<Marks, RunError> {
        let marks = read_json(&self.marks_path(), "marks");
        Ok(marks.map_err(|error| error.advised(RESTORE_METRICS))?.unwrap_or_default())
    }

    fn mark_at(&self, marks: &Marks, records: u64) -> Result<MetricsMark, RunError> {
        marks.at(records).ok_or_else(|| {
            let path = self.marks_path();
            let reason = match path.exists() {
                true => format!("it has no checksum of the first {records} records of {METRICS}"),
                false => "it is gone".into(),
            };
            RunError::damaged(&path, reason).advised(RESTORE_METRICS)
        })
    }

    /// Writes a checkpoint of `header.stage` at `header.step` and returns its path.
    pub fn save_checkpoint(&self, header: &CheckpointHeader, tensors: &[TensorRef<'_>]) -> Result<PathBuf, RunError> {
        let path = self.checkpoint_path(&header.stage, header.step)?;
        self.create_stage_folder(&header.stage)?;
        let sealed = Sealed::of(&path, "checkpoint", header, tensors)?;
        self.writing(|| sealed.write(&path, "checkpoint", tensors))?;
        Ok(path)
    }

    /// The checkpoints of a stage in ascending order of steps, whether they can be read or not.
    pub fn checkpoints(&self, stage: &str) -> Result<Vec<(u64, PathBuf)>, RunError> {
        self.steps_of(stage, "step-")
    }

    /// The files of a stage whose names are a word and a step.
    fn steps_of(&self, stage: &str, word: &str) -> Result<Vec<(u64, PathBuf)>, RunError> {
        let folder = self.stage_folder(stage)?;
        let at = |name: String| Some((step_of(&name, word)?, folder.join(&name)));
        let mut found: Vec<_> = file_names(&folder)?.into_iter().filter_map(at).collect();
        found.sort();
        Ok(found)
    }

    /// Writes the best state of `header.stage` so far, `checkpoints/STAGE/best-00001234.safetensors` after step 1234: what the
    /// stage would leave if it ended there. Returns its path.
    pub fn save_best(&self, header: &CheckpointHeader, tensors: &[TensorRef<'_>]) -> Result<PathBuf, RunError> {
        let path = self.stage_folder(&header.stage)?.join(format!("{BEST}{:08}.safetensors", header.step));
        self.create_stage_folder(&header.stage)?;
        let sealed = Sealed::of(&path, "best", header, tensors)?;
        self.writing(|| sealed.write(&path, "best", tensors))?;
        Ok(path)
    }

    /// The best state of a stage, of the step that its checkpoints note.
    ///
    /// # Errors
    /// It is gone or damaged.
    pub fn read_best(&self, stage: &str, step: u64) -> Result<Checkpoint, RunError> {
        let folder = self.stage_folder(stage)?;
        let path = folder.join(format!("{BEST}{step:08}.safetensors"));
        let read = load(&path).and_then(|best| agrees(&path, &best.header, stage, step).map(|()| best));
        let remedy = format!("put back a copy, or move {} away to train the stage again", folder.display());
        read.map_err(|error| match error {
            RunError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                RunError::damaged(&path, "the best state of the stage is gone").advised(&remedy)
            }
            error => error.advised(&remedy),
        })
    }

    /// Deletes the best states of a stage but those that are needed.
    pub fn prune_best(&self, stage: &str, is_needed: &dyn Fn(u64) -> bool) -> Result<(), RunError> {
        let found = self.bests(stage)?;
        self.still_there()?;
        found.iter().filter(|(step, _)| !is_needed(*step)).try_for_each(|(_, path)| delete(path))
    }

    /// The best states of a stage in ascending order of steps: one, and one more between two checkpoints.
    pub(super) fn bests(&self, stage: &str) -> Result<Vec<(u64, PathBuf)>, RunError> {
        self.steps_of(stage, BEST)
    }

    /// Writes the state before a step whose loss or gradient is not finite, `checkpoints/STAGE/failed-00001234.safetensors` of
    /// step 1234, in place of an earlier one of the stage. It is none to go on from.
    pub fn save_failed_state(&self, header: &CheckpointHeader, tensors: &[TensorRef<'_>]) -> Result<(), RunError> {
        self.prune_failed(&header.stage)?;
        let path = self.failed_path(&header.stage, header.step)?;
        self.create_stage_folder(&header.stage)?;
        let sealed = Sealed::of(&path, "state", header, tensors)?;
        self.writing(|| sealed.write(&path, "state", tensors))
    }

    /// Writes what is known of the step, beside its state. Returns its path.
    pub fn save_failed(&self, failed: &FailedStep) -> Result<PathBuf, RunError> {
        let path = self.failed_path(&failed.stage, failed.step)?.with_extension("json");
        self.writing(|| write_json(&path, "record of a step", failed))?;
        Ok(path)
    }

    /// The step of a stage that was kept because its loss or gradient is not finite, and the state before it.
    ///
    /// # Errors
    /// One of the two is damaged.
    pub fn failed(&self, stage: &str) -> Result<Option<(FailedStep, Checkpoint)>, RunError> {
        let Some((step, path)) = self.steps_of(stage, FAILED)?.pop() else { return Ok(None) };
        let Some(failed) = read_json(&path.with_extension("json"), "record of a step")? else { return Ok(None) };
        let state = load(&path)?;
        agrees(&path, &state.header, stage, step)?;
        Ok(Some((failed, state)))
    }

    /// Whether a stage keeps such a step.
    pub(super) fn has_failed(&self) -> Result<bool, RunError> {
        for stage in self.stages()? {
            if !self.steps_of(&stage, FAILED)?.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn failed_path(&self, stage: &str, step: u64) -> Result<PathBuf, RunError> {
        Ok(self.stage_folder(stage)?.join(format!("{FAILED}{step:08}.safetensors")))
    }

    fn prune_failed(&self, stage: &str) -> Result<(), RunError> {
        let found = self.steps_of(stage, FAILED)?;
        self.still_there()?;
        found.iter().try_for_each(|(_, path)| delete(path).and_then(|()| delete(&path.with_extension("json"))))
    }

    /// The newest checkpoint of a stage that is whole, and that `metrics.jsonl` agrees with. Others are passed over, set
    /// aside under another name, and logged.
    ///
    /// # Errors
    /// There are checkpoints, and none is whole; or one is of an earlier version, or a link.
    pub fn latest_checkpoint(&self, stage: &str) -> Result<Option<Checkpoint>, RunError> {
        let mut passed_over: Vec<(PathBuf, RunError)> = Vec::new();
        for (step, path) in self.checkpoints(stage)?.into_iter().rev() {
            match self.read_checkpoint(stage, step) {
                Ok(checkpoint) => {
                    if passed_over.iter().any(|(_, error)| error.damaged_path() == Some(&self.metrics_path())) {
                        self.keep_damaged_metrics()?;
                    }
                    for (path, error) in passed_over {
                        let aside = set_aside(&path)?;
                        let (path, aside) = (path.display(), aside.display());
                        tracing::warn!(
                            "{error}: {path} is passed over for the checkpoint before it, and is now {aside}"
                        );
                    }
                    return Ok(Some(checkpoint));
                }
                // Metrics that cannot be read at all say nothing about the checkpoint.
                Err(RunError::NotPlain { path: at, found, expected }) if at != path => {
                    return Err(RunError::NotPlain { path: at, found, expected });
                }
                Err(error) if error.is_lost_content() => passed_over.push((path, error)),
                Err(error) => return Err(error),
            }
        }
        match passed_over.into_iter().next() {
            None => Ok(None),
            Some((path, error)) => {
                let folder = path.parent().unwrap_or(&self.path).display();
                let remedy = format!(
                    "put back a copy, or move what is in {folder} away to train stage `{stage}` from its start"
                );
                let unusable = "no checkpoint of the stage can be gone on from";
                Err(match error.damaged_path() {
                    Some(damaged) if damaged == path => error.advised(unusable).advised(&remedy),
                    Some(_) => error.advised(unusable),
                    None => RunError::damaged(&path, error.to_string()).advised(unusable).advised(&remedy),
                })
            }
        }
    }

    /// Copies `metrics.jsonl` before what is wrong in it, and what is not behind that, is cut off and made again.
    fn keep_damaged_metrics(&self) -> Result<(), RunError> {
        let path = self.metrics_path();
        if path.exists() {
            let aside = free_name(&path);
            fs::copy(&path, &aside).map_err(|source| RunError::writing("copy of the metrics", &aside, source))?;
            tracing::warn!("{} is kept as {}", path.display(), aside.display());
        }
        Ok(())
    }

    /// Deletes the checkpoints of a stage that need not stay.
    pub fn prune_checkpoints(&self, stage: &str, retention: Retention) -> Result<(), RunError> {
        let checkpoints = self.checkpoints(stage)?;
        self.still_there()?;
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
        // With other kernels the stage may have come past it.
        self.prune_failed(&header.stage)?;
        let path = folder.join(FINAL);
        let sealed = Sealed::of(&path, "final", header, tensors)?;
        self.writing(|| sealed.write(&path, "final", tensors))?;
        let finished = FinishedStage {
            step: header.step,
            fingerprint: header.fingerprint.clone(),
            metrics_records: header.metrics_records,
            results,
        };
        self.writing(|| write_json(&folder.join(DONE), "done", &finished))?;
        self.add_to_summary(&header.stage, &finished.results)
    }

    /// The record of a stage that is finished and what it left, so that a resumed run skips it; `None` if it is not, or
    /// if its weights are gone or damaged.
    ///
    /// Completes `summary.json` if a kill came between the two.
    ///
    /// # Errors
    /// The record is damaged or of an earlier version; or the weights are lost and so are the checkpoints to make them from.
    pub fn finished_stage(&self, stage: &str) -> Result<Option<(FinishedStage, Checkpoint)>, RunError> {
        let folder = self.stage_folder(stage)?;
        let Some(finished) = self.read_done(stage)? else {
            return Ok(None);
        };
        let left = match self.read_final(stage, &finished) {
            Ok(left) => left,
            Err(error) if error.is_lost_content() => {
                if finished.step > 0 && self.checkpoints(stage)?.is_empty() {
                    let remedy = format!("put back a copy, or move {} away to train the stage again", folder.display());
                    let reason = format!("{error}; there is no checkpoint to make it from");
                    return Err(RunError::damaged(&folder, reason).advised(&remedy));
                }
                tracing::warn!("{error}: stage `{stage}` goes on from its last checkpoint");
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        self.add_to_summary(stage, &finished.results)?;
        Ok(Some((finished, left)))
    }

    /// `final.safetensors` of a stage, which must agree with its record.
    pub(crate) fn read_final(&self, stage: &str, finished: &FinishedStage) -> Result<Checkpoint, RunError> {
        let path = self.final_path(stage)?;
        let left = load(&path)?;
        agrees(&path, &left.header, stage, finished.step)?;
        let differs = |what| Err(RunError::damaged(&path, format!("its {what} is not the one of {DONE} beside it")));
        match &left.header {
            header if header.fingerprint != finished.fingerprint => differs("recipe"),
            header if header.metrics_records != finished.metrics_records => differs("number of records"),
            _ => Ok(left),
        }
    }

    /// A checkpoint that is whole, and that the metrics agree with.
    pub(crate) fn read_checkpoint(&self, stage: &str, step: u64) -> Result<Checkpoint, RunError> {
        let path = self.checkpoint_path(stage, step)?;
        let checkpoint = load(&path)?;
        agrees(&path, &checkpoint.header, stage, step)?;
        self.check_metrics(checkpoint.header.metrics_records)?;
        Ok(checkpoint)
    }

    /// The number of marks, the records up to the last, and what follows it.
    pub(super) fn whole_metrics(&self) -> Result<(usize, u64, Tail), RunError> {
        let marks = self.marks()?;
        let last = marks.marks.last().cloned().unwrap_or_else(MetricsMark::begin);
        let tail = metrics::check(&self.metrics_path(), &last, &marks)?;
        Ok((marks.marks.len(), last.records, tail))
    }

    /// The stages that have left something, sorted.
    pub(super) fn stages(&self) -> Result<Vec<String>, RunError> {
        let folders = self.stage_folders()?.into_iter();
        let mut names: Vec<String> =
            folders.filter_map(|folder| folder.file_name()?.to_str().map(str::to_owned)).collect();
        names.retain(|name| self.stage_folder(name).is_ok());
        names.sort();
        Ok(names)
    }

    /// `done.json` of a stage; `None` if it is not finished.
    pub(crate) fn read_done(&self, stage: &str) -> Result<Option<FinishedStage>, RunError> {
        let finished = read_json(&self.stage_folder(stage)?.join(DONE), "record of a finished stage");
        finished.map_err(|error| {
            error.advised("put back a copy, or move it away to finish the stage again from its last checkpoint")
        })
    }

    /// Whether a stage has left its record.
    pub fn is_finished(&self, stage: &str) -> Result<bool, RunError> {
        Ok(self.stage_folder(stage)?.join(DONE).is_file())
    }

    /// Writes a picture, a PNG file, in place of an earlier one of the same stage and name.
    ///
    /// # Errors
    /// Names that no file can have; a file that cannot be written; a link where the folder should be.
    pub fn write_picture(&self, record: &PictureRecord, file: &[u8]) -> Result<(), RunError> {
        self.writing(|| pictures::write(&self.path, record, file))
    }

    /// Makes a stage unfinished again, so that it goes on from its last checkpoint.
    pub fn reopen_stage(&self, stage: &str) -> Result<(), RunError> {
        let folder = self.stage_folder(stage)?;
        self.still_there()?;
        // Without its record a stage is unfinished, whatever else is there.
        delete(&folder.join(DONE))?;
        delete(&folder.join(FINAL))?;
        pictures::delete(&self.path, Some(stage))?;
        let mut summary = self.summary_or_anew()?;
        if summary.shift_remove(stage).is_some() {
            self.write_summary(&summary)?;
        }
        Ok(())
    }

    /// Deletes all that a stage made: what it began with has changed.
    pub fn discard_stage(&self, stage: &str) -> Result<(), RunError> {
        self.reopen_stage(stage)?;
        self.prune_best(stage, &|_| false)?;
        self.prune_failed(stage)?;
        self.checkpoints(stage)?.iter().try_for_each(|(_, path)| delete(path))
    }

    /// `summary.json`: each finished stage's results under its name, in the order they finished.
    pub fn read_summary(&self) -> Result<Map<String, Value>, RunError> {
        let path = self.summary_path();
        let Some(text) = read_if_there(&path, "summary")? else {
            return Ok(Map::new());
        };
        serde_json::from_str(&text).map_err(|error| RunError::damaged(&path, format!("it does not parse: {error}")))
    }

    fn add_to_summary(&self, stage: &str, results: &Value) -> Result<(), RunError> {
        let mut summary = self.summary_or_anew()?;
        if summary.get(stage) != Some(results) {
            summary.insert(stage.to_owned(), results.clone());
            self.write_summary(&summary)?;
        }
        Ok(())
    }

    /// The summary; an empty one where it is damaged: stages have their results in their own records too.
    fn summary_or_anew(&self) -> Result<Map<String, Value>, RunError> {
        match self.read_summary() {
            Err(error @ RunError::Damaged { .. }) => {
                tracing::warn!("{error}; it is made again from the stages' own records");
                Ok(Map::new())
            }
            read => read,
        }
    }

    fn write_summary(&self, summary: &Map<String, Value>) -> Result<(), RunError> {
        self.writing(|| {
            atomic_write(&self.summary_path(), "summary", |file| {
                serde_json::to_writer_pretty(&mut *file, summary)?;
                file.write_all(b"\n")
            })
        })
    }

    fn stage_folder(&self, stage: &str) -> Result<PathBuf, RunError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        if stage.is_empty() || stage.starts_with('.') || !stage.chars().all(plain) {
            return Err(RunError::Name { what: "stage", name: stage.to_owned() });
        }
        let all = self.path.join(CHECKPOINTS);
        let folder = all.join(stage);
        for own in [&all, &folder] {
            is_plain_folder(own).map_err(|error| RunError::folder(own, error))?;
        }
        Ok(folder)
    }

    fn create_stage_folder(&self, stage: &str) -> Result<PathBuf, RunError> {
        let folder = self.stage_folder(stage)?;
        self.writing(|| create_folders(&folder).map_err(|source| RunError::writing("folder", &folder, source)))?;
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

    /// Whether an earlier process began to delete the run.
    fn is_half_replaced(&mut self) -> Result<bool, RunError> {
        Ok(self.read_marker()?.lines().any(|line| line == REPLACED_LINE))
    }

    fn read_marker(&mut self) -> Result<String, RunError> {
        let mut text = String::new();
        match self.marker.rewind().and_then(|()| self.marker.read_to_string(&mut text)) {
            Ok(_) => Ok(text),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                Err(RunError::damaged(&self.path.join(MARKER), "it is not UTF-8"))
            }
            Err(source) => Err(RunError::reading("run directory's marker", &self.path.join(MARKER), source)),
        }
    }

    /// Deletes every file that a run is known to make or has noted, then the folders that are empty. What a failure leaves
    /// of it is marked as no run to go on with.
    fn delete_previous_run(&mut self) -> Result<(), RunError> {
        let path = self.path.join(MARKER);
        let writing = |source| RunError::writing("run directory's marker", &path, source);
        let recorded = self.read_marker()?;
        self.marker.write_all(format!("{REPLACED_LINE}\n").as_bytes()).map_err(writing)?;
        self.marker.sync_all().map_err(writing)?;
        self.delete_leftovers()?;
        for folder in self.stage_folders()? {
            let names = file_names(&folder)?;
            // A stage is unfinished from the first file on.
            let (records, others): (Vec<&String>, Vec<&String>) = names.iter().partition(|name| *name == DONE);
            for name in records.into_iter().chain(others) {
                if is_stages(name) || aside_of(name).is_some_and(is_stages) {
                    delete(&folder.join(name))?;
                }
            }
            // A folder that holds something else stays.
            let _ = fs::remove_dir(&folder);
        }
        let _ = fs::remove_dir(self.path.join(CHECKPOINTS));
        for name in [REPORT, SUMMARY, MARKS, METRICS, MANIFEST, RECIPE] {
            delete(&self.path.join(name))?;
        }
        for name in file_names(&self.path)?.iter().filter(|name| aside_of(name) == Some(METRICS)) {
            delete(&self.path.join(name))?;
        }
        for line in recorded.lines().skip(1).filter(|line| is_inside(line)) {
            if has_plain_folders(&self.path, line) {
                delete(&self.path.join(line))?;
            }
        }
        pictures::delete(&self.path, None)?;
        let tensorboard = self.path.join(TENSORBOARD);
        if is_folder(&tensorboard) {
            delete(&tensorboard.join(EVENTS))?;
            let _ = fs::remove_dir(&tensorboard);
        }
        self.marker.set_len(0).map_err(writing)
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
        delete_in(&self.path, &|name| [RECIPE, MANIFEST, MARKS, SUMMARY, REPORT].contains(&name))?;
        for folder in self.stage_folders()? {
            delete_in(&folder, &is_stages)?;
        }
        Ok(())
    }

    /// The folders in `checkpoints/`; links are not followed, lest files elsewhere be deleted.
    fn stage_folders(&self) -> Result<Vec<PathBuf>, RunError> {
        let folder = self.path.join(CHECKPOINTS);
        if !is_folder(&folder) {
            return Ok(Vec::new());
        }
        let entries = fs::read_dir(&folder).map_err(|e| RunError::reading("folder", &folder, e))?;
        let mut found = Vec::new();
        for entry in entries {
            let path = entry.map_err(|e| RunError::reading("folder", &folder, e))?.path();
            if is_folder(&path) {
                found.push(path);
            }
        }
        Ok(found)
    }
}

/// Whether a marker says that a fork has begun, and not that it has taken over what it goes on from.
fn takes_over(marker: &str) -> bool {
    let last = marker.lines().rfind(|line| [FORKING_LINE, FORKED_LINE].contains(line));
    last == Some(FORKING_LINE)
}

/// As [`takes_over`], of the marker in a folder.
fn is_half_forked(path: &Path) -> bool {
    fs::read_to_string(path.join(MARKER)).is_ok_and(|marker| takes_over(&marker))
}

/// Refuses links where a run has folders of its own, and files that it would read.
fn refuse_links(path: &Path, mode: Mode) -> Result<(), RunError> {
    let checkpoints = path.join(CHECKPOINTS);
    let mut files: Vec<PathBuf> = Vec::new();
    for folder in [&checkpoints, &path.join(TENSORBOARD), &path.join(PICTURES)] {
        is_plain_folder(folder).map_err(|error| RunError::folder(folder, error))?;
    }
    for name in file_names(&checkpoints)? {
        let folder = checkpoints.join(name);
        if folder.is_symlink() {
            return Err(RunError::NotPlain { path: folder, found: "a link", expected: "folder" });
        }
        if is_folder(&folder) {
            files.extend(file_names(&folder)?.iter().filter(|name| is_stages(name)).map(|name| folder.join(name)));
        }
    }
    files.extend([RECIPE, MANIFEST, METRICS, MARKS, SUMMARY].map(|name| path.join(name)));
    files.push(path.join(TENSORBOARD).join(EVENTS));
    match files.into_iter().find(|file| file.is_symlink()) {
        // To delete a link leaves what it leads to.
        Some(path) if mode == Mode::Resume => Err(RunError::NotPlain { path, found: "a link", expected: "file" }),
        _ => Ok(()),
    }
}

fn open_marker(folder: &Path) -> Result<File, RunError> {
    let path = folder.join(MARKER);
    let writing = |source| RunError::writing("run directory's marker", &path, source);
    let is_new = !path.exists();
    let marker = open_plain(&path, OpenOptions::new().create(true).read(true).append(true)).map_err(writing)?;
    if is_new {
        sync_parent(&path).map_err(writing)?;
    }
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

/// Whether a stage leaves a file of this name.
fn is_stages(name: &str) -> bool {
    let has_step = |word: &&str| step_of(name, word).is_some();
    let is_failed =
        name.strip_suffix(".json").is_some_and(|name| step_of(&format!("{name}.safetensors"), FAILED).is_some());
    name == FINAL || name == DONE || is_failed || ["step-", BEST, FAILED].iter().any(has_step)
}

/// The name of what was set aside under another, if it is one.
fn aside_of(name: &str) -> Option<&str> {
    Some(name.split_once(SET_ASIDE)?.0)
}

/// `step-00001234.safetensors` -> 1234, for the word `step-`.
fn step_of(name: &str, word: &str) -> Option<u64> {
    let digits = name.strip_prefix(word)?.strip_suffix(".safetensors")?;
    (digits.len() >= 8 && digits.bytes().all(|b| b.is_ascii_digit())).then(|| digits.parse().ok())?
}

/// Whether a folder is a run's.
pub(super) fn is_run(folder: &Path) -> bool {
    is_plain_file(&folder.join(MARKER))
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
    folders.all(|folder| is_folder(&root.join(folder)))
}

fn is_folder(path: &Path) -> bool {
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

/// Deletes a file. A folder of its name is somebody else's: it gets another name.
fn delete(path: &Path) -> Result<(), RunError> {
    if is_folder(path) {
        return set_aside(path).map(drop);
    }
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(RunError::Io { action: "delete".into(), path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

/// Writes a value with a checksum.
fn write_json(path: &Path, what: &str, value: &impl Serialize) -> Result<(), RunError> {
    let text = seal(value).map_err(|error| RunError::writing(what, path, error.into()))?;
    atomic_write(path, what, |file| file.write_all(text.as_bytes()))
}

fn read_if_there(path: &Path, what: &str) -> Result<Option<String>, RunError> {
    let mut text = String::new();
    let read = open_plain(path, OpenOptions::new().read(true)).and_then(|mut file| file.read_to_string(&mut text));
    match read {
        Ok(_) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(RunError::damaged(path, "it is not UTF-8")),
        Err(error) => Err(RunError::reading(what, path, error)),
    }
}

/// Reads a value that was written with a checksum.
fn read_json<T: for<'de> Deserialize<'de>>(path: &Path, what: &str) -> Result<Option<T>, RunError> {
    let Some(text) = read_if_there(path, what)? else {
        return Ok(None);
    };
    match unseal(&text) {
        Ok(value) => Ok(Some(value)),
        Err(Broken::Unsealed) => Err(RunError::Outdated { path: path.to_owned() }),
        Err(Broken::Damaged(reason)) => Err(RunError::damaged(path, reason)),
    }
}

/// Reads a checkpoint of a run's own.
fn load(path: &Path) -> Result<Checkpoint, RunError> {
    let file = open_plain(path, OpenOptions::new().read(true));
    Checkpoint::of(path, file.map_err(|error| RunError::reading("checkpoint", path, error))?)
}

/// Checks that a checkpoint is the one that its place says.
fn agrees(path: &Path, header: &CheckpointHeader, stage: &str, step: u64) -> Result<(), RunError> {
    if header.stage == stage && header.step == step {
        return Ok(());
    }
    let reason = format!("it is of step {} of stage `{}`, and not of its place", header.step, header.stage);
    Err(RunError::damaged(path, reason))
}

/// A name beside a file that is none of a run's, and nobody's yet.
fn free_name(path: &Path) -> PathBuf {
    let named = |end: &str| {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(SET_ASIDE);
        name.push(end);
        path.with_file_name(name)
    };
    let is_free = |path: &PathBuf| path.symlink_metadata().is_err();
    let numbered = (2..).map(|count| named(&format!("-{count}")));
    std::iter::once(named("")).chain(numbered).find(is_free).unwrap_or_else(|| named(""))
}

/// Gives what is no checkpoint to go on from another name.
fn set_aside(path: &Path) -> Result<PathBuf, RunError> {
    let aside = free_name(path);
    fs::rename(path, &aside).and_then(|()| sync_parent(&aside)).map_err(|source| RunError::Io {
        action: "set aside".into(),
        path: path.to_owned(),
        source,
    })?;
    Ok(aside)
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
            metrics_records: step.min(16),
            student: Vec::new(),
            meta: Value::Null,
        }
    }

    /// Saves a checkpoint after so many records, each of them new.
    fn save(run: &RunDir, stage: &str, step: u64) -> PathBuf {
        let records = run.marks().unwrap().marks.last().map_or(0, |mark| mark.records);
        let mut metrics = run.metrics(records).unwrap();
        for step in records..step.min(16) {
            metrics.append(&json!({ "stage": stage, "step": step, "loss": 1.0 })).unwrap();
        }
        run.mark_metrics(metrics.sync().unwrap()).unwrap();
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
        fs::write(run.report_path(), "page").unwrap();
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
        assert!(!path.join("report.html").exists());
        assert!(!path.join("export/student.safetensors").exists());
        assert_eq!(fs::read_to_string(path.join("notes.txt")).unwrap(), "mine");
        assert_eq!(fs::read_to_string(path.join("checkpoints/pretrain/copy.safetensors")).unwrap(), "mine");
        assert_eq!(fs::read_to_string(&outside).unwrap(), "keep");
        assert_eq!(fs::read_to_string(path.join(MARKER)).unwrap(), MARKER_LINE);
    }

    #[cfg(unix)]
    #[test]
    fn links_are_neither_followed_nor_deleted_through() {
        use std::os::unix::fs::symlink;
        let folder = tempfile::tempdir().unwrap();
        let elsewhere = folder.path().join("elsewhere");
        let path = folder.path().join("run");
        let contents = || {
            let names = file_names(&elsewhere).unwrap();
            names.iter().map(|name| fs::read(elsewhere.join(name)).unwrap()).collect::<Vec<_>>()
        };
        let mut run = RunDir::create(&path, Mode::Fresh).unwrap();
        run.write_recipe("seed: 1\n").unwrap();
        run.write_manifest(&Manifest::default()).unwrap();
        run.record("link/final.safetensors").unwrap();
        save(&run, "pretrain", 2);
        run.finish_stage(&header("pretrain", 2), &[], json!({})).unwrap();
        drop(run);
        fs::create_dir(path.join(TENSORBOARD)).unwrap();
        fs::write(path.join(TENSORBOARD).join(EVENTS), "events").unwrap();
        fs::create_dir(&elsewhere).unwrap();
        symlink(&elsewhere, path.join("link")).unwrap();
        let step = "checkpoints/pretrain/step-00000002.safetensors";
        let files = [RECIPE, MANIFEST, METRICS, MARKS, SUMMARY, step].map(|name| path.join(name)).into_iter();
        let folders = ["checkpoints", "checkpoints/pretrain", TENSORBOARD].map(|name| path.join(name)).into_iter();
        for (place, is_folder) in files.zip(std::iter::repeat(false)).chain(folders.zip(std::iter::repeat(true))) {
            let moved = elsewhere.join("moved");
            fs::rename(&place, &moved).unwrap();
            symlink(&moved, &place).unwrap();
            let there = if is_folder { Vec::new() } else { contents() };
            let error = RunDir::create(&path, Mode::Resume).unwrap_err();
            assert!(matches!(&error, RunError::NotPlain { path, .. } if *path == place), "{error}");
            assert!(error.is_user_mistake());
            if is_folder {
                assert!(matches!(RunDir::create(&path, Mode::Force), Err(RunError::NotPlain { .. })));
                assert!(path.join(RECIPE).exists(), "nothing is deleted before all is known");
            } else {
                assert_eq!(contents(), there);
            }
            fs::remove_file(&place).unwrap();
            fs::rename(&moved, &place).unwrap();
        }
        // A link to a file is deleted; what it leads to stays.
        fs::rename(path.join(METRICS), elsewhere.join("moved")).unwrap();
        symlink(elsewhere.join("moved"), path.join(METRICS)).unwrap();
        fs::write(elsewhere.join("final.safetensors"), "keep").unwrap();
        let there = contents();
        let run = RunDir::create(&path, Mode::Force).unwrap();
        assert_eq!(contents(), there);
        // One that appears later.
        fs::create_dir(path.join(CHECKPOINTS)).unwrap();
        symlink(&elsewhere, path.join("checkpoints/pretrain")).unwrap();
        let error = run.finish_stage(&header("pretrain", 2), &[], json!({})).unwrap_err();
        assert!(matches!(error, RunError::NotPlain { .. }), "{error}");
        let all = Retention { keep_last: 1, keep_every: None };
        assert!(run.prune_checkpoints("pretrain", all).is_err() && run.discard_stage("pretrain").is_err());
        assert_eq!(contents(), there);
    }

    /// A failure half-way, such as a folder that may not be changed.
    #[test]
    fn a_run_that_is_half_deleted_is_not_gone_on_with() {
        let folder = tempfile::tempdir().unwrap();
        let mut run = RunDir::create(folder.path(), Mode::Fresh).unwrap();
        run.write_recipe("seed: 1\n").unwrap();
        let checkpoint = save(&run, "pretrain", 2);
        run.record("export.bin").unwrap();
        fs::write(folder.path().join("export.bin"), "e").unwrap();
        // A file cannot be inside a file: this is not deleted, and not because it is gone.
        run.record("recipe.resolved.yaml/inside").unwrap();
        drop(run);
        fs::write(checkpoint.with_file_name(".final.safetensors.tmp"), "torn").unwrap();
        fs::write(folder.path().join(MARKER), format!("{MARKER_LINE}export.bin\n{REPLACED_LINE}\n")).unwrap();
        let error = RunDir::create(folder.path(), Mode::Resume).unwrap_err();
        assert!(matches!(error, RunError::HalfReplaced { .. }) && error.is_user_mistake(), "{error}");
        assert!(checkpoint.exists());
        let run = RunDir::create(folder.path(), Mode::Force).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "the marker");
        drop(run);
        RunDir::create(folder.path(), Mode::Resume).unwrap();
    }

    #[cfg(unix)]
    #[test]
    fn a_directory_that_is_removed_renamed_or_replaced_is_written_to_no_more() {
        for replaced in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let (path, moved) = (folder.path().join("run"), folder.path().join("moved"));
            let run = RunDir::create(&path, Mode::Fresh).unwrap();
            save(&run, "pretrain", 1);
            fs::rename(&path, &moved).unwrap();
            if replaced {
                drop(RunDir::create(&path, Mode::Fresh).unwrap());
            }
            let tensors = [];
            let writes: [&dyn Fn() -> Result<(), RunError>; 7] = [
                &|| run.save_checkpoint(&header("pretrain", 2), &tensors).map(drop),
                &|| run.finish_stage(&header("pretrain", 2), &tensors, json!({})),
                &|| run.write_manifest(&Manifest::default()),
                &|| run.write_recipe("seed: 1\n"),
                &|| run.metrics(0).map(drop),
                &|| run.discard_stage("pretrain"),
                &|| run.still_has(std::iter::empty()),
            ];
            for write in writes {
                let error = write().unwrap_err();
                assert!(matches!(error, RunError::Removed { .. }) && !error.is_user_mistake(), "{error}");
            }
            run.withdraw().unwrap();
            match replaced {
                true => assert_eq!(file_names(&path).unwrap().len(), 1, "the other's marker"),
                false => assert!(!path.exists()),
            }
            assert!(moved.join("checkpoints/pretrain/step-00000001.safetensors").exists());
        }
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
        let steps: Vec<u64> = run.checkpoints("pretrain").unwrap().into_iter().map(|(step, _)| step).collect();
        assert_eq!(steps, [9, 10], "it does not count among those that are kept");
    }

    /// Whatever cannot be read in the place of the newest checkpoint.
    #[test]
    fn a_newest_checkpoint_that_is_none_falls_back_to_the_one_before() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::create(folder.path(), Mode::Fresh).unwrap();
        let whole = fs::read(save(&run, "pretrain", 4)).unwrap();
        let other = fs::read(save(&run, "probe", 6)).unwrap();
        let path = run.checkpoint_path("pretrain", 6).unwrap();
        let spoil: [(&str, &dyn Fn()); 5] = [
            ("empty", &|| fs::write(&path, "").unwrap()),
            ("a folder", &|| fs::create_dir_all(path.join("inside")).unwrap()),
            ("an older one under its name", &|| fs::write(&path, &whole).unwrap()),
            ("another stage's", &|| fs::write(&path, &other).unwrap()),
            ("text", &|| fs::write(&path, "no checkpoint at all").unwrap()),
        ];
        for (what, spoil) in spoil {
            spoil();
            let checkpoint = run.latest_checkpoint("pretrain").unwrap().unwrap();
            assert_eq!(checkpoint.header, header("pretrain", 4), "{what}");
            assert!(!path.exists(), "{what}: its place is free for the one that will be made again");
        }
        fs::rename(run.checkpoint_path("pretrain", 4).unwrap(), &path).unwrap();
        let error = run.latest_checkpoint("pretrain").unwrap_err();
        let says =
            "it is of step 4 of stage `pretrain`, and not of its place; no checkpoint of the stage can be gone on";
        assert!(error.is_user_mistake() && error.to_string().contains(says), "{error}");
        assert!(path.exists());
    }

    #[test]
    fn metrics_that_a_checkpoint_does_not_agree_with_send_back_to_an_older_one_or_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::create(folder.path(), Mode::Fresh).unwrap();
        for step in [2, 4, 6] {
            save(&run, "pretrain", step);
        }
        let path = run.metrics_path();
        let whole = fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = whole.split_inclusive('\n').collect();
        let damaged = [&lines[..4], &lines[5..]].concat().concat();
        fs::write(&path, &damaged).unwrap();
        assert_eq!(run.latest_checkpoint("pretrain").unwrap().unwrap().header.step, 4);
        let kept = folder.path().join("metrics.jsonl.set-aside");
        assert_eq!(fs::read_to_string(kept).unwrap(), damaged);
        run.metrics(4).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), lines[..4].concat());

        fs::write(&path, lines[1..4].concat()).unwrap();
        let error = run.latest_checkpoint("pretrain").unwrap_err();
        assert!(error.is_user_mistake() && error.to_string().contains("metrics.jsonl is damaged"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), lines[1..4].concat());
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        let error = run.latest_checkpoint("pretrain").unwrap_err();
        assert!(matches!(&error, RunError::NotPlain { path: at, .. } if *at == path), "{error}");
        fs::remove_dir(&path).unwrap();
        fs::write(&path, lines[..4].concat()).unwrap();
        fs::remove_file(run.marks_path()).unwrap();
        let error = run.latest_checkpoint("pretrain").unwrap_err().to_string();
        assert!(error.contains("metrics.marks.json is damaged: it is gone"), "{error}");
    }

    #[test]
    fn a_record_that_is_damaged_or_of_an_earlier_version_is_answered() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::create(folder.path(), Mode::Fresh).unwrap();
        run.finish_stage(&header("pretrain", 4), &[], json!({ "loss": 0.5 })).unwrap();
        run.write_manifest(&Manifest::default()).unwrap();
        let done = folder.path().join("checkpoints/pretrain/done.json");
        for (path, read) in [
            (done, &(|| run.finished_stage("pretrain").map(drop)) as &dyn Fn() -> Result<(), RunError>),
            (run.manifest_path(), &|| run.read_manifest().map(drop)),
        ] {
            let whole = fs::read_to_string(&path).unwrap();
            read().unwrap();
            let mut entries: Map<String, Value> = serde_json::from_str(&whole).unwrap();
            entries.shift_remove("blake3");
            fs::write(&path, Value::Object(entries).to_string()).unwrap();
            assert!(matches!(read(), Err(RunError::Outdated { .. })));
            for damaged in [whole.replace('4', "5"), String::new(), whole[..whole.len() / 2].to_owned()] {
                fs::write(&path, damaged).unwrap();
                let error = read().unwrap_err();
                assert!(error.is_user_mistake() && error.to_string().contains("; put back a copy"), "{error}");
            }
            fs::write(&path, whole).unwrap();
        }
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
        let checkpoint = save(&run, "pretrain", 4);
        for damaged in [&whole[..whole.len() - 1], &flipped] {
            fs::write(&path, damaged).unwrap();
            assert_eq!(run.finished_stage("pretrain").unwrap(), None);
        }
        fs::remove_file(&path).unwrap();
        assert_eq!(run.finished_stage("pretrain").unwrap(), None);
        fs::remove_file(checkpoint).unwrap();
        let error = run.finished_stage("pretrain").unwrap_err();
        assert!(error.is_user_mistake(), "it would be trained from its start: {error}");
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
