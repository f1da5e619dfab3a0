//! What every forward pass is given besides its inputs.

use std::sync::Arc;

use crate::{
    device::{Backend, Dev},
    kernels::Kernels,
};

/// The device of a run and how its operators run.
#[derive(Clone)]
pub struct Context<D: Dev> {
    /// Where tensors are made.
    pub dev: D,
    /// The operators.
    pub kernels: Arc<dyn Kernels<D>>,
    /// Keep block inputs alone and compute blocks again in the backward pass: less memory, the same numbers.
    pub recompute: bool,
}

impl<D: Dev> Context<D> {
    /// The device's own operators on `threads` threads; nothing is computed again.
    pub fn new(dev: D, threads: usize) -> Self {
        Context { dev, kernels: <D as Backend>::kernels(threads), recompute: false }
    }
}
