//! Batch norm against PyTorch's `BatchNorm1d` and against plain loops in double precision.

use super::*;
use crate::testing::{assert_close, on_pools, recorded, wave};

const EPS: f32 = 1e-3;

/// Mean and biased variance of the columns, one after the other.
fn stats_of(pool: &Pool, x: &[f32], cols: usize) -> (Vec<f32>, Vec<f32>) {
    let (mut mean, mut var) = (vec![f32::NAN; cols], vec![f32::NAN; cols]);
    column_stats(pool, x, &mut mean, &mut var);
    (mean, var)
}

#[test]
fn training_evaluation_and_gradients_equal_pytorch() {
    const COLS: usize = 7;
    let (gamma, beta) = (wave(COLS, 4), wave(COLS, 5));
    let affine = Affine { gamma: Some(&gamma), beta: Some(&beta) };
    for (name, affine) in [("plain", Affine::default()), ("affine", affine)] {
        let record = |part: &str| recorded(&format!("batch_norm_{name}_{part}"));
        let (mut running_mean, mut running_var) = (vec![0.0; COLS], vec![1.0; COLS]);
        for step in 0..2u32 {
            let x: Vec<f32> = wave(63, 1 + step).iter().map(|x| 2.0 * x + 0.5).collect();
            let y = on_pools(|pool| {
                let (mean, var) = stats_of(pool, &x, COLS);
                let mut y = vec![f32::NAN; 63];
                batch_norm(pool, &x, ColumnStats { mean: &mean, var: &var, eps: EPS }, affine, &mut y);
                y
            });
            assert_close(&y, &record(&step.to_string()), 1e-6, name);
            let pool = Pool::new(1);
            let (mean, var) = stats_of(&pool, &x, COLS);
            let batch = ColumnStats { mean: &mean, var: &var, eps: EPS };
            update_running_stats(batch, 9, 0.1, &mut running_mean, &mut running_var);
            assert_close(&running_mean, &record(&format!("mean_{step}")), 2e-7, "running mean");
            assert_close(&running_var, &record(&format!("var_{step}")), 2e-7, "running variance");
            if step == 0 {
                continue;
            }
            let dy = wave(63, 3);
            let (mut dx, mut dgamma, mut dbeta) = (vec![0.5; 63], vec![0.5; COLS], vec![0.5; COLS]);
            let grads = BatchNormGrads { dx: Some(&mut dx), dgamma: Some(&mut dgamma), dbeta: Some(&mut dbeta) };
            batch_norm_backward(&pool, &x, batch, affine.gamma, &dy, grads);
            // They are added to what was there.
            let more = |values: Vec<f64>| values.iter().map(|v| v + 0.5).collect::<Vec<_>>();
            assert_close(&dx, &more(record("dx")), 1e-6, "dx");
            if name == "affine" {
                assert_close(&dgamma, &more(record("dgamma")), 1e-6, "dgamma");
                assert_close(&dbeta, &more(record("dbeta")), 1e-6, "dbeta");
            }
            let running = ColumnStats { mean: &running_mean, var: &running_var, eps: EPS };
            let mut y = vec![f32::NAN; 63];
            batch_norm(&pool, &x, running, affine, &mut y);
            assert_close(&y, &record("eval"), 1e-6, "evaluation");
        }
    }
}

#[test]
fn every_shape_agrees_with_loops_in_double_precision() {
    // Fewer and more columns than a tile, a task and several; fewer and more rows than a block.
    for (rows, cols) in [(1, 1), (2, 31), (3, 32), (65, 33), (64, 64), (130, 100), (257, 200)] {
        // An offset far beyond the spread shows statistics of one pass.
        let x: Vec<f32> = wave(rows * cols, 1).iter().map(|x| x + 30.0).collect();
        let (gamma, dy) = (wave(cols, 2), wave(rows * cols, 3));
        let got = on_pools(|pool| {
            let (mean, var) = stats_of(pool, &x, cols);
            let stats = ColumnStats { mean: &mean, var: &var, eps: EPS };
            let affine = Affine { gamma: Some(&gamma), beta: None };
            let (mut y, mut dx) = (vec![f32::NAN; rows * cols], vec![0.0; rows * cols]);
            let (mut dgamma, mut dbeta) = (vec![0.0; cols], vec![0.0; cols]);
            batch_norm(pool, &x, stats, affine, &mut y);
            let grads = BatchNormGrads { dx: Some(&mut dx), dgamma: Some(&mut dgamma), dbeta: Some(&mut dbeta) };
            batch_norm_backward(pool, &x, stats, Some(&gamma), &dy, grads);
            let mut alone = vec![0.0; rows * cols];
            let grads = BatchNormGrads { dx: Some(&mut alone), ..BatchNormGrads::default() };
            batch_norm_backward(pool, &x, stats, Some(&gamma), &dy, grads);
            assert!(alone == dx);
            [mean, var, y, dx, dgamma, dbeta].concat()
        });
        let (mut mean, mut var) = (vec![0.0f64; cols], vec![0.0f64; cols]);
        let (mut y, mut dx) = (vec![0.0f64; rows * cols], vec![0.0f64; rows * cols]);
        let (mut dgamma, mut dbeta) = (vec![0.0f64; cols], vec![0.0f64; cols]);
        let n = rows as f64;
        for c in 0..cols {
            let column = |from: &[f32]| (0..rows).map(|r| f64::from(from[r * cols + c])).collect::<Vec<_>>();
            let (x, dy, gamma) = (column(&x), column(&dy), f64::from(gamma[c]));
            mean[c] = x.iter().sum::<f64>() / n;
            var[c] = x.iter().map(|x| (x - mean[c]).powi(2)).sum::<f64>() / n;
            let rstd = 1.0 / (var[c] + f64::from(EPS)).sqrt();
            let normed: Vec<f64> = x.iter().map(|x| (x - mean[c]) * rstd).collect();
            dbeta[c] = dy.iter().sum();
            dgamma[c] = dy.iter().zip(&normed).map(|(dy, x)| dy * x).sum();
            for r in 0..rows {
                y[r * cols + c] = normed[r] * gamma;
                dx[r * cols + c] = gamma * rstd * (dy[r] - dbeta[c] / n - normed[r] * dgamma[c] / n);
            }
        }
        // Means near 30 are rounded to 2e-6, seen through a standard deviation of about 0.7, or of eps.
        let tolerance = if rows < 4 { 2e-4 } else { 1e-5 };
        assert_close(&got, &[mean, var, y, dx, dgamma, dbeta].concat(), tolerance, &format!("[{rows}, {cols}]"));
    }
}

#[test]
#[should_panic(expected = "no unbiased variance")]
fn one_row_does_not_move_running_statistics() {
    let batch = ColumnStats { mean: &[0.0], var: &[0.0], eps: EPS };
    update_running_stats(batch, 1, 0.1, &mut [0.0], &mut [1.0]);
}
