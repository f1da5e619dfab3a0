//! A recipe, from a request to stages with every default filled in.

use std::sync::Arc;

use indexmap::IndexMap;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::{
    compose::{Input, LoadRequest, compose},
    decode::{self, Located, Unset},
    diagnostic::{Diagnostic, Label, Place, Report, codes},
    plugin::{Kind, Registry, StageTag},
    refusal::{Base, Refusal},
    slot::Slot,
    source::{Content, Node, Origin, Source, SourceKind, parse, resolve_plain},
};

/// How many mistakes one report lists.
const MAX_REPORTED: usize = 100;

/// What a recipe says, with the defaults of every component at every level.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Run directories are named after it.
    pub name: String,
    /// What it is for; changes nothing.
    #[serde(default)]
    pub description: Option<String>,
    /// Everything random follows from it.
    #[serde(default)]
    pub seed: u64,
    /// The stages, in the order in which they run.
    pub stages: IndexMap<String, Slot<StageTag>>,
}

impl Recipe {
    /// Reads, composes, checks and fills a recipe.
    ///
    /// # Errors
    /// Every mistake that can be known from the recipe's structure, sorted by place; with such mistakes also names of
    /// teachers and stages that are not there, which otherwise are told with all that cannot be planned.
    pub fn load(request: &LoadRequest<'_>, registry: &Registry) -> Result<Loaded, Report> {
        Recipe::load_as(request, registry, Unset::Mistake)
    }

    /// As [`Recipe::load`], for a machine on which the recipe does not run: a variable that is not set is some scalar
    /// that fits. Text stands for itself; a stage in which it is anything else is left out, see [`Loaded::unplanned`].
    ///
    /// # Errors
    /// As there.
    pub fn load_without_environment(request: &LoadRequest<'_>, registry: &Registry) -> Result<Loaded, Report> {
        Recipe::load_as(request, registry, Unset::Unknown)
    }

    fn load_as(request: &LoadRequest<'_>, registry: &Registry, unset: Unset) -> Result<Loaded, Report> {
        let composed = compose(request);
        let mut sources = composed.sources;
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
            let checked = decode::check(root, registry, &fallback, unset);
            if composed.incomplete {
                // What a base that could not be read would have given is not missing.
                let is_there = |found: &Diagnostic| found.code != codes::MISSING_KEY;
                diagnostics.extend(checked.diagnostics.into_iter().filter(is_there));
            } else {
                diagnostics.extend(checked.diagnostics);
                references = checked.references;
            }
            resolved = checked.value;
            unplanned = checked.unknown;
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
            Ok((recipe, resolved)) => Ok(Loaded { root, sources, fallback, references, unplanned, recipe, resolved }),
            Err((path, message)) => {
                let place = decode::locate(&root, &path, &fallback).place;
                let diagnostic = Diagnostic::error(codes::REFUSED, message, place).at(&path);
                Err(report(vec![diagnostic], &sources))
            }
        }
    }
}

