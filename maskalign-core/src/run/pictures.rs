//! `pictures/`: what stages show of what they do, with an index of what each picture is.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::files::{RunError, atomic_write, create_folders, is_plain_folder};

/// The folder.
pub(super) const PICTURES: &str = "pictures";
const INDEX: &str = "pictures.json";

/// How the names of curves begin: a report draws those itself, of several runs in one chart.
pub const CURVE: &str = "curve-";

/// What a picture's file holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PictureFormat {
    /// Pixels.
    #[default]
    Png,
    /// Lines, marks and text.
    Svg,
}

impl PictureFormat {
    /// The ending of its files.
    pub fn extension(self) -> &'static str {
        match self {
            PictureFormat::Png => "png",
            PictureFormat::Svg => "svg",
        }
    }

    /// Its media type.
    pub fn media_type(self) -> &'static str {
        match self {
            PictureFormat::Png => "image/png",
            PictureFormat::Svg => "image/svg+xml",
        }
    }
}

/// A picture in a run's directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PictureRecord {
    /// The stage that made it.
    pub stage: String,
    /// What it is called.
    pub name: String,
    /// What there is to see.
    pub caption: String,
    /// What its file holds.
    #[serde(default)]
    pub format: PictureFormat,
}

impl PictureRecord {
    /// The file of the picture, by the run's directory; `None` if its name can be no file's.
    pub fn path(&self, run: &Path) -> Option<PathBuf> {
        let plain = |text: &str| {
            !text.is_empty()
                && !text.starts_with('.')
                && text.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c))
        };
        let is_plain = plain(&self.stage) && plain(&self.name);
        is_plain.then(|| run.join(PICTURES).join(format!("{}.{}.{}", self.stage, self.name, self.format.extension())))
    }
}

/// The pictures of a run, in the order in which they were made. They steer nothing: an index that cannot be read counts as
/// none.
pub fn pictures(run: &Path) -> Vec<PictureRecord> {
    let folder = run.join(PICTURES);
    let index = folder.join(INDEX);
    if !matches!(is_plain_folder(&folder), Ok(true)) || index.is_symlink() {
        return Vec::new();
    }
    let text = fs::read_to_string(index).unwrap_or_default();
    serde_json::from_str(&text).unwrap_or_default()
}

/// Writes a picture's file, in place of an earlier one of the same stage and name.
pub(super) fn write(run: &Path, record: &PictureRecord, png: &[u8]) -> Result<(), RunError> {
    let Some(path) = record.path(run) else {
        return Err(RunError::Name { what: "picture", name: record.name.clone() });
    };
    let folder = run.join(PICTURES);
    if !is_plain_folder(&folder).map_err(|error| RunError::folder(&folder, error))? {
        create_folders(&folder).map_err(|source| RunError::writing("folder", &folder, source))?;
    }
    atomic_write(&path, "picture", |file| file.write_all(png))?;
    let mut all = pictures(run);
    match all.iter_mut().find(|known| (&known.stage, &known.name) == (&record.stage, &record.name)) {
        Some(known) => known.clone_from(record),
        None => all.push(record.clone()),
    }
    write_index(run, &all)
}

/// Deletes the pictures of a stage, or of all.
pub(super) fn delete(run: &Path, stage: Option<&str>) -> Result<(), RunError> {
    let remove = |path: &Path| match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(RunError::Io { action: "delete".into(), path: path.to_owned(), source })
        }
        _ => Ok(()),
    };
    let (gone, rest): (Vec<_>, Vec<_>) =
        pictures(run).into_iter().partition(|record| stage.is_none_or(|stage| record.stage == stage));
    if gone.is_empty() {
        return Ok(());
    }
    gone.iter().filter_map(|record| record.path(run)).try_for_each(|path| remove(&path))?;
    if !rest.is_empty() {
        return write_index(run, &rest);
    }
    let folder = run.join(PICTURES);
    remove(&folder.join(INDEX))?;
    // A folder that holds something else stays.
    let _ = fs::remove_dir(&folder);
    Ok(())
}

fn write_index(run: &Path, all: &[PictureRecord]) -> Result<(), RunError> {
    let text = serde_json::to_string_pretty(all).expect("names and captions");
    let path = run.join(PICTURES).join(INDEX);
    atomic_write(&path, "index of pictures", |file| file.write_all(text.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::{Mode, RunDir};

    fn record(stage: &str, name: &str, caption: &str) -> PictureRecord {
        PictureRecord {
            stage: stage.to_owned(),
            name: name.to_owned(),
            caption: caption.to_owned(),
            format: PictureFormat::Png,
        }
    }

    #[test]
    fn a_picture_replaces_its_earlier_one_and_goes_with_its_stage() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::create(folder.path().join("run"), Mode::Fresh).unwrap();
        run.write_picture(&record("pretrain", "masks", "at first"), b"one").unwrap();
        run.write_picture(&record("pretrain", "features", "too"), b"two").unwrap();
        run.write_picture(&record("probe", "masks", "of another"), b"three").unwrap();
        run.write_picture(&record("pretrain", "masks", "later"), b"four").unwrap();
        let found = pictures(run.path());
        assert_eq!(found.iter().map(|r| r.caption.as_str()).collect::<Vec<_>>(), ["later", "too", "of another"]);
        assert_eq!(fs::read(found[0].path(run.path()).unwrap()).unwrap(), b"four");
        assert!(run.write_picture(&record("pretrain", "../masks", ""), b"").is_err());
        run.discard_stage("pretrain").unwrap();
        assert_eq!(pictures(run.path()), [record("probe", "masks", "of another")]);
        fs::write(run.path().join(PICTURES).join("mine.png"), "mine").unwrap();
        let path = run.path().to_owned();
        drop(run);
        let run = RunDir::create(&path, Mode::Force).unwrap();
        assert!(pictures(run.path()).is_empty());
        assert!(run.path().join("pictures/mine.png").exists() && !run.path().join("pictures/pictures.json").exists());
    }

    #[cfg(unix)]
    #[test]
    fn links_are_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let elsewhere = folder.path().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        let run = RunDir::create(folder.path().join("run"), Mode::Fresh).unwrap();
        std::os::unix::fs::symlink(&elsewhere, run.path().join(PICTURES)).unwrap();
        assert!(run.write_picture(&record("pretrain", "masks", ""), b"one").is_err());
        assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
    }
}
