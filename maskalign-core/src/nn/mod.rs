//! Layers whose sizes are known at run time, and the vision transformer made of them. Names and shapes of parameters
//! are timm's, so that a checkpoint reads like the code.

mod block;
mod layers;
mod param;
mod positions;
mod vit;

pub use block::{Block, BlockConfig};
pub use layers::{Bias, Linear, Norm};
pub use param::{Init, Module, Param, count};
pub use positions::sincos_positions;
pub use vit::{Arch, BranchScales, Features, Grid, Reach, Statistics, TowerInput, Vit, VitConfig};
