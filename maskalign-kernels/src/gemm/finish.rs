//! The epilogue: what is applied to the sums before they are stored in `C`. The tiles have already added the bias.

use super::Act;
use super::kernel::{Direct, Output};
use crate::arch::Isa;
use crate::vmath;

/// A pointer that tasks write through, each to elements of its own.
#[derive(Clone, Copy)]
pub(super) struct Out(pub *mut f32);

// SAFETY: whoever writes through it vouches that no two threads touch the same element.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

/// [`Epilogue`](super::Epilogue) with shared outputs.
#[derive(Clone, Copy)]
pub(super) struct Finish<'a> {
    /// Added by the tiles.
    pub bias: Option<&'a [f32]>,
    pub pre: Option<Out>,
    pub act: Act,
    pub col_scale: Option<&'a [f32]>,
    pub row_scale: Option<(&'a [f32], usize)>,
    pub residual: Option<&'a [f32]>,
    pub accumulate: bool,
    pub n: usize,
    pub c: Out,
    pub ldc: usize,
}

impl Finish<'_> {
    /// Whether [`Direct`] can express the epilogue.
    pub(super) fn in_registers(&self) -> bool {
        self.pre.is_none()
            && self.act == Act::None
            && self.col_scale.is_none()
            && self.row_scale.is_none()
            && !(self.accumulate && self.residual.is_some())
    }

    /// The epilogue from `(i0, j0)`, if [`in_registers`](Self::in_registers).
    pub(super) fn direct(&self, i0: usize, j0: usize) -> Direct {
        let c = self.c.0.wrapping_add(i0 * self.ldc + j0);
        let (add, add_stride) = match self.residual {
            Some(residual) => (residual.as_ptr().wrapping_add(i0 * self.n + j0), self.n),
            None if self.accumulate => (c.cast_const(), self.ldc),
            None => (std::ptr::null(), 0),
        };
        Direct { c, ldc: self.ldc, add, add_stride }
    }

    /// What the epilogue from `(i0, j0)` will read and write.
    pub(super) fn soon(&self, i0: usize, j0: usize) -> Output {
        let Direct { c, ldc, add, add_stride, .. } = self.direct(i0, j0);
        Output::Soon { c, ldc, add, add_stride }
    }

    /// Applies the epilogue to finished tiles below each other and stores them.
    ///
    /// # Safety
    /// The tiles lie inside the outputs, and no other thread uses them.
    pub(super) unsafe fn tiles(&self, isa: Isa, tile: &mut [f32], i0: usize, j0: usize, cols: usize) {
        let place = Place { i0, j0, cols };
        // SAFETY: `isa` is available here; the outputs are as the caller says.
        unsafe {
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => finish_avx512(self, tile, place),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => finish_avx2(self, tile, place),
                Isa::Neon => finish_any::<16, { cfg!(target_arch = "aarch64") }>(self, tile, place),
                _ => finish_any::<8, false>(self, tile, place),
            }
        }
    }
}

/// Where tiles begin in `C` and how many of their columns count.
#[derive(Clone, Copy)]
struct Place {
    i0: usize,
    j0: usize,
    cols: usize,
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn finish_avx512(finish: &Finish, tile: &mut [f32], place: Place) {
    // SAFETY: passed on.
    unsafe { finish_any::<32, true>(finish, tile, place) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn finish_avx2(finish: &Finish, tile: &mut [f32], place: Place) {
    // SAFETY: passed on.
    unsafe { finish_any::<16, true>(finish, tile, place) }
}

/// # Safety
/// As for [`Finish::tiles`].
#[inline(always)]
unsafe fn finish_any<const NR: usize, const FMA: bool>(finish: &Finish, tile: &mut [f32], place: Place) {
    // SAFETY: passed on.
    unsafe {
        if place.cols == NR {
            finish_body::<NR, FMA, true>(finish, tile, place);
        } else {
            finish_body::<NR, FMA, false>(finish, tile, place);
        }
    }
}

/// `FULL` says that all columns count.
///
/// # Safety
/// As for [`Finish::tiles`].
#[inline(always)]
unsafe fn finish_body<const NR: usize, const FMA: bool, const FULL: bool>(
    finish: &Finish,
    tile: &mut [f32],
    place: Place,
) {
    let Place { i0, j0, cols } = place;
    let load = |src: &[f32]| -> [f32; NR] {
        let mut row = [0.0; NR];
        if FULL {
            row.copy_from_slice(&src[..NR]);
        } else {
            row[..cols].copy_from_slice(&src[..cols]);
        }
        row
    };
    let store = |dst: *mut f32, row: &[f32; NR]| {
        // SAFETY: every call names a row segment that lies inside an output and is ours.
        unsafe {
            if FULL {
                dst.cast::<[f32; NR]>().write_unaligned(*row);
            } else {
                std::slice::from_raw_parts_mut(dst, cols).copy_from_slice(&row[..cols]);
            }
        }
    };
    // Several passes over rows that stay in the L1 cache: a simple loop vectorises best.
    let rows = tile.as_chunks_mut::<NR>().0;
    if let Some(pre) = finish.pre {
        for (i, row) in rows.iter().enumerate() {
            store(pre.0.wrapping_add((i0 + i) * finish.n + j0), row);
        }
    }
    match finish.act {
        Act::None => {}
        Act::Gelu => {
            for x in rows.as_flattened_mut() {
                *x = vmath::gelu::<FMA>(*x);
            }
        }
        Act::QuickGelu => {
            for x in rows.as_flattened_mut() {
                *x = vmath::quick_gelu::<FMA>(*x);
            }
        }
    }
    let col_scale = finish.col_scale.map(|scale| load(&scale[j0..]));
    for (i, row) in rows.iter_mut().enumerate() {
        let i = i0 + i;
        if let Some(scale) = &col_scale {
            for j in 0..NR {
                row[j] *= scale[j];
            }
        }
        if let Some((scale, group)) = finish.row_scale {
            let scale = scale[i / group];
            for x in row.iter_mut() {
                *x *= scale;
            }
        }
        if let Some(residual) = finish.residual {
            let residual = load(&residual[i * finish.n + j0..]);
            for j in 0..NR {
                row[j] += residual[j];
            }
        }
        let c = finish.c.0.wrapping_add(i * finish.ldc + j0);
        if finish.accumulate {
            // SAFETY: the row segment lies inside `C` and is ours.
            let old = load(unsafe { std::slice::from_raw_parts(c, cols) });
            for j in 0..NR {
                row[j] += old[j];
            }
        }
        store(c, row);
    }
}
