//! A whole pre-norm transformer block, forward and backward.
//!
//! ```text
//! x1 = x  + drop1 * (ls1 * proj(attention(qkv(norm1(x)))))
//! y  = x1 + drop2 * (ls2 * fc2(act(fc1(norm2(x1)))))
//! ```
//!
//! This is timm's `Block` (Dosovitskiy et al., arXiv 2010.11929) with optional LayerScale (`ls`,
//! arXiv 2103.17239) and stochastic depth per sample (`drop`, arXiv 1603.09382). Activations are
//! row-major `[batch * tokens, dim]`; weights are `[out, in]` as checkpoints hold them.
//!
//! Samples that stochastic depth drops take no part in a branch: their rows are neither computed
//! nor kept.

use std::ops::Range;

use crate::arena::{Arena, Buf};
use crate::attention::{AttentionShape, Heads, QkvGrad, attention, attention_backward, cls_attention};
use crate::elementwise::{
    Write, activation_and_slope, add_column_sums, axpy, gather_rows, multiply, multiply_and_add_column_sums, scale_rows,
};
use crate::gemm::{Act, Epilogue, MatRef, PackedB, Rhs, gemm};
use crate::norm::{layer_norm, layer_norm_again, layer_norm_backward};
use crate::pool::Pool;
use crate::share::{Shared, for_ranges, rows_per_task, sum_of2, vectorised};

/// The sizes of a block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockShape {
    /// Images.
    pub batch: usize,
    /// Tokens of an image.
    pub tokens: usize,
    /// Channels.
    pub dim: usize,
    /// Attention heads; their number divides `dim`.
    pub heads: usize,
    /// Channels inside the MLP.
    pub hidden: usize,
    /// The `eps` of the layer norms, added to the variance.
    pub eps: f32,
    /// The activation inside the MLP.
    pub act: Act,
}

impl BlockShape {
    /// Rows of an activation: `batch * tokens`.
    pub fn rows(&self) -> usize {
        self.batch * self.tokens
    }

    fn attention(&self) -> AttentionShape {
        assert!(
            self.heads > 0 && self.dim.is_multiple_of(self.heads),
            "{} heads do not divide {} channels",
            self.heads,
            self.dim
        );
        AttentionShape {
            batch: self.batch,
            heads: self.heads,
            head_dim: self.dim / self.heads,
            queries: self.tokens,
            keys: self.tokens,
        }
    }

    fn with_batch(self, batch: usize) -> Self {
        Self { batch, ..self }
    }
}

/// The weight of a linear layer.
#[derive(Clone, Copy)]
pub enum Weight<'a> {
    /// Row-major `[out, in]`.
    Dense(&'a [f32]),
    /// The transpose `[in, out]`, packed once by [`pack_weight`]: for weights that do not change.
    /// Only the forward pass takes it.
    Packed(&'a PackedB),
}

/// Packs a weight `[outputs, inputs]` for [`Weight::Packed`].
pub fn pack_weight(weight: &[f32], outputs: usize, inputs: usize) -> PackedB {
    assert_eq!(weight.len(), outputs * inputs, "weight to pack");
    PackedB::new(MatRef::row_major(weight, inputs).t(), inputs, outputs)
}

/// A linear layer: `x weight^T + bias`.
#[derive(Clone, Copy)]
pub struct Linear<'a> {
    /// The weight.
    pub weight: Weight<'a>,
    /// The bias `[out]`.
    pub bias: Option<&'a [f32]>,
}

impl<'a> Linear<'a> {
    /// A layer with a dense weight.
    pub fn dense(weight: &'a [f32], bias: Option<&'a [f32]>) -> Self {
        Self { weight: Weight::Dense(weight), bias }
    }

    /// A layer with a packed weight.
    pub fn packed(weight: &'a PackedB, bias: Option<&'a [f32]>) -> Self {
        Self { weight: Weight::Packed(weight), bias }
    }

    fn dense_weight(&self, len: usize) -> &'a [f32] {
        match self.weight {
            Weight::Dense(w) => {
                assert_eq!(w.len(), len, "weight of a linear layer");
                w
            }
            Weight::Packed(_) => panic!("the backward pass takes dense weights"),
        }
    }
}

/// `y = epilogue(x weight^T + bias)` for `x` `[rows, inputs]` and `y` `[rows, outputs]`; the
/// epilogue's `bias` is replaced by the layer's.
///
/// # Panics
/// When the lengths do not fit.
#[expect(clippy::too_many_arguments, reason = "operands and shapes of one operator, each named at the call")]
pub fn linear<'a>(
    pool: &Pool,
    layer: Linear<'a>,
    rows: usize,
    inputs: usize,
    outputs: usize,
    x: &[f32],
    y: &mut [f32],
    epilogue: Epilogue<'a>,
) {
    assert_eq!(x.len(), rows * inputs, "input of a linear layer");
    assert_eq!(y.len(), rows * outputs, "output of a linear layer");
    assert!(layer.bias.is_none_or(|b| b.len() == outputs), "bias of a linear layer");
    let weight = match layer.weight {
        Weight::Dense(w) => {
            assert_eq!(w.len(), inputs * outputs, "weight of a linear layer");
            Rhs::Strided(MatRef::row_major(w, inputs).t())
        }
        Weight::Packed(w) => {
            assert!(w.k() == inputs && w.n() == outputs, "packed weight of a linear layer");
            Rhs::Packed(w)
        }
    };
    let epilogue = Epilogue { bias: layer.bias, ..epilogue };
    gemm(pool, rows, outputs, inputs, MatRef::row_major(x, inputs), weight, y, outputs, epilogue);
}

