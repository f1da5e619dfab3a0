//! Classification from a few labelled images: logistic regression on frozen features.

use std::collections::{BTreeMap, BTreeSet};

use maskalign_engine::{Pool, random::Stream};
use maskalign_registry::{LevelRef, Refusal, With};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{
    Data, OpenData, PlannedJudge, PlannedStage, Stage, StageContext, StageRun, StageSummary, Tower, View,
    data::{PlannedSides, Sides},
    features::extract_blocks,
    logistic::{Examples, Logistic},
    measured::{MeasuredTowers, Measures, Measuring, PlannedTowers},
    memory::Fits,
};
use crate::{component, components::towers::StudentPlan, error::Result, events::Event, register, run::moments};

/// Draws of training images: an accuracy is the mean over them.
const SUBSETS: usize = 3;

fn shots() -> Vec<usize> {
    vec![1, 2, 5]
}
fn hundredth() -> Vec<f64> {
    vec![0.01]
}
fn one() -> f64 {
    1.0
}

/// Accuracy of logistic regression on the frozen features of a few labelled images: 1, 2 and 5 of each class, and 1 % of all.
///
/// Features have length 1. The classifier has a bias and a penalty on the squares of its weights, and is fitted to its
/// optimum in double precision: scikit-learn's `LogisticRegression` with `C = 1 / penalty`.
///
/// An accuracy is the mean over three subsets of `train`, and `deviation` the standard deviation of the three. A subset takes
/// the first images of each class in an order that the recipe's seed gives, from a random stream for each subset and class:
/// it depends on the data and the seed alone, a larger one holds the smaller ones, and every tower is judged on the same.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct FewShot(With<MeasuredTowers, FewShotOptions>);

/// The options that are the stage's own.
#[component]
struct FewShotOptions {
    /// Labelled images that the few are drawn from.
    train: Data,
    /// Labelled images that are classified.
    test: Data,
    /// Numbers of images of each class; `[]`: none.
    #[serde(default = "shots")]
    #[schemars(inner(range(min = 1)))]
    shots: Vec<usize>,
    /// Shares of each class besides, rounded, but at least one image; `[]`: none.
    #[serde(default = "hundredth")]
    #[schemars(inner(range(min = 1e-9, max = 1.0)))]
    shares: Vec<f64>,
    /// Weight of half the sum of the squared weights, against the sum of the images' cross entropies.
    #[serde(default = "one")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    penalty: f64,
}

/// Few-shot classification whose options fit.
struct PlannedFewShot {
    summary: StageSummary,
    sides: PlannedSides,
    towers: PlannedTowers,
    amounts: Vec<Amount>,
    penalty: f64,
}

/// How many images of a class are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Amount {
    Images(usize),
    Share(f64),
}

impl Amount {
    /// Of a class of so many images.
    fn of(self, images: usize) -> usize {
        match self {
            Amount::Images(wanted) => wanted.min(images),
            Amount::Share(share) => ((share * images as f64).round() as usize).clamp(1, images),
        }
    }

    /// What results have its accuracy under.
    fn name(self) -> String {
        match self {
            Amount::Images(images) => format!("{images}_per_class"),
            // Names are parted at dots. A product has digits that the share has not.
            Amount::Share(share) => format!("{}_percent", (1e8 * share).round() / 1e6).replace('.', "_"),
        }
    }
}

impl FewShot {
    /// Plans to measure the towers of the options, or a student in training.
    fn plan_measures(&self, cx: &StageContext, trained: Option<&StudentPlan>) -> Result<PlannedFewShot, Vec<Refusal>> {
        let With { shared, own } = &self.0;
        let mut refusals = Vec::new();
        let mut summary = StageSummary::default();
        let shares = own.shares.iter().copied().map(Amount::Share);
        let amounts: Vec<Amount> = own.shots.iter().copied().map(Amount::Images).chain(shares).collect();
        if amounts.is_empty() {
            refusals.push(Refusal::new("shots", "neither a number of images nor a share of them is asked for"));
        }
        let options = Sides { searched: ("train", &own.train), seekers: ("test", &own.test) };
        let sides = options.plan(cx.environment, "few-shot classification", &mut refusals);
        let mut drawn = Drawn::default();
        if let Some(sides) = &sides {
            options.record(sides, cx.name, &mut summary);
            if let Some(train) = sides.searched.opened() {
                let classes = by_class(train);
                own.check(train, &classes, &mut refusals);
                drawn = Drawn::of(&classes, &amounts);
                summary.images = Some(drawn.images + sides.lengths()[1]);
            }
        }
        let size = sides.as_ref().map_or(0, |sides| sides.searched.size);
        let towers = shared.plan(cx, trained, size, &mut refusals);
        let (Some(sides), Some(towers)) = (sides, towers) else { return Err(refusals) };
        if !refusals.is_empty() {
            return Err(refusals);
        }
        let fits = Fits {
            images: drawn.images,
            most: drawn.most,
            classes: drawn.classes,
            fits: SUBSETS * amounts.len(),
            tested: sides.lengths()[1],
        };
        summary.memory += fits.bytes(&towers.shapes(), towers.pixels(), size, shared.batch);
        Ok(PlannedFewShot { summary, sides, towers, amounts, penalty: own.penalty })
    }
}

