//! Products of matrices that stay in the caches of one core, for kernels whose tasks make many of them.

use super::MatRef;
use super::kernel::{ALayout, Direct, Kernel, Output, Panel, kernel};
use super::pack::{Part, panels};
use crate::arch::Isa;
use crate::share::Write;

/// The columns of a result are a multiple of this: whole vectors on every instruction set.
pub(crate) const LANES: usize = 16;

/// The register tiles of an instruction set, without the blocks, packing and threads of
/// [`gemm`](super::gemm).
#[derive(Clone, Copy)]
pub(crate) struct Small {
    kernel: &'static Kernel,
}

impl Small {
    /// The tiles of `isa`, which the machine has.
    pub(crate) fn new(isa: Isa) -> Small {
        Small { kernel: kernel(isa) }
    }

    /// Elements of a packed right-hand operand `[k, n]`.
    pub(crate) fn packed_len(self, k: usize, n: usize) -> usize {
        super::packed_len(k, super::padded(super::padded(n, LANES), self.kernel.nr))
    }

    /// Packs `b` `[k, n]` into the first [`packed_len`](Self::packed_len) elements of `to`, padded with
    /// columns of zeros.
    ///
    /// # Panics
    /// If an element of `b` lies outside its data, or `to` is too short.
    pub(crate) fn pack(&self, b: MatRef<'_>, k: usize, n: usize, to: &mut [f32]) {
        b.check("b", k, n);
        let to = &mut to[..self.packed_len(k, n)];
        to[k * n.next_multiple_of(self.kernel.nr)..].fill(0.0);
        let part = Part { p0: 0, count: k, j0: 0, cols: n };
        // SAFETY: the panels lie inside `to`, and `new` was given a set that the machine has.
        unsafe { panels(self.kernel.isa, b, self.kernel.nr, part, to.as_mut_ptr()) };
    }

    /// `c = a b` or `c += a b` for sizes `[m, n, k]` on this thread. Rows or columns of `a` are adjacent
    /// elements; `b` was packed with `k` rows and at least `n - LANES + 1` columns; rows of `c` are `ldc`
    /// apart. Each element is one chain of multiply-adds in ascending depth.
    ///
    /// # Panics
    /// If an operand is too short, `n` is no multiple of [`LANES`], or a size is 0.
    pub(crate) fn multiply(
        &self,
        [m, n, k]: [usize; 3],
        a: MatRef<'_>,
        b: &[f32],
        c: &mut [f32],
        ldc: usize,
        write: Write,
    ) {
        let Kernel { mr, nr, panel, .. } = *self.kernel;
        assert!(m > 0 && k > 0 && n > 0 && n.is_multiple_of(LANES), "a product of [{m}, {n}, {k}]");
        a.check("a", m, k);
        assert!(b.len() >= self.packed_len(k, n) && ldc >= n, "b or a row of c is too short");
        MatRef::row_major(c, ldc).check("c", m, n);
        let (layout, a_strip) = match a {
            MatRef { cs: 1, rs, .. } => (ALayout::Rows { stride: rs }, mr * rs),
            MatRef { rs: 1, cs, .. } => (ALayout::Columns { stride: cs }, mr),
            MatRef { rs, cs, .. } => panic!("neither rows nor columns of a are adjacent: {rs} and {cs}"),
        };
        for (index, j) in (0..n).step_by(nr).enumerate() {
            let b = b[index * k * nr..][..k * nr].as_ptr();
            let c = c[j..].as_mut_ptr();
            let add = match write {
                Write::Set => std::ptr::null(),
                Write::Add => c.cast_const(),
            };
            // SAFETY: the operands were checked above; a tile computes whole vectors, of which `n` holds a
            // multiple, and takes its sums through no memory.
            unsafe {
                panel(&Panel {
                    kc: k,
                    a: a.data.as_ptr(),
                    layout,
                    a_strip,
                    a_far: false,
                    b,
                    b_next: b.wrapping_add(k * nr),
                    rows: m,
                    cols: nr.min(n - j),
                    acc: std::ptr::null_mut(),
                    first: true,
                    bias: std::ptr::null(),
                    output: Output::Direct(Direct { c, ldc, add, add_stride: ldc }),
                });
            }
        }
    }
}
