//! What features are like, without any label: how many directions they use, and how they lie on the sphere.

use std::sync::{Mutex, PoisonError};

use maskalign_engine::{
    Context, Tape, Tensor,
    ops::{self, Act, LinearWeights},
};
use maskalign_registry::{LevelRef, Refusal, Slot, TransformTag, With};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    Data, OpenData, PlannedData, PlannedJudge, PlannedStage, Stage, StageContext, StageRun, StageSummary, Tower, View,
    data::spread,
    eigenvalues::eigenvalues,
    features::{Blocks, Seen, State, centre_and_scale, each_batch, each_batch_of, scale_to_length_1},
    keep,
    measured::{MeasuredTowers, Measures, Measuring, PlannedTowers},
    memory::{self, block_rows},
    neighbours::{Search, others, rows_of},
    pictures::{MAPPED, NEIGHBOURS, Neighbours, SEEKERS, show_map, show_neighbours},
};
use crate::{component, components::towers::StudentPlan, error::Result, register};

/// Added to the share of each singular value, as in RankMe's paper.
const RANKME_EPS: f64 = 1e-7;
/// The ranks of eigenvalues that alpha-ReQ's authors fit a power law to.
const RANKS: std::ops::RangeInclusive<usize> = 4..=100;
/// Eigenvalues below this share of the first are round-off.
const ROUND_OFF: f64 = 1e-12;
/// The temperature of uniformity.
const T: f64 = 2.0;

fn images() -> usize {
    25_600
}

/// Measures of features that need no labels, of a student, of teachers and of the student before training.
///
/// * `rankme`: the effective rank, exp of the entropy of the singular values' shares (RankMe, arXiv 2210.02885, equation 1;
///   features as they are, 1e-7 added to each share). At most the width of a feature; higher is better, among towers of one
///   width.
/// * `alpha_req`: the exponent by which the eigenvalues of the covariance decay with their rank (alpha-ReQ, NeurIPS 2022),
///   fitted as its authors' code does: least squares of the logarithms at the ranks 4 to 100, weighted by 1 / rank. Near 1
///   is good. Absent where features have too few directions.
/// * `uniformity`: the logarithm of the mean over pairs of images of exp(-2 d^2), d the distance of their features scaled to
///   length 1 (Wang and Isola 2020, arXiv 2005.10242). Lower is more uniform; 0: all are the same.
/// * `pair_accuracy`, with `views`: each image is seen twice, under `views` drawn at random. The share of images whose first
///   view is, among the second views of all images, nearest to its own second, by the cosine of features of length 1 less
///   their mean. By chance it is 1 / images. It says whether features know an image again; what views leave alone, such as
///   colours, helps an untrained tower too.
/// * `alignment`, with `views`: the mean of the squared distance between the two views' features of length 1 (Wang and Isola
///   2020). Lower is nearer; it says something only beside `uniformity`, since features that are all the same have 0.
/// * `cls_patch_similarity`: the mean cosine between the class token and the patches' tokens of its image. Near 1 the class
///   token says what patches say. Absent without a class token.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Quality(With<MeasuredTowers, QualityOptions>);

/// The options that are the stage's own.
#[component]
struct QualityOptions {
    /// Images; labels are not looked at.
    data: Data,
    /// Images that are looked at, at most: equally spaced ones of `data`. RankMe's paper takes 25,600.
    #[serde(default = "images")]
    #[schemars(range(min = 2, max = 16777216))]
    images: usize,
    /// What is done to each image twice to see whether it is known again, such as a random crop; draws by chance. Absent:
    /// that is not measured.
    #[serde(default)]
    views: Vec<Slot<TransformTag>>,
}

/// Measures that fit.
struct PlannedQuality {
    summary: StageSummary,
    data: PlannedData,
    /// The same images, each time as another view.
    views: Option<PlannedData>,
    images: usize,
    towers: PlannedTowers,
}