/// The gradient of [`linear`] with respect to its input, `dx = dy weight`, or added to `dx`.
#[expect(clippy::too_many_arguments, reason = "operands and shapes of one operator, each named at the call")]
pub fn linear_backward_input(
    pool: &Pool,
    weight: &[f32],
    rows: usize,
    inputs: usize,
    outputs: usize,
    dy: &[f32],
    dx: &mut [f32],
    write: Write,
) {
    assert_eq!(dy.len(), rows * outputs, "gradient of the output");
    assert_eq!(dx.len(), rows * inputs, "gradient of the input");
    assert_eq!(weight.len(), inputs * outputs, "weight of a linear layer");
    let weight = Rhs::Strided(MatRef::row_major(weight, inputs));
    let epilogue = Epilogue { accumulate: write == Write::Add, ..Default::default() };
    gemm(pool, rows, inputs, outputs, MatRef::row_major(dy, outputs), weight, dx, inputs, epilogue);
}

/// The gradient of [`linear`] with respect to its weight and bias: adds `dy^T x` to `dweight` and the
/// column sums of `dy` to `dbias`.
#[expect(clippy::too_many_arguments, reason = "operands and shapes of one operator, each named at the call")]
pub fn linear_backward_params(
    pool: &Pool,
    arena: &Arena,
    rows: usize,
    inputs: usize,
    outputs: usize,
    x: &[f32],
    dy: &[f32],
    dweight: Option<&mut [f32]>,
    dbias: Option<&mut [f32]>,
) {
    assert_eq!(x.len(), rows * inputs, "input of a linear layer");
    assert_eq!(dy.len(), rows * outputs, "gradient of the output");
    if let Some(dweight) = dweight {
        weight_product(pool, rows, inputs, outputs, x, dy, dweight, Write::Add);
    }
    if let Some(dbias) = dbias {
        add_column_sums(pool, arena, dy, outputs, dbias);
    }
}

/// `dy^T x`.
#[expect(clippy::too_many_arguments, reason = "operands and shapes of one operator, each named at the call")]
fn weight_product(
    pool: &Pool,
    rows: usize,
    inputs: usize,
    outputs: usize,
    x: &[f32],
    dy: &[f32],
    dweight: &mut [f32],
    write: Write,
) {
    assert_eq!(dweight.len(), inputs * outputs, "gradient of a weight");
    let dy = MatRef::row_major(dy, outputs).t();
    let x = Rhs::Strided(MatRef::row_major(x, inputs));
    let epilogue = Epilogue { accumulate: write == Write::Add, ..Default::default() };
    gemm(pool, outputs, inputs, rows, dy, x, dweight, inputs, epilogue);
}

/// The parameters of a block.
#[derive(Clone, Copy)]
pub struct BlockWeights<'a> {
    /// Scale of the first layer norm, `[dim]`.
    pub norm1_gamma: Option<&'a [f32]>,
    /// Shift of the first layer norm, `[dim]`.
    pub norm1_beta: Option<&'a [f32]>,
    /// Queries, keys and values, in that order: `[3 * dim, dim]`.
    pub qkv: Linear<'a>,
    /// The projection after the attention, `[dim, dim]`.
    pub proj: Linear<'a>,
    /// LayerScale of the attention branch, `[dim]`.
    pub ls1: Option<&'a [f32]>,
    /// Scale of the second layer norm, `[dim]`.
    pub norm2_gamma: Option<&'a [f32]>,
    /// Shift of the second layer norm, `[dim]`.
    pub norm2_beta: Option<&'a [f32]>,
    /// The MLP's first layer, `[hidden, dim]`.
    pub fc1: Linear<'a>,
    /// The MLP's second layer, `[dim, hidden]`.
    pub fc2: Linear<'a>,
    /// LayerScale of the MLP branch, `[dim]`.
    pub ls2: Option<&'a [f32]>,
}

impl BlockWeights<'_> {
    fn are_packed(&self) -> bool {
        let packed = |layer: &Linear<'_>| matches!(layer.weight, Weight::Packed(_));
        [&self.qkv, &self.proj, &self.fc1, &self.fc2].into_iter().all(packed)
    }
}

/// Gradients of a block's parameters; the backward pass adds to them. Those that are `None` are not
/// computed.
#[derive(Default)]
pub struct BlockGrads<'a> {
    /// Of [`BlockWeights::norm1_gamma`].
    pub norm1_gamma: Option<&'a mut [f32]>,
    /// Of [`BlockWeights::norm1_beta`].
    pub norm1_beta: Option<&'a mut [f32]>,
    /// Of the weight of [`BlockWeights::qkv`].
    pub qkv_weight: Option<&'a mut [f32]>,
    /// Of the bias of [`BlockWeights::qkv`].
    pub qkv_bias: Option<&'a mut [f32]>,
    /// Of the weight of [`BlockWeights::proj`].
    pub proj_weight: Option<&'a mut [f32]>,
    /// Of the bias of [`BlockWeights::proj`].
    pub proj_bias: Option<&'a mut [f32]>,
    /// Of [`BlockWeights::ls1`].
    pub ls1: Option<&'a mut [f32]>,
    /// Of [`BlockWeights::norm2_gamma`].
    pub norm2_gamma: Option<&'a mut [f32]>,
    /// Of [`BlockWeights::norm2_beta`].
    pub norm2_beta: Option<&'a mut [f32]>,
    /// Of the weight of [`BlockWeights::fc1`].
    pub fc1_weight: Option<&'a mut [f32]>,
    /// Of the bias of [`BlockWeights::fc1`].
    pub fc1_bias: Option<&'a mut [f32]>,
    /// Of the weight of [`BlockWeights::fc2`].
    pub fc2_weight: Option<&'a mut [f32]>,
    /// Of the bias of [`BlockWeights::fc2`].
    pub fc2_bias: Option<&'a mut [f32]>,
    /// Of [`BlockWeights::ls2`].
    pub ls2: Option<&'a mut [f32]>,
}

