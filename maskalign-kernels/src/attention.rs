//! Multi-head attention that never stores a `[batch, heads, queries, keys]` array.
//!
//! One task computes one head of one image. It takes the queries in blocks whose scores against all
//! keys stay in the cache, and multiplies with one small register tile. The
//! forward pass keeps the logarithm of each row's sum of exponentials; the backward pass makes the
//! probabilities again from it (as FlashAttention does, arXiv 2205.14135).

use crate::arch::isa;
use crate::arena::Arena;
use crate::elementwise::Write;
use crate::gemm::pack::columns;
use crate::pool::Pool;
use crate::share::{Shared, max_of, sum_of, sum_of2, vectorised};
use crate::vmath;

/// Rows of the register tile.
const TILE_ROWS: usize = 6;
/// Columns of the register tile.
const TILE_COLS: usize = 16;
/// Queries whose scores the forward pass holds at once, in the L1 cache; a multiple of
/// [`TILE_ROWS`].
const FORWARD_BLOCK: usize = 24;
/// The same for the backward pass, which sums over the queries of a block.
const BACKWARD_BLOCK: usize = 48;

/// The sizes of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Images.
    pub batch: usize,
    /// Heads.
    pub heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Query tokens of an image.
    pub queries: usize,
    /// Key tokens of an image.
    pub keys: usize,
}

impl AttentionShape {
    /// Channels of all heads.
    pub fn dim(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Length of the array of log-sums, `[batch, heads, queries]`.
    pub fn lse_len(&self) -> usize {
        self.batch * self.heads * self.queries
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

/// Queries, keys or values inside a row-major buffer: channel `c` of head `h` of row `r` is
/// `data[r * row_stride + offset + h * head_dim + c]`. Rows run over images, then tokens.
#[derive(Clone, Copy)]
pub struct Heads<'a> {
    data: &'a [f32],
    row_stride: usize,
    offset: usize,
}

impl<'a> Heads<'a> {
    /// A view with rows `row_stride` apart that start at `offset`.
    pub fn new(data: &'a [f32], row_stride: usize, offset: usize) -> Self {
        Self { data, row_stride, offset }
    }

    /// Rows of `dim` channels one after another.
    pub fn separate(data: &'a [f32], dim: usize) -> Self {
        Self::new(data, dim, 0)
    }

    /// Queries, keys and values of a buffer `[rows, 3 * dim]`.
    pub fn fused(data: &'a [f32], dim: usize) -> [Self; 3] {
        [0, 1, 2].map(|part| Self::new(data, 3 * dim, part * dim))
    }

    /// `head_dim` channels of a head.
    #[inline(always)]
    fn row(&self, row: usize, head: usize, head_dim: usize) -> &'a [f32] {
        &self.data[row * self.row_stride + self.offset + head * head_dim..][..head_dim]
    }

    fn check(&self, rows: usize, dim: usize, what: &str) {
        assert!(
            self.offset + dim <= self.row_stride && rows * self.row_stride <= self.data.len(),
            "{what}: a buffer of {} floats is too small for {rows} rows, {} apart",
            self.data.len(),
            self.row_stride
        );
    }
}

/// Where [`attention_backward`] writes the gradients of queries, keys and values.
pub enum QkvGrad<'a> {
    /// One buffer `[rows, 3 * dim]`: self-attention from one fused projection.
    Fused(&'a mut [f32]),
    /// Queries `[query rows, dim]`, and keys and values `[key rows, 2 * dim]`.
    Cross {
        /// The queries' gradient.
        q: &'a mut [f32],
        /// The keys' and values' gradient.
        kv: &'a mut [f32],
    },
    /// Three buffers of rows of `dim`.
    Separate {
        /// The queries' gradient.
        q: &'a mut [f32],
        /// The keys' gradient.
        k: &'a mut [f32],
        /// The values' gradient.
        v: &'a mut [f32],
    },
}

/// [`Heads`] to write to.
#[derive(Clone, Copy)]
struct HeadsMut<'a> {
    data: Shared<'a>,
    row_stride: usize,
    offset: usize,
}

