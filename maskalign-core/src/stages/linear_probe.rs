//! Linear probing: a linear classifier is trained on the features of a frozen student.

use std::sync::Arc;

use maskalign_engine::{Context, ImageBatch, Role, Tape, Tensor};
use maskalign_registry::{Refusal, Slot, StudentTag, With};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    BatchSize, Data, FeatureTap, Length, MicroBatch, Outcome, PlannedData, PlannedJudge, PlannedStage, PlannedTraining,
    Pooling, Stage, StageContext, StageRun, StageSummary, Task, Tower, Trained, Training, View, finish, keep, memory,
    probe_sweep::{Head, PlannedSweep, Sides, sweep},
    supervised::{Classify, Kept, Labelled, PlannedClasses, PlannedClassifier, PlannedSupervised},
    training::{count_parameters, load_kept, saved_parameters},
    under,
};
use crate::{
    component,
    components::{
        students::StudentModel,
        towers::{StudentPlan, Tap, TowerShape, TrainedStudents},
    },
    error::Result,
    events::Event,
    nn::{BatchNorm, Bias, Init, Linear, Param, Reach},
    register,
    weights::TensorMap,
};

/// Images that go through the student together.
const AT_A_TIME: usize = 64;

/// The official probe's: added to the variances of features.
pub(super) const EPS: f64 = 1e-6;
/// What the official probe reads.
pub(super) const POOLING: Pooling = Pooling::Cls;
/// Where it takes that.
pub(super) const TAP: FeatureTap = FeatureTap::Norm;

fn cls() -> Pooling {
    POOLING
}
fn norm() -> FeatureTap {
    TAP
}
fn head_std() -> f64 {
    0.01
}

/// Trains a linear classifier on a frozen student's features, behind a BatchNorm without scale and shift (MAE's and
/// MaskAlign's linear probe); the loss is the cross entropy.
///
/// The student runs on every image anew, so that images may be augmented; with `base_lrs` it runs on each once, and several
/// classifiers are trained. It stays as it is: later stages take it from where this one took it.
///
/// Under `evaluations` of `pretrain` it judges the student that is trained: `student` is left out there, every image goes
/// through it once, and a classifier is trained at each of `base_lrs`, or at the optimizer's rate.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct LinearProbe(With<Kept, With<Training, LinearProbeOptions>>);

/// The options that are the probe's own.
#[component]
struct LinearProbeOptions {
    /// Labelled images on which the accuracy is measured at the end; absent: it is not.
    #[serde(default)]
    eval: Option<Data>,
    /// The frozen tower: with `weights: {stage: NAME}` an earlier stage's. To be left out where a student is judged in training.
    #[serde(default)]
    student: Option<Slot<StudentTag>>,
    /// What the classifier reads.
    #[serde(default = "cls")]
    pooling: Pooling,
    /// Where the student's tokens are taken.
    #[serde(default = "norm")]
    tap: FeatureTap,
    /// Standard deviation of the classifier's initial weights, a truncated normal.
    #[serde(default = "head_std")]
    #[schemars(range(min = 0.0))]
    head_std: f64,
    /// Learning rates that are tried in place of `optimizer.base_lr`; absent: that one.
    ///
    /// Features are computed once, so that random transforms are drawn once for each image; a classifier is trained on them
    /// at each rate, and the one with the highest accuracy on `eval` is left.
    #[serde(default)]
    #[schemars(inner(range(min = 1e-12)))]
    base_lrs: Vec<f64>,
    /// Number of classes; absent: the dataset's.
    #[serde(default)]
    #[schemars(range(min = 2, max = 1000000))]
    classes: Option<usize>,
}

/// A frozen student and the classifier that is trained on it.
pub struct Probe {
    student: Box<dyn StudentModel>,
    pooling: Pooling,
    tap: FeatureTap,
    head: Head,
}

impl Probe {
    /// `[batch, width]`.
    fn features(&self, cx: &Context, images: &ImageBatch) -> Result<Tensor> {
        let view = View { pooling: self.pooling, tap: self.tap, batch: AT_A_TIME };
        Tower::Student(&*self.student).features(cx, images, view)
    }
}

impl Task for Probe {
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        self.student.visit(f);
        self.head.visit(f);
    }

    fn loss(&mut self, cx: &Context, tape: &mut Tape, batch: &MicroBatch) -> Result<Tensor> {
        let features = self.features(cx, &batch.images)?;
        self.head.loss(cx, tape, &features, batch)
    }
}

