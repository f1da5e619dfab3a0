//! The values of CPU tensors: dfdx's storage, seen as slices.
//!
//! dfdx keeps a tensor's storage private, and its `Index` returns a reference to one element, from which no longer slice
//! may be made. Storage is therefore made only here, from a vector whose address is taken before the vector is moved in;
//! the vector's buffer stays in place for as long as the storage lives.

use std::sync::{Arc, OnceLock};

use dfdx::prelude::{Cpu, HasShape, TensorFromVec};

use crate::error::Result;

/// A matrix of dfdx's on the CPU.
pub type Matrix<E = f32> = dfdx::prelude::Tensor<(usize, usize), E, Cpu>;

/// dfdx's CPU device, made once: each `Cpu::default()` would have its own random generator and cache.
pub(crate) fn cpu() -> &'static Cpu {
    static CPU: OnceLock<Cpu> = OnceLock::new();
    CPU.get_or_init(Cpu::default)
}

/// Row-major values in a tensor of dfdx's.
#[derive(Debug)]
pub(crate) struct Values {
    /// Never changed through dfdx: a clone that is given to a graph shares the storage, which dfdx copies before it
    /// writes.
    matrix: Matrix,
    /// A pointer to the first value.
    start: *mut f32,
    len: usize,
}

// SAFETY: `start` points into the storage of `matrix`, which is `Send` and `Sync` and which nobody else changes; it is
// read through `&self` and written through `&mut self` alone.
unsafe impl Send for Values {}
// SAFETY: as above.
unsafe impl Sync for Values {}

impl Values {
    /// Takes a vector of `rows * columns` values.
    ///
    /// # Errors
    /// Out of memory.
    pub(crate) fn new(mut values: Vec<f32>, rows: usize, columns: usize) -> Result<Self> {
        assert_eq!(values.len(), rows * columns, "{} values are not {rows} rows of {columns}", values.len());
        // The address is exposed: what is read and written through it later has this vector's provenance, however often
        // dfdx made references to the storage in between.
        let start = std::ptr::with_exposed_provenance_mut(values.as_mut_ptr().expose_provenance());
        let len = values.len();
        let matrix = cpu().try_tensor_from_vec(values, (rows, columns))?;
        assert!(
            len == 0 || std::ptr::addr_eq(start, &raw const matrix[[0, 0]]),
            "dfdx moved the values that it was given"
        );
        Ok(Values { matrix, start, len })
    }

    /// All values, row by row.
    pub(crate) fn as_slice(&self) -> &[f32] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: `start` is the buffer of the vector that `matrix` owns, `len` long; `self` is borrowed, so that nobody
        // writes.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }

    /// All values, mutable.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [f32] {
        if self.len == 0 {
            return &mut [];
        }
        // SAFETY: as above; `self` is borrowed mutably, and a graph that holds a clone of `matrix` holds the `Arc` of
        // these values as well, so that they are not unique then.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }

    /// The same storage and dfdx's identity of it, in another shape.
    pub(crate) fn matrix(&self, rows: usize, columns: usize) -> Result<Matrix> {
        use dfdx::prelude::ReshapeTo;
        match *self.matrix.shape() == (rows, columns) {
            true => Ok(self.matrix.clone()),
            false => Ok(self.matrix.clone().try_reshape_like(&(rows, columns))?),
        }
    }
}

/// The values, mutable: if they are shared, they are copied first.
pub(crate) fn unique(values: &mut Arc<Values>) -> Result<&mut [f32]> {
    if Arc::get_mut(values).is_none() {
        let (rows, columns) = *values.matrix.shape();
        *values = Arc::new(Values::new(values.as_slice().to_vec(), rows, columns)?);
    }
    Ok(Arc::get_mut(values).expect("made unique").as_mut_slice())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_changed_in_place_and_shared_ones_are_copied_first() {
        let mut x = Arc::new(Values::new(vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2, 3).unwrap());
        unique(&mut x).unwrap()[4] = 7.0;
        assert_eq!(x.as_slice(), [1.0, 2.0, 3.0, 4.0, 7.0, 6.0]);
        let before = Arc::clone(&x);
        unique(&mut x).unwrap()[0] = 9.0;
        assert_eq!((x.as_slice()[0], before.as_slice()[0]), (9.0, 1.0));
        assert_eq!(x.matrix(3, 2).unwrap()[[2, 0]], 7.0);
    }

    /// dfdx changes a tensor that it owns in place; it must not reach these values.
    #[test]
    fn a_graph_never_writes_into_the_values() {
        use dfdx::prelude::{TryAdd, TryMul};
        let x = Values::new(vec![1.0, 2.0], 1, 2).unwrap();
        let y = x.matrix(1, 2).unwrap().try_mul(3.0).unwrap().try_add(1.0).unwrap();
        assert_eq!(y[[0, 1]], 7.0);
        assert_eq!(x.as_slice(), [1.0, 2.0]);
        assert_eq!(x.matrix(2, 1).unwrap()[[1, 0]], 2.0);
    }

    #[test]
    fn no_values_are_an_empty_slice() {
        let mut x = Values::new(Vec::new(), 0, 3).unwrap();
        assert!(x.as_slice().is_empty() && x.as_mut_slice().is_empty());
    }
}