impl Stage for FewShot {
    fn plan(&self, cx: &StageContext) -> Result<Box<dyn PlannedStage>, Vec<Refusal>> {
        Ok(Box::new(Measuring(self.plan_measures(cx, None)?)))
    }

    fn plan_judge(&self, cx: &StageContext, student: &StudentPlan) -> Result<Box<dyn PlannedJudge>, Vec<Refusal>> {
        Ok(Box::new(Measuring(self.plan_measures(cx, Some(student))?)))
    }
}

impl FewShotOptions {
    /// Refuses classes that cannot be told apart, or have too few images.
    fn check(&self, train: &OpenData, classes: &Classes, refusals: &mut Vec<Refusal>) {
        if classes.len() < 2 {
            let refusal = Refusal::new("dataset", "all images are of one class: there is nothing to tell apart");
            refusals.push(refusal.under("train"));
        }
        let Some((fewest, label)) = classes.iter().map(|(label, places)| (places.len(), *label)).min() else { return };
        if let Some(at) = self.shots.iter().position(|&shots| shots > fewest) {
            let name = train.class_names()(label as usize);
            let message = format!("{} images of each class, but class `{name}` has {fewest}", self.shots[at]);
            let help = "leave this number out, or leave the class out of the data";
            refusals.push(Refusal::new(at.to_string(), message).help(help).under("shots"));
        }
    }
}

/// The places of the images of each class, in order.
type Classes = BTreeMap<u32, Vec<usize>>;

fn by_class(data: &OpenData) -> Classes {
    let mut classes = Classes::new();
    for place in 0..data.images.len() {
        if let Some(label) = data.images.label(place) {
            classes.entry(label).or_default().push(place);
        }
    }
    classes
}

/// What is drawn, for estimates.
#[derive(Default)]
struct Drawn {
    /// Images of all subsets, at most.
    images: usize,
    /// Images of the largest subset.
    most: usize,
    classes: usize,
}

impl Drawn {
    fn of(classes: &Classes, amounts: &[Amount]) -> Drawn {
        let of_class = |places: &Vec<usize>| amounts.iter().map(|amount| amount.of(places.len())).max().unwrap_or(0);
        let most = classes.values().map(of_class).sum();
        let images = classes.values().map(|places| (SUBSETS * of_class(places)).min(places.len())).sum();
        Drawn { images, most, classes: classes.len() }
    }
}

/// The images of each class in the order in which a subset takes them.
fn shuffled(mut classes: Classes, seed: u64, subset: usize) -> Classes {
    for (label, places) in &mut classes {
        Stream::new(seed, "few shot", subset as u64, u64::from(*label)).shuffle(places);
    }
    classes
}

/// The first images of each class.
fn take(subset: &Classes, amount: Amount) -> impl Iterator<Item = usize> + '_ {
    subset.values().flat_map(move |places| places[..amount.of(places.len())].iter().copied())
}

impl Measures for PlannedFewShot {
    fn summary(&self) -> &StageSummary {
        &self.summary
    }

    fn towers(&self) -> &PlannedTowers {
        &self.towers
    }

    fn measure(
        &self,
        run: &mut StageRun,
        tower: &Tower,
        view: View,
        levels: Option<&[LevelRef]>,
        _shown: Option<&str>,
    ) -> Result<Vec<Value>> {
        let (cx, train, test) = (run.cx, self.sides.searched.open()?, self.sides.seekers.open()?);
        let subsets: Vec<Classes> = (0..SUBSETS).map(|subset| shuffled(by_class(train), run.seed, subset)).collect();
        let draws: Vec<(Amount, &Classes)> =
            self.amounts.iter().flat_map(|amount| subsets.iter().map(move |subset| (*amount, subset))).collect();
        // Features are taken once of each image, whatever subsets it is in.
        let picked: BTreeSet<usize> = draws.iter().flat_map(|(amount, subset)| take(subset, *amount)).collect();
        let picked: Vec<usize> = picked.into_iter().collect();
        let few = train.pick(picked.clone());
        let mut features: Vec<Features> = Vec::new();
        let seen = extract_blocks(run, tower, &few, view, levels, &mut |level, block| {
            if features.len() <= level {
                features.push(Features { width: block.columns(), values: Vec::new() });
            }
            features[level].values.extend_from_slice(&block.values());
            Ok(())
        })?;
        let labels = seen.labels(&few)?;
        let rows: BTreeMap<usize, usize> =
            seen.places.iter().enumerate().map(|(row, &place)| (picked[place], row)).collect();
        let mut fits: Vec<Vec<Classifier>> = Vec::new();
        for features in &features {
            let mut of_level = Vec::new();
            for (amount, subset) in &draws {
                let rows: Vec<usize> = take(subset, *amount).filter_map(|place| rows.get(&place).copied()).collect();
                of_level.push(Classifier::fit(cx.pool(), features, &rows, &labels, self.penalty));
                run.check_stop()?;
            }
            fits.push(of_level);
        }
        drop(features);
        let unfinished = fits.iter().flatten().filter(|classifier| !classifier.fit.converged).count();
        if unfinished > 0 {
            let text = format!("{unfinished} classifiers are not fitted to their optimum: raise `penalty`");
            run.events.send(Event::Warned { stage: run.name, text: &text })?;
        }
        let mut found: Vec<Vec<Vec<u32>>> = fits.iter().map(|fits| vec![Vec::new(); fits.len()]).collect();
        let tested = extract_blocks(run, tower, test, view, levels, &mut |level, block| {
            let values = block.values();
            for (classifier, found) in fits[level].iter().zip(&mut found[level]) {
                found.extend(classifier.classify(cx.pool(), &values));
            }
            Ok(())
        })?;
        let expected = tested.labels(test)?;
        let result = |found: &Vec<Vec<u32>>| {
            let mut result = Map::new();
            for (amount, found) in self.amounts.iter().zip(found.chunks(SUBSETS)) {
                let share = |found: &Vec<u32>| {
                    let right = found.iter().zip(&expected).filter(|(found, label)| found == label).count();
                    right as f64 / expected.len() as f64
                };
                let (accuracy, variance) = moments(&found.iter().map(share).collect::<Vec<_>>());
                result.insert(amount.name(), json!({ "accuracy": accuracy, "deviation": variance.sqrt() }));
            }
            if seen.skipped + tested.skipped > 0 {
                result.insert("skipped".into(), (seen.skipped + tested.skipped).into());
            }
            Value::Object(result)
        };
        Ok(found.iter().map(result).collect())
    }
}

