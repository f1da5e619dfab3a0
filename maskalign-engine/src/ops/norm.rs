//! Normalisation of rows.

use dfdx::prelude::{
    Axis, BroadcastTo, Cpu, Device, HasShape, MeanTo, PutTape, ReshapeTo, SplitTape, SumTo, TryAdd, TryMul,
};
use maskalign_kernels::{elementwise::Write, norm as kernel};

use super::{Replaced, composed_one, linear::row, made_on_cpu, through_host_one};
use crate::{
    context::{Context, Form},
    error::Result,
    graph::{Float, Graph, Matrix, Taped},
    tape::Tape,
    tensor::Tensor,
};

/// What a LayerNorm multiplies by and adds.
#[derive(Clone)]
pub struct NormWeights {
    /// Scale and shift, `[1, columns]` each; `None` for a norm without affine parameters.
    pub affine: Option<(Tensor, Tensor)>,
    /// Added to the variance.
    pub eps: f64,
}

impl NormWeights {
    pub(super) fn tensors(&self) -> Vec<&Tensor> {
        self.affine.iter().flat_map(|(gamma, beta)| [gamma, beta]).collect()
    }

    pub(super) fn replaced(&self, by: &mut Replaced) -> Self {
        NormWeights { affine: self.affine.as_ref().map(|_| (by.next(), by.next())), eps: self.eps }
    }

    pub(super) fn gamma(&self) -> Option<&Tensor> {
        self.affine.as_ref().map(|affine| &affine.0)
    }

    pub(super) fn beta(&self) -> Option<&Tensor> {
        self.affine.as_ref().map(|affine| &affine.1)
    }
}

/// How values that take no gradient are normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standardize {
    /// Each row to unit length (eps 1e-12, PyTorch's `F.normalize`).
    Length,
    /// Each row by its own mean and unbiased variance, eps 1e-6.
    Rows,
    /// All values by one mean and one unbiased variance, eps 1e-6.
    All,
}

/// LayerNorm over columns, with the biased variance.
///
/// # Errors
/// Out of memory on the device.
pub fn layer_norm(cx: &Context, tape: &mut Tape, x: &Tensor, norm: &NormWeights) -> Result<Tensor> {
    let inputs: Vec<&Tensor> = [x].into_iter().chain(norm.tensors()).collect();
    match cx.form("layer_norm", &inputs)? {
        Form::Composed => composed_one(cx, tape, &inputs, |g, m| {
            composed(g, &m[0], norm.affine.is_some().then(|| (&m[1], &m[2])), norm.eps)
        }),
        Form::Gpu => through_host_one(cx, tape, "layer_norm", &inputs, |cx, tape, copies| {
            layer_norm(cx, tape, &copies[0], &norm.replaced(&mut Replaced::new(&copies[1..])))
        }),
        Form::Cpu => {
            let records = tape.wants(&inputs);
            let (rows, columns) = x.shape();
            let (pool, arena) = cx.handles();
            let mut y = vec![0.0; rows * columns];
            let mut stats = records.then(|| arena.take(2 * rows));
            let (gamma, beta) = (norm.gamma().map(Tensor::cpu), norm.beta().map(Tensor::cpu));
            kernel::layer_norm(&pool, x.cpu(), columns, gamma, beta, norm.eps as f32, &mut y, stats.as_deref_mut());
            let y = made_on_cpu(cx, y, rows, columns, records)?;
            if let Some(stats) = stats {
                let (x, norm, out) = (x.clone(), norm.clone(), y.slot());
                tape.record(move |g| {
                    let Some(dy) = g.take_cpu(&out) else { return Ok(()) };
                    let gamma = norm.gamma().and_then(Tensor::wanted);
                    let beta = norm.beta().and_then(Tensor::wanted);
                    let (mut dgamma, mut dbeta) = (g.lend(gamma.as_ref()), g.lend(beta.as_ref()));
                    // The kernel adds to the gradient of its input, which nobody reads where it is not wanted.
                    let mut unread;
                    let dx = match x.wanted() {
                        Some(slot) => g.cpu_mut(&slot),
                        None => {
                            unread = vec![0.0; x.len()];
                            &mut unread
                        }
                    };
                    kernel::layer_norm_backward(
                        &pool,
                        &arena,
                        x.cpu(),
                        columns,
                        &stats,
                        norm.gamma().map(Tensor::cpu),
                        &dy,
                        dx,
                        Write::Add,
                        dgamma.as_deref_mut(),
                        dbeta.as_deref_mut(),
                    );
                    g.give_back(gamma.as_ref(), dgamma)?;
                    g.give_back(beta.as_ref(), dbeta)
                });
            }
            Ok(y)
        }
    }
}

