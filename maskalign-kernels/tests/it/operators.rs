//! Norms, losses, the optimiser and element-wise operators against PyTorch and definitions.

use crate::support::*;
use maskalign_kernels::elementwise::*;
use maskalign_kernels::loss::*;
use maskalign_kernels::norm::*;
use maskalign_kernels::optim::*;
use maskalign_kernels::{Act, Arena, Pool};

#[test]
fn layer_norm_agrees_with_its_definition() {
    for (rows, cols) in [(1, 1), (3, 5), (130, 33), (7, 768), (300, 192)] {
        for (offset, tolerance) in [(0.0, 1e-6), (30.0, 2e-5)] {
            let x: Vec<f32> = noise(rows * cols, 1).iter().map(|x| x + offset).collect();
            let (gamma, beta) = (noise(cols, 2), noise(cols, 3));
            for (gamma, beta) in [(None, None), (Some(&gamma), Some(&beta)), (Some(&gamma), None), (None, Some(&beta))]
            {
                let want = wide_layer_norm(
                    &wide(&x),
                    cols,
                    gamma.map(|g| wide(g)).as_deref(),
                    beta.map(|b| wide(b)).as_deref(),
                    1e-6,
                );
                let (gamma, beta) = (gamma.map(|g| &g[..]), beta.map(|b| &b[..]));
                let y = on_pools(|pool, _| {
                    let mut y = vec![f32::NAN; x.len()];
                    let mut again = y.clone();
                    let mut stats = vec![0.0; 2 * rows];
                    layer_norm(pool, &x, cols, gamma, beta, 1e-6, &mut y, Some(&mut stats));
                    layer_norm_again(pool, &x, cols, gamma, beta, &stats, &mut again);
                    assert!(y == again);
                    layer_norm(pool, &x, cols, gamma, beta, 1e-6, &mut again, None);
                    assert!(y == again);
                    y
                });
                if cols > 1 {
                    assert_close(&y, &want, tolerance, "layer norm");
                }
            }
        }
    }
}

#[test]
fn layer_norm_gradients_agree_with_finite_differences() {
    for (rows, cols) in [(2, 5), (70, 33), (3, 80)] {
        let (x, dy) = (noise(rows * cols, 1), noise(rows * cols, 2));
        let (gamma, beta) = (noise(cols, 3), noise(cols, 4));
        for affine in [true, false] {
            let g = affine.then_some(&gamma[..]);
            let b = affine.then_some(&beta[..]);
            let [dx, dgamma, dbeta] = on_pools(|pool, arena| {
                let mut y = vec![0.0; x.len()];
                let mut stats = vec![0.0; 2 * rows];
                let mut dx = vec![0.0; x.len()];
                let (mut dgamma, mut dbeta) = (vec![0.0; cols], vec![0.0; cols]);
                layer_norm(pool, &x, cols, g, b, 1e-5, &mut y, Some(&mut stats));
                layer_norm_backward(
                    pool,
                    arena,
                    &x,
                    cols,
                    &stats,
                    g,
                    &dy,
                    &mut dx,
                    Write::Set,
                    Some(&mut dgamma),
                    Some(&mut dbeta),
                );
                // Added once more without the parameters' gradients: twice the gradient.
                let once = dx.clone();
                layer_norm_backward(pool, arena, &x, cols, &stats, g, &dy, &mut dx, Write::Add, None, None);
                assert!(dx.iter().zip(&once).all(|(d, o)| *d == 2.0 * o));
                [once, dgamma, dbeta]
            });
            let (x, g, b) = (wide(&x), g.map(wide), b.map(wide));
            let f = |x: &[f64], g: Option<&[f64]>, b: Option<&[f64]>| {
                weighted_sum(&wide_layer_norm(x, cols, g, b, 1e-5), &dy)
            };
            let want = finite_differences(&x, 0..x.len(), |x| f(x, g.as_deref(), b.as_deref()));
            assert_close(&dx, &want, 2e-6, "dx");
            if let (Some(g), Some(b)) = (&g, &b) {
                let want = finite_differences(g, 0..cols, |g| f(&x, Some(g), Some(b)));
                assert_close(&dgamma, &want, 1e-6, "dgamma");
                let want = finite_differences(b, 0..cols, |b| f(&x, Some(g), Some(b)));
                assert_close(&dbeta, &want, 1e-6, "dbeta");
            }
        }
    }
}

