//! Batch norm over rows: the columns of `[rows, cols]` are normalised, each by its own mean and variance.
//!
//! A task handles a few columns of all rows, and sums them in double precision in the order of the rows.

use std::ops::Range;

use crate::pool::Pool;
use crate::share::{Shared, for_ranges, vectorised};

#[cfg(test)]
mod tests;

/// Columns of a task: whole cache lines of each row.
const COLS: usize = 64;
/// Columns whose sums are held in registers.
const TILE: usize = 32;
/// Rows that are summed before the next tile's turn: their part of all columns of a task stays in the L1 cache.
const BLOCK_ROWS: usize = 64;

/// Scale and shift of each column, `[cols]`: 1 and 0 where there are none.
#[derive(Clone, Copy, Debug, Default)]
pub struct Affine<'a> {
    /// The scale.
    pub gamma: Option<&'a [f32]>,
    /// The shift.
    pub beta: Option<&'a [f32]>,
}

/// What normalises the columns, `[cols]` each: a batch's own, from [`column_stats`], or running statistics.
#[derive(Clone, Copy, Debug)]
pub struct ColumnStats<'a> {
    /// The means.
    pub mean: &'a [f32],
    /// The variances. A batch's own are biased: divided by the number of rows.
    pub var: &'a [f32],
    /// What is added to the variances.
    pub eps: f32,
}

/// Where [`batch_norm_backward`] adds the gradients. Those that are `None` are not computed.
#[derive(Debug, Default)]
pub struct BatchNormGrads<'a> {
    /// Of the input, `[rows, cols]`.
    pub dx: Option<&'a mut [f32]>,
    /// Of the scale, `[cols]`.
    pub dgamma: Option<&'a mut [f32]>,
    /// Of the shift, `[cols]`.
    pub dbeta: Option<&'a mut [f32]>,
}

/// Mean and biased variance of each column of `x` `[rows, cols]`, to `mean` and `var` `[cols]`, in two passes in
/// double precision.
///
/// # Panics
/// When the lengths do not fit, or there is no row.
pub fn column_stats(pool: &Pool, x: &[f32], mean: &mut [f32], var: &mut [f32]) {
    let cols = mean.len();
    let rows = row_count(x, cols);
    assert!(rows > 0, "statistics of no rows");
    assert_eq!(var.len(), cols, "variances of the columns");
    let (mean, var) = (Shared::new(mean), Shared::new(var));
    for_ranges(pool, cols, COLS, |range| {
        // SAFETY: the ranges of columns are disjoint.
        let (mean, var) = unsafe { (mean.part(range.clone()), var.part(range.clone())) };
        let mut sums = [0.0; COLS];
        add_columns(x, cols, range.clone(), &mut sums);
        let wide = sums.map(|sum| sum / rows as f64);
        sums = [0.0; COLS];
        add_squares(x, cols, range, &wide, &mut sums);
        for (mean, wide) in mean.iter_mut().zip(wide) {
            *mean = wide as f32;
        }
        for (var, sum) in var.iter_mut().zip(sums) {
            *var = (sum / rows as f64) as f32;
        }
    });
}

/// `y = (x - mean) / sqrt(var + eps) * gamma + beta` for `x` and `y` `[rows, cols]`: PyTorch's `BatchNorm1d`, in
/// training with the statistics that [`column_stats`] found in `x`, in evaluation with running ones.
///
/// # Panics
/// When the lengths do not fit.
pub fn batch_norm(pool: &Pool, x: &[f32], stats: ColumnStats<'_>, affine: Affine<'_>, y: &mut [f32]) {
    let cols = stats.check();
    row_count(x, cols);
    assert_eq!(y.len(), x.len(), "batch norm output");
    check_columns(affine.gamma, cols, "scale of the columns");
    check_columns(affine.beta, cols, "shift of the columns");
    let y = Shared::new(y);
    for_ranges(pool, cols, COLS, |range| {
        let (mean, rstd) = stats.of(&range);
        let gamma = filled(affine.gamma, &range, 1.0);
        let beta = filled(affine.beta, &range, 0.0);
        for (row, x) in x.chunks_exact(cols).enumerate() {
            // SAFETY: the ranges of columns are disjoint, and a task takes one row at a time.
            let y = unsafe { y.part(row * cols + range.start..row * cols + range.end) };
            apply(&x[range.clone()], &mean, &rstd, &gamma, &beta, y);
        }
    });
}

