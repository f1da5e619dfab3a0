//! Everything that is wrong with one recipe.

use std::{fmt, sync::Arc};

use serde_json::Value;

use super::{Diagnostic, Source};

/// Every mistake found, in the order of their places.
#[derive(Clone, Debug, Default)]
pub struct Report(pub Vec<Diagnostic>);

impl Report {
    /// Plain text, a blank line between diagnostics.
    pub fn render(&self) -> String {
        let parts: Vec<String> = self.0.iter().map(Diagnostic::render).collect();
        parts.join("\n")
    }

    /// A list of [`Diagnostic::to_json`].
    pub fn to_json(&self) -> Value {
        Value::Array(self.0.iter().map(Diagnostic::to_json).collect())
    }

    /// Sorts by source, in the order in which `sources` lists them, then by offset; drops repeats.
    pub(crate) fn sort(&mut self, sources: &[Arc<Source>]) {
        let rank = |diagnostic: &Diagnostic| {
            diagnostic.place().map_or((0, 0), |place| {
                let source =
                    sources.iter().position(|source| Arc::ptr_eq(source, &place.source)).unwrap_or(sources.len());
                (source, place.span.start)
            })
        };
        self.0.sort_by_key(rank);
        self.0.dedup_by(|a, b| rank(a) == rank(b) && a.message == b.message);
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render())
    }
}

impl std::error::Error for Report {}
