//! Files of many formats against Pillow, and files that are none.

use std::fs;
use std::path::Path;

use super::fixtures;
use crate::data::{DataError, decode};

#[test]
fn files_decode_to_what_pillow_makes_of_them() {
    let mut seen = 0;
    for entry in fs::read_dir(fixtures().join("decode")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if name.ends_with(".rgb") {
            continue;
        }
        seen += 1;
        let image = decode::read(&path).unwrap();
        assert_eq!(image.size(), if name.starts_with("one") { (1, 1) } else { (13, 9) }, "{name}");
        let expected = fs::read(path.with_file_name(format!("{name}.rgb"))).unwrap();
        // JPEG decoders may round differently; CMYK goes through a second rounding.
        let tolerance = if name == "cmyk.jpg" {
            6
        } else if name.ends_with(".jpg") {
            3
        } else {
            0
        };
        let difference = image.pixels.iter().zip(&expected).map(|(a, b)| a.abs_diff(*b)).max();
        assert_eq!(image.pixels.len(), expected.len(), "{name}");
        assert!(difference <= Some(tolerance), "{name}: {difference:?}");
    }
    assert_eq!(seen, 23);
}

#[test]
fn sixteen_bit_grey_keeps_its_upper_half() {
    let mut bytes = std::io::Cursor::new(Vec::new());
    let deep = image::ImageBuffer::<image::Luma<u16>, _>::from_raw(2, 1, vec![0x1234u16, 0xFFFF]).unwrap();
    deep.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    let image = decode::decode(bytes.get_ref(), Path::new("deep.png")).unwrap();
    assert_eq!(image.pixels, [0x12, 0x12, 0x12, 0xFF, 0xFF, 0xFF]);
}

#[test]
fn a_file_cut_short_anywhere_is_refused_by_name() {
    for name in
        ["rgb.jpg", "progressive.jpg", "restarts.jpg", "rgb.png", "rgb.bmp", "lossless.webp", "rgb.ppm", "lzw.tiff"]
    {
        let whole = fs::read(fixtures().join("decode").join(name)).unwrap();
        let is_jpeg = name.ends_with("jpg");
        for length in 0..whole.len() - 1 {
            let result = decode::decode(&whole[..length], Path::new("some/photo"));
            // Containers whose pixels are complete may lack closing bytes; a JPEG may not, as with Pillow.
            if !is_jpeg && length > whole.len() * 3 / 4 {
                continue;
            }
            let message = result.expect_err(name).to_string();
            assert!(message.contains("some/photo") && message.contains("on_error: skip"), "{message}");
        }
    }
    let whole = fs::read(fixtures().join("decode/rgb.jpg")).unwrap();
    let result = decode::decode(&whole[..whole.len() - 5], Path::new("x"));
    assert!(matches!(result, Err(DataError::Truncated { .. })), "{result:?}");
}

#[test]
fn damaged_files_never_panic() {
    for entry in fs::read_dir(fixtures().join("decode")).unwrap() {
        let path = entry.unwrap().path();
        let whole = fs::read(&path).unwrap();
        for at in (0..whole.len()).step_by(3) {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x55;
            if let Ok(image) = decode::decode(&damaged, &path) {
                assert_eq!(image.pixels.len(), image.width * image.height * 3);
            }
        }
    }
}

#[test]
fn what_is_no_image_says_so() {
    let message = |bytes: &[u8]| decode::decode(bytes, Path::new("a.jpg")).unwrap_err().to_string();
    assert!(message(b"").contains("empty"));
    assert!(message(b"This is not an image.\n").contains("no known format"));
    let missing = decode::read(Path::new("not/there.jpg")).unwrap_err();
    assert!(matches!(missing, DataError::Read { .. }) && missing.to_string().contains("not/there.jpg"));
}

#[test]
fn a_giant_image_is_refused_before_memory_is_taken() {
    let mut header = b"P6 60000 60000 255\n".to_vec();
    header.extend([0; 64]);
    let error = decode::decode(&header, Path::new("giant.ppm")).unwrap_err();
    assert!(matches!(error, DataError::TooLarge { width: 60_000, height: 60_000, .. }), "{error}");

    let mut jpeg = fs::read(fixtures().join("decode/rgb.jpg")).unwrap();
    let frame = jpeg.windows(2).position(|marker| marker == [0xFF, 0xC0]).unwrap();
    jpeg[frame + 5..frame + 9].copy_from_slice(&[0xFF, 0xFF, 0xFF, 0xFF]);
    let error = decode::decode(&jpeg, Path::new("giant.jpg")).unwrap_err();
    assert!(matches!(error, DataError::TooLarge { width: 65_535, .. }), "{error}");
}
