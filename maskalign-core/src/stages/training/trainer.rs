//! One optimizer step, and its state.

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
use serde::Serialize;

use super::{
    Length,
    average::{self, Average, MovingAverage},
};
use crate::{
    components::{
        optimizers::{Optimizer, Update},
        schedules::Schedule,
        towers::TowerShape,
    },
    data::Batch,
    error::{Error, Result},
    events::SavedParameter,
    nn::{BranchScales, Param, Reach},
    stages::image_batch,
    weights::{TensorData, TensorMap, TensorRef},
};

/// Where the forward pass of a step went, in seconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct ForwardTimes {
    /// Teachers and targets.
    pub teacher: f64,
    /// Drawing masks.
    pub mask: f64,
}

/// A term of a loss, for the records.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Term {
    /// What it is called: an objective's name.
    pub name: String,
    /// What it adds to the loss. The terms of a loss sum to it.
    pub value: f64,
    /// The distances that it is made of, before they are weighted, by the level that is compared; empty where there is one.
    pub levels: Vec<(usize, f64)>,
}

/// A micro-batch with what keys its random streams.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// The classes of a micro-batch, where every image has one.
/// fn classes(batch: &MicroBatch) -> Option<Vec<u32>> {
///     batch.labels.iter().copied().collect()
/// }
///
/// let images = ImageBatch { pixels: vec![0.5; 2 * 3 * 8 * 8], batch: 2, size: 8 };
/// let indices = vec![4, 9];
/// let batch = MicroBatch { images, crops: vec![], labels: vec![Some(1), None], indices, epoch: 0, progress: 0.0 };
/// assert_eq!(classes(&batch), None);
/// ```
pub struct MicroBatch {
    /// The images: of data with views, the first crop of each.
    pub images: ImageBatch,
    /// The further crops of each image, in order.
    pub crops: Vec<ImageBatch>,
    /// Classes, where the data has them.
    pub labels: Vec<Option<u32>>,
    /// Places of the images in the dataset.
    pub indices: Vec<usize>,
    /// Epoch.
    pub epoch: u64,
    /// Share of the stage that is done.
    pub progress: f64,
}

impl MicroBatch {
    /// What a loader gives, where such a share of the stage is done.
    pub(in crate::stages) fn of(mut batch: Batch, progress: f64) -> MicroBatch {
        let images = image_batch(&mut batch);
        let further = |(pixels, (size, _))| ImageBatch { pixels, batch: images.batch, size };
        let crops = std::mem::take(&mut batch.crops).into_iter().map(further).collect();
        MicroBatch { images, crops, labels: batch.labels, indices: batch.indices, epoch: batch.at.epoch, progress }
    }
}