impl Quality {
    /// Plans to measure the towers of the options, or a student in training.
    fn plan_measures(&self, cx: &StageContext, trained: Option<&StudentPlan>) -> Result<PlannedQuality, Vec<Refusal>> {
        let With { shared, own } = &self.0;
        let mut refusals = Vec::new();
        let mut summary = StageSummary::default();
        let data = keep(&mut refusals, own.data.plan(cx.environment).map_err(|r| r.under("data")));
        let size = data.as_ref().map_or(0, |data| data.size);
        let towers = shared.plan(cx, trained, size, &mut refusals);
        let views = data.as_ref().filter(|_| !own.views.is_empty()).map(|data| data.under(&own.views));
        let views = keep(&mut refusals, views.transpose().map_err(|refusal| refusal.under("views")));
        let (Some(data), Some(towers), Some(views)) = (data, towers, views) else { return Err(refusals) };
        if towers.pixels() {
            let message = "pixels are as wide as images: their singular values would take too long";
            return Err(vec![Refusal::new("baselines", message).help("leave `pixels` out")]);
        }
        let open = data.opened();
        let images = open.map_or(own.images, |open| own.images.min(open.images.len()));
        if let Some(open) = open {
            summary.images = Some(images);
            summary.memory = open.images.resident_bytes();
            summary.warnings.extend(open.images.notes());
            summary.data.push(open.record(format!("{}.data", cx.name)));
            let widest = towers.shapes().iter().map(|(tower, _)| tower.arch.dim).max().unwrap_or(0);
            if images < widest {
                let text = format!("{images} images have no more directions than that, of a feature's {widest}");
                summary.warnings.push(format!("{text}: ranks are too low"));
            }
        }
        let size = views.as_ref().map_or(size, |views| views.size.max(size));
        summary.memory += memory::quality(&towers.shapes(), images, size, shared.batch);
        if views.is_some() {
            summary.memory += memory::pairs(&towers.shapes(), images);
        }
        Ok(PlannedQuality { summary, data, views, images, towers })
    }
}

impl Stage for Quality {
    fn plan(&self, cx: &StageContext) -> Result<Box<dyn PlannedStage>, Vec<Refusal>> {
        Ok(Box::new(Measuring(self.plan_measures(cx, None)?)))
    }

    fn plan_judge(&self, cx: &StageContext, student: &StudentPlan) -> Result<Box<dyn PlannedJudge>, Vec<Refusal>> {
        Ok(Box::new(Measuring(self.plan_measures(cx, Some(student))?)))
    }
}

/// Shows some images with those nearest to them, and many in a plane. `features` are those of the images at `places`.
fn show(run: &mut StageRun, whose: &str, data: &OpenData, places: &[usize], features: &[Tensor]) -> Result<()> {
    let mapped = spread(places.len(), MAPPED);
    let mapped_places: Vec<usize> = mapped.iter().map(|&row| places[row]).collect();
    let (rows, width) = rows_of(features.iter(), &mapped);
    show_map(run, whose, data, &mapped_places, &rows, width)?;
    // As a page of neighbours has them: the features of one tower all point much the same way.
    let every: Vec<usize> = (0..places.len()).collect();
    let (mut rows, width) = rows_of(features.iter(), &every);
    centre_and_scale(&mut rows, width)?;
    let blocks = rows.chunks(block_rows(width) * width);
    let features: Vec<Tensor> =
        blocks.map(|block| Ok(run.cx.tensor(block.to_vec(), block.len() / width, width)?)).collect::<Result<_>>()?;
    let whose = &format!("{whose}, less their mean");
    let seekers = spread(places.len(), SEEKERS);
    // One more: each image is its own nearest.
    let mut search = Search::new((NEIGHBOURS + 1).min(places.len()));
    search.add(run.cx.tensor(rows_of(features.iter(), &seekers).0, seekers.len(), width)?);
    features.iter().try_for_each(|block| search.search(run.cx, block))?;
    let of_seeker = |(&row, found)| {
        let others = others(row, found, NEIGHBOURS).into_iter().map(|(other, _)| places[other]);
        (places[row], others.collect())
    };
    let found: Vec<(usize, Vec<usize>)> = seekers.iter().zip(search.finish()).map(of_seeker).collect();
    show_neighbours(run, &Neighbours { whose, seekers: data, searched: data, found: &found })
}

