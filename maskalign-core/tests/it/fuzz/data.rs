//! Lists of images, and files in MNIST's format, packed or not.

use std::{fs, io::Read as _};

use flate2::{Compression, bufread::MultiGzDecoder, write::GzEncoder};
use maskalign_core::data::{
    Dataset, Images,
    datasets::{Idx, ImageList},
};
use maskalign_registry::Refusal;

use super::{
    big, committed, edited, no_edit,
    run::{Outcome, Random, Target, any_number},
};

/// What a refusal says, with the way out.
fn said(refusal: &Refusal) -> String {
    assert!(!refusal.path.is_empty() && !refusal.message.trim().is_empty(), "{refusal:?}");
    refusal.to_string()
}

/// Reads every image, its name and its label.
fn check_images(images: &dyn Images) {
    assert!(!images.is_empty());
    for index in 0..images.len() {
        assert!(!images.name(index).is_empty());
        images.label(index);
    }
    assert_eq!(images.fingerprint().len(), 64);
}

/// An idx file of bytes.
fn idx(sides: &[u32]) -> Vec<u8> {
    let count: u32 = sides.iter().product();
    let mut bytes = vec![0, 0, 8, sides.len() as u8];
    for side in sides {
        bytes.extend(side.to_be_bytes());
    }
    bytes.extend((0..count).map(|value| (value % 7) as u8));
    bytes
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packer = GzEncoder::new(Vec::new(), Compression::default());
    std::io::Write::write_all(&mut packer, bytes).and_then(|()| packer.finish()).expect("memory does not fail")
}

/// The content of a file that may be packed, as far as it can be read.
fn plain(bytes: &[u8]) -> Vec<u8> {
    if !bytes.starts_with(&[0x1f, 0x8b]) {
        return bytes.to_vec();
    }
    let mut content = Vec::new();
    let _ = MultiGzDecoder::new(bytes).take(64 << 20).read_to_end(&mut content);
    content
}

/// Edits the header or the content, and packs it again where it was packed.
fn edit_idx(bytes: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    let is_packed = bytes.starts_with(&[0x1f, 0x8b]);
    let mut content = plain(bytes);
    if random.one_in(2) {
        let at = *random.pick(&[0, 4, 8, 12]);
        let number = any_number(big(&content, at, 4)? as u64, 4, random) as u32;
        content.get_mut(at..at + 4)?.copy_from_slice(&number.to_be_bytes());
    } else {
        content = edited(&content, random);
    }
    Some(match (is_packed, random.one_in(8)) {
        (true, false) => gzip(&content),
        // In two pieces, as `cat a.gz b.gz` makes it.
        (true, true) => {
            let (first, second) = content.split_at(random.below(content.len()));
            [gzip(first), gzip(second)].concat()
        }
        (false, true) => gzip(&content),
        (false, false) => content,
    })
}

