//! Images turned by a random angle.

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

use crate::data::affine::{Canvas, rotate};
use crate::data::amount::Limits;
use crate::data::{Amount, Fill, RgbImage, Sampling, Transform};
use crate::random::Stream;
use maskalign_registry::Refusal;

const DEGREES: Limits = Limits { number: (0.0, 360.0), ends: (-360.0, 360.0) };

/// Turns an image about its middle by an angle that is drawn.
///
/// The law is torchvision's `RandomRotation` on Pillow images.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RandomRotation {
    /// Angle in degrees, counter-clockwise: drawn uniformly from `[low, high]`, or, given one number, at most that far
    /// from 0.
    #[schemars(schema_with = "degrees")]
    pub degrees: Amount,
    /// How the value between pixels is found.
    #[serde(default)]
    pub interpolation: Sampling,
    /// Whether the image grows until all of it is seen. Its size then depends on the angle, so that a later transform has to
    /// fix it.
    #[serde(default)]
    pub expand: bool,
    /// What comes in from outside: a value from 0 to 255, or `[red, green, blue]`.
    #[serde(default)]
    pub fill: Fill,
}

fn degrees(_: &mut SchemaGenerator) -> Schema {
    DEGREES.schema()
}

impl RandomRotation {
    /// The angle of an image in degrees.
    pub(crate) fn draw(&self, rng: &mut Stream) -> f64 {
        let (low, high) = self.degrees.around(0.0);
        rng.uniform_in(low, high)
    }

    pub(crate) fn turned(&self, image: RgbImage, degrees: f64) -> RgbImage {
        let canvas = if self.expand { Canvas::Expanded } else { Canvas::Kept };
        rotate(image, degrees, self.interpolation, canvas, self.fill.0)
    }
}

impl Transform for RandomRotation {
    fn apply(&self, image: RgbImage, rng: &mut Stream) -> RgbImage {
        let degrees = self.draw(rng);
        self.turned(image, degrees)
    }

    fn output_size(&self, input: Option<(usize, usize)>) -> Option<(usize, usize)> {
        if self.expand { None } else { input }
    }

    fn check(&self) -> Result<(), Refusal> {
        self.degrees.check("degrees", DEGREES)
    }
}

crate::register!(transform "random_rotation" => RandomRotation, "turns an image by a random angle",
    example: "{ type: random_rotation, degrees: 10, interpolation: bilinear }");
