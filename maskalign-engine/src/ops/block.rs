//! The pre-norm transformer block: `x + ls1 attn(norm1 x)`, then `x + ls2 mlp(norm2 x)`.
//!
//! On the CPU a whole block is one operator: one closure holds what its backward pass needs, and frees it as it runs.

use std::{any::Any, sync::Arc};

use maskalign_kernels::block::{self as kernel, BlockGrads, DropPath, LastBlock, Save, SplitWeights};

use super::{
    Act, AttentionShape, LinearWeights, NormWeights, Packed, Replaced, add, attention, flat_rows, gather_rows,
    layer_norm, linear, made_on_cpu, slice_columns, through_host_one,
};
use crate::{
    context::{Context, Form},
    error::Result,
    tape::{Recompute, Slot, Tape},
    tensor::Tensor,
};

/// The weights and constants of a block.
#[derive(Clone)]
pub struct BlockWeights {
    /// The norm before the attention.
    pub norm1: NormWeights,
    /// Queries, keys and values, in that order: `[3 * dim, dim]`.
    pub qkv: LinearWeights,
    /// The projection after the attention.
    pub proj: LinearWeights,
    /// LayerScale of the attention branch, `[1, dim]`.
    pub ls1: Option<Tensor>,
    /// The norm before the MLP.
    pub norm2: NormWeights,
    /// First layer of the MLP.
    pub fc1: LinearWeights,
    /// Second layer of the MLP.
    pub fc2: LinearWeights,
    /// LayerScale of the MLP branch, `[1, dim]`.
    pub ls2: Option<Tensor>,
    /// Attention heads.
    pub heads: usize,
    /// Activation of the MLP.
    pub act: Act,
    /// In a frozen tower's last block, the queries' third of `qkv` and the rest, packed separately: the class token's query
    /// is needed first.
    pub split_qkv: Option<(Packed, Packed)>,
}

/// How a block is run.
#[derive(Clone, Debug, Default)]
pub struct BlockRun {
    /// Images in the batch.
    pub batch: usize,
    /// Tokens of an image.
    pub tokens: usize,
    /// Stochastic depth: each sample's factor for the attention branch and for the MLP branch, 0 or 1 / (1 - p).
    pub branch_scale: Option<(Arc<[f32]>, Arc<[f32]>)>,
    /// What is kept for the backward pass.
    pub recompute: Recompute,
}

impl BlockRun {
    fn attention(&self, heads: usize) -> AttentionShape {
        AttentionShape { batch: self.batch, heads, queries: self.tokens, keys: self.tokens }
    }

    fn drop_path(&self) -> DropPath<'_> {
        let scale = self.branch_scale.as_ref();
        DropPath { attention: scale.map(|s| &*s.0), mlp: scale.map(|s| &*s.1) }
    }
}

/// The result of the first half of a frozen tower's last block.
pub struct Begun {
    /// Attention of the class token to each patch, mean over heads: `[batch, patches]`, row-major.
    pub attention: Vec<f32>,
    state: State,
}

enum State {
    /// The block's whole output.
    Done(Tensor),
    /// What the CPU kernels keep for the second half.
    Half(Box<dyn Any>),
}

impl BlockWeights {
    /// In the order in which the kernels give their gradients.
    fn tensors(&self) -> Vec<&Tensor> {
        let linear = LinearWeights::tensors;
        [
            self.norm1.tensors(),
            linear(&self.qkv),
            linear(&self.proj),
            self.ls1.iter().collect(),
            self.norm2.tensors(),
            linear(&self.fc1),
            linear(&self.fc2),
            self.ls2.iter().collect(),
        ]
        .concat()
    }

    fn replaced(&self, by: &mut Replaced) -> Self {
        BlockWeights {
            norm1: self.norm1.replaced(by),
            qkv: self.qkv.replaced(by),
            proj: self.proj.replaced(by),
            ls1: by.next_for(self.ls1.as_ref()),
            norm2: self.norm2.replaced(by),
            fc1: self.fc1.replaced(by),
            fc2: self.fc2.replaced(by),
            ls2: by.next_for(self.ls2.as_ref()),
            ..self.clone()
        }
    }

