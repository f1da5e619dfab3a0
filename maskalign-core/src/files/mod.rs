//! What every module that reads or writes files shares: writing a file whole or not at all, and what that can fail with.

mod atomic;
mod error;
mod fail_point;
mod plain;

pub use atomic::atomic_write;
pub(crate) use atomic::target_of_temporary;
pub use error::RunError;
pub use fail_point::fail_point;
pub(crate) use fail_point::fail_point_after;
pub(crate) use plain::{create_folders, is_at, is_plain_folder, is_shared, open_folder, open_plain, sync_parent};

/// A path for a message: its name may hold characters on which a terminal acts.
pub(crate) fn shown(path: &std::path::Path) -> String {
    maskalign_registry::source::visible_lines(&path.display().to_string()).replace('\n', "\u{fffd}")
}

/// Whether another path would help: what was named is not there, is of another kind, may not be used, or can be no name.
pub(crate) fn is_wrong_path(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{InvalidFilename, InvalidInput, IsADirectory, NotADirectory, NotFound, PermissionDenied};
    matches!(error.kind(), NotFound | PermissionDenied | IsADirectory | NotADirectory | InvalidFilename | InvalidInput)
}
