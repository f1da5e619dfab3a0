//! Scaled dot-product attention of all heads.

use std::ops::Range;

use dfdx::prelude::{Axes4, Axis, Cpu, Device, HasShape, PermuteTo, ReshapeTo, TryMatMul, TryMul};
use maskalign_kernels::{attention as kernel, elementwise::Write};

use super::{composed_one, made_on_cpu, through_host_one};
use crate::{
    context::{Context, Form},
    error::Result,
    graph::{Float, Graph, Matrix},
    tape::Tape,
    tensor::Tensor,
};

/// Sizes of an attention: queries and keys are the rows of matrices `[batch * tokens, heads * head_dim]`.
///
/// ```
/// # use maskalign_engine::{Context, Device, Error, Tape, ops::{self, AttentionShape}};
/// # let cx = Context::new(Device::Cpu, 1);
/// // Two queries of one image to three keys, in one head of width 4.
/// let shape = AttentionShape { batch: 1, heads: 1, queries: 2, keys: 3 };
/// let (q, k) = (cx.tensor(vec![0.0; 8], 2, 4)?, cx.tensor(vec![0.0; 12], 3, 4)?);
/// let y = ops::attention(&cx, &mut Tape::inference(), &q, &k, &k, shape)?;
/// assert_eq!(y.shape(), (2, 4));
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Images in the batch.
    pub batch: usize,
    /// Attention heads, each `columns / heads` channels wide.
    pub heads: usize,
    /// Query tokens of an image.
    pub queries: usize,
    /// Key and value tokens of an image.
    pub keys: usize,
}

/// Attention of queries to keys and values, `[batch * queries, dim]`.
///
/// # Errors
/// Out of memory on the device.
pub fn attention(
    cx: &Context,
    tape: &mut Tape,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: AttentionShape,
) -> Result<Tensor> {
    run(cx, tape, "attention", &[q, k, v], shape)
}

/// The same with keys and values side by side, as one projection gives them: `kv` is `[batch * keys, 2 * dim]`, the keys'
/// columns first.
///
/// # Errors
/// Out of memory on the device.
pub fn cross_attention(
    cx: &Context,
    tape: &mut Tape,
    q: &Tensor,
    kv: &Tensor,
    shape: AttentionShape,
) -> Result<Tensor> {
    run(cx, tape, "cross_attention", &[q, kv], shape)
}

fn run(cx: &Context, tape: &mut Tape, op: &'static str, inputs: &[&Tensor], s: AttentionShape) -> Result<Tensor> {
    match cx.form(op, inputs)? {
        Form::Composed => composed_one(cx, tape, inputs, |g, m| match m {
            [q, k, v] => composed(g, q, k, v, s),
            [q, kv] => composed_cross(g, q, kv, s),
            _ => unreachable!("queries, then keys and values, apart or side by side"),
        }),
        Form::Gpu => through_host_one(cx, tape, op, inputs, |cx, tape, copies| {
            run(cx, tape, op, &copies.iter().collect::<Vec<_>>(), s)
        }),
        Form::Cpu => on_cpu(cx, tape, inputs, s),
    }
}

