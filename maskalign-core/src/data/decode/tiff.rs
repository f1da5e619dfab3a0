//! The first image of a TIFF as Pillow reads it.
//!
//! The kinds of samples are Pillow's table (`TiffImagePlugin.OPEN_INFO`); the orientation tag is applied, as Pillow does
//! for this format alone. Packed with LZW, deflate, PackBits, JPEG, CCITT group 4, or not at all.

use std::io::Read;

use flate2::read::ZlibDecoder;
use weezl::BitOrder;

use super::colour::{Palette, cmyk_to_rgb, pillow_ycc_to_rgb, unpack, ycc_to_rgb};
use super::{MAX_DECODER_BYTES, Unreadable, check_fits, check_size, jpeg, most_per_byte};
use crate::data::RgbImage;

/// Tags that are read, by their numbers.
mod tag {
    pub(super) const WIDTH: u16 = 256;
    pub(super) const HEIGHT: u16 = 257;
    pub(super) const BITS: u16 = 258;
    pub(super) const COMPRESSION: u16 = 259;
    pub(super) const PHOTOMETRIC: u16 = 262;
    pub(super) const FILL_ORDER: u16 = 266;
    pub(super) const STRIP_OFFSETS: u16 = 273;
    pub(super) const ORIENTATION: u16 = 274;
    pub(super) const SAMPLES: u16 = 277;
    pub(super) const ROWS_PER_STRIP: u16 = 278;
    pub(super) const STRIP_BYTES: u16 = 279;
    pub(super) const PLANAR: u16 = 284;
    pub(super) const PREDICTOR: u16 = 317;
    pub(super) const COLOUR_MAP: u16 = 320;
    pub(super) const TILE_WIDTH: u16 = 322;
    pub(super) const TILE_HEIGHT: u16 = 323;
    pub(super) const TILE_OFFSETS: u16 = 324;
    pub(super) const TILE_BYTES: u16 = 325;
    pub(super) const EXTRA_SAMPLES: u16 = 338;
    pub(super) const SAMPLE_FORMAT: u16 = 339;
    pub(super) const JPEG_TABLES: u16 = 347;
    pub(super) const CHROMA_SAMPLING: u16 = 530;
}

/// Values of the tag of compression.
const PLAIN: usize = 1;
const GROUP_4: usize = 4;
const LZW: usize = 5;
const JPEG: usize = 7;
const DEFLATE: usize = 8;
const OLD_DEFLATE: usize = 32_946;
const PACK_BITS: usize = 32_773;

/// More samples a pixel than any image that can be read has.
const MAX_SAMPLES: usize = 6;

/// Files whose strips have no lengths let each go on to the end; of others, some share a tile.
const MOST_OVERLAP: usize = 64;

/// The numbers of the tags of one directory.
struct Directory<'a> {
    bytes: &'a [u8],
    big_endian: bool,
    /// Number, type, count, and where the values lie.
    entries: Vec<(u16, u16, usize, usize)>,
}

impl<'a> Directory<'a> {
    fn first(bytes: &'a [u8]) -> Result<Self, Unreadable> {
        let mut directory = Self { bytes, big_endian: bytes.starts_with(b"MM"), entries: Vec::new() };
        let is_big = directory.number(2, 2)? == 43;
        // Sizes of an offset, of the number of entries, and of an entry.
        let (offset, count, entry) = if is_big { (8, 8, 20) } else { (4, 2, 12) };
        let start = directory.number(if is_big { 8 } else { 4 }, offset)? as usize;
        let entries = directory.number(start, count)? as usize;
        if entries > bytes.len() / entry {
            return Err(Unreadable::Truncated);
        }
        for index in 0..entries {
            let at = start + count + index * entry;
            let (number, kind) = (directory.number(at, 2)? as u16, directory.number(at + 2, 2)? as u16);
            let values = directory.number(at + 4, offset)? as usize;
            let place = at + 4 + offset;
            let fits = values.saturating_mul(size_of_type(kind)) <= offset;
            let place = if fits { place } else { directory.number(place, offset)? as usize };
            directory.entries.push((number, kind, values, place));
        }
        Ok(directory)
    }

    /// The unsigned number of `size` bytes at `at`.
    fn number(&self, at: usize, size: usize) -> Result<u64, Unreadable> {
        let part = at.checked_add(size).and_then(|end| self.bytes.get(at..end)).ok_or(Unreadable::Truncated)?;
        Ok(if self.big_endian {
            part.iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
        } else {
            part.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
        })
    }