impl Measures for PlannedQuality {
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
        let data = self.data.open()?.spread(self.images);
        let mut sketches: Vec<Sketch> = Vec::new();
        let seen = sketch_all(run, tower, &data, view, levels, &mut sketches)?;
        if let (Some(whose), Some(last)) = (shown, sketches.last()) {
            show(run, whose, &data, &seen.places, &last.blocks)?;
        }
        let cx = run.cx;
        let result = |sketch: Sketch| -> Result<Value> {
            let mut result = sketch.measure(cx)?;
            if seen.skipped > 0 {
                result.insert("skipped".into(), seen.skipped.into());
            }
            Ok(Value::Object(result))
        };
        let mut results: Vec<Value> = sketches.into_iter().map(result).collect::<Result<_>>()?;
        if let Some(views) = &self.views {
            let views = views.open()?.spread(self.images);
            for (result, pairs) in results.iter_mut().zip(pairs_of(run, tower, &views, view, levels)?) {
                let mut pairs = pairs.measure(run.cx)?;
                if let Value::Object(others) = result.take() {
                    pairs.extend(others);
                }
                *result = Value::Object(pairs);
            }
        }
        Ok(results)
    }
}

/// The features of two views of each image at a level, `[images, width]` each.
struct Pairs {
    views: [Vec<f32>; 2],
    width: usize,
}

/// Sees each image twice, and gives the features of both views by level.
fn pairs_of(
    run: &mut StageRun,
    tower: &Tower,
    views: &OpenData,
    view: View,
    levels: Option<&[LevelRef]>,
) -> Result<Vec<Pairs>> {
    let cx = run.cx;
    let mut found: Vec<Pairs> = Vec::new();
    for pass in 0..2 {
        each_batch_of(run, tower, views, (view, pass), levels, &mut |level, state, _| {
            let features = state.pooled(cx, view.pooling)?;
            if found.len() <= level {
                found.push(Pairs { views: [Vec::new(), Vec::new()], width: features.columns() });
            }
            found[level].views[pass as usize].extend_from_slice(&features.values());
            Ok(())
        })?;
    }
    Ok(found)
}

impl Pairs {
    fn measure(self, cx: &Context) -> Result<Map<String, Value>> {
        let Pairs { views, width } = self;
        // Both views are measured from one mean.
        let [mut rows, second] = views;
        let middle = rows.len();
        rows.extend(second);
        scale_to_length_1(&mut rows, width)?;
        let (first, second) = rows.split_at(middle);
        let distances = first.iter().zip(second).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2));
        let images = (middle / width).max(1);
        let alignment = distances.sum::<f64>() / images as f64;
        centre_and_scale(&mut rows, width)?;
        let (first, second) = rows.split_at(middle);
        let mut search = Search::new(1);
        let size = block_rows(width) * width;
        let tensor = |block: &[f32]| cx.tensor(block.to_vec(), block.len() / width, width);
        first.chunks(size).try_for_each(|block| tensor(block).map(|block| search.add(block)))?;
        second.chunks(size).try_for_each(|block| search.search(cx, &tensor(block)?))?;
        let nearest = search.finish().enumerate();
        let known = nearest.filter(|(image, found)| found.first().is_some_and(|found| found.place as usize == *image));
        let accuracy = known.count() as f64 / images as f64;
        Ok([("pair_accuracy", accuracy), ("alignment", alignment)]
            .map(|(name, value)| (name.to_owned(), value.into()))
            .into_iter()
            .collect())
    }
}

