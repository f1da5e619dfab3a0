//! Sheets of images for people: rows of equally large pictures, written as PNG or JPEG.

use image::{ExtendedColorType, ImageEncoder, codecs::png::PngEncoder, imageops};

use libjpeg_turbo_rs::{PixelFormat, Subsampling};

use super::RgbImage;

/// Small pictures are enlarged to at least as many pixels a side, each pixel to a square.
const LEAST_SIDE: usize = 112;
/// Pixels between two pictures.
const GAP: usize = 4;
/// Between pictures, and where there is none; readable on white and on black.
const GROUND: u8 = 128;

/// Rows of pictures, all as large as the first, as one image.
///
/// ```
/// # use maskalign_core::data::{RgbImage, sheet};
/// let pictures = vec![vec![RgbImage::black(112, 112); 3]; 2];
/// assert_eq!(sheet(&pictures).size(), (3 * 112 + 4 * 4, 2 * 112 + 3 * 4));
/// ```
pub fn sheet(rows: &[Vec<RgbImage>]) -> RgbImage {
    let (width, height) = rows.iter().flatten().next().map_or((1, 1), RgbImage::size);
    let scale = LEAST_SIDE.div_ceil(width.min(height));
    let (width, height) = (width * scale, height * scale);
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let whole = (columns * (width + GAP) + GAP, rows.len() * (height + GAP) + GAP);
    let mut sheet = image::RgbImage::from_pixel(whole.0 as u32, whole.1 as u32, image::Rgb([GROUND; 3]));
    for (row, pictures) in rows.iter().enumerate() {
        for (column, picture) in pictures.iter().enumerate() {
            let (w, h) = picture.size();
            let Some(picture) = image::RgbImage::from_raw(w as u32, h as u32, picture.pixels.clone()) else { continue };
            let picture = imageops::resize(&picture, width as u32, height as u32, imageops::FilterType::Nearest);
            let at = |index: usize, side: usize| (GAP + index * (side + GAP)) as i64;
            imageops::replace(&mut sheet, &picture, at(column, width), at(row, height));
        }
    }
    RgbImage { width: whole.0, height: whole.1, pixels: sheet.into_raw() }
}

/// An image as a PNG file.
///
/// # Errors
/// An image of no pixels, or one too large for the format.
pub fn png(image: &RgbImage) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let encoder = PngEncoder::new(&mut bytes);
    let written = encoder.write_image(&image.pixels, image.width as u32, image.height as u32, ExtendedColorType::Rgb8);
    written.map_err(std::io::Error::other)?;
    Ok(bytes)
}

/// An image as a small JPEG file, for a page of many.
///
/// ```
/// # use maskalign_core::data::{RgbImage, jpeg};
/// assert!(jpeg(&RgbImage::black(112, 112))?.len() < 2000);
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// # Errors
/// An image of no pixels, or one too large for the format.
pub fn jpeg(image: &RgbImage) -> std::io::Result<Vec<u8>> {
    const QUALITY: u8 = 85;
    let RgbImage { width, height, pixels } = image;
    libjpeg_turbo_rs::compress(pixels, *width, *height, PixelFormat::Rgb, QUALITY, Subsampling::S420)
        .map_err(std::io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_pictures_are_enlarged_to_squares_and_stand_in_rows() {
        let white = RgbImage::from_grey(28, 28, &[255; 28 * 28]);
        let image = sheet(&[vec![white.clone(), RgbImage::black(28, 28)], vec![white]]);
        assert_eq!(image.size(), (2 * 112 + 12, 2 * 112 + 12));
        let at = |x: usize, y: usize| image.pixels[3 * (y * image.width + x)];
        assert_eq!([at(0, 0), at(4, 4), at(115, 115), at(116, 4), at(120, 4)], [128, 255, 255, 128, 0]);
        assert_eq!([at(4, 120), at(120, 120)], [255, 128], "the second row has one picture");
        let file = png(&image).unwrap();
        let again = image::load_from_memory(&file).unwrap().into_rgb8();
        assert_eq!(again.into_raw(), image.pixels);
    }
}
