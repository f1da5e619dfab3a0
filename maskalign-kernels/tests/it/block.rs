//! The transformer block against timm, finite differences and itself in its other modes.

use crate::support::*;
use maskalign_kernels::block::*;
use maskalign_kernels::{Act, Arena, Pool};

const NAMES: [&str; 14] = [
    "norm1.weight",
    "norm1.bias",
    "attn.qkv.weight",
    "attn.qkv.bias",
    "attn.proj.weight",
    "attn.proj.bias",
    "ls1.gamma",
    "norm2.weight",
    "norm2.bias",
    "mlp.fc1.weight",
    "mlp.fc1.bias",
    "mlp.fc2.weight",
    "mlp.fc2.bias",
    "ls2.gamma",
];

/// A block's parameters in the order of [`NAMES`].
#[derive(Clone)]
struct Params {
    values: Vec<Option<Vec<f32>>>,
}

fn sizes(s: &BlockShape) -> [usize; 14] {
    let (c, h) = (s.dim, s.hidden);
    [c, c, 3 * c * c, 3 * c, c * c, c, c, c, c, h * c, h, c * h, c, c]
}

impl Params {
    fn random(s: &BlockShape, layer_scale: bool, bias: bool) -> Self {
        let make = |(i, len): (usize, usize)| {
            let scale = if NAMES[i].ends_with("weight") && !NAMES[i].starts_with("norm") {
                1.0 / (s.dim as f32).sqrt()
            } else {
                0.3
            };
            let centre = if NAMES[i].starts_with("norm") && i % 7 == 0 { 1.0 } else { 0.0 };
            let skip = (NAMES[i].starts_with("ls") && !layer_scale) || (NAMES[i].ends_with("bias") && !bias);
            (!skip).then(|| noise(len, 100 + i as u64).iter().map(|x| centre + scale * x).collect())
        };
        Self { values: sizes(s).into_iter().enumerate().map(make).collect() }
    }

    fn get(&self, i: usize) -> Option<&[f32]> {
        self.values[i].as_deref()
    }

    fn weights(&self) -> BlockWeights<'_> {
        let linear = |i| Linear::dense(self.get(i).expect("a weight"), self.get(i + 1));
        BlockWeights {
            norm1_gamma: self.get(0),
            norm1_beta: self.get(1),
            qkv: linear(2),
            proj: linear(4),
            ls1: self.get(6),
            norm2_gamma: self.get(7),
            norm2_beta: self.get(8),
            fc1: linear(9),
            fc2: linear(11),
            ls2: self.get(13),
        }
    }
}

fn grads_of(buffers: &mut [Vec<f32>]) -> BlockGrads<'_> {
    let mut buffers = buffers.iter_mut().map(|b| Some(&mut b[..]));
    let mut next = || buffers.next().expect("fourteen buffers");
    BlockGrads {
        norm1_gamma: next(),
        norm1_beta: next(),
        qkv_weight: next(),
        qkv_bias: next(),
        proj_weight: next(),
        proj_bias: next(),
        ls1: next(),
        norm2_gamma: next(),
        norm2_beta: next(),
        fc1_weight: next(),
        fc1_bias: next(),
        fc2_weight: next(),
        fc2_bias: next(),
        ls2: next(),
    }
}

struct Step {
    y: Vec<f32>,
    dx: Vec<f32>,
    grads: Vec<Vec<f32>>,
}

/// Forward and backward; `save` chooses between saved and recomputed intermediate results.
#[expect(clippy::too_many_arguments, reason = "operands and shapes of one product")]
fn step(
    pool: &Pool,
    arena: &Arena,
    s: BlockShape,
    p: &Params,
    drop_path: DropPath<'_>,
    x: &[f32],
    dy: &[f32],
    save: Save,
) -> Step {
    let weights = p.weights();
    let mut y = vec![f32::NAN; x.len()];
    let saved = block_forward(pool, arena, s, &weights, drop_path, x, &mut y, save);
    assert_eq!(saved.is_some(), save == Save::ForBackward);
    let mut grads: Vec<Vec<f32>> = sizes(&s).iter().map(|&n| vec![0.0; n]).collect();
    let mut dx = dy.to_vec();
    block_backward(pool, arena, s, &weights, drop_path, x, saved, &mut dx, None, grads_of(&mut grads));
    Step { y, dx, grads }
}

