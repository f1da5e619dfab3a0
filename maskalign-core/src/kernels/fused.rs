//! The operators of the CPU: one fused kernel each, forward and backward, from `maskalign-kernels`.
//!
//! What a backward pass needs is kept in the closure that the recorder holds and freed as that closure runs; buffers
//! come from a pool that lives as long as the run.

use std::{mem, ops::Range, sync::Arc};

use dfdx::prelude::{Cpu, CpuError, Gradients, HasShape, TensorFromVec};
use maskalign_kernels::{
    Arena, Buf, Epilogue, Pool, attention as attn,
    block::{self as blk, BlockGrads, BlockShape, BlockWeights, DropPath, LastBlock, Save, SplitWeights},
    elementwise::{self as ew, Write},
    fma_peak_gflops, isa, loss, norm, optim,
};

use super::{
    Act, AdamStep, AttentionShape, Begun, BegunState, BlockRun, Distance, Kernels, Packed, Standardize,
    view::{is_contiguous, view, view_mut},
};
use crate::{
    device::{Matrix, Scalar, Vector},
    error::{Result, device},
    nn::{Block, Linear, Norm, Param},
    tape::Recorder,
};

/// Takes a gradient buffer out of the map: an output's, which nobody reads again, or one that is put back. A macro
/// because dfdx does not let its ghosts be named.
macro_rules! take {
    ($gradients:ident, $of:expr) => {
        mem::take(&mut **$gradients.get_or_alloc_mut($of)?)
    };
}

/// Borrows the gradient buffer of an input by taking it out; [`restore!`] returns it. Where two inputs are one tensor,
/// the second borrower gets zeros, and what it leaves there is added in the end.
macro_rules! lend {
    ($gradients:ident, $of:expr) => {{
        let buffer = take!($gradients, $of);
        let (rows, columns) = *$of.shape();
        let len = rows * columns;
        if buffer.len() == len { buffer } else { vec![0.0; len] }
    }};
}

/// Returns what [`lend!`] took.
macro_rules! restore {
    ($gradients:ident, $of:expr, $buffer:expr) => {{
        let (there, buffer) = (&mut **$gradients.get_or_alloc_mut($of)?, $buffer);
        match there.is_empty() {
            true => *there = buffer,
            false => there.iter_mut().zip(buffer).for_each(|(sum, more)| *sum += more),
        }
    }};
}

type M = Matrix<Cpu>;
type R = Recorder<Cpu>;

/// What a linear layer is given.
#[derive(Clone, Copy, PartialEq)]
enum Input {
    /// States of the model, which take a gradient.
    Hidden,
    /// Data, which takes none.
    Data,
}

/// The table of fused operators.
pub struct Fused {
    pool: Arc<Pool>,
    arena: Arena,
}

impl Fused {
    /// Operators on `threads` threads; the number changes no result.
    pub fn new(threads: usize) -> Self {
        Fused { pool: Pool::new(threads.max(1)), arena: Arena::new() }
    }

    fn handles(&self) -> (Arc<Pool>, Arena) {
        (Arc::clone(&self.pool), self.arena.clone())
    }

