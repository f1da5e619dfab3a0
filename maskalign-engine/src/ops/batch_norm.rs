//! Normalisation of columns over the rows of a batch: PyTorch's `BatchNorm1d` without affine parameters.

use dfdx::prelude::{Axis, Cpu, Device, HasShape, MeanTo, ReshapeTo, TryAdd, TryMul, TrySub};
use maskalign_kernels::{Pool, batch_norm as kernel, for_parts};

use super::{
    CHUNK, composed as run_composed, composed_one, linear::row, made_on_cpu, move_gradient, optim, through_host,
    through_host_one,
};
use crate::{
    context::{Context, Form},
    error::Result,
    graph::{Float, Graph, Matrix, Vector},
    tape::Tape,
    tensor::Tensor,
};

/// Mean and variance of each column, `[1, columns]` each. They take no gradient.
#[derive(Clone, Debug)]
pub struct BatchStatistics {
    /// Each column's mean.
    pub mean: Tensor,
    /// Each column's biased variance; in running statistics, the unbiased one.
    pub variance: Tensor,
}

impl BatchStatistics {
    /// Moves running statistics towards those of a batch of `rows` rows:
    /// `running = (1 - momentum) running + momentum batch`, with the batch's unbiased variance, as PyTorch does.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn follow(&mut self, cx: &Context, batch: &BatchStatistics, rows: usize, momentum: f64) -> Result<()> {
        let unbiased = rows as f32 / (rows as f32 - 1.0);
        let variance = super::scale(cx, &mut Tape::inference(), &batch.variance, unbiased)?;
        optim::ema(cx, &mut self.mean, &batch.mean, 1.0 - momentum)?;
        optim::ema(cx, &mut self.variance, &variance, 1.0 - momentum)
    }
}

/// Training mode: `(x - mean) / sqrt(variance + eps)` with the batch's own statistics, which are returned too.
/// `[rows, columns] -> [rows, columns]`.
///
/// # Errors
/// Out of memory on the device.
pub fn batch_norm(cx: &Context, tape: &mut Tape, x: &Tensor, eps: f64) -> Result<(Tensor, BatchStatistics)> {
    let [y, mean, variance] = of_batch(cx, tape, x, eps)?.try_into().expect("three outputs");
    Ok((y, BatchStatistics { mean: mean.detached(), variance: variance.detached() }))
}

fn of_batch(cx: &Context, tape: &mut Tape, x: &Tensor, eps: f64) -> Result<Vec<Tensor>> {
    match cx.form("batch_norm", &[x])? {
        Form::Composed => run_composed(cx, tape, &[x], |g, m| composed(g, &m[0], eps)),
        Form::Gpu => through_host(cx, tape, "batch_norm", &[x], |cx, tape, copies| of_batch(cx, tape, &copies[0], eps)),
        Form::Cpu => {
            let (pool, _) = cx.handles();
            let records = tape.wants(&[x]);
            let ((rows, columns), eps) = (x.shape(), eps as f32);
            let (mut mean, mut var) = (vec![0.0; columns], vec![0.0; columns]);
            kernel::column_stats(&pool, x.cpu(), &mut mean, &mut var);
            let stats = kernel::ColumnStats { mean: &mean, var: &var, eps };
            let mut y = vec![0.0; rows * columns];
            kernel::batch_norm(&pool, x.cpu(), stats, kernel::Affine::default(), &mut y);
            let y = made_on_cpu(cx, y, rows, columns, records)?;
            let statistics = [mean.clone(), var.clone()].map(|values| made_on_cpu(cx, values, 1, columns, false));
            if records {
                let (x, out) = (x.clone(), y.slot());
                tape.record(move |g| {
                    let Some(d) = g.take_cpu(&out) else { return Ok(()) };
                    let stats = kernel::ColumnStats { mean: &mean, var: &var, eps };
                    let dx = x.wanted();
                    let dx = dx.as_ref().map(|slot| g.cpu_mut(slot).as_mut_slice());
                    let grads = kernel::BatchNormGrads { dx, ..Default::default() };
                    kernel::batch_norm_backward(&pool, x.cpu(), stats, None, &d, grads);
                    Ok(())
                });
            }
            let [mean, variance] = statistics;
            Ok(vec![y, mean?, variance?])
        }
    }
}

/// Evaluation mode: `(x - mean) / sqrt(variance + eps)` with the given statistics. `[rows, columns] -> [rows, columns]`.
///
/// # Errors
/// Out of memory on the device.
pub fn batch_norm_by(
    cx: &Context,
    tape: &mut Tape,
    x: &Tensor,
    statistics: &BatchStatistics,
    eps: f64,
) -> Result<Tensor> {
    let (mean, variance) = (&statistics.mean.clone().detached(), &statistics.variance.clone().detached());
    let op = "batch_norm_by";
    match cx.form(op, &[x, mean, variance])? {
        Form::Composed => composed_one(cx, tape, &[x, mean, variance], |g, m| composed_by(g, &m[0], &m[1], &m[2], eps)),
        Form::Gpu => through_host_one(cx, tape, op, &[x, mean, variance], |cx, tape, copies| {
            let statistics = BatchStatistics { mean: copies[1].clone(), variance: copies[2].clone() };
            batch_norm_by(cx, tape, &copies[0], &statistics, eps)
        }),
        Form::Cpu => {
            let (pool, _) = cx.handles();
            let records = tape.wants(&[x]);
            let (rows, columns) = x.shape();
            let inverse = inverse_deviations(variance.cpu(), eps);
            let mut y = vec![0.0; rows * columns];
            let stats = kernel::ColumnStats { mean: mean.cpu(), var: variance.cpu(), eps: eps as f32 };
            kernel::batch_norm(&pool, x.cpu(), stats, kernel::Affine::default(), &mut y);
            let y = made_on_cpu(cx, y, rows, columns, records)?;
            if records {
                let (x, out) = (x.wanted(), y.slot());
                tape.record(move |g| {
                    let Some(mut d) = g.take_cpu(&out) else { return Ok(()) };
                    by_columns(&pool, &mut d, columns, |_, j, d| d * inverse[j]);
                    move_gradient(g, &pool, x.as_ref(), d)
                });
            }
            Ok(y)
        }
    }
}

