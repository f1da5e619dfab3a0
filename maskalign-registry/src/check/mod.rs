//! Checking a document: nodes to JSON that decodes. Every mistake is collected, each with its place.
//!
//! The walk follows the strict schemas of [`Schemas`](crate::schema::Schemas): they alone decide structure, so that
//! editors and this check agree. A component whose structure is right is then decoded into its own struct, which may
//! still refuse a value. Each message is written beside the check that reports it.

mod checker;
mod component;
mod fill;
mod locate;
mod mapping;
mod references;
mod scalar;
mod slots;
mod suggest;
mod typos;
mod unset;
mod walk;

pub(crate) use checker::Unset;
pub(crate) use fill::fill;
pub(crate) use locate::{Located, locate};
pub(crate) use slots::each_slot;
pub(crate) use walk::{check, check_component};
