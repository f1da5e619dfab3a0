//! Every operator from dfdx's own, for any device. The functions are generic over the float as well: finite
//! differences need f64.

use std::{ops::Range, sync::Arc};

use dfdx::prelude::*;

use super::{
    Act, AdamStep, AttentionShape, Begun, BegunState, BlockRun, Distance, Kernels, Packed, Pool, Standardize, flat_rows,
};
use crate::{
    device::{Dev, Matrix, Scalar, Vector},
    error::{Result, device},
    nn::{Block, Linear, Norm, Param},
    tape::{Recorder, Taped},
};

/// The float of a composed operator.
pub trait Float: Dtype {
    /// The nearest value.
    fn of(value: f64) -> Self {
        Self::from_f64(value).expect("f32 and f64 take every f64")
    }
}
impl Float for f32 {}
impl Float for f64 {}

/// `x W^T + b`: `[rows, in] -> [rows, out]`; `w` is `[out, in]` as checkpoints store it.
pub fn linear<E: Float, D: Device<E>>(
    r: &mut Recorder<D, E>,
    x: &Matrix<D, E>,
    w: &Matrix<D, E>,
    b: Option<&Vector<D, E>>,
) -> Result<Matrix<D, E>> {
    r.run(x, |x| {
        let y = x.try_matmul(w.clone().try_permute::<(usize, usize), Axes2<1, 0>>()?)?;
        match b {
            Some(b) => {
                let shape = *y.shape();
                y.try_add(b.clone().try_broadcast_like::<_, Axis<0>>(&shape)?)
            }
            None => Ok(y),
        }
    })
}

/// The exact GELU, `x Phi(x)`.
///
/// The second term of dfdx's gradient is sqrt 2 too large. What is added here is 0 in value and the missing slope in
/// gradient: `k (p - stop(p))` with `p = exp(-x^2/2)`, `k = (sqrt 2 - 1)/sqrt(2 pi)`.
pub fn gelu<E: Float, D: Device<E>>(r: &mut Recorder<D, E>, x: &Matrix<D, E>) -> Result<Matrix<D, E>> {
    let k = (std::f64::consts::SQRT_2 - 1.0) / (2.0 * std::f64::consts::PI).sqrt();
    let bell = |x: Taped<(usize, usize), D, E>| x.try_square()?.try_mul(E::of(-0.5))?.try_exp()?.try_mul(E::of(k));
    let stopped = Recorder::inference().run(x, bell)?;
    let bell = r.run(x, bell)?;
    let correction = r.run(&bell, |bell| bell.try_sub(stopped))?;
    let wrong = r.run(x, |x| x.try_accurate_gelu())?;
    r.run(&wrong, |y| y.try_add(correction))
}

/// `x sigmoid(1.702 x)`, the activation of OpenAI's CLIP.
pub fn quick_gelu<E: Float, D: Device<E>>(r: &mut Recorder<D, E>, x: &Matrix<D, E>) -> Result<Matrix<D, E>> {
    let gate = r.run(x, |x| x.try_mul(E::of(1.702))?.try_sigmoid())?;
    r.run(&gate, |gate| gate.try_mul(x.clone()))
}

/// An activation by name.
pub fn activate<E: Float, D: Device<E>>(r: &mut Recorder<D, E>, x: Matrix<D, E>, act: Act) -> Result<Matrix<D, E>> {
    match act {
        Act::None => Ok(x),
        Act::Gelu => gelu(r, &x),
        Act::QuickGelu => quick_gelu(r, &x),
    }
}

/// LayerNorm over columns with the biased variance.
pub fn layer_norm<E: Float, D: Device<E>>(
    r: &mut Recorder<D, E>,
    x: &Matrix<D, E>,
    affine: Option<(&Vector<D, E>, &Vector<D, E>)>,
    eps: f64,
) -> Result<Matrix<D, E>> {
    r.run(x, |x| {
        let y = x.try_normalize::<Axis<1>>(eps)?;
        match affine {
            Some((gamma, beta)) => {
                let shape = *y.shape();
                y.try_mul(gamma.clone().try_broadcast_like::<_, Axis<0>>(&shape)?)?
                    .try_add(beta.clone().try_broadcast_like::<_, Axis<0>>(&shape)?)
            }
            None => Ok(y),
        }
    })
}

