//! The loop of a training stage: batches, steps, evaluations, checkpoints, and going on from them.

use std::{collections::BTreeSet, sync::Arc, time::Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{
    Best, Length, MicroBatch, PlannedTraining, Step, Task, Trainer, best::Found, failing::examine, trainer::on_device,
};
use crate::{
    components::towers::timm_config,
    data::Batch,
    error::{Error, Result},
    events::{Evaluation, Event, Mark, StepReport, StepSeconds},
    nn::Role,
    run::{Checkpoint, CheckpointHeader, Retention, STOPPED_EARLY},
    stages::{OpenData, StageRun},
    weights::{NOTED_TOWER, TRAINED_BLOCKS, TensorMap, TensorRef},
};

/// What a training loop is told besides the run.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// Training without a measurement on its way.
/// fn plain<T>(training: &PlannedTraining) -> Loop<'_, T> {
///     Loop { training, evaluation: None }
/// }
/// ```
pub struct Loop<'a, T> {
    /// Data, length and checkpoints.
    pub training: &'a PlannedTraining,
    /// What is measured after some epochs, by the name that results have it under; absent: nothing.
    pub evaluation: Option<EpochEvaluation<'a, T>>,
}

/// A measurement in the course of training.
pub struct EpochEvaluation<'a, T> {
    /// What it is called, such as `knn`; `None` where each entry of what it gives is a result with a name of its own.
    pub name: Option<&'a str>,
    /// Epochs between measurements.
    pub every: u64,
    /// By what the best state is kept and left; absent: the last is left. With it, the end of training is measured too.
    pub best: Option<Best>,
    /// Measures after so many epochs; its numbers are recorded, and kept in checkpoints. An empty object: there was nothing
    /// to measure.
    pub measure: &'a mut dyn FnMut(&mut StageRun, &mut T, u64) -> Result<Value>,
}

impl<T: Task> EpochEvaluation<'_, T> {
    /// Whether it is to measure after so many steps.
    fn is_due(&self, steps: u64, length: &Length) -> bool {
        let epochs = steps / length.steps_per_epoch;
        let ends_epoch = steps.is_multiple_of(length.steps_per_epoch);
        ends_epoch && epochs.is_multiple_of(self.every) || self.best.is_some() && steps == length.steps()
    }

    /// Measures, and keeps the state where it is the best.
    fn measure(
        &mut self,
        run: &mut StageRun,
        task: &mut T,
        trainer: &mut Trainer,
        length: &Length,
        notes: &mut Notes,
    ) -> Result<()> {
        let step = trainer.updates;
        let epochs = step / length.steps_per_epoch;
        let measured = trainer.averaged(task, |task| (self.measure)(run, task, epochs))?;
        if measured.as_object().is_some_and(Map::is_empty) {
            return Ok(());
        }
        let epoch = step as f64 / length.steps_per_epoch as f64;
        // All of it is there before the first is told of: a stop comes before all or after all.
        for (name, result) in self.named(&measured) {
            let stage = run.name.to_string();
            run.events.send(Event::Evaluated(&Evaluation { stage, step, epoch, name, result }))?;
        }
        let mut result = match step.is_multiple_of(length.steps_per_epoch) {
            true => json!({ "epoch": epochs }),
            false => json!({ "epoch": epoch }),
        };
        if let (Value::Object(result), Value::Object(measured)) = (&mut result, measured) {
            result.extend(measured);
        }
        if self.best.is_some_and(|best| best.is_better(&result, notes.best.as_ref())) {
            trainer.averaged(task, |task| {
                let header = header(run, task, step, result.clone());
                let mut tensors = Vec::new();
                task.visit(&mut |p| {
                    if p.role().is_kept() {
                        tensors.push(on_device(p.name.clone(), &p.dims, &p.value));
                    }
                });
                Ok(run.dir.save_best(&header, &tensors)?)
            })?;
            notes.best = Some(Found { step, measured: result.clone() });
        }
        notes.measured.push(result);
        Ok(())
    }

    /// Whether nothing better is waited for.
    fn is_over(&self, notes: &Notes) -> bool {
        self.best.is_some_and(|best| best.is_out_of_patience(&notes.measured, notes.best.as_ref()))
    }

    /// What was measured, by name.
    fn named(&self, measured: &Value) -> Vec<(String, Value)> {
        let each = || measured.as_object().into_iter().flatten().map(|(name, result)| (name.clone(), result.clone()));
        self.name.map_or_else(|| each().collect(), |name| vec![(name.to_owned(), measured.clone())])
    }

    /// What was measured in the course of training, by name, each with its epochs.
    fn courses(&self, measured: Vec<Value>) -> Map<String, Value> {
        let mut courses = Map::new();
        if let Some(name) = self.name {
            courses.insert(name.to_owned(), measured.into());
            return courses;
        }
        for measured in &measured {
            for (name, result) in measured.as_object().into_iter().flatten() {
                let (Value::Object(result), course) = (result, courses.entry(name.as_str())) else { continue };
                let mut row = json!({ "epoch": measured["epoch"] });
                if let Value::Object(row) = &mut row {
                    row.extend(result.clone());
                }
                if let Value::Array(course) = course.or_insert_with(|| json!([])) {
                    course.push(row);
                }
            }
        }
        courses
    }
}