impl<'a> HeadsMut<'a> {
    fn new(data: Shared<'a>, row_stride: usize, offset: usize) -> Self {
        Self { data, row_stride, offset }
    }

    /// # Safety
    /// As [`Shared::part`]: one borrower of a row of a head at a time.
    #[inline(always)]
    unsafe fn row(&self, row: usize, head: usize, head_dim: usize) -> &'a mut [f32] {
        let at = row * self.row_stride + self.offset + head * head_dim;
        // SAFETY: the caller's promise.
        unsafe { self.data.part(at..at + head_dim) }
    }
}

impl<'a> QkvGrad<'a> {
    fn views(self, shape: &AttentionShape) -> [HeadsMut<'a>; 3] {
        let dim = shape.dim();
        let (query_rows, key_rows) = (shape.batch * shape.queries, shape.batch * shape.keys);
        match self {
            QkvGrad::Fused(qkv) => {
                assert_eq!(shape.queries, shape.keys, "a fused projection has equal tokens");
                assert_eq!(qkv.len(), query_rows * 3 * dim, "gradient of queries, keys and values");
                let data = Shared::new(qkv);
                [0, 1, 2].map(|part| HeadsMut::new(data, 3 * dim, part * dim))
            }
            QkvGrad::Cross { q, kv } => {
                assert_eq!(q.len(), query_rows * dim, "gradient of the queries");
                assert_eq!(kv.len(), key_rows * 2 * dim, "gradient of keys and values");
                let kv = Shared::new(kv);
                let q = HeadsMut::new(Shared::new(q), dim, 0);
                [q, HeadsMut::new(kv, 2 * dim, 0), HeadsMut::new(kv, 2 * dim, dim)]
            }
            QkvGrad::Separate { q, k, v } => {
                assert_eq!(q.len(), query_rows * dim, "gradient of the queries");
                assert!(k.len() == key_rows * dim && v.len() == k.len(), "gradient of the keys");
                [q, k, v].map(|x| HeadsMut::new(Shared::new(x), dim, 0))
            }
        }
    }
}

/// `out = softmax(q k^T / sqrt(head_dim)) v` for each image and head; `out` is
/// `[batch * queries, dim]`. `lse` `[batch, heads, queries]` takes what [`attention_backward`]
/// needs.
///
/// # Panics
/// When a buffer is too small, or there are no keys.
pub fn attention(
    pool: &Pool,
    arena: &Arena,
    shape: AttentionShape,
    q: Heads<'_>,
    k: Heads<'_>,
    v: Heads<'_>,
    out: &mut [f32],
    lse: Option<&mut [f32]>,
) {
    let dim = shape.dim();
    check_inputs(&shape, q, k, v);
    assert_eq!(out.len(), shape.batch * shape.queries * dim, "attention output");
    assert!(lse.as_ref().is_none_or(|lse| lse.len() == shape.lse_len()), "attention log-sums");
    let out = HeadsMut::new(Shared::new(out), dim, 0);
    let lse = lse.map(Shared::new);
    let sizes = Sizes::new(&shape, FORWARD_BLOCK);
    pool.run(shape.batch * shape.heads, &|task, _| {
        let mut scratch = arena.take(sizes.forward_scratch());
        let lse = lse.map(|lse| {
            // SAFETY: one part for each task.
            unsafe { lse.part(task * shape.queries..(task + 1) * shape.queries) }
        });
        let head = Head { shape, sizes, image: task / shape.heads, head: task % shape.heads };
        forward_head(head, q, k, v, out, lse, &mut scratch);
    });
}

