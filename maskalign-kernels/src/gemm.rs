//! Single-precision matrix products with a fused epilogue.
//!
//! `C` is cut into blocks of rows and columns, the tasks of the pool. Inside a task the product runs
//! over panels of the depth (the dimension `k`): a panel of `B` stays in the L1 cache while all rows
//! of the block use it, and the partial sums stay in the L2 cache until the last panel, whose tiles
//! go directly through the epilogue to `C`. Each element is one chain of multiply-adds in ascending
//! depth, so neither the partition nor the number of threads changes a bit.

mod finish;
mod kernel;
mod pack;
pub(crate) mod small;
#[cfg(test)]
mod tests;

use std::cell::Cell;

use crate::arch::{self, Isa};
use crate::pool::Pool;
use finish::{Finish, Out};
use kernel::{ALayout, Kernel, MAX_NR, Output, Panel, kernel};
use pack::Buffer;

/// A strided view of a matrix: element `(i, j)` is `data[i * rs + j * cs]`.
#[derive(Clone, Copy, Debug)]
pub struct MatRef<'a> {
    /// The elements, at least up to that of the last row and column.
    pub data: &'a [f32],
    /// Distance between rows, in elements.
    pub rs: usize,
    /// Distance between columns, in elements.
    pub cs: usize,
}

impl<'a> MatRef<'a> {
    /// Rows of `cols` elements one after another.
    pub fn row_major(data: &'a [f32], cols: usize) -> MatRef<'a> {
        MatRef { data, rs: cols, cs: 1 }
    }

    /// The transposed view.
    #[must_use]
    pub fn t(self) -> MatRef<'a> {
        MatRef { data: self.data, rs: self.cs, cs: self.rs }
    }

    /// Panics unless every element of a matrix of `rows` by `cols` lies inside `data`.
    pub(crate) fn check(&self, name: &str, rows: usize, cols: usize) {
        if rows == 0 || cols == 0 {
            return;
        }
        let last = (rows - 1)
            .checked_mul(self.rs)
            .zip((cols - 1).checked_mul(self.cs))
            .and_then(|(row, col)| row.checked_add(col));
        assert!(
            last.is_some_and(|last| last < self.data.len()),
            "{name} [{rows}, {cols}] with strides {} and {} exceeds its {} elements",
            self.rs,
            self.cs,
            self.data.len()
        );
    }
}

/// A right-hand operand `[k, n]` packed once, for weights that do not change.
pub struct PackedB {
    data: Buffer,
    isa: Isa,
    k: usize,
    n: usize,
}

impl PackedB {
    /// Packs `b` of shape `[k, n]`.
    ///
    /// # Panics
    /// If an element lies outside `b.data`, or the copy would exceed the address space: a view with
    /// strides of 0 may claim any shape.
    pub fn new(b: MatRef, k: usize, n: usize) -> PackedB {
        PackedB::for_isa(arch::isa(), b, k, n)
    }

    fn for_isa(isa: Isa, b: MatRef, k: usize, n: usize) -> PackedB {
        b.check("b", k, n);
        let depth = Depth::new(kernel(isa), k);
        let width = kernel(isa).nr;
        let padded = padded(n, width);
        let mut data = Buffer::default();
        let dst = data.get(packed_len(k, padded));
        for (p0, kc) in depth.panels() {
            let part = pack::Part { p0, count: kc, j0: 0, cols: n };
            let dst = dst[p0 * padded..][..kc * padded].as_mut_ptr();
            // SAFETY: the panels of this depth fill the slice.
            unsafe { pack::panels(isa, b, width, part, dst) };
        }
        PackedB { data, isa, k, n }
    }

    /// Rows of the operand.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Columns of the operand.
    pub fn n(&self) -> usize {
        self.n
    }
}

/// `len`, rounded up to whole panels of `width`.
fn padded(len: usize, width: usize) -> usize {
    len.checked_next_multiple_of(width).unwrap_or_else(|| panic!("an operand of {len} columns is too large to pack"))
}

