//! Graphs of dfdx's own operators, with which composed forms are written, in `f32` and `f64`.

use std::{mem, rc::Rc};

use dfdx::prelude::{
    Backward, Cpu, CpuError, Device, Dtype, Gradients as CpuGradients, HasShape, OwnedTape, PutTape, Shape, SplitTape,
    Tape as _, Tensor, ZerosTensor,
};

pub use crate::host::Matrix;
use crate::{error::Result, host::cpu};

/// A vector of dfdx's on the CPU.
pub(crate) type Vector<E = f32> = Tensor<(usize,), E, Cpu>;
/// A tensor of dfdx's that carries the tape, inside [`Graph::run`].
pub type Taped<S, E = f32> = Tensor<S, E, Cpu, OwnedTape<E, Cpu>>;

/// The floating-point type of a composed form.
pub(crate) trait Float: Dtype {
    /// The nearest value.
    fn of(value: f64) -> Self {
        Self::from_f64(value).expect("f32 and f64 take every f64")
    }
}
impl Float for f32 {}
impl Float for f64 {}

/// A tape of dfdx's for one operator.
///
/// dfdx passes its tape along with the values; with many inputs that means merging tapes. Here values carry no tape: a graph
/// lends its tape to an operator's first operand and takes it back. Gradients are keyed by dfdx's tensor identities.
pub struct Graph<E: Dtype = f32>
where
    Cpu: Device<E>,
{
    tape: OwnedTape<E, Cpu>,
    recording: bool,
}

impl<E: Dtype> Graph<E>
where
    Cpu: Device<E>,
{
    /// A graph whose gradient is wanted.
    pub fn recording() -> Self {
        Graph { tape: OwnedTape::default(), recording: true }
    }

    /// A graph that keeps nothing.
    pub fn inference() -> Self {
        Graph { tape: OwnedTape::default(), recording: false }
    }

    /// Runs operators of dfdx.
    ///
    /// # Errors
    /// Errors of these operators: out of memory.
    pub fn run<A: Shape, B: Shape>(
        &mut self,
        x: &Tensor<A, E, Cpu>,
        f: impl FnOnce(Taped<A, E>) -> Result<Taped<B, E>, CpuError>,
    ) -> Result<Tensor<B, E, Cpu>> {
        let (y, tape) = f(x.clone().put_tape(mem::take(&mut self.tape)))?.split_tape();
        if self.recording {
            self.tape = tape;
        }
        Ok(y)
    }

    /// The backward pass from one value.
    ///
    /// # Errors
    /// Out of memory.
    pub fn backward(self, loss: &Tensor<(), E, Cpu>) -> Result<CpuGradients<E, Cpu>> {
        Ok(loss.clone().put_tape(self.tape).try_backward()?)
    }
}

/// Finds a gradient's buffer in dfdx's map. A closure, because the type of dfdx's ghost tensors cannot be named.
pub(crate) type Find = dyn for<'g> Fn(&'g mut CpuGradients<f32, Cpu>) -> Result<&'g mut Vec<f32>, CpuError>;

/// Where the gradient of a matrix accumulates.
pub(crate) fn finder(x: &Matrix) -> Rc<Find> {
    fn find<F>(f: F) -> Rc<Find>
    where
        F: for<'g> Fn(&'g mut CpuGradients<f32, Cpu>) -> Result<&'g mut Vec<f32>, CpuError> + 'static,
    {
        Rc::new(f)
    }
    let ghost = x.ghost();
    find(move |gradients| Ok(&mut **gradients.get_or_alloc_mut(&ghost)?))
}

impl Graph<f32> {
    /// The backward pass from the gradients of some outputs, each stored in the buffer that its finder returns.
    pub(crate) fn backward_from(mut self, seeds: Vec<(Rc<Find>, Vec<f32>)>) -> Result<CpuGradients<f32, Cpu>> {
        // Recorded last, so that it runs first.
        self.tape.add_backward_op(move |gradients| {
            for (find, seed) in seeds {
                *find(gradients)? = seed;
            }
            Ok(())
        });
        let root: Tensor<(), f32, Cpu> = cpu().zeros();
        Ok(root.put_tape(self.tape).try_backward()?)
    }
}

/// Whether two matrices share storage and may therefore be the same tensor: dfdx's identities are private.
pub(crate) fn shares_storage(x: &Matrix, y: &Matrix) -> bool {
    let len = |x: &Matrix| x.shape().0 * x.shape().1;
    len(x) > 0 && len(y) > 0 && std::ptr::eq(&raw const x[[0, 0]], &raw const y[[0, 0]])
}
