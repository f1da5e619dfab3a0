//! What can go wrong once a recipe is accepted.

use std::path::PathBuf;

use maskalign_registry::Refusal;

use crate::{files::is_wrong_path, run::FailedStep};

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a plan, a step or a run ended early.
///
/// [`Error::is_users`] tells mistakes of the user (exit code 2) from failures (exit code 1).
///
/// ```
/// # use maskalign_core::prelude::*;
/// let refused: Error = Refusal::new("cell", "expected at least 2, found 1").into();
/// assert!(refused.is_users());
/// assert!(Error::Usage("`--steps` is 0".into()).to_string().contains("--steps"));
/// ```
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
    /// The engine: out of memory, or no such device.
    #[error(transparent)]
    Engine(#[from] maskalign_engine::Error),
    /// A request that does not fit this binary or this run (a flag, not an option of a recipe).
    #[error("{0}")]
    Usage(String),
    /// The loss or the gradient is NaN or infinite; nothing was updated.
    #[error("the {what} is {value} at step {step} (learning rate {lr:.3e}){rest}", rest = ending(first))]
    NonFinite {
        /// Which of the two.
        what: &'static str,
        /// The value as computed.
        value: f64,
        /// The optimizer step, counted from 0.
        step: u64,
        /// The learning rate of that step.
        lr: f64,
        /// Where that began; empty where it is not known.
        first: String,
        /// What to look at and to try, each for itself; none for steps that no run makes.
        help: Vec<String>,
    },
    /// A step was made again, which is all that was asked for.
    #[error("step {} of stage `{}` was made again", .0.step, .0.stage)]
    Replayed(Box<FailedStep>),
    /// The user asked the run to stop; the state is saved.
    #[error("stopped by {signal}; continue with `--resume {dir}`")]
    Stopped {
        /// Name of the signal.
        signal: &'static str,
        /// The exit code that goes with it: 129, 130 or 143.
        code: u8,
        /// The run directory.
        dir: String,
    },
}

impl Error {
    /// The refusal that this is; one of the whole component, where what failed named no option.
    pub(crate) fn into_refusal(self) -> Refusal {
        match self {
            Error::Refused(refusal) => refusal,
            other => Refusal::whole(other.to_string()),
        }
    }

    /// True where the recipe, a flag or a file named by the user is at fault.
    pub fn is_users(&self) -> bool {
        match self {
            Error::Refused(_) | Error::Usage(_) => true,
            Error::Data(error) => error.is_user_mistake(),
            Error::Weights(error) => error.is_user_mistake(),
            Error::Run(error) => error.is_user_mistake(),
            Error::Io { source, .. } => is_wrong_path(source),
            Error::Engine(error) => matches!(error, maskalign_engine::Error::NoDevice(_)),
            Error::NonFinite { .. } | Error::Replayed(_) | Error::Stopped { .. } => false,
        }
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Error::Refused(refusal)
    }
}

/// What follows a message, after a semicolon.
fn ending(more: &str) -> String {
    match more {
        "" => String::new(),
        more => format!("; {more}"),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, ErrorKind};

    use super::*;
    use crate::{data::DataError, weights::WeightsError};

    #[test]
    fn what_another_path_cannot_help_is_a_failure() {
        for (kind, users) in [(ErrorKind::NotFound, true), (ErrorKind::Other, false)] {
            let (path, io) = (PathBuf::from("w"), || io::Error::from(kind));
            assert_eq!(Error::from(WeightsError::Io { path: path.clone(), source: io() }).is_users(), users);
            assert_eq!(Error::from(DataError::Read { path: path.clone(), source: io() }).is_users(), users);
            assert_eq!(Error::Io { path, source: io() }.is_users(), users);
        }
        let panicked = || DataError::Panicked { name: "1.png".into(), message: "bug".into() };
        assert!(!Error::from(panicked()).is_users());
        let source = Box::new(panicked());
        assert!(!Error::from(DataError::NothingReadable { count: 2, name: "2.png".into(), source }).is_users());
    }

    #[test]
    fn a_message_ends_with_what_is_known() {
        let error = |first: &str| {
            let (first, help) = (first.to_owned(), Vec::new());
            Error::NonFinite { what: "loss", value: f64::NAN, step: 3, lr: 0.5, first, help }
        };
        assert_eq!(error("").to_string(), "the loss is NaN at step 3 (learning rate 5.000e-1)");
        assert!(error("it began there").to_string().ends_with("e-1); it began there"));
    }
}
