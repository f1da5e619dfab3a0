//! Why a file of a run cannot be used, read or written.

use std::io;
use std::path::{Path, PathBuf};

use maskalign_registry::source::visible_lines;

use super::plain::NotPlain;
use super::shown;

/// Why a run's directory cannot be used, read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// A fresh run was asked for in a folder that holds something.
    #[error(
        "the run directory {path} is not empty: go on with its run with `--resume {path}`, replace it with `--force`, or choose another with `--out`",
        path = shown(.path)
    )]
    NotEmpty {
        /// The folder.
        path: PathBuf,
    },
    /// `--resume` or `--force` was given a folder that no run made.
    #[error(
        "{path} is not a run directory: it has no `{marker}`, so nothing in it is resumed or deleted; name another folder",
        path = shown(.path)
    )]
    NotARun {
        /// The folder.
        path: PathBuf,
        /// The file that marks a run's folder.
        marker: &'static str,
    },
    /// `--resume` was given a folder that does not exist.
    #[error("cannot resume {path}: there is no such directory", path = shown(.path))]
    NothingToResume {
        /// The folder.
        path: PathBuf,
    },
    /// A run's directory was to be made where a file is.
    #[error("cannot make the run directory {path}: a file is in its place; choose another with `--out`", path = shown(.path))]
    NotAFolder {
        /// The folder that was to be.
        path: PathBuf,
    },
    /// Another process holds the run's lock.
    #[error("the run in {path} is in use by another process: wait for it to end, or choose another directory with `--out`", path = shown(.path))]
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
    #[error("no space left on the disk while writing the {what} {path}: nothing was left half written; free some space and go on with `--resume`", path = shown(.path))]
    DiskFull {
        /// The kind of file.
        what: String,
        /// The file.
        path: PathBuf,
    },
    /// A link, or something else, is where a run has a file or a folder of its own.
    #[error("{path} is {found}, and not the run's own {expected}: nothing is read, written or deleted through it; move it away, or put the {expected} itself there", path = shown(.path))]
    NotPlain {
        /// The place.
        path: PathBuf,
        /// What is there, as in "a link".
        found: &'static str,
        /// What should be there: `file` or `folder`.
        expected: &'static str,
    },
    /// `--force` did not come to its end.
    #[error("the run in {path} was being replaced, and part of it is deleted: replace it with `--force`, or choose another directory with `--out`", path = shown(.path))]
    HalfReplaced {
        /// The folder.
        path: PathBuf,
    },
    /// A fork did not come to its beginning.
    #[error("the run in {path} is a fork that was ended while it took over what it goes on from: begin it anew with the same `maskalign run --from RUN --out {path}`; nothing was trained in it", path = shown(.path))]
    HalfForked {
        /// The folder.
        path: PathBuf,
    },
    /// What a run works in is another, or nothing.
    #[error("{path} is not where the run made it: it was removed, renamed or replaced while the run went on, which writes nothing more; put it back and go on with `--resume`", path = shown(.path))]
    Removed {
        /// The run's directory, or a file in it.
        path: PathBuf,
    },
    /// A file of a run that an earlier version made.
    #[error("{path} is of an earlier version of MaskAlign, whose runs are not known by their checksums to be whole: finish the run with that version, or start a new one; `export` and `weights` still take what its stages left", path = shown(.path))]
    Outdated {
        /// The file.
        path: PathBuf,
    },
    /// Another failure of the operating system.
    #[error("cannot {action} {path}: {source}", path = shown(.path))]
    Io {
        /// What was tried, as in "write the checkpoint".
        action: String,
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A file of the run cannot be understood.
    #[error("{path} is damaged: {reason}", path = shown(.path))]
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
            | RunError::Name { .. }
            | RunError::NotPlain { .. }
            | RunError::HalfReplaced { .. }
            | RunError::HalfForked { .. }
            | RunError::Outdated { .. }
            | RunError::Damaged { .. } => true,
            RunError::DiskFull { .. } | RunError::Io { .. } | RunError::Removed { .. } => false,
        }
    }

    /// Whether what a file held is lost: it is gone, cannot be read, or is not as it was written. A link is none: what it
    /// leads to may be whole.
    pub(crate) fn is_lost_content(&self) -> bool {
        match self {
            RunError::Damaged { .. } | RunError::Io { .. } => true,
            RunError::NotPlain { found, .. } => *found != "a link",
            _ => false,
        }
    }

    /// The file that is damaged.
    pub(crate) fn damaged_path(&self) -> Option<&Path> {
        match self {
            RunError::Damaged { path, .. } => Some(path),
            _ => None,
        }
    }

    /// Adds the way out to what is wrong with a file.
    pub(crate) fn advised(self, remedy: &str) -> RunError {
        match self {
            RunError::Damaged { path, reason } => RunError::Damaged { path, reason: format!("{reason}; {remedy}") },
            other => other,
        }
    }

    pub(crate) fn writing(what: &str, path: &Path, source: io::Error) -> RunError {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                RunError::DiskFull { what: what.to_owned(), path: path.to_owned() }
            }
            _ => RunError::io(format!("write the {what}"), path, source),
        }
    }

    pub(crate) fn reading(what: &str, path: &Path, source: io::Error) -> RunError {
        RunError::io(format!("read the {what}"), path, source)
    }

    /// What a folder of a run's own turned out to be.
    pub(crate) fn folder(path: &Path, source: io::Error) -> RunError {
        match RunError::io("use the folder".into(), path, source) {
            RunError::NotPlain { path, found, .. } => RunError::NotPlain { path, found, expected: "folder" },
            other => other,
        }
    }

    fn io(action: String, path: &Path, source: io::Error) -> RunError {
        let path = path.to_owned();
        match NotPlain::of(&source) {
            Some(NotPlain(found)) => RunError::NotPlain { path, found, expected: "file" },
            None => RunError::Io { action, path, source },
        }
    }

    /// What is wrong with a file's content, some of which may stand in `reason`.
    pub(crate) fn damaged(path: &Path, reason: impl Into<String>) -> RunError {
        let reason: String = reason.into();
        RunError::Damaged { path: path.to_owned(), reason: visible_lines(&reason) }
    }
}
