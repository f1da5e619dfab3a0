//! Weighted k-nearest-neighbour classification of frozen features (DINO's protocol, arXiv 2104.14294, section 4.1).

use maskalign_registry::{LevelRef, Refusal, With};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    Data, FeatureTap, PlannedJudge, PlannedStage, Pooling, Stage, StageContext, StageRun, StageSummary, Tower, View,
    data::{PlannedSides, Sides, spread},
    features::extract_blocks,
    measured::{MeasuredTowers, Measures, Measuring, PlannedTowers, batch},
    memory::NeighbourSearch,
    neighbours::{Neighbour, Search},
    pictures::{MAPPED, NEIGHBOURS, Neighbours, SEEKERS, show_map, show_neighbours},
};
use crate::{
    component,
    components::{students::StudentModel, towers::StudentPlan},
    error::Result,
    register,
};

/// Divisor of similarities before they are exponentiated into votes.
const TEMPERATURE: f64 = 0.07;
/// What needs labels, in refusals.
const PURPOSE: &str = "k-NN";

fn neighbours() -> Vec<usize> {
    vec![20]
}

/// k-NN accuracy of a student, of teachers, and of what they are compared with: features of length 1, cosine
/// similarity, votes weighted by exp(similarity / 0.07).
///
/// The neighbours are exact. The features of `test` are held, those of `train` go by in blocks: their number costs no
/// memory.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Knn(With<MeasuredTowers, KnnOptions>);

/// The options that are k-NN's own.
#[component]
struct KnnOptions {
    /// Labelled images that neighbours are taken from.
    train: Data,
    /// Labelled images that are classified.
    test: Data,
    /// Numbers of neighbours; `accuracy` is that of the first.
    #[serde(default = "neighbours")]
    #[schemars(length(min = 1), inner(range(min = 1)))]
    k: Vec<usize>,
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
    sides: PlannedSides,
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
        let mut refusals = Vec::new();
        let options = sides(&self.train, &self.test);
        let Some(sides) = options.plan(cx.environment, PURPOSE, &mut refusals) else { return Err(refusals) };
        options.record(&sides, &format!("{}.knn", cx.name), summary);
        let (seekers, image_size) = (sides.lengths()[1], sides.seekers.size);
        let search = NeighbourSearch { seekers, k: self.k, image_size, images: batch() };
        summary.memory += search.of_features(width, 1);
        Ok(PlannedKnn { every_epochs: self.every_epochs, sides, k: self.k })
    }
}

impl PlannedKnn {
    /// The accuracy of a student in training.
    pub(super) fn measure(&self, run: &mut StageRun, student: &dyn StudentModel) -> Result<Value> {
        let view = View { pooling: Pooling::Mean, tap: FeatureTap::Block, batch: batch() };
        let measured = measure(run, &self.sides, &Tower::Student(student), view, None, &[self.k], None)?;
        Ok(json!({ "accuracy": measured.accuracies[0][0] }))
    }
}

fn sides<'a>(train: &'a Data, test: &'a Data) -> Sides<'a> {
    Sides { searched: ("train", train), seekers: ("test", test) }
}

