//! Image files, a target for each format.

use std::{
    cell::RefCell,
    fs::File,
    io::{Read, Write},
    panic,
    path::Path,
    sync::Once,
};

use flate2::{Compression, read::ZlibDecoder, write::ZlibEncoder};
use maskalign_core::data::{DataError, decode};

use super::{
    big, committed, crc32, edited, fixtures, little, no_edit,
    run::{Outcome, Random, Target, any_number, edit_field, files_in},
};

/// Every file of these endings in the fixtures, the small ones.
fn seeds(endings: &[&str]) -> Vec<(String, Vec<u8>)> {
    let wanted = |name: &str| endings.iter().any(|ending| name.ends_with(&format!(".{ending}")));
    let mut found = files_in(&fixtures().join("data/decode"));
    found.retain(|(name, _)| wanted(name));
    for archive in ["format_matrix.zip", "jpeg_matrix.zip"] {
        let file = File::open(fixtures().join("data").join(archive)).expect("a fixture");
        let mut archive = zip::ZipArchive::new(file).expect("an archive");
        for index in 0..archive.len() {
            let mut entry = archive.by_index(index).expect("an entry");
            let name = entry.name().expect("a name").into_owned();
            if wanted(&name) && entry.size() < 4096 {
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes).expect("an entry");
                found.push((name, bytes));
            }
        }
    }
    assert!(found.len() > 5, "{endings:?}: {} files", found.len());
    found
}

thread_local! {
    /// Where a decoder panicked last.
    static PANICKED: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Notes where decoders panic, in place of telling it.
fn note_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let default = panic::take_hook();
        panic::set_hook(Box::new(move |info| match decode::is_guarded() {
            true => PANICKED.set(info.location().map(|place| place.file().to_owned()).unwrap_or_default()),
            false => default(info),
        }));
    });
}

/// Decodes, and holds what comes out against what the file says: `size` reads it from the header where that is simple.
fn read(bytes: &[u8], size: &dyn Fn(&[u8]) -> Option<(usize, usize)>) -> Outcome {
    match decode::decode(bytes, Path::new("photo")) {
        Ok(image) => {
            assert_eq!(image.pixels.len(), image.width * image.height * 3);
            assert!(image.width * image.height <= decode::MAX_PIXELS && !image.pixels.is_empty());
            if let Some(size) = size(bytes) {
                assert_eq!(image.size(), size);
            }
            Outcome::Accepted(image.pixels.len() as u64)
        }
        Err(error) => {
            assert!(error.is_user_mistake(), "{error:?}");
            let is_of_content = |error: &DataError| {
                matches!(error, DataError::Decode { .. } | DataError::Truncated { .. } | DataError::TooLarge { .. })
            };
            assert!(is_of_content(&error), "{error:?}");
            let message = error.to_string();
            // What a library panics on is refused; what is our own does not panic.
            let place = if message.contains(decode::GAVE_UP) { PANICKED.take() } else { String::new() };
            assert!(!place.contains("maskalign"), "it panicked at {place}");
            Outcome::Refused(message)
        }
    }
}

struct Format<'a> {
    name: &'a str,
    endings: &'a [&'a str],
    edit: &'a dyn Fn(&[u8], &mut Random) -> Option<Vec<u8>>,
    mend: &'a dyn Fn(Vec<u8>) -> Vec<u8>,
    /// Width and height, from where the format has them.
    size: &'a dyn Fn(&[u8]) -> Option<(usize, usize)>,
    memory: &'a dyn Fn(&[u8], u64) -> u64,
    cases: u64,
}

impl Format<'_> {
    fn run(self) {
        note_panics();
        Target {
            name: self.name,
            committed: &committed(),
            seeds: seeds(self.endings),
            edit: self.edit,
            mend: self.mend,
            read: &|bytes| read(bytes, self.size),
            memory: self.memory,
            cases: self.cases,
            most_bytes: 32 << 10,
        }
        .run();
    }
}

/// The chunks of a PNG behind its first eight bytes.
fn chunks(bytes: &[u8]) -> Vec<([u8; 4], Vec<u8>)> {
    let mut found = Vec::new();
    let mut at = 8;
    while let (Some(length), Some(kind)) = (big(bytes, at, 4), bytes.get(at + 4..at + 8)) {
        let data = bytes[at + 8..].iter().take(length).copied().collect();
        found.push(([kind[0], kind[1], kind[2], kind[3]], data));
        at = at.saturating_add(12).saturating_add(length);
    }
    found
}

