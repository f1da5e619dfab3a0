//! Blurred images.

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

use super::{always, check_probability};
use crate::data::amount::Limits;
use crate::data::{Amount, RgbImage, Transform, blur};
use crate::random::Stream;
use maskalign_registry::Refusal;

/// The largest standard deviation in pixels.
const MOST: f64 = 1000.0;
const SIGMA: Limits = Limits { number: (0.0, MOST), ends: (0.0, MOST) };

/// Blurs an image by a Gaussian of random width.
///
/// Two programs' blurs are called that, and they differ by a few levels. Without `kernel_size` it is Pillow's
/// `ImageFilter.GaussianBlur`, which DINO, iBOT and DeiT III use: three boxes, to the byte. With `kernel_size` it is
/// torchvision's `GaussianBlur`, which DINOv2 uses (with 9): a kernel of that size, cut off there. Its sums are in single
/// precision and in an order that PyTorch chooses by the machine, so that a value near the middle of two levels may come out
/// as the other one.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GaussianBlur {
    /// Standard deviation in pixels: one number, or drawn uniformly from `[low, high]`.
    #[serde(default = "usual")]
    #[schemars(schema_with = "sigma")]
    pub sigma: Amount,
    /// Side in pixels of torchvision's kernel, an odd number (DINOv2: 9). Absent: Pillow's blur (DINO, iBOT, DeiT III).
    #[serde(default)]
    #[schemars(range(min = 1, max = 1023))]
    pub kernel_size: Option<usize>,
    /// Probability that an image is blurred.
    #[serde(default = "always")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub p: f64,
}

fn usual() -> Amount {
    Amount::Range(0.1, 2.0)
}

fn sigma(_: &mut SchemaGenerator) -> Schema {
    SIGMA.schema()
}

impl GaussianBlur {
    /// The standard deviation of an image's blur, if it is blurred.
    pub(crate) fn draw(&self, rng: &mut Stream) -> Option<f64> {
        let (low, high) = self.sigma.bounds();
        (rng.uniform() < self.p).then(|| rng.uniform_in(low, high))
    }

    pub(crate) fn blurred(&self, image: RgbImage, sigma: f64) -> RgbImage {
        match self.kernel_size {
            None => blur::by_boxes(image, sigma),
            Some(side) => blur::by_kernel(&image, sigma, side),
        }
    }
}

impl Transform for GaussianBlur {
    fn apply(&self, image: RgbImage, rng: &mut Stream) -> RgbImage {
        match self.draw(rng) {
            Some(sigma) => self.blurred(image, sigma),
            None => image,
        }
    }

    fn output_size(&self, input: Option<(usize, usize)>) -> Option<(usize, usize)> {
        input
    }

    fn check(&self) -> Result<(), Refusal> {
        self.sigma.check("sigma", SIGMA)?;
        if let Some(side) = self.kernel_size {
            if side % 2 == 0 || side > 1023 {
                let message = format!("expected an odd number from 1 to 1023, found {side}");
                return Err(Refusal::new("kernel_size", message).help("a kernel has its middle on a pixel"));
            }
            if self.sigma.bounds().0 <= 0.0 {
                let message = "a kernel needs a standard deviation above 0";
                return Err(
                    Refusal::new("sigma", message).help("leave `kernel_size` out for Pillow's blur, which takes 0")
                );
            }
        }
        check_probability("p", self.p)
    }
}

crate::register!(transform "gaussian_blur" => GaussianBlur, "blurs an image with a probability: Pillow's blur, or torchvision's",
    example: "{ type: gaussian_blur, sigma: [0.1, 2.0], p: 0.5 }", paper: "SimCLR, arXiv 2002.05709, appendix A");
