//! RandAugment, as timm's `rand-m9-mstd0.5-inc1` does it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::data::{RgbImage, Transform};
use crate::random::Stream;
use maskalign_registry::Refusal;

/// The largest magnitude: timm's scale runs from 0 to 10.
const MAX_MAGNITUDE: f64 = 10.0;
/// What moves into the image from outside: ImageNet's mean colour, as timm rounds it.
const FILL: [u8; 3] = [124, 116, 104];

/// Applies operations drawn with replacement from fifteen (contrast, colour, geometry), whose strength grows with the
/// magnitude: timm's increasing set, Pillow's arithmetic, bicubic geometry filled with ImageNet's mean colour.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RandAugment {
    /// Operations drawn for an image (`n` in timm's names).
    #[serde(default = "num_ops")]
    #[schemars(range(min = 1))]
    pub num_ops: usize,
    /// Mean strength, from 0 to 10 (`m`).
    #[serde(default = "magnitude")]
    #[schemars(range(min = 0.0, max = 10.0))]
    pub magnitude: f64,
    /// Standard deviation of the strength from operation to operation (`mstd`).
    #[serde(default = "magnitude_std")]
    #[schemars(range(min = 0.0))]
    pub magnitude_std: f64,
    /// Probability that a drawn operation is applied (`p`).
    #[serde(default = "prob")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub prob: f64,
}

fn num_ops() -> usize {
    2
}
fn magnitude() -> f64 {
    9.0
}
fn magnitude_std() -> f64 {
    0.5
}
fn prob() -> f64 {
    0.5
}

/// The operations, by timm's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(crate) enum Op {
    AutoContrast,
    Equalize,
    Invert,
    Rotate,
    PosterizeIncreasing,
    SolarizeIncreasing,
    SolarizeAdd,
    ColorIncreasing,
    ContrastIncreasing,
    BrightnessIncreasing,
    SharpnessIncreasing,
    ShearX,
    ShearY,
    TranslateXRel,
    TranslateYRel,
}

const OPS: [Op; 15] = [
    Op::AutoContrast,
    Op::Equalize,
    Op::Invert,
    Op::Rotate,
    Op::PosterizeIncreasing,
    Op::SolarizeIncreasing,
    Op::SolarizeAdd,
    Op::ColorIncreasing,
    Op::ContrastIncreasing,
    Op::BrightnessIncreasing,
    Op::SharpnessIncreasing,
    Op::ShearX,
    Op::ShearY,
    Op::TranslateXRel,
    Op::TranslateYRel,
];

impl Transform for RandAugment {
    fn apply(&self, mut image: RgbImage, rng: &mut Stream) -> RgbImage {
        let drawn: Vec<Op> = (0..self.num_ops).map(|_| OPS[rng.below(OPS.len())]).collect();
        for op in drawn {
            if rng.uniform() < self.prob {
                let magnitude = (self.magnitude + self.magnitude_std * rng.normal()).clamp(0.0, MAX_MAGNITUDE);
                let sign = if rng.uniform() < 0.5 { -1.0 } else { 1.0 };
                image = op.apply(image, magnitude, sign);
            }
        }
        image
    }

    fn output_size(&self, input: Option<(usize, usize)>) -> Option<(usize, usize)> {
        input
    }

    fn check(&self) -> Result<(), Refusal> {
        let outside =
            |option: &str, what: &str, value: f64| Err(Refusal::new(option, format!("expected {what}, found {value}")));
        if self.num_ops == 0 {
            return Err(
                Refusal::new("num_ops", "expected at least 1 operation, found 0").help("leave the transform out")
            );
        }
        if !(0.0..=MAX_MAGNITUDE).contains(&self.magnitude) {
            return outside("magnitude", "a strength from 0 to 10", self.magnitude);
        }
        if !(self.magnitude_std >= 0.0 && self.magnitude_std.is_finite()) {
            return outside("magnitude_std", "a standard deviation of 0 or more", self.magnitude_std);
        }
        if !(0.0..=1.0).contains(&self.prob) {
            return outside("prob", "a probability from 0 to 1", self.prob);
        }
        Ok(())
    }
}