/// Stochastic depth: a factor for each sample, `[batch]`, 0 for a dropped branch and
/// `1 / (1 - rate)` for a kept one. `None` keeps all samples with a factor of 1.
#[derive(Clone, Copy, Default)]
pub struct DropPath<'a> {
    /// Factors of the attention branch.
    pub attention: Option<&'a [f32]>,
    /// Factors of the MLP branch.
    pub mlp: Option<&'a [f32]>,
}

/// What a forward pass keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Save {
    /// Nothing: inference, or a backward pass that recomputes.
    Nothing,
    /// What [`block_backward`] needs.
    ForBackward,
}

/// What [`block_forward`] kept: for each token of a branch that was not dropped `dim` floats of
/// the attention's output, `3 dim` of queries, keys and values, `hidden` of the MLP, and `dim` of
/// the residual stream between the branches.
pub struct BlockSaved {
    x1: Buf,
    attention: Option<AttentionSaved>,
    mlp: Option<MlpSaved>,
}

struct AttentionSaved {
    stats: Buf,
    qkv: Buf,
    out: Buf,
    lse: Buf,
}

struct MlpSaved {
    stats: Buf,
    pre: Buf,
}

/// Memory for a branch in which some samples take part. Buffers have room for all samples: the number
/// of dropped samples changes from step to step, and changing sizes would leave unused buffers behind.
#[derive(Clone, Copy)]
struct Room<'a> {
    arena: &'a Arena,
    kept: usize,
    all: usize,
}

impl<'a> Room<'a> {
    fn exact(arena: &'a Arena) -> Self {
        Self { arena, kept: 1, all: 1 }
    }

    fn take(&self, len: usize) -> Buf {
        self.arena.take_for(len, len / self.kept * self.all)
    }
}

/// The samples that take part in a branch.
enum Kept<'a> {
    All(Option<&'a [f32]>),
    /// Row indices of the kept samples, and their factors.
    Some {
        rows: Vec<u32>,
        factors: Vec<f32>,
    },
}

impl<'a> Kept<'a> {
    fn new(shape: &BlockShape, factors: Option<&'a [f32]>) -> Self {
        let Some(factors) = factors else {
            return Kept::All(None);
        };
        assert_eq!(factors.len(), shape.batch, "factors of stochastic depth");
        if factors.iter().all(|&f| f != 0.0) {
            return Kept::All(Some(factors));
        }
        let tokens = shape.tokens as u32;
        let samples = (0u32..).zip(factors).filter(|(_, f)| **f != 0.0);
        Kept::Some {
            rows: samples.clone().flat_map(|(s, _)| s * tokens..(s + 1) * tokens).collect(),
            factors: samples.map(|(_, f)| *f).collect(),
        }
    }
}

/// The block's output `y` from its input `x`, both `[batch * tokens, dim]`.
///
/// # Panics
/// When a length does not fit the shape.
#[expect(clippy::too_many_arguments, reason = "operands and shapes of one operator, each named at the call")]
pub fn block_forward(
    pool: &Pool,
    arena: &Arena,
    shape: BlockShape,
    weights: &BlockWeights<'_>,
    drop_path: DropPath<'_>,
    x: &[f32],
    y: &mut [f32],
    save: Save,
) -> Option<BlockSaved> {
    assert_eq!(x.len(), shape.rows() * shape.dim, "input of the block");
    assert_eq!(y.len(), x.len(), "output of the block");
    let all_kept = drop_path.attention.is_none() && drop_path.mlp.is_none();
    if save == Save::Nothing && all_kept && weights.are_packed() {
        for images in groups(shape) {
            let at = elements(shape, &images);
            let room = Room { arena, kept: images.len(), all: largest_group(shape) };
            let shape = shape.with_batch(images.len());
            let mut x1 = room.take(at.len());
            attention_forward(pool, room, shape, weights, None, &x[at.clone()], &mut x1, save);
            mlp_forward(pool, room, shape, weights, None, &x1, &mut y[at], save);
        }
        return None;
    }
    let mut x1 = arena.take(x.len());
    let attention = branch(pool, arena, shape, drop_path.attention, x, &mut x1, |room, shape, factors, x, x1| {
        attention_forward(pool, room, shape, weights, factors, x, x1, save)
    });
    let mlp = branch(pool, arena, shape, drop_path.mlp, &x1, y, |room, shape, factors, x1, y| {
        mlp_forward(pool, room, shape, weights, factors, x1, y, save)
    });
    (save == Save::ForBackward).then_some(BlockSaved { x1, attention, mlp })
}

/// Rows that an inference pass takes through a block at once: their intermediate results stay in
/// the last-level cache, and large batches need no more memory than small ones.
const INFERENCE_ROWS: usize = 1536;

/// Ranges of images of about [`INFERENCE_ROWS`] rows.
fn groups(shape: BlockShape) -> impl Iterator<Item = Range<usize>> {
    let most = (INFERENCE_ROWS / shape.tokens.max(1)).max(1);
    // Equal groups: a small last one would be slow.
    let count = shape.batch.div_ceil(most).max(1);
    (0..count).map(move |i| i * shape.batch / count..(i + 1) * shape.batch / count)
}

