//! Updates of optimizers, the gradient norm and moving averages (EMA) over a list of tensors.

use crate::pool::Pool;
use crate::share::{CHUNK, Shared, for_parts, for_ranges, sum_ranges, vectorised};
use crate::vmath;

#[cfg(test)]
mod tests;

/// One tensor of an AdamW update. All slices have the same length.
pub struct AdamWTensor<'a> {
    /// The parameter, updated in place.
    pub param: &'a mut [f32],
    /// Its gradient.
    pub grad: &'a [f32],
    /// The first moment, updated in place; zeros before the first step.
    pub exp_avg: &'a mut [f32],
    /// The second moment, updated in place; zeros before the first step.
    pub exp_avg_sq: &'a mut [f32],
    /// The learning rate of this update.
    pub lr: f64,
    /// The decoupled weight decay.
    pub weight_decay: f64,
}

/// What all tensors of an AdamW update share.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the square root of the second moment.
    pub eps: f64,
    /// The number of this update, counted from 1.
    pub step: u64,
    /// The factor of all gradients: 1, or less to clip their norm.
    pub grad_scale: f32,
}

/// The factors of one tensor, computed in double precision as in PyTorch.
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

/// One AdamW update (Loshchilov and Hutter, arXiv 1711.05101) on all tensors, in the order of
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

/// One tensor of a LARS update. All slices have the same length.
pub struct LarsTensor<'a> {
    /// The parameter, updated in place.
    pub param: &'a mut [f32],
    /// Its gradient.
    pub grad: &'a [f32],
    /// The momentum, updated in place; zeros before the first step.
    pub momentum: &'a mut [f32],
    /// The learning rate of this update.
    pub lr: f64,
    /// How the gradient becomes an update.
    pub rule: LarsRule,
}

/// How LARS treats a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LarsRule {
    /// With weight decay, and with a learning rate adapted to the norms: parameters of more than one dimension.
    Adapted {
        /// Weight decay: the parameter times this is added to the gradient before the norms are taken.
        weight_decay: f64,
    },
    /// The gradient alone: biases and the parameters of normalisation layers.
    Plain,
}

/// What all tensors of a LARS update share.
#[derive(Clone, Copy, Debug)]
pub struct Lars {
    /// Momentum; 0.9 in MAE's linear probe.
    pub momentum: f64,
    /// Trust coefficient: the ratio of an adapted update's norm to the parameter's; 0.001 there.
    pub trust_coefficient: f64,
    /// The factor of all gradients: 1, or less to clip their norm.
    pub grad_scale: f32,
}

/// One LARS update (You, Gitman and Ginsburg, arXiv 1708.03888) on all tensors, in the order of operations of MAE's linear
/// probe: `d = g + wd p; d *= trust |p| / |d|` (1 where a norm is 0) for
/// [`LarsRule::Adapted`], `d = g` for [`LarsRule::Plain`]; then `m = momentum m + d; p -= lr m`. The norms are summed in
/// double precision.
///
/// # Panics
/// When the lengths of a tensor's slices differ.
pub fn lars(pool: &Pool, lars: Lars, tensors: &mut [LarsTensor<'_>]) {
    struct Part<'a> {
        param: Shared<'a>,
        grad: &'a [f32],
        momentum: Shared<'a>,
        factors: LarsFactors,
    }
    for t in tensors.iter() {
        let len = t.param.len();
        assert!(
            t.grad.len() == len && t.momentum.len() == len,
            "a parameter of {len} elements has a gradient or momentum of another length"
        );
    }
    let parts: Vec<Part> = tensors
        .iter_mut()
        .map(|t| {
            let (weight_decay, ratio) = match t.rule {
                LarsRule::Plain => (0.0, 1.0),
                LarsRule::Adapted { weight_decay } => {
                    let decay = weight_decay as f32;
                    let [param, update] = sum_ranges(pool, t.grad.len(), CHUNK, |range| {
                        lars_squares(lars.grad_scale, decay, &t.param[range.clone()], &t.grad[range])
                    });
                    let adapted = param > 0.0 && update > 0.0;
                    let ratio = if adapted { lars.trust_coefficient * (param / update).sqrt() } else { 1.0 };
                    (decay, ratio as f32)
                }
            };
            Part {
                factors: LarsFactors {
                    grad_scale: lars.grad_scale,
                    weight_decay,
                    ratio,
                    momentum: lars.momentum as f32,
                    minus_lr: -t.lr as f32,
                },
                param: Shared::new(t.param),
                grad: t.grad,
                momentum: Shared::new(t.momentum),
            }
        })
        .collect();
    let pieces = pieces(parts.iter().map(|p| p.grad.len()));
    for_ranges(pool, pieces.len(), 1, |range| {
        let (tensor, start, end) = pieces[range.start];
        let part = &parts[tensor];
        // SAFETY: the pieces are disjoint.
        let (param, momentum) = unsafe { (part.param.part(start..end), part.momentum.part(start..end)) };
        lars_part(part.factors, param, &part.grad[start..end], momentum);
    });
}

