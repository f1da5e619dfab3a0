//! Reusable buffers, so that a training step allocates nothing after the first time.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

/// Buffers start on a cache line, so that vector loads do not straddle two.
const ALIGN_FLOATS: usize = 16;
/// Below this length all buffers share one size class.
const SMALLEST_CLASS: usize = 256;

/// A shared store of `f32` buffers. Cloning gives another handle to the same store.
///
/// A buffer that is dropped goes back to the store and is handed out again for a request of its
/// size class (eight classes to a power of two, so at most an eighth of a buffer is unused).
/// The store never shrinks by itself; see [`Arena::trim`].
#[derive(Clone, Default)]
pub struct Arena {
    store: Arc<Store>,
}

#[derive(Default)]
struct Store {
    /// Idle buffers by size class.
    idle: Mutex<Idle>,
}

type Idle = BTreeMap<usize, Vec<Vec<f32>>>;

impl Store {
    fn lock(&self) -> std::sync::MutexGuard<'_, Idle> {
        // The lists hold no invariant that a panic elsewhere could break.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Arena {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// A buffer of `len` floats with unspecified contents (old values, never uninitialised memory).
    pub fn take(&self, len: usize) -> Buf {
        self.take_for(len, len)
    }

    /// A buffer of `len` floats, from the size class for `capacity` floats. If lengths vary from step
    /// to step, the store stays small if all requests have the same capacity.
    pub fn take_for(&self, len: usize, capacity: usize) -> Buf {
        let class = size_class(capacity.max(len));
        let reused = self.store.lock().get_mut(&class).and_then(Vec::pop);
        // Fresh zeroed memory comes from the system untouched: pages appear as they are written.
        let data = reused.unwrap_or_else(|| vec![0.0; class + ALIGN_FLOATS]);
        let misaligned = data.as_ptr().align_offset(ALIGN_FLOATS * size_of::<f32>());
        let start = if misaligned < ALIGN_FLOATS { misaligned } else { 0 };
        Buf { data, start, len, class, store: Arc::clone(&self.store) }
    }

    /// A buffer of `len` zeros.
    pub fn take_zeroed(&self, len: usize) -> Buf {
        let mut buf = self.take(len);
        buf.fill(0.0);
        buf
    }

    /// Gives all idle buffers back to the system. Worth calling between stages, whose sizes differ.
    pub fn trim(&self) {
        self.store.lock().clear();
    }

    /// Bytes of the idle buffers: with none on loan, everything that the store has allocated.
    pub fn idle(&self) -> usize {
        self.store.lock().iter().map(|(class, buffers)| class * buffers.len() * size_of::<f32>()).sum()
    }
}

/// Rounds up to the next of eight steps between powers of two.
fn size_class(len: usize) -> usize {
    if len <= SMALLEST_CLASS {
        return SMALLEST_CLASS;
    }
    let step = (len.next_power_of_two() / 16).max(1);
    len.div_ceil(step) * step
}

/// A buffer on loan from an [`Arena`]: a slice of `f32` that returns to it when dropped.
pub struct Buf {
    data: Vec<f32>,
    start: usize,
    len: usize,
    class: usize,
    store: Arc<Store>,
}

impl Deref for Buf {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.data[self.start..self.start + self.len]
    }
}

impl DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.data[self.start..self.start + self.len]
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        let data = std::mem::take(&mut self.data);
        self.store.lock().entry(self.class).or_default().push(data);
    }
}

impl std::fmt::Debug for Buf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buf({} floats)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_buffer_is_handed_out_again() {
        let arena = Arena::new();
        let first = arena.take(1000).as_ptr();
        let again = arena.take(990);
        assert_eq!(first, again.as_ptr());
        assert_eq!(again.len(), 990);
        assert_eq!(arena.idle(), 0);
        drop(again);
        let one = arena.idle();
        for _ in 0..5 {
            drop(arena.take(1000));
        }
        assert_eq!(arena.idle(), one);
        arena.trim();
        assert_eq!(arena.idle(), 0);
    }

    #[test]
    fn classes_waste_at_most_an_eighth() {
        for len in [1usize, 256, 257, 1000, 4096, 4097, 123_457, 1 << 20, (1 << 20) + 1] {
            let class = size_class(len);
            assert!(class >= len);
            assert!(len < SMALLEST_CLASS || (class - len) * 8 <= len, "{len} -> {class}");
        }
    }

    #[test]
    fn buffers_are_aligned_and_zeroed_on_request() {
        let arena = Arena::new();
        arena.take(300).fill(7.0);
        let zeroed = arena.take_zeroed(300);
        assert!(zeroed.iter().all(|&v| v == 0.0));
        assert_eq!(zeroed.as_ptr() as usize % 64, 0);
    }
}