    fn linear_op(&self, r: &mut R, x: &M, layer: &Linear<Cpu>, act: Act, input: Input) -> Result<M> {
        let x = contiguous(r, x)?;
        let (rows, inputs) = *x.shape();
        let outputs = layer.outputs();
        let mut y = vec![0.0; rows * outputs];
        let keeps_pre = r.is_recording() && act != Act::None;
        let mut pre: Option<Buf> = keeps_pre.then(|| self.arena.take(rows * outputs));
        let epilogue = Epilogue { act, pre: pre.as_deref_mut(), ..Epilogue::default() };
        blk::linear(&self.pool, kernel_linear(layer), rows, inputs, outputs, view(&x), &mut y, epilogue);
        let y = matrix(&x, y, rows, outputs)?;
        let (pool, arena) = self.handles();
        let (layer, out) = (layer.clone(), y.ghost());
        r.record(move |g| {
            let mut dy = take!(g, &out);
            if let Some(mut pre) = pre {
                let mut act_value = arena.take(pre.len());
                ew::activation_and_slope(&pool, act, &mut pre, &mut act_value);
                ew::multiply(&pool, &pre, &mut dy);
            }
            let mut dw = trainable(g, Some(&layer.weight))?;
            let mut db = trainable(g, layer.bias.as_ref())?;
            blk::linear_backward_params(
                &pool,
                &arena,
                rows,
                inputs,
                outputs,
                view(&x),
                &dy,
                dw.as_deref_mut(),
                db.as_deref_mut(),
            );
            give_back(g, Some(&layer.weight), dw)?;
            give_back(g, layer.bias.as_ref(), db)?;
            if input == Input::Hidden {
                let dx = g.get_or_alloc_mut(&x)?;
                blk::linear_backward_input(
                    &pool,
                    view(&layer.weight.value),
                    rows,
                    inputs,
                    outputs,
                    &dy,
                    dx,
                    Write::Add,
                );
            }
            Ok(())
        });
        Ok(y)
    }

    /// Attention of queries to keys and values, see [`heads`].
    fn attention_op(&self, r: &mut R, inputs: &[&M], s: AttentionShape) -> Result<M> {
        let inputs: Vec<M> = inputs.iter().map(|x| contiguous(r, x)).collect::<Result<_>>()?;
        let dim = inputs[0].shape().1;
        let shape = attn::AttentionShape {
            batch: s.batch,
            heads: s.heads,
            head_dim: dim / s.heads,
            queries: s.queries,
            keys: s.keys,
        };
        let mut out = vec![0.0; s.batch * s.queries * dim];
        let mut lse = r.is_recording().then(|| self.arena.take(shape.lse_len()));
        let [q, k, v] = heads(&inputs);
        attn::attention(&self.pool, &self.arena, shape, q, k, v, &mut out, lse.as_deref_mut());
        let y = matrix(&inputs[0], out, s.batch * s.queries, dim)?;
        let (pool, arena) = self.handles();
        let (out, kept) = (y.ghost(), r.is_recording().then(|| y.clone()));
        r.record(move |g| {
            let dy = take!(g, &out);
            let (y, lse) = (kept.expect("kept while recording"), lse.expect("kept while recording"));
            let mut buffers = Vec::with_capacity(inputs.len());
            for x in &inputs {
                buffers.push(lend!(g, x));
            }
            let [q, k, v] = heads(&inputs);
            let into = heads_gradient(&mut buffers);
            attn::attention_backward(&pool, &arena, shape, q, k, v, view(&y), &lse, &dy, into, Write::Add);
            for (x, buffer) in inputs.iter().zip(buffers) {
                restore!(g, x, buffer);
            }
            Ok(())
        });
        Ok(y)
    }
}

/// The tensor itself where its values lie row by row; else a copy that does, recorded.
fn contiguous(r: &mut R, x: &M) -> Result<M> {
    use dfdx::prelude::ReshapeTo;
    match is_contiguous(x) {
        true => Ok(x.clone()),
        false => r.run(x, |x| Ok(x.contiguous())),
    }
}

fn matrix(like: &M, values: Vec<f32>, rows: usize, columns: usize) -> Result<M> {
    like.device().try_tensor_from_vec(values, (rows, columns)).map_err(device)
}

fn scalar(like: &M, value: f64) -> Result<Scalar<Cpu>> {
    like.device().try_tensor_from_vec(vec![value as f32], ()).map_err(device)
}

/// Borrows the gradient buffer of a parameter that has one by taking it out; [`give_back`] returns it.
fn trainable(g: &mut Gradients<f32, Cpu>, p: Option<&Param<Cpu>>) -> Result<Option<Vec<f32>>, CpuError> {
    p.filter(|p| p.trainable).map(|p| Ok(mem::take(&mut **g.get_or_alloc_mut(&p.value)?))).transpose()
}

