//! One recorder for a whole step.
//!
//! dfdx threads its tape through values; with twelve hidden states and as many heads that means merging tapes. Here
//! values carry no tape: a [`Recorder`] lends its tape to an operator's first operand and takes it back. Gradients
//! flow by tensor id.

use std::{cell::RefCell, mem, rc::Rc};

use dfdx::prelude::*;

use crate::{
    device::{Buffer, Dev, Matrix, Scalar},
    error::{Error, Result, device},
};

/// The tape of a step, or none for inference.
pub struct Recorder<D: Device<E>, E: Dtype = f32> {
    tape: OwnedTape<E, D>,
    recording: bool,
    /// The first error of this crate in a backward pass; dfdx's tape passes on none but the device's.
    failure: Rc<RefCell<Option<Error>>>,
}

/// A tensor that carries the tape, inside [`Recorder::run`].
pub type Taped<S, D, E = f32> = Tensor<S, E, D, OwnedTape<E, D>>;

impl<D: Device<E>, E: Dtype> Recorder<D, E> {
    /// Records what is needed for a backward pass.
    pub fn training() -> Self {
        Recorder { tape: OwnedTape::default(), recording: true, failure: Rc::default() }
    }

    /// Records nothing.
    pub fn inference() -> Self {
        Recorder { tape: OwnedTape::default(), recording: false, failure: Rc::default() }
    }

    /// Records, and accumulates into gradients that exist already (earlier micro-batches).
    pub fn onto(dev: &D, gradients: Gradients<E, D>) -> Self {
        // The only public way to put gradients into a tape is to trace a tensor with them.
        let seed: Tensor<(), E, D> = dev.zeros();
        Recorder { tape: seed.traced(gradients).split_tape().1, recording: true, failure: Rc::default() }
    }

    /// A recorder whose backward pass runs inside this one's.
    fn inside(&self) -> Self {
        Recorder { failure: Rc::clone(&self.failure), ..Self::training() }
    }

    /// Whether a backward pass may follow.
    pub fn is_recording(&self) -> bool {
        self.recording
    }

    /// Runs operators of dfdx: lends the tape to `x` and takes it back from the result.
    ///
    /// # Errors
    /// What the operators answer: out of memory.
    pub fn run<A: Shape, B: Shape>(
        &mut self,
        x: &Tensor<A, E, D>,
        f: impl FnOnce(Taped<A, D, E>) -> Result<Taped<B, D, E>, D::Err>,
    ) -> Result<Tensor<B, E, D>> {
        let lent = mem::take(&mut self.tape);
        let (y, tape) = f(x.clone().put_tape(lent)).map_err(device)?.split_tape();
        if self.recording {
            self.tape = tape;
        }
        Ok(y)
    }

    /// Records the backward pass of an operator that ran outside dfdx; does nothing in inference.
    pub fn record(&mut self, f: impl FnOnce(&mut Gradients<E, D>) -> Result<(), D::Err> + 'static) {
        if self.recording {
            self.tape.add_backward_op(f);
        }
    }

    /// Runs the backward pass of `loss` and gives all gradient buffers.
    ///
    /// # Errors
    /// Out of memory, also where a segment is computed again.
    pub fn backward(self, loss: &Scalar<D, E>) -> Result<Gradients<E, D>> {
        let gradients = loss.clone().put_tape(self.tape).try_backward().map_err(device)?;
        match self.failure.take() {
            Some(error) => Err(error),
            None => Ok(gradients),
        }
    }
}