/// What a checkpoint notes besides tensors, so that a resumed stage ends with the results of an uninterrupted one.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Notes {
    /// The losses of the epoch that goes on, and of the one before it.
    #[serde(default)]
    losses: Losses,
    /// What was measured after epochs, in order.
    measured: Vec<Value>,
    /// The best of it, where the best state is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    best: Option<Found>,
    /// Whether the run was stopped before what follows the checkpoint's epoch was measured.
    unmeasured: bool,
    /// Places of the images that could not be read so far.
    skipped: BTreeSet<usize>,
    /// The student, for whoever takes the checkpoint as weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tower: Option<Value>,
}

/// Losses of the steps of an epoch, as sums and counts: one batch's alone would be a matter of luck.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Losses {
    /// Of the epoch that goes on.
    now: (f64, u64),
    /// Of the one before.
    before: (f64, u64),
}

impl Losses {
    fn add(&mut self, loss: f32, step: u64, length: &Length) {
        if step.is_multiple_of(length.steps_per_epoch) {
            (self.before, self.now) = (self.now, (0.0, 0));
        }
        self.now = (self.now.0 + f64::from(loss), self.now.1 + 1);
    }

    /// The mean over the last epoch; where one goes on, over it and the one before.
    fn mean(&self, length: &Length) -> Option<f64> {
        let (sum, count) = match self.now.1 >= length.steps_per_epoch {
            true => self.now,
            false => (self.now.0 + self.before.0, self.now.1 + self.before.1),
        };
        (count > 0).then(|| sum / count as f64)
    }
}

/// The step of the best state that a checkpoint counts on: its file is beside it.
pub(crate) fn noted_best(checkpoint: &CheckpointHeader) -> Option<u64> {
    serde_json::from_value::<Notes>(checkpoint.meta.clone()).ok()?.best.map(|best| best.step)
}

/// What a training loop leaves besides the task.
pub struct Trained {
    /// Steps, epochs, the mean loss of the last epoch, what was measured and the best of it, and whether training ended early.
    pub results: Value,
}

