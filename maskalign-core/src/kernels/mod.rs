//! The operators that models are written in.
//!
//! [`Kernels`] is an object-safe table: [`composed`] builds every operator from dfdx's own, for any device and any
//! float; [`fused`] hands them to `maskalign-kernels`, for the CPU. The composed operators are checked against finite
//! differences in f64 and are what CUDA runs; the fused ones are checked against the composed.

pub mod composed;
pub mod fused;
mod view;

use std::{ops::Range, sync::Arc};

use dfdx::prelude::Gradients;

use crate::{
    device::{Dev, Matrix, Scalar, Vector},
    error::Result,
    nn::{Block, Linear, Norm, Param},
    tape::Recorder,
};

use maskalign_kernels::elementwise::cut_patches;

pub use maskalign_kernels::{Pool, elementwise::Patches, gemm::Act};

/// Sizes of an attention: queries and keys are the rows of matrices `[batch * tokens, heads * head_dim]`.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Images in the batch.
    pub batch: usize,
    /// Heads; their width is columns / heads.
    pub heads: usize,
    /// Query tokens of an image.
    pub queries: usize,
    /// Key and value tokens of an image.
    pub keys: usize,
}

/// How a block is run.
#[derive(Clone, Debug, Default)]
pub struct BlockRun {
    /// Images in the batch.
    pub batch: usize,
    /// Tokens of an image.
    pub tokens: usize,
    /// Stochastic depth: the factor of each sample on the attention and on the MLP branch, 0 or 1 / (1 - p).
    pub branch_scale: Option<(Arc<[f32]>, Arc<[f32]>)>,
    /// Keep the input alone and compute the block again in the backward pass.
    pub recompute: bool,
}

/// An elementwise distance or a distribution loss, averaged as PyTorch's `reduction="mean"` does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Distance {
    /// Mean squared error.
    Mse,
    /// Mean absolute error.
    L1,
    /// Smooth L1; `beta` is where it turns from square to line.
    SmoothL1 {
        /// Width of the quadratic part.
        beta: f32,
    },
    /// 1 - cosine similarity of each row, averaged over rows.
    Cosine,
    /// Kullback-Leibler divergence of softmax(prediction) from softmax(target), averaged over all elements.
    Kl,
}

/// How rows that take no gradient are normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standardize {
    /// Each row to length 1 (eps 1e-12, PyTorch's `F.normalize`).
    Length,
    /// Each row by its mean and unbiased variance, eps 1e-6.
    Rows,
    /// All values by one mean and one unbiased variance, eps 1e-6.
    All,
}

/// Everything an AdamW step needs to know besides the tensors.
#[derive(Clone, Copy, Debug)]
pub struct AdamStep {
    /// Learning rate.
    pub lr: f64,
    /// Decay rates of the moments.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// The number of this update, from 1.
    pub step: u64,
    /// What gradients are multiplied by first (clipping).
    pub gradient_scale: f32,
}

/// A frozen weight in the layout that a device multiplies fastest by.
#[derive(Clone)]
pub struct Packed(pub(crate) Arc<maskalign_kernels::gemm::PackedB>);

/// Indices into `[batch * tokens]` of the given token indices of each image (`rows` holds `rows.len() / batch` each).
pub fn flat_rows(rows: &[u32], batch: usize, tokens: usize) -> Vec<u32> {
    let each = rows.len() / batch;
    rows.iter().enumerate().map(|(i, &row)| ((i / each.max(1)) * tokens) as u32 + row).collect()
}

/// What the last block of a frozen tower gives before it is finished.
pub struct Begun<D: Dev> {
    /// Attention of the class token to each patch, mean over heads: `[batch, patches]`, row-major.
    pub attention: Vec<f32>,
    pub(crate) state: BegunState<D>,
}

pub(crate) enum BegunState<D: Dev> {
    /// The block's whole output.
    Done(Matrix<D>),
    /// What the fused kernels keep for the second half.
    Fused(Box<dyn std::any::Any>),
}

