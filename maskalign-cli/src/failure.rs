//! How a verb ends when it fails.

use std::{fmt::Write as _, io, process::ExitCode};

use maskalign_core::{error::Error, run::RunError, weights::WeightsError};
use maskalign_registry::{Loaded, Report, source::visible_lines};
use serde_json::{Value, json};

use crate::{output, render};

/// Why a verb ended early, with everything that the user is told about it.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Mistakes in a recipe, each at its place. Exit code 2.
    Recipe(Report),
    /// One line, ways to fix it, and the exit code.
    Message { message: String, help: Vec<String>, code: u8 },
    /// Everything has been printed already.
    Told(u8),
    /// Nobody reads the results any more, as with a closed pipe: not a failure.
    Closed,
}

impl Failure {
    /// A failure that the user can fix: exit code 2.
    pub(crate) fn mistake(message: impl Into<String>) -> Failure {
        Failure::Message { message: message.into(), help: Vec::new(), code: 2 }
    }

    /// A failure of something else: exit code 1.
    pub(crate) fn failed(message: impl Into<String>) -> Failure {
        Failure::Message { message: message.into(), help: Vec::new(), code: 1 }
    }

    /// Adds a way to fix it.
    #[must_use]
    pub(crate) fn help(mut self, text: impl Into<String>) -> Failure {
        if let Failure::Message { help, .. } = &mut self {
            help.push(text.into());
        }
        self
    }

    /// Shows a refusal at its place in the recipe, when it came after the recipe was accepted.
    pub(crate) fn located(error: Error, loaded: &Loaded) -> Failure {
        match error {
            Error::Refused(refusal) => Failure::Recipe(loaded.locate_all([&refusal])),
            other => other.into(),
        }
    }

    /// The exit code.
    pub(crate) fn code(&self) -> u8 {
        match self {
            Failure::Recipe(_) => 2,
            Failure::Message { code, .. } | Failure::Told(code) => *code,
            Failure::Closed => 0,
        }
    }

    /// What remains to be printed, in colour.
    pub(crate) fn text(&self) -> String {
        match self {
            Failure::Recipe(report) => render::report(report),
            Failure::Message { message, help, .. } => {
                // Names of files and what stands in them may be anything.
                let mut text = format!("{}: {}\n", render::paint(render::ERROR, "error"), visible_lines(message));
                for line in help {
                    let line = visible_lines(line);
                    let _ = writeln!(text, "  {} {line}", render::paint(render::GUTTER, "= help:"));
                }
                text
            }
            Failure::Told(_) | Failure::Closed => String::new(),
        }
    }

    /// What remains to be printed, for programs.
    pub(crate) fn to_json(&self) -> Value {
        match self {
            Failure::Recipe(report) => report.to_json(),
            Failure::Message { message, help, .. } => json!([{ "message": message, "help": help }]),
            Failure::Told(_) | Failure::Closed => json!([]),
        }
    }

    /// Tells the user and returns the exit code.
    pub(crate) fn tell(self) -> ExitCode {
        let text = self.text();
        if !text.is_empty() {
            output::complain(&text);
        }
        ExitCode::from(self.code())
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let code = match &error {
            Error::Stopped { code, .. } => *code,
            error if error.is_users() => 2,
            _ => 1,
        };
        let message = error.to_string();
        let help = if let Error::NonFinite { help, .. } = error { help } else { Vec::new() };
        Failure::Message { message, help, code }
    }
}

impl From<RunError> for Failure {
    fn from(error: RunError) -> Failure {
        Error::from(error).into()
    }
}

impl From<WeightsError> for Failure {
    fn from(error: WeightsError) -> Failure {
        Error::from(error).into()
    }
}

/// An error in writing results.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Failure::Closed,
            _ => Failure::failed(format!("cannot write to stdout: {error}")),
        }
    }
}
