//! Files of many formats against Pillow, and files that are none.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::{crc32, fixtures};
use crate::data::{DataError, RgbImage, decode};

/// Every file of an archive that the scripts beside it wrote, by its name.
fn archive(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut archive = zip::ZipArchive::new(fs::File::open(path).unwrap()).unwrap();
    (0..archive.len())
        .map(|index| {
            let mut file = archive.by_index(index).unwrap();
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).unwrap();
            (file.name().unwrap().into_owned(), bytes)
        })
        .collect()
}

/// What is wrong with an image where Pillow gave `expected`.
fn difference(image: &RgbImage, size: (usize, usize), expected: &[u8]) -> Option<String> {
    if image.size() != size || image.pixels.len() != expected.len() {
        return Some(format!("{:?} instead of {size:?}", image.size()));
    }
    let most = image.pixels.iter().zip(expected).map(|(a, b)| a.abs_diff(*b)).max()?;
    let first = image.pixels.iter().zip(expected).position(|(a, b)| a != b)?;
    let (got, wanted) = (image.pixels[first], expected[first]);
    Some(format!("up to {most} levels, first at byte {first}: {got} instead of {wanted}"))
}

fn ending(name: &str) -> Option<&str> {
    Path::new(name).extension()?.to_str()
}

/// Every subsampling, colour space and way of coding, against Pillow's bytes. `MASKALIGN_JPEG_MATRIX` names a larger
/// archive of the same script.
#[test]
fn jpeg_files_decode_to_pillows_bytes() {
    let more = std::env::var_os("MASKALIGN_JPEG_MATRIX").map(PathBuf::from);
    for path in [Some(fixtures().join("jpeg_matrix.zip")), more].into_iter().flatten() {
        let files = archive(&path);
        let (mut seen, mut wrong) = (0, Vec::new());
        for (name, bytes) in files.iter().filter(|(name, _)| ending(name) == Some("jpg")) {
            seen += 1;
            let image = decode::decode(bytes, Path::new(name));
            let beside = |ending: &str| files.get(&format!("{name}.{ending}"));
            let difference = match image {
                Err(error) => beside("error").is_none().then(|| error.to_string()),
                Ok(_) if beside("error").is_some() => Some("it was read, and Pillow refuses it".into()),
                Ok(image) => match (beside("rgb"), beside("crc32")) {
                    (Some(pixels), _) => difference(&image, image.size(), pixels),
                    (None, Some(text)) => {
                        let got = format!("{} {} {}", image.width, image.height, crc32(&image.pixels));
                        (got.as_bytes() != text).then_some(got)
                    }
                    (None, None) => panic!("{name} has no expected pixels"),
                },
            };
            wrong.extend(difference.map(|difference| format!("{name}: {difference}")));
        }
        assert!(wrong.is_empty(), "{} of {seen} files differ:\n{}", wrong.len(), wrong.join("\n"));
        assert!(seen > 400, "{seen}");
    }
}

/// What Pillow reads and we refuse, with the remedy.
fn is_refused_here(name: &str) -> bool {
    let rare = ["tiff/lzma_", "tiff/zstd_", "tiff/group3.", "tiff/tiff_ccitt.", "tiff/lab_"];
    rare.iter().any(|start| name.starts_with(start))
}

/// Every mode, depth and tag of the other formats, against Pillow's bytes.
#[test]
fn files_of_every_mode_decode_to_pillows_bytes() {
    let files = archive(&fixtures().join("format_matrix.zip"));
    let (mut seen, mut wrong) = (0, Vec::new());
    for (name, bytes) in files.iter().filter(|(name, _)| !matches!(ending(name), Some("rgb" | "error"))) {
        seen += 1;
        let image = decode::decode(bytes, Path::new(name));
        let difference = match (image, files.get(&format!("{name}.rgb"))) {
            (Err(_), None) => None,
            (Err(error), Some(_)) if is_refused_here(name) && error.to_string().contains("save it as PNG") => None,
            (Err(error), Some(_)) => Some(error.to_string()),
            (Ok(_), None) => Some("it was read, and Pillow refuses it".into()),
            (Ok(image), Some(expected)) => {
                let (size, pixels) = expected.split_at(8);
                let side = |at: usize| u32::from_le_bytes(size[at..at + 4].try_into().unwrap()) as usize;
                difference(&image, (side(0), side(4)), pixels)
            }
        };
        wrong.extend(difference.map(|difference| format!("{name}: {difference}")));
    }
    assert!(wrong.is_empty(), "{} of {seen} files differ:\n{}", wrong.len(), wrong.join("\n"));
    assert!(seen > 400, "{seen}");
}

