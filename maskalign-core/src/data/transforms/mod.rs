//! What is done to an image between the dataset and the towers. One component a file.

use maskalign_registry::Refusal;

pub mod center_crop;
pub mod color_jitter;
pub mod gaussian_blur;
pub mod grayscale;
pub mod horizontal_flip;
pub mod pad;
pub mod rand_augment;
pub mod random_erasing;
pub mod random_resized_crop;
pub mod random_rotation;
pub mod resize;
pub mod solarize;
pub mod three_augment;

pub use self::center_crop::CenterCrop;
pub use self::color_jitter::ColorJitter;
pub use self::gaussian_blur::GaussianBlur;
pub use self::grayscale::Grayscale;
pub use self::horizontal_flip::HorizontalFlip;
pub use self::pad::{Pad, PadMode, Padding};
pub use self::rand_augment::RandAugment;
pub use self::random_erasing::{ErasingMode, RandomErasing};
pub use self::random_resized_crop::RandomResizedCrop;
pub use self::random_rotation::RandomRotation;
pub use self::resize::Resize;
pub use self::solarize::Solarize;
pub use self::three_augment::ThreeAugment;

/// The default of `p` where a transform, once chosen, is for every image.
fn always() -> f64 {
    1.0
}

/// Refuses what is no probability.
fn check_probability(option: &str, p: f64) -> Result<(), Refusal> {
    if (0.0..=1.0).contains(&p) {
        Ok(())
    } else {
        Err(Refusal::new(option, format!("expected a probability from 0 to 1, found {p}")))
    }
}
