//! The verbs, one file each. A file's `Args` are its arguments, and `Args::run` is the verb.

mod bench;
mod completions;
mod cp;
mod doctor;
mod explain;
mod export;
mod features;
mod init;
mod list;
mod machine;
mod outline;
mod plugin;
mod report;
mod run;
mod runs;
mod schema;
mod show;
mod sweep;
mod validate;
mod verify;

use std::path::Path;

use clap::{Subcommand, ValueEnum};
use tracing_subscriber::filter::LevelFilter;

use crate::{failure::Failure, session::Session};

#[derive(Subcommand)]
pub(crate) enum Verb {
    Run(run::Args),
    Sweep(sweep::Args),
    Runs(runs::Args),
    Report(report::Args),
    Validate(validate::Args),
    Show(show::Args),
    List(list::Args),
    Explain(explain::Args),
    Schema(schema::Args),
    Cp(cp::Args),
    Init(init::Args),
    New(plugin::Args),
    Verify(verify::Args),
    Bench(bench::Args),
    Export(export::Args),
    Features(features::Args),
    Doctor(doctor::Args),
    Completions(completions::Args),
}

impl Verb {
    /// The log level without any flag: a run logs what it does, short verbs only what is wrong.
    pub(crate) fn log_level(&self) -> LevelFilter {
        match self {
            Verb::Run(_) => LevelFilter::INFO,
            _ => LevelFilter::WARN,
        }
    }

    /// The trace file that was requested.
    pub(crate) fn trace(&self) -> Option<&Path> {
        match self {
            Verb::Run(args) => args.trace.as_deref(),
            Verb::Bench(args) => args.trace.as_deref(),
            _ => None,
        }
    }

    /// Runs the verb.
    ///
    /// # Errors
    /// Why it failed; nothing has been printed about it yet.
    pub(crate) fn run(self, session: &Session) -> Result<(), Failure> {
        match self {
            Verb::Run(args) => args.run(session),
            Verb::Sweep(args) => args.run(session),
            Verb::Runs(args) => args.run(session),
            Verb::Report(args) => args.run(),
            Verb::Validate(args) => args.run(session),
            Verb::Show(args) => args.run(session),
            Verb::List(args) => args.run(session),
            Verb::Explain(args) => args.run(session),
            Verb::Schema(args) => args.run(session),
            Verb::Cp(args) => args.run(session),
            Verb::Init(args) => args.run(session),
            Verb::New(args) => args.run(session),
            Verb::Verify(args) => args.run(session),
            Verb::Bench(args) => args.run(session),
            Verb::Export(args) => args.run(),
            Verb::Features(args) => args.run(session),
            Verb::Doctor(args) => args.run(session),
            Verb::Completions(args) => args.run(session),
        }
    }
}

/// The form of a result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
}

/// In which form a verb writes what it finds.
#[derive(clap::Args)]
pub(crate) struct Written {
    /// How the findings are written
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// The same as --format json
    #[arg(long, conflicts_with = "format")]
    json: bool,
}

impl Written {
    pub(crate) fn format(&self) -> Format {
        if self.json { Format::Json } else { self.format }
    }
}