/// What is trained: parameters, and a loss of a micro-batch.
///
/// ```
/// # use maskalign_core::{Device, prelude::*};
/// /// One number, which is to become the mean of the pixels.
/// struct Mean(Param);
///
/// impl Task for Mean {
///     fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
///         f(&mut self.0);
///     }
///
///     fn loss(&mut self, cx: &Context, tape: &mut Tape, batch: &MicroBatch) -> Result<Tensor, Error> {
///         let pixels = &batch.images.pixels;
///         let mean = cx.tensor(vec![pixels.iter().sum::<f32>() / pixels.len() as f32], 1, 1)?;
///         Ok(ops::distance(cx, tape, &self.0.value, &mean, Distance::Mse)?)
///     }
/// }
/// # let cx = Context::new(Device::Cpu, 1);
/// # let images = ImageBatch { pixels: vec![0.5; 3 * 8 * 8], batch: 1, size: 8 };
/// # let batch = MicroBatch { images, crops: vec![], labels: vec![None], indices: vec![0], epoch: 0, progress: 0.0 };
///
/// let mut task = Mean(Init::new(cx.device(), 0, "mean").constant("mean", &[1], 0.0)?);
/// assert_eq!(task.loss(&cx, &mut Tape::training(), &batch)?.value(), 0.25);
/// # Ok::<(), Error>(())
/// ```
pub trait Task {
    /// Calls `f` on every parameter; their [roles](maskalign_engine::Role) say which are updated and which are saved.
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param));
    /// The loss of a micro-batch, averaged over its images.
    ///
    /// # Errors
    /// Out of memory on the device, or data that does not fit.
    fn loss(&mut self, cx: &Context, tape: &mut Tape, batch: &MicroBatch) -> Result<Tensor>;
    /// Called after each update: for moving averages of parameters. `progress` is the update's own, the share of the stage
    /// that was done before it, in 0..1.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn after_update(&mut self, _cx: &Context, _progress: f64) -> Result<()> {
        Ok(())
    }
    /// The student that is trained, and what of it training reaches, which checkpoints note; `None` where there is none.
    fn tower(&self) -> Option<(TowerShape, Reach)> {
        None
    }
    /// Where forward passes went since this was last asked.
    fn take_times(&mut self) -> ForwardTimes {
        ForwardTimes::default()
    }
    /// The terms of the losses since this was last asked, one list for each; empty where a loss has one term without a
    /// name.
    fn take_terms(&mut self) -> Vec<Vec<Term>> {
        Vec::new()
    }
    /// What the learning rate of a parameter is multiplied by (layer decay).
    fn lr_scale(&self, _parameter: &str) -> f64 {
        1.0
    }
    /// For how many epochs of the stage a parameter stays as it began; its optimizer begins after them.
    fn held_epochs(&self, _parameter: &str) -> f64 {
        0.0
    }
    /// The groups of parameters whose learning rates differ, by name, with what theirs is multiplied by, for the records;
    /// empty where all are updated at one rate.
    fn lr_groups(&self) -> Vec<(String, f64)> {
        Vec::new()
    }
}

/// The number of values in all parameters of a task, and in those that are updated.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// What a plan tells of a task that has shapes and no values.
/// fn summarize(task: &mut dyn Task, summary: &mut StageSummary) {
///     (summary.parameters, summary.trainable) = count_parameters(task);
/// }
/// ```
pub fn count_parameters(task: &mut dyn Task) -> (usize, usize) {
    let (mut all, mut trained) = (0, 0);
    task.visit(&mut |p| {
        all += p.len();
        trained += if p.is_trained() { p.len() } else { 0 };
    });
    (all, trained)
}

/// What checkpoints hold of a task.
pub(in crate::stages) fn saved_parameters(task: &mut dyn Task) -> Vec<SavedParameter> {
    let mut all = Vec::new();
    task.visit(&mut |p| {
        if p.role().is_saved() {
            let (name, dims) = (p.name.clone(), p.dims.clone());
            all.push(SavedParameter { name, dims, role: p.role(), is_trained: p.is_trained() });
        }
    });
    all
}

/// An optimizer with its state, gradient buffers and schedule.
pub struct Trainer {
    optimizer: Arc<dyn Optimizer>,
    schedule: Arc<dyn Schedule>,
    state: BTreeMap<String, Vec<Tensor>>,
    gradients: Option<Gradients>,
    length: Length,
    peak_lr: f64,
    average: Option<Average>,
    /// Updates so far.
    pub updates: u64,
}

/// What one optimizer step answers.
#[derive(Clone, Debug)]
pub struct Step {
    /// The loss, averaged over the effective batch.
    pub loss: f32,
    /// Its terms, averaged likewise; empty where the task names none.
    pub terms: Vec<Term>,
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
    /// Waiting for images.
    pub data: f64,
    /// Forward pass: student, alignments, losses; and the teacher and the mask.
    pub forward: f64,
    /// Backward pass.
    pub backward: f64,
    /// Gradient norm and update.
    pub optimizer: f64,
}

impl Trainer {
    /// An optimizer before its first step, for `effective` images an update.
    pub fn new(optimizer: Arc<dyn Optimizer>, schedule: Arc<dyn Schedule>, effective: usize, length: Length) -> Self {
        let peak_lr = optimizer.peak_lr(effective);
        let (state, gradients, average) = (BTreeMap::new(), None, None);
        Trainer { optimizer, schedule, state, gradients, length, peak_lr, average, updates: 0 }
    }

