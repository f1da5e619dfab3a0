//! `maskalign completions`: what a shell completes.

use std::path::Path;

use clap_complete::Shell;

use crate::{failure::Failure, output, session::Session};

const EXAMPLES: &str = "\
Examples:
  maskalign completions bash > ~/.local/share/bash-completion/completions/maskalign
  maskalign completions zsh > ~/.zfunc/_maskalign
  maskalign completions fish > ~/.config/fish/completions/maskalign.fish";

/// Print the completions of a shell
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

impl Args {
    pub(crate) fn run(self, session: &Session) -> Result<(), Failure> {
        // A plugin's own binary is completed under its own name.
        let name =
            session.arguments.first().and_then(|path| Path::new(path).file_stem()?.to_str()).unwrap_or("maskalign");
        let mut text = Vec::new();
        clap_complete::generate(self.shell, &mut (session.command)(), name, &mut text);
        Ok(output::print(&String::from_utf8_lossy(&text))?)
    }
}
