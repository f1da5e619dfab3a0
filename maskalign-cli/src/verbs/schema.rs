//! `maskalign schema`: what editors check recipes against.

use std::{fs, io::Write as _, path::Path};

use maskalign_core::run::atomic_write;
use maskalign_registry::recipe_schema;

use crate::{failure::Failure, output, session::Session};

/// The file that the first line of a recipe names, for editors.
pub(super) const SCHEMA: &str = "recipe.schema.json";

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

/// Writes the schema beside a recipe where there is none, and says what an editor has there now. Another one may be somebody's
/// own.
pub(super) fn schema_beside(session: &Session, recipe: &Path) -> Result<String, Failure> {
    let schema = recipe.with_file_name(SCHEMA);
    if schema == recipe {
        return Ok(String::new());
    }
    let text = format!("{:#}\n", recipe_schema(session.registry));
    let shown = schema.display();
    match fs::read_to_string(&schema) {
        Ok(there) if there == text => Ok(String::new()),
        _ if schema.symlink_metadata().is_ok() => {
            Ok(format!("{shown}, which editors read, is of another version; renew it: maskalign schema > {shown}\n"))
        }
        _ => {
            atomic_write(&schema, "schema", |out| out.write_all(text.as_bytes()))?;
            Ok(format!("wrote {shown}, by which editors complete and check it\n"))
        }
    }
}
