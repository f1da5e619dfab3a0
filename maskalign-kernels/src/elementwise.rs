//! Element-wise operations, sums over rows, gathering of rows, and mixtures of levels.

use crate::arena::Arena;
use crate::gemm::Act;
use crate::pool::Pool;
use crate::share::{CHUNK, Shared, add_reduced, for_parts, for_ranges, rows_per_task, sum_of2, vectorised};
use crate::vmath;

pub use crate::share::Write;

/// Stores `values` in `y` as `write` says.
#[inline(always)]
pub(crate) fn store(write: Write, y: &mut [f32], values: impl Iterator<Item = f32>) {
    match write {
        Write::Set => {
            for (y, v) in y.iter_mut().zip(values) {
                *y = v;
            }
        }
        Write::Add => {
            for (y, v) in y.iter_mut().zip(values) {
                *y += v;
            }
        }
    }
}

/// Writes `act(x)` to `y` and replaces `x` by `act'(x)`: both in one evaluation, for a backward pass
/// that recomputes the activation.
///
/// # Panics
/// When the lengths differ, as in all functions of this module.
pub fn activation_and_slope(pool: &Pool, act: Act, x: &mut [f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "activation output");
    let y = Shared::new(y);
    for_parts(pool, x, CHUNK, |start, x| {
        // SAFETY: the parts of `x` are disjoint, and so are these.
        activate(act, x, unsafe { y.part(start..start + x.len()) });
    });
}

vectorised! {
    fn activate(act: Act, x: &mut [f32], y: &mut [f32]) {
        match act {
            Act::None => {
                y.copy_from_slice(x);
                x.fill(1.0);
            }
            Act::Gelu => {
                for (y, x) in y.iter_mut().zip(x) {
                    let v = *x;
                    *y = vmath::gelu::<FMA>(v);
                    *x = vmath::gelu_grad::<FMA>(v);
                }
            }
            Act::QuickGelu => {
                for (y, x) in y.iter_mut().zip(x) {
                    let v = *x;
                    *y = vmath::quick_gelu::<FMA>(v);
                    *x = vmath::quick_gelu_grad::<FMA>(v);
                }
            }
        }
    }
}

/// `y = a + b`.
pub fn add(pool: &Pool, a: &[f32], b: &[f32], y: &mut [f32]) {
    assert!(a.len() == y.len() && b.len() == y.len(), "sum");
    for_parts(pool, y, CHUNK, |start, y| add_part(&a[start..], &b[start..], y));
}

/// `y += alpha x`.
pub fn axpy(pool: &Pool, alpha: f32, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "scaled sum");
    for_parts(pool, y, CHUNK, |start, y| axpy_part(alpha, &x[start..], y));
}

/// `y *= x`, element by element.
pub fn multiply(pool: &Pool, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "product");
    for_parts(pool, y, CHUNK, |start, y| multiply_part(&x[start..], y));
}

vectorised! {
    fn add_part(a: &[f32], b: &[f32], y: &mut [f32]) {
        for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
            *y = a + b;
        }
    }

    fn axpy_part(alpha: f32, x: &[f32], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += alpha * x;
        }
    }

    fn multiply_part(x: &[f32], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y *= x;
        }
    }
}

/// `y = x * columns[j] * groups[i / group_rows]` for element `(i, j)` of `[rows, cols]`: the
/// gradient through LayerScale (`columns`) and stochastic depth (`groups` and the rows in each).
/// A factor that is `None` counts as 1.
pub fn scale_rows(
    pool: &Pool,
    x: &[f32],
    cols: usize,
    columns: Option<&[f32]>,
    groups: Option<(&[f32], usize)>,
    y: &mut [f32],
) {
    assert!(x.len() == y.len() && x.len().is_multiple_of(cols.max(1)), "scaled rows");
    assert!(columns.is_none_or(|c| c.len() == cols), "column factors");
    for_parts(pool, y, rows_per_task(cols) * cols, |start, y| {
        for (i, y) in y.chunks_exact_mut(cols).enumerate() {
            let row = start / cols + i;
            let factor = groups.map_or(1.0, |(groups, size)| groups[row / size]);
            scale_row(&x[row * cols..][..cols], factor, columns, y);
        }
    });
}

