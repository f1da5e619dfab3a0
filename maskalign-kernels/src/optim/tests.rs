//! LARS and moving averages against PyTorch and against plain loops in double precision.

use super::*;
use crate::testing::{assert_close, on_pools, recorded, wave};

const SHARED: Lars = Lars { momentum: 0.9, trust_coefficient: 0.001, grad_scale: 1.0 };

#[test]
fn lars_steps_equal_pytorch() {
    // A weight, a bias, a weight that starts at zero, and one without gradient and decay: norms of 0.
    let (decay, none) = (LarsRule::Adapted { weight_decay: 0.05 }, LarsRule::Adapted { weight_decay: 0.0 });
    let rules = [decay, LarsRule::Plain, decay, none];
    let results = on_pools(|pool| {
        let mut params = [wave(35, 1), wave(5, 2), vec![0.0; 12], wave(6, 9)];
        let mut momenta = params.each_ref().map(|p| vec![0.0; p.len()]);
        let mut results = Vec::new();
        for (step, lr) in (0..3u32).zip([0.1, 2.0, 6.4]) {
            let mut grads: Vec<Vec<f32>> =
                (0..4u32).zip(&params).map(|(i, p)| wave(p.len(), 3 + 4 * step + i)).collect();
            grads[3].fill(0.0);
            let mut tensors: Vec<LarsTensor> = params
                .iter_mut()
                .zip(&grads)
                .zip(&mut momenta)
                .zip(rules)
                .map(|(((param, grad), momentum), rule)| LarsTensor { param, grad, momentum, lr, rule })
                .collect();
            lars(pool, SHARED, &mut tensors);
            for (param, momentum) in params.iter().zip(&momenta) {
                results.extend(param.iter().chain(momentum));
            }
        }
        results
    });
    let want: Vec<f64> = (0..3)
        .flat_map(|step| (0..4).map(move |i| format!("lars_{step}_{i}")))
        .flat_map(|name| [recorded(&name), recorded(&format!("{name}_mu"))].concat())
        .collect();
    assert_close(&results, &want, 5e-7, "parameters and momenta");
}

#[test]
fn lars_on_large_tensors_agrees_with_loops_in_double_precision() {
    // Several pieces with a rest, and a gradient that is scaled down.
    let len = 2 * CHUNK + 77;
    let (param, grad, momentum) = (wave(len, 1), wave(len, 2), wave(len, 3));
    let shared = Lars { grad_scale: 0.25, ..SHARED };
    let got = on_pools(|pool| {
        let (mut param, mut momentum) = (param.clone(), momentum.clone());
        let rule = LarsRule::Adapted { weight_decay: 0.1 };
        let tensor = LarsTensor { param: &mut param, grad: &grad, momentum: &mut momentum, lr: 3.0, rule };
        lars(pool, shared, &mut [tensor]);
        [param, momentum].concat()
    });
    let update: Vec<f64> = grad.iter().zip(&param).map(|(&g, &p)| 0.25 * f64::from(g) + 0.1 * f64::from(p)).collect();
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let ratio = 0.001 * norm(&mut param.iter().map(|&p| f64::from(p))) / norm(&mut update.iter().copied());
    let momentum: Vec<f64> = momentum.iter().zip(&update).map(|(&m, d)| 0.9 * f64::from(m) + ratio * d).collect();
    let param: Vec<f64> = param.iter().zip(&momentum).map(|(&p, m)| f64::from(p) - 3.0 * m).collect();
    assert_close(&got, &[param, momentum].concat(), 5e-7, "parameters and momenta");
}

#[test]
fn moving_averages_equal_pytorch() {
    let moving = on_pools(|pool| {
        let mut moving = wave(1027, 1);
        for (momentum, seed) in [0.996, 0.5, 0.99995].into_iter().zip(2..) {
            ema_update(pool, &mut moving, &wave(1027, seed), momentum);
        }
        moving
    });
    assert_close(&moving, &recorded("moving_average"), 1.2e-7, "moving average");
}

#[test]
fn long_moving_averages_agree_with_loops_in_double_precision() {
    let len = 3 * CHUNK + 5;
    let (before, source) = (wave(len, 1), wave(len, 2));
    let moving = on_pools(|pool| {
        let mut moving = before.clone();
        ema_update(pool, &mut moving, &source, 0.9);
        moving
    });
    let want: Vec<f64> =
        before.iter().zip(&source).map(|(&m, &s)| 0.9 * f64::from(m) + (1.0 - 0.9) * f64::from(s)).collect();
    assert_close(&moving, &want, 1.5e-7, "moving average");
}
