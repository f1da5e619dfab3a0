//! The interface to a GPU: a device that is found at run time, its memory, and the operators that it has kernels for.
//!
//! There is no driver binding here yet, so [`Gpu::open`] refuses every device and says so. The engine's side is complete: it
//! copies tensors to and from a device, adds gradients on it, and runs on the host what the device has no kernel for. The
//! feature `pretend` provides a device in the host's memory, on which tests run all of that.

use std::sync::Arc;

#[cfg(feature = "pretend")]
pub mod pretend;

/// Why a device failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// This binary cannot use a GPU.
    #[error("this binary has no GPU support yet: use `--device cpu`")]
    Unsupported,
    /// An allocation that the device's memory has no room for.
    #[error("out of memory on {device}: {bytes} bytes were asked for")]
    OutOfMemory {
        /// Name of the device.
        device: String,
        /// Size of the allocation.
        bytes: usize,
    },
}

/// The result of an operation on a device.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a device can do. An operator that is not here runs on the host.
pub trait Driver: std::fmt::Debug + Send + Sync {
    /// Name for manifests and messages: `cuda:N`.
    fn name(&self) -> String;
    /// Allocates memory with a copy of these values.
    ///
    /// # Errors
    /// Out of memory, here and below.
    fn upload(&self, values: &[f32]) -> Result<Box<dyn Memory>>;
    /// `x + y`, for buffers of equal length.
    ///
    /// # Errors
    /// Out of memory.
    fn add(&self, x: &dyn Memory, y: &dyn Memory) -> Result<Box<dyn Memory>>;
}

/// Memory of a device, opaque to the host.
pub trait Memory: std::fmt::Debug + Send + Sync + std::any::Any {
    /// The number of values in it.
    fn len(&self) -> usize;
    /// True for memory without values.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// A copy on the host; waits for what is still being computed.
    fn download(&self) -> Vec<f32>;
}

/// A device that was opened; clones are the same one.
#[derive(Clone, Debug)]
pub struct Gpu(Arc<dyn Driver>);

impl Gpu {
    /// Opens the device with this ordinal.
    ///
    /// # Errors
    /// There is none: see the documentation of the crate.
    pub fn open(_ordinal: usize) -> Result<Gpu> {
        Err(Error::Unsupported)
    }

    /// Name for manifests and messages.
    pub fn name(&self) -> String {
        self.0.name()
    }

    /// A copy of these values on the device.
    ///
    /// # Errors
    /// Out of memory on the device, here and below.
    pub fn upload(&self, values: &[f32]) -> Result<Array> {
        Ok(self.array(self.0.upload(values)?))
    }

    /// `x + y`.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn add(&self, x: &Array, y: &Array) -> Result<Array> {
        Ok(self.array(self.0.add(&*x.memory, &*y.memory)?))
    }

    fn array(&self, memory: Box<dyn Memory>) -> Array {
        Array { memory: Arc::from(memory), gpu: self.clone() }
    }
}

impl PartialEq for Gpu {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// Immutable values on a device; a clone shares them.
#[derive(Clone, Debug)]
pub struct Array {
    memory: Arc<dyn Memory>,
    gpu: Gpu,
}

impl Array {
    /// The device that it lies on.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// A copy on the host.
    pub fn download(&self) -> Vec<f32> {
        self.memory.download()
    }
}
