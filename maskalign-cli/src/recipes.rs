//! Reading recipes: a file, or the name of one that is embedded.

use std::path::Path;

use maskalign_core::embedded;
use maskalign_registry::{Input, LoadRequest, Loaded, Recipe, RecipeSource, Registry, Report};

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

impl From<Report> for Failure {
    fn from(report: Report) -> Failure {
        Failure::Recipe(report)
    }
}
