//! What the tests of several operators share.

use std::sync::Arc;

use crate::Pool;

/// The inputs of `tests/fixtures/make_probe.py`.
pub(crate) fn wave(len: usize, seed: u32) -> Vec<f32> {
    let seed = f64::from(seed);
    (0..len).map(|i| (i as f64 * (0.37 + 0.11 * seed) + seed).sin() as f32).collect()
}

/// What PyTorch computed under this name.
pub(crate) fn recorded(name: &str) -> Vec<f64> {
    let line = include_str!("../tests/fixtures/probe.txt")
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
        .unwrap_or_else(|| panic!("no record {name}"));
    line.split(' ').map(|v| v.parse().expect("a number")).collect()
}

/// Runs `f` on pools of one, two, three and five threads; the results must be equal to the last bit.
pub(crate) fn on_pools(f: impl Fn(&Arc<Pool>) -> Vec<f32>) -> Vec<f32> {
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let first = f(&Pool::new(1));
    for threads in [2, 3, 5] {
        assert!(bits(&first) == bits(&f(&Pool::new(threads))), "the number of threads changes the result");
    }
    first
}

/// Every element within `tolerance` times the larger of 1 and the wanted magnitude.
#[track_caller]
pub(crate) fn assert_close(got: &[f32], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(got) - want).abs() / want.abs().max(1.0);
        assert!(error <= tolerance, "{what}, element {i}: {got}, expected {want}");
    }
}