/// Elements of a packed operand of depth `k`, checked for overflow, since unsafe code fills a buffer of this length.
fn packed_len(k: usize, padded: usize) -> usize {
    k.checked_mul(padded).unwrap_or_else(|| panic!("an operand of [{k}, {padded}] is too large to pack"))
}

/// The right-hand operand of [`gemm`].
#[derive(Clone, Copy)]
pub enum Rhs<'a> {
    /// A view, packed by the call.
    Strided(MatRef<'a>),
    /// Packed beforehand.
    Packed(&'a PackedB),
}

/// The activation in an [`Epilogue`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Act {
    /// The identity.
    #[default]
    None,
    /// The exact GELU, [`vmath::gelu`](crate::vmath::gelu).
    Gelu,
    /// CLIP's `x sigmoid(1.702 x)`, [`crate::vmath::quick_gelu`].
    QuickGelu,
}

/// What is done with a finished element of `C = A B`, in the order of the fields.
#[derive(Default)]
pub struct Epilogue<'a> {
    /// Added to each row, `[n]`.
    pub bias: Option<&'a [f32]>,
    /// Where the value before the activation is kept, row-major `[m, n]`.
    pub pre: Option<&'a mut [f32]>,
    /// Applied to each element.
    pub act: Act,
    /// Factor of each column (LayerScale), `[n]`.
    pub col_scale: Option<&'a [f32]>,
    /// Factors of groups of rows (stochastic depth per sample) and the rows in a group.
    pub row_scale: Option<(&'a [f32], usize)>,
    /// Added to each element, row-major `[m, n]`.
    pub residual: Option<&'a [f32]>,
    /// Whether the result is added to `C` instead of replacing it.
    pub accumulate: bool,
}

/// `C = epilogue(A B)` for `A` `[m, k]`, `B` `[k, n]` and `C` `[m, n]` with rows `ldc` apart, on all
/// threads of the pool. The bits of the result do not depend on the number of threads.
///
/// # Panics
/// If an operand is shorter than its shape and strides say or too large to pack, a packed `B` has
/// another shape, or the rows of `C` overlap.
#[expect(clippy::too_many_arguments, reason = "operands and shapes of one operator, each named at the call")]
pub fn gemm(pool: &Pool, m: usize, n: usize, k: usize, a: MatRef, b: Rhs, c: &mut [f32], ldc: usize, ep: Epilogue) {
    gemm_on(arch::isa(), pool, m, n, k, a, b, c, ldc, ep);
}

/// The peak throughput of `threads` threads of `pool`, in 10^9 floating-point operations a second:
/// the best of a few bursts of independent multiply-adds in registers.
pub fn fma_peak_gflops(threads: usize, pool: &Pool) -> f64 {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::{Duration, Instant};

    const BURSTS: usize = 6;
    const ROUNDS: usize = 400_000;
    let threads = threads.clamp(1, pool.threads());
    let isa = arch::isa();
    let mut best = 0.0_f64;
    for _ in 0..BURSTS {
        let arrived = AtomicUsize::new(0);
        let spans = std::sync::Mutex::new(Vec::with_capacity(threads));
        pool.run(threads, &|_| {
            // One burst to a thread: each waits for the others, but not forever.
            arrived.fetch_add(1, Ordering::SeqCst);
            let patience = Instant::now();
            while arrived.load(Ordering::SeqCst) < threads && patience.elapsed() < Duration::from_millis(20) {
                std::hint::spin_loop();
            }
            let begin = Instant::now();
            let operations = kernel::fma_rounds(isa, ROUNDS);
            let end = Instant::now();
            if let Ok(mut spans) = spans.lock() {
                spans.push((begin, end, operations));
            }
        });
        let spans = spans.into_inner().unwrap_or_default();
        let begin = spans.iter().map(|span| span.0).min();
        let end = spans.iter().map(|span| span.1).max();
        if let (Some(begin), Some(end)) = (begin, end) {
            let operations: f64 = spans.iter().map(|span| span.2).sum();
            best = best.max(operations / (end - begin).as_secs_f64() / 1e9);
        }
    }
    best
}

