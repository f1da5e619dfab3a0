//! The values of a CPU tensor as a slice.
//!
//! dfdx keeps a tensor's storage private; its `Index` hands out references into it. A contiguous tensor's first
//! element is therefore the start of all its values.

use dfdx::prelude::{Cpu, HasShape, Shape, Tensor};

/// The values of a contiguous tensor, row-major.
pub(super) fn view<S: Shape>(tensor: &Tensor<S, f32, Cpu>) -> &[f32]
where
    Tensor<S, f32, Cpu>: std::ops::Index<S::Concrete, Output = f32>,
{
    let len = tensor.shape().num_elements();
    if len == 0 {
        return &[];
    }
    debug_assert!(is_contiguous(tensor), "a kernel was given a strided tensor");
    let first: &f32 = &tensor[S::Concrete::default()];
    // SAFETY: the tensor is contiguous and not broadcast (its callers make it so), so that its storage holds `len`
    // values from the first on; the borrow of the tensor keeps the storage alive and unchanged.
    unsafe { std::slice::from_raw_parts(first, len) }
}

/// The values of a contiguous tensor, to be changed in place; storage that is shared is copied first.
pub(super) fn view_mut<S: Shape>(tensor: &mut Tensor<S, f32, Cpu>) -> &mut [f32]
where
    Tensor<S, f32, Cpu>: std::ops::IndexMut<S::Concrete, Output = f32>,
{
    let len = tensor.shape().num_elements();
    if len == 0 {
        return &mut [];
    }
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
