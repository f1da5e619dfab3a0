//! JPEG to RGB, equal to Pillow's (libjpeg-turbo's) bytes.
//!
//! `libjpeg-turbo-rs` was chosen by measurement. Of the decoders in pure Rust it alone repeats what libjpeg-turbo defines
//! beyond the standard: the integer IDCT, the triangle filter of chroma with its rules for edges, and the colour
//! conversion. zune-jpeg, which the `image` crate uses, lets the filter see samples beyond the last column (up to 54
//! levels off at widths that are no multiple of 16), and jpeg-decoder differs in images of one or two columns. Photographs
//! of 500 x 375 pixels in 4:2:0 take a sixth less time than with zune-jpeg.
//!
//! For four components, and for chroma finer than luma, the crate's own last steps are not libjpeg's; there it gives the
//! planes, and this file does the rest.

use libjpeg_turbo_rs::{ColorSpace, DecodeLimits, Decoder, JpegError, PixelFormat};

use super::colour::{cmyk_to_rgb, ycc_to_rgb};
use super::{MAX_DECODER_BYTES, Unreadable, check_fits, check_size, most_per_byte};
use crate::data::RgbImage;

/// More scans than any encoder writes; each costs a pass over the whole image.
const MAX_SCANS: usize = 100;

pub(super) fn decode(bytes: &[u8]) -> Result<RgbImage, Unreadable> {
    let (mut decoder, factors, most) = open(bytes)?;
    if factors.len() == 4 || factors.len() == 3 && factors[0] != most {
        return from_planes(decoder, &factors, most);
    }
    decoder.set_output_format(PixelFormat::Rgb);
    let (width, height) = (decoder.header().width(), decoder.header().height());
    let image = decoder.decode_image().map_err(unreadable)?;
    Ok(RgbImage { width, height, pixels: image.data })
}

/// Reads the headers: the decoder, the sampling factors of each component across and down, and the largest of them.
fn open(bytes: &[u8]) -> Result<(Decoder<'_>, Vec<(usize, usize)>, (usize, usize)), Unreadable> {
    let mut decoder = Decoder::new_with_limits(bytes, limits(0)).map_err(unreadable)?;
    let (width, height) = (decoder.header().width(), decoder.header().height());
    check_size(width, height)?;
    check_fits(width * height, most_per_byte::JPEG, bytes.len())?;
    decoder.set_limits(limits(3 * (width * height) as u64));
    let components = &decoder.header().components;
    let factors: Vec<(usize, usize)> = components
        .iter()
        .map(|component| (component.horizontal_sampling.into(), component.vertical_sampling.into()))
        .collect();
    let precision = decoder.header().precision;
    if precision != 8 || !matches!(factors.len(), 1 | 3 | 4) {
        return Err(Unreadable::Broken(format!(
            "{} components of {precision} bits, where 1, 3 or 4 of 8 bits can be read",
            factors.len()
        )));
    }
    let across = factors.iter().map(|factor| factor.0).max().unwrap_or(1);
    let down = factors.iter().map(|factor| factor.1).max().unwrap_or(1);
    Ok((decoder, factors, (across, down)))
}

fn limits(image_bytes: u64) -> DecodeLimits {
    DecodeLimits { max_scans: MAX_SCANS, max_memory: Some(MAX_DECODER_BYTES + image_bytes), ..DecodeLimits::default() }
}

fn unreadable(error: JpegError) -> Unreadable {
    match error {
        JpegError::UnexpectedEof => Unreadable::Truncated,
        error => Unreadable::Broken(error.to_string()),
    }
}

/// Decodes what the crate's own last steps do not cover.
fn from_planes(decoder: Decoder<'_>, factors: &[(usize, usize)], most: (usize, usize)) -> Result<RgbImage, Unreadable> {
    let (width, height) = (decoder.header().width(), decoder.header().height());
    let space = decoder.jpeg_color_space();
    let planes = planes(decoder, factors, most)?;
    let mut pixels = Vec::with_capacity(3 * width * height);
    for at in 0..width * height {
        let first = [planes[0][at], planes[1][at], planes[2][at]];
        pixels.extend(match space {
            ColorSpace::Ycck => cmyk_to_rgb(ycc_to_rgb(first), 255 - planes[3][at]),
            // Inks are stored as what they leave of the light: Adobe's convention, which Pillow takes for granted.
            ColorSpace::Cmyk => cmyk_to_rgb(first.map(|ink| 255 - ink), 255 - planes[3][at]),
            ColorSpace::Rgb => first,
            _ => ycc_to_rgb(first),
        });
    }
    Ok(RgbImage { width, height, pixels })
}

/// `(width, height)` and each component in that size, as they are stored: for JPEG inside TIFF, whose tags say what the
/// components mean.
pub(super) fn components(bytes: &[u8]) -> Result<((usize, usize), Vec<Vec<u8>>), Unreadable> {
    let (decoder, factors, most) = open(bytes)?;
    let size = (decoder.header().width(), decoder.header().height());
    Ok((size, planes(decoder, &factors, most)?))
}