impl Classify for Probe {
    fn classes(&self) -> usize {
        self.head.head.outputs()
    }

    fn scores(&self, cx: &Context, images: &ImageBatch) -> Result<Tensor> {
        self.head.scores(cx, &self.features(cx, images)?)
    }
}

/// A linear probe whose options fit.
pub struct PlannedLinearProbe {
    summary: StageSummary,
    plan: Arc<ProbePlan>,
}

/// What is trained, and on what.
struct ProbePlan {
    supervised: PlannedSupervised,
    sweep: Option<PlannedSweep>,
    options: LinearProbeOptions,
    seed: u64,
    scope: String,
}

impl LinearProbe {
    /// What runs.
    ///
    /// # Errors
    /// Every option that does not fit.
    pub fn plan_probe(&self, cx: &StageContext) -> Result<PlannedLinearProbe, Vec<Refusal>> {
        let With { shared: kept, own: With { shared, own } } = &self.0;
        let mut refusals = Vec::new();
        let mut summary = StageSummary::default();
        let batch = shared.batch;
        keep(&mut refusals, check_batch(batch));
        let Some(student) = &own.student else {
            let refusal = Refusal::new("student", "there is no student to probe");
            return Err(vec![refusal.help("give it, as `{ type: vit, weights: { stage: NAME } }`")]);
        };
        let labelled = Labelled { classes: own.classes, eval: own.eval.as_ref(), student, kept: *kept };
        let planned = PlannedSupervised::plan(cx, shared, labelled, &mut summary, &mut refusals);
        let Some(supervised) = planned else { return Err(refusals) };
        let shape = supervised.student.shape();
        keep(&mut refusals, own.pooling.check("the student", &shape));
        if own.tap == FeatureTap::Norm {
            keep(&mut refusals, shape.check_tap("the student", Tap::Norm));
        }
        if !refusals.is_empty() {
            return Err(refusals);
        }
        if supervised.student.is_drawn() {
            summary.warnings.push("the student has no `weights`: what is probed is its random initialisation".into());
        }
        let sweep = PlannedSweep::plan(&own.base_lrs, shared, &mut refusals);
        for (option, is_given) in [("ema", kept.ema.is_some()), ("best", kept.best.is_some())] {
            if is_given && !own.base_lrs.is_empty() {
                refusals.push(
                    Refusal::new(option, "several learning rates are tried, and of each the last state is compared")
                        .related(["base_lrs"], "the learning rates")
                        .help(format!("leave out `base_lrs`, or `{option}`")),
                );
            }
        }
        if !own.base_lrs.is_empty() && own.eval.is_none() {
            refusals.push(
                Refusal::new("base_lrs", "without `eval` there are no images to tell the best rate by")
                    .help("give `eval` images that are not trained on, or leave `base_lrs` out"),
            );
        }
        if !refusals.is_empty() {
            return Err(refusals);
        }
        let plan = ProbePlan { supervised, sweep, options: own.clone(), seed: cx.seed, scope: cx.name.to_string() };
        let model = plan.model(&Init::shapes(), &TrainedStudents::default());
        let mut model = model.map_err(|error| vec![error.into_refusal()])?;
        (summary.parameters, summary.trainable) = count_parameters(&mut model);
        summary.saved = saved_parameters(&mut model);
        summary.tokens = Some((shape.tokens(), shape.tokens()));
        let size = plan.supervised.training.data.size;
        summary.memory += match &plan.sweep {
            None => {
                memory::average(&summary, plan.supervised.kept.ema.is_some())
                    + memory::probe(&summary, &shape, [batch.micro(), AT_A_TIME], size)
            }
            Some(_) => {
                let open = [Some(&plan.supervised.training.data), plan.supervised.classes.eval.as_ref()];
                let images =
                    open.into_iter().flatten().filter_map(PlannedData::opened).map(|open| open.images.len()).sum();
                memory::cached(&shape, images, AT_A_TIME, size)
            }
        };
        Ok(PlannedLinearProbe { summary, plan: Arc::new(plan) })
    }
}

/// Refuses micro-batches of one image.
fn check_batch(batch: BatchSize) -> Result<(), Refusal> {
    if batch.micro() > 1 {
        return Ok(());
    }
    let message = "the variance of one image's features is not defined: a micro-batch needs two images";
    let option = if batch.micro.is_some() { "micro" } else { "effective" };
    Err(Refusal::new(option, message).under("batch"))
}

