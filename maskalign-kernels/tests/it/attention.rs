//! Attention against its definition in double precision.

use crate::support::*;
use maskalign_kernels::attention::{AttentionShape, Heads, QkvGrad, attention, attention_backward, cls_attention};
use maskalign_kernels::elementwise::Write;

fn naive(s: AttentionShape) -> Attention {
    let AttentionShape { batch, heads, head_dim, queries, keys } = s;
    Attention { batch, heads, head_dim, queries, keys }
}

fn shape(batch: usize, heads: usize, head_dim: usize, queries: usize, keys: usize) -> AttentionShape {
    AttentionShape { batch, heads, head_dim, queries, keys }
}

/// Odd sizes: one token, one image, narrow and wide heads, more and fewer queries than keys, and
/// more queries than one block holds.
fn shapes() -> Vec<AttentionShape> {
    vec![
        shape(1, 1, 5, 1, 1),
        shape(2, 3, 5, 7, 7),
        shape(1, 2, 16, 17, 3),
        shape(3, 1, 80, 2, 33),
        shape(2, 2, 24, 50, 59),
        shape(1, 2, 64, 101, 15),
        shape(1, 1, 33, 48, 49),
    ]
}

struct Case {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    dout: Vec<f32>,
}

fn case(s: AttentionShape) -> Case {
    let queries = s.batch * s.queries * s.dim();
    let keys = s.batch * s.keys * s.dim();
    let large = |x: Vec<f32>| x.into_iter().map(|x| 3.0 * x).collect();
    Case { q: large(noise(queries, 1)), k: large(noise(keys, 2)), v: noise(keys, 3), dout: noise(queries, 4) }
}

#[test]
fn forward_agrees_with_the_definition() {
    for s in shapes() {
        let c = case(s);
        let (want, _) = wide_attention(naive(s), &wide(&c.q), &wide(&c.k), &wide(&c.v));
        let out = on_pools(|pool, arena| {
            let mut out = vec![f32::NAN; want.len()];
            let [q, k, v] = [&c.q, &c.k, &c.v].map(|x| Heads::separate(x, s.dim()));
            attention(pool, arena, s, q, k, v, &mut out, None);
            out
        });
        assert_close(&out, &want, 1e-6, &format!("{s:?}"));
    }
}

#[test]
fn backward_agrees_with_finite_differences() {
    for s in shapes() {
        let c = case(s);
        let [q, k, v] = [&c.q, &c.k, &c.v].map(|x| Heads::separate(x, s.dim()));
        let [dq, dk, dv] = on_pools(|pool, arena| {
            let mut out = vec![0.0; c.q.len()];
            let mut lse = vec![0.0; s.lse_len()];
            attention(pool, arena, s, q, k, v, &mut out, Some(&mut lse));
            // What is there already must be kept: the gradient is added.
            let mut dq = vec![1.0; c.q.len()];
            let mut dk = vec![2.0; c.k.len()];
            let mut dv = vec![3.0; c.v.len()];
            let into = QkvGrad::Separate { q: &mut dq, k: &mut dk, v: &mut dv };
            attention_backward(pool, arena, s, q, k, v, &out, &lse, &c.dout, into, Write::Add);
            let less = |x: Vec<f32>, y: f32| x.into_iter().map(|x| x - y).collect::<Vec<_>>();
            [less(dq, 1.0), less(dk, 2.0), less(dv, 3.0)]
        });
        let (q, k, v) = (wide(&c.q), wide(&c.k), wide(&c.v));
        let loss = |q: &[f64], k: &[f64], v: &[f64]| weighted_sum(&wide_attention(naive(s), q, k, v).0, &c.dout);
        let picks = |len: usize| (0..len).step_by(1 + len / 40).collect::<Vec<_>>();
        let check = |got: &[f32], want: Vec<f64>, name: &str| {
            let got: Vec<f32> = picks(got.len()).into_iter().map(|i| got[i]).collect();
            // With a single key the gradient of the scores is exactly zero.
            let scale = want.iter().fold(0.0f64, |m, w| m.max(w.abs()));
            if s.keys == 1 && scale < 1e-9 {
                assert!(got.iter().all(|g| g.abs() < 1e-6), "{name} {s:?}");
            } else {
                assert_close(&got, &want, 2e-6, &format!("{name} {s:?}"));
            }
        };
        check(&dq, finite_differences(&q, picks(q.len()), |q| loss(q, &k, &v)), "dq");
        check(&dk, finite_differences(&k, picks(k.len()), |k| loss(&q, k, &v)), "dk");
        check(&dv, finite_differences(&v, picks(v.len()), |v| loss(&q, &k, v)), "dv");
    }
}

