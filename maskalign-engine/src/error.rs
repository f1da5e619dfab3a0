//! What can go wrong in the engine.

/// The result of everything in this crate that can fail.
///
/// ```
/// # use maskalign_engine::{Context, Device, Error, Result, Tape, Tensor, ops};
/// fn positive(cx: &Context, x: &Tensor) -> Result<Tensor> {
///     ops::exp(cx, &mut Tape::inference(), x)
/// }
/// # let cx = Context::new(Device::Cpu, 1);
///
/// let x = cx.tensor(vec![0.0], 1, 1)?;
/// assert_eq!(positive(&cx, &x)?.value(), 1.0);
/// # Ok::<(), Error>(())
/// ```
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operator or a backward pass failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An error of the device: it is out of memory, or there is no such device.
    #[error("device: {0}")]
    Device(String),
    /// A device that was asked for and that this binary or this machine does not have.
    #[error("{0}")]
    NoDevice(String),
    /// An operator was given tensors of several devices.
    #[error("`{op}` was given tensors of different devices")]
    Devices {
        /// The operator.
        op: &'static str,
    },
    /// A backward pass was requested from a tape that records nothing.
    #[error("this tape does not record: a backward pass needs `Tape::training`")]
    NotRecording,
}

impl From<dfdx::prelude::CpuError> for Error {
    fn from(error: dfdx::prelude::CpuError) -> Self {
        Error::Device(error.to_string())
    }
}

impl From<maskalign_gpu::Error> for Error {
    fn from(error: maskalign_gpu::Error) -> Self {
        match error {
            maskalign_gpu::Error::Unsupported => Error::NoDevice(error.to_string()),
            error => Error::Device(error.to_string()),
        }
    }
}
