//! `maskalign runs check`: whether a run directory is whole.

use std::path::PathBuf;

use maskalign_core::run::{Findings, Item, check};
use maskalign_registry::source::visible_lines;
use serde_json::json;

use crate::{
    failure::Failure,
    output, recipes,
    render::{self, paint},
    session::Session,
    verbs::{Format, Written},
};

/// Check that every file of a run is as it was written, and that they agree with each other
///
/// Reads all that the run would go on from: recipe, manifest, metrics, checkpoints, what its stages left. Changes nothing.
/// Exit code 1 where something is not whole.
#[derive(clap::Args)]
pub(super) struct Args {
    /// The run directory
    run: PathBuf,
    #[command(flatten)]
    written: Written,
}

impl Args {
    pub(super) fn run(self, session: &Session) -> Result<(), Failure> {
        let Findings { mut items, fingerprint } = check(&self.run)?;
        let recipe = items.iter_mut().find(|item| item.name == "recipe.resolved.yaml" && item.whole);
        if let (Some(recipe), Some(wanted)) = (recipe, fingerprint) {
            *recipe = self.recipe(session, &recipe.name, &wanted);
        }
        let broken = items.iter().filter(|item| !item.whole).count();
        match self.written.format() {
            Format::Json => output::print_json(&json!({ "whole": broken == 0, "items": items }))?,
            Format::Text => output::print(&text(&items))?,
        }
        match broken {
            0 => Ok(()),
            count => Err(Failure::failed(format!(
                "the run in {} is not whole: {count} of {} items are not as they should be",
                self.run.display(),
                items.len()
            ))),
        }
    }

    /// The recipe, held against the manifest's fingerprint.
    fn recipe(&self, session: &Session, name: &str, wanted: &str) -> Item {
        match recipes::load_anywhere(session.registry, &self.run.join(name), &[]) {
            Ok(loaded) if loaded.fingerprint() == wanted => Item::whole(name, "as the manifest names it"),
            Ok(_) => Item::broken(name, "it is not the recipe that the manifest names; put back a copy of it"),
            Err(report) => {
                let first = report.0.first().map_or(String::new(), |diagnostic| diagnostic.message.clone());
                Item::broken(name, format!("this command does not read it: {first}"))
            }
        }
    }
}

fn text(items: &[Item]) -> String {
    let width = items.iter().map(|item| item.name.chars().count()).max().unwrap_or(0);
    let lines = items.iter().map(|item| {
        let state = match item.whole {
            true => "whole    ".into(),
            false => paint(render::ERROR, "not whole"),
        };
        format!("{state}  {:<width$}  {}\n", visible_lines(&item.name), visible_lines(&item.says))
    });
    lines.collect::<Vec<_>>().concat()
}