fn png_of(chunks: &[([u8; 4], Vec<u8>)]) -> Vec<u8> {
    let mut bytes = b"\x89PNG\r\n\x1a\n".to_vec();
    for (kind, data) in chunks {
        bytes.extend((data.len() as u32).to_be_bytes());
        let start = bytes.len();
        bytes.extend(kind);
        bytes.extend(data);
        bytes.extend(crc32(&bytes[start..]).to_be_bytes());
    }
    bytes
}

fn unpacked(packed: &[u8]) -> Vec<u8> {
    let mut data = Vec::new();
    let _ = ZlibDecoder::new(packed).take(1 << 20).read_to_end(&mut data);
    data
}

fn packed(data: &[u8]) -> Vec<u8> {
    let mut packer = ZlibEncoder::new(Vec::new(), Compression::fast());
    packer.write_all(data).and_then(|()| packer.finish()).expect("memory does not fail")
}

fn edit_png(bytes: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    const KINDS: [&[u8; 4]; 12] =
        [b"PLTE", b"tRNS", b"IDAT", b"IEND", b"iCCP", b"zTXt", b"iTXt", b"gAMA", b"acTL", b"fcTL", b"eXIf", b"sBIT"];
    let mut chunks = chunks(bytes);
    let at = random.below(chunks.len());
    match random.below(8) {
        0 => {
            let chunk = chunks.get(at)?.clone();
            chunks.insert(random.below(chunks.len()), chunk);
        }
        1 => {
            (at < chunks.len()).then(|| chunks.remove(at))?;
        }
        2 => chunks.get_mut(at)?.0 = **random.pick(&KINDS),
        3 => {
            // A text or a profile that unpacks to far more.
            let data = [b"a\0\0".to_vec(), packed(&vec![b' '; 1 << random.below(21)])].concat();
            chunks.insert(1.min(chunks.len()), (**random.pick(&KINDS), data));
        }
        4 => {
            let (_, data) = chunks.iter_mut().find(|(kind, _)| kind == b"IDAT")?;
            *data = packed(&edited(&unpacked(data), random));
        }
        5 | 6 => {
            let (_, header) = chunks.first_mut().filter(|(_, header)| header.len() == 13)?;
            match random.below(3) {
                0 => header[8] = *random.pick(&[1, 2, 4, 8, 16]),
                1 => header[9] = *random.pick(&[0, 2, 3, 4, 6]),
                _ => {
                    let place = random.below(12);
                    edit_field(header, place, random);
                }
            }
        }
        _ => {
            let (_, data) = chunks.get_mut(at)?;
            *data = edited(data, random);
        }
    }
    Some(png_of(&chunks))
}

fn mend_png(bytes: Vec<u8>) -> Vec<u8> {
    match bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
        true => png_of(&chunks(&bytes)),
        false => bytes,
    }
}

#[test]
fn png() {
    Format {
        name: "png",
        endings: &["png"],
        edit: &edit_png,
        mend: &mend_png,
        size: &|bytes| Some((big(bytes, 16, 4)?, big(bytes, 20, 4)?)),
        memory: &|bytes, accepted| (34 << 20) + 4096 * bytes.len() as u64 + 12 * accepted,
        cases: 2_000,
    }
    .run();
}

/// The segments of a JPEG before its first scan's data: the marker and what follows its length; and all that is left.
fn segments(bytes: &[u8]) -> (Vec<(u8, Vec<u8>)>, &[u8]) {
    let mut found = Vec::new();
    let mut at = 2;
    while let (Some(&0xFF), Some(&marker), Some(length)) = (bytes.get(at), bytes.get(at + 1), big(bytes, at + 2, 2)) {
        let Some(data) = bytes.get(at + 4..at + 2 + length.max(2)) else { break };
        found.push((marker, data.to_vec()));
        at += 2 + length.max(2);
        if marker == 0xDA {
            break;
        }
    }
    (found, bytes.get(at..).unwrap_or_default())
}

fn jpeg_of(segments: &[(u8, Vec<u8>)], rest: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0xFF, 0xD8];
    for (marker, data) in segments {
        bytes.extend([0xFF, *marker]);
        bytes.extend((data.len() as u16 + 2).to_be_bytes());
        bytes.extend(data);
    }
    bytes.extend(rest);
    bytes
}

