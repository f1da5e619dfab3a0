//! Warm-up, then the same rate throughout.

use maskalign_engine::Result;
use maskalign_registry::Refusal;

use super::{Schedule, check_below_peak, check_warmup, warmup};
use crate::{component, register};

/// The peak rate throughout, after a linear warm-up.
#[component]
struct Constant {
    /// Epochs of linear warm-up.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    warmup_epochs: f64,
    /// Rate at which the warm-up starts.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    warmup_lr: f64,
}

impl Schedule for Constant {
    fn rate(&self, peak: f64, epoch: f64, _: f64) -> f64 {
        warmup(self.warmup_lr, peak, epoch, self.warmup_epochs).unwrap_or(peak)
    }

    fn check(&self, epochs: f64, peak: f64) -> Result<(), Refusal> {
        check_below_peak("warmup_lr", self.warmup_lr, peak)?;
        check_warmup(self.warmup_epochs, epochs)
    }
}

register!(schedule "constant" => Constant, "the same rate throughout, after a warm-up", example: "{ type: constant }");