/// The gradient of [`attention`] from `dout`, with the forward's inputs, `out` and `lse`.
///
/// # Panics
/// When a buffer does not fit.
pub fn attention_backward(
    pool: &Pool,
    arena: &Arena,
    shape: AttentionShape,
    q: Heads<'_>,
    k: Heads<'_>,
    v: Heads<'_>,
    out: &[f32],
    lse: &[f32],
    dout: &[f32],
    grad: QkvGrad<'_>,
    write: Write,
) {
    let dim = shape.dim();
    check_inputs(&shape, q, k, v);
    assert_eq!(out.len(), shape.batch * shape.queries * dim, "attention output");
    assert_eq!(dout.len(), out.len(), "gradient of the attention output");
    assert_eq!(lse.len(), shape.lse_len(), "attention log-sums");
    let grad = grad.views(&shape);
    let (out, dout) = (Heads::separate(out, dim), Heads::separate(dout, dim));
    let sizes = Sizes::new(&shape, BACKWARD_BLOCK);
    pool.run(shape.batch * shape.heads, &|task, _| {
        let mut scratch = arena.take(sizes.backward_scratch());
        let lse = &lse[task * shape.queries..(task + 1) * shape.queries];
        let head = Head { shape, sizes, image: task / shape.heads, head: task % shape.heads };
        backward_head(head, [q, k, v, out, dout], lse, grad, write, &mut scratch);
    });
}

/// What the first query of each image attends to: its probabilities over all keys but the first,
/// mean over the heads, `out` `[batch, keys - 1]`. With CLS first this is the weight of each patch
/// in attentive masking. `q` needs one row an image, `query_rows` apart.
///
/// # Panics
/// When a buffer is too small, or there are no keys.
pub fn cls_attention(
    pool: &Pool,
    arena: &Arena,
    shape: AttentionShape,
    q: Heads<'_>,
    query_rows: usize,
    k: Heads<'_>,
    out: &mut [f32],
) {
    assert!(shape.keys > 0, "attention needs a key");
    k.check(shape.batch * shape.keys, shape.dim(), "keys");
    let patches = shape.keys - 1;
    assert_eq!(out.len(), shape.batch * patches, "attention of CLS");
    let out = Shared::new(out);
    pool.run(shape.batch, &|image, _| {
        // SAFETY: one part for each image.
        let out = unsafe { out.part(image * patches..(image + 1) * patches) };
        out.fill(0.0);
        let mut scores = arena.take(shape.keys);
        for head in 0..shape.heads {
            let q = q.row(image * query_rows, head, shape.head_dim);
            for (key, score) in scores.iter_mut().enumerate() {
                let k = k.row(image * shape.keys + key, head, shape.head_dim);
                *score = dot(q, k) * shape.scale();
            }
            add_softmax(&mut scores, 1.0 / shape.heads as f32, out);
        }
    });
}

fn check_inputs(shape: &AttentionShape, q: Heads<'_>, k: Heads<'_>, v: Heads<'_>) {
    assert!(shape.keys > 0 && shape.head_dim > 0, "attention needs a key and a channel");
    q.check(shape.batch * shape.queries, shape.dim(), "queries");
    k.check(shape.batch * shape.keys, shape.dim(), "keys");
    v.check(shape.batch * shape.keys, shape.dim(), "values");
}

/// Padded sizes of one head's scratch memory.
#[derive(Clone, Copy)]
struct Sizes {
    /// Keys up to whole tile columns: the stride of a row of scores.
    keys_padded: usize,
    /// Channels up to whole tile columns.
    dim_padded: usize,
    /// Rows of a block of queries, whole tiles.
    block: usize,
    keys: usize,
    dim: usize,
}

impl Sizes {
    fn new(shape: &AttentionShape, block: usize) -> Self {
        Self {
            keys_padded: shape.keys.next_multiple_of(TILE_COLS),
            dim_padded: shape.head_dim.next_multiple_of(TILE_COLS),
            block: shape.queries.next_multiple_of(TILE_ROWS).clamp(TILE_ROWS, block),
            keys: shape.keys,
            dim: shape.head_dim,
        }
    }

    /// A row of scores for each query. The tile that takes keys as rows may read past the last.
    fn scores(&self) -> usize {
        self.block * self.keys_padded + TILE_ROWS
    }

    /// Keys or values `[dim, keys]` in panels of keys.
    fn by_key(&self) -> usize {
        self.dim * self.keys_padded
    }

    /// Keys or values `[keys, dim]` in panels of channels.
    fn by_channel(&self) -> usize {
        self.keys * self.dim_padded
    }

    /// A block of queries, plain rows.
    fn query_rows(&self) -> usize {
        self.block * self.dim
    }