fn edit_jpeg(bytes: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    const MARKERS: [u8; 16] =
        [0xC0, 0xC1, 0xC2, 0xC3, 0xC4, 0xC9, 0xCC, 0xDA, 0xDB, 0xDC, 0xDD, 0xE0, 0xE1, 0xE2, 0xEE, 0xFE];
    let (mut segments, rest) = segments(bytes);
    let at = random.below(segments.len());
    let frame = segments.iter().position(|(marker, _)| (0xC0..=0xC2).contains(marker));
    match random.below(9) {
        0 => {
            let segment = segments.get(at)?.clone();
            segments.insert(random.below(segments.len()), segment);
        }
        1 => {
            (at < segments.len()).then(|| segments.remove(at))?;
        }
        2 => segments.get_mut(at)?.0 = *random.pick(&MARKERS),
        // Rows and columns, samplings, the number of components.
        3 => edit_field(segments.get_mut(frame?)?.1.get_mut(1..5)?, random.below(2) * 2, random),
        4 => {
            let data = &mut segments.get_mut(frame?)?.1;
            let component = random.below(data.len().saturating_sub(6) / 3);
            let sampling =
                *random.pick(&[0x11, 0x12, 0x21, 0x22, 0x14, 0x41, 0x42, 0x31, 0x13, 0x44, 0x10, 0x01, 0xFF]);
            *data.get_mut(7 + 3 * component)? = sampling;
        }
        5 => *segments.get_mut(frame?)?.1.get_mut(5)? = random.below(6) as u8,
        6 => segments.insert(at, (0xDD, (random.below(70) as u16).to_be_bytes().to_vec())),
        7 => {
            // The first scan once more, before the end of the image.
            let scan = jpeg_of(&segments[segments.len().checked_sub(1)?..], rest);
            let whole = jpeg_of(&segments, rest);
            let end = whole.len().saturating_sub(2);
            let times = 1 + random.below(30);
            return Some([&whole[..end], &scan[2..scan.len().saturating_sub(2)].repeat(times), &whole[end..]].concat());
        }
        _ => {
            let (_, data) = segments.get_mut(at)?;
            *data = edited(data, random);
            data.truncate(65_533);
        }
    }
    Some(jpeg_of(&segments, rest))
}

/// Ends a JPEG with its last marker: without it nothing is looked at.
fn mend_jpeg(mut bytes: Vec<u8>) -> Vec<u8> {
    if !bytes.ends_with(&[0xFF, 0xD9]) {
        bytes.extend([0xFF, 0xD9]);
    }
    bytes
}

#[test]
fn jpeg() {
    Format {
        name: "jpeg",
        endings: &["jpg"],
        edit: &edit_jpeg,
        mend: &mend_jpeg,
        size: &|_| None,
        memory: &|bytes, accepted| (1 << 20) + (16 << 10) * bytes.len() as u64 + 12 * accepted,
        cases: 2_000,
    }
    .run();
}

#[test]
fn gif() {
    Format {
        name: "gif",
        endings: &["gif"],
        edit: &no_edit,
        mend: &|bytes| bytes,
        size: &|_| None,
        // A palette of greys is added where a file has none, and counts as much as the file.
        memory: &|bytes, accepted| (8 << 20) + 8192 * bytes.len() as u64 + 8 * accepted,
        cases: 2_000,
    }
    .run();
}

fn edit_bmp(bytes: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    // The start of pixels, the size of the header; width, height, bits, compression, colours; masks.
    const FIELDS: [(usize, usize); 12] =
        [(10, 4), (14, 4), (18, 4), (22, 4), (18, 2), (20, 2), (28, 2), (30, 4), (46, 4), (54, 4), (58, 4), (62, 4)];
    let &(at, size) = random.pick(&FIELDS);
    let new = match at {
        14 => *random.pick(&[12, 16, 40, 52, 56, 64, 108, 124, 255]),
        28 => *random.pick(&[1, 2, 4, 8, 16, 24, 32]),
        30 => *random.pick(&[0, 1, 2, 3, 4, 6]),
        _ => any_number(little(bytes, at, size)? as u64, size, random),
    };
    let mut bytes = bytes.to_vec();
    bytes.get_mut(at..at + size)?.copy_from_slice(&new.to_le_bytes()[..size]);
    Some(bytes)
}

fn bmp_size(bytes: &[u8]) -> Option<(usize, usize)> {
    match little(bytes, 14, 4)? {
        12 => Some((little(bytes, 18, 2)?, little(bytes, 20, 2)?)),
        _ => Some((little(bytes, 18, 4)?, (little(bytes, 22, 4)? as u32 as i32).unsigned_abs() as usize)),
    }
}

/// The pixels of a size, as far as they are allowed.
fn pixels(size: Option<(usize, usize)>) -> u64 {
    let (width, height) = size.unwrap_or_default();
    width.saturating_mul(height).min(decode::MAX_PIXELS) as u64
}

