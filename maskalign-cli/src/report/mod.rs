//! `report.html`: what one or several runs measured, as one page that needs nothing else.

mod page;
mod run;
mod words;

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

/// What can be done with a run, as commands with what each is for: of a student that `exported` left, and of any.
pub(crate) fn next_commands(dir: &Path, exported: Option<&str>, is_finished: bool) -> Vec<(String, &'static str)> {
    let dir = dir.display();
    let mut commands = Vec::new();
    if !is_finished {
        commands.push((format!("maskalign run --resume {dir}"), "go on with it"));
    }
    if let Some(stage) = exported.filter(|_| is_finished) {
        commands.extend([
            (
                format!("maskalign features {dir} FOLDER-OF-IMAGES --stage {stage} --out features"),
                "features of a folder of images, and which of them are alike",
            ),
            (
                format!("maskalign export {dir} --stage {stage} --out student.safetensors"),
                "the weights, for timm and other programs",
            ),
        ]);
    }
    commands.extend([
        (format!("maskalign runs compare {dir} OTHER-RUN"), "what differs from another run"),
        (format!("maskalign runs metrics {dir} --csv"), "all that was measured, as a table"),
    ]);
    commands
}
