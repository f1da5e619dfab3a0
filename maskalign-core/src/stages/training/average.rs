//! A moving average of what a stage trains, beside it.

use std::collections::BTreeMap;

use maskalign_engine::{
    Context, Tensor,
    ops::optim::{self},
};

use super::Task;
use crate::{
    component,
    error::{Error, Result},
    nn::{Param, Role},
    weights::{HostTensor, TensorMap},
};

/// A moving average (EMA) of everything that a stage trains, and of its running statistics: it begins as they do, and after
/// each update `average = momentum average + (1 - momentum) trained` (timm's `ModelEma`).
///
/// Where there is one, the average is what is measured, what the stage leaves, and so what later stages and exports take.
/// What was trained is in the checkpoints beside it.
#[component]
#[derive(Copy)]
pub struct MovingAverage {
    /// What is kept of the average in an update; timm calls it `decay`.
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1))]
    pub momentum: f64,
}

/// The prefix of its tensors in checkpoints.
pub(super) const PREFIX: &str = "ema.";

/// The state of a moving average: empty before the first update.
pub(super) struct Average {
    momentum: f64,
    values: BTreeMap<String, Tensor>,
}

/// Whether a parameter is averaged: what does not change is its own mean.
pub(super) fn is_averaged(p: &Param) -> bool {
    p.is_trained() || p.role() == Role::Buffer
}

impl Average {
    pub(super) fn new(options: MovingAverage) -> Average {
        Average { momentum: options.momentum, values: BTreeMap::new() }
    }

    /// Calls `f` on each parameter that is averaged, until it fails.
    fn each(task: &mut dyn Task, mut f: impl FnMut(&mut Param) -> Result<()>) -> Result<()> {
        let mut outcome = Ok(());
        task.visit(&mut |p| {
            if is_averaged(p) && outcome.is_ok() {
                outcome = f(p);
            }
        });
        outcome
    }

    /// Begins as what is trained, before its first update.
    pub(super) fn begin(&mut self, cx: &Context, task: &mut dyn Task) -> Result<()> {
        if !self.values.is_empty() {
            return Ok(());
        }
        Average::each(task, |p| {
            let (rows, columns) = p.value.shape();
            self.values.insert(p.name.clone(), cx.tensor(p.value.to_vec(), rows, columns)?);
            Ok(())
        })
    }

    /// Takes in what an update made.
    pub(super) fn follow(&mut self, cx: &Context, task: &mut dyn Task) -> Result<()> {
        Average::each(task, |p| match self.values.get_mut(&p.name) {
            Some(average) => Ok(optim::ema(cx, average, &p.value, self.momentum)?),
            None => Ok(()),
        })
    }

    /// Exchanges what is trained and its average. Done twice, all is as it was.
    pub(super) fn exchange(&mut self, task: &mut dyn Task) {
        task.visit(&mut |p| {
            if let Some(average) = self.values.get_mut(&p.name) {
                std::mem::swap(average, &mut p.value);
            }
        });
    }

    /// The average of a parameter.
    pub(super) fn of(&self, name: &str) -> Option<&Tensor> {
        self.values.get(name)
    }

    /// Takes up the state of a checkpoint.
    pub(super) fn restore(&mut self, cx: &Context, task: &mut dyn Task, tensors: &TensorMap) -> Result<()> {
        self.values.clear();
        Average::each(task, |p| {
            let name = format!("{PREFIX}{}", p.name);
            let HostTensor { data, .. } =
                tensors.get(&name).filter(|tensor| tensor.shape == p.dims).ok_or_else(|| {
                    Error::Usage(format!(
                        "the checkpoint has no `{name}` of that parameter's shape: it is of another recipe"
                    ))
                })?;
            let (rows, columns) = p.value.shape();
            self.values.insert(p.name.clone(), cx.tensor(data.clone(), rows, columns)?);
            Ok(())
        })
    }
}
