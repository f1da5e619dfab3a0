//! Smooth L1.

use super::Loss;
use crate::{component, register};
use maskalign_engine::{
    Context, Result, Tape, Tensor,
    ops::{self, Distance},
};

fn one() -> f32 {
    1.0
}

/// Quadratic within `beta` of the target, linear beyond; mean over all elements. MaskAlign uses it with beta 1 and an
/// objective's `weight` of 2.
#[component]
struct SmoothL1 {
    /// Where the square turns into a line; 0 is the absolute error.
    #[serde(default = "one")]
    #[schemars(range(min = 0.0))]
    beta: f32,
}

impl Loss for SmoothL1 {
    fn term(&self, cx: &Context, tape: &mut Tape, prediction: &Tensor, target: &Tensor) -> Result<Tensor> {
        ops::distance(cx, tape, prediction, target, Distance::SmoothL1 { beta: self.beta })
    }
}

register!(loss "smooth_l1" => SmoothL1, "quadratic near the target, linear far from it",
    example: "{ type: smooth_l1, beta: 1.0 }");
