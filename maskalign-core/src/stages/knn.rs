//! Weighted k-nearest-neighbour classification of frozen features (DINO's protocol, arXiv 2104.14294, section 4.1).

use indexmap::IndexMap;
use maskalign_engine::{
    Context, ImageBatch, Tape, Tensor,
    ops::{self, Act, LinearWeights},
};
use maskalign_registry::{Refusal, Slot, TeacherTag, Weights};
use serde_json::{Value, json};

use super::{
    Data, OpenData, Outcome, Stage, StageContext, StagePlan, StageRun, data::image_batch, keep, memory, under,
};
use crate::{
    component,
    components::{
        students::StudentModel,
        teachers::{TeacherModel, Wants},
        tokens::Masks,
        towers::{PlanContext, Tap, TowerShape},
    },
    error::{Error, Result},
    nn::Init,
    plugin::Build,
    register,
};

/// Divisor of similarities before they are exponentiated into votes.
const TEMPERATURE: f64 = 0.07;

/// What k-NN is measured on besides towers.
#[component]
#[derive(Copy, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Baseline {
    /// The raw pixels.
    Pixels,
    /// The student before training.
    Untrained,
}

/// How a tower's tokens become one feature.
#[component]
#[derive(Copy, Default, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Pooling {
    /// The mean of the patches' tokens after the last block.
    #[default]
    Mean,
    /// The class token after the last block.
    Cls,
}

/// Where a tower's features are taken.
#[component]
#[derive(Copy, Default, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum FeatureTap {
    /// The residual stream after the last block.
    #[default]
    Block,
    /// After the final norm.
    Norm,
}

fn neighbours() -> Vec<usize> {
    vec![20]
}
fn batch() -> usize {
    64
}

/// k-NN accuracy of a student, of teachers, and of what they are compared with: features of length 1, cosine
/// similarity, votes weighted by exp(similarity / 0.07).
#[component]
pub struct Knn {
    /// Labelled images that neighbours are taken from.
    train: Data,
    /// Labelled images that are classified.
    test: Data,
    /// The student of an earlier stage, as `{stage: NAME}`.
    #[serde(default)]
    student: Option<Weights>,
    /// What the student is compared with.
    #[serde(default)]
    baselines: Vec<Baseline>,
    /// Towers that are measured too, by name.
    #[serde(default)]
    teachers: IndexMap<String, Slot<TeacherTag>>,
    /// Numbers of neighbours; `accuracy` is that of the first.
    #[serde(default = "neighbours")]
    #[schemars(length(min = 1), inner(range(min = 1)))]
    k: Vec<usize>,
    /// How a tower's tokens become one feature.
    #[serde(default)]
    pooling: Pooling,
    /// Where a tower's tokens are taken: after its last block that was trained, or after the final norm too, as DINO's
    /// own evaluation does (with `pooling: cls`). Pre-training may leave a student's final norm at its initial scale.
    #[serde(default)]
    tap: FeatureTap,
    /// Images that go through a tower together.
    #[serde(default = "batch")]
    #[schemars(range(min = 1, max = 1048576))]
    batch: usize,
}

/// k-NN of the student in the course of pre-training.
#[component]
pub struct PeriodicKnn {
    /// Epochs between measurements.
    #[schemars(range(min = 1))]
    pub every_epochs: u64,
    /// Labelled images that neighbours are taken from.
    train: Data,
    /// Labelled images that are classified.
    test: Data,
    /// Number of neighbours.
    #[serde(default = "twenty")]
    #[schemars(range(min = 1))]
    k: usize,
}

fn twenty() -> usize {
    20
}

/// Data of a periodic measurement.
pub(super) struct OpenKnn {
    pub every_epochs: u64,
    train: OpenData,
    test: OpenData,
    k: usize,
}

impl PeriodicKnn {
    /// Refuses data that cannot be opened or has no labels, and a measurement that never comes. Adds what is read, and
    /// the memory it takes for features of `width` values, to the stage's plan.
    pub(super) fn plan(
        &self,
        cx: &StageContext,
        epochs: f64,
        width: usize,
        plan: &mut StagePlan,
    ) -> Result<(), Vec<Refusal>> {
        if self.every_epochs as f64 > epochs {
            let message =
                format!("{} epochs are more than the stage's {epochs}: nothing would be measured", self.every_epochs);
            return Err(vec![Refusal::new("every_epochs", message)]);
        }
        let Some((train, test)) = open_both(&self.train, &self.test, cx.environment)? else { return Ok(()) };
        plan.data.push(train.record(format!("{}.knn.train", cx.name)));
        plan.data.push(test.record(format!("{}.knn.test", cx.name)));
        plan.memory += memory::bank(train.images.len() + test.images.len(), width);
        Ok(())
    }

