//! Changes of colour in Pillow's 8-bit arithmetic, as torchvision makes them on Pillow's images: the same bytes.
//!
//! Source of the law: Pillow's `ImageEnhance` and `ImageOps`, its `Blend.c`, the conversions to `L` and `HSV` of its
//! `Convert.c`, and torchvision's `adjust_hue`. Where Pillow computes in single precision, so does this.

use super::image::RgbImage;

/// A change of colour, and by how much.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Adjustment {
    /// Every value times the factor.
    Brightness(f64),
    /// The distance from the mean brightness of the image times the factor.
    Contrast(f64),
    /// The distance from the pixel's own brightness times the factor.
    Saturation(f64),
    /// Hues turned by this share of the circle of colours, from -0.5 to 0.5.
    Hue(f64),
}

impl Adjustment {
    pub(crate) fn apply(self, image: RgbImage) -> RgbImage {
        match self {
            Adjustment::Brightness(factor) => {
                let factor = narrowed(factor);
                by_value(image, |value| mix(0, value, factor))
            }
            Adjustment::Contrast(factor) => {
                let factor = narrowed(factor);
                let (pixels, _) = image.pixels.as_chunks::<3>();
                let sum: u64 = pixels.iter().map(|&pixel| u64::from(luminance(pixel))).sum();
                let mean = (sum as f64 / pixels.len() as f64 + 0.5) as u8;
                by_value(image, |value| mix(mean, value, factor))
            }
            Adjustment::Saturation(factor) => {
                let factor = narrowed(factor);
                by_pixel(image, |pixel| {
                    let grey = luminance(pixel);
                    pixel.map(|value| mix(grey, value, factor))
                })
            }
            Adjustment::Hue(share) => {
                // 255 hues, cut off towards zero, and round again: torchvision's law.
                let turn = (share * 255.0) as i32 as u8;
                by_pixel(image, |pixel| {
                    let [hue, saturation, value] = to_hsv(pixel);
                    from_hsv([hue.wrapping_add(turn), saturation, value])
                })
            }
        }
    }
}

/// Every pixel by its brightness.
pub(crate) fn grey(image: RgbImage) -> RgbImage {
    by_pixel(image, |pixel| [luminance(pixel); 3])
}

/// Values from `threshold` on turned into their negative.
pub(crate) fn solarized(image: RgbImage, threshold: f64) -> RgbImage {
    by_value(image, |value| if f64::from(value) < threshold { value } else { 255 - value })
}

pub(crate) fn by_value(mut image: RgbImage, f: impl Fn(u8) -> u8) -> RgbImage {
    image.pixels.iter_mut().for_each(|value| *value = f(*value));
    image
}

fn by_pixel(mut image: RgbImage, f: impl Fn([u8; 3]) -> [u8; 3]) -> RgbImage {
    let (pixels, _) = image.pixels.as_chunks_mut::<3>();
    for pixel in pixels {
        *pixel = f(*pixel);
    }
    image
}

/// `other + factor (value - other)`, Pillow's `Image.blend`: cut off, not rounded.
pub(crate) fn mix(other: u8, value: u8, factor: f32) -> u8 {
    let (other, value) = (f32::from(other), f32::from(value));
    // `as` saturates.
    (other + factor * (value - other)) as u8
}

/// A factor as Pillow takes it, and finite, so that no product is undefined.
fn narrowed(factor: f64) -> f32 {
    (factor as f32).min(f32::MAX)
}

/// Pillow's conversion to `L` (ITU-R 601-2).
fn luminance([red, green, blue]: [u8; 3]) -> u8 {
    ((19595 * u32::from(red) + 38470 * u32::from(green) + 7471 * u32::from(blue) + 0x8000) >> 16) as u8
}

/// Pillow's conversion to `HSV`, 8 bits each; hue 255 is hue 0 again.
fn to_hsv([red, green, blue]: [u8; 3]) -> [u8; 3] {
    let (most, least) = (red.max(green).max(blue), red.min(green).min(blue));
    if most == least {
        return [0, 0, most];
    }
    let range = f32::from(most - least);
    let below = |value: u8| f64::from(f32::from(most - value) / range);
    let sixths = if red == most {
        below(blue) - below(green)
    } else if green == most {
        2.0 + below(red) - below(blue)
    } else {
        4.0 + below(green) - below(red)
    };
    let hue = ((f64::from(sixths as f32) / 6.0 + 1.0) % 1.0) as f32;
    let byte = |value: f32| (f64::from(value) * 255.0) as u8;
    [byte(hue), byte(range / f32::from(most)), most]
}

/// Pillow's conversion from `HSV`.
fn from_hsv([hue, saturation, value]: [u8; 3]) -> [u8; 3] {
    if saturation == 0 {
        return [value; 3];
    }
    let sixths = f64::from(hue) * 6.0 / 255.0;
    let sector = sixths.floor();
    let along = (sixths - sector) as f32;
    let saturation = (f64::from(saturation) / 255.0) as f32;
    let kept = |share: f64| (f64::from(value) * share).round() as u8;
    let low = kept(1.0 - f64::from(saturation));
    let falling = kept(1.0 - f64::from(saturation * along));
    let rising = kept(1.0 - f64::from(saturation) * (1.0 - f64::from(along)));
    match sector as u8 % 6 {
        0 => [value, rising, low],
        1 => [falling, value, low],
        2 => [low, value, rising],
        3 => [low, falling, value],
        4 => [rising, low, value],
        _ => [value, low, falling],
    }
}
