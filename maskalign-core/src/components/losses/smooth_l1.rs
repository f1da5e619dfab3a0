//! Smooth L1.

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

fn one() -> f32 {
    1.0
}

/// Quadratic within `beta` of the target, linear beyond; mean over all elements. MaskAlign uses it with beta 1 and an
/// objective's `weight` of 2.
#[component]
pub struct SmoothL1 {
    /// Where the square turns into a line; 0 is the absolute error.
    #[serde(default = "one")]
    #[schemars(range(min = 0.0))]
    beta: f32,
}

impl LossPlugin for SmoothL1 {
    fn term<D: Dev>(
        &self,
        cx: &Context<D>,
        r: &mut Recorder<D>,
        prediction: &Matrix<D>,
        target: &Matrix<D>,
    ) -> Result<Scalar<D>> {
        cx.kernels.distance(r, prediction, target, Distance::SmoothL1 { beta: self.beta })
    }
}

register!(loss "smooth_l1" => SmoothL1, "quadratic near the target, linear far from it",
    example: "{ type: smooth_l1, beta: 1.0 }");
