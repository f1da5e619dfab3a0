//! Fused CPU kernels for transformer training, in single precision but for [`double`].
//!
//! Plain `f32` slices, no tensor library. Every kernel picks its instruction set once at run time
//! ([`arch`]) and shares work through one thread pool ([`pool`]); for a given instruction set the
//! result has the same bits for any number of threads. All `unsafe` code of the workspace is here,
//! except for the code that accesses a tensor's storage (`host.rs` of `maskalign-engine`).

pub mod arch;
pub mod arena;
pub mod attention;
pub mod batch_norm;
pub mod block;
pub mod double;
pub mod elementwise;
pub mod gemm;
pub mod loss;
mod memory;
#[cfg(test)]
mod model;
pub mod norm;
pub mod optim;
pub mod pool;
#[cfg(test)]
mod pool_tests;
mod share;
#[cfg(test)]
mod soundness;
mod sync;
#[cfg(test)]
mod testing;
pub mod vmath;

pub use arch::{Isa, NoSuchIsa, isa, requested};
pub use arena::{Arena, Buf};
pub use double::add_product_in_double;
pub use gemm::{Act, Epilogue, MatRef, PackedB, Rhs, fma_peak_gflops, gemm};
pub use memory::{available_memory_mib, keep_freed_memory, peak_memory_mib};
pub use pool::Pool;
pub use share::for_parts;
