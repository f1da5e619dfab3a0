//! The pre-norm transformer block.

use super::{Bias, Init, Linear, Norm, Param, layers::dev_empty};
use crate::{
    device::Dev,
    error::Result,
    kernels::{Act, Kernels, Packed},
};

/// `x + ls1 attn(norm1 x)`, then `x + ls2 mlp(norm2 x)`; timm's names.
#[derive(Clone)]
pub struct Block<D: Dev> {
    /// `norm1`.
    pub norm1: Norm<D>,
    /// `attn.qkv`, fused in that order.
    pub qkv: Linear<D>,
    /// `attn.proj`.
    pub proj: Linear<D>,
    /// `ls1.gamma` (DINOv2).
    pub ls1: Option<Param<D>>,
    /// `norm2`.
    pub norm2: Norm<D>,
    /// `mlp.fc1`.
    pub fc1: Linear<D>,
    /// `mlp.fc2`.
    pub fc2: Linear<D>,
    /// `ls2.gamma` (DINOv2).
    pub ls2: Option<Param<D>>,
    /// Heads of the attention.
    pub heads: usize,
    /// Activation of the MLP.
    pub act: Act,
    /// Of a frozen tower's last block, the queries' third of `attn.qkv` and the rest, packed apart: the class token's
    /// queries are wanted first.
    pub split_qkv: Option<(Packed, Packed)>,
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
    /// Of the LayerNorms.
    pub eps: f64,
    /// Of the MLP.
    pub act: Act,
    /// Whether the branches are scaled by learned vectors.
    pub layer_scale: bool,
}

impl<D: Dev> Block<D> {
    /// A block whose parameters are named `PREFIX.attn.qkv.weight` and so on.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn new(init: &Init<D>, prefix: &str, c: BlockConfig) -> Result<Self> {
        let scale = |name: &str| {
            c.layer_scale.then(|| init.constant(format!("{prefix}.{name}.gamma"), &[c.dim], 1e-5)).transpose()
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

    /// Freezes the block and packs its weights.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn pack(&mut self, kernels: &dyn Kernels<D>) -> Result<()> {
        self.each_mut(&mut |p| p.trainable = false);
        match self.split_qkv.is_some() {
            true => self.qkv.weight.value = dev_empty(&self.qkv.weight.value)?,
            false => self.qkv.pack(kernels)?,
        }
        for linear in [&mut self.proj, &mut self.fc1, &mut self.fc2] {
            linear.pack(kernels)?;
        }
        Ok(())
    }

    /// As [`Block::pack`], for a tower's last block, which runs in two halves.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn pack_split(&mut self, kernels: &dyn Kernels<D>) -> Result<()> {
        let dim = self.proj.outputs();
        let part = |rows| kernels.pack(&self.qkv.weight(), rows);
        self.split_qkv = part(0..dim).zip(part(dim..3 * dim));
        self.pack(kernels)
    }

    /// Calls `f` on each parameter.
    pub fn each(&self, f: &mut dyn FnMut(&Param<D>)) {
        self.norm1.each(f);
        self.qkv.each(f);
        self.proj.each(f);
        self.ls1.iter().for_each(&mut *f);
        self.norm2.each(f);
        self.fc1.each(f);
        self.fc2.each(f);
        self.ls2.iter().for_each(f);
    }

    /// Calls `f` on each parameter.
    pub fn each_mut(&mut self, f: &mut dyn FnMut(&mut Param<D>)) {
        self.norm1.each_mut(f);
        self.qkv.each_mut(f);
        self.proj.each_mut(f);
        self.ls1.iter_mut().for_each(&mut *f);
        self.norm2.each_mut(f);
        self.fc1.each_mut(f);
        self.fc2.each_mut(f);
        self.ls2.iter_mut().for_each(f);
    }
}
