//! Nodes to typed configuration. Every mistake is collected, each with its place.
//!
//! The walk follows the strict schemas of [`Schemas`](crate::schema::Schemas): structure is decided there, so that
//! editors and the decoder agree. A component whose structure holds is then decoded into its own struct, which may
//! still refuse a value. What a mistake is told as stands beside the check that finds it.

mod checker;
mod component;
mod fill;
mod locate;
mod mapping;
mod references;
mod scalar;
mod suggest;
mod typos;
mod unset;
mod walk;

pub(crate) use checker::Unset;
pub(crate) use fill::fill;
pub(crate) use locate::{Located, locate};
pub(crate) use walk::{check, check_component};
