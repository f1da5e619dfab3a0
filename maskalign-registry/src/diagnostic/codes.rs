//! The codes of diagnostics. They are stable: scripts may match on them.

/// The text is not YAML.
pub const SYNTAX: &str = "syntax";
/// The file cannot be read.
pub const UNREADABLE: &str = "unreadable";
/// The file, its nesting or its aliases are past the limits.
pub const TOO_LARGE: &str = "too-large";
/// A mapping has the same key twice.
pub const DUPLICATE_KEY: &str = "duplicate-key";
/// `extends` leads back to a recipe that is being read.
pub const EXTENDS_CYCLE: &str = "extends-cycle";
/// `extends` names a recipe that does not exist.
pub const UNKNOWN_BASE: &str = "unknown-base";
/// A `--set` that cannot be applied.
pub const BAD_OVERRIDE: &str = "bad-override";
/// A `null` or `$replace` where nothing is inherited.
pub const NOTHING_TO_REMOVE: &str = "nothing-to-remove";
/// `${VAR}` without a value and without a default.
pub const UNSET_VARIABLE: &str = "unset-variable";
/// `${...}` that is not `${VAR}` or `${VAR:-default}`.
pub const BAD_VARIABLE: &str = "bad-variable";
/// A key that nothing reads.
pub const UNKNOWN_KEY: &str = "unknown-key";
/// A `type` that no component has.
pub const UNKNOWN_TYPE: &str = "unknown-type";
/// A value of the wrong type.
pub const WRONG_TYPE: &str = "wrong-type";
/// A required key is missing.
pub const MISSING_KEY: &str = "missing-key";
/// A number, length or format outside what is allowed.
pub const OUT_OF_RANGE: &str = "out-of-range";
/// A word that is not one of those allowed.
pub const UNKNOWN_VALUE: &str = "unknown-value";
/// A component refuses an option, or an option does not fit the rest of the recipe.
pub const REFUSED: &str = "refused";
