//! Files that are there whole or not at all.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use super::error::RunError;
use super::fail_point::{fail_point, fail_point_after};
use super::plain::{is_at, sync_parent};

const BUFFER_BYTES: usize = 1 << 20;

/// Writes a file that is there whole or not at all.
///
/// The content goes to a temporary file in the same folder (`.NAME.tmp`), which is synced and then takes the place of
/// `path`; the folder is synced too. `what` names the kind of file in errors ("checkpoint"). On an error, a full disk
/// included, the temporary file is removed and what was at `path` before is untouched. A kill may leave the temporary
/// file behind: the next write of that name or a resume removes it.
pub fn atomic_write<T>(
    path: &Path,
    what: &str,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<T>,
) -> Result<T, RunError> {
    let temporary = temporary_path(path)
        .ok_or_else(|| RunError::writing(what, path, io::Error::from(io::ErrorKind::InvalidInput)))?;
    let written = write_and_rename(path, &temporary, what, write);
    if written.as_ref().is_err_and(|error| !is_replaced(error)) {
        // The first error is the one to report.
        let _ = fs::remove_file(&temporary);
    }
    written.map_err(|source| RunError::writing(what, path, source))
}

fn write_and_rename<T>(
    path: &Path,
    temporary: &Path,
    what: &str,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<T>,
) -> io::Result<T> {
    let mut writer = BufWriter::with_capacity(BUFFER_BYTES, create_temporary(temporary)?);
    let value = write(&mut writer)?;
    writer.flush()?;
    let file = writer.into_inner().map_err(io::IntoInnerError::into_error)?;
    fail_point_after(what, "write", || {
        let half = file.metadata().map_or(0, |metadata| metadata.len() / 2);
        let _ = file.set_len(half);
    });
    fail_point(what, "sync");
    file.sync_all()?;
    // In a copy of the folder that took its place, another file has the temporary one's name: it is left alone.
    if !is_at(&file, temporary)? {
        return Err(io::Error::new(io::ErrorKind::NotFound, Replaced));
    }
    drop(file);
    fail_point(what, "rename");
    fs::rename(temporary, path)?;
    fail_point(what, "renamed");
    sync_parent(path)?;
    Ok(value)
}

/// The temporary file is not where it was made.
#[derive(Debug, thiserror::Error)]
#[error("the folder was removed, renamed or replaced while a file was written to it")]
struct Replaced;

fn is_replaced(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|error| error.is::<Replaced>())
}

/// Makes the temporary file in place of one that a kill left. What is there may be a link: it is not followed.
fn create_temporary(path: &Path) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => OpenOptions::new().write(true).create_new(true).open(path),
    }
}

/// `DIR/NAME` -> `DIR/.NAME.tmp`.
pub(crate) fn temporary_path(path: &Path) -> Option<PathBuf> {
    let mut name = OsString::from(".");
    name.push(path.file_name()?);
    name.push(".tmp");
    Some(path.with_file_name(name))
}

/// The name that a temporary file was to take, if it is one.
pub(crate) fn target_of_temporary(name: &str) -> Option<&str> {
    name.strip_prefix('.')?.strip_suffix(".tmp")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("summary.json");
        atomic_write(&path, "summary", |file| file.write_all(b"old")).unwrap();
        let error = atomic_write(&path, "summary", |file| {
            file.write_all(b"new")?;
            Err::<(), _>(io::Error::from(io::ErrorKind::StorageFull))
        })
        .unwrap_err();
        assert!(matches!(error, RunError::DiskFull { .. }));
        assert!(error.to_string().contains("no space left"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["summary.json"]);
    }

    #[test]
    fn a_write_replaces_the_file_and_a_leftover_of_a_kill() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("manifest.json");
        fs::write(folder.path().join(".manifest.json.tmp"), "torn").unwrap();
        fs::write(&path, "old").unwrap();
        atomic_write(&path, "manifest", |file| file.write_all(b"new")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(names(folder.path()), ["manifest.json"]);
    }

    #[cfg(unix)]
    #[test]
    fn a_link_in_the_place_of_the_file_or_of_the_temporary_one_is_replaced_and_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let mine = folder.path().join("mine");
        fs::write(&mine, "mine").unwrap();
        let path = folder.path().join("manifest.json");
        for link in [&path, &temporary_path(&path).unwrap()] {
            std::os::unix::fs::symlink(&mine, link).unwrap();
            atomic_write(&path, "manifest", |file| file.write_all(b"new")).unwrap();
            assert_eq!(fs::read(&mine).unwrap(), b"mine");
            assert_eq!(fs::read(&path).unwrap(), b"new");
            assert_eq!(names(folder.path()), ["manifest.json", "mine"]);
        }
    }

    #[test]
    fn a_missing_folder_is_an_error_that_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("absent").join("file");
        let error = atomic_write(&path, "recipe", |_| Ok(())).unwrap_err().to_string();
        assert!(error.starts_with("cannot write the recipe") && error.contains("absent"), "{error}");
    }
}
