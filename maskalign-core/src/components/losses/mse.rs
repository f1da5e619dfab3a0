//! Mean squared error.

use super::Loss;
use crate::{component, register};
use maskalign_engine::{
    Context, Result, Tape, Tensor,
    ops::{self, Distance},
};

/// Mean over all elements of the squared difference.
#[component]
struct Mse {}

impl Loss for Mse {
    fn term(&self, cx: &Context, tape: &mut Tape, prediction: &Tensor, target: &Tensor) -> Result<Tensor> {
        ops::distance(cx, tape, prediction, target, Distance::Mse)
    }
}

register!(loss "mse" => Mse, "mean squared error", example: "{ type: mse }");
