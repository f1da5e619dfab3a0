//! The engine of MaskAlign: tensors, the tape, operators and layers, on a device that is chosen at run time.
//!
//! A [`Tensor`] is a matrix of rows that knows which device it lies on; a [`Tape`] records what a backward pass needs;
//! models are written with the functions of [`ops`]. Nothing outside this crate names a device's type, dfdx, the CPU's
//! kernels or the GPU.
//!
//! dfdx is the storage of tensors on the CPU, the tape that orders and runs every backward pass, and the reference that
//! every operator has in `f32` and `f64` ([`Graph`]).

pub mod context;
pub mod device;
pub mod error;
mod graph;
mod host;
pub mod images;
pub mod nn;
pub mod ops;
pub mod param;
pub mod random;
pub mod tape;
pub mod tensor;
pub mod watch;

pub use context::{Context, Forms};
pub use device::{Device, DeviceChoice, instruction_sets};
pub use error::{Error, Result};
pub use graph::{Graph, Matrix, Taped};
pub use images::ImageBatch;
pub use maskalign_kernels::{
    MatRef, Pool, add_product_in_double, available_memory_mib, fma_peak_gflops, for_parts, isa, keep_freed_memory,
    peak_memory_mib, simd_fn,
};
pub use param::{HostTensor, Init, Module, Param, Role, TensorMap};
pub use tape::{Gradients, Recompute, Tape};
pub use tensor::Tensor;
pub use watch::Watch;
