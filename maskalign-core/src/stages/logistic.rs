//! Multinomial logistic regression, to its optimum.

use std::sync::{Mutex, PoisonError};

use maskalign_engine::{MatRef, Pool, add_product_in_double};

/// No part of the gradient is above this share of the penalty at the end. The penalty is the least curvature of the weights:
/// so far at most they are from the optimum.
const TOLERANCE: f64 = 1e-7;
/// Steps at most; the optimum of a penalised problem is there long before.
const STEPS: usize = 2000;
/// Earlier steps that a direction is computed from.
pub(super) const HISTORY: usize = 10;
/// Images whose probabilities one task computes.
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

    /// The class with the highest score of each feature, `[features, width]`; of several the first.
    pub(super) fn classify(&self, pool: &Pool, features: &[f32]) -> Vec<usize> {
        let width = self.parameters.len() / self.classes - 1;
        let best = |scores: &[f64]| {
            (0..self.classes).max_by(|&a, &b| scores[a].total_cmp(&scores[b]).then(b.cmp(&a))).unwrap_or(0)
        };
        scores(pool, &self.parameters, features, width, self.classes).chunks_exact(self.classes).map(best).collect()
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

/// The scores of the classes of features, `[features, classes]`.
fn scores(pool: &Pool, parameters: &[f64], features: &[f32], width: usize, classes: usize) -> Vec<f64> {
    let (weights, biases) = parameters.split_at(width * classes);
    let images = features.len() / width;
    let mut scores = biases.repeat(images);
    add_product_in_double(pool, [images, classes, width], MatRef::row_major(features, width), weights, &mut scores);
    scores
}

impl Examples<'_> {
    /// The sum of the losses with the penalty, and its gradient.
    fn objective(&self, pool: &Pool, parameters: &[f64]) -> (f64, Vec<f64>) {
        let (width, classes, images) = (self.width, self.classes, self.labels.len());
        // Scores that become probabilities less what they should be, of some images at a time, and the losses of these.
        let mut residuals = scores(pool, parameters, self.features, width, classes);
        let chunks: Vec<Mutex<(&mut [f64], f64)>> =
            residuals.chunks_mut(CHUNK * classes).map(|chunk| Mutex::new((chunk, 0.0))).collect();
        pool.run(chunks.len(), &|at| {
            let mut chunk = chunks[at].lock().unwrap_or_else(PoisonError::into_inner);
            let (scores, loss) = &mut *chunk;
            for (scores, label) in scores.chunks_exact_mut(classes).zip(&self.labels[at * CHUNK..]) {
                let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let label = *label as usize;
                *loss -= scores[label] - highest;
                for score in &mut *scores {
                    *score = (*score - highest).exp();
                }
                let all: f64 = scores.iter().sum();
                *loss += all.ln();
                for score in &mut *scores {
                    *score /= all;
                }
                scores[label] -= 1.0;
            }
        });
        let losses = chunks.into_iter().map(|chunk| chunk.into_inner().unwrap_or_else(PoisonError::into_inner).1);
        let loss: f64 = losses.sum();
        let weights = &parameters[..width * classes];
        // Two weights of one size and opposite signs have half the penalty of the one by which a binary classifier differs.
        let penalty = if classes == 2 { 2.0 * self.penalty } else { self.penalty };
        let mut gradient: Vec<f64> = weights.iter().map(|weight| penalty * weight).collect();
        let transposed = MatRef::row_major(self.features, width).t();
        add_product_in_double(pool, [width, classes, images], transposed, &residuals, &mut gradient);
        let mut biases = vec![0.0; classes];
        for residuals in residuals.chunks_exact(classes) {
            add(&mut biases, 1.0, residuals);
        }
        gradient.extend(biases);
        (loss + 0.5 * penalty * dot(weights, weights), gradient)
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
            let pool = Pool::new(1);
            let mut probabilities = Vec::new();
            for scores in scores(&pool, &fit.parameters, &test, width, classes).chunks_exact(classes) {
                let all: f64 = scores.iter().map(|score| score.exp()).sum();
                probabilities.extend(scores.iter().map(|score| score.exp() / all));
            }
            probabilities
                .iter()
                .zip(numbers("probabilities"))
                .for_each(|(ours, theirs)| near("probability", *ours, theirs));
            let found: Vec<f64> = fit.classify(&pool, &test).into_iter().map(|class| class as f64).collect();
            assert_eq!(found, numbers("predictions"), "{case}");
        }
    }

    /// A class of its own is what is found of one class; nothing has to be fitted.
    #[test]
    fn one_class_is_always_found() {
        let examples = Examples { features: &[1.0, 0.0], width: 2, labels: &[0], classes: 1, penalty: 1.0 };
        let fit = Logistic::fit(&Pool::new(1), &examples);
        assert!(fit.converged && fit.classify(&Pool::new(1), &[0.0, 1.0]) == [0]);
    }
}