vectorised! {
    fn scale_row(x: &[f32], factor: f32, columns: Option<&[f32]>, y: &mut [f32]) {
        match columns {
            Some(columns) => {
                for ((y, x), c) in y.iter_mut().zip(x).zip(columns) {
                    *y = x * c * factor;
                }
            }
            None => {
                for (y, x) in y.iter_mut().zip(x) {
                    *y = x * factor;
                }
            }
        }
    }
}

/// Rows that are summed before the sums are added up.
const SUM_ROWS: usize = 64;

/// Adds to `out` `[cols]` the sum of the rows of `x` `[rows, cols]`: the gradient of a bias.
pub fn add_column_sums(pool: &Pool, arena: &Arena, x: &[f32], cols: usize, out: &mut [f32]) {
    assert!(out.len() == cols && x.len().is_multiple_of(cols.max(1)), "column sums");
    add_reduced(pool, arena, x.len() / cols.max(1), SUM_ROWS, out, |range, partial| {
        sum_columns(&x[range.start * cols..range.end * cols], partial);
    });
}

/// `x *= slope` element by element, and adds the column sums of the product to `out` `[cols]`: the
/// gradients of an activation and of the bias before it, in one pass.
pub fn multiply_and_add_column_sums(
    pool: &Pool,
    arena: &Arena,
    slope: &[f32],
    x: &mut [f32],
    cols: usize,
    out: &mut [f32],
) {
    assert!(out.len() == cols && x.len().is_multiple_of(cols.max(1)), "column sums");
    assert_eq!(slope.len(), x.len(), "product");
    let rows = x.len() / cols.max(1);
    let x = Shared::new(x);
    add_reduced(pool, arena, rows, SUM_ROWS, out, |range, partial| {
        let range = range.start * cols..range.end * cols;
        // SAFETY: the ranges of rows are disjoint.
        let x = unsafe { x.part(range.clone()) };
        multiply_part(&slope[range], x);
        sum_columns(x, partial);
    });
}

vectorised! {
    fn sum_columns(x: &[f32], sums: &mut [f32]) {
        // In double precision: gradients that cancel (signs under L1) must leave zero, since AdamW turns what is left
        // of them into whole steps.
        const TILE: usize = 32;
        let cols = sums.len();
        for (tile, sums) in sums.chunks_mut(TILE).enumerate() {
            let mut exact = [0.0f64; TILE];
            for row in x.chunks_exact(cols) {
                for (e, x) in exact.iter_mut().zip(&row[tile * TILE..][..sums.len()]) {
                    *e += f64::from(*x);
                }
            }
            for (s, e) in sums.iter_mut().zip(exact) {
                *s += e as f32;
            }
        }
    }
}

/// Finds a row in the concatenation of several matrices: which matrix, and the row in it.
fn locate(lengths: impl Iterator<Item = usize>, cols: usize, row: u32) -> (usize, usize) {
    let mut row = row as usize;
    for (matrix, length) in lengths.enumerate() {
        let rows = length / cols;
        if row < rows {
            return (matrix, row);
        }
        row -= rows;
    }
    panic!("row index beyond the last matrix");
}

/// `y[i] = row index[i]` of the concatenated `sources`, matrices of `cols` columns: with sources of
/// 3 and 2 rows, 3 is the first row of the second source.
///
/// # Panics
/// When an index lies beyond the last source.
pub fn gather_rows(pool: &Pool, sources: &[&[f32]], cols: usize, index: &[u32], y: &mut [f32]) {
    assert_eq!(y.len(), index.len() * cols, "gathered rows");
    for_parts(pool, y, rows_per_task(cols) * cols.max(1), |start, y| {
        let index = &index[start / cols..];
        for (y, &row) in y.chunks_exact_mut(cols).zip(index) {
            let (source, row) = locate(sources.iter().map(|s| s.len()), cols, row);
            y.copy_from_slice(&sources[source][row * cols..][..cols]);
        }
    });
}

