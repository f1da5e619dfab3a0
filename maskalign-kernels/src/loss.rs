//! Loss terms with their gradients. Every value is a mean as with PyTorch's `reduction="mean"`, summed
//! in double precision in a fixed order.

use crate::elementwise::{Write, store};
use crate::pool::Pool;
use crate::share::{CHUNK, Shared, max_of, rows_per_task, sum_of, sum_of2, sum_ranges, vectorised};
use crate::vmath;

/// Where the gradient of a loss goes.
pub struct Grad<'a> {
    /// As long as the prediction.
    pub into: &'a mut [f32],
    /// Factor: the weight of the term times the gradient of the loss with respect to the term.
    pub scale: f32,
    /// Whether it replaces or adds.
    pub write: Write,
}

/// A term that compares prediction and target element by element.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pointwise {
    /// Squared error.
    Mse,
    /// Absolute error; the gradient at 0 is 0.
    L1,
    /// `F.smooth_l1_loss`: `d^2 / (2 beta)` where `|d| < beta`, else `|d| - beta / 2`. With `beta`
    /// 0 it is [`Pointwise::L1`].
    SmoothL1 {
        /// Where the parabola meets the line.
        beta: f32,
    },
}

/// The mean of the term over all elements, and its gradient with respect to `pred` if requested.
///
/// # Panics
/// When the lengths differ.
pub fn pointwise(pool: &Pool, term: Pointwise, pred: &[f32], target: &[f32], grad: Option<Grad<'_>>) -> f64 {
    assert_eq!(pred.len(), target.len(), "prediction and target");
    let term = match term {
        Pointwise::SmoothL1 { beta } if beta <= 0.0 => Pointwise::L1,
        term => term,
    };
    let n = pred.len() as f64;
    let grad = SharedGrad::new(grad, pred.len(), n);
    let [sum] = sum_ranges(pool, pred.len(), CHUNK, |range| {
        let (pred, target) = (&pred[range.clone()], &target[range.clone()]);
        if let Some(grad) = &grad {
            // SAFETY: the ranges are disjoint.
            let into = unsafe { grad.into.part(range) };
            pointwise_grad(term, pred, target, grad.scale, grad.write, into);
        }
        [pointwise_sum(term, pred, target)]
    });
    sum / n
}

/// A [`Grad`] that tasks share, with its scale divided by the number of terms in the mean.
struct SharedGrad<'a> {
    into: Shared<'a>,
    scale: f32,
    write: Write,
}

impl<'a> SharedGrad<'a> {
    fn new(grad: Option<Grad<'a>>, len: usize, mean_over: f64) -> Option<Self> {
        let grad = grad?;
        assert_eq!(grad.into.len(), len, "gradient of the loss");
        Some(Self {
            into: Shared::new(grad.into),
            scale: (f64::from(grad.scale) / mean_over) as f32,
            write: grad.write,
        })
    }
}

/// Elements whose terms are summed in single precision before they join the double sum.
const SINGLE_BLOCK: usize = 1024;

vectorised! {
    fn pointwise_sum(term: Pointwise, pred: &[f32], target: &[f32]) -> f64 {
        let blocks = pred.chunks(SINGLE_BLOCK).zip(target.chunks(SINGLE_BLOCK));
        let mut sum = 0.0;
        for (p, t) in blocks {
            sum += f64::from(match term {
                Pointwise::Mse => sum_of2(p, t, |p, t| (p - t) * (p - t)),
                Pointwise::L1 => sum_of2(p, t, |p, t| (p - t).abs()),
                Pointwise::SmoothL1 { beta } => {
                    let curve = 0.5 / beta;
                    sum_of2(p, t, |p, t| {
                        let d = (p - t).abs();
                        if d < beta { d * d * curve } else { d - 0.5 * beta }
                    })
                }
            });
        }
        sum
    }

    fn pointwise_grad(
        term: Pointwise,
        pred: &[f32],
        target: &[f32],
        scale: f32,
        write: Write,
        into: &mut [f32],
    ) {
        let errors = pred.iter().zip(target).map(|(p, t)| p - t);
        match term {
            Pointwise::Mse => store(write, into, errors.map(|d| 2.0 * d * scale)),
            Pointwise::L1 => store(write, into, errors.map(|d| sign(d) * scale)),
            Pointwise::SmoothL1 { beta } => {
                let slope = 1.0 / beta;
                let grad = |d: f32| if d.abs() < beta { d * slope } else { sign(d) };
                store(write, into, errors.map(|d| grad(d) * scale));
            }
        }
    }
}

