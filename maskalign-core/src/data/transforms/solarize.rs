//! Images whose bright values are turned into their negative.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{always, check_probability};
use crate::data::{RgbImage, Transform, tone};
use crate::random::Stream;
use maskalign_registry::Refusal;

/// What no level reaches.
const ABOVE_ALL: f64 = 256.0;

/// Replaces each value from the threshold on by 255 less it.
///
/// The law is torchvision's `RandomSolarize` and Pillow's `ImageOps.solarize`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Solarize {
    /// The least level, of 0 to 255, that is turned into its negative; 256 turns none.
    #[serde(default = "middle")]
    #[schemars(range(min = 0.0, max = 256.0))]
    pub threshold: f64,
    /// Probability that an image is changed.
    #[serde(default = "always")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub p: f64,
}

fn middle() -> f64 {
    128.0
}

impl Transform for Solarize {
    fn apply(&self, image: RgbImage, rng: &mut Stream) -> RgbImage {
        if rng.uniform() < self.p { tone::solarized(image, self.threshold) } else { image }
    }

    fn output_size(&self, input: Option<(usize, usize)>) -> Option<(usize, usize)> {
        input
    }

    fn check(&self) -> Result<(), Refusal> {
        // Between 0 and 1 nobody means a level: torchvision's thresholds of tensors are such numbers.
        if !(0.0..=ABOVE_ALL).contains(&self.threshold) || (self.threshold > 0.0 && self.threshold < 1.0) {
            let message = format!("expected a level from 0 to {ABOVE_ALL}, found {}", self.threshold);
            return Err(Refusal::new("threshold", message).help("levels are those of 8 bits: 128 is the middle"));
        }
        check_probability("p", self.p)
    }
}

crate::register!(transform "solarize" => Solarize, "turns bright values into their negative with a probability",
    example: "{ type: solarize, threshold: 128, p: 0.2 }", paper: "BYOL, arXiv 2006.07733, appendix B");
