//! Warm-up, then a drop at each milestone.

use maskalign_engine::Result;
use maskalign_registry::{Refusal, source::number};

use super::{Schedule, check_below_peak, check_warmup, warmup};
use crate::{component, register};

fn tenth() -> f64 {
    0.1
}

/// The rate is multiplied by `gamma` at each milestone, after a linear warm-up (SimMIM, arXiv 2111.09886).
#[component]
struct Multistep {
    /// Epochs of linear warm-up.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    warmup_epochs: f64,
    /// Rate at which the warm-up starts.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    warmup_lr: f64,
    /// Epochs at which the rate drops, ascending.
    milestones: Vec<f64>,
    /// What the rate is multiplied by.
    #[serde(default = "tenth")]
    #[schemars(range(min = 0.0))]
    gamma: f64,
}

impl Schedule for Multistep {
    fn rate(&self, peak: f64, epoch: f64, _: f64) -> f64 {
        warmup(self.warmup_lr, peak, epoch, self.warmup_epochs).unwrap_or_else(|| {
            let passed = self.milestones.iter().filter(|&&m| epoch >= m).count();
            peak * self.gamma.powi(passed as i32)
        })
    }

    fn check(&self, epochs: f64, peak: f64) -> Result<(), Refusal> {
        check_below_peak("warmup_lr", self.warmup_lr, peak)?;
        check_warmup(self.warmup_epochs, epochs)?;
        if let Some(i) = self.milestones.windows(2).position(|pair| pair[0] >= pair[1]) {
            return Err(Refusal::new((i + 1).to_string(), "milestones must ascend").under("milestones"));
        }
        if let Some(i) = self.milestones.iter().position(|&milestone| milestone >= epochs) {
            let (milestone, epochs) = (number(self.milestones[i]), number(epochs));
            return Err(Refusal::new(i.to_string(), format!("{milestone} is never reached in {epochs} epochs"))
                .under("milestones")
                .in_stage(["epochs"], "the stage's length"));
        }
        Ok(())
    }
}

register!(schedule "multistep" => Multistep, "drops at milestones, after a warm-up",
    example: "{ type: multistep, milestones: [700], gamma: 0.1 }", paper: "SimMIM, arXiv 2111.09886");
