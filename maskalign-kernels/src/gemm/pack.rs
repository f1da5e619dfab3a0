//! Copies of operands in the order in which the register tiles read them.

use super::MatRef;
use crate::arch::Isa;

/// A growing buffer that starts on a cache line.
#[derive(Default)]
pub(super) struct Buffer(Vec<Line>);

#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line {
    _elements: [f32; 16],
}

impl Buffer {
    /// At least `len` elements with unspecified contents.
    pub(super) fn get(&mut self, len: usize) -> &mut [f32] {
        let lines = len.div_ceil(16);
        if self.0.len() < lines {
            // The old content need not be copied.
            self.0 = Vec::new();
            self.0.resize(lines, Line { _elements: [0.0; 16] });
        }
        let data = self.0.as_mut_ptr().cast::<f32>();
        // SAFETY: a line is 16 elements without padding.
        unsafe { std::slice::from_raw_parts_mut(data, self.0.len() * 16) }
    }

    /// The elements.
    pub(super) fn as_slice(&self) -> &[f32] {
        let data = self.0.as_ptr().cast::<f32>();
        // SAFETY: a line is 16 elements without padding.
        unsafe { std::slice::from_raw_parts(data, self.0.len() * 16) }
    }
}

/// A part of an operand: `count` rows from `p0` and `cols` columns from `j0`.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub p0: usize,
    pub count: usize,
    pub j0: usize,
    pub cols: usize,
}

/// Copies a part of `b` into row-major panels of `width` columns one after another: element `(p, j)`
/// of the part goes to `dst[j / width * count * width + p * width + j % width]`. The last
/// panel is padded with columns of zeros.
///
/// # Safety
/// The part lies inside `b`, no other thread uses the elements of `dst` named above, and the machine
/// has the instruction set.
pub(super) unsafe fn panels(isa: Isa, b: MatRef, width: usize, part: Part, dst: *mut f32) {
    let Part { p0, count, j0, cols } = part;
    let stride = count * width;
    for (panel, j) in (0..cols).step_by(width).enumerate() {
        let live = (cols - j).min(width);
        // SAFETY: as the caller says; the rows of one panel are contiguous.
        let dst = unsafe { std::slice::from_raw_parts_mut(dst.add(panel * stride), stride) };
        if live < width {
            dst.fill(0.0);
        }
        let src = &b.data[p0 * b.rs + (j0 + j) * b.cs..];
        if b.cs == 1 {
            rows(isa, src, b.rs, width, live, dst);
        } else if b.rs == 1 {
            columns(isa, src, b.cs, width, count, live, dst);
        } else {
            for (p, dst) in dst.chunks_exact_mut(width).enumerate() {
                for (j, dst) in dst[..live].iter_mut().enumerate() {
                    *dst = src[p * b.rs + j * b.cs];
                }
            }
        }
    }
}

