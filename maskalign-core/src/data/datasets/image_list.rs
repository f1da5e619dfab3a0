//! Images named in a text file.

use std::io::Read;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::files::{FileImages, existing_file, existing_folder, odd_letter, open_named};
use super::list::{self, Entry, Fault};
use crate::data::{Dataset, Images};
use maskalign_registry::Refusal;

/// Images named in a text file, one a line: a path, or a path and a label.
///
/// Path and label stand apart by a tab or by spaces; after a tab the path may hold spaces and end in a number. Empty
/// lines do not count. Either all lines have a label or none has. A file that begins with a line of column names, such as
/// `path,label`, is read as CSV: columns in any order, apart by commas, semicolons or tabs, in quotes where need be.
///
/// Labels count from 0 and leave none out; where a list holds some of the classes only, or names them, `classes` says
/// which there are.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageList {
    /// The text file, in UTF-8.
    pub file: String,
    /// The folder that relative paths start from. Default: the text file's own.
    #[serde(default)]
    pub root: Option<String>,
    /// The names of the classes by label; the list may then name classes in place of labels. Default: none.
    #[serde(default)]
    pub classes: Option<Vec<String>>,
}

/// Larger lists are refused.
const MAX_BYTES: u64 = 1 << 30;

/// So many of the first images are looked for before training; if none is there, the folder is wrong.
const LOOKED_FOR: usize = 16;

impl Dataset for ImageList {
    fn open(&self) -> Result<Box<dyn Images>, Refusal> {
        let list = existing_file("file", &self.file)?;
        let root = match &self.root {
            Some(root) => existing_folder("root", root)?,
            None => list.parent().map(Path::to_path_buf).unwrap_or_default(),
        };
        let (file, metadata) = open_named("file", &self.file, &list)?;
        if metadata.len() > MAX_BYTES {
            return Err(Refusal::new("file", format!("`{}` is larger than 1 GiB", self.file))
                .help("name a text file that lists images"));
        }
        let mut bytes = Vec::with_capacity(metadata.len() as usize);
        file.take(MAX_BYTES)
            .read_to_end(&mut bytes)
            .map_err(|error| Refusal::new("file", format!("cannot read `{}`: {error}", self.file)))?;
        let at = |fault: Fault| {
            let refusal = Refusal::new("file", format!("{}:{}: {}", self.file, fault.line, fault.message));
            if fault.help.is_empty() { refusal } else { refusal.help(fault.help) }
        };
        let found = list::parse(&bytes, &root, self.classes.as_deref()).map_err(at)?;
        if found.entries.is_empty() {
            return Err(Refusal::new("file", format!("`{}` names no images", self.file))
                .help("write one path a line, and after a tab its label where there are labels"));
        }
        if found.entries.iter().take(LOOKED_FOR).all(|(path, _)| !root.join(path).exists()) {
            return Err(self.nothing_there(&root, &found.entries[0]));
        }
        Ok(Box::new(FileImages { root, files: found.entries, classes: self.classes.clone(), notes: found.notes }))
    }

    fn needs_files(&self) -> bool {
        true
    }
}

impl ImageList {
    fn nothing_there(&self, root: &Path, (first, _): &Entry) -> Refusal {
        let option = if self.root.is_some() { "root" } else { "file" };
        let full = root.join(first);
        // The paths may begin with the folder's own name, or leave out one that lies between.
        let above = root.canonicalize().ok().and_then(|root| root.parent().map(Path::to_path_buf));
        let below = || {
            let folders = root.read_dir().ok()?.flatten().map(|entry| entry.path());
            folders.filter(|folder| folder.is_dir()).find(|folder| folder.join(first).exists())
        };
        let better: Option<PathBuf> = above.filter(|folder| folder.join(first).exists()).or_else(below);
        let help = match better {
            Some(folder) => format!("it is there from `{}` on: write `root: {}`", folder.display(), folder.display()),
            None => match first.to_str().and_then(odd_letter) {
                Some(letter) => format!("it holds {letter}: write the path again by hand"),
                None => "paths in the list start from `root`, or from the folder of the list".into(),
            },
        };
        Refusal::new(option, format!("none of the first images is there, such as `{}`", full.display())).help(help)
    }
}

crate::register!(dataset "image_list" => ImageList, "images named in a text file, with labels or without",
    example: "{ type: image_list, file: train.txt, root: images }");
