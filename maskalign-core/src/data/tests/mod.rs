//! The data side against Pillow and torchvision, and against itself.
//!
//! `tests/fixtures/data` is written by `scripts/make_data_fixtures.py`.

mod augmentations;
mod datasets;
mod decode;
mod loader;
mod transforms;

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::RgbImage;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/data")
}

fn oracle(part: &str) -> Value {
    let text = std::fs::read_to_string(fixtures().join("oracle.json")).unwrap();
    serde_json::from_str::<Value>(&text).unwrap()[part].take()
}

fn numbers<const N: usize>(value: &Value) -> [usize; N] {
    std::array::from_fn(|index| value[index].as_u64().unwrap() as usize)
}

/// The upper bytes of a linear congruential generator, the same in the script.
fn noise(width: usize, height: usize) -> RgbImage {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    let pixels = (0..width * height * 3).map(|_| next()).collect();
    RgbImage { width, height, pixels }
}

fn crc32(bytes: &[u8]) -> u64 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    u64::from(crc.sum())
}
