//! The optimiser step and the gradient norm over a list of tensors.

use crate::pool::Pool;
use crate::share::{CHUNK, Shared, for_ranges, sum_ranges, vectorised};

/// One tensor of an AdamW step. All slices have one length.
pub struct AdamWTensor<'a> {
    /// The parameter, updated in place.
    pub param: &'a mut [f32],
    /// Its gradient.
    pub grad: &'a [f32],
    /// The first moment, updated in place; zeros before the first step.
    pub exp_avg: &'a mut [f32],
    /// The second moment, updated in place; zeros before the first step.
    pub exp_avg_sq: &'a mut [f32],
    /// The learning rate of this step.
    pub lr: f64,
    /// The decoupled weight decay.
    pub weight_decay: f64,
}

/// What all tensors of an AdamW step share.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// The step, counted from 1.
    pub step: u64,
    /// Factor of all gradients: 1, or less to clip their norm.
    pub grad_scale: f32,
}

/// The factors of one tensor, worked out in double precision as PyTorch does.
#[derive(Clone, Copy)]
struct Factors {
    grad_scale: f32,
    keep: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    correction2_sqrt: f32,
    eps: f32,
    step_size: f32,
}

impl Factors {
    fn new(adam: &AdamW, lr: f64, weight_decay: f64) -> Self {
        let step = adam.step as f64;
        let correction1 = 1.0 - adam.beta1.powf(step);
        let correction2 = 1.0 - adam.beta2.powf(step);
        Self {
            grad_scale: adam.grad_scale,
            keep: (1.0 - lr * weight_decay) as f32,
            one_minus_beta1: (1.0 - adam.beta1) as f32,
            beta2: adam.beta2 as f32,
            one_minus_beta2: (1.0 - adam.beta2) as f32,
            correction2_sqrt: correction2.sqrt() as f32,
            eps: adam.eps as f32,
            step_size: (lr / correction1) as f32,
        }
    }
}

/// One AdamW step (Loshchilov and Hutter, arXiv 1711.05101) on all tensors, in the order of
/// operations of `torch.optim.AdamW`:
/// `p *= 1 - lr wd; m += (g - m)(1 - beta1); v = beta2 v + (1 - beta2) g g;
/// p -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)`.
///
/// # Panics
/// When the lengths of a tensor's slices differ.
pub fn adamw(pool: &Pool, adam: AdamW, tensors: &mut [AdamWTensor<'_>]) {
    struct Part<'a> {
        param: Shared<'a>,
        grad: &'a [f32],
        exp_avg: Shared<'a>,
        exp_avg_sq: Shared<'a>,
        factors: Factors,
    }
    let parts: Vec<Part> = tensors
        .iter_mut()
        .map(|t| {
            let len = t.param.len();
            assert!(
                t.grad.len() == len && t.exp_avg.len() == len && t.exp_avg_sq.len() == len,
                "a parameter of {len} elements has a gradient or moments of another length"
            );
            Part {
                factors: Factors::new(&adam, t.lr, t.weight_decay),
                param: Shared::new(t.param),
                grad: t.grad,
                exp_avg: Shared::new(t.exp_avg),
                exp_avg_sq: Shared::new(t.exp_avg_sq),
            }
        })
        .collect();
    let pieces = pieces(parts.iter().map(|p| p.grad.len()));
    for_ranges(pool, pieces.len(), 1, |range| {
        let (tensor, start, end) = pieces[range.start];
        let part = &parts[tensor];
        // SAFETY: the pieces are disjoint.
        let (param, exp_avg, exp_avg_sq) =
            unsafe { (part.param.part(start..end), part.exp_avg.part(start..end), part.exp_avg_sq.part(start..end)) };
        adamw_part(part.factors, param, &part.grad[start..end], exp_avg, exp_avg_sq);
    });
}

/// Cuts tensors of these lengths into pieces `(tensor, start, end)` of at most [`CHUNK`].
fn pieces(lengths: impl Iterator<Item = usize>) -> Vec<(usize, usize, usize)> {
    let mut pieces = Vec::new();
    for (tensor, len) in lengths.enumerate() {
        for start in (0..len).step_by(CHUNK) {
            pieces.push((tensor, start, (start + CHUNK).min(len)));
        }
    }
    pieces
}

vectorised! {
    fn adamw_part(f: Factors, param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32]) {
        for (((p, g), m), v) in param.iter_mut().zip(grad).zip(m).zip(v) {
            let g = g * f.grad_scale;
            let kept = *p * f.keep;
            let first = *m + (g - *m) * f.one_minus_beta1;
            let second = *v * f.beta2 + f.one_minus_beta2 * g * g;
            let denominator = second.sqrt() / f.correction2_sqrt + f.eps;
            *m = first;
            *v = second;
            *p = kept - f.step_size * first / denominator;
        }
    }
}

/// The Euclidean norm of all gradients together, summed in double precision. It is infinite or NaN
/// exactly when an element is not finite.
pub fn grad_norm(pool: &Pool, grads: &[&[f32]]) -> f64 {
    let pieces = pieces(grads.iter().map(|g| g.len()));
    let [squares] = sum_ranges(pool, pieces.len(), 1, |range| {
        let (tensor, start, end) = pieces[range.start];
        [sum_squares(&grads[tensor][start..end])]
    });
    squares.sqrt()
}

vectorised! {
    fn sum_squares(x: &[f32]) -> f64 {
        let mut lanes = [0.0f64; 16];
        let (blocks, rest) = x.as_chunks::<16>();
        for x in blocks {
            for l in 0..16 {
                lanes[l] += f64::from(x[l]) * f64::from(x[l]);
            }
        }
        let tail: f64 = rest.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        lanes.iter().sum::<f64>() + tail
    }
}