    /// Has a moving average follow what is trained.
    #[must_use]
    pub fn with_average(self, average: Option<MovingAverage>) -> Self {
        Trainer { average: average.map(Average::new), ..self }
    }

    /// Calls `f` on the task with its average in place of what is trained, where there is one.
    ///
    /// # Errors
    /// What `f` answers.
    pub fn averaged<T: Task, R>(&mut self, task: &mut T, f: impl FnOnce(&mut T) -> Result<R>) -> Result<R> {
        let Some(average) = &mut self.average else { return f(task) };
        average.exchange(task);
        let answer = f(task);
        average.exchange(task);
        answer
    }

    /// Leaves the average in the task for good, where there is one: training is over.
    pub(super) fn leave_average(&mut self, task: &mut dyn Task) {
        if let Some(mut average) = self.average.take() {
            average.exchange(task);
        }
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
        if let Some(average) = &mut self.average {
            // A forward pass moves running statistics.
            average.begin(cx, task)?;
        }
        // Those of the last step have no room beside this one's.
        self.gradients = None;
        let mut gradients = Gradients::default();
        let (mut total, mut phases) = (0.0f64, Phases::default());
        for _ in 0..parts {
            let waited = Instant::now();
            let batch = micro_batches()?;
            phases.data += waited.elapsed().as_secs_f64();
            let started = Instant::now();
            let mut tape = Tape::onto(gradients).watched(cx.watch());
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
            phases.backward += started.elapsed().saturating_sub(forward).as_secs_f64();
        }
        let started = Instant::now();
        let gradient_norm = {
            let _span = tracing::info_span!("optimizer").entered();
            self.update(cx, task, &gradients, lr)?
        };
        if let Some(average) = &mut self.average {
            average.follow(cx, task)?;
        }
        self.gradients = Some(gradients);
        let progress = self.progress();
        self.updates += 1;
        task.after_update(cx, progress)?;
        phases.optimizer = started.elapsed().as_secs_f64();
        Ok(Step { loss: total as f32, terms: mean_terms(task.take_terms()), gradient_norm, lr, phases })
    }

