//! What a step leaves whose loss or gradient is not finite.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// So many of the operators before the first bad one are kept.
pub const OPERATORS_BEFORE: usize = 12;

/// A step whose loss or gradient is not finite: `checkpoints/STAGE/failed-00001234.json`. The state before it is beside it.
///
/// Numbers that JSON has no form for are the texts `NaN`, `inf` and `-inf`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FailedStep {
    /// The stage.
    pub stage: String,
    /// The optimizer step, counted from 0.
    pub step: u64,
    /// The fractional epoch at which it began.
    pub epoch: f64,
    /// Its learning rate.
    pub lr: f64,
    /// What is not finite: `loss` or `norm of the gradients`.
    pub what: String,
    /// Its value.
    pub value: Value,
    /// The micro-batches of the step, up to the first whose loss is not finite.
    pub micro_batches: Vec<FailedBatch>,
    /// Trained or moving parameters that were not finite before the step.
    pub parameters: Vec<BadParameter>,
    /// What made the first value that is not finite; absent where none did, as with parameters that were so before, or
    /// when the step was made again and was finite.
    pub first: Option<FirstOperator>,
    /// Whether the step failed again when it was made a second time, to be looked at.
    pub repeats: bool,
    /// The kernels that computed it.
    pub kernels: String,
}

/// A micro-batch of a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FailedBatch {
    /// Places of the images in the dataset.
    pub indices: Vec<usize>,
    /// What the dataset calls them.
    pub images: Vec<String>,
    /// What each objective added to the loss, by its name; empty where a loss has one term without a name.
    pub terms: Map<String, Value>,
    /// The distances that terms are made of, by the level that is compared.
    pub levels: Map<String, Value>,
}

/// A parameter with values that are not finite.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadParameter {
    /// Its name.
    pub name: String,
    /// How many values are not finite.
    pub not_finite: usize,
    /// How many it has.
    pub values: usize,
}

/// An operator of the step, and the size of what it made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OperatorRecord {
    /// Its name.
    pub operator: String,
    /// `forward`, or `backward` for what it left in a gradient.
    pub pass: String,
    /// The parameters that it reads.
    pub parameters: Vec<String>,
    /// Whose gradient it is, where that is a parameter's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gradient_of: Option<String>,
    /// Rows and columns of what it made.
    pub shape: [usize; 2],
    /// The largest finite value, without its sign.
    pub largest: f32,
}

/// What made the first value that is not finite.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FirstOperator {
    /// The operator.
    #[serde(flatten)]
    pub made_by: OperatorRecord,
    /// How many values are not finite.
    pub not_finite: usize,
    /// Its place among the operators of the step, from 1.
    pub number: usize,
    /// The operators before it, the last at the end.
    pub before: Vec<OperatorRecord>,
}

impl OperatorRecord {
    /// The module that the parameters belong to, such as `blocks.3`; `None` without any.
    pub fn module(&self) -> Option<String> {
        let [first, rest @ ..] = self.parameters.as_slice() else { return None };
        let mut shared: Vec<&str> = first.split('.').collect();
        for name in rest {
            let same = name.split('.').zip(&shared).take_while(|(a, b)| a == *b).count();
            shared.truncate(same);
        }
        Some(if shared.is_empty() { first.clone() } else { shared.join(".") })
    }
}

impl fmt::Display for OperatorRecord {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        if let Some(parameter) = &self.gradient_of {
            return write!(f, "the gradient of `{parameter}`, by `{}`", self.operator);
        }
        if self.pass == "backward" {
            write!(f, "the backward pass of ")?;
        }
        write!(f, "`{}`", self.operator)?;
        self.module().map_or(Ok(()), |module| write!(f, " of `{module}`"))
    }
}

impl FirstOperator {
    /// The operator, how much of what it made is not finite, and after what it came where it has no place of its own.
    pub fn says(&self) -> String {
        let FirstOperator { made_by, not_finite, .. } = self;
        let values = made_by.shape[0] * made_by.shape[1];
        let place = |record: &OperatorRecord| record.gradient_of.is_some() || record.module().is_some();
        let after = self.before.iter().rev().find(|earlier| !place(made_by) && place(earlier));
        let after = after.map_or(String::new(), |earlier| format!(", after {earlier}"));
        format!("{made_by}{after}: {not_finite} of {values} values")
    }
}

/// A number for JSON.
pub(crate) fn number(value: f64) -> Value {
    if value.is_finite() { value.into() } else { value.to_string().into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(operator: &str, parameters: &[&str]) -> OperatorRecord {
        OperatorRecord {
            operator: operator.into(),
            pass: "forward".into(),
            parameters: parameters.iter().map(|&name| name.to_owned()).collect(),
            gradient_of: None,
            shape: [2, 3],
            largest: 1.0,
        }
    }

    #[test]
    fn an_operator_is_placed_by_its_parameters_or_by_what_came_before() {
        let block = record("block", &["blocks.1.norm1.weight", "blocks.1.attn.qkv.weight"]);
        assert_eq!(block.to_string(), "`block` of `blocks.1`");
        assert_eq!(record("linear", &["head.weight", "head.bias"]).to_string(), "`linear` of `head`");
        assert_eq!(record("mix", &["w", "x"]).module(), Some("w".into()));
        let gradient = OperatorRecord { gradient_of: Some("norm.weight".into()), ..record("layer_norm", &[]) };
        assert_eq!(gradient.to_string(), "the gradient of `norm.weight`, by `layer_norm`");
        let first = |made_by: OperatorRecord, before: Vec<OperatorRecord>| {
            FirstOperator { made_by, not_finite: 4, number: 3, before }.says()
        };
        assert_eq!(first(block.clone(), vec![gradient]), "`block` of `blocks.1`: 4 of 6 values");
        let before = vec![block, record("gather_rows", &[])];
        assert_eq!(first(record("ln", &[]), before), "`ln`, after `block` of `blocks.1`: 4 of 6 values");
        assert_eq!(number(f64::NEG_INFINITY), "-inf");
    }
}
