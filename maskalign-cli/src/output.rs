//! The two streams: results go to stdout, everything else to stderr.

use std::io::{self, Write};

use serde_json::Value;

/// Writes a result.
///
/// # Errors
/// Stdout is closed or full.
pub(crate) fn print(text: &str) -> io::Result<()> {
    let mut out = anstream::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Writes a result as indented JSON and a newline.
///
/// # Errors
/// As [`print`].
pub(crate) fn print_json(value: &Value) -> io::Result<()> {
    print(&format!("{value:#}\n"))
}

/// Writes to stderr. Nobody can be told that this failed.
pub(crate) fn complain(text: &str) {
    let mut err = anstream::stderr().lock();
    let _ = err.write_all(text.as_bytes()).and_then(|()| err.flush());
}