/// Images in the largest of [`groups`].
fn largest_group(shape: BlockShape) -> usize {
    groups(shape).map(|images| images.len()).max().unwrap_or(1)
}

/// Where the rows of these images lie.
fn elements(shape: BlockShape, images: &Range<usize>) -> Range<usize> {
    let image = shape.tokens * shape.dim;
    images.start * image..images.end * image
}

/// Runs a branch, `run(room, shape, factors, input, output)`, on the samples that are kept; the others'
/// rows pass through.
fn branch<S>(
    pool: &Pool,
    arena: &Arena,
    shape: BlockShape,
    factors: Option<&[f32]>,
    input: &[f32],
    output: &mut [f32],
    run: impl FnOnce(Room<'_>, BlockShape, Option<&[f32]>, &[f32], &mut [f32]) -> Option<S>,
) -> Option<S> {
    match Kept::new(&shape, factors) {
        Kept::All(factors) => run(Room::exact(arena), shape, factors, input, output),
        Kept::Some { rows, factors } => {
            output.copy_from_slice(input);
            if rows.is_empty() {
                return None;
            }
            let room = Room { arena, kept: factors.len(), all: shape.batch };
            let shape = shape.with_batch(factors.len());
            let mut some = room.take(rows.len() * shape.dim);
            gather_rows(pool, &[input], shape.dim, &rows, &mut some);
            let mut result = room.take(some.len());
            let saved = run(room, shape, Some(&factors), &some, &mut result);
            put_rows(pool, &result, shape.dim, &rows, output);
            saved
        }
    }
}

/// The backward pass of a branch: `run(room, shape, factors, input, saved, gradient)` replaces the gradient in place.
#[expect(clippy::too_many_arguments, reason = "operands and shapes of one operator, each named at the call")]
fn branch_backward<S>(
    pool: &Pool,
    arena: &Arena,
    shape: BlockShape,
    factors: Option<&[f32]>,
    input: &[f32],
    dy: &mut [f32],
    saved: Option<S>,
    run: impl FnOnce(Room<'_>, BlockShape, Option<&[f32]>, &[f32], S, &mut [f32]),
) {
    // Nothing was kept where all samples were dropped.
    let Some(saved) = saved else { return };
    match Kept::new(&shape, factors) {
        Kept::All(factors) => run(Room::exact(arena), shape, factors, input, saved, dy),
        Kept::Some { rows, factors } => {
            let room = Room { arena, kept: factors.len(), all: shape.batch };
            let shape = shape.with_batch(factors.len());
            let mut some = room.take(rows.len() * shape.dim);
            gather_rows(pool, &[input], shape.dim, &rows, &mut some);
            let mut gradient = room.take(some.len());
            gather_rows(pool, &[dy], shape.dim, &rows, &mut gradient);
            run(room, shape, Some(&factors), &some, saved, &mut gradient);
            put_rows(pool, &gradient, shape.dim, &rows, dy);
        }
    }
}

/// Row `i` of `from` replaces row `rows[i]` of `to`; no row occurs twice.
fn put_rows(pool: &Pool, from: &[f32], cols: usize, rows: &[u32], to: &mut [f32]) {
    let to = Shared::new(to);
    for_ranges(pool, rows.len(), rows_per_task(cols), |range| {
        for i in range {
            let at = rows[i] as usize * cols;
            // SAFETY: no row occurs twice.
            unsafe { to.part(at..at + cols) }.copy_from_slice(&from[i * cols..][..cols]);
        }
    });
}

#[expect(clippy::too_many_arguments, reason = "operands and shapes of one operator, each named at the call")]
fn attention_forward(
    pool: &Pool,
    room: Room<'_>,
    shape: BlockShape,
    weights: &BlockWeights<'_>,
    factors: Option<&[f32]>,
    x: &[f32],
    x1: &mut [f32],
    save: Save,
) -> Option<AttentionSaved> {
    let (rows, dim) = (shape.rows(), shape.dim);
    let mut stats = room.take(2 * rows);
    let mut qkv = room.take(rows * 3 * dim);
    // The normalised input, and later the attention's output.
    let mut out = room.take(rows * dim);
    let (gamma, beta) = (weights.norm1_gamma, weights.norm1_beta);
    layer_norm(pool, x, dim, gamma, beta, shape.eps, &mut out, Some(&mut stats));
    linear(pool, weights.qkv, rows, dim, 3 * dim, &out, &mut qkv, Epilogue::default());
    let sizes = shape.attention();
    let mut lse = room.take(sizes.lse_len());
    let [q, k, v] = Heads::fused(&qkv, dim);
    attention(pool, room.arena, sizes, q, k, v, &mut out, Some(&mut lse));
    let saved = (save == Save::ForBackward).then_some((stats, qkv, lse));
    let epilogue = Epilogue {
        col_scale: weights.ls1,
        row_scale: factors.map(|f| (f, shape.tokens)),
        residual: Some(x),
        ..Default::default()
    };
    linear(pool, weights.proj, rows, dim, dim, &out, x1, epilogue);
    saved.map(|(stats, qkv, lse)| AttentionSaved { stats, qkv, out, lse })
}

#[expect(clippy::too_many_arguments, reason = "operands and shapes of one operator, each named at the call")]
fn mlp_forward(
    pool: &Pool,
    room: Room<'_>,
    shape: BlockShape,
    weights: &BlockWeights<'_>,
    factors: Option<&[f32]>,
    x1: &[f32],
    y: &mut [f32],
    save: Save,
) -> Option<MlpSaved> {
    let (rows, dim, hidden) = (shape.rows(), shape.dim, shape.hidden);
    let (gamma, beta) = (weights.norm2_gamma, weights.norm2_beta);
    let saving = save == Save::ForBackward;
    let mut stats = saving.then(|| room.take(2 * rows));
    let mut pre = saving.then(|| room.take(rows * hidden));
    let mut inner = room.take(rows * hidden);
    {
        let mut normed = room.take(rows * dim);
        layer_norm(pool, x1, dim, gamma, beta, shape.eps, &mut normed, stats.as_deref_mut());
        let epilogue = Epilogue { pre: pre.as_deref_mut(), act: shape.act, ..Default::default() };
        linear(pool, weights.fc1, rows, dim, hidden, &normed, &mut inner, epilogue);
    }
    let epilogue = Epilogue {
        col_scale: weights.ls2,
        row_scale: factors.map(|f| (f, shape.tokens)),
        residual: Some(x1),
        ..Default::default()
    };
    linear(pool, weights.fc2, rows, hidden, dim, &inner, y, epilogue);
    Some(MlpSaved { stats: stats?, pre: pre? })
}

/// The gradient of [`block_forward`].
///
/// `dy` holds the gradient of the output and is used up. The gradient of the input is added to
/// `dx`; without `dx` it takes the place of `dy`. `saved` is what the forward pass kept; without
/// it the forward pass runs again, with the same result to the last bit. What was kept is freed
/// piece by piece as it is consumed. `weights` must be dense.
///
/// # Panics
/// When a length does not fit the shape, or a weight is packed.
#[expect(clippy::too_many_arguments, reason = "operands and shapes of one operator, each named at the call")]
pub fn block_backward(
    pool: &Pool,
    arena: &Arena,
    shape: BlockShape,
    weights: &BlockWeights<'_>,
    drop_path: DropPath<'_>,
    x: &[f32],
    saved: Option<BlockSaved>,
    dy: &mut [f32],
    dx: Option<&mut [f32]>,
    grads: BlockGrads<'_>,
) {
    assert_eq!(x.len(), shape.rows() * shape.dim, "input of the block");
    assert_eq!(dy.len(), x.len(), "gradient of the block's output");
    let saved = saved.unwrap_or_else(|| again(pool, arena, shape, weights, drop_path, x));
    let BlockSaved { x1, attention, mlp } = saved;
    let mlp_grads = MlpGrads {
        norm: (grads.norm2_gamma, grads.norm2_beta),
        fc1: (grads.fc1_weight, grads.fc1_bias),
        fc2: (grads.fc2_weight, grads.fc2_bias),
        ls: grads.ls2,
    };
    branch_backward(pool, arena, shape, drop_path.mlp, &x1, dy, mlp, |room, shape, f, x1, saved, dy| {
        mlp_backward(pool, room, shape, weights, f, x1, saved, dy, mlp_grads);
    });
    drop(x1);
    let attention_grads = AttentionGrads {
        norm: (grads.norm1_gamma, grads.norm1_beta),
        qkv: (grads.qkv_weight, grads.qkv_bias),
        proj: (grads.proj_weight, grads.proj_bias),
        ls: grads.ls1,
    };
    branch_backward(pool, arena, shape, drop_path.attention, x, dy, attention, |room, shape, f, x, saved, dy| {
        attention_branch_backward(pool, room, shape, weights, f, x, saved, dy, attention_grads);
    });
    if let Some(dx) = dx {
        axpy(pool, 1.0, dy, dx);
    }
}

/// Runs the forward pass for its intermediate results alone: the MLP's second layer is left out.
fn again(
    pool: &Pool,
    arena: &Arena,
    shape: BlockShape,
    weights: &BlockWeights<'_>,
    drop_path: DropPath<'_>,
    x: &[f32],
) -> BlockSaved {
    let mut x1 = arena.take(x.len());
    let save = Save::ForBackward;
    let attention = branch(pool, arena, shape, drop_path.attention, x, &mut x1, |room, shape, factors, x, x1| {
        attention_forward(pool, room, shape, weights, factors, x, x1, save)
    });
    let mlp = match Kept::new(&shape, drop_path.mlp) {
        Kept::All(_) => Some(mlp_again(pool, Room::exact(arena), shape, weights, &x1)),
        Kept::Some { rows, .. } if rows.is_empty() => None,
        Kept::Some { rows, factors } => {
            let room = Room { arena, kept: factors.len(), all: shape.batch };
            let shape = shape.with_batch(factors.len());
            let mut some = room.take(rows.len() * shape.dim);
            gather_rows(pool, &[&x1], shape.dim, &rows, &mut some);
            Some(mlp_again(pool, room, shape, weights, &some))
        }
    };
    BlockSaved { x1, attention, mlp }
}

fn mlp_again(pool: &Pool, room: Room<'_>, shape: BlockShape, weights: &BlockWeights<'_>, x1: &[f32]) -> MlpSaved {
    let (rows, dim, hidden) = (shape.rows(), shape.dim, shape.hidden);
    let (gamma, beta) = (weights.norm2_gamma, weights.norm2_beta);
    let mut stats = room.take(2 * rows);
    let mut pre = room.take(rows * hidden);
    let mut normed = room.take(rows * dim);
    layer_norm(pool, x1, dim, gamma, beta, shape.eps, &mut normed, Some(&mut stats));
    linear(pool, weights.fc1, rows, dim, hidden, &normed, &mut pre, Epilogue::default());
    MlpSaved { stats, pre }
}

type Pair<'a> = (Option<&'a mut [f32]>, Option<&'a mut [f32]>);

struct MlpGrads<'a> {
    norm: Pair<'a>,
    fc1: Pair<'a>,
    fc2: Pair<'a>,
    ls: Option<&'a mut [f32]>,
}

struct AttentionGrads<'a> {
    norm: Pair<'a>,
    qkv: Pair<'a>,
    proj: Pair<'a>,
    ls: Option<&'a mut [f32]>,
}

