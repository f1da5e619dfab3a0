//! What can go wrong once a recipe is accepted.

use std::path::PathBuf;

use maskalign_registry::Refusal;

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a plan, a step or a run ended early.
///
/// [`Error::is_users`] tells mistakes of the user (exit code 2) from failures (exit code 1).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A component refuses one of its options; the registry finds its place in the recipe.
    #[error("{0}")]
    Refused(Refusal),
    /// Weights that cannot be read, or do not fit the model.
    #[error(transparent)]
    Weights(#[from] crate::weights::WeightsError),
    /// An image or a list of images that cannot be read.
    #[error(transparent)]
    Data(#[from] crate::data::DataError),
    /// The run directory, a checkpoint or a metrics file.
    #[error(transparent)]
    Run(#[from] crate::run::RunError),
    /// A file that is not part of a run.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The tensor device: out of memory, or no such device.
    #[error("device: {0}")]
    Device(String),
    /// A request that does not fit this binary or this run (a flag, not an option of a recipe).
    #[error("{0}")]
    Usage(String),
    /// The loss or the gradient is NaN or infinite; nothing was updated.
    #[error("the {what} is {value} at step {step} (learning rate {lr:.3e}); {advice}")]
    NonFinite {
        /// Which of the two.
        what: &'static str,
        /// The value as computed.
        value: f64,
        /// The optimizer step, counted from 0.
        step: u64,
        /// The learning rate of that step.
        lr: f64,
        /// Which checkpoint is the last good one, and what to try.
        advice: String,
    },
    /// The user asked the run to stop; the state is saved.
    #[error("stopped by {signal}; continue with `--resume {dir}`")]
    Stopped {
        /// Name of the signal.
        signal: &'static str,
        /// The exit code that goes with it: 130 or 143.
        code: u8,
        /// The run directory.
        dir: String,
    },
}

impl Error {
    /// True where the recipe, a flag or a file named by the user is at fault.
    pub fn is_users(&self) -> bool {
        match self {
            Error::Refused(_) | Error::Usage(_) | Error::Weights(_) | Error::Data(_) => true,
            Error::Run(error) => error.is_user_mistake(),
            Error::Io { source, .. } => source.kind() == std::io::ErrorKind::NotFound,
            Error::Device(_) | Error::NonFinite { .. } | Error::Stopped { .. } => false,
        }
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Error::Refused(refusal)
    }
}

/// Wraps a device's own error, which dfdx bounds by `Debug + Display` alone.
pub(crate) fn device<E: std::fmt::Display>(error: E) -> Error {
    Error::Device(error.to_string())
}
