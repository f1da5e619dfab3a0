//! The values of a CPU tensor as a slice.
//!
//! dfdx keeps a tensor's storage private; its `Index` hands out references into it. A contiguous tensor's first
//! element is therefore the start of all its values.

use dfdx::prelude::{Cpu, HasShape, Shape, Tensor};

/// The values of a contiguous tensor, row-major.
///
/// # Panics
/// The tensor is strided or broadcast: its storage does not hold the values in a row.
pub(super) fn view<S: Shape>(tensor: &Tensor<S, f32, Cpu>) -> &[f32]
where
    Tensor<S, f32, Cpu>: std::ops::Index<S::Concrete, Output = f32>,
{
    let len = tensor.shape().num_elements();
    if len == 0 {
        return &[];
    }
    assert!(is_contiguous(tensor), "a kernel was given a strided tensor");
    let first: &f32 = &tensor[S::Concrete::default()];
    // SAFETY: the tensor is contiguous and not broadcast, so that its storage holds `len` values from the first on; the
    // borrow of the tensor keeps the storage alive and unchanged.
    unsafe { std::slice::from_raw_parts(first, len) }
}

/// The values of a contiguous tensor, to be changed in place; storage that is shared is copied first.
///
/// # Panics
/// As [`view`].
pub(super) fn view_mut<S: Shape>(tensor: &mut Tensor<S, f32, Cpu>) -> &mut [f32]
where
    Tensor<S, f32, Cpu>: std::ops::IndexMut<S::Concrete, Output = f32>,
{
    let len = tensor.shape().num_elements();
    if len == 0 {
        return &mut [];
    }
    assert!(is_contiguous(tensor), "a kernel was given a strided tensor");
    let first: &mut f32 = &mut tensor[S::Concrete::default()];
    // SAFETY: as above; `IndexMut` made the storage this tensor's alone, and the borrow is exclusive.
    unsafe { std::slice::from_raw_parts_mut(first, len) }
}

/// Whether the values lie row by row without gaps: every step along an axis goes as far as the axes after it are large.
/// dfdx keeps the strides private, so that addresses have to tell.
pub(super) fn is_contiguous<S: Shape>(tensor: &Tensor<S, f32, Cpu>) -> bool {
    let dims = tensor.shape().concrete();
    if tensor.shape().num_elements() == 0 {
        return true;
    }
    let address = |index: S::Concrete| std::ptr::from_ref(&tensor[index]) as usize;
    let start = address(S::Concrete::default());
    let mut after = 1;
    for axis in (0..S::NUM_DIMS).rev() {
        if dims[axis] > 1 {
            let mut index = S::Concrete::default();
            index[axis] = 1;
            if address(index) != start + after * size_of::<f32>() {
                return false;
            }
        }
        after *= dims[axis];
    }
    true
}

#[cfg(test)]
mod tests {
    use dfdx::prelude::{Axes2, Axis, BroadcastTo, PermuteTo, TensorFromVec};

    use super::*;

    fn matrix() -> Tensor<(usize, usize), f32, Cpu> {
        Cpu::default().tensor_from_vec(vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0], (2, 3))
    }

    #[test]
    fn values_that_lie_row_by_row_are_seen_and_changed_in_place() {
        let mut x = matrix();
        let before = x.clone();
        view_mut(&mut x)[4] = 7.0;
        assert_eq!(view(&x), [1.0, 2.0, 3.0, 4.0, 7.0, 6.0]);
        assert_eq!(view(&before)[4], 5.0);
    }

    #[test]
    #[should_panic(expected = "strided")]
    fn a_permuted_tensor_is_refused() {
        view(&matrix().permute::<(usize, usize), Axes2<1, 0>>());
    }

    #[test]
    #[should_panic(expected = "strided")]
    fn a_broadcast_tensor_is_not_written_to() {
        let row: Tensor<(usize,), f32, Cpu> = Cpu::default().tensor_from_vec(vec![1.0, 2.0], (2,));
        view_mut(&mut row.broadcast_like::<(usize, usize), Axis<0>>(&(3, 2)));
    }
}
