//! Folders of images.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::files::{FileImages, existing_folder};
use super::some_of;
use crate::data::{Dataset, Images};
use maskalign_registry::Refusal;

/// Images in one folder a class, as ImageNet has them.
///
/// The law is torchvision's `ImageFolder`: the classes are the sorted names of the folders in `root`, images may lie
/// deeper, and their order is that of their folders' paths, then of their names. A `root` without folders is a set of
/// images without labels. Unlike there, folders that programs leave behind (hidden ones, `__MACOSX`, `@eaDir` and the
/// like) are no classes, and splits such as `train` beside `val` are refused.
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
        let mut left_out = LeftOut::default();
        top.folders.retain(|(name, _)| {
            let is_left = is_left_behind(name);
            if is_left {
                left_out.folders.push(name.to_string_lossy().into_owned());
            }
            !is_left
        });
        if top.folders.is_empty() {
            return self.unlabelled(root, top.files, left_out);
        }
        let beside: Vec<&OsString> = top.files.iter().filter(|name| self.is_image(name)).collect();
        if let Some(first) = beside.iter().min() {
            left_out.beside = Some((beside.len(), first.to_string_lossy().into_owned()));
        }
        let names: Vec<String> = top.folders.iter().map(|(name, _)| name.to_string_lossy().into_owned()).collect();
        self.check_splits(&root, &names)?;
        let mut files = Vec::new();
        let mut classes = Vec::new();
        let mut empty = Vec::new();
        for (label, (class, is_link)) in top.folders.into_iter().enumerate() {
            let before = files.len();
            self.collect(&root, (PathBuf::from(&class), is_link), label as u32, &mut files, &mut left_out)?;
            let class = class.to_string_lossy().into_owned();
            if files.len() == before {
                empty.push(format!("`{class}`"));
            }
            classes.push(class);
        }
        if !empty.is_empty() {
            return Err(Refusal::new("root", format!("no images in the class folders {} of `{}`", some_of(&empty), self.root))
                .help(format!(
                    "each folder there is a class and must hold images ({}): remove it, or name the folder that holds the classes",
                    self.extensions.join(", ")
                )));
        }
        let mut notes = left_out.notes(&self.root);
        notes.extend(doubtful_classes(&classes, &files));
        Ok(Box::new(FileImages { root, files, classes: Some(classes), notes }))
    }

    fn needs_files(&self) -> bool {
        true
    }
}

impl ImageFolder {
    fn unlabelled(
        &self,
        root: PathBuf,
        mut names: Vec<OsString>,
        mut left_out: LeftOut,
    ) -> Result<Box<dyn Images>, Refusal> {
        self.keep_images(&mut names, &mut left_out);
        if names.is_empty() {
            return Err(Refusal::new("root", format!("no images in `{}`", self.root)).help(format!(
                "put one folder a class there, or images; files ending in {} count as such",
                self.extensions.join(", ")
            )));
        }
        names.sort();
        let files = names.into_iter().map(|name| (PathBuf::from(name).into_boxed_path(), None)).collect();
        Ok(Box::new(FileImages { notes: left_out.notes(&self.root), root, files, classes: None }))
    }

    /// Appends the images of one class in torchvision's order.
    fn collect(
        &self,
        root: &Path,
        (class, is_link): (PathBuf, bool),
        label: u32,
        files: &mut Vec<(Box<Path>, Option<u32>)>,
        left_out: &mut LeftOut,
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
                if is_left_behind(&name) {
                    left_out.folders.push(folder.join(name).to_string_lossy().into_owned());
                    continue;
                }
                pending.push((folder.join(name), is_link, links.clone()));
            }
            self.keep_images(&mut content.files, left_out);
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

    /// Leaves the images among names of files, counting the others.
    fn keep_images(&self, names: &mut Vec<OsString>, left_out: &mut LeftOut) {
        names.retain(|name| {
            let is_image = self.is_image(name);
            if !is_image {
                left_out.count_file(name);
            }
            is_image
        });
    }

    fn is_image(&self, name: &OsString) -> bool {
        let name = name.as_encoded_bytes().to_ascii_lowercase();
        // What macOS writes beside a file on a foreign disk has its name, with this in front.
        if name.starts_with(b"._") {
            return false;
        }
        self.extensions.iter().any(|ending| {
            let ending = ending.trim_start_matches('.').to_ascii_lowercase();
            name.strip_suffix(ending.as_bytes()).is_some_and(|rest| rest.ends_with(b"."))
        })
    }