/// Trains to the end of the stage, from its last checkpoint where there is one, or until nothing better is waited for. The
/// state at the end is saved too: what follows may be interrupted, and a run that `--steps` ended may go on.
///
/// The task then holds what the stage leaves: the best state where one is kept, else the trainer's average where it has one,
/// else what was trained.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// What runs of a planned stage that trains `task`.
/// fn run(mut run: StageRun, training: &PlannedTraining, task: &mut impl Task) -> Result<Outcome, Error> {
///     let mut trainer = training.trainer();
///     let trained = train(&mut run, task, &mut trainer, Loop { training, evaluation: None })?;
///     let student = finish(&run, task, trainer, &trained)?;
///     Ok(Outcome { results: trained.results, student: Some(student) })
/// }
/// ```
///
/// # Errors
/// Whatever ends a run early.
pub fn train<T: Task>(run: &mut StageRun, task: &mut T, trainer: &mut Trainer, plan: Loop<T>) -> Result<Trained> {
    let Loop { training, mut evaluation } = plan;
    let PlannedTraining { batch, length, checkpoints, .. } = training;
    let data = training.data.open()?;
    let retention = Retention { keep_last: checkpoints.keep_last, keep_every: checkpoints.keep_every_steps };
    let mut notes = Notes::default();
    if let Some(state) = run.replay {
        trainer.restore(run.cx, task, &state.tensors, state.header.step)?;
        return Err(Error::Replayed(Box::new(examine(run, task, trainer, training, data)?)));
    }
    let checkpoint = last_checkpoint(run)?;
    let records = checkpoint.as_ref().map_or(run.events.records(), |c| c.header.metrics_records);
    let step = checkpoint.as_ref().map_or(0, |c| c.header.step);
    run.events.rewind(Mark { records, stage: run.name, step })?;
    if let Some(checkpoint) = checkpoint {
        trainer.restore(run.cx, task, &checkpoint.tensors, checkpoint.header.step)?;
        notes = serde_json::from_value(checkpoint.header.meta).map_err(|error| {
            Error::Usage(format!("the notes in the checkpoint of step {} do not parse: {error}", trainer.updates))
        })?;
        keep_best(run, [&notes.best, &None])?;
        if std::mem::take(&mut notes.unmeasured)
            && let Some(evaluation) = &mut evaluation
        {
            evaluation.measure(run, task, trainer, length, &mut notes)?;
        }
        tracing::info!("stage `{}` goes on from step {}", run.name, trainer.updates);
    }
    notes.tower = tower_of(task);
    let start = trainer.updates;
    let mut last_saved = (start > 0).then_some(start);
    // A kill may have come between a checkpoint and the deletion of those that it replaces.
    run.dir.prune_checkpoints(run.name, retention)?;
    let end = run.step_limit.map_or(length.steps(), |limit| length.steps().min(limit));
    let loader = data.training(run.seed, batch.effective, batch.micro(), run.workers)?;
    let mut batches = loader.batches(length.position(start), Some(end.saturating_sub(start)));
    let parts = batch.effective / batch.micro();
    let groups = task.lr_groups();
    // A checkpoint is known to be good once a loss computed from it is finite.
    let mut last_good = None;
    // The best state as the last checkpoint knows it: it stays as long as the run may go on from there.
    let mut saved_best = notes.best.clone();
    let mut over = evaluation.as_ref().is_some_and(|evaluation| evaluation.is_over(&notes));
    while trainer.updates < end && !over {
        let began = Instant::now();
        let step = trainer.updates;
        let progress = trainer.progress();
        let waits = run.stop;
        let stepped = trainer.step(run.cx, task, parts, &mut || {
            let batch: Batch = waits.while_waiting(|| batches.next()).expect("batches for every step")?;
            notes.skipped.extend(&batch.unreadable);
            Ok(MicroBatch::of(batch, progress))
        });
        let forward = task.take_times();
        let Step { loss, terms, gradient_norm, lr, phases } = match stepped {
            Ok(step) => step,
            Err(Error::NonFinite { what, value, step, lr, .. }) => {
                let (first, mut help) = keep_failed(run, task, trainer, training, data, &notes)?;
                help.extend(advice(run, last_good));
                return Err(Error::NonFinite { what, value, step, lr, first, help });
            }
            Err(error) => return Err(error),
        };
        last_good = last_saved;
        notes.losses.add(loss, step, length);
        run.events.send(Event::Step(&StepReport {
            stage: run.name.to_string(),
            step,
            steps: end,
            epoch: step as f64 / length.steps_per_epoch as f64,
            loss,
            terms: terms.iter().map(|term| (term.name.clone(), term.value)).collect(),
            levels: terms
                .into_iter()
                .filter(|term| !term.levels.is_empty())
                .map(|term| (term.name, term.levels.into_iter().collect()))
                .collect(),
            lr,
            lr_groups: groups.iter().map(|(name, scale)| (name.clone(), lr * scale)).collect(),
            gradient_norm,
            seconds: StepSeconds {
                data: phases.data,
                teacher: forward.teacher,
                mask: forward.mask,
                student: (phases.forward - forward.teacher - forward.mask).max(0.0),
                backward: phases.backward,
                optimizer: phases.optimizer,
            },
            images_per_s: batch.effective as f64 / began.elapsed().as_secs_f64(),
            skipped: notes.skipped.len(),
        }))?;
        let done = trainer.updates;
        if let Some(evaluation) = evaluation.as_mut().filter(|evaluation| evaluation.is_due(done, length)) {
            match evaluation.measure(run, task, trainer, length, &mut notes) {
                Ok(()) => keep_best(run, [&notes.best, &saved_best])?,
                Err(stopped @ Error::Stopped { .. }) => {
                    notes.unmeasured = true;
                    save(run, task, trainer, &notes, retention)?;
                    return Err(stopped);
                }
                Err(error) => return Err(error),
            }
            over = evaluation.is_over(&notes);
        }
        let stop = run.stop.get();
        let is_asked_for = run.stop.take_save();
        if done == end || over || checkpoints.is_due(done, length.steps_per_epoch) || stop.is_some() || is_asked_for {
            save(run, task, trainer, &notes, retention)?;
            last_saved = Some(done);
            saved_best.clone_from(&notes.best);
            keep_best(run, [&notes.best, &None])?;
        }
        if let Some(stop) = stop {
            return Err(run.stopped(stop));
        }
    }
    run.events.sync()?;
    run.events.send(Event::Trained { stage: run.name })?;
    let epochs = trainer.updates as f64 / length.steps_per_epoch as f64;
    let mut results = serde_json::json!({ "steps": trainer.updates, "epochs": epochs });
    if let Some(loss) = notes.losses.mean(length) {
        results["loss"] = loss.into();
    }
    if let (Some(evaluation), Value::Object(results)) = (&evaluation, &mut results)
        && !notes.measured.is_empty()
    {
        results.extend(evaluation.courses(notes.measured));
    }
    trainer.leave_average(task);
    if let Some(best) = evaluation.and_then(|evaluation| evaluation.best)
        && let Some(Found { step, measured }) = notes.best
    {
        load_kept(task, &run.dir.read_best(run.name, step)?.tensors)?;
        let mut result = serde_json::json!({ "metric": best.metric.name(), "step": step });
        if let (Value::Object(result), Value::Object(measured)) = (&mut result, measured) {
            result.extend(measured);
        }
        results["best"] = result;
        if over && trainer.updates < length.steps() {
            results[STOPPED_EARLY] = true.into();
        }
    }
    Ok(Trained { results })
}