impl Op {
    /// The operation at a magnitude from 0 to 10; `sign` is the direction of those that have two.
    pub(crate) fn apply(self, image: RgbImage, magnitude: f64, sign: f64) -> RgbImage {
        let level = magnitude / MAX_MAGNITUDE;
        let enhance = (1.0 + sign * level * 0.9).max(0.1) as f32;
        let (width, height) = (image.width as f64, image.height as f64);
        match self {
            Op::AutoContrast => by_channel(image, stretched),
            Op::Equalize => by_channel(image, equalized),
            Op::Invert => by_value(image, |v| 255 - v),
            Op::Rotate => rotate(image, sign * level * 30.0),
            Op::PosterizeIncreasing => {
                let kept = 4 - (level * 4.0) as u32;
                let mask = (0xff00_u32 >> kept) as u8;
                by_value(image, |v| v & mask)
            }
            Op::SolarizeIncreasing => {
                let threshold = 256 - ((level * 256.0) as i32).min(256);
                by_value(image, |v| if i32::from(v) < threshold { v } else { 255 - v })
            }
            Op::SolarizeAdd => {
                let add = (level * 110.0).min(128.0) as u8;
                by_value(image, |v| if v < 128 { v.saturating_add(add) } else { v })
            }
            Op::ColorIncreasing => {
                let grey = luminance(&image).iter().flat_map(|&v| [v; 3]).collect();
                blend(image, grey, enhance)
            }
            Op::ContrastIncreasing => {
                let luminance = luminance(&image);
                let sum: u64 = luminance.iter().map(|&v| u64::from(v)).sum();
                let mean = (sum as f64 / luminance.len() as f64 + 0.5) as u8;
                let flat = vec![mean; image.pixels.len()];
                blend(image, flat, enhance)
            }
            Op::BrightnessIncreasing => {
                let black = vec![0; image.pixels.len()];
                blend(image, black, enhance)
            }
            Op::SharpnessIncreasing => {
                let smooth = smoothed(&image);
                blend(image, smooth, enhance)
            }
            Op::ShearX => affine(image, [1.0, sign * level * 0.3, 0.0, 0.0, 1.0, 0.0]),
            Op::ShearY => affine(image, [1.0, 0.0, 0.0, sign * level * 0.3, 1.0, 0.0]),
            Op::TranslateXRel => affine(image, [1.0, 0.0, sign * level * 0.45 * width, 0.0, 1.0, 0.0]),
            Op::TranslateYRel => affine(image, [1.0, 0.0, 0.0, 0.0, 1.0, sign * level * 0.45 * height]),
        }
    }
}

fn by_value(mut image: RgbImage, f: impl Fn(u8) -> u8) -> RgbImage {
    image.pixels.iter_mut().for_each(|v| *v = f(*v));
    image
}

/// Maps each channel by the table that `table` makes of its histogram.
fn by_channel(mut image: RgbImage, table: impl Fn(&[u64; 256]) -> Option<[u8; 256]>) -> RgbImage {
    for channel in 0..3 {
        let mut histogram = [0; 256];
        image.pixels.iter().skip(channel).step_by(3).for_each(|&v| histogram[usize::from(v)] += 1);
        if let Some(table) = table(&histogram) {
            image.pixels.iter_mut().skip(channel).step_by(3).for_each(|v| *v = table[usize::from(*v)]);
        }
    }
    image
}

/// Pillow's `ImageOps.autocontrast` without cutoff.
fn stretched(histogram: &[u64; 256]) -> Option<[u8; 256]> {
    let low = histogram.iter().position(|&n| n > 0)?;
    let high = histogram.iter().rposition(|&n| n > 0)?;
    if high <= low {
        return None;
    }
    let scale = 255.0 / (high - low) as f64;
    let offset = -(low as f64) * scale;
    Some(std::array::from_fn(|v| (v as f64 * scale + offset).clamp(0.0, 255.0) as u8))
}

/// Pillow's `ImageOps.equalize`.
fn equalized(histogram: &[u64; 256]) -> Option<[u8; 256]> {
    let last = histogram.iter().rposition(|&n| n > 0)?;
    let step = (histogram.iter().sum::<u64>() - histogram[last]) / 255;
    if step == 0 {
        return None;
    }
    let mut count = step / 2;
    Some(std::array::from_fn(|v| {
        let value = (count / step).min(255) as u8;
        count += histogram[v];
        value
    }))
}

/// Pillow's conversion to `L` (ITU-R 601-2), one value a pixel.
fn luminance(image: &RgbImage) -> Vec<u8> {
    let weigh = |p: &[u8]| 19595 * u32::from(p[0]) + 38470 * u32::from(p[1]) + 7471 * u32::from(p[2]) + 0x8000;
    image.pixels.chunks_exact(3).map(|p| (weigh(p) >> 16) as u8).collect()
}