/// A tower's accuracies for each number of neighbours, of the last level or of those given. The last level is shown in
/// pictures of the tower that is called so.
fn measure(
    run: &mut StageRun,
    sides: &PlannedSides,
    tower: &Tower,
    view: View,
    levels: Option<&[LevelRef]>,
    ks: &[usize],
    shown: Option<&str>,
) -> Result<Measured> {
    let (cx, train, test) = (run.cx, sides.searched.open()?, sides.seekers.open()?);
    let k = ks.iter().copied().max().unwrap_or(1).min(train.images.len());
    let mut searches: Vec<Search> = Vec::new();
    let seekers = extract_blocks(run, tower, test, view, levels, &mut |level, block| {
        if searches.len() <= level {
            searches.push(Search::new(k));
        }
        searches[level].add(block);
        Ok(())
    })?;
    let searched =
        extract_blocks(run, tower, train, view, levels, &mut |level, block| searches[level].search(cx, &block))?;
    let labels = (searched.labels(train)?, seekers.labels(test)?);
    let last = searches.len() - 1;
    let seeking = spread(seekers.places.len(), if shown.is_some() { SEEKERS } else { 0 });
    if let Some(whose) = shown {
        let mapped = spread(seekers.places.len(), MAPPED);
        let (features, width) = searches[last].seekers(&mapped);
        let places: Vec<usize> = mapped.iter().map(|&row| seekers.places[row]).collect();
        show_map(run, whose, test, &places, &features, width)?;
    }
    let mut found = Vec::new();
    let mut of_level = |(level, search): (usize, Search)| {
        let neighbours = search.finish().enumerate().map(|(row, neighbours)| {
            if level == last && seeking.contains(&row) {
                let nearest = neighbours.iter().take(NEIGHBOURS).map(|near| searched.places[near.place as usize]);
                found.push((seekers.places[row], nearest.collect()));
            }
            neighbours
        });
        accuracies(neighbours, &labels.0, &labels.1, ks)
    };
    let accuracies = searches.into_iter().enumerate().map(&mut of_level).collect();
    if let Some(whose) = shown {
        show_neighbours(run, &Neighbours { whose, seekers: test, searched: train, found: &found })?;
    }
    Ok(Measured { accuracies, skipped: searched.skipped + seekers.skipped })
}

/// What k-NN says of a tower.
struct Measured {
    /// For each level the accuracy by each number of neighbours.
    accuracies: Vec<Vec<f64>>,
    /// Images that could not be read.
    skipped: usize,
}

/// Share of the tested images that each number of neighbours classifies rightly, by the labels of the images that
/// neighbours are taken from, and of those that are tested.
fn accuracies(neighbours: impl Iterator<Item = Vec<Neighbour>>, train: &[u32], test: &[u32], ks: &[usize]) -> Vec<f64> {
    let classes = 1 + train.iter().chain(test).max().copied().unwrap_or(0) as usize;
    let mut right = vec![0usize; ks.len()];
    for (neighbours, &label) in neighbours.zip(test) {
        for (right, &k) in right.iter_mut().zip(ks) {
            let votes = votes(&neighbours[..k.min(neighbours.len())], train, classes);
            *right += usize::from(winner(&votes) == label as usize);
        }
    }
    right.into_iter().map(|right| right as f64 / test.len() as f64).collect()
}

/// What each class gets from neighbours, whose classes are those of their places in `labels`.
fn votes(neighbours: &[Neighbour], labels: &[u32], classes: usize) -> Vec<f64> {
    let mut votes = vec![0.0; classes];
    for neighbour in neighbours {
        votes[labels[neighbour.place as usize] as usize] += (f64::from(neighbour.similarity) / TEMPERATURE).exp();
    }
    votes
}

/// The class with most votes; of several the first.
fn winner(votes: &[f64]) -> usize {
    let better = |&a: &usize, &b: &usize| votes[a].total_cmp(&votes[b]).then(b.cmp(&a));
    (0..votes.len()).max_by(better).unwrap_or(0)
}

/// The result of a tower at a level.
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

/// k-NN whose options fit.
struct PlannedKnnStage {
    summary: StageSummary,
    sides: PlannedSides,
    towers: PlannedTowers,
    k: Vec<usize>,
}

impl Knn {
    /// Plans to measure the towers of the options, or a student in training.
    fn plan_measures(&self, cx: &StageContext, trained: Option<&StudentPlan>) -> Result<PlannedKnnStage, Vec<Refusal>> {
        let With { shared, own } = &self.0;
        let mut refusals = Vec::new();
        let mut summary = StageSummary::default();
        let options = sides(&own.train, &own.test);
        let sides = options.plan(cx.environment, PURPOSE, &mut refusals);
        if let Some(sides) = &sides {
            let [searched, seekers] = sides.lengths();
            if let Some(i) = own.k.iter().position(|&k| k > searched && searched > 0) {
                let message = format!("{} neighbours of {searched} images", own.k[i]);
                refusals.push(Refusal::new(i.to_string(), message).under("k"));
            }
            summary.images = sides.searched.opened().map(|_| searched + seekers);
            options.record(sides, cx.name, &mut summary);
        }
        let size = sides.as_ref().map_or(0, |sides| sides.searched.size);
        let towers = shared.plan(cx, trained, size, &mut refusals);
        let (Some(sides), Some(towers)) = (sides, towers) else { return Err(refusals) };
        let [_, seekers] = sides.lengths();
        let k = own.k.iter().copied().max().unwrap_or(1);
        let search = NeighbourSearch { seekers, k, image_size: size, images: shared.batch };
        summary.memory += search.bytes(&towers.shapes(), towers.pixels());
        Ok(PlannedKnnStage { summary, sides, towers, k: own.k.clone() })
    }
}

