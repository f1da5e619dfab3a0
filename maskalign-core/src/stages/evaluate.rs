//! What a classifier gets right, what it takes for what, and how well it knows.

use std::{collections::BTreeMap, sync::Arc};

use maskalign_registry::Refusal;
use serde_json::{Map, Value, json};

use super::{
    Classify, Data, OpenData, Outcome, PlannedClassifier, PlannedData, PlannedStage, Stage, StageContext, StageRun,
    StageSummary,
    classifiers::{HeadOptions, PlannedHeld},
    keep,
    measured::Judged,
    memory,
    pictures::show_chart,
    supervised::{TOP, best_class, each_scored, is_among_best, largest_label},
    under,
};
use crate::{
    chart, component,
    components::towers::TowerShape,
    error::{Error, Result},
    events::Event,
    register,
};

/// Bins of confidence, as in the paper.
const BINS: usize = 15;

fn batch() -> usize {
    64
}

/// Measures a classifier: the share of images whose class it finds (also among its five best), of each class by itself, what
/// it takes for what, and its calibration.
///
/// The classifier is that of an earlier stage; or a tower with weights of its own and a head that stands beside them, as
/// `finetune` leaves it in a run directory and `maskalign export` writes it, and as timm (`head`, `fc_norm`), MAE (fine-tuned
/// and linear probes) and Hugging Face (`classifier`) save it. A run directory with a student and a linear probe of it is one,
/// too: the probe reads what its recipe says.
///
/// The expected calibration error compares confidence, the probability of the class that is found, with accuracy (Guo et al.
/// 2017, arXiv 1706.04599): images are put into 15 bins of equal width by their confidence, each with its upper bound; the
/// error is the mean over the images of their bin's distance between mean confidence and accuracy.
#[component]
pub struct Evaluate {
    /// The classifier of an earlier stage that fine-tuned or probed a student, as `{stage: NAME}`; or a tower whose `weights` are
    /// a run directory, an exported folder or a file with a classifier, as `{type: vit, weights: PATH}`.
    classifier: Judged,
    /// What classifies behind a tower with weights of its own. Absent: as the weights say.
    #[serde(default)]
    head: Option<HeadOptions>,
    /// Labelled images that are classified.
    data: Data,
    /// Images that go through the classifier together.
    #[serde(default = "batch")]
    #[schemars(range(min = 1, max = 1048576))]
    batch: usize,
}

/// An evaluation whose options fit.
struct PlannedEvaluate {
    summary: StageSummary,
    classifier: PlannedJudged,
    data: PlannedData,
    batch: usize,
}

/// A classifier whose options fit.
enum PlannedJudged {
    /// That of an earlier stage, with the stage's name.
    Stage(String, Arc<dyn PlannedClassifier>),
    /// One with weights of its own.
    Held(Box<PlannedHeld>),
}

/// Classes that are assumed where the weights were not looked at: ImageNet's, for estimates.
const UNSEEN_CLASSES: usize = 1000;

impl PlannedJudged {
    fn tower(&self) -> TowerShape {
        match self {
            PlannedJudged::Stage(_, classifier) => classifier.tower(),
            PlannedJudged::Held(held) => held.tower(),
        }
    }

    /// How many classes it tells apart, where that is known.
    fn classes(&self) -> Option<usize> {
        match self {
            PlannedJudged::Stage(_, classifier) => Some(classifier.classes()),
            PlannedJudged::Held(held) => held.classes(),
        }
    }

    /// Refuses images of other classes.
    fn check(&self, open: &OpenData) -> Result<(), Refusal> {
        open.check_labels("an evaluation")?;
        let own = open.images.classes().map(|classes| classes.len());
        match self {
            PlannedJudged::Stage(stage, classifier) => {
                let learnt = classifier.data().opened();
                learnt.map_or(Ok(()), |learnt| open.check_classes(learnt, &format!("{stage}.data")))?;
            }
            // What they are called is not known: of classes with names there have to be as many.
            PlannedJudged::Held(held) => {
                if let (Some(own), Some(classes)) = (own, held.classes())
                    && own != classes
                {
                    let message = format!("{own} classes, but the classifier tells {classes} apart");
                    return Err(Refusal::new("dataset", message)
                        .help("it needs the classes that it was trained on: one folder for each, empty or not"));
                }
            }
        }
        match (largest_label(open), self.classes()) {
            (most, Some(classes)) if most >= classes => {
                let message = format!("the label {most}, but the classifier tells {classes} classes apart");
                Err(Refusal::new("dataset", message))
            }
            _ => Ok(()),
        }
    }