/// A probe of a student in the course of its training.
struct JudgingProbe {
    summary: StageSummary,
    sweep: PlannedSweep,
    data: PlannedData,
    eval: PlannedData,
    batch: BatchSize,
    length: Length,
    options: LinearProbeOptions,
    classes: usize,
    width: usize,
    scope: String,
}

impl LinearProbe {
    fn plan_judging(&self, cx: &StageContext, student: &StudentPlan) -> Result<JudgingProbe, Vec<Refusal>> {
        let With { shared: kept, own: With { shared, own } } = &self.0;
        let mut refusals = Vec::new();
        let mut summary = StageSummary::default();
        keep(&mut refusals, check_batch(shared.batch));
        let student_given = own.student.is_some();
        for (option, is_given) in
            [("student", student_given), ("ema", kept.ema.is_some()), ("best", kept.best.is_some())]
        {
            if is_given {
                refusals.push(
                    Refusal::new(option, "a probe in training judges the student that is trained, and leaves nothing")
                        .help(format!("leave `{option}` out")),
                );
            }
        }
        let training = shared.plan(cx, format!("{}.data", cx.name), &mut summary, &mut refusals);
        let data = training.as_ref().map(|training| &training.data);
        let classes = PlannedClasses::plan(cx, own.classes, data, own.eval.as_ref(), &mut summary, &mut refusals);
        if own.eval.is_none() {
            refusals.push(
                Refusal::new("eval", "without it there are no images to judge the student on")
                    .help("give `eval` images that are not trained on"),
            );
        }
        let shape = student.tower.shape();
        keep(&mut refusals, own.pooling.check("the student", &shape));
        if own.tap == FeatureTap::Norm {
            keep(&mut refusals, shape.check_tap("the student", Tap::Norm));
        }
        let rate = shared.optimizer.options.get("base_lr").and_then(Value::as_f64);
        let rates = if own.base_lrs.is_empty() { rate.into_iter().collect() } else { own.base_lrs.clone() };
        let sweep = PlannedSweep::plan(&rates, shared, &mut refusals);
        let (Some(training), Some(sweep), Some(eval), true) = (training, sweep, classes.eval, refusals.is_empty())
        else {
            return Err(refusals);
        };
        let PlannedTraining { data, batch, length, .. } = training;
        let open = [Some(&data), Some(&eval)];
        let images = open.into_iter().flatten().filter_map(PlannedData::opened).map(|open| open.images.len()).sum();
        summary.memory += memory::cached(&shape, images, AT_A_TIME, data.size);
        Ok(JudgingProbe {
            summary,
            sweep,
            data,
            eval,
            batch,
            length,
            options: own.clone(),
            classes: classes.classes,
            width: shape.arch.dim,
            // As a stage of that name would draw it.
            scope: cx.name.rsplit_once(".evaluations.").map_or(cx.name, |(_, own)| own).to_string(),
        })
    }
}

impl PlannedJudge for JudgingProbe {
    fn summary(&self) -> &StageSummary {
        &self.summary
    }

    fn judge(&self, run: &mut StageRun, student: &dyn StudentModel) -> Result<Value> {
        let (length, batch) = (self.length, self.batch);
        // What is found depends on the student and the recipe alone, not on `--steps`.
        let sides = Sides { data: self.data.open()?, eval: self.eval.open()?, batch, length, end: length.steps() };
        let view = View { pooling: self.options.pooling, tap: self.options.tap, batch: AT_A_TIME };
        let init = Init::new(run.cx.device(), run.seed, &*self.scope);
        let fresh = || self.options.head(&init, self.classes, self.width);
        let tower = Tower::Student(student);
        Ok(sweep(run, &self.sweep, &sides, (&tower, view), &fresh, &mut |_, _, _| Ok(()))?.results)
    }
}

impl PlannedLinearProbe {
    /// Data, optimizer and length.
    pub fn training(&self) -> &PlannedTraining {
        &self.plan.supervised.training
    }

    /// The model at its beginning.
    ///
    /// # Errors
    /// Weights that have gone or changed since they were planned; out of memory.
    pub fn model(&self, init: &Init, trained: &TrainedStudents) -> Result<Probe> {
        self.plan.model(init, trained)
    }
}

impl ProbePlan {
    fn model(&self, init: &Init, trained: &TrainedStudents) -> Result<Probe> {
        let LinearProbeOptions { pooling, tap, .. } = self.options;
        let mut student = self.supervised.student.build(init, trained).map_err(|e| under(e, "student"))?;
        let arch = student.shape().arch;
        student.set_reach(Reach { blocks: arch.depth, norm: tap == FeatureTap::Norm, qkv: false });
        student.set_role(Role::Frozen);
        Ok(Probe { student, pooling, tap, head: self.head(init)? })
    }

