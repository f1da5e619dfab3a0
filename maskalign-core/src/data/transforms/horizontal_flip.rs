//! Mirrored images.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::check_probability;
use crate::data::{RgbImage, Transform};
use crate::random::Stream;
use maskalign_registry::Refusal;

/// Mirrors an image left to right, or leaves it as it is.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HorizontalFlip {
    /// Probability that an image is mirrored.
    #[serde(default = "default_p")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub p: f64,
}

fn default_p() -> f64 {
    0.5
}

impl Transform for HorizontalFlip {
    fn apply(&self, mut image: RgbImage, rng: &mut Stream) -> RgbImage {
        if rng.uniform() < self.p {
            for row in image.pixels.chunks_exact_mut(image.width * 3) {
                let (pixels, _) = row.as_chunks_mut::<3>();
                pixels.reverse();
            }
        }
        image
    }

    fn output_size(&self, input: Option<(usize, usize)>) -> Option<(usize, usize)> {
        input
    }

    fn check(&self) -> Result<(), Refusal> {
        check_probability("p", self.p)
    }
}

crate::register!(transform "horizontal_flip" => HorizontalFlip, "mirrors an image with a probability",
    example: "{ type: horizontal_flip, p: 0.5 }");
