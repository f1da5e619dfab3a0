//! `maskalign runs`: what run directories hold.

mod check;
mod compare;
mod list;
mod metrics;
mod replay;

use std::path::Path;

use maskalign_core::run::BadLines;
use serde_json::Value;

use crate::{failure::Failure, output, session::Session};

const EXAMPLES: &str = "\
Examples:
  maskalign runs list                             every run below `runs`
  maskalign runs metrics runs/mine --csv          what a run measured, as columns
  maskalign runs compare runs/a runs/b            what differs in two recipes and their results
  maskalign runs check runs/mine                  whether every file is as it was written
  maskalign runs replay runs/mine                 make the step again whose loss was not finite";

/// Look at run directories: list, metrics, compare, check, replay
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    List(list::Args),
    Metrics(metrics::Args),
    Compare(compare::Args),
    Check(check::Args),
    Replay(replay::Args),
}

impl Args {
    pub(crate) fn run(self, session: &Session) -> Result<(), Failure> {
        match self.what {
            What::List(args) => args.run(),
            What::Metrics(args) => args.run(),
            What::Compare(args) => args.run(),
            What::Check(args) => args.run(session),
            What::Replay(args) => args.run(session),
        }
    }
}

/// Says which lines of a run's metrics are none; what is sound has been shown.
fn told(run: &Path, bad: &BadLines) -> Result<(), Failure> {
    const SHOWN: usize = 5;
    let mut parts = Vec::new();
    if let [first, ..] = bad.lines.as_slice() {
        let lines: Vec<String> = bad.lines.iter().take(SHOWN).map(u64::to_string).collect();
        let more =
            if bad.lines.len() > SHOWN { format!(" and {} more", bad.lines.len() - SHOWN) } else { String::new() };
        parts.push(match bad.lines.len() {
            1 => format!("line {first} is no record"),
            _ => format!("lines {}{more} are no records", lines.join(", ")),
        });
    }
    if bad.torn {
        parts.push("the last line is torn".to_owned());
    }
    if parts.is_empty() {
        return Ok(());
    }
    let file = run.join("metrics.jsonl");
    Err(Failure::failed(format!("{}: {}; everything else is shown", file.display(), parts.join(", and ")))
        .help(format!("`maskalign runs check {}` says what `--resume` would do about it", run.display())))
}

/// Writes a line of CSV, as RFC 4180 has it.
pub(super) fn csv_line(cells: impl IntoIterator<Item = String>) -> String {
    let quoted = |cell: String| match cell.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", cell.replace('"', "\"\"")),
        false => cell,
    };
    cells.into_iter().map(quoted).collect::<Vec<_>>().join(",") + "\n"
}

/// A value as a cell: text without its quotes, nothing for null.
pub(super) fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Prints text piece by piece, so that a long table is not held in memory.
struct Pieces(String);

impl Pieces {
    const FULL: usize = 64 * 1024;

    fn add(&mut self, text: &str) -> Result<(), Failure> {
        self.0.push_str(text);
        if self.0.len() >= Self::FULL { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), Failure> {
        output::print(&std::mem::take(&mut self.0))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {

    use super::*;

    #[test]
    fn a_line_of_csv_quotes_what_would_break_it() {
        let cells = ["a", "b,c", "say \"d\"", "e\nf", ""].map(str::to_owned);
        assert_eq!(csv_line(cells), "a,\"b,c\",\"say \"\"d\"\"\",\"e\nf\",\n");
    }
}