    fn kernel(&self) -> kernel::BlockWeights<'_> {
        kernel::BlockWeights {
            norm1_gamma: self.norm1.gamma().map(Tensor::cpu),
            norm1_beta: self.norm1.beta().map(Tensor::cpu),
            qkv: self.qkv.kernel(),
            proj: self.proj.kernel(),
            ls1: self.ls1.as_ref().map(Tensor::cpu),
            norm2_gamma: self.norm2.gamma().map(Tensor::cpu),
            norm2_beta: self.norm2.beta().map(Tensor::cpu),
            fc1: self.fc1.kernel(),
            fc2: self.fc2.kernel(),
            ls2: self.ls2.as_ref().map(Tensor::cpu),
        }
    }

    /// The weights in two parts, as packed weights already are.
    fn split(&self) -> SplitWeights<'_> {
        let weights = self.kernel();
        match &self.split_qkv {
            Some((q, kv)) => {
                let bias = self.qkv.bias.as_ref().map(Tensor::cpu).map(|b| b.split_at(b.len() / 3));
                SplitWeights {
                    q: kernel::Linear::packed(&q.0, bias.map(|b| b.0)),
                    kv: kernel::Linear::packed(&kv.0, bias.map(|b| b.1)),
                    block: weights,
                }
            }
            None => SplitWeights::dense(weights, self.proj.outputs()),
        }
    }

    fn shape(&self, run: &BlockRun) -> kernel::BlockShape {
        kernel::BlockShape {
            batch: run.batch,
            tokens: run.tokens,
            dim: self.proj.outputs(),
            heads: self.heads,
            hidden: self.fc1.outputs(),
            eps: self.norm1.eps as f32,
            act: self.act,
        }
    }

    /// The slots of its weights' gradients, in the order of the kernel's struct.
    fn wanted(&self) -> [Option<Slot>; 14] {
        let of = |x: Option<&Tensor>| x.and_then(Tensor::wanted);
        [
            of(self.norm1.gamma()),
            of(self.norm1.beta()),
            of(Some(&self.qkv.weight)),
            of(self.qkv.bias.as_ref()),
            of(Some(&self.proj.weight)),
            of(self.proj.bias.as_ref()),
            of(self.ls1.as_ref()),
            of(self.norm2.gamma()),
            of(self.norm2.beta()),
            of(Some(&self.fc1.weight)),
            of(self.fc1.bias.as_ref()),
            of(Some(&self.fc2.weight)),
            of(self.fc2.bias.as_ref()),
            of(self.ls2.as_ref()),
        ]
    }
}

fn kernel_gradients(buffers: &mut [Option<Vec<f32>>; 14]) -> BlockGrads<'_> {
    let [n1g, n1b, qkv_w, qkv_b, proj_w, proj_b, ls1, n2g, n2b, fc1_w, fc1_b, fc2_w, fc2_b, ls2] = buffers;
    BlockGrads {
        norm1_gamma: n1g.as_deref_mut(),
        norm1_beta: n1b.as_deref_mut(),
        qkv_weight: qkv_w.as_deref_mut(),
        qkv_bias: qkv_b.as_deref_mut(),
        proj_weight: proj_w.as_deref_mut(),
        proj_bias: proj_b.as_deref_mut(),
        ls1: ls1.as_deref_mut(),
        norm2_gamma: n2g.as_deref_mut(),
        norm2_beta: n2b.as_deref_mut(),
        fc1_weight: fc1_w.as_deref_mut(),
        fc1_bias: fc1_b.as_deref_mut(),
        fc2_weight: fc2_w.as_deref_mut(),
        fc2_bias: fc2_b.as_deref_mut(),
        ls2: ls2.as_deref_mut(),
    }
}

