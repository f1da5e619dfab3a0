//! Layers whose sizes are known at run time. Names and shapes of parameters are timm's, so that a checkpoint reads like
//! the code.

mod block;
mod layers;
mod positions;

pub use block::{Block, BlockConfig};
pub use layers::{BatchNorm, Bias, Linear, Norm};
pub use positions::sincos_positions;