/// Attention probabilities `[batch, heads, queries, keys]`.
fn probabilities<E: Float, D: Device<E>>(
    r: &mut Recorder<D, E>,
    q: &Matrix<D, E>,
    k: &Matrix<D, E>,
    s: AttentionShape,
) -> Result<Tensor<(usize, usize, usize, usize), E, D>> {
    let width = q.shape().1 / s.heads;
    let k: Tensor<(usize, usize, usize, usize), E, D> =
        r.run(k, |k| k.try_reshape_like(&(s.batch, s.keys, s.heads, width))?.try_permute::<_, Axes4<0, 2, 3, 1>>())?;
    r.run(q, |q| {
        // Scaled first: what is multiplied is then another tensor than the keys even where queries and keys are one.
        q.try_mul(E::of(1.0 / (width as f64).sqrt()))?
            .try_reshape_like(&(s.batch, s.queries, s.heads, width))?
            .try_permute::<(usize, usize, usize, usize), Axes4<0, 2, 1, 3>>()?
            .try_matmul(k)?
            .try_softmax::<Axis<3>>()
    })
}

/// Scaled dot-product attention of all heads.
pub fn attention<E: Float, D: Device<E>>(
    r: &mut Recorder<D, E>,
    q: &Matrix<D, E>,
    k: &Matrix<D, E>,
    v: &Matrix<D, E>,
    s: AttentionShape,
) -> Result<Matrix<D, E>> {
    let width = v.shape().1 / s.heads;
    let p = probabilities(r, q, k, s)?;
    let v: Tensor<(usize, usize, usize, usize), E, D> =
        r.run(v, |v| v.try_reshape_like(&(s.batch, s.keys, s.heads, width))?.try_permute::<_, Axes4<0, 2, 1, 3>>())?;
    r.run(&p, |p| {
        p.try_matmul(v)?
            .try_permute::<(usize, usize, usize, usize), Axes4<0, 2, 1, 3>>()?
            .try_reshape_like(&(s.batch * s.queries, s.heads * width))
    })
}

/// Scaled dot-product attention of all heads, keys and values side by side.
pub fn cross_attention<E: Float, D: Device<E>>(
    r: &mut Recorder<D, E>,
    q: &Matrix<D, E>,
    kv: &Matrix<D, E>,
    s: AttentionShape,
) -> Result<Matrix<D, E>> {
    let (k, v) = (part(r, kv, 0, 2)?, part(r, kv, 1, 2)?);
    attention(r, q, &k, &v, s)
}

/// Columns `part` of `parts` equal parts.
///
/// The CPU gradient of dfdx's `slice` assigns where it should add, so that the slice is of a temporary here.
fn part<E: Float, D: Device<E>>(
    r: &mut Recorder<D, E>,
    x: &Matrix<D, E>,
    part: usize,
    parts: usize,
) -> Result<Matrix<D, E>> {
    let (rows, columns) = *x.shape();
    let width = columns / parts;
    r.run(x, |x| {
        x.try_mul(E::of(1.0))?.try_slice((0..rows, part * width..(part + 1) * width))?.try_reshape_like(&(rows, width))
    })
}

/// Indices as a tensor.
fn index<D: Storage<usize> + TensorFromVec<usize>>(
    dev: &D,
    index: impl Iterator<Item = usize>,
) -> Result<Tensor<(usize,), usize, D>> {
    let index: Vec<usize> = index.collect();
    let len = index.len();
    dev.try_tensor_from_vec(index, (len,)).map_err(device)
}

