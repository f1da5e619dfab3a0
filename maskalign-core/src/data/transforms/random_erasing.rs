//! Random erasing, as timm does it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::check_probability;
use crate::data::{Crop, RgbImage, Transform};
use crate::nn::Statistics;
use crate::random::Stream;
use maskalign_registry::Refusal;

/// Boxes that are tried where one does not fit.
const TRIES: usize = 10;

/// What an erased box is filled with, in values normalised by ImageNet's statistics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErasingMode {
    /// Zero: the mean colour.
    Const,
    /// One normal draw a channel.
    Rand,
    /// One normal draw a pixel and channel.
    #[default]
    Pixel,
}

/// Fills one random box of an image with noise, after all other transforms: values may leave [0, 1], as in timm, which
/// erases normalised images.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RandomErasing {
    /// Probability that an image gets a box.
    #[serde(default = "prob")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub prob: f64,
    /// What it is filled with.
    #[serde(default)]
    pub mode: ErasingMode,
    /// Least and largest share of the image's area.
    #[serde(default = "area")]
    pub area: [f64; 2],
    /// Least and largest height over width, drawn uniformly in its logarithm.
    #[serde(default = "aspect")]
    pub aspect: [f64; 2],
}

fn prob() -> f64 {
    0.25
}
fn area() -> [f64; 2] {
    [0.02, 1.0 / 3.0]
}
fn aspect() -> [f64; 2] {
    [0.3, 1.0 / 0.3]
}

impl RandomErasing {
    /// The box to erase, if one of ten fits.
    pub(crate) fn draw(&self, (width, height): (usize, usize), rng: &mut Stream) -> Option<Crop> {
        for _ in 0..TRIES {
            let area = rng.uniform_in(self.area[0], self.area[1]) * (width * height) as f64;
            let aspect = rng.uniform_in(self.aspect[0].ln(), self.aspect[1].ln()).exp();
            let side = |squared: f64| squared.sqrt().round_ties_even() as usize;
            let (h, w) = (side(area * aspect), side(area / aspect));
            if w < width && h < height {
                let (top, left) = (rng.below(height - h + 1), rng.below(width - w + 1));
                return Some(Crop { top, left, height: h, width: w });
            }
        }
        None
    }
}

impl Transform for RandomErasing {
    fn apply(&self, image: RgbImage, _: &mut Stream) -> RgbImage {
        image
    }

    fn apply_planes(&self, planes: &mut [f32], size: (usize, usize), rng: &mut Stream) {
        if rng.uniform() >= self.prob {
            return;
        }
        let Some(Crop { top, left, height, width }) = self.draw(size, rng) else { return };
        let Statistics { mean, std } = Statistics::IMAGENET;
        for (channel, plane) in planes.chunks_exact_mut(size.0 * size.1).enumerate() {
            let mut draw = || mean[channel] + std[channel] * rng.normal() as f32;
            let colour = match self.mode {
                ErasingMode::Const => Some(mean[channel]),
                ErasingMode::Rand => Some(draw()),
                ErasingMode::Pixel => None,
            };
            for row in plane.chunks_exact_mut(size.0).skip(top).take(height) {
                row[left..left + width].fill_with(|| colour.unwrap_or_else(&mut draw));
            }
        }
    }

    fn output_size(&self, input: Option<(usize, usize)>) -> Option<(usize, usize)> {
        input
    }

    fn check(&self) -> Result<(), Refusal> {
        check_probability("prob", self.prob)?;
        let [least, largest] = self.area;
        if !(0.0 < least && least <= largest && largest <= 1.0) {
            let found = format!("expected two shares with 0 < least <= largest <= 1, found [{least}, {largest}]");
            return Err(Refusal::new("area", found));
        }
        let [least, largest] = self.aspect;
        if !(0.0 < least && least <= largest && largest.is_finite()) {
            let found = format!("expected two ratios with 0 < least <= largest, found [{least}, {largest}]");
            return Err(Refusal::new("aspect", found));
        }
        Ok(())
    }
}

crate::register!(transform "random_erasing" => RandomErasing, "fills a random box with noise",
    example: "{ type: random_erasing, prob: 0.25, mode: pixel }", paper: "Random Erasing, arXiv 1708.04896");
