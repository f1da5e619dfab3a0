//! Opening files that others name, without waiting on what is no file.
//!
//! A named pipe blocks whoever opens it until somebody writes, a device may answer without end; neither holds images. So
//! a path is looked at first, through links, and opened only when it is a regular file.

use std::fs::{self, File, FileType, Metadata, OpenOptions};
use std::io;
use std::path::Path;

/// Why a file cannot be opened.
#[derive(Debug)]
pub enum OpenError {
    /// What is there is something else, named here with its article: `a named pipe`.
    NotRegular(&'static str),
    /// The system's answer.
    Io(io::Error),
}

/// What a path that is no regular file is, with its article; `None` for a regular file.
pub fn other_than_file(kind: FileType) -> Option<&'static str> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;

        if kind.is_fifo() {
            return Some("a named pipe");
        }
        if kind.is_socket() {
            return Some("a socket");
        }
        if kind.is_char_device() || kind.is_block_device() {
            return Some("a device");
        }
    }
    match (kind.is_file(), kind.is_dir()) {
        (true, _) => None,
        (false, true) => Some("a folder"),
        (false, false) => Some("something else"),
    }
}

/// Opens a regular file for reading, following links.
///
/// # Errors
/// Nothing is there, it may not be read, or it is no regular file. Never waits for what is at the other end of a pipe,
/// not even where the pipe took the file's place after the first look.
pub fn open_regular(path: &Path) -> Result<(File, Metadata), OpenError> {
    let check = |metadata: &Metadata| match other_than_file(metadata.file_type()) {
        Some(what) => Err(OpenError::NotRegular(what)),
        None => Ok(()),
    };
    check(&fs::metadata(path).map_err(OpenError::Io)?)?;
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;

        options.custom_flags(libc::O_NONBLOCK);
    }
    let file = options.open(path).map_err(OpenError::Io)?;
    let metadata = file.metadata().map_err(OpenError::Io)?;
    check(&metadata)?;
    Ok((file, metadata))
}
