//! A recipe without mistakes of structure, with the document that it came from.

use std::sync::Arc;

use serde_json::Value;

use super::{Recipe, diff::fingerprint, report};
use crate::{
    check::{Located, locate},
    compose::Removal,
    diagnostic::{Diagnostic, Label, Place, Report, Source, SourceKind, codes},
    plugin::{Base, Refusal},
    wording::quoted,
    yaml::{self, Node, Origin},
};

/// Whether [`Loaded::resolved_yaml`] says where each value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShowOrigin {
    /// Values alone.
    No,
    /// A comment after each value.
    Yes,
}

/// A recipe without mistakes of structure, with the document that it came from.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub(super) root: Node,
    /// Every text that was read, in the order in which reports list them: recipes, flags, and what stands beside files.
    pub(super) sources: Vec<Arc<Source>>,
    pub(super) fallback: Arc<Source>,
    /// References to teachers and stages that do not resolve, which planning refuses too.
    pub(super) references: Vec<Diagnostic>,
    /// Variables without a value, for which stages were left out.
    pub(super) unplanned: Vec<Diagnostic>,
    /// What was not taken over from bases, or removed by flags.
    pub(super) removals: Vec<Removal>,
    pub(super) recipe: Recipe,
    pub(super) resolved: Value,
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

    /// The stages that were left out because a variable that is not free text has no value, in their order, with every
    /// such variable at its place.
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

    /// Where the value at a path of keys and indices comes from; [`Origin::Default`] if it is not written anywhere.
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

    /// What the recipe does not take over from those that it extends, and what flags remove, in the order of the document.
    pub fn removals(&self) -> &[Removal] {
        &self.removals
    }

    /// The resolved value at a path.
    fn resolved_at(&self, path: &[String]) -> Option<&Value> {
        path.iter().try_fold(&self.resolved, |value, segment| match value {
            Value::Array(items) => items.get(segment.parse::<usize>().ok()?),
            other => other.get(segment),
        })
    }

    /// Turns a refusal into a diagnostic at its place. Its path starts at the recipe's root: prefix it with
    /// [`Refusal::under`] `(stage)` and `("stages")`. An option that was left at its default is shown at the nearest
    /// mapping above it; of options that conflict, the one set last is blamed, and the others are shown with it.
    pub fn locate(&self, refusal: &Refusal) -> Diagnostic {
        // For a reference that does not resolve, the check knows more: similar names, and all known ones.
        if let Some(missed) = self.references.iter().find(|missed| missed.path == refusal.path) {
            return missed.clone();
        }
        let located = locate(&self.root, &refusal.path, &self.fallback);
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
            let located = locate(&self.root, &path, &self.fallback);
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

    /// A note on an option that is not given.
    fn default_of(&self, path: &[String]) -> String {
        let option = path.last().map_or("", String::as_str);
        match self.resolved_at(path) {
            Some(value) if !value.is_object() && !value.is_array() && !value.is_null() => {
                format!("`{option}` is {value} by default")
            }
            _ => format!("`{option}` is not given"),
        }
    }

    /// What overrides what: flags override the recipe, later flags earlier ones, and the recipe its bases.
    fn precedence(&self, place: &Place) -> (bool, isize) {
        let at = self.sources.iter().position(|source| Arc::ptr_eq(source, &place.source));
        let at = at.map_or(isize::MAX, |at| at as isize);
        let is_flag = place.source.kind() == SourceKind::Flag;
        (is_flag, if is_flag { at } else { -at })
    }

    /// Turns refusals into diagnostics at their places, sorted. Two refusals in one stage with the same message are one
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
                    other.labels.push(Label { place: place.clone(), text: "here too".into() });
                }
                _ => diagnostics.push(found),
            }
        }
        // References that planning did not reach, because it refused something before them.
        for missed in &self.references {
            if !diagnostics.iter().any(|known| known.path == missed.path) {
                diagnostics.push(missed.clone());
            }
        }
        report(diagnostics, &self.sources)
    }

    /// The recipe as YAML that decodes to the same recipe, without variables, bases, or defaults left to fill in.
    pub fn resolved_yaml(&self, show: ShowOrigin) -> String {
        yaml::write(
            &self.resolved,
            &|path| match show {
                ShowOrigin::Yes => Some(self.origin_comment(path)),
                ShowOrigin::No => None,
            },
            &|path| match show {
                ShowOrigin::Yes => self.removal_comments(path),
                ShowOrigin::No => Vec::new(),
            },
        )
    }

    /// Where a value comes from, and what it takes the place of.
    fn origin_comment(&self, path: &[String]) -> String {
        let own = shown(&self.origin_of(path));
        match self.removals.iter().find(|removal| removal.path == path) {
            Some(removal) => format!("{own}; {} removes {}", shown(&removal.by), shown(&removal.was)),
            None => own,
        }
    }

    /// What a mapping does not have any more, and what it has in the place of something else.
    fn removal_comments(&self, path: &[String]) -> Vec<String> {
        let comment = |removal: &Removal| match removal.path.split_last() {
            _ if removal.path == path => {
                Some(format!("in the place of {}, by {}", shown(&removal.was), shown(&removal.by)))
            }
            Some((name, parent)) if parent == path && self.resolved_at(&removal.path).is_none() => {
                Some(format!("without {} of {}, by {}", quoted(name), shown(&removal.was), shown(&removal.by)))
            }
            _ => None,
        };
        self.removals.iter().filter_map(comment).collect()
    }

    /// BLAKE3 of the resolved recipe without its `description`, in hexadecimal. Mappings whose order has a meaning,
    /// such as stages, keep it; options are in the order of their struct.
    pub fn fingerprint(&self) -> String {
        fingerprint(&self.resolved)
    }
}

/// An origin on one line.
fn shown(origin: &Origin) -> String {
    let at = |place: &Place| format!("{}:{}", place.source.name(), place.line_column().0);
    // A comment ends with its line, so that nothing in it may break the line.
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