/// Rows of a task: the panels of `A` fill about a fifth of the L2 cache.
const BLOCK_ROWS: usize = 96;
/// Rows of a task where the product is small.
const SMALLEST_BLOCK_ROWS: usize = 36;
/// The least number of tasks that a large enough product is cut into.
const LEAST_TASKS: usize = 24;
/// Columns of a task: the partial sums fill about a quarter of the L2 cache.
const BLOCK_COLS: usize = 384;
/// A product deeper than this that only adds to `C` is computed in parts, to bound the packed copies.
const MAX_DEPTH: usize = 2048;
/// Elements of `B` or `A` packed by one task.
const PACK_TASK: usize = 1 << 15;

thread_local! {
    /// The packed operands of the product that this thread has begun.
    static PACKED: Cell<[Buffer; 2]> = Cell::default();
    /// The partial sums of the task that this thread runs, and its copy of rows of `A`.
    static BLOCK: Cell<[Buffer; 2]> = Cell::default();
}

/// How the depth `k` is cut into panels; depends on `k` and the instruction set alone.
#[derive(Clone, Copy)]
struct Depth {
    k: usize,
    kc: usize,
}

impl Depth {
    fn new(kernel: &Kernel, k: usize) -> Depth {
        let panels = k.div_ceil(kernel.kc).max(1);
        Depth { k, kc: k.div_ceil(panels).next_multiple_of(8) }
    }

    /// First row and number of rows of each panel; one empty panel where `k` is 0.
    fn panels(self) -> impl Iterator<Item = (usize, usize)> {
        let Depth { k, kc } = self;
        (0..k.div_ceil(kc.max(1)).max(1)).map(move |i| (i * kc, (k - i * kc).min(kc)))
    }

    fn count(self) -> usize {
        self.k.div_ceil(self.kc.max(1)).max(1)
    }
}

/// A range `0..len` cut into blocks of almost equal size that are multiples of `unit`.
#[derive(Clone, Copy)]
struct Blocks {
    len: usize,
    size: usize,
}

impl Blocks {
    fn new(len: usize, largest: usize, unit: usize) -> Blocks {
        let count = len.div_ceil(largest).max(1);
        Blocks { len, size: len.div_ceil(count).next_multiple_of(unit).max(unit) }
    }

    /// As [`new`](Self::new), but smaller until `groups` times the count reaches `LEAST_TASKS` and is
    /// even: two equal threads then finish together. Depends on the shape alone.
    fn balanced(len: usize, largest: usize, unit: usize, groups: usize) -> Blocks {
        let mut blocks = Blocks::new(len, largest, unit);
        while blocks.size >= SMALLEST_BLOCK_ROWS + unit {
            let tasks = blocks.count() * groups;
            if tasks >= LEAST_TASKS && tasks.is_multiple_of(2) {
                break;
            }
            blocks.size -= unit;
        }
        blocks
    }

    fn count(self) -> usize {
        self.len.div_ceil(self.size)
    }

    fn get(self, index: usize) -> (usize, usize) {
        let begin = index * self.size;
        (begin, (self.len - begin).min(self.size))
    }
}