/// Rows of several matrices by index into their concatenation.
pub fn gather_rows<E: Float, D: Device<E>>(
    r: &mut Recorder<D, E>,
    sources: &[Matrix<D, E>],
    rows: &[u32],
) -> Result<Matrix<D, E>> {
    let mut all = sources[0].clone();
    for source in &sources[1..] {
        let next = source.clone();
        all = r.run(&all, |all| (all, next.put_tape(OwnedTape::default())).try_concat_along(Axis::<0>))?;
    }
    let at = index(all.device(), rows.iter().map(|&i| i as usize))?;
    r.run(&all, |all| all.try_gather(at))
}

/// The mean of each image's tokens from token `first` on.
pub fn mean_tokens<E: Float, D: Device<E>>(
    r: &mut Recorder<D, E>,
    x: &Matrix<D, E>,
    batch: usize,
    first: usize,
) -> Result<Matrix<D, E>> {
    let (rows, columns) = *x.shape();
    let tokens = rows / batch;
    let kept: Vec<u32> =
        (0..batch).flat_map(|image| image * tokens + first..(image + 1) * tokens).map(|i| i as u32).collect();
    let x = gather_rows(r, std::slice::from_ref(x), &kept)?;
    r.run(&x, |x| x.try_reshape_like(&(batch, tokens - first, columns))?.try_mean::<(usize, usize), Axis<1>>())
}

/// `out[i] = sum_j w[rows[i], j] x[j]`.
pub fn mix<E: Float, D: Device<E>>(
    r: &mut Recorder<D, E>,
    x: &[Matrix<D, E>],
    w: &Matrix<D, E>,
    rows: &[usize],
) -> Result<Vec<Matrix<D, E>>> {
    let ((n, c), levels) = (*x[0].shape(), x.len());
    let stacked: Matrix<D, E> = r.run(&x[0], |first| {
        let rest = x[1..].iter().map(|x| x.clone().put_tape(OwnedTape::default()));
        let all: Vec<_> = std::iter::once(first).chain(rest).collect();
        all.try_stack()?.try_reshape_like(&(levels, n * c))
    })?;
    let at = index(w.device(), rows.iter().copied())?;
    let mixed: Matrix<D, E> = r.run(w, |w| {
        let w: Taped<(usize, usize), D, E> = w.try_gather(at)?;
        w.try_matmul(stacked)
    })?;
    (0..rows.len())
        .map(|i| {
            let at = index(w.device(), std::iter::once(i))?;
            r.run(&mixed, |m| {
                let row: Taped<(usize, usize), D, E> = m.try_gather(at)?;
                row.try_reshape_like(&(n, c))
            })
        })
        .collect()
}

fn mean<E: Float, D: Device<E>>(x: Taped<(usize, usize), D, E>) -> Result<Taped<(), D, E>, D::Err> {
    let (rows, columns) = *x.shape();
    x.try_reshape_like(&(rows * columns,))?.try_mean::<(), Axis<0>>()
}

/// The gradient that dfdx has of the maximum in it is wrong for values that do not lie row by row.
fn log_softmax<E: Float, D: Device<E>>(x: Taped<(usize, usize), D, E>) -> Result<Taped<(usize, usize), D, E>, D::Err> {
    x.try_contiguous()?.try_log_softmax::<Axis<1>>()
}