#[test]
fn normalisations_equal_pytorch() {
    let x: Vec<f32> = wave(21, 1).iter().map(|x| 2.0 * x).collect();
    let check = |name: &str, f: &dyn Fn(&Pool, &mut [f32])| {
        let y = on_pools(|pool, _| {
            let mut y = vec![f32::NAN; 21];
            f(pool, &mut y);
            y
        });
        assert_close(&y, &recorded(name), 1e-6, name);
    };
    check("normalize", &|pool, y| l2_normalize(pool, &x, 7, y));
    check("standardize_rows", &|pool, y| standardize_rows(pool, &x, 7, y));
    check("standardize_all", &|pool, y| standardize_all(pool, &x, y));
    let mut zero = [7.0; 4];
    l2_normalize(&Pool::new(1), &[0.0; 4], 4, &mut zero);
    assert_eq!(zero, [0.0; 4]);
}

#[test]
fn standardize_all_is_the_same_for_any_number_of_threads() {
    let x = noise(100_003, 1);
    let y = on_pools(|pool, _| {
        let mut y = vec![0.0; x.len()];
        standardize_all(pool, &x, &mut y);
        y
    });
    let wide = wide(&y);
    let mean = wide.iter().sum::<f64>() / wide.len() as f64;
    let var = wide.iter().map(|y| (y - mean).powi(2)).sum::<f64>() / (wide.len() - 1) as f64;
    assert!(mean.abs() < 1e-7 && (var - 1.0).abs() < 1e-4);
}

#[test]
fn losses_and_their_gradients_equal_pytorch() {
    let double = |seed| -> Vec<f32> { wave(21, seed).iter().map(|x| 2.0 * x).collect() };
    let (p, t) = (double(1), double(2));
    let soft: Vec<f32> = wide(&wave(21, 3)).chunks(7).flat_map(wide_softmax).map(|p| p as f32).collect();
    // A class for each row, smoothed as `F.cross_entropy` does.
    let labels = |smoothing: f32| -> Vec<f32> {
        let even = smoothing / 7.0;
        let row = |label| (0..7).map(move |class| if class == label { 1.0 - smoothing + even } else { even });
        [2, 0, 6].into_iter().flat_map(row).collect()
    };
    let (hard, smoothed) = (labels(0.0), labels(0.1));
    type Loss<'a> = &'a dyn Fn(&Pool, Option<Grad<'_>>) -> f64;
    let smooth = |beta| {
        move |pool: &Pool, p: &[f32], t: &[f32], g: Option<Grad<'_>>| {
            pointwise(pool, Pointwise::SmoothL1 { beta }, p, t, g)
        }
    };
    let terms: [(&str, Loss); 9] = [
        ("mse", &|pool, g| pointwise(pool, Pointwise::Mse, &p, &t, g)),
        ("l1", &|pool, g| pointwise(pool, Pointwise::L1, &p, &t, g)),
        ("smooth_l1", &|pool, g| smooth(1.0)(pool, &p, &t, g)),
        ("smooth_l1_half", &|pool, g| smooth(0.5)(pool, &p, &t, g)),
        ("cosine", &|pool, g| cosine(pool, &p, &t, 7, g)),
        ("kl", &|pool, g| kl(pool, &p, &t, 7, g)),
        ("cross_entropy_soft", &|pool, g| cross_entropy(pool, &p, &soft, 7, g)),
        ("cross_entropy_labels", &|pool, g| cross_entropy(pool, &p, &hard, 7, g)),
        ("cross_entropy_smooth", &|pool, g| cross_entropy(pool, &p, &smoothed, 7, g)),
    ];
    for (name, term) in terms {
        let (value, grad) = on_pools(|pool, _| {
            let mut grad = vec![f32::NAN; 21];
            let value = term(pool, Some(Grad { into: &mut grad, scale: 1.0, write: Write::Set }));
            assert_eq!(value, term(pool, None));
            let once = grad.clone();
            // Added with factor 2: three times the gradient.
            term(pool, Some(Grad { into: &mut grad, scale: 2.0, write: Write::Add }));
            for (g, o) in grad.iter().zip(&once) {
                assert!((g - 3.0 * o).abs() <= 1e-6 * (1.0 + g.abs()), "{name}");
            }
            (value, once)
        });
        let want = recorded(name)[0];
        assert!((value / want - 1.0).abs() < 1e-6, "{name}: {value}, expected {want}");
        assert_close(&grad, &recorded(&format!("{name}_grad")), 1e-6, name);
    }
}

