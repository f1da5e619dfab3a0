//! The middle of an image.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::data::{Crop, RgbImage, Size, Transform};
use crate::random::Stream;
use maskalign_registry::Refusal;

/// Cuts out the middle of an image; one that is too small gets a black border first.
///
/// The law is torchvision's `CenterCrop`, its rounding of odd margins included.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CenterCrop {
    /// Size in pixels to cut out: one number for a square, or `[height, width]`.
    pub size: Size,
}

impl Transform for CenterCrop {
    fn apply(&self, image: RgbImage, _: &mut Stream) -> RgbImage {
        let (width, height) = self.size.as_square();
        if image.size() == (width, height) {
            return image;
        }
        let image = pad(image, width, height);
        let crop =
            Crop { top: half_to_even(image.height - height), left: half_to_even(image.width - width), height, width };
        cut(&image, crop)
    }

    fn output_size(&self, _: Option<(usize, usize)>) -> Option<(usize, usize)> {
        Some(self.size.as_square())
    }

    fn check(&self) -> Result<(), Refusal> {
        self.size.check("size")
    }
}

/// Half of `margin`, a half rounded to the even neighbour, as Python's `round` does.
fn half_to_even(margin: usize) -> usize {
    (margin as f64 / 2.0).round_ties_even() as usize
}

/// Puts a black border around an image that is smaller than `width` x `height`, the larger part right and below.
fn pad(image: RgbImage, width: usize, height: usize) -> RgbImage {
    if image.width >= width && image.height >= height {
        return image;
    }
    let mut padded = RgbImage::black(image.width.max(width), image.height.max(height));
    let left = width.saturating_sub(image.width) / 2;
    let top = height.saturating_sub(image.height) / 2;
    for (row, values) in image.pixels.chunks_exact(image.width * 3).enumerate() {
        let start = ((top + row) * padded.width + left) * 3;
        padded.pixels[start..start + values.len()].copy_from_slice(values);
    }
    padded
}

fn cut(image: &RgbImage, crop: Crop) -> RgbImage {
    let mut pixels = Vec::with_capacity(crop.width * crop.height * 3);
    for row in crop.top..crop.top + crop.height {
        pixels.extend_from_slice(&image.pixels[(row * image.width + crop.left) * 3..][..crop.width * 3]);
    }
    RgbImage { width: crop.width, height: crop.height, pixels }
}

crate::register!(transform "center_crop" => CenterCrop, "the middle of an image",
    example: "{ type: center_crop, size: 224 }");