#[test]
fn forward_and_gradients_equal_timm() {
    for (name, scaled) in [("plain", false), ("scaled", true)] {
        let s = BlockShape {
            batch: 3,
            tokens: 5,
            dim: 12,
            heads: 3,
            hidden: 20,
            eps: 1e-6,
            act: if scaled { Act::QuickGelu } else { Act::Gelu },
        };
        let mut seed = 0;
        let values = sizes(&s)
            .into_iter()
            .zip(NAMES)
            .map(|(len, name)| {
                if name.starts_with("ls") && !scaled {
                    return None;
                }
                seed += 1;
                let centre = if name.starts_with("norm") && name.ends_with("weight") { 1.0 } else { 0.0 };
                Some(wave(len, seed).iter().map(|x| x * 0.4 + centre).collect())
            })
            .collect();
        let p = Params { values };
        let n = s.rows() * s.dim;
        let (drop1, drop2) = ([1.25, 0.0, 1.25], [0.0, 1.25, 1.25]);
        let drop_path = DropPath { attention: scaled.then_some(&drop1[..]), mlp: scaled.then_some(&drop2[..]) };
        let (x, dy) = (wave(n, 20), wave(n, 21));
        for save in [Save::ForBackward, Save::Nothing] {
            let (y, dx, grads) = on_pools(|pool, arena| {
                let r = step(pool, arena, s, &p, drop_path, &x, &dy, save);
                (r.y, r.dx, r.grads)
            });
            assert_close(&y, &recorded(&format!("block_{name}")), 1e-6, "output");
            assert_close(&dx, &recorded(&format!("block_{name}_x")), 2e-6, "gradient of the input");
            for (i, key) in NAMES.iter().enumerate() {
                if p.get(i).is_some() {
                    let want = recorded(&format!("block_{name}_{key}"));
                    assert_close(&grads[i], &want, 1e-5, key);
                }
            }
        }
    }
}

/// The block in double precision.
fn naive(s: &BlockShape, p: &[Option<Vec<f64>>], drops: [&[f64]; 2], x: &[f64]) -> Vec<f64> {
    let get = |i: usize| p[i].as_deref();
    let c = s.dim;
    let residual = |x: &[f64], z: &[f64], ls: Option<&[f64]>, drops: &[f64]| -> Vec<f64> {
        (0..x.len()).map(|i| x[i] + drops[i / (c * s.tokens)] * ls.map_or(1.0, |l| l[i % c]) * z[i]).collect()
    };
    let eps = f64::from(s.eps);
    let h = wide_layer_norm(x, c, get(0), get(1), eps);
    let qkv = wide_linear(&h, get(2).expect("a weight"), get(3), c);
    let part = |part: usize| -> Vec<f64> {
        qkv.chunks(3 * c).flat_map(|row| row[part * c..(part + 1) * c].to_vec()).collect()
    };
    let sizes = Attention { batch: s.batch, heads: s.heads, head_dim: c / s.heads, queries: s.tokens, keys: s.tokens };
    let (out, _) = wide_attention(sizes, &part(0), &part(1), &part(2));
    let x1 = residual(x, &wide_linear(&out, get(4).expect("a weight"), get(5), c), get(6), drops[0]);
    let h = wide_layer_norm(&x1, c, get(7), get(8), eps);
    let inner: Vec<f64> =
        wide_linear(&h, get(9).expect("a weight"), get(10), c).into_iter().map(|x| wide_act(s.act, x)).collect();
    residual(&x1, &wide_linear(&inner, get(11).expect("a weight"), get(12), s.hidden), get(13), drops[1])
}

fn odd_shapes() -> Vec<BlockShape> {
    let shape =
        |batch, tokens, dim, heads, hidden, act| BlockShape { batch, tokens, dim, heads, hidden, eps: 1e-5, act };
    vec![shape(1, 1, 6, 1, 5, Act::Gelu), shape(2, 7, 15, 3, 33, Act::QuickGelu), shape(4, 18, 32, 2, 40, Act::Gelu)]
}

#[test]
fn gradients_of_odd_sizes_agree_with_finite_differences() {
    for (layer_scale, bias) in [(false, true), (true, false), (true, true)] {
        for s in odd_shapes() {
            let p = Params::random(&s, layer_scale, bias);
            let n = s.rows() * s.dim;
            let (x, dy) = (noise(n, 1), noise(n, 2));
            let drops: Vec<f32> = (0..s.batch).map(|b| if b % 3 == 1 { 0.0 } else { 1.5 }).collect();
            let all = vec![1.0; s.batch];
            let drop_path = DropPath { attention: Some(&drops), mlp: None };
            let (y, dx, grads) = on_pools(|pool, arena| {
                let r = step(pool, arena, s, &p, drop_path, &x, &dy, Save::ForBackward);
                (r.y, r.dx, r.grads)
            });
            let params: Vec<Option<Vec<f64>>> = p.values.iter().map(|v| v.as_deref().map(wide)).collect();
            let drops = [&wide(&drops)[..], &all];
            let x = wide(&x);
            assert_close(&y, &naive(&s, &params, drops, &x), 1e-6, "output");
            let picks = |len: usize| (0..len).step_by(1 + len / 7);
            let some = |got: &[f32]| picks(got.len()).map(|i| got[i]).collect::<Vec<_>>();
            let loss = |p: &[Option<Vec<f64>>], x: &[f64]| weighted_sum(&naive(&s, p, drops, x), &dy);
            let want = finite_differences(&x, picks(n), |x| loss(&params, x));
            assert_close(&some(&dx), &want, 1e-5, "gradient of the input");
            for i in 0..14 {
                let Some(value) = &params[i] else { continue };
                let want = finite_differences(value, picks(value.len()), |v| {
                    let mut p = params.clone();
                    p[i] = Some(v.to_vec());
                    loss(&p, &x)
                });
                // Queries and keys of a single token have no gradient; differences give noise.
                let error = relative_error(&some(&grads[i]), &want);
                let large = want.iter().any(|w| w.abs() > 1e-6);
                assert!(error < 1e-5 || !large, "{}: {error:.1e} {s:?}", NAMES[i]);
            }
        }
    }
}