#[test]
fn large_losses_are_the_same_for_any_number_of_threads() {
    let (p, t) = (noise(120_000, 1), noise(120_000, 2));
    let value = on_pools(|pool, _| {
        let mut grad = vec![0.0; p.len()];
        let into = Grad { into: &mut grad, scale: 1.0, write: Write::Set };
        let value = pointwise(pool, Pointwise::SmoothL1 { beta: 1.0 }, &p, &t, Some(into));
        (value, cosine(pool, &p, &t, 48, None), kl(pool, &p, &t, 48, None), grad)
    });
    let smooth = |d: f64| {
        if d.abs() < 1.0 { 0.5 * d * d } else { d.abs() - 0.5 }
    };
    let sum: f64 = p.iter().zip(&t).map(|(&p, &t)| smooth(f64::from(p) - f64::from(t))).sum();
    assert!((value.0 / (sum / p.len() as f64) - 1.0).abs() < 1e-6);
}

#[test]
fn a_loss_that_is_not_finite_shows() {
    let pool = Pool::new(2);
    let mut p = noise(50, 1);
    let t = noise(50, 2);
    p[33] = f32::NAN;
    for term in [Pointwise::Mse, Pointwise::L1, Pointwise::SmoothL1 { beta: 1.0 }] {
        assert!(pointwise(&pool, term, &p, &t, None).is_nan());
    }
    assert!(cosine(&pool, &p, &t, 10, None).is_nan());
    assert!(kl(&pool, &p, &t, 10, None).is_nan());
    assert!(cross_entropy(&pool, &p, &t, 10, None).is_nan());
}

#[test]
fn adamw_and_clipping_equal_pytorch() {
    let (got, norms) = on_pools(|pool, _| {
        let (mut a, mut b) = (wave(21, 1), wave(5, 2));
        let (mut am, mut av, mut bm, mut bv) = (vec![0.0; 21], vec![0.0; 21], vec![0.0; 5], vec![0.0; 5]);
        let (mut got, mut norms) = (Vec::new(), Vec::new());
        for step in 0..4 {
            let (ga, gb) = (wave(21, 3 + step), wave(5, 8 + step));
            let norm = grad_norm(pool, &[&ga, &gb]);
            norms.push(norm);
            let adam = AdamW {
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                step: u64::from(step) + 1,
                grad_scale: (1.5 / (norm + 1e-6)).min(1.0) as f32,
            };
            adamw(
                pool,
                adam,
                &mut [
                    AdamWTensor {
                        param: &mut a,
                        grad: &ga,
                        exp_avg: &mut am,
                        exp_avg_sq: &mut av,
                        lr: 1e-2,
                        weight_decay: 0.05,
                    },
                    AdamWTensor {
                        param: &mut b,
                        grad: &gb,
                        exp_avg: &mut bm,
                        exp_avg_sq: &mut bv,
                        lr: 3e-3,
                        weight_decay: 0.0,
                    },
                ],
            );
            got.push([a.clone(), b.clone()]);
        }
        (got, norms)
    });
    for (step, [a, b]) in got.iter().enumerate() {
        assert!((norms[step] / recorded(&format!("grad_norm_{step}"))[0] - 1.0).abs() < 1e-6);
        assert_close(a, &recorded(&format!("adamw_a_{step}")), 2e-7, "adamw");
        assert_close(b, &recorded(&format!("adamw_b_{step}")), 2e-7, "adamw");
    }
}