    /// A block of queries in panels of channels, or a block of outputs.
    fn query_panels(&self) -> usize {
        self.block * self.dim_padded
    }

    /// Sums for each key, whole tiles.
    fn key_sums(&self) -> usize {
        self.keys.next_multiple_of(TILE_ROWS) * self.dim_padded
    }

    fn forward_scratch(&self) -> usize {
        self.by_key() + self.by_channel() + self.query_rows() + self.query_panels() + self.scores()
    }

    fn backward_scratch(&self) -> usize {
        2 * self.by_key()
            + self.by_channel()
            + 2 * self.query_rows()
            + 3 * self.query_panels()
            + 2 * self.scores()
            + 2 * self.key_sums()
    }
}

/// One head of one image.
#[derive(Clone, Copy)]
struct Head {
    shape: AttentionShape,
    sizes: Sizes,
    image: usize,
    head: usize,
}

impl Head {
    #[inline(always)]
    fn query<'a>(&self, from: Heads<'a>, query: usize) -> &'a [f32] {
        from.row(self.image * self.shape.queries + query, self.head, self.shape.head_dim)
    }

    #[inline(always)]
    fn key<'a>(&self, from: Heads<'a>, key: usize) -> &'a [f32] {
        from.row(self.image * self.shape.keys + key, self.head, self.shape.head_dim)
    }

    /// The buffer from a key of this head on.
    #[inline(always)]
    fn key_on<'a>(&self, from: Heads<'a>, key: usize) -> &'a [f32] {
        let row = self.image * self.shape.keys + key;
        &from.data[row * from.row_stride + from.offset + self.head * self.shape.head_dim..]
    }
}

/// Takes the first `len` floats off `scratch`.
fn cut<'a>(scratch: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    let (first, rest) = std::mem::take(scratch).split_at_mut(len);
    *scratch = rest;
    first
}

