//! The best state of a stage by what is measured while it trains, and when nothing better is waited for.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::component;

fn every_epoch() -> u64 {
    1
}

/// Which of a stage's states is left: the one that was measured to be the best; of equal ones the first.
///
/// The images of `eval` are measured every few epochs and at the end of training. They choose the state, so that its
/// accuracy on them is a little better than on images that nothing was chosen by.
#[component]
#[derive(Copy)]
pub struct Best {
    /// What decides.
    #[serde(default)]
    pub metric: EvalMetric,
    /// Epochs between measurements.
    #[serde(default = "every_epoch")]
    #[schemars(range(min = 1))]
    pub every_epochs: u64,
    /// Training ends early once so many epochs have brought nothing better; absent: it does not.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub patience_epochs: Option<u64>,
}

/// A number that is measured on the images of `eval`.
#[component]
#[derive(Copy, Default, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum EvalMetric {
    /// The share of images whose class is found.
    #[default]
    Accuracy,
    /// The share of images whose class is among the five best.
    #[serde(rename = "top_5_accuracy")]
    Top5Accuracy,
    /// The mean cross entropy; the lowest is the best.
    Loss,
}

impl EvalMetric {
    /// Its name among what is measured.
    pub fn name(self) -> &'static str {
        match self {
            EvalMetric::Accuracy => "accuracy",
            EvalMetric::Top5Accuracy => "top_5_accuracy",
            EvalMetric::Loss => "loss",
        }
    }

    /// Whether `value` is better than `other`. What is not finite never is.
    fn is_better(self, value: f64, other: f64) -> bool {
        value.is_finite()
            && match self {
                EvalMetric::Accuracy | EvalMetric::Top5Accuracy => value > other,
                EvalMetric::Loss => value < other,
            }
    }
}

/// The best state so far, as checkpoints note it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Found {
    /// Updates that had been made.
    pub(super) step: u64,
    /// What was measured then, `epoch` among it.
    pub(super) measured: Value,
}

impl Best {
    fn value(self, measured: &Value) -> Option<f64> {
        measured.get(self.metric.name()).and_then(Value::as_f64)
    }

    /// Whether what was just measured is better than what was found before.
    pub(super) fn is_better(self, measured: &Value, found: Option<&Found>) -> bool {
        match (self.value(measured), found.and_then(|found| self.value(&found.measured))) {
            (Some(value), Some(other)) => self.metric.is_better(value, other),
            (value, _) => value.is_some_and(f64::is_finite),
        }
    }

    /// Whether so many epochs lie between the best and the last measurement that training ends. It depends on what
    /// checkpoints note alone, so that a resumed run ends where it would have.
    pub(super) fn is_out_of_patience(self, measured: &[Value], found: Option<&Found>) -> bool {
        let epoch = |measured: &Value| measured.get("epoch").and_then(Value::as_f64).unwrap_or(0.0);
        match (self.patience_epochs, measured.last()) {
            (Some(patience), Some(last)) => {
                epoch(last) - found.map_or(0.0, |found| epoch(&found.measured)) >= patience as f64
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_first_of_equal_states_is_the_best_and_patience_counts_from_it() {
        let best = Best { metric: EvalMetric::Loss, every_epochs: 2, patience_epochs: Some(4) };
        let losses = [0.5, f64::NAN, 0.4, 0.4, 0.6, 0.3];
        let (mut found, mut measured) = (None, Vec::new());
        let mut ended = Vec::new();
        for (i, loss) in losses.into_iter().enumerate() {
            let now = json!({ "epoch": 2 * (i + 1), "loss": loss });
            if best.is_better(&now, found.as_ref()) {
                found = Some(Found { step: 10 * i as u64, measured: now.clone() });
            }
            measured.push(now);
            ended.push((best.is_out_of_patience(&measured, found.as_ref()), found.as_ref().unwrap().step));
        }
        assert_eq!(ended, [(false, 0), (false, 0), (false, 20), (false, 20), (true, 20), (false, 50)]);
        let highest = Best { metric: EvalMetric::Accuracy, patience_epochs: None, ..best };
        let found = Found { step: 1, measured: json!({ "epoch": 1, "accuracy": 0.5 }) };
        assert!(highest.is_better(&json!({ "accuracy": 0.6 }), Some(&found)));
        assert!(!highest.is_better(&json!({ "accuracy": 0.5 }), Some(&found)));
        assert!(!highest.is_better(&json!({ "loss": 0.1 }), None), "what was not measured is not the best");
        assert!(!highest.is_out_of_patience(&[json!({ "epoch": 99 })], Some(&found)));
    }
}
