//! Cosine distance.

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

/// 1 - the cosine of prediction and target, mean over tokens; both are normalised.
#[component]
pub struct Cosine {}

impl LossPlugin for Cosine {
    fn term<D: Dev>(
        &self,
        cx: &Context<D>,
        r: &mut Recorder<D>,
        prediction: &Matrix<D>,
        target: &Matrix<D>,
    ) -> Result<Scalar<D>> {
        cx.kernels.distance(r, prediction, target, Distance::Cosine)
    }
}

register!(loss "cosine" => Cosine, "1 - cosine similarity", example: "{ type: cosine }");
