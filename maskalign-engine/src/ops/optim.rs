//! What optimizers do with parameters and gradients, in place.

use maskalign_kernels::{Pool, for_parts, optim as kernel};

use super::CHUNK;
use crate::{
    context::{Context, Form},
    error::Result,
    tape::Gradients,
    tensor::Tensor,
};

/// The settings of an AdamW update.
#[derive(Clone, Copy, Debug)]
pub struct AdamStep {
    /// Learning rate.
    pub lr: f64,
    /// Decay rates of the moments (`betas`).
    pub betas: (f64, f64),
    /// Added to the square root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// The number of this update, from 1.
    pub step: u64,
    /// The factor of all gradients (clipping).
    pub gradient_scale: f32,
}

/// One AdamW update of a parameter and its two moments, in PyTorch's order of operations. A parameter that no loss reached
/// is unchanged, and does not decay either, as in PyTorch, where its gradient is `None`.
///
/// # Errors
/// Out of memory on the device.
pub fn adamw(
    cx: &Context,
    parameter: &mut Tensor,
    moments: [&mut Tensor; 2],
    gradients: &Gradients,
    s: AdamStep,
) -> Result<()> {
    let [first, second] = moments;
    match cx.form("adamw", &[parameter, first, second])? {
        Form::Cpu => {
            let Some(grad) = gradients.cpu(parameter) else { return Ok(()) };
            let adam = kernel::AdamW {
                beta1: s.betas.0,
                beta2: s.betas.1,
                eps: s.eps,
                step: s.step,
                grad_scale: s.gradient_scale,
            };
            let tensor = kernel::AdamWTensor {
                param: parameter.cpu_mut()?,
                grad,
                exp_avg: first.cpu_mut()?,
                exp_avg_sq: second.cpu_mut()?,
                lr: s.lr,
                weight_decay: s.weight_decay,
            };
            kernel::adamw(cx.pool(), adam, &mut [tensor]);
            Ok(())
        }
        Form::Composed | Form::Gpu => {
            let correction = 1.0 - s.betas.0.powi(s.step as i32);
            let root_correction = (1.0 - s.betas.1.powi(s.step as i32)).sqrt();
            update(cx, "adamw", parameter, &mut [first, second], gradients, |p, g, state| {
                let g = f64::from(g * s.gradient_scale);
                let m = s.betas.0 * f64::from(state[0]) + (1.0 - s.betas.0) * g;
                let v = s.betas.1 * f64::from(state[1]) + (1.0 - s.betas.1) * g * g;
                (state[0], state[1]) = (m as f32, v as f32);
                let direction = m / (v.sqrt() / root_correction + s.eps);
                (f64::from(p) * (1.0 - s.lr * s.weight_decay) - s.lr / correction * direction) as f32
            })
        }
    }
}

/// The settings of an update of gradient descent with momentum.
#[derive(Clone, Copy, Debug)]
pub struct SgdStep {
    /// Learning rate.
    pub lr: f64,
    /// Momentum: how much is kept of the momentum buffer.
    pub momentum: f64,
    /// Weight decay: the parameter times this is added to the gradient.
    pub weight_decay: f64,
    /// The factor of all gradients (clipping).
    pub gradient_scale: f32,
}

/// One update of a parameter and its momentum buffer, initially zeros, as `torch.optim.SGD` does:
/// `d = g + weight_decay p; mu = momentum mu + d; p -= lr mu`. A parameter that no loss reached is unchanged.
///
/// # Errors
/// Out of memory on the device.
pub fn sgd(cx: &Context, parameter: &mut Tensor, mu: &mut Tensor, gradients: &Gradients, s: SgdStep) -> Result<()> {
    with_momentum(cx, "sgd", parameter, mu, gradients, s, None)
}

