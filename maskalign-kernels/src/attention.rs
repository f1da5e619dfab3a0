//! Multi-head attention that never stores a `[batch, heads, queries, keys]` array.
//!
//! One task computes one head of one image. It takes the queries in blocks whose scores against all
//! keys stay in the cache, and multiplies with the register tiles of the matrix product. The forward
//! pass keeps each row's log-sum-exp, from which the backward pass computes the probabilities again
//! (as FlashAttention does, arXiv 2205.14135).

use crate::arch::isa;
use crate::arena::Arena;
use crate::elementwise::Write;
use crate::gemm::MatRef;
use crate::gemm::small::{LANES, Small};
use crate::pool::Pool;
use crate::share::{Shared, max_of, sum_of, sum_of2, vectorised};
use crate::vmath;

/// Queries whose scores the forward pass holds at once, in the L1 cache: whole tiles of 12 or 6.
const FORWARD_BLOCK: usize = 24;
/// The same for the backward pass, which sums over the queries of a block.
const BACKWARD_BLOCK: usize = 48;

/// The sizes of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Images.
    pub batch: usize,
    /// Attention heads.
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
        len_of([self.heads, self.head_dim])
    }

    /// Length of the array of log-sum-exps, `[batch, heads, queries]`.
    pub fn lse_len(&self) -> usize {
        len_of([self.batch, self.heads, self.queries])
    }

    /// Rows of queries, of all images.
    fn query_rows(&self) -> usize {
        len_of([self.batch, self.queries])
    }

    /// Rows of keys, of all images.
    fn key_rows(&self) -> usize {
        len_of([self.batch, self.keys])
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

/// The product of sizes, checked: an overflow could wrap to the length of a slice that is far smaller than the shape.
fn len_of<const N: usize>(sizes: [usize; N]) -> usize {
    let product = sizes.into_iter().try_fold(1, usize::checked_mul);
    product.unwrap_or_else(|| panic!("an attention of sizes {sizes:?} exceeds the address space"))
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

    /// A head's rows from `row` on, `[.., head_dim]`.
    #[inline(always)]
    fn rows(&self, row: usize, head: usize, head_dim: usize) -> MatRef<'a> {
        let first = row * self.row_stride + self.offset + head * head_dim;
        MatRef { data: &self.data[first..], rs: self.row_stride, cs: 1 }
    }

    /// `head_dim` channels of a head.
    #[inline(always)]
    fn row(&self, row: usize, head: usize, head_dim: usize) -> &'a [f32] {
        &self.rows(row, head, head_dim).data[..head_dim]
    }

    fn check(&self, rows: usize, dim: usize, what: &str) {
        assert!(
            self.offset.checked_add(dim).is_some_and(|end| end <= self.row_stride)
                && len_of([rows, self.row_stride]) <= self.data.len(),
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
    /// As [`Shared::part`]: only one borrower of a head's row at a time.
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
        let (query_rows, key_rows) = (shape.query_rows(), shape.key_rows());
        match self {
            QkvGrad::Fused(qkv) => {
                assert_eq!(shape.queries, shape.keys, "a fused projection has equal tokens");
                assert_eq!(qkv.len(), len_of([query_rows, 3, dim]), "gradient of queries, keys and values");
                let data = Shared::new(qkv);
                [0, 1, 2].map(|part| HeadsMut::new(data, 3 * dim, part * dim))
            }
            QkvGrad::Cross { q, kv } => {
                assert_eq!(q.len(), len_of([query_rows, dim]), "gradient of the queries");
                assert_eq!(kv.len(), len_of([key_rows, 2, dim]), "gradient of keys and values");
                let kv = Shared::new(kv);
                let q = HeadsMut::new(Shared::new(q), dim, 0);
                [q, HeadsMut::new(kv, 2 * dim, 0), HeadsMut::new(kv, 2 * dim, dim)]
            }
            QkvGrad::Separate { q, k, v } => {
                assert_eq!(q.len(), len_of([query_rows, dim]), "gradient of the queries");
                assert!(k.len() == len_of([key_rows, dim]) && v.len() == k.len(), "gradient of the keys");
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
#[expect(clippy::too_many_arguments, reason = "operands and shapes of one operator, each named at the call")]
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
    assert_eq!(out.len(), len_of([shape.query_rows(), dim]), "attention output");
    assert!(lse.as_ref().is_none_or(|lse| lse.len() == shape.lse_len()), "attention log-sums");
    let out = HeadsMut::new(Shared::new(out), dim, 0);
    let lse = lse.map(Shared::new);
    let sizes = Sizes::new(&shape, FORWARD_BLOCK);
    pool.run(shape.batch * shape.heads, &|task| {
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
#[expect(clippy::too_many_arguments, reason = "operands and shapes of one operator, each named at the call")]
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
    assert_eq!(out.len(), len_of([shape.query_rows(), dim]), "attention output");
    assert_eq!(dout.len(), out.len(), "gradient of the attention output");
    assert_eq!(lse.len(), shape.lse_len(), "attention log-sums");
    let grad = grad.views(&shape);
    let (out, dout) = (Heads::separate(out, dim), Heads::separate(dout, dim));
    let sizes = Sizes::new(&shape, BACKWARD_BLOCK);
    pool.run(shape.batch * shape.heads, &|task| {
        let mut scratch = arena.take(sizes.backward_scratch());
        let lse = &lse[task * shape.queries..(task + 1) * shape.queries];
        let head = Head { shape, sizes, image: task / shape.heads, head: task % shape.heads };
        backward_head(head, [q, k, v, out, dout], lse, grad, write, &mut scratch);
    });
}

/// The attention of each image's first query: its probabilities over all keys but the first, averaged
/// over the heads, to `out` `[batch, keys - 1]`. With the class token first, this is the weight of
/// each patch in attentive masking. `q` needs one row for each image, `query_rows` apart.
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
    k.check(shape.key_rows(), shape.dim(), "keys");
    let patches = shape.keys - 1;
    assert_eq!(out.len(), len_of([shape.batch, patches]), "attention of CLS");
    let out = Shared::new(out);
    pool.run(shape.batch, &|image| {
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
    q.check(shape.query_rows(), shape.dim(), "queries");
    k.check(shape.key_rows(), shape.dim(), "keys");
    v.check(shape.key_rows(), shape.dim(), "values");
}

/// Padded sizes of one head's scratch memory.
#[derive(Clone, Copy)]
struct Sizes {
    /// The products.
    small: Small,
    /// Keys, rounded up to whole columns: the stride of a row of scores.
    keys_padded: usize,
    /// Channels, rounded up to whole columns.
    dim_padded: usize,
    /// Queries of a block.
    block: usize,
    keys: usize,
    dim: usize,
}

impl Sizes {
    fn new(shape: &AttentionShape, block: usize) -> Self {
        Self {
            small: Small::new(isa()),
            keys_padded: shape.keys.next_multiple_of(LANES),
            dim_padded: shape.head_dim.next_multiple_of(LANES),
            block: shape.queries.clamp(1, block),
            keys: shape.keys,
            dim: shape.head_dim,
        }
    }

    /// A row of scores for each query.
    fn scores(&self) -> usize {
        self.block * self.keys_padded
    }

    /// Keys or values `[dim, keys]`, packed.
    fn by_key(&self) -> usize {
        self.small.packed_len(self.dim, self.keys)
    }

    /// Keys or values `[keys, dim]`, packed.
    fn by_channel(&self) -> usize {
        self.small.packed_len(self.keys, self.dim)
    }

    /// A block of queries, plain rows.
    fn query_rows(&self) -> usize {
        self.block * self.dim
    }

    /// A block of queries, packed.
    fn queries_packed(&self) -> usize {
        self.small.packed_len(self.block, self.dim)
    }

    /// A block of outputs.
    fn outputs(&self) -> usize {
        self.block * self.dim_padded
    }

    /// Sums for each key.
    fn key_sums(&self) -> usize {
        self.keys * self.dim_padded
    }

    fn forward_scratch(&self) -> usize {
        self.by_key() + self.by_channel() + self.query_rows() + self.outputs() + self.scores()
    }

    fn backward_scratch(&self) -> usize {
        2 * self.by_key()
            + self.by_channel()
            + self.query_rows()
            + 2 * self.queries_packed()
            + self.outputs()
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

    /// Keys or values `[keys, head_dim]`.
    #[inline(always)]
    fn keys<'a>(&self, from: Heads<'a>) -> MatRef<'a> {
        from.rows(self.image * self.shape.keys, self.head, self.shape.head_dim)
    }

    /// Rows of queries or outputs `[count, head_dim]` from `query` on.
    #[inline(always)]
    fn queries<'a>(&self, from: Heads<'a>, query: usize) -> MatRef<'a> {
        from.rows(self.image * self.shape.queries + query, self.head, self.shape.head_dim)
    }
}

/// Takes the first `len` floats off `scratch`.
#[expect(clippy::mut_mut, reason = "the rest is handed back in place")]
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
        let result = cut(&mut rest, sizes.outputs());
        let scores = cut(&mut rest, sizes.scores());
        let mut lse = lse;

        let (small, stride, width) = (sizes.small, sizes.keys_padded, sizes.dim_padded);
        small.pack(head.keys(k).t(), shape.head_dim, shape.keys, keys_by_key);
        small.pack(head.keys(v), shape.keys, shape.head_dim, values);
        for first in (0..shape.queries).step_by(sizes.block) {
            let count = sizes.block.min(shape.queries - first);
            scaled_rows(count, shape.head_dim, shape.scale(), |i| head.query(q, first + i), q_rows);
            let rows = MatRef::row_major(q_rows, shape.head_dim);
            small.multiply([count, stride, shape.head_dim], rows, keys_by_key, scores, stride, Write::Set);
            let mut inverse_sums = [0.0f32; FORWARD_BLOCK];
            for i in 0..count {
                let row = &mut scores[i * stride..][..stride];
                row[shape.keys..].fill(f32::NEG_INFINITY);
                let (largest, sum) = exponentials::<FMA>(row);
                inverse_sums[i] = 1.0 / sum;
                if let Some(lse) = &mut lse {
                    lse[first + i] = largest + sum.ln();
                }
            }
            let probabilities = MatRef::row_major(scores, stride);
            small.multiply([count, width, shape.keys], probabilities, values, result, width, Write::Set);
            for i in 0..count {
                let row = head.image * shape.queries + first + i;
                // SAFETY: a head of an image belongs to one task.
                let to = unsafe { out.row(row, head.head, shape.head_dim) };
                for (to, from) in to.iter_mut().zip(&result[i * width..]) {
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
        let q_packed = cut(&mut rest, sizes.queries_packed());
        let dout_packed = cut(&mut rest, sizes.queries_packed());
        let dq = cut(&mut rest, sizes.outputs());
        let probs = cut(&mut rest, sizes.scores());
        let dscores = cut(&mut rest, sizes.scores());
        let dk = cut(&mut rest, sizes.key_sums());
        let dv = cut(&mut rest, sizes.key_sums());

        let (small, stride, width) = (sizes.small, sizes.keys_padded, sizes.dim_padded);
        small.pack(head.keys(k).t(), dim, shape.keys, keys_by_key);
        small.pack(head.keys(v).t(), dim, shape.keys, values_by_key);
        small.pack(head.keys(k), shape.keys, dim, keys_by_channel);
        dk.fill(0.0);
        dv.fill(0.0);
        for first in (0..shape.queries).step_by(sizes.block) {
            let count = sizes.block.min(shape.queries - first);
            scaled_rows(count, dim, scale, |i| head.query(q, first + i), q_rows);
            let (q_rows, dout_rows) = (MatRef::row_major(q_rows, dim), head.queries(dout, first));
            small.pack(q_rows, count, dim, q_packed);
            small.pack(dout_rows, count, dim, dout_packed);
            small.multiply([count, stride, dim], q_rows, keys_by_key, probs, stride, Write::Set);
            small.multiply([count, stride, dim], dout_rows, values_by_key, dscores, stride, Write::Set);
            for i in 0..count {
                // What comes of the padding is not used.
                let probs = &mut probs[i * stride..][..stride];
                let dscores = &mut dscores[i * stride..][..stride];
                let (dout, out) = (head.query(dout, first + i), head.query(out, first + i));
                let mean = sum_of2(dout, out, |d, o| d * o);
                let lse = lse[first + i];
                for (p, d) in probs.iter_mut().zip(dscores) {
                    *p = vmath::exp::<FMA>(*p - lse);
                    *d = *p * (*d - mean);
                }
            }
            let (probs, dscores) = (MatRef::row_major(probs, stride), MatRef::row_major(dscores, stride));
            small.multiply([shape.keys, width, count], probs.t(), dout_packed, dv, width, Write::Add);
            // The packed queries are scaled: the factor of the scores is in.
            small.multiply([shape.keys, width, count], dscores.t(), q_packed, dk, width, Write::Add);
            small.multiply([count, width, shape.keys], dscores, keys_by_channel, dq, width, Write::Set);
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
                put(write, to, &sums[key * width..], 1.0);
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

/// Replaces each score by `e^(score - largest)`; returns the largest score and the sum. The number of
/// scores is a multiple of the vector width.
#[inline(always)]
fn exponentials<const FMA: bool>(scores: &mut [f32]) -> (f32, f32) {
    let (scores, _) = scores.as_chunks_mut::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for s in scores.iter() {
        for l in 0..LANES {
            lanes[l] = if s[l] > lanes[l] { s[l] } else { lanes[l] };
        }
    }
    let largest = lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sums = [0.0; LANES];
    for s in scores.iter_mut() {
        for l in 0..LANES {
            s[l] = vmath::exp::<FMA>(s[l] - largest);
            sums[l] += s[l];
        }
    }
    (largest, sums.iter().sum())
}

/// Copies `count` rows times `factor`.
#[inline(always)]
fn scaled_rows<'a>(count: usize, dim: usize, factor: f32, from: impl Fn(usize) -> &'a [f32], to: &mut [f32]) {
    for row in 0..count {
        for (to, from) in to[row * dim..][..dim].iter_mut().zip(from(row)) {
            *to = from * factor;
        }
    }
}