/// Distance of `x` from `target`, averaged as PyTorch's `reduction="mean"`; the target takes no gradient.
pub fn distance<E: Float, D: Device<E>>(
    r: &mut Recorder<D, E>,
    x: &Matrix<D, E>,
    target: &Matrix<D, E>,
    distance: Distance,
) -> Result<Scalar<D, E>> {
    let y = target.clone();
    match distance {
        Distance::Mse => r.run(x, |x| mean(x.try_sub(y)?.try_square()?)),
        Distance::L1 | Distance::SmoothL1 { beta: 0.0 } => r.run(x, |x| mean(x.try_sub(y)?.try_abs()?)),
        Distance::SmoothL1 { beta } => {
            r.run(x, |x| mean(x.try_huber_error(y, f64::from(beta))?.try_mul(E::of(1.0 / f64::from(beta)))?))
        }
        Distance::Cosine => {
            let unit = |x: Taped<(usize, usize), D, E>| {
                let shape = *x.shape();
                let (x, tape) = x.split_tape();
                let length: Taped<(usize,), D, E> =
                    x.clone().put_tape(tape).try_square()?.try_sum::<(usize,), Axis<1>>()?;
                let inverse = length.try_add(E::of(1e-16))?.try_sqrt()?.try_recip()?;
                inverse.try_broadcast_like::<(usize, usize), Axis<1>>(&shape)?.try_mul(x)
            };
            let y = Recorder::inference().run(&y, unit)?;
            let x = r.run(x, unit)?;
            r.run(&x, |x| {
                let cosine: Taped<(usize,), D, E> = x.try_mul(y)?.try_sum::<(usize,), Axis<1>>()?;
                cosine.try_mean::<(), Axis<0>>()?.try_negate()?.try_add(E::of(1.0))
            })
        }
        Distance::Kl => {
            let mut off = Recorder::inference();
            let log_p = off.run(&y, |y| y.try_log_softmax::<Axis<1>>())?;
            let p = off.run(&log_p, |y| y.try_exp())?;
            let log_q = r.run(x, log_softmax)?;
            r.run(&log_q, |q| mean(q.try_negate()?.try_add(log_p)?.try_mul(p)?))
        }
    }
}

/// Mean over rows of the cross entropy with soft targets.
pub fn cross_entropy<E: Float, D: Device<E>>(
    r: &mut Recorder<D, E>,
    logits: &Matrix<D, E>,
    targets: &Matrix<D, E>,
) -> Result<Scalar<D, E>> {
    let classes = logits.shape().1 as f64;
    r.run(logits, |x| mean(log_softmax(x)?.try_mul(targets.clone())?)?.try_mul(E::of(-classes)))
}

/// Rows by their mean and unbiased variance, eps 1e-6.
fn standardize_rows<D: Dev>(r: &mut Recorder<D>, x: &Matrix<D>) -> Result<Matrix<D>> {
    let shape = *x.shape();
    let unbiased = shape.1 as f32 / (shape.1 as f32 - 1.0);
    r.run(x, |x| {
        let (x, tape) = x.split_tape();
        let mean: Taped<(usize,), D> = x.clone().put_tape(tape).try_mean::<(usize,), Axis<1>>()?;
        let centred = mean.try_negate()?.try_broadcast_like::<(usize, usize), Axis<1>>(&shape)?.try_add(x)?;
        let (centred, tape) = centred.split_tape();
        let variance: Taped<(usize,), D> =
            centred.clone().put_tape(tape).try_square()?.try_mean::<(usize,), Axis<1>>()?;
        let inverse = variance.try_mul(unbiased)?.try_add(1e-6)?.try_sqrt()?.try_recip()?;
        inverse.try_broadcast_like::<(usize, usize), Axis<1>>(&shape)?.try_mul(centred)
    })
}

/// The table of composed operators.
#[derive(Clone)]
pub struct Composed {
    pool: Arc<Pool>,
}

impl Composed {
    /// Operators of any device; `threads` are the host's, for images.
    pub fn new(threads: usize) -> Self {
        Composed { pool: Pool::new(threads.max(1)) }
    }

    fn scaled<D: Dev>(
        r: &mut Recorder<D>,
        x: Matrix<D>,
        gamma: Option<&Param<D>>,
        samples: Option<&[f32]>,
        tokens: usize,
    ) -> Result<Matrix<D>> {
        let shape = *x.shape();
        let x = match gamma {
            Some(gamma) => {
                let gamma = gamma.vector();
                r.run(&x, |x| x.try_mul(gamma.try_broadcast_like::<_, Axis<0>>(&shape)?))?
            }
            None => x,
        };
        match samples {
            Some(samples) => {
                let rows: Vec<f32> = samples.iter().flat_map(|&s| std::iter::repeat_n(s, tokens)).collect();
                let rows: Vector<D> = x.device().try_tensor_from_vec(rows, (shape.0,)).map_err(device)?;
                r.run(&x, |x| x.try_mul(rows.try_broadcast_like::<_, Axis<1>>(&shape)?))
            }
            None => Ok(x),
        }
    }