fn inverse_deviations(variance: &[f32], eps: f64) -> Vec<f32> {
    variance.iter().map(|v| (1.0 / (f64::from(*v) + eps).sqrt()) as f32).collect()
}

/// Replaces each value by `f(index, column, value)`.
fn by_columns(pool: &Pool, values: &mut [f32], columns: usize, f: impl Fn(usize, usize, f32) -> f32 + Sync) {
    let part = (CHUNK / columns.max(1)).max(1) * columns.max(1);
    for_parts(pool, values, part, |start, part| {
        for (row, values) in part.chunks_exact_mut(columns).enumerate() {
            for (j, value) in values.iter_mut().enumerate() {
                *value = f(start + row * columns + j, j, *value);
            }
        }
    });
}

/// The normalised values, mean and variance.
fn composed<E: Float>(g: &mut Graph<E>, x: &Matrix<E>, eps: f64) -> Result<Vec<Matrix<E>>>
where
    Cpu: Device<E>,
{
    let columns = x.shape().1;
    let mean: Vector<E> = g.run(x, |x| x.try_mean::<(usize,), Axis<0>>())?;
    let mean = g.run(&mean, |m| m.try_reshape_like(&(1, columns)))?;
    let repeated = row(g, &mean, *x.shape())?;
    let centred = g.run(x, |x| x.try_sub(repeated))?;
    let variance: Vector<E> = g.run(&centred, |x| x.try_square()?.try_mean::<(usize,), Axis<0>>())?;
    let variance = g.run(&variance, |v| v.try_reshape_like(&(1, columns)))?;
    let y = composed_by_centred(g, &centred, &variance, eps)?;
    Ok(vec![y, mean, variance])
}

fn composed_by<E: Float>(
    g: &mut Graph<E>,
    x: &Matrix<E>,
    mean: &Matrix<E>,
    variance: &Matrix<E>,
    eps: f64,
) -> Result<Matrix<E>>
where
    Cpu: Device<E>,
{
    let mean = row(g, mean, *x.shape())?;
    let centred = g.run(x, |x| x.try_sub(mean))?;
    composed_by_centred(g, &centred, variance, eps)
}

fn composed_by_centred<E: Float>(
    g: &mut Graph<E>,
    centred: &Matrix<E>,
    variance: &Matrix<E>,
    eps: f64,
) -> Result<Matrix<E>>
where
    Cpu: Device<E>,
{
    let inverse = g.run(variance, |v| v.try_add(E::of(eps))?.try_sqrt()?.try_recip())?;
    let inverse = row(g, &inverse, *centred.shape())?;
    g.run(centred, |x| x.try_mul(inverse))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{finite_differences, forms, forms_and_slopes, input, near};

    #[test]
    fn composed_gradients_are_finite_differences() {
        finite_differences("batch norm", &[(5, 3)], |g, x| Ok(vec![composed(g, &x[0], 1e-6)?.remove(0)]));
        finite_differences("batch norm by statistics", &[(5, 3), (1, 3)], |g, x| {
            let variance = g.run(&x[1], |v| v.try_square()?.try_add(0.5))?;
            Ok(vec![composed_by(g, &x[0], &x[1], &variance, 1e-6)?])
        });
    }

    #[test]
    fn the_forms_agree() {
        for (rows, columns) in [(3, 1), (7, 5), (131, 257)] {
            forms("batch_norm", &[input("x", rows, columns)], |cx, tape, x| {
                let (y, statistics) = batch_norm(cx, tape, &x[0], 1e-6)?;
                assert!(!statistics.mean.is_tracked() && !statistics.variance.is_tracked());
                Ok(vec![y, statistics.mean, statistics.variance])
            });
            let variance = input("variance", 1, columns).map(|v| 0.5 + v * v).constant();
            let all = [input("x", rows, columns), input("mean", 1, columns).constant(), variance];
            forms("batch_norm_by", &all, |cx, tape, x| {
                let statistics = BatchStatistics { mean: x[1].clone(), variance: x[2].clone() };
                Ok(vec![batch_norm_by(cx, tape, &x[0], &statistics, 1e-6)?])
            });
        }
        forms_and_slopes("batch_norm", &[input("x", 7, 5)], |cx, tape, x| {
            Ok(vec![batch_norm(cx, tape, &x[0], 1e-6)?.0])
        });
    }

    #[test]
    fn running_statistics_follow_with_the_unbiased_variance() {
        let cx = Context::new(crate::device::Device::Cpu, 1);
        let row = |values: [f32; 2]| cx.tensor(values.to_vec(), 1, 2).unwrap();
        let mut running = BatchStatistics { mean: row([0.0, 0.0]), variance: row([1.0, 1.0]) };
        let x = cx.tensor(vec![1.0, 0.0, 3.0, 0.0, 5.0, 3.0], 3, 2).unwrap();
        let (_, batch) = batch_norm(&cx, &mut Tape::inference(), &x, 1e-5).unwrap();
        running.follow(&cx, &batch, 3, 0.1).unwrap();
        // Means 3 and 1, unbiased variances 4 and 3: a tenth of the way.
        near("mean", &running.mean.to_vec(), &[0.3, 0.1], 1e-6);
        near("variance", &running.variance.to_vec(), &[1.3, 1.2], 1e-6);
    }
}
