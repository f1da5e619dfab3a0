//! Distances of predictions from targets, and sums of them.

use std::sync::Arc;

use dfdx::prelude::{
    Axis, BroadcastTo, Cpu, Device, HasShape, MeanTo, PutTape, ReshapeTo, SplitTape, SumTo, TryAdd, TryMul, TrySub,
};
use maskalign_kernels::{Pool, elementwise::Write, loss as kernel};

use super::{composed_one, made_on_cpu, through_host_one};
use crate::{
    context::{Context, Form},
    error::Result,
    graph::{Float, Graph, Matrix, Taped},
    tape::Tape,
    tensor::Tensor,
};

/// An elementwise distance or a distribution loss, averaged as PyTorch's `reduction="mean"` does.
///
/// ```
/// # use maskalign_engine::{Context, Device, Error, Tape, ops::{self, Distance}};
/// # let cx = Context::new(Device::Cpu, 1);
/// let (x, y) = (cx.tensor(vec![1.0, 4.0], 1, 2)?, cx.tensor(vec![1.0, 2.0], 1, 2)?);
/// assert_eq!(ops::distance(&cx, &mut Tape::training(), &x, &y, Distance::L1)?.value(), 1.0);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Distance {
    /// Mean squared error.
    Mse,
    /// Mean absolute error.
    L1,
    /// Smooth L1; at `beta` it turns from quadratic to linear.
    SmoothL1 {
        /// Width of the quadratic part.
        beta: f32,
    },
    /// 1 - cosine similarity of each row, averaged over rows.
    Cosine,
    /// Kullback-Leibler divergence of softmax(prediction) from softmax(target), averaged over all elements.
    Kl,
}

/// The distance of a prediction from a target of the same shape, `[1, 1]`. The target takes no gradient.
///
/// # Errors
/// Out of memory on the device.
pub fn distance(cx: &Context, tape: &mut Tape, x: &Tensor, target: &Tensor, kind: Distance) -> Result<Tensor> {
    assert_eq!(x.shape(), target.shape(), "a prediction has its target's shape");
    let target = &target.clone().detached();
    match cx.form("distance", &[x, target])? {
        Form::Composed => composed_one(cx, tape, &[x, target], |g, m| composed_distance(g, &m[0], &m[1], kind)),
        Form::Gpu => through_host_one(cx, tape, "distance", &[x, target], |cx, tape, copies| {
            distance(cx, tape, &copies[0], &copies[1], kind)
        }),
        Form::Cpu => {
            let records = tape.wants(&[x]);
            let value = distance_kernel(cx.pool(), x, target, kind, None);
            let y = made_on_cpu(cx, vec![value as f32], 1, 1, records)?;
            if records {
                let (pool, _): (Arc<Pool>, _) = cx.handles();
                let (x, target, out) = (x.clone(), target.clone(), y.slot());
                tape.record(move |g| {
                    let Some(dy) = g.take_cpu(&out) else { return Ok(()) };
                    let into = g.cpu_mut(&x.slot());
                    let grad = kernel::Grad { into, scale: dy[0], write: Write::Add };
                    distance_kernel(&pool, &x, &target, kind, Some(grad));
                    Ok(())
                });
            }
            Ok(y)
        }
    }
}

fn distance_kernel(pool: &Pool, x: &Tensor, target: &Tensor, kind: Distance, grad: Option<kernel::Grad<'_>>) -> f64 {
    let (columns, x, y) = (x.columns(), x.cpu(), target.cpu());
    match kind {
        Distance::Mse => kernel::pointwise(pool, kernel::Pointwise::Mse, x, y, grad),
        Distance::L1 => kernel::pointwise(pool, kernel::Pointwise::L1, x, y, grad),
        Distance::SmoothL1 { beta } => kernel::pointwise(pool, kernel::Pointwise::SmoothL1 { beta }, x, y, grad),
        Distance::Cosine => kernel::cosine(pool, x, y, columns, grad),
        Distance::Kl => kernel::kl(pool, x, y, columns, grad),
    }
}