impl Stage for Knn {
    fn plan(&self, cx: &StageContext) -> Result<Box<dyn PlannedStage>, Vec<Refusal>> {
        Ok(Box::new(Measuring(self.plan_measures(cx, None)?)))
    }

    fn plan_judge(&self, cx: &StageContext, student: &StudentPlan) -> Result<Box<dyn PlannedJudge>, Vec<Refusal>> {
        Ok(Box::new(Measuring(self.plan_measures(cx, Some(student))?)))
    }
}

impl Measures for PlannedKnnStage {
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
        shown: Option<&str>,
    ) -> Result<Vec<Value>> {
        let Measured { accuracies, skipped } = measure(run, &self.sides, tower, view, levels, &self.k, shown)?;
        Ok(accuracies.iter().map(|accuracies| report(&self.k, accuracies, skipped)).collect())
    }
}

register!(stage "knn" => Knn, "measures frozen features by weighted k nearest neighbours",
    example: "{ type: knn, train: { dataset: { type: sample, split: train } }, test: { dataset: { type: sample, split: test } }, baselines: [pixels] }",
    paper: "DINO, arXiv 2104.14294, section 4.1");

#[cfg(test)]
mod tests {
    use std::path::Path;

    use maskalign_engine::{Context, Device};

    use super::*;
    use crate::weights::{TensorMap, read};

    /// Votes and probabilities that PyTorch and scikit-learn give (`tests/fixtures/stages/make_knn.py`).
    #[test]
    fn votes_are_those_of_dino_and_scikit_learn() {
        let recorded = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/stages/knn_votes.safetensors");
        let recorded: TensorMap = read(&recorded).unwrap();
        let whole = |name: &str| recorded[name].data.iter().map(|&v| v as usize).collect::<Vec<_>>();
        let (train, test, labels) = (&recorded["train"], &recorded["test"], whole("train_labels"));
        let labels: Vec<u32> = labels.into_iter().map(|label| label as u32).collect();
        let classes = 1 + *labels.iter().max().unwrap() as usize;
        let cx = Context::new(Device::Cpu, 2);
        for k in whole("k") {
            let mut search = Search::new(k);
            search.add(cx.tensor(test.data.clone(), test.shape[0], test.shape[1]).unwrap());
            for part in train.data.chunks(64 * train.shape[1]) {
                let block = cx.tensor(part.to_vec(), part.len() / train.shape[1], train.shape[1]).unwrap();
                search.search(&cx, &block).unwrap();
            }
            let found: Vec<Vec<f64>> = search.finish().map(|found| votes(&found, &labels, classes)).collect();
            let expected = |name: &str| recorded[&format!("{name}.{k}")].data.chunks_exact(classes);
            for (ours, (votes, shares)) in found.iter().zip(expected("votes").zip(expected("probabilities"))) {
                let all: f64 = ours.iter().sum();
                for (our, (&vote, &share)) in ours.iter().zip(votes.iter().zip(shares)) {
                    let (vote, share) = (f64::from(vote), f64::from(share));
                    assert!((our - vote).abs() <= 1e-5 * vote, "k {k}: {our}, DINO {vote}");
                    assert!((our / all - share).abs() <= 1e-5 * share, "k {k}: {}, scikit-learn {share}", our / all);
                }
            }
            let winners: Vec<usize> = found.iter().map(|votes| winner(votes)).collect();
            assert_eq!(winners, whole(&format!("predictions.{k}")), "k {k}");
        }
    }
}