fn give_back(g: &mut Gradients<f32, Cpu>, p: Option<&Param<Cpu>>, buffer: Option<Vec<f32>>) -> Result<(), CpuError> {
    if let (Some(p), Some(buffer)) = (p, buffer) {
        **g.get_or_alloc_mut(&p.value)? = buffer;
    }
    Ok(())
}

fn values(p: Option<&Param<Cpu>>) -> Option<&[f32]> {
    p.map(|p| view(&p.value))
}

fn kernel_linear(layer: &Linear<Cpu>) -> blk::Linear<'_> {
    let bias = values(layer.bias.as_ref());
    match &layer.packed {
        Some(packed) => blk::Linear::packed(&packed.0, bias),
        None => blk::Linear::dense(view(&layer.weight.value), bias),
    }
}

fn kernel_weights(block: &Block<Cpu>) -> BlockWeights<'_> {
    let (norm1, norm2) = (block.norm1.affine.as_ref(), block.norm2.affine.as_ref());
    BlockWeights {
        norm1_gamma: values(norm1.map(|n| &n.0)),
        norm1_beta: values(norm1.map(|n| &n.1)),
        qkv: kernel_linear(&block.qkv),
        proj: kernel_linear(&block.proj),
        ls1: values(block.ls1.as_ref()),
        norm2_gamma: values(norm2.map(|n| &n.0)),
        norm2_beta: values(norm2.map(|n| &n.1)),
        fc1: kernel_linear(&block.fc1),
        fc2: kernel_linear(&block.fc2),
        ls2: values(block.ls2.as_ref()),
    }
}

/// The last block's weights in two parts: packed ones were packed that way.
fn split_weights(block: &Block<Cpu>) -> SplitWeights<'_> {
    let weights = kernel_weights(block);
    match &block.split_qkv {
        Some((q, kv)) => {
            let bias = values(block.qkv.bias.as_ref()).map(|b| b.split_at(b.len() / 3));
            SplitWeights {
                q: blk::Linear::packed(&q.0, bias.map(|b| b.0)),
                kv: blk::Linear::packed(&kv.0, bias.map(|b| b.1)),
                block: weights,
            }
        }
        None => SplitWeights::dense(weights, block.proj.outputs()),
    }
}

fn kernel_shape(block: &Block<Cpu>, run: &BlockRun) -> BlockShape {
    BlockShape {
        batch: run.batch,
        tokens: run.tokens,
        dim: block.proj.outputs(),
        heads: block.heads,
        hidden: block.fc1.outputs(),
        eps: block.norm1.eps as f32,
        act: block.act,
    }
}

fn drop_path(run: &BlockRun) -> DropPath<'_> {
    let scale = run.branch_scale.as_ref();
    DropPath { attention: scale.map(|s| &*s.0), mlp: scale.map(|s| &*s.1) }
}

/// The parameters of a block in a fixed order, with their places among the kernel's gradients.
fn block_parameters(block: &Block<Cpu>) -> [Option<&Param<Cpu>>; 14] {
    let (norm1, norm2) = (block.norm1.affine.as_ref(), block.norm2.affine.as_ref());
    [
        norm1.map(|n| &n.0),
        norm1.map(|n| &n.1),
        Some(&block.qkv.weight),
        block.qkv.bias.as_ref(),
        Some(&block.proj.weight),
        block.proj.bias.as_ref(),
        block.ls1.as_ref(),
        norm2.map(|n| &n.0),
        norm2.map(|n| &n.1),
        Some(&block.fc1.weight),
        block.fc1.bias.as_ref(),
        Some(&block.fc2.weight),
        block.fc2.bias.as_ref(),
        block.ls2.as_ref(),
    ]
}

fn block_gradients(buffers: &mut [Option<Vec<f32>>; 14]) -> BlockGrads<'_> {
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