/// Columns that one task of [`scatter_add_rows`] handles: whole cache lines.
const SCATTER_COLS: usize = 64;

/// The gradient of [`gather_rows`]: adds row `i` of `dy` to row `index[i]` of the `targets`. An
/// index may occur many times; its rows are added in order.
///
/// # Panics
/// When an index lies beyond the last target.
pub fn scatter_add_rows(pool: &Pool, dy: &[f32], cols: usize, index: &[u32], targets: &mut [&mut [f32]]) {
    assert_eq!(dy.len(), index.len() * cols, "scattered rows");
    let targets: Vec<(usize, Shared)> = targets.iter_mut().map(|t| (t.len(), Shared::new(t))).collect();
    for_ranges(pool, cols, SCATTER_COLS, |range| {
        for (dy, &row) in dy.chunks_exact(cols).zip(index) {
            let (target, row) = locate(targets.iter().map(|t| t.0), cols, row);
            let at = row * cols;
            // SAFETY: a task touches its own columns, one row at a time.
            let to = unsafe { targets[target].1.part(at + range.start..at + range.end) };
            for (to, dy) in to.iter_mut().zip(&dy[range.clone()]) {
                *to += dy;
            }
        }
    });
}

/// Pixels as the patch embedding reads them.
#[derive(Clone, Copy, Debug)]
pub struct Patches<'a> {
    /// Images `[batch, 3, height, width]`, RGB in 0..1.
    pub images: &'a [f32],
    /// Images in the batch.
    pub batch: usize,
    /// Height in pixels.
    pub height: usize,
    /// Width in pixels.
    pub width: usize,
    /// Side of a patch in pixels; pixels beyond the last whole patch of a row or column are ignored.
    pub patch: usize,
    /// Mean of each channel, subtracted.
    pub mean: [f32; 3],
    /// Standard deviation of each channel, divided by after the mean is subtracted.
    pub std: [f32; 3],
}

impl Patches<'_> {
    /// Values that [`cut_patches`] writes.
    pub fn elements(&self, index: Option<&[u32]>) -> usize {
        let all = self.batch * (self.height / self.patch) * (self.width / self.patch);
        index.map_or(all, <[u32]>::len) * 3 * self.patch * self.patch
    }
}

/// Cuts images into rows `[3 * patch * patch]` (channel, row, column: the order of a convolution's
/// weight), normalised, so that `rows * weight^T` is the patch embedding.
///
/// `index` holds the same number of patches for each image, in row order of the grid, and picks
/// those to cut; without it all patches are cut. `y` is `[batch * patches, 3 * patch * patch]`.
pub fn cut_patches(pool: &Pool, from: Patches, index: Option<&[u32]>, y: &mut [f32]) {
    let Patches { images, batch, height, width, patch, mean, std } = from;
    assert_eq!(images.len(), batch * 3 * height * width, "images");
    let grid_width = width / patch;
    let all = (height / patch) * grid_width;
    let picked = index.map_or(all, |index| index.len() / batch.max(1));
    let cols = 3 * patch * patch;
    assert_eq!(y.len(), batch * picked * cols, "rows of patches");
    assert!(index.is_none_or(|i| i.len() == batch * picked), "patches of each image");
    for_parts(pool, y, rows_per_task(cols) * cols, |start, y| {
        for (i, y) in y.chunks_exact_mut(cols).enumerate() {
            let row = start / cols + i;
            let at = index.map_or(row % picked, |index| index[row] as usize);
            assert!(at < all, "patch index beyond the grid");
            let (top, left) = (at / grid_width * patch, at % grid_width * patch);
            for (line, y) in y.chunks_exact_mut(patch).enumerate() {
                let (channel, line) = (line / patch, line % patch);
                let at = ((row / picked * 3 + channel) * height + top + line) * width + left;
                for (y, x) in y.iter_mut().zip(&images[at..at + patch]) {
                    *y = (x - mean[channel]) / std[channel];
                }
            }
        }
    });
}

