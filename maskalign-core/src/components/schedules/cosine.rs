//! Warm-up, then half a cosine.

use maskalign_engine::Result;
use maskalign_registry::Refusal;

use super::{Schedule, check_below_peak, check_warmup, warmup};
use crate::{component, register};

/// A linear warm-up, then half a cosine down to `min_lr` (MAE's and MaskAlign's schedule).
#[component]
struct Cosine {
    /// Epochs of linear warm-up.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    warmup_epochs: f64,
    /// Rate at which the warm-up starts.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    warmup_lr: f64,
    /// Rate at the end.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    min_lr: f64,
    /// Epochs until `min_lr` is reached; absent: the stage's.
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0))]
    length_epochs: Option<f64>,
}

impl Schedule for Cosine {
    fn rate(&self, peak: f64, epoch: f64, epochs: f64) -> f64 {
        if let Some(rate) = warmup(self.warmup_lr, peak, epoch, self.warmup_epochs) {
            return rate;
        }
        let length = self.length_epochs.unwrap_or(epochs) - self.warmup_epochs;
        let done = if length > 0.0 { ((epoch - self.warmup_epochs) / length).min(1.0) } else { 1.0 };
        self.min_lr + (peak - self.min_lr) * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
    }

    fn check(&self, epochs: f64, peak: f64) -> Result<(), Refusal> {
        check_below_peak("warmup_lr", self.warmup_lr, peak)?;
        check_below_peak("min_lr", self.min_lr, peak)?;
        if let Some(length) = self.length_epochs.filter(|length| *length < epochs) {
            let message = format!("the schedule ends after {length} of the stage's {epochs} epochs");
            return Err(Refusal::new("length_epochs", message)
                .in_stage(["epochs"], "the stage's length")
                .help("leave it out for a schedule as long as the stage; a longer one is cut off"));
        }
        check_warmup(self.warmup_epochs, self.length_epochs.unwrap_or(epochs))
    }
}

register!(schedule "cosine" => Cosine, "a warm-up, then half a cosine",
    example: "{ type: cosine, warmup_epochs: 20, min_lr: 1.0e-5 }", paper: "SGDR, arXiv 1608.03983");

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers are those of MAE's `adjust_learning_rate` with lr 6e-4, min_lr 1e-5, warm-up 20 of 200 epochs,
    /// worked out in Python.
    #[test]
    fn rates_equal_the_official_ones() {
        let cosine = Cosine { warmup_epochs: 20.0, warmup_lr: 0.0, min_lr: 1e-5, length_epochs: None };
        for (epoch, rate) in [
            (0.0, 0.0),
            (0.5, 1.5e-5),
            (19.99, 5.997e-4),
            (20.0, 6e-4),
            (110.0, 3.05e-4),
            (155.0, 9.640350e-5),
            (200.0, 1e-5),
        ] {
            let got = cosine.rate(6e-4, epoch, 200.0);
            assert!((got - rate).abs() < 1e-10, "epoch {epoch}: {got}, expected {rate}");
        }
    }
}