impl Kernels<Cpu> for Fused {
    fn name(&self) -> String {
        format!("fused, {}", isa().name())
    }

    fn pool(&self) -> &Pool {
        &self.pool
    }

    fn peak_gflops(&self) -> Option<f64> {
        Some(fma_peak_gflops(self.pool.threads(), &self.pool))
    }

    fn trim(&self) {
        self.arena.trim();
    }

    fn pack(&self, weight: &M, rows: Range<usize>) -> Option<Packed> {
        let inputs = weight.shape().1;
        let values = &view(weight)[rows.start * inputs..rows.end * inputs];
        Some(Packed(Arc::new(blk::pack_weight(values, rows.len(), inputs))))
    }

    fn linear(&self, r: &mut R, x: &M, layer: &Linear<Cpu>, act: Act) -> Result<M> {
        self.linear_op(r, x, layer, act, Input::Hidden)
    }

    fn embed(&self, r: &mut R, data: &M, layer: &Linear<Cpu>) -> Result<M> {
        self.linear_op(r, data, layer, Act::None, Input::Data)
    }

    fn layer_norm(&self, r: &mut R, x: &M, layer: &Norm<Cpu>) -> Result<M> {
        let x = contiguous(r, x)?;
        let (rows, columns) = *x.shape();
        let mut y = vec![0.0; rows * columns];
        let mut stats = r.is_recording().then(|| self.arena.take(2 * rows));
        let affine = layer.affine.as_ref();
        let (gamma, beta) = (values(affine.map(|a| &a.0)), values(affine.map(|a| &a.1)));
        norm::layer_norm(&self.pool, view(&x), columns, gamma, beta, layer.eps as f32, &mut y, stats.as_deref_mut());
        let y = matrix(&x, y, rows, columns)?;
        let (pool, arena) = self.handles();
        let (layer, out) = (layer.clone(), y.ghost());
        r.record(move |g| {
            let dy = take!(g, &out);
            let stats = stats.expect("kept while recording");
            let affine = layer.affine.as_ref();
            let (gamma, beta) = (affine.map(|a| &a.0), affine.map(|a| &a.1));
            let (mut dgamma, mut dbeta) = (trainable(g, gamma)?, trainable(g, beta)?);
            let dx = g.get_or_alloc_mut(&x)?;
            norm::layer_norm_backward(
                &pool,
                &arena,
                view(&x),
                columns,
                &stats,
                values(gamma),
                &dy,
                dx,
                Write::Add,
                dgamma.as_deref_mut(),
                dbeta.as_deref_mut(),
            );
            give_back(g, gamma, dgamma)?;
            give_back(g, beta, dbeta)
        });
        Ok(y)
    }

    fn attention(&self, r: &mut R, q: &M, k: &M, v: &M, s: AttentionShape) -> Result<M> {
        self.attention_op(r, &[q, k, v], s)
    }

    fn cross_attention(&self, r: &mut R, q: &M, kv: &M, s: AttentionShape) -> Result<M> {
        self.attention_op(r, &[q, kv], s)
    }

    fn block(&self, r: &mut R, x: &M, block: &Block<Cpu>, run: &BlockRun) -> Result<M> {
        let x = contiguous(r, x)?;
        let shape = kernel_shape(block, run);
        let mut y = vec![0.0; shape.rows() * shape.dim];
        let save = match r.is_recording() && !run.recompute {
            true => Save::ForBackward,
            false => Save::Nothing,
        };
        let weights = kernel_weights(block);
        let saved =
            blk::block_forward(&self.pool, &self.arena, shape, &weights, drop_path(run), view(&x), &mut y, save);
        let y = matrix(&x, y, shape.rows(), shape.dim)?;
        if !r.is_recording() {
            return Ok(y);
        }
        let (pool, arena) = self.handles();
        let (block, run, out) = (block.clone(), run.clone(), y.ghost());
        r.record(move |g| {
            let mut dy = take!(g, &out);
            let parameters = block_parameters(&block);
            let mut buffers = [const { None }; 14];
            for (buffer, parameter) in buffers.iter_mut().zip(parameters) {
                *buffer = trainable(g, parameter)?;
            }
            let dx = g.get_or_alloc_mut(&x)?;
            blk::block_backward(
                &pool,
                &arena,
                shape,
                &kernel_weights(&block),
                drop_path(&run),
                view(&x),
                saved,
                &mut dy,
                Some(dx),
                block_gradients(&mut buffers),
            );
            for (parameter, buffer) in parameters.into_iter().zip(buffers) {
                give_back(g, parameter, buffer)?;
            }
            Ok(())
        });
        Ok(y)
    }

