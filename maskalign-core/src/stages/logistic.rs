//! Multinomial logistic regression, to its optimum.

use std::sync::{Mutex, PoisonError};

use maskalign_engine::Pool;

/// No part of the gradient is above this share of the penalty at the end. The penalty is the least curvature of the weights:
/// so far at most they are from the optimum.
const TOLERANCE: f64 = 1e-7;
/// Steps at most; the optimum of a penalised problem is there long before.
const STEPS: usize = 2000;
/// Earlier steps that a direction is computed from.
pub(super) const HISTORY: usize = 10;
/// Images whose scores one task computes.
const CHUNK: usize = 16;
/// A step has to gain this share of what its slope promises.
const GAIN: f64 = 1e-4;
/// Values that differ by less, as a share of them, may differ by round-off alone.
const ROUND_OFF: f64 = 1e-12;

/// What a classifier is fitted to.
pub(super) struct Examples<'a> {
    /// `[images, width]`.
    pub features: &'a [f32],
    /// Values of a feature.
    pub width: usize,
    /// The classes of the images, each below `classes` and each with an image.
    pub labels: &'a [u32],
    /// How many classes there are.
    pub classes: usize,
    /// Weight of half the sum of the squared weights, against the sum of the images' cross entropies. Biases are free.
    pub penalty: f64,
}

/// A linear classifier: `[width + 1, classes]`, the last row its biases.
pub(super) struct Logistic {
    parameters: Vec<f64>,
    classes: usize,
    /// Whether the optimum was found.
    pub converged: bool,
}

impl Logistic {
    /// Fits a classifier, from zeros, by L-BFGS (Nocedal and Wright, algorithm 7.4) with backtracking. Where round-off hides
    /// what a step gains, its slope decides (Hager and Zhang 2005, condition T2).
    pub(super) fn fit(pool: &Pool, examples: &Examples) -> Logistic {
        let mut at = vec![0.0; (examples.width + 1) * examples.classes];
        let (mut value, mut gradient) = examples.objective(pool, &at);
        let mut history: Vec<Pair> = Vec::new();
        let tolerance = TOLERANCE * examples.penalty.min(1.0);
        let is_small = |gradient: &[f64]| gradient.iter().all(|part| part.abs() <= tolerance);
        for _ in 0..STEPS {
            if is_small(&gradient) {
                break;
            }
            let direction = direction(&gradient, &history);
            let slope = dot(&direction, &gradient);
            // The first direction is the gradient, of a length that says nothing.
            let mut step = if history.is_empty() { 1.0 / dot(&gradient, &gradient).sqrt() } else { 1.0 };
            let mut moved = None;
            while step > 1e-12 && moved.is_none() {
                let to: Vec<f64> = at.iter().zip(&direction).map(|(at, by)| at + step * by).collect();
                let (there, its_gradient) = examples.objective(pool, &to);
                let gains = there <= value + GAIN * step * slope;
                let may_gain = || {
                    there <= value + ROUND_OFF * value.abs()
                        && dot(&direction, &its_gradient) <= (2.0 * GAIN - 1.0) * slope
                };
                match gains || may_gain() {
                    true => moved = Some((to, there, its_gradient)),
                    false => step *= 0.5,
                }
            }
            let Some((to, there, its_gradient)) = moved else { break };
            let difference = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<_>>();
            let pair = Pair::new(difference(&to, &at), difference(&its_gradient, &gradient));
            if pair.curvature > 0.0 {
                if history.len() == HISTORY {
                    history.remove(0);
                }
                history.push(pair);
            }
            (at, value, gradient) = (to, there, its_gradient);
        }
        Logistic { parameters: at, classes: examples.classes, converged: is_small(&gradient) }
    }

    /// The class with the highest score; of several the first.
    pub(super) fn classify(&self, feature: &[f32]) -> usize {
        let mut scores = vec![0.0; self.classes];
        score(&self.parameters, feature, &mut scores);
        (0..self.classes).max_by(|&a, &b| scores[a].total_cmp(&scores[b]).then(b.cmp(&a))).unwrap_or(0)
    }
}

