//! The rule that updates parameters.

mod adamw;

use dfdx::prelude::Gradients;
use maskalign_registry::Refusal;

use crate::{
    context::Context,
    device::{Dev, Vector},
    error::Result,
    nn::Param,
    plugin::kind,
};

/// What changes from one update to the next.
#[derive(Clone, Copy, Debug)]
pub struct Update {
    /// Learning rate of this parameter.
    pub lr: f64,
    /// Share of the stage that is done, in 0..=1, for options that change over time.
    pub progress: f64,
    /// Number of this update, from 1.
    pub step: u64,
    /// What gradients are multiplied by first (clipping).
    pub gradient_scale: f32,
}

/// An optimizer, as its author writes it: for any device.
pub trait OptimizerPlugin: Send + Sync {
    /// Peak learning rate for an effective batch.
    fn peak_lr(&self, effective_batch: usize) -> f64;
    /// The gradient norm beyond which gradients are scaled down.
    fn clip_norm(&self) -> Option<f64>;
    /// Names of the tensors kept for each parameter, as checkpoints call them.
    fn state_names(&self) -> &'static [&'static str];
    /// Refuses options that contradict each other.
    ///
    /// # Errors
    /// Names the option.
    fn check(&self) -> Result<(), Refusal>;
    /// Updates one parameter in place; `state` has one vector for each of [`OptimizerPlugin::state_names`], zero at
    /// first.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn update<D: Dev>(
        &self,
        cx: &Context<D>,
        parameter: &mut Param<D>,
        gradients: &mut Gradients<f32, D>,
        state: &mut [Vector<D>],
        update: Update,
    ) -> Result<()>;
}

/// An optimizer on one device, as stages call it; see [`OptimizerPlugin`].
#[allow(missing_docs)]
pub trait Optimizer<D: Dev> {
    fn peak_lr(&self, effective_batch: usize) -> f64;
    fn clip_norm(&self) -> Option<f64>;
    fn state_names(&self) -> &'static [&'static str];
    fn check(&self) -> Result<(), Refusal>;
    fn update(
        &self,
        cx: &Context<D>,
        parameter: &mut Param<D>,
        gradients: &mut Gradients<f32, D>,
        state: &mut [Vector<D>],
        update: Update,
    ) -> Result<()>;
}

impl<P: OptimizerPlugin, D: Dev> Optimizer<D> for P {
    fn peak_lr(&self, effective_batch: usize) -> f64 {
        OptimizerPlugin::peak_lr(self, effective_batch)
    }
    fn clip_norm(&self) -> Option<f64> {
        OptimizerPlugin::clip_norm(self)
    }
    fn state_names(&self) -> &'static [&'static str] {
        OptimizerPlugin::state_names(self)
    }
    fn check(&self) -> Result<(), Refusal> {
        OptimizerPlugin::check(self)
    }
    fn update(
        &self,
        cx: &Context<D>,
        parameter: &mut Param<D>,
        gradients: &mut Gradients<f32, D>,
        state: &mut [Vector<D>],
        update: Update,
    ) -> Result<()> {
        OptimizerPlugin::update(self, cx, parameter, gradients, state, update)
    }
}

kind!(device OptimizerTag, OptimizerPlugin, Optimizer, optimizer);
