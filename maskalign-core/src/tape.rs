//! One recorder for a whole step.
//!
//! dfdx threads its tape through values; with twelve hidden states and as many heads that means merging tapes. Here
//! values carry no tape: a [`Recorder`] lends its tape to an operator's first operand and takes it back. Gradients
//! flow by tensor id.

use std::mem;

use dfdx::prelude::*;

use crate::{
    device::{Buffer, Dev, Matrix, Scalar},
    error::{Result, device},
};

/// The tape of a step, or none for inference.
pub struct Recorder<D: Device<E>, E: Dtype = f32> {
    tape: OwnedTape<E, D>,
    recording: bool,
}

/// A tensor that carries the tape, inside [`Recorder::run`].
pub type Taped<S, D, E = f32> = Tensor<S, E, D, OwnedTape<E, D>>;

impl<D: Device<E>, E: Dtype> Recorder<D, E> {
    /// Records what is needed for a backward pass.
    pub fn training() -> Self {
        Recorder { tape: OwnedTape::default(), recording: true }
    }

    /// Records nothing.
    pub fn inference() -> Self {
        Recorder { tape: OwnedTape::default(), recording: false }
    }

    /// Records, and accumulates into gradients that exist already (earlier micro-batches).
    pub fn onto(dev: &D, gradients: Gradients<E, D>) -> Self {
        // The only public way to put gradients into a tape is to trace a tensor with them.
        let seed: Tensor<(), E, D> = dev.zeros();
        Recorder { tape: seed.traced(gradients).split_tape().1, recording: true }
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
    /// Out of memory.
    pub fn backward(self, loss: &Scalar<D, E>) -> Result<Gradients<E, D>> {
        loss.clone().put_tape(self.tape).try_backward().map_err(device)
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
        let mut inner = if recompute { Recorder::inference() } else { Recorder::training() };
        let y = f(&mut inner, x)?;
        let out = y.clone();
        let kept = (!recompute).then_some((y.clone(), inner));
        let (y_ghost, dev, x) = (y.ghost(), y.device().clone(), x.clone());
        self.record(move |outer| {
            outer.get_or_alloc_mut(&y_ghost)?;
            let dy: Matrix<D> = outer.get(&y_ghost);
            *outer.get_or_alloc_mut(&y_ghost)? = empty(&dev)?;
            let (y, inner) = match kept {
                Some(kept) => kept,
                None => {
                    let mut again = Recorder::training();
                    // The first run of the same closure on the same input succeeded.
                    let y = f(&mut again, &x).expect("a recomputed segment repeats its first run");
                    (y, again)
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
