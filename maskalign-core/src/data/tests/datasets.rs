//! Lists, labels and messages of the datasets.

use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{fixtures, oracle};
use crate::data::datasets::{Idx, ImageFolder, ImageList, Sample, Split};
use crate::data::{Dataset, Images};
use maskalign_registry::Refusal;

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
    assert!(help(&refusal(&folder(Path::new("$HOME/no/such")))).contains("written `${HOME}`"));
    assert!(help(&refusal(&folder(Path::new("data/ima\u{200b}ges")))).contains("U+200B, a zero-width space"));
    assert!(help(&refusal(&folder(Path::new("data/no\u{2212}images")))).contains("U+2212"));

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
    let labelled = list(root.path(), "\u{feff}1.jpg 2\r\n\n  sub/2.jpg\t0\nwith space 3.jpg\t1").open().unwrap();
    let expected = [("1.jpg", 2), ("sub/2.jpg", 0), ("with space 3.jpg", 1)];
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

#[test]
fn a_list_with_column_names_is_read_as_pythons_csv_reads_it() {
    let text = fs::read_to_string(fixtures().join("list_oracle.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_str(&text).unwrap();
    for case in &cases {
        let text = case["text"].as_str().unwrap();
        let rows: Vec<(String, Option<u32>)> = serde_json::from_value(case["rows"].clone()).unwrap();
        let root = TempDir::new().unwrap();
        for (path, _) in &rows {
            write(root.path(), path, "");
        }
        write(root.path(), "list.csv", text);
        let list: ImageList = serde_json::from_value(json!({ "file": root.path().join("list.csv") })).unwrap();
        let images = list.open().unwrap_or_else(|refused| panic!("{text}: {refused:?}"));
        assert_eq!(entries(&*images, root.path()), rows, "{text}");
    }
    assert!(cases.len() > 10);
}

/// What people write, and in the answer: the line, what is there, and the way out.
#[test]
fn lists_in_other_forms_are_answered_with_the_way_out() {
    for (text, line, message, way_out) in [
        // The kinds that were reported.
        ("1.jpg,0\nsub/2.jpg,1\n", 1, "a comma", "`path,label`"),
        ("path label\n1.jpg 0\n", 1, "names columns", "remove the line"),
        ("1.jpg blobs\nsub/2.jpg stripes\n", 1, "found `blobs`", r#"classes: ["blobs", "stripes"]"#),
        ("sub\\2.jpg\t0\r\n1.jpg\t1\r\n", 1, "as Windows writes it", "write `/`"),
        ("1.jpg 1\nsub/2.jpg 2\n", 1, "from 1 to 2", "take 1 from each"),
        ("1.jpg 0\nsub/2.jpg 5\n", 2, "leave out 4 of the numbers before: 1, 2, 3, 4", "without a gap"),
        ("1.jpg -1\nsub/2.jpg 1\n", 1, "negative", "-1"),
        ("1.jpg 0.0\nsub/2.jpg 1.0\n", 1, "decimal", "astype(int)"),
        // More of them.
        ("1.jpg red fox\nsub/2.jpg wolf\n", 1, "found `red fox`", r#"["red fox", "wolf"]"#),
        ("1.jpg;0\n", 1, "a semicolon", "`path;label`"),
        ("1.jpg, 0\n", 1, "a comma", "put a tab"),
        ("\"1.jpg\",0\n", 1, "a comma", "`path,label`"),
        ("\"1.jpg\" 0\n", 1, "in quotes", "remove the quotes"),
        ("1.jpg\tred fox\nsub/2.jpg\twolf\n", 1, "found `red fox`", r#"["red fox", "wolf"]"#),
        ("0 1.jpg\n1 sub/2.jpg\n", 1, "stands before the path", "path first"),
        ("1.jpg 0 3\n", 1, "more than one label", "one label"),
        ("C:\\data\\1.jpg\t0\n", 1, "another machine", "`root`"),
        ("\\\\server\\share\\1.jpg\t0\n", 1, "another machine", "`root`"),
        ("https://example.org/1.jpg\t0\n", 1, "an address", "get the images"),
        ("file:///data/1.jpg\t0\n", 1, "an address", "without `file://`"),
        ("~/1.jpg\t0\n", 1, "home folder", "write it out"),
        ("# images\n1.jpg\n", 1, "no comments", "remove the line"),
        ("{\"path\": \"1.jpg\"}\n", 1, "JSON", "one path a line"),
        ("1.jpg 0\nsub/2.jpg 1\n1.jpg 1\n", 3, "and 0 on line 1", "one label"),
        ("1.jpg 1e3\n", 1, "decimal", "whole numbers"),
        ("1.jpg nan\n", 1, "found `nan`", ""),
        ("1.jpg \u{2212}1\nsub/2.jpg 0\n", 1, "U+2212, a minus sign", "digits alone"),
        ("1.jpg\t0\u{200b}\n", 1, "U+200B, a zero-width space", "digits alone"),
        ("1.jpg\t\u{ff11}\n", 1, "U+FF11, a wide digit", "digits alone"),
        ("$HOME/1.jpg\t0\n", 1, "not filled in", "`root`"),
        ("${DATA}/1.jpg\t0\n", 1, "not filled in", "`root`"),
        ("path,label\n1.jpg,0,7\n", 2, "3 fields", "double quotes"),
        ("path,label\n\"1.jpg,0\n", 2, "not closed", "close it"),
        ("path,label\n1.jpg,\n", 2, "label is empty", "remove the line"),
        ("path,label\n1.jpg,cat\nsub/2.jpg,dog\n", 2, "found `cat`", r#"["cat", "dog"]"#),
        ("path,label\n1.jpg,1\nsub/2.jpg,2\n", 2, "from 1 to 2", "take 1"),
        ("path,label\nsub\\2.jpg,0\n", 2, "as Windows writes it", "write `/`"),
        ("id,label\n1,0\n", 1, "none of them is a path", "`path`"),
        ("1.jpg 0\n\0\n", 2, "zero byte", "text file"),
    ] {
        let root = TempDir::new().unwrap();
        let refused = refusal(&list(root.path(), text));
        assert_eq!(refused.path, ["file"]);
        assert!(refused.message.contains(&format!("list.txt:{line}: ")), "{text:?}: {refused:?}");
        assert!(refused.message.contains(message), "{text:?}: {refused:?}");
        assert!(help(&refused).contains(way_out), "{text:?}: {refused:?}");
    }
    let wide: Vec<u8> = "\u{feff}1.jpg\t0\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let root = TempDir::new().unwrap();
    let refused = refusal(&list(root.path(), wide));
    assert!(refused.message.contains("UTF-16") && help(&refused).contains("UTF-8"), "{refused:?}");
}

#[test]
fn a_list_may_name_its_classes_and_hold_some_of_them() {
    let root = TempDir::new().unwrap();
    let open = |text: &str| {
        let mut dataset = list(root.path(), text);
        dataset.classes = Some(["cat", "dog", "red fox"].map(String::from).to_vec());
        dataset
    };
    let named = open("1.jpg dog\nsub/2.jpg\tred fox\n").open().unwrap();
    assert_eq!((named.label(0), named.label(1)), (Some(1), Some(2)));
    assert_eq!(named.classes().unwrap().len(), 3);
    assert_eq!(open("1.jpg 2\n").open().unwrap().label(0), Some(2));
    assert!(refusal(&open("1.jpg 3\n")).message.contains("names 3 classes"));
    assert!(help(&refusal(&open("1.jpg bird\n"))).contains("no such name"));
}

#[test]
fn a_list_says_what_it_leaves_aside() {
    let root = TempDir::new().unwrap();
    let notes = |text: &str| list(root.path(), text).open().unwrap().notes().join("\n");
    assert_eq!(notes("1.jpg 0\nsub/2.jpg 1\n"), "");
    assert!(notes("1.jpg\n1.jpg\n1.jpg\n").contains("2 lines name an image that was named before, such as `1.jpg`"));
    assert!(notes("path,kind\n1.jpg,0\n").contains("no labels; not read: `kind`"));
    assert_eq!(notes("path,label,kind\n1.jpg,0,7\n"), "");
}

#[test]
fn a_list_whose_paths_start_elsewhere_is_told_where() {
    let root = TempDir::new().unwrap();
    write(root.path(), "images/cat/1.jpg", "");
    write(root.path(), "lists/train.txt", "images/cat/1.jpg\t0\n");
    let open = |from: &Path| -> ImageList {
        serde_json::from_value(json!({ "file": root.path().join("lists/train.txt"), "root": from })).unwrap()
    };
    assert_eq!(open(root.path()).open().unwrap().len(), 1);
    let refused = refusal(&open(&root.path().join("images")));
    let there = root.path().canonicalize().unwrap().display().to_string();
    assert!(help(&refused).contains(&format!("root: {there}")), "{refused:?}");
}

#[test]
fn what_a_folder_leaves_out_is_said_with_counts() {
    let root = TempDir::new().unwrap();
    for path in [
        "cat/1.jpg",
        "cat/deep/2.jpg",
        "dog/3.jpg",
        "dog/4.PNG",
        "loose.jpg",
        "loose2.png",
        "readme.txt",
        ".ipynb_checkpoints/1-checkpoint.jpg",
        "__MACOSX/cat/._1.jpg",
        "@eaDir/1.jpg/SYNO.jpg",
        ".hidden/5.jpg",
        "$RECYCLE.BIN/6.jpg",
        "cat/.ipynb_checkpoints/1-checkpoint.jpg",
        "cat/@eaDir/7.jpg",
        "cat/._1.jpg",
        "cat/notes.txt",
        "dog/movie.gif",
        "dog/movie2.gif",
        "dog/Thumbs.db",
        "dog/.DS_Store",
    ] {
        write(root.path(), path, "");
    }
    let images = folder(root.path()).open().unwrap();
    assert_eq!(images.classes().unwrap(), ["cat", "dog"]);
    let expected = [("cat/1.jpg", 0), ("cat/deep/2.jpg", 0), ("dog/3.jpg", 1), ("dog/4.PNG", 1)];
    assert_eq!(entries(&*images, root.path()), expected.map(|(path, label)| (path.to_string(), Some(label))));
    let notes = images.notes();
    assert_eq!(notes.len(), 3, "{notes:?}");
    assert!(notes[0].contains("2 images lie beside") && notes[0].contains("`loose.jpg`"), "{notes:?}");
    assert!(notes[1].contains("7 folders") && notes[1].contains("`.hidden`"), "{notes:?}");
    assert!(notes[2].contains("3 files") && notes[2].contains("gif (2), txt (1)"), "{notes:?}");
}

#[test]
fn a_flat_folder_with_refuse_in_it_stays_flat() {
    let root = TempDir::new().unwrap();
    for path in ["1.jpg", "2.jpg", ".ipynb_checkpoints/1-checkpoint.jpg", "._1.jpg"] {
        write(root.path(), path, "");
    }
    let images = folder(root.path()).open().unwrap();
    assert_eq!(entries(&*images, root.path()), [("1.jpg".into(), None), ("2.jpg".into(), None)]);
    assert!(images.notes()[0].contains("1 folder of"), "{:?}", images.notes());
}

#[test]
fn parts_of_a_dataset_are_no_classes() {
    for folders in
        [&["train", "val"][..], &["Train", "Test"], &["train"], &["training", "validation", "other"], &["test"]]
    {
        let root = TempDir::new().unwrap();
        for name in folders {
            write(root.path(), &format!("{name}/cat/1.jpg"), "");
        }
        let refused = refusal(&folder(root.path()));
        assert_eq!(refused.path, ["root"]);
        assert!(refused.message.contains(&format!("`{}`", folders[0])), "{refused:?}");
        let part = root.path().join(folders[0]).display().to_string();
        assert!(help(&refused).contains(&format!("root: {part}`")), "{refused:?}");
    }
    // A train is a class among others, and so is a test.
    let root = TempDir::new().unwrap();
    for name in ["train", "tram"] {
        write(root.path(), &format!("{name}/1.jpg"), "");
    }
    assert_eq!(folder(root.path()).open().unwrap().classes().unwrap(), ["train", "tram"]);
}

#[test]
fn classes_that_may_not_be_meant_are_pointed_out() {
    let notes = |paths: &[&str]| {
        let root = TempDir::new().unwrap();
        for path in paths {
            write(root.path(), path, "");
        }
        folder(root.path()).open().unwrap().notes().join("\n")
    };
    assert!(notes(&["images/1.jpg", "images/2.jpg"]).contains("in one class, `images`"));
    let deeper = notes(&["images/cat/1.jpg", "images/dog/2.jpg"]);
    assert!(deeper.contains("the 2 folders in it are no classes; name `images` itself"), "{deeper}");
    assert!(notes(&["Cat/1.jpg", "cat/2.jpg", "dog/3.jpg"]).contains("`Cat` and `cat`"));
    let each: Vec<String> = (0..12).map(|index| format!("patient{index}/1.jpg")).collect();
    assert!(
        notes(&each.iter().map(String::as_str).collect::<Vec<_>>()).contains("each of the 12 classes has one image")
    );
    assert_eq!(notes(&["cat/1.jpg", "dog/2.jpg"]), "");
}

/// Runs what must not wait for anybody, and fails after ten seconds.
#[cfg(unix)]
fn at_once<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> T {
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::spawn(move || send.send(run()));
    receive.recv_timeout(std::time::Duration::from_secs(10)).expect("it waits")
}

/// A named pipe nobody writes to, a socket, a device that never ends, and links to them.
#[cfg(unix)]
fn no_files(root: &Path) -> Vec<(std::path::PathBuf, &'static str)> {
    use std::os::unix::{fs::symlink, net::UnixListener};

    let pipe = root.join("pipe.jpg");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let socket = root.join("socket.jpg");
    drop(UnixListener::bind(&socket).unwrap());
    let link = root.join("link.jpg");
    symlink(&pipe, &link).unwrap();
    let device = root.join("device.jpg");
    symlink("/dev/zero", &device).unwrap();
    vec![(pipe, "a named pipe"), (socket, "a socket"), (link, "a named pipe"), (device, "a device")]
}

#[cfg(unix)]
#[test]
fn what_is_no_file_is_refused_and_never_waited_for() {
    let root = TempDir::new().unwrap();
    for (path, what) in no_files(root.path()) {
        let error = at_once({
            let path = path.clone();
            move || crate::data::decode::read(&path).unwrap_err()
        });
        assert!(error.is_user_mistake() && error.to_string().contains(what), "{error}");
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");

        let options = |key: &str| json!({ key: path });
        let list: ImageList = serde_json::from_value(options("file")).unwrap();
        let folder: ImageFolder = serde_json::from_value(options("root")).unwrap();
        let packed: Idx = serde_json::from_value(options("images")).unwrap();
        for refused in at_once(move || [refusal(&list), refusal(&folder), refusal(&packed)]) {
            assert!(refused.message.contains(what), "{refused:?}");
        }
    }
    let folder = crate::data::decode::read(root.path()).unwrap_err();
    assert!(folder.to_string().contains("a folder"), "{folder}");
}

#[cfg(unix)]
#[test]
fn a_pipe_among_the_images_of_a_folder_is_named_when_it_is_read() {
    let root = TempDir::new().unwrap();
    fs::create_dir(root.path().join("class")).unwrap();
    no_files(&root.path().join("class"));
    let images = folder(root.path()).open().unwrap();
    assert_eq!(images.len(), 4);
    let errors = at_once(move || (0..4).map(|index| images.image(index).unwrap_err().to_string()).collect::<Vec<_>>());
    assert!(errors.iter().all(|error| error.contains("not a file")), "{errors:?}");
}

fn packed(bytes: &[u8]) -> Vec<u8> {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    packed.write_all(bytes).unwrap();
    packed.finish().unwrap()
}

#[test]
fn an_idx_file_is_unpacked_no_further_than_it_says_and_can_hold() {
    let root = TempDir::new().unwrap();
    let zeros = vec![0; 4 << 20];
    let big = idx_bytes(3, &[1_500_000, 28, 28], &zeros);
    for (images, message) in [
        // 1.2 GB announced in some kilobytes.
        (packed(&big), "packed images are not so small"),
        (big, "ends after 5349"),
        // 2^32 images of 4096 x 4096: more than any file holds.
        (packed(&idx_bytes(3, &[u32::MAX, 4096, 4096], &zeros)), "packed images are not so small"),
        // Four images announced, and megabytes after them.
        (packed(&idx_bytes(3, &[4, 28, 28], &zeros)), "goes on after the 4"),
        (idx_bytes(3, &[4, 28, 28], &zeros), "goes on after the 4"),
        (packed(&idx_bytes(3, &[6000, 28, 28], &zeros)), "ends after 5349"),
    ] {
        write(root.path(), "images", images);
        write(root.path(), "labels", idx_bytes(1, &[1], &[0]));
        let refused = refusal(&idx(root.path(), json!({})));
        assert_eq!(refused.path, ["images"]);
        assert!(refused.message.contains(message), "{refused:?}");
    }
    write(root.path(), "images", packed(&idx_bytes(3, &[2, 2, 2], &[7; 8])));
    write(root.path(), "labels", packed(&idx_bytes(1, &[90_000_000], &zeros)));
    assert!(refusal(&idx(root.path(), json!({}))).message.contains("packed images are not so small"));
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