    /// The values of a tag, none where it is not there.
    fn values(&self, number: u16) -> Result<Vec<usize>, Unreadable> {
        let Some(&(_, kind, count, place)) = self.entries.iter().find(|entry| entry.0 == number) else {
            return Ok(Vec::new());
        };
        let size = size_of_type(kind);
        let end = count.checked_mul(size).and_then(|length| length.checked_add(place));
        if size == 0 || end.is_none_or(|end| end > self.bytes.len()) {
            return Err(Unreadable::Broken(format!("its tag {number} is damaged")));
        }
        (0..count).map(|index| Ok(self.number(place + index * size, size)? as usize)).collect()
    }

    fn value(&self, number: u16, default: usize) -> Result<usize, Unreadable> {
        Ok(self.values(number)?.first().copied().unwrap_or(default))
    }
}

/// Bytes of a value; 0 for types that no tag read here has.
fn size_of_type(kind: u16) -> usize {
    match kind {
        1 | 2 | 6 | 7 => 1,
        3 | 8 => 2,
        4 | 9 | 11 | 13 => 4,
        5 | 10 | 12 | 16 | 17 | 18 => 8,
        _ => 0,
    }
}

/// What the samples of a pixel mean.
enum Meaning {
    /// Brightness of up to 8 bits, perhaps from white to black.
    Grey { inverted: bool },
    /// Brightness of 16 or 32 bits, which is cut off at 0 and 255.
    Deep(Deep),
    /// Red, green and blue.
    Rgb,
    /// Red, green and blue, multiplied by the opacity that follows.
    Premultiplied,
    /// Cyan, magenta, yellow and black.
    Inks,
    /// Brightness and two differences of colour.
    Ycc,
    /// Numbers of colours.
    Indexed(Palette),
}

#[derive(Clone, Copy)]
enum Deep {
    Unsigned,
    Signed,
    Float,
}

pub(super) fn decode(bytes: &[u8]) -> Result<RgbImage, Unreadable> {
    let directory = Directory::first(bytes)?;
    let (width, height) = (directory.value(tag::WIDTH, 0)?, directory.value(tag::HEIGHT, 0)?);
    check_size(width, height)?;
    let layout = Layout::of(&directory, width, height)?;
    let samples = layout.read(&directory)?;
    let pixels = layout.to_rgb(&samples);
    let image = RgbImage { width, height, pixels };
    Ok(match directory.value(tag::ORIENTATION, 1)? {
        orientation @ 2..=8 => oriented(&image, orientation),
        _ => image,
    })
}

/// Where samples lie, and what they are.
struct Layout {
    width: usize,
    height: usize,
    /// Bits of a sample.
    bits: usize,
    /// Samples of a pixel.
    samples: usize,
    meaning: Meaning,
    compression: usize,
    reversed_bits: bool,
    /// Whether each sample of all pixels lies apart from the others.
    planar: bool,
    tiled: bool,
    predictor: usize,
    /// Width and height of what is packed together.
    chunk: (usize, usize),
    offsets: Vec<usize>,
    lengths: Vec<usize>,
}