/// The left-hand operand as the tasks read it.
#[derive(Clone, Copy)]
enum Lhs<'a> {
    /// In place: rows of adjacent elements.
    Rows { data: &'a [f32], stride: usize },
    /// As `Rows`, but the stride maps many rows to the same cache sets: copied by each task.
    CopiedRows { data: &'a [f32], stride: usize },
    /// Packed strips; the panel that begins at depth `p0` lies at `p0 * padded`.
    Strips { data: &'a [f32], padded: usize },
}

/// Everything that the tasks of one product share.
struct Product<'a> {
    kernel: &'static Kernel,
    rows: Blocks,
    cols: Blocks,
    depth: Depth,
    a: Lhs<'a>,
    b: &'a [f32],
    /// Columns of `b`, with its last panel padded.
    padded: usize,
    finish: Finish<'a>,
}

#[expect(clippy::too_many_arguments, reason = "operands and shapes of one operator, each named at the call")]
fn gemm_on(
    isa: Isa,
    pool: &Pool,
    m: usize,
    n: usize,
    k: usize,
    a: MatRef,
    b: Rhs,
    c: &mut [f32],
    ldc: usize,
    ep: Epilogue,
) {
    if m == 0 || n == 0 {
        return;
    }
    a.check("a", m, k);
    match b {
        Rhs::Strided(b) => b.check("b", k, n),
        Rhs::Packed(b) => {
            assert!((b.k, b.n, b.isa) == (k, n, isa), "packed b is [{}, {}], expected [{k}, {n}]", b.k, b.n);
        }
    }
    assert!(ldc >= n || m == 1, "rows of c of {n} elements overlap: they are {ldc} apart");
    MatRef { data: c, rs: ldc, cs: 1 }.check("c", m, n);
    let long_enough = |name: &str, slice: Option<&[f32]>, len: usize| {
        if let Some(slice) = slice {
            assert!(slice.len() >= len, "{name} has {} elements, expected {len}", slice.len());
        }
    };
    long_enough("bias", ep.bias, n);
    long_enough("pre", ep.pre.as_deref(), m * n);
    long_enough("col_scale", ep.col_scale, n);
    long_enough("residual", ep.residual, m * n);
    if let Some((scale, rows)) = ep.row_scale {
        assert!(rows > 0, "row_scale covers no rows");
        long_enough("row_scale", Some(scale), m.div_ceil(rows));
    }

    let only_adds = ep.bias.is_none()
        && ep.pre.is_none()
        && ep.act == Act::None
        && ep.col_scale.is_none()
        && ep.row_scale.is_none()
        && ep.residual.is_none();
    let mut finish = Finish {
        bias: ep.bias,
        pre: ep.pre.map(|pre| Out(pre.as_mut_ptr())),
        act: ep.act,
        col_scale: ep.col_scale,
        row_scale: ep.row_scale,
        residual: ep.residual,
        accumulate: ep.accumulate,
        n,
        c: Out(c.as_mut_ptr()),
        ldc,
    };
    match b {
        Rhs::Packed(b) => product(isa, pool, m, n, k, a, None, Some(b), finish),
        Rhs::Strided(b) if k > MAX_DEPTH && only_adds => {
            let parts = Blocks::new(k, MAX_DEPTH, 8);
            for part in 0..parts.count() {
                let (p0, depth) = parts.get(part);
                let a = MatRef { data: &a.data[p0 * a.cs..], ..a };
                let b = MatRef { data: &b.data[p0 * b.rs..], ..b };
                product(isa, pool, m, n, depth, a, Some(b), None, finish);
                finish.accumulate = true;
            }
        }
        Rhs::Strided(b) => product(isa, pool, m, n, k, a, Some(b), None, finish),
    }
}

/// Packs what needs packing and runs the blocks; the caller has checked the operands.
#[expect(clippy::too_many_arguments, reason = "operands and shapes of one operator, each named at the call")]
fn product(
    isa: Isa,
    pool: &Pool,
    m: usize,
    n: usize,
    k: usize,
    a: MatRef,
    strided_b: Option<MatRef>,
    packed_b: Option<&PackedB>,
    finish: Finish,
) {
    let kernel = kernel(isa);
    let depth = Depth::new(kernel, k);
    let [mut a_buffer, mut b_buffer] = PACKED.take();

    let strips = a.cs != 1 && k > 1;
    let a_jobs = PackJobs::new(kernel.mr, m, depth, strips.then(|| a.t()));
    let b_jobs = PackJobs::new(kernel.nr, n, depth, strided_b);
    let a_out = Out(a_buffer.get(a_jobs.len()).as_mut_ptr());
    let b_out = Out(b_buffer.get(b_jobs.len()).as_mut_ptr());
    let (a_tasks, b_tasks) = (a_jobs.count(), b_jobs.count());
    pool.run(a_tasks + b_tasks, &|task| {
        // SAFETY: the buffers have the lengths asked for, and each task has a range of its own.
        unsafe {
            if task < b_tasks {
                b_jobs.run(isa, task, b_out);
            } else {
                a_jobs.run(isa, task - b_tasks, a_out);
            }
        }
    });

    let cols = Blocks::new(n, BLOCK_COLS, kernel.nr);
    let product = Product {
        kernel,
        rows: Blocks::balanced(m, BLOCK_ROWS, kernel.mr, cols.count()),
        cols,
        depth,
        a: if strips {
            Lhs::Strips { data: a_buffer.as_slice(), padded: a_jobs.padded }
        } else if collides(a.rs) && n > 4 * kernel.nr {
            Lhs::CopiedRows { data: a.data, stride: a.rs }
        } else {
            // Without depth there is no element to point at.
            Lhs::Rows { data: a.data, stride: if k == 0 { 0 } else { a.rs } }
        },
        b: packed_b.map_or(b_buffer.as_slice(), |b| b.data.as_slice()),
        padded: b_jobs.padded,
        finish,
    };
    let col_blocks = product.cols.count();
    pool.run(product.rows.count() * col_blocks, &|task| {
        let [mut sums, mut copy] = BLOCK.take();
        // SAFETY: the operands were checked against the shape, and no other task has this block.
        unsafe { product.block(task / col_blocks, task % col_blocks, &mut sums, &mut copy) };
        BLOCK.set([sums, copy]);
    });
    PACKED.set([a_buffer, b_buffer]);
}

/// Whether rows `stride` elements apart map to few cache sets, as with multiples of 4 KiB.
fn collides(stride: usize) -> bool {
    stride >= 1024 && stride.is_multiple_of(1024)
}

/// The packing of one operand, cut into tasks.
struct PackJobs<'a> {
    /// `[k, len]`, nothing where no packing is needed.
    source: Option<MatRef<'a>>,
    width: usize,
    depth: Depth,
    chunks: Blocks,
    padded: usize,
}

