//! Files to images: what torchvision's default loader does (`PIL.Image.open(...).convert("RGB")`).
//!
//! The format is told by the content, not by the name. Colour profiles are not applied, nor are orientation tags but
//! those of TIFF; alpha is dropped, grey is repeated, grey of more than 8 bits is cut off at 255, of an animation the first
//! frame is taken: all as Pillow does, to the byte. What Pillow refuses is refused. Files that Pillow reads and this does not
//! (TIFF packed with LZMA or Zstandard, say) are refused with what to do, and so are damaged ones that Pillow fills in.

use std::cell::Cell;
use std::io::{self, Cursor, Read};
use std::panic::catch_unwind;
use std::path::Path;

use image::{DynamicImage, ImageError, ImageFormat, ImageReader, Limits};

use super::regular_file::{OpenError, open_regular};
use super::{DataError, RgbImage};
use maskalign_registry::source::visible_lines;

mod bmp;
mod colour;
mod gif;
mod jpeg;
mod pnm;
mod tiff;

/// Images with more pixels than this are refused: 256 MiB of RGB, the size above which Pillow warns.
pub const MAX_PIXELS: usize = 89_478_485;

/// Files with more bytes than this are refused.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// Memory in bytes that a decoder may use beside the image itself.
const MAX_DECODER_BYTES: u64 = 1 << 30;

/// The same for PNG, beside some of the rows.
const MAX_PNG_BYTES: u64 = 32 << 20;

/// Bytes of the largest pixel: four samples of 16 bits.
const MAX_PIXEL_BYTES: u64 = 8;

/// What is said of a file on which a decoder panicked.
pub const GAVE_UP: &str = "it is damaged in a way that its decoder does not foresee";

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Whether a panic on this thread now is one of a decoder, which is answered as a damaged file: a hook has nothing to report.
pub fn is_guarded() -> bool {
    GUARDED.get()
}

/// Reads one image file.
///
/// # Errors
/// The file cannot be read or is no regular file, is truncated, is no image of a known format, or is larger than [`MAX_PIXELS`].
pub fn read(path: &Path) -> Result<RgbImage, DataError> {
    let failed = |source| DataError::Read { path: path.to_owned(), source };
    let (file, metadata) = open_regular(path).map_err(|error| match error {
        OpenError::NotRegular(what) => DataError::NotAFile { path: path.to_owned(), what },
        OpenError::Io(source) => failed(source),
    })?;
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
    let format = match image::guess_format(bytes) {
        Ok(format) => format,
        // TIFF with places of 64 bits.
        Err(_) if bytes.starts_with(b"II+\0") || bytes.starts_with(b"MM\0+") => ImageFormat::Tiff,
        Err(_) => {
            let known = "JPEG, PNG, WebP, TIFF, BMP, GIF, PNM";
            return Err(broken(
                path,
                match other_content(bytes) {
                    Some(what) => format!("it is {what}, and {known} are read"),
                    None => format!("its first bytes are those of no known format ({known})"),
                },
            ));
        }
    };
    GUARDED.set(true);
    let decoded = catch_unwind(|| match format {
        ImageFormat::Jpeg if !jpeg::is_complete(bytes) => Err(Unreadable::NoEnd),
        ImageFormat::Jpeg => jpeg::decode(bytes),
        ImageFormat::Gif => gif::decode(bytes),
        ImageFormat::Bmp => bmp::decode(bytes),
        ImageFormat::Tiff => tiff::decode(bytes),
        ImageFormat::Pnm => pnm::decode(bytes),
        ImageFormat::Png | ImageFormat::WebP => by_image(bytes, format),
        other => Err(Unreadable::Broken(format!("{other:?} files are not read; save it as PNG or JPEG"))),
    });
    GUARDED.set(false);
    let length = bytes.len();
    match decoded.unwrap_or_else(|_| Err(Unreadable::Broken(GAVE_UP.into()))) {
        Ok(image) => {
            debug_assert_eq!(image.pixels.len(), image.width * image.height * 3);
            Ok(image)
        }
        Err(Unreadable::Broken(message)) => Err(broken(path, message)),
        Err(Unreadable::Truncated) => {
            Err(truncated(path, format!("the file ends after {length} bytes, inside the image")))
        }
        Err(Unreadable::NoEnd) => Err(truncated(path, format!("no end-of-image marker within its {length} bytes"))),
        Err(Unreadable::TooLarge(width, height)) => Err(DataError::TooLarge { path: path.to_owned(), width, height }),
    }
}

/// What often stands in an image's place.
fn other_content(bytes: &[u8]) -> Option<&'static str> {
    let start = bytes[..bytes.len().min(64)].trim_ascii_start().to_ascii_lowercase();
    let is_media = bytes.get(4..8) == Some(b"ftyp");
    match () {
        () if start.starts_with(b"<!doctype html") || start.starts_with(b"<html") => {
            Some("a web page, as servers send in place of an image that is gone")
        }
        () if start.starts_with(b"version https://git-lfs") => {
            Some("a pointer of Git LFS: `git lfs pull` gets the image")
        }
        () if start.starts_with(b"<svg") || start.starts_with(b"<?xml") => Some("SVG or other XML"),
        () if is_media && matches!(bytes.get(8..12), Some(b"heic" | b"heix" | b"mif1" | b"msf1" | b"hevc")) => {
            Some("HEIC, as telephones write")
        }
        () if is_media => Some("a video"),
        () if bytes.iter().all(|&byte| byte == 0) => {
            Some("nothing but zero bytes, as a download that broke off leaves")
        }
        () => None,
    }
}