    /// The classifier at its beginning.
    fn head(&self, init: &Init) -> Result<Head> {
        self.options.head(init, self.supervised.classes.classes, self.supervised.student.shape().arch.dim)
    }

    /// Tries the rates, and leaves the best classifier.
    fn sweep(&self, run: &mut StageRun, rates: &PlannedSweep, model: &mut Probe) -> Result<Outcome> {
        let PlannedTraining { data, batch, length, .. } = &self.supervised.training;
        let eval = self.supervised.classes.eval.as_ref().unwrap_or(data);
        let end = run.step_limit.map_or(length.steps(), |limit| length.steps().min(limit));
        let sides = Sides { data: data.open()?, eval: eval.open()?, batch: *batch, length: *length, end };
        let view = View { pooling: self.options.pooling, tap: self.options.tap, batch: AT_A_TIME };
        let init = self.init(run.cx);
        let tower = Tower::Student(&*model.student);
        let swept = sweep(run, rates, &sides, (&tower, view), &|| self.head(&init), &mut |run, rate, result| {
            run.events.send(Event::Result { stage: run.name, result: &json!({ "by_lr": { rate: result } }) })
        })?;
        model.head = swept.head;
        let trained = Trained { results: swept.results };
        finish(run, model, swept.trainer, &trained)?;
        Ok(Outcome { results: trained.results, student: None })
    }

    fn init(&self, cx: &Context) -> Init {
        Init::new(cx.device(), self.seed, &*self.scope)
    }
}

impl PlannedClassifier for ProbePlan {
    fn tower(&self) -> TowerShape {
        self.supervised.student.shape()
    }

    fn classes(&self) -> usize {
        self.supervised.classes.classes
    }

    fn data(&self) -> &PlannedData {
        &self.supervised.training.data
    }

    fn build(&self, cx: &Context, trained: &TrainedStudents, left: &TensorMap) -> Result<Box<dyn Classify>> {
        let mut model = self.model(&self.init(cx), trained)?;
        load_kept(&mut model, left)?;
        Ok(Box::new(model))
    }
}

impl LinearProbeOptions {
    /// The classifier at its beginning.
    fn head(&self, init: &Init, classes: usize, width: usize) -> Result<Head> {
        let init = &init.of_role(Role::Head);
        let weight = init.truncated_normal("head.1.weight", &[classes, width], self.head_std)?;
        Ok(Head {
            norm: BatchNorm::plain(init, "head.0", width, EPS)?,
            head: Linear::from_weight(init, "head.1", weight, Bias::With)?,
        })
    }
}

impl Stage for LinearProbe {
    fn plan(&self, cx: &StageContext) -> Result<Box<dyn PlannedStage>, Vec<Refusal>> {
        Ok(Box::new(self.plan_probe(cx)?))
    }

    fn plan_judge(&self, cx: &StageContext, student: &StudentPlan) -> Result<Box<dyn PlannedJudge>, Vec<Refusal>> {
        Ok(Box::new(self.plan_judging(cx, student)?))
    }
}

impl PlannedStage for PlannedLinearProbe {
    fn summary(&self) -> &StageSummary {
        &self.summary
    }

    fn classifier(&self) -> Option<Arc<dyn PlannedClassifier>> {
        Some(Arc::clone(&self.plan) as Arc<dyn PlannedClassifier>)
    }

    fn run(&self, mut run: StageRun) -> Result<Outcome> {
        let mut model = self.model(&self.plan.init(run.cx), run.trained)?;
        if let Some(rates) = &self.plan.sweep {
            return self.plan.sweep(&mut run, rates, &mut model);
        }
        // The student is what it was: later stages have it from where this one does.
        Ok(Outcome { student: None, ..self.plan.supervised.train(&mut run, &mut model)? })
    }
}

register!(stage "linear_probe" => LinearProbe, "trains a linear classifier on a frozen student's features",
    example: "{ type: linear_probe, epochs: 5, data: { dataset: { type: sample, split: train } },
      eval: { dataset: { type: sample, split: test } },
      student: { type: vit, arch: { dim: 96, depth: 4, heads: 3, patch: 4 }, weights: student.safetensors },
      optimizer: { type: lars, base_lr: 0.1 }, schedule: { type: cosine }, batch: { effective: 64 } }",
    paper: "MAE, arXiv 2111.06377, appendix A.1");