    fn not_finite(&self, what: &'static str, value: f64, lr: f64) -> Error {
        Error::NonFinite { what, value, step: self.updates, lr, first: String::new(), help: Vec::new() }
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
                    parameters.push(p.value.clone());
                }
            });
            optim::square_sum(cx, &parameters, gradients)?.sqrt()
        };
        if !norm.is_finite() {
            return Err(self.not_finite("norm of the gradients", norm, lr));
        }
        let clipped = |norm: f64, limit: Option<f64>| match limit {
            // PyTorch's `clip_grad_norm_` adds 1e-6.
            Some(limit) if norm > limit => (limit / (norm + 1e-6)) as f32,
            _ => 1.0,
        };
        let gradient_scale = clipped(norm, self.optimizer.clip_norm());
        let (progress, updates, each) = (self.progress(), self.updates, self.optimizer.clip_each());
        let mut scales = BTreeMap::new();
        task.visit(&mut |p| {
            scales.insert(p.name.clone(), (0.0, 0));
        });
        for (name, (scale, held)) in &mut scales {
            *scale = task.lr_scale(name);
            *held = (task.held_epochs(name) * self.length.steps_per_epoch as f64).round() as u64;
        }
        let (optimizer, state) = (&self.optimizer, &mut self.state);
        let mut outcome = Ok(());
        task.visit(&mut |p| {
            if !p.is_trained() || outcome.is_err() {
                return;
            }
            let (scale, held) = scales[&p.name];
            outcome = (|| {
                if !state.contains_key(&p.name) {
                    let (rows, columns) = p.value.shape();
                    let zeros = || Tensor::zeros(cx.device(), rows, columns);
                    let fresh = optimizer.state_names().iter().map(|_| zeros()).collect::<Result<_, _>>()?;
                    state.insert(p.name.clone(), fresh);
                }
                if updates < held {
                    // Its state is there, so that a checkpoint has it.
                    return Ok(());
                }
                let state = state.get_mut(&p.name).expect("made above");
                let gradient_scale = match each {
                    None => gradient_scale,
                    Some(_) => {
                        let norm = optim::square_sum(cx, std::slice::from_ref(&p.value), gradients)?.sqrt();
                        clipped(norm, each)
                    }
                };
                let update = Update { lr: lr * scale, progress, step: updates + 1 - held, gradient_scale };
                optimizer.update(cx, p, gradients, state, update).map_err(Error::from)
            })();
        });
        outcome.map(|()| norm)
    }

    /// Parameters, optimizer state and average as a checkpoint holds them: `model.NAME`, `optimizer.STATE.NAME`, `ema.NAME`.
    pub(super) fn tensors(&self, task: &mut dyn Task) -> Vec<TensorRef<'static>> {
        let mut all = Vec::new();
        task.visit(&mut |p| {
            if !p.role().is_saved() {
                return;
            }
            let name = &p.name;
            let states = self.state.get(name).into_iter().flatten();
            for (kind, vector) in self.optimizer.state_names().iter().zip(states) {
                all.push(on_device(format!("optimizer.{kind}.{name}"), &p.dims, vector));
            }
            if let Some(average) = self.average.as_ref().and_then(|average| average.of(name)) {
                all.push(on_device(format!("{}{name}", average::PREFIX), &p.dims, average));
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
            _ if !p.role().is_saved() => {}
            Some(tensor) if tensor.shape == p.dims => {
                loaded = std::mem::replace(&mut loaded, Ok(())).and(p.load(&tensor.data));
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
            if updates == 0 {
                // The first update makes it.
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
        if let Some(average) = &mut self.average {
            average.restore(cx, task, tensors)?;
        }
        (self.state, self.updates, self.gradients) = (state, updates, None);
        Ok(())
    }
}

/// The means of the terms of several losses.
fn mean_terms(losses: Vec<Vec<Term>>) -> Vec<Term> {
    let share = 1.0 / losses.len() as f64;
    let mut losses = losses.into_iter();
    let mut mean = losses.next().unwrap_or_default();
    for terms in losses {
        for (mean, term) in mean.iter_mut().zip(terms) {
            mean.value += term.value;
            mean.levels.iter_mut().zip(term.levels).for_each(|((_, mean), (_, value))| *mean += value);
        }
    }
    for term in &mut mean {
        term.value *= share;
        term.levels.iter_mut().for_each(|(_, value)| *value *= share);
    }
    mean
}

/// A tensor that is copied from its device when it is written.
pub(super) fn on_device(name: String, dims: &[usize], values: &Tensor) -> TensorRef<'static> {
    let (len, values) = (dims.iter().product(), values.clone());
    TensorRef { name, shape: dims.to_vec(), data: TensorData::Device(len, Box::new(move || values.to_vec())) }
}

/// The factors of stochastic depth for a micro-batch: for each block, of each image, on each branch. Keyed by image and
/// epoch, so that no order of arrival changes them.
pub fn branch_scales(rate: f64, depth: usize, seed: u64, epoch: u64, indices: &[usize]) -> Option<BranchScales> {
    branch_scales_of(rate, depth, indices.iter().map(|&index| Stream::new(seed, DROP_PATH, epoch, index as u64)))
}

/// What the streams of [`branch_scales`] are for.
pub(in crate::stages) const DROP_PATH: &str = "drop path";

/// As [`branch_scales`], of images with these streams.
pub(in crate::stages) fn branch_scales_of(
    rate: f64,
    depth: usize,
    streams: impl Iterator<Item = Stream>,
) -> Option<BranchScales> {
    if rate == 0.0 {
        return None;
    }
    let mut scales = vec![(Vec::new(), Vec::new()); depth];
    for mut stream in streams {
        for (block, (attention, mlp)) in scales.iter_mut().enumerate() {
            let rate = rate * block as f64 / (depth - 1).max(1) as f64;
            let mut draw = || if stream.uniform() < rate { 0.0 } else { (1.0 / (1.0 - rate)) as f32 };
            attention.push(draw());
            mlp.push(draw());
        }
    }
    Some(scales.into_iter().map(|(a, m)| (a.into(), m.into())).collect())
}
