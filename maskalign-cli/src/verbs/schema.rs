//! `maskalign schema`: what editors check recipes against.

use maskalign_registry::recipe_schema;

use crate::{failure::Failure, output, session::Session};

const EXAMPLES: &str = "\
Examples:
  maskalign schema > recipe.schema.json

An editor with a YAML language server then completes and checks every recipe beside it that begins with
  # yaml-language-server: $schema=./recipe.schema.json";

/// Print the JSON Schema (draft-07) of recipes, plugins included
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {}

impl Args {
    #[expect(clippy::unused_self, reason = "every verb runs alike; this one takes no arguments")]
    pub(crate) fn run(self, session: &Session) -> Result<(), Failure> {
        Ok(output::print_json(&recipe_schema(session.registry))?)
    }
}