    fn begin_block(&self, x: &M, block: &Block<Cpu>, run: &BlockRun) -> Result<Begun<Cpu>> {
        let x = &contiguous(&mut Recorder::inference(), x)?;
        let shape = kernel_shape(block, run);
        let mut attention = vec![0.0; run.batch * (run.tokens - 1)];
        let last = LastBlock::begin(&self.pool, &self.arena, shape, &split_weights(block), view(x), &mut attention);
        Ok(Begun { attention, state: BegunState::Fused(Box::new(last)) })
    }

    fn finish_block(
        &self,
        x: &M,
        block: &Block<Cpu>,
        run: &BlockRun,
        begun: Begun<Cpu>,
        rows: Option<&[u32]>,
    ) -> Result<M> {
        let BegunState::Fused(last) = begun.state else {
            unreachable!("a block is finished by the kernels that began it")
        };
        let last: Box<LastBlock> = last.downcast().expect("made by `begin_block`");
        let x = &contiguous(&mut Recorder::inference(), x)?;
        let shape = kernel_shape(block, run);
        let all: Vec<u32>;
        let rows = match rows {
            Some(rows) => rows,
            None => {
                all = (0..run.batch).flat_map(|_| 0..run.tokens as u32).collect();
                &all
            }
        };
        let mut y = vec![0.0; rows.len() * shape.dim];
        last.finish(&self.pool, &self.arena, shape, &split_weights(block), view(x), rows, &mut y);
        matrix(x, y, rows.len(), shape.dim)
    }

    fn add(&self, r: &mut R, x: &M, y: &M) -> Result<M> {
        let (x, y) = (contiguous(r, x)?, contiguous(r, y)?);
        let (rows, columns) = *x.shape();
        let mut sum = vec![0.0; rows * columns];
        ew::add(&self.pool, view(&x), view(&y), &mut sum);
        let sum = matrix(&x, sum, rows, columns)?;
        let (pool, out) = (Arc::clone(&self.pool), sum.ghost());
        let (x, y) = (x.ghost(), y.ghost());
        r.record(move |g| {
            let d = take!(g, &out);
            ew::axpy(&pool, 1.0, &d, g.get_or_alloc_mut(&x)?);
            ew::axpy(&pool, 1.0, &d, g.get_or_alloc_mut(&y)?);
            Ok(())
        });
        Ok(sum)
    }

    fn add_constant(&self, r: &mut R, x: &M, constant: &M) -> Result<M> {
        let (x, constant) = (contiguous(r, x)?, contiguous(&mut Recorder::inference(), constant)?);
        let (rows, columns) = *x.shape();
        let mut sum = vec![0.0; rows * columns];
        ew::add(&self.pool, view(&x), view(&constant), &mut sum);
        let sum = matrix(&x, sum, rows, columns)?;
        let (pool, out, x) = (Arc::clone(&self.pool), sum.ghost(), x.ghost());
        r.record(move |g| {
            let d = take!(g, &out);
            ew::axpy(&pool, 1.0, &d, g.get_or_alloc_mut(&x)?);
            Ok(())
        });
        Ok(sum)
    }

