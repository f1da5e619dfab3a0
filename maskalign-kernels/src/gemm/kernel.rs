//! Register tiles: the innermost loops of the matrix product, one set per instruction set.

use crate::arch::Isa;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use crate::vmath::fma;

/// How the `A` rows of a tile lie in memory.
#[derive(Clone, Copy)]
pub(super) enum ALayout {
    /// Element `(i, p)` at `i * stride + p`.
    Rows { stride: usize },
    /// Element `(i, p)` at `p * mr + i`, `mr` the kernel's.
    Strips,
    /// Element `(i, p)` at `p * stride + i`.
    Columns { stride: usize },
}

/// The layouts as constants, for const generics.
#[cfg(target_arch = "x86_64")]
const ROWS: u8 = 0;
#[cfg(target_arch = "x86_64")]
const STRIPS: u8 = 1;
#[cfg(target_arch = "x86_64")]
const COLUMNS: u8 = 2;

/// A panel of `B` and the strips of `A` that it is multiplied with, one register tile to a strip.
#[derive(Clone, Copy)]
pub(super) struct Panel {
    /// Depth of the product.
    pub kc: usize,
    /// `rows` by `kc` elements in the given layout.
    pub a: *const f32,
    pub layout: ALayout,
    /// Distance between strips of `mr` rows, in elements.
    pub a_strip: usize,
    /// Whether the strips are not in the L2 cache yet.
    pub a_far: bool,
    /// `kc` by `nr` elements, row-major.
    pub b: *const f32,
    /// The elements that follow `b`, as many as it has: prefetched into the L2 cache meanwhile.
    pub b_next: *const f32,
    /// Rows in use, at least 1.
    pub rows: usize,
    /// Columns in use, `1..=nr`; more may be computed, up to whole vectors and at most `nr`.
    pub cols: usize,
    /// `rows` by `nr` elements, row-major: the sums so far, and where they are left. Not touched
    /// where the sums start at zero and end in `C`.
    pub acc: *mut f32,
    /// Whether the sums start at zero instead of at `acc`.
    pub first: bool,
    /// `nr` elements that are added to each row of sums in the end, or null.
    pub bias: *const f32,
    /// Where the result will be stored.
    pub output: Output,
}

/// What becomes of the sums of a [`Panel`].
#[derive(Clone, Copy)]
pub(super) enum Output {
    /// They stay in `acc`.
    Sums,
    /// They stay in `acc` for now; rows of `nr` elements `ldc` apart at `c`, and the same at `add`
    /// unless it is null, are needed next and prefetched.
    Soon { c: *const f32, ldc: usize, add: *const f32, add_stride: usize },
    /// They go directly to `C`.
    Direct(Direct),
}

/// An epilogue simple enough to be applied in registers: `C = sum + add` for as many columns as are computed.
#[derive(Clone, Copy)]
pub(super) struct Direct {
    pub c: *mut f32,
    pub ldc: usize,
    /// Rows of the same length, or null.
    pub add: *const f32,
    pub add_stride: usize,
}

/// A tile size and the functions for it.
pub(super) struct Kernel {
    pub isa: Isa,
    /// Rows of a full tile.
    pub mr: usize,
    /// Columns of a full tile.
    pub nr: usize,
    /// Greatest depth of a panel, such that `kc * nr` elements of `B` stay in the L1 cache.
    pub kc: usize,
    /// Computes a panel.
    ///
    /// # Safety
    /// The machine has the instruction set, the pointers cover what the fields of [`Panel`] and
    /// [`Direct`] say (`b_next` and [`Output::Soon`] are hints and may lie anywhere), and what is
    /// written overlaps neither operand.
    pub panel: unsafe fn(&Panel),
}

/// The most columns that a tile has on any instruction set.
pub(super) const MAX_NR: usize = 32;

/// The kernel of an instruction set.
pub(super) fn kernel(isa: Isa) -> &'static Kernel {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => &Kernel { isa: Isa::Avx512, mr: 12, nr: 32, kc: 192, panel: avx512 },
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => &Kernel { isa: Isa::Avx2, mr: 6, nr: 16, kc: 256, panel: avx2 },
        Isa::Neon => &Kernel { isa: Isa::Neon, mr: 6, nr: 16, kc: 256, panel: neon },
        _ => &Kernel { isa: Isa::Scalar, mr: 6, nr: 8, kc: 256, panel: scalar },
    }
}

/// What differs between the tiles of a panel.
#[derive(Clone, Copy)]
struct Strip {
    a: *const f32,
    /// The first row, from that of the panel.
    row: usize,
    /// What to prefetch meanwhile: `ahead_step` elements for every 4 of depth.
    ahead: *const f32,
    ahead_step: usize,
}

