//! The fused operators at ViT-B's sizes, 16 images: `cargo bench --bench ops`.
//!
//! `THREADS` sets the number of threads (2). Attention and blocks report arithmetic as bytes: one
//! "byte" is one floating-point operation, so that GB/s reads as GFLOP/s.

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use maskalign_kernels::attention::{AttentionShape, Heads, QkvGrad, attention, attention_backward};
use maskalign_kernels::block::{
    BlockGrads, BlockShape, BlockWeights, DropPath, Linear, Save, block_backward, block_forward, pack_weight,
};
use maskalign_kernels::elementwise::{self, Write};
use maskalign_kernels::loss::{Grad, Pointwise, pointwise};
use maskalign_kernels::norm::{layer_norm, layer_norm_backward};
use maskalign_kernels::optim::{AdamW, AdamWTensor, adamw, grad_norm};
use maskalign_kernels::{Act, Arena, Pool};
use std::sync::Arc;

const BATCH: usize = 16;
const DIM: usize = 768;
const HEADS: usize = 12;
/// Tokens of the masked student and of the teacher.
const TOKENS: [usize; 2] = [59, 197];

fn main() {
    divan::main();
}

fn pool() -> Arc<Pool> {
    let threads = std::env::var("THREADS").ok().and_then(|t| t.parse().ok());
    Pool::new(threads.unwrap_or(2))
}

fn noise(len: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn attention_shape(tokens: usize) -> AttentionShape {
    AttentionShape { batch: BATCH, heads: HEADS, head_dim: DIM / HEADS, queries: tokens, keys: tokens }
}

fn attention_work(tokens: usize) -> usize {
    4 * BATCH * tokens * tokens * DIM
}

#[divan::bench(args = TOKENS)]
fn attention_forward(bencher: Bencher, tokens: usize) {
    let (pool, arena, shape) = (pool(), Arena::new(), attention_shape(tokens));
    let qkv = noise(BATCH * tokens * 3 * DIM);
    let [q, k, v] = Heads::fused(&qkv, DIM);
    let mut out = vec![0.0; BATCH * tokens * DIM];
    let mut lse = vec![0.0; shape.lse_len()];
    bencher.counter(BytesCount::new(attention_work(tokens))).bench_local(|| {
        attention(&pool, &arena, shape, q, k, v, black_box(&mut out), Some(&mut lse));
    });
}

#[divan::bench(args = TOKENS, name = "attention_backward")]
fn attention_gradient(bencher: Bencher, tokens: usize) {
    let (pool, arena, shape) = (pool(), Arena::new(), attention_shape(tokens));
    let qkv = noise(BATCH * tokens * 3 * DIM);
    let [q, k, v] = Heads::fused(&qkv, DIM);
    let dout = noise(BATCH * tokens * DIM);
    let mut out = vec![0.0; dout.len()];
    let mut lse = vec![0.0; shape.lse_len()];
    attention(&pool, &arena, shape, q, k, v, &mut out, Some(&mut lse));
    let mut grad = vec![0.0; qkv.len()];
    bencher.counter(BytesCount::new(attention_work(tokens) / 2 * 5)).bench_local(|| {
        let into = QkvGrad::Fused(black_box(&mut grad));
        attention_backward(&pool, &arena, shape, q, k, v, &out, &lse, &dout, into, Write::Set);
    });
}

struct Block {
    weights: [Vec<f32>; 4],
    vector: Vec<f32>,
}

impl Block {
    fn new() -> Self {
        let weights = [3, 1, 4, 4].map(|n| noise(n * DIM * DIM).iter().map(|w| w * 0.05).collect());
        Self { weights, vector: noise(4 * DIM) }
    }

    fn weights(&self) -> BlockWeights<'_> {
        let channels = Some(&self.vector[..DIM]);
        let linear = |i: usize, outputs| Linear::dense(&self.weights[i], Some(&self.vector[..outputs]));
        BlockWeights {
            norm1_gamma: channels,
            norm1_beta: channels,
            qkv: linear(0, 3 * DIM),
            proj: linear(1, DIM),
            ls1: None,
            norm2_gamma: channels,
            norm2_beta: channels,
            fc1: linear(2, 4 * DIM),
            fc2: linear(3, DIM),
            ls2: None,
        }
    }
}