    fn gather_rows(&self, r: &mut R, sources: &[M], index: &[u32]) -> Result<M> {
        let sources: Vec<M> = sources.iter().map(|s| contiguous(r, s)).collect::<Result<_>>()?;
        let columns = sources[0].shape().1;
        let mut y = vec![0.0; index.len() * columns];
        let slices: Vec<&[f32]> = sources.iter().map(view).collect();
        ew::gather_rows(&self.pool, &slices, columns, index, &mut y);
        let y = matrix(&sources[0], y, index.len(), columns)?;
        if !r.is_recording() {
            return Ok(y);
        }
        let (pool, out, index) = (Arc::clone(&self.pool), y.ghost(), index.to_vec());
        let sources: Vec<_> = sources.iter().map(|s| s.ghost()).collect();
        r.record(move |g| {
            let dy = take!(g, &out);
            let mut buffers = Vec::with_capacity(sources.len());
            for source in &sources {
                buffers.push(lend!(g, source));
            }
            let mut targets: Vec<&mut [f32]> = buffers.iter_mut().map(|b| b.as_mut_slice()).collect();
            ew::scatter_add_rows(&pool, &dy, columns, &index, &mut targets);
            for (source, buffer) in sources.iter().zip(buffers) {
                restore!(g, source, buffer);
            }
            Ok(())
        });
        Ok(y)
    }

    fn mean_tokens(&self, r: &mut R, x: &M, batch: usize, first: usize) -> Result<M> {
        let x = contiguous(r, x)?;
        let (rows, columns) = *x.shape();
        let tokens = rows / batch;
        let share = 1.0 / (tokens - first) as f32;
        let mut y = vec![0.0; batch * columns];
        for (y, x) in y.chunks_exact_mut(columns).zip(view(&x).chunks_exact(tokens * columns)) {
            for row in x[first * columns..].chunks_exact(columns) {
                y.iter_mut().zip(row).for_each(|(y, x)| *y += x * share);
            }
        }
        let y = matrix(&x, y, batch, columns)?;
        let (out, x) = (y.ghost(), x.ghost());
        r.record(move |g| {
            let dy = take!(g, &out);
            let dx = g.get_or_alloc_mut(&x)?;
            for (dy, dx) in dy.chunks_exact(columns).zip(dx.chunks_exact_mut(tokens * columns)) {
                for row in dx[first * columns..].chunks_exact_mut(columns) {
                    row.iter_mut().zip(dy).for_each(|(dx, dy)| *dx += dy * share);
                }
            }
            Ok(())
        });
        Ok(y)
    }

    fn mix(&self, r: &mut R, x: &[M], w: &M, rows: &[usize]) -> Result<Vec<M>> {
        let x: Vec<M> = x.iter().map(|x| contiguous(r, x)).collect::<Result<_>>()?;
        let w = contiguous(r, w)?;
        let ((n, columns), levels) = (*x[0].shape(), x.len());
        let part: Vec<f32> = rows.iter().flat_map(|&i| view(&w)[i * levels..][..levels].iter().copied()).collect();
        let mut mixed: Vec<Vec<f32>> = rows.iter().map(|_| vec![0.0; n * columns]).collect();
        let inputs: Vec<&[f32]> = x.iter().map(view).collect();
        let mut outputs: Vec<&mut [f32]> = mixed.iter_mut().map(|m| m.as_mut_slice()).collect();
        ew::mix(&self.pool, &part, &inputs, &mut outputs, Write::Set);
        let mixed: Vec<M> = mixed.into_iter().map(|m| matrix(&x[0], m, n, columns)).collect::<Result<_>>()?;
        if !r.is_recording() {
            return Ok(mixed);
        }
        let (pool, arena) = self.handles();
        let outs: Vec<_> = mixed.iter().map(|m| m.ghost()).collect();
        let rows = rows.to_vec();
        r.record(move |g| {
            let mut doutputs = Vec::with_capacity(outs.len());
            for out in &outs {
                doutputs.push(take!(g, out));
            }
            let doutputs: Vec<&[f32]> = doutputs.iter().map(Vec::as_slice).collect();
            let inputs: Vec<&[f32]> = x.iter().map(view).collect();
            let mut dpart = vec![0.0; part.len()];
            ew::mix_backward_weights(&pool, &arena, &inputs, &doutputs, &mut dpart);
            let dw = g.get_or_alloc_mut(&w)?;
            for (&row, dpart) in rows.iter().zip(dpart.chunks_exact(levels)) {
                dw[row * levels..][..levels].iter_mut().zip(dpart).for_each(|(dw, d)| *dw += d);
            }
            let mut buffers = Vec::with_capacity(levels);
            for x in &x {
                buffers.push(lend!(g, x));
            }
            let mut dinputs: Vec<&mut [f32]> = buffers.iter_mut().map(|b| b.as_mut_slice()).collect();
            ew::mix_backward_inputs(&pool, &part, &doutputs, &mut dinputs, Write::Add);
            for (x, buffer) in x.iter().zip(buffers) {
                restore!(g, x, buffer);
            }
            Ok(())
        });
        Ok(mixed)
    }