/// `other + factor (image - other)`, Pillow's `Image.blend`: cut off, not rounded.
fn blend(mut image: RgbImage, other: Vec<u8>, factor: f32) -> RgbImage {
    for (v, other) in image.pixels.iter_mut().zip(other) {
        let other = f32::from(other);
        // `as` saturates.
        *v = (other + factor * (f32::from(*v) - other)) as u8;
    }
    image
}

/// Pillow's filter `SMOOTH`: 5 in the middle of eight 1s, over 13; the border stays.
fn smoothed(image: &RgbImage) -> Vec<u8> {
    let (width, height) = image.size();
    let mut out = image.pixels.clone();
    let at = |x: usize, y: usize, channel: usize| u32::from(image.pixels[(y * width + x) * 3 + channel]);
    for y in 1..height.saturating_sub(1) {
        for x in 1..width.saturating_sub(1) {
            for channel in 0..3 {
                let around: u32 = (y - 1..=y + 1).flat_map(|y| (x - 1..=x + 1).map(move |x| at(x, y, channel))).sum();
                let sum = around + 4 * at(x, y, channel);
                out[(y * width + x) * 3 + channel] = ((2 * sum + 13) / 26) as u8;
            }
        }
    }
    out
}

/// Turns about the middle, counter-clockwise, by Pillow's `rotate`.
fn rotate(image: RgbImage, degrees: f64) -> RgbImage {
    let degrees = degrees.rem_euclid(360.0);
    if degrees == 0.0 {
        return image;
    }
    let angle = -degrees.to_radians();
    // Pillow rounds to fifteen decimals, so that right angles are exact.
    let round = |v: f64| (v * 1e15).round() / 1e15;
    let (cos, sin) = (round(angle.cos()), round(angle.sin()));
    let (x, y) = (image.width as f64 / 2.0, image.height as f64 / 2.0);
    affine(image, [cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y])
}

/// Each pixel of the result from where `(a x + b y + c, d x + e y + f)` takes its middle, by Pillow's bicubic filter;
/// [`FILL`] from outside.
fn affine(image: RgbImage, [a, b, c, d, e, f]: [f64; 6]) -> RgbImage {
    let (width, height) = image.size();
    let mut out = Vec::with_capacity(image.pixels.len());
    for y in 0..height {
        for x in 0..width {
            let (x, y) = (x as f64 + 0.5, y as f64 + 0.5);
            let (from_x, from_y) = (a * x + b * y + c, d * x + e * y + f);
            let inside = (0.0..width as f64).contains(&from_x) && (0.0..height as f64).contains(&from_y);
            out.extend(if inside { bicubic(&image, from_x - 0.5, from_y - 0.5) } else { FILL });
        }
    }
    RgbImage { width, height, pixels: out }
}

/// The value between pixels, by cubic convolution with a = -1; rows beyond the edge repeat what was before them.
fn bicubic(image: &RgbImage, x: f64, y: f64) -> [u8; 3] {
    let (width, height) = image.size();
    let (left, top) = (x.floor(), y.floor());
    let (dx, dy) = (x - left, y - top);
    let columns: [usize; 4] =
        std::array::from_fn(|i| (left as isize - 1 + i as isize).clamp(0, width as isize - 1) as usize);
    let row =
        |y: usize, channel: usize| cubic(columns.map(|x| f64::from(image.pixels[(y * width + x) * 3 + channel])), dx);
    std::array::from_fn(|channel| {
        let first = (top as isize - 1).clamp(0, height as isize - 1) as usize;
        let mut rows = [row(first, channel); 4];
        for i in 1..4 {
            let y = top as isize - 1 + i as isize;
            rows[i] = if (0..height as isize).contains(&y) { row(y as usize, channel) } else { rows[i - 1] };
        }
        cubic(rows, dy) as u8
    })
}

/// The cubic through four equidistant values, `d` of the way from the second to the third.
fn cubic([v1, v2, v3, v4]: [f64; 4], d: f64) -> f64 {
    let linear = v3 - v1;
    let square = 2.0 * (v1 - v2) + v3 - v4;
    let cube = v2 - v1 + v4 - v3;
    v2 + d * (linear + d * (square + d * cube))
}

crate::register!(transform "rand_augment" => RandAugment, "applies random operations of contrast, colour and geometry",
    example: "{ type: rand_augment, num_ops: 2, magnitude: 9, magnitude_std: 0.5 }", paper: "RandAugment, arXiv 1909.13719");
