//! What the tests of stages share.

use std::{collections::BTreeMap, path::Path};

use maskalign_core::{
    Recompute,
    components::towers::{Environment, MissingWeights},
    stages::StageContext,
    weights::{TensorMap, read},
};
use maskalign_registry::{Input, LoadRequest, NoRecipes, Recipe, Registry, decode_options};
use serde::de::DeserializeOwned;

/// A file of this workspace, by its path from this crate's folder.
///
/// # Panics
/// It cannot be read.
pub(crate) fn fixture(path: &str) -> TensorMap {
    read(&Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).expect("the fixture")
}

/// Takes the tensors whose names begin with `prefix` out of `tensors`, without it.
pub(crate) fn part(tensors: &mut TensorMap, prefix: &str) -> TensorMap {
    let names: Vec<String> = tensors.keys().filter(|name| name.starts_with(prefix)).cloned().collect();
    names.into_iter().map(|name| (name[prefix.len()..].to_owned(), tensors.remove(&name).expect("listed"))).collect()
}

/// The options of the one stage of a recipe.
///
/// # Panics
/// The recipe is not sound.
pub(crate) fn stage<S: DeserializeOwned>(recipe: &str) -> S {
    let request = LoadRequest {
        input: Input::Text { name: "recipe".into(), text: recipe.into() },
        sets: &[],
        env: &|_| None,
        builtins: &NoRecipes,
    };
    let loaded = Recipe::load(&request, Registry::global().expect("a registry"));
    let loaded = loaded.unwrap_or_else(|report| panic!("{}", report.render()));
    decode_options(loaded.recipe().stages[0].options_value()).expect("its options")
}

/// Plans without a look at files, as the first stage of a recipe.
pub(crate) fn planned<P>(plan: impl FnOnce(&StageContext) -> P) -> P {
    plan(&StageContext {
        name: "stage",
        seed: 0,
        students: &BTreeMap::new(),
        environment: Environment::Ignored,
        missing_weights: MissingWeights::Refused,
        recompute: Recompute::Never,
    })
}

/// Norm of the difference over norm of the reference.
pub(crate) fn relative_error(ours: &[f32], theirs: &[f32]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    norm(&mut ours.iter().zip(theirs).map(|(a, b)| f64::from(*a) - f64::from(*b)))
        / norm(&mut theirs.iter().map(|v| f64::from(*v)))
}