/// A step and the change of the gradient that it brought.
struct Pair {
    step: Vec<f64>,
    change: Vec<f64>,
    /// Their product.
    curvature: f64,
}

impl Pair {
    fn new(step: Vec<f64>, change: Vec<f64>) -> Pair {
        let curvature = dot(&step, &change);
        Pair { step, change, curvature }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(to: &mut [f64], factor: f64, values: &[f64]) {
    to.iter_mut().zip(values).for_each(|(to, value)| *to += factor * value);
}

/// Downhill, by the curvature that the last steps met.
fn direction(gradient: &[f64], history: &[Pair]) -> Vec<f64> {
    let mut direction: Vec<f64> = gradient.iter().map(|part| -part).collect();
    let mut factors = Vec::with_capacity(history.len());
    for pair in history.iter().rev() {
        let factor = dot(&pair.step, &direction) / pair.curvature;
        add(&mut direction, -factor, &pair.change);
        factors.push(factor);
    }
    if let Some(last) = history.last() {
        let scale = last.curvature / dot(&last.change, &last.change);
        for part in &mut direction {
            *part *= scale;
        }
    }
    for (pair, factor) in history.iter().zip(factors.into_iter().rev()) {
        let correction = dot(&pair.change, &direction) / pair.curvature;
        add(&mut direction, factor - correction, &pair.step);
    }
    direction
}

/// The scores of a feature's classes.
fn score(parameters: &[f64], feature: &[f32], scores: &mut [f64]) {
    let classes = scores.len();
    let (weights, biases) = parameters.split_at(feature.len() * classes);
    scores.copy_from_slice(biases);
    for (value, weights) in feature.iter().zip(weights.chunks_exact(classes)) {
        add(scores, f64::from(*value), weights);
    }
}

impl Examples<'_> {
    /// The sum of the losses with the penalty, and its gradient.
    fn objective(&self, pool: &Pool, parameters: &[f64]) -> (f64, Vec<f64>) {
        let (width, classes, images) = (self.width, self.classes, self.labels.len());
        // Probabilities less what they should be, and the loss, of some images at a time.
        let chunks: Vec<Mutex<(Vec<f64>, f64)>> = (0..images.div_ceil(CHUNK)).map(|_| Mutex::default()).collect();
        pool.run(chunks.len(), &|chunk| {
            let images = chunk * CHUNK..((chunk + 1) * CHUNK).min(images);
            let mut residuals = vec![0.0; images.len() * classes];
            let mut loss = 0.0;
            for (scores, image) in residuals.chunks_exact_mut(classes).zip(images) {
                score(parameters, &self.features[image * width..(image + 1) * width], scores);
                let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let label = self.labels[image] as usize;
                loss -= scores[label] - highest;
                for score in &mut *scores {
                    *score = (*score - highest).exp();
                }
                let all: f64 = scores.iter().sum();
                loss += all.ln();
                for score in &mut *scores {
                    *score /= all;
                }
                scores[label] -= 1.0;
            }
            *chunks[chunk].lock().unwrap_or_else(PoisonError::into_inner) = (residuals, loss);
        });
        let chunks: Vec<_> =
            chunks.into_iter().map(|chunk| chunk.into_inner().unwrap_or_else(PoisonError::into_inner)).collect();
        let weights = &parameters[..width * classes];
        let loss: f64 = chunks.iter().map(|(_, loss)| loss).sum();
        // Two weights of one size and opposite signs have half the penalty of the one by which a binary classifier differs.
        let penalty = if classes == 2 { 2.0 * self.penalty } else { self.penalty };
        // Each task sums over all images in their order: the same for any number of threads.
        let rows: Vec<Mutex<Vec<f64>>> = (0..=width).map(|_| Mutex::default()).collect();
        pool.run(rows.len(), &|row| {
            let mut gradient = match row < width {
                true => weights[row * classes..(row + 1) * classes].iter().map(|w| penalty * w).collect(),
                false => vec![0.0; classes],
            };
            let residuals = chunks.iter().flat_map(|(residuals, _)| residuals.chunks_exact(classes));
            for (feature, residuals) in self.features.chunks_exact(width).zip(residuals) {
                add(&mut gradient, feature.get(row).map_or(1.0, |value| f64::from(*value)), residuals);
            }
            *rows[row].lock().unwrap_or_else(PoisonError::into_inner) = gradient;
        });
        let gradient = rows.into_iter().flat_map(|row| row.into_inner().unwrap_or_else(PoisonError::into_inner));
        (loss + 0.5 * penalty * dot(weights, weights), gradient.collect())
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, path::Path};

    use serde_json::Value;

    use super::*;

    /// What scikit-learn's `LogisticRegression` finds (`tests/fixtures/stages/make_few_shot.py`): coefficients,
    /// probabilities and predictions.
    #[test]
    fn fits_are_those_of_scikit_learn() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/stages/logistic.json");
        let cases: BTreeMap<String, Value> = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
        assert!(cases.len() > 2);
        for (case, recorded) in cases {
            let numbers = |name: &str| -> Vec<f64> {
                let rows = recorded[name].as_array().unwrap().iter();
                let numbers = rows.flat_map(|row| row.as_array().cloned().unwrap_or_else(|| vec![row.clone()]));
                numbers.map(|number| number.as_f64().unwrap()).collect()
            };
            let (train, test) =
                ["train", "test"].map(|name| numbers(name).iter().map(|&v| v as f32).collect::<Vec<_>>()).into();
            let labels: Vec<u32> = numbers("labels").iter().map(|&label| label as u32).collect();
            let (width, biases) = (recorded["train"][0].as_array().unwrap().len(), numbers("biases"));
            let (classes, penalty) = (biases.len(), recorded["penalty"].as_f64().unwrap());
            let examples = Examples { features: &train, width, labels: &labels, classes, penalty };
            let near = |what: &str, ours: f64, theirs: f64| {
                assert!((ours - theirs).abs() <= 1e-5 * theirs.abs(), "{case}: {what} {ours}, scikit-learn {theirs}");
            };
            let mut fits: Vec<Logistic> = [1, 3].iter().map(|&n| Logistic::fit(&Pool::new(n), &examples)).collect();
            assert_eq!(fits[0].parameters, fits[1].parameters, "{case}: whatever the number of threads");
            let fit = fits.remove(0);
            assert!(fit.converged, "{case}");
            // [width, classes] here, [classes, width] there.
            let theirs = numbers("weights");
            for (at, ours) in fit.parameters[..width * classes].iter().enumerate() {
                near("weight", *ours, theirs[at % classes * width + at / classes]);
            }
            fit.parameters[width * classes..]
                .iter()
                .zip(&biases)
                .for_each(|(ours, theirs)| near("bias", *ours, *theirs));
            let mut probabilities = Vec::new();
            for feature in test.chunks_exact(width) {
                let mut scores = vec![0.0; classes];
                score(&fit.parameters, feature, &mut scores);
                let all: f64 = scores.iter().map(|score| score.exp()).sum();
                probabilities.extend(scores.iter().map(|score| score.exp() / all));
            }
            probabilities
                .iter()
                .zip(numbers("probabilities"))
                .for_each(|(ours, theirs)| near("probability", *ours, theirs));
            let found: Vec<f64> = test.chunks_exact(width).map(|feature| fit.classify(feature) as f64).collect();
            assert_eq!(found, numbers("predictions"), "{case}");
        }
    }

    /// A class of its own is what is found of one class; nothing has to be fitted.
    #[test]
    fn one_class_is_always_found() {
        let examples = Examples { features: &[1.0, 0.0], width: 2, labels: &[0], classes: 1, penalty: 1.0 };
        let fit = Logistic::fit(&Pool::new(1), &examples);
        assert!(fit.converged && fit.classify(&[0.0, 1.0]) == 0);
    }
}
