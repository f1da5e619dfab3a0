//! What a plugin is and what a recipe is: kinds, entries, composition, checking, schemas and diagnostics. No tensors,
//! no command line, no printing.
//!
//! The modules are layers, listed from the lowest up: each may use those before it, and none after. A test in
//! `tests/it/structure.rs` checks that.

mod wording;

pub mod diagnostic;
mod yaml;

mod compose;
pub mod plugin;

mod options;
mod schema;

mod catalog;
mod check;
mod recipe;

pub use catalog::{DuplicatePlugin, Registry, recipe_schema};
pub use compose::{Input, LoadRequest, NoRecipes, RecipeSource, Removal};
pub use diagnostic::{Diagnostic, Label, Place, Report};
pub use options::{
    LevelIndex, LevelRef, Levels, Options, Scalar, Shape, SharedOptions, Slot, Weights, With, block_index,
};
#[doc(hidden)]
pub use plugin::tag_named;
pub use plugin::tags::*;
pub use plugin::{Code, Entry, Kind, KindTag, Refusal, Related, decode_options};
pub use recipe::{Loaded, Recipe, ShowOrigin, diff, fingerprint};
pub use schema::{OptionDoc, Schemas};
pub use yaml::Origin;

/// Texts, and what is read from them.
pub mod source {
    pub use crate::{
        diagnostic::{Source, SourceKind},
        wording::{number, visible_lines},
        yaml::{Content, MAX_BYTES, MAX_DEPTH, MAX_NODES, Mapping, Member, Node, Origin, parse_value},
    };
}
