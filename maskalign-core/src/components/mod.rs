//! The built-in components, one file each, and the traits that a component of each kind implements.
//!
//! A built-in has no privilege: it registers with the same macro as a plugin of somebody else's crate.

pub mod aligners;
pub mod beside;
pub mod losses;
pub mod maskers;
pub mod optimizers;
pub mod relations;
pub mod schedules;
pub mod students;
pub mod targets;
pub mod teachers;
pub mod tokens;
pub mod towers;
