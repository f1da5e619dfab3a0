//! What training stages share: optimizer steps, checkpoints, and the loop.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Instant,
};

use maskalign_engine::{
    Context, Gradients, ImageBatch, Tape, Tensor,
    ops::{self, optim},
    random::Stream,
};
use maskalign_registry::{OptimizerTag, Refusal, ScheduleTag, Slot};
use serde::{Deserialize, Serialize};

use super::{OpenData, StageRun, data::image_batch};
use crate::{
    bench::ForwardTimes,
    component,
    components::{
        optimizers::{Optimizer, Update},
        schedules::Schedule,
        students::StudentModel,
    },
    data::{Batch, Position},
    error::{Error, Result},
    nn::Param,
    plugin::Build,
    run::{Checkpoint, CheckpointHeader, Metrics, Retention, Stop},
    weights::{TensorData, TensorMap, TensorRef},
};

/// Images of an optimizer step.
#[component]
#[derive(Copy)]
pub struct BatchSize {
    /// Images that one update is computed from.
    #[schemars(range(min = 1, max = 1048576))]
    pub effective: usize,
    /// Images that go through the model together; effective / micro gradients are accumulated. Absent: all.
    #[serde(default)]
    #[schemars(range(min = 1, max = 1048576))]
    pub micro: Option<usize>,
}

impl BatchSize {
    /// Images that go through the model together.
    pub fn micro(&self) -> usize {
        self.micro.unwrap_or(self.effective)
    }

    /// Refuses a micro-batch that does not divide the batch.
    ///
    /// # Errors
    /// Names `batch.micro`.
    pub fn check(&self) -> Result<(), Refusal> {
        if !self.effective.is_multiple_of(self.micro()) {
            return Err(Refusal::new(
                "micro",
                format!("{} does not divide the effective batch {}", self.micro(), self.effective),
            )
            .under("batch"));
        }
        Ok(())
    }
}

/// Numbers that a stage computes with.
#[component]
#[derive(Copy, Default, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// Single precision throughout; the only one for now.
    #[default]
    F32,
}

fn keep_last() -> usize {
    2
}

/// When checkpoints are written and which are kept.
#[component]
pub struct Checkpoints {
    /// Epochs between checkpoints; absent: one epoch, or `every_steps` where that is given.
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub every_epochs: Option<f64>,
    /// Optimizer steps between checkpoints, instead of `every_epochs`.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub every_steps: Option<u64>,
    /// How many of the newest are kept.
    #[serde(default = "keep_last")]
    #[schemars(range(min = 1))]
    pub keep_last: usize,
    /// Checkpoints at multiples of this many steps are kept for good.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub keep_every_steps: Option<u64>,
}

impl Default for Checkpoints {
    fn default() -> Self {
        Checkpoints { every_epochs: None, every_steps: None, keep_last: keep_last(), keep_every_steps: None }
    }
}

impl Checkpoints {
    /// Refuses two answers to when checkpoints are written.
    ///
    /// # Errors
    /// Names `checkpoints.every_steps`.
    pub fn check(&self) -> Result<(), Refusal> {
        match (self.every_epochs, self.every_steps) {
            (Some(_), Some(_)) => {
                Err(Refusal::new("every_steps", "only one of `every_epochs` and `every_steps` may be given")
                    .related(["every_epochs"], "given here")
                    .under("checkpoints"))
            }
            _ => Ok(()),
        }
    }

    fn interval(&self, steps_per_epoch: u64) -> u64 {
        let epochs = self.every_epochs.unwrap_or(1.0);
        self.every_steps.unwrap_or(((epochs * steps_per_epoch as f64) as u64).max(1))
    }
}

/// The length of a training stage.
#[derive(Clone, Copy, Debug)]
pub struct Length {
    /// Epochs, fractional.
    pub epochs: f64,
    /// Optimizer steps of an epoch: floor(images / effective).
    pub steps_per_epoch: u64,
}

impl Length {
    /// So many epochs over `images` images, `effective` a step.
    pub fn new(epochs: f64, images: usize, effective: usize) -> Self {
        Length { epochs, steps_per_epoch: (images / effective).max(1) as u64 }
    }

    /// Optimizer steps of the stage.
    pub fn steps(&self) -> u64 {
        ((self.epochs * self.steps_per_epoch as f64).round() as u64).max(1)
    }

