//! Labels, classes and accuracy: what stages that learn classes share.

use std::sync::Arc;

use maskalign_engine::{Context, ImageBatch, Tensor};
use maskalign_registry::{Refusal, SharedOptions, Slot, StudentTag};
use serde_json::{Value, json};

use super::{
    Best, Data, EpochEvaluation, EvalMetric, Loop, MicroBatch, MovingAverage, OpenData, Outcome, PlannedData,
    PlannedTraining, StageContext, StageRun, StageSummary, Task, Trained, Training, finish, image_batch, keep, train,
};
use crate::{
    component,
    components::{
        students::PlannedStudent,
        towers::{TowerShape, TrainedStudents},
    },
    data::Position,
    error::{Error, Result},
    events::Event,
    plugin::Build,
    weights::TensorMap,
};

/// Of so many best classes, one has to be the right one.
pub(super) const TOP: usize = 5;

/// What of training on labelled images a stage leaves: what it trained last, an average of it, or the best.
#[component]
#[derive(Copy)]
pub struct Kept {
    /// A moving average of what is trained, which is measured and left in its place; absent: none.
    #[serde(default)]
    pub ema: Option<MovingAverage>,
    /// Measures on the images of `eval` while it trains, and leaves the best state; absent: the last one.
    #[serde(default)]
    pub best: Option<Best>,
}

impl SharedOptions for Kept {
    const LAST: &'static [&'static str] = &["ema", "best"];
}

impl Kept {
    /// Refuses a metric that nothing could be measured by.
    ///
    /// # Errors
    /// Names `best`.
    fn check(self, classes: &PlannedClasses) -> Result<(), Refusal> {
        match self.best {
            Some(_) if classes.eval.is_none() => {
                Err(Refusal::new("best", "without `eval` there are no images to tell the best state by")
                    .help("give `eval` images that are not trained on, or leave `best` out"))
            }
            Some(Best { metric: EvalMetric::Top5Accuracy, .. }) if classes.classes <= TOP => {
                let message = format!("the five best of {} classes are all of them", classes.classes);
                Err(Refusal::new("metric", message).under("best"))
            }
            _ => Ok(()),
        }
    }
}

/// Classes that are assumed where the data was not looked at: ImageNet's, for estimates.
const UNSEEN_CLASSES: usize = 1000;

/// Training on labelled images whose options fit: data, optimizer and length, the classes, and the student.
pub struct PlannedSupervised {
    /// Data, optimizer and length.
    pub training: PlannedTraining,
    /// What is classified.
    pub classes: PlannedClasses,
    /// The tower.
    pub student: Arc<dyn PlannedStudent>,
    /// What the stage leaves.
    pub kept: Kept,
}

impl PlannedSupervised {
    /// Plans all of it, in the order of the options. Every refusal is noted, and `summary` told of what is read. `None`
    /// where too little fits to go on.
    pub fn plan(
        cx: &StageContext,
        training: &Training,
        labelled: Labelled,
        summary: &mut StageSummary,
        refusals: &mut Vec<Refusal>,
    ) -> Option<Self> {
        let training = training.plan(cx, format!("{}.data", cx.name), summary, refusals);
        let data = training.as_ref().map(|training| &training.data);
        let classes = PlannedClasses::plan(cx, labelled.classes, data, labelled.eval, summary, refusals);
        // An `eval` that was refused is not missing.
        if labelled.eval.is_none() || classes.eval.is_some() {
            keep(refusals, labelled.kept.check(&classes));
        }
        let training = training?;
        let towers = cx.towers(training.data.size);
        let student = Build::build(labelled.student).and_then(|student| student.plan(&towers));
        let student = keep(refusals, student.map_err(|refusal| refusal.under("student")))?;
        Some(PlannedSupervised { training, classes, student, kept: labelled.kept })
    }