/// A block: `[batch * tokens, dim] -> [batch * tokens, dim]`.
///
/// # Errors
/// Out of memory on the device.
pub fn block(cx: &Context, tape: &mut Tape, x: &Tensor, weights: &BlockWeights, run: &BlockRun) -> Result<Tensor> {
    let inputs: Vec<&Tensor> = [x].into_iter().chain(weights.tensors()).collect();
    match cx.form("block", &inputs)? {
        Form::Composed => {
            let (cx, weights, run) = (cx.clone(), weights.clone(), run.clone());
            tape.segment(x, run.recompute, move |tape, x| {
                let heads = heads(&cx, tape, x, &weights)?;
                after_heads(&cx, tape, x, heads, &weights, &run)
            })
        }
        Form::Gpu => through_host_one(cx, tape, "block", &inputs, |cx, tape, copies| {
            block(cx, tape, &copies[0], &weights.replaced(&mut Replaced::new(&copies[1..])), run)
        }),
        Form::Cpu => on_cpu(cx, tape, x, weights, run),
    }
}

fn on_cpu(cx: &Context, tape: &mut Tape, x: &Tensor, weights: &BlockWeights, run: &BlockRun) -> Result<Tensor> {
    let records = tape.wants(&[x]) || tape.wants(&weights.tensors());
    let shape = weights.shape(run);
    let save = match (records, run.recompute) {
        (true, Recompute::Never) => Save::ForBackward,
        _ => Save::Nothing,
    };
    let (pool, arena) = cx.handles();
    let mut y = vec![0.0; shape.rows() * shape.dim];
    let saved = kernel::block_forward(&pool, &arena, shape, &weights.kernel(), run.drop_path(), x.cpu(), &mut y, save);
    let y = made_on_cpu(cx, y, shape.rows(), shape.dim, records)?;
    if records {
        let (x, weights, run, out) = (x.clone(), weights.clone(), run.clone(), y.slot());
        tape.record(move |g| {
            let Some(mut dy) = g.take_cpu(&out) else { return Ok(()) };
            let wanted = weights.wanted();
            let mut buffers: [Option<Vec<f32>>; 14] = std::array::from_fn(|i| g.lend(wanted[i].as_ref()));
            let into = x.wanted();
            let dx = into.as_ref().map(|slot| g.cpu_mut(slot).as_mut_slice());
            kernel::block_backward(
                &pool,
                &arena,
                shape,
                &weights.kernel(),
                run.drop_path(),
                x.cpu(),
                saved,
                &mut dy,
                dx,
                kernel_gradients(&mut buffers),
            );
            wanted.iter().zip(buffers).try_for_each(|(slot, buffer)| g.give_back(slot.as_ref(), buffer))
        });
    }
    Ok(y)
}

/// The first half of a frozen tower's last block: what the attention of its class token needs. It has no gradient.
///
/// # Errors
/// Out of memory on the device.
pub fn begin_block(cx: &Context, x: &Tensor, weights: &BlockWeights, run: &BlockRun) -> Result<Begun> {
    let inputs: Vec<&Tensor> = [x].into_iter().chain(weights.tensors()).collect();
    match cx.form("begin_block", &inputs)? {
        Form::Cpu => {
            let shape = weights.shape(run);
            let mut attention = vec![0.0; run.batch * (run.tokens - 1)];
            let half = LastBlock::begin(cx.pool(), cx.arena(), shape, &weights.split(), x.cpu(), &mut attention);
            Ok(Begun { attention, state: State::Half(Box::new(half)) })
        }
        Form::Composed | Form::Gpu => {
            let off = &mut Tape::inference();
            let heads = heads(cx, off, x, weights)?;
            let by_head = composed_attention_by_head(&heads[0], &heads[1], run.attention(weights.heads))?;
            let attention = mean_of_heads(&by_head, weights.heads, run.tokens - 1);
            let y = after_heads(cx, off, x, heads, weights, run)?;
            Ok(Begun { attention, state: State::Done(y) })
        }
    }
}