/// The settings of a LARS update.
#[derive(Clone, Copy, Debug)]
pub struct LarsStep {
    /// Learning rate.
    pub lr: f64,
    /// Momentum: how much is kept of the momentum buffer; 0.9 in MAE's linear probe.
    pub momentum: f64,
    /// Weight decay: the parameter times this is added to the gradient, where there is a trust coefficient.
    pub weight_decay: f64,
    /// Trust coefficient: 0.001 for parameters of more than one dimension; `None` for biases and norms, which neither decay
    /// nor adapt.
    pub trust: Option<f64>,
    /// The factor of all gradients (clipping).
    pub gradient_scale: f32,
}

/// One LARS update (You et al., arXiv 1708.03888) of a parameter and its momentum buffer, initially zeros, as MAE's linear
/// probe does: `d = g + weight_decay p; d *= trust |p| / |d|; mu = momentum mu + d; p -= lr mu`, where a norm of 0
/// means no scaling. A parameter that no loss reached is unchanged.
///
/// # Errors
/// Out of memory on the device.
pub fn lars(cx: &Context, parameter: &mut Tensor, mu: &mut Tensor, gradients: &Gradients, s: LarsStep) -> Result<()> {
    if cx.form("lars", &[parameter, mu])? == Form::Cpu {
        let Some(grad) = gradients.cpu(parameter) else { return Ok(()) };
        let (trust_coefficient, rule) = match s.trust {
            Some(trust) => (trust, kernel::LarsRule::Adapted { weight_decay: s.weight_decay }),
            None => (1.0, kernel::LarsRule::Plain),
        };
        let tensor = kernel::LarsTensor { param: parameter.cpu_mut()?, grad, momentum: mu.cpu_mut()?, lr: s.lr, rule };
        let lars = kernel::Lars { momentum: s.momentum, trust_coefficient, grad_scale: s.gradient_scale };
        kernel::lars(cx.pool(), lars, &mut [tensor]);
        return Ok(());
    }
    let weight_decay = if s.trust.is_some() { s.weight_decay } else { 0.0 };
    let sgd = SgdStep { lr: s.lr, momentum: s.momentum, weight_decay, gradient_scale: s.gradient_scale };
    with_momentum(cx, "lars", parameter, mu, gradients, sgd, s.trust)
}

/// What [`sgd`] and [`lars`] share.
fn with_momentum(
    cx: &Context,
    op: &'static str,
    parameter: &mut Tensor,
    mu: &mut Tensor,
    gradients: &Gradients,
    s: SgdStep,
    trust: Option<f64>,
) -> Result<()> {
    let ratio = |parameter: f64, direction: f64| match trust {
        Some(trust) if parameter > 0.0 && direction > 0.0 => trust * parameter / direction,
        _ => 1.0,
    };
    match cx.form(op, &[parameter, mu])? {
        Form::Cpu => {
            let Some(gradient) = gradients.cpu(parameter) else { return Ok(()) };
            let pool = cx.pool();
            let (scale, decay) = (s.gradient_scale, s.weight_decay as f32);
            let mut direction = vec![0.0; gradient.len()];
            zip_parts(pool, &mut direction, [gradient, parameter.cpu()], |_, [g, p]| g * scale + p * decay);
            let lengths = |x: &[f32]| kernel::grad_norm(pool, &[x]);
            let ratio = ratio(lengths(parameter.cpu()), lengths(&direction)) as f32;
            let momentum = s.momentum as f32;
            zip_parts(pool, mu.cpu_mut()?, [&direction], |mu, [d]| mu * momentum + d * ratio);
            let lr = s.lr as f32;
            zip_parts(pool, parameter.cpu_mut()?, [mu.cpu()], |p, [mu]| p - lr * mu);
            Ok(())
        }
        Form::Composed | Form::Gpu => {
            let Some(gradient) = gradients.get(parameter) else { return Ok(()) };
            let direction = |p: f32, g: f32| f64::from(g * s.gradient_scale) + s.weight_decay * f64::from(p);
            let length = |squares: &mut dyn Iterator<Item = f64>| squares.map(|v| v * v).sum::<f64>().sqrt();
            let values = parameter.to_vec();
            let ratio = ratio(
                length(&mut values.iter().map(|p| f64::from(*p))),
                length(&mut values.iter().zip(&gradient).map(|(p, g)| direction(*p, *g))),
            );
            update(cx, op, parameter, &mut [mu], gradients, |p, g, state| {
                let mu = s.momentum * f64::from(state[0]) + ratio * direction(p, g);
                state[0] = mu as f32;
                (f64::from(p) - s.lr * mu) as f32
            })
        }
    }
}

