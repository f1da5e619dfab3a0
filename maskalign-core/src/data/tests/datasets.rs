//! Lists, labels and messages of the datasets.

use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::oracle;
use crate::Refusal;
use crate::data::datasets::{Idx, ImageFolder, ImageList, Sample, Split};
use crate::data::{Dataset, Images};

fn folder(root: &Path) -> ImageFolder {
    serde_json::from_value(json!({ "root": root })).unwrap()
}

fn refusal(dataset: &dyn Dataset) -> Refusal {
    dataset.open().err().expect("a refusal")
}

fn help(refusal: &Refusal) -> &str {
    refusal.help.as_deref().unwrap_or_default()
}

fn write(root: &Path, path: &str, content: impl AsRef<[u8]>) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn entries(images: &dyn Images, root: &Path) -> Vec<(String, Option<u32>)> {
    let start = format!("{}/", root.display());
    (0..images.len())
        .map(|index| (images.name(index).strip_prefix(&start).unwrap().to_owned(), images.label(index)))
        .collect()
}

#[test]
fn a_folder_has_torchvisions_classes_and_order() {
    let recorded = oracle("image_folder");
    let root = TempDir::new().unwrap();
    for path in recorded["paths"].as_array().unwrap().iter().rev() {
        write(root.path(), path.as_str().unwrap(), "");
    }
    let images = folder(root.path()).open().unwrap();
    let classes: Vec<String> = serde_json::from_value(recorded["classes"].clone()).unwrap();
    assert_eq!(images.classes(), Some(classes));
    let expected: Vec<(String, u32)> = serde_json::from_value(recorded["samples"].clone()).unwrap();
    let expected: Vec<_> = expected.into_iter().map(|(path, label)| (path, Some(label))).collect();
    assert_eq!(entries(&*images, root.path()), expected);
}

#[test]
fn a_flat_folder_is_a_set_without_labels() {
    let root = TempDir::new().unwrap();
    for path in ["2.jpg", "1.JPEG", "notes.txt"] {
        write(root.path(), path, "");
    }
    let images = folder(root.path()).open().unwrap();
    assert_eq!(entries(&*images, root.path()), [("1.JPEG".into(), None), ("2.jpg".into(), None)]);
    assert_eq!(images.classes(), None);
}

#[test]
fn a_folder_that_is_not_there_says_what_is_and_what_leads_to_it() {
    let root = TempDir::new().unwrap();
    let missing = refusal(&folder(&root.path().join("imagenet/train")));
    assert_eq!(missing.path, ["root"]);
    assert!(help(&missing).contains(&root.path().display().to_string()), "{missing:?}");

    let unset = refusal(&folder(Path::new("/no_such_folder_anywhere")));
    assert!(help(&unset).contains("variable is empty"), "{unset:?}");
    assert!(help(&refusal(&folder(Path::new("")))).contains("variable is empty"));
    assert!(help(&refusal(&folder(Path::new("${IMAGENET_DIR}/train")))).contains("was not filled in"));
    assert!(help(&refusal(&folder(Path::new("no/such/folder")))).contains("current folder"));

    write(root.path(), "list.txt", "");
    assert!(help(&refusal(&folder(&root.path().join("list.txt")))).contains("image_list"));
}

#[test]
fn folders_without_images_are_named() {
    let root = TempDir::new().unwrap();
    assert!(refusal(&folder(root.path())).message.contains("no images"));
    write(root.path(), "cat/1.jpg", "");
    write(root.path(), "dog/readme.txt", "");
    let empty = refusal(&folder(root.path()));
    assert!(empty.message.contains("`dog`") && !empty.message.contains("`cat`"), "{empty:?}");
    let other: ImageFolder =
        serde_json::from_value(json!({ "root": root.path(), "extensions": ["TXT", ".jpg"] })).unwrap();
    assert_eq!(other.open().unwrap().len(), 2);
}