fn block_shape(tokens: usize) -> BlockShape {
    BlockShape { batch: BATCH, tokens, dim: DIM, heads: HEADS, hidden: 4 * DIM, eps: 1e-6, act: Act::Gelu }
}

fn block_work(tokens: usize) -> usize {
    24 * BATCH * tokens * DIM * DIM + attention_work(tokens)
}

#[divan::bench(args = TOKENS, sample_count = 10)]
fn block_forward_packed(bencher: Bencher, tokens: usize) {
    let (pool, arena, shape, block) = (pool(), Arena::new(), block_shape(tokens), Block::new());
    let sizes = [(3 * DIM, DIM), (DIM, DIM), (4 * DIM, DIM), (DIM, 4 * DIM)];
    let packed: Vec<_> =
        block.weights.iter().zip(sizes).map(|(w, (outputs, inputs))| pack_weight(w, outputs, inputs)).collect();
    let dense = block.weights();
    let weights = BlockWeights {
        qkv: Linear::packed(&packed[0], dense.qkv.bias),
        proj: Linear::packed(&packed[1], dense.proj.bias),
        fc1: Linear::packed(&packed[2], dense.fc1.bias),
        fc2: Linear::packed(&packed[3], dense.fc2.bias),
        ..dense
    };
    let x = noise(shape.rows() * DIM);
    let mut y = x.clone();
    bencher.counter(BytesCount::new(block_work(tokens))).bench_local(|| {
        let drop_path = DropPath::default();
        let y = black_box(&mut y);
        block_forward(&pool, &arena, shape, &weights, drop_path, &x, y, Save::Nothing);
    });
}

#[divan::bench(args = TOKENS, sample_count = 10)]
fn block_forward_and_backward(bencher: Bencher, tokens: usize) {
    let (pool, arena, shape, block) = (pool(), Arena::new(), block_shape(tokens), Block::new());
    let weights = block.weights();
    let x = noise(shape.rows() * DIM);
    let mut y = x.clone();
    let [mut qkv, mut proj, mut fc1, mut fc2] = block.weights.clone();
    let [mut qkv_bias, mut fc1_bias] = [vec![0.0; 3 * DIM], vec![0.0; 4 * DIM]];
    let [mut gamma1, mut beta1, mut gamma2, mut beta2, mut proj_bias, mut fc2_bias] = [0; 6].map(|_| vec![0.0; DIM]);
    bencher.counter(BytesCount::new(3 * block_work(tokens))).bench_local(|| {
        let drop_path = DropPath::default();
        let save = Save::ForBackward;
        let saved = block_forward(&pool, &arena, shape, &weights, drop_path, &x, &mut y, save);
        let grads = BlockGrads {
            norm1_gamma: Some(&mut gamma1),
            norm1_beta: Some(&mut beta1),
            qkv_weight: Some(&mut qkv),
            qkv_bias: Some(&mut qkv_bias),
            proj_weight: Some(&mut proj),
            proj_bias: Some(&mut proj_bias),
            norm2_gamma: Some(&mut gamma2),
            norm2_beta: Some(&mut beta2),
            fc1_weight: Some(&mut fc1),
            fc1_bias: Some(&mut fc1_bias),
            fc2_weight: Some(&mut fc2),
            fc2_bias: Some(&mut fc2_bias),
            ..Default::default()
        };
        let dy = black_box(&mut y);
        block_backward(&pool, &arena, shape, &weights, drop_path, &x, saved, dy, None, grads);
    });
}

/// Elements of the student's activations.
const LEN: usize = BATCH * 59 * DIM;