/// Takes in all images in one pass.
fn sketch_all(
    run: &mut StageRun,
    tower: &Tower,
    data: &OpenData,
    view: View,
    levels: Option<&[LevelRef]>,
    sketches: &mut Vec<Sketch>,
) -> Result<Seen> {
    let cx = run.cx;
    let mut blocks = Blocks::default();
    let seen = each_batch(run, tower, data, view, levels, &mut |level, state, _| {
        let features = state.pooled(cx, view.pooling)?;
        if sketches.len() <= level {
            sketches.push(Sketch::new(features.columns()));
        }
        sketches[level].compare_tokens(&state);
        blocks.add(level, &features, &mut |level, values, _| sketches[level].add(cx, values))
    })?;
    blocks.finish(&mut |level, values, _| sketches[level].add(cx, values))?;
    Ok(seen)
}

/// What is kept of the features at a level.
struct Sketch {
    width: usize,
    /// Features of length 1, in blocks.
    blocks: Vec<Tensor>,
    /// Sums of products of two values of a feature: the lower half of a square, by rows.
    products: Vec<Mutex<Vec<f64>>>,
    sums: Vec<f64>,
    images: usize,
    /// Sum and number of cosines between class tokens and patches.
    cosines: (f64, usize),
}

impl Sketch {
    fn new(width: usize) -> Sketch {
        let products = (0..width).map(|row| Mutex::new(vec![0.0; row + 1])).collect();
        Sketch { width, blocks: Vec::new(), products, sums: vec![0.0; width], images: 0, cosines: (0.0, 0) }
    }

    /// Adds the cosine of each patch's token with its image's class token.
    fn compare_tokens(&mut self, state: &State) {
        let Some((tokens, true)) = state.tokens else { return };
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        for image in state.x.values().chunks_exact(tokens * self.width) {
            let (cls, patches) = image.split_at(self.width);
            for patch in patches.chunks_exact(self.width) {
                let lengths = (dot(cls, cls) * dot(patch, patch)).sqrt().max(1e-12);
                self.cosines.0 += dot(cls, patch) / lengths;
                self.cosines.1 += 1;
            }
        }
    }

    /// Adds a block of features, row by row.
    fn add(&mut self, cx: &Context, mut values: Vec<f32>) -> Result<()> {
        let (width, products) = (self.width, &self.products);
        // Each row of products is summed in the order of the images: the same for any number of threads.
        cx.pool().run(width, &|row| {
            let mut sums = products[row].lock().unwrap_or_else(PoisonError::into_inner);
            for feature in values.chunks_exact(width) {
                let value = f64::from(feature[row]);
                sums.iter_mut().zip(feature).for_each(|(sum, other)| *sum += value * f64::from(*other));
            }
        });
        for feature in values.chunks_exact(width) {
            self.sums.iter_mut().zip(feature).for_each(|(sum, value)| *sum += f64::from(*value));
        }
        scale_to_length_1(&mut values, width)?;
        let rows = values.len() / width;
        self.images += rows;
        self.blocks.push(cx.tensor(values, rows, width)?);
        Ok(())
    }

    fn measure(self, cx: &Context) -> Result<Map<String, Value>> {
        let mut results = Map::new();
        let squares = self.eigenvalues(Centre::Origin);
        // A matrix of fewer images than values has as many singular values as images.
        results.insert("rankme".into(), effective_rank(&squares[..self.images.min(self.width)]).into());
        if let Some(alpha) = decay(&self.eigenvalues(Centre::Mean)) {
            results.insert("alpha_req".into(), alpha.into());
        }
        if let Some(uniformity) = uniformity(cx, &self.blocks)? {
            results.insert("uniformity".into(), uniformity.into());
        }
        if self.cosines.1 > 0 {
            results.insert("cls_patch_similarity".into(), (self.cosines.0 / self.cosines.1 as f64).into());
        }
        Ok(results)
    }

