//! Splitting one output among the tasks of a parallel operation.
//!
//! Every split depends on the sizes alone, never on the number of threads, and partial sums are
//! added in the order of the data: results have the same bits for any number of threads.

use std::marker::PhantomData;
use std::ops::Range;

use crate::arena::Arena;
use crate::pool::Pool;

/// Floats that one task of an element-wise operation handles: 64 KiB, a share of the L2 cache.
pub(crate) const CHUNK: usize = 16 * 1024;

/// What happens to the former contents of an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// They are replaced.
    Set,
    /// The result is added to them.
    Add,
}

/// A mutable slice whose disjoint parts are written by the tasks of one parallel operation.
pub(crate) struct Shared<'a, T = f32> {
    start: *mut T,
    len: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

impl<T> Clone for Shared<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<'_, T> {}

// SAFETY: it stands for a `&mut [T]`, and `part` leaves disjointness to the caller.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above; shared access hands out nothing without the promise of `part`.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), lifetime: PhantomData }
    }

    /// The elements of `range`.
    ///
    /// # Safety
    /// While the returned slice lives, no other slice that overlaps it may be asked for.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "part outside of the slice");
        // SAFETY: inside the borrowed slice, and the caller promises that no other part overlaps.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

/// How many rows of `cols` floats one task handles.
pub(crate) fn rows_per_task(cols: usize) -> usize {
    (CHUNK / cols.max(1)).clamp(1, 256)
}

/// Calls `f(range)` for consecutive ranges of at most `chunk` of `items` items, in parallel.
pub(crate) fn for_ranges(pool: &Pool, items: usize, chunk: usize, f: impl Fn(Range<usize>) + Sync) {
    if items == 0 {
        return;
    }
    pool.run(items.div_ceil(chunk), &|task| {
        f(task * chunk..((task + 1) * chunk).min(items));
    });
}

/// Calls `f(first_element, part)` for consecutive parts of `data`, `chunk` elements long but for the last, in parallel.
/// The result must not depend on the order.
pub fn for_parts(pool: &Pool, data: &mut [f32], chunk: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    let len = data.len();
    let shared = Shared::new(data);
    for_ranges(pool, len, chunk, |range| {
        let start = range.start;
        // SAFETY: the ranges are disjoint.
        f(start, unsafe { shared.part(range) });
    });
}

/// Adds to `out` the sum of the vectors that `f(range, partial)` computes for ranges of `items`.
/// `partial` is zeroed before and is as long as `out`.
pub(crate) fn add_reduced(
    pool: &Pool,
    arena: &Arena,
    items: usize,
    chunk: usize,
    out: &mut [f32],
    f: impl Fn(Range<usize>, &mut [f32]) + Sync,
) {
    if items == 0 || out.is_empty() {
        return;
    }
    let width = out.len();
    let chunks = items.div_ceil(chunk);
    let mut partials = arena.take(chunks * width);
    let shared = Shared::new(&mut partials);
    for_ranges(pool, items, chunk, |range| {
        let at = range.start / chunk * width;
        // SAFETY: one partial vector for each range.
        let partial = unsafe { shared.part(at..at + width) };
        partial.fill(0.0);
        f(range, partial);
    });
    let partials: &[f32] = &partials;
    for_parts(pool, out, 4096, |start, part| {
        for chunk in 0..chunks {
            let from = &partials[chunk * width + start..][..part.len()];
            for (o, p) in part.iter_mut().zip(from) {
                *o += p;
            }
        }
    });
}

/// The sum over ranges of `items` of what `f(range)` returns, added in order.
pub(crate) fn sum_ranges<const N: usize>(
    pool: &Pool,
    items: usize,
    chunk: usize,
    f: impl Fn(Range<usize>) -> [f64; N] + Sync,
) -> [f64; N] {
    let mut partials = vec![[0.0f64; N]; items.div_ceil(chunk)];
    let shared = Shared::new(&mut partials);
    for_ranges(pool, items, chunk, |range| {
        let at = range.start / chunk;
        let sum = f(range);
        // SAFETY: one element for each range.
        let partial = unsafe { shared.part(at..at + 1) };
        partial[0] = sum;
    });
    let mut total = [0.0; N];
    for partial in partials {
        for (t, p) in total.iter_mut().zip(partial) {
            *t += p;
        }
    }
    total
}

/// Declares functions whose body is compiled for each instruction set and dispatched at run time.
/// The body sees `FMA: bool`, a constant that says whether fused multiply-add is available.
macro_rules! vectorised {
    ($(
        $(#[$meta:meta])*
        $vis:vis fn $name:ident ($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block
    )*) => {$(
        $(#[$meta])*
        // As many arguments as the function has that is vectorised.
        #[allow(clippy::too_many_arguments)]
        $vis fn $name ($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body<const FMA: bool>($($arg: $ty),*) $(-> $ret)? $body
            $crate::simd_fn! {
                fn dispatch($($arg: $ty),*) $(-> $ret)? = body;
            }
            dispatch($($arg),*)
        }
    )*};
}
pub(crate) use vectorised;

/// Lanes of the accumulators below: four AVX2 or two AVX-512 registers.
const LANES: usize = 32;

/// Sum of `f(a)` over the elements, in lanes that vectorise; the order is fixed.
#[inline(always)]
pub(crate) fn sum_of(a: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (blocks, rest) = a.as_chunks::<LANES>();
    for x in blocks {
        for l in 0..LANES {
            lanes[l] += f(x[l]);
        }
    }
    let mut tail = 0.0;
    for &x in rest {
        tail += f(x);
    }
    sum_lanes(&mut lanes) + tail
}

/// Sum of `f(a, b)` over pairs of elements, in lanes that vectorise; the order is fixed.
#[inline(always)]
pub(crate) fn sum_of2(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let b = &b[..a.len()];
    let mut lanes = [0.0f32; LANES];
    let (blocks_a, rest_a) = a.as_chunks::<LANES>();
    let (blocks_b, rest_b) = b.as_chunks::<LANES>();
    for (x, y) in blocks_a.iter().zip(blocks_b) {
        for l in 0..LANES {
            lanes[l] += f(x[l], y[l]);
        }
    }
    let mut tail = 0.0;
    for (&x, &y) in rest_a.iter().zip(rest_b) {
        tail += f(x, y);
    }
    sum_lanes(&mut lanes) + tail
}

/// The largest element; negative infinity if there are none.
#[inline(always)]
pub(crate) fn max_of(a: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (blocks, rest) = a.as_chunks::<LANES>();
    for x in blocks {
        for l in 0..LANES {
            lanes[l] = if x[l] > lanes[l] { x[l] } else { lanes[l] };
        }
    }
    let mut best = f32::NEG_INFINITY;
    for &x in rest.iter().chain(&lanes) {
        best = if x > best { x } else { best };
    }
    best
}

#[inline(always)]
fn sum_lanes(lanes: &mut [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] += lanes[l + width];
        }
        width /= 2;
    }
    lanes[0]
}