impl Layout {
    fn of(directory: &Directory<'_>, width: usize, height: usize) -> Result<Self, Unreadable> {
        let samples = directory.value(tag::SAMPLES, 1)?;
        let mut bits = directory.values(tag::BITS)?;
        bits.truncate(samples);
        let depth = bits.first().copied().unwrap_or(1);
        let formats = directory.values(tag::SAMPLE_FORMAT)?;
        let format = formats.first().copied().unwrap_or(1);
        let extra = directory.values(tag::EXTRA_SAMPLES)?;
        let photometric = directory.value(tag::PHOTOMETRIC, 0)?;
        let planar = directory.value(tag::PLANAR, 1)? == 2;
        let compression = directory.value(tag::COMPRESSION, 1)?;
        let unknown = || {
            Unreadable::Broken(format!(
                "a TIFF of {samples} samples of {depth} bits (photometric interpretation {photometric}, sample format {format}, extra samples {extra:?}) cannot be read; save it as PNG"
            ))
        };
        let alike = |values: &[usize]| values.iter().all(|value| Some(value) == values.first());
        if !(1..=MAX_SAMPLES).contains(&samples) || !alike(&bits) || !alike(&formats) {
            return Err(unknown());
        }
        if bits.len() > 1 && bits.len() != samples {
            return Err(unknown());
        }
        let big = directory.big_endian;
        let meaning = match (photometric, format, depth, samples, &extra[..]) {
            (0 | 1, 1, 1 | 2 | 4 | 8, 1, []) | (1, 2, 8, 1, []) | (1, 1, 8, 2, [0 | 2]) | (6, 1, 8, 1, []) => {
                Meaning::Grey { inverted: photometric == 0 }
            }
            (1, 1, 16, 1, []) => Meaning::Deep(Deep::Unsigned),
            (0, 1, 16, 1, []) if !big => Meaning::Deep(Deep::Unsigned),
            (1, 2, 16 | 32, 1, []) => Meaning::Deep(Deep::Signed),
            (1, 1, 32, 1, []) if !big => Meaning::Deep(Deep::Signed),
            (0 | 1, 3, 32, 1, []) => Meaning::Deep(Deep::Float),
            (2, 1, 8 | 16, 3, []) | (2, 1, 8 | 16, 4, [] | [0 | 2]) => Meaning::Rgb,
            (2, 1, 8, 4, [999]) | (2, 1, 8, 5, [0 | 2, 0]) | (2, 1, 8, 6, [0 | 2, 0, 0]) => Meaning::Rgb,
            (2, 1, 8 | 16, 4, [1]) | (2, 1, 8, 5, [1, 0]) | (2, 1, 8, 6, [1, 0, 0]) => Meaning::Premultiplied,
            (5, 1, 8 | 16, 4, []) | (5, 1, 8, 5, [0]) | (5, 1, 8, 6, [0, 0]) => Meaning::Inks,
            (6, 1, 8, 3, []) if compression == JPEG || directory.values(tag::CHROMA_SAMPLING)? == [1, 1] => {
                Meaning::Ycc
            }
            (3, 1, 1 | 2 | 4 | 8, 1, []) | (3, 1, 8, 2, [0 | 2]) => {
                let map = directory.values(tag::COLOUR_MAP)?;
                let third = map.len() / 3;
                let colour = |index: usize| [0, 1, 2].map(|channel| (map[channel * third + index] >> 8) as u8);
                Meaning::Indexed(Palette::new((0..third.min(256)).map(colour).collect()))
            }
            _ => return Err(unknown()),
        };
        let tiled = !directory.values(tag::TILE_OFFSETS)?.is_empty();
        let (offsets, lengths, chunk) = if tiled {
            let side = |number| directory.value(number, 0);
            (tag::TILE_OFFSETS, tag::TILE_BYTES, (side(tag::TILE_WIDTH)?, side(tag::TILE_HEIGHT)?))
        } else {
            let rows = directory.value(tag::ROWS_PER_STRIP, height)?;
            (tag::STRIP_OFFSETS, tag::STRIP_BYTES, (width, rows.min(height)))
        };
        check_size(chunk.0, chunk.1)?;
        Ok(Self {
            width,
            height,
            bits: depth,
            samples,
            meaning,
            compression,
            reversed_bits: directory.value(tag::FILL_ORDER, 1)? == 2,
            planar: planar && samples > 1,
            tiled,
            predictor: directory.value(tag::PREDICTOR, 1)?,
            chunk,
            offsets: directory.values(offsets)?,
            lengths: directory.values(lengths)?,
        })
    }

    /// Bytes of a sample once it is unpacked.
    fn sample_bytes(&self) -> usize {
        self.bits.div_ceil(8)
    }