/// One component written as YAML, checked and filled.
pub(crate) fn component(registry: &Registry, kind: Kind, name: &str, text: &str) -> Result<Value, Report> {
    let source = Arc::new(Source::new(name, text, SourceKind::File));
    let parsed = parse(&source);
    let mut diagnostics = parsed.diagnostics;
    let Some(root) = parsed.root else {
        if diagnostics.is_empty() {
            let place = Place { source: Arc::clone(&source), span: 0..0 };
            diagnostics.push(Diagnostic::error(codes::SYNTAX, "nothing is written", place));
        }
        return Err(report(diagnostics, &[source]));
    };
    let (value, found) = decode::check_component(&root, kind, registry, &source);
    diagnostics.extend(found);
    let (Some(mut value), true) = (value, diagnostics.is_empty()) else {
        return Err(report(diagnostics, &[source]));
    };
    decode::fill(registry, kind, &mut value, &mut Vec::new()).map_err(|(path, message)| {
        let place = decode::locate(&root, &path, &source).place;
        let diagnostic = Diagnostic::error(codes::REFUSED, message, place).at(&path);
        report(vec![diagnostic], &[Arc::clone(&source)])
    })?;
    Ok(value)
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

/// Fills the defaults of the root and of every component.
fn fill(value: Value, registry: &Registry) -> Result<(Recipe, Value), (Vec<String>, String)> {
    let mut value = value;
    let mut path = vec!["stages".to_owned()];
    if let Some(Value::Object(stages)) = value.get_mut("stages") {
        for (name, stage) in stages.iter_mut() {
            path.push(name.clone());
            decode::fill(registry, Kind::Stage, stage, &mut path)?;
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

/// Whether [`Loaded::resolved_yaml`] says where each value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShowOrigin {
    /// Values alone.
    No,
    /// A comment behind each value.
    Yes,
}

/// A recipe without mistakes of structure, and the document that it came from.
#[derive(Clone, Debug)]
pub struct Loaded {
    root: Node,
    /// Every text that took part, in the order in which reports list them: flags last.
    sources: Vec<Arc<Source>>,
    fallback: Arc<Source>,
    /// Names of teachers and stages that are not there: planning refuses them too.
    references: Vec<Diagnostic>,
    /// Variables without a value that stages were left out for.
    unplanned: Vec<Diagnostic>,
    recipe: Recipe,
    resolved: Value,
}

impl Loaded {
    /// The typed recipe.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// The recipe as JSON: every default filled in, `type` first in every component.
    pub fn resolved(&self) -> &Value {
        &self.resolved
    }

    /// The stages that were left out since a variable that decides more than a text has no value, in their order, with
    /// every such variable at its place.
    pub fn unplanned(&self) -> Vec<(&str, Report)> {
        let stages = self.root.as_map().and_then(|root| root.get("stages")?.value.as_map());
        let names = stages.into_iter().flat_map(|stages| stages.keys());
        let of = |stage: &String| {
            let here = |noted: &&Diagnostic| {
                noted.path.first().is_some_and(|key| key == "stages") && noted.path.get(1) == Some(stage)
            };
            Report(self.unplanned.iter().filter(here).cloned().collect())
        };
        names.map(|stage| (stage.as_str(), of(stage))).filter(|(_, report)| !report.0.is_empty()).collect()
    }

    /// Every variable for which [`Loaded::unplanned`] leaves out a stage, once.
    pub fn unset(&self) -> Report {
        let in_stage = |noted: &&Diagnostic| noted.path.first().is_some_and(|key| key == "stages");
        report(self.unplanned.iter().filter(in_stage).cloned().collect(), &self.sources)
    }

    /// The composed document, as it was before defaults.
    pub fn document(&self) -> &Node {
        &self.root
    }

    /// Who set the value at a path of keys and indices; [`Origin::Default`] where nobody did.
    pub fn origin_of<S: AsRef<str>>(&self, path: &[S]) -> Origin {
        let mut node = &self.root;
        for segment in path {
            match node.child(segment.as_ref()) {
                Some(child) => node = child,
                None => return Origin::Default,
            }
        }
        node.origin.clone()
    }

    /// Puts a refusal at its place. Its path starts at the recipe's root: prefix it with
    /// [`Refusal::under`] `(stage)` and `("stages")`. An option that was left at its default is
    /// shown at the nearest mapping above it; of options that do not fit each other the one that was
    /// set last is blamed, and the others are shown beside it.
    pub fn locate(&self, refusal: &Refusal) -> Diagnostic {
        // Of a name that is not there the document says more: what is near, and what is known.
        if let Some(missed) = self.references.iter().find(|missed| missed.path == refusal.path) {
            return missed.clone();
        }
        let located = decode::locate(&self.root, &refusal.path, &self.fallback);
        let said = match located.absent {
            Some(depth) => self.default_of(&refusal.path[..depth]),
            None => String::new(),
        };
        let rank = |located: &Located| (self.precedence(&located.place), located.absent.is_none());
        let mut last = (rank(&located), 0);
        let mut spots = vec![(refusal.path.clone(), located.place, said)];
        for related in &refusal.related {
            let stage = if related.base == Base::Stage { refusal.path.get(..2).unwrap_or_default() } else { &[] };
            let path = [stage, &related.path].concat();
            let located = decode::locate(&self.root, &path, &self.fallback);
            let known = spots.iter().any(|(_, place, _)| place.is(&located.place));
            if located.absent.is_none() && !known {
                let rank = rank(&located);
                if rank > last.0 {
                    last = (rank, spots.len());
                }
                spots.push((path, located.place, related.note.clone()));
            }
        }
        let (path, place, said) = spots.remove(last.1);
        let mut diagnostic = Diagnostic::error(codes::REFUSED, refusal.message.clone(), place).at(&path).says(said);
        for (_, place, said) in spots {
            diagnostic = diagnostic.label(place, said);
        }
        diagnostic.help.extend(refusal.help.clone());
        diagnostic
    }

    /// What holds for an option that is not given.
    fn default_of(&self, path: &[String]) -> String {
        let option = path.last().map_or("", String::as_str);
        let mut value = Some(&self.resolved);
        for segment in path {
            value = value.and_then(|value| match value {
                Value::Array(items) => items.get(segment.parse::<usize>().ok()?),
                other => other.get(segment),
            });
        }
        match value {
            Some(value) if !value.is_object() && !value.is_array() && !value.is_null() => {
                format!("`{option}` is {value} by default")
            }
            _ => format!("`{option}` is not given"),
        }
    }

    /// What overrides what: flags the recipe, later ones earlier ones, and the recipe its bases.
    fn precedence(&self, place: &Place) -> (bool, isize) {
        let at = self.sources.iter().position(|source| Arc::ptr_eq(source, &place.source));
        let at = at.map_or(isize::MAX, |at| at as isize);
        let is_flag = place.source.kind() == SourceKind::Flag;
        (is_flag, if is_flag { at } else { -at })
    }

    /// Puts several refusals at their places, sorted. What two parts of a stage are refused for in the same words is one
    /// mistake with two places.
    pub fn locate_all<'r>(&self, refusals: impl IntoIterator<Item = &'r Refusal>) -> Report {
        let mut diagnostics: Vec<Diagnostic> = Vec::new();
        for refusal in refusals {
            let found = self.locate(refusal);
            let same = |other: &&mut Diagnostic| {
                other.message == found.message && other.path.get(..2) == found.path.get(..2) && found.path.len() > 2
            };
            match (diagnostics.iter_mut().find(same), found.place()) {
                (Some(other), Some(place)) => {
                    other.labels.push(Label { place: place.clone(), text: "here too".into() })
                }
                _ => diagnostics.push(found),
            }
        }
        // What planning did not come to, since something before it was refused.
        for missed in &self.references {
            if !diagnostics.iter().any(|known| known.path == missed.path) {
                diagnostics.push(missed.clone());
            }
        }
        report(diagnostics, &self.sources)
    }

    /// The recipe as YAML that decodes to the same recipe: no variables, no bases, no defaults
    /// left to fill.
    pub fn resolved_yaml(&self, show: ShowOrigin) -> String {
        let mut lines = Vec::new();
        let mut writer = Writer { loaded: self, show, path: Vec::new(), lines: &mut lines };
        writer.mapping(&self.resolved, 0);
        const COMMENT_COLUMN: usize = 48;
        let mut out = String::new();
        for (text, comment) in lines {
            match comment {
                Some(comment) => out.push_str(&format!("{text:<COMMENT_COLUMN$}  # {comment}\n")),
                None => out.push_str(&format!("{text}\n")),
            }
        }
        out
    }

    /// BLAKE3 of the resolved recipe without its `description`, in hexadecimal. Maps that a person
    /// orders, such as stages, keep their order in it; options stand in the order of their struct.
    pub fn fingerprint(&self) -> String {
        fingerprint(&self.resolved)
    }
}

/// The fingerprint of a resolved recipe, such as one read back from a run.
pub fn fingerprint(resolved: &Value) -> String {
    let mut resolved = resolved.clone();
    if let Value::Object(object) = &mut resolved {
        object.shift_remove("description");
    }
    blake3::hash(resolved.to_string().as_bytes()).to_hex().to_string()
}

/// What differs between two resolved recipes, one line each: `path: old -> new`.
pub fn diff(old: &Value, new: &Value) -> Vec<String> {
    let mut lines = Vec::new();
    diff_at("", Some(old), Some(new), &mut lines);
    lines
}

fn diff_at(path: &str, old: Option<&Value>, new: Option<&Value>, lines: &mut Vec<String>) {
    if let (Some(Value::Object(old)), Some(Value::Object(new))) = (old, new) {
        let join = |key: &str| {
            if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
        };
        for (key, value) in old {
            diff_at(&join(key), Some(value), new.get(key), lines);
        }
        for (key, value) in new.iter().filter(|(key, _)| !old.contains_key(*key)) {
            diff_at(&join(key), None, Some(value), lines);
        }
        let shared = |a: &Map<String, Value>, b: &Map<String, Value>| -> Vec<String> {
            a.keys().filter(|key| b.contains_key(*key)).cloned().collect()
        };
        let (before, after) = (shared(old, new), shared(new, old));
        if before != after {
            lines.push(format!("{path}: order {} -> {}", before.join(", "), after.join(", ")));
        }
        return;
    }
    if old != new {
        let shown = |value: Option<&Value>| value.map_or("absent".to_owned(), Value::to_string);
        lines.push(format!("{path}: {} -> {}", shown(old), shown(new)));
    }
}

struct Writer<'a> {
    loaded: &'a Loaded,
    show: ShowOrigin,
    path: Vec<String>,
    lines: &'a mut Vec<(String, Option<String>)>,
}

impl Writer<'_> {
    fn mapping(&mut self, value: &Value, indent: usize) {
        let Value::Object(object) = value else {
            return;
        };
        for (key, value) in object {
            self.path.push(key.clone());
            let head = format!("{:indent$}{}:", "", yaml_text(key));
            self.value(&head, value, indent + 2);
            self.path.pop();
        }
    }

    /// Writes a value behind `head`, which is `key:` or `-`.
    fn value(&mut self, head: &str, value: &Value, indent: usize) {
        match value {
            Value::Object(object) if !object.is_empty() => {
                if head.ends_with('-') {
                    // The first key stands on the dash's line.
                    let first = self.lines.len();
                    self.mapping(value, indent);
                    if let Some((line, _)) = self.lines.get_mut(first) {
                        *line = format!("{head} {}", line.trim_start());
                    }
                } else {
                    self.lines.push((head.to_owned(), None));
                    self.mapping(value, indent);
                }
            }
            Value::Array(items) if items.iter().any(|item| !fits_in_line(item)) => {
                self.lines.push((head.to_owned(), None));
                for (index, item) in items.iter().enumerate() {
                    self.path.push(index.to_string());
                    self.value(&format!("{:indent$}-", ""), item, indent + 2);
                    self.path.pop();
                }
            }
            other => {
                let comment = match self.show {
                    ShowOrigin::Yes => Some(origin_comment(&self.loaded.origin_of(&self.path))),
                    ShowOrigin::No => None,
                };
                self.lines.push((format!("{head} {}", yaml_flow(other)), comment));
            }
        }
    }
}