    fn standardize(&self, x: &M, kind: Standardize) -> Result<M> {
        let x = contiguous(&mut Recorder::inference(), x)?;
        let (rows, columns) = *x.shape();
        let mut y = vec![0.0; rows * columns];
        match kind {
            Standardize::Length => norm::l2_normalize(&self.pool, view(&x), columns, &mut y),
            Standardize::Rows => norm::standardize_rows(&self.pool, view(&x), columns, &mut y),
            Standardize::All => norm::standardize_all(&self.pool, view(&x), &mut y),
        }
        matrix(&x, y, rows, columns)
    }

    fn weighted_mean(&self, x: &[M], weights: &[f32]) -> Result<M> {
        let (rows, columns) = *x[0].shape();
        let mut mean = vec![0.0; rows * columns];
        for (x, &weight) in x.iter().zip(weights) {
            let x = contiguous(&mut Recorder::inference(), x)?;
            ew::axpy(&self.pool, weight, view(&x), &mut mean);
        }
        matrix(&x[0], mean, rows, columns)
    }

    fn distance(&self, r: &mut R, x: &M, target: &M, distance: Distance) -> Result<Scalar<Cpu>> {
        let off = &mut Recorder::inference();
        let (x, target) = (contiguous(r, x)?, contiguous(off, target)?);
        let value = distance_kernel(&self.pool, &x, &target, distance, None);
        let y = scalar(&x, value)?;
        let (pool, out) = (Arc::clone(&self.pool), y.ghost());
        r.record(move |g| {
            let scale = take!(g, &out)[0];
            let dx = mem::take(&mut **g.get_or_alloc_mut(&x)?);
            let mut dx = dx;
            distance_kernel(&pool, &x, &target, distance, Some(loss::Grad { into: &mut dx, scale, write: Write::Add }));
            **g.get_or_alloc_mut(&x)? = dx;
            Ok(())
        });
        Ok(y)
    }

    fn cross_entropy(&self, r: &mut R, logits: &M, targets: Vec<f32>) -> Result<Scalar<Cpu>> {
        let x = contiguous(r, logits)?;
        let columns = x.shape().1;
        let value = loss::cross_entropy(&self.pool, view(&x), &targets, columns, None);
        let y = scalar(&x, value)?;
        let (pool, out) = (Arc::clone(&self.pool), y.ghost());
        r.record(move |g| {
            let scale = take!(g, &out)[0];
            let grad = loss::Grad { into: g.get_or_alloc_mut(&x)?, scale, write: Write::Add };
            loss::cross_entropy(&pool, view(&x), &targets, columns, Some(grad));
            Ok(())
        });
        Ok(y)
    }

