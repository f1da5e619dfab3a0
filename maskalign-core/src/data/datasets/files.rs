//! Images in files, read when asked for; and the checks of paths that recipes name.

use std::fs::{self, File, Metadata};
use std::io;
use std::path::{Path, PathBuf};

use super::ListHash;
use crate::data::regular_file::{OpenError, open_regular, other_than_file};
use crate::data::{DataError, Images, RgbImage, decode};
use maskalign_registry::{Refusal, source::visible_lines};

/// A list of image files, with or without labels.
pub struct FileImages {
    /// The folder that relative paths start from.
    pub root: PathBuf,
    /// Path, absolute or from `root`, and label of each image.
    pub files: Vec<(Box<Path>, Option<u32>)>,
    /// The names of the classes by label, where they are known.
    pub classes: Option<Vec<String>>,
    /// What was left out, or may not be meant.
    pub notes: Vec<String>,
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

    fn notes(&self) -> Vec<String> {
        // They quote names of files and columns.
        self.notes.iter().map(|note| visible_lines(note)).collect()
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
    let kind = fs::metadata(&found).map(|metadata| metadata.file_type());
    let what = kind.ok().and_then(other_than_file).unwrap_or("a file");
    Err(Refusal::new(option, format!("expected a folder, but `{path}` is {what}"))
        .help("name the folder that holds the images; a text file that lists them is read by `image_list`"))
}

/// The path of a file that a recipe names, `~` being the home folder.
///
/// # Errors
/// Names `option`, what is there instead, and what usually leads to it.
pub fn existing_file(option: &str, path: &str) -> Result<PathBuf, Refusal> {
    let found = existing(option, path, "file")?;
    let kind = fs::metadata(&found).map(|metadata| metadata.file_type());
    match kind.ok().and_then(other_than_file) {
        Some(what) => Err(not_a_file(option, path, what)),
        None => Ok(found),
    }
}

/// Opens the file that [`existing_file`] found.
///
/// # Errors
/// It may not be read, or something else has taken its place.
pub fn open_named(option: &str, path: &str, found: &Path) -> Result<(File, Metadata), Refusal> {
    open_regular(found).map_err(|error| match error {
        OpenError::NotRegular(what) => not_a_file(option, path, what),
        OpenError::Io(error) => Refusal::new(option, format!("cannot read `{path}`: {error}")),
    })
}

fn not_a_file(option: &str, path: &str, what: &str) -> Refusal {
    let help = match what {
        "a folder" => "name a file; a folder of images is read by `image_folder`",
        _ => "write what comes from there into a file, and name that",
    };
    Refusal::new(option, format!("expected a file, but `{path}` is {what}")).help(help)
}

fn existing(option: &str, path: &str, what: &str) -> Result<PathBuf, Refusal> {
    if path.trim().is_empty() {
        return Err(Refusal::new(option, format!("the path of the {what} is empty"))
            .help("where it comes from a variable, as in `${IMAGENET_DIR}`, that variable is empty: set it"));
    }
    let expanded = expand_home(path);
    let Err(error) = fs::metadata(&expanded) else { return Ok(expanded) };
    if error.kind() != io::ErrorKind::NotFound {
        return Err(Refusal::new(option, format!("cannot read `{path}`: {error}")));
    }
    Err(Refusal::new(option, format!("there is no {what} `{path}`")).help(why_missing(path, &expanded)))
}

fn why_missing(path: &str, expanded: &Path) -> String {
    if path.contains("${") {
        return "`${...}` stands in it as it is: the variable was not filled in".into();
    }
    if let Some(name) = bare_variable(path) {
        return format!("`${name}` stands in it as it is: variables are written `${{{name}}}`");
    }
    if let Some(letter) = odd_letter(path) {
        return format!("it holds {letter}: write the path again by hand");
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

/// The name after a `$` without braces, as shells fill in and recipes and lists do not.
pub(super) fn bare_variable(path: &str) -> Option<&str> {
    let (_, after) = path.split_once('$')?;
    let end = after.find(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_').unwrap_or(after.len());
    let name = &after[..end];
    name.starts_with(|letter: char| letter.is_ascii_alphabetic() || letter == '_').then_some(name)
}

/// The first letter that cannot be seen, or looks like one that is meant: its number and its name. Such letters come
/// from web pages and word processors.
pub(super) fn odd_letter(text: &str) -> Option<String> {
    text.chars().find_map(|letter| {
        let name = match letter {
            '\u{a0}' | '\u{202f}' => "a no-break space",
            '\u{ad}' => "a soft hyphen",
            '\u{200b}' => "a zero-width space",
            '\u{200c}' | '\u{200d}' | '\u{2060}' => "a zero-width joiner",
            '\u{feff}' => "a byte order mark",
            '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                "a mark of writing direction"
            }
            '\u{2212}' => "a minus sign in place of `-`",
            '\u{2010}'..='\u{2015}' => "a dash in place of `-`",
            '\u{2018}' | '\u{2019}' | '\u{201c}' | '\u{201d}' => "a typographic quote",
            '\u{2044}' | '\u{2215}' => "a slash that is not `/`",
            '\u{3000}' => "a wide space",
            '\u{ff10}'..='\u{ff19}' => "a wide digit",
            _ => return None,
        };
        Some(format!("U+{:04X}, {name}", u32::from(letter)))
    })
}