fn on_cpu(cx: &Context, tape: &mut Tape, inputs: &[&Tensor], s: AttentionShape) -> Result<Tensor> {
    let records = tape.wants(inputs);
    let inputs: Vec<Tensor> = inputs.iter().map(|&x| x.clone()).collect();
    let dim = inputs[0].columns();
    let AttentionShape { batch, heads, queries, keys } = s;
    let shape = kernel::AttentionShape { batch, heads, head_dim: dim / heads, queries, keys };
    let (pool, arena) = cx.handles();
    let mut out = vec![0.0; batch * queries * dim];
    let mut lse = records.then(|| arena.take(shape.lse_len()));
    let [q, k, v] = kernel_heads(&inputs);
    kernel::attention(&pool, &arena, shape, q, k, v, &mut out, lse.as_deref_mut());
    let y = made_on_cpu(cx, out, batch * queries, dim, records)?;
    if let Some(lse) = lse {
        let (out, kept) = (y.slot(), y.clone());
        tape.record(move |g| {
            let Some(dy) = g.take_cpu(&out) else { return Ok(()) };
            let slots: Vec<_> = inputs.iter().map(Tensor::wanted).collect();
            // What takes no gradient gets one that nobody reads: the kernel makes all three in one pass.
            let mut buffers: Vec<Vec<f32>> = slots
                .iter()
                .zip(&inputs)
                .map(|(slot, x)| g.lend(slot.as_ref()).unwrap_or_else(|| vec![0.0; x.len()]))
                .collect();
            let [q, k, v] = kernel_heads(&inputs);
            let into = match buffers.as_mut_slice() {
                [q, k, v] => kernel::QkvGrad::Separate { q, k, v },
                [q, kv] => kernel::QkvGrad::Cross { q, kv },
                _ => unreachable!("as many as inputs"),
            };
            kernel::attention_backward(&pool, &arena, shape, q, k, v, kept.cpu(), &lse, &dy, into, Write::Add);
            for (slot, buffer) in slots.iter().zip(buffers) {
                g.give_back(slot.as_ref(), Some(buffer))?;
            }
            Ok(())
        });
    }
    Ok(y)
}

/// Queries, keys and values of all heads.
fn kernel_heads(inputs: &[Tensor]) -> [kernel::Heads<'_>; 3] {
    fn alone(x: &Tensor) -> kernel::Heads<'_> {
        kernel::Heads::separate(x.cpu(), x.columns())
    }
    match inputs {
        [q, k, v] => [alone(q), alone(k), alone(v)],
        [q, kv] => {
            let side = |offset| kernel::Heads::new(kv.cpu(), kv.columns(), offset);
            [alone(q), side(0), side(kv.columns() / 2)]
        }
        _ => unreachable!("queries, then keys and values, apart or side by side"),
    }
}

/// Attention probabilities `[batch, heads, queries, keys]`.
pub(super) fn probabilities<E: Float>(
    g: &mut Graph<E>,
    q: &Matrix<E>,
    k: &Matrix<E>,
    s: AttentionShape,
) -> Result<dfdx::prelude::Tensor<(usize, usize, usize, usize), E, Cpu>>
where
    Cpu: Device<E>,
{
    let width = q.shape().1 / s.heads;
    let k: dfdx::prelude::Tensor<(usize, usize, usize, usize), E, Cpu> =
        g.run(k, |k| k.try_reshape_like(&(s.batch, s.keys, s.heads, width))?.try_permute::<_, Axes4<0, 2, 3, 1>>())?;
    g.run(q, |q| {
        // Scaled first: what is multiplied is then another tensor than the keys even where queries and keys are one.
        q.try_mul(E::of(1.0 / (width as f64).sqrt()))?
            .try_reshape_like(&(s.batch, s.queries, s.heads, width))?
            .try_permute::<(usize, usize, usize, usize), Axes4<0, 2, 1, 3>>()?
            .try_matmul(k)?
            .try_softmax::<Axis<3>>()
    })
}

/// Attention of all heads.
pub(super) fn composed<E: Float>(
    g: &mut Graph<E>,
    q: &Matrix<E>,
    k: &Matrix<E>,
    v: &Matrix<E>,
    s: AttentionShape,
) -> Result<Matrix<E>>
where
    Cpu: Device<E>,
{
    let width = v.shape().1 / s.heads;
    let p = probabilities(g, q, k, s)?;
    let v: dfdx::prelude::Tensor<(usize, usize, usize, usize), E, Cpu> =
        g.run(v, |v| v.try_reshape_like(&(s.batch, s.keys, s.heads, width))?.try_permute::<_, Axes4<0, 2, 1, 3>>())?;
    g.run(&p, |p| {
        p.try_matmul(v)?
            .try_permute::<(usize, usize, usize, usize), Axes4<0, 2, 1, 3>>()?
            .try_reshape_like(&(s.batch * s.queries, s.heads * width))
    })
}

