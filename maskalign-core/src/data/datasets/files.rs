//! Images in files, read when asked for; and the checks of paths that recipes name.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::ListHash;
use crate::Refusal;
use crate::data::{DataError, Images, RgbImage, decode};

/// A list of image files, with or without labels.
pub struct FileImages {
    /// The folder that relative paths start from.
    pub root: PathBuf,
    /// Path, absolute or from `root`, and label of each image.
    pub files: Vec<(Box<Path>, Option<u32>)>,
    /// The names of the classes by label, where they are known.
    pub classes: Option<Vec<String>>,
}

impl Images for FileImages {
    fn len(&self) -> usize {
        self.files.len()
    }

    fn image(&self, index: usize) -> Result<RgbImage, DataError> {
        decode::read(&self.root.join(&self.files[index].0))
    }

    fn label(&self, index: usize) -> Option<u32> {
        self.files[index].1
    }

    fn classes(&self) -> Option<Vec<String>> {
        self.classes.clone()
    }

    fn name(&self, index: usize) -> String {
        self.root.join(&self.files[index].0).display().to_string()
    }

    fn size(&self) -> Option<(usize, usize)> {
        None
    }

    /// Takes one look at each file's size; a file that is missing counts as one of no bytes.
    fn fingerprint(&self) -> String {
        let mut hash = ListHash::new();
        for (path, label) in &self.files {
            let bytes = fs::metadata(self.root.join(path)).map_or(0, |metadata| metadata.len());
            hash.add(path.as_os_str().as_encoded_bytes(), *label, bytes);
        }
        hash.finish()
    }
}

/// The path of a folder that a recipe names, `~` being the home folder.
///
/// # Errors
/// Names `option`, what is there instead, and what usually leads to it.
pub fn existing_folder(option: &str, path: &str) -> Result<PathBuf, Refusal> {
    let found = existing(option, path, "folder")?;
    if found.is_dir() {
        return Ok(found);
    }
    Err(Refusal::new(option, format!("expected a folder, but `{path}` is a file"))
        .help("name the folder that holds the images; a text file that lists them is read by `image_list`"))
}

/// The path of a file that a recipe names, `~` being the home folder.
///
/// # Errors
/// Names `option`, what is there instead, and what usually leads to it.
pub fn existing_file(option: &str, path: &str) -> Result<PathBuf, Refusal> {
    let found = existing(option, path, "file")?;
    if found.is_dir() {
        return Err(Refusal::new(option, format!("expected a file, but `{path}` is a folder"))
            .help("name a file; a folder of images is read by `image_folder`"));
    }
    Ok(found)
}

fn existing(option: &str, path: &str, what: &str) -> Result<PathBuf, Refusal> {
    if path.trim().is_empty() {
        return Err(Refusal::new(option, format!("the path of the {what} is empty"))
            .help("where it comes from a variable, as in `${IMAGENET_DIR}`, that variable is empty: set it"));
    }
    let expanded = expand_home(path);
    let error = match fs::metadata(&expanded) {
        Ok(_) => return Ok(expanded),
        Err(error) => error,
    };
    if error.kind() != io::ErrorKind::NotFound {
        return Err(Refusal::new(option, format!("cannot read `{path}`: {error}")));
    }
    Err(Refusal::new(option, format!("there is no {what} `{path}`")).help(why_missing(path, &expanded)))
}

fn why_missing(path: &str, expanded: &Path) -> String {
    if path.contains("${") {
        return "`${...}` stands in it as it is: the variable was not filled in".into();
    }
    let there = expanded.ancestors().skip(1).find(|folder| folder.is_dir());
    match there {
        Some(folder) if expanded.is_absolute() && folder.parent().is_none() => format!(
            "not even its first folder is there; where it was written like `${{IMAGENET_DIR}}{path}`, the variable is empty: set it"
        ),
        Some(folder) => format!("`{}` is there; check the rest of the path", folder.display()),
        None => {
            let here = std::env::current_dir().map_or_else(|_| ".".into(), |folder| folder.display().to_string());
            format!("the path starts from the current folder, `{here}`: name it in full, or change the folder")
        }
    }
}

fn expand_home(path: &str) -> PathBuf {
    match (path.strip_prefix("~/"), std::env::var_os("HOME")) {
        (Some(rest), Some(home)) => Path::new(&home).join(rest),
        _ => PathBuf::from(path),
    }
}