#[cfg(unix)]
#[test]
fn links_are_followed_and_circles_refused() {
    use std::os::unix::fs::symlink;

    let (root, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    write(other.path(), "deep/1.jpg", "");
    symlink(other.path(), root.path().join("class")).unwrap();
    let images = folder(root.path()).open().unwrap();
    assert_eq!(entries(&*images, root.path()), [("class/deep/1.jpg".into(), Some(0))]);

    symlink(root.path(), other.path().join("deep/back")).unwrap();
    assert!(refusal(&folder(root.path())).message.contains("circle"));
}

#[test]
fn the_fingerprint_tells_lists_apart_and_not_places() {
    let (one, two) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    for root in [one.path(), two.path()] {
        write(root, "a/1.jpg", "12345");
        write(root, "b/2.jpg", "123");
    }
    let print = |root: &TempDir| folder(root.path()).open().unwrap().fingerprint();
    assert_eq!(print(&one), print(&two));
    write(two.path(), "b/2.jpg", "1234");
    assert_ne!(print(&one), print(&two));
    write(two.path(), "b/2.jpg", "123");
    fs::rename(two.path().join("b/2.jpg"), two.path().join("b/3.jpg")).unwrap();
    assert_ne!(print(&one), print(&two));
}

fn list(root: &Path, text: impl AsRef<[u8]>) -> ImageList {
    write(root, "list.txt", text);
    for path in ["1.jpg", "sub/2.jpg", "with space 3.jpg"] {
        write(root, path, "");
    }
    serde_json::from_value(json!({ "file": root.join("list.txt") })).unwrap()
}

#[test]
fn a_list_holds_paths_with_labels_or_without() {
    let root = TempDir::new().unwrap();
    let labelled = list(root.path(), "\u{feff}1.jpg 3\r\n\n  sub/2.jpg\t0\nwith space 3.jpg\t12").open().unwrap();
    let expected = [("1.jpg", 3), ("sub/2.jpg", 0), ("with space 3.jpg", 12)];
    let expected = expected.map(|(path, label)| (path.to_string(), Some(label)));
    assert_eq!(entries(&*labelled, root.path()), expected);
    let plain = list(root.path(), "1.jpg\nwith space 3.jpg\n").open().unwrap();
    assert_eq!(plain.len(), 2);
    assert_eq!(plain.label(1), None);
}

#[test]
fn a_bad_line_is_named() {
    let root = TempDir::new().unwrap();
    for (text, line, message) in [
        (&b"1.jpg 0\nsub/2.jpg\n"[..], 2, "expected a label"),
        (b"1.jpg\n\nsub/2.jpg 1\n", 3, "lines before have none"),
        (b"1.jpg\tcat\n", 1, "found `cat`"),
        (b"1.jpg 4000000000\n", 1, "from 0 to 999999"),
        (b"1.jpg 0\n\xff\xfe 1\n", 2, "UTF-8"),
    ] {
        let refused = refusal(&list(root.path(), text));
        assert_eq!(refused.path, ["file"]);
        assert!(refused.message.contains(&format!("list.txt:{line}: ")), "{refused:?}");
        assert!(refused.message.contains(message), "{refused:?}");
    }
    assert!(refusal(&list(root.path(), "\n\n")).message.contains("names no images"));
    let elsewhere = refusal(&list(root.path(), "gone/1.jpg\ngone/2.jpg\n"));
    assert!(elsewhere.message.contains("gone/1.jpg"), "{elsewhere:?}");
}

fn idx_bytes(magic: u8, dims: &[u32], items: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 0, 8, magic];
    bytes.extend(dims.iter().flat_map(|dim| dim.to_be_bytes()));
    bytes.extend(items);
    bytes
}

fn idx(root: &Path, more: Value) -> Idx {
    let mut options = json!({ "images": root.join("images"), "labels": root.join("labels") });
    options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    serde_json::from_value(options).unwrap()
}