/// Copies rows: `dst[p * width + j] = src[p * stride + j]`.
fn rows(isa: Isa, src: &[f32], stride: usize, width: usize, live: usize, dst: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if matches!(isa, Isa::Avx2 | Isa::Avx512) && live == width {
        // SAFETY: the machine has AVX2, which AVX-512 implies.
        unsafe {
            match width {
                6 => return rows_avx2::<6, 8>(src, stride, dst),
                12 => return rows_avx2::<12, 16>(src, stride, dst),
                16 => return rows_avx2::<16, 16>(src, stride, dst),
                32 => return rows_avx2::<32, 32>(src, stride, dst),
                _ => {}
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = isa;
    for (p, dst) in dst.chunks_exact_mut(width).enumerate() {
        dst[..live].copy_from_slice(&src[p * stride..][..live]);
    }
}

/// Copies `W` elements of each row by moving `R` where they exist: the next row overwrites the rest.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn rows_avx2<const W: usize, const R: usize>(src: &[f32], stride: usize, dst: &mut [f32]) {
    let count = dst.len() / W;
    let readable = (src.len() + stride).saturating_sub(R) / stride.max(1);
    let writable = (dst.len() + W).saturating_sub(R) / W;
    let wide = if stride == 0 { 0 } else { count.min(readable).min(writable) };
    for p in 0..wide {
        // SAFETY: `p < wide`, so `p * stride + R <= src.len()` and `p * W + R <= dst.len()`.
        unsafe {
            let row = src.as_ptr().add(p * stride).cast::<[f32; R]>().read_unaligned();
            dst.as_mut_ptr().add(p * W).cast::<[f32; R]>().write_unaligned(row);
        }
    }
    for p in wide..count {
        dst[p * W..][..W].copy_from_slice(&src[p * stride..][..W]);
    }
}

/// Transposes: `dst[p * width + j] = src[j * stride + p]`.
fn columns(isa: Isa, src: &[f32], stride: usize, width: usize, kc: usize, live: usize, dst: &mut [f32]) {
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if matches!(isa, Isa::Avx2 | Isa::Avx512) {
        // SAFETY: the machine has AVX2, which AVX-512 implies.
        done = unsafe { columns_avx2(src, stride, width, kc, live, dst) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = isa;
    // A few columns at a time, so that the lines read stay in the L1 cache.
    while done < live {
        let group = (live - done).min(4);
        for p in 0..kc {
            for j in done..done + group {
                dst[p * width + j] = src[j * stride + p];
            }
        }
        done += group;
    }
}

/// Transposes blocks of 8 columns and returns how many columns it did.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn columns_avx2(src: &[f32], stride: usize, width: usize, kc: usize, live: usize, dst: &mut [f32]) -> usize {
    use std::arch::x86_64::*;
    let whole = live / 8 * 8;
    if whole == 0 {
        return 0;
    }
    assert!(src.len() >= (whole - 1) * stride + kc && dst.len() >= kc * width);
    for p in (0..kc / 8 * 8).step_by(8) {
        for j in (0..whole).step_by(8) {
            // SAFETY: rows j..j + 8 of `src` hold at least p + 8 elements and rows p..p + 8 of
            // `dst` at least j + 8, by the assertion.
            unsafe {
                let src = src.as_ptr().add(j * stride + p);
                let r: [__m256; 8] = std::array::from_fn(|i| _mm256_loadu_ps(src.add(i * stride)));
                let t = [
                    _mm256_unpacklo_ps(r[0], r[1]),
                    _mm256_unpackhi_ps(r[0], r[1]),
                    _mm256_unpacklo_ps(r[2], r[3]),
                    _mm256_unpackhi_ps(r[2], r[3]),
                    _mm256_unpacklo_ps(r[4], r[5]),
                    _mm256_unpackhi_ps(r[4], r[5]),
                    _mm256_unpacklo_ps(r[6], r[7]),
                    _mm256_unpackhi_ps(r[6], r[7]),
                ];
                let u = [
                    _mm256_shuffle_ps::<0x44>(t[0], t[2]),
                    _mm256_shuffle_ps::<0xee>(t[0], t[2]),
                    _mm256_shuffle_ps::<0x44>(t[1], t[3]),
                    _mm256_shuffle_ps::<0xee>(t[1], t[3]),
                    _mm256_shuffle_ps::<0x44>(t[4], t[6]),
                    _mm256_shuffle_ps::<0xee>(t[4], t[6]),
                    _mm256_shuffle_ps::<0x44>(t[5], t[7]),
                    _mm256_shuffle_ps::<0xee>(t[5], t[7]),
                ];
                let dst = dst.as_mut_ptr().add(p * width + j);
                for i in 0..4 {
                    let low = _mm256_permute2f128_ps::<0x20>(u[i], u[i + 4]);
                    let high = _mm256_permute2f128_ps::<0x31>(u[i], u[i + 4]);
                    _mm256_storeu_ps(dst.add(i * width), low);
                    _mm256_storeu_ps(dst.add((i + 4) * width), high);
                }
            }
        }
    }
    for p in kc / 8 * 8..kc {
        for j in 0..whole {
            dst[p * width + j] = src[j * stride + p];
        }
    }
    whole
}