    /// Trains `model` to its end, measures its accuracy, and writes what it leaves.
    ///
    /// # Errors
    /// Whatever ends a run early.
    pub fn train<T: Task + Classify>(&self, run: &mut StageRun, model: &mut T) -> Result<Outcome> {
        let (training, micro) = (&self.training, self.training.batch.micro());
        let mut trainer = training.trainer().with_average(self.kept.ema);
        let mut measure = |run: &mut StageRun, model: &mut T, _| self.classes.measure(run, model, micro);
        let evaluation = self.kept.best.map(|best| EpochEvaluation {
            name: Some("eval"),
            every: best.every_epochs,
            best: Some(best),
            measure: &mut measure,
        });
        let Trained { mut results } = train(run, model, &mut trainer, Loop { training, evaluation })?;
        let measured = match results.get("best") {
            Some(best) => best.clone(),
            None => self.classes.measure(run, model, micro)?,
        };
        for (name, result) in [("accuracy", "accuracy"), ("skipped", "eval_skipped")] {
            if let Some(value) = measured.get(name) {
                results[result] = value.clone();
            }
        }
        let trained = Trained { results };
        let weights = finish(run, model, trainer, &trained)?;
        Ok(Outcome { results: trained.results, student: Some(weights) })
    }
}

/// The options of training on labelled images that a stage has besides [`Training`].
pub struct Labelled<'a> {
    /// The number of classes, where it is given.
    pub classes: Option<usize>,
    /// The images that the accuracy is measured on.
    pub eval: Option<&'a Data>,
    /// The tower.
    pub student: &'a Slot<StudentTag>,
    /// What the stage leaves.
    pub kept: Kept,
}

/// What is classified: how many classes there are, and the images that the accuracy is measured on.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// Plans a stage that learns the classes of some data.
/// fn plan(cx: &StageContext, data: &PlannedData) -> Result<PlannedClasses, Vec<Refusal>> {
///     let (mut summary, mut refusals) = (StageSummary::default(), Vec::new());
///     let classes = PlannedClasses::plan(cx, None, Some(data), None, &mut summary, &mut refusals);
///     if refusals.is_empty() { Ok(classes) } else { Err(refusals) }
/// }
/// ```
pub struct PlannedClasses {
    /// How many there are.
    pub classes: usize,
    /// The images that the accuracy is measured on.
    pub eval: Option<PlannedData>,
}

impl PlannedClasses {
    /// Finds out the number of classes (`classes` where it is given, else the data's), and refuses labels beyond it and
    /// data that no accuracy could be measured on. Every refusal is noted, and `summary` told of what is read.
    pub fn plan(
        cx: &StageContext,
        classes: Option<usize>,
        data: Option<&PlannedData>,
        eval: Option<&Data>,
        summary: &mut StageSummary,
        refusals: &mut Vec<Refusal>,
    ) -> Self {
        let eval = eval.and_then(|eval| keep(refusals, eval.plan(cx.environment).map_err(|r| r.under("eval"))));
        let open = data.and_then(PlannedData::opened);
        let open_eval = eval.as_ref().and_then(PlannedData::opened);
        if let Some(eval) = open_eval {
            summary.data.push(eval.record(format!("{}.eval", cx.name)));
            summary.memory += eval.images.resident_bytes();
            summary.warnings.extend(eval.images.notes());
        }
        let counted = open.and_then(|data| keep(refusals, count_classes(classes, data)));
        let classes = counted.or(classes).unwrap_or(UNSEEN_CLASSES);
        if let (Some(eval), Some(data)) = (open_eval, open) {
            keep(refusals, check_eval(eval, data, classes).map_err(|r| r.under("eval")));
        }
        PlannedClasses { classes, eval }
    }

    /// The accuracy, also among the five best where there are more classes, and the mean cross entropy on the images that
    /// they are measured on, and how many of these could not be read; null without such images.
    ///
    /// # Errors
    /// None of the images can be read; a stop that the user asked for.
    pub fn measure(&self, run: &mut StageRun, model: &dyn Classify, batch: usize) -> Result<Value> {
        let Some(eval) = &self.eval else { return Ok(Value::Null) };
        let data = eval.open()?;
        let (mut right, mut among, mut loss) = (0usize, 0usize, 0.0f64);
        let seen = each_scored(run, model, data, batch, "eval", &mut |scores, label| {
            let label = label as usize;
            right += usize::from(best_class(scores) == label);
            among += usize::from(is_among_best(scores, label));
            loss += cross_entropy(scores, label);
        })?;
        let share = |count: usize| count as f64 / seen as f64;
        let mut measured = json!({ "accuracy": share(right), "loss": loss / seen as f64 });
        if model.classes() > TOP {
            measured["top_5_accuracy"] = share(among).into();
        }
        if seen < data.images.len() {
            measured["skipped"] = (data.images.len() - seen).into();
        }
        Ok(measured)
    }
}

