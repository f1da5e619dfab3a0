//! Kullback-Leibler divergence.

use super::LossPlugin;
use crate::{
    component,
    context::Context,
    device::{Dev, Matrix, Scalar},
    error::Result,
    kernels::Distance,
    register,
    tape::Recorder,
};

/// KL divergence of softmax(prediction) from softmax(target) over channels, mean over all elements (PyTorch's `kl_div`, `reduction="mean"`).
#[component]
pub struct Kl {}

impl LossPlugin for Kl {
    fn term<D: Dev>(
        &self,
        cx: &Context<D>,
        r: &mut Recorder<D>,
        prediction: &Matrix<D>,
        target: &Matrix<D>,
    ) -> Result<Scalar<D>> {
        cx.kernels.distance(r, prediction, target, Distance::Kl)
    }
}

register!(loss "kl" => Kl, "Kullback-Leibler divergence over channels", example: "{ type: kl }");