#[test]
fn the_gradient_norm_shows_what_is_not_finite() {
    let pool = Pool::new(2);
    let fine = noise(40_000, 1);
    let mut bad = fine.clone();
    bad[39_999] = f32::INFINITY;
    assert!(!grad_norm(&pool, &[&fine, &bad]).is_finite());
    bad[5] = f32::NAN;
    assert!(grad_norm(&pool, &[&bad]).is_nan());
}

#[test]
fn activations_and_their_gradients_agree_with_definitions() {
    let x: Vec<f32> = noise(20_001, 1).iter().map(|x| 4.0 * x).collect();
    let dy = noise(x.len(), 2);
    for act in [Act::None, Act::Gelu, Act::QuickGelu] {
        let (y, dx) = on_pools(|pool, _| {
            let (mut y, mut dx) = (vec![0.0; x.len()], x.clone());
            activation_and_slope(pool, act, &mut dx, &mut y);
            multiply(pool, &dy, &mut dx);
            (y, dx)
        });
        for i in (0..x.len()).step_by(97) {
            let (at, h) = (f64::from(x[i]), 1e-5);
            let f = |x: f64| wide_act(act, x);
            assert!((f64::from(y[i]) - f(at)).abs() < 1e-6);
            let slope = (f(at + h) - f(at - h)) / (2.0 * h);
            assert!((f64::from(dx[i]) - slope * f64::from(dy[i])).abs() < 2e-6);
        }
    }
}

#[test]
fn sums_and_scales_do_what_they_say() {
    let (rows, cols) = (150, 37);
    let (a, b) = (noise(rows * cols, 1), noise(rows * cols, 2));
    let (columns, groups) = (noise(cols, 3), noise(rows / 10, 4));
    on_pools(|pool, arena| {
        let mut y = vec![0.0; a.len()];
        add(pool, &a, &b, &mut y);
        axpy(pool, -1.0, &b, &mut y);
        assert!(y.iter().zip(&a).all(|(y, a)| (y - a).abs() < 1e-6));
        scale_rows(pool, &a, cols, Some(&columns), Some((&groups, 10)), &mut y);
        assert_eq!(y[37 * 25 + 3], a[37 * 25 + 3] * columns[3] * groups[2]);
        let mut sums = vec![1.0; cols];
        add_column_sums(pool, arena, &a, cols, &mut sums);
        let want: Vec<f64> =
            (0..cols).map(|c| 1.0 + (0..rows).map(|r| f64::from(a[r * cols + c])).sum::<f64>()).collect();
        assert_close(&sums, &want, 1e-6, "column sums");
        let (mut fused, mut product) = (vec![1.0; cols], a.clone());
        multiply_and_add_column_sums(pool, arena, &b, &mut product, cols, &mut fused);
        assert!(product.iter().zip(&a).zip(&b).all(|((p, a), b)| *p == a * b));
        let mut separate = vec![1.0; cols];
        add_column_sums(pool, arena, &product, cols, &mut separate);
        assert!(fused == separate);
        (y, sums, fused)
    });
}

#[test]
fn rows_are_gathered_from_and_scattered_to_several_matrices() {
    let cols = 70;
    let (a, b) = (noise(3 * cols, 1), noise(2 * cols, 2));
    let index = [4, 0, 2, 2, 3];
    on_pools(|pool, _| {
        let mut y = vec![0.0; index.len() * cols];
        gather_rows(pool, &[&a, &b], cols, &index, &mut y);
        assert_eq!(y[..cols], b[cols..]);
        assert_eq!(y[cols..2 * cols], a[..cols]);
        assert_eq!(y[4 * cols..], b[..cols]);
        let (mut da, mut db) = (vec![1.0; 3 * cols], vec![0.0; 2 * cols]);
        scatter_add_rows(pool, &y, cols, &index, &mut [&mut da, &mut db]);
        assert!((0..cols).all(|c| da[2 * cols + c] == 1.0 + a[2 * cols + c] + a[2 * cols + c]));
        assert!(da[cols..2 * cols].iter().all(|&d| d == 1.0));
        assert!(db == b);
        (da, db)
    });
}

