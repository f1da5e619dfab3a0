//! Normalisation of rows: layer norm, L2 norm, standardisation.

use crate::arena::Arena;
use crate::elementwise::Write;
use crate::pool::Pool;
use crate::share::{
    CHUNK, Shared, add_reduced, for_parts, for_ranges, rows_per_task, sum_of, sum_of2, sum_ranges, vectorised,
};

/// Rows whose gradients of gamma and beta are summed before the sums are added up.
const BACKWARD_ROWS: usize = 64;

/// Layer norm of each row of `x` `[rows, cols]`: `(x - mean) / sqrt(var + eps) * gamma + beta`
/// with the biased variance. `gamma` and `beta` are `[cols]`; without them they are 1 and 0.
///
/// `stats` `[rows, 2]` takes each row's mean and `1 / sqrt(var + eps)`, which
/// [`layer_norm_backward`] and [`layer_norm_again`] need.
///
/// # Panics
/// When the lengths do not fit.
#[expect(clippy::too_many_arguments, reason = "operands and shapes of one operator, each named at the call")]
pub fn layer_norm(
    pool: &Pool,
    x: &[f32],
    cols: usize,
    gamma: Option<&[f32]>,
    beta: Option<&[f32]>,
    eps: f32,
    y: &mut [f32],
    stats: Option<&mut [f32]>,
) {
    let rows = row_count(x, cols);
    assert_eq!(y.len(), x.len(), "layer norm output");
    assert!(gamma.is_none_or(|g| g.len() == cols) && beta.is_none_or(|b| b.len() == cols));
    assert!(stats.as_ref().is_none_or(|s| s.len() == 2 * rows), "layer norm statistics");
    let y = Shared::new(y);
    let stats = stats.map(Shared::new);
    for_ranges(pool, rows, rows_per_task(cols), |range| {
        // SAFETY: the ranges of rows are disjoint.
        let y = unsafe { y.part(range.start * cols..range.end * cols) };
        let x = &x[range.start * cols..range.end * cols];
        match &stats {
            Some(stats) => {
                // SAFETY: as above.
                let stats = unsafe { stats.part(range.start * 2..range.end * 2) };
                row_stats(x, cols, eps, stats);
                apply_rows(x, cols, stats, gamma, beta, y);
            }
            None => {
                let mut one = [0.0; 2];
                for (x, y) in x.chunks_exact(cols).zip(y.chunks_exact_mut(cols)) {
                    row_stats(x, cols, eps, &mut one);
                    apply_rows(x, cols, &one, gamma, beta, y);
                }
            }
        }
    });
}

/// The output of [`layer_norm`] once more, bit for bit, from the statistics it returned.
pub fn layer_norm_again(
    pool: &Pool,
    x: &[f32],
    cols: usize,
    gamma: Option<&[f32]>,
    beta: Option<&[f32]>,
    stats: &[f32],
    y: &mut [f32],
) {
    let rows = row_count(x, cols);
    assert_eq!(y.len(), x.len(), "layer norm output");
    assert_eq!(stats.len(), 2 * rows, "layer norm statistics");
    for_parts(pool, y, rows_per_task(cols) * cols, |start, y| {
        let first = start / cols;
        let count = y.len() / cols;
        apply_rows(&x[start..][..y.len()], cols, &stats[2 * first..][..2 * count], gamma, beta, y);
    });
}

/// Gradient of [`layer_norm`]: from `dy` to `dx` (`write` says how), and to `dgamma` and `dbeta`
/// `[cols]` (added to what they hold). `x` and `stats` are the forward's. `dx` may be a gradient
/// that already holds the contributions of other consumers: use [`Write::Add`].
///
/// # Panics
/// When the lengths do not fit.
#[expect(clippy::too_many_arguments, reason = "operands and shapes of one operator, each named at the call")]
pub fn layer_norm_backward(
    pool: &Pool,
    arena: &Arena,
    x: &[f32],
    cols: usize,
    stats: &[f32],
    gamma: Option<&[f32]>,
    dy: &[f32],
    dx: &mut [f32],
    write: Write,
    dgamma: Option<&mut [f32]>,
    dbeta: Option<&mut [f32]>,
) {
    let rows = row_count(x, cols);
    assert!(dy.len() == x.len() && dx.len() == x.len(), "layer norm gradients");
    assert_eq!(stats.len(), 2 * rows, "layer norm statistics");
    let dx = Shared::new(dx);
    let slice_backward = |range: std::ops::Range<usize>, dparams: &mut [f32]| {
        // SAFETY: the ranges of rows are disjoint.
        let dx = unsafe { dx.part(range.start * cols..range.end * cols) };
        let x = &x[range.start * cols..range.end * cols];
        let dy = &dy[range.start * cols..range.end * cols];
        let stats = &stats[2 * range.start..2 * range.end];
        let (dgamma, dbeta) = dparams.split_at_mut(dparams.len() / 2);
        backward_rows(x, cols, stats, gamma, dy, dx, write, dgamma, dbeta);
    };
    if dgamma.is_none() && dbeta.is_none() {
        for_ranges(pool, rows, rows_per_task(cols), |range| slice_backward(range, &mut []));
        return;
    }
    let mut dparams = arena.take_zeroed(2 * cols);
    add_reduced(pool, arena, rows, BACKWARD_ROWS, &mut dparams, slice_backward);
    let (from_gamma, from_beta) = dparams.split_at(cols);
    for (to, from) in [(dgamma, from_gamma), (dbeta, from_beta)] {
        for (to, from) in to.into_iter().flatten().zip(from) {
            *to += from;
        }
    }
}