/// Why a file's content is not an image.
enum Unreadable {
    /// What is wrong.
    Broken(String),
    /// The file ends inside the image.
    Truncated,
    /// A JPEG without its last marker.
    NoEnd,
    /// More than [`MAX_PIXELS`]: width and height.
    TooLarge(usize, usize),
}

/// Refuses sizes of nothing and of more than [`MAX_PIXELS`]; decoders ask before they take memory.
fn check_size(width: usize, height: usize) -> Result<(), Unreadable> {
    if width == 0 || height == 0 {
        return Err(Unreadable::Broken(format!("it is {width} x {height} pixels")));
    }
    if width.saturating_mul(height) > MAX_PIXELS {
        return Err(Unreadable::TooLarge(width, height));
    }
    Ok(())
}

/// How many bytes or pixels one byte of a file can unpack to, at most.
mod most_per_byte {
    /// A run of 258 bytes takes at least two bits.
    pub(super) const DEFLATE: usize = 1032;
    /// A code of 12 bits stands for 4,096 bytes at most.
    pub(super) const LZW: usize = 2731;
    /// A row as the one above takes one bit, and has 65,535 pixels at most.
    pub(super) const GROUP_4: usize = 8 * 65_535;
    /// A block of 64 pixels takes at least one bit.
    pub(super) const JPEG: usize = 512;
}

/// Refuses sizes that the file cannot hold, before memory is taken for them.
fn check_fits(unpacked: usize, most_per_byte: usize, file: usize) -> Result<(), Unreadable> {
    if unpacked / most_per_byte > file { Err(Unreadable::Truncated) } else { Ok(()) }
}

fn by_image(bytes: &[u8], format: ImageFormat) -> Result<RgbImage, Unreadable> {
    use image::ImageDecoder;

    let failed = |error: ImageError| match error {
        ImageError::IoError(error) if error.kind() == io::ErrorKind::UnexpectedEof => Unreadable::Truncated,
        error => Unreadable::Broken(error.to_string()),
    };
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(match (format, bytes.get(16..20)) {
        // A packed colour profile, which nobody asks for, could take the whole of it: rows are what memory is for here.
        (ImageFormat::Png, Some(&[a, b, c, d])) => {
            MAX_PNG_BYTES + 4 * MAX_PIXEL_BYTES * u64::from(u32::from_be_bytes([a, b, c, d]))
        }
        _ => MAX_DECODER_BYTES,
    });
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(failed)?;
    let (width, height) = decoder.dimensions();
    let (width, height) = (width as usize, height as usize);
    check_size(width, height)?;
    if format == ImageFormat::Png {
        let bits = usize::from(decoder.original_color_type().bits_per_pixel());
        check_fits(width * height / 8 * bits, most_per_byte::DEFLATE, bytes.len())?;
    }
    // The decoder makes alpha of one transparent value; in the file it is grey alone: 16 bits, colour type 0.
    let is_deep_grey = format == ImageFormat::Png && bytes.get(24..26) == Some(&[16, 0]);
    let image = DynamicImage::from_decoder(decoder).map_err(failed)?;
    let pixels = match image {
        DynamicImage::ImageLumaA16(image) if is_deep_grey => {
            to_rgb(DynamicImage::ImageLuma16(DynamicImage::ImageLumaA16(image).into_luma16()))
        }
        image => to_rgb(image),
    };
    Ok(RgbImage { width, height, pixels })
}

fn to_rgb(image: DynamicImage) -> Vec<u8> {
    let upper = |value: u16| (value >> 8) as u8;
    let cut = |value: u16| value.min(255) as u8;
    match image {
        DynamicImage::ImageRgb8(image) => image.into_raw(),
        DynamicImage::ImageLuma8(image) => image.into_raw().into_iter().flat_map(|value| [value; 3]).collect(),
        DynamicImage::ImageLumaA8(image) => image.pixels().flat_map(|pixel| [pixel.0[0]; 3]).collect(),
        DynamicImage::ImageRgba8(image) => image.pixels().flat_map(|p| [p.0[0], p.0[1], p.0[2]]).collect(),
        DynamicImage::ImageLuma16(image) => image.into_raw().into_iter().flat_map(|value| [cut(value); 3]).collect(),
        DynamicImage::ImageLumaA16(image) => image.pixels().flat_map(|pixel| [upper(pixel.0[0]); 3]).collect(),
        DynamicImage::ImageRgb16(image) => image.into_raw().into_iter().map(upper).collect(),
        DynamicImage::ImageRgba16(image) => image.pixels().flat_map(|p| [p.0[0], p.0[1], p.0[2]].map(upper)).collect(),
        other => other.into_rgb8().into_raw(),
    }
}

fn broken(path: &Path, message: impl Into<String>) -> DataError {
    let message: String = message.into();
    DataError::Decode { path: path.to_owned(), message: visible_lines(&message) }
}

fn truncated(path: &Path, message: String) -> DataError {
    DataError::Truncated { path: path.to_owned(), message }
}