    /// Queries, keys and values of a block.
    fn heads<D: Dev>(&self, r: &mut Recorder<D>, x: &Matrix<D>, block: &Block<D>) -> Result<[Matrix<D>; 3]> {
        let y = self.layer_norm(r, x, &block.norm1)?;
        let qkv = self.linear(r, &y, &block.qkv, Act::None)?;
        Ok([part(r, &qkv, 0, 3)?, part(r, &qkv, 1, 3)?, part(r, &qkv, 2, 3)?])
    }

    /// The rest of a block.
    fn after_heads<D: Dev>(
        &self,
        r: &mut Recorder<D>,
        x: &Matrix<D>,
        [q, k, v]: [Matrix<D>; 3],
        block: &Block<D>,
        run: &BlockRun,
    ) -> Result<Matrix<D>> {
        let scales = run.branch_scale.as_ref();
        let y = attention(r, &q, &k, &v, self_attention(block, run))?;
        let y = self.linear(r, &y, &block.proj, Act::None)?;
        let y = Self::scaled(r, y, block.ls1.as_ref(), scales.map(|s| &*s.0), run.tokens)?;
        let x = self.add(r, x, &y)?;
        let y = self.layer_norm(r, &x, &block.norm2)?;
        let y = self.linear(r, &y, &block.fc1, block.act)?;
        let y = self.linear(r, &y, &block.fc2, Act::None)?;
        let y = Self::scaled(r, y, block.ls2.as_ref(), scales.map(|s| &*s.1), run.tokens)?;
        self.add(r, &x, &y)
    }
}

fn self_attention<D: Dev>(block: &Block<D>, run: &BlockRun) -> AttentionShape {
    AttentionShape { batch: run.batch, heads: block.heads, queries: run.tokens, keys: run.tokens }
}

/// What the class token, the first of each image, attends to: its probabilities over the other tokens, mean over heads,
/// `[batch, tokens - 1]`. Of the probabilities its rows alone are computed and copied to the host.
fn class_attention<D: Dev>(q: &Matrix<D>, k: &Matrix<D>, s: AttentionShape) -> Result<Vec<f32>> {
    let off = &mut Recorder::inference();
    let class = flat_rows(&vec![0; s.batch], s.batch, s.queries);
    let q = gather_rows(off, std::slice::from_ref(q), &class)?;
    let p = probabilities(off, &q, k, AttentionShape { queries: 1, ..s })?.as_vec();
    let others = s.keys - 1;
    let mut out = vec![0.0; s.batch * others];
    for (row, p) in p.chunks_exact(s.keys).enumerate() {
        let out = &mut out[row / s.heads * others..][..others];
        out.iter_mut().zip(&p[1..]).for_each(|(sum, p)| *sum += p / s.heads as f32);
    }
    Ok(out)
}