/// Runs `tile(strip, rows)` for each strip of a panel, and prefetches what will be needed.
#[inline(always)]
fn for_each_strip(p: &Panel, mr: usize, nr: usize, mut tile: impl FnMut(Strip, usize)) {
    let ahead = (p.kc * nr).div_ceil(p.rows.div_ceil(mr));
    let ahead_step = ahead.div_ceil((p.kc / 4).max(1));
    let mut strip = Strip { a: p.a, row: 0, ahead: p.b_next, ahead_step };
    while strip.row < p.rows {
        let rows = (p.rows - strip.row).min(mr);
        let next = strip.a.wrapping_add(p.a_strip);
        if p.a_far && strip.row + mr < p.rows {
            let (lines, len, stride) = match p.layout {
                ALayout::Rows { stride } => (mr, p.kc, stride),
                ALayout::Strips => (1, mr * p.kc, 0),
                ALayout::Columns { stride } => (p.kc, mr, stride),
            };
            for i in 0..lines {
                for p in (0..len).step_by(16) {
                    prefetch_far(next.wrapping_add(i * stride + p));
                }
            }
        }
        let (c, ldc, add, add_stride) = match p.output {
            // The sums of the next strip.
            Output::Sums => (p.acc.wrapping_add(mr * nr).cast_const(), nr, std::ptr::null(), 0),
            Output::Soon { c, ldc, add, add_stride } => (c, ldc, add, add_stride),
            Output::Direct(d) => (d.c.cast_const(), d.ldc, d.add, d.add_stride),
        };
        prefetch_rows(c, ldc, nr, strip.row, rows);
        if !add.is_null() && add != c {
            prefetch_rows(add, add_stride, nr, strip.row, rows);
        }
        tile(strip, rows);
        strip.a = next;
        strip.row += mr;
        strip.ahead = strip.ahead.wrapping_add(ahead);
    }
}

/// Prefetches `len` elements of each of `rows` rows.
#[inline(always)]
fn prefetch_rows(data: *const f32, stride: usize, len: usize, first: usize, rows: usize) {
    // Up to 16 elements from the beginning of a line lie in that line.
    let one_line = len <= 16 && data.addr().is_multiple_of(64) && stride.is_multiple_of(16);
    for i in first..first + rows {
        prefetch(data.wrapping_add(i * stride));
        if !one_line {
            prefetch(data.wrapping_add(i * stride + len - 1));
        }
    }
}

/// Calls `$f::<rows, $x, $y>` for the number of rows at run time.
macro_rules! by_rows {
    ($p:expr, $strip:expr, $rows:expr, $f:ident, [$($m:literal)*], $x:tt, $y:tt) => {
        match $rows {
            $($m => $f::<$m, $x, $y>($p, $strip),)*
            rows => unreachable!("a tile of {rows} rows"),
        }
    };
}

/// Rows of a tile that x86 can address from one pointer and the multiples 1, 3 and 5 of their distance, scaled by 1, 2
/// and 4.
#[cfg(target_arch = "x86_64")]
const NEAR_ROWS: usize = 6;

/// Hides where `p` came from. Otherwise the compiler would address all rows of a tall tile from the first and load the
/// elements of four steps at once, run out of registers and keep the sums in memory, at half the speed.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
#[expect(clippy::pointers_in_nomem_asm_block, reason = "the pointer passes through; nothing reads what it points to")]
fn opaque(mut p: *const f32) -> *const f32 {
    // SAFETY: no instruction.
    unsafe { std::arch::asm!("/* {0} */", inout(reg) p, options(pure, nomem, nostack, preserves_flags)) };
    p
}

