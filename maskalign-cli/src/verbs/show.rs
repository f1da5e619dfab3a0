//! `maskalign show`: a recipe as it is written, or as it is understood.

use std::{fs, path::PathBuf};

use maskalign_registry::{RecipeSource, ShowOrigin};

use crate::{
    failure::Failure,
    output,
    recipes::{self, Embedded, Sets},
    session::Session,
};

const EXAMPLES: &str = "\
Examples:
  maskalign show quickstart                       the text of a built-in recipe
  maskalign show mine.yaml --resolved             with every default filled in
  maskalign show mine.yaml --resolved --origin    and who set each value";

/// Print a recipe, as written or with every default
///
/// With --resolved, what is printed is a whole recipe: no bases, variables or defaults left, and running it is the same
/// run.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// A recipe's file, or the name of a built-in recipe
    recipe: PathBuf,
    /// Apply bases, flags and variables, and fill in every default
    #[arg(long)]
    resolved: bool,
    /// Say behind each value where it comes from; implies --resolved
    #[arg(long)]
    origin: bool,
    #[command(flatten)]
    sets: Sets,
}

impl Args {
    pub(crate) fn run(self, session: &Session) -> Result<(), Failure> {
        if !self.resolved && !self.origin {
            if !self.sets.sets.is_empty() {
                return Err(Failure::mistake("`--set` changes nothing in a recipe's text").help("add `--resolved`"));
            }
            return Ok(output::print(&self.text(session)?)?);
        }
        let loaded = recipes::load(session.registry, &self.recipe, &self.sets.sets)?;
        let origin = if self.origin { ShowOrigin::Yes } else { ShowOrigin::No };
        Ok(output::print(&loaded.resolved_yaml(origin))?)
    }

    /// The text that `run` would read: a file's, else that of a built-in recipe.
    fn text(&self, session: &Session) -> Result<String, Failure> {
        let shown = self.recipe.display();
        if self.recipe.is_file() {
            return fs::read_to_string(&self.recipe)
                .map_err(|error| Failure::mistake(format!("cannot read {shown}: {error}")));
        }
        match self.recipe.to_str().and_then(|name| Embedded.builtin(name)) {
            Some(text) => Ok(text.to_owned()),
            // Loading has the words for a recipe that is not there, and the nearest names.
            None => match recipes::load(session.registry, &self.recipe, &[]) {
                Err(report) => Err(report.into()),
                Ok(_) => Err(Failure::mistake(format!("{shown} is not a file"))),
            },
        }
    }
}
