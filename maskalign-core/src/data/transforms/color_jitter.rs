//! Colours that are changed at random.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rand_augment::Op;
use crate::data::{RgbImage, Transform};
use crate::random::Stream;
use maskalign_registry::Refusal;

/// The most that a factor may differ from 1.
const MOST: f64 = 0.9;
/// How far the operations' scale of magnitudes, which ends at [`MOST`], goes.
const MAX_MAGNITUDE: f64 = 10.0;

/// Multiplies brightness, contrast and saturation by factors, one after another in a drawn order.
///
/// Each factor is drawn uniformly between 1 - x and 1 + x, where x is the option. The operations are Pillow's, as in
/// torchvision's `ColorJitter`, which has a change of hue besides.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ColorJitter {
    /// How much the brightness changes; 0 leaves it.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 0.9))]
    pub brightness: f64,
    /// How much the contrast changes.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 0.9))]
    pub contrast: f64,
    /// How much the saturation changes.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 0.9))]
    pub saturation: f64,
}

impl Transform for ColorJitter {
    fn apply(&self, mut image: RgbImage, rng: &mut Stream) -> RgbImage {
        let mut operations = [
            (Op::BrightnessIncreasing, self.brightness),
            (Op::ContrastIncreasing, self.contrast),
            (Op::ColorIncreasing, self.saturation),
        ];
        rng.shuffle(&mut operations);
        for (operation, most) in operations {
            let change = rng.uniform_in(-most, most);
            if most > 0.0 {
                image = operation.apply(image, change.abs() / MOST * MAX_MAGNITUDE, change.signum());
            }
        }
        image
    }

    fn output_size(&self, input: Option<(usize, usize)>) -> Option<(usize, usize)> {
        input
    }

    fn check(&self) -> Result<(), Refusal> {
        let options = [("brightness", self.brightness), ("contrast", self.contrast), ("saturation", self.saturation)];
        match options.into_iter().find(|(_, most)| !(0.0..=MOST).contains(most)) {
            Some((option, most)) => {
                Err(Refusal::new(option, format!("expected a number from 0 to {MOST}, found {most}")))
            }
            None => Ok(()),
        }
    }
}

crate::register!(transform "color_jitter" => ColorJitter, "changes brightness, contrast and saturation at random",
    example: "{ type: color_jitter, brightness: 0.4, contrast: 0.4, saturation: 0.4 }");

#[cfg(test)]
mod tests {
    use super::*;

    fn jitter(brightness: f64, contrast: f64, saturation: f64) -> ColorJitter {
        ColorJitter { brightness, contrast, saturation }
    }

    /// Pillow's `ImageEnhance.Brightness(image).enhance(factor)` multiplies every value and cuts what is above 255.
    #[test]
    fn brightness_is_a_factor_between_its_bounds() {
        let image = RgbImage { width: 2, height: 1, pixels: vec![100, 50, 0, 200, 10, 100] };
        let mut factors: Vec<f64> = Vec::new();
        for index in 0..200 {
            let changed = jitter(0.4, 0.0, 0.0).apply(image.clone(), &mut Stream::new(0, "test", 0, index));
            let factor = f64::from(changed.pixels[0]) / 100.0;
            for (before, after) in image.pixels.iter().zip(&changed.pixels) {
                assert!((f64::from(*after) - (f64::from(*before) * factor).min(255.0)).abs() <= 3.0, "{factor}");
            }
            factors.push(factor);
        }
        let (low, high) = factors.iter().fold((f64::INFINITY, 0.0_f64), |(l, h), f| (l.min(*f), h.max(*f)));
        assert!((0.59..0.65).contains(&low) && (1.35..=1.4).contains(&high), "{low} to {high}");
    }

    #[test]
    fn grey_stays_grey_and_nothing_asked_for_changes_nothing() {
        let grey = RgbImage::from_grey(2, 2, &[0, 90, 180, 255]);
        let mut rng = Stream::new(0, "test", 0, 0);
        assert_eq!(jitter(0.0, 0.0, 0.0).apply(grey.clone(), &mut rng), grey);
        assert_eq!(jitter(0.0, 0.0, 0.9).apply(grey.clone(), &mut rng), grey, "grey has no saturation");
        assert_ne!(jitter(0.0, 0.9, 0.0).apply(grey.clone(), &mut rng), grey);
        assert_eq!(jitter(0.1, 1.5, 0.0).check().unwrap_err().path, ["contrast"]);
        assert_eq!(jitter(f64::NAN, 0.0, 0.0).check().unwrap_err().path, ["brightness"]);
    }
}
