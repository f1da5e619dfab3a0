//! The pre-norm transformer block.

use super::{Bias, Linear, Norm};
use crate::{
    context::Context,
    error::Result,
    ops::{self, Act, Begun, BlockRun, BlockWeights, LinearWeights, Packed},
    param::{Init, Param, Role},
    tape::Tape,
    tensor::Tensor,
};

/// `x + ls1 attn(norm1 x)`, then `x + ls2 mlp(norm2 x)`, with timm's names.
#[derive(Clone)]
pub struct Block {
    /// `norm1`.
    pub norm1: Norm,
    /// `attn.qkv`: queries, keys and values in one projection, in that order.
    pub qkv: Linear,
    /// `attn.proj`.
    pub proj: Linear,
    /// `ls1.gamma` (DINOv2).
    pub ls1: Option<Param>,
    /// `norm2`.
    pub norm2: Norm,
    /// `mlp.fc1`.
    pub fc1: Linear,
    /// `mlp.fc2`.
    pub fc2: Linear,
    /// `ls2.gamma` (DINOv2).
    pub ls2: Option<Param>,
    heads: usize,
    act: Act,
    split_qkv: Option<(Packed, Packed)>,
}

/// Sizes and constants of a block.
#[derive(Clone, Copy, Debug)]
pub struct BlockConfig {
    /// Channels.
    pub dim: usize,
    /// Heads.
    pub heads: usize,
    /// Channels inside the MLP.
    pub mlp: usize,
    /// The `eps` of the LayerNorms.
    pub eps: f64,
    /// The activation of the MLP.
    pub act: Act,
    /// Initial value of LayerScale, the learned scales of the branches (arXiv 2103.17239); `None` for a block without.
    pub layer_scale: Option<f64>,
}

impl Block {
    /// A block whose parameters are named `PREFIX.attn.qkv.weight` and so on.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn new(init: &Init, prefix: &str, c: BlockConfig) -> Result<Self> {
        let scale = |name: &str| {
            let scale =
                c.layer_scale.map(|value| init.constant(format!("{prefix}.{name}.gamma"), &[c.dim], value as f32));
            scale.transpose()
        };
        Ok(Block {
            norm1: Norm::new(init, &format!("{prefix}.norm1"), c.dim, c.eps)?,
            qkv: Linear::new(init, &format!("{prefix}.attn.qkv"), 3 * c.dim, c.dim, Bias::With)?,
            proj: Linear::new(init, &format!("{prefix}.attn.proj"), c.dim, c.dim, Bias::With)?,
            ls1: scale("ls1")?,
            norm2: Norm::new(init, &format!("{prefix}.norm2"), c.dim, c.eps)?,
            fc1: Linear::new(init, &format!("{prefix}.mlp.fc1"), c.mlp, c.dim, Bias::With)?,
            fc2: Linear::new(init, &format!("{prefix}.mlp.fc2"), c.dim, c.mlp, Bias::With)?,
            ls2: scale("ls2")?,
            heads: c.heads,
            act: c.act,
            split_qkv: None,
        })
    }

    /// The block as operators take it.
    pub fn weights(&self) -> BlockWeights {
        BlockWeights {
            norm1: self.norm1.weights(),
            qkv: self.qkv.weights(),
            proj: self.proj.weights(),
            ls1: self.ls1.as_ref().map(|p| p.value.clone()),
            norm2: self.norm2.weights(),
            fc1: self.fc1.weights(),
            fc2: self.fc2.weights(),
            ls2: self.ls2.as_ref().map(|p| p.value.clone()),
            heads: self.heads,
            act: self.act,
            split_qkv: self.split_qkv.clone(),
        }
    }

    /// `[batch * tokens, dim] -> [batch * tokens, dim]`.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn forward(&self, cx: &Context, tape: &mut Tape, x: &Tensor, run: &BlockRun) -> Result<Tensor> {
        ops::block(cx, tape, x, &self.weights(), run)
    }

    /// What the block's attention is computed from: queries, keys and values, side by side: `[batch * tokens, dim] ->
    /// [batch * tokens, 3 * dim]`. The rest of the block does not run.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn queries_keys_values(&self, cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
        let y = self.norm1.forward(cx, tape, x)?;
        let Some((q, kv)) = &self.split_qkv else { return self.qkv.forward(cx, tape, &y, Act::None) };
        let dim = self.proj.outputs();
        let weights = self.qkv.weights();
        let mut part = |packed: &Packed, columns| {
            let bias = weights.bias.as_ref().map(|bias| ops::slice_columns(cx, tape, bias, columns)).transpose()?;
            let part = LinearWeights { weight: weights.weight.clone(), bias, packed: Some(packed.clone()) };
            ops::linear(cx, tape, &y, &part, Act::None)
        };
        let (q, kv) = (part(q, 0..dim)?, part(kv, dim..3 * dim)?);
        ops::concat_columns(cx, tape, &[&q, &kv])
    }

    /// The first half of a frozen block: what the attention of its class token needs.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn begin(&self, cx: &Context, x: &Tensor, run: &BlockRun) -> Result<Begun> {
        ops::begin_block(cx, x, &self.weights(), run)
    }

    /// The second half: the output for the `rows` (token indices) of each image, in that order; `None` gives all.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn finish(
        &self,
        cx: &Context,
        x: &Tensor,
        run: &BlockRun,
        begun: Begun,
        rows: Option<&[u32]>,
    ) -> Result<Tensor> {
        ops::finish_block(cx, x, &self.weights(), run, begun, rows)
    }

    /// The attention of the class token to the other tokens, of each head by itself: `[batch, heads, tokens - 1]`.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn class_attention_by_head(&self, cx: &Context, x: &Tensor, run: &BlockRun) -> Result<Vec<f32>> {
        ops::class_attention_by_head(cx, x, &self.weights(), run)
    }

    /// Freezes the block and packs its weights.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn pack(&mut self, cx: &Context) -> Result<()> {
        self.visit(&mut |p| p.set_role(Role::Frozen));
        match self.split_qkv.is_some() {
            true => self.qkv.weight.value = self.qkv.weight.value.emptied()?,
            false => self.qkv.pack(cx)?,
        }
        for linear in [&mut self.proj, &mut self.fc1, &mut self.fc2] {
            linear.pack(cx)?;
        }
        Ok(())
    }

    /// As [`Block::pack`], for a tower's last block, which runs in two halves.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn pack_split(&mut self, cx: &Context) -> Result<()> {
        let dim = self.proj.outputs();
        let part = |rows| ops::pack(cx, &self.qkv.weight.value, rows);
        self.split_qkv = part(0..dim).zip(part(dim..3 * dim));
        self.pack(cx)
    }

    /// Calls `f` on each parameter.
    pub fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        self.norm1.visit(f);
        self.qkv.visit(f);
        self.proj.visit(f);
        self.ls1.iter_mut().for_each(&mut *f);
        self.norm2.visit(f);
        self.fc1.visit(f);
        self.fc2.visit(f);
        self.ls2.iter_mut().for_each(f);
    }
}
