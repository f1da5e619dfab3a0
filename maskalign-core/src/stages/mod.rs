//! The steps of a recipe: each trains or evaluates, and may leave a student to later ones.
//!
//! A stage is composed of `training` (the options and the loop of everything that trains), `supervised` (labels, classes,
//! accuracy), `features` (what evaluations of frozen towers read), `measured` (which towers), `neighbours` (the nearest of features) and
//! the run's [events](crate::events); its own file holds what is its own. [`Stage::plan`] turns options into a [`PlannedStage`], which is what runs.

mod classifiers;
mod data;
mod eigenvalues;
mod evaluate;
mod features;
mod few_shot;
mod finetune;
mod knn;
mod linear_probe;
mod logistic;
mod measured;
mod memory;
mod neighbours;
mod outline;
mod pictures;
mod pretrain;
mod probe_sweep;
mod quality;
mod retrieval;
mod supervised;
mod training;

use std::{collections::BTreeMap, sync::Arc};

use maskalign_engine::{Context, Recompute};
use maskalign_registry::{Kind, Refusal};

pub use data::{Data, ImageView, OpenData, PlannedData, image_batch};
pub use evaluate::Evaluate;
pub use features::{Bank, FeatureTap, Pooling, Tower, View, centre_and_scale, extract, scale_to_length_1};
pub use few_shot::FewShot;
pub use finetune::{Classifier, Finetune, PlannedFinetune};
pub use knn::Knn;
pub use linear_probe::{LinearProbe, PlannedLinearProbe, Probe};
pub use memory::TrainingStep;
pub use neighbours::nearest_others;
pub use outline::{OutlineLine, outline};
pub use pretrain::{Objective, PlannedObjective, PlannedPretrain, Pretrain, PretrainModel};
pub use quality::Quality;
pub use retrieval::Retrieval;
pub use supervised::{
    Classify, Kept, Labelled, PlannedClasses, PlannedClassifier, PlannedSupervised, accuracy, class_targets,
    largest_label,
};
pub(crate) use training::noted_best;
pub use training::{
    BatchSize, Best, Checkpoints, EpochEvaluation, EvalMetric, ForwardTimes, Length, Loop, MicroBatch, MovingAverage,
    Phases, PlannedTraining, Precision, Step, Task, Term, Trained, Trainer, Training, branch_scales, count_parameters,
    finish, train,
};

pub use crate::events::StageSummary;
use crate::{
    components::{
        students::StudentModel,
        towers::{Environment, MissingWeights, PlanContext, StudentPlan, TrainedStudents},
    },
    error::{Error, Result},
    events::Events,
    run::{Checkpoint, RunDir, Stop, StopFlag},
    weights::TensorMap,
};

/// What a stage is asked before the first step.
///
/// ```
/// # use maskalign_core::prelude::*;
/// let (students, classifiers) = Default::default();
/// let cx = StageContext {
///     name: "probe",
///     seed: 0,
///     students: &students,
///     classifiers: &classifiers,
///     environment: Environment::Ignored,
///     missing_weights: MissingWeights::Refused,
///     recompute: Recompute::Never,
/// };
/// assert_eq!(cx.towers(224).data_size, 224);
/// ```
#[derive(Clone, Copy)]
pub struct StageContext<'a> {
    /// The stage's name in the recipe.
    pub name: &'a str,
    /// The recipe's seed.
    pub seed: u64,
    /// The students of earlier stages.
    pub students: &'a BTreeMap<String, StudentPlan>,
    /// The classifiers of earlier stages.
    pub classifiers: &'a BTreeMap<String, Arc<dyn PlannedClassifier>>,
    /// Whether files are looked at.
    pub environment: Environment,
    /// What becomes of a tower whose weights cannot be found.
    pub missing_weights: MissingWeights,
    /// What is kept for the backward pass, for the memory estimate.
    pub recompute: Recompute,
}