/// Deletes the best states but those that the run may still need.
fn keep_best(run: &StageRun, needed: [&Option<Found>; 2]) -> Result<()> {
    let steps = needed.map(|found| found.as_ref().map(|found| found.step));
    Ok(run.dir.prune_best(run.name, &|step| steps.contains(&Some(step)))?)
}

/// Loads every parameter that a finished stage keeps.
///
/// # Errors
/// One that is missing or has another shape.
pub(in crate::stages) fn load_kept(task: &mut dyn Task, left: &TensorMap) -> Result<()> {
    let mut loaded = Ok(());
    task.visit(&mut |p| {
        if !p.role().is_kept() || loaded.is_err() {
            return;
        }
        loaded = match left.get(&p.name).filter(|tensor| tensor.shape == p.dims) {
            Some(tensor) => p.load(&tensor.data).map_err(Error::from),
            None => Err(Error::Usage(format!("the stage has not left `{}` in the classifier's shape", p.name))),
        };
    });
    loaded
}

/// The newest checkpoint of the stage that can be read.
fn last_checkpoint(run: &StageRun) -> Result<Option<Checkpoint>> {
    let checkpoint = run.dir.latest_checkpoint(run.name)?;
    match &checkpoint {
        Some(checkpoint) if checkpoint.header.fingerprint != run.fingerprint => {
            Err(Error::Usage(format!("the checkpoints of stage `{}` are of another recipe", run.name)))
        }
        _ => Ok(checkpoint),
    }
}

/// Keeps what there is to look at of a step that is not finite, and gives where that began and how to look at it.
///
/// # Errors
/// A stop that the user asked for.
fn keep_failed(
    run: &StageRun,
    task: &mut dyn Task,
    trainer: &mut Trainer,
    training: &PlannedTraining,
    data: &OpenData,
    notes: &Notes,
) -> Result<(String, Vec<String>)> {
    let meta = serde_json::to_value(notes).expect("numbers and lists");
    let tensors = trainer.tensors(task);
    // The state comes first: a step that turns out finite the second time changes it.
    let saved = run.dir.save_failed_state(&header(run, task, trainer.updates, meta), &tensors);
    drop(tensors);
    let failed = match examine(run, task, trainer, training, data) {
        Ok(failed) => failed,
        Err(error @ Error::Stopped { .. }) => return Err(error),
        Err(error) => return Ok((format!("why is not known: {error}"), Vec::new())),
    };
    let first = match (&failed.first, failed.parameters.as_slice()) {
        _ if !failed.repeats => {
            "the same step made again is finite: this machine does not compute alike twice".to_owned()
        }
        (_, [bad, rest @ ..]) => {
            let more = if rest.is_empty() { String::new() } else { format!(" and {} parameters more", rest.len()) };
            format!("`{}`{more} was not finite before: the update before this step made it so", bad.name)
        }
        (Some(first), []) => format!("it began in {}", first.says()),
        (None, []) => "every value is finite: their sum is too large".to_owned(),
    };
    let help = match saved.and_then(|()| run.dir.save_failed(&failed)) {
        Ok(path) => {
            let (path, dir) = (path.display(), run.dir.path().display());
            vec![format!("{path} says which images and terms; `maskalign runs replay {dir}` makes the step again")]
        }
        Err(error) => {
            tracing::warn!("what failed is not kept: {error}");
            Vec::new()
        }
    };
    Ok((first, help))
}