fn origin_comment(origin: &Origin) -> String {
    let at = |place: &Place| format!("{}:{}", place.source.name(), place.line_column().0);
    // A comment ends at the end of the line, so nothing in it may break the line.
    let text = match origin {
        Origin::File(place) => at(place),
        Origin::Flag(place) => format!("--set {}", place.source.text()),
        Origin::Variable { name, at: place } if place.source.kind() == SourceKind::Flag => {
            format!("${name} in --set {}", place.source.text())
        }
        Origin::Variable { name, at: place } => format!("${name} at {}", at(place)),
        Origin::Default => "default".to_owned(),
    };
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Whether a value is written on one line: a scalar, or a list of such.
fn fits_in_line(value: &Value) -> bool {
    match value {
        Value::Object(object) => object.is_empty(),
        Value::Array(items) => items.iter().all(fits_in_line),
        _ => true,
    }
}

fn yaml_flow(value: &Value) -> String {
    match value {
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(yaml_flow).collect();
            format!("[{}]", items.join(", "))
        }
        Value::Object(_) => "{}".to_owned(),
        // A dollar would begin a variable.
        Value::String(text) => yaml_text(&text.replace('$', "$$")),
        other => other.to_string(),
    }
}

/// Text as a YAML scalar: plain where that is safe anywhere, double-quoted otherwise.
fn yaml_text(text: &str) -> String {
    let is_word = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_' || c == '/')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '/'));
    if is_word && matches!(resolve_plain(text), Content::Str(_)) {
        return text.to_owned();
    }
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            ' '..='~' => out.push(c),
            '\u{a0}'..='\u{d7ff}' | '\u{e000}'..='\u{fefe}' | '\u{ff00}'..='\u{fffd}'
                if !matches!(c, '\u{2028}' | '\u{2029}') =>
            {
                out.push(c);
            }
            c => out.push_str(&format!("\\U{:08x}", u32::from(c))),
        }
    }
    out.push('"');
    out
}
