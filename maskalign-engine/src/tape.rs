//! One tape for a whole step, on every device.
//!
//! dfdx's `OwnedTape` orders and runs every backward pass. Each operator puts one closure on it, which takes its outputs'
//! gradients out of the map and adds to its inputs'. Gradients are keyed by the engine's own tensor identities: dfdx does
//! not distinguish a gradient of zeros from no gradient, and its identities are private.

use std::{cell::RefCell, collections::BTreeMap, mem, rc::Rc};

use dfdx::prelude::{Backward, Cpu, CpuError, OwnedTape, PutTape, Tape as _, ZerosTensor};
use maskalign_gpu::{Array, Gpu};

use crate::{
    error::{Error, Result},
    host::cpu,
    tensor::{Place, Tensor},
    watch::Watch,
};

/// What is kept for the backward pass of a segment.
///
/// ```
/// # use maskalign_engine::{Context, Device, Error, Recompute, Tape, ops};
/// let cx = Context::new(Device::Cpu, 1).with_recompute(Recompute::Blocks);
/// let x = cx.tensor(vec![3.0], 1, 1)?.tracked();
/// let (mut tape, inner) = (Tape::training(), cx.clone());
/// let loss = tape.segment(&x, cx.recompute(), move |tape, x| ops::square(&inner, tape, x))?;
/// assert_eq!(tape.backward(&loss)?.to_vec(&x), [6.0]);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// Everything that its operators need.
    #[default]
    Never,
    /// Its input alone: the segment runs again in the backward pass.
    Blocks,
}

/// The gradients that a backward pass left: those of leaves, that is parameters and other tensors that no operator made.
///
/// ```
/// # use maskalign_engine::{Context, Device, Error, Gradients, Tape, ops};
/// # let cx = Context::new(Device::Cpu, 1);
/// let x = cx.tensor(vec![3.0], 1, 1)?.tracked();
/// let mut tape = Tape::training();
/// let loss = ops::square(&cx, &mut tape, &x)?;
/// let gradients: Gradients = tape.backward(&loss)?;
/// assert_eq!(gradients.get(&x), Some(vec![6.0]));
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug, Default)]
pub struct Gradients(BTreeMap<u64, Gradient>);

/// One gradient.
#[derive(Debug)]
pub(crate) enum Gradient {
    Cpu(Vec<f32>),
    Gpu(Array),
}

/// Where the gradient of a tensor accumulates, without the tensor's values.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    id: u64,
    len: usize,
    pub(crate) gpu: Option<Gpu>,
}

impl Tensor {
    pub(crate) fn slot(&self) -> Slot {
        let gpu = match &self.place {
            Place::Cpu(_) => None,
            Place::Gpu(array) => Some(array.gpu().clone()),
        };
        Slot { id: self.id(), len: self.len(), gpu }
    }

    /// The slot of its gradient, if it takes one.
    pub(crate) fn wanted(&self) -> Option<Slot> {
        self.is_tracked().then(|| self.slot())
    }
}

impl Gradients {
    /// A copy of a tensor's gradient on the host, row by row; `None` where no loss reached the tensor.
    pub fn get(&self, of: &Tensor) -> Option<Vec<f32>> {
        self.0.get(&of.id()).map(|gradient| match gradient {
            Gradient::Cpu(values) => values.clone(),
            Gradient::Gpu(array) => array.download(),
        })
    }

    /// As [`Gradients::get`], with zeros where there is no gradient.
    pub fn to_vec(&self, of: &Tensor) -> Vec<f32> {
        self.get(of).unwrap_or_else(|| vec![0.0; of.len()])
    }

    /// The CPU's gradient of a tensor, where a loss reached it.
    pub(crate) fn cpu(&self, of: &Tensor) -> Option<&[f32]> {
        match self.0.get(&of.id())? {
            Gradient::Cpu(values) => Some(values),
            Gradient::Gpu(_) => None,
        }
    }

    /// The buffer of a tensor's gradient on the CPU, to add to.
    pub(crate) fn cpu_mut(&mut self, slot: &Slot) -> &mut Vec<f32> {
        match self.0.entry(slot.id).or_insert_with(|| Gradient::Cpu(vec![0.0; slot.len])) {
            Gradient::Cpu(values) => values,
            Gradient::Gpu(_) => unreachable!("an operator of the CPU has inputs on the CPU"),
        }
    }

    /// Takes the gradient of an operator's output; `None` where no loss reached it.
    pub(crate) fn take_cpu(&mut self, slot: &Slot) -> Option<Vec<f32>> {
        match self.0.remove(&slot.id)? {
            Gradient::Cpu(values) => Some(values),
            Gradient::Gpu(_) => unreachable!("an operator of the CPU has outputs on the CPU"),
        }
    }

    pub(crate) fn take(&mut self, slot: &Slot) -> Option<Gradient> {
        self.0.remove(&slot.id)
    }