#[test]
fn files_decode_to_what_pillow_makes_of_them() {
    let mut seen = 0;
    for entry in fs::read_dir(fixtures().join("decode")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if ending(&name) == Some("rgb") {
            continue;
        }
        seen += 1;
        let image = decode::read(&path).unwrap();
        assert_eq!(image.size(), if name.starts_with("one") { (1, 1) } else { (13, 9) }, "{name}");
        let expected = fs::read(path.with_file_name(format!("{name}.rgb"))).unwrap();
        assert!(image.pixels == expected, "{name}: {:?}", difference(&image, image.size(), &expected));
    }
    assert_eq!(seen, 23);
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

/// Each of many strips is the whole file: reading them all would take the square of its size.
#[test]
fn strips_that_lie_over_each_other_are_refused() {
    const STRIPS: u32 = 20_000;
    let entries: [(u16, u32, u32); 10] = [
        (256, 1, 1),
        (257, 1, STRIPS),
        (258, 1, 8),
        (259, 1, 32_773),
        (262, 1, 1),
        // The bits of each byte turned, which takes a copy.
        (266, 1, 2),
        (273, STRIPS, 134),
        (277, 1, 1),
        (278, 1, 1),
        (279, STRIPS, 134 + 4 * STRIPS),
    ];
    let mut file = b"II*\0\x0a\0\0\0\0\x07".to_vec();
    file.extend((entries.len() as u16).to_le_bytes());
    for (tag, count, value) in entries {
        file.extend([tag.to_le_bytes(), 4u16.to_le_bytes()].concat());
        file.extend([count.to_le_bytes(), value.to_le_bytes()].concat());
    }
    file.resize(134, 0);
    file.extend(8u32.to_le_bytes().repeat(STRIPS as usize));
    file.extend((8 * STRIPS).to_le_bytes().repeat(STRIPS as usize));
    let error = decode::decode(&file, Path::new("photo")).unwrap_err().to_string();
    assert!(error.contains("lie over each other"), "{error}");
}

#[test]
fn damaged_files_never_panic() {
    for entry in fs::read_dir(fixtures().join("decode")).unwrap() {
        let path = entry.unwrap().path();
        let whole = fs::read(&path).unwrap();
        for at in (0..whole.len()).step_by(3) {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x55;
            check_damaged(&damaged, &path);
        }
    }
    for matrix in ["jpeg_matrix.zip", "format_matrix.zip"] {
        for (name, whole) in archive(&fixtures().join(matrix)) {
            for at in (0..whole.len().min(700)).step_by(97) {
                let mut damaged = whole.clone();
                damaged[at] ^= 1 << (at % 8);
                check_damaged(&damaged, Path::new(&name));
            }
        }
    }
}

fn check_damaged(bytes: &[u8], path: &Path) {
    match decode::decode(bytes, path) {
        Ok(image) => assert_eq!(image.pixels.len(), image.width * image.height * 3),
        Err(error) => assert!(!error.to_string().contains("panicked"), "{error}"),
    }
}

#[test]
fn what_is_no_image_says_so() {
    let message = |bytes: &[u8]| decode::decode(bytes, Path::new("a.jpg")).unwrap_err().to_string();
    assert!(message(b"").contains("empty"));
    assert!(message(b"This is not an image.\n").contains("no known format"));
    assert!(message(b"\n<!DOCTYPE html><html><head>404</head></html>").contains("a web page"));
    assert!(message(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n").contains("git lfs pull"));
    assert!(message(b"\0\0\0\x18ftypheic\0\0\0\0").contains("HEIC"));
    assert!(message(b"\0\0\0\x1cftypavif\0\0\0\0mif1").contains("Avif files are not read"));
    assert!(message(&[0; 100]).contains("zero bytes"));
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

/// A file of some hundred bytes whose header announces `side` pixels each way.
fn headers(side: u32) -> Vec<(&'static str, Vec<u8>)> {
    let (high, low) = (side.to_be_bytes(), side.to_le_bytes());
    let short = (&high[2..], &low[..2]);
    let chunk = |name: &[u8], data: &[u8]| {
        let named = [name, data].concat();
        let mut crc = flate2::Crc::new();
        crc.update(&named);
        [&(data.len() as u32).to_be_bytes()[..], &named, &crc.sum().to_be_bytes()].concat()
    };
    let header = [&high[..], &high, &[8, 2, 0, 0, 0]].concat();
    let png = [
        b"\x89PNG\r\n\x1a\n".to_vec(),
        chunk(b"IHDR", &header),
        chunk(b"IDAT", &[0x78, 0x9C, 1, 0, 0]),
        chunk(b"IEND", b""),
    ];
    let gif =
        [b"GIF89a", short.1, short.1, &[0, 0, 0, 0x2C, 0, 0, 0, 0], short.1, short.1, &[0, 8, 2, 0, 0x51, 0, 0x3B]];
    let bmp = [b"BM", &[0; 8][..], &[54, 0, 0, 0, 40, 0, 0, 0], &low, &low, &[1, 0, 24, 0], &[0; 24], &[7; 50]];
    let tag = |number: u8, value: [u8; 4]| [&[number, 1, 4, 0, 1, 0, 0, 0][..], &value].concat();
    let tiff = |compression: u8| {
        let tags = [
            tag(0, [low[0], low[1], low[2], low[3]]),
            tag(1, [low[0], low[1], low[2], low[3]]),
            tag(2, [8, 0, 0, 0]),
            tag(3, [compression, 0, 0, 0]),
            tag(6, [1, 0, 0, 0]),
            tag(17, [8, 0, 0, 0]),
            tag(23, [90, 0, 0, 0]),
        ];
        [b"II*\0\x08\0\0\0\x07\0".to_vec(), tags.concat(), vec![0; 4]].concat()
    };
    let mut jpeg = fs::read(fixtures().join("decode/rgb.jpg")).unwrap();
    let frame = jpeg.windows(2).position(|marker| marker == [0xFF, 0xC0]).unwrap();
    jpeg[frame + 5..frame + 7].copy_from_slice(short.0);
    jpeg[frame + 7..frame + 9].copy_from_slice(short.0);
    let mut progressive = fs::read(fixtures().join("decode/progressive.jpg")).unwrap();
    let frame = progressive.windows(2).position(|marker| marker == [0xFF, 0xC2]).unwrap();
    progressive[frame + 5..frame + 7].copy_from_slice(short.0);
    progressive[frame + 7..frame + 9].copy_from_slice(short.0);
    vec![
        ("png", png.concat()),
        ("gif", gif.concat()),
        ("bmp", bmp.concat()),
        ("tiff", tiff(1)),
        ("tiff lzw", tiff(5)),
        ("tiff deflate", tiff(8)),
        ("pgm", format!("P5 {side} {side} 255\n{}", "x".repeat(50)).into_bytes()),
        ("plain ppm", format!("P3 {side} {side} 255\n{}", "1 ".repeat(50)).into_bytes()),
        ("jpeg", jpeg),
        ("progressive", progressive),
    ]
}

#[test]
fn a_header_that_announces_more_than_the_file_holds_is_refused_at_once() {
    for (name, bytes) in headers(65_535) {
        let error = decode::decode(&bytes, Path::new(name)).unwrap_err();
        assert!(matches!(error, DataError::TooLarge { width: 65_535, height: 65_535, .. }), "{name}: {error}");
    }
    // Few enough pixels for the limit, and still far more than some hundred bytes hold.
    for (name, bytes) in headers(9000) {
        let start = std::time::Instant::now();
        let error = decode::decode(&bytes, Path::new(name)).unwrap_err();
        assert!(matches!(error, DataError::Truncated { .. }), "{name}: {error}");
        assert!(start.elapsed().as_millis() < 500, "{name}: {:?}", start.elapsed());
    }
}