/// Which checkpoint is the last good one, and what to try.
fn advice(run: &StageRun, last_good: Option<u64>) -> [String; 2] {
    let path = last_good.and_then(|step| run.dir.checkpoint_path(run.name, step).ok());
    let checkpoint = match path.filter(|path| path.is_file()) {
        Some(path) => format!("the last good checkpoint is {}", path.display()),
        None => "no checkpoint is good".to_string(),
    };
    let try_this = "lower `optimizer.base_lr`, lengthen `schedule.warmup_epochs` or set `optimizer.clip_norm`";
    [checkpoint, try_this.to_owned()]
}

/// Writes a checkpoint that agrees with what was recorded.
fn save(run: &mut StageRun, task: &mut dyn Task, trainer: &Trainer, notes: &Notes, retention: Retention) -> Result<()> {
    run.events.sync()?;
    let tensors = trainer.tensors(task);
    let meta = serde_json::to_value(notes).expect("numbers and lists");
    let path = run.dir.save_checkpoint(&header(run, task, trainer.updates, meta), &tensors)?;
    run.events.send(Event::Saved { path: &path })?;
    Ok(run.dir.prune_checkpoints(run.name, retention)?)
}

/// What checkpoints note of the student.
fn tower_of(task: &dyn Task) -> Option<Value> {
    let (tower, reach) = task.tower()?;
    let mut noted = timm_config(&tower);
    if reach.blocks < tower.arch.depth {
        noted[TRAINED_BLOCKS] = reach.blocks.into();
    }
    Some(noted)
}

fn header(run: &StageRun, task: &mut dyn Task, step: u64, meta: Value) -> CheckpointHeader {
    let mut student = Vec::new();
    task.visit(&mut |p| {
        if p.role() == Role::Student {
            student.push(p.name.clone());
        }
    });
    CheckpointHeader {
        stage: run.name.to_string(),
        step,
        fingerprint: run.fingerprint.to_string(),
        metrics_records: run.events.records(),
        student,
        meta,
    }
}

/// Writes what a finished training stage leaves, and gives its student's parameters by name. The trainer's state is
/// freed first, and so are the buffers of its steps: the next stage has sizes of its own.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// A stage that leaves what it trained.
/// fn run(mut run: StageRun, training: &PlannedTraining, task: &mut impl Task) -> Result<Outcome, Error> {
///     let mut trainer = training.trainer();
///     let trained = train(&mut run, task, &mut trainer, Loop { training, evaluation: None })?;
///     let student = finish(&run, task, trainer, &trained)?;
///     Ok(Outcome { results: trained.results, student: Some(student) })
/// }
/// ```
///
/// # Errors
/// A file that cannot be written.
pub fn finish(run: &StageRun, task: &mut dyn Task, trainer: Trainer, trained: &Trained) -> Result<Arc<TensorMap>> {
    let step = trainer.updates;
    drop(trainer);
    run.cx.trim();
    let mut weights = TensorMap::new();
    task.visit(&mut |p| {
        if p.role().is_kept() {
            weights.insert(p.name.clone(), p.to_host());
        }
    });
    let meta = tower_of(task).map_or(Value::Null, |tower| serde_json::json!({ NOTED_TOWER: tower }));
    let header = header(run, task, step, meta);
    run.dir.finish_stage(&header, &TensorRef::all_of(&weights), trained.results.clone())?;
    weights.retain(|name, _| header.student.contains(name));
    Ok(Arc::new(weights))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loss_of_a_stage_is_the_mean_of_its_last_epoch() {
        let length = Length::new(3.0, 12, 4);
        let mut losses = Losses::default();
        let mut after = |step: u64, loss: f32| {
            losses.add(loss, step, &length);
            losses.mean(&length)
        };
        assert_eq!(after(0, 8.0), Some(8.0));
        assert_eq!([after(1, 4.0), after(2, 0.0)], [Some(6.0), Some(4.0)]);
        assert_eq!(after(3, 2.0), Some(3.5), "the epoch before counts until this one is whole");
        assert_eq!([after(4, 1.0), after(5, 3.0)], [Some(3.0), Some(2.0)]);
        assert_eq!(Losses::default().mean(&length), None);
    }
}