/// `dy` is the gradient of the branch's sum with its input, and becomes that of the input.
#[expect(clippy::too_many_arguments, reason = "operands and shapes of one operator, each named at the call")]
fn mlp_backward(
    pool: &Pool,
    room: Room<'_>,
    shape: BlockShape,
    weights: &BlockWeights<'_>,
    factors: Option<&[f32]>,
    x1: &[f32],
    saved: MlpSaved,
    dy: &mut [f32],
    grads: MlpGrads<'_>,
) {
    let (rows, hidden) = (shape.rows(), shape.hidden);
    let MlpSaved { stats, pre: mut slope } = saved;
    // In turn the activation, its gradient, and the gradient before it.
    let mut inner = room.take(rows * hidden);
    activation_and_slope(pool, shape.act, &mut slope, &mut inner);
    output_layer_backward(
        pool,
        room,
        &OutputLayer { shape, layer: weights.fc2, inputs: hidden, ls: weights.ls2, factors },
        dy,
        &mut inner,
        grads.fc2,
        grads.ls,
    );
    match grads.fc1.1 {
        Some(dbias) => {
            multiply_and_add_column_sums(pool, room.arena, &slope, &mut inner, hidden, dbias);
        }
        None => multiply(pool, &slope, &mut inner),
    }
    drop(slope);
    input_layer_backward(
        pool,
        room,
        &InputLayer {
            shape,
            layer: weights.fc1,
            outputs: hidden,
            gamma: weights.norm2_gamma,
            beta: weights.norm2_beta,
        },
        x1,
        &stats,
        inner,
        dy,
        grads.norm,
        (grads.fc1.0, None),
    );
}