    pub(super) fn open(&self) -> Result<OpenKnn, Refusal> {
        Ok(OpenKnn {
            every_epochs: self.every_epochs,
            train: self.train.open().map_err(|r| r.under("train"))?,
            test: self.test.open().map_err(|r| r.under("test"))?,
            k: self.k,
        })
    }
}

impl OpenKnn {
    /// The accuracy of a student in training.
    pub(super) fn measure(&self, run: &mut StageRun, student: &dyn StudentModel, epochs: u64) -> Result<Value> {
        let tower = Tower::Student(student);
        let view = View { pooling: Pooling::Mean, tap: FeatureTap::Block, batch: batch() };
        let train = extract(run, &tower, &self.train, view)?;
        let test = extract(run, &tower, &self.test, view)?;
        let accuracy = accuracy(&run.cx, &train, &test, &[self.k])?;
        Ok(json!({ "epoch": epochs, "accuracy": accuracy[0] }))
    }
}

/// Opens both sides where that is allowed, and refuses them without labels, or with sizes or classes that differ.
fn open_both(train: &Data, test: &Data, environment: bool) -> Result<Option<(OpenData, OpenData)>, Vec<Refusal>> {
    let mut refusals = Vec::new();
    let mut open = |data: &Data, name: &str| {
        let size = keep(&mut refusals, data.size(environment).map_err(|r| r.under(name)))?;
        let open = data.may_open(environment).then(|| data.open().and_then(|d| d.check_labels("k-NN").map(|()| d)));
        let open = keep(&mut refusals, open.transpose().map_err(|r| r.under(name)))?;
        Some((size, open))
    };
    let sides = (open(train, "train"), open(test, "test"));
    let (Some((train_size, train)), Some((test_size, test))) = sides else { return Err(refusals) };
    if train_size != test_size {
        let message = format!("images of {test_size} pixels, those of `train` have {train_size}");
        return Err(vec![Refusal::new("test", message)]);
    }
    let both = train.zip(test);
    if let Some((train, test)) = &both {
        test.check_classes(train, "train").map_err(|r| vec![r.under("test")])?;
    }
    Ok(both)
}

/// How features are taken.
#[derive(Clone, Copy)]
struct View {
    pooling: Pooling,
    tap: FeatureTap,
    /// Images that go through a tower together.
    batch: usize,
}

/// What features are taken from.
enum Tower<'a> {
    Pixels,
    Student(&'a dyn StudentModel),
    Teacher(&'a dyn TeacherModel),
}

impl Tower<'_> {
    /// One feature an image, `[batch, width]`.
    fn features(&self, cx: &Context, images: ImageBatch, view: View) -> Result<Tensor> {
        let batch = images.batch;
        let off = &mut Tape::inference();
        let normed = view.tap == FeatureTap::Norm;
        let (x, shape): (Tensor, TowerShape) = match self {
            Tower::Pixels => {
                let width = images.pixels.len() / batch;
                return Ok(cx.tensor(images.pixels, batch, width)?);
            }
            Tower::Student(student) => {
                let last = student.forward(cx, off, &images, None, None, &|_| false)?.last;
                (if normed { student.norm(cx, off, &last)? } else { last }, student.shape())
            }
            Tower::Teacher(teacher) => {
                let last = teacher.shape().arch.depth - 1;
                let wants = Wants { levels: [last].into(), whole: true, ..Wants::default() };
                let pass = teacher.begin(cx, &images, &wants)?;
                let masks = Masks::all_visible(batch, teacher.shape().grid.patches());
                let mut levels = teacher.finish(cx, pass, &wants, &masks)?;
                let x = levels.remove(&last).expect("wanted").x;
                (if normed { teacher.tap(cx, &x, Tap::Norm)? } else { x }, teacher.shape())
            }
        };
        match view.pooling {
            Pooling::Mean => Ok(ops::mean_tokens(cx, off, &x, batch, usize::from(shape.cls_token))?),
            Pooling::Cls => {
                let rows: Vec<u32> = (0..batch).map(|i| (i * shape.tokens()) as u32).collect();
                Ok(ops::gather_rows(cx, off, &[&x], &rows)?)
            }
        }
    }
}

/// Features of length 1 with their labels.
pub(crate) struct Bank {
    features: Vec<f32>,
    width: usize,
    labels: Vec<u32>,
    /// Images that could not be read.
    skipped: usize,
}

