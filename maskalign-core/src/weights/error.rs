//! Errors of weights.

use std::io;
use std::path::{Path, PathBuf};

use super::mismatch::Mismatch;
use crate::files::{is_wrong_path, shown};
use maskalign_registry::source::visible_lines;

/// Why weights cannot be found, read or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// The file cannot be opened or read.
    #[error("cannot read the weights {path}: {source}", path = shown(.path))]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The file's content is not what it should be.
    #[error("cannot use the weights {path}: {reason}", path = shown(.path))]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong, and the way out where there is one.
        reason: String,
    },
    /// An `hf://` address that does not parse.
    #[error("`{spec}` is not a hub address: {reason}; expected `hf://ORG/REPO[@REVISION][/FILE]`")]
    Address {
        /// The address.
        spec: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An `hf://` address whose file is not in the local cache.
    #[error("{message}")]
    NotInCache {
        /// What was looked for and where, and the command that gets it.
        message: String,
    },
    /// The names are of no family that is known, or of another than was asked for.
    #[error("{what}: {reason}")]
    Layout {
        /// Whose weights.
        what: String,
        /// What was found and what was expected.
        reason: String,
    },
    /// Names, shapes or values do not fit.
    #[error("{what} {mismatch}")]
    Mismatch {
        /// Whose weights.
        what: String,
        /// All that does not fit.
        mismatch: Box<Mismatch>,
    },
    /// Positions that cannot be resized.
    #[error("cannot resize positions of shape {shape:?} to a grid of {grid} x {grid}: {reason}")]
    Positions {
        /// Their shape.
        shape: Vec<usize>,
        /// The side that was asked for, in patches.
        grid: usize,
        /// What is wrong.
        reason: String,
    },
}

impl WeightsError {
    /// Puts `what` (a file, "teacher `clip`") before a refusal of names, shapes or values; other errors name their
    /// file already.
    #[must_use]
    pub fn of(self, whose: &str) -> WeightsError {
        match self {
            WeightsError::Layout { what, reason } => WeightsError::Layout { what: format!("{whose}: {what}"), reason },
            WeightsError::Mismatch { what, mismatch } => {
                WeightsError::Mismatch { what: format!("{whose}: {what}"), mismatch }
            }
            other => other,
        }
    }

    /// Whether the user can put it right by naming or getting other weights (exit code 2); else it is a failure of the
    /// machine (exit code 1).
    pub fn is_user_mistake(&self) -> bool {
        match self {
            WeightsError::Io { source, .. } => is_wrong_path(source),
            _ => true,
        }
    }

    pub(super) fn io(path: &Path, source: io::Error) -> WeightsError {
        if source.kind() == io::ErrorKind::UnexpectedEof {
            return WeightsError::format(path, "the file is truncated");
        }
        WeightsError::Io { path: path.to_owned(), source }
    }

    /// What is wrong with a file's content, some of which may stand in `reason`.
    pub(crate) fn format(path: &Path, reason: impl Into<String>) -> WeightsError {
        let reason: String = reason.into();
        WeightsError::Format { path: path.to_owned(), reason: visible_lines(&reason) }
    }
}

impl Mismatch {
    /// The error that it is, unless everything fits; `what` says whose tensors they are.
    pub(super) fn into_result(self, what: &str) -> Result<(), WeightsError> {
        if self.is_empty() {
            return Ok(());
        }
        Err(WeightsError::Mismatch { what: what.to_owned(), mismatch: Box::new(self) })
    }
}
