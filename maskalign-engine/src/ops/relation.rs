//! Relations of tokens: scaled products of their queries, keys and values with each other, by head.

use dfdx::prelude::{Axes4, Cpu, Device, HasShape, PermuteTo, ReshapeTo, TryMatMul, TryMul};
use maskalign_kernels::{Epilogue, MatRef, Pool, Rhs, gemm};

use super::{attention, composed_one, made_on_cpu, through_host_one};
use crate::{
    context::{Context, Form},
    error::Result,
    graph::{Float, Graph, Matrix},
    tape::Tape,
    tensor::Tensor,
};

/// A third of the columns that a block's projection gives.
///
/// ```
/// # use maskalign_engine::ops::Third;
/// // What an attention is a softmax of, and what MiniLM compares besides.
/// let (attention, values) = ([Third::Queries, Third::Keys], [Third::Values; 2]);
/// assert_ne!(attention, values);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Third {
    /// The first.
    Queries,
    /// The second.
    Keys,
    /// The last.
    Values,
}

/// Sizes of a relation.
///
/// ```
/// # use maskalign_engine::{Context, Device, Error, Tape, ops::{self, RelationShape, Third}};
/// # let cx = Context::new(Device::Cpu, 1);
/// // One image of two tokens, whose queries, keys and values have four channels: a head of them, or four.
/// let qkv = cx.tensor(vec![1.0; 2 * 12], 2, 12)?;
/// for (heads, logit) in [(1, 2.0), (4, 1.0)] {
///     let shape = RelationShape { batch: 1, tokens: 2, heads };
///     let logits = ops::relation(&cx, &mut Tape::inference(), &qkv, [Third::Queries, Third::Keys], shape)?;
///     assert_eq!((logits.shape(), logits.to_vec()[0]), ((2 * heads, 2), logit));
/// }
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct RelationShape {
    /// Images in the batch.
    pub batch: usize,
    /// Tokens of an image.
    pub tokens: usize,
    /// Heads that the channels are cut into, equally wide and one after another; those of an attention, or others.
    pub heads: usize,
}

impl RelationShape {
    /// Channels of a head, of a matrix with three parts.
    fn width(&self, qkv: &Tensor) -> usize {
        qkv.columns() / 3 / self.heads
    }
}

/// What the softmax of an attention is taken of, for any two of queries, keys and values: in each head, the product of each
/// token's part with the other part of every token of its image, over the square root of the head's channels. `qkv` is
/// `[batch * tokens, 3 * dim]`, and the result `[batch * tokens * heads, tokens]`: a row for each token and head.
///
/// # Errors
/// Out of memory on the device.
///
/// # Panics
/// The shapes do not fit.
pub fn relation(
    cx: &Context,
    tape: &mut Tape,
    qkv: &Tensor,
    parts: [Third; 2],
    shape: RelationShape,
) -> Result<Tensor> {
    let RelationShape { batch, tokens, heads } = shape;
    assert_eq!(qkv.rows(), batch * tokens, "a row for each token");
    assert!(qkv.columns().is_multiple_of(3 * heads), "{} columns are not three parts of {heads} heads", qkv.columns());
    let op = "relation";
    match cx.form(op, &[qkv])? {
        Form::Composed => composed_one(cx, tape, &[qkv], |g, m| composed(g, &m[0], parts, shape)),
        Form::Gpu => {
            through_host_one(cx, tape, op, &[qkv], |cx, tape, copies| relation(cx, tape, &copies[0], parts, shape))
        }
        Form::Cpu => {
            let records = tape.wants(&[qkv]);
            let mut y = vec![0.0; batch * heads * tokens * tokens];
            let (pool, _) = cx.handles();
            let width = shape.width(qkv);
            products(&pool, qkv.cpu(), parts, width, shape, &mut y);
            let y = made_on_cpu(cx, y, batch * tokens * heads, tokens, records)?;
            if records {
                let (qkv, out) = (qkv.clone(), y.slot());
                tape.record(move |g| {
                    let Some(d) = g.take_cpu(&out) else { return Ok(()) };
                    let Some(slot) = qkv.wanted() else { return Ok(()) };
                    gradients(&pool, qkv.cpu(), parts, width, shape, &d, g.cpu_mut(&slot));
                    Ok(())
                });
            }
            Ok(y)
        }
    }
}

