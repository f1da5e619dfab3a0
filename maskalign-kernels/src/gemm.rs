//! Single-precision matrix products with a fused epilogue.
//!
//! `C` is cut into blocks of rows and columns, the tasks of the pool. Inside a task the product
//! runs over panels of the depth: a panel of `B` stays in the first cache while the rows of the block
//! pass by it, and the partial sums stay in the second cache until the last panel, whose tiles go
//! through the epilogue to `C` at once. Each element is one chain of multiply-adds in ascending
//! depth, so neither the partition nor the number of threads changes a bit.

mod kernel;
pub(crate) mod pack;

use std::cell::Cell;

use crate::arch::{self, Isa};
use crate::pool::Pool;
use crate::vmath;
use kernel::{ALayout, Direct, Kernel, Output, Panel, kernel};
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
    pub fn t(self) -> MatRef<'a> {
        MatRef { data: self.data, rs: self.cs, cs: self.rs }
    }

    /// Panics unless every element of a matrix of `rows` by `cols` lies inside `data`.
    fn check(&self, name: &str, rows: usize, cols: usize) {
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
    /// If an element lies outside `b.data`.
    pub fn new(b: MatRef, k: usize, n: usize) -> PackedB {
        PackedB::for_isa(arch::isa(), b, k, n)
    }

    fn for_isa(isa: Isa, b: MatRef, k: usize, n: usize) -> PackedB {
        b.check("b", k, n);
        let depth = Depth::new(kernel(isa), k);
        let width = kernel(isa).nr;
        let padded = n.next_multiple_of(width);
        let mut data = Buffer::default();
        let dst = data.get(k * padded);
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

    /// Memory held, in bytes.
    pub fn bytes(&self) -> usize {
        size_of_val(self.data.as_slice())
    }
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
    /// The exact GELU, [`vmath::gelu`].
    Gelu,
    /// CLIP's `x sigmoid(1.702 x)`, [`vmath::quick_gelu`].
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
/// If an operand is shorter than its shape and strides say, a packed `B` has another shape, or the
/// rows of `C` overlap.
pub fn gemm(
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
    gemm_on(arch::isa(), Some(pool), m, n, k, a, b, c, ldc, 1.0, ep);
}

/// `C = alpha A B`, or `C += alpha A B`, on the calling thread; shapes and panics as in [`gemm`].
///
/// Meant for small products inside the tasks of a pool; scratch memory belongs to the thread and is
/// reused.
pub fn gemm_st(
    m: usize,
    n: usize,
    k: usize,
    alpha: f32,
    a: MatRef,
    b: MatRef,
    c: &mut [f32],
    ldc: usize,
    accumulate: bool,
) {
    let ep = Epilogue { accumulate, ..Epilogue::default() };
    gemm_on(arch::isa(), None, m, n, k, a, Rhs::Strided(b), c, ldc, alpha, ep);
}

/// The arithmetic peak of `threads` threads of `pool`, in 10^9 floating-point operations a second:
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
        pool.run(threads, &|_, _| {
            // One burst to a thread: each waits for the others, but not forever.
            arrived.fetch_add(1, Ordering::SeqCst);
            let patience = Instant::now();
            while arrived.load(Ordering::SeqCst) < threads
                && patience.elapsed() < Duration::from_millis(20)
            {
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

/// Rows of a task: the panels of `A` fill about a fifth of the second cache.
const BLOCK_ROWS: usize = 96;
/// Rows of a task where the product is small.
const SMALLEST_BLOCK_ROWS: usize = 36;
/// Tasks that a product is cut into where it is large enough.
const LEAST_TASKS: usize = 24;
/// Columns of a task: the partial sums fill about a quarter of the second cache.
const BLOCK_COLS: usize = 384;
/// A product deeper than this that only adds to `C` is done in parts, to bound the packed copies.
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

/// A pointer that tasks write through, each to elements of its own.
#[derive(Clone, Copy)]
struct Out(*mut f32);

// SAFETY: whoever writes through it vouches that no two threads touch the same element.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

/// [`Epilogue`] with shared outputs.
#[derive(Clone, Copy)]
struct Finish<'a> {
    alpha: f32,
    bias: Option<&'a [f32]>,
    pre: Option<Out>,
    act: Act,
    col_scale: Option<&'a [f32]>,
    row_scale: Option<(&'a [f32], usize)>,
    residual: Option<&'a [f32]>,
    accumulate: bool,
    n: usize,
    c: Out,
    ldc: usize,
}

/// Everything that the tasks of one product share.
struct Product<'a> {
    kernel: &'static Kernel,
    rows: Blocks,
    cols: Blocks,
    depth: Depth,
    a: Lhs<'a>,
    b: &'a [f32],
    /// Columns of `b` with its last panel filled up.
    padded: usize,
    finish: Finish<'a>,
}

fn gemm_on(
    isa: Isa,
    pool: Option<&Pool>,
    m: usize,
    n: usize,
    k: usize,
    a: MatRef,
    b: Rhs,
    c: &mut [f32],
    ldc: usize,
    alpha: f32,
    ep: Epilogue,
) {
    if m == 0 || n == 0 {
        return;
    }
    a.check("a", m, k);
    match b {
        Rhs::Strided(b) => b.check("b", k, n),
        Rhs::Packed(b) => assert!(
            (b.k, b.n, b.isa) == (k, n, isa),
            "packed b is [{}, {}], expected [{k}, {n}]",
            b.k,
            b.n
        ),
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
        alpha,
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

/// Packs what needs packing and runs the blocks; the operands are checked.
fn product(
    isa: Isa,
    pool: Option<&Pool>,
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
    let run = |tasks: usize, f: &(dyn Fn(usize, usize) + Sync)| match pool {
        Some(pool) => pool.run(tasks, f),
        None => (0..tasks).for_each(|task| f(task, 0)),
    };
    let [mut a_buffer, mut b_buffer] = PACKED.take();

    let strips = a.cs != 1 && k > 1;
    let a_jobs = PackJobs::new(kernel.mr, m, depth, strips.then(|| a.t()));
    let b_jobs = PackJobs::new(kernel.nr, n, depth, strided_b);
    let a_out = Out(a_buffer.get(a_jobs.len()).as_mut_ptr());
    let b_out = Out(b_buffer.get(b_jobs.len()).as_mut_ptr());
    let (a_tasks, b_tasks) = (a_jobs.count(), b_jobs.count());
    run(a_tasks + b_tasks, &|task, _| {
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
    // One thread has nothing to balance.
    let groups = if pool.is_some() { cols.count() } else { LEAST_TASKS };
    let product = Product {
        kernel,
        rows: Blocks::balanced(m, BLOCK_ROWS, kernel.mr, groups),
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
    run(product.rows.count() * col_blocks, &|task, _| {
        let [mut sums, mut copy] = BLOCK.take();
        // SAFETY: the operands were checked against the shape, and no other task has this block.
        unsafe { product.block(task / col_blocks, task % col_blocks, &mut sums, &mut copy) };
        BLOCK.set([sums, copy]);
    });
    PACKED.set([a_buffer, b_buffer]);
}

/// Whether rows `stride` elements apart fall on few sets of the caches: a multiple of 4 KiB.
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
            padded: len.next_multiple_of(width),
        }
    }

    fn count(&self) -> usize {
        if self.source.is_some() { self.depth.count() * self.chunks.count() } else { 0 }
    }

    fn len(&self) -> usize {
        if self.source.is_some() { self.depth.k * self.padded } else { 0 }
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
        let in_registers = self.kernel.direct && self.finish.in_registers();
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

impl Finish<'_> {
    /// Whether [`Direct`] can express the epilogue.
    fn in_registers(&self) -> bool {
        self.pre.is_none()
            && self.act == Act::None
            && self.col_scale.is_none()
            && self.row_scale.is_none()
            && !(self.accumulate && self.residual.is_some())
    }

    /// The epilogue from `(i0, j0)`, where [`in_registers`](Self::in_registers).
    fn direct(&self, i0: usize, j0: usize) -> Direct {
        let c = self.c.0.wrapping_add(i0 * self.ldc + j0);
        let (add, add_stride) = match self.residual {
            Some(residual) => (residual.as_ptr().wrapping_add(i0 * self.n + j0), self.n),
            None if self.accumulate => (c.cast_const(), self.ldc),
            None => (std::ptr::null(), 0),
        };
        Direct {
            c,
            ldc: self.ldc,
            alpha: self.alpha,
            bias: self.bias.map_or(std::ptr::null(), |bias| bias.as_ptr().wrapping_add(j0)),
            add,
            add_stride,
        }
    }

    /// What the epilogue from `(i0, j0)` will read and write.
    fn soon(&self, i0: usize, j0: usize) -> Output {
        let Direct { c, ldc, add, add_stride, .. } = self.direct(i0, j0);
        Output::Soon { c, ldc, add, add_stride }
    }

    /// Applies the epilogue to finished tiles below each other and stores them.
    ///
    /// # Safety
    /// The tiles lie inside the outputs, and no other thread uses them.
    unsafe fn tiles(&self, isa: Isa, tile: &mut [f32], i0: usize, j0: usize, cols: usize) {
        let place = Place { i0, j0, cols };
        // SAFETY: `isa` is available here; the outputs are as the caller says.
        unsafe {
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => finish_avx512(self, tile, place),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => finish_avx2(self, tile, place),
                Isa::Neon => finish_any::<16, { cfg!(target_arch = "aarch64") }>(self, tile, place),
                _ => finish_any::<8, false>(self, tile, place),
            }
        }
    }
}

/// Where tiles begin in `C` and how many of their columns count.
#[derive(Clone, Copy)]
struct Place {
    i0: usize,
    j0: usize,
    cols: usize,
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn finish_avx512(finish: &Finish, tile: &mut [f32], place: Place) {
    // SAFETY: passed on.
    unsafe { finish_any::<32, true>(finish, tile, place) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn finish_avx2(finish: &Finish, tile: &mut [f32], place: Place) {
    // SAFETY: passed on.
    unsafe { finish_any::<16, true>(finish, tile, place) }
}

/// # Safety
/// As for [`Finish::tiles`].
#[inline(always)]
unsafe fn finish_any<const NR: usize, const FMA: bool>(
    finish: &Finish,
    tile: &mut [f32],
    place: Place,
) {
    // SAFETY: passed on.
    unsafe {
        if place.cols == NR {
            finish_body::<NR, FMA, true>(finish, tile, place);
        } else {
            finish_body::<NR, FMA, false>(finish, tile, place);
        }
    }
}

/// `FULL` says that all columns count.
///
/// # Safety
/// As for [`Finish::tiles`].
#[inline(always)]
unsafe fn finish_body<const NR: usize, const FMA: bool, const FULL: bool>(
    finish: &Finish,
    tile: &mut [f32],
    place: Place,
) {
    let Place { i0, j0, cols } = place;
    let load = |src: &[f32]| -> [f32; NR] {
        let mut row = [0.0; NR];
        if FULL {
            row.copy_from_slice(&src[..NR]);
        } else {
            row[..cols].copy_from_slice(&src[..cols]);
        }
        row
    };
    // SAFETY (for its callers): the row segment lies inside the output and is ours.
    let store = |dst: *mut f32, row: &[f32; NR]| unsafe {
        if FULL {
            dst.cast::<[f32; NR]>().write_unaligned(*row);
        } else {
            std::slice::from_raw_parts_mut(dst, cols).copy_from_slice(&row[..cols]);
        }
    };
    // Several passes over rows that stay in the first cache: a simple loop vectorises best.
    let rows = tile.as_chunks_mut::<NR>().0;
    if finish.alpha != 1.0 {
        for x in rows.as_flattened_mut() {
            *x *= finish.alpha;
        }
    }
    if let Some(bias) = finish.bias {
        let bias = load(&bias[j0..]);
        for row in rows.iter_mut() {
            for j in 0..NR {
                row[j] += bias[j];
            }
        }
    }
    if let Some(pre) = finish.pre {
        for (i, row) in rows.iter().enumerate() {
            store(pre.0.wrapping_add((i0 + i) * finish.n + j0), row);
        }
    }
    match finish.act {
        Act::None => {}
        Act::Gelu => {
            for x in rows.as_flattened_mut() {
                *x = vmath::gelu::<FMA>(*x);
            }
        }
        Act::QuickGelu => {
            for x in rows.as_flattened_mut() {
                *x = vmath::quick_gelu::<FMA>(*x);
            }
        }
    }
    if let Some(scale) = finish.col_scale {
        let scale = load(&scale[j0..]);
        for row in rows.iter_mut() {
            for j in 0..NR {
                row[j] *= scale[j];
            }
        }
    }
    for (i, row) in rows.iter_mut().enumerate() {
        let i = i0 + i;
        if let Some((scale, group)) = finish.row_scale {
            let scale = scale[i / group];
            for x in row.iter_mut() {
                *x *= scale;
            }
        }
        if let Some(residual) = finish.residual {
            let residual = load(&residual[i * finish.n + j0..]);
            for j in 0..NR {
                row[j] += residual[j];
            }
        }
        let c = finish.c.0.wrapping_add(i * finish.ldc + j0);
        if finish.accumulate {
            // SAFETY: the row segment lies inside `C` and is ours.
            let old = load(unsafe { std::slice::from_raw_parts(c, cols) });
            for j in 0..NR {
                row[j] += old[j];
            }
        }
        store(c, row);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers in `-1..1` from a linear congruential generator.
    fn random(len: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    /// Those of this machine, and the portable code in the size for NEON, which runs anywhere.
    fn instruction_sets() -> impl Iterator<Item = Isa> {
        Isa::all_available().filter(|&isa| isa != Isa::Neon).chain([Isa::Neon])
    }

    /// Storage and strides of a matrix of a given shape.
    #[derive(Clone, Copy, Debug)]
    enum Order {
        Rows,
        Columns,
        PaddedRows,
        Scattered,
    }

    const ORDERS: [Order; 4] = [Order::Rows, Order::Columns, Order::PaddedRows, Order::Scattered];

    impl Order {
        fn strides(self, rows: usize, cols: usize) -> (usize, usize) {
            match self {
                Order::Rows => (cols, 1),
                Order::Columns => (1, rows),
                Order::PaddedRows => (cols + 5, 1),
                Order::Scattered => (2, 2 * rows + 3),
            }
        }

        fn make(self, rows: usize, cols: usize, seed: u64) -> Vec<f32> {
            let (rs, cs) = self.strides(rows, cols);
            let last = rows.saturating_sub(1) * rs + cols.saturating_sub(1) * cs;
            random(last + 1, seed)
        }

        fn view(self, data: &[f32], rows: usize, cols: usize) -> MatRef<'_> {
            let (rs, cs) = self.strides(rows, cols);
            MatRef { data, rs, cs }
        }
    }

    /// The product in double precision, and the sum of the magnitudes for the tolerance.
    fn oracle(m: usize, n: usize, k: usize, a: MatRef, b: MatRef) -> Vec<(f64, f64)> {
        let mut c = Vec::with_capacity(m * n);
        for i in 0..m {
            for j in 0..n {
                let terms = (0..k).map(|p| {
                    f64::from(a.data[i * a.rs + p * a.cs]) * f64::from(b.data[p * b.rs + j * b.cs])
                });
                c.push(terms.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs())));
            }
        }
        c
    }

    fn assert_close(what: &dyn std::fmt::Debug, got: f32, want: f64, scale: f64) {
        let error = (f64::from(got) - want).abs();
        assert!(error <= 4e-6 * (1.0 + scale), "{what:?}: {got}, expected {want}");
    }

    #[test]
    fn every_instruction_set_multiplies_every_shape_and_order() {
        let shapes = [
            (1, 1, 1), (1, 7, 3), (7, 1, 5), (2, 3, 0), (5, 8, 1), (6, 16, 64), (13, 33, 9),
            (12, 32, 257), (59, 59, 64), (97, 40, 31), (25, 17, 513), (100, 401, 33),
        ];
        let pool = Pool::new(2);
        for isa in instruction_sets() {
            for (m, n, k) in shapes {
                for order_a in ORDERS {
                    for order_b in ORDERS {
                        let what = (isa, m, n, k, order_a, order_b);
                        let (a, b) = (order_a.make(m, k, 1), order_b.make(k, n, 2));
                        let (a, b) = (order_a.view(&a, m, k), order_b.view(&b, k, n));
                        let ldc = n + 3;
                        let before = random(m * ldc, 3);
                        let mut c = before.clone();
                        let ep = Epilogue { accumulate: true, ..Epilogue::default() };
                        gemm_on(isa, None, m, n, k, a, Rhs::Strided(b), &mut c, ldc, 0.5, ep);
                        let mut plain = before.clone();
                        let ep = Epilogue::default();
                        let strided = Rhs::Strided(b);
                        gemm_on(isa, Some(&pool), m, n, k, a, strided, &mut plain, ldc, 1.0, ep);
                        for (i, row) in oracle(m, n, k, a, b).chunks(n).enumerate() {
                            for (j, &(want, scale)) in row.iter().enumerate() {
                                let at = i * ldc + j;
                                let added = f64::from(before[at]) + 0.5 * want;
                                assert_close(&what, c[at], added, scale);
                                assert_close(&what, plain[at], want, scale);
                            }
                            let gap = i * ldc + n..(i + 1) * ldc;
                            assert_eq!(c[gap.clone()], before[gap], "{what:?} wrote between rows");
                        }
                    }
                }
            }
        }
    }

    /// The epilogue in double precision.
    fn finish_oracle(x: f64, ep: &Epilogue, old: f32, i: usize, j: usize, n: usize) -> (f64, f64) {
        let pre = x + ep.bias.map_or(0.0, |bias| f64::from(bias[j]));
        let mut y = match ep.act {
            Act::None => pre,
            // The approximation is tested in `vmath` against PyTorch.
            Act::Gelu => f64::from(vmath::gelu::<false>(pre as f32)),
            Act::QuickGelu => pre / (1.0 + (-1.702 * pre).exp()),
        };
        y *= ep.col_scale.map_or(1.0, |scale| f64::from(scale[j]));
        y *= ep.row_scale.map_or(1.0, |(scale, rows)| f64::from(scale[i / rows]));
        y += ep.residual.map_or(0.0, |residual| f64::from(residual[i * n + j]));
        (pre, if ep.accumulate { y + f64::from(old) } else { y })
    }

    #[test]
    fn every_epilogue_option_applies_in_order_alone_and_together() {
        let pool = Pool::new(2);
        for isa in instruction_sets() {
            for (m, n, k) in [(25, 39, 70), (14, 64, 300)] {
                let (a, b) = (random(m * k, 1), random(k * n, 2));
                let (a, b) = (MatRef::row_major(&a, k), MatRef::row_major(&b, n));
                let packed = PackedB::for_isa(isa, b, k, n);
                let (bias, col_scale, row_scale) = (random(n, 3), random(n, 4), random(m, 5));
                let residual = random(m * n, 6);
                let before = random(m * n, 7);
                let product = oracle(m, n, k, a, b);
                for options in 0..96 {
                    let on = |bit: usize| options >> bit & 1 == 1;
                    let acts = [Act::None, Act::Gelu, Act::QuickGelu];
                    let mut pre = vec![f32::NAN; m * n];
                    let mut c = before.clone();
                    let make = || Epilogue {
                        bias: on(0).then_some(&bias),
                        pre: None,
                        act: acts[options / 32],
                        col_scale: on(1).then_some(&col_scale),
                        row_scale: on(2).then_some((&row_scale, 4)),
                        residual: on(3).then_some(&residual),
                        accumulate: on(4),
                    };
                    let keep = options % 3 == 0;
                    let ep = Epilogue { pre: keep.then_some(&mut pre), ..make() };
                    let b = Rhs::Packed(&packed);
                    gemm_on(isa, Some(&pool), m, n, k, a, b, &mut c, n, 1.0, ep);
                    for (at, &(x, scale)) in product.iter().enumerate() {
                        let what = (isa, m, options, at);
                        let (i, j) = (at / n, at % n);
                        let (want_pre, want) = finish_oracle(x, &make(), before[at], i, j, n);
                        assert_close(&what, c[at], want, scale);
                        if keep {
                            assert_close(&what, pre[at], want_pre, scale);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_bits_do_not_depend_on_the_number_of_threads() {
        let pools = [Pool::new(1), Pool::new(2), Pool::new(3)];
        for isa in instruction_sets() {
            for (m, n, k, transposed) in [(197, 400, 300, false), (150, 192, 2100, true)] {
                let (a, b) = (random(m * k, 1), random(k * n, 2));
                let a = if transposed { MatRef::row_major(&a, m).t() } else { MatRef::row_major(&a, k) };
                let b = MatRef::row_major(&b, n);
                let packed = PackedB::for_isa(isa, b, k, n);
                let results = pools.iter().flat_map(|pool| {
                    [Rhs::Strided(b), Rhs::Packed(&packed)].map(|b| {
                        let mut c = vec![0.25; m * n];
                        let ep = Epilogue { accumulate: !transposed, ..Epilogue::default() };
                        gemm_on(isa, Some(pool), m, n, k, a, b, &mut c, n, 1.0, ep);
                        c.into_iter().map(f32::to_bits).collect::<Vec<_>>()
                    })
                });
                let results: Vec<_> = results.collect();
                for pair in results.chunks(2) {
                    assert_eq!(pair[0], results[0], "{isa:?} {m} {n} {k}");
                    assert_eq!(pair[1], results[1], "{isa:?} {m} {n} {k}");
                }
            }
        }
    }

    #[test]
    fn a_large_product_agrees_with_double_precision() {
        let (m, n, k) = (197, 768, 768);
        let (a, w) = (random(m * k, 1), random(n * k, 2));
        let (a, b) = (MatRef::row_major(&a, k), MatRef::row_major(&w, k).t());
        let mut c = vec![0.0; m * n];
        let pool = Pool::new(2);
        gemm(&pool, m, n, k, a, Rhs::Strided(b), &mut c, n, Epilogue::default());
        let largest = oracle(m, n, k, a, b)
            .iter()
            .zip(&c)
            .map(|(want, &got)| (want.0 - f64::from(got)).abs())
            .fold(0.0, f64::max);
        assert!(largest < 5e-5, "largest error {largest}");
    }

    #[test]
    #[should_panic(expected = "a [3, 4] with strides 4 and 1 exceeds its 11 elements")]
    fn a_short_operand_is_refused() {
        let (a, b, mut c) = (vec![0.0; 11], vec![0.0; 8], vec![0.0; 6]);
        gemm_st(3, 2, 4, 1.0, MatRef::row_major(&a, 4), MatRef::row_major(&b, 2), &mut c, 2, false);
    }

    #[test]
    #[should_panic(expected = "overlap")]
    fn overlapping_rows_of_the_result_are_refused() {
        let (a, b, mut c) = (vec![0.0; 12], vec![0.0; 8], vec![0.0; 6]);
        gemm_st(3, 2, 4, 1.0, MatRef::row_major(&a, 4), MatRef::row_major(&b, 2), &mut c, 1, false);
    }
}