fn extract(run: &mut StageRun, tower: &Tower, data: &OpenData, view: View) -> Result<Bank> {
    let mut bank = Bank { features: Vec::new(), width: 0, labels: Vec::new(), skipped: 0 };
    let all = data.images.len() as u64;
    for batch in data.pass(view.batch, run.workers)?.batches(Default::default(), None) {
        let mut batch = batch?;
        for (label, index) in batch.labels.iter().zip(&batch.indices) {
            let label = label.ok_or_else(|| Refusal::whole(format!("{} has no label", data.images.name(*index))))?;
            bank.labels.push(label);
        }
        let x = tower.features(&run.cx, image_batch(&mut batch), view)?;
        bank.width = x.columns();
        bank.features.extend(x.to_vec());
        run.progress.count("features", bank.labels.len() as u64, all);
        if let Some(stop) = run.stop.get() {
            return Err(super::train::stopped(run, stop));
        }
    }
    bank.skipped = data.images.len() - bank.labels.len();
    if bank.labels.is_empty() {
        return Err(Error::Usage(format!("none of the {all} images of `{}` can be read", run.stage.name)));
    }
    for row in bank.features.chunks_exact_mut(bank.width) {
        let length = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt().max(1e-12);
        row.iter_mut().for_each(|v| *v = (f64::from(*v) / length) as f32);
    }
    Ok(bank)
}

/// Share of `test` that each number of neighbours in `train` classifies rightly.
pub(crate) fn accuracy(cx: &Context, train: &Bank, test: &Bank, ks: &[usize]) -> Result<Vec<f64>> {
    let bank = LinearWeights {
        weight: cx.tensor(train.features.clone(), train.labels.len(), train.width)?,
        bias: None,
        packed: None,
    };
    let classes = 1 + train.labels.iter().chain(&test.labels).max().copied().unwrap_or(0) as usize;
    let most = ks.iter().copied().max().unwrap_or(1).min(train.labels.len());
    let mut right = vec![0usize; ks.len()];
    const CHUNK: usize = 256;
    for (features, labels) in test.features.chunks(CHUNK * test.width).zip(test.labels.chunks(CHUNK)) {
        let x = cx.tensor(features.to_vec(), labels.len(), test.width)?;
        let similarity = ops::linear(cx, &mut Tape::inference(), &x, &bank, Act::None)?.to_vec();
        for (row, &label) in similarity.chunks_exact(train.labels.len()).zip(labels) {
            let mut order: Vec<u32> = (0..row.len() as u32).collect();
            let nearer = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
            if most < order.len() {
                order.select_nth_unstable_by(most, nearer);
                order.truncate(most);
            }
            order.sort_unstable_by(nearer);
            for (right, &k) in right.iter_mut().zip(ks) {
                let mut votes = vec![0f64; classes];
                for &i in order.iter().take(k) {
                    votes[train.labels[i as usize] as usize] += (f64::from(row[i as usize]) / TEMPERATURE).exp();
                }
                let best = (0..classes).max_by(|&a, &b| votes[a].total_cmp(&votes[b]).then(b.cmp(&a)));
                *right += usize::from(best == Some(label as usize));
            }
        }
    }
    Ok(right.into_iter().map(|r| r as f64 / test.labels.len() as f64).collect())
}

impl Knn {
    fn report(&self, accuracies: &[f64], skipped: usize) -> Value {
        let mut report = json!({ "accuracy": accuracies[0] });
        if skipped > 0 {
            report["skipped"] = skipped.into();
        }
        if self.k.len() > 1 {
            report["by_k"] = self.k.iter().zip(accuracies).map(|(k, a)| (k.to_string(), json!(a))).collect();
        }
        report
    }

    fn stage(&self) -> Result<Option<&str>, Refusal> {
        match &self.student {
            None => Ok(None),
            Some(Weights::Stage(stage)) => Ok(Some(stage)),
            Some(_) => Err(Refusal::new("student", "expected the student of an earlier stage, as `{stage: NAME}`")
                .help("a tower from a file goes under `teachers`")),
        }
    }
}

