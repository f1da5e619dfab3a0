//! `maskalign report`: runs as a page to look at.

use std::path::{Path, PathBuf};

use crate::{failure::Failure, output, report};

const EXAMPLES: &str = "\
Examples:
  maskalign report runs/mine                           writes runs/mine/report.html
  maskalign report runs/one runs/two --out both.html   side by side, with what differs";

/// Write a page with the results, curves and recipes of runs
///
/// The page is one file that needs no network and nothing beside it. A run writes its own when it ends; of a run that is
/// still going, the page shows what it has measured so far.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Run directories
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// The file to write [default: report.html in the run directory; of several runs, in the current folder]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

impl Args {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let runs: Vec<&Path> = self.runs.iter().map(PathBuf::as_path).collect();
        let out = self.out.unwrap_or_else(|| match runs[..] {
            [only] => only.join(report::FILE),
            _ => PathBuf::from(report::FILE),
        });
        report::write(&runs, &out)?;
        Ok(output::print(&format!("{}\n", out.display()))?)
    }
}