/// Mean over rows of the cross entropy with soft targets `[rows, classes]`, `[1, 1]`. The targets take no gradient.
///
/// # Errors
/// Out of memory on the device.
pub fn cross_entropy(cx: &Context, tape: &mut Tape, logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    assert_eq!(logits.shape(), targets.shape(), "there is a target for each logit");
    let targets = &targets.clone().detached();
    match cx.form("cross_entropy", &[logits, targets])? {
        Form::Composed => composed_one(cx, tape, &[logits, targets], |g, m| composed_cross_entropy(g, &m[0], &m[1])),
        Form::Gpu => through_host_one(cx, tape, "cross_entropy", &[logits, targets], |cx, tape, copies| {
            cross_entropy(cx, tape, &copies[0], &copies[1])
        }),
        Form::Cpu => {
            let records = tape.wants(&[logits]);
            let columns = logits.columns();
            let value = kernel::cross_entropy(cx.pool(), logits.cpu(), targets.cpu(), columns, None);
            let y = made_on_cpu(cx, vec![value as f32], 1, 1, records)?;
            if records {
                let (pool, _) = cx.handles();
                let (x, targets, out) = (logits.clone(), targets.clone(), y.slot());
                tape.record(move |g| {
                    let Some(dy) = g.take_cpu(&out) else { return Ok(()) };
                    let grad = kernel::Grad { into: g.cpu_mut(&x.slot()), scale: dy[0], write: Write::Add };
                    kernel::cross_entropy(&pool, x.cpu(), targets.cpu(), columns, Some(grad));
                    Ok(())
                });
            }
            Ok(y)
        }
    }
}

/// `sum_i weights[i] terms[i]` for terms of shape `[1, 1]`.
///
/// # Errors
/// Out of memory on the device.
pub fn weighted_sum(cx: &Context, tape: &mut Tape, terms: &[Tensor], weights: &[f32]) -> Result<Tensor> {
    assert_eq!(terms.len(), weights.len(), "there is a weight for each term");
    let inputs: Vec<&Tensor> = terms.iter().collect();
    match cx.form("weighted_sum", &inputs)? {
        Form::Composed => composed_one(cx, tape, &inputs, |g, m| {
            let mut total = g.run(&m[0], |t| t.try_mul(weights[0]))?;
            for (term, &weight) in m.iter().zip(weights).skip(1) {
                let so_far = total;
                total = g.run(term, |t| t.try_mul(weight)?.try_add(so_far))?;
            }
            Ok(total)
        }),
        Form::Gpu => through_host_one(cx, tape, "weighted_sum", &inputs, |cx, tape, copies| {
            weighted_sum(cx, tape, copies, weights)
        }),
        Form::Cpu => {
            let records = tape.wants(&inputs);
            let sum: f32 = terms.iter().zip(weights).map(|(term, weight)| term.value() * weight).sum();
            let y = made_on_cpu(cx, vec![sum], 1, 1, records)?;
            if records {
                let terms: Vec<_> = terms.iter().map(Tensor::wanted).collect();
                let (weights, out) = (weights.to_vec(), y.slot());
                tape.record(move |g| {
                    let Some(dy) = g.take_cpu(&out) else { return Ok(()) };
                    for (term, weight) in terms.iter().zip(weights) {
                        if let Some(slot) = term {
                            g.cpu_mut(slot)[0] += dy[0] * weight;
                        }
                    }
                    Ok(())
                });
            }
            Ok(y)
        }
    }
}

/// The mean of all values.
fn mean<E: Float>(x: Taped<(usize, usize), E>) -> Result<Taped<(), E>, dfdx::prelude::CpuError>
where
    Cpu: Device<E>,
{
    let (rows, columns) = *x.shape();
    x.try_reshape_like(&(rows * columns,))?.try_mean::<(), Axis<0>>()
}

/// The logarithm of the softmax of values made contiguous: dfdx's gradient of the maximum in it is wrong for others.
pub(super) fn contiguous_log_softmax<E: Float>(
    x: Taped<(usize, usize), E>,
) -> Result<Taped<(usize, usize), E>, dfdx::prelude::CpuError>
where
    Cpu: Device<E>,
{
    x.try_contiguous()?.try_log_softmax::<Axis<1>>()
}

fn single<E: Float>(g: &mut Graph<E>, x: &dfdx::prelude::Tensor<(), E, Cpu>) -> Result<Matrix<E>>
where
    Cpu: Device<E>,
{
    g.run(x, |x| x.try_reshape_like(&(1, 1)))
}

