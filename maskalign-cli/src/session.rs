//! What every verb is given, and what this binary knows of itself.

use std::ffi::OsString;

use maskalign_registry::Registry;

use crate::{
    logging::{Trace, Verbosity},
    progress::Screen,
};

/// The commit this binary was built from, where known.
pub(crate) const COMMIT: Option<&str> = option_env!("MASKALIGN_COMMIT");

/// What every verb is given besides its own arguments.
pub(crate) struct Session<'a> {
    pub registry: &'static Registry,
    pub verbosity: &'a Verbosity,
    pub screen: Screen,
    pub trace: &'a Trace,
    /// The command line as given, the binary's name first.
    pub arguments: &'a [OsString],
    /// The definition of the command line, for shell completion.
    pub command: fn() -> clap::Command,
}