/// Gradient of [`batch_norm`] in training, where the statistics are functions of `x`: from `dy` `[rows, cols]`, added to
/// what `grads` hold. `stats` are those that [`column_stats`] found in `x`.
///
/// # Panics
/// When the lengths do not fit.
pub fn batch_norm_backward(
    pool: &Pool,
    x: &[f32],
    stats: ColumnStats<'_>,
    gamma: Option<&[f32]>,
    dy: &[f32],
    grads: BatchNormGrads<'_>,
) {
    let cols = stats.check();
    let rows = row_count(x, cols);
    assert_eq!(dy.len(), x.len(), "gradient of the output");
    assert!(grads.dx.as_ref().is_none_or(|dx| dx.len() == x.len()), "gradient of the input");
    check_columns(gamma, cols, "scale of the columns");
    check_columns(grads.dgamma.as_deref(), cols, "gradient of the scale");
    check_columns(grads.dbeta.as_deref(), cols, "gradient of the shift");
    let [dx, dgamma, dbeta] = [grads.dx, grads.dgamma, grads.dbeta].map(|grad| grad.map(Shared::new));
    for_ranges(pool, cols, COLS, |range| {
        let (mean, rstd) = stats.of(&range);
        let (mut sums, mut dots) = ([0.0; COLS], [0.0; COLS]);
        add_columns(dy, cols, range.clone(), &mut sums);
        add_products(x, dy, cols, range.clone(), &mean, &rstd, &mut dots);
        for (grad, sums) in [(dgamma, &dots), (dbeta, &sums)] {
            let Some(grad) = grad else { continue };
            // SAFETY: the ranges of columns are disjoint.
            for (to, sum) in unsafe { grad.part(range.clone()) }.iter_mut().zip(sums) {
                *to += *sum as f32;
            }
        }
        let Some(dx) = dx else { return };
        // What remains of dy is orthogonal to the constant column and to the normalised one.
        let [sum, dot] = [sums, dots].map(|sums| sums.map(|sum| (sum / rows as f64) as f32));
        let mut scale = filled(gamma, &range, 1.0);
        for (scale, rstd) in scale.iter_mut().zip(rstd) {
            *scale *= rstd;
        }
        for (row, (x, dy)) in x.chunks_exact(cols).zip(dy.chunks_exact(cols)).enumerate() {
            // SAFETY: the ranges of columns are disjoint, and a task takes one row at a time.
            let dx = unsafe { dx.part(row * cols + range.start..row * cols + range.end) };
            let factors = Factors { mean: &mean, rstd: &rstd, scale: &scale, sum: &sum, dot: &dot };
            add_gradient(&x[range.clone()], &dy[range.clone()], factors, dx);
        }
    });
}

/// Moves running statistics towards a batch's as PyTorch's `BatchNorm1d` does in training:
/// `running = (1 - momentum) running + momentum batch`, with the unbiased variance, divided by `rows - 1`.
///
/// # Panics
/// When the lengths differ, or with fewer than two rows, which have no unbiased variance.
pub fn update_running_stats(
    batch: ColumnStats<'_>,
    rows: usize,
    momentum: f64,
    running_mean: &mut [f32],
    running_var: &mut [f32],
) {
    let cols = batch.check();
    assert!(running_mean.len() == cols && running_var.len() == cols, "running statistics of the columns");
    assert!(rows > 1, "a batch of {rows} rows has no unbiased variance");
    let unbiased = rows as f64 / (rows as f64 - 1.0);
    for (to, from, factor) in [(running_mean, batch.mean, 1.0), (running_var, batch.var, unbiased)] {
        for (to, from) in to.iter_mut().zip(from) {
            *to = (f64::from(*to) * (1.0 - momentum) + f64::from(*from) * factor * momentum) as f32;
        }
    }
}

impl ColumnStats<'_> {
    /// The number of columns.
    fn check(&self) -> usize {
        assert_eq!(self.mean.len(), self.var.len(), "means and variances of the columns");
        self.mean.len()
    }

    /// Means and reciprocal standard deviations of a range of columns.
    fn of(&self, range: &Range<usize>) -> ([f32; COLS], [f32; COLS]) {
        let rstd = filled(Some(self.var), range, 1.0).map(|var| 1.0 / (var + self.eps).sqrt());
        (filled(Some(self.mean), range, 0.0), rstd)
    }
}

