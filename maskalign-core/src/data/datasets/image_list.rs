//! Images named in a text file.

use std::fs;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::files::{FileImages, existing_file, existing_folder};
use crate::Refusal;
use crate::data::{Dataset, Images};

/// Images named in a text file, one a line: a path, or a path and a label.
///
/// Path and label stand apart by a tab or by spaces; after a tab the path may hold spaces and end in a number. Empty
/// lines do not count. Either all lines have a label or none has.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageList {
    /// The text file, in UTF-8.
    pub file: String,
    /// The folder that relative paths start from. Default: the text file's own.
    #[serde(default)]
    pub root: Option<String>,
}

/// Labels from here on are refused: more likely a mistake than a class.
const LABELS: u32 = 1_000_000;

/// So many of the first images are looked for before training; if none is there, the folder is wrong.
const LOOKED_FOR: usize = 16;

impl Dataset for ImageList {
    fn open(&self) -> Result<Box<dyn Images>, Refusal> {
        let list = existing_file("file", &self.file)?;
        let root = match &self.root {
            Some(root) => existing_folder("root", root)?,
            None => list.parent().map(Path::to_path_buf).unwrap_or_default(),
        };
        let bytes =
            fs::read(&list).map_err(|error| Refusal::new("file", format!("cannot read `{}`: {error}", self.file)))?;
        let files = parse(&bytes)
            .map_err(|(line, message)| Refusal::new("file", format!("{}:{line}: {message}", self.file)))?;
        if files.is_empty() {
            return Err(Refusal::new("file", format!("`{}` names no images", self.file))
                .help("write one path a line, and after a tab its label where there are labels"));
        }
        if files.iter().take(LOOKED_FOR).all(|(path, _)| !root.join(path).exists()) {
            let option = if self.root.is_some() { "root" } else { "file" };
            let first = root.join(&files[0].0);
            return Err(Refusal::new(
                option,
                format!("none of the first images is there, such as `{}`", first.display()),
            )
            .help("paths in the list start from `root`, or from the folder of the list"));
        }
        Ok(Box::new(FileImages { root, files, classes: None }))
    }

    fn needs_files(&self) -> bool {
        true
    }
}

type Entry = (Box<Path>, Option<u32>);

/// The entries of a list, or the number of the first bad line and what is wrong with it.
fn parse(bytes: &[u8]) -> Result<Vec<Entry>, (usize, String)> {
    let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
    let mut entries: Vec<Entry> = Vec::new();
    for (index, line) in bytes.split(|&byte| byte == b'\n').enumerate() {
        let at = |message: String| (index + 1, message);
        let line = std::str::from_utf8(line).map_err(|_| at("expected text in UTF-8".into()))?.trim();
        if line.is_empty() {
            continue;
        }
        let (path, label) = parse_line(line).map_err(at)?;
        if let Some((_, first)) = entries.first()
            && first.is_some() != label.is_some()
        {
            let message = match first {
                Some(_) => "expected a label after the path, as on the lines before",
                None => "found a label, where the lines before have none",
            };
            return Err(at(message.into()));
        }
        entries.push((PathBuf::from(path).into_boxed_path(), label));
    }
    Ok(entries)
}

fn parse_line(line: &str) -> Result<(&str, Option<u32>), String> {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let (path, label) = match line.rsplit_once('\t') {
        Some((path, label)) if is_number(label.trim()) => (path, label),
        Some((_, label)) => {
            return Err(format!("expected a label from 0 to {} after the tab, found `{label}`", LABELS - 1));
        }
        None => match line.rsplit_once(' ') {
            Some((path, label)) if is_number(label) => (path, label),
            _ => return Ok((line, None)),
        },
    };
    match label.trim().parse::<u32>() {
        Ok(label) if label < LABELS => Ok((path.trim_end(), Some(label))),
        _ => Err(format!("expected a label from 0 to {}, found `{label}`", LABELS - 1)),
    }
}

crate::register!(dataset "image_list" => ImageList, "images named in a text file, with labels or without",
    example: r#"{ type: image_list, file: train.txt, root: images }"#);
