//! `extends`, `--set` and `${VARIABLE}`: from a request to one tree of nodes.
//!
//! The order is fixed: each text is parsed and its variables are substituted; bases are merged from left to right, with
//! the recipe on top; then the flags apply, in the order given; then what a `null` or a flag removed is taken out. A
//! variable without a value is an error only if it survives that.

mod bases;
mod flags;
mod merge;
mod removals;
mod request;
mod variables;

pub(crate) use bases::compose;
pub(crate) use removals::REPLACE;
pub use removals::Removal;
pub use request::{Input, LoadRequest, NoRecipes, RecipeSource};