    fn build(&self, run: &StageRun) -> Result<Box<dyn Classify>> {
        match self {
            PlannedJudged::Held(held) => Ok(Box::new(held.build(run.cx, run.seed, run.trained)?)),
            PlannedJudged::Stage(stage, classifier) => {
                let (_, left) = run.dir.finished_stage(stage)?.ok_or_else(|| {
                    Error::Usage(format!("{} has not what stage `{stage}` left", run.dir.path().display()))
                })?;
                let (mut parameters, head) = left.into_parameters();
                parameters.extend(head);
                classifier.build(run.cx, run.trained, &parameters).map_err(|e| under(e, "classifier"))
            }
        }
    }
}

impl Evaluate {
    /// The classifier, for images of `size` pixels.
    fn classifier(&self, cx: &StageContext, size: usize) -> Result<PlannedJudged, Refusal> {
        match &self.classifier {
            Judged::Stage(_) if self.head.is_some() => {
                Err(Refusal::new("head", "the classifier of an earlier stage has its own")
                    .related(["classifier"], "the earlier stage")
                    .help("leave `head` out; or give a tower as `classifier: { type: vit, weights: PATH }`"))
            }
            Judged::Stage(stage) => {
                let found = cx.classifier(stage).map_err(|refusal| refusal.under("classifier"))?;
                Ok(PlannedJudged::Stage(stage.clone(), Arc::clone(found)))
            }
            Judged::Tower(slot) => {
                let head = self.head.clone().unwrap_or_default();
                let held = PlannedHeld::plan(slot, &head, &cx.towers(size), cx.name, self.batch)?;
                Ok(PlannedJudged::Held(Box::new(held)))
            }
        }
    }
}

impl Stage for Evaluate {
    fn plan(&self, cx: &StageContext) -> Result<Box<dyn PlannedStage>, Vec<Refusal>> {
        let mut refusals = Vec::new();
        let mut summary = StageSummary::default();
        let data = keep(&mut refusals, self.data.plan(cx.environment).map_err(|r| r.under("data")));
        // Without data the size of images is not known, which a tower with weights of its own has to fit.
        let is_planned = data.is_some() || matches!(self.classifier, Judged::Stage(_));
        let size = data.as_ref().map_or(0, |data| data.size);
        let classifier = is_planned.then(|| keep(&mut refusals, self.classifier(cx, size))).flatten();
        let (Some(data), Some(classifier)) = (data, classifier) else { return Err(refusals) };
        if let Some(open) = data.opened() {
            keep(&mut refusals, classifier.check(open).map_err(|refusal| refusal.under("data")));
            summary.images = Some(open.images.len());
            summary.memory = open.images.resident_bytes();
            summary.warnings.extend(open.images.notes());
            summary.data.push(open.record(format!("{}.data", cx.name)));
        }
        if !refusals.is_empty() {
            return Err(refusals);
        }
        let classes = classifier.classes().unwrap_or(UNSEEN_CLASSES);
        summary.memory += memory::classifier(&classifier.tower(), classes, self.batch, data.size);
        Ok(Box::new(PlannedEvaluate { summary, classifier, data, batch: self.batch }))
    }
}

impl PlannedStage for PlannedEvaluate {
    fn summary(&self) -> &StageSummary {
        &self.summary
    }

    fn run(&self, mut run: StageRun) -> Result<Outcome> {
        let model = self.classifier.build(&run)?;
        let data = self.data.open()?;
        let mut tally = Tally::new(model.classes());
        let seen = each_scored(&mut run, &*model, data, self.batch, "data", &mut |scores, label| {
            tally.add(scores, label as usize);
        })?;
        let name = data.class_names();
        let mut results = tally.summary();
        if seen < data.images.len() {
            results.insert("skipped".into(), (data.images.len() - seen).into());
        }
        run.events.send(Event::Result { stage: run.name, result: &Value::Object(results.clone()) })?;
        if run.events.take_pictures() {
            let (classes, counts) = tally.most_confused(chart::MOST_CLASSES);
            let names: Vec<String> = classes.iter().map(|&class| name(class)).collect();
            if let Some(chart) = chart::confusion(&names, &counts) {
                let of = match model.classes() {
                    all if all == classes.len() => String::new(),
                    all => format!("; of {all} classes those that are confused most"),
                };
                let caption =
                    format!("{}. Rows: the images' class; columns: what they were taken for{of}", chart.label());
                show_chart(&mut run, "confusion", caption, chart)?;
            }
        }
        results.insert("classes".into(), tally.by_class(&name));
        results.insert("confusion".into(), tally.confusion(&name));
        Ok(Outcome { results: Value::Object(results), student: None })
    }
}

