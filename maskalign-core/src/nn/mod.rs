//! The vision transformer, and the layers that it is made of.

mod statistics;
mod vit;

pub use maskalign_engine::{
    Init, Module, Param, Role,
    nn::{BatchNorm, Bias, Block, BlockConfig, Linear, Norm, sincos_positions},
};
pub use statistics::Statistics;
pub use vit::{
    Arch, BranchScales, Counts, Features, FinalNorm, Grid, MaskedPatches, Reach, SeenPatches, TowerInput, Vit,
    VitConfig,
};