#[expect(clippy::too_many_arguments, reason = "operands and shapes of one operator, each named at the call")]
fn attention_branch_backward(
    pool: &Pool,
    room: Room<'_>,
    shape: BlockShape,
    weights: &BlockWeights<'_>,
    factors: Option<&[f32]>,
    x: &[f32],
    saved: AttentionSaved,
    dy: &mut [f32],
    grads: AttentionGrads<'_>,
) {
    let (rows, dim) = (shape.rows(), shape.dim);
    let AttentionSaved { stats, qkv, out, lse } = saved;
    let mut dout = room.take(out.len());
    dout.copy_from_slice(&out);
    output_layer_backward(
        pool,
        room,
        &OutputLayer { shape, layer: weights.proj, inputs: dim, ls: weights.ls1, factors },
        dy,
        &mut dout,
        grads.proj,
        grads.ls,
    );
    let mut dqkv = room.take(rows * 3 * dim);
    let [q, k, v] = Heads::fused(&qkv, dim);
    let into = QkvGrad::Fused(&mut dqkv);
    attention_backward(pool, room.arena, shape.attention(), q, k, v, &out, &lse, &dout, into, Write::Set);
    drop((qkv, out, lse, dout));
    input_layer_backward(
        pool,
        room,
        &InputLayer {
            shape,
            layer: weights.qkv,
            outputs: 3 * dim,
            gamma: weights.norm1_gamma,
            beta: weights.norm1_beta,
        },
        x,
        &stats,
        dqkv,
        dy,
        grads.norm,
        grads.qkv,
    );
}

/// The last layer of a branch, with LayerScale and stochastic depth.
struct OutputLayer<'a> {
    shape: BlockShape,
    layer: Linear<'a>,
    inputs: usize,
    ls: Option<&'a [f32]>,
    factors: Option<&'a [f32]>,
}

/// Takes the layer's input in `inner` and replaces it by its gradient.
fn output_layer_backward(
    pool: &Pool,
    room: Room<'_>,
    layer: &OutputLayer<'_>,
    dy: &[f32],
    inner: &mut [f32],
    (dweight, dbias): Pair<'_>,
    dls: Option<&mut [f32]>,
) {
    let (rows, inputs, outputs) = (layer.shape.rows(), layer.inputs, layer.shape.dim);
    let weight = layer.layer.dense_weight(inputs * outputs);
    let groups = layer.factors.map(|f| (f, layer.shape.tokens));
    if let (Some(dls), Some(ls)) = (dls, layer.ls) {
        layer_scale_backward(pool, room, layer, ls, dy, inner, dweight, dbias, dls);
        let mut scaled = room.take(dy.len());
        scale_rows(pool, dy, outputs, layer.ls, groups, &mut scaled);
        linear_backward_input(pool, weight, rows, inputs, outputs, &scaled, inner, Write::Set);
        return;
    }
    let scaled = (layer.ls.is_some() || groups.is_some()).then(|| {
        let mut scaled = room.take(dy.len());
        scale_rows(pool, dy, outputs, layer.ls, groups, &mut scaled);
        scaled
    });
    let dz = scaled.as_deref().unwrap_or(dy);
    linear_backward_params(pool, room.arena, rows, inputs, outputs, inner, dz, dweight, dbias);
    linear_backward_input(pool, weight, rows, inputs, outputs, dz, inner, Write::Set);
}