    /// Refuses folders that are splits of a dataset and not classes.
    fn check_splits(&self, root: &Path, names: &[String]) -> Result<(), Refusal> {
        let is = |splits: &[&str], name: &String| splits.contains(&name.to_lowercase().as_str());
        let to_train =
            |name: &&String| is(&["train", "training", "train2017", "train2014", "trainval", "unlabeled"], name);
        let to_test = |name: &&String| {
            is(&["val", "valid", "validation", "test", "testing", "dev", "eval", "val2017", "val2014"], name)
        };
        let first = names.iter().find(to_train);
        let all = names.iter().all(|name| to_train(&name) || to_test(&name));
        let side_by_side = first.is_some() && names.iter().any(|name| to_test(&name));
        if !(all || side_by_side) {
            return Ok(());
        }
        let splits: Vec<String> =
            names.iter().filter(|name| to_train(name) || to_test(name)).map(|name| format!("`{name}`")).collect();
        let first = first.unwrap_or(&names[0]);
        Err(Refusal::new(
            "root",
            format!("the folders in `{}` are parts of a dataset, not classes: {}", self.root, some_of(&splits)),
        )
        .help(format!("name the part: `root: {}`", root.join(first).display())))
    }
}

/// Folders that programs leave behind, hidden ones among them; what lies in them are copies, previews and refuse.
fn is_left_behind(name: &OsString) -> bool {
    const NAMES: [&str; 8] = [
        "__macosx",
        "@eadir",
        "#recycle",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "__pycache__",
        "@tmp",
    ];
    let name = name.to_string_lossy().to_lowercase();
    name.starts_with('.') || NAMES.contains(&name.as_str())
}

/// What is in a folder and not taken.
#[derive(Default)]
struct LeftOut {
    /// Paths of folders from the root on.
    folders: Vec<String>,
    /// How many images lie beside the class folders, and the first of them.
    beside: Option<(usize, String)>,
    /// How many files there are of each other ending.
    endings: BTreeMap<String, usize>,
}

impl LeftOut {
    /// Counts a file that is no image by its name; what systems write into every folder does not count.
    fn count_file(&mut self, name: &OsString) {
        let name = name.to_string_lossy().to_lowercase();
        if name.starts_with('.') || ["thumbs.db", "desktop.ini"].contains(&name.as_str()) {
            return;
        }
        let ending = name.rsplit_once('.').map_or("none", |(_, ending)| ending).to_owned();
        *self.endings.entry(ending).or_default() += 1;
    }

    fn notes(&self, root: &str) -> Vec<String> {
        let mut notes = Vec::new();
        if let Some((count, first)) = &self.beside {
            notes.push(format!(
                "{} beside the class folders of `{root}`, such as `{first}`: left out, since no folder gives a class",
                counted(*count, "image lies", "images lie")
            ));
        }
        if !self.folders.is_empty() {
            let names: Vec<String> = self.folders.iter().map(|name| format!("`{name}`")).collect();
            notes.push(format!(
                "{} of `{root}` left out as no classes: {}",
                counted(names.len(), "folder", "folders"),
                some_of(&names)
            ));
        }
        if !self.endings.is_empty() {
            let mut endings: Vec<_> = self.endings.iter().collect();
            endings.sort_by_key(|&(ending, &count)| (Reverse(count), ending));
            let each: Vec<String> = endings.iter().map(|(ending, count)| format!("{ending} ({count})")).collect();
            notes.push(format!(
                "{} of `{root}` left out, whose endings are not in `extensions`: {}",
                counted(self.endings.values().sum(), "file", "files"),
                some_of(&each)
            ));
        }
        notes
    }
}

/// Sentences about classes that may not be meant.
fn doubtful_classes(classes: &[String], files: &[(Box<Path>, Option<u32>)]) -> Vec<String> {
    let mut notes = Vec::new();
    let inner = |path: &Path| {
        let mut parts = path.components().skip(1);
        let part = parts.next()?;
        parts.next().map(|_| part.as_os_str().to_string_lossy().into_owned())
    };
    if let [only] = classes {
        let below: BTreeSet<String> = files.iter().filter_map(|(path, _)| inner(path)).collect();
        let help = match below.len() {
            0 | 1 => "labels tell nothing apart".to_owned(),
            count => {
                format!("the {count} folders in it are no classes; name `{only}` itself where they are meant to be")
            }
        };
        notes.push(format!("all images are in one class, `{only}`: {help}"));
    }
    if files.len() == classes.len() && classes.len() >= 10 {
        notes.push(format!(
            "each of the {} classes has one image: folders may hold something else than classes",
            classes.len()
        ));
    }
    let mut by_name: BTreeMap<String, &String> = BTreeMap::new();
    let alike: Vec<String> = classes
        .iter()
        .filter_map(|class| {
            let other = by_name.insert(class.trim().to_lowercase(), class)?;
            Some(format!("`{other}` and `{class}`"))
        })
        .collect();
    if !alike.is_empty() {
        notes.push(format!("classes whose names differ by capitals or spaces alone: {}", some_of(&alike)));
    }
    notes
}

fn counted(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
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