#[test]
fn idx_files_are_read_packed_or_plain_whole_or_in_part() {
    let root = TempDir::new().unwrap();
    let pixels: Vec<u8> = (0..5 * 2 * 3).collect();
    write(root.path(), "images", idx_bytes(3, &[5, 2, 3], &pixels));
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    packed.write_all(&idx_bytes(1, &[5], &[4, 3, 2, 1, 0])).unwrap();
    write(root.path(), "labels", packed.finish().unwrap());

    let all = idx(root.path(), json!({})).open().unwrap();
    assert_eq!((all.len(), all.size(), all.classes()), (5, Some((3, 2)), None));
    let second = all.image(1).unwrap();
    assert_eq!(second.size(), (3, 2));
    assert_eq!(second.pixels, [6, 6, 6, 7, 7, 7, 8, 8, 8, 9, 9, 9, 10, 10, 10, 11, 11, 11]);
    assert_eq!(all.label(1), Some(3));

    let names = ["a", "b", "c", "d", "e"];
    let part = idx(root.path(), json!({ "skip": 1, "limit": 2, "classes": names })).open().unwrap();
    assert_eq!((part.len(), part.label(0), part.label(1)), (2, Some(3), Some(2)));
    assert_eq!(part.image(0).unwrap(), second);
    assert!(part.name(0).starts_with("image 1 of "));
    assert_ne!(part.fingerprint(), all.fingerprint());
    assert_eq!(idx(root.path(), json!({ "limit": 900 })).open().unwrap().fingerprint(), all.fingerprint());

    let too_few = refusal(&idx(root.path(), json!({ "classes": ["a", "b"] })));
    assert_eq!(too_few.path, ["classes"]);
    assert_eq!(refusal(&idx(root.path(), json!({ "skip": 5 }))).path, ["skip"]);
    assert_eq!(refusal(&idx(root.path(), json!({ "limit": 0 }))).path, ["limit"]);
}

#[test]
fn broken_idx_files_say_what_is_wrong() {
    let root = TempDir::new().unwrap();
    let good_labels = idx_bytes(1, &[2], &[0, 1]);
    for (images, labels, option, message) in [
        (idx_bytes(3, &[2, 2, 2], &[0; 7]), good_labels.clone(), "images", "ends after 1"),
        (idx_bytes(3, &[2, 2, 2], &[0; 9]), good_labels.clone(), "images", "goes on after the 2"),
        (good_labels.clone(), good_labels.clone(), "images", "expected a file that begins with"),
        (idx_bytes(3, &[u32::MAX, 4096, 4096], &[0; 9]), good_labels.clone(), "images", "ends after"),
        (idx_bytes(3, &[2, 0, 2], &[]), good_labels.clone(), "images", "pixels a side"),
        (vec![0, 0, 8], good_labels, "images", "inside its header"),
        (idx_bytes(3, &[2, 2, 2], &[0; 8]), idx_bytes(1, &[3], &[0; 3]), "labels", "3 labels for 2 images"),
        (idx_bytes(3, &[2, 2, 2], &[0; 8]), vec![0x1F, 0x8B, 8, 0, 1], "labels", ""),
    ] {
        write(root.path(), "images", images);
        write(root.path(), "labels", labels);
        let refused = refusal(&idx(root.path(), json!({})));
        assert_eq!(refused.path, [option], "{refused:?}");
        assert!(refused.message.contains(message), "{refused:?}");
    }
}

fn sample(split: Split, limit: Option<usize>) -> Box<dyn Images> {
    Sample { split, limit }.open().unwrap()
}

#[test]
fn the_sample_is_balanced_and_its_parts_share_no_image() {
    let mut seen = HashSet::new();
    for (split, count) in [(Split::Train, 5600), (Split::Test, 1000)] {
        let images = sample(split, None);
        assert_eq!((images.len(), images.size()), (count, Some((28, 28))));
        let mut of_class = [0; 10];
        for index in 0..images.len() {
            of_class[images.label(index).unwrap() as usize] += 1;
            assert!(seen.insert(blake3::hash(&images.image(index).unwrap().pixels)), "{}", images.name(index));
        }
        assert_eq!(of_class, [count / 10; 10]);
        assert_eq!(images.classes().unwrap().len(), 10);
    }
}

#[test]
fn a_limited_sample_is_a_balanced_beginning() {
    let (some, all) = (sample(Split::Test, Some(30)), sample(Split::Test, None));
    assert_eq!(some.len(), 30);
    assert_eq!(some.image(29).unwrap(), all.image(29).unwrap());
    assert_eq!((0..30).filter(|&index| some.label(index) == Some(4)).count(), 3);
    assert_ne!(some.fingerprint(), all.fingerprint());
    assert_eq!(refusal(&Sample { split: Split::Test, limit: Some(0) }).path, ["limit"]);
}

#[test]
fn the_sample_and_its_licence_take_at_most_three_million_bytes() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/fashion_mnist");
    let bytes: u64 = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
    assert!(bytes <= 3_000_000, "{bytes}");
}
