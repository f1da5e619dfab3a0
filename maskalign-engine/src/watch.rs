//! Watching a step: which operator makes the first value that is not finite.
//!
//! Every operator says its name and its inputs when it begins ([`Context::form`](crate::Context)), and every tensor that it
//! makes passes here; the tape shows what each adds to gradients. Nothing of this costs anything where nobody watches.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::tensor::Tensor;

/// The name of what was handed to operators from outside: images, targets, factors.
const GIVEN: &str = "given values";

/// Sees what operators make, up to the first value that is not finite. Clones share what they have seen.
///
/// ```
/// # use maskalign_engine::{Context, Device, Error, Tape, Watch, ops};
/// let watch = Watch::default();
/// let cx = Context::new(Device::Cpu, 1).with_watch(&watch);
/// let x = cx.tensor(vec![1.0, -1.0], 1, 2)?;
/// let squares = ops::square(&cx, &mut Tape::inference(), &x)?;
/// ops::ln(&cx, &mut Tape::inference(), &ops::sub(&cx, &mut Tape::inference(), &x, &squares)?)?;
/// let last = watch.seen().pop().unwrap();
/// assert_eq!((last.operator, last.not_finite, last.shape), ("ln", 2, (1, 2)));
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Watch(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// The operator that began last.
    running: Option<Begun>,
    seen: Vec<Seen>,
    /// Something was not finite; what follows is not looked at.
    is_over: bool,
}

/// An operator and the tensors that it reads.
#[derive(Clone, Debug)]
pub(crate) struct Begun {
    operator: &'static str,
    pub(crate) inputs: Vec<u64>,
}

/// In which direction an operator ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// It computed values.
    Forward,
    /// It added to its inputs' gradients.
    Backward,
}

/// What an operator made: an output, or what it left in the gradient of an input.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The operator's name in [`ops`](crate::ops), or `given values`: what came from outside.
    pub operator: &'static str,
    /// Whether it is a value or a gradient.
    pub pass: Pass,
    inputs: Vec<u64>,
    /// Whose gradient it is.
    gradient_of: Option<u64>,
    /// Rows and columns; a gradient's values count as one row.
    pub shape: (usize, usize),
    /// The largest of the finite values, without its sign; 0 where none is finite.
    pub largest: f32,
    /// How many values are not finite.
    pub not_finite: usize,
}

impl Seen {
    /// Whether the operator reads a tensor, such as a parameter.
    pub fn reads(&self, tensor: &Tensor) -> bool {
        self.inputs.contains(&tensor.id())
    }

    /// Whether it is the gradient of a tensor, such as a parameter.
    pub fn is_gradient_of(&self, tensor: &Tensor) -> bool {
        self.gradient_of == Some(tensor.id())
    }
}

impl Watch {
    /// What was made, in order, up to the first that has a value that is not finite: that is the last then.
    pub fn seen(&self) -> Vec<Seen> {
        self.state().seen.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An operator begins.
    pub(crate) fn begin(&self, operator: &'static str, inputs: &[&Tensor]) {
        let inputs = inputs.iter().map(|x| x.id()).collect();
        self.state().running = Some(Begun { operator, inputs });
    }

    /// The operator that began last.
    pub(crate) fn running(&self) -> Option<Begun> {
        self.state().running.clone()
    }

    /// The operator that began last made a tensor.
    pub(crate) fn made(&self, y: &Tensor) {
        if let Some(Begun { operator, inputs }) = self.running() {
            self.look(&y.values(), y.shape(), (operator, Pass::Forward), inputs, None);
        }
    }

    /// A tensor came from outside.
    pub(crate) fn given(&self, x: &Tensor) {
        self.look(&x.values(), x.shape(), (GIVEN, Pass::Forward), Vec::new(), None);
    }

    /// An operator left this in the gradient of an input.
    pub(crate) fn gradient(&self, by: &Begun, of: u64, values: &[f32]) {
        self.look(values, (1, values.len()), (by.operator, Pass::Backward), by.inputs.clone(), Some(of));
    }

    fn look(
        &self,
        values: &[f32],
        shape: (usize, usize),
        (operator, pass): (&'static str, Pass),
        inputs: Vec<u64>,
        gradient_of: Option<u64>,
    ) {
        let mut state = self.state();
        if state.is_over {
            return;
        }
        let (mut largest, mut not_finite) = (0.0f32, 0);
        for value in values {
            match value.is_finite() {
                true => largest = largest.max(value.abs()),
                false => not_finite += 1,
            }
        }
        state.is_over = not_finite > 0;
        state.seen.push(Seen { operator, pass, inputs, gradient_of, shape, largest, not_finite });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        context::{Context, Forms},
        device::Device,
        ops,
        tape::{Recompute, Tape},
    };

    /// `sqrt` has an infinite slope at 0; every form and a segment that is computed again tell so.
    #[test]
    fn the_first_gradient_that_is_not_finite_is_seen() {
        for (forms, recompute) in
            [(Forms::Best, Recompute::Never), (Forms::Composed, Recompute::Never), (Forms::Best, Recompute::Blocks)]
        {
            let watch = Watch::default();
            let cx = Context::new(Device::Cpu, 1).with_forms(forms).with_watch(&watch);
            let x = cx.tensor(vec![4.0, 0.0], 1, 2).unwrap().tracked();
            let mut tape = Tape::training().watched(Some(&watch));
            let inner = cx.clone();
            let y = tape
                .segment(&x, recompute, move |tape, x| {
                    let y = ops::sqrt(&inner, tape, x)?;
                    ops::scale(&inner, tape, &y, 2.0)
                })
                .unwrap();
            let loss = ops::sum(&cx, &mut tape, &y).unwrap();
            tape.backward(&loss).unwrap();
            let seen = watch.seen();
            let (last, before) = seen.split_last().unwrap();
            assert_eq!((last.operator, last.pass, last.not_finite), ("sqrt", Pass::Backward, 1), "{forms:?}");
            assert!(last.is_gradient_of(&x) && last.reads(&x));
            assert!(before.iter().all(|seen| seen.not_finite == 0));
        }
    }

    #[test]
    fn what_comes_from_outside_is_told_from_what_operators_make() {
        let watch = Watch::default();
        let cx = Context::new(Device::Cpu, 1).with_watch(&watch);
        let x = cx.tensor(vec![2.0], 1, 1).unwrap();
        ops::square(&cx, &mut Tape::inference(), &x).unwrap();
        cx.tensor(vec![f32::NAN, f32::INFINITY, -3.0], 1, 3).unwrap();
        ops::square(&cx, &mut Tape::inference(), &x).unwrap();
        let seen: Vec<_> = watch.seen().iter().map(|seen| (seen.operator, seen.largest, seen.not_finite)).collect();
        assert_eq!(seen, [(GIVEN, 2.0, 0), ("square", 4.0, 0), (GIVEN, 3.0, 2)]);
    }
}
