//! Matrix products in double precision, for what is solved to its optimum.
//!
//! The result is cut into blocks of rows, the tasks of the pool. Inside a task the product runs over panels of the depth: the
//! rows' part of a panel is packed once, and columns go by in packed tiles that stay in the L1 cache. The sums of a panel are
//! chains of multiply-adds in ascending depth, and panels are added in their order: neither the partition nor the number of
//! threads changes a bit.

use crate::gemm::MatRef;
use crate::pool::Pool;
use crate::share::{Shared, for_ranges, vectorised};

/// Rows and columns of a tile: its sums are in registers.
const TILE: (usize, usize) = (6, 8);
/// Rows of a task.
const ROWS: usize = 8 * TILE.0;
/// Depth of a panel.
const PANEL: usize = 256;

/// Adds `A B` to `C`, for `A` `[m, k]` in single precision and `B` `[k, n]` and `C` `[m, n]` in double precision, row by row.
/// The bits of the result do not depend on the number of threads.
///
/// # Panics
/// If `a` is shorter than its shape and strides say, or `b` or `c` has another length than its shape.
pub fn add_product_in_double(pool: &Pool, [m, n, k]: [usize; 3], a: MatRef, b: &[f64], c: &mut [f64]) {
    a.check("a", m, k);
    assert!(Some(b.len()) == k.checked_mul(n) && Some(c.len()) == m.checked_mul(n), "b is [k, n], and c is [m, n]");
    if n == 0 {
        return;
    }
    let rows = Shared::new(c);
    for_ranges(pool, m, ROWS, |range| {
        // SAFETY: the ranges are disjoint, and so are their rows.
        let c = unsafe { rows.part(range.start * n..range.end * n) };
        let mut packed_a = vec![0.0; ROWS * PANEL];
        let mut packed_b = vec![0.0; TILE.1 * PANEL];
        for from in (0..k).step_by(PANEL) {
            let depth = PANEL.min(k - from);
            pack_rows(a, range.start, range.len(), from, depth, &mut packed_a);
            for column in (0..n).step_by(TILE.1) {
                let columns = TILE.1.min(n - column);
                let tile = &mut packed_b[..TILE.1 * depth];
                for (values, row) in tile.chunks_exact_mut(TILE.1).zip(b[from * n..].chunks(n)) {
                    values[..columns].copy_from_slice(&row[column..column + columns]);
                    values[columns..].fill(0.0);
                }
                add_tiles(&packed_a, tile, depth, c, n, column);
            }
        }
    });
}

/// Tiles of rows one after another, each by its depth: what is beyond the last row is zero.
fn pack_rows(a: MatRef, first: usize, rows: usize, from: usize, depth: usize, packed: &mut [f64]) {
    for (tile, packed) in packed.chunks_exact_mut(TILE.0 * depth).take(rows.div_ceil(TILE.0)).enumerate() {
        for (p, values) in packed.chunks_exact_mut(TILE.0).enumerate() {
            for (i, value) in values.iter_mut().enumerate() {
                let row = tile * TILE.0 + i;
                *value = match row < rows {
                    true => f64::from(a.data[(first + row) * a.rs + (from + p) * a.cs]),
                    false => 0.0,
                };
            }
        }
    }
}

vectorised! {
    /// Adds the products of packed tiles of rows and one of columns to `c`, whose rows have `n` values, at `column`.
    fn add_tiles(packed_a: &[f64], packed_b: &[f64], depth: usize, c: &mut [f64], n: usize, column: usize) {
        let columns = TILE.1.min(n - column);
        for (a, rows) in packed_a.chunks_exact(TILE.0 * depth).zip(c.chunks_mut(TILE.0 * n)) {
            let mut sums = [[0.0f64; TILE.1]; TILE.0];
            let (a, b) = (a.as_chunks::<{ TILE.0 }>().0, packed_b.as_chunks::<{ TILE.1 }>().0);
            for (a, b) in a.iter().zip(b) {
                for i in 0..TILE.0 {
                    for j in 0..TILE.1 {
                        sums[i][j] = if FMA { a[i].mul_add(b[j], sums[i][j]) } else { a[i] * b[j] + sums[i][j] };
                    }
                }
            }
            for (sums, row) in sums.iter().zip(rows.chunks_exact_mut(n)) {
                for (value, sum) in row[column..column + columns].iter_mut().zip(sums) {
                    *value += sum;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against sums one by one, for sizes beside those of tiles, panels and tasks, and a transposed operand.
    #[test]
    fn a_product_is_that_of_its_definition_on_any_number_of_threads() {
        let mut state = 1u64;
        let mut draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / f64::from(1 << 24) as f32 - 0.5
        };
        for [m, n, k] in [[1, 1, 1], [7, 9, 5], [ROWS + 1, TILE.1 + 3, PANEL + 2], [2 * ROWS, 3, 2 * PANEL], [3, 4, 0]]
        {
            let a: Vec<f32> = (0..m * k).map(|_| draw()).collect();
            let b: Vec<f64> = (0..k * n).map(|_| f64::from(draw())).collect();
            let before: Vec<f64> = (0..m * n).map(|_| f64::from(draw())).collect();
            for transposed in [false, true] {
                let view = match transposed {
                    false => MatRef { data: &a, rs: k, cs: 1 },
                    true => MatRef { data: &a, rs: 1, cs: m },
                };
                let [one, three] = [1, 3].map(|threads| {
                    let mut c = before.clone();
                    add_product_in_double(&Pool::new(threads), [m, n, k], view, &b, &mut c);
                    c
                });
                assert_eq!(one, three, "{m} {n} {k}");
                for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                    let product = |p: usize| f64::from(a[i * view.rs + p * view.cs]) * b[p * n + j];
                    let expected = before[i * n + j] + (0..k).map(product).sum::<f64>();
                    assert!((one[i * n + j] - expected).abs() < 1e-12, "{m} {n} {k}: {i} {j}");
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "b is [k, n]")]
    fn another_shape_is_refused() {
        let a = MatRef::row_major(&[1.0, 2.0], 2);
        add_product_in_double(&Pool::new(1), [1, 1, 2], a, &[1.0], &mut [0.0]);
    }
}