    /// All samples, pixel by pixel, each in whole bytes, little end first.
    fn read(&self, directory: &Directory<'_>) -> Result<Vec<u8>, Unreadable> {
        let size = self.sample_bytes();
        let total = self.width * self.height * self.samples * size;
        let across = self.width.div_ceil(self.chunk.0);
        let down = self.height.div_ceil(self.chunk.1);
        let layers = if self.planar { self.samples } else { 1 };
        // Samples that lie together in a chunk.
        let together = self.samples / layers;
        // Tiles may go beyond the image, and are unpacked whole.
        let chunk = self.chunk.0 * self.chunk.1 * together * size;
        // What a byte of the file may unpack to, at most.
        let most = match self.compression {
            PLAIN | PACK_BITS => 64,
            LZW => most_per_byte::LZW,
            DEFLATE | OLD_DEFLATE => most_per_byte::DEFLATE,
            JPEG => most_per_byte::JPEG * self.samples,
            _ => most_per_byte::GROUP_4,
        };
        for bytes in [total, chunk] {
            check_fits(bytes * self.bits.min(8) / 8, most, directory.bytes.len())?;
            if bytes as u64 > MAX_DECODER_BYTES {
                return Err(Unreadable::Broken(format!("its samples take {bytes} bytes, more than 1 GiB")));
            }
        }
        if self.offsets.len() < across * down * layers {
            return Err(Unreadable::Truncated);
        }
        let tables = self.jpeg_tables(directory)?;
        // Packed bytes that may still be read: where strips or tiles lie over each other, a file would have more of them
        // than it has bytes.
        let mut may_read = directory.bytes.len().saturating_add(total).saturating_mul(MOST_OVERLAP);
        // As much as is unpacked, and not what the tags say.
        let mut out = Vec::new();
        let row_length = self.width * self.samples * size;
        for (number, &offset) in self.offsets.iter().enumerate().take(across * down * layers) {
            let (layer, place) = (number / (across * down), number % (across * down));
            let (left, top) = (place % across * self.chunk.0, place / across * self.chunk.1);
            let (columns, rows) = (self.chunk.0.min(self.width - left), self.chunk.1.min(self.height - top));
            // Strips end with the image, tiles do not; a fax is unpacked as far as it is needed, since a few bits may be
            // many pixels.
            let held_rows = if self.tiled && self.compression != GROUP_4 { self.chunk.1 } else { rows };
            let packed = directory.bytes.get(offset..).ok_or(Unreadable::Truncated)?;
            let packed = match self.lengths.get(number) {
                Some(&length) if self.compression != PLAIN => packed.get(..length).ok_or(Unreadable::Truncated)?,
                _ => packed,
            };
            if self.compression != PLAIN {
                let read = packed.len() + tables.len();
                may_read = may_read
                    .checked_sub(read)
                    .ok_or_else(|| Unreadable::Broken("its strips or tiles lie over each other".into()))?;
            }
            let chunk = self.unpacked(directory.big_endian, &tables, packed, held_rows, together)?;
            out.resize(out.len().max((top + rows) * row_length), 0);
            let row_bytes = self.chunk.0 * together * size;
            for y in 0..rows {
                let row = &chunk[y * row_bytes..][..columns * together * size];
                let start = (top + y) * row_length + left * self.samples * size;
                if layers == 1 {
                    out[start..start + row.len()].copy_from_slice(row);
                    continue;
                }
                for (x, sample) in row.chunks_exact(size).enumerate() {
                    let at = start + (x * self.samples + layer) * size;
                    out[at..at + size].copy_from_slice(sample);
                }
            }
        }
        Ok(out)
    }

    /// The samples of one chunk, each in whole bytes, little end first.
    fn unpacked(
        &self,
        big_endian: bool,
        tables: &[u8],
        packed: &[u8],
        rows: usize,
        samples: usize,
    ) -> Result<Vec<u8>, Unreadable> {
        if self.compression == JPEG {
            return self.jpeg_samples(tables, packed, rows, samples);
        }
        let row_bytes = (self.chunk.0 * samples * self.bits).div_ceil(8);
        let needed = row_bytes * rows;
        let turned: Vec<u8>;
        let packed = if self.reversed_bits {
            turned = packed
                .iter()
                .take(if self.compression == PLAIN { needed } else { packed.len() })
                .map(|byte| byte.reverse_bits())
                .collect();
            &turned[..]
        } else {
            packed
        };
        let mut bytes = match self.compression {
            PLAIN => packed.get(..needed).map(<[u8]>::to_vec).unwrap_or_default(),
            GROUP_4 => group4(packed, self.chunk.0, rows)?,
            LZW => lzw(packed, needed),
            DEFLATE | OLD_DEFLATE => {
                let mut bytes = Vec::new();
                ZlibDecoder::new(packed)
                    .take(needed as u64)
                    .read_to_end(&mut bytes)
                    .map_err(|_| Unreadable::Truncated)?;
                bytes
            }
            PACK_BITS => pack_bits(packed, needed),
            other => {
                return Err(Unreadable::Broken(format!("TIFF compression {other} cannot be read; save it as PNG")));
            }
        };
        if bytes.len() < needed {
            return Err(Unreadable::Truncated);
        }
        match self.predictor {
            2 if matches!(self.compression, LZW | DEFLATE | OLD_DEFLATE) => {
                self.sum_differences(&mut bytes, row_bytes, samples, big_endian);
            }
            3 => return Err(Unreadable::Broken("a TIFF with predictor 3 cannot be read; save it as PNG".into())),
            _ => {}
        }
        if big_endian {
            bytes.chunks_exact_mut(self.sample_bytes()).for_each(<[u8]>::reverse);
        }
        if self.bits >= 8 {
            return Ok(bytes);
        }
        let count = self.chunk.0 * samples;
        Ok(bytes.chunks_exact(row_bytes).flat_map(|row| unpack(row, self.bits, count)).collect())
    }

