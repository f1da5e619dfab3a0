//! Files and folders that are a run's own: never reached through a link, and there after a power cut.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::path::Path;

/// What is found where a plain file or folder is expected; inside an [`io::Error`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it is {0}")]
pub(crate) struct NotPlain(pub(crate) &'static str);

impl NotPlain {
    /// The one inside an error.
    pub(crate) fn of(error: &io::Error) -> Option<NotPlain> {
        error.get_ref()?.downcast_ref().copied()
    }

    fn found(metadata: &Metadata) -> io::Error {
        let kind = metadata.file_type();
        io::Error::other(NotPlain(match () {
            () if kind.is_symlink() => "a link",
            () if kind.is_dir() => "a folder",
            () if kind.is_file() => "a file",
            () => "a pipe, a socket or a device",
        }))
    }
}

/// Opens a file, unless a link or anything else but a file is in its place: neither is followed nor waited for.
pub(crate) fn open_plain(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.is_file() => return Err(NotPlain::found(&metadata)),
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // It may have become another since.
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(options, libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = options.open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_file() { Ok(file) } else { Err(NotPlain::found(&metadata)) }
}

/// Whether a folder is there; an error where a link or something else is in its place.
pub(crate) fn is_plain_folder(path: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => Ok(true),
        Ok(metadata) => Err(NotPlain::found(&metadata)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Opens a folder, to tell it from another in its place; `None` on systems where folders cannot be opened, and cannot be
/// renamed while files in them are open.
pub(crate) fn open_folder(path: &Path) -> io::Result<Option<File>> {
    match cfg!(unix) {
        true => File::open(path).map(Some),
        false => Ok(None),
    }
}

/// Whether a path still leads to what was opened there: it was not removed, renamed or replaced.
///
/// What is open keeps its number, so that nothing else can have it. Where the system has no such numbers, something has to
/// be there.
pub(crate) fn is_at(opened: &File, path: &Path) -> io::Result<bool> {
    match fs::metadata(path) {
        #[cfg(unix)]
        Ok(found) => {
            use std::os::unix::fs::MetadataExt;
            let own = opened.metadata()?;
            Ok((own.dev(), own.ino()) == (found.dev(), found.ino()))
        }
        #[cfg(not(unix))]
        Ok(_) => opened.metadata().map(|_| true),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether a file has other names than the one it was opened by: to change it in place would change it under these too.
pub(crate) fn is_shared(file: &File) -> io::Result<bool> {
    #[cfg(unix)]
    let names = std::os::unix::fs::MetadataExt::nlink(&file.metadata()?);
    #[cfg(not(unix))]
    let names = file.metadata().map(|_| 1)?;
    Ok(names > 1)
}

/// Makes a folder and those above it that are missing, each of them to last.
pub(crate) fn create_folders(path: &Path) -> io::Result<()> {
    let missing: Vec<&Path> =
        path.ancestors().take_while(|folder| !folder.as_os_str().is_empty() && !folder.exists()).collect();
    for folder in missing.into_iter().rev() {
        match fs::create_dir(folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => sync_parent(folder)?,
        }
    }
    match path.is_dir() {
        true => Ok(()),
        false => Err(io::ErrorKind::AlreadyExists.into()),
    }
}

/// Makes an entry of a folder last: a file that was created, renamed or deleted.
#[cfg(unix)]
pub(crate) fn sync_parent(path: &Path) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    match File::open(folder) {
        // One may be allowed to make entries in a folder and not to read it.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        opened => opened?.sync_all(),
    }
}

/// Folders cannot be opened and synced here.
#[cfg(not(unix))]
pub(crate) fn sync_parent(_path: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn only_a_file_is_opened_as_one() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "mine").unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let dangling = folder.path().join("dangling");
        std::os::unix::fs::symlink(folder.path().join("made"), &dangling).unwrap();
        let pipe = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        for path in [&link, &dangling, &pipe, &folder.path().to_owned()] {
            for options in [OpenOptions::new().read(true), OpenOptions::new().create(true).append(true)] {
                let error = open_plain(path, options).unwrap_err();
                assert!(NotPlain::of(&error).is_some(), "{}: {error}", path.display());
            }
        }
        assert!(!folder.path().join("made").exists());
        assert!(open_plain(&file, OpenOptions::new().read(true)).is_ok());
        assert!(is_plain_folder(folder.path()).unwrap());
        assert!(!is_plain_folder(&folder.path().join("none")).unwrap());
        assert!(is_plain_folder(&link).is_err() && is_plain_folder(&file).is_err());
    }

    #[test]
    fn folders_are_made_where_no_file_is() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("a/b/c");
        create_folders(&deep).unwrap();
        create_folders(&deep).unwrap();
        assert!(deep.is_dir());
        let file = folder.path().join("file");
        fs::write(&file, "mine").unwrap();
        assert_eq!(create_folders(&file).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(create_folders(&file.join("d")).unwrap_err().kind(), io::ErrorKind::NotADirectory);
    }
}
