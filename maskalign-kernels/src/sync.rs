//! The threads, locks and atomics of the standard library that the pool is built from.
//!
//! `pool.rs` names this module alone, so that the tests compile it a second time with a model checker's versions in
//! its place (`model.rs`).

pub(crate) use std::hint;
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, atomic};
pub(crate) use std::{thread, thread_local};

/// Turns of a waiting loop before a worker sleeps (about 0.1 ms).
pub(crate) const SPINS: usize = 4000;
