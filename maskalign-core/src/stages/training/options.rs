//! The options that every training stage has, and what follows from them.

use std::sync::Arc;

use maskalign_registry::{OptimizerTag, Refusal, ScheduleTag, SharedOptions, Slot, source::number};

use super::Trainer;
use crate::{
    component,
    components::{optimizers::Optimizer, schedules::Schedule},
    data::Position,
    plugin::Build,
    stages::{Data, PlannedData, StageContext, StageSummary, keep},
};

/// What every stage that trains has: data, an optimizer, and how long and how much at a time.
///
/// ```
/// # use maskalign_core::prelude::*;
/// let recipe = serde_json::json!({
///     "epochs": 2, "batch": { "effective": 64, "micro": 16 },
///     "data": { "dataset": { "type": "sample", "split": "train" } },
///     "optimizer": { "type": "adamw", "base_lr": 0.001 }, "schedule": { "type": "cosine" },
/// });
/// let training: Training = serde_json::from_value(recipe).expect("what a recipe may say");
/// assert_eq!(training.batch.effective / training.batch.micro(), 4);
/// ```
#[component]
pub struct Training {
    /// Epochs to train for.
    #[schemars(extend("exclusiveMinimum" = 0), range(max = 1000000.0))]
    pub epochs: f64,
    /// The images.
    pub data: Data,
    /// The rule that updates parameters.
    pub optimizer: Slot<OptimizerTag>,
    /// The learning rate over time.
    pub schedule: Slot<ScheduleTag>,
    /// Images of an update.
    pub batch: BatchSize,
    /// Numbers that are computed with; only f32 for now.
    #[serde(default)]
    pub precision: Precision,
    /// When checkpoints are written and which are kept.
    #[serde(default)]
    pub checkpoints: Checkpoints,
}

impl SharedOptions for Training {
    const LAST: &'static [&'static str] = &["optimizer", "schedule", "batch", "precision", "checkpoints"];
}

impl Training {
    /// Checks the options against the data and against each other; every refusal is noted. `summary` is told of images,
    /// steps and memory. `None` where the images' size is not known, or a component was refused.
    pub fn plan(
        &self,
        cx: &StageContext,
        data_name: String,
        summary: &mut StageSummary,
        refusals: &mut Vec<Refusal>,
    ) -> Option<PlannedTraining> {
        self.plan_on(self.data.plan(cx.environment), cx, data_name, summary, refusals)
    }

    /// As [`Training::plan`], on data that the stage has planned: one that reads several views of each image.
    pub(in crate::stages) fn plan_on(
        &self,
        data: Result<PlannedData, Refusal>,
        cx: &StageContext,
        data_name: String,
        summary: &mut StageSummary,
        refusals: &mut Vec<Refusal>,
    ) -> Option<PlannedTraining> {
        keep(refusals, self.batch.check());
        keep(refusals, self.checkpoints.check());
        summary.epochs = Some(self.epochs);
        let data = keep(refusals, data.map_err(|r| r.under("data")));
        let open = data.as_ref().and_then(PlannedData::opened);
        if let Some(open) = open {
            summary.images = Some(open.images.len());
            summary.memory += open.images.resident_bytes();
            summary.warnings.extend(open.images.notes());
            summary.data.push(open.record(data_name));
            match open.training(cx.seed, self.batch.effective, self.batch.micro(), 0) {
                Ok(_) => summary.steps = Some(self.length(open.images.len()).steps()),
                // A batch that was refused would be reported twice.
                Err(refusal) if refusals.is_empty() => refusals.push(refusal),
                Err(_) => {}
            }
        }
        let length = self.length(open.map_or(self.batch.effective, |open| open.images.len()));
        let optimizer = Build::build(&self.optimizer).and_then(|o| o.check().map(|()| o));
        let optimizer = keep(refusals, optimizer.map_err(|r| r.under("optimizer")));
        // Without an optimizer the peak is not known, and nothing lies above it.
        let peak = optimizer.as_ref().map_or(f64::INFINITY, |optimizer| optimizer.peak_lr(self.batch.effective));
        let schedule = Build::build(&self.schedule).and_then(|s| s.check(length.epochs, peak).map(|()| s));
        let schedule = keep(refusals, schedule.map_err(|r| r.under("schedule")));
        if let Some(schedule) = &schedule
            && peak.is_finite()
        {
            summary.warnings.extend(late_peak(&**schedule, peak, length.epochs));
        }
        Some(PlannedTraining {
            data: data?,
            optimizer: optimizer?.into(),
            schedule: schedule?.into(),
            batch: self.batch,
            checkpoints: self.checkpoints.clone(),
            length,
        })
    }

    fn length(&self, images: usize) -> Length {
        Length::new(self.epochs, images, self.batch.effective)
    }
}

/// The largest share of training that a warm-up may take before it is taken for an oversight: papers' take a quarter at most.
const WARMUP_SHARE: f64 = 1.0 / 3.0;

/// What is said where the rate comes to its peak late, as it does where a recipe is shortened and its warm-up is not.
fn late_peak(schedule: &dyn Schedule, peak: f64, epochs: f64) -> Option<String> {
    const PLACES: u32 = 200;
    let at = |place: u32| epochs * f64::from(place) / f64::from(PLACES);
    let rates: Vec<f64> = (0..=PLACES).map(|place| schedule.rate(peak, at(place), epochs)).collect();
    let highest = rates.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let first = rates.iter().position(|rate| *rate >= highest)? as u32;
    let (share, warmup) = (f64::from(first) / f64::from(PLACES), at(first));
    (share > WARMUP_SHARE).then(|| {
        format!(
            "the learning rate comes to its peak only after about {} of {} epochs, {:.0} % of the training: where it was made \
             shorter, make the warm-up shorter too (`schedule.warmup_epochs`)",
            number((10.0 * warmup).round() / 10.0),
            number(epochs),
            100.0 * share
        )
    })
}

/// Training whose options fit.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// What a stage's summary says of its first step.
/// fn first_rate(training: &PlannedTraining) -> f64 {
///     training.trainer().lr()
/// }
/// ```
#[derive(Clone)]
pub struct PlannedTraining {
    /// The images.
    pub data: PlannedData,
    /// The rule that updates parameters.
    pub optimizer: Arc<dyn Optimizer>,
    /// The learning rate over time.
    pub schedule: Arc<dyn Schedule>,
    /// Images of an update.
    pub batch: BatchSize,
    /// When checkpoints are written and which are kept.
    pub checkpoints: Checkpoints,
    /// How long it takes; of one step an epoch where the data was not looked at.
    pub length: Length,
}

impl PlannedTraining {
    /// An optimizer before its first step.
    pub fn trainer(&self) -> Trainer {
        Trainer::new(Arc::clone(&self.optimizer), Arc::clone(&self.schedule), self.batch.effective, self.length)
    }

    /// As [`PlannedTraining::trainer`], as if the data had so many images.
    pub fn trainer_for(&self, images: usize) -> Trainer {
        let length = Length::new(self.length.epochs, images, self.batch.effective);
        PlannedTraining { length, ..self.clone() }.trainer()
    }
}

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
    /// Checkpoints at multiples of this many steps are written besides, and kept for good.
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

    /// Whether one is written after `done` steps.
    pub(super) fn is_due(&self, done: u64, steps_per_epoch: u64) -> bool {
        let epochs = self.every_epochs.unwrap_or(1.0);
        let interval = self.every_steps.unwrap_or(((epochs * steps_per_epoch as f64) as u64).max(1));
        done.is_multiple_of(interval) || self.keep_every_steps.is_some_and(|kept| done.is_multiple_of(kept))
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
