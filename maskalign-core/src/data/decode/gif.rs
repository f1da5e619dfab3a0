//! The first frame of a GIF as Pillow shows it: colours of the palette, transparent or not.

use std::io::ErrorKind;

use gif::{ColorOutput, DecodeOptions, DecodingError, MemoryLimit};

use super::colour::Palette;
use super::{MAX_DECODER_BYTES, Unreadable, check_fits, check_size, most_per_byte};
use crate::data::RgbImage;

/// Bytes before the palette, and the place and a bit of the flags among them.
const HEADER: usize = 13;
const FLAGS: usize = 10;
const HAS_PALETTE: u8 = 0x80;

pub(super) fn decode(bytes: &[u8]) -> Result<RgbImage, Unreadable> {
    let with_palette;
    let bytes = if bytes.get(FLAGS).is_some_and(|flags| flags & HAS_PALETTE == 0) {
        // The decoder wants a palette; one of greys stands for none.
        let (head, rest) = bytes.split_at_checked(HEADER).ok_or(Unreadable::Truncated)?;
        let ramp: Vec<u8> = (0..=255).flat_map(|shade| [shade; 3]).collect();
        let mut file = [head, &ramp, rest].concat();
        file[FLAGS] |= HAS_PALETTE | 7;
        with_palette = file;
        &with_palette
    } else {
        bytes
    };
    let mut options = DecodeOptions::new();
    options.set_color_output(ColorOutput::Indexed);
    options.set_memory_limit(MemoryLimit::Bytes(MAX_DECODER_BYTES.try_into().expect("it is not 0")));
    let mut decoder = options.read_info(bytes).map_err(unreadable)?;
    let canvas = (usize::from(decoder.width()), usize::from(decoder.height()));
    let palette = decoder.global_palette().map(Palette::rgb);
    let frame = decoder.next_frame_info().map_err(unreadable)?;
    let frame = frame.ok_or_else(|| Unreadable::Broken("it has no frame".into()))?.clone();
    let (left, top) = (usize::from(frame.left), usize::from(frame.top));
    let (frame_width, frame_height) = (usize::from(frame.width), usize::from(frame.height));
    // A frame that goes beyond the canvas makes it larger.
    let (width, height) = (canvas.0.max(left + frame_width), canvas.1.max(top + frame_height));
    check_size(width, height)?;
    check_size(frame_width, frame_height)?;
    check_fits(frame_width * frame_height, most_per_byte::LZW, bytes.len())?;
    let mut indices = vec![0; frame_width * frame_height];
    decoder.read_into_buffer(&mut indices).map_err(unreadable)?;
    let palette = frame.palette.as_deref().map(Palette::rgb).or(palette).filter(|palette| !palette.is_grey_ramp());
    let colour = |index: u8| palette.as_ref().map_or([index; 3], |palette| palette.colour(index));
    let around = colour(frame.transparent.unwrap_or(0));
    let mut pixels = around.repeat(width * height);
    for (y, row) in indices.chunks_exact(frame_width).enumerate() {
        let start = 3 * ((top + y) * width + left);
        for (pixel, &index) in pixels[start..].chunks_exact_mut(3).zip(row) {
            pixel.copy_from_slice(&colour(index));
        }
    }
    Ok(RgbImage { width, height, pixels })
}

fn unreadable(error: DecodingError) -> Unreadable {
    match error {
        DecodingError::Io(error) if error.kind() == ErrorKind::UnexpectedEof => Unreadable::Truncated,
        error => Unreadable::Broken(error.to_string()),
    }
}
