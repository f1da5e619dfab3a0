//! The registry as core and the command line use it, with components that compute nothing.

mod agreement;
#[allow(dead_code, reason = "options are read through serde alone")]
mod components;
mod fuzz;
mod layers;
mod mistakes;
mod plugins;
mod recipes;
mod robustness;
#[allow(dead_code, reason = "options are read through serde alone")]
mod shared;
mod structure;
