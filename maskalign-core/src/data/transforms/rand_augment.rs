//! RandAugment, as timm's `rand-m9-mstd0.5-inc1` does it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::check_probability;
use crate::data::affine::{Canvas, Matrix, affine, rotate};
use crate::data::tone::{Adjustment, by_value, mix, solarized};
use crate::data::{RgbImage, Sampling, Transform};
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
        check_probability("prob", self.prob)
    }
}

impl Op {
    /// The operation at a magnitude from 0 to 10; `sign` is the direction of those that have two.
    pub(crate) fn apply(self, image: RgbImage, magnitude: f64, sign: f64) -> RgbImage {
        let level = magnitude / MAX_MAGNITUDE;
        let enhance = (1.0 + sign * level * 0.9).max(0.1);
        let (width, height) = (image.width as f64, image.height as f64);
        match self {
            Op::AutoContrast => by_channel(image, stretched),
            Op::Equalize => by_channel(image, equalized),
            Op::Invert => by_value(image, |v| 255 - v),
            Op::Rotate => rotate(image, sign * level * 30.0, Sampling::Bicubic, Canvas::Kept, FILL),
            Op::PosterizeIncreasing => {
                let kept = 4 - (level * 4.0) as u32;
                let mask = (0xff00_u32 >> kept) as u8;
                by_value(image, |v| v & mask)
            }
            Op::SolarizeIncreasing => {
                let threshold = 256 - ((level * 256.0) as i32).min(256);
                solarized(image, f64::from(threshold))
            }
            Op::SolarizeAdd => {
                let add = (level * 110.0).min(128.0) as u8;
                by_value(image, |v| if v < 128 { v.saturating_add(add) } else { v })
            }
            Op::ColorIncreasing => Adjustment::Saturation(enhance).apply(image),
            Op::ContrastIncreasing => Adjustment::Contrast(enhance).apply(image),
            Op::BrightnessIncreasing => Adjustment::Brightness(enhance).apply(image),
            Op::SharpnessIncreasing => sharpened(image, enhance as f32),
            Op::ShearX => moved(&image, [1.0, sign * level * 0.3, 0.0, 0.0, 1.0, 0.0]),
            Op::ShearY => moved(&image, [1.0, 0.0, 0.0, sign * level * 0.3, 1.0, 0.0]),
            Op::TranslateXRel => moved(&image, [1.0, 0.0, sign * level * 0.45 * width, 0.0, 1.0, 0.0]),
            Op::TranslateYRel => moved(&image, [1.0, 0.0, 0.0, 0.0, 1.0, sign * level * 0.45 * height]),
        }
    }
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

/// The distance from the smoothed image times the factor: Pillow's `ImageEnhance.Sharpness`.
fn sharpened(mut image: RgbImage, factor: f32) -> RgbImage {
    let smooth = smoothed(&image);
    image.pixels.iter_mut().zip(smooth).for_each(|(value, smooth)| *value = mix(smooth, *value, factor));
    image
}

/// Sheared or shifted, in its own size.
fn moved(image: &RgbImage, matrix: Matrix) -> RgbImage {
    affine(image, image.size(), matrix, Sampling::Bicubic, FILL)
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

crate::register!(transform "rand_augment" => RandAugment, "applies random operations of contrast, colour and geometry",
    example: "{ type: rand_augment, num_ops: 2, magnitude: 9, magnitude_std: 0.5 }", paper: "RandAugment, arXiv 1909.13719");
