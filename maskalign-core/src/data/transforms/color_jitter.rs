//! Random brightness, contrast, saturation and hue.

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

use super::{always, check_probability};
use crate::data::amount::Limits;
use crate::data::tone::Adjustment;
use crate::data::{Amount, RgbImage, Transform};
use crate::random::Stream;
use maskalign_registry::Refusal;

/// Changes brightness, contrast, saturation and hue by amounts that are drawn, one after the other in an order that is
/// drawn too.
///
/// The law is torchvision's `ColorJitter` on Pillow images, and with `p` its `RandomApply` around it.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ColorJitter {
    /// Factor of every value: drawn uniformly from `[low, high]`, or, given one number, at most that far from 1 and at least
    /// 0. The number 0 changes nothing.
    #[serde(default = "nothing")]
    #[schemars(schema_with = "factor")]
    pub brightness: Amount,
    /// Factor of the distance from the image's mean brightness, drawn as that of `brightness`.
    #[serde(default = "nothing")]
    #[schemars(schema_with = "factor")]
    pub contrast: Amount,
    /// Factor of the distance from the pixel's own brightness (0 makes it grey), drawn as that of `brightness`.
    #[serde(default = "nothing")]
    #[schemars(schema_with = "factor")]
    pub saturation: Amount,
    /// Turn of all hues in parts of the circle of colours: drawn uniformly from `[low, high]`, or, given one
    /// number, at most that far from 0. The number 0 changes nothing.
    #[serde(default = "nothing")]
    #[schemars(schema_with = "hue")]
    pub hue: Amount,
    /// Probability that an image is changed.
    #[serde(default = "always")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub p: f64,
}

const FACTOR: Limits = Limits { number: (0.0, f64::INFINITY), ends: (0.0, f64::INFINITY) };
const HUE: Limits = Limits { number: (0.0, 0.5), ends: (-0.5, 0.5) };

fn nothing() -> Amount {
    Amount::Number(0.0)
}

fn factor(_: &mut SchemaGenerator) -> Schema {
    FACTOR.schema()
}

fn hue(_: &mut SchemaGenerator) -> Schema {
    HUE.schema()
}

impl ColorJitter {
    /// What is done to an image, in this order.
    pub(crate) fn draw(&self, rng: &mut Stream) -> Vec<Adjustment> {
        type Make = fn(f64) -> Adjustment;
        if rng.uniform() >= self.p {
            return Vec::new();
        }
        let factor = |make: Make, amount: Amount| {
            let (low, high) = amount.around(1.0);
            (make, low.max(0.0), high, 1.0)
        };
        let (least, most) = self.hue.around(0.0);
        let all: [(Make, f64, f64, f64); 4] = [
            factor(Adjustment::Brightness, self.brightness),
            factor(Adjustment::Contrast, self.contrast),
            factor(Adjustment::Saturation, self.saturation),
            (Adjustment::Hue, least, most, 0.0),
        ];
        let order = rng.permutation(all.len()).into_iter().map(|index| all[index]);
        // What can only leave the image as it is is left out: turning hues by nothing loses a little, by 8 bits of each.
        let effective = order.filter(|&(_, low, high, neutral)| low != neutral || high != neutral);
        effective.map(|(make, low, high, _)| make(rng.uniform_in(low, high))).collect()
    }
}

impl Transform for ColorJitter {
    fn apply(&self, image: RgbImage, rng: &mut Stream) -> RgbImage {
        self.draw(rng).into_iter().fold(image, |image, adjustment| adjustment.apply(image))
    }

    fn output_size(&self, input: Option<(usize, usize)>) -> Option<(usize, usize)> {
        input
    }

    fn check(&self) -> Result<(), Refusal> {
        self.brightness.check("brightness", FACTOR)?;
        self.contrast.check("contrast", FACTOR)?;
        self.saturation.check("saturation", FACTOR)?;
        self.hue.check("hue", HUE)?;
        check_probability("p", self.p)
    }
}

crate::register!(transform "color_jitter" => ColorJitter, "random brightness, contrast, saturation and hue",
    example: "{ type: color_jitter, brightness: 0.4, contrast: 0.4, saturation: 0.2, hue: 0.1, p: 0.8 }",
    paper: "SimCLR, arXiv 2002.05709, appendix A");