/// The second half: the block's output for the `rows` (token indices) of each image, in that order; `None` gives all.
///
/// # Errors
/// Out of memory on the device.
pub fn finish_block(
    cx: &Context,
    x: &Tensor,
    weights: &BlockWeights,
    run: &BlockRun,
    begun: Begun,
    rows: Option<&[u32]>,
) -> Result<Tensor> {
    match begun.state {
        State::Done(y) => match rows {
            None => Ok(y),
            Some(rows) => gather_rows(cx, &mut Tape::inference(), &[&y], &flat_rows(rows, run.batch, run.tokens)),
        },
        State::Half(half) => {
            let inputs: Vec<&Tensor> = [x].into_iter().chain(weights.tensors()).collect();
            cx.form("finish_block", &inputs)?;
            let half: Box<LastBlock> = half.downcast().expect("made by `begin_block`");
            let shape = weights.shape(run);
            let all: Vec<u32>;
            let rows = match rows {
                Some(rows) => rows,
                None => {
                    all = (0..run.batch).flat_map(|_| 0..run.tokens as u32).collect();
                    &all
                }
            };
            let mut y = vec![0.0; rows.len() * shape.dim];
            half.finish(cx.pool(), cx.arena(), shape, &weights.split(), x.cpu(), rows, &mut y);
            cx.output(y, rows.len(), shape.dim)
        }
    }
}

/// The attention of the class token, the first token of each image, to the others, of each head by itself: `[batch, heads,
/// tokens - 1]`. For people to look at; it has no gradient.
///
/// # Errors
/// Out of memory on the device.
pub fn class_attention_by_head(cx: &Context, x: &Tensor, weights: &BlockWeights, run: &BlockRun) -> Result<Vec<f32>> {
    match cx.form("class_attention_by_head", &[x])? {
        Form::Cpu => {
            let shape = weights.shape(run);
            Ok(LastBlock::attention_by_head(cx.pool(), cx.arena(), shape, &weights.split(), x.cpu()))
        }
        Form::Composed | Form::Gpu => {
            let [q, k, _] = heads(cx, &mut Tape::inference(), x, weights)?;
            composed_attention_by_head(&q, &k, run.attention(weights.heads))
        }
    }
}

/// Queries, keys and values of a block.
fn heads(cx: &Context, tape: &mut Tape, x: &Tensor, weights: &BlockWeights) -> Result<[Tensor; 3]> {
    let y = layer_norm(cx, tape, x, &weights.norm1)?;
    let qkv = linear(cx, tape, &y, &weights.qkv, Act::None)?;
    let width = qkv.columns() / 3;
    let mut part = |i| slice_columns(cx, tape, &qkv, i * width..(i + 1) * width);
    Ok([part(0)?, part(1)?, part(2)?])
}

/// A block after its attention.
fn after_heads(
    cx: &Context,
    tape: &mut Tape,
    x: &Tensor,
    [q, k, v]: [Tensor; 3],
    weights: &BlockWeights,
    run: &BlockRun,
) -> Result<Tensor> {
    let scales = run.branch_scale.as_ref();
    let y = attention(cx, tape, &q, &k, &v, run.attention(weights.heads))?;
    let y = linear(cx, tape, &y, &weights.proj, Act::None)?;
    let y = scaled(cx, tape, y, weights.ls1.as_ref(), scales.map(|s| &*s.0), run.tokens)?;
    let x = add(cx, tape, x, &y)?;
    let y = layer_norm(cx, tape, &x, &weights.norm2)?;
    let y = linear(cx, tape, &y, &weights.fc1, weights.act)?;
    let y = linear(cx, tape, &y, &weights.fc2, Act::None)?;
    let y = scaled(cx, tape, y, weights.ls2.as_ref(), scales.map(|s| &*s.1), run.tokens)?;
    add(cx, tape, &x, &y)
}

/// A branch times its LayerScale and each sample's factor.
fn scaled(
    cx: &Context,
    tape: &mut Tape,
    mut x: Tensor,
    gamma: Option<&Tensor>,
    samples: Option<&[f32]>,
    tokens: usize,
) -> Result<Tensor> {
    let (rows, columns) = x.shape();
    if let Some(gamma) = gamma {
        let gamma = super::broadcast_row(cx, tape, gamma, rows)?;
        x = super::mul(cx, tape, &x, &gamma)?;
    }
    if let Some(samples) = samples {
        let factors: Vec<f32> = samples.iter().flat_map(|&s| std::iter::repeat_n(s, tokens)).collect();
        let factors = super::broadcast_column(cx, tape, &cx.tensor(factors, rows, 1)?, columns)?;
        x = super::mul(cx, tape, &x, &factors)?;
    }
    Ok(x)
}

