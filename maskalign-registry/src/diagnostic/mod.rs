//! Diagnostics: what is wrong with a recipe, where, and how to fix it.

pub mod codes;
mod json;
mod render;
mod report;
mod source;

use std::{fmt, ops::Range, sync::Arc};

pub use report::Report;
pub use source::{Source, SourceKind};

use crate::wording::list;

/// A span of a source.
#[derive(Clone, Debug)]
pub struct Place {
    /// The file or flag.
    pub source: Arc<Source>,
    /// Byte offsets into its text.
    pub span: Range<usize>,
}

impl Place {
    /// Line and column of the start, both from 1, the column in characters.
    pub fn line_column(&self) -> (usize, usize) {
        self.source.line_column(self.span.start)
    }

    /// Whether both are the same span of the same source.
    pub(crate) fn is(&self, other: &Place) -> bool {
        Arc::ptr_eq(&self.source, &other.source) && self.span == other.span
    }

    /// The text that the span covers.
    pub fn text(&self) -> &str {
        self.source.text().get(self.span.clone()).unwrap_or("")
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (line, column) = self.line_column();
        write!(f, "{}:{line}:{column}", self.source.name())
    }
}

/// A place with a note.
#[derive(Clone, Debug)]
pub struct Label {
    /// Where.
    pub place: Place,
    /// The note; empty if the message needs none.
    pub text: String,
}

/// One mistake: what, where, and how to fix it.
#[derive(Clone, Debug)]
pub struct Diagnostic {
    /// One of [`codes`].
    pub code: &'static str,
    /// What is wrong: a lower-case fragment.
    pub message: String,
    /// The first label is the primary one. Empty only if nothing could be read at all.
    pub labels: Vec<Label>,
    /// Ways to fix it, each a lower-case fragment.
    pub help: Vec<String>,
    /// Keys and indices from the recipe's root to the value at fault; empty where unknown.
    pub path: Vec<String>,
    /// What is allowed there, if that can be listed.
    pub allowed: Vec<String>,
    /// The nearest known names.
    pub suggestions: Vec<String>,
}

impl Diagnostic {
    /// An error at a place.
    pub fn error(code: &'static str, message: impl Into<String>, place: Place) -> Diagnostic {
        Diagnostic {
            code,
            message: message.into(),
            labels: vec![Label { place, text: String::new() }],
            help: Vec::new(),
            path: Vec::new(),
            allowed: Vec::new(),
            suggestions: Vec::new(),
        }
    }

    /// Adds a way to fix it.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Diagnostic {
        self.help.push(help.into());
        self
    }

    /// Adds a second place.
    #[must_use]
    pub fn label(mut self, place: Place, text: impl Into<String>) -> Diagnostic {
        self.labels.push(Label { place, text: text.into() });
        self
    }

    /// Sets the note at the primary place.
    #[must_use]
    pub fn says(mut self, text: impl Into<String>) -> Diagnostic {
        if let Some(label) = self.labels.first_mut() {
            label.text = text.into();
        }
        self
    }

    /// Sets the path from the recipe's root.
    #[must_use]
    pub fn at(mut self, path: &[String]) -> Diagnostic {
        self.path = path.to_vec();
        self
    }

    /// Sets the suggestions and what is allowed, and adds both to the help.
    #[must_use]
    pub fn allowing<'a>(
        mut self,
        suggestions: impl IntoIterator<Item = &'a str>,
        allowed: impl IntoIterator<Item = &'a str>,
    ) -> Diagnostic {
        self.suggestions.extend(suggestions.into_iter().map(str::to_owned));
        self.allowed.extend(allowed.into_iter().map(str::to_owned));
        if !self.suggestions.is_empty() {
            self.help.push(format!("did you mean {}?", list(&self.suggestions, "or")));
        }
        if !self.allowed.is_empty() {
            self.help.push(format!("known here: {}", list(&self.allowed, "and")));
        }
        self
    }

    /// The primary place.
    pub fn place(&self) -> Option<&Place> {
        self.labels.first().map(|label| &label.place)
    }
}