/// What a classifier said of the images that it was shown.
struct Tally {
    classes: usize,
    /// How often the right class was among the best.
    top: usize,
    /// How often images of a class were taken for a class: a row for each class, without those that are zero.
    taken_for: BTreeMap<usize, BTreeMap<usize, usize>>,
    bins: [Bin; BINS],
}

/// Images of about the same confidence.
#[derive(Clone, Copy, Default)]
struct Bin {
    images: usize,
    right: usize,
    confidence: f64,
}

impl Tally {
    fn new(classes: usize) -> Tally {
        Tally { classes, top: 0, taken_for: BTreeMap::new(), bins: [Bin::default(); BINS] }
    }

    /// Notes the scores of an image, one for each class: logits.
    fn add(&mut self, scores: &[f32], label: usize) {
        let found = best_class(scores);
        self.top += usize::from(is_among_best(scores, label));
        *self.taken_for.entry(label).or_default().entry(found).or_default() += 1;
        let highest = f64::from(scores[found]);
        let confidence = 1.0 / scores.iter().map(|&score| (f64::from(score) - highest).exp()).sum::<f64>();
        // A bin is open below and closed above.
        let bin = &mut self.bins[((confidence * BINS as f64).ceil() as usize).clamp(1, BINS) - 1];
        bin.images += 1;
        bin.right += usize::from(found == label);
        bin.confidence += confidence;
    }

    fn images(&self) -> usize {
        self.bins.iter().map(|bin| bin.images).sum()
    }

    /// The mean over images of their bin's distance between mean confidence and accuracy.
    fn calibration_error(&self) -> f64 {
        self.bins.iter().map(|bin| (bin.right as f64 - bin.confidence).abs()).sum::<f64>() / self.images() as f64
    }

    fn summary(&self) -> Map<String, Value> {
        let images = self.images();
        let right: usize = self.bins.iter().map(|bin| bin.right).sum();
        let mut summary = Map::new();
        summary.insert("images".into(), images.into());
        summary.insert("accuracy".into(), (right as f64 / images as f64).into());
        if self.classes > TOP {
            summary.insert("top_5_accuracy".into(), (self.top as f64 / images as f64).into());
        }
        summary.insert("calibration_error".into(), self.calibration_error().into());
        summary
    }

    /// The images of each class that has any, and the share of them that was found.
    fn by_class(&self, name: &dyn Fn(usize) -> String) -> Value {
        let row = |(&class, found): (&usize, &BTreeMap<usize, usize>)| {
            let images: usize = found.values().sum();
            let right = found.get(&class).copied().unwrap_or(0);
            (name(class), json!({ "images": images, "accuracy": right as f64 / images as f64 }))
        };
        Value::Object(self.taken_for.iter().map(row).collect())
    }

    /// The classes whose images are most often taken for others, or others for them, at most so many and in their order, and
    /// how often each was taken for each of them.
    fn most_confused(&self, most: usize) -> (Vec<usize>, Vec<Vec<u64>>) {
        let mut mistakes = vec![0; self.classes];
        for (&class, found) in &self.taken_for {
            for (&other, images) in found.iter().filter(|(other, _)| **other != class) {
                mistakes[class] += images;
                mistakes[other] += images;
            }
        }
        let mut classes: Vec<usize> = (0..self.classes).collect();
        classes.sort_by_key(|&class| std::cmp::Reverse(mistakes[class]));
        classes.truncate(most);
        classes.sort_unstable();
        let count = |class: usize, other: usize| -> u64 {
            self.taken_for.get(&class).and_then(|found| found.get(&other)).map_or(0, |&images| images as u64)
        };
        let rows = classes.iter().map(|&class| classes.iter().map(|&other| count(class, other)).collect()).collect();
        (classes, rows)
    }

