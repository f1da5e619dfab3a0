//! Optimizers: an update moves a parameter downhill, and always in the same way.

use maskalign_engine::{
    Context, Role, Tape, Tensor,
    ops::{self, Distance},
};
use maskalign_registry::OptimizerTag;

use super::{Faults, built, composed, fused, matrix, normal, same_bits};
use maskalign_core::{
    components::optimizers::{Optimizer, Update},
    error::Result,
    nn::Param,
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
        let name = cx.operators();
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
        let straight = faults.expect("four steps", train(&*optimizer, &cx, 4));
        let resumed = faults.expect("four steps, saved and loaded on the way", resumed(&*optimizer, &cx));
        if let (Some(straight), Some(resumed)) = (straight, resumed) {
            faults.unless(
                same_bits(&straight.values, &resumed),
                format_args!("its state does not hold all it needs: steps differ after saving and loading ({name})"),
            );
        }
        if let Some(many) = faults.expect("20 steps", train(&*optimizer, &cx, 20)) {
            faults.unless(
                many.last < many.first,
                format_args!(
                    "20 steps at a learning rate of 0.01 take a square from {} to {} ({name})",
                    many.first, many.last
                ),
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

/// Trains a parameter towards a target by the mean squared error.
fn train(optimizer: &dyn Optimizer, cx: &Context, steps: u64) -> Result<Trained> {
    let mut run = Pull::new(optimizer, cx)?;
    let before = run.parameter.to_host().data;
    let first = run.loss(cx)?;
    for step in 1..=steps {
        run.step(optimizer, cx, step)?;
    }
    Ok(Trained { before, values: run.parameter.to_host().data, first, last: run.loss(cx)? })
}

/// Four updates; after two, the parameter and the state are copied to the host and back.
fn resumed(optimizer: &dyn Optimizer, cx: &Context) -> Result<Vec<f32>> {
    let mut run = Pull::new(optimizer, cx)?;
    for step in 1..=2 {
        run.step(optimizer, cx, step)?;
    }
    let mut again = Pull::new(optimizer, cx)?;
    again.parameter.load(&run.parameter.to_host().data)?;
    for (to, from) in again.state.iter_mut().zip(&run.state) {
        to.set(&from.to_vec())?;
    }
    for step in 3..=4 {
        again.step(optimizer, cx, step)?;
    }
    Ok(again.parameter.to_host().data)
}

/// A parameter that is trained towards a target.
struct Pull {
    parameter: Param,
    target: Tensor,
    state: Vec<Tensor>,
}

impl Pull {
    fn new(optimizer: &dyn Optimizer, cx: &Context) -> Result<Self> {
        let [rows, columns] = DIMS;
        let before = normal("parameter", rows * columns);
        let away = normal("pull", rows * columns);
        let target = before.iter().zip(away).map(|(v, d)| v + d + d.signum()).collect();
        let zeros = |_: &&str| Ok(Tensor::zeros(cx.device(), rows, columns)?);
        Ok(Pull {
            parameter: Param::new(cx.device(), Role::Student, "layer.weight", &DIMS, before)?,
            target: matrix(rows, columns, target),
            state: optimizer.state_names().iter().map(zeros).collect::<Result<_>>()?,
        })
    }

    fn loss(&self, cx: &Context) -> Result<f32> {
        let off = &mut Tape::inference();
        Ok(ops::distance(cx, off, &self.parameter.value, &self.target, Distance::Mse)?.value())
    }

    fn step(&mut self, optimizer: &dyn Optimizer, cx: &Context, step: u64) -> Result<()> {
        let mut recorder = Tape::training();
        let loss = ops::distance(cx, &mut recorder, &self.parameter.value, &self.target, Distance::Mse)?;
        let gradients = recorder.backward(&loss)?;
        let update = Update { lr: 0.01, progress: 0.0, step, gradient_scale: 1.0 };
        Ok(optimizer.update(cx, &mut self.parameter, &gradients, &mut self.state, update)?)
    }
}
