//! Images without colour.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{always, check_probability};
use crate::data::{RgbImage, Transform, tone};
use crate::random::Stream;
use maskalign_registry::Refusal;

/// Replaces every pixel by its brightness, in three equal channels.
///
/// The law is torchvision's `RandomGrayscale` on Pillow images: ITU-R 601-2, rounded to 8 bits.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Grayscale {
    /// Probability that an image is changed.
    #[serde(default = "always")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub p: f64,
}

impl Transform for Grayscale {
    fn apply(&self, image: RgbImage, rng: &mut Stream) -> RgbImage {
        if rng.uniform() < self.p { tone::grey(image) } else { image }
    }

    fn output_size(&self, input: Option<(usize, usize)>) -> Option<(usize, usize)> {
        input
    }

    fn check(&self) -> Result<(), Refusal> {
        check_probability("p", self.p)
    }
}

crate::register!(transform "grayscale" => Grayscale, "takes colours away with a probability",
    example: "{ type: grayscale, p: 0.2 }", paper: "SimCLR, arXiv 2002.05709, appendix A");