    /// Undoes predictor 2: each sample is kept as its difference from the pixel before.
    fn sum_differences(&self, bytes: &mut [u8], row_bytes: usize, samples: usize, big_endian: bool) {
        let size = self.sample_bytes();
        let step = samples * size;
        for row in bytes.chunks_exact_mut(row_bytes) {
            for at in (step..row.len()).step_by(size) {
                let mut carry = 0;
                for byte in 0..size {
                    let byte = if big_endian { size - 1 - byte } else { byte };
                    let sum = u16::from(row[at + byte]) + u16::from(row[at + byte - step]) + carry;
                    row[at + byte] = sum as u8;
                    carry = sum >> 8;
                }
            }
        }
    }

    /// The tables of all chunks that are JPEG, without the end marker; none where each has its own.
    fn jpeg_tables(&self, directory: &Directory<'_>) -> Result<Vec<u8>, Unreadable> {
        if self.compression != JPEG {
            return Ok(Vec::new());
        }
        let mut tables: Vec<u8> = directory.values(tag::JPEG_TABLES)?.into_iter().map(|byte| byte as u8).collect();
        tables.truncate(tables.len().saturating_sub(2));
        Ok(tables)
    }

    /// The samples of a chunk that is a JPEG, its tables apart from it.
    fn jpeg_samples(&self, tables: &[u8], packed: &[u8], rows: usize, samples: usize) -> Result<Vec<u8>, Unreadable> {
        let mut file = tables.to_vec();
        // Two images in one: the start marker of the data goes.
        if file.is_empty() {
            file.extend_from_slice(packed);
        } else {
            file.extend_from_slice(packed.get(2..).unwrap_or_default());
        }
        let (size, planes) = jpeg::components(&file)?;
        if size != (self.chunk.0, rows) || planes.len() != samples || self.bits != 8 {
            return Err(Unreadable::Broken("a JPEG inside it has another size than its tags say".into()));
        }
        Ok((0..size.0 * size.1).flat_map(|at| planes.iter().map(move |plane| plane[at])).collect())
    }

    fn to_rgb(&self, samples: &[u8]) -> Vec<u8> {
        let size = self.sample_bytes();
        let count = self.samples;
        // The upper byte of each sample, which of 8 bits is all.
        let upper = |pixel: &[u8], sample: usize| pixel[sample * size + size - 1];
        let three = |pixel: &[u8]| [0, 1, 2].map(|sample| upper(pixel, sample));
        let mut pixels = Vec::with_capacity(3 * self.width * self.height);
        let each = samples.chunks_exact(count * size);
        match &self.meaning {
            Meaning::Grey { inverted } => {
                let most = (1u16 << self.bits) - 1;
                let flip = if *inverted { 255 } else { 0 };
                pixels.extend(each.flat_map(|pixel| [(u16::from(pixel[0]) * (255 / most)) as u8 ^ flip; 3]));
            }
            Meaning::Deep(deep) => pixels.extend(each.flat_map(|pixel| [deep.cut(pixel); 3])),
            Meaning::Rgb => pixels.extend(each.flat_map(three)),
            Meaning::Premultiplied => pixels.extend(each.flat_map(|pixel| {
                let alpha = u32::from(upper(pixel, 3));
                three(pixel).map(|value| match alpha {
                    0 => 0,
                    alpha => (u32::from(value) * 255 / alpha).min(255) as u8,
                })
            })),
            Meaning::Inks => pixels.extend(each.flat_map(|pixel| cmyk_to_rgb(three(pixel), upper(pixel, 3)))),
            Meaning::Ycc if self.compression == JPEG => pixels.extend(each.flat_map(|pixel| ycc_to_rgb(three(pixel)))),
            Meaning::Ycc => pixels.extend(each.flat_map(|pixel| pillow_ycc_to_rgb(three(pixel)))),
            Meaning::Indexed(palette) => pixels.extend(each.flat_map(|pixel| palette.colour(pixel[0]))),
        }
        pixels
    }
}

