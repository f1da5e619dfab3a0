//! The request: a recipe, flags and an environment.

use std::path::PathBuf;

/// Where the names of embedded recipes come from.
pub trait RecipeSource {
    /// The text of the embedded recipe of that name.
    fn builtin(&self, name: &str) -> Option<&str>;

    /// The names of all embedded recipes, for suggestions.
    fn names(&self) -> Vec<&str>;
}

/// No embedded recipes.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoRecipes;

impl RecipeSource for NoRecipes {
    fn builtin(&self, _: &str) -> Option<&str> {
        None
    }

    fn names(&self) -> Vec<&str> {
        Vec::new()
    }
}

/// The recipe to read.
#[derive(Clone, Debug)]
pub enum Input {
    /// A file, or, if there is none, the name of an embedded recipe.
    Path(PathBuf),
    /// Text in place of a file.
    Text {
        /// The name that messages show; bases are looked up relative to it.
        name: String,
        /// The YAML.
        text: String,
    },
}

/// Everything that decides what a recipe means, besides the registry.
pub struct LoadRequest<'a> {
    /// The recipe.
    pub input: Input,
    /// The values of `--set`, in order: `path=VALUE` or `~path`.
    pub sets: &'a [String],
    /// The environment.
    pub env: &'a dyn Fn(&str) -> Option<String>,
    /// The embedded recipes.
    pub builtins: &'a dyn RecipeSource,
}