vectorised! {
    fn forward_head(
        head: Head,
        q: Heads<'_>,
        k: Heads<'_>,
        v: Heads<'_>,
        out: HeadsMut<'_>,
        lse: Option<&mut [f32]>,
        scratch: &mut [f32],
    ) {
        let Head { shape, sizes, .. } = head;
        let mut rest = scratch;
        let keys_by_key = cut(&mut rest, sizes.by_key());
        let values = cut(&mut rest, sizes.by_channel());
        let q_rows = cut(&mut rest, sizes.query_rows());
        let result = cut(&mut rest, sizes.query_panels());
        let scores = cut(&mut rest, sizes.scores());
        let mut lse = lse;

        pack_by_key(head, k, keys_by_key);
        pack_by_channel(shape.keys, shape.head_dim, |key| head.key(v, key), values);
        for first in (0..shape.queries).step_by(sizes.block) {
            let count = sizes.block.min(shape.queries - first);
            let tiled = count.next_multiple_of(TILE_ROWS);
            copy_rows(count, shape.head_dim, shape.scale(), |i| head.query(q, first + i), q_rows);
            product::<FMA>(
                [tiled, sizes.keys_padded, shape.head_dim],
                q_rows,
                [shape.head_dim, 1],
                keys_by_key,
                scores,
                sizes.keys_padded,
                Write::Set,
            );
            let mut inverse_sums = [0.0f32; FORWARD_BLOCK];
            for i in 0..count {
                let row = &mut scores[i * sizes.keys_padded..][..sizes.keys_padded];
                row[shape.keys..].fill(f32::NEG_INFINITY);
                let (largest, sum) = exponentials::<FMA>(row);
                inverse_sums[i] = 1.0 / sum;
                if let Some(lse) = &mut lse {
                    lse[first + i] = largest + sum.ln();
                }
            }
            product::<FMA>(
                [tiled, sizes.dim_padded, shape.keys],
                scores,
                [sizes.keys_padded, 1],
                values,
                result,
                sizes.dim_padded,
                Write::Set,
            );
            for i in 0..count {
                let row = head.image * shape.queries + first + i;
                // SAFETY: a head of an image belongs to one task.
                let to = unsafe { out.row(row, head.head, shape.head_dim) };
                for (to, from) in to.iter_mut().zip(&result[i * sizes.dim_padded..]) {
                    *to = from * inverse_sums[i];
                }
            }
        }
    }

    fn backward_head(
        head: Head,
        inputs: [Heads<'_>; 5],
        lse: &[f32],
        grad: [HeadsMut<'_>; 3],
        write: Write,
        scratch: &mut [f32],
    ) {
        let Head { shape, sizes, .. } = head;
        let [q, k, v, out, dout] = inputs;
        let (dim, scale) = (shape.head_dim, shape.scale());
        let mut rest = scratch;
        let keys_by_key = cut(&mut rest, sizes.by_key());
        let values_by_key = cut(&mut rest, sizes.by_key());
        let keys_by_channel = cut(&mut rest, sizes.by_channel());
        let q_rows = cut(&mut rest, sizes.query_rows());
        let dout_rows = cut(&mut rest, sizes.query_rows());
        let q_panels = cut(&mut rest, sizes.query_panels());
        let dout_panels = cut(&mut rest, sizes.query_panels());
        let dq = cut(&mut rest, sizes.query_panels());
        let probs = cut(&mut rest, sizes.scores());
        let dscores = cut(&mut rest, sizes.scores());
        let dk = cut(&mut rest, sizes.key_sums());
        let dv = cut(&mut rest, sizes.key_sums());

        pack_by_key(head, k, keys_by_key);
        pack_by_key(head, v, values_by_key);
        pack_by_channel(shape.keys, dim, |key| head.key(k, key), keys_by_channel);
        dk.fill(0.0);
        dv.fill(0.0);
        let key_tiles = shape.keys.next_multiple_of(TILE_ROWS);
        for first in (0..shape.queries).step_by(sizes.block) {
            let count = sizes.block.min(shape.queries - first);
            let tiled = count.next_multiple_of(TILE_ROWS);
            let query = |i: usize| head.query(q, first + i);
            let dout_row = |i: usize| head.query(dout, first + i);
            copy_rows(count, dim, scale, query, q_rows);
            copy_rows(count, dim, 1.0, dout_row, dout_rows);
            pack_by_channel(count, dim, |i| &q_rows[i * dim..][..dim], q_panels);
            pack_by_channel(count, dim, dout_row, dout_panels);
            let score_size = [tiled, sizes.keys_padded, dim];
            let stride = sizes.keys_padded;
            product::<FMA>(score_size, q_rows, [dim, 1], keys_by_key, probs, stride, Write::Set);
            product::<FMA>(
                score_size,
                dout_rows,
                [dim, 1],
                values_by_key,
                dscores,
                stride,
                Write::Set,
            );
            for i in 0..count {
                // What comes of the padding is not used.
                let probs = &mut probs[i * stride..][..stride];
                let dscores = &mut dscores[i * stride..][..stride];
                let mean = sum_of2(dout_row(i), head.query(out, first + i), |d, o| d * o);
                let lse = lse[first + i];
                for (p, d) in probs.iter_mut().zip(dscores) {
                    *p = vmath::exp::<FMA>(*p - lse);
                    *d = *p * (*d - mean);
                }
            }
            let sum_size = [key_tiles, sizes.dim_padded, count];
            let width = sizes.dim_padded;
            product::<FMA>(sum_size, probs, [1, stride], dout_panels, dv, width, Write::Add);
            // `q_panels` holds the scaled queries: the factor of the scores is in.
            product::<FMA>(sum_size, dscores, [1, stride], q_panels, dk, width, Write::Add);
            product::<FMA>(
                [tiled, width, shape.keys],
                dscores,
                [stride, 1],
                keys_by_channel,
                dq,
                width,
                Write::Set,
            );
            for i in 0..count {
                let row = head.image * shape.queries + first + i;
                // SAFETY: a head of an image belongs to one task.
                let to = unsafe { grad[0].row(row, head.head, dim) };
                put(write, to, &dq[i * width..], scale);
            }
        }
        for key in 0..shape.keys {
            let row = head.image * shape.keys + key;
            for (grad, sums) in [(grad[1], &*dk), (grad[2], &*dv)] {
                // SAFETY: as above.
                let to = unsafe { grad.row(row, head.head, dim) };
                put(write, to, &sums[key * sizes.dim_padded..], 1.0);
            }
        }
    }

    fn dot(a: &[f32], b: &[f32]) -> f32 {
        sum_of2(a, b, |a, b| a * b)
    }

    // Adds `factor` times the softmax of `scores`, its first element left out, to `out`.
    fn add_softmax(scores: &mut [f32], factor: f32, out: &mut [f32]) {
        let largest = max_of(scores);
        for s in scores.iter_mut() {
            *s = vmath::exp::<FMA>(*s - largest);
        }
        let factor = factor / sum_of(scores, |p| p);
        for (o, p) in out.iter_mut().zip(&scores[1..]) {
            *o += p * factor;
        }
    }
}

#[inline(always)]
fn put(write: Write, to: &mut [f32], from: &[f32], factor: f32) {
    crate::elementwise::store(write, to, from.iter().map(|f| f * factor));
}

/// Replaces each score by `e^(score - largest)`; returns the largest score and the sum. Scores come
/// in whole tiles.
#[inline(always)]
fn exponentials<const FMA: bool>(scores: &mut [f32]) -> (f32, f32) {
    let (scores, _) = scores.as_chunks_mut::<TILE_COLS>();
    let mut lanes = [f32::NEG_INFINITY; TILE_COLS];
    for s in scores.iter() {
        for l in 0..TILE_COLS {
            lanes[l] = if s[l] > lanes[l] { s[l] } else { lanes[l] };
        }
    }
    let largest = lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sums = [0.0; TILE_COLS];
    for s in scores.iter_mut() {
        for l in 0..TILE_COLS {
            s[l] = vmath::exp::<FMA>(s[l] - largest);
            sums[l] += s[l];
        }
    }
    (largest, sums.iter().sum())
}

/// Keys or values of a head, transposed to `[channels, keys]`, in panels of [`TILE_COLS`] keys.
#[inline(always)]
fn pack_by_key(head: Head, from: Heads<'_>, to: &mut [f32]) {
    let (keys, dim) = (head.shape.keys, head.shape.head_dim);
    for (panel, to) in to.chunks_exact_mut(dim * TILE_COLS).enumerate() {
        let first = panel * TILE_COLS;
        let live = TILE_COLS.min(keys - first);
        if live < TILE_COLS {
            to.fill(0.0);
        }
        let rows = head.key_on(from, first);
        columns(isa(), rows, from.row_stride, TILE_COLS, dim, live, to);
    }
}

/// Rows of `dim` channels in panels of [`TILE_COLS`] channels.
#[inline(always)]
fn pack_by_channel<'a>(rows: usize, dim: usize, from: impl Fn(usize) -> &'a [f32], to: &mut [f32]) {
    for row in 0..rows {
        let (whole, rest) = from(row)[..dim].as_chunks::<TILE_COLS>();
        let at = |panel: usize| (panel * rows + row) * TILE_COLS;
        for (panel, from) in whole.iter().enumerate() {
            to[at(panel)..][..TILE_COLS].copy_from_slice(from);
        }
        if !rest.is_empty() {
            let to = &mut to[at(whole.len())..][..TILE_COLS];
            to[..rest.len()].copy_from_slice(rest);
            to[rest.len()..].fill(0.0);
        }
    }
}

/// Copies `count` rows times `factor`, and zeros for the rest of the last tile.
#[inline(always)]
fn copy_rows<'a>(count: usize, dim: usize, factor: f32, from: impl Fn(usize) -> &'a [f32], to: &mut [f32]) {
    for row in 0..count {
        for (to, from) in to[row * dim..][..dim].iter_mut().zip(from(row)) {
            *to = from * factor;
        }
    }
    to[count * dim..count.next_multiple_of(TILE_ROWS) * dim].fill(0.0);
}