/// -1, 0 or 1; NaN stays NaN.
#[inline(always)]
fn sign(d: f32) -> f32 {
    let zero_or_nan = d * 0.0;
    if d > 0.0 {
        1.0
    } else if d < 0.0 {
        -1.0
    } else {
        zero_or_nan
    }
}

/// `F.cosine_similarity` clamps each norm to at least this.
const COSINE_EPS: f32 = 1e-8;

/// The mean over rows of `1 - cos(pred, target)`, rows of `cols` elements, and its gradient with
/// respect to `pred` if requested. Norms below 1e-8 count as 1e-8.
pub fn cosine(pool: &Pool, pred: &[f32], target: &[f32], cols: usize, grad: Option<Grad<'_>>) -> f64 {
    let rows = row_count(pred, target, cols);
    let grad = SharedGrad::new(grad, pred.len(), rows as f64);
    let [sum] = sum_ranges(pool, rows, rows_per_task(cols), |range| {
        let mut sum = 0.0;
        for row in range {
            let at = row * cols..(row + 1) * cols;
            let (p, t) = (&pred[at.clone()], &target[at.clone()]);
            let (dot, p_norm, t_norm) = cosine_sums(p, t);
            let (p_used, t_used) = (clamp_norm(p_norm), clamp_norm(t_norm));
            let cos = dot / (p_used * t_used);
            sum += 1.0 - f64::from(cos);
            if let Some(grad) = &grad {
                // SAFETY: a row belongs to one task.
                let into = unsafe { grad.into.part(at) };
                let by_target = -grad.scale / (p_used * t_used);
                // A clamped norm is a constant.
                let clamped = p_norm < COSINE_EPS;
                let by_pred = if clamped { 0.0 } else { grad.scale * cos / (p_used * p_used) };
                combine(by_pred, p, by_target, t, grad.write, into);
            }
        }
        [sum]
    });
    sum / rows as f64
}

fn clamp_norm(norm: f32) -> f32 {
    if norm < COSINE_EPS { COSINE_EPS } else { norm }
}

vectorised! {
    fn cosine_sums(p: &[f32], t: &[f32]) -> (f32, f32, f32) {
        let dot = sum_of2(p, t, |p, t| p * t);
        let p_norm = sum_of2(p, p, |p, q| p * q).sqrt();
        let t_norm = sum_of2(t, t, |p, q| p * q).sqrt();
        (dot, p_norm, t_norm)
    }

    fn combine(a: f32, x: &[f32], b: f32, y: &[f32], write: Write, into: &mut [f32]) {
        store(write, into, x.iter().zip(y).map(|(x, y)| a * x + b * y));
    }
}

/// The Kullback-Leibler divergence of `softmax(pred)` from `softmax(target)` over rows of `cols`
/// elements, averaged over all elements: `F.kl_div(log_softmax(pred), softmax(target))`, and its
/// gradient with respect to `pred` if requested.
pub fn kl(pool: &Pool, pred: &[f32], target: &[f32], cols: usize, grad: Option<Grad<'_>>) -> f64 {
    let rows = row_count(pred, target, cols);
    let over = pred.len() as f64;
    let grad = SharedGrad::new(grad, pred.len(), over);
    let [sum] = sum_ranges(pool, rows, rows_per_task(cols), |range| {
        let mut sum = 0.0;
        for row in range {
            let at = row * cols..(row + 1) * cols;
            let (p, t) = (&pred[at.clone()], &target[at.clone()]);
            let (p_log_sum, t_log_sum) = (log_sum_exp(p), log_sum_exp(t));
            sum += kl_row(p, p_log_sum, t, t_log_sum);
            if let Some(grad) = &grad {
                // SAFETY: a row belongs to one task.
                let into = unsafe { grad.into.part(at) };
                kl_grad(p, p_log_sum, t, t_log_sum, grad.scale, grad.write, into);
            }
        }
        [sum]
    });
    sum / over
}

