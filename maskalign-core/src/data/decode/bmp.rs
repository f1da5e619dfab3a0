//! BMP as Pillow reads it: palettes, run lengths, 16, 24 and 32 bits, and the layouts of masks that Pillow knows.

use super::colour::{Palette, unpack};
use super::{Unreadable, check_size};
use crate::data::RgbImage;

/// How the bytes of pixels make colours.
enum Layout {
    /// Red, green and blue at these places of so many bytes.
    Bytes { size: usize, places: [usize; 3] },
    /// Two bytes with so many bits of green, and 5 of red and of blue.
    Packed { green_bits: u32 },
    /// Numbers of so many bits, and what each stands for.
    Indexed { bits: usize, palette: Option<Palette> },
}

/// Values of the header's field of compression.
const RUNS_OF_BYTES: u32 = 1;
const RUNS_OF_NIBBLES: u32 = 2;
const MASKS: u32 = 3;

pub(super) fn decode(bytes: &[u8]) -> Result<RgbImage, Unreadable> {
    let at = |place: usize, size: usize| -> Result<u32, Unreadable> {
        let part = bytes.get(place..place + size).ok_or(Unreadable::Truncated)?;
        Ok(part.iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte)))
    };
    let header = at(14, 4)? as usize;
    let (width, height, top_down, bits, compression, colours, colour_size) = match header {
        12 => (at(18, 2)?, at(20, 2)?, false, at(24, 2)?, 0, 0, 3),
        40 | 52 | 56 | 64 | 108 | 124 => {
            let (height, top_down) = (at(22, 4)?, at(25, 1)? == 0xFF);
            let height = if top_down { height.wrapping_neg() } else { height };
            (at(18, 4)?, height, top_down, at(28, 2)?, at(30, 4)?, at(46, 4)? as usize, 4)
        }
        other => return Err(Unreadable::Broken(format!("a BMP header of {other} bytes"))),
    };
    let (width, height) = (width as usize, height as usize);
    check_size(width, height)?;
    let after_header = 14 + header;
    let colours = if colours == 0 { 1 << bits.min(16) } else { colours };
    let mut start = at(10, 4)? as usize;
    if start == after_header && bits <= 8 {
        start += colour_size * colours;
    }
    let unsupported = |what: String| Unreadable::Broken(format!("{what} cannot be read; save it as PNG"));
    let mut layout = match (bits, compression) {
        (1 | 4 | 8, 0 | RUNS_OF_BYTES | RUNS_OF_NIBBLES) => {
            if colours > 65_536 {
                return Err(Unreadable::Broken(format!("a palette of {colours} colours")));
            }
            let table = bytes.get(after_header..).unwrap_or_default();
            indexed(bits as usize, &table[..table.len().min(colour_size * colours)], colours, colour_size)
        }
        (16, 0) => Layout::Packed { green_bits: 5 },
        (24, 0) => Layout::Bytes { size: 3, places: [2, 1, 0] },
        (32, 0) => Layout::Bytes { size: 4, places: [2, 1, 0] },
        (16 | 24 | 32, MASKS) => {
            let mask = |index: usize| at(54 + 4 * index, 4);
            let alpha = if header >= 56 { mask(3)? } else { 0 };
            let masks = [mask(0)?, mask(1)?, mask(2)?];
            masked(bits, masks, alpha).ok_or_else(|| unsupported(format!("a BMP with colour masks {masks:08x?}")))?
        }
        _ => return Err(unsupported(format!("a BMP of {bits} bits with compression {compression}"))),
    };
    if start == 0 {
        start = after_header + if compression == MASKS && header == 40 { 12 } else { 0 };
    }
    let data = bytes.get(start..).ok_or(Unreadable::Truncated)?;
    let mut unpacked;
    let (data, stride) = if matches!(compression, RUNS_OF_BYTES | RUNS_OF_NIBBLES) {
        let Layout::Indexed { bits, .. } = &mut layout else { return Err(unsupported("run lengths".into())) };
        unpacked = run_lengths(data, start, (width, height), compression == RUNS_OF_NIBBLES);
        if *bits == 1 {
            // Black and white: whatever is not 0 is white.
            let pixels = unpacked.iter().map(|&index| if index == 0 { 0 } else { 255 });
            unpacked = pixels.collect();
        }
        *bits = 8;
        (&unpacked[..], width)
    } else {
        (data, (width * bits as usize).div_ceil(32) * 4)
    };
    let needed = match &layout {
        Layout::Bytes { size, .. } => size * width,
        Layout::Packed { .. } => 2 * width,
        Layout::Indexed { bits, .. } => (bits * width).div_ceil(8),
    };
    if needed > stride {
        return Err(Unreadable::Broken("its palette does not belong to its depth".into()));
    }
    if data.len() < (height - 1) * stride + needed {
        return Err(Unreadable::Truncated);
    }
    let mut pixels = Vec::with_capacity(3 * width * height);
    for y in 0..height {
        let row = &data[if top_down { y } else { height - 1 - y } * stride..][..needed];
        match &layout {
            Layout::Bytes { size, places } => {
                pixels.extend(row.chunks_exact(*size).flat_map(|pixel| places.map(|place| pixel[place])));
            }
            Layout::Packed { green_bits } => pixels.extend(row.chunks_exact(2).flat_map(|pixel| {
                let value = u32::from(u16::from_le_bytes([pixel[0], pixel[1]]));
                let part = |shift: u32, bits: u32| {
                    let most = (1 << bits) - 1;
                    ((value >> shift & most) * 255 / most) as u8
                };
                [part(5 + green_bits, 5), part(5, *green_bits), part(0, 5)]
            })),
            Layout::Indexed { bits, palette: Some(palette) } => {
                pixels.extend(unpack(row, *bits, width).flat_map(|index| palette.colour(index)));
            }
            Layout::Indexed { bits, palette: None } => {
                let times = if *bits == 1 { 255 } else { 1 };
                pixels.extend(unpack(row, *bits, width).flat_map(|index| [index * times; 3]));
            }
        }
    }
    Ok(RgbImage { width, height, pixels })
}

