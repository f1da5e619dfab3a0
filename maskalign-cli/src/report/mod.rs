//! `report.html`: what one or several runs measured, as one page that needs nothing else.

mod page;
mod run;

use std::{io::Write as _, path::Path};

use maskalign_core::run::atomic_write;

use self::run::Run;
pub(crate) use self::run::run_name;
use crate::failure::Failure;

/// The name of a run's own report in its directory.
pub(crate) const FILE: &str = "report.html";

/// Writes the report of runs to a file, whole or not at all.
///
/// # Errors
/// A folder that is no run, or files in it that cannot be read; a file that cannot be written.
pub(crate) fn write(runs: &[&Path], out: &Path) -> Result<(), Failure> {
    let runs = runs.iter().map(|path| Run::read(path)).collect::<Result<Vec<_>, _>>()?;
    let page = page::render(&page::names(&runs), &runs);
    Ok(atomic_write(out, "report", |file| file.write_all(page.as_bytes()))?)
}