/// `c = a b` or `c += a b` for sizes `[m, n, k]`: `m` whole tile rows, `n` whole tile columns.
/// Element `(i, p)` of `a` is `a[i * strides[0] + p * strides[1]]`; `b` is in panels
/// `[n / TILE_COLS][k][TILE_COLS]`, and panels may be longer than `k` rows only if there is one.
#[inline(always)]
fn product<const FMA: bool>(
    [m, n, k]: [usize; 3],
    a: &[f32],
    strides: [usize; 2],
    b: &[f32],
    c: &mut [f32],
    ldc: usize,
    write: Write,
) {
    assert!(m.is_multiple_of(TILE_ROWS) && n.is_multiple_of(TILE_COLS) && m > 0 && k > 0);
    assert!((m - 1) * strides[0] + (k - 1) * strides[1] < a.len());
    for (panel, b) in b.chunks_exact(k * TILE_COLS).take(n / TILE_COLS).enumerate() {
        let (b, _) = b.as_chunks::<TILE_COLS>();
        for i in (0..m).step_by(TILE_ROWS) {
            let c = &mut c[i * ldc + panel * TILE_COLS..];
            tile::<FMA>(&a[i * strides[0]..], strides, b, c, ldc, write);
        }
    }
}

/// One register tile of [`product`]: `c` or `c +=` rows of `a` times the panel `b`.
#[inline(always)]
fn tile<const FMA: bool>(
    a: &[f32],
    strides: [usize; 2],
    b: &[[f32; TILE_COLS]],
    c: &mut [f32],
    ldc: usize,
    write: Write,
) {
    assert!((TILE_ROWS - 1) * strides[0] + (b.len() - 1) * strides[1] < a.len());
    assert!((TILE_ROWS - 1) * ldc + TILE_COLS <= c.len());
    #[cfg(target_arch = "x86_64")]
    if FMA {
        // SAFETY: on x86-64 only copies for AVX2 and wider have fused multiply-add, and the
        // largest indices were checked above.
        unsafe { tile_avx2(a.as_ptr(), strides, b, c.as_mut_ptr(), ldc, write) };
        return;
    }
    let mut acc = [[0.0f32; TILE_COLS]; TILE_ROWS];
    for (p, b) in b.iter().enumerate() {
        for r in 0..TILE_ROWS {
            let a = a[r * strides[0] + p * strides[1]];
            for l in 0..TILE_COLS {
                acc[r][l] = vmath::fma::<FMA>(a, b[l], acc[r][l]);
            }
        }
    }
    for (r, acc) in acc.iter().enumerate() {
        let c = &mut c[r * ldc..][..TILE_COLS];
        crate::elementwise::store(write, c, acc.iter().copied());
    }
}