/// The features of a level, `[images, width]`.
struct Features {
    width: usize,
    values: Vec<f32>,
}

/// What was fitted to some images, and the labels of its classes: a class whose few images cannot be read has none.
struct Classifier {
    fit: Logistic,
    labels: Vec<u32>,
}

impl Classifier {
    fn fit(pool: &Pool, features: &Features, rows: &[usize], labels: &[u32], penalty: f64) -> Classifier {
        let Features { width, values } = features;
        let chosen: Vec<f32> = rows.iter().flat_map(|row| &values[row * width..(row + 1) * width]).copied().collect();
        let classes: BTreeSet<u32> = rows.iter().map(|row| labels[*row]).collect();
        let classes: Vec<u32> = classes.into_iter().collect();
        let class = |row: &usize| classes.partition_point(|class| *class < labels[*row]) as u32;
        let labels: Vec<u32> = rows.iter().map(class).collect();
        let examples = Examples { features: &chosen, width: *width, labels: &labels, classes: classes.len(), penalty };
        Classifier { fit: Logistic::fit(pool, &examples), labels: classes }
    }

    /// The labels of features, row by row.
    fn classify(&self, pool: &Pool, values: &[f32]) -> Vec<u32> {
        let found = self.fit.classify(pool, values).into_iter();
        found.map(|class| self.labels.get(class).copied().unwrap_or(u32::MAX)).collect()
    }
}

register!(stage "few_shot" => FewShot, "classifies from a few labelled images by logistic regression on frozen features",
    example: "{ type: few_shot, train: { dataset: { type: sample, split: train } },
      test: { dataset: { type: sample, split: test } }, student: { stage: pretrain } }",
    paper: "1 % of ImageNet: MSN, arXiv 2204.07141, section 5");

#[cfg(test)]
mod tests {
    use super::*;

    /// The law of the subsets: by class, larger ones hold smaller ones, and seed and subset alone decide.
    #[test]
    fn subsets_are_nested_and_follow_from_the_seed() {
        let classes: Classes = [(0, (0..40).collect()), (3, (40..45).collect())].into();
        let draw =
            |seed, subset, amount| take(&shuffled(classes.clone(), seed, subset), amount).collect::<BTreeSet<_>>();
        let two = draw(0, 0, Amount::Images(2));
        assert_eq!((two.len(), two.range(40..).count()), (4, 2));
        assert!(two.is_subset(&draw(0, 0, Amount::Images(5))));
        assert_eq!(two, draw(0, 0, Amount::Images(2)));
        assert!(two != draw(0, 1, Amount::Images(2)) && two != draw(1, 0, Amount::Images(2)));
        let share = draw(0, 0, Amount::Share(0.1));
        assert_eq!((share.range(..40).count(), share.range(40..).count()), (4, 1), "5 * 0.1 rounds to 1");
        assert_eq!(draw(0, 0, Amount::Share(0.001)).len(), 2, "at least one of each");
        let Drawn { images, most, classes } = Drawn::of(&classes, &[Amount::Images(2), Amount::Share(0.1)]);
        assert_eq!((images, most, classes), (12 + 5, 6, 2));
        assert_eq!(Amount::Share(0.01).name(), "1_percent");
        assert_eq!(Amount::Share(0.005).name(), "0_5_percent");
        assert_eq!(Amount::Share(0.07).name(), "7_percent");
    }
}
