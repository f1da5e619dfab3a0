//! Every reader of files that others made, given files with edits: see `run.rs` for what it owes.

mod archive;
mod data;
mod images;
#[path = "../../../../maskalign-registry/tests/it/fuzz/run.rs"]
mod run;
mod runs;
mod tensors;
mod weights;

use std::{
    fs,
    path::{Path, PathBuf},
};

use run::{Random, edit_bytes};

/// The committed fixtures.
fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// The committed inputs of all targets.
fn committed() -> PathBuf {
    fixtures().join("fuzz")
}

/// Named fixtures, each below [`fixtures`].
fn seeds(paths: &[&str]) -> Vec<(String, Vec<u8>)> {
    let read = |path: &&str| ((*path).to_owned(), fs::read(fixtures().join(path)).expect("a fixture"));
    paths.iter().map(read).collect()
}

/// No edit that knows a format.
fn no_edit(_: &[u8], _: &mut Random) -> Option<Vec<u8>> {
    None
}

/// An edit of a part of a file.
fn edited(part: &[u8], random: &mut Random) -> Vec<u8> {
    let mut edited = part.to_vec();
    edit_bytes(&mut edited, part, random);
    edited
}

/// The number of `size` bytes at `at`, little end first.
fn little(bytes: &[u8], at: usize, size: usize) -> Option<usize> {
    let part = bytes.get(at..at.checked_add(size)?)?;
    Some(part.iter().rev().fold(0, |value, &byte| value << 8 | usize::from(byte)))
}

/// The number of `size` bytes at `at`, big end first.
fn big(bytes: &[u8], at: usize, size: usize) -> Option<usize> {
    let part = bytes.get(at..at.checked_add(size)?)?;
    Some(part.iter().fold(0, |value, &byte| value << 8 | usize::from(byte)))
}

/// The checksum of gzip, zip and PNG.
fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}
