//! Files to images: what torchvision's default loader does (`PIL.Image.open(...).convert("RGB")`).
//!
//! The format is told by the content, not by the name. Rotation tags (EXIF) and colour profiles are not applied, alpha
//! is dropped, grey is repeated. One difference: 16-bit grey keeps its upper 8 bits, where Pillow clips at 255.

use std::fs::File;
use std::io::{self, Cursor, Read};
use std::panic::catch_unwind;
use std::path::Path;

use image::{DynamicImage, ImageError, ImageFormat, ImageReader, Limits};

use super::{DataError, RgbImage};

/// Images with more pixels than this are refused: 256 MiB of RGB, the size above which Pillow warns.
pub const MAX_PIXELS: usize = 89_478_485;

/// Files with more bytes than this are refused.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// Memory in bytes that a decoder may use beside the image itself.
const MAX_DECODER_BYTES: u64 = 1 << 30;

/// Reads one image file.
///
/// # Errors
/// The file cannot be read, is truncated, is no image of a known format, or is larger than [`MAX_PIXELS`].
pub fn read(path: &Path) -> Result<RgbImage, DataError> {
    let failed = |source| DataError::Read { path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(failed(io::Error::other("not a file")));
    }
    if metadata.len() > MAX_FILE_BYTES {
        return Err(broken(path, format!("a file of {} bytes, more than 1 GiB", metadata.len())));
    }
    let mut bytes = Vec::with_capacity(metadata.len() as usize);
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).map_err(failed)?;
    decode(&bytes, path)
}

/// Decodes an image file's content; `path` is for messages alone.
///
/// # Errors
/// See [`read`].
pub fn decode(bytes: &[u8], path: &Path) -> Result<RgbImage, DataError> {
    if bytes.is_empty() {
        return Err(broken(path, "the file is empty"));
    }
    let format = image::guess_format(bytes).map_err(|_| {
        broken(path, "its first bytes are those of no known format (JPEG, PNG, WebP, TIFF, BMP, GIF, PNM)")
    })?;
    if format == ImageFormat::Jpeg && !jpeg_is_complete(bytes) {
        return Err(truncated(path, format!("no end-of-image marker within its {} bytes", bytes.len())));
    }
    catch_unwind(|| decode_format(bytes, format, path)).unwrap_or_else(|_| Err(broken(path, "the decoder panicked")))
}

fn decode_format(bytes: &[u8], format: ImageFormat, path: &Path) -> Result<RgbImage, DataError> {
    use image::ImageDecoder;

    let failed = |error: ImageError| match error {
        ImageError::IoError(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            truncated(path, format!("the file ends after {} bytes, inside the image", bytes.len()))
        }
        error => broken(path, error.to_string()),
    };
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(MAX_DECODER_BYTES);
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(failed)?;
    let (width, height) = decoder.dimensions();
    let (width, height) = (width as usize, height as usize);
    if width == 0 || height == 0 {
        return Err(broken(path, format!("it is {width} x {height} pixels")));
    }
    if width * height > MAX_PIXELS {
        return Err(DataError::TooLarge { path: path.to_owned(), width, height });
    }
    let pixels = to_rgb(DynamicImage::from_decoder(decoder).map_err(failed)?);
    debug_assert_eq!(pixels.len(), width * height * 3);
    Ok(RgbImage { width, height, pixels })
}

fn to_rgb(image: DynamicImage) -> Vec<u8> {
    let upper = |value: u16| (value >> 8) as u8;
    match image {
        DynamicImage::ImageRgb8(image) => image.into_raw(),
        DynamicImage::ImageLuma8(image) => image.into_raw().into_iter().flat_map(|value| [value; 3]).collect(),
        DynamicImage::ImageLumaA8(image) => image.pixels().flat_map(|pixel| [pixel.0[0]; 3]).collect(),
        DynamicImage::ImageRgba8(image) => image.pixels().flat_map(|p| [p.0[0], p.0[1], p.0[2]]).collect(),
        DynamicImage::ImageLuma16(image) => image.into_raw().into_iter().flat_map(|value| [upper(value); 3]).collect(),
        DynamicImage::ImageLumaA16(image) => image.pixels().flat_map(|pixel| [upper(pixel.0[0]); 3]).collect(),
        DynamicImage::ImageRgb16(image) => image.into_raw().into_iter().map(upper).collect(),
        DynamicImage::ImageRgba16(image) => image.pixels().flat_map(|p| [p.0[0], p.0[1], p.0[2]].map(upper)).collect(),
        other => other.into_rgb8().into_raw(),
    }
}

/// Whether a JPEG goes on to its end-of-image marker. Decoders fill in what is missing; training must not see that.
fn jpeg_is_complete(bytes: &[u8]) -> bool {
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

fn broken(path: &Path, message: impl Into<String>) -> DataError {
    DataError::Decode { path: path.to_owned(), message: message.into() }
}

fn truncated(path: &Path, message: String) -> DataError {
    DataError::Truncated { path: path.to_owned(), message }
}
