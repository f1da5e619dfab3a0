//! The product against double precision.

use super::small::{LANES, Small};
use super::*;
use crate::share::Write;
use crate::vmath;

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
            let terms = (0..k).map(|p| f64::from(a.data[i * a.rs + p * a.cs]) * f64::from(b.data[p * b.rs + j * b.cs]));
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
        (1, 1, 1),
        (1, 7, 3),
        (7, 1, 5),
        (2, 3, 0),
        (5, 8, 1),
        (6, 16, 64),
        (13, 33, 9),
        (12, 32, 257),
        (59, 59, 64),
        (97, 40, 31),
        (25, 17, 513),
        (100, 401, 33),
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
                    gemm_on(isa, &pool, m, n, k, a, Rhs::Strided(b), &mut c, ldc, ep);
                    let mut plain = before.clone();
                    let ep = Epilogue::default();
                    gemm_on(isa, &pool, m, n, k, a, Rhs::Strided(b), &mut plain, ldc, ep);
                    for (i, row) in oracle(m, n, k, a, b).chunks(n).enumerate() {
                        for (j, &(want, scale)) in row.iter().enumerate() {
                            let at = i * ldc + j;
                            let added = f64::from(before[at]) + want;
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
                gemm_on(isa, &pool, m, n, k, a, b, &mut c, n, ep);
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
                    gemm_on(isa, pool, m, n, k, a, b, &mut c, n, ep);
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
    let largest =
        oracle(m, n, k, a, b).iter().zip(&c).map(|(want, &got)| (want.0 - f64::from(got)).abs()).fold(0.0, f64::max);
    assert!(largest < 5e-5, "largest error {largest}");
}

/// Of `[3, 4]` and zeros `[4, 2]`.
fn product_of(a: &[f32], ldc: usize) {
    let (b, mut c) = ([0.0; 8], [0.0; 6]);
    let (a, b) = (MatRef::row_major(a, 4), Rhs::Strided(MatRef::row_major(&b, 2)));
    gemm(&Pool::new(1), 3, 2, 4, a, b, &mut c, ldc, Epilogue::default());
}

#[test]
#[should_panic(expected = "a [3, 4] with strides 4 and 1 exceeds its 11 elements")]
fn a_short_operand_is_refused() {
    product_of(&[0.0; 11], 2);
}

#[test]
#[should_panic(expected = "overlap")]
fn overlapping_rows_of_the_result_are_refused() {
    product_of(&[0.0; 12], 1);
}

/// The padding of the columns is zero, and nothing behind them is written.
#[test]
fn small_products_equal_double_precision_on_every_instruction_set() {
    let shapes = [(1, 1, 1), (5, 4, 3), (12, 16, 64), (25, 33, 7), (24, 197, 64), (48, 72, 50), (197, 64, 24)];
    for isa in instruction_sets() {
        let small = Small::new(isa);
        for (m, n, k) in shapes {
            for order_a in [Order::Rows, Order::Columns, Order::PaddedRows] {
                for order_b in ORDERS {
                    let what = (isa, m, n, k, order_a, order_b);
                    let (a, b) = (order_a.make(m, k, 1), order_b.make(k, n, 2));
                    let (a, b) = (order_a.view(&a, m, k), order_b.view(&b, k, n));
                    let mut packed = random(small.packed_len(k, n), 3);
                    small.pack(b, k, n, &mut packed);
                    let padded = n.next_multiple_of(LANES);
                    let ldc = padded + 3;
                    let before = random(m * ldc, 4);
                    let (mut set, mut added) = (before.clone(), before.clone());
                    small.multiply([m, padded, k], a, &packed, &mut set, ldc, Write::Set);
                    small.multiply([m, padded, k], a, &packed, &mut added, ldc, Write::Add);
                    for (i, row) in oracle(m, n, k, a, b).chunks(n).enumerate() {
                        for j in 0..ldc {
                            let at = i * ldc + j;
                            let (want, scale) = row.get(j).copied().unwrap_or_default();
                            assert_close(&what, added[at], f64::from(before[at]) + want, scale);
                            let want = if j < padded { want } else { f64::from(before[at]) };
                            assert_close(&what, set[at], want, scale);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_view_that_claims_more_than_memory_holds_is_refused() {
    // Strides of 0 make one element a matrix of any shape, and a wrapped length an empty buffer.
    let one = MatRef { data: &[1.0], rs: 0, cs: 0 };
    let message = |call: &dyn Fn()| {
        let payload = std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)).expect_err("refused");
        payload.downcast_ref::<String>().cloned().unwrap_or_default()
    };
    for (k, n) in [(16, 1 << 60), (1, usize::MAX), (usize::MAX, 1)] {
        let message = message(&|| _ = PackedB::new(one, k, n));
        assert!(message.contains("too large to pack"), "[{k}, {n}]: {message}");
    }
    let bias = [0.0; 64];
    let message = message(&|| {
        let ep = Epilogue { bias: Some(&bias), ..Epilogue::default() };
        gemm(&Pool::new(1), 1, 64, 1 << 62, one, Rhs::Strided(one), &mut [0.0; 64], 64, ep);
    });
    assert!(message.contains("too large to pack"), "{message}");
}