/// Defines the panels of an x86 instruction set.
#[cfg(target_arch = "x86_64")]
macro_rules! x86_panel {
    (
        $panel:ident, $tile:ident, $features:literal, $mr:literal, [$($rows:literal)*], $lanes:literal,
        $zero:ident, $load:ident, $store:ident, $set1:ident, $fmadd:ident, $add:ident
    ) => {
        #[target_feature(enable = $features)]
        unsafe fn $panel(p: &Panel) {
            let wide = p.cols > $lanes;
            // SAFETY: the caller vouches for the operands of `p`, and a strip lies inside them.
            for_each_strip(p, $mr, 2 * $lanes, |strip, rows| unsafe {
                macro_rules! run {
                    ($vectors:tt, $layout:tt) => {
                        by_rows!(p, strip, rows, $tile, [$($rows)*], $vectors, $layout)
                    };
                }
                match (p.layout, wide) {
                    (ALayout::Rows { .. }, true) => run!(2, ROWS),
                    (ALayout::Rows { .. }, false) => run!(1, ROWS),
                    (ALayout::Strips, true) => run!(2, STRIPS),
                    (ALayout::Strips, false) => run!(1, STRIPS),
                    (ALayout::Columns { .. }, true) => run!(2, COLUMNS),
                    (ALayout::Columns { .. }, false) => run!(1, COLUMNS),
                }
            });
        }

        /// `M` rows by `V` vectors.
        #[target_feature(enable = $features)]
        unsafe fn $tile<const M: usize, const V: usize, const LAYOUT: u8>(p: &Panel, s: Strip) {
            const NR: usize = 2 * $lanes;
            let (stride, step) = match p.layout {
                ALayout::Rows { stride } if LAYOUT == ROWS => (stride, 1),
                ALayout::Columns { stride } if LAYOUT == COLUMNS => (1, stride),
                _ => (1, $mr),
            };
            // SAFETY: `acc` or the direct outputs hold M rows of NR columns from the strip's, `a` M
            // rows and `b` NR columns of depth kc.
            unsafe {
                let acc = p.acc.wrapping_add(s.row * NR);
                let mut c = [[$zero(); V]; M];
                if !p.first {
                    for i in 0..M {
                        for v in 0..V {
                            c[i][v] = $load(acc.add(i * NR + v * $lanes));
                        }
                    }
                }
                let (mut a, mut b, mut ahead) = (s.a, p.b, s.ahead);
                // Where elements of one depth are adjacent, the step from the last depth may leave the operand.
                let advance = |a: *const f32, by| if LAYOUT == COLUMNS { a.wrapping_add(by) } else { a.add(by) };
                // Rows of a tall tile, from `NEAR_ROWS` on.
                let tall = M > NEAR_ROWS && LAYOUT == ROWS;
                let mut a_far = a.wrapping_add(NEAR_ROWS * stride);
                macro_rules! step {
                    ($p:expr) => {
                        if tall {
                            (a, a_far) = (opaque(a), opaque(a_far));
                        }
                        let mut bv = [$zero(); V];
                        for v in 0..V {
                            bv[v] = $load(b.add($p * NR + v * $lanes));
                        }
                        for i in 0..M {
                            let row = if tall && i >= NEAR_ROWS {
                                a_far.add((i - NEAR_ROWS) * stride)
                            } else {
                                a.add(i * stride)
                            };
                            let av = $set1(*row.add($p * step));
                            for v in 0..V {
                                c[i][v] = $fmadd(av, bv[v], c[i][v]);
                            }
                        }
                    };
                }
                for _ in 0..p.kc / 4 {
                    prefetch_far(ahead);
                    ahead = ahead.wrapping_add(s.ahead_step);
                    step!(0);
                    step!(1);
                    step!(2);
                    step!(3);
                    a = advance(a, 4 * step);
                    a_far = a_far.wrapping_add(4 * step);
                    b = b.add(4 * NR);
                }
                for _ in 0..p.kc % 4 {
                    step!(0);
                    a = advance(a, step);
                    a_far = a_far.wrapping_add(step);
                    b = b.add(NR);
                }
                if !p.bias.is_null() {
                    for v in 0..V {
                        let bias = $load(p.bias.add(v * $lanes));
                        for i in 0..M {
                            c[i][v] = $add(c[i][v], bias);
                        }
                    }
                }
                let Output::Direct(d) = &p.output else {
                    for i in 0..M {
                        for v in 0..V {
                            $store(acc.add(i * NR + v * $lanes), c[i][v]);
                        }
                    }
                    return;
                };
                if !d.add.is_null() {
                    let add = d.add.add(s.row * d.add_stride);
                    for i in 0..M {
                        for v in 0..V {
                            let old = $load(add.add(i * d.add_stride + v * $lanes));
                            c[i][v] = $add(c[i][v], old);
                        }
                    }
                }
                let out = d.c.add(s.row * d.ldc);
                for i in 0..M {
                    for v in 0..V {
                        $store(out.add(i * d.ldc + v * $lanes), c[i][v]);
                    }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
x86_panel!(
    avx2, avx2_tile, "avx2,fma", 6, [6 5 4 3 2 1], 8, _mm256_setzero_ps, _mm256_loadu_ps,
    _mm256_storeu_ps, _mm256_set1_ps, _mm256_fmadd_ps, _mm256_add_ps
);

#[cfg(target_arch = "x86_64")]
x86_panel!(
    avx512, avx512_tile, "avx512f", 12, [12 11 10 9 8 7 6 5 4 3 2 1], 16, _mm512_setzero_ps,
    _mm512_loadu_ps, _mm512_storeu_ps, _mm512_set1_ps, _mm512_fmadd_ps, _mm512_add_ps
);

/// The portable tiles at NEON's size: 24 accumulators of its 32 registers.
unsafe fn neon(p: &Panel) {
    const FMA: bool = cfg!(target_arch = "aarch64");
    // SAFETY: the caller vouches for the operands of `p`, and a strip lies inside them.
    for_each_strip(p, 6, 16, |strip, rows| unsafe { by_rows!(p, strip, rows, portable_tile, [6 5 4 3 2 1], 16, FMA) });
}

/// The portable tiles at the size of a machine with 16 registers of 4 elements.
unsafe fn scalar(p: &Panel) {
    // SAFETY: the caller vouches for the operands of `p`, and a strip lies inside them.
    for_each_strip(p, 6, 8, |strip, rows| unsafe { by_rows!(p, strip, rows, portable_tile, [6 5 4 3 2 1], 8, false) });
}

/// `M` rows by `NR` columns, vectorised by the compiler for its target.
unsafe fn portable_tile<const M: usize, const NR: usize, const FMA: bool>(p: &Panel, s: Strip) {
    let (stride, step) = match p.layout {
        ALayout::Rows { stride } => (stride, 1),
        ALayout::Strips => (1, 6),
        ALayout::Columns { stride } => (1, stride),
    };
    let mut c = [[0.0_f32; NR]; M];
    // SAFETY: `acc` or the direct outputs hold M rows of NR columns from the strip's, `a` M rows and
    // `b` NR columns of depth kc.
    unsafe {
        let acc = p.acc.wrapping_add(s.row * NR).cast::<[[f32; NR]; M]>();
        if !p.first {
            c = acc.read_unaligned();
        }
        for k in 0..p.kc {
            let b = p.b.add(k * NR).cast::<[f32; NR]>().read_unaligned();
            for i in 0..M {
                let a = *s.a.add(i * stride + k * step);
                for j in 0..NR {
                    c[i][j] = fma::<FMA>(a, b[j], c[i][j]);
                }
            }
        }
        if !p.bias.is_null() {
            let bias = p.bias.cast::<[f32; NR]>().read_unaligned();
            for i in 0..M {
                for j in 0..NR {
                    c[i][j] += bias[j];
                }
            }
        }
        let Output::Direct(d) = &p.output else {
            acc.write_unaligned(c);
            return;
        };
        for i in 0..M {
            let mut row = c[i];
            if !d.add.is_null() {
                let add = d.add.add((s.row + i) * d.add_stride).cast::<[f32; NR]>().read_unaligned();
                for j in 0..NR {
                    row[j] += add[j];
                }
            }
            d.c.add((s.row + i) * d.ldc).cast::<[f32; NR]>().write_unaligned(row);
        }
    }
}

/// Prefetches the cache line at `p` into the L2 cache; any address is allowed.
#[inline(always)]
pub(super) fn prefetch_far(p: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults, and SSE belongs to the baseline of x86-64.
    unsafe {
        _mm_prefetch::<_MM_HINT_T1>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// Prefetches the cache line at `p` into the L1 cache; any address is allowed.
#[inline(always)]
pub(super) fn prefetch(p: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults, and SSE belongs to the baseline of x86-64.
    unsafe {
        _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// Runs `rounds` rounds of 12 independent multiply-adds on the widest registers and returns the
/// floating-point operations done.
pub(super) fn fma_rounds(isa: Isa, rounds: usize) -> f64 {
    let lanes = match isa {
        // SAFETY: the caller got `isa` from the machine it runs on.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { fma_avx512(rounds) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { fma_avx2(rounds) },
        Isa::Neon => fma_portable::<{ cfg!(target_arch = "aarch64") }>(rounds),
        _ => fma_portable::<false>(rounds),
    };
    (2 * CHAINS * lanes * rounds) as f64
}

const CHAINS: usize = 12;

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn fma_avx512(rounds: usize) -> usize {
    let (x, y) = (_mm512_set1_ps(0.999), _mm512_set1_ps(1e-3));
    let mut c = [y; CHAINS];
    for _ in 0..std::hint::black_box(rounds) {
        for c in &mut c {
            *c = _mm512_fmadd_ps(*c, x, y);
        }
    }
    std::hint::black_box(c);
    16
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn fma_avx2(rounds: usize) -> usize {
    let (x, y) = (_mm256_set1_ps(0.999), _mm256_set1_ps(1e-3));
    let mut c = [y; CHAINS];
    for _ in 0..std::hint::black_box(rounds) {
        for c in &mut c {
            *c = _mm256_fmadd_ps(*c, x, y);
        }
    }
    std::hint::black_box(c);
    8
}

fn fma_portable<const FMA: bool>(rounds: usize) -> usize {
    let mut c = [[1e-3_f32; 4]; CHAINS];
    for _ in 0..std::hint::black_box(rounds) {
        for c in &mut c {
            for c in c {
                *c = fma::<FMA>(*c, 0.999, 1e-3);
            }
        }
    }
    std::hint::black_box(c);
    4
}