    /// Lends the buffer of an input that takes a gradient, to add to; several can be lent at once. If two inputs are the
    /// same tensor, the second borrower gets zeros, and [`Gradients::give_back`] adds what it left there.
    pub(crate) fn lend(&mut self, slot: Option<&Slot>) -> Option<Vec<f32>> {
        let slot = slot?;
        Some(self.take_cpu(slot).unwrap_or_else(|| vec![0.0; slot.len]))
    }

    /// Returns what [`Gradients::lend`] gave.
    pub(crate) fn give_back(&mut self, slot: Option<&Slot>, lent: Option<Vec<f32>>) -> Result<()> {
        match (slot, lent) {
            (Some(slot), Some(lent)) => self.add(slot, Gradient::Cpu(lent)),
            _ => Ok(()),
        }
    }

    /// Adds to a gradient; the first addend becomes the buffer. Values from the host are copied to the tensor's device.
    pub(crate) fn add(&mut self, slot: &Slot, more: Gradient) -> Result<()> {
        let more = match (&slot.gpu, more) {
            (Some(gpu), Gradient::Cpu(more)) => Gradient::Gpu(gpu.upload(&more)?),
            (_, more) => more,
        };
        match (self.0.get_mut(&slot.id), more) {
            (None, more) => drop(self.0.insert(slot.id, more)),
            (Some(Gradient::Cpu(sum)), Gradient::Cpu(more)) => {
                sum.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
            }
            (Some(Gradient::Gpu(sum)), Gradient::Gpu(more)) => *sum = sum.gpu().clone().add(sum, &more)?,
            _ => unreachable!("a tensor's gradient lies where the tensor does"),
        }
        Ok(())
    }
}

/// What the closures of a tape share.
#[derive(Default)]
struct Shared {
    gradients: Gradients,
    /// The first error of a backward pass; dfdx's tape only passes on errors of its own type.
    failure: Option<Error>,
}

/// The tape of a step or of inference. Neither `Send` nor `Sync`.
///
/// ```
/// # use maskalign_engine::{Context, Device, Error, Tape, ops};
/// # let cx = Context::new(Device::Cpu, 1);
/// let x = cx.tensor(vec![1.0, 2.0], 1, 2)?.tracked();
/// let mut tape = Tape::training();
/// let squares = ops::square(&cx, &mut tape, &x)?;
/// let loss = ops::sum(&cx, &mut tape, &squares)?;
/// assert_eq!(tape.backward(&loss)?.to_vec(&x), [2.0, 4.0]);
/// # Ok::<(), Error>(())
/// ```
pub struct Tape {
    operators: OwnedTape<f32, Cpu>,
    recording: bool,
    watch: Option<Watch>,
    shared: Rc<RefCell<Shared>>,
}

impl Tape {
    /// Records what a backward pass needs.
    pub fn training() -> Self {
        Tape::onto(Gradients::default())
    }

    /// Records nothing.
    pub fn inference() -> Self {
        Tape { recording: false, ..Tape::training() }
    }

    /// Records, and accumulates into gradients that exist already (earlier micro-batches).
    pub fn onto(gradients: Gradients) -> Self {
        let shared = Rc::new(RefCell::new(Shared { gradients, failure: None }));
        Tape { operators: OwnedTape::default(), recording: true, watch: None, shared }
    }

    /// Shows a watch what each operator adds to gradients.
    #[must_use]
    pub fn watched(self, watch: Option<&Watch>) -> Self {
        Tape { watch: watch.cloned(), ..self }
    }

    /// Whether a backward pass may follow.
    pub fn is_recording(&self) -> bool {
        self.recording
    }

    /// Whether an operator on these inputs must record.
    pub(crate) fn wants(&self, inputs: &[&Tensor]) -> bool {
        self.recording && inputs.iter().any(|x| x.is_tracked())
    }

    /// Records the backward pass of an operator. Every operator of the engine calls this once.
    pub(crate) fn record(&mut self, f: impl FnOnce(&mut Gradients) -> Result<()> + 'static) {
        if !self.recording {
            return;
        }
        let shared = Rc::clone(&self.shared);
        let watched = self.watch.clone().and_then(|watch| Some((watch.running()?, watch)));
        self.operators.add_backward_op(move |_| {
            // Moved, not borrowed: a segment's inner pass runs inside this closure, on the same map.
            let mut gradients = mem::take(&mut shared.borrow_mut().gradients);
            let result = f(&mut gradients);
            if let Some((operator, watch)) = &watched {
                for id in &operator.inputs {
                    match gradients.0.get(id) {
                        Some(Gradient::Cpu(values)) => watch.gradient(operator, *id, values),
                        Some(Gradient::Gpu(array)) => watch.gradient(operator, *id, &array.download()),
                        None => {}
                    }
                }
            }
            let mut shared = shared.borrow_mut();
            shared.gradients = gradients;
            // Any error of dfdx's stops the pass; the true one waits.
            result.map_err(|error| {
                shared.failure = Some(error);
                CpuError::OutOfMemory
            })
        });
    }