impl<D: Dev> Recorder<D> {
    /// Runs `f` on a tape of its own, whose gradient temporaries die with it. With `recompute`, `f` runs again in the
    /// backward pass and only `x` is kept. `parameters` are the tensors, besides `x`, that `f` takes gradients into.
    ///
    /// # Errors
    /// What `f` answers.
    pub fn segment<F>(
        &mut self,
        parameters: Vec<crate::device::Vector<D>>,
        x: &Matrix<D>,
        recompute: bool,
        f: F,
    ) -> Result<Matrix<D>>
    where
        F: Fn(&mut Recorder<D>, &Matrix<D>) -> Result<Matrix<D>> + 'static,
    {
        if !self.recording {
            return f(self, x);
        }
        let mut inner = if recompute { Recorder::inference() } else { self.inside() };
        let y = f(&mut inner, x)?;
        let out = y.clone();
        let kept = (!recompute).then_some((y.clone(), inner));
        let (y_ghost, dev, x) = (y.ghost(), y.device().clone(), x.clone());
        let inside = self.inside();
        self.record(move |outer| {
            if inside.failure.borrow().is_some() {
                return Ok(());
            }
            outer.get_or_alloc_mut(&y_ghost)?;
            let dy: Matrix<D> = outer.get(&y_ghost);
            *outer.get_or_alloc_mut(&y_ghost)? = empty(&dev)?;
            let (y, inner) = match kept {
                Some(kept) => kept,
                None => {
                    let mut again = inside;
                    match f(&mut again, &x) {
                        Ok(y) => (y, again),
                        Err(error) => {
                            // The gradients are wrong from here on; `backward` gives the error in their place.
                            *again.failure.borrow_mut() = Some(error);
                            return Ok(());
                        }
                    }
                }
            };
            let mut lent = Vec::with_capacity(parameters.len());
            for parameter in &parameters {
                let lend = mem::replace(outer.get_or_alloc_mut(parameter)?, empty(&dev)?);
                lent.push((parameter.clone(), lend));
            }
            let dx = mem::replace(outer.get_or_alloc_mut(&x)?, empty(&dev)?);
            let x_ghost = x.ghost();
            let elements = y.shape().0 * y.shape().1;
            let (product, tape) = y.put_tape(inner.tape).try_mul(dy)?.split_tape();
            let sum: Taped<(), D> = product.put_tape(tape).try_reshape_like(&(elements,))?.try_sum::<(), Axis<0>>()?;
            let (sum, mut tape) = sum.split_tape();
            // Recorded last, so it runs first: the inner pass accumulates into the outer buffers.
            tape.add_backward_op(move |inner| {
                for (parameter, buffer) in lent {
                    *inner.get_or_alloc_mut(&parameter)? = buffer;
                }
                *inner.get_or_alloc_mut(&x_ghost)? = dx;
                Ok(())
            });
            let mut inner = sum.put_tape(tape).try_backward()?;
            for parameter in &parameters {
                mem::swap(outer.get_or_alloc_mut(parameter)?, inner.get_or_alloc_mut(parameter)?);
            }
            mem::swap(outer.get_or_alloc_mut(&x)?, inner.get_or_alloc_mut(&x)?);
            Ok(())
        });
        Ok(out)
    }
}

/// Something small to leave in the place of a buffer that is lent or freed.
fn empty<D: Dev>(dev: &D) -> Result<Buffer<D>, D::Err> {
    Storage::<f32>::try_alloc_len(dev, 1)
}

/// The gradient of a tensor, copied out; zeros where the loss does not reach it.
///
/// # Errors
/// Out of memory.
pub fn gradient<S: Shape, D: Dev>(
    gradients: &mut Gradients<f32, D>,
    of: &Tensor<S, f32, D>,
) -> Result<Tensor<S, f32, D>> {
    gradients.get_or_alloc_mut(of).map_err(device)?;
    Ok(gradients.get(of))
}

/// Moves a gradient buffer between maps without copying.
///
/// # Errors
/// Out of memory.
pub fn swap_gradient<S: Shape, D: Dev>(
    a: &mut Gradients<f32, D>,
    b: &mut Gradients<f32, D>,
    of: &Tensor<S, f32, D>,
) -> Result<()> {
    let left: &mut Buffer<D> = a.get_or_alloc_mut(of).map_err(device)?;
    mem::swap(left, b.get_or_alloc_mut(of).map_err(device)?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    type Segment = Rc<dyn Fn(&mut Recorder<Cpu>, &Matrix<Cpu>) -> Result<Matrix<Cpu>>>;

    fn recomputed(r: &mut Recorder<Cpu>, x: &Matrix<Cpu>, f: &Segment) -> Result<Matrix<Cpu>> {
        let f = Rc::clone(f);
        r.segment(Vec::new(), x, true, move |r, x| f(r, x))
    }

    /// The gradient of `x^2`, whose run number `bad` fails for want of memory, in `depth` segments inside each other.
    fn gradient_of_square(bad: usize, depth: usize) -> Result<Vec<f32>> {
        let x: Matrix<Cpu> = Cpu::default().tensor_from_vec(vec![1.0, 2.0, 3.0], (1, 3));
        let runs = Cell::new(0);
        let mut square: Segment = Rc::new(move |r, x| {
            runs.set(runs.get() + 1);
            match runs.get() == bad {
                true => Err(Error::Device("out of memory".into())),
                false => r.run(x, |x| x.try_square()),
            }
        });
        for _ in 1..depth {
            square = Rc::new(move |r, x| recomputed(r, x, &square));
        }
        let mut r = Recorder::training();
        let same: Segment = Rc::new(|r, x| r.run(x, |x| x.try_mul(1.0)));
        let y = recomputed(&mut r, &x, &same)?;
        let y = recomputed(&mut r, &y, &square)?;
        let loss = r.run(&y, |y| y.try_reshape_like(&(3,))?.try_sum::<(), Axis<0>>())?;
        let mut gradients = r.backward(&loss)?;
        Ok(gradient(&mut gradients, &x)?.as_vec())
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
}