#[test]
fn patches_are_cut_in_the_order_of_a_convolution() {
    let (batch, height, width, patch) = (2, 7, 9, 3);
    let images = noise(batch * 3 * height * width, 1);
    let (mean, std) = ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]);
    let from = Patches { images: &images, batch, height, width, patch, mean, std };
    let pixel =
        |b: usize, c: usize, y: usize, x: usize| (images[((b * 3 + c) * height + y) * width + x] - mean[c]) / std[c];
    let mut all = vec![0.0; batch * 6 * 27];
    let pool = Pool::new(2);
    cut_patches(&pool, from, None, &mut all);
    assert_eq!(all[(6 + 4) * 27 + 9 + 3 + 2], pixel(1, 1, 3 + 1, 3 + 2));
    let index = [5, 0, 1, 3];
    let mut some = vec![0.0; 4 * 27];
    cut_patches(&pool, from, Some(&index), &mut some);
    for (i, &patch) in index.iter().enumerate() {
        let at = (i / 2 * 6 + patch as usize) * 27;
        assert_eq!(some[i * 27..][..27], all[at..][..27]);
    }
}

#[test]
fn the_mix_of_levels_and_its_gradients_agree_with_definitions() {
    for (outputs, levels, len) in [(1, 1, 5), (5, 3, 1000), (12, 12, 9001), (2, 4, 16)] {
        let w = noise(outputs * levels, 1);
        let x: Vec<Vec<f32>> = (0..levels).map(|j| noise(len, 10 + j as u64)).collect();
        let dy: Vec<Vec<f32>> = (0..outputs).map(|i| noise(len, 50 + i as u64)).collect();
        let x: Vec<&[f32]> = x.iter().map(|x| &x[..]).collect();
        let dy: Vec<&[f32]> = dy.iter().map(|x| &x[..]).collect();
        let (y, dx, dw) = on_pools(|pool, arena| {
            let mut y = vec![vec![0.0; len]; outputs];
            let mut dx = vec![vec![1.0; len]; levels];
            let mut dw = vec![1.0; w.len()];
            let views = &mut y.iter_mut().map(|y| &mut y[..]).collect::<Vec<_>>();
            mix(pool, &w, &x, views, Write::Set);
            let views = &mut dx.iter_mut().map(|y| &mut y[..]).collect::<Vec<_>>();
            mix_backward_inputs(pool, &w, &dy, views, Write::Add);
            mix_backward_weights(pool, arena, &x, &dy, &mut dw);
            (y, dx, dw)
        });
        let at = |x: &[f32], e: usize| f64::from(x[e]);
        for i in 0..outputs {
            let want: Vec<f64> =
                (0..len).map(|e| (0..levels).map(|j| at(&w, i * levels + j) * at(x[j], e)).sum()).collect();
            assert_close(&y[i], &want, 1e-6, "mix");
            for j in 0..levels {
                let want = 1.0 + (0..len).map(|e| at(dy[i], e) * at(x[j], e)).sum::<f64>();
                let scale = (len as f64).sqrt();
                assert!((f64::from(dw[i * levels + j]) - want).abs() < 1e-6 * scale);
            }
        }
        for j in 0..levels {
            let want: Vec<f64> = (0..len)
                .map(|e| 1.0 + (0..outputs).map(|i| at(&w, i * levels + j) * at(dy[i], e)).sum::<f64>())
                .collect();
            assert_close(&dx[j], &want, 1e-6, "gradient of the mix");
        }
    }
}

#[test]
fn a_warm_arena_allocates_nothing_more() {
    let (pool, arena) = (Pool::new(1), Arena::new());
    let x = noise(200 * 33, 1);
    let mut sums = vec![0.0; 33];
    add_column_sums(&pool, &arena, &x, 33, &mut sums);
    let once = arena.idle();
    for _ in 0..3 {
        add_column_sums(&pool, &arena, &x, 33, &mut sums);
    }
    assert_eq!(arena.idle(), once);
}
