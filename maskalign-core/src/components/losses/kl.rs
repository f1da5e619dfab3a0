//! Kullback-Leibler divergence.

use super::Loss;
use crate::{component, register};
use maskalign_engine::{
    Context, Result, Tape, Tensor,
    ops::{self, Distance},
};

/// KL divergence of softmax(prediction) from softmax(target) over channels, mean over all elements (PyTorch's `kl_div`, `reduction="mean"`).
#[component]
struct Kl {}

impl Loss for Kl {
    fn term(&self, cx: &Context, tape: &mut Tape, prediction: &Tensor, target: &Tensor) -> Result<Tensor> {
        ops::distance(cx, tape, prediction, target, Distance::Kl)
    }
}

register!(loss "kl" => Kl, "Kullback-Leibler divergence over channels", example: "{ type: kl }");