/// The gradients of LayerScale, weight and bias without the layer's output, which was not kept:
/// with `M = (drop dy)^T input` and `s` the column sums of `drop dy`, the output's product with
/// the gradient is `sum_k weight[c, k] M[c, k] + bias[c] s[c]`.
#[expect(clippy::too_many_arguments, reason = "operands and shapes of one operator, each named at the call")]
fn layer_scale_backward(
    pool: &Pool,
    room: Room<'_>,
    layer: &OutputLayer<'_>,
    ls: &[f32],
    dy: &[f32],
    input: &[f32],
    dweight: Option<&mut [f32]>,
    dbias: Option<&mut [f32]>,
    dls: &mut [f32],
) {
    let (rows, inputs, outputs) = (layer.shape.rows(), layer.inputs, layer.shape.dim);
    let weight = layer.layer.dense_weight(inputs * outputs);
    let groups = layer.factors.map(|f| (f, layer.shape.tokens));
    let mut dropped = room.take(dy.len());
    scale_rows(pool, dy, outputs, None, groups, &mut dropped);
    let mut product = room.arena.take(outputs * inputs);
    weight_product(pool, rows, inputs, outputs, input, &dropped, &mut product, Write::Set);
    let mut sums = room.arena.take_zeroed(outputs);
    add_column_sums(pool, room.arena, &dropped, outputs, &mut sums);
    for c in 0..outputs {
        let at = c * inputs..(c + 1) * inputs;
        let bias = layer.layer.bias.map_or(0.0, |b| b[c] * sums[c]);
        dls[c] += dot(&weight[at.clone()], &product[at]) + bias;
    }
    if let Some(dweight) = dweight {
        for (c, to) in dweight.chunks_exact_mut(inputs).enumerate() {
            add_scaled(ls[c], &product[c * inputs..][..inputs], to);
        }
    }
    for (c, to) in dbias.into_iter().flatten().enumerate() {
        *to += ls[c] * sums[c];
    }
}

vectorised! {
    fn dot(a: &[f32], b: &[f32]) -> f32 {
        sum_of2(a, b, |a, b| a * b)
    }

    fn add_scaled(factor: f32, x: &[f32], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += factor * x;
        }
    }
}

/// The first layer of a branch and the norm before it.
struct InputLayer<'a> {
    shape: BlockShape,
    layer: Linear<'a>,
    outputs: usize,
    gamma: Option<&'a [f32]>,
    beta: Option<&'a [f32]>,
}

/// From the gradient `dz` of the layer's output to that of `x`, which is added to `dx`.
#[expect(clippy::too_many_arguments, reason = "operands and shapes of one operator, each named at the call")]
fn input_layer_backward(
    pool: &Pool,
    room: Room<'_>,
    layer: &InputLayer<'_>,
    x: &[f32],
    stats: &[f32],
    dz: Buf,
    dx: &mut [f32],
    (dgamma, dbeta): Pair<'_>,
    (dweight, dbias): Pair<'_>,
) {
    let (rows, dim, outputs) = (layer.shape.rows(), layer.shape.dim, layer.outputs);
    let weight = layer.layer.dense_weight(dim * outputs);
    // The normalised input, then its gradient.
    let mut normed = room.take(rows * dim);
    layer_norm_again(pool, x, dim, layer.gamma, layer.beta, stats, &mut normed);
    linear_backward_params(pool, room.arena, rows, dim, outputs, &normed, &dz, dweight, dbias);
    linear_backward_input(pool, weight, rows, dim, outputs, &dz, &mut normed, Write::Set);
    drop(dz);
    layer_norm_backward(pool, room.arena, x, dim, stats, layer.gamma, &normed, dx, Write::Add, dgamma, dbeta);
}

/// The parameters of a block that [`LastBlock`] computes in two phases.
#[derive(Clone, Copy)]
pub struct SplitWeights<'a> {
    /// The queries' third of the fused projection, `[dim, dim]`.
    pub q: Linear<'a>,
    /// The other two thirds, `[2 * dim, dim]`.
    pub kv: Linear<'a>,
    /// The rest; `qkv` is not used.
    pub block: BlockWeights<'a>,
}

impl<'a> SplitWeights<'a> {
    /// Splits the fused projection of a block with dense weights.
    ///
    /// # Panics
    /// If its weight is packed: pack the two parts instead.
    pub fn dense(block: BlockWeights<'a>, dim: usize) -> Self {
        let (q, kv) = block.qkv.dense_weight(3 * dim * dim).split_at(dim * dim);
        let bias = block.qkv.bias.map(|b| b.split_at(dim));
        Self { q: Linear::dense(q, bias.map(|b| b.0)), kv: Linear::dense(kv, bias.map(|b| b.1)), block }
    }
}

