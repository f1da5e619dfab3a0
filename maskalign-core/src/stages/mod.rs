//! The steps of a recipe: each trains or evaluates, and may leave a student to later ones.

mod data;
mod finetune;
mod knn;
mod memory;
mod pretrain;
mod train;

use std::{collections::BTreeMap, path::Path};

use maskalign_engine::{Context, Recompute};
use maskalign_registry::Refusal;
use serde::Serialize;

pub use data::{Data, OpenData};
pub use finetune::Finetune;
pub use knn::Knn;
pub use pretrain::{Inspection, Pretrain, PretrainModel};
pub use train::{BatchSize, MicroBatch, Phases, Step, StepReport, Task, Trainer};

use crate::{
    components::towers::{PlanContext, StudentRecord},
    error::{Error, Result},
    plugin::kind,
    run::{RunDir, StopFlag},
};

/// What a stage is asked before the first step.
#[derive(Clone, Copy)]
pub struct StageContext<'a> {
    /// The stage's name in the recipe.
    pub name: &'a str,
    /// The recipe's seed.
    pub seed: u64,
    /// The students of earlier stages.
    pub students: &'a BTreeMap<String, StudentRecord>,
    /// Whether files may be looked at.
    pub environment: bool,
    /// Whether towers get random weights where theirs cannot be found (timings alone).
    pub random_weights: bool,
    /// Whether the flag `--recompute` holds, for the memory estimate.
    pub recompute: Recompute,
}

impl<'a> StageContext<'a> {
    /// What towers are asked, for data of the given size.
    pub fn towers(&self, data_size: usize) -> PlanContext<'a> {
        PlanContext {
            data_size,
            students: self.students,
            environment: self.environment,
            random_weights: self.random_weights,
        }
    }
}

/// What is known of a stage before its first step.
#[derive(Clone, Debug, Default, Serialize)]
pub struct StagePlan {
    /// Images of the data, where they may be looked at.
    pub images: Option<usize>,
    /// Parameters of the models: all, and those an optimizer updates.
    pub parameters: usize,
    /// Parameters that are trained.
    pub trainable: usize,
    /// Tokens of an image that the student sees, the class token included, and all it could see.
    pub tokens: Option<(usize, usize)>,
    /// Epochs.
    pub epochs: Option<f64>,
    /// Optimizer steps.
    pub steps: Option<u64>,
    /// Estimated peak memory in bytes.
    pub memory: u64,
    /// What is no mistake, but may not be meant: a sentence each.
    pub warnings: Vec<String>,
    /// The data that is read: what for, how many images, and the fingerprint of the list.
    #[serde(skip)]
    pub data: Vec<(String, usize, String)>,
    /// The student that the stage leaves, without weights.
    #[serde(skip)]
    pub student: Option<StudentRecord>,
}

/// What a running stage is given.
pub struct StageRun<'a> {
    /// The device and its operators.
    pub cx: Context,
    /// Name, seed and earlier students.
    pub stage: StageContext<'a>,
    /// Where checkpoints and metrics go.
    pub dir: &'a RunDir,
    /// Fingerprint of the recipe, written into checkpoints.
    pub fingerprint: &'a str,
    /// Set by Ctrl-C, SIGTERM and SIGHUP.
    pub stop: &'a StopFlag,
    /// Told of what happens.
    pub progress: &'a mut dyn Progress,
    /// Ends training after this many steps (`--steps`).
    pub step_limit: Option<u64>,
    /// Threads that read images; 0 reads them between steps.
    pub workers: usize,
    /// Whole lines in the metrics file so far.
    pub metric_records: u64,
}

/// What a stage leaves.
pub struct Outcome {
    /// Results for `summary.json` and the table at the end.
    pub results: serde_json::Value,
    /// The student, for later stages.
    pub student: Option<StudentRecord>,
    /// Whole lines in the metrics file.
    pub metric_records: u64,
}

/// Told of what happens in a run; the command line draws it.
pub trait Progress {
    /// A stage begins.
    fn stage(&mut self, name: &str, plan: &StagePlan);
    /// A training step is done.
    fn step(&mut self, report: &StepReport);
    /// An evaluation made progress: `done` of `all` units named `what`.
    fn count(&mut self, what: &str, done: u64, all: u64);
    /// A checkpoint was written.
    fn saved(&mut self, path: &Path);
    /// An intermediate result.
    fn result(&mut self, stage: &str, result: &serde_json::Value);
}

/// A stage.
pub trait Stage: Send + Sync {
    /// Checks all that can be known before the first step.
    ///
    /// # Errors
    /// Every option that does not fit.
    fn plan(&self, cx: &StageContext) -> Result<StagePlan, Vec<Refusal>>;
    /// Runs the stage, going on from its last checkpoint where the run directory has one.
    ///
    /// # Errors
    /// Whatever ends a run early.
    fn run(&self, run: StageRun) -> Result<Outcome>;
}

kind!(StageTag, Stage, stage);

/// Keeps the value, or notes the refusal.
fn keep<T>(refusals: &mut Vec<Refusal>, result: Result<T, Refusal>) -> Option<T> {
    result.map_err(|refusal| refusals.push(refusal)).ok()
}

/// Prefixes the path of a refusal.
fn under(error: Error, segment: &str) -> Error {
    match error {
        Error::Refused(refusal) => refusal.under(segment).into(),
        other => other,
    }
}
