//! YAML: text to [`Node`]s that know where they were written, and values back to text.
//!
//! Scalars follow the core schema of YAML 1.2, as editors read it: `yes` and `no` are text, `1e-3`
//! and `.75` are numbers. Anchors, aliases and merge keys are resolved here; duplicate keys are
//! errors; size, nesting and what aliases expand to are limited.

mod node;
mod parse;
mod scalar;
mod syntax;
mod write;

pub use node::{Content, Mapping, Member, Node, Origin};
pub(crate) use node::{Typing, integer};
pub use parse::parse_value;
pub(crate) use parse::{parse, parse_from};
pub(crate) use scalar::resolve_plain;
pub(crate) use syntax::mistyped_key;
pub(crate) use write::write;

/// The largest recipe file, in bytes.
pub const MAX_BYTES: usize = 1 << 20;
/// The deepest nesting.
pub const MAX_DEPTH: usize = 64;
/// The most values that a document may hold after aliases are expanded.
pub const MAX_NODES: usize = 100_000;
