//! The distance between an aligned output and its target.

mod cosine;
mod cross_entropy;
mod kl;
mod l1;
mod mse;
mod smooth_l1;

use maskalign_engine::{Context, Result, Tape, Tensor};

/// A loss.
pub trait Loss: Send + Sync {
    /// The distance of predictions from targets, both `[rows, channels]`; the target takes no gradient.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn term(&self, cx: &Context, tape: &mut Tape, prediction: &Tensor, target: &Tensor) -> Result<Tensor>;
}
