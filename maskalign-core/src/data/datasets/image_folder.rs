//! Folders of images.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::files::{FileImages, existing_folder};
use crate::Refusal;
use crate::data::{Dataset, Images};

/// Images in one folder a class, as ImageNet has them.
///
/// The law is torchvision's `ImageFolder`: the classes are the sorted names of the folders in `root`, images may lie
/// deeper, and their order is that of their folders' paths, then of their names. A `root` without folders is a set of
/// images without labels.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageFolder {
    /// The folder that holds one folder a class, or images alone.
    pub root: String,
    /// Endings of the file names that count as images, in lower case; the names may be in either.
    #[serde(default = "default_extensions")]
    #[schemars(length(min = 1))]
    pub extensions: Vec<String>,
}

fn default_extensions() -> Vec<String> {
    ["jpg", "jpeg", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp"].map(String::from).to_vec()
}

impl Dataset for ImageFolder {
    fn open(&self) -> Result<Box<dyn Images>, Refusal> {
        if self.extensions.iter().all(|ending| ending.trim_start_matches('.').is_empty()) {
            return Err(Refusal::new("extensions", "expected at least one ending, such as jpg"));
        }
        let root = existing_folder("root", &self.root)?;
        let unreadable = |path: &Path, error: io::Error| {
            Refusal::new("root", format!("cannot read the folder `{}`: {error}", path.display()))
        };
        let mut top = read_folder(&root).map_err(|error| unreadable(&root, error))?;
        top.folders.sort();
        if top.folders.is_empty() {
            return self.unlabelled(root, top.files);
        }
        let mut files = Vec::new();
        let mut classes = Vec::new();
        let mut empty = Vec::new();
        for (label, (class, is_link)) in top.folders.into_iter().enumerate() {
            let before = files.len();
            self.collect(&root, (PathBuf::from(&class), is_link), label as u32, &mut files)?;
            let class = class.to_string_lossy().into_owned();
            if files.len() == before {
                empty.push(format!("`{class}`"));
            }
            classes.push(class);
        }
        if !empty.is_empty() {
            const SHOWN: usize = 5;
            let more = if empty.len() > SHOWN { format!(" and {} more", empty.len() - SHOWN) } else { String::new() };
            let some = empty[..empty.len().min(SHOWN)].join(", ");
            return Err(Refusal::new("root", format!("no images in the class folders {some}{more} of `{}`", self.root))
                .help(format!(
                    "each folder there is a class and must hold images ({}): remove it, or name the folder that holds the classes",
                    self.extensions.join(", ")
                )));
        }
        Ok(Box::new(FileImages { root, files, classes: Some(classes) }))
    }

    fn needs_files(&self) -> bool {
        true
    }
}

impl ImageFolder {
    fn unlabelled(&self, root: PathBuf, mut names: Vec<OsString>) -> Result<Box<dyn Images>, Refusal> {
        names.retain(|name| self.is_image(name));
        if names.is_empty() {
            return Err(Refusal::new("root", format!("no images in `{}`", self.root)).help(format!(
                "put one folder a class there, or images; files ending in {} count as such",
                self.extensions.join(", ")
            )));
        }
        names.sort();
        let files = names.into_iter().map(|name| (PathBuf::from(name).into_boxed_path(), None)).collect();
        Ok(Box::new(FileImages { root, files, classes: None }))
    }

    /// Appends the images of one class in torchvision's order.
    fn collect(
        &self,
        root: &Path,
        (class, is_link): (PathBuf, bool),
        label: u32,
        files: &mut Vec<(Box<Path>, Option<u32>)>,
    ) -> Result<(), Refusal> {
        let refused = |path: &Path, what: &str| {
            Refusal::new("root", format!("cannot read the folder `{}`: {what}", root.join(path).display()))
        };
        let mut found = Vec::new();
        let mut pending = vec![(class, is_link, Arc::new(Vec::<PathBuf>::new()))];
        while let Some((folder, is_link, mut links)) = pending.pop() {
            let full = root.join(&folder);
            if is_link {
                // A way back into a link already followed would never end.
                let target = fs::canonicalize(&full).map_err(|error| refused(&folder, &error.to_string()))?;
                if links.contains(&target) {
                    return Err(refused(&folder, "the links lead round in a circle").help("remove the link"));
                }
                Arc::make_mut(&mut links).push(target);
            }
            let mut content = read_folder(&full).map_err(|error| refused(&folder, &error.to_string()))?;
            for (name, is_link) in content.folders {
                pending.push((folder.join(name), is_link, links.clone()));
            }
            content.files.retain(|name| self.is_image(name));
            content.files.sort();
            found.push((folder, content.files));
        }
        // As text, not by components: "a-b" comes before "a/b".
        found.sort_by(|(a, _), (b, _)| a.as_os_str().as_encoded_bytes().cmp(b.as_os_str().as_encoded_bytes()));
        for (folder, names) in found {
            files.extend(names.into_iter().map(|name| (folder.join(name).into_boxed_path(), Some(label))));
        }
        Ok(())
    }

    fn is_image(&self, name: &OsString) -> bool {
        let name = name.as_encoded_bytes().to_ascii_lowercase();
        self.extensions.iter().any(|ending| {
            let ending = ending.trim_start_matches('.').to_ascii_lowercase();
            name.strip_suffix(ending.as_bytes()).is_some_and(|rest| rest.ends_with(b"."))
        })
    }
}

struct Content {
    /// Name, and whether it is a link.
    folders: Vec<(OsString, bool)>,
    files: Vec<OsString>,
}

fn read_folder(path: &Path) -> io::Result<Content> {
    let mut content = Content { folders: Vec::new(), files: Vec::new() };
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            content.folders.push((entry.file_name(), false));
        } else if kind.is_symlink() && entry.path().is_dir() {
            content.folders.push((entry.file_name(), true));
        } else {
            content.files.push(entry.file_name());
        }
    }
    Ok(content)
}

crate::register!(dataset "image_folder" => ImageFolder, "images in one folder a class, as ImageNet has them; a flat folder is unlabelled",
    example: r#"{ type: image_folder, root: "${IMAGENET_DIR}/train" }"#);
