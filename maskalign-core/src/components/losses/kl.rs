//! Kullback-Leibler divergence.

use super::Loss;
use crate::{component, register};
use maskalign_engine::{
    Context, Result, Tape, Tensor,
    ops::{self, Distance},
};

/// What a sum of divergences is divided by.
#[component]
#[derive(Copy, Default, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
enum Reduction {
    /// All elements (PyTorch's `reduction="mean"`).
    #[default]
    Mean,
    /// Rows, so that it is the mean divergence of a distribution (PyTorch's `reduction="batchmean"`).
    Batchmean,
}

/// KL divergence of softmax(prediction) from softmax(target) over channels (PyTorch's `kl_div`).
#[component]
struct Kl {
    /// What the sum is divided by.
    #[serde(default)]
    reduction: Reduction,
}

impl Loss for Kl {
    fn term(&self, cx: &Context, tape: &mut Tape, prediction: &Tensor, target: &Tensor) -> Result<Tensor> {
        let mean = ops::distance(cx, tape, prediction, target, Distance::Kl)?;
        match self.reduction {
            Reduction::Mean => Ok(mean),
            Reduction::Batchmean => ops::scale(cx, tape, &mean, prediction.columns() as f32),
        }
    }
}

register!(loss "kl" => Kl, "Kullback-Leibler divergence over channels", example: "{ type: kl }");