/// Elements that [`mix`] takes from all levels at once: they share the L2 cache.
const MIX_BLOCK: usize = 1024;
/// Blocks that one task of [`mix`] handles.
const MIX_BLOCKS: usize = 8;
/// Outputs that are accumulated together in registers.
const MIX_TILE: usize = 4;

/// `outputs[i] = sum_j w[i, j] inputs[j]`: the mix of levels of Dynamic Alignment. `w` is row-major
/// `[outputs, inputs]`; all inputs and outputs have one length. Every input is read once.
pub fn mix(pool: &Pool, w: &[f32], inputs: &[&[f32]], outputs: &mut [&mut [f32]], write: Write) {
    let len = outputs.first().map_or(0, |o| o.len());
    assert_eq!(w.len(), inputs.len() * outputs.len(), "weights of the mix");
    assert!(inputs.iter().all(|i| i.len() == len) && outputs.iter().all(|o| o.len() == len));
    let levels = inputs.len();
    let outputs: Vec<Shared> = outputs.iter_mut().map(|o| Shared::new(o)).collect();
    for_ranges(pool, len, MIX_BLOCK * MIX_BLOCKS, |range| {
        for start in range.clone().step_by(MIX_BLOCK) {
            let block = start..(start + MIX_BLOCK).min(range.end);
            for (w, outputs) in w.chunks(MIX_TILE * levels.max(1)).zip(outputs.chunks(MIX_TILE)) {
                // SAFETY: the blocks are disjoint, and each output is borrowed once.
                let part = |i: usize| unsafe { outputs[i].part(block.clone()) };
                match outputs.len() {
                    1 => mix_block_1(w, inputs, start, &mut [part(0)], write),
                    2 => mix_block_2(w, inputs, start, &mut [part(0), part(1)], write),
                    3 => mix_block_3(w, inputs, start, &mut [part(0), part(1), part(2)], write),
                    _ => mix_block_4(w, inputs, start, &mut [part(0), part(1), part(2), part(3)], write),
                }
            }
        }
    });
}

vectorised! {
    fn mix_block_1(w: &[f32], x: &[&[f32]], start: usize, y: &mut [&mut [f32]; 1], write: Write) {
        mix_block::<FMA, 1>(w, x, start, y, write);
    }
    fn mix_block_2(w: &[f32], x: &[&[f32]], start: usize, y: &mut [&mut [f32]; 2], write: Write) {
        mix_block::<FMA, 2>(w, x, start, y, write);
    }
    fn mix_block_3(w: &[f32], x: &[&[f32]], start: usize, y: &mut [&mut [f32]; 3], write: Write) {
        mix_block::<FMA, 3>(w, x, start, y, write);
    }
    fn mix_block_4(w: &[f32], x: &[&[f32]], start: usize, y: &mut [&mut [f32]; 4], write: Write) {
        mix_block::<FMA, 4>(w, x, start, y, write);
    }
}

#[inline(always)]
fn mix_block<const FMA: bool, const TILE: usize>(
    w: &[f32],
    inputs: &[&[f32]],
    start: usize,
    outputs: &mut [&mut [f32]; TILE],
    write: Write,
) {
    const WIDTH: usize = 16;
    let len = outputs[0].len();
    let levels = inputs.len();
    let whole = len / WIDTH * WIDTH;
    for at in (0..whole).step_by(WIDTH) {
        let mut acc = [[0.0f32; WIDTH]; TILE];
        for (j, x) in inputs.iter().enumerate() {
            let x = &x[start + at..][..WIDTH];
            for t in 0..TILE {
                let w = w[t * levels + j];
                for l in 0..WIDTH {
                    acc[t][l] = vmath::fma::<FMA>(w, x[l], acc[t][l]);
                }
            }
        }
        for t in 0..TILE {
            store(write, &mut outputs[t][at..at + WIDTH], acc[t].iter().copied());
        }
    }
    for at in whole..len {
        for t in 0..TILE {
            let mut sum = 0.0;
            for (j, x) in inputs.iter().enumerate() {
                sum = vmath::fma::<FMA>(w[t * levels + j], x[start + at], sum);
            }
            store(write, &mut outputs[t][at..=at], std::iter::once(sum));
        }
    }
}