vectorised! {
    fn log_sum_exp(x: &[f32]) -> f32 {
        let largest = max_of(x);
        let sum = sum_of(x, |x| vmath::exp::<FMA>(x - largest));
        largest + sum.ln()
    }

    fn kl_row(p: &[f32], p_log_sum: f32, t: &[f32], t_log_sum: f32) -> f64 {
        f64::from(sum_of2(p, t, |p, t| {
            let (p, t) = (p - p_log_sum, t - t_log_sum);
            let probability = vmath::exp::<FMA>(t);
            // 0 log 0 is 0.
            if probability > 0.0 || t.is_nan() { probability * (t - p) } else { 0.0 }
        }))
    }

    fn kl_grad(
        p: &[f32],
        p_log_sum: f32,
        t: &[f32],
        t_log_sum: f32,
        scale: f32,
        write: Write,
        into: &mut [f32],
    ) {
        store(write, into, p.iter().zip(t).map(|(p, t)| {
            let p = vmath::exp::<FMA>(p - p_log_sum);
            let t = vmath::exp::<FMA>(t - t_log_sum);
            (p - t) * scale
        }));
    }
}

/// Softmax cross-entropy with a distribution over the classes as each row's target, mean over rows
/// of `cols` logits, as `F.cross_entropy`, and its gradient with respect to the logits if requested.
/// A row's target need not sum to 1.
///
/// # Panics
/// When the lengths do not fit.
pub fn cross_entropy(pool: &Pool, logits: &[f32], target: &[f32], cols: usize, grad: Option<Grad<'_>>) -> f64 {
    let rows = row_count(logits, target, cols);
    let grad = SharedGrad::new(grad, logits.len(), rows as f64);
    let [sum] = sum_ranges(pool, rows, rows_per_task(cols), |range| {
        let mut sum = 0.0;
        for row in range {
            let at = row * cols..(row + 1) * cols;
            let (x, t) = (&logits[at.clone()], &target[at.clone()]);
            let log_sum = log_sum_exp(x);
            let (entropy, mass) = entropy(x, log_sum, t);
            sum += entropy;
            if let Some(grad) = &grad {
                // SAFETY: a row belongs to one task.
                let into = unsafe { grad.into.part(at) };
                entropy_grad(x, log_sum, t, mass * grad.scale, grad.scale, grad.write, into);
            }
        }
        [sum]
    });
    sum / rows as f64
}

vectorised! {
    fn entropy(x: &[f32], log_sum: f32, t: &[f32]) -> (f64, f32) {
        let entropy = sum_of2(x, t, |x, t| if t == 0.0 { 0.0 } else { t * (log_sum - x) });
        (f64::from(entropy), sum_of(t, |t| t))
    }

    fn entropy_grad(
        x: &[f32],
        log_sum: f32,
        t: &[f32],
        mass: f32,
        scale: f32,
        write: Write,
        into: &mut [f32],
    ) {
        store(write, into, x.iter().zip(t).map(|(x, t)| {
            vmath::exp::<FMA>(x - log_sum) * mass - t * scale
        }));
    }
}

fn row_count(pred: &[f32], target: &[f32], cols: usize) -> usize {
    assert_eq!(pred.len(), target.len(), "prediction and target");
    assert!(cols > 0 && pred.len().is_multiple_of(cols), "{} floats in rows of {cols}", pred.len());
    pred.len() / cols
}
