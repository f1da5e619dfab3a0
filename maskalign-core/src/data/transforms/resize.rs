//! Images of another size.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::data::size::MAX_SIDE;
use crate::data::{Crop, Interpolation, RgbImage, Size, Transform, resample};
use crate::random::Stream;
use maskalign_registry::Refusal;

/// Resizes an image, antialiased.
///
/// The law is torchvision's `Resize` on Pillow images.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Resize {
    /// Size in pixels: one number for the shorter side, the other following the image's shape, or `[height, width]`.
    pub size: Size,
    /// How pixels are mixed.
    #[serde(default)]
    pub interpolation: Interpolation,
}

impl Resize {
    /// `(width, height)` for an image of `(width, height)`.
    fn target(&self, (width, height): (usize, usize)) -> (usize, usize) {
        let short = match self.size {
            Size::HeightWidth(height, width) => return (width, height),
            Size::Side(short) => short,
        };
        // A sliver of an image would get a side that no memory holds: the long side ends at `MAX_SIDE`.
        let long = |long: usize, by: usize| ((short as f64 * long as f64 / by as f64) as usize).clamp(1, MAX_SIDE);
        if width <= height { (short, long(height, width)) } else { (long(width, height), short) }
    }
}

impl Transform for Resize {
    fn apply(&self, image: RgbImage, _: &mut Stream) -> RgbImage {
        let (width, height) = self.target(image.size());
        if image.size() == (width, height) {
            return image;
        }
        resample::resize(&image, Crop::whole(&image), width, height, self.interpolation)
    }

    fn output_size(&self, input: Option<(usize, usize)>) -> Option<(usize, usize)> {
        match self.size {
            Size::HeightWidth(height, width) => Some((width, height)),
            Size::Side(_) => input.map(|size| self.target(size)),
        }
    }

    fn check(&self) -> Result<(), Refusal> {
        self.size.check("size")
    }
}

crate::register!(transform "resize" => Resize, "another size, antialiased",
    example: "{ type: resize, size: 256 }");
