//! Why a file of a run cannot be used, read or written.

use std::io;
use std::path::{Path, PathBuf};

/// Why a run's directory cannot be used, read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// A fresh run was asked for in a folder that holds something.
    #[error(
        "the run directory {path} is not empty: go on with its run with `--resume {path}`, replace it with `--force`, or choose another with `--out`",
        path = .path.display()
    )]
    NotEmpty {
        /// The folder.
        path: PathBuf,
    },
    /// `--resume` or `--force` was given a folder that no run made.
    #[error(
        "{path} is not a run directory: it has no `{marker}`, so nothing in it is resumed or deleted; name another folder",
        path = .path.display()
    )]
    NotARun {
        /// The folder.
        path: PathBuf,
        /// The file that marks a run's folder.
        marker: &'static str,
    },
    /// `--resume` was given a folder that does not exist.
    #[error("cannot resume {path}: there is no such directory", path = .path.display())]
    NothingToResume {
        /// The folder.
        path: PathBuf,
    },
    /// A run's directory was to be made where a file is.
    #[error("cannot make the run directory {path}: a file is in its place; choose another with `--out`", path = .path.display())]
    NotAFolder {
        /// The folder that was to be.
        path: PathBuf,
    },
    /// Another process holds the run's lock.
    #[error("the run in {path} is in use by another process: wait for it to end, or choose another directory with `--out`", path = .path.display())]
    InUse {
        /// The folder.
        path: PathBuf,
    },
    /// A name that would become part of a path cannot be one.
    #[error("`{name}` cannot name a {what}: use letters, digits, `_`, `-` and `.`, and do not begin with `.`")]
    Name {
        /// What was to be named.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// The disk is full.
    #[error("no space left on the disk while writing the {what} {path}: nothing was left half written; free some space and go on with `--resume`", path = .path.display())]
    DiskFull {
        /// The kind of file.
        what: String,
        /// The file.
        path: PathBuf,
    },
    /// Another failure of the operating system.
    #[error("cannot {action} {path}: {source}", path = .path.display())]
    Io {
        /// What was tried, as in "write the checkpoint".
        action: String,
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A file of the run cannot be understood.
    #[error("{path} is damaged: {reason}", path = .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl RunError {
    /// Whether the user can put it right by asking for something else (exit code 2); else it is a failure (exit code 1).
    pub fn is_user_mistake(&self) -> bool {
        match self {
            RunError::NotEmpty { .. }
            | RunError::NotARun { .. }
            | RunError::NothingToResume { .. }
            | RunError::NotAFolder { .. }
            | RunError::InUse { .. }
            | RunError::Name { .. } => true,
            RunError::DiskFull { .. } | RunError::Io { .. } | RunError::Damaged { .. } => false,
        }
    }

    /// Whether what a file held is lost: it is gone, or not as it was written.
    pub(crate) fn is_lost_content(&self) -> bool {
        match self {
            RunError::Damaged { .. } => true,
            RunError::Io { source, .. } => source.kind() == io::ErrorKind::NotFound,
            _ => false,
        }
    }

    pub(crate) fn writing(what: &str, path: &Path, source: io::Error) -> RunError {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                RunError::DiskFull { what: what.to_owned(), path: path.to_owned() }
            }
            _ => RunError::Io { action: format!("write the {what}"), path: path.to_owned(), source },
        }
    }

    pub(crate) fn reading(what: &str, path: &Path, source: io::Error) -> RunError {
        RunError::Io { action: format!("read the {what}"), path: path.to_owned(), source }
    }

    pub(crate) fn damaged(path: &Path, reason: impl Into<String>) -> RunError {
        RunError::Damaged { path: path.to_owned(), reason: reason.into() }
    }
}