    /// The epoch and the step in it after so many steps.
    pub fn position(&self, steps: u64) -> Position {
        Position { epoch: steps / self.steps_per_epoch, step: steps % self.steps_per_epoch }
    }
}

/// A micro-batch with what keys its random streams.
pub struct MicroBatch {
    /// The images.
    pub images: ImageBatch,
    /// Classes, where the data has them.
    pub labels: Vec<Option<u32>>,
    /// Places of the images in the dataset.
    pub indices: Vec<usize>,
    /// Epoch.
    pub epoch: u64,
    /// Share of the stage that is done.
    pub progress: f64,
}

/// What is trained: parameters, and a loss of a micro-batch.
pub trait Task {
    /// Calls `f` on every parameter that checkpoints hold.
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param));
    /// The tower among them that later stages and exports take.
    fn student(&mut self) -> &mut dyn StudentModel;
    /// The loss of a micro-batch, averaged over its images.
    ///
    /// # Errors
    /// Out of memory on the device, or data that does not fit.
    fn loss(&mut self, cx: &Context, tape: &mut Tape, batch: &MicroBatch) -> Result<Tensor>;
    /// Where forward passes went since this was last asked.
    fn take_times(&mut self) -> ForwardTimes {
        ForwardTimes::default()
    }
    /// What the learning rate of a parameter is multiplied by (layer decay).
    fn lr_scale(&self, _parameter: &str) -> f64 {
        1.0
    }
}

/// One optimizer step, as metrics and progress bars show it.
#[derive(Clone, Debug, Serialize)]
pub struct StepReport {
    /// The stage.
    pub stage: String,
    /// The step, from 0.
    pub step: u64,
    /// Steps of the stage.
    #[serde(skip)]
    pub steps: u64,
    /// The fractional epoch at which the step began.
    pub epoch: f64,
    /// The loss, averaged over the effective batch.
    pub loss: f32,
    /// The learning rate.
    pub lr: f64,
    /// Norm of all gradients together, before clipping.
    pub gradient_norm: f64,
    /// Images of the effective batch per second.
    pub images_per_s: f64,
    /// Images that could not be read so far, where they are skipped.
    pub skipped: usize,
}

/// An optimizer with its state, gradient buffers and schedule.
pub struct Trainer {
    optimizer: Box<dyn Optimizer>,
    schedule: Box<dyn Schedule>,
    state: BTreeMap<String, Vec<Tensor>>,
    gradients: Option<Gradients>,
    length: Length,
    peak_lr: f64,
    /// Updates so far.
    pub updates: u64,
}

/// What one optimizer step answers.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// The loss, averaged over the effective batch.
    pub loss: f32,
    /// Norm of all gradients together, before clipping.
    pub gradient_norm: f64,
    /// The learning rate.
    pub lr: f64,
    /// Where the time went.
    pub phases: Phases,
}

/// Time spent in the phases of a step, in seconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Phases {
    /// Forward pass: student, alignments, losses; and the teacher and the mask.
    pub forward: f64,
    /// Backward pass.
    pub backward: f64,
    /// Gradient norm and update.
    pub optimizer: f64,
}

impl Trainer {
    /// An optimizer before its first step.
    ///
    /// # Errors
    /// A component refuses its options.
    pub fn new(
        optimizer: &Slot<OptimizerTag>,
        schedule: &Slot<ScheduleTag>,
        effective: usize,
        length: Length,
    ) -> Result<Self, Refusal> {
        let optimizer = Build::build(optimizer).map_err(|r| r.under("optimizer"))?;
        let schedule = Build::build(schedule).map_err(|r| r.under("schedule"))?;
        optimizer.check().map_err(|r| r.under("optimizer"))?;
        schedule.check(length.epochs).map_err(|r| r.under("schedule"))?;
        let peak_lr = optimizer.peak_lr(effective);
        Ok(Trainer { optimizer, schedule, state: BTreeMap::new(), gradients: None, length, peak_lr, updates: 0 })
    }

    /// The learning rate of the next step.
    pub fn lr(&self) -> f64 {
        self.schedule.rate(self.peak_lr, self.updates as f64 / self.length.steps_per_epoch as f64, self.length.epochs)
    }

    /// Share of the stage that is done.
    pub fn progress(&self) -> f64 {
        (self.updates as f64 / self.length.steps() as f64).min(1.0)
    }

