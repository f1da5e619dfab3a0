//! Matrix products of a training step against the arithmetic peak and against other crates.
//!
//! `cargo bench -p maskalign-kernels --bench gemm -- [FILTER] [peers]` prints for each shape and one
//! and two threads the best and the median rate in 10^9 floating-point operations a second, and the
//! best as a share of the peak measured in between. `peers` adds other crates. The filter is a part of
//! the line's beginning, such as `teacher`; `""` is everything.

#![expect(clippy::print_stdout, reason = "a benchmark prints what it measures")]

use maskalign_kernels::{Act, Epilogue, MatRef, PackedB, Pool, Rhs, fma_peak_gflops, gemm};
use std::time::Instant;

/// What is measured for one shape.
#[derive(Clone, Copy)]
enum Kind {
    /// `X W^T` with `W` packed beforehand, bias and QuickGELU.
    Teacher,
    /// `X W^T`, bias.
    Forward,
    /// `dY W`.
    GradInput,
    /// `W += dY^T X`.
    GradWeight,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let filter = arguments.first().map_or("", String::as_str);
    let seconds = 0.25;
    let mut cases = Vec::new();
    for (n, k) in [(2304, 768), (768, 768), (3072, 768), (768, 3072)] {
        cases.push((Kind::Teacher, 3152, n, k));
        cases.push((Kind::Forward, 944, n, k));
        cases.push((Kind::GradInput, 944, k, n));
        cases.push((Kind::GradWeight, n, k, 944));
    }
    for (n, k) in [(576, 192), (192, 192), (768, 192), (192, 768)] {
        cases.push((Kind::Teacher, 6304, n, k));
        cases.push((Kind::Forward, 1888, n, k));
        cases.push((Kind::GradInput, 1888, k, n));
        cases.push((Kind::GradWeight, n, k, 1888));
    }
    for (n, k) in [(288, 96), (96, 96), (384, 96), (96, 384)] {
        cases.push((Kind::Forward, 3200, n, k));
        cases.push((Kind::GradInput, 3200, k, n));
        cases.push((Kind::GradWeight, n, k, 3200));
    }
    let pools = [Pool::new(1), Pool::new(2)];
    for (kind, m, n, k) in cases {
        let name = match kind {
            Kind::Teacher => "teacher",
            Kind::Forward => "forward",
            Kind::GradInput => "grad-input",
            Kind::GradWeight => "grad-weight",
        };
        let line = format!("{name:12} {m:5} {n:5} {k:5}");
        if !line.contains(filter) {
            continue;
        }
        print!("{line} ");
        let a = random(m * k, 1);
        let b = random(k * n, 2);
        let bias = random(n, 3);
        let mut c = vec![0.0; m * n];
        let packed = PackedB::new(MatRef::row_major(&b, k).t(), k, n);
        for pool in &pools {
            report(pool, 2 * m * n * k, seconds, &mut || match kind {
                Kind::Teacher => {
                    let ep = Epilogue { bias: Some(&bias), act: Act::QuickGelu, ..Default::default() };
                    gemm(pool, m, n, k, MatRef::row_major(&a, k), Rhs::Packed(&packed), &mut c, n, ep);
                }
                Kind::Forward => {
                    let ep = Epilogue { bias: Some(&bias), ..Default::default() };
                    let b = Rhs::Strided(MatRef::row_major(&b, k).t());
                    gemm(pool, m, n, k, MatRef::row_major(&a, k), b, &mut c, n, ep);
                }
                Kind::GradInput => {
                    let b = Rhs::Strided(MatRef::row_major(&b, n));
                    gemm(pool, m, n, k, MatRef::row_major(&a, k), b, &mut c, n, Epilogue::default());
                }
                Kind::GradWeight => {
                    let ep = Epilogue { accumulate: true, ..Default::default() };
                    let b = Rhs::Strided(MatRef::row_major(&b, n));
                    gemm(pool, m, n, k, MatRef::row_major(&a, m).t(), b, &mut c, n, ep);
                }
            });
        }
        if arguments.iter().any(|a| a == "peers") {
            for threads in [1, 2] {
                let parallelism = if threads == 1 { ::gemm::Parallelism::None } else { ::gemm::Parallelism::Rayon(2) };
                print!("| gemm ");
                report(&pools[threads - 1], 2 * m * n * k, seconds, &mut || peer(m, n, k, &a, &b, &mut c, parallelism));
            }
            print!("| matrixmultiply ");
            report(&pools[1], 2 * m * n * k, seconds, &mut || {
                // SAFETY: the slices have the shapes given.
                unsafe {
                    matrixmultiply::sgemm(
                        m,
                        k,
                        n,
                        1.0,
                        a.as_ptr(),
                        k as isize,
                        1,
                        b.as_ptr(),
                        1,
                        k as isize,
                        0.0,
                        c.as_mut_ptr(),
                        n as isize,
                        1,
                    );
                }
            });
        }
        println!();
    }
}

/// `X W^T` by the `gemm` crate.
fn peer(m: usize, n: usize, k: usize, a: &[f32], b: &[f32], c: &mut [f32], p: ::gemm::Parallelism) {
    // SAFETY: the slices have the shapes given.
    unsafe {
        ::gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            n as isize,
            false,
            a.as_ptr(),
            1,
            k as isize,
            b.as_ptr(),
            k as isize,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            p,
        );
    }
}

/// Runs `f` for about `seconds` with the peak measured in between, and prints the rates.
fn report(pool: &Pool, operations: usize, seconds: f64, f: &mut dyn FnMut()) {
    f();
    let mut rates = Vec::new();
    let mut peaks = Vec::new();
    let begin = Instant::now();
    while rates.len() < 5 || begin.elapsed().as_secs_f64() < seconds {
        if rates.len() % 5 == 0 {
            peaks.push(fma_peak_gflops(pool.threads(), pool));
        }
        // Short products are timed in groups of about a millisecond.
        let repeats = (100_000_000 / operations).max(1);
        let start = Instant::now();
        for _ in 0..repeats {
            f();
        }
        rates.push((operations * repeats) as f64 / start.elapsed().as_secs_f64() / 1e9);
    }
    rates.sort_by(f64::total_cmp);
    let best = rates[rates.len() - 1];
    let median = rates[rates.len() / 2];
    let peak = peaks.iter().copied().fold(0.0, f64::max);
    print!("| {}t {best:6.1} {median:6.1} of {peak:6.1} {:3.0}% ", pool.threads(), 100.0 * best / peak);
}

/// Numbers in `-1..1` from a linear congruential generator.
fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}