vectorised! {
    fn row_stats(x: &[f32], cols: usize, eps: f32, stats: &mut [f32]) {
        for (x, stats) in x.chunks_exact(cols).zip(stats.chunks_exact_mut(2)) {
            let mean = sum_of(x, |v| v) / cols as f32;
            let var = sum_of(x, |v| (v - mean) * (v - mean)) / cols as f32;
            stats[0] = mean;
            stats[1] = 1.0 / (var + eps).sqrt();
        }
    }
}

vectorised! {
    fn apply_rows(
        x: &[f32],
        cols: usize,
        stats: &[f32],
        gamma: Option<&[f32]>,
        beta: Option<&[f32]>,
        y: &mut [f32],
    ) {
        let rows = x.chunks_exact(cols).zip(y.chunks_exact_mut(cols)).zip(stats.chunks_exact(2));
        for ((x, y), stats) in rows {
            let (mean, rstd) = (stats[0], stats[1]);
            match (gamma, beta) {
                (Some(gamma), Some(beta)) => {
                    for (((y, x), g), b) in y.iter_mut().zip(x).zip(gamma).zip(beta) {
                        *y = (x - mean) * rstd * g + b;
                    }
                }
                (Some(scale), None) => {
                    for ((y, x), g) in y.iter_mut().zip(x).zip(scale) {
                        *y = (x - mean) * rstd * g;
                    }
                }
                (None, Some(beta)) => {
                    for ((y, x), b) in y.iter_mut().zip(x).zip(beta) {
                        *y = (x - mean) * rstd + b;
                    }
                }
                (None, None) => {
                    for (y, x) in y.iter_mut().zip(x) {
                        *y = (x - mean) * rstd;
                    }
                }
            }
        }
    }
}