#[test]
fn bmp() {
    Format {
        name: "bmp",
        endings: &["bmp"],
        edit: &edit_bmp,
        mend: &|bytes| bytes,
        size: &bmp_size,
        // Run lengths leave out what they like.
        memory: &|bytes, accepted| (1 << 20) + 2048 * bytes.len() as u64 + 4 * pixels(bmp_size(bytes)) + 4 * accepted,
        cases: 2_500,
    }
    .run();
}

/// Edits the directory: the tag, the type, the count or the value of an entry.
fn edit_tiff(bytes: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    const TAGS: [u16; 23] = [
        256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 338, 339, 347, 530,
        512,
    ];
    const VALUES: [u32; 24] = [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
        16,
        32,
        64,
        128,
        200,
        255,
        999,
        9_000,
        32_773,
        32_946,
        65_535,
        65_536,
        1 << 24,
        1 << 31,
        u32::MAX,
    ];
    let is_big_end = bytes.starts_with(b"MM");
    let number = |at: usize, size: usize| if is_big_end { big(bytes, at, size) } else { little(bytes, at, size) };
    if number(2, 2)? != 42 {
        return None;
    }
    let start = number(4, 4)?;
    let entries = number(start, 2)?;
    let at = start + 2 + 12 * random.below(entries);
    let mut bytes = bytes.to_vec();
    let mut set = |at: usize, size: usize, value: u32| {
        let place = bytes.get_mut(at..at + size)?;
        place.copy_from_slice(&value.to_le_bytes()[..size]);
        if is_big_end {
            place.reverse();
        }
        Some(())
    };
    match random.below(6) {
        0 => set(at, 2, (*random.pick(&TAGS)).into())?,
        1 => set(at + 2, 2, 1 + random.below(18) as u32)?,
        2 => set(at + 4, 4, *random.pick(&VALUES))?,
        3 => set(at + 8, 2, *random.pick(&VALUES))?,
        4 => set(at + 8, 4, *random.pick(&VALUES))?,
        _ => {
            // One entry in place of another: a tag that was not there.
            set(at, 2, (*random.pick(&TAGS)).into())?;
            set(at + 2, 2, *random.pick(&[3, 4]))?;
            set(at + 4, 4, 1)?;
            set(at + 8, 4, *random.pick(&VALUES))?;
        }
    }
    Some(bytes)
}

#[test]
fn tiff() {
    Format {
        name: "tiff",
        endings: &["tif", "tiff"],
        edit: &edit_tiff,
        mend: &|bytes| bytes,
        size: &|_| None,
        memory: &|bytes, accepted| (1 << 20) + (64 << 10) * bytes.len() as u64 + 12 * accepted,
        cases: 3_000,
    }
    .run();
}

/// Writes the length that a RIFF file has.
fn mend_webp(mut bytes: Vec<u8>) -> Vec<u8> {
    if bytes.starts_with(b"RIFF") && bytes.len() >= 20 {
        let length = bytes.len() as u32 - 8;
        bytes[4..8].copy_from_slice(&length.to_le_bytes());
    }
    bytes
}

/// The pixels of every size that a WebP file tells: those of the canvas and of each picture.
fn webp_pixels(bytes: &[u8]) -> u64 {
    let packed = |bits: usize| ((bits & 0x3fff) + 1, (bits >> 14 & 0x3fff) + 1);
    let size = |at: usize| match &bytes[at..] {
        [b'V', b'P', b'8', b'L', ..] => Some(packed(little(bytes, at + 9, 4)?)),
        [b'V', b'P', b'8', b'X', ..] => Some((little(bytes, at + 12, 3)? + 1, little(bytes, at + 15, 3)? + 1)),
        [0x9d, 0x01, 0x2a, ..] => Some((little(bytes, at + 3, 2)? & 0x3fff, little(bytes, at + 5, 2)? & 0x3fff)),
        _ => None,
    };
    (0..bytes.len()).map(|at| pixels(size(at))).sum()
}

#[test]
fn webp() {
    Format {
        name: "webp",
        endings: &["webp"],
        edit: &no_edit,
        mend: &mend_webp,
        size: &|_| None,
        // An image of one colour takes a few bytes, whatever its size, and so do the library's tables of codes.
        memory: &|bytes, accepted| (64 << 20) + 8192 * bytes.len() as u64 + 16 * webp_pixels(bytes) + 12 * accepted,
        cases: 1_500,
    }
    .run();
}

#[test]
fn pnm() {
    Format {
        name: "pnm",
        endings: &["pbm", "pgm", "ppm", "pnm"],
        edit: &no_edit,
        mend: &|bytes| bytes,
        size: &|_| None,
        memory: &|bytes, accepted| (1 << 20) + 256 * bytes.len() as u64 + 4 * accepted,
        cases: 2_500,
    }
    .run();
}
