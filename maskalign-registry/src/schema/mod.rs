//! The schemas of everything registered: strict ones for checking, and one draft-07 document for editors.
//!
//! Both come from the same structs, so that an editor and the decoder agree on structure.

mod describe;
mod docs;
mod editor;
mod keywords;
mod strict;

pub(crate) use describe::{range, shown_bound};
pub use docs::OptionDoc;
pub(crate) use docs::option_docs;
pub(crate) use editor::document;
pub(crate) use keywords::{reference, required, types, words};
pub use strict::Schemas;