#[test]
fn recomputation_changes_no_bit_and_gradients_accumulate() {
    let s = odd_shapes()[2];
    let p = Params::random(&s, false, true);
    let n = s.rows() * s.dim;
    let (x, dy) = (noise(n, 1), noise(n, 2));
    let drops = [1.2, 0.0, 1.2, 1.2];
    for drop_path in [
        DropPath::default(),
        DropPath { attention: Some(&drops), mlp: Some(&drops) },
        DropPath { attention: Some(&[0.0; 4]), mlp: Some(&[0.0; 4]) },
    ] {
        let (pool, arena) = (Pool::new(2), Arena::new());
        let saved = step(&pool, &arena, s, &p, drop_path, &x, &dy, Save::ForBackward);
        let again = step(&pool, &arena, s, &p, drop_path, &x, &dy, Save::Nothing);
        assert!(saved.y == again.y && saved.dx == again.dx && saved.grads == again.grads);
        if drop_path.attention == Some(&[0.0; 4]) {
            assert!(saved.y == x && saved.dx == dy);
        }

        let (mut used, mut dx) = (dy.clone(), vec![1.0; n]);
        let mut grads: Vec<Vec<f32>> = sizes(&s).iter().map(|&n| vec![2.0; n]).collect();
        block_backward(
            &pool,
            &arena,
            s,
            &p.weights(),
            drop_path,
            &x,
            None,
            &mut used,
            Some(&mut dx),
            grads_of(&mut grads),
        );
        assert!(dx.iter().zip(&saved.dx).all(|(a, b)| *a == 1.0 + b));
        for (a, b) in grads.iter().flatten().zip(saved.grads.iter().flatten()) {
            assert!((a - 2.0 - b).abs() < 1e-5);
        }
    }
}

#[test]
fn dropped_samples_change_no_bit_of_the_others() {
    let s = odd_shapes()[2];
    let p = Params::random(&s, false, true);
    let n = s.rows() * s.dim;
    let (x, dy) = (noise(n, 1), noise(n, 2));
    let (pool, arena) = (Pool::new(2), Arena::new());
    let run = |drops: &[f32]| {
        let drop_path = DropPath { attention: Some(drops), mlp: Some(drops) };
        step(&pool, &arena, s, &p, drop_path, &x, &dy, Save::ForBackward)
    };
    let (all, some) = (run(&[1.2; 4]), run(&[1.2, 0.0, 1.2, 1.2]));
    let sample = n / 4;
    for kept in [0, 2, 3] {
        let range = kept * sample..(kept + 1) * sample;
        assert!(all.y[range.clone()] == some.y[range.clone()]);
        assert!(all.dx[range.clone()] == some.dx[range]);
    }
    assert!(some.y[sample..2 * sample] == x[sample..2 * sample]);
    assert!(some.dx[sample..2 * sample] == dy[sample..2 * sample]);
}

#[test]
fn memory_does_not_grow_as_other_samples_are_dropped() {
    let s = BlockShape { batch: 8, tokens: 40, ..odd_shapes()[2] };
    let p = Params::random(&s, false, true);
    let n = s.rows() * s.dim;
    let (x, dy) = (noise(n, 1), noise(n, 2));
    let (pool, arena) = (Pool::new(1), Arena::new());
    let run = |dropped: usize| {
        let drops: Vec<f32> = (0..8).map(|b| if b < dropped { 0.0 } else { 1.5 }).collect();
        let drop_path = DropPath { attention: Some(&drops), mlp: Some(&drops) };
        step(&pool, &arena, s, &p, drop_path, &x, &dy, Save::ForBackward);
        arena.idle()
    };
    let most = run(0).max(run(1));
    for dropped in [3, 7, 2, 8, 5, 6, 4] {
        // A twentieth for small sums whose number depends on the rows.
        assert!(run(dropped) <= most + most / 20);
    }
}