/// Distance of `x` from `target`, averaged as PyTorch's `reduction="mean"`.
pub(super) fn composed_distance<E: Float>(
    g: &mut Graph<E>,
    x: &Matrix<E>,
    target: &Matrix<E>,
    kind: Distance,
) -> Result<Matrix<E>>
where
    Cpu: Device<E>,
{
    let y = target.clone();
    let value = match kind {
        Distance::Mse => g.run(x, |x| mean(x.try_sub(y)?.try_square()?)),
        Distance::L1 | Distance::SmoothL1 { beta: 0.0 } => g.run(x, |x| mean(x.try_sub(y)?.try_abs()?)),
        Distance::SmoothL1 { beta } => {
            g.run(x, |x| mean(x.try_huber_error(y, f64::from(beta))?.try_mul(E::of(1.0 / f64::from(beta)))?))
        }
        Distance::Cosine => {
            let unit = |x: Taped<(usize, usize), E>| {
                let shape = *x.shape();
                let (x, tape) = x.split_tape();
                let length: Taped<(usize,), E> =
                    x.clone().put_tape(tape).try_square()?.try_sum::<(usize,), Axis<1>>()?;
                let inverse = length.try_add(E::of(1e-16))?.try_sqrt()?.try_recip()?;
                inverse.try_broadcast_like::<(usize, usize), Axis<1>>(&shape)?.try_mul(x)
            };
            let y = Graph::inference().run(&y, unit)?;
            let x = g.run(x, unit)?;
            g.run(&x, |x| {
                let cosine: Taped<(usize,), E> = x.try_mul(y)?.try_sum::<(usize,), Axis<1>>()?;
                cosine.try_mean::<(), Axis<0>>()?.try_negate()?.try_add(E::of(1.0))
            })
        }
        Distance::Kl => {
            let mut off = Graph::inference();
            let log_p = off.run(&y, |y| y.try_log_softmax::<Axis<1>>())?;
            let p = off.run(&log_p, |y| y.try_exp())?;
            let log_q = g.run(x, contiguous_log_softmax)?;
            g.run(&log_q, |q| mean(q.try_negate()?.try_add(log_p)?.try_mul(p)?))
        }
    }?;
    single(g, &value)
}

/// Mean over rows of the cross entropy with soft targets.
pub(super) fn composed_cross_entropy<E: Float>(
    g: &mut Graph<E>,
    logits: &Matrix<E>,
    targets: &Matrix<E>,
) -> Result<Matrix<E>>
where
    Cpu: Device<E>,
{
    let classes = logits.shape().1 as f64;
    let value =
        g.run(logits, |x| mean(contiguous_log_softmax(x)?.try_mul(targets.clone())?)?.try_mul(E::of(-classes)))?;
    single(g, &value)
}

#[cfg(test)]
mod tests {
    use dfdx::prelude::TensorFromVec;

    use super::*;
    use crate::{
        host::cpu,
        ops::check::{distributions, finite_differences, forms, input, normal},
    };

    #[test]
    fn composed_gradients_are_finite_differences() {
        let kinds = [
            Distance::Mse,
            Distance::L1,
            Distance::SmoothL1 { beta: 1.0 },
            Distance::SmoothL1 { beta: 0.25 },
            Distance::SmoothL1 { beta: 0.0 },
            Distance::Cosine,
            Distance::Kl,
        ];
        for kind in kinds {
            let target: Matrix<f64> = cpu().tensor_from_vec(normal("target", 20), (4, 5));
            finite_differences(&format!("{kind:?}"), &[(4, 5)], |g, x| {
                Ok(vec![composed_distance(g, &x[0], &target, kind)?])
            });
        }
        let targets = distributions("targets", 4, 3).into_iter().map(f64::from).collect();
        let targets: Matrix<f64> = cpu().tensor_from_vec(targets, (4, 3));
        finite_differences("cross entropy", &[(4, 3)], |g, x| Ok(vec![composed_cross_entropy(g, &x[0], &targets)?]));
    }

    #[test]
    fn the_forms_agree() {
        let kinds = [
            Distance::Mse,
            Distance::L1,
            Distance::SmoothL1 { beta: 2.0 },
            Distance::SmoothL1 { beta: 0.1 },
            Distance::SmoothL1 { beta: 0.0 },
            Distance::Cosine,
            Distance::Kl,
        ];
        for (rows, columns) in [(1, 2), (5, 7), (67, 33)] {
            let all = [input("x", rows, columns), input("target", rows, columns).constant()];
            for kind in kinds {
                forms("distance", &all, |cx, tape, x| Ok(vec![distance(cx, tape, &x[0], &x[1], kind)?]));
            }
            let mut targets = input("targets", rows, columns).constant();
            targets.values = distributions("targets", rows, columns);
            forms("cross_entropy", &[input("x", rows, columns), targets], |cx, tape, x| {
                Ok(vec![cross_entropy(cx, tape, &x[0], &x[1])?])
            });
        }
        forms("weighted_sum", &[input("s", 1, 1), input("t", 1, 1), input("u", 1, 1)], |cx, tape, x| {
            Ok(vec![weighted_sum(cx, tape, x, &[0.5, -2.0, 0.25])?])
        });
    }

    #[test]
    fn a_target_that_is_the_prediction_takes_no_gradient() {
        forms("distance", &[input("x", 3, 4)], |cx, tape, x| Ok(vec![distance(cx, tape, &x[0], &x[0], Distance::Kl)?]));
    }
}