    /// One optimizer step over `parts` micro-batches, which must be all of an effective batch.
    ///
    /// # Errors
    /// What the micro-batches and the task answer; a loss or a gradient that is not finite (nothing is updated then).
    pub fn step(
        &mut self,
        cx: &Context,
        task: &mut dyn Task,
        parts: usize,
        micro_batches: &mut dyn FnMut() -> Result<MicroBatch>,
    ) -> Result<Step> {
        self.step_at(cx, task, parts, micro_batches, self.lr())
    }

    /// As [`Trainer::step`], at a given learning rate.
    ///
    /// # Errors
    /// As there.
    pub fn step_at(
        &mut self,
        cx: &Context,
        task: &mut dyn Task,
        parts: usize,
        micro_batches: &mut dyn FnMut() -> Result<MicroBatch>,
        lr: f64,
    ) -> Result<Step> {
        let mut gradients = Gradients::default();
        let (mut total, mut phases) = (0.0f64, Phases::default());
        for _ in 0..parts {
            let batch = micro_batches()?;
            let started = Instant::now();
            let mut tape = Tape::onto(gradients);
            let loss = task.loss(cx, &mut tape, &batch)?;
            let value = loss.value();
            if !value.is_finite() {
                return Err(self.not_finite("loss", f64::from(value), lr));
            }
            total += f64::from(value) / parts as f64;
            let share = 1.0 / parts as f32;
            let loss = match parts {
                1 => loss,
                _ => ops::scale(cx, &mut tape, &loss, share)?,
            };
            let forward = started.elapsed();
            gradients = {
                let _span = tracing::info_span!("backward").entered();
                tape.backward(&loss)?
            };
            phases.forward += forward.as_secs_f64();
            phases.backward += (started.elapsed() - forward).as_secs_f64();
        }
        let started = Instant::now();
        let gradient_norm = {
            let _span = tracing::info_span!("optimizer").entered();
            self.update(cx, task, &gradients, lr)?
        };
        self.gradients = Some(gradients);
        self.updates += 1;
        phases.optimizer = started.elapsed().as_secs_f64();
        Ok(Step { loss: total as f32, gradient_norm, lr, phases })
    }

    fn not_finite(&self, what: &'static str, value: f64, lr: f64) -> Error {
        Error::NonFinite { what, value, step: self.updates, lr, advice: String::new() }
    }

    /// The gradients of the last step, before clipping.
    pub fn gradients(&self) -> Option<&Gradients> {
        self.gradients.as_ref()
    }

    fn update(&mut self, cx: &Context, task: &mut dyn Task, gradients: &Gradients, lr: f64) -> Result<f64> {
        let norm = {
            let mut parameters = Vec::new();
            task.visit(&mut |p| {
                if p.is_trained() {
                    parameters.push(p.value.clone())
                }
            });
            optim::square_sum(cx, &parameters, gradients)?.sqrt()
        };
        if !norm.is_finite() {
            return Err(self.not_finite("norm of the gradients", norm, lr));
        }
        let gradient_scale = match self.optimizer.clip_norm() {
            // PyTorch's `clip_grad_norm_` adds 1e-6.
            Some(limit) if norm > limit => (limit / (norm + 1e-6)) as f32,
            _ => 1.0,
        };
        let (progress, step) = (self.progress(), self.updates + 1);
        let mut scales = BTreeMap::new();
        task.visit(&mut |p| {
            scales.insert(p.name.clone(), 0.0);
        });
        for (name, scale) in &mut scales {
            *scale = task.lr_scale(name);
        }
        let (optimizer, state) = (&self.optimizer, &mut self.state);
        let mut outcome = Ok(());
        task.visit(&mut |p| {
            if !p.is_trained() || outcome.is_err() {
                return;
            }
            outcome = (|| {
                if !state.contains_key(&p.name) {
                    let (rows, columns) = p.value.shape();
                    let zeros = || Tensor::zeros(cx.device(), rows, columns);
                    let fresh = optimizer.state_names().iter().map(|_| zeros()).collect::<Result<_, _>>()?;
                    state.insert(p.name.clone(), fresh);
                }
                let state = state.get_mut(&p.name).expect("made above");
                let update = Update { lr: lr * scales[&p.name], progress, step, gradient_scale };
                optimizer.update(cx, p, gradients, state, update).map_err(Error::from)
            })();
        });
        outcome.map(|()| norm)
    }

