//! Plain double-precision versions of the operators, and tools to compare with them.

use maskalign_kernels::{Act, Arena, Pool};
use std::sync::Arc;

/// Uniform values in -1..1 from a counter (SplitMix64).
pub(crate) fn noise(len: usize, seed: u64) -> Vec<f32> {
    (0..len as u64)
        .map(|i| {
            let mut z = (i + 1 + (seed << 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

pub(crate) fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// Norm of the difference over the norm of `want`, or over 1e-30 for zeros.
pub(crate) fn relative_error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |x: f64| x * x;
    let difference: f64 = got.iter().zip(want).map(|(&g, &w)| square(f64::from(g) - w)).sum();
    let norm: f64 = want.iter().map(|&w| square(w)).sum();
    assert!(difference.is_finite(), "not finite");
    (difference / norm.max(1e-30)).sqrt()
}

#[track_caller]
pub(crate) fn assert_close(got: &[f32], want: &[f64], tolerance: f64, what: &str) {
    let error = relative_error(got, want);
    assert!(error <= tolerance, "{what}: relative error {error:.2e} beyond {tolerance:.0e}");
}

/// Central differences of `f` at `x`, for the elements `picks`.
pub(crate) fn finite_differences(
    x: &[f64],
    picks: impl IntoIterator<Item = usize>,
    mut f: impl FnMut(&[f64]) -> f64,
) -> Vec<f64> {
    let step = 1e-5;
    let mut x = x.to_vec();
    picks
        .into_iter()
        .map(|i| {
            let kept = x[i];
            x[i] = kept + step;
            let above = f(&x);
            x[i] = kept - step;
            let below = f(&x);
            x[i] = kept;
            (above - below) / (2.0 * step)
        })
        .collect()
}

/// Runs `f` on pools of one, two and three threads; the results must be equal to the last bit.
pub(crate) fn on_pools<T: PartialEq>(mut f: impl FnMut(&Arc<Pool>, &Arena) -> T) -> T {
    let mut results = [1, 2, 3].map(|threads| f(&Pool::new(threads), &Arena::new())).into_iter();
    let first = results.next().expect("three results");
    for other in results {
        assert!(first == other, "the number of threads changes the result");
    }
    first
}

pub(crate) fn weighted_sum(y: &[f64], w: &[f32]) -> f64 {
    y.iter().zip(w).map(|(y, &w)| y * f64::from(w)).sum()
}

pub(crate) fn wide_layer_norm(
    x: &[f64],
    cols: usize,
    gamma: Option<&[f64]>,
    beta: Option<&[f64]>,
    eps: f64,
) -> Vec<f64> {
    x.chunks(cols)
        .flat_map(|x| {
            let mean = x.iter().sum::<f64>() / cols as f64;
            let var = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / cols as f64;
            let scale = 1.0 / (var + eps).sqrt();
            (0..cols)
                .map(|c| (x[c] - mean) * scale * gamma.map_or(1.0, |g| g[c]) + beta.map_or(0.0, |b| b[c]))
                .collect::<Vec<_>>()
        })
        .collect()
}

/// `x w^T + b` for `w` `[outputs, inputs]`.
pub(crate) fn wide_linear(x: &[f64], w: &[f64], b: Option<&[f64]>, inputs: usize) -> Vec<f64> {
    x.chunks(inputs)
        .flat_map(|x| {
            w.chunks(inputs)
                .enumerate()
                .map(|(o, w)| b.map_or(0.0, |b| b[o]) + x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>())
                .collect::<Vec<_>>()
        })
        .collect()
}

#[derive(Clone, Copy)]
pub(crate) struct Attention {
    pub batch: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub queries: usize,
    pub keys: usize,
}

/// Rows of `heads * head_dim`; returns the output and the probabilities `[batch, heads, queries,
/// keys]`.
pub(crate) fn wide_attention(s: Attention, q: &[f64], k: &[f64], v: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let dim = s.heads * s.head_dim;
    let mut out = vec![0.0; s.batch * s.queries * dim];
    let mut all = Vec::new();
    for b in 0..s.batch {
        for h in 0..s.heads {
            for i in 0..s.queries {
                let q = &q[(b * s.queries + i) * dim + h * s.head_dim..][..s.head_dim];
                let scores: Vec<f64> = (0..s.keys)
                    .map(|j| {
                        let k = &k[(b * s.keys + j) * dim + h * s.head_dim..][..s.head_dim];
                        let dot: f64 = q.iter().zip(k).map(|(q, k)| q * k).sum();
                        dot / (s.head_dim as f64).sqrt()
                    })
                    .collect();
                let probs = wide_softmax(&scores);
                for (j, p) in probs.iter().enumerate() {
                    for c in 0..s.head_dim {
                        let at = h * s.head_dim + c;
                        out[(b * s.queries + i) * dim + at] += p * v[(b * s.keys + j) * dim + at];
                    }
                }
                all.extend(probs);
            }
        }
    }
    (out, all)
}

pub(crate) fn wide_softmax(x: &[f64]) -> Vec<f64> {
    let largest = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = x.iter().map(|x| (x - largest).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.iter().map(|e| e / sum).collect()
}

/// Phi by integrating the density with Simpson's rule from 0: exact to double precision here.
fn normal_cdf(x: f64) -> f64 {
    let steps = 160;
    let h = x / f64::from(steps);
    let density = |t: f64| (-0.5 * t * t).exp() / (2.0 * std::f64::consts::PI).sqrt();
    let mut sum = density(0.0) + density(x);
    for i in 1..steps {
        sum += density(h * f64::from(i)) * if i % 2 == 1 { 4.0 } else { 2.0 };
    }
    0.5 + sum * h / 3.0
}

pub(crate) fn wide_act(act: Act, x: f64) -> f64 {
    match act {
        Act::None => x,
        Act::Gelu => x * normal_cdf(x),
        Act::QuickGelu => x / (1.0 + (-1.702 * x).exp()),
    }
}

/// The inputs of `fixtures/make_operators.py`.
pub(crate) fn wave(len: usize, seed: u32) -> Vec<f32> {
    let seed = f64::from(seed);
    (0..len).map(|i| (i as f64 * (0.37 + 0.11 * seed) + seed).sin() as f32).collect()
}

/// What PyTorch computed under this name.
pub(crate) fn recorded(name: &str) -> Vec<f64> {
    let line = include_str!("../fixtures/operators.txt")
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
        .unwrap_or_else(|| panic!("no record {name}"));
    line.split(' ').map(|v| v.parse().expect("a number")).collect()
}