/// For each head of each image: where its channels of a part begin among the values of all, and where its products do.
fn places(width: usize, shape: RelationShape) -> impl Iterator<Item = ([usize; 3], usize)> {
    let RelationShape { batch, tokens, heads } = shape;
    let dim = heads * width;
    (0..batch * heads).map(move |i| {
        let (image, head) = (i / heads, i % heads);
        let first = image * tokens * 3 * dim + head * width;
        ([first, first + dim, first + 2 * dim], (image * tokens * heads + head) * tokens)
    })
}

fn products(pool: &Pool, qkv: &[f32], parts: [Third; 2], width: usize, shape: RelationShape, y: &mut [f32]) {
    let RelationShape { tokens, heads, .. } = shape;
    let row = 3 * heads * width;
    let scale = vec![1.0 / (width as f32).sqrt(); tokens];
    for (begin, out) in places(width, shape) {
        let [from, to] = parts.map(|part| MatRef { data: &qkv[begin[part as usize]..], rs: row, cs: 1 });
        let epilogue = Epilogue { col_scale: Some(&scale), ..Epilogue::default() };
        gemm(pool, tokens, tokens, width, from, Rhs::Strided(to.t()), &mut y[out..], heads * tokens, epilogue);
    }
}

/// Adds to the gradients of the two parts.
fn gradients(
    pool: &Pool,
    qkv: &[f32],
    parts: [Third; 2],
    width: usize,
    shape: RelationShape,
    d: &[f32],
    into: &mut [f32],
) {
    let RelationShape { tokens, heads, .. } = shape;
    let row = 3 * heads * width;
    let scale = vec![1.0 / (width as f32).sqrt(); width];
    for (begin, out) in places(width, shape) {
        let d = MatRef { data: &d[out..], rs: heads * tokens, cs: 1 };
        for (d, of, other) in [(d, parts[0], parts[1]), (d.t(), parts[1], parts[0])] {
            let other = MatRef { data: &qkv[begin[other as usize]..], rs: row, cs: 1 };
            let epilogue = Epilogue { col_scale: Some(&scale), accumulate: true, ..Epilogue::default() };
            let into = &mut into[begin[of as usize]..];
            gemm(pool, tokens, width, tokens, d, Rhs::Strided(other), into, row, epilogue);
        }
    }
}

fn composed<E: Float>(g: &mut Graph<E>, qkv: &Matrix<E>, parts: [Third; 2], s: RelationShape) -> Result<Matrix<E>>
where
    Cpu: Device<E>,
{
    let dim = qkv.shape().1 / 3;
    let width = dim / s.heads;
    let [from, to] = parts.map(|part| part as usize * dim..(part as usize + 1) * dim);
    let (from, to) = (attention::columns(g, qkv, from)?, attention::columns(g, qkv, to)?);
    let to: dfdx::prelude::Tensor<(usize, usize, usize, usize), E, Cpu> = g.run(&to, |to| {
        to.try_reshape_like(&(s.batch, s.tokens, s.heads, width))?.try_permute::<_, Axes4<0, 2, 3, 1>>()
    })?;
    g.run(&from, |from| {
        from.try_mul(E::of(1.0 / (width as f64).sqrt()))?
            .try_reshape_like(&(s.batch, s.tokens, s.heads, width))?
            .try_permute::<(usize, usize, usize, usize), Axes4<0, 2, 1, 3>>()?
            .try_matmul(to)?
            .try_permute::<(usize, usize, usize, usize), Axes4<0, 2, 1, 3>>()?
            .try_reshape_like(&(s.batch * s.tokens * s.heads, s.tokens))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{finite_differences, forms, input};

    const PAIRS: [[Third; 2]; 4] = [
        [Third::Queries, Third::Keys],
        [Third::Values, Third::Values],
        [Third::Values, Third::Keys],
        [Third::Keys, Third::Keys],
    ];

    #[test]
    fn composed_gradients_are_finite_differences() {
        let shape = RelationShape { batch: 2, tokens: 3, heads: 2 };
        for parts in PAIRS {
            finite_differences("relation", &[(6, 12)], |g, x| Ok(vec![composed(g, &x[0], parts, shape)?]));
        }
    }

    #[test]
    fn the_forms_agree() {
        for (batch, tokens, heads, width) in [(1, 1, 1, 1), (2, 5, 3, 4), (3, 17, 2, 9), (1, 50, 4, 16)] {
            let shape = RelationShape { batch, tokens, heads };
            for parts in PAIRS {
                forms("relation", &[input("qkv", batch * tokens, 3 * heads * width)], |cx, tape, x| {
                    Ok(vec![relation(cx, tape, &x[0], parts, shape)?])
                });
            }
        }
    }
}