    /// Parameters and optimizer state as a checkpoint holds them: `model.NAME`, `optimizer.STATE.NAME`.
    fn tensors(&self, task: &mut dyn Task) -> Vec<TensorRef<'static>> {
        let mut all = Vec::new();
        task.visit(&mut |p| {
            let name = &p.name;
            let states = self.state.get(name).into_iter().flatten();
            for (kind, vector) in self.optimizer.state_names().iter().zip(states) {
                all.push(on_device(format!("optimizer.{kind}.{name}"), &p.dims, vector));
            }
            all.push(on_device(format!("model.{name}"), &p.dims, &p.value));
        });
        all
    }

    /// Takes up the state of a checkpoint.
    ///
    /// # Errors
    /// Tensors that are missing or do not fit (a checkpoint of another recipe); out of memory on the device.
    pub fn restore(&mut self, cx: &Context, task: &mut dyn Task, tensors: &TensorMap, updates: u64) -> Result<()> {
        let (mut missing, mut loaded) = (BTreeSet::new(), Ok(()));
        task.visit(&mut |p| match tensors.get(&format!("model.{}", p.name)) {
            Some(tensor) if tensor.shape == p.dims => {
                loaded = std::mem::replace(&mut loaded, Ok(())).and(p.load(&tensor.data))
            }
            _ => {
                missing.insert(p.name.clone());
            }
        });
        if let Some(name) = missing.first() {
            return Err(Error::Usage(format!(
                "the checkpoint has no `{name}` of the model's shape: it is of another recipe"
            )));
        }
        loaded?;
        let mut state = BTreeMap::new();
        let mut outcome = Ok(());
        let names = self.optimizer.state_names();
        task.visit(&mut |p| {
            if !p.is_trained() || outcome.is_err() {
                return;
            }
            let vectors = names.iter().map(|kind| {
                let name = format!("optimizer.{kind}.{}", p.name);
                let tensor = tensors.get(&name).filter(|tensor| tensor.shape == p.dims).ok_or_else(|| {
                    Error::Usage(format!(
                        "the checkpoint has no `{name}` of that parameter's shape: it is of another recipe"
                    ))
                })?;
                let (rows, columns) = p.value.shape();
                Ok(cx.tensor(tensor.data.clone(), rows, columns)?)
            });
            match vectors.collect::<Result<Vec<Tensor>>>() {
                Ok(vectors) => {
                    state.insert(p.name.clone(), vectors);
                }
                Err(error) => outcome = Err(error),
            }
        });
        outcome?;
        (self.state, self.updates, self.gradients) = (state, updates, None);
        Ok(())
    }
}

/// What a training loop is told besides the run.
pub(crate) struct Loop<'a, T> {
    pub data: &'a OpenData,
    pub batch: BatchSize,
    pub length: Length,
    pub checkpoints: &'a Checkpoints,
    /// Called after every epoch's last step, with the number of epochs done. What it measures is kept in checkpoints.
    pub after_epoch: &'a mut dyn FnMut(&mut StageRun, &mut T, u64) -> Result<Option<serde_json::Value>>,
}

/// What a checkpoint notes besides tensors, so that a resumed stage ends with the results of an uninterrupted one.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Notes {
    /// The loss of the last step.
    loss: Option<f32>,
    /// What was measured after epochs, in order.
    measured: Vec<serde_json::Value>,
    /// Whether the run was stopped before what follows the checkpoint's epoch was measured.
    unmeasured: bool,
    /// Places of the images that could not be read so far.
    skipped: BTreeSet<usize>,
}

/// What a training loop leaves besides the task.
pub(crate) struct Trained {
    /// Whole lines in the metrics file.
    pub metric_records: u64,
    /// Steps, epochs, the last loss, and what was measured.
    pub results: serde_json::Value,
}