    /// For each class that has images, the classes that they were taken for, with their number.
    fn confusion(&self, name: &dyn Fn(usize) -> String) -> Value {
        let row = |found: &BTreeMap<usize, usize>| {
            Value::Object(found.iter().map(|(&class, &images)| (name(class), images.into())).collect())
        };
        Value::Object(self.taken_for.iter().map(|(&class, found)| (name(class), row(found))).collect())
    }
}

register!(stage "evaluate" => Evaluate, "measures a classifier: accuracies, confusion of classes, calibration",
    example: "{ type: evaluate, classifier: { stage: finetune }, data: { dataset: { type: sample, split: test } } }",
    paper: "calibration: Guo et al. 2017, arXiv 1706.04599");

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_most_confused_classes_are_shown() {
        let mut tally = Tally::new(4);
        // Two of class 1 are taken for 3, one of class 0 for itself, one of class 2 for 1.
        for (found, label) in [(3, 1), (3, 1), (0, 0), (1, 2)] {
            let mut scores = [0.0; 4];
            scores[found] = 1.0;
            tally.add(&scores, label);
        }
        assert_eq!(tally.most_confused(2), (vec![1, 3], vec![vec![0, 2], vec![0, 0]]));
        let (classes, counts) = tally.most_confused(9);
        assert_eq!((classes, counts.concat().iter().sum::<u64>()), (vec![0, 1, 2, 3], 4));
    }

    /// What scikit-learn and torchmetrics say of the same scores (`tests/fixtures/stages/make_evaluate.py`).
    #[test]
    fn numbers_are_those_of_scikit_learn_and_torchmetrics() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/stages/evaluate.json");
        let cases: BTreeMap<String, Value> = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
        assert!(cases.len() > 1);
        for (case, recorded) in cases {
            let classes = recorded["confusion"].as_array().unwrap().len();
            let mut tally = Tally::new(classes);
            let labels = recorded["labels"].as_array().unwrap();
            for (scores, label) in recorded["scores"].as_array().unwrap().iter().zip(labels) {
                let scores: Vec<f32> =
                    scores.as_array().unwrap().iter().map(|score| score.as_f64().unwrap() as f32).collect();
                tally.add(&scores, label.as_u64().unwrap() as usize);
            }
            let summary = tally.summary();
            assert_eq!(summary["images"], labels.len(), "{case}");
            for name in ["accuracy", "top_5_accuracy", "calibration_error"] {
                let (Some(ours), Some(theirs)) = (summary.get(name), recorded[name].as_f64()) else {
                    assert!(
                        classes <= TOP && summary.get(name).is_none() && recorded[name].is_null(),
                        "{case}: {name}"
                    );
                    continue;
                };
                let ours = ours.as_f64().unwrap();
                assert!((ours - theirs).abs() <= 1e-6, "{case}: {name} {ours}, recorded {theirs}");
            }
            let by_class = tally.by_class(&|class| class.to_string());
            let confusion = tally.confusion(&|class| class.to_string());
            for (class, expected) in recorded["by_class"].as_array().unwrap().iter().enumerate() {
                let ours = &by_class[class.to_string()]["accuracy"];
                let same = ours.as_f64().zip(expected.as_f64()).is_some_and(|(a, b)| (a - b).abs() < 1e-12);
                assert!(same || ours.is_null() && expected.is_null(), "{case}: class {class} {ours}, {expected}");
                for (found, count) in recorded["confusion"][class].as_array().unwrap().iter().enumerate() {
                    let ours = confusion[class.to_string()][found.to_string()].as_u64().unwrap_or(0);
                    assert_eq!(ours, count.as_u64().unwrap(), "{case}: {class} taken for {found}");
                }
            }
        }
    }

    /// A confidence on the edge of two bins belongs to the lower; a class that ties with an earlier one is not found.
    #[test]
    fn edges_and_ties() {
        let mut tally = Tally::new(3);
        tally.add(&[0.0, 0.0, 0.0], 1);
        assert_eq!(tally.bins.iter().position(|bin| bin.images == 1), Some(4), "a third is in (4/15, 5/15]");
        assert_eq!(tally.confusion(&|class| class.to_string()), json!({ "1": { "0": 1 } }));
        tally.add(&[0.0, 100.0, 0.0], 1);
        assert_eq!(tally.bins[14].images, 1, "certainty is in the last bin");
    }
}
