//! What is done to an image between the dataset and the towers. One component a file.

pub mod center_crop;
pub mod color_jitter;
pub mod horizontal_flip;
pub mod rand_augment;
pub mod random_erasing;
pub mod random_resized_crop;
pub mod resize;

pub use self::center_crop::CenterCrop;
pub use self::color_jitter::ColorJitter;
pub use self::horizontal_flip::HorizontalFlip;
pub use self::rand_augment::RandAugment;
pub use self::random_erasing::{ErasingMode, RandomErasing};
pub use self::random_resized_crop::RandomResizedCrop;
pub use self::resize::Resize;
