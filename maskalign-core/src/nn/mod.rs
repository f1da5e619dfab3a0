//! The vision transformer, and the layers that it is made of.

mod vit;

pub use maskalign_engine::{
    Init, Module, Param, Role,
    nn::{BatchNorm, Bias, Block, BlockConfig, Linear, Norm, sincos_positions},
};
pub use vit::{
    Arch, BranchScales, Features, FinalNorm, Grid, MaskedPatches, Reach, SeenPatches, Statistics, TowerInput, Vit,
    VitConfig,
};
