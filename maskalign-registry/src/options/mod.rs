//! What options are made of, besides what serde knows: components in components, and values that several components'
//! options share.

mod levels;
mod scalar;
mod shared;
mod slot;
mod weights;

pub use levels::{LevelIndex, LevelRef, Levels};
pub use scalar::{Scalar, Shape};
pub(crate) use shared::NAMED_TWICE;
pub use shared::{SharedOptions, With};
pub use slot::{Options, Slot};
pub use weights::Weights;
