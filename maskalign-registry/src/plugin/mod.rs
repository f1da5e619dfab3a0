//! What a plugin is: a closed set of [`Kind`]s, an open set of [`Entry`]s.
//!
//! A crate registers a component with `inventory::submit!`; [`Registry::global`](crate::Registry::global) collects what
//! the linker found. The registry knows names, options, schemas and examples, never a component's trait: the typed
//! constructors travel in [`Entry::vtable`] and belong to the crate that defines the traits.

mod decode;
mod entry;
mod kind;
mod refusal;
pub mod sidecar;

pub use decode::decode_options;
pub(crate) use decode::decode_part;
pub use entry::Entry;
#[doc(hidden)]
pub use kind::tag_named;
pub use kind::{
    Kind, KindTag,
    tags::{self, *},
};
pub(crate) use refusal::Base;
pub use refusal::{Code, Refusal, Related};

pub use crate::wording::nearest;