#[test]
fn a_fused_buffer_gives_what_separate_ones_give() {
    let s = shape(2, 3, 20, 21, 21);
    let dim = s.dim();
    let c = case(s);
    let rows = s.batch * s.queries;
    let fuse = |q: &[f32], k: &[f32], v: &[f32]| {
        let mut fused = vec![0.0; rows * 3 * dim];
        for r in 0..rows {
            for (part, x) in [q, k, v].into_iter().enumerate() {
                fused[(r * 3 + part) * dim..][..dim].copy_from_slice(&x[r * dim..][..dim]);
            }
        }
        fused
    };
    let fused = fuse(&c.q, &c.k, &c.v);
    let views = [[&c.q, &c.k, &c.v].map(|x| Heads::separate(x, dim)), Heads::fused(&fused, dim)];
    let pool = maskalign_kernels::Pool::new(2);
    let arena = maskalign_kernels::Arena::new();
    let mut results = Vec::new();
    for (i, [q, k, v]) in views.into_iter().enumerate() {
        let mut out = vec![0.0; rows * dim];
        let mut lse = vec![0.0; s.lse_len()];
        attention(&pool, &arena, s, q, k, v, &mut out, Some(&mut lse));
        let mut dfused = vec![0.0; rows * 3 * dim];
        if i == 0 {
            let [mut dq, mut dk, mut dv] = [0; 3].map(|_| vec![0.0; rows * dim]);
            let into = QkvGrad::Separate { q: &mut dq, k: &mut dk, v: &mut dv };
            attention_backward(&pool, &arena, s, q, k, v, &out, &lse, &c.dout, into, Write::Set);
            dfused = fuse(&dq, &dk, &dv);
        } else {
            let into = QkvGrad::Fused(&mut dfused);
            attention_backward(&pool, &arena, s, q, k, v, &out, &lse, &c.dout, into, Write::Set);
        }
        results.push((out, lse, dfused));
    }
    assert!(results[0] == results[1]);
}

#[test]
fn cls_attention_is_the_mean_of_the_first_rows_probabilities() {
    for s in [shape(2, 3, 5, 7, 7), shape(1, 1, 16, 1, 1), shape(3, 4, 64, 50, 50)] {
        let c = case(s);
        let (_, probs) = wide_attention(naive(s), &wide(&c.q), &wide(&c.k), &wide(&c.v));
        let mut want = vec![0.0; s.batch * (s.keys - 1)];
        for b in 0..s.batch {
            for h in 0..s.heads {
                let row = &probs[(b * s.heads + h) * s.queries * s.keys..][..s.keys];
                for (j, p) in row[1..].iter().enumerate() {
                    want[b * (s.keys - 1) + j] += p / s.heads as f64;
                }
            }
        }
        let got = on_pools(|pool, arena| {
            let mut got = vec![f32::NAN; want.len()];
            let [q, k] = [&c.q, &c.k].map(|x| Heads::separate(x, s.dim()));
            cls_attention(pool, arena, s, q, s.queries, k, &mut got);
            got
        });
        assert_close(&got, &want, 1e-6, &format!("{s:?}"));
    }
}

#[test]
fn large_scores_neither_overflow_nor_vanish() {
    let s = shape(1, 1, 8, 4, 6);
    let c = case(s);
    let q: Vec<f32> = c.q.iter().map(|q| q * 300.0).collect();
    let (want, _) = wide_attention(naive(s), &wide(&q), &wide(&c.k), &wide(&c.v));
    let mut out = vec![0.0; want.len()];
    let [q, k, v] = [&q, &c.k, &c.v].map(|x| Heads::separate(x, s.dim()));
    let pool = maskalign_kernels::Pool::new(1);
    attention(&pool, &maskalign_kernels::Arena::new(), s, q, k, v, &mut out, None);
    assert_close(&out, &want, 1e-4, "large scores");
}

#[test]
fn vit_b_sizes_agree_with_double_precision() {
    for s in [shape(1, 12, 64, 197, 197), shape(1, 12, 64, 59, 59), shape(1, 12, 64, 59, 197)] {
        let c = case(s);
        let (want, _) = wide_attention(naive(s), &wide(&c.q), &wide(&c.k), &wide(&c.v));
        let mut out = vec![0.0; want.len()];
        let [q, k, v] = [&c.q, &c.k, &c.v].map(|x| Heads::separate(x, s.dim()));
        let pool = maskalign_kernels::Pool::new(2);
        attention(&pool, &maskalign_kernels::Arena::new(), s, q, k, v, &mut out, None);
        assert_close(&out, &want, 1e-6, &format!("{s:?}"));
    }
}
