//! Mean absolute error.

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

/// Mean over all elements of the absolute difference.
#[component]
pub struct L1 {}

impl LossPlugin for L1 {
    fn term<D: Dev>(
        &self,
        cx: &Context<D>,
        r: &mut Recorder<D>,
        prediction: &Matrix<D>,
        target: &Matrix<D>,
    ) -> Result<Scalar<D>> {
        cx.kernels.distance(r, prediction, target, Distance::L1)
    }
}

register!(loss "l1" => L1, "mean absolute error", example: "{ type: l1 }");