/// [`tile`] in twelve registers.
///
/// # Safety
/// `a` covers [`TILE_ROWS`] rows of `b.len()` elements at these strides, and `c` as many rows of
/// [`TILE_COLS`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn tile_avx2(a: *const f32, strides: [usize; 2], b: &[[f32; TILE_COLS]], c: *mut f32, ldc: usize, write: Write) {
    use std::arch::x86_64::*;
    let [row, step] = strides;
    let mut acc = [[_mm256_setzero_ps(); 2]; TILE_ROWS];
    let mut a = a;
    for b in b {
        // SAFETY: a panel's row is two registers, and the caller vouches for `a`.
        unsafe {
            let b = [_mm256_loadu_ps(b.as_ptr()), _mm256_loadu_ps(b.as_ptr().add(8))];
            for r in 0..TILE_ROWS {
                let a = _mm256_set1_ps(*a.add(r * row));
                acc[r][0] = _mm256_fmadd_ps(a, b[0], acc[r][0]);
                acc[r][1] = _mm256_fmadd_ps(a, b[1], acc[r][1]);
            }
        }
        a = a.wrapping_add(step);
    }
    for (r, acc) in acc.into_iter().enumerate() {
        for (half, sum) in acc.into_iter().enumerate() {
            // SAFETY: the caller vouches for `c`.
            unsafe {
                let c = c.add(r * ldc + half * 8);
                let sum = match write {
                    Write::Set => sum,
                    Write::Add => _mm256_add_ps(_mm256_loadu_ps(c), sum),
                };
                _mm256_storeu_ps(c, sum);
            }
        }
    }
}
