//! The command line of MaskAlign, as a library: the binary of a crate with plugins of its own is
//! `fn main() -> std::process::ExitCode { maskalign_cli::main() }`, and every verb then knows those plugins.
//!
//! Results go to stdout; logs, progress and errors to stderr. Exit codes: 0 success; 1 a failure; 2 a mistake of the
//! user's; 129, 130 and 143 stopped by SIGHUP, Ctrl-C and SIGTERM, with the state saved.

mod failure;
mod logging;
mod output;
mod panics;
mod progress;
mod recipes;
mod render;
mod report;
mod session;
mod signals;
mod table;
mod verbs;

use std::{ffi::OsString, process::ExitCode};

use clap::{CommandFactory, FromArgMatches, Parser};
use maskalign_core::kinds::is_constructible;
use maskalign_registry::Registry;

use crate::{failure::Failure, progress::Screen, session::Session, verbs::Verb};

/// Masked image modelling without reconstruction, as recipes.
///
/// A recipe is a YAML file that names components: data, a student, teachers, a masker, targets, losses. `maskalign run`
/// trains what it says, `maskalign validate` checks all that can be known before the first step.
#[derive(Parser)]
#[command(
    name = "maskalign",
    version,
    styles = render::HELP,
    after_help = EXAMPLES,
    arg_required_else_help = true,
    max_term_width = 100,
    disable_help_subcommand = true
)]
struct Cli {
    #[command(flatten)]
    verbosity: logging::Verbosity,
    #[command(subcommand)]
    verb: Verb,
}

const EXAMPLES: &str = "\
Examples:
  maskalign run quickstart                       run a built-in recipe
  maskalign init photos                          a recipe for a folder of your own images
  maskalign cp quickstart mine.yaml              start a recipe of your own from it
  maskalign validate mine.yaml                   all its mistakes at once; parameters, steps, memory
  maskalign run mine.yaml --set seed=1           run it with a value changed
  maskalign run --resume runs/mine-20230618-093000
  maskalign runs list                            every run, its state and its best result
  maskalign features runs/mine photos --out features     which images are alike
  maskalign explain masker.attention             what a component does and its options";

/// Runs the command line of this process, with every plugin that is linked into it.
pub fn main() -> ExitCode {
    panics::install();
    let arguments: Vec<OsString> = std::env::args_os().collect();
    match std::panic::catch_unwind(|| run(&arguments)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(failure)) => failure.tell(),
        // The hook has said what there is to say.
        Err(_) => ExitCode::FAILURE,
    }
}

fn run(arguments: &[OsString]) -> Result<(), Failure> {
    let cli = match parse(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // `--help` and `--version` come this way too, with exit code 0. Nobody can be told that printing failed.
            let _ = error.print();
            return match error.exit_code() {
                0 => Ok(()),
                code => Err(Failure::Told(u8::try_from(code).unwrap_or(2))),
            };
        }
    };
    let screen = Screen::default();
    let trace = logging::start(&cli.verbosity, cli.verb.log_level(), cli.verb.trace(), &screen)?;
    let registry = Registry::global().map_err(|error| Failure::mistake(error.to_string()))?;
    check_versions(registry)?;
    cli.verb.run(&Session {
        registry,
        verbosity: &cli.verbosity,
        screen,
        trace: &trace,
        arguments,
        command: Cli::command,
    })
}

fn parse(arguments: &[OsString]) -> Result<Cli, clap::Error> {
    let mut matches = Cli::command().try_get_matches_from(arguments)?;
    Cli::from_arg_matches_mut(&mut matches)
}

/// A plugin that was compiled against another version of the core has constructors of another type.
fn check_versions(registry: &Registry) -> Result<(), Failure> {
    match registry.entries().find(|entry| !is_constructible(entry.kind, entry.vtable)) {
        None => Ok(()),
        Some(entry) => Err(Failure::mistake(format!(
            "`{}` of the crate `{}` was compiled against another version of maskalign-core than this command",
            entry.address(),
            entry.package
        ))
        .help("let both depend on the same version")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_and_every_argument_is_explained() {
        for verb in Cli::command().get_subcommands() {
            assert!(verb.get_about().is_some(), "{}", verb.get_name());
            for argument in verb.get_arguments() {
                assert!(argument.get_help().is_some(), "{} {}", verb.get_name(), argument.get_id());
            }
        }
    }
}