impl Stage for Knn {
    fn plan(&self, cx: &StageContext) -> Result<StagePlan, Vec<Refusal>> {
        let mut refusals = Vec::new();
        let mut plan = StagePlan::default();
        match open_both(&self.train, &self.test, cx.environment) {
            Ok(Some((train, test))) => {
                let neighbours = train.images.len();
                if let Some(i) = self.k.iter().position(|&k| k > neighbours) {
                    let message = format!("{} neighbours of {neighbours} images", self.k[i]);
                    refusals.push(Refusal::new(i.to_string(), message).under("k"));
                }
                plan.images = Some(neighbours + test.images.len());
                plan.data = vec![train.record(format!("{}.train", cx.name)), test.record(format!("{}.test", cx.name))];
            }
            Ok(None) => {}
            Err(more) => refusals.extend(more),
        }
        let size = self.train.size(cx.environment).unwrap_or(0);
        let towers = cx.towers(size);
        let mut passes = Vec::new();
        if let Some(stage) = keep(&mut refusals, self.stage()).flatten() {
            let student = keep(&mut refusals, towers.student(stage).map_err(|r| r.under("student")));
            passes.extend(student.map(|student| student.shape));
        }
        if self.student.is_none() && self.baselines.contains(&Baseline::Untrained) {
            refusals
                .push(Refusal::new("baselines", "`untrained` is a student before training, but `student` is missing"));
        }
        if self.student.is_none() && self.baselines.is_empty() && self.teachers.is_empty() {
            refusals.push(
                Refusal::whole("nothing is measured").help("give a `student`, `teachers`, or `baselines: [pixels]`"),
            );
        }
        if refusals.is_empty() {
            for (name, slot) in &self.teachers {
                let planned = Build::build(slot).and_then(|t| t.plan(&towers));
                if let Some(shape) = keep(&mut refusals, planned.map_err(|r| r.under(name).under("teachers"))) {
                    passes.push(shape);
                }
            }
            let pixels = self.baselines.contains(&Baseline::Pixels);
            plan.memory = memory::features(&passes, pixels, plan.images.unwrap_or(0), size, self.batch);
        }
        match refusals.is_empty() {
            true => Ok(plan),
            false => Err(refusals),
        }
    }

    fn run(&self, mut run: StageRun) -> Result<Outcome> {
        let run = &mut run;
        let train = self.train.open().map_err(|r| r.under("train"))?;
        let test = self.test.open().map_err(|r| r.under("test"))?;
        let towers = run.stage.towers(train.size);
        let mut results = serde_json::Map::new();
        let mut measure = |run: &mut StageRun, name: &str, tower: &Tower| -> Result<()> {
            let view = View { pooling: self.pooling, tap: self.tap, batch: self.batch };
            let near = extract(run, tower, &train, view)?;
            let far = extract(run, tower, &test, view)?;
            let report = self.report(&accuracy(&run.cx, &near, &far, &self.k)?, near.skipped + far.skipped);
            run.progress.result(run.stage.name, &json!({ name: report }));
            results.insert(name.to_string(), report);
            Ok(())
        };
        if self.baselines.contains(&Baseline::Pixels) {
            measure(run, "pixels", &Tower::Pixels)?;
        }
        if let Some(stage) = self.stage()? {
            let record = towers.student(stage).map_err(|r| r.under("student"))?;
            let init = Init::new(run.cx.device(), run.stage.seed, &*record.init_scope);
            // It runs at the size it was trained at, and resizes these images to that.
            let trained_at = PlanContext { data_size: record.shape.image_size, ..towers };
            let mut student = Build::build(&record.slot)?.build(&trained_at, &init).map_err(|e| under(e, "student"))?;
            student.set_reach(record.reach);
            if self.baselines.contains(&Baseline::Untrained) {
                measure(run, "untrained", &Tower::Student(&*student))?;
            }
            student.load(record.weights.as_ref().expect("a stage that ran leaves its student's weights"))?;
            measure(run, "student", &Tower::Student(&*student))?;
        }
        for (name, slot) in &self.teachers {
            let teacher = Build::build(slot)?.build(&towers, &run.cx).map_err(|e| under(under(e, name), "teachers"))?;
            measure(run, name, &Tower::Teacher(&*teacher))?;
        }
        Ok(Outcome { results: Value::Object(results), student: None, metric_records: run.metric_records })
    }
}

register!(stage "knn" => Knn, "measures frozen features by weighted k nearest neighbours",
    example: "{ type: knn, train: { dataset: { type: sample, split: train } }, test: { dataset: { type: sample, split: test } }, baselines: [pixels] }",
    paper: "DINO, arXiv 2104.14294, section 4.1");

#[cfg(test)]
mod tests {
    use maskalign_engine::Device;

    use super::*;

    /// Votes are exp(similarity / 0.07): one very near neighbour outweighs two that are farther.
    #[test]
    fn votes_are_weighted_by_similarity() {
        let cx = Context::new(Device::Cpu, 1);
        let angle = |degrees: f64| [degrees.to_radians().cos() as f32, degrees.to_radians().sin() as f32];
        let bank = |angles: &[f64], labels: &[u32]| Bank {
            features: angles.iter().flat_map(|&a| angle(a)).collect(),
            width: 2,
            labels: labels.to_vec(),
            skipped: 0,
        };
        let train = bank(&[5.0, 40.0, 42.0], &[0, 1, 1]);
        let test = bank(&[0.0, 41.0], &[0, 1]);
        assert_eq!(accuracy(&cx, &train, &test, &[1, 3]).unwrap(), [1.0, 1.0]);
    }
}