fn bytes(floats: usize) -> BytesCount {
    BytesCount::new(floats * size_of::<f32>())
}

#[divan::bench]
fn layer_norm_forward(bencher: Bencher) {
    let (pool, x, gamma) = (pool(), noise(LEN), noise(DIM));
    let (mut y, mut stats) = (x.clone(), vec![0.0; 2 * LEN / DIM]);
    let affine = Some(&gamma[..]);
    bencher.counter(bytes(2 * LEN)).bench_local(|| {
        layer_norm(&pool, &x, DIM, affine, affine, 1e-6, black_box(&mut y), Some(&mut stats));
    });
}

#[divan::bench(name = "layer_norm_backward")]
fn layer_norm_gradient(bencher: Bencher) {
    let (pool, arena, x, gamma) = (pool(), Arena::new(), noise(LEN), noise(DIM));
    let (mut dx, stats) = (x.clone(), vec![0.5; 2 * LEN / DIM]);
    let (mut dgamma, mut dbeta) = (vec![0.0; DIM], vec![0.0; DIM]);
    bencher.counter(bytes(4 * LEN)).bench_local(|| {
        layer_norm_backward(
            &pool,
            &arena,
            &x,
            DIM,
            &stats,
            Some(&gamma),
            &x,
            black_box(&mut dx),
            Write::Add,
            Some(&mut dgamma),
            Some(&mut dbeta),
        );
    });
}

#[divan::bench]
fn gelu_and_slope(bencher: Bencher) {
    let (pool, mut x) = (pool(), noise(4 * LEN));
    let mut y = x.clone();
    bencher.counter(bytes(4 * 4 * LEN)).bench_local(|| {
        elementwise::activation_and_slope(&pool, Act::Gelu, &mut x, black_box(&mut y));
    });
}

#[divan::bench]
fn mix_of_levels(bencher: Bencher) {
    let (pool, x, w) = (pool(), noise(12 * LEN), noise(60));
    let inputs: Vec<&[f32]> = x.chunks(LEN).collect();
    let mut y = noise(5 * LEN);
    bencher.counter(bytes(17 * LEN)).bench_local(|| {
        let mut outputs: Vec<&mut [f32]> = y.chunks_mut(LEN).collect();
        elementwise::mix(&pool, &w, &inputs, black_box(&mut outputs), Write::Set);
    });
}

#[divan::bench]
fn smooth_l1_and_gradient(bencher: Bencher) {
    let (pool, x, t) = (pool(), noise(LEN), vec![0.0; LEN]);
    let mut grad = x.clone();
    bencher.counter(bytes(3 * LEN)).bench_local(|| {
        let into = Grad { into: &mut grad, scale: 2.0, write: Write::Set };
        pointwise(&pool, Pointwise::SmoothL1 { beta: 1.0 }, &x, black_box(&t), Some(into))
    });
}

/// Parameters of one block.
const PARAMS: usize = 12 * DIM * DIM;

#[divan::bench]
fn adamw_of_one_block(bencher: Bencher) {
    let (pool, grad) = (pool(), noise(PARAMS));
    let (mut param, mut exp_avg, mut exp_avg_sq) = (grad.clone(), vec![0.0; PARAMS], vec![0.0; PARAMS]);
    let adam = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, step: 1, grad_scale: 1.0 };
    bencher.counter(bytes(7 * PARAMS)).bench_local(|| {
        let tensor = AdamWTensor {
            param: black_box(&mut param),
            grad: &grad,
            exp_avg: &mut exp_avg,
            exp_avg_sq: &mut exp_avg_sq,
            lr: 1e-5,
            weight_decay: 0.05,
        };
        adamw(&pool, adam, &mut [tensor]);
    });
}

#[divan::bench]
fn gradient_norm_of_one_block(bencher: Bencher) {
    let (pool, grad) = (pool(), noise(PARAMS));
    bencher.counter(bytes(PARAMS)).bench_local(|| grad_norm(&pool, black_box(&[&grad])));
}