impl<'a> StageContext<'a> {
    /// What towers are asked, for data of the given size.
    pub fn towers(&self, data_size: usize) -> PlanContext<'a> {
        PlanContext {
            data_size,
            students: self.students,
            student: None,
            environment: self.environment,
            missing_weights: self.missing_weights,
        }
    }

    /// The classifier of an earlier stage.
    ///
    /// # Errors
    /// There is none of that name; the known ones are listed.
    pub fn classifier(&self, stage: &str) -> Result<&'a Arc<dyn PlannedClassifier>, Refusal> {
        self.classifiers.get(stage).ok_or_else(|| {
            let known: Vec<&str> = self.classifiers.keys().map(String::as_str).collect();
            let refusal = Refusal::new("stage", format!("no earlier stage `{stage}` leaves a classifier"))
                .unresolved(Kind::Stage, stage);
            match known.is_empty() {
                true => refusal.help("no earlier stage trains one: `finetune` and `linear_probe` do"),
                false => refusal.help(format!("earlier stages with a classifier: {}", known.join(", "))),
            }
        })
    }
}

/// What a running stage is given.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// A stage's own work, which ends where the user asks for it.
/// fn work(run: &mut StageRun, all: u64) -> Result<(), Error> {
///     for done in 0..all {
///         run.check_stop()?;
///         run.events.send(Event::Progress { what: "images", done, all })?;
///     }
///     Ok(())
/// }
/// ```
pub struct StageRun<'a, 'e> {
    /// The device and its operators.
    pub cx: &'a Context,
    /// The stage's name in the recipe.
    pub name: &'a str,
    /// The recipe's seed.
    pub seed: u64,
    /// What earlier stages have left.
    pub trained: &'a TrainedStudents,
    /// Where checkpoints go.
    pub dir: &'a RunDir,
    /// Fingerprint of the recipe, written into checkpoints.
    pub fingerprint: &'a str,
    /// Set by Ctrl-C, SIGTERM and SIGHUP.
    pub stop: &'a StopFlag,
    /// Told of what happens.
    pub events: &'a mut Events<'e>,
    /// Ends training after this many steps (`--steps`).
    pub step_limit: Option<u64>,
    /// Threads that read images; 0 reads them between steps.
    pub workers: usize,
    /// A state whose next step is made again, to be looked at: training ends with it, and writes nothing.
    pub replay: Option<&'a Checkpoint>,
}

impl StageRun<'_, '_> {
    /// Ends the run where the user asked for it.
    ///
    /// # Errors
    /// The user did.
    pub fn check_stop(&self) -> Result<()> {
        self.stop.get().map_or(Ok(()), |stop| Err(self.stopped(stop)))
    }

    /// The end of a run that the user asked for.
    pub fn stopped(&self, stop: Stop) -> Error {
        Error::Stopped { signal: stop.name(), code: stop.exit_code(), dir: self.dir.path().display().to_string() }
    }
}

/// What a stage leaves.
///
/// ```
/// # use maskalign_core::prelude::*;
/// let outcome = Outcome { results: serde_json::json!({ "accuracy": 0.5 }), student: None };
/// assert_eq!(outcome.results["accuracy"], 0.5);
/// ```
pub struct Outcome {
    /// Results for `summary.json` and the table at the end.
    pub results: serde_json::Value,
    /// The student's parameters, for later stages.
    pub student: Option<Arc<TensorMap>>,
}