/// Trains to the end of the stage, from its last checkpoint where there is one. The state at the end is saved too: what
/// follows may be interrupted, and a run that `--steps` ended may go on.
pub(crate) fn train<T: Task>(
    run: &mut StageRun,
    task: &mut T,
    trainer: &mut Trainer,
    plan: Loop<T>,
) -> Result<Trained> {
    let Loop { data, batch, length, checkpoints, after_epoch } = plan;
    let mut notes = Notes::default();
    let mut records = run.metric_records;
    if let Some(checkpoint) = last_checkpoint(run)? {
        trainer.restore(&run.cx, task, &checkpoint.tensors, checkpoint.header.step)?;
        records = checkpoint.header.metrics_records;
        notes = serde_json::from_value(checkpoint.header.meta).map_err(|error| {
            Error::Usage(format!("the notes in the checkpoint of step {} do not parse: {error}", trainer.updates))
        })?;
        if std::mem::take(&mut notes.unmeasured) {
            notes.measured.extend(after_epoch(run, task, trainer.updates / length.steps_per_epoch)?);
        }
        tracing::info!("stage `{}` goes on from step {}", run.stage.name, trainer.updates);
    }
    let start = trainer.updates;
    let mut saver = Saver {
        metrics: run.dir.metrics(records)?,
        retention: Retention { keep_last: checkpoints.keep_last, keep_every: checkpoints.keep_every_steps },
        last: (start > 0).then_some(start),
    };
    // A kill may have come between a checkpoint and the deletion of those that it replaces.
    run.dir.prune_checkpoints(run.stage.name, saver.retention)?;
    let end = run.step_limit.map_or(length.steps(), |limit| length.steps().min(limit));
    let loader = data.training(run.stage.seed, batch.effective, batch.micro(), run.workers)?;
    let mut batches = loader.batches(length.position(start), Some(end.saturating_sub(start)));
    let parts = batch.effective / batch.micro();
    let interval = checkpoints.interval(length.steps_per_epoch);
    // A checkpoint is known to be good once a loss computed from it is finite.
    let mut last_good = None;
    while trainer.updates < end {
        let began = Instant::now();
        let step = trainer.updates;
        let progress = trainer.progress();
        let stepped = trainer.step(&run.cx, task, parts, &mut || {
            let mut batch: Batch = batches.next().expect("batches for every step")?;
            notes.skipped.extend(&batch.unreadable);
            Ok(MicroBatch {
                images: image_batch(&mut batch),
                labels: batch.labels,
                indices: batch.indices,
                epoch: batch.at.epoch,
                progress,
            })
        });
        let Step { loss, gradient_norm, lr, .. } = stepped.map_err(|error| advised(error, run, last_good))?;
        last_good = saver.last;
        notes.loss = Some(loss);
        let report = StepReport {
            stage: run.stage.name.to_string(),
            step,
            steps: end,
            epoch: step as f64 / length.steps_per_epoch as f64,
            loss,
            lr,
            gradient_norm,
            images_per_s: batch.effective as f64 / began.elapsed().as_secs_f64(),
            skipped: notes.skipped.len(),
        };
        saver.metrics.append(&report)?;
        run.progress.step(&report);
        let done = trainer.updates;
        if done.is_multiple_of(length.steps_per_epoch) {
            match after_epoch(run, task, done / length.steps_per_epoch) {
                Ok(result) => notes.measured.extend(result),
                Err(stopped @ Error::Stopped { .. }) => {
                    notes.unmeasured = true;
                    saver.save(run, task, trainer, &notes)?;
                    return Err(stopped);
                }
                Err(error) => return Err(error),
            }
        }
        let stop = run.stop.get();
        if done == end || done.is_multiple_of(interval) || stop.is_some() {
            saver.save(run, task, trainer, &notes)?;
        }
        if let Some(stop) = stop {
            return Err(stopped(run, stop));
        }
    }
    saver.metrics.sync()?;
    let epochs = trainer.updates as f64 / length.steps_per_epoch as f64;
    let mut results = serde_json::json!({ "steps": trainer.updates, "epochs": epochs });
    if let Some(loss) = notes.loss {
        results["loss"] = loss.into();
    }
    if !notes.measured.is_empty() {
        results["knn"] = notes.measured.into();
    }
    Ok(Trained { metric_records: saver.metrics.records(), results })
}

/// The newest checkpoint of the stage that can be read.
fn last_checkpoint(run: &StageRun) -> Result<Option<Checkpoint>> {
    let name = run.stage.name;
    let checkpoint = run.dir.latest_checkpoint(name)?;
    match &checkpoint {
        Some(checkpoint) if checkpoint.header.fingerprint != run.fingerprint => {
            Err(Error::Usage(format!("the checkpoints of stage `{name}` are of another recipe")))
        }
        _ => Ok(checkpoint),
    }
}

/// The end of a run that the user asked for.
pub(crate) fn stopped(run: &StageRun, stop: Stop) -> Error {
    Error::Stopped { signal: stop.name(), code: stop.exit_code(), dir: run.dir.path().display().to_string() }
}