/// LayerNorm over columns with the biased variance.
pub(super) fn composed<E: Float>(
    g: &mut Graph<E>,
    x: &Matrix<E>,
    affine: Option<(&Matrix<E>, &Matrix<E>)>,
    eps: f64,
) -> Result<Matrix<E>>
where
    Cpu: Device<E>,
{
    let y = g.run(x, |x| x.try_normalize::<Axis<1>>(eps))?;
    let Some((gamma, beta)) = affine else { return Ok(y) };
    let (gamma, beta) = (row(g, gamma, *y.shape())?, row(g, beta, *y.shape())?);
    g.run(&y, |y| y.try_mul(gamma)?.try_add(beta))
}

/// Normalised values, which take no gradient.
///
/// # Errors
/// Out of memory on the device.
pub fn standardize(cx: &Context, x: &Tensor, kind: Standardize) -> Result<Tensor> {
    let off = &mut Tape::inference();
    match cx.form("standardize", &[x])? {
        Form::Composed => composed_one(cx, off, &[x], |g, m| composed_standardize(g, &m[0], kind)),
        Form::Gpu => through_host_one(cx, off, "standardize", &[x], |cx, _, copies| standardize(cx, &copies[0], kind)),
        Form::Cpu => {
            let (rows, columns) = x.shape();
            let mut y = vec![0.0; rows * columns];
            match kind {
                Standardize::Length => kernel::l2_normalize(cx.pool(), x.cpu(), columns, &mut y),
                Standardize::Rows => kernel::standardize_rows(cx.pool(), x.cpu(), columns, &mut y),
                Standardize::All => kernel::standardize_all(cx.pool(), x.cpu(), &mut y),
            }
            cx.output(y, rows, columns)
        }
    }
}

pub(super) fn composed_standardize(g: &mut Graph, x: &Matrix, kind: Standardize) -> Result<Matrix> {
    let (rows, columns) = *x.shape();
    match kind {
        Standardize::Length => g.run(x, |x| {
            let (x, tape) = x.split_tape();
            let length: Taped<(usize,)> =
                x.clone().put_tape(tape).try_square()?.try_sum::<(usize,), Axis<1>>()?.try_sqrt()?;
            let inverse = length.try_clamp(1e-12, f32::MAX)?.try_recip()?;
            inverse.try_broadcast_like::<(usize, usize), Axis<1>>(&(rows, columns))?.try_mul(x)
        }),
        Standardize::Rows => composed_standardize_rows(g, x),
        Standardize::All => {
            let row = g.run(x, |x| x.try_reshape_like(&(1, rows * columns)))?;
            let row = composed_standardize_rows(g, &row)?;
            g.run(&row, |x| x.try_reshape_like(&(rows, columns)))
        }
    }
}

/// Rows by their mean and unbiased variance, eps 1e-6.
fn composed_standardize_rows(g: &mut Graph, x: &Matrix) -> Result<Matrix> {
    let shape = *x.shape();
    let unbiased = shape.1 as f32 / (shape.1 as f32 - 1.0);
    g.run(x, |x| {
        let (x, tape) = x.split_tape();
        let mean: Taped<(usize,)> = x.clone().put_tape(tape).try_mean::<(usize,), Axis<1>>()?;
        let centred = mean.try_negate()?.try_broadcast_like::<(usize, usize), Axis<1>>(&shape)?.try_add(x)?;
        let (centred, tape) = centred.split_tape();
        let variance: Taped<(usize,)> = centred.clone().put_tape(tape).try_square()?.try_mean::<(usize,), Axis<1>>()?;
        let inverse = variance.try_mul(unbiased)?.try_add(1e-6)?.try_sqrt()?.try_recip()?;
        inverse.try_broadcast_like::<(usize, usize), Axis<1>>(&shape)?.try_mul(centred)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{finite_differences, forms, input};

    #[test]
    fn composed_gradients_are_finite_differences() {
        finite_differences("layer norm", &[(4, 5), (1, 5), (1, 5)], |g, x| {
            Ok(vec![composed(g, &x[0], Some((&x[1], &x[2])), 1e-6)?])
        });
        finite_differences("plain layer norm", &[(3, 7)], |g, x| Ok(vec![composed(g, &x[0], None, 1e-5)?]));
    }

    #[test]
    fn the_forms_agree() {
        for (rows, columns) in [(1, 3), (5, 7), (33, 65)] {
            let gamma = input("gamma", 1, columns).map(|v| 1.0 + 0.3 * v);
            let all = [input("x", rows, columns), gamma, input("beta", 1, columns)];
            forms("layer_norm", &all, |cx, tape, x| {
                let norm = NormWeights { affine: Some((x[1].clone(), x[2].clone())), eps: 1e-6 };
                Ok(vec![layer_norm(cx, tape, &x[0], &norm)?])
            });
            forms("layer_norm", &all[..1], |cx, tape, x| {
                Ok(vec![layer_norm(cx, tape, &x[0], &NormWeights { affine: None, eps: 1e-5 })?])
            });
            for kind in [Standardize::Length, Standardize::Rows, Standardize::All] {
                forms("standardize", &[input("x", rows, columns).constant()], |cx, _, x| {
                    Ok(vec![standardize(cx, &x[0], kind)?])
                });
            }
        }
    }
}