/// Moves a moving average (EMA) towards its source, in place: `moving = momentum moving + (1 - momentum) source`, in the
/// order of PyTorch's `moving.mul_(momentum).add_(source, alpha=1 - momentum)`.
///
/// # Errors
/// Out of memory on the device.
///
/// # Panics
/// The shapes differ.
pub fn ema(cx: &Context, moving: &mut Tensor, source: &Tensor, momentum: f64) -> Result<()> {
    assert_eq!(moving.shape(), source.shape(), "a moving average has its source's shape");
    let form = cx.form("ema", &[moving, source])?;
    let (keep, take) = (momentum as f32, (1.0 - momentum) as f32);
    let rule = |moving: f32, source: f32| moving * keep + source * take;
    if form == Form::Cpu {
        // The source may be what the moving average began as: a clone, which `cpu_mut` copies first.
        kernel::ema_update(cx.pool(), moving.cpu_mut()?, source.cpu(), momentum);
        return Ok(());
    }
    if form == Form::Gpu {
        cx.count_fallback("ema");
    }
    let values: Vec<f32> = moving.values().iter().zip(&*source.values()).map(|(m, s)| rule(*m, *s)).collect();
    moving.set(&values)
}

/// Replaces each value by `f(value, others)`, on the pool's threads.
fn zip_parts<const N: usize>(
    pool: &Pool,
    values: &mut [f32],
    others: [&[f32]; N],
    f: impl Fn(f32, [f32; N]) -> f32 + Sync,
) {
    assert!(others.iter().all(|x| x.len() == values.len()), "what is updated together has one length");
    for_parts(pool, values, CHUNK, |start, part| {
        let others = others.map(|x| &x[start..start + part.len()]);
        for (i, value) in part.iter_mut().enumerate() {
            *value = f(*value, others.map(|x| x[i]));
        }
    });
}

/// One update of a parameter by a rule for each of its values: `rule(value, gradient, state)` returns the new value and
/// changes the value's state, one number from each tensor of `state`. A parameter that no loss reached is unchanged.
///
/// It runs on the host, whatever the device: for optimizers of plugins, and as the reference for the others.
///
/// # Errors
/// Out of memory on the device.
pub fn update(
    cx: &Context,
    op: &'static str,
    parameter: &mut Tensor,
    state: &mut [&mut Tensor],
    gradients: &Gradients,
    mut rule: impl FnMut(f32, f32, &mut [f32]) -> f32,
) -> Result<()> {
    let Some(gradient) = gradients.get(parameter) else { return Ok(()) };
    if cx.form(op, &[parameter])? == Form::Gpu {
        cx.count_fallback(op);
    }
    let mut values = parameter.to_vec();
    let mut states: Vec<Vec<f32>> = state.iter().map(|tensor| tensor.to_vec()).collect();
    let mut of_value = vec![0.0; states.len()];
    for (i, (value, gradient)) in values.iter_mut().zip(&gradient).enumerate() {
        of_value.iter_mut().zip(&states).for_each(|(one, all)| *one = all[i]);
        *value = rule(*value, *gradient, &mut of_value);
        of_value.iter().zip(&mut states).for_each(|(one, all)| all[i] = *one);
    }
    parameter.set(&values)?;
    state.iter_mut().zip(&states).try_for_each(|(tensor, values)| tensor.set(values))
}

