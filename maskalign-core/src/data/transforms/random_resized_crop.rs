//! Random crops of random size and shape.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::data::{Crop, Interpolation, RgbImage, Size, Transform, resample};
use crate::random::Stream;
use maskalign_registry::Refusal;

/// Cuts out a random box and resizes it: the crop of nearly all pre-training.
///
/// The law is torchvision's `RandomResizedCrop`: ten tries of a box whose area is uniform in `scale` and whose shape is
/// log-uniform in `ratio`; where none fits, the largest middle box whose shape is allowed.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RandomResizedCrop {
    /// Size in pixels of the result: one number for a square, or `[height, width]`.
    pub size: Size,
    /// Smallest and largest area of the box, as parts of the image's area.
    #[serde(default = "default_scale")]
    #[schemars(inner(range(min = 0.0, max = 1.0)))]
    pub scale: [f64; 2],
    /// Smallest and largest shape of the box, width over height. Default: 3/4 to 4/3.
    #[serde(default = "default_ratio")]
    #[schemars(inner(range(min = 0.01, max = 100.0)))]
    pub ratio: [f64; 2],
    /// How pixels are mixed.
    #[serde(default)]
    pub interpolation: Interpolation,
}

fn default_scale() -> [f64; 2] {
    [0.08, 1.0]
}

fn default_ratio() -> [f64; 2] {
    [3.0 / 4.0, 4.0 / 3.0]
}

impl RandomResizedCrop {
    /// Draws the box for an image of `width` x `height`.
    pub fn draw(&self, width: usize, height: usize, rng: &mut Stream) -> Crop {
        const TRIES: usize = 10;
        let [smallest, largest] = self.scale;
        let [narrowest, widest] = self.ratio.map(f64::ln);
        for _ in 0..TRIES {
            let area = (width * height) as f64 * rng.uniform_in(smallest, largest);
            let shape = rng.uniform_in(narrowest, widest).exp();
            let crop_width = (area * shape).sqrt().round_ties_even() as usize;
            let crop_height = (area / shape).sqrt().round_ties_even() as usize;
            if (1..=width).contains(&crop_width) && (1..=height).contains(&crop_height) {
                let top = rng.below(height - crop_height + 1);
                let left = rng.below(width - crop_width + 1);
                return Crop { top, left, height: crop_height, width: crop_width };
            }
        }
        self.middle(width, height)
    }

    /// The largest middle box whose shape is allowed, at least one pixel wide and high.
    fn middle(&self, width: usize, height: usize) -> Crop {
        let [narrowest, widest] = self.ratio;
        let shape = width as f64 / height as f64;
        let rounded = |length: f64, most: usize| (length.round_ties_even() as usize).clamp(1, most);
        let (crop_width, crop_height) = if shape < narrowest {
            (width, rounded(width as f64 / narrowest, height))
        } else if shape > widest {
            (rounded(height as f64 * widest, width), height)
        } else {
            (width, height)
        };
        Crop { top: (height - crop_height) / 2, left: (width - crop_width) / 2, height: crop_height, width: crop_width }
    }
}

impl Transform for RandomResizedCrop {
    fn apply(&self, image: RgbImage, rng: &mut Stream) -> RgbImage {
        let crop = self.draw(image.width, image.height, rng);
        let (width, height) = self.size.as_square();
        resample::resize(&image, crop, width, height, self.interpolation)
    }

    fn output_size(&self, _: Option<(usize, usize)>) -> Option<(usize, usize)> {
        Some(self.size.as_square())
    }

    fn check(&self) -> Result<(), Refusal> {
        self.size.check("size")?;
        let [smallest, largest] = self.scale;
        if !(smallest > 0.0 && smallest <= largest && largest <= 1.0) {
            let found =
                format!("expected two numbers with 0 < smallest <= largest <= 1, found [{smallest}, {largest}]");
            return Err(Refusal::new("scale", found).help("for boxes of 20 % to 100 % of the image: [0.2, 1.0]"));
        }
        let [narrowest, widest] = self.ratio;
        if !(narrowest > 0.0 && narrowest <= widest && widest.is_finite()) {
            let found = format!("expected two numbers with 0 < narrowest <= widest, found [{narrowest}, {widest}]");
            return Err(Refusal::new("ratio", found).help("for boxes from 3:4 to 4:3: [0.75, 1.3333]"));
        }
        Ok(())
    }
}

crate::register!(transform "random_resized_crop" => RandomResizedCrop, "a random box, resized: torchvision's law, Pillow's pixels",
    example: "{ type: random_resized_crop, size: 224, scale: [0.2, 1.0] }", paper: "Inception, arXiv 1409.4842");