#[test]
fn idx_files() {
    let folder = tempfile::tempdir().expect("a folder");
    let (images, labels, known) =
        (folder.path().join("images"), folder.path().join("labels"), folder.path().join("known"));
    fs::write(&known, idx(&[6, 2, 3])).expect("it is written");
    let open = |images: &std::path::Path, labels: Option<&std::path::Path>| {
        let text = |path: &std::path::Path| path.to_str().expect("text").to_owned();
        let options = Idx { images: text(images), labels: labels.map(text), classes: None, skip: 0, limit: None };
        options.open()
    };
    let files = [idx(&[6, 2, 3]), idx(&[1, 28, 28]), idx(&[6])];
    let seeds = files.iter().enumerate().flat_map(|(number, file)| {
        [(format!("plain {number}"), file.clone()), (format!("packed {number}"), gzip(file))]
    });
    Target {
        name: "idx",
        committed: &committed(),
        seeds: seeds.collect(),
        edit: &edit_idx,
        mend: &|bytes| bytes,
        read: &|bytes| {
            fs::write(&images, bytes).expect("it is written");
            fs::write(&labels, bytes).expect("it is written");
            let content = plain(bytes);
            let of_images = open(&images, None).map(|found| {
                check_images(&*found);
                let side = |number: usize| big(&content, 4 + 4 * number, 4).expect("a header");
                assert_eq!(Some((side(2), side(1))), found.size());
                assert_eq!((found.len(), content.len()), (side(0), 16 + side(0) * side(1) * side(2)));
                for index in [0, found.len() - 1] {
                    let image = found.image(index).expect("it is in memory");
                    let start = 16 + index * side(1) * side(2);
                    assert!(image.pixels.iter().step_by(3).eq(&content[start..start + side(1) * side(2)]));
                }
                content.len() as u64
            });
            let of_labels = open(&known, Some(&labels)).map(|found| {
                let labels = (0..found.len()).map(|index| found.label(index).expect("a label"));
                assert!(labels.eq(content[8..].iter().map(|label| u32::from(*label))));
                content.len() as u64
            });
            match (of_images, of_labels) {
                (Ok(bytes), Err(refusal)) | (Err(refusal), Ok(bytes)) => {
                    assert!(!said(&refusal).is_empty());
                    Outcome::Accepted(bytes)
                }
                (Err(images), Err(labels)) => Outcome::Refused(format!("{}\n{}", said(&images), said(&labels))),
                (Ok(_), Ok(_)) => panic!("images and labels in one"),
            }
        },
        memory: &|bytes, accepted| (65 << 20) + 4096 * bytes.len() as u64 + 8 * accepted,
        cases: 1_500,
        most_bytes: 32 << 10,
    }
    .run();
}

/// The committed lists, and files for each path in them.
#[test]
fn lists() {
    let folder = tempfile::tempdir().expect("a folder");
    for name in ["a.jpg", "b.jpg", "c d.jpg", "e,f.png", "g.jpg"] {
        fs::create_dir_all(folder.path().join("images")).expect("a folder");
        fs::write(folder.path().join("images").join(name), b"").expect("a file");
    }
    let list = folder.path().join("list.txt");
    let options = |classes: Option<&[&str]>| ImageList {
        file: list.to_str().expect("text").to_owned(),
        root: Some(folder.path().to_str().expect("text").to_owned()),
        classes: classes.map(|names| names.iter().map(|name| (*name).to_owned()).collect()),
    };
    Target {
        name: "list",
        committed: &committed(),
        // The committed ones, which name files that are there.
        seeds: Vec::new(),
        edit: &no_edit,
        mend: &|bytes| bytes,
        read: &|bytes| {
            fs::write(&list, bytes).expect("it is written");
            let lines = bytes.split(|byte| matches!(byte, b'\n' | b'\r')).count();
            let check = |found: &dyn Images| {
                check_images(found);
                assert!(found.len() <= lines, "{} images in {lines} lines", found.len());
                let labels: Vec<Option<u32>> = (0..found.len()).map(|index| found.label(index)).collect();
                assert!(labels.iter().all(|label| label.is_some() == labels[0].is_some()));
                found.notes().iter().for_each(|note| assert!(!note.chars().any(char::is_control), "{note:?}"));
                labels
            };
            let named = options(Some(&["stripes", "blobs", "dots"])).open();
            match &named {
                Ok(found) => assert!(check(&**found).iter().flatten().all(|label| *label < 3)),
                Err(refusal) => assert!(!said(refusal).is_empty()),
            }
            match options(None).open() {
                Ok(found) => {
                    // Labels go from 0 on without a gap.
                    let mut labels: Vec<u32> = check(&*found).into_iter().flatten().collect();
                    labels.sort_unstable();
                    labels.dedup();
                    assert!(labels.iter().copied().eq(0..labels.len() as u32), "{labels:?}");
                    Outcome::Accepted(0)
                }
                Err(_) if named.is_ok() => Outcome::Accepted(0),
                Err(refusal) => Outcome::Refused(said(&refusal)),
            }
        },
        memory: &|bytes, _| (1 << 20) + 512 * bytes.len() as u64,
        cases: 2_000,
        most_bytes: 32 << 10,
    }
    .run();
}
