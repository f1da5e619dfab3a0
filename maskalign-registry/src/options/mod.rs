//! Building blocks of options: nested components, shared groups of options, and values that many components take.

mod levels;
mod scalar;
mod shared;
mod slot;
mod weights;

pub use levels::{LevelIndex, LevelRef, Levels, block_index};
pub use scalar::{Scalar, Shape};
pub(crate) use shared::NAMED_TWICE;
pub use shared::{SharedOptions, With};
pub use slot::{Options, Slot};
pub use weights::Weights;
