//! What options are made of, besides what serde knows: components in components, and values that several components'
//! options share.

mod levels;
mod scalar;
mod slot;
mod weights;

pub use levels::{LevelIndex, LevelRef, Levels};
pub use scalar::{Scalar, Shape};
pub use slot::{Options, Slot};
pub use weights::Weights;