impl<D: Dev> Kernels<D> for Composed {
    fn name(&self) -> String {
        "composed".into()
    }
    fn pool(&self) -> &Pool {
        &self.pool
    }
    fn pack(&self, _: &Matrix<D>, _: Range<usize>) -> Option<Packed> {
        None
    }
    fn linear(&self, r: &mut Recorder<D>, x: &Matrix<D>, layer: &Linear<D>, act: Act) -> Result<Matrix<D>> {
        let bias = layer.bias.as_ref().map(Param::vector);
        let y = linear(r, x, &layer.weight(), bias.as_ref())?;
        activate(r, y, act)
    }
    fn embed(&self, r: &mut Recorder<D>, data: &Matrix<D>, layer: &Linear<D>) -> Result<Matrix<D>> {
        self.linear(r, data, layer, Act::None)
    }
    fn layer_norm(&self, r: &mut Recorder<D>, x: &Matrix<D>, norm: &Norm<D>) -> Result<Matrix<D>> {
        let affine = norm.affine.as_ref().map(|(g, b)| (g.vector(), b.vector()));
        layer_norm(r, x, affine.as_ref().map(|(g, b)| (g, b)), norm.eps)
    }
    fn attention(
        &self,
        r: &mut Recorder<D>,
        q: &Matrix<D>,
        k: &Matrix<D>,
        v: &Matrix<D>,
        shape: AttentionShape,
    ) -> Result<Matrix<D>> {
        attention(r, q, k, v, shape)
    }
    fn cross_attention(
        &self,
        r: &mut Recorder<D>,
        q: &Matrix<D>,
        kv: &Matrix<D>,
        shape: AttentionShape,
    ) -> Result<Matrix<D>> {
        cross_attention(r, q, kv, shape)
    }
    fn block(&self, r: &mut Recorder<D>, x: &Matrix<D>, block: &Block<D>, run: &BlockRun) -> Result<Matrix<D>> {
        let mut parameters = Vec::new();
        block.each(&mut |p| {
            if p.trainable {
                parameters.push(p.vector())
            }
        });
        let (kernels, block, run, recompute) = (self.clone(), block.clone(), run.clone(), run.recompute);
        r.segment(parameters, x, recompute, move |r, x| {
            let heads = kernels.heads(r, x, &block)?;
            kernels.after_heads(r, x, heads, &block, &run)
        })
    }
    fn begin_block(&self, x: &Matrix<D>, block: &Block<D>, run: &BlockRun) -> Result<Begun<D>> {
        let off = &mut Recorder::inference();
        let heads = self.heads(off, x, block)?;
        let attention = class_attention(&heads[0], &heads[1], self_attention(block, run))?;
        let y = self.after_heads(off, x, heads, block, run)?;
        Ok(Begun { attention, state: BegunState::Done(y) })
    }
    fn finish_block(
        &self,
        _: &Matrix<D>,
        _: &Block<D>,
        run: &BlockRun,
        begun: Begun<D>,
        rows: Option<&[u32]>,
    ) -> Result<Matrix<D>> {
        let BegunState::Done(y) = begun.state else { unreachable!("a block is finished by the kernels that began it") };
        match rows {
            None => Ok(y),
            Some(rows) => gather_rows(&mut Recorder::inference(), &[y], &flat_rows(rows, run.batch, run.tokens)),
        }
    }
    fn add(&self, r: &mut Recorder<D>, x: &Matrix<D>, y: &Matrix<D>) -> Result<Matrix<D>> {
        r.run(x, |x| x.try_add(y.clone()))
    }
    fn add_constant(&self, r: &mut Recorder<D>, x: &Matrix<D>, constant: &Matrix<D>) -> Result<Matrix<D>> {
        self.add(r, x, constant)
    }
    fn gather_rows(&self, r: &mut Recorder<D>, sources: &[Matrix<D>], index: &[u32]) -> Result<Matrix<D>> {
        gather_rows(r, sources, index)
    }
    fn mean_tokens(&self, r: &mut Recorder<D>, x: &Matrix<D>, batch: usize, first: usize) -> Result<Matrix<D>> {
        mean_tokens(r, x, batch, first)
    }
    fn mix(&self, r: &mut Recorder<D>, x: &[Matrix<D>], w: &Matrix<D>, rows: &[usize]) -> Result<Vec<Matrix<D>>> {
        mix(r, x, w, rows)
    }
    fn standardize(&self, x: &Matrix<D>, kind: Standardize) -> Result<Matrix<D>> {
        let (rows, columns) = *x.shape();
        let mut off = Recorder::inference();
        match kind {
            Standardize::Length => off.run(x, |x| {
                let (x, tape) = x.split_tape();
                let length: Taped<(usize,), D> =
                    x.clone().put_tape(tape).try_square()?.try_sum::<(usize,), Axis<1>>()?.try_sqrt()?;
                let inverse = length.try_clamp(1e-12, f32::MAX)?.try_recip()?;
                inverse.try_broadcast_like::<(usize, usize), Axis<1>>(&(rows, columns))?.try_mul(x)
            }),
            Standardize::Rows => standardize_rows(&mut off, x),
            Standardize::All => {
                let row = off.run(x, |x| x.try_reshape_like(&(1, rows * columns)))?;
                let row = standardize_rows(&mut off, &row)?;
                off.run(&row, |x| x.try_reshape_like(&(rows, columns)))
            }
        }
    }
    fn weighted_mean(&self, x: &[Matrix<D>], weights: &[f32]) -> Result<Matrix<D>> {
        let mut total = x[0].clone().try_mul(weights[0]).map_err(device)?;
        for (x, &weight) in x.iter().zip(weights).skip(1) {
            total.try_axpy(1.0, x, weight).map_err(device)?;
        }
        Ok(total)
    }
    fn distance(&self, r: &mut Recorder<D>, x: &Matrix<D>, target: &Matrix<D>, kind: Distance) -> Result<Scalar<D>> {
        distance(r, x, target, kind)
    }
    fn cross_entropy(&self, r: &mut Recorder<D>, logits: &Matrix<D>, targets: Vec<f32>) -> Result<Scalar<D>> {
        let targets = logits.device().try_tensor_from_vec(targets, *logits.shape()).map_err(device)?;
        cross_entropy(r, logits, &targets)
    }
    fn weighted_sum(&self, r: &mut Recorder<D>, terms: &[Scalar<D>], weights: &[f32]) -> Result<Scalar<D>> {
        let mut total = r.run(&terms[0], |t| t.try_mul(weights[0]))?;
        for (term, &weight) in terms.iter().zip(weights).skip(1) {
            let so_far = total;
            total = r.run(term, |t| t.try_mul(weight)?.try_add(so_far))?;
        }
        Ok(total)
    }
    fn adamw(
        &self,
        parameter: &mut Param<D>,
        gradients: &mut Gradients<f32, D>,
        first: &mut Vector<D>,
        second: &mut Vector<D>,
        s: AdamStep,
    ) -> Result<()> {
        let gradient = crate::tape::gradient(gradients, &parameter.value)?;
        let update = || -> Result<(), D::Err> {
            let g = gradient.try_mul(s.gradient_scale)?;
            let (m, v) = (&mut *first, &mut *second);
            m.try_axpy(s.betas.0, &g, 1.0 - s.betas.0)?;
            v.try_axpy(s.betas.1, &g.try_square()?, 1.0 - s.betas.1)?;
            let correction = 1.0 - s.betas.0.powi(s.step as i32);
            let root_correction = (1.0 - s.betas.1.powi(s.step as i32)).sqrt();
            let root = v.clone().try_sqrt()?.try_mul((1.0 / root_correction) as f32)?.try_add(s.eps as f32)?;
            let direction = m.clone().try_div(root)?;
            parameter.value.try_axpy(1.0 - s.lr * s.weight_decay, &direction, -s.lr / correction)
        };
        update().map_err(device)
    }
    fn square_sum(&self, gradients: &mut Gradients<f32, D>, parameters: &[Vector<D>]) -> Result<f64> {
        if parameters.is_empty() {
            return Ok(0.0);
        }
        let mut sums: Vec<Scalar<D>> = Vec::with_capacity(parameters.len());
        for parameter in parameters {
            let g = crate::tape::gradient(gradients, parameter)?;
            sums.push(g.try_square().and_then(|g| g.try_sum::<(), Axis<0>>()).map_err(device)?);
        }
        let sums: Vector<D> = sums.try_stack().map_err(device)?;
        Ok(sums.as_vec().into_iter().map(f64::from).sum())
    }
}
