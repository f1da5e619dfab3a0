//! Mean squared error.

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

/// Mean over all elements of the squared difference.
#[component]
pub struct Mse {}

impl LossPlugin for Mse {
    fn term<D: Dev>(
        &self,
        cx: &Context<D>,
        r: &mut Recorder<D>,
        prediction: &Matrix<D>,
        target: &Matrix<D>,
    ) -> Result<Scalar<D>> {
        cx.kernels.distance(r, prediction, target, Distance::Mse)
    }
}

register!(loss "mse" => Mse, "mean squared error", example: "{ type: mse }");
