//! The rule that updates parameters.

mod adamw;
mod lars;

use maskalign_engine::{Context, Gradients, Result, Tensor};
use maskalign_registry::{Refusal, Scalar};

use crate::nn::Param;

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

/// An optimizer.
pub trait Optimizer: Send + Sync {
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
    /// Updates one parameter in place; `state` has one vector for each of [`Optimizer::state_names`], zero at
    /// first.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn update(
        &self,
        cx: &Context,
        parameter: &mut Param,
        gradients: &Gradients,
        state: &mut [Tensor],
        update: Update,
    ) -> Result<()>;
}

/// The peak learning rate of a batch by the linear rule (arXiv 1706.02677): `base_lr` is meant for `base_batch` images.
fn linear_rule(base_lr: f64, effective_batch: usize, base_batch: usize) -> f64 {
    base_lr * effective_batch as f64 / base_batch as f64
}

/// The images that papers mean `base_lr` for.
fn base_batch() -> usize {
    256
}

fn no_weight_decay() -> Scalar {
    Scalar::Constant(0.0)
}

/// Refuses a weight decay that is negative at any time.
fn check_weight_decay(weight_decay: &Scalar) -> Result<(), Refusal> {
    match weight_decay.bounds().0 < 0.0 {
        true => Err(Refusal::new("weight_decay", format!("must not be negative, found {weight_decay}"))),
        false => Ok(()),
    }
}