/// The factors of one tensor in a LARS update.
#[derive(Clone, Copy)]
struct LarsFactors {
    grad_scale: f32,
    weight_decay: f32,
    ratio: f32,
    momentum: f32,
    minus_lr: f32,
}

/// The gradient with its decay.
#[inline(always)]
fn decayed<const FMA: bool>(grad_scale: f32, weight_decay: f32, param: f32, grad: f32) -> f32 {
    vmath::fma::<FMA>(param, weight_decay, grad * grad_scale)
}

vectorised! {
    // The sums of squares of the parameter and of the gradient with its decay.
    fn lars_squares(grad_scale: f32, weight_decay: f32, param: &[f32], grad: &[f32]) -> [f64; 2] {
        const LANES: usize = 16;
        let mut lanes = [[0.0f64; LANES]; 2];
        let (params, rest) = param.as_chunks::<LANES>();
        let (grads, rest_grad) = grad.as_chunks::<LANES>();
        for (p, g) in params.iter().zip(grads) {
            for l in 0..LANES {
                let d = f64::from(decayed::<FMA>(grad_scale, weight_decay, p[l], g[l]));
                lanes[0][l] += f64::from(p[l]) * f64::from(p[l]);
                lanes[1][l] += d * d;
            }
        }
        let mut sums = lanes.map(|lanes| lanes.iter().sum::<f64>());
        for (&p, &g) in rest.iter().zip(rest_grad) {
            let d = f64::from(decayed::<FMA>(grad_scale, weight_decay, p, g));
            sums[0] += f64::from(p) * f64::from(p);
            sums[1] += d * d;
        }
        sums
    }

    fn lars_part(f: LarsFactors, param: &mut [f32], grad: &[f32], momentum: &mut [f32]) {
        for ((p, g), m) in param.iter_mut().zip(grad).zip(momentum) {
            let d = decayed::<FMA>(f.grad_scale, f.weight_decay, *p, *g) * f.ratio;
            *m = *m * f.momentum + d;
            *p = vmath::fma::<FMA>(*m, f.minus_lr, *p);
        }
    }
}

/// `moving = momentum moving + (1 - momentum) source`, element by element: a teacher that follows its student.
///
/// The order of operations is that of PyTorch's `moving.mul_(momentum).add_(source, alpha=1 - momentum)`: the first
/// product is rounded, and the second is added to it, in one rounding where the machine has fused multiply-add.
/// `1 - momentum` is computed in double precision.
///
/// # Panics
/// When the lengths differ.
pub fn ema_update(pool: &Pool, moving: &mut [f32], source: &[f32], momentum: f64) {
    assert_eq!(moving.len(), source.len(), "a moving average and its source");
    let (keep, take) = (momentum as f32, (1.0 - momentum) as f32);
    for_parts(pool, moving, CHUNK, |start, moving| ema_part(keep, take, moving, &source[start..]));
}

vectorised! {
    fn ema_part(keep: f32, take: f32, moving: &mut [f32], source: &[f32]) {
        for (m, s) in moving.iter_mut().zip(source) {
            *m = vmath::fma::<FMA>(*s, take, *m * keep);
        }
    }
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
