//! The distance between an aligned output and its target.

mod cosine;
mod kl;
mod l1;
mod mse;
mod smooth_l1;

use crate::{
    context::Context,
    device::{Dev, Matrix, Scalar},
    error::Result,
    plugin::kind,
    tape::Recorder,
};

/// A loss, as its author writes it: for any device.
pub trait LossPlugin: Send + Sync {
    /// The distance of predictions from targets, both `[rows, channels]`; the target takes no gradient.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn term<D: Dev>(
        &self,
        cx: &Context<D>,
        r: &mut Recorder<D>,
        prediction: &Matrix<D>,
        target: &Matrix<D>,
    ) -> Result<Scalar<D>>;
}

/// A loss on one device, as stages call it.
pub trait Loss<D: Dev> {
    /// See [`LossPlugin::term`].
    ///
    /// # Errors
    /// Out of memory on the device.
    fn term(
        &self,
        cx: &Context<D>,
        r: &mut Recorder<D>,
        prediction: &Matrix<D>,
        target: &Matrix<D>,
    ) -> Result<Scalar<D>>;
}

impl<P: LossPlugin, D: Dev> Loss<D> for P {
    fn term(
        &self,
        cx: &Context<D>,
        r: &mut Recorder<D>,
        prediction: &Matrix<D>,
        target: &Matrix<D>,
    ) -> Result<Scalar<D>> {
        LossPlugin::term(self, cx, r, prediction, target)
    }
}

kind!(device LossTag, LossPlugin, Loss, loss);