    /// The eigenvalues of the sums of products of features as they are, or of their distances from the mean; in descending
    /// order.
    fn eigenvalues(&self, centre: Centre) -> Vec<f64> {
        let rows: Vec<_> =
            self.products.iter().map(|row| row.lock().unwrap_or_else(PoisonError::into_inner).clone()).collect();
        let value = |at: usize| {
            let (i, j) = (at / self.width, at % self.width);
            let sum = rows[i.max(j)][i.min(j)];
            match centre {
                Centre::Origin => sum,
                Centre::Mean => sum - self.sums[i] * self.sums[j] / self.images as f64,
            }
        };
        eigenvalues((0..self.width * self.width).map(value).collect(), self.width)
    }
}

/// What features are measured from.
#[derive(Clone, Copy)]
enum Centre {
    Origin,
    Mean,
}

/// RankMe, of the squares of singular values.
fn effective_rank(squares: &[f64]) -> f64 {
    let values = || squares.iter().map(|square| square.max(0.0).sqrt());
    let all: f64 = values().sum();
    let entropy: f64 = values().map(|value| value / all + RANKME_EPS).map(|share| -share * share.ln()).sum();
    entropy.exp()
}

/// The exponent of the power law that eigenvalues follow; `None` where there are too few to tell.
fn decay(eigenvalues: &[f64]) -> Option<f64> {
    let smallest = eigenvalues.first()? * ROUND_OFF;
    let ranked = (1..).zip(eigenvalues).filter(|(rank, value)| RANKS.contains(rank) && **value > smallest);
    let points: Vec<(f64, f64, f64)> =
        ranked.map(|(rank, value)| ((rank as f64).ln(), value.ln(), 1.0 / rank as f64)).collect();
    let all: f64 = points.iter().map(|(_, _, weight)| weight).sum();
    let mean = |of: fn(&(f64, f64, f64)) -> f64| points.iter().map(|point| of(point) * point.2).sum::<f64>() / all;
    let (x, y) = (mean(|point| point.0), mean(|point| point.1));
    let slope = |over: fn(f64, f64) -> f64| points.iter().map(|p| p.2 * over(p.0 - x, p.1 - y)).sum::<f64>();
    (points.len() > 1).then(|| -slope(|dx, dy| dx * dy) / slope(|dx, _| dx * dx))
}

/// The logarithm of the mean of exp(-2 d^2) over pairs of features; `None` without a pair.
fn uniformity(cx: &Context, blocks: &[Tensor]) -> Result<Option<f64>> {
    let blocks = centred(cx, blocks)?;
    let (mut sum, mut pairs) = (0.0, 0);
    for (at, (block, squares)) in blocks.iter().enumerate() {
        for (ahead, (other, other_squares)) in blocks[at..].iter().enumerate() {
            let other = LinearWeights { weight: other.clone(), bias: None, packed: None };
            let products = ops::linear(cx, &mut Tape::inference(), block, &other, Act::None)?;
            for (row, products) in products.values().chunks_exact(products.columns()).enumerate() {
                // Each pair once, and no feature with itself.
                let from = if ahead == 0 { row + 1 } else { 0 };
                let others = products[from..].iter().zip(&other_squares[from..]);
                let distances = others.map(|(product, square)| squares[row] + square - 2.0 * f64::from(*product));
                sum += distances.map(|distance| (-T * distance).exp()).sum::<f64>();
                pairs += products.len() - from;
            }
        }
    }
    Ok((pairs > 0).then(|| (sum / pairs as f64).ln()))
}