impl Deep {
    /// The sample, little end first, cut off at 0 and 255.
    fn cut(self, sample: &[u8]) -> u8 {
        let value = match (self, sample) {
            (Deep::Unsigned, &[a, b]) => i64::from(u16::from_le_bytes([a, b])),
            (Deep::Signed, &[a, b]) => i64::from(i16::from_le_bytes([a, b])),
            (Deep::Signed, &[a, b, c, d]) => i64::from(i32::from_le_bytes([a, b, c, d])),
            (Deep::Float, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]) as i64,
            _ => 0,
        };
        value.clamp(0, 255) as u8
    }
}

/// The image turned as its tag says: the value is where its first row and column are.
fn oriented(image: &RgbImage, orientation: usize) -> RgbImage {
    let (width, height) = image.size();
    let (columns, rows) = if orientation >= 5 { (height, width) } else { (width, height) };
    let mut pixels = Vec::with_capacity(image.pixels.len());
    for y in 0..rows {
        for x in 0..columns {
            let (right, down) = (width - 1, height - 1);
            let (x, y) = match orientation {
                2 => (right - x, y),
                3 => (right - x, down - y),
                4 => (x, down - y),
                5 => (y, x),
                6 => (y, down - x),
                7 => (right - y, down - x),
                _ => (right - y, x),
            };
            pixels.extend_from_slice(&image.pixels[3 * (y * width + x)..][..3]);
        }
    }
    RgbImage { width: columns, height: rows, pixels }
}

/// Unpacks LZW, at most `needed` bytes.
fn lzw(packed: &[u8], needed: usize) -> Vec<u8> {
    let mut decoder = weezl::decode::Decoder::with_tiff_size_switch(BitOrder::Msb, 8);
    let mut bytes = vec![0; needed];
    let (mut read, mut written) = (0, 0);
    while written < needed {
        let step = decoder.decode_bytes(&packed[read..], &mut bytes[written..]);
        read += step.consumed_in;
        written += step.consumed_out;
        if !matches!(step.status, Ok(weezl::LzwStatus::Ok)) || step.consumed_in + step.consumed_out == 0 {
            break;
        }
    }
    bytes.truncate(written);
    bytes
}

/// Unpacks Apple's PackBits, at most `needed` bytes.
fn pack_bits(packed: &[u8], needed: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(needed);
    let mut rest = packed;
    while let Some((&head, after)) = rest.split_first() {
        if bytes.len() >= needed {
            break;
        }
        let head = head as i8;
        let taken = match head {
            -128 => 0,
            0.. => (head as usize + 1).min(after.len()),
            _ => 1.min(after.len()),
        };
        match head {
            -128 => {}
            0.. => bytes.extend_from_slice(&after[..taken]),
            _ => {
                bytes
                    .extend(after.iter().take(1).flat_map(|&byte| [byte].repeat(1 + usize::from(head.unsigned_abs()))));
            }
        }
        rest = &after[taken..];
    }
    bytes.truncate(needed);
    bytes
}

/// Unpacks CCITT group 4: rows of bits, 1 being black.
fn group4(packed: &[u8], width: usize, rows: usize) -> Result<Vec<u8>, Unreadable> {
    let columns = u16::try_from(width).map_err(|_| Unreadable::Broken(format!("a fax of {width} columns")))?;
    let height = u16::try_from(rows).map_err(|_| Unreadable::Broken(format!("a fax of {rows} rows")))?;
    let mut bytes = Vec::new();
    let decoded = fax::decoder::decode_g4(packed.iter().copied(), columns, Some(height), |line| {
        let mut row = vec![0u8; width.div_ceil(8)];
        for (x, colour) in fax::decoder::pels(line, columns).enumerate() {
            if colour == fax::Color::Black {
                row[x / 8] |= 0x80 >> (x % 8);
            }
        }
        bytes.extend(row);
    });
    decoded.map(|()| bytes).ok_or(Unreadable::Truncated)
}