/// The elements of a range of columns, or `other` where there are none.
fn filled(values: Option<&[f32]>, range: &Range<usize>, other: f32) -> [f32; COLS] {
    let mut filled = [other; COLS];
    if let Some(values) = values {
        filled[..range.len()].copy_from_slice(&values[range.clone()]);
    }
    filled
}

fn check_columns(values: Option<&[f32]>, cols: usize, what: &str) {
    assert!(values.is_none_or(|values| values.len() == cols), "{what}: expected {cols} elements");
}

fn row_count(x: &[f32], cols: usize) -> usize {
    assert!(cols > 0 && x.len().is_multiple_of(cols), "{} floats in rows of {cols}", x.len());
    x.len() / cols
}

/// Adds `term(column, x, y)` to `sums` for each element of the columns `range` of `x` and `y`, in the order of the
/// rows; `column` counts from the range's first.
#[inline(always)]
fn add_terms(
    x: &[f32],
    y: &[f32],
    cols: usize,
    range: Range<usize>,
    sums: &mut [f64; COLS],
    term: impl Fn(usize, f32, f32) -> f64,
) {
    for (x, y) in x.chunks(BLOCK_ROWS * cols).zip(y.chunks(BLOCK_ROWS * cols)) {
        for first in range.clone().step_by(TILE) {
            let (live, begin) = ((range.end - first).min(TILE), first - range.start);
            let mut tile = [0.0f64; TILE];
            for (x, y) in x.chunks_exact(cols).zip(y.chunks_exact(cols)) {
                let (x, y) = (&x[first..first + live], &y[first..first + live]);
                for (c, sum) in tile[..live].iter_mut().enumerate() {
                    *sum += term(begin + c, x[c], y[c]);
                }
            }
            for (sum, tile) in sums[begin..begin + live].iter_mut().zip(tile) {
                *sum += tile;
            }
        }
    }
}

/// What one row's gradient needs to know of its columns.
#[derive(Clone, Copy)]
struct Factors<'a> {
    mean: &'a [f32; COLS],
    rstd: &'a [f32; COLS],
    /// `gamma * rstd`.
    scale: &'a [f32; COLS],
    /// The mean of `dy`.
    sum: &'a [f32; COLS],
    /// The mean of `dy` times the normalised input.
    dot: &'a [f32; COLS],
}

vectorised! {
    fn add_columns(x: &[f32], cols: usize, range: Range<usize>, sums: &mut [f64; COLS]) {
        add_terms(x, x, cols, range, sums, |_, x, _| f64::from(x));
    }

    fn add_squares(x: &[f32], cols: usize, range: Range<usize>, mean: &[f64; COLS], sums: &mut [f64; COLS]) {
        add_terms(x, x, cols, range, sums, |c, x, _| (f64::from(x) - mean[c]) * (f64::from(x) - mean[c]));
    }

    fn add_products(
        x: &[f32],
        dy: &[f32],
        cols: usize,
        range: Range<usize>,
        mean: &[f32; COLS],
        rstd: &[f32; COLS],
        sums: &mut [f64; COLS],
    ) {
        add_terms(x, dy, cols, range, sums, |c, x, dy| f64::from(dy) * f64::from((x - mean[c]) * rstd[c]));
    }

    fn apply(
        x: &[f32],
        mean: &[f32; COLS],
        rstd: &[f32; COLS],
        gamma: &[f32; COLS],
        beta: &[f32; COLS],
        y: &mut [f32],
    ) {
        let columns = mean.iter().zip(rstd).zip(gamma).zip(beta);
        for ((y, x), (((mean, rstd), gamma), beta)) in y.iter_mut().zip(x).zip(columns) {
            *y = (x - mean) * rstd * gamma + beta;
        }
    }

    fn add_gradient(x: &[f32], dy: &[f32], factors: Factors<'_>, dx: &mut [f32]) {
        let Factors { mean, rstd, scale, sum, dot } = factors;
        let columns = mean.iter().zip(rstd).zip(scale).zip(sum).zip(dot);
        for (((dx, x), dy), ((((mean, rstd), scale), sum), dot)) in dx.iter_mut().zip(x).zip(dy).zip(columns) {
            *dx += scale * (dy - sum - (x - mean) * rstd * dot);
        }
    }
}
