//! Cosine distance.

use super::Loss;
use crate::{component, register};
use maskalign_engine::{
    Context, Result, Tape, Tensor,
    ops::{self, Distance},
};

/// 1 - the cosine of prediction and target, mean over tokens; both are normalised.
#[component]
struct Cosine {}

impl Loss for Cosine {
    fn term(&self, cx: &Context, tape: &mut Tape, prediction: &Tensor, target: &Tensor) -> Result<Tensor> {
        ops::distance(cx, tape, prediction, target, Distance::Cosine)
    }
}

register!(loss "cosine" => Cosine, "1 - cosine similarity", example: "{ type: cosine }");