/// A stage's options.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// Counts the images of a dataset.
/// #[component]
/// struct Count {
///     /// The images.
///     data: Data,
/// }
///
/// impl Stage for Count {
///     fn plan(&self, cx: &StageContext) -> Result<Box<dyn PlannedStage>, Vec<Refusal>> {
///         let data = self.data.plan(cx.environment).map_err(|refusal| vec![refusal.under("data")])?;
///         Ok(Box::new(PlannedCount { data, summary: StageSummary::default() }))
///     }
/// }
///
/// register!(stage "count" => Count, "counts images",
///     example: "{ type: count, data: { dataset: { type: sample, split: train } } }");
/// # struct PlannedCount { data: PlannedData, summary: StageSummary }
/// # impl PlannedStage for PlannedCount {
/// #     fn summary(&self) -> &StageSummary { &self.summary }
/// #     fn run(&self, _: StageRun) -> Result<Outcome, Error> { unimplemented!() }
/// # }
/// ```
pub trait Stage: Send + Sync {
    /// Checks all that can be known before the first step, and gives what runs.
    ///
    /// # Errors
    /// Every option that does not fit.
    fn plan(&self, cx: &StageContext) -> Result<Box<dyn PlannedStage>, Vec<Refusal>>;
    /// As [`Stage::plan`], to judge a student in the course of its training; `cx` names the judgement.
    ///
    /// # Errors
    /// Every option that does not fit; that it judges no student.
    fn plan_judge(&self, _cx: &StageContext, _student: &StudentPlan) -> Result<Box<dyn PlannedJudge>, Vec<Refusal>> {
        Err(vec![
            Refusal::new("type", "this stage judges no student in training")
                .help("`knn`, `linear_probe`, `few_shot`, `quality` and `retrieval` do"),
        ])
    }
}

/// A judgement of a student in training, whose options fit.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// Says how deep the student is.
/// struct Depth(StageSummary);
///
/// impl PlannedJudge for Depth {
///     fn summary(&self) -> &StageSummary {
///         &self.0
///     }
///
///     fn judge(&self, _: &mut StageRun, student: &dyn StudentModel) -> Result<Value, Error> {
///         Ok(json!({ "blocks": student.shape().arch.depth }))
///     }
/// }
/// ```
pub trait PlannedJudge {
    /// What is known of it: the images that it reads, and the memory that it takes.
    fn summary(&self) -> &StageSummary;
    /// Judges the student as it is, and leaves it so. What it finds depends on the student and the recipe alone.
    ///
    /// # Errors
    /// Whatever ends a run early.
    fn judge(&self, run: &mut StageRun, student: &dyn StudentModel) -> Result<serde_json::Value>;
}

/// A stage whose options fit.
///
/// ```
/// # use maskalign_core::prelude::*;
/// struct PlannedCount {
///     data: PlannedData,
///     summary: StageSummary,
/// }
///
/// impl PlannedStage for PlannedCount {
///     fn summary(&self) -> &StageSummary {
///         &self.summary
///     }
///
///     fn run(&self, run: StageRun) -> Result<Outcome, Error> {
///         let images = self.data.open()?.images.len();
///         let results = serde_json::json!({ "images": images });
///         run.events.send(Event::Result { stage: run.name, result: &results })?;
///         Ok(Outcome { results, student: None })
///     }
/// }
/// ```
pub trait PlannedStage {
    /// What is known of it.
    fn summary(&self) -> &StageSummary;
    /// The classifier that it leaves, where it trains one.
    fn classifier(&self) -> Option<Arc<dyn PlannedClassifier>> {
        None
    }
    /// Runs it, going on from its last checkpoint where the run directory has one.
    ///
    /// # Errors
    /// Whatever ends a run early.
    fn run(&self, run: StageRun) -> Result<Outcome>;
}

/// Keeps the value, or notes the refusal.
///
/// ```
/// # use maskalign_core::prelude::*;
/// let mut refusals = Vec::new();
/// let wrong: Result<usize, _> = Err(Refusal::new("k", "no neighbour is asked for"));
/// assert_eq!(keep(&mut refusals, wrong), None);
/// assert_eq!(keep(&mut refusals, Ok(3)), Some(3));
/// assert_eq!(refusals.len(), 1);
/// ```
pub fn keep<T>(refusals: &mut Vec<Refusal>, result: Result<T, Refusal>) -> Option<T> {
    result.map_err(|refusal| refusals.push(refusal)).ok()
}

/// Prefixes the path of a refusal.
pub fn under(error: Error, segment: &str) -> Error {
    match error {
        Error::Refused(refusal) => refusal.under(segment).into(),
        other => other,
    }
}