/// The gradient of [`mix`] with respect to its inputs: `dinputs[j] += sum_i w[i, j] doutputs[i]` (or
/// set, as `write` says).
pub fn mix_backward_inputs(pool: &Pool, w: &[f32], doutputs: &[&[f32]], dinputs: &mut [&mut [f32]], write: Write) {
    let (rows, cols) = (doutputs.len(), dinputs.len());
    assert_eq!(w.len(), rows * cols, "weights of the mix");
    let mut transposed = vec![0.0; w.len()];
    for i in 0..rows {
        for j in 0..cols {
            transposed[j * rows + i] = w[i * cols + j];
        }
    }
    mix(pool, &transposed, doutputs, dinputs, write);
}

/// The gradient of [`mix`] with respect to its weights, `dw[i, j] += <doutputs[i], inputs[j]>`,
/// summed in f64 over blocks of the data.
pub fn mix_backward_weights(pool: &Pool, arena: &Arena, inputs: &[&[f32]], doutputs: &[&[f32]], dw: &mut [f32]) {
    assert_eq!(dw.len(), inputs.len() * doutputs.len(), "gradient of the mix's weights");
    let len = doutputs.first().map_or(0, |o| o.len());
    assert!(inputs.iter().chain(doutputs).all(|x| x.len() == len), "levels of the mix");
    let levels = inputs.len();
    let chunk = MIX_BLOCK * MIX_BLOCKS;
    add_reduced(pool, arena, len, chunk, dw, |range, partial| {
        for start in range.clone().step_by(MIX_BLOCK) {
            let block = start..(start + MIX_BLOCK).min(range.end);
            for (dy, partial) in doutputs.iter().zip(partial.chunks_exact_mut(levels.max(1))) {
                let dy = &dy[block.clone()];
                let (tiles, rest) = inputs.as_chunks::<DOT_TILE>();
                let (partials, partial_rest) = partial.as_chunks_mut::<DOT_TILE>();
                for (x, sums) in tiles.iter().zip(partials) {
                    dots(dy, x, start, sums);
                }
                for (x, sum) in rest.iter().zip(partial_rest) {
                    *sum += dot(dy, &x[block.clone()]);
                }
            }
        }
    });
}

/// Inner products with one vector that are summed together in registers.
const DOT_TILE: usize = 4;

vectorised! {
    fn dot(a: &[f32], b: &[f32]) -> f32 {
        sum_of2(a, b, |a, b| a * b)
    }

    fn dots(a: &[f32], b: &[&[f32]; DOT_TILE], start: usize, sums: &mut [f32; DOT_TILE]) {
        const WIDTH: usize = 16;
        let (whole, rest) = a.as_chunks::<WIDTH>();
        let tail = a.len() - rest.len();
        let parts = b.map(|b| b[start..start + a.len()].as_chunks::<WIDTH>().0);
        // Spelled out: an array of these arrays would stay in memory.
        let [mut sum0, mut sum1, mut sum2, mut sum3] = [[0.0f32; WIDTH]; DOT_TILE];
        let [part0, part1, part2, part3] = parts;
        for ((((a, b0), b1), b2), b3) in whole.iter().zip(part0).zip(part1).zip(part2).zip(part3) {
            for l in 0..WIDTH {
                sum0[l] = vmath::fma::<FMA>(a[l], b0[l], sum0[l]);
            }
            for l in 0..WIDTH {
                sum1[l] = vmath::fma::<FMA>(a[l], b1[l], sum1[l]);
            }
            for l in 0..WIDTH {
                sum2[l] = vmath::fma::<FMA>(a[l], b2[l], sum2[l]);
            }
            for l in 0..WIDTH {
                sum3[l] = vmath::fma::<FMA>(a[l], b3[l], sum3[l]);
            }
        }
        for (t, lanes) in [sum0, sum1, sum2, sum3].iter().enumerate() {
            let rest: f32 = rest.iter().zip(&b[t][start + tail..]).map(|(a, b)| a * b).sum();
            sums[t] += lanes.iter().sum::<f32>() + rest;
        }
    }
}
