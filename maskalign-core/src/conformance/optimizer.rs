//! Optimizers: a step moves a parameter downhill, and the same way each time.

use dfdx::prelude::{AsArray, Cpu};
use maskalign_registry::OptimizerTag;

use super::{Faults, built, composed, fused, matrix, normal, same_bits};
use crate::{
    components::optimizers::{Optimizer, Update},
    context::Context,
    error::Result,
    kernels::Distance,
    nn::Param,
    tape::Recorder,
};

const DIMS: [usize; 2] = [5, 3];

pub(super) fn check(text: &str, faults: &mut Faults) {
    let Some(optimizer) = built::<OptimizerTag>(text, faults) else { return };
    faults.expect("checking its options", optimizer.check());
    let peak = optimizer.peak_lr(256);
    faults.unless(peak.is_finite() && peak >= 0.0, format_args!("its peak rate for 256 images is {peak}"));
    let mut names = optimizer.state_names().to_vec();
    names.sort_unstable();
    names.dedup();
    faults.unless(names.len() == optimizer.state_names().len(), "two of its state tensors share a name");
    for cx in [fused(), composed()] {
        let name = cx.kernels.name();
        let (Some(one), Some(again)) = (
            faults.expect("one step", train(&*optimizer, &cx, 1)),
            faults.expect("one step", train(&*optimizer, &cx, 1)),
        ) else {
            return;
        };
        faults.unless(same_bits(&one.values, &again.values), format_args!("a step differs from call to call ({name})"));
        faults.unless(
            !same_bits(&one.before, &one.values),
            format_args!("a step leaves a parameter where it was ({name})"),
        );
        faults.unless(
            one.values.iter().all(|v| v.is_finite()),
            format_args!("a step gives values that are not finite ({name})"),
        );
        if let Some(many) = faults.expect("20 steps", train(&*optimizer, &cx, 20)) {
            faults.unless(
                many.last < many.first,
                format_args!("20 steps at a rate of 0.01 take a square from {} to {} ({name})", many.first, many.last),
            );
        }
    }
}

struct Trained {
    before: Vec<f32>,
    values: Vec<f32>,
    first: f32,
    last: f32,
}

/// Pulls a parameter to a target by its mean squared distance.
fn train(optimizer: &dyn Optimizer<Cpu>, cx: &Context<Cpu>, steps: u64) -> Result<Trained> {
    let [rows, columns] = DIMS;
    let before = normal("parameter", rows * columns);
    let mut parameter = Param::new(&cx.dev, "layer.weight", &DIMS, before.clone())?;
    let target = matrix(
        rows,
        columns,
        before.iter().zip(normal("pull", rows * columns)).map(|(v, d)| v + d + d.signum()).collect(),
    );
    let mut state = Vec::new();
    for _ in optimizer.state_names() {
        state.push(Param::new(&cx.dev, "state", &DIMS, vec![0.0; rows * columns])?.value);
    }
    let mut losses = Vec::new();
    for step in 1..=steps + 1 {
        let mut recorder = Recorder::training();
        let loss = cx.kernels.distance(&mut recorder, &parameter.matrix(rows), &target, Distance::Mse)?;
        losses.push(loss.array());
        if step > steps {
            break;
        }
        let mut gradients = recorder.backward(&loss)?;
        let update = Update { lr: 0.01, progress: 0.0, step, gradient_scale: 1.0 };
        optimizer.update(cx, &mut parameter, &mut gradients, &mut state, update)?;
    }
    Ok(Trained { before, values: parameter.to_host().data, first: losses[0], last: losses[steps as usize] })
}