/// Sum of squares of the gradients of the given parameters, in double precision; 0 for those that no loss reached.
///
/// # Errors
/// Out of memory on the device.
pub fn square_sum(cx: &Context, parameters: &[Tensor], gradients: &Gradients) -> Result<f64> {
    let inputs: Vec<&Tensor> = parameters.iter().collect();
    match cx.form("square_sum", &inputs)? {
        Form::Cpu => {
            let slices: Vec<&[f32]> = parameters.iter().filter_map(|p| gradients.cpu(p)).collect();
            let norm = kernel::grad_norm(cx.pool(), &slices);
            Ok(norm * norm)
        }
        form @ (Form::Composed | Form::Gpu) => {
            if form == Form::Gpu {
                cx.count_fallback("square_sum");
            }
            let squares = |p: &Tensor| -> f64 { gradients.to_vec(p).iter().map(|g| f64::from(*g).powi(2)).sum() };
            Ok(parameters.iter().map(squares).sum())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;
    use crate::{
        context::Forms,
        device::Device,
        error::Error,
        ops::{
            self, Act, Distance, LinearWeights,
            check::{floats, gpu, near},
        },
        tape::Tape,
    };

    /// The CPU's best on 1 and 3 threads, the composed forms, and the pretended GPU.
    fn contexts() -> [Context; 4] {
        let best = |threads| Context::new(Device::Cpu, threads);
        [best(1), best(3), best(1).with_forms(Forms::Composed), gpu().0]
    }

    fn gradients_of(cx: &Context, tensors: &[(&Tensor, &str)]) -> Gradients {
        let mut tape = Tape::training();
        let terms: Vec<Tensor> = tensors
            .iter()
            .map(|(x, key)| {
                let gradient = cx.tensor(floats(key, x.len()), x.rows(), x.columns()).unwrap();
                let product = ops::mul(cx, &mut tape, x, &gradient).unwrap();
                ops::sum(cx, &mut tape, &product).unwrap()
            })
            .collect();
        let loss = ops::weighted_sum(cx, &mut tape, &terms, &vec![1.0; terms.len()]).unwrap();
        tape.backward(&loss).unwrap()
    }

    type Update<'a> = &'a dyn Fn(&Context, &mut Tensor, &mut [Tensor; 2], &Gradients, u64) -> Result<()>;

    /// Three updates: all contexts agree, the number of threads changes no bit, and what no loss reached is unchanged.
    fn updates(op: &'static str, f: Update) -> Vec<f32> {
        let mut first = Vec::new();
        for len in [7, 1003, 70_001] {
            let mut all = Vec::new();
            for cx in contexts() {
                let parameter = |key: &str| cx.tensor(floats(key, len), 1, len).unwrap().tracked();
                let (mut p, mut lone) = (parameter("p"), parameter("p"));
                let zeros = || [0, 1].map(|_| cx.tensor(vec![0.0; len], 1, len).unwrap());
                let (mut state, mut other) = (zeros(), zeros());
                for step in 1..4 {
                    let before = p.clone();
                    let gradients = gradients_of(&cx, &[(&p, &format!("g{step}"))]);
                    f(&cx, &mut p, &mut state, &gradients, step).unwrap();
                    f(&cx, &mut lone, &mut other, &gradients, step).unwrap();
                    assert_ne!(before.to_vec(), p.to_vec(), "{op}: a clone keeps its values");
                }
                assert_eq!(lone.to_vec(), floats("p", len), "{op}: no loss reached it");
                if *cx.device() != Device::Cpu {
                    assert_eq!(cx.fallbacks().get(op), Some(&3), "{op}");
                }
                all.push([p.to_vec(), state[0].to_vec(), state[1].to_vec()].concat());
            }
            assert!(all[0] == all[1], "{op} of {len}: 3 threads give other bits");
            near(&format!("{op} of {len}, composed"), &all[2], &all[0], 1e-6);
            near(&format!("{op} of {len}, GPU"), &all[3], &all[0], 1e-6);
            if len == 7 {
                first = all[0][..7].to_vec();
            }
        }
        first
    }

    #[test]
    fn adamw_agrees_in_its_forms() {
        updates("adamw", &|cx, p, [first, second], gradients, step| {
            let step = AdamStep {
                lr: 0.01 * step as f64,
                betas: (0.9, 0.95),
                eps: 1e-8,
                weight_decay: 0.05,
                step,
                gradient_scale: 0.5,
            };
            adamw(cx, p, [first, second], gradients, step)
        });
    }

    #[test]
    fn sgd_and_lars_agree_in_their_forms() {
        updates("sgd", &|cx, p, [mu, _], gradients, _| {
            sgd(cx, p, mu, gradients, SgdStep { lr: 0.1, momentum: 0.9, weight_decay: 0.05, gradient_scale: 0.5 })
        });
        for trust in [Some(0.001), None] {
            updates("lars", &|cx, p, [mu, _], gradients, _| {
                let step = LarsStep { lr: 6.4, momentum: 0.9, weight_decay: 0.1, trust, gradient_scale: 1.0 };
                lars(cx, p, mu, gradients, step)
            });
        }
    }

    #[test]
    fn lars_scales_by_trust_and_leaves_biases_alone() {
        for cx in contexts() {
            let run = |values: [f32; 2], trust: Option<f64>| {
                let mut p = cx.tensor(values.to_vec(), 1, 2).unwrap().tracked();
                let mut mu = cx.tensor(vec![1.0, 0.0], 1, 2).unwrap();
                let mut tape = Tape::training();
                // The gradient is (3, 4) - 0.5 p, so that with the decay |d| = 5.
                let decay = if trust.is_some() { 0.5 } else { 0.0 };
                let wanted: Vec<f32> = [3.0, 4.0].iter().zip(values).map(|(d, p)| d - decay * p).collect();
                let product = ops::mul(&cx, &mut tape, &p, &cx.tensor(wanted, 1, 2).unwrap()).unwrap();
                let loss = ops::sum(&cx, &mut tape, &product).unwrap();
                let gradients = tape.backward(&loss).unwrap();
                let step = LarsStep { lr: 2.0, momentum: 0.9, weight_decay: 0.5, trust, gradient_scale: 1.0 };
                lars(&cx, &mut p, &mut mu, &gradients, step).unwrap();
                (mu.to_vec(), p.to_vec())
            };
            // |p| = 10, ratio 0.1 * 10 / 5 = 0.2; mu = 0.9 (1, 0) + 0.2 (3, 4).
            let (mu, p) = run([6.0, 8.0], Some(0.1));
            near("mu", &mu, &[1.5, 0.8], 1e-6);
            near("p", &p, &[3.0, 6.4], 1e-6);
            // A bias, and a parameter of length 0: the plain gradient.
            near("bias", &run([6.0, 8.0], None).0, &[3.9, 4.0], 1e-6);
            near("zeros", &run([0.0, 0.0], Some(0.1)).0, &[3.9, 4.0], 1e-6);
        }
    }

    #[test]
    fn a_running_mean_moves_in_place_and_not_under_a_clone() {
        for cx in contexts() {
            let source = cx.tensor(floats("source", 70_001), 1, 70_001).unwrap();
            let start = cx.tensor(floats("moving", 70_001), 1, 70_001).unwrap();
            let mut moving = start.clone();
            ema(&cx, &mut moving, &source, 0.996).unwrap();
            let (keep, take) = (0.996f64 as f32, (1.0 - 0.996f64) as f32);
            let expected: Vec<f32> =
                start.values().iter().zip(&*source.values()).map(|(m, s)| m * keep + s * take).collect();
            near("moving average", &moving.to_vec(), &expected, 1e-6);
            assert_eq!(start.to_vec(), floats("moving", 70_001), "a clone keeps its values");
            assert_eq!(moving.id(), start.id(), "it is still the same tensor");
            let mut same = source.clone();
            ema(&cx, &mut same, &source, 0.5).unwrap();
            assert_eq!(same.to_vec(), source.to_vec());
            ema(&cx, &mut moving, &source, 0.0).unwrap();
            assert_eq!(moving.to_vec(), source.to_vec());
        }
        let (on_gpu, on_cpu) = (gpu().0, Context::new(Device::Cpu, 1));
        let [mut a, b] = [&on_gpu, &on_cpu].map(|cx| cx.tensor(vec![1.0], 1, 1).unwrap());
        assert_eq!(ema(&on_gpu, &mut a, &b, 0.5), Err(Error::Devices { op: "ema" }));
    }

    #[test]
    fn the_sum_of_squares_counts_what_a_loss_reached() {
        for cx in contexts() {
            let parameter = |key: &str, len| cx.tensor(floats(key, len), 1, len).unwrap().tracked();
            let (a, b, lone) = (parameter("a", 1003), parameter("b", 3), parameter("lone", 5));
            let gradients = gradients_of(&cx, &[(&a, "ga"), (&b, "gb")]);
            let squares = |key: &str, len| floats(key, len).iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
            let expected = squares("ga", 1003) + squares("gb", 3);
            let got = square_sum(&cx, &[a, b, lone], &gradients).unwrap();
            assert!((got / expected - 1.0).abs() < 1e-9, "{got} and {expected}");
            assert_eq!(square_sum(&cx, &[], &gradients), Ok(0.0));
        }
    }

    /// The losses of 20 AdamW steps of a model of two layers.
    fn train(cx: &Context) -> Vec<f32> {
        let tensor = |key: &str, rows, columns| cx.tensor(floats(key, rows * columns), rows, columns).unwrap();
        let (x, target) = (tensor("x", 16, 8), tensor("target", 16, 6));
        let mut parameters = [("w1", 12, 8), ("b1", 1, 12), ("w2", 6, 12), ("b2", 1, 6)].map(|(key, rows, columns)| {
            let values = floats(key, rows * columns).iter().map(|v| 0.3 * v).collect();
            cx.tensor(values, rows, columns).unwrap().tracked()
        });
        let mut states = parameters
            .each_ref()
            .map(|p| [0, 1].map(|_| cx.tensor(vec![0.0; p.len()], p.rows(), p.columns()).unwrap()));
        let mut losses = Vec::new();
        for step in 1..=20 {
            let mut tape = Tape::training();
            let layer = |i: usize| LinearWeights {
                weight: parameters[i].clone(),
                bias: Some(parameters[i + 1].clone()),
                packed: None,
            };
            let y = ops::linear(cx, &mut tape, &x, &layer(0), Act::Gelu).unwrap();
            let y = ops::linear(cx, &mut tape, &y, &layer(2), Act::None).unwrap();
            let loss = ops::distance(cx, &mut tape, &y, &target, Distance::SmoothL1 { beta: 1.0 }).unwrap();
            drop(y);
            losses.push(loss.value());
            let gradients = tape.backward(&loss).unwrap();
            let step =
                AdamStep { lr: 1e-2, betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.05, step, gradient_scale: 1.0 };
            for (p, [first, second]) in parameters.iter_mut().zip(&mut states) {
                adamw(cx, p, [first, second], &gradients, step).unwrap();
            }
        }
        losses
    }

    #[test]
    fn training_is_the_same_in_all_forms_and_on_all_devices() {
        let [best, threads, composed, _] = contexts();
        let expected = train(&best);
        assert!(expected[19] < 0.8 * expected[0], "{expected:?}");
        assert!(train(&threads) == expected, "3 threads give other bits");
        let (cx, counts) = gpu();
        for (name, losses) in [("composed", train(&composed)), ("GPU", train(&cx))] {
            for (got, expected) in losses.iter().zip(&expected) {
                assert!((got - expected).abs() <= 1e-6, "{name}: {got} and {expected}");
            }
        }
        assert_eq!((cx.fallbacks().get("linear"), cx.fallbacks().get("adamw")), (Some(&40), Some(&80)));
        assert_eq!(counts.live.load(Relaxed), 0, "nothing outlives the run");
    }
}