#[test]
fn packed_weights_give_what_dense_ones_give() {
    // The last one is computed in several groups of images.
    let large = BlockShape { batch: 7, tokens: 501, dim: 8, heads: 2, hidden: 9, eps: 1e-5, act: Act::Gelu };
    for s in odd_shapes().into_iter().chain([large]) {
        let p = Params::random(&s, true, true);
        let x = noise(s.rows() * s.dim, 1);
        let dense = p.weights();
        let pack = |i: usize, outputs, inputs| pack_weight(p.get(i).expect("a weight"), outputs, inputs);
        let (c, h) = (s.dim, s.hidden);
        let packs = [pack(2, 3 * c, c), pack(4, c, c), pack(9, h, c), pack(11, c, h)];
        let packed = BlockWeights {
            qkv: Linear::packed(&packs[0], p.get(3)),
            proj: Linear::packed(&packs[1], p.get(5)),
            fc1: Linear::packed(&packs[2], p.get(10)),
            fc2: Linear::packed(&packs[3], p.get(12)),
            ..dense
        };
        let run = |weights: &BlockWeights<'_>| {
            on_pools(|pool, arena| {
                let mut y = vec![f32::NAN; x.len()];
                let none = DropPath::default();
                block_forward(pool, arena, s, weights, none, &x, &mut y, Save::Nothing);
                y
            })
        };
        assert!(run(&dense) == run(&packed));
    }
}

#[test]
fn the_split_last_block_equals_the_whole_one() {
    for s in odd_shapes() {
        let p = Params::random(&s, true, true);
        let x = noise(s.rows() * s.dim, 1);
        let weights = SplitWeights::dense(p.weights(), s.dim);
        let picked = s.tokens.div_ceil(2);
        let tokens: Vec<u32> =
            (0..s.batch * picked).map(|i| ((i % picked * 2 + i / picked) % s.tokens) as u32).collect();
        let (whole, cls, some) = on_pools(|pool, arena| {
            let mut whole = vec![0.0; x.len()];
            let none = DropPath::default();
            block_forward(pool, arena, s, &p.weights(), none, &x, &mut whole, Save::Nothing);
            let mut cls = vec![f32::NAN; s.batch * (s.tokens - 1)];
            let last = LastBlock::begin(pool, arena, s, &weights, &x, &mut cls);
            let mut some = vec![f32::NAN; tokens.len() * s.dim];
            last.finish(pool, arena, s, &weights, &x, &tokens, &mut some);
            (whole, cls, some)
        });
        for (i, (&token, row)) in tokens.iter().zip(some.chunks(s.dim)).enumerate() {
            let at = (i / picked * s.tokens + token as usize) * s.dim;
            assert_close(row, &wide(&whole[at..at + s.dim]), 1e-6, "picked row");
        }
        for cls in cls.chunks(s.tokens.max(2) - 1) {
            let sum: f32 = cls.iter().sum();
            assert!(sum > 0.0 && sum < 1.0 && cls.iter().all(|&p| p > 0.0));
        }
    }
}

/// One image of ViT-B: the blocked products at their real sizes, a few rows checked in double
/// precision.
#[test]
fn vit_b_sizes_agree_with_double_precision() {
    let s = BlockShape { batch: 1, tokens: 59, dim: 768, heads: 12, hidden: 3072, eps: 1e-6, act: Act::Gelu };
    let p = Params::random(&s, false, true);
    let n = s.rows() * s.dim;
    let (x, dy) = (noise(n, 1), noise(n, 2));
    let (pool, arena) = (Pool::new(2), Arena::new());
    let r = step(&pool, &arena, s, &p, DropPath::default(), &x, &dy, Save::ForBackward);
    let params: Vec<Option<Vec<f64>>> = p.values.iter().map(|v| v.as_deref().map(wide)).collect();
    let ones = [1.0];
    assert_close(&r.y, &naive(&s, &params, [&ones, &ones], &wide(&x)), 1e-6, "output");
    let bias: Vec<f64> = (0..s.dim).map(|c| dy.iter().skip(c).step_by(s.dim).map(|&d| f64::from(d)).sum()).collect();
    assert_close(&r.grads[12], &bias, 1e-6, "gradient of the last bias");
    // A few elements of each weight's gradient against differences along them.
    let loss = |p: &[Option<Vec<f64>>]| weighted_sum(&naive(&s, p, [&ones, &ones], &wide(&x)), &dy);
    for i in [2, 11] {
        let value = params[i].as_deref().expect("a weight");
        let picks = [value.len() / 2 + 7];
        let want = finite_differences(value, picks, |v| {
            let mut p = params.clone();
            p[i] = Some(v.to_vec());
            loss(&p)
        });
        assert_close(&picks.map(|at| r.grads[i][at]), &want, 1e-4, NAMES[i]);
    }
}
