//! Recipes: from a request to stages with every default filled in.

mod beside;
mod component;
mod diff;
mod loaded;

use std::sync::Arc;

use indexmap::IndexMap;
use serde::Deserialize;
use serde_json::{Map, Value, json};

pub use diff::{diff, fingerprint};
pub use loaded::{Loaded, ShowOrigin};

use crate::{
    catalog::Registry,
    check::{self, Unset, check},
    compose::{Input, LoadRequest, compose},
    diagnostic::{Diagnostic, Place, Report, Source, SourceKind, codes},
    options::Slot,
    plugin::{Kind, StageTag},
};

/// The most mistakes that one report lists.
const MAX_REPORTED: usize = 100;

/// A recipe, with the defaults of every component at every level.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Run directories are named after it.
    pub name: String,
    /// What it is for; it changes nothing.
    #[serde(default)]
    pub description: Option<String>,
    /// Everything random follows from it.
    #[serde(default)]
    pub seed: u64,
    /// The stages, in the order in which they run.
    pub stages: IndexMap<String, Slot<StageTag>>,
}

impl Recipe {
    /// Reads, composes and checks a recipe, and fills in its defaults.
    ///
    /// # Errors
    /// Every mistake of structure, sorted by place. References to teachers and stages that do not resolve are reported
    /// along with those; on their own they are left to planning.
    pub fn load(request: &LoadRequest<'_>, registry: &Registry) -> Result<Loaded, Report> {
        Recipe::load_as(request, registry, Unset::Mistake)
    }

    /// As [`Recipe::load`], for a machine on which the recipe will not run: a variable that is not set counts as some
    /// valid scalar. In free text it is kept as text; a stage where it is anything else is left out, see
    /// [`Loaded::unplanned`].
    ///
    /// # Errors
    /// As [`Recipe::load`].
    pub fn load_without_environment(request: &LoadRequest<'_>, registry: &Registry) -> Result<Loaded, Report> {
        Recipe::load_as(request, registry, Unset::Unknown)
    }

    fn load_as(request: &LoadRequest<'_>, registry: &Registry, unset: Unset) -> Result<Loaded, Report> {
        let mut composed = compose(request);
        let mut sources = std::mem::take(&mut composed.sources);
        let fallback = match sources.first() {
            Some(source) => Arc::clone(source),
            None => {
                let name = match &request.input {
                    Input::Path(path) => path.display().to_string(),
                    Input::Text { name, .. } => name.clone(),
                };
                let source = Arc::new(Source::new(name, "", SourceKind::File));
                sources.push(Arc::clone(&source));
                source
            }
        };
        let mut diagnostics = composed.diagnostics;
        let mut resolved = None;
        let mut references = Vec::new();
        let mut unplanned = Vec::new();
        if let Some(root) = &composed.root {
            let checked = check(root, &composed.removals, registry, &fallback, unset);
            let vain = |found: &Diagnostic| {
                let at = found.place().filter(|_| found.code == codes::WRONG_TYPE)?;
                composed.vain.iter().find(|vain| vain.place.is(at))
            };
            if composed.incomplete {
                // Keys may come from a base that could not be read.
                let is_there = |found: &Diagnostic| found.code != codes::MISSING_KEY && vain(found).is_none();
                diagnostics.extend(checked.diagnostics.into_iter().filter(is_there));
            } else {
                let told = |found: Diagnostic| vain(&found).map(|vain| vain.mistake(&found)).unwrap_or(found);
                diagnostics.extend(checked.diagnostics.into_iter().map(told));
                references = checked.references;
            }
            resolved = checked.value;
            unplanned = checked.unknown;
        }
        // What stands beside files is read on the machine on which the recipe is to run.
        if let (Unset::Mistake, true, Some(root), Some(value)) =
            (unset, diagnostics.is_empty(), &mut composed.root, &resolved)
        {
            match beside::take_up(root, value, registry, &fallback, &mut sources) {
                Ok(false) => {}
                Ok(true) => {
                    let checked = check(root, &composed.removals, registry, &fallback, unset);
                    diagnostics.extend(checked.diagnostics);
                    references = checked.references;
                    resolved = checked.value;
                }
                Err(contradictions) => diagnostics.extend(contradictions),
            }
        }
        if !diagnostics.is_empty() {
            diagnostics.append(&mut references);
        }
        let (root, value) = match (composed.root, resolved) {
            (Some(root), Some(value)) if diagnostics.is_empty() => (root, value),
            (root, _) => {
                if diagnostics.is_empty() {
                    let place = root.as_ref().and_then(|root| root.origin.place()).cloned();
                    let place = place.unwrap_or_else(|| Place { source: Arc::clone(&fallback), span: 0..0 });
                    let message = "the recipe holds a value that no component takes";
                    diagnostics.push(Diagnostic::error(codes::REFUSED, message, place));
                }
                return Err(report(diagnostics, &sources));
            }
        };
        match fill(value, registry) {
            Ok((recipe, resolved)) => {
                let removals = composed.removals;
                Ok(Loaded { root, sources, fallback, references, unplanned, removals, recipe, resolved })
            }
            Err((path, message)) => {
                let place = check::locate(&root, &path, &fallback).place;
                let diagnostic = Diagnostic::error(codes::REFUSED, message, place).at(&path);
                Err(report(vec![diagnostic], &sources))
            }
        }
    }
}

fn report(diagnostics: Vec<Diagnostic>, sources: &[Arc<Source>]) -> Report {
    let mut report = Report(diagnostics);
    report.sort(sources);
    let more = report.0.len().saturating_sub(MAX_REPORTED);
    report.0.truncate(MAX_REPORTED);
    if let (Some(last), true) = (report.0.last_mut(), more > 0) {
        last.help.push(format!("{more} more mistakes follow"));
    }
    report
}

/// Fills in the defaults of the root and of every component.
fn fill(value: Value, registry: &Registry) -> Result<(Recipe, Value), (Vec<String>, String)> {
    let mut value = value;
    let mut path = vec!["stages".to_owned()];
    if let Some(Value::Object(stages)) = value.get_mut("stages") {
        for (name, stage) in stages.iter_mut() {
            path.push(name.clone());
            check::fill(registry, Kind::Stage, stage, &mut path)?;
            path.pop();
        }
    }
    let recipe: Recipe = serde_json::from_value(value).map_err(|error| (Vec::new(), error.to_string()))?;
    let mut resolved = Map::new();
    resolved.insert("name".to_owned(), json!(recipe.name));
    if let Some(description) = &recipe.description {
        resolved.insert("description".to_owned(), json!(description));
    }
    resolved.insert("seed".to_owned(), json!(recipe.seed));
    resolved.insert("stages".to_owned(), json!(recipe.stages));
    Ok((recipe, Value::Object(resolved)))
}
