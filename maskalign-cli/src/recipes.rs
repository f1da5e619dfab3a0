//! Reading recipes: a file, or the name of one that is embedded.

use std::path::Path;

use maskalign_core::embedded;
use maskalign_registry::{Input, LoadRequest, Loaded, Recipe, RecipeSource, Registry, Report, source::parse_value};
use serde_json::Value;

use crate::failure::Failure;

/// The recipes inside the binary.
pub(crate) struct Embedded;

impl RecipeSource for Embedded {
    fn builtin(&self, name: &str) -> Option<&str> {
        embedded::RECIPES.iter().find(|(known, _)| *known == name).map(|(_, text)| *text)
    }

    fn names(&self) -> Vec<&str> {
        embedded::RECIPES.iter().map(|(name, _)| *name).collect()
    }
}

/// Values that replace those of a recipe.
#[derive(clap::Args, Clone, Debug, Default)]
pub(crate) struct Sets {
    /// Sets one value of the recipe, or removes it with `~PATH`; may be repeated
    ///
    /// The value is YAML: `--set stages.pretrain.masker.ratio=0.75`, `--set 'stages.pretrain.masker={type: random, ratio:
    /// 0.5}'`, `--set ~stages.knn`.
    #[arg(long = "set", value_name = "PATH=VALUE")]
    pub sets: Vec<String>,
}

/// Reads and checks a recipe.
///
/// # Errors
/// Every mistake of its structure.
pub(crate) fn load(registry: &Registry, recipe: &Path, sets: &[String]) -> Result<Loaded, Report> {
    Recipe::load(&request(recipe, sets), registry)
}

/// As [`load`], for verbs that do not look at data and weights: a variable that is not set may have any value.
///
/// # Errors
/// As [`load`].
pub(crate) fn load_anywhere(registry: &Registry, recipe: &Path, sets: &[String]) -> Result<Loaded, Report> {
    Recipe::load_without_environment(&request(recipe, sets), registry)
}

fn request<'a>(recipe: &Path, sets: &'a [String]) -> LoadRequest<'a> {
    LoadRequest {
        input: Input::Path(recipe.to_owned()),
        sets,
        env: &|name| std::env::var(name).ok(),
        builtins: &Embedded,
    }
}

/// A run's resolved recipe. It is read as it stands, without components, so that those of other versions are read too.
pub(crate) fn resolved(text: &str) -> Result<Value, String> {
    let mut recipe = parse_value(text)?;
    let mut open = vec![&mut recipe];
    while let Some(value) = open.pop() {
        match value {
            // A dollar is written twice there.
            Value::String(text) => *text = text.replace("$$", "$"),
            Value::Array(items) => open.extend(items),
            Value::Object(entries) => open.extend(entries.values_mut()),
            _ => {}
        }
    }
    Ok(recipe)
}

impl From<Report> for Failure {
    fn from(report: Report) -> Failure {
        Failure::Recipe(report)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_resolved_recipe_is_read_with_its_dollars() {
        let read = resolved("name: x\nstages:\n  a:\n    root: a$$b\n    list: [$$c]\n").expect("YAML");
        assert_eq!(read, json!({ "name": "x", "stages": { "a": { "root": "a$b", "list": ["$c"] } } }));
    }
}