vectorised! {
    // Empty `dgamma` and `dbeta` are not wanted.
    fn backward_rows(
        x: &[f32],
        cols: usize,
        stats: &[f32],
        gamma: Option<&[f32]>,
        dy: &[f32],
        dx: &mut [f32],
        write: Write,
        dgamma: &mut [f32],
        dbeta: &mut [f32],
    ) {
        let rows = x.chunks_exact(cols).zip(dy.chunks_exact(cols));
        for (((x, dy), dx), stats) in
            rows.zip(dx.chunks_exact_mut(cols)).zip(stats.chunks_exact(2))
        {
            let (mean, rstd) = (stats[0], stats[1]);
            for ((dgamma, x), dy) in dgamma.iter_mut().zip(x).zip(dy) {
                *dgamma += dy * ((x - mean) * rstd);
            }
            for (dbeta, dy) in dbeta.iter_mut().zip(dy) {
                *dbeta += dy;
            }
            // The gradient by the normalised row is g = dy * gamma; what remains of it is
            // orthogonal to the constant row and to the normalised row.
            let n = cols as f32;
            match gamma {
                Some(gamma) => {
                    let sum = sum_of2(dy, gamma, |dy, g| dy * g) / n;
                    let mut along = [0.0f32; 16];
                    let tail = x.len() / 16 * 16;
                    for i in (0..tail).step_by(16) {
                        let (x, dy, g) = (&x[i..i + 16], &dy[i..i + 16], &gamma[i..i + 16]);
                        for l in 0..16 {
                            along[l] += dy[l] * g[l] * ((x[l] - mean) * rstd);
                        }
                    }
                    let mut dot: f32 = along.iter().sum();
                    for i in tail..x.len() {
                        dot += dy[i] * gamma[i] * ((x[i] - mean) * rstd);
                    }
                    let dot = dot / n;
                    let parts = dx.iter_mut().zip(x).zip(dy).zip(gamma);
                    match write {
                        Write::Set => {
                            for (((dx, x), dy), g) in parts {
                                *dx = rstd * (dy * g - sum - (x - mean) * rstd * dot);
                            }
                        }
                        Write::Add => {
                            for (((dx, x), dy), g) in parts {
                                *dx += rstd * (dy * g - sum - (x - mean) * rstd * dot);
                            }
                        }
                    }
                }
                None => {
                    let sum = sum_of(dy, |dy| dy) / n;
                    let dot = sum_of2(dy, x, |dy, x| dy * ((x - mean) * rstd)) / n;
                    let parts = dx.iter_mut().zip(x).zip(dy);
                    match write {
                        Write::Set => {
                            for ((dx, x), dy) in parts {
                                *dx = rstd * (dy - sum - (x - mean) * rstd * dot);
                            }
                        }
                        Write::Add => {
                            for ((dx, x), dy) in parts {
                                *dx += rstd * (dy - sum - (x - mean) * rstd * dot);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Each row of `x` `[rows, cols]` divided by the larger of its Euclidean norm and 1e-12, as
/// PyTorch's `F.normalize(x, dim=-1)`.
pub fn l2_normalize(pool: &Pool, x: &[f32], cols: usize, y: &mut [f32]) {
    row_count(x, cols);
    assert_eq!(y.len(), x.len(), "l2 normalisation output");
    for_parts(pool, y, rows_per_task(cols) * cols, |start, y| {
        y.copy_from_slice(&x[start..][..y.len()]);
        l2_rows(y, cols);
    });
}

vectorised! {
    fn l2_rows(y: &mut [f32], cols: usize) {
        for y in y.chunks_exact_mut(cols) {
            let norm = sum_of(y, |v| v * v).sqrt();
            let norm = if norm > 1e-12 || norm.is_nan() { norm } else { 1e-12 };
            for y in y {
                *y /= norm;
            }
        }
    }
}

/// What the standardisations add to the variance.
const STANDARDIZE_EPS: f64 = 1e-6;

/// Each row of `x` `[rows, cols]` as `(x - mean) / sqrt(var + 1e-6)` with the unbiased variance:
/// the normalised pixels of MAE. A row of one element has no unbiased variance and gives NaN.
pub fn standardize_rows(pool: &Pool, x: &[f32], cols: usize, y: &mut [f32]) {
    row_count(x, cols);
    assert_eq!(y.len(), x.len(), "standardisation output");
    for_parts(pool, y, rows_per_task(cols) * cols, |start, y| {
        standardize(&x[start..][..y.len()], cols, y);
    });
}

vectorised! {
    fn standardize(x: &[f32], cols: usize, y: &mut [f32]) {
        for (x, y) in x.chunks_exact(cols).zip(y.chunks_exact_mut(cols)) {
            let mean = sum_of(x, |v| v) / cols as f32;
            let var = sum_of(x, |v| (v - mean) * (v - mean)) / (cols as f32 - 1.0);
            let std = (var + STANDARDIZE_EPS as f32).sqrt();
            for (y, x) in y.iter_mut().zip(x) {
                *y = (x - mean) / std;
            }
        }
    }
}

/// The whole of `x` as `(x - mean) / sqrt(var + 1e-6)` with one mean and one unbiased variance,
/// summed in f64: the official code's `bn` target.
pub fn standardize_all(pool: &Pool, x: &[f32], y: &mut [f32]) {
    assert_eq!(y.len(), x.len(), "standardisation output");
    let [sum] = sum_ranges(pool, x.len(), CHUNK, |range| [sum_f64(&x[range])]);
    let mean = sum / x.len() as f64;
    let [squares] = sum_ranges(pool, x.len(), CHUNK, |range| [squares_f64(&x[range], mean)]);
    let std = (squares / (x.len() as f64 - 1.0) + STANDARDIZE_EPS).sqrt();
    for_parts(pool, y, CHUNK, |start, y| shift_scale(&x[start..][..y.len()], mean, std, y));
}

vectorised! {
    fn sum_f64(x: &[f32]) -> f64 {
        let mut lanes = [0.0f64; 16];
        let (blocks, rest) = x.as_chunks::<16>();
        for x in blocks {
            for l in 0..16 {
                lanes[l] += f64::from(x[l]);
            }
        }
        lanes.iter().sum::<f64>() + rest.iter().map(|&x| f64::from(x)).sum::<f64>()
    }
}

vectorised! {
    fn squares_f64(x: &[f32], mean: f64) -> f64 {
        let square = |x: f32| (f64::from(x) - mean) * (f64::from(x) - mean);
        let mut lanes = [0.0f64; 16];
        let (blocks, rest) = x.as_chunks::<16>();
        for x in blocks {
            for l in 0..16 {
                lanes[l] += square(x[l]);
            }
        }
        lanes.iter().sum::<f64>() + rest.iter().map(|&x| square(x)).sum::<f64>()
    }
}

vectorised! {
    fn shift_scale(x: &[f32], mean: f64, std: f64, y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = ((f64::from(*x) - mean) / std) as f32;
        }
    }
}

fn row_count(x: &[f32], cols: usize) -> usize {
    assert!(cols > 0 && x.len().is_multiple_of(cols), "{} floats in rows of {cols}", x.len());
    x.len() / cols
}