/// The queries of the class tokens `[batch, dim]`, and keys and values of all tokens `[batch * tokens, 2 * dim]`.
fn class_queries_and_keys(
    pool: &Pool,
    arena: &Arena,
    shape: BlockShape,
    weights: &SplitWeights<'_>,
    x: &[f32],
) -> (Buf, Buf) {
    let (rows, dim) = (shape.rows(), shape.dim);
    assert_eq!(x.len(), rows * dim, "input of the block");
    let mut normed = arena.take(rows * dim);
    let (gamma, beta) = (weights.block.norm1_gamma, weights.block.norm1_beta);
    layer_norm(pool, x, dim, gamma, beta, shape.eps, &mut normed, None);
    let mut kv = arena.take(rows * 2 * dim);
    linear(pool, weights.kv, rows, dim, 2 * dim, &normed, &mut kv, Epilogue::default());
    let first: Vec<u32> = (0..shape.batch).map(|b| (b * shape.tokens) as u32).collect();
    let mut cls_normed = arena.take(shape.batch * dim);
    gather_rows(pool, &[&normed], dim, &first, &mut cls_normed);
    drop(normed);
    let mut q = arena.take(shape.batch * dim);
    linear(pool, weights.q, shape.batch, dim, dim, &cls_normed, &mut q, Epilogue::default());
    (q, kv)
}

/// The last block of a frozen teacher, computed in two phases: [`begin`](Self::begin) computes the
/// attention of the class token to the patches, from which a mask is drawn;
/// [`finish`](Self::finish) computes the output of only those tokens that the mask needs.
pub struct LastBlock {
    kv: Buf,
}

impl LastBlock {
    /// Keys and values of all tokens of `x` `[batch * tokens, dim]`, and in `cls` `[batch,
    /// tokens - 1]` the attention of the first token to the others, averaged over heads.
    ///
    /// # Panics
    /// When a length does not fit the shape.
    pub fn begin(
        pool: &Pool,
        arena: &Arena,
        shape: BlockShape,
        weights: &SplitWeights<'_>,
        x: &[f32],
        cls: &mut [f32],
    ) -> LastBlock {
        let (q, kv) = class_queries_and_keys(pool, arena, shape, weights, x);
        let (q, k) = (Heads::separate(&q, shape.dim), Heads::new(&kv, 2 * shape.dim, 0));
        cls_attention(pool, arena, shape.attention(), q, 1, k, cls);
        LastBlock { kv }
    }

    /// The same attention of each head by itself, for people to look at: `[batch, heads, tokens - 1]`.
    ///
    /// # Panics
    /// When a length does not fit the shape.
    pub fn attention_by_head(
        pool: &Pool,
        arena: &Arena,
        shape: BlockShape,
        weights: &SplitWeights<'_>,
        x: &[f32],
    ) -> Vec<f32> {
        let (q, kv) = class_queries_and_keys(pool, arena, shape, weights, x);
        let all = shape.attention();
        let patches = shape.tokens - 1;
        let mut by_head = vec![0.0; shape.batch * all.heads * patches];
        let mut one = vec![0.0; shape.batch * patches];
        for head in 0..all.heads {
            // A head is an attention of its own, over its channels.
            let (first, alone) = (head * all.head_dim, AttentionShape { heads: 1, ..all });
            let (q, k) = (Heads::new(&q, shape.dim, first), Heads::new(&kv, 2 * shape.dim, first));
            cls_attention(pool, arena, alone, q, 1, k, &mut one);
            for (image, row) in one.chunks_exact(patches).enumerate() {
                by_head[(image * all.heads + head) * patches..][..patches].copy_from_slice(row);
            }
        }
        by_head
    }

    /// The block's output for `tokens` `[batch, picked]`, the same number for each image:
    /// `y` `[batch * picked, dim]`. `shape`, `weights` and `x` are those of
    /// [`begin`](Self::begin).
    ///
    /// # Panics
    /// When a length does not fit the shape, or a token index lies beyond the tokens.
    #[expect(clippy::too_many_arguments, reason = "operands and shapes of one operator, each named at the call")]
    pub fn finish(
        &self,
        pool: &Pool,
        arena: &Arena,
        shape: BlockShape,
        weights: &SplitWeights<'_>,
        x: &[f32],
        tokens: &[u32],
        y: &mut [f32],
    ) {
        let dim = shape.dim;
        let rows = tokens.len();
        assert_eq!(x.len(), shape.rows() * dim, "input of the block");
        assert!(rows.is_multiple_of(shape.batch), "as many tokens for each image");
        assert!(tokens.iter().all(|&t| (t as usize) < shape.tokens), "token beyond the image");
        if rows == 0 {
            return;
        }
        let picked = rows / shape.batch;
        let index: Vec<u32> =
            tokens.iter().enumerate().map(|(i, &token)| (i / picked * shape.tokens) as u32 + token).collect();
        let mut some = arena.take(rows * dim);
        gather_rows(pool, &[x], dim, &index, &mut some);
        let mut out = arena.take(rows * dim);
        let mut q = arena.take(rows * dim);
        let (gamma, beta) = (weights.block.norm1_gamma, weights.block.norm1_beta);
        layer_norm(pool, &some, dim, gamma, beta, shape.eps, &mut out, None);
        linear(pool, weights.q, rows, dim, dim, &out, &mut q, Epilogue::default());
        let sizes = AttentionShape { queries: picked, ..shape.attention() };
        let (k, v) = (Heads::new(&self.kv, 2 * dim, 0), Heads::new(&self.kv, 2 * dim, dim));
        attention(pool, arena, sizes, Heads::separate(&q, dim), k, v, &mut out, None);
        // The queries have served; their buffer takes the stream between the branches.
        let mut x1 = q;
        let epilogue = Epilogue { col_scale: weights.block.ls1, residual: Some(&some), ..Default::default() };
        linear(pool, weights.block.proj, rows, dim, dim, &out, &mut x1, epilogue);
        drop((some, out));
        let shape = BlockShape { tokens: picked, ..shape };
        mlp_forward(pool, Room::exact(arena), shape, &weights.block, None, &x1, y, Save::Nothing);
    }
}
