//! Every operator that splits its outputs among tasks by unchecked code, at sizes that miri can follow (`.ci/miri.sh`).
//!
//! Other tests check what they compute; here several threads write, and the result must be that of one thread.

use crate::attention::{AttentionShape, Heads, QkvGrad, attention, attention_backward, cls_attention};
use crate::batch_norm::{Affine, BatchNormGrads, ColumnStats, batch_norm, batch_norm_backward, column_stats};
use crate::elementwise::{
    Write, activation_and_slope, gather_rows, mix, multiply_and_add_column_sums, scatter_add_rows,
};
use crate::loss::{Grad, Pointwise, cosine, cross_entropy, kl, pointwise};
use crate::norm::{layer_norm, layer_norm_backward};
use crate::optim::{AdamW, AdamWTensor, Lars, LarsRule, LarsTensor, adamw, ema_update, lars};
use crate::testing::{on_pools, wave};
use crate::{Act, Arena, Epilogue, MatRef, PackedB, Rhs, gemm};

#[test]
fn products() {
    // More rows and columns than a tile, in each order of either operand, with and without an epilogue.
    let (m, n, k) = (14, 34, 5);
    let (a, b, bias) = (wave(m * k, 1), wave(k * n, 2), wave(n, 3));
    let orders = |data, rows, cols| [MatRef::row_major(data, cols), MatRef::row_major(data, rows).t()];
    for a in orders(&a, m, k) {
        for b in orders(&b, k, n) {
            let packed = PackedB::new(b, k, n);
            on_pools(|pool| {
                let (mut c, mut pre) = (vec![0.0; m * (n + 3)], vec![0.0; m * n]);
                let plain = Epilogue { bias: Some(&bias), accumulate: true, ..Epilogue::default() };
                gemm(pool, m, n, k, a, Rhs::Packed(&packed), &mut c, n + 3, plain);
                let full = Epilogue { pre: Some(&mut pre), act: Act::Gelu, ..Epilogue::default() };
                gemm(pool, m, n, k, a, Rhs::Strided(b), &mut c, n + 3, full);
                [c, pre].concat()
            });
        }
    }
}

#[test]
fn attentions() {
    let shape = AttentionShape { batch: 2, heads: 2, head_dim: 3, queries: 5, keys: 5 };
    let (dim, rows) = (shape.dim(), shape.batch * shape.queries);
    let (qkv, dout) = (wave(rows * 3 * dim, 1), wave(rows * dim, 2));
    let [q, k, v] = Heads::fused(&qkv, dim);
    on_pools(|pool| {
        let arena = Arena::new();
        let (mut out, mut lse) = (vec![0.0; rows * dim], vec![0.0; shape.lse_len()]);
        attention(pool, &arena, shape, q, k, v, &mut out, Some(&mut lse));
        let mut grad = vec![0.0; qkv.len()];
        let into = QkvGrad::Fused(&mut grad);
        attention_backward(pool, &arena, shape, q, k, v, &out, &lse, &dout, into, Write::Add);
        let mut cls = vec![0.0; shape.batch * (shape.keys - 1)];
        cls_attention(pool, &arena, shape, q, shape.queries, k, &mut cls);
        [out, lse, grad, cls].concat()
    });
}