/// The operators of a device.
///
/// Matrices are `[rows, columns]` with rows = images x tokens; every operator records its gradient on the recorder
/// it is given. Those that take several matrices with a gradient want different ones (dfdx has no gradient for a tensor
/// that an operator takes twice), but for [`Kernels::attention`]. Errors are the device's: out of memory.
pub trait Kernels<D: Dev> {
    /// Name for manifests: `composed`, or `fused` with its instruction set.
    fn name(&self) -> String;
    /// The host's threads: the CPU's operators run on them and, on every device, what is done with images before they
    /// reach it.
    fn pool(&self) -> &Pool;
    /// How many threads that is.
    fn threads(&self) -> usize {
        self.pool().threads()
    }
    /// The machine's peak of fused multiply-adds in GFLOP/s, measured now on these threads.
    fn peak_gflops(&self) -> Option<f64> {
        None
    }
    /// Gives idle buffers back to the system: worth it between stages, whose sizes differ.
    fn trim(&self) {}
    /// The fastest form of some rows of a frozen weight `[out, in]`, where this device has one.
    fn pack(&self, weight: &Matrix<D>, rows: Range<usize>) -> Option<Packed>;
    /// Cuts images, which lie in the host's memory, into normalised patches: rows `[3 * patch * patch]` of channel,
    /// row, column. `index` holds as many patches for each image; without it all are cut.
    fn cut_patches(&self, from: Patches<'_>, index: Option<&[u32]>) -> Vec<f32> {
        let mut rows = vec![0.0; from.elements(index)];
        cut_patches(self.pool(), from, index, &mut rows);
        rows
    }
    /// `act(x W^T + b)`: `[rows, in] -> [rows, out]`.
    fn linear(&self, r: &mut Recorder<D>, x: &Matrix<D>, layer: &Linear<D>, act: Act) -> Result<Matrix<D>>;
    /// `data W^T + b` for data that takes no gradient: a patch embedding.
    fn embed(&self, r: &mut Recorder<D>, data: &Matrix<D>, layer: &Linear<D>) -> Result<Matrix<D>>;
    /// LayerNorm over columns, with the biased variance; without affine parameters where `norm` has none.
    fn layer_norm(&self, r: &mut Recorder<D>, x: &Matrix<D>, norm: &Norm<D>) -> Result<Matrix<D>>;
    /// Scaled dot-product attention of all heads.
    fn attention(
        &self,
        r: &mut Recorder<D>,
        q: &Matrix<D>,
        k: &Matrix<D>,
        v: &Matrix<D>,
        shape: AttentionShape,
    ) -> Result<Matrix<D>>;
    /// The same with keys and values side by side, as one projection gives them: `kv` is `[batch * keys, 2 * dim]`, the
    /// keys' columns first.
    fn cross_attention(
        &self,
        r: &mut Recorder<D>,
        q: &Matrix<D>,
        kv: &Matrix<D>,
        shape: AttentionShape,
    ) -> Result<Matrix<D>>;
    /// A pre-norm transformer block.
    fn block(&self, r: &mut Recorder<D>, x: &Matrix<D>, block: &Block<D>, run: &BlockRun) -> Result<Matrix<D>>;
    /// First half of a frozen tower's last block: enough for the attention of its class token.
    fn begin_block(&self, x: &Matrix<D>, block: &Block<D>, run: &BlockRun) -> Result<Begun<D>>;
    /// Second half: the block's output for the `rows` of each image (token indices), in that order; `None` gives all.
    fn finish_block(
        &self,
        x: &Matrix<D>,
        block: &Block<D>,
        run: &BlockRun,
        begun: Begun<D>,
        rows: Option<&[u32]>,
    ) -> Result<Matrix<D>>;
    /// Sum of two matrices.
    fn add(&self, r: &mut Recorder<D>, x: &Matrix<D>, y: &Matrix<D>) -> Result<Matrix<D>>;
    /// Sum of a matrix and one that takes no gradient, such as fixed positions.
    fn add_constant(&self, r: &mut Recorder<D>, x: &Matrix<D>, constant: &Matrix<D>) -> Result<Matrix<D>>;
    /// Rows of several matrices of equal width, by index into their concatenation; a row may be taken many times.
    fn gather_rows(&self, r: &mut Recorder<D>, sources: &[Matrix<D>], index: &[u32]) -> Result<Matrix<D>>;
    /// The mean of each image's tokens from token `first` on: `[batch * tokens, C] -> [batch, C]`.
    fn mean_tokens(&self, r: &mut Recorder<D>, x: &Matrix<D>, batch: usize, first: usize) -> Result<Matrix<D>>;
    /// `out[i] = sum_j w[rows[i], j] x[j]` for matrices `x` of equal shape.
    fn mix(&self, r: &mut Recorder<D>, x: &[Matrix<D>], w: &Matrix<D>, rows: &[usize]) -> Result<Vec<Matrix<D>>>;
    /// Normalised values of a target; takes no gradient.
    fn standardize(&self, x: &Matrix<D>, kind: Standardize) -> Result<Matrix<D>>;
    /// `sum_i weights[i] x[i]` of targets of equal shape; takes no gradient.
    fn weighted_mean(&self, x: &[Matrix<D>], weights: &[f32]) -> Result<Matrix<D>>;
    /// Distance of a prediction from a target that takes no gradient.
    fn distance(&self, r: &mut Recorder<D>, x: &Matrix<D>, target: &Matrix<D>, distance: Distance)
    -> Result<Scalar<D>>;
    /// Mean over rows of the cross entropy with soft targets `[rows, classes]`, row-major.
    fn cross_entropy(&self, r: &mut Recorder<D>, logits: &Matrix<D>, targets: Vec<f32>) -> Result<Scalar<D>>;
    /// `sum_i weights[i] terms[i]`.
    fn weighted_sum(&self, r: &mut Recorder<D>, terms: &[Scalar<D>], weights: &[f32]) -> Result<Scalar<D>>;
    /// One AdamW update of a parameter, in place, in PyTorch's order of operations.
    fn adamw(
        &self,
        parameter: &mut Param<D>,
        gradients: &mut Gradients<f32, D>,
        first: &mut Vector<D>,
        second: &mut Vector<D>,
        step: AdamStep,
    ) -> Result<()>;
    /// Sum of squares of the gradients of the given parameters: in double precision throughout for the fused operators,
    /// over the parameters alone for the composed, which sum each one's on the device and wait for it once.
    fn square_sum(&self, gradients: &mut Gradients<f32, D>, parameters: &[Vector<D>]) -> Result<f64>;
}
