//! The one tensor type.

use std::{
    borrow::Cow,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use maskalign_gpu::Array;

use crate::{
    device::Device,
    error::Result,
    host::{Values, unique},
};

/// A matrix of rows in `f32`, on any device: the tokens of a batch are the rows, `[batch * tokens, channels]`; a single
/// value is `[1, 1]`.
///
/// A clone shares the values and the gradient, and is cheap. Values change only in [`Tensor::set`] and in the updates of
/// optimizers, and those of existing clones never do.
///
/// ```
/// # use maskalign_engine::{Device, Error, Tensor};
/// let x = Tensor::new(&Device::Cpu, vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2, 3)?;
/// assert_eq!((x.rows(), x.columns(), x.is_tracked()), (2, 3, false));
/// assert_eq!(x.reshaped(3, 2).to_vec(), x.to_vec());
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Tensor {
    id: u64,
    rows: usize,
    columns: usize,
    pub(crate) place: Place,
    tracked: bool,
}

/// Where the values lie, row by row.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    Cpu(Arc<Values>),
    Gpu(Array),
}

impl Tensor {
    /// A tensor with these row-major values, without a gradient.
    ///
    /// # Errors
    /// Out of memory on the device.
    ///
    /// # Panics
    /// There are not `rows * columns` values.
    pub fn new(device: &Device, values: Vec<f32>, rows: usize, columns: usize) -> Result<Self> {
        let place = match device {
            Device::Cpu => Place::Cpu(Arc::new(Values::new(values, rows, columns)?)),
            Device::Gpu(gpu) => {
                assert_eq!(values.len(), rows * columns, "{} values are not {rows} rows of {columns}", values.len());
                Place::Gpu(gpu.upload(&values)?)
            }
        };
        Ok(Tensor::at(place, rows, columns))
    }

    /// A tensor of zeros, without a gradient.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn zeros(device: &Device, rows: usize, columns: usize) -> Result<Self> {
        Tensor::new(device, vec![0.0; rows * columns], rows, columns)
    }

    pub(crate) fn at(place: Place, rows: usize, columns: usize) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Tensor { id: NEXT.fetch_add(1, Ordering::Relaxed), rows, columns, place, tracked: false }
    }

    /// The same tensor, taking a gradient, as parameters do and what operators make of them.
    #[must_use]
    pub fn tracked(mut self) -> Self {
        self.tracked = true;
        self
    }

    /// The same values without a gradient (PyTorch's `detach`).
    #[must_use]
    pub fn detached(mut self) -> Self {
        self.tracked = false;
        self
    }

    /// Whether it takes a gradient.
    pub fn is_tracked(&self) -> bool {
        self.tracked
    }

    /// The same tensor, taking a gradient if the operator that made it has an input that does.
    pub(crate) fn tracked_if(mut self, tracked: bool) -> Self {
        self.tracked = tracked;
        self
    }

    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// The number of rows and of columns.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The number of values.
    pub fn len(&self) -> usize {
        self.rows * self.columns
    }

    /// True for a tensor without values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same values and gradient in another shape.
    ///
    /// # Panics
    /// The shape has another number of values.
    #[must_use]
    pub fn reshaped(&self, rows: usize, columns: usize) -> Self {
        assert_eq!(self.len(), rows * columns, "{:?} is not {rows} rows of {columns}", self.shape());
        Tensor { rows, columns, ..self.clone() }
    }

    /// The device that it lies on.
    pub fn device(&self) -> Device {
        match &self.place {
            Place::Cpu(_) => Device::Cpu,
            Place::Gpu(array) => Device::Gpu(array.gpu().clone()),
        }
    }

    pub(crate) fn is_on(&self, device: &Device) -> bool {
        match (&self.place, device) {
            (Place::Cpu(_), Device::Cpu) => true,
            (Place::Gpu(array), Device::Gpu(gpu)) => array.gpu() == gpu,
            _ => false,
        }
    }

    /// The values, row by row: borrowed on the CPU; copied from a GPU, after waiting for it.
    pub fn values(&self) -> Cow<'_, [f32]> {
        match &self.place {
            Place::Cpu(values) => Cow::Borrowed(values.as_slice()),
            Place::Gpu(array) => Cow::Owned(array.download()),
        }
    }

    /// A copy of the values on the host.
    pub fn to_vec(&self) -> Vec<f32> {
        self.values().into_owned()
    }

    /// The first value, such as that of a loss.
    ///
    /// # Panics
    /// The tensor has no values.
    pub fn value(&self) -> f32 {
        self.values()[0]
    }

    /// Replaces the values, not the identity that gradients are keyed by.
    ///
    /// # Errors
    /// Out of memory on the device.
    ///
    /// # Panics
    /// The number of values differs.
    pub fn set(&mut self, values: &[f32]) -> Result<()> {
        assert_eq!(values.len(), self.len(), "{} values for {:?}", values.len(), self.shape());
        match &mut self.place {
            Place::Cpu(mine) => unique(mine)?.copy_from_slice(values),
            Place::Gpu(array) => *array = array.gpu().upload(values)?,
        }
        Ok(())
    }

    /// Drops the values, for weights that stay in another layout.
    pub(crate) fn emptied(&self) -> Result<Self> {
        Ok(Tensor { id: self.id, tracked: false, ..Tensor::new(&self.device(), Vec::new(), 0, 0)? })
    }

    /// The values of a CPU tensor.
    pub(crate) fn cpu(&self) -> &[f32] {
        match &self.place {
            Place::Cpu(values) => values.as_slice(),
            Place::Gpu(_) => unreachable!("the CPU's form of an operator is given the CPU's tensors"),
        }
    }

    /// The values of a CPU tensor, mutable.
    pub(crate) fn cpu_mut(&mut self) -> Result<&mut [f32]> {
        match &mut self.place {
            Place::Cpu(values) => unique(values),
            Place::Gpu(_) => unreachable!("the CPU's form of an operator is given the CPU's tensors"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clone_keeps_its_values_and_a_view_shares_the_gradient() {
        let mut x = Tensor::new(&Device::Cpu, vec![1.0, 2.0, 3.0, 4.0], 2, 2).unwrap();
        let (before, row) = (x.clone(), x.reshaped(1, 4));
        x.set(&[5.0; 4]).unwrap();
        assert_eq!((x.to_vec(), before.to_vec()), (vec![5.0; 4], vec![1.0, 2.0, 3.0, 4.0]));
        assert_eq!((row.id(), row.shape()), (x.id(), (1, 4)));
    }

    #[test]
    fn tensors_go_to_other_threads() {
        fn goes<T: Send + Sync>(_: &T) {}
        goes(&Tensor::zeros(&Device::Cpu, 1, 1).unwrap());
    }
}