/// The attention of the class token, the first token of each image: its probabilities over the other tokens for each head,
/// `[batch, heads, tokens - 1]`. Only its rows of the probabilities are computed.
fn composed_attention_by_head(q: &Tensor, k: &Tensor, s: AttentionShape) -> Result<Vec<f32>> {
    use dfdx::prelude::TensorFromVec;
    let matrix = |x: &Tensor| crate::host::cpu().try_tensor_from_vec(x.to_vec(), x.shape());
    let off = &mut crate::graph::Graph::inference();
    let class = flat_rows(&vec![0; s.batch], s.batch, s.queries);
    let q = super::rows::composed_gather_rows(off, &[matrix(q)?], &class)?;
    let p = attention::probabilities(off, &q, &matrix(k)?, AttentionShape { queries: 1, ..s })?.as_vec();
    Ok(p.chunks_exact(s.keys).flat_map(|p| &p[1..]).copied().collect())
}

/// The mean over heads of `[batch, heads, others]`.
fn mean_of_heads(by_head: &[f32], heads: usize, others: usize) -> Vec<f32> {
    let mut out = vec![0.0; by_head.len() / heads];
    for (row, p) in by_head.chunks_exact(others).enumerate() {
        let out = &mut out[row / heads * others..][..others];
        out.iter_mut().zip(p).for_each(|(sum, p)| *sum += p / heads as f32);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        context::Forms,
        device::Device,
        ops::{
            check::{Input, forms, gpu, input, near, normal},
            pack,
        },
    };

    /// The input of a block, then its tensors in the order of [`BlockWeights::tensors`].
    fn inputs(rows: usize, dim: usize, mlp: usize, layer_scale: bool) -> Vec<Input> {
        let around = |key: &str, rows, columns, centre: f32| input(key, rows, columns).map(|v| centre + 0.3 * v);
        let scale = |key: &str| layer_scale.then(|| around(key, 1, dim, 1.0));
        let mut all = vec![
            input("x", rows, dim),
            around("n1g", 1, dim, 1.0),
            around("n1b", 1, dim, 0.0),
            around("qkv", 3 * dim, dim, 0.0),
            around("qkv bias", 1, 3 * dim, 0.0),
            around("proj", dim, dim, 0.0),
            around("proj bias", 1, dim, 0.0),
        ];
        all.extend(scale("ls1"));
        all.extend([
            around("n2g", 1, dim, 1.0),
            around("n2b", 1, dim, 0.0),
            around("fc1", mlp, dim, 0.0),
            around("fc1 bias", 1, mlp, 0.0),
            around("fc2", dim, mlp, 0.0),
            around("fc2 bias", 1, dim, 0.0),
        ]);
        all.extend(scale("ls2"));
        all
    }

    fn weights(x: &[Tensor], heads: usize, act: Act) -> BlockWeights {
        let layer_scale = x.len() == 15;
        let mut x = x[1..].iter().cloned();
        let mut next = || x.next().unwrap();
        let norm = |gamma, beta| NormWeights { affine: Some((gamma, beta)), eps: 1e-6 };
        let linear = |weight, bias| LinearWeights { weight, bias: Some(bias), packed: None };
        BlockWeights {
            norm1: norm(next(), next()),
            qkv: linear(next(), next()),
            proj: linear(next(), next()),
            ls1: layer_scale.then(&mut next),
            norm2: norm(next(), next()),
            fc1: linear(next(), next()),
            fc2: linear(next(), next()),
            ls2: layer_scale.then(&mut next),
            heads,
            act,
            split_qkv: None,
        }
    }

    #[test]
    fn the_forms_agree() {
        for (dim, heads, mlp, batch, tokens) in [(6, 2, 11, 2, 5), (33, 3, 65, 3, 17), (16, 1, 8, 1, 1)] {
            for (layer_scale, drop_path, act, recompute) in [
                (false, false, Act::Gelu, Recompute::Never),
                (true, true, Act::QuickGelu, Recompute::Blocks),
                (false, true, Act::Gelu, Recompute::Never),
                (true, false, Act::None, Recompute::Never),
            ] {
                let scale = |key: &str| -> Arc<[f32]> {
                    let drops = normal(key, batch);
                    drops.iter().enumerate().map(|(i, v)| if i > 0 && *v < 0.0 { 0.0 } else { 1.25 }).collect()
                };
                let branch_scale = drop_path.then(|| (scale("attention"), scale("mlp")));
                let run = BlockRun { batch, tokens, branch_scale, recompute };
                forms("block", &inputs(batch * tokens, dim, mlp, layer_scale), |cx, tape, x| {
                    Ok(vec![block(cx, tape, &x[0], &weights(x, heads, act), &run)?])
                });
            }
        }
    }

    #[test]
    fn recomputed_blocks_give_the_same_bits() {
        let all = inputs(22, 18, 37, true);
        let best = Context::new(Device::Cpu, 2);
        for cx in [best.clone(), best.with_forms(Forms::Composed), gpu().0] {
            let of = |recompute| {
                let run = BlockRun { batch: 2, tokens: 11, branch_scale: None, recompute };
                let tensors = all.iter().map(|i| i.tensor(&cx).unwrap().tracked()).collect::<Vec<_>>();
                let mut tape = Tape::training();
                let y = block(&cx, &mut tape, &tensors[0], &weights(&tensors, 3, Act::Gelu), &run).unwrap();
                let loss = crate::ops::mean(&cx, &mut tape, &y).unwrap();
                let gradients = tape.backward(&loss).unwrap();
                (y.to_vec(), tensors.iter().map(|x| gradients.get(x).unwrap()).collect::<Vec<_>>())
            };
            assert!(of(Recompute::Blocks) == of(Recompute::Never), "{:?}", cx.device());
        }
    }

    #[test]
    fn the_last_block_runs_in_two_halves() {
        let best = Context::new(Device::Cpu, 1);
        let composed = best.clone().with_forms(Forms::Composed);
        for (dim, heads, mlp, batch, tokens) in [(6, 2, 11, 2, 5), (33, 3, 65, 3, 18)] {
            for (packed, layer_scale) in [(false, true), (true, false), (true, true)] {
                let all = inputs(batch * tokens, dim, mlp, layer_scale);
                let run = BlockRun { batch, tokens, ..Default::default() };
                let some: Vec<u32> = (0..batch as u32).flat_map(|i| [0, 1 + i % 2, tokens as u32 - 1]).collect();
                let of = |cx: &Context, rows: Option<&[u32]>| {
                    let tensors = all.iter().map(|i| i.tensor(cx).unwrap()).collect::<Vec<_>>();
                    let mut weights = weights(&tensors, heads, Act::QuickGelu);
                    let qkv = &weights.qkv.weight;
                    let parts = [pack(cx, qkv, 0..dim), pack(cx, qkv, dim..3 * dim)];
                    if let (true, [Some(q), Some(kv)]) = (packed, parts) {
                        weights.split_qkv = Some((q, kv));
                    }
                    let begun = begin_block(cx, &tensors[0], &weights, &run).unwrap();
                    let attention = begun.attention.clone();
                    let y = finish_block(cx, &tensors[0], &weights, &run, begun, rows).unwrap();
                    let by_head = class_attention_by_head(cx, &tensors[0], &weights, &run).unwrap();
                    let mean = mean_of_heads(&by_head, heads, tokens - 1);
                    near("the mean of the heads", &mean, &attention, 2e-5);
                    ([attention, by_head].concat(), y.to_vec())
                };
                for rows in [None, Some(&some[..])] {
                    let expected = of(&composed, rows);
                    let got = of(&best, rows);
                    for (got, name) in [(&got, "CPU"), (&of(&gpu().0, rows), "GPU")] {
                        let name = format!("{name}, last block of {dim}, packed {packed}, rows {rows:?}");
                        near(&format!("attention on the {name}"), &got.0, &expected.0, 2e-5);
                        near(&name, &got.1, &expected.1, 2e-5);
                    }
                    assert!(got == of(&Context::new(Device::Cpu, 3), rows), "3 threads give other bits");
                }
            }
        }
    }
}
