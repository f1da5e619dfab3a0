//! The state that all checks share: the position in the document, and what was found.

use std::sync::Arc;

use serde_json::Value;

use crate::{
    catalog::Registry,
    compose::Removal,
    diagnostic::{Diagnostic, Place, Source},
    plugin::Entry,
    schema::Schemas,
    yaml::{Mapping, Node, Origin},
};

/// How to treat a variable without a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unset {
    /// As a mistake.
    Mistake,
    /// As some valid scalar: the recipe will not run on this machine.
    Unknown,
}

/// A mapping that encloses what is being checked.
pub(super) struct Frame<'a> {
    pub(super) schema: &'a Value,
    pub(super) map: &'a Mapping,
    pub(super) depth: usize,
    /// The component whose options these are.
    pub(super) component: Option<&'static Entry>,
}

/// One walk over a document. Its methods are spread over the files of this folder by what they check.
pub(super) struct Checker<'a> {
    pub(super) registry: &'a Registry,
    pub(super) schemas: &'a Schemas,
    pub(super) root: &'a Node,
    /// What the document would hold, had it not been removed.
    pub(super) removals: &'a [Removal],
    pub(super) fallback: &'a Arc<Source>,
    pub(super) path: Vec<String>,
    pub(super) frames: Vec<Frame<'a>>,
    pub(super) diagnostics: Vec<Diagnostic>,
    pub(super) references: Vec<Diagnostic>,
    pub(super) unset: Unset,
    pub(super) unknown: Vec<Diagnostic>,
}

impl<'a> Checker<'a> {
    pub(super) fn new(root: &'a Node, registry: &'a Registry, fallback: &'a Arc<Source>) -> Checker<'a> {
        Checker {
            registry,
            schemas: registry.schemas(),
            root,
            removals: &[],
            fallback,
            path: Vec::new(),
            frames: Vec::new(),
            diagnostics: Vec::new(),
            references: Vec::new(),
            unset: Unset::Mistake,
            unknown: Vec::new(),
        }
    }

    pub(super) fn place(&self, origin: &Origin) -> Place {
        origin.place().cloned().unwrap_or_else(|| Place { source: Arc::clone(self.fallback), span: 0..0 })
    }

    /// Shows with a mistake where what is missing was removed, or what it was in.
    pub(super) fn showing_removal(&self, diagnostic: Diagnostic, missing: &[String]) -> Diagnostic {
        let within = missing.split_last().map(|(_, within)| within);
        let removal = self.removals.iter().find(|removal| removal.path == missing || Some(&*removal.path) == within);
        match removal.and_then(|removal| Some((removal, removal.by.place()?))) {
            Some((_, place)) if diagnostic.labels.iter().any(|label| label.place.is(place)) => diagnostic,
            Some((removal, place)) if removal.path == missing => diagnostic.label(place.clone(), "removed here"),
            Some((_, place)) => diagnostic.label(place.clone(), "what is inherited here is not taken over"),
            None => diagnostic,
        }
    }

    pub(super) fn report(&mut self, diagnostic: Diagnostic) {
        let diagnostic = diagnostic.at(&self.path);
        self.diagnostics.push(diagnostic);
    }
}