    fn weighted_sum(&self, r: &mut R, terms: &[Scalar<Cpu>], weights: &[f32]) -> Result<Scalar<Cpu>> {
        let sum: f32 = terms.iter().zip(weights).map(|(t, w)| t.as_vec()[0] * w).sum();
        let y: Scalar<Cpu> = terms[0].device().try_tensor_from_vec(vec![sum], ()).map_err(device)?;
        let (terms, weights, out) = (terms.iter().map(|t| t.ghost()).collect::<Vec<_>>(), weights.to_vec(), y.ghost());
        r.record(move |g| {
            let scale = take!(g, &out)[0];
            for (term, weight) in terms.iter().zip(weights) {
                g.get_or_alloc_mut(term)?[0] += scale * weight;
            }
            Ok(())
        });
        Ok(y)
    }

    fn adamw(
        &self,
        parameter: &mut Param<Cpu>,
        gradients: &mut Gradients<f32, Cpu>,
        first: &mut Vector<Cpu>,
        second: &mut Vector<Cpu>,
        s: AdamStep,
    ) -> Result<()> {
        let grad = gradients.get_or_alloc_mut(&parameter.value).map_err(device)?;
        let adam =
            optim::AdamW { beta1: s.betas.0, beta2: s.betas.1, eps: s.eps, step: s.step, grad_scale: s.gradient_scale };
        let tensor = optim::AdamWTensor {
            param: view_mut(&mut parameter.value),
            grad,
            exp_avg: view_mut(first),
            exp_avg_sq: view_mut(second),
            lr: s.lr,
            weight_decay: s.weight_decay,
        };
        optim::adamw(&self.pool, adam, &mut [tensor]);
        Ok(())
    }

    fn square_sum(&self, gradients: &mut Gradients<f32, Cpu>, parameters: &[Vector<Cpu>]) -> Result<f64> {
        let mut buffers = Vec::with_capacity(parameters.len());
        for parameter in parameters {
            buffers.push(mem::take(&mut **gradients.get_or_alloc_mut(parameter).map_err(device)?));
        }
        let slices: Vec<&[f32]> = buffers.iter().map(Vec::as_slice).collect();
        let norm = optim::grad_norm(&self.pool, &slices);
        for (parameter, buffer) in parameters.iter().zip(buffers) {
            **gradients.get_or_alloc_mut(parameter).map_err(device)? = buffer;
        }
        Ok(norm * norm)
    }
}

/// All heads of queries, keys and values.
fn heads(inputs: &[M]) -> [attn::Heads<'_>; 3] {
    let columns = |x: &M| x.shape().1;
    let alone = |x| attn::Heads::separate(view(x), columns(x));
    match inputs {
        [q, k, v] => [alone(q), alone(k), alone(v)],
        [q, kv] => {
            let side = |offset| attn::Heads::new(view(kv), columns(kv), offset);
            [alone(q), side(0), side(columns(kv) / 2)]
        }
        _ => unreachable!("queries, then keys and values, apart or side by side"),
    }
}

/// The gradients of what [`heads`] takes.
fn heads_gradient(buffers: &mut [Vec<f32>]) -> attn::QkvGrad<'_> {
    match buffers {
        [q, k, v] => attn::QkvGrad::Separate { q, k, v },
        [q, kv] => attn::QkvGrad::Cross { q, kv },
        _ => unreachable!("as many as inputs"),
    }
}

fn distance_kernel(pool: &Pool, x: &M, target: &M, distance: Distance, grad: Option<loss::Grad<'_>>) -> f64 {
    let (columns, x, y) = (x.shape().1, view(x), view(target));
    match distance {
        Distance::Mse => loss::pointwise(pool, loss::Pointwise::Mse, x, y, grad),
        Distance::L1 => loss::pointwise(pool, loss::Pointwise::L1, x, y, grad),
        Distance::SmoothL1 { beta } => loss::pointwise(pool, loss::Pointwise::SmoothL1 { beta }, x, y, grad),
        Distance::Cosine => loss::cosine(pool, x, y, columns, grad),
        Distance::Kl => loss::kl(pool, x, y, columns, grad),
    }
}