/// A palette; one of the greys from black to white is none, and the numbers are the brightness.
fn indexed(bits: usize, table: &[u8], colours: usize, colour_size: usize) -> Layout {
    let palette: Vec<[u8; 3]> =
        table.chunks_exact(colour_size).map(|colour| [colour[2], colour[1], colour[0]]).collect();
    if palette[..] == [[0; 3], [255; 3]] {
        return Layout::Indexed { bits: 1, palette: None };
    }
    let whole = palette.len() == colours;
    let palette = Palette::new(palette);
    if whole && colours != 2 && palette.is_grey_ramp() {
        return Layout::Indexed { bits: if colours < 2 { 1 } else { 8 }, palette: None };
    }
    Layout::Indexed { bits, palette: Some(palette) }
}

fn masked(bits: u32, masks: [u32; 3], alpha: u32) -> Option<Layout> {
    let places = match (bits, masks, alpha) {
        (16, [0xF800, 0x7E0, 0x1F], _) => return Some(Layout::Packed { green_bits: 6 }),
        (16, [0x7C00, 0x3E0, 0x1F], _) => return Some(Layout::Packed { green_bits: 5 }),
        (24, [0xFF_0000, 0xFF00, 0xFF], _) => [2, 1, 0],
        (32, [0xFF_0000, 0xFF00, 0xFF], 0 | 0xFF00_0000) | (32, [0, 0, 0], 0) => [2, 1, 0],
        (32, [0xFF00_0000, 0xFF_0000, 0xFF00], 0 | 0xFF) => [3, 2, 1],
        (32, [0xFF00_0000, 0xFF00, 0xFF], 0 | 0xFF_0000) => [3, 1, 0],
        (32, [0xFF, 0xFF00, 0xFF_0000], 0xFF00_0000) => [0, 1, 2],
        _ => return None,
    };
    Some(Layout::Bytes { size: bits as usize / 8, places })
}

/// Unpacks run lengths into one byte a pixel, as far as they go; `start` is where they lie in the file.
fn run_lengths(data: &[u8], start: usize, (width, height): (usize, usize), nibbles: bool) -> Vec<u8> {
    let total = width * height;
    let mut out: Vec<u8> = Vec::new();
    let (mut at, mut x) = (0, 0);
    let next = |at: &mut usize, count: usize| {
        let part = data.get(*at..*at + count);
        *at += count;
        part
    };
    while out.len() < total {
        let Some(&[count, value]) = next(&mut at, 2) else { break };
        match (count, value) {
            (0, 0) => {
                out.resize(out.len().next_multiple_of(width), 0);
                x = 0;
            }
            (0, 1) => break,
            (0, 2) => {
                let Some(&[right, up]) = next(&mut at, 2) else { break };
                let jump = usize::from(right) + usize::from(up) * width;
                out.resize(out.len() + jump.min(total - out.len()), 0);
                x = out.len() % width;
            }
            (0, count) => {
                let count = usize::from(count).min(total - out.len());
                let Some(part) = next(&mut at, if nibbles { count.div_ceil(2) } else { count }) else { break };
                if nibbles {
                    out.extend(unpack(part, 4, count));
                } else {
                    out.extend_from_slice(part);
                }
                x += usize::from(value);
                at += (start + at) % 2;
            }
            (count, value) => {
                let count = usize::from(count).min(width.saturating_sub(x));
                let pair = if nibbles { [value >> 4, value & 15] } else { [value; 2] };
                out.extend((0..count).map(|index| pair[index % 2]));
                x += count;
            }
        }
    }
    out
}