/// Each component in the image's size; `factors` are their sampling factors, `most` the largest of them.
fn planes(decoder: Decoder<'_>, factors: &[(usize, usize)], most: (usize, usize)) -> Result<Vec<Vec<u8>>, Unreadable> {
    let (width, height) = (decoder.header().width(), decoder.header().height());
    if factors.iter().any(|factor| !most.0.is_multiple_of(factor.0) || !most.1.is_multiple_of(factor.1)) {
        return Err(Unreadable::Broken("its components are sampled at no whole multiples of each other".into()));
    }
    let raw = decoder.decode_raw().map_err(unreadable)?;
    let samples = raw.planes.iter().zip(&raw.plane_widths);
    Ok(factors
        .iter()
        .zip(samples)
        .map(|(factor, (samples, &stride))| {
            let plane = Plane {
                samples,
                stride,
                width: (width * factor.0).div_ceil(most.0),
                height: (height * factor.1).div_ceil(most.1),
            };
            plane.upsampled((width, height), (most.0 / factor.0, most.1 / factor.1))
        })
        .collect())
}

/// The samples of one component.
struct Plane<'a> {
    samples: &'a [u8],
    /// Samples from one row to the next.
    stride: usize,
    /// Samples in a row that belong to the image; what follows fills a block.
    width: usize,
    /// Rows that belong to the image.
    height: usize,
}

impl Plane<'_> {
    /// The plane in the image's size: libjpeg's triangle filter where a side doubles, each sample repeated elsewhere.
    ///
    /// `times` is how often each sample stands in a row and in a column. The filter weighs the nearer sample 3, the
    /// farther 1; ties round down and up by turns (8 and 7 of 16, 1 and 2 of 4). Planes of one or two columns are
    /// repeated, as in libjpeg.
    fn upsampled(&self, (width, height): (usize, usize), times: (usize, usize)) -> Vec<u8> {
        let smooth_columns = times.0 == 2 && times.1 <= 2 && self.width > 2;
        let smooth_rows = times.1 == 2 && (times.0 == 1 || smooth_columns);
        let mut out = Vec::with_capacity(width * height);
        for y in 0..height {
            let near = self.row(y / times.1);
            // A row of sums: 4 times the sample where rows are blended, else the sample.
            let sums: Vec<u32> = if smooth_rows {
                let inner = y / 2;
                let far = self.row(if y % 2 == 0 { inner.saturating_sub(1) } else { inner + 1 });
                near.iter().zip(far).map(|(&near, &far)| 3 * u32::from(near) + u32::from(far)).collect()
            } else {
                near.iter().map(|&near| u32::from(near)).collect()
            };
            let start = out.len();
            match (smooth_columns, smooth_rows) {
                (false, false) => {
                    out.extend(near.iter().flat_map(|&sample| std::iter::repeat_n(sample, times.0)).take(width));
                }
                (false, true) => {
                    let round = if y % 2 == 0 { 1 } else { 2 };
                    out.extend(sums.iter().map(|sum| ((sum + round) >> 2) as u8).take(width));
                }
                (true, rows) => {
                    let (left_round, right_round, shift) = if rows { (8, 7, 4) } else { (1, 2, 2) };
                    let last = sums.len() - 1;
                    for (x, &sum) in sums.iter().enumerate() {
                        let left = sums[x.saturating_sub(1)];
                        let right = sums[(x + 1).min(last)];
                        out.push(((3 * sum + left + left_round) >> shift) as u8);
                        out.push(((3 * sum + right + right_round) >> shift) as u8);
                    }
                    out.truncate(start + width);
                }
            }
            debug_assert_eq!(out.len(), start + width);
        }
        out
    }

    /// A row of the image, the last one repeated beyond it.
    fn row(&self, y: usize) -> &[u8] {
        &self.samples[y.min(self.height - 1) * self.stride..][..self.width]
    }
}

/// Whether the file goes on to its end-of-image marker. Decoders fill in what is missing; training must not see that.
pub(super) fn is_complete(bytes: &[u8]) -> bool {
    const START: u8 = 0xD8;
    const END: u8 = 0xD9;
    // In front of a marker: nothing to skip but the marker. Stuffed zeros and restarts lie inside entropy-coded data.
    let stands_alone = |marker: u8| matches!(marker, 0x00 | 0x01 | START | 0xD0..=0xD7);
    let mut at = 2;
    while let Some(offset) = bytes.get(at..).and_then(|rest| rest.iter().position(|&byte| byte == 0xFF)) {
        at += offset + 1;
        match bytes.get(at) {
            None => return false,
            Some(&END) => return true,
            // Fill: the next byte may begin the marker.
            Some(&0xFF) => {}
            Some(&marker) if stands_alone(marker) => at += 1,
            Some(_) => match bytes.get(at + 1..at + 3) {
                Some(length) => at += 1 + usize::from(u16::from_be_bytes([length[0], length[1]])),
                None => return false,
            },
        }
    }
    false
}
