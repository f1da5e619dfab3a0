//! Netpbm's formats P1 to P6 as Pillow reads them.

use super::colour::unpack;
use super::{Unreadable, check_size};
use crate::data::RgbImage;

/// Longer numbers are refused.
const MAX_DIGITS: usize = 10;

pub(super) fn decode(bytes: &[u8]) -> Result<RgbImage, Unreadable> {
    let kind = bytes[1];
    if !(b'1'..=b'6').contains(&kind) || !bytes.get(2).is_some_and(u8::is_ascii_whitespace) {
        return Err(Unreadable::Broken("of Netpbm's formats P1 to P6 can be read; save it as PNG".into()));
    }
    let mut at = 3;
    let width = header_number(bytes, &mut at)?;
    let height = header_number(bytes, &mut at)?;
    check_size(width, height)?;
    let channels = if matches!(kind, b'3' | b'6') { 3 } else { 1 };
    let count = width * height * channels;
    let most = if matches!(kind, b'1' | b'4') { 1 } else { header_number(bytes, &mut at)? };
    if !(1..=65_535).contains(&most) {
        return Err(Unreadable::Broken(format!("its largest value is {most}, where 1 to 65535 can be")));
    }
    // Grey of more than 8 bits keeps its depth in Pillow, and is cut off at 255 when it becomes RGB.
    let (scale, top) = if channels == 1 && most > 255 { (65_535.0, 65_535.0) } else { (255.0, 255.0) };
    let scaled = |value: usize| {
        let value = (value as f64 / most as f64 * scale).round_ties_even();
        value.min(top).min(255.0) as u8
    };
    let data = bytes.get(at..).unwrap_or_default();
    let values: Vec<u8> = match kind {
        b'1' => plain_bits(data, count)?,
        b'2' | b'3' => plain_numbers(data, count, most)?.into_iter().map(scaled).collect(),
        b'4' => {
            let stride = width.div_ceil(8);
            let rows = data.get(..stride * height).ok_or(Unreadable::Truncated)?;
            rows.chunks_exact(stride).flat_map(|row| unpack(row, 1, width).map(|bit| (1 - bit) * 255)).collect()
        }
        _ if most < 256 => data.get(..count).ok_or(Unreadable::Truncated)?.iter().map(|&b| scaled(b.into())).collect(),
        _ => {
            let pairs = data.get(..2 * count).ok_or(Unreadable::Truncated)?.chunks_exact(2);
            pairs.map(|pair| scaled(u16::from_be_bytes([pair[0], pair[1]]).into())).collect()
        }
    };
    Ok(match channels {
        1 => RgbImage::from_grey(width, height, &values),
        _ => RgbImage { width, height, pixels: values },
    })
}

/// The next number of the header, and the one byte of space after it.
fn header_number(bytes: &[u8], at: &mut usize) -> Result<usize, Unreadable> {
    let mut digits = String::new();
    loop {
        let byte = *bytes.get(*at).ok_or(Unreadable::Truncated)?;
        *at += 1;
        match byte {
            b'#' => {
                let end = bytes[*at..].iter().position(|byte| matches!(byte, b'\r' | b'\n'));
                *at += end.ok_or(Unreadable::Truncated)? + 1;
            }
            byte if byte.is_ascii_whitespace() || byte == 0x0B => {
                if !digits.is_empty() {
                    return number(digits.as_bytes());
                }
            }
            byte => digits.push(char::from(byte)),
        }
        if digits.len() > MAX_DIGITS {
            return Err(Unreadable::Broken("a number of its header is too long".into()));
        }
    }
}

fn number(digits: &[u8]) -> Result<usize, Unreadable> {
    let text = std::str::from_utf8(digits).ok().filter(|text| text.len() <= MAX_DIGITS);
    text.and_then(|text| text.parse().ok())
        .ok_or_else(|| Unreadable::Broken(format!("`{}` is no number", digits.escape_ascii())))
}

/// The text without comments, which go from `#` to the end of the line.
fn without_comments(data: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = data;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let start = rest.iter().position(|&byte| byte == b'#').unwrap_or(rest.len());
        let (text, comment) = rest.split_at(start);
        let end = comment.iter().position(|byte| matches!(byte, b'\r' | b'\n')).map_or(comment.len(), |end| end + 1);
        rest = &comment[end..];
        Some(text)
    })
}

fn plain_bits(data: &[u8], count: usize) -> Result<Vec<u8>, Unreadable> {
    let mut bits = Vec::new();
    for &byte in without_comments(data).flatten().filter(|byte| !byte.is_ascii_whitespace()) {
        if bits.len() == count {
            return Ok(bits);
        }
        bits.push(match byte {
            b'0' => 255,
            b'1' => 0,
            _ => return Err(Unreadable::Broken(format!("`{}` is no bit", byte.escape_ascii()))),
        });
    }
    if bits.len() < count { Err(Unreadable::Truncated) } else { Ok(bits) }
}

fn plain_numbers(data: &[u8], count: usize, most: usize) -> Result<Vec<usize>, Unreadable> {
    let text: Vec<u8> = without_comments(data).flatten().copied().collect();
    let mut values = Vec::new();
    for digits in text.split(u8::is_ascii_whitespace).filter(|digits| !digits.is_empty()).take(count) {
        let value = number(digits)?;
        if value > most {
            return Err(Unreadable::Broken(format!("it holds {value}, above its largest value {most}")));
        }
        values.push(value);
    }
    if values.len() < count { Err(Unreadable::Truncated) } else { Ok(values) }
}
