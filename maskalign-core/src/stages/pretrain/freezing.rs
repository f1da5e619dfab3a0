//! Freezing the student's layers one after another.

use std::sync::Arc;

use maskalign_registry::{Refusal, source::number};

use super::PlannedObjective;
use crate::{component, components::schedules::Schedule, stages::PlannedTraining};

/// How the shares of training grow with depth.
#[component]
#[derive(Copy, Default, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
enum Growth {
    /// As they are: in equal steps from `first` to 1.
    #[default]
    Linear,
    /// The square of that.
    Squared,
    /// The cube of that.
    Cubic,
}

/// Freezes the student's layers one after another, from the embedding of patches on, each after its share of training
/// (FreezeOut, arXiv 1706.04983). In its share a layer goes through the whole schedule, at rates that are higher by as much as
/// its time is shorter. What a frozen layer alone is read by, an objective with its head, ends with it: it is computed no more.
#[component]
#[derive(Copy)]
pub(super) struct Freeze {
    /// Share of training after which the embedding of patches is frozen, before `growth`. The last block's is 1.
    #[schemars(extend("exclusiveMinimum" = 0, "exclusiveMaximum" = 1))]
    first: f64,
    /// How the shares of the blocks grow from `first` to 1.
    #[serde(default)]
    growth: Growth,
    /// Epochs that no share counts: the schedule's warm-up, in which all layers have one rate.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    after_epochs: f64,
}

impl Freeze {
    /// What freezes the layers of a student of `depth` blocks.
    pub(super) fn plan(
        &self,
        depth: usize,
        training: &PlannedTraining,
        objectives: &[PlannedObjective],
    ) -> Result<Freezing, Refusal> {
        let epochs = training.length.epochs;
        if self.after_epochs >= epochs {
            let message = format!("{} epochs are the whole stage: nothing is frozen", number(self.after_epochs));
            return Err(Refusal::new("after_epochs", message).in_stage(["epochs"], "the stage's length"));
        }
        let deepest = objectives.iter().map(PlannedObjective::deepest_layer).max().unwrap_or(0);
        if deepest < depth {
            let message = format!(
                "no objective is left at the end: the deepest reads block {deepest} of {depth}, which is frozen before"
            );
            return Err(Refusal::whole(message).help("let an objective read the student's last block"));
        }
        let share = |layer: usize| {
            let share = self.first + (1.0 - self.first) * layer as f64 / depth as f64;
            match self.growth {
                Growth::Linear => share,
                Growth::Squared => share.powi(2),
                Growth::Cubic => share.powi(3),
            }
        };
        Ok(Freezing {
            shares: (0..=depth).map(share).collect(),
            after_epochs: self.after_epochs,
            epochs,
            schedule: Arc::clone(&training.schedule),
            peak: training.optimizer.peak_lr(training.batch.effective),
        })
    }
}

/// When each layer is frozen: the embedding of patches, then every block.
#[derive(Clone)]
pub(super) struct Freezing {
    shares: Vec<f64>,
    after_epochs: f64,
    epochs: f64,
    schedule: Arc<dyn Schedule>,
    peak: f64,
}

impl Freezing {
    /// Whether a layer's share of training is over where such a share of the stage is done.
    pub(super) fn is_frozen(&self, layer: usize, progress: f64) -> bool {
        (progress * self.epochs - self.after_epochs) / (self.epochs - self.after_epochs) > self.shares[layer]
    }

    /// What the learning rate of a layer is multiplied by there.
    pub(super) fn scale(&self, layer: usize, progress: f64) -> f64 {
        let (epoch, share) = (progress * self.epochs, self.shares[layer]);
        let rate = self.schedule.rate(self.peak, epoch, self.epochs);
        if epoch < self.after_epochs || rate == 0.0 {
            return 1.0;
        }
        let own = self.after_epochs + (epoch - self.after_epochs) / share;
        self.schedule.rate(self.peak / share, own, self.epochs) / rate
    }
}

/// The layer that a parameter of the student is of; none of its own are class token, mask token, positions and final norm.
pub(super) fn layer(parameter: &str) -> Option<usize> {
    if parameter.starts_with("patch_embed.") {
        return Some(0);
    }
    let block = parameter.strip_prefix("blocks.")?.split('.').next()?;
    block.parse::<usize>().ok().map(|block| block + 1)
}