/// Whether the class is among the five with the best scores. Of classes with the same score the first come first.
pub(super) fn is_among_best(scores: &[f32], label: usize) -> bool {
    let before = |(class, score): &(usize, &f32)| match score.total_cmp(&scores[label]) {
        std::cmp::Ordering::Equal => *class < label,
        order => order.is_gt(),
    };
    scores.iter().enumerate().filter(before).count() < TOP
}

/// The cross entropy of scores that are logits, in double precision.
fn cross_entropy(scores: &[f32], label: usize) -> f64 {
    let highest = f64::from(scores.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = scores.iter().map(|&score| (f64::from(score) - highest).exp()).sum();
    highest + sum.ln() - f64::from(scores[label])
}

/// The number of classes, which the labels must stay below.
fn count_classes(given: Option<usize>, data: &OpenData) -> Result<usize, Refusal> {
    data.check_labels("supervised training").map_err(|r| r.under("data"))?;
    let most = largest_label(data);
    let named = data.images.classes().map(|c| c.len());
    let classes = given.or(named).unwrap_or(most + 1).max(2);
    if most >= classes {
        return Err(Refusal::new("classes", format!("{classes} classes, but the data has the label {most}")));
    }
    Ok(classes)
}

/// Refuses data that no accuracy could be measured on.
fn check_eval(eval: &OpenData, data: &OpenData, classes: usize) -> Result<(), Refusal> {
    if eval.size != data.size {
        let message = format!("images of {} pixels, those of `data` have {}", eval.size, data.size);
        return Err(Refusal::new("transforms", message));
    }
    eval.check_labels("an accuracy")?;
    eval.check_classes(data, "data")?;
    match largest_label(eval) {
        most if most < classes => Ok(()),
        most => Err(Refusal::new("dataset", format!("the label {most}, but the student learns {classes} classes"))),
    }
}

/// The largest label; 0 without any.
pub fn largest_label(data: &OpenData) -> usize {
    (0..data.images.len()).filter_map(|i| data.images.label(i)).max().unwrap_or(0) as usize
}

/// The classes of a micro-batch as targets `[batch, classes]`, `smoothing` of each spread over all classes.
///
/// ```
/// # use maskalign_core::prelude::*;
/// let images = ImageBatch { pixels: vec![0.0; 6], batch: 2, size: 1 };
/// let labels = vec![Some(2), Some(0)];
/// let batch = MicroBatch { images, crops: vec![], labels, indices: vec![0, 1], epoch: 0, progress: 0.0 };
/// assert_eq!(class_targets(&batch, 3, 0.0)?, [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]);
/// # Ok::<(), Refusal>(())
/// ```
///
/// # Errors
/// An image without a label below `classes`.
pub fn class_targets(batch: &MicroBatch, classes: usize, smoothing: f64) -> Result<Vec<f32>, Refusal> {
    let off = (smoothing / classes as f64) as f32;
    let on = (1.0 - smoothing) as f32 + off;
    let mut targets = vec![off; batch.labels.len() * classes];
    for (i, label) in batch.labels.iter().enumerate() {
        let label = label
            .map(|l| l as usize)
            .filter(|&l| l < classes)
            .ok_or_else(|| Refusal::new("data", format!("image {} has no label below {classes}", batch.indices[i])))?;
        targets[i * classes + label] = on;
    }
    Ok(targets)
}

/// Gives a score to each class.
///
/// ```
/// # use maskalign_core::{Device, prelude::*};
/// /// Says always the same class.
/// struct Same(usize);
///
/// impl Classify for Same {
///     fn classes(&self) -> usize {
///         self.0
///     }
///
///     fn scores(&self, cx: &Context, images: &ImageBatch) -> Result<Tensor, Error> {
///         let mut scores = vec![0.0; images.batch * self.0];
///         scores.iter_mut().step_by(self.0).for_each(|first| *first = 1.0);
///         Ok(cx.tensor(scores, images.batch, self.0)?)
///     }
/// }
/// # let cx = Context::new(Device::Cpu, 1);
///
/// let images = ImageBatch { pixels: vec![0.5; 2 * 3 * 8 * 8], batch: 2, size: 8 };
/// assert_eq!(Same(3).scores(&cx, &images)?.to_vec(), [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]);
/// # Ok::<(), Error>(())
/// ```
pub trait Classify {
    /// How many classes there are.
    fn classes(&self) -> usize;
    /// `[batch, classes]`; takes no gradient.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn scores(&self, cx: &Context, images: &ImageBatch) -> Result<Tensor>;
}

/// A classifier that a stage leaves, known before the stage has run.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// How large the weight of an earlier stage's head is.
/// fn head(cx: &StageContext, stage: &str) -> Result<usize, Refusal> {
///     let classifier = cx.classifier(stage)?;
///     Ok(classifier.classes() * classifier.tower().arch.dim)
/// }
/// ```
pub trait PlannedClassifier: Send + Sync {
    /// The shape of its tower.
    fn tower(&self) -> TowerShape;
    /// How many classes it tells apart.
    fn classes(&self) -> usize;
    /// The images that it learns these from.
    fn data(&self) -> &PlannedData;
    /// The classifier with the parameters that its stage left; those that the stage kept as they were are built as the
    /// stage built them.
    ///
    /// # Errors
    /// Parameters that are missing or do not fit; weights that have gone or changed; out of memory.
    fn build(&self, cx: &Context, trained: &TrainedStudents, left: &TensorMap) -> Result<Box<dyn Classify>>;
}

/// Share of the images whose class the model finds, and how many could not be read.
///
/// ```
/// # use maskalign_core::prelude::*;
/// fn results(run: &mut StageRun, model: &dyn Classify, data: &OpenData) -> Result<Value, Error> {
///     let (accuracy, skipped) = accuracy(run, model, data, 64)?;
///     Ok(json!({ "accuracy": accuracy, "skipped": skipped }))
/// }
/// ```
///
/// # Errors
/// None of the images can be read; a stop that the user asked for.
pub fn accuracy(run: &mut StageRun, model: &dyn Classify, data: &OpenData, batch: usize) -> Result<(f64, usize)> {
    let mut right = 0usize;
    let seen = each_scored(run, model, data, batch, "eval", &mut |scores, label| {
        right += usize::from(best_class(scores) == label as usize);
    })?;
    Ok((right as f64 / seen as f64, data.images.len() - seen))
}

/// The class with the best score; of several the first.
pub(super) fn best_class(scores: &[f32]) -> usize {
    let better = |&a: &usize, &b: &usize| scores[a].total_cmp(&scores[b]).then(b.cmp(&a));
    (0..scores.len()).max_by(better).unwrap_or(0)
}

/// Gives the scores and the label of every image that can be read to `take`, and says how many there were. `option` is what
/// a recipe calls the data.
///
/// # Errors
/// An image without a label; none that can be read; a stop that the user asked for.
pub(super) fn each_scored(
    run: &mut StageRun,
    model: &dyn Classify,
    data: &OpenData,
    batch: usize,
    option: &str,
    take: &mut dyn FnMut(&[f32], u32),
) -> Result<usize> {
    let mut seen = 0;
    let (classes, all) = (model.classes(), data.images.len());
    let mut batches = data.pass(batch, run.workers)?.batches(Position::default(), None);
    while let Some(batch) = run.stop.while_waiting(|| batches.next()) {
        let mut batch = batch?;
        let images = image_batch(&mut batch);
        let scores = model.scores(run.cx, &images)?.to_vec();
        for (scores, (label, index)) in scores.chunks_exact(classes).zip(batch.labels.iter().zip(&batch.indices)) {
            let label =
                label.ok_or_else(|| Refusal::new(option, format!("{} has no label", data.images.name(*index))))?;
            take(scores, label);
        }
        run.check_stop()?;
        seen += batch.indices.len();
        run.events.send(Event::Progress { what: "evaluation", done: seen as u64, all: all as u64 })?;
    }
    if seen == 0 {
        return Err(Error::Usage(format!("none of the {all} images of `{option}` can be read")));
    }
    Ok(seen)
}
