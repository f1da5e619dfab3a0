//! The vision transformer, and the layers that it is made of.

mod moving;
mod statistics;
mod vit;

pub use maskalign_engine::{
    Init, Module, Param, Role,
    nn::{BatchNorm, Bias, Block, BlockConfig, Linear, Norm, sincos_positions},
};
pub(crate) use moving::{begin_as, follow};
pub use statistics::Statistics;
pub use vit::{
    Arch, BranchScales, Counts, Features, FinalNorm, Grid, MaskedPatches, Reach, SeenPatches, TowerInput, Vit,
    VitConfig,
};