/// Adds to a loss or a gradient that is not finite which checkpoint is the last good one, and what to try.
fn advised(error: Error, run: &StageRun, last_good: Option<u64>) -> Error {
    let Error::NonFinite { what, value, step, lr, .. } = error else { return error };
    let path = last_good.and_then(|step| run.dir.checkpoint_path(run.stage.name, step).ok());
    let checkpoint = match path.filter(|path| path.is_file()) {
        Some(path) => format!("the last good checkpoint is {}", path.display()),
        None => "no checkpoint is good".to_string(),
    };
    let try_this = "lower `optimizer.base_lr`, lengthen `schedule.warmup_epochs` or set `optimizer.clip_norm`";
    Error::NonFinite { what, value, step, lr, advice: format!("{checkpoint}; {try_this}") }
}

/// Writes metrics, and checkpoints that agree with them.
struct Saver {
    metrics: Metrics,
    retention: Retention,
    /// The step of the newest checkpoint.
    last: Option<u64>,
}

impl Saver {
    fn save(&mut self, run: &mut StageRun, task: &mut dyn Task, trainer: &Trainer, notes: &Notes) -> Result<()> {
        self.metrics.sync()?;
        let tensors = trainer.tensors(task);
        let meta = serde_json::to_value(notes).expect("numbers and lists");
        let path =
            run.dir.save_checkpoint(&header(run, task, trainer.updates, self.metrics.records(), meta), &tensors)?;
        run.progress.saved(&path);
        run.dir.prune_checkpoints(run.stage.name, self.retention)?;
        self.last = Some(trainer.updates);
        Ok(())
    }
}

fn header(
    run: &StageRun,
    task: &mut dyn Task,
    step: u64,
    metrics_records: u64,
    meta: serde_json::Value,
) -> CheckpointHeader {
    CheckpointHeader {
        stage: run.stage.name.to_string(),
        step,
        fingerprint: run.fingerprint.to_string(),
        metrics_records,
        student: task.student().shapes().into_iter().map(|(name, _)| name).collect(),
        meta,
    }
}

/// Writes what a finished training stage leaves, and gives its student's parameters by name. The trainer's state is
/// freed first, and so are the buffers of its steps: the next stage has sizes of its own.
pub(crate) fn finish(
    run: &StageRun,
    task: &mut dyn Task,
    trainer: Trainer,
    trained: &Trained,
) -> Result<Arc<TensorMap>> {
    let step = trainer.updates;
    drop(trainer);
    run.cx.trim();
    let mut weights = TensorMap::new();
    task.visit(&mut |p| {
        weights.insert(p.name.clone(), p.to_host());
    });
    let header = header(run, task, step, trained.metric_records, serde_json::Value::Null);
    run.dir.finish_stage(&header, &TensorRef::all_of(&weights), trained.results.clone())?;
    weights.retain(|name, _| header.student.contains(name));
    Ok(Arc::new(weights))
}

/// A tensor that is copied from its device when it is written.
fn on_device(name: String, dims: &[usize], values: &Tensor) -> TensorRef<'static> {
    let (len, values) = (dims.iter().product(), values.clone());
    TensorRef { name, shape: dims.to_vec(), data: TensorData::Device(len, Box::new(move || values.to_vec())) }
}

/// The factors of stochastic depth for a micro-batch: for each block, of each image, on each branch. Keyed by image and
/// epoch, so that no order of arrival changes them.
pub(crate) fn branch_scales(
    rate: f64,
    depth: usize,
    seed: u64,
    epoch: u64,
    indices: &[usize],
) -> Option<crate::nn::BranchScales> {
    if rate == 0.0 {
        return None;
    }
    let mut scales = vec![(Vec::new(), Vec::new()); depth];
    for &index in indices {
        let mut stream = Stream::new(seed, "drop path", epoch, index as u64);
        for (block, (attention, mlp)) in scales.iter_mut().enumerate() {
            let rate = rate * block as f64 / (depth - 1).max(1) as f64;
            let mut draw = || if stream.uniform() < rate { 0.0 } else { (1.0 / (1.0 - rate)) as f32 };
            attention.push(draw());
            mlp.push(draw());
        }
    }
    Some(scales.into_iter().map(|(a, m)| (a.into(), m.into())).collect())
}