/// Features less their mean, with the squares of their lengths. Their distances are the same, and exact where all are alike.
fn centred(cx: &Context, blocks: &[Tensor]) -> Result<Vec<(Tensor, Vec<f64>)>> {
    let (width, images) = (blocks.first().map_or(0, Tensor::columns), blocks.iter().map(Tensor::rows).sum::<usize>());
    let mut mean = vec![0.0; width];
    for block in blocks {
        for feature in block.values().chunks_exact(width) {
            mean.iter_mut().zip(feature).for_each(|(mean, value)| *mean += f64::from(*value) / images as f64);
        }
    }
    let centre = |block: &Tensor| -> Result<(Tensor, Vec<f64>)> {
        let values = block.values();
        let less = values.iter().zip(mean.iter().cycle()).map(|(value, mean)| (f64::from(*value) - mean) as f32);
        let less: Vec<f32> = less.collect();
        let square = |feature: &[f32]| feature.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>();
        let squares = less.chunks_exact(width).map(square).collect();
        Ok((cx.tensor(less, block.rows(), width)?, squares))
    };
    blocks.iter().map(centre).collect()
}

register!(stage "quality" => Quality, "measures features without labels: their rank, decay and uniformity",
    example: "{ type: quality, data: { dataset: { type: sample, split: test } }, student: { stage: pretrain } }",
    paper: "RankMe, arXiv 2210.02885; alpha-ReQ, NeurIPS 2022; uniformity, arXiv 2005.10242");

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, path::Path};

    use maskalign_engine::Device;

    use super::*;
    use crate::weights::read;

    /// What numpy and PyTorch give of the same features (`tests/fixtures/stages/make_quality.py`).
    #[test]
    fn measures_are_those_of_numpy_and_pytorch() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/stages");
        let text = std::fs::read_to_string(fixtures.join("quality.json")).unwrap();
        let expected: BTreeMap<String, Value> = serde_json::from_str(&text).unwrap();
        let features = read(&fixtures.join("quality.safetensors")).unwrap();
        assert_eq!(features.len(), expected.len());
        for (case, features) in features {
            let (rows, width) = (features.shape[0], features.shape[1]);
            for (threads, block) in [(1, rows), (2, 7)] {
                let cx = Context::new(Device::Cpu, threads);
                let mut sketch = Sketch::new(width);
                features.data.chunks(block * width).for_each(|part| sketch.add(&cx, part.to_vec()).unwrap());
                let ours = sketch.measure(&cx).unwrap();
                for name in ["rankme", "alpha_req", "uniformity"] {
                    let (Some(ours), Some(theirs)) = (ours.get(name), expected[&case][name].as_f64()) else {
                        assert!(ours.get(name).is_none() && expected[&case][name].is_null(), "{case}: {name}");
                        continue;
                    };
                    let ours = ours.as_f64().unwrap();
                    assert!((ours - theirs).abs() <= 1e-5 * theirs.abs(), "{case}: {name} {ours}, recorded {theirs}");
                }
            }
        }
    }

    /// What PyTorch gives of the same pairs (`tests/fixtures/stages/make_quality.py`): of some images the second view is
    /// another image's.
    #[test]
    fn pairs_are_those_of_pytorch() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/stages");
        let text = std::fs::read_to_string(fixtures.join("quality_pairs.json")).unwrap();
        let expected: BTreeMap<String, Value> = serde_json::from_str(&text).unwrap();
        let features = read(&fixtures.join("quality_pairs.safetensors")).unwrap();
        assert_eq!(features.len(), 2 * expected.len());
        for (case, expected) in expected {
            let view = |which: &str| features[&format!("{case}, {which}")].data.clone();
            let width = features[&format!("{case}, first")].shape[1];
            for threads in [1, 2] {
                let cx = Context::new(Device::Cpu, threads);
                let pairs = Pairs { views: [view("first"), view("second")], width };
                let ours = pairs.measure(&cx).unwrap();
                assert_eq!(ours["pair_accuracy"], expected["pair_accuracy"], "{case}");
                let (ours, theirs) = (ours["alignment"].as_f64().unwrap(), expected["alignment"].as_f64().unwrap());
                assert!((ours - theirs).abs() <= 1e-5 * theirs, "{case}: alignment {ours}, recorded {theirs}");
            }
        }
    }
}
