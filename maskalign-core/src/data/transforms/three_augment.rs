//! DeiT III's 3-Augment.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::data::{RgbImage, Transform, blur, tone};
use crate::random::Stream;
use maskalign_registry::Refusal;

/// Makes an image grey, solarizes it or blurs it, each with the same chance.
///
/// The law is that of DeiT's `augment.py`: Pillow's `ImageOps.solarize` from 128 on, and its `ImageFilter.GaussianBlur` with
/// a standard deviation uniform in [0.1, 2]. The random crop and flip before it and the colour jitter of 0.3 behind it are
/// transforms of their own.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ThreeAugment {}

/// What is done to an image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Choice {
    Grey,
    Solarized,
    /// With this standard deviation in pixels.
    Blurred(f64),
}

impl ThreeAugment {
    pub(crate) fn draw(rng: &mut Stream) -> Choice {
        match rng.below(3) {
            0 => Choice::Grey,
            1 => Choice::Solarized,
            _ => Choice::Blurred(rng.uniform_in(0.1, 2.0)),
        }
    }
}

impl Choice {
    pub(crate) fn apply(self, image: RgbImage) -> RgbImage {
        match self {
            Choice::Grey => tone::grey(image),
            Choice::Solarized => tone::solarized(image, 128.0),
            Choice::Blurred(sigma) => blur::by_boxes(image, sigma),
        }
    }
}

impl Transform for ThreeAugment {
    fn apply(&self, image: RgbImage, rng: &mut Stream) -> RgbImage {
        Self::draw(rng).apply(image)
    }

    fn output_size(&self, input: Option<(usize, usize)>) -> Option<(usize, usize)> {
        input
    }

    fn check(&self) -> Result<(), Refusal> {
        Ok(())
    }
}

crate::register!(transform "three_augment" => ThreeAugment, "makes an image grey, solarizes it or blurs it",
    example: "{ type: three_augment }", paper: "DeiT III, arXiv 2204.07118");
