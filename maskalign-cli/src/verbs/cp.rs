//! `maskalign cp`: a built-in recipe as a file to change.

use std::{io::Write, path::PathBuf};

use maskalign_core::run::atomic_write;
use maskalign_registry::{RecipeSource, plugin::nearest};

use super::schema::{SCHEMA, schema_beside};
use crate::{failure::Failure, output, recipes::Embedded, session::Session};

const EXAMPLES: &str = "\
Examples:
  maskalign cp quickstart               writes quickstart.yaml
  maskalign cp quickstart mine.yaml";

/// Copy a built-in recipe to a file of your own
///
/// Writes the schema of recipes beside it, unless one is there: an editor with a YAML language server then completes and
/// checks the recipe.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The built-in recipe; `maskalign list recipes` names them
    name: String,
    /// Where to write it [default: NAME.yaml]
    file: Option<PathBuf>,
    /// Replace the file if it is there
    #[arg(long)]
    force: bool,
}

impl Args {
    pub(crate) fn run(self, session: &Session) -> Result<(), Failure> {
        let Some(text) = Embedded.builtin(&self.name) else {
            let names = Embedded.names();
            let mut failure = Failure::mistake(format!("there is no built-in recipe `{}`", self.name));
            if let Some(near) = nearest(&self.name, names.iter().copied()).first() {
                failure = failure.help(format!("did you mean `{near}`?"));
            }
            return Err(failure.help(format!("built-in recipes: {}", names.join(", "))));
        };
        let mut file = self.file.unwrap_or_else(|| PathBuf::from(format!("{}.yaml", self.name)));
        if file.is_dir() {
            file.push(format!("{}.yaml", self.name));
        }
        // A link that leads nowhere is something that would be replaced too.
        if file.symlink_metadata().is_ok() && !self.force {
            return Err(Failure::mistake(format!("{} is there already", file.display()))
                .help("name another file, or replace it with `--force`"));
        }
        atomic_write(&file, "recipe", |out| out.write_all(text.as_bytes()))?;
        let says = match text.contains(SCHEMA) {
            true => schema_beside(session, &file)?,
            false => String::new(),
        };
        Ok(output::print(&format!("wrote {}\n{says}", file.display()))?)
    }
}