impl<'a> PackJobs<'a> {
    fn new(width: usize, len: usize, depth: Depth, source: Option<MatRef<'a>>) -> PackJobs<'a> {
        let chunk = (PACK_TASK / depth.kc.max(1)).max(width);
        PackJobs {
            source: source.filter(|_| depth.k > 0),
            width,
            depth,
            chunks: Blocks::new(len, chunk, width),
            padded: padded(len, width),
        }
    }

    fn count(&self) -> usize {
        if self.source.is_some() { self.depth.count() * self.chunks.count() } else { 0 }
    }

    fn len(&self) -> usize {
        if self.source.is_some() { packed_len(self.depth.k, self.padded) } else { 0 }
    }

    /// # Safety
    /// `out` covers [`len`](Self::len) elements, and no one else uses those of this task.
    unsafe fn run(&self, isa: Isa, task: usize, out: Out) {
        let Some(source) = self.source else { return };
        let p0 = task / self.chunks.count() * self.depth.kc;
        let kc = (self.depth.k - p0).min(self.depth.kc);
        let (j0, cols) = self.chunks.get(task % self.chunks.count());
        let part = pack::Part { p0, count: kc, j0, cols };
        // SAFETY: the panels of these columns begin at `j0 * kc`, as `j0` is a multiple of their
        // width, and other tasks have other columns or another depth.
        unsafe {
            let dst = out.0.add(p0 * self.padded + j0 * kc);
            pack::panels(isa, source, self.width, part, dst);
        }
    }
}

impl Product<'_> {
    /// Computes and stores one block of `C`.
    ///
    /// # Safety
    /// The operands cover the shape, and no other thread uses this block of the outputs.
    unsafe fn block(&self, row_block: usize, col_block: usize, sums: &mut Buffer, copy: &mut Buffer) {
        let Kernel { isa, mr, nr, .. } = *self.kernel;
        let (i0, rows) = self.rows.get(row_block);
        let (j0, cols) = self.cols.get(col_block);
        let panels = self.depth.count();
        let in_registers = self.finish.in_registers();
        // Between panels of the depth the sums of the whole block are kept, after the last those of
        // one panel of columns until they go through the epilogue.
        let tile_len = mr * nr;
        let strips = rows.div_ceil(mr);
        let kept = if panels > 1 { cols.div_ceil(nr) } else { 1 };
        let sums = sums.get(kept * strips * tile_len);
        for (index, (p0, kc)) in self.depth.panels().enumerate() {
            let last = index + 1 == panels;
            // SAFETY: row `i0` and depth `p0` lie inside the operand.
            let (a, layout, a_strip) = match self.a {
                Lhs::Rows { data, stride } => {
                    let a = data[i0 * stride + p0..].as_ptr();
                    (a, ALayout::Rows { stride }, mr * stride)
                }
                Lhs::CopiedRows { data, stride } => {
                    // An odd number of lines apart, the rows spread over all sets.
                    let row = (kc.div_ceil(16) | 1) * 16;
                    let copy = copy.get(rows * row);
                    for i in 0..rows {
                        let src = &data[(i0 + i) * stride + p0..][..kc];
                        copy[i * row..][..kc].copy_from_slice(src);
                    }
                    (copy.as_ptr(), ALayout::Rows { stride: row }, mr * row)
                }
                Lhs::Strips { data, padded } => {
                    let a = data[p0 * padded + i0 * kc..].as_ptr();
                    (a, ALayout::Strips, mr * kc)
                }
            };
            for (panel, j) in (0..cols).step_by(nr).enumerate() {
                let width = (cols - j).min(nr);
                let b = self.b[p0 * self.padded + (j0 + j) * kc..].as_ptr();
                let sums = &mut sums[panel % kept * strips * tile_len..][..strips * tile_len];
                let output = match (last, in_registers && width == nr) {
                    (false, _) => Output::Sums,
                    (true, false) => self.finish.soon(i0, j0 + j),
                    (true, true) => Output::Direct(self.finish.direct(i0, j0 + j)),
                };
                // A tile takes whole vectors, so the last columns' bias is filled up.
                let mut some = [0.0; MAX_NR];
                let bias = match self.finish.bias.filter(|_| last) {
                    None => std::ptr::null(),
                    Some(bias) if width == nr => bias[j0 + j..][..nr].as_ptr(),
                    Some(bias) => {
                        some[..width].copy_from_slice(&bias[j0 + j..][..width]);
                        some.as_ptr()
                    }
                };
                let panel = Panel {
                    kc,
                    a,
                    layout,
                    a_strip,
                    a_far: panel == 0,
                    b,
                    b_next: b.wrapping_add(kc * nr),
                    rows,
                    cols: width,
                    acc: sums.as_mut_ptr(),
                    first: index == 0,
                    bias,
                    output,
                };
                // SAFETY: `a` has `rows` rows and `b` `nr` columns of depth kc, `sums` holds whole
                // strips, and a direct panel has `nr` columns inside the block.
                unsafe { (self.kernel.panel)(&panel) };
                if matches!(output, Output::Soon { .. }) {
                    // SAFETY: the block of the outputs is ours.
                    unsafe {
                        self.finish.tiles(isa, &mut sums[..rows * nr], i0, j0 + j, width);
                    }
                }
            }
        }
    }
}