/// Attention of all heads, keys and values side by side.
pub(super) fn composed_cross<E: Float>(
    g: &mut Graph<E>,
    q: &Matrix<E>,
    kv: &Matrix<E>,
    s: AttentionShape,
) -> Result<Matrix<E>>
where
    Cpu: Device<E>,
{
    let (k, v) = (part(g, kv, 0, 2)?, part(g, kv, 1, 2)?);
    composed(g, q, &k, &v, s)
}

/// Columns `part` of `parts` equal parts.
fn part<E: Float>(g: &mut Graph<E>, x: &Matrix<E>, part: usize, parts: usize) -> Result<Matrix<E>>
where
    Cpu: Device<E>,
{
    let width = x.shape().1 / parts;
    columns(g, x, part * width..(part + 1) * width)
}

/// A range of columns.
///
/// dfdx's gradient of `slice` on the CPU assigns where it should add, so a temporary is sliced here.
pub(super) fn columns<E: Float>(g: &mut Graph<E>, x: &Matrix<E>, range: Range<usize>) -> Result<Matrix<E>>
where
    Cpu: Device<E>,
{
    let (rows, width) = (x.shape().0, range.len());
    g.run(x, |x| x.try_mul(E::of(1.0))?.try_slice((0..rows, range))?.try_reshape_like(&(rows, width)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{finite_differences, forms, input};

    #[test]
    fn composed_gradients_are_finite_differences() {
        for (queries, keys) in [(3, 3), (2, 5), (4, 1)] {
            let shape = AttentionShape { batch: 2, heads: 2, queries, keys };
            finite_differences("attention", &[(2 * queries, 6), (2 * keys, 6), (2 * keys, 6)], |g, x| {
                Ok(vec![composed(g, &x[0], &x[1], &x[2], shape)?])
            });
            finite_differences("cross attention", &[(2 * queries, 6), (2 * keys, 12)], |g, x| {
                Ok(vec![composed_cross(g, &x[0], &x[1], shape)?])
            });
        }
        let shape = AttentionShape { batch: 1, heads: 1, queries: 3, keys: 3 };
        finite_differences("attention of one to itself", &[(3, 4)], |g, x| {
            Ok(vec![composed(g, &x[0], &x[0], &x[0], shape)?])
        });
    }

    #[test]
    fn the_forms_agree() {
        for (batch, heads, width, queries, keys) in
            [(1, 1, 3, 1, 1), (2, 3, 5, 7, 7), (3, 2, 9, 5, 17), (1, 2, 32, 50, 3), (2, 1, 64, 70, 130)]
        {
            let shape = AttentionShape { batch, heads, queries, keys };
            let dim = heads * width;
            let all = [input("q", batch * queries, dim), input("k", batch * keys, dim), input("v", batch * keys, dim)];
            forms("attention", &all, |cx, tape, x| Ok(vec![attention(cx, tape, &x[0], &x[1], &x[2], shape)?]));
            let all = [input("q", batch * queries, dim), input("kv", batch * keys, 2 * dim)];
            forms("cross_attention", &all, |cx, tape, x| Ok(vec![cross_attention(cx, tape, &x[0], &x[1], shape)?]));
        }
    }

    #[test]
    fn queries_keys_and_values_may_be_one_and_the_same() {
        let shape = AttentionShape { batch: 2, heads: 1, queries: 3, keys: 3 };
        forms("attention", &[input("x", 6, 5)], |cx, tape, x| {
            Ok(vec![attention(cx, tape, &x[0], &x[0], &x[0], shape)?])
        });
        forms("attention", &[input("x", 6, 5), input("q", 4, 5)], |cx, tape, x| {
            Ok(vec![attention(cx, tape, &x[1], &x[0], &x[0], AttentionShape { queries: 2, ..shape })?])
        });
    }
}