    /// Runs the backward pass of a loss, `[1, 1]`.
    ///
    /// # Errors
    /// Out of memory, also where a segment is computed again; a tape that records nothing.
    pub fn backward(self, loss: &Tensor) -> Result<Gradients> {
        assert_eq!(loss.shape(), (1, 1), "a loss is one value");
        self.backward_from(vec![(loss.slot(), Gradient::Cpu(vec![1.0]))])
    }

    /// Runs the backward pass from the gradients of some outputs.
    pub(crate) fn backward_from(mut self, seeds: Vec<(Slot, Gradient)>) -> Result<Gradients> {
        if !self.recording {
            return Err(Error::NotRecording);
        }
        // Recorded last, so that it runs first.
        self.record(move |g| seeds.into_iter().try_for_each(|(slot, seed)| g.add(&slot, seed)));
        let root: dfdx::prelude::Tensor<(), f32, Cpu> = cpu().zeros();
        let outcome = root.put_tape(self.operators).try_backward();
        let mut shared = self.shared.borrow_mut();
        match shared.failure.take() {
            Some(error) => Err(error),
            None => {
                outcome?;
                Ok(mem::take(&mut shared.gradients))
            }
        }
    }

    /// Runs `f`. With [`Recompute::Blocks`] only `x` is kept, and `f` runs again in the backward pass, on a tape nested in
    /// this one. `f` owns clones of its parameters.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn segment<F>(&mut self, x: &Tensor, recompute: Recompute, f: F) -> Result<Tensor>
    where
        F: Fn(&mut Tape, &Tensor) -> Result<Tensor> + 'static,
    {
        if !self.recording || recompute == Recompute::Never {
            return f(self, x);
        }
        let y = f(&mut Tape::inference(), x)?.tracked();
        let (out, x, watch) = (y.slot(), x.clone(), self.watch.clone());
        self.record(move |g| {
            let Some(dy) = g.take(&out) else { return Ok(()) };
            let mut inner = Tape::onto(mem::take(g)).watched(watch.as_ref());
            let again = f(&mut inner, &x)?;
            *g = inner.backward_from(vec![(again.slot(), dy)])?;
            Ok(())
        });
        Ok(y)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::{context::Context, device::Device, ops};

    type Segment = Rc<dyn Fn(&mut Tape, &Tensor) -> Result<Tensor>>;

    fn recomputed(tape: &mut Tape, x: &Tensor, f: &Segment) -> Result<Tensor> {
        let f = Rc::clone(f);
        tape.segment(x, Recompute::Blocks, move |tape, x| f(tape, x))
    }

    /// The gradient of `x^2` in `depth` nested segments; the run with the number `bad` fails with out of memory.
    fn gradient_of_square(bad: usize, depth: usize) -> Result<Vec<f32>> {
        let cx = Context::new(Device::Cpu, 1);
        let x = cx.tensor(vec![1.0, 2.0, 3.0], 1, 3)?.tracked();
        let runs = Cell::new(0);
        let inner = cx.clone();
        let mut square: Segment = Rc::new(move |tape, x| {
            runs.set(runs.get() + 1);
            match runs.get() == bad {
                true => Err(Error::Device("out of memory".into())),
                false => ops::square(&inner, tape, x),
            }
        });
        for _ in 1..depth {
            square = Rc::new(move |tape, x| recomputed(tape, x, &square));
        }
        let mut tape = Tape::training();
        let inner = cx.clone();
        let same: Segment = Rc::new(move |tape, x| ops::scale(&inner, tape, x, 1.0));
        let y = recomputed(&mut tape, &x, &same)?;
        let y = recomputed(&mut tape, &y, &square)?;
        let loss = ops::sum(&cx, &mut tape, &y)?;
        Ok(tape.backward(&loss)?.to_vec(&x))
    }

    #[test]
    fn a_segment_that_fails_when_it_is_computed_again_fails_the_backward_pass() {
        for depth in 1..4 {
            assert_eq!(gradient_of_square(0, depth).unwrap(), [2.0, 4.0, 6.0]);
            for bad in 1..=depth + 1 {
                let error = gradient_of_square(bad, depth).unwrap_err();
                assert_eq!(error.to_string(), "device: out of memory", "run {bad} of {depth} segments");
            }
        }
    }

    #[test]
    fn what_no_loss_reaches_has_no_gradient() {
        let cx = Context::new(Device::Cpu, 1);
        let [x, y] = [1.0, 2.0].map(|v| cx.tensor(vec![v], 1, 1).unwrap().tracked());
        let mut tape = Tape::training();
        ops::square(&cx, &mut tape, &y).unwrap();
        let loss = ops::square(&cx, &mut tape, &x).unwrap();
        let gradients = tape.backward(&loss).unwrap();
        assert_eq!((gradients.get(&x), gradients.get(&y)), (Some(vec![2.0]), None));
    }

    #[test]
    fn an_inference_has_no_backward_pass() {
        let loss = Tensor::zeros(&Device::Cpu, 1, 1).unwrap();
        assert_eq!(Tape::inference().backward(&loss).unwrap_err(), Error::NotRecording);
    }
}
