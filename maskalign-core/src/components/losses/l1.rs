//! Mean absolute error.

use super::Loss;
use crate::{component, register};
use maskalign_engine::{
    Context, Result, Tape, Tensor,
    ops::{self, Distance},
};

/// Mean over all elements of the absolute difference.
#[component]
struct L1 {}

impl Loss for L1 {
    fn term(&self, cx: &Context, tape: &mut Tape, prediction: &Tensor, target: &Tensor) -> Result<Tensor> {
        ops::distance(cx, tape, prediction, target, Distance::L1)
    }
}

register!(loss "l1" => L1, "mean absolute error", example: "{ type: l1 }");