#[test]
fn norms() {
    let (rows, cols) = (70, 5);
    let (x, dy, gamma) = (wave(rows * cols, 1), wave(rows * cols, 2), wave(cols, 3));
    on_pools(|pool| {
        let arena = Arena::new();
        let (mut y, mut stats) = (vec![0.0; x.len()], vec![0.0; 2 * rows]);
        let (mut dx, mut dgamma) = (vec![0.0; x.len()], vec![0.0; cols]);
        layer_norm(pool, &x, cols, Some(&gamma), None, 1e-6, &mut y, Some(&mut stats));
        let gradient = Some(&mut dgamma[..]);
        layer_norm_backward(pool, &arena, &x, cols, &stats, Some(&gamma), &dy, &mut dx, Write::Set, gradient, None);
        [y, stats, dx, dgamma].concat()
    });
    // More columns than a task takes.
    let cols = 70;
    let rows = 5;
    let gamma = wave(cols, 3);
    on_pools(|pool| {
        let (mut mean, mut var) = (vec![0.0; cols], vec![0.0; cols]);
        column_stats(pool, &x, &mut mean, &mut var);
        let stats = ColumnStats { mean: &mean, var: &var, eps: 1e-6 };
        let (mut y, mut dx) = (vec![0.0; rows * cols], vec![0.0; rows * cols]);
        let (mut dgamma, mut dbeta) = (vec![0.0; cols], vec![0.0; cols]);
        batch_norm(pool, &x, stats, Affine { gamma: Some(&gamma), beta: None }, &mut y);
        let grads = BatchNormGrads { dx: Some(&mut dx), dgamma: Some(&mut dgamma), dbeta: Some(&mut dbeta) };
        batch_norm_backward(pool, &x, stats, Some(&gamma), &dy, grads);
        [mean, var, y, dx, dgamma, dbeta].concat()
    });
}

#[test]
fn rows_and_elements() {
    let cols = 70;
    let (x, dy) = (wave(6 * cols, 1), wave(4 * cols, 2));
    let index = [5, 0, 2, 2];
    on_pools(|pool| {
        let arena = Arena::new();
        let mut picked = vec![0.0; 4 * cols];
        let (head, tail) = x.split_at(2 * cols);
        gather_rows(pool, &[head, tail], cols, &index, &mut picked);
        let mut added = x.clone();
        let (to_head, to_tail) = added.split_at_mut(2 * cols);
        scatter_add_rows(pool, &dy, cols, &index, &mut [to_head, to_tail]);
        let (mut slope, mut y) = (x.clone(), vec![0.0; x.len()]);
        activation_and_slope(pool, Act::QuickGelu, &mut slope, &mut y);
        let mut sums = vec![0.0; cols];
        multiply_and_add_column_sums(pool, &arena, &slope, &mut y, cols, &mut sums);
        let mut mixed = vec![0.0; 2 * cols];
        let (first, second) = mixed.split_at_mut(cols);
        mix(pool, &[0.5, 2.0], &[&x[..cols]], &mut [first, second], Write::Set);
        [picked, added, slope, y, sums, mixed].concat()
    });
}

#[test]
fn losses_and_updates() {
    let cols = 6;
    let (pred, target) = (wave(5 * cols, 1), wave(5 * cols, 2));
    on_pools(|pool| {
        let mut into = vec![0.0; pred.len()];
        let mut grad = |f: &dyn Fn(Grad<'_>) -> f64| f(Grad { into: &mut into, scale: 1.0, write: Write::Add }) as f32;
        let values = vec![
            grad(&|g| pointwise(pool, Pointwise::Mse, &pred, &target, Some(g))),
            grad(&|g| cosine(pool, &pred, &target, cols, Some(g))),
            grad(&|g| kl(pool, &pred, &target, cols, Some(g))),
            grad(&|g| cross_entropy(pool, &pred, &target, cols, Some(g))),
        ];
        let [mut param, mut other, mut moving] = [(); 3].map(|()| pred.clone());
        let [mut exp_avg, mut exp_avg_sq, mut momentum] = [(); 3].map(|()| vec![0.0; pred.len()]);
        let adam = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, step: 1, grad_scale: 1.0 };
        let tensor = AdamWTensor {
            param: &mut param,
            grad: &into,
            exp_avg: &mut exp_avg,
            exp_avg_sq: &mut exp_avg_sq,
            lr: 0.1,
            weight_decay: 0.1,
        };
        adamw(pool, adam, &mut [tensor]);
        let rule = LarsRule::Adapted { weight_decay: 0.1 };
        let tensor = LarsTensor { param: &mut other, grad: &into, momentum: &mut momentum, lr: 0.1, rule };
        lars(pool, Lars { momentum: 0.9, trust_coefficient: 0.001, grad_scale: 1.0 }, &mut [tensor]);
        ema_update(pool, &mut moving, &param, 0.5);
        [values, into, param, other, moving, exp_avg, exp_avg_sq, momentum].concat()
    });
}
