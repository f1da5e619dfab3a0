//! Weighted k-nearest-neighbour classification of frozen features (DINO's protocol, arXiv 2104.14294, section 4.1).

use std::sync::Arc;

use indexmap::IndexMap;
use maskalign_engine::{
    Context, Tape,
    ops::{self, Act, LinearWeights},
};
use maskalign_registry::{Refusal, Slot, TeacherTag, Weights};
use serde_json::{Value, json};

use super::{
    Bank, Data, FeatureTap, Outcome, PlannedData, PlannedStage, Pooling, Stage, StageContext, StageRun, StageSummary,
    Tower, View, extract, keep, memory, under,
};
use crate::{
    component,
    components::{
        students::StudentModel,
        teachers::{PlannedTeacher, TeacherBuild},
        towers::{Environment, StudentPlan, Tap},
    },
    error::Result,
    events::Event,
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
enum Baseline {
    /// The raw pixels.
    Pixels,
    /// The student before training.
    Untrained,
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
pub(super) struct PeriodicKnn {
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

/// k-NN of a student in training, whose options fit.
pub(super) struct PlannedKnn {
    /// Epochs between measurements.
    pub every_epochs: u64,
    sides: Sides,
    k: usize,
}

impl PeriodicKnn {
    /// Refuses data that cannot be opened or has no labels, and a measurement that never comes. Adds what is read, and
    /// the memory it takes for features of `width` values, to the stage's summary.
    pub(super) fn plan(
        &self,
        cx: &StageContext,
        epochs: f64,
        width: usize,
        summary: &mut StageSummary,
    ) -> Result<PlannedKnn, Vec<Refusal>> {
        if self.every_epochs as f64 > epochs {
            let message =
                format!("{} epochs are more than the stage's {epochs}: nothing would be measured", self.every_epochs);
            return Err(vec![Refusal::new("every_epochs", message)]);
        }
        let sides = Sides::plan(&self.train, &self.test, cx.environment)?;
        if let (Some(train), Some(test)) = (sides.train.opened(), sides.test.opened()) {
            summary.data.push(train.record(format!("{}.knn.train", cx.name)));
            summary.data.push(test.record(format!("{}.knn.test", cx.name)));
            summary.memory += memory::bank(train.images.len() + test.images.len(), width);
        }
        Ok(PlannedKnn { every_epochs: self.every_epochs, sides, k: self.k })
    }
}

impl PlannedKnn {
    /// The accuracy of a student in training.
    pub(super) fn measure(&self, run: &mut StageRun, student: &dyn StudentModel) -> Result<Value> {
        let view = View { pooling: Pooling::Mean, tap: FeatureTap::Block, batch: batch() };
        let (accuracies, _) = self.sides.accuracies(run, &Tower::Student(student), view, &[self.k])?;
        Ok(json!({ "accuracy": accuracies[0] }))
    }
}

/// Images that neighbours are taken from, and those that are classified.
struct Sides {
    train: PlannedData,
    test: PlannedData,
}

impl Sides {
    /// Opens both where that is allowed, and refuses them without labels, or with sizes or classes that differ.
    fn plan(train: &Data, test: &Data, environment: Environment) -> Result<Sides, Vec<Refusal>> {
        let mut refusals = Vec::new();
        let mut plan = |data: &Data, name: &str| {
            let planned = data.plan(environment).and_then(|planned| {
                planned.opened().map_or(Ok(()), |open| open.check_labels("k-NN"))?;
                Ok(planned)
            });
            keep(&mut refusals, planned.map_err(|r| r.under(name)))
        };
        let sides = (plan(train, "train"), plan(test, "test"));
        let (Some(train), Some(test)) = sides else { return Err(refusals) };
        if train.size != test.size {
            let message = format!("images of {} pixels, those of `train` have {}", test.size, train.size);
            return Err(vec![Refusal::new("test", message)]);
        }
        if let (Some(train), Some(test)) = (train.opened(), test.opened()) {
            test.check_classes(train, "train").map_err(|r| vec![r.under("test")])?;
        }
        Ok(Sides { train, test })
    }

    /// A tower's accuracy for each number of neighbours, and how many images could not be read.
    fn accuracies(&self, run: &mut StageRun, tower: &Tower, view: View, ks: &[usize]) -> Result<(Vec<f64>, usize)> {
        let near = extract(run, tower, self.train.open()?, view)?;
        let far = extract(run, tower, self.test.open()?, view)?;
        Ok((accuracy(run.cx, &near, &far, ks)?, near.skipped + far.skipped))
    }
}

/// Share of `test` that each number of neighbours in `train` classifies rightly.
fn accuracy(cx: &Context, train: &Bank, test: &Bank, ks: &[usize]) -> Result<Vec<f64>> {
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

fn report(k: &[usize], accuracies: &[f64], skipped: usize) -> Value {
    let mut report = json!({ "accuracy": accuracies[0] });
    if skipped > 0 {
        report["skipped"] = skipped.into();
    }
    if k.len() > 1 {
        report["by_k"] = k.iter().zip(accuracies).map(|(k, a)| (k.to_string(), json!(a))).collect();
    }
    report
}

impl Knn {
    fn stage(&self) -> Result<Option<&str>, Refusal> {
        match &self.student {
            None => Ok(None),
            Some(Weights::Stage(stage)) => Ok(Some(stage)),
            Some(_) => Err(Refusal::new("student", "expected the student of an earlier stage, as `{stage: NAME}`")
                .help("a tower from a file goes under `teachers`")),
        }
    }
}

/// k-NN whose options fit.
struct PlannedKnnStage {
    summary: StageSummary,
    sides: Sides,
    student: Option<(String, StudentPlan)>,
    baselines: Vec<Baseline>,
    teachers: Vec<(String, Arc<dyn PlannedTeacher>)>,
    k: Vec<usize>,
    view: View,
}

impl Stage for Knn {
    fn plan(&self, cx: &StageContext) -> Result<Box<dyn PlannedStage>, Vec<Refusal>> {
        let mut refusals = Vec::new();
        let mut summary = StageSummary::default();
        let sides = match Sides::plan(&self.train, &self.test, cx.environment) {
            Ok(sides) => Some(sides),
            Err(more) => {
                refusals.extend(more);
                None
            }
        };
        if let Some(Sides { train, test }) = &sides
            && let (Some(train), Some(test)) = (train.opened(), test.opened())
        {
            let neighbours = train.images.len();
            if let Some(i) = self.k.iter().position(|&k| k > neighbours) {
                let message = format!("{} neighbours of {neighbours} images", self.k[i]);
                refusals.push(Refusal::new(i.to_string(), message).under("k"));
            }
            summary.images = Some(neighbours + test.images.len());
            summary.warnings.extend(train.images.notes().into_iter().chain(test.images.notes()));
            summary.data = vec![train.record(format!("{}.train", cx.name)), test.record(format!("{}.test", cx.name))];
        }
        let size = sides.as_ref().map_or(0, |sides| sides.train.size);
        let towers = cx.towers(size);
        let student = keep(&mut refusals, self.stage()).flatten().and_then(|stage| {
            let planned = towers.student(stage).map_err(|r| r.under("student"));
            Some((stage.to_string(), keep(&mut refusals, planned)?.clone()))
        });
        if self.student.is_none() && self.baselines.contains(&Baseline::Untrained) {
            refusals
                .push(Refusal::new("baselines", "`untrained` is a student before training, but `student` is missing"));
        }
        if self.student.is_none() && self.baselines.is_empty() && self.teachers.is_empty() {
            refusals.push(
                Refusal::whole("nothing is measured").help("give a `student`, `teachers`, or `baselines: [pixels]`"),
            );
        }
        let mut teachers: Vec<(String, Arc<dyn PlannedTeacher>)> = Vec::new();
        if refusals.is_empty() {
            for (name, slot) in &self.teachers {
                let planned = Build::build(slot).and_then(|t| t.plan(&towers));
                if let Some(planned) = keep(&mut refusals, planned.map_err(|r| r.under(name).under("teachers"))) {
                    teachers.push((name.clone(), planned.into()));
                }
            }
            let whose = student.iter().map(|(_, student)| ("the student".to_string(), student.shape()));
            let towers =
                whose.chain(teachers.iter().map(|(name, teacher)| (format!("teacher `{name}`"), teacher.shape())));
            for (whose, shape) in towers {
                keep(&mut refusals, self.pooling.check(&whose, &shape));
                if self.tap == FeatureTap::Norm {
                    keep(&mut refusals, shape.check_tap(&whose, Tap::Norm));
                }
            }
            let shapes = student.iter().map(|(_, student)| student.shape());
            let shapes: Vec<_> = shapes.chain(teachers.iter().map(|(_, teacher)| teacher.shape())).collect();
            let pixels = self.baselines.contains(&Baseline::Pixels);
            summary.memory = memory::features(&shapes, pixels, summary.images.unwrap_or(0), size, self.batch);
        }
        match sides {
            Some(sides) if refusals.is_empty() => Ok(Box::new(PlannedKnnStage {
                summary,
                sides,
                student,
                baselines: self.baselines.clone(),
                teachers,
                k: self.k.clone(),
                view: View { pooling: self.pooling, tap: self.tap, batch: self.batch },
            })),
            _ => Err(refusals),
        }
    }
}

impl PlannedStage for PlannedKnnStage {
    fn summary(&self) -> &StageSummary {
        &self.summary
    }

    fn run(&self, mut run: StageRun) -> Result<Outcome> {
        let run = &mut run;
        let mut results = serde_json::Map::new();
        let mut measure = |run: &mut StageRun, name: &str, tower: &Tower| -> Result<()> {
            let (accuracies, skipped) = self.sides.accuracies(run, tower, self.view, &self.k)?;
            let report = report(&self.k, &accuracies, skipped);
            run.events.send(Event::Result { stage: run.name, result: &json!({ name: report }) })?;
            results.insert(name.to_string(), report);
            Ok(())
        };
        if self.baselines.contains(&Baseline::Pixels) {
            measure(run, "pixels", &Tower::Pixels)?;
        }
        if let Some((stage, student)) = &self.student {
            let init = Init::new(run.cx.device(), run.seed, &*student.init_scope);
            // It runs at the size it was trained at, and resizes these images to that.
            let mut model = student.tower.build(&init, run.trained).map_err(|e| under(e, "student"))?;
            model.set_reach(student.reach);
            if self.baselines.contains(&Baseline::Untrained) {
                measure(run, "untrained", &Tower::Student(&*model))?;
            }
            model.load(run.trained.get(stage)?)?;
            measure(run, "student", &Tower::Student(&*model))?;
        }
        for (name, teacher) in &self.teachers {
            let mut build = TeacherBuild { cx: run.cx, trained: run.trained, student: None };
            let teacher = teacher.build(&mut build).map_err(|e| under(under(e, name), "teachers"))?;
            measure(run, name, &Tower::Teacher(&*teacher))?;
        }
        Ok(Outcome { results: Value::Object(results), student: None })
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
