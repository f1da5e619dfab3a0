//! Checking a single component, such as an example, and how it is registered.

use std::sync::Arc;

use serde_json::Value;

use super::report;
use crate::{
    catalog::Registry,
    check::{check_component, fill, locate},
    diagnostic::{Diagnostic, Place, Report, Source, SourceKind, codes},
    options::NAMED_TWICE,
    plugin::{Entry, Kind},
    schema::types,
    yaml::parse,
};

impl Registry {
    /// A single component written as YAML, checked and with every default filled in.
    ///
    /// # Errors
    /// Every mistake in it; their places show `name` as the file.
    pub fn component(&self, kind: Kind, name: &str, text: &str) -> Result<Value, Report> {
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
        let (value, found) = check_component(&root, kind, self, &source);
        diagnostics.extend(found);
        let (Some(mut value), true) = (value, diagnostics.is_empty()) else {
            return Err(report(diagnostics, &[source]));
        };
        fill(self, kind, &mut value, &mut Vec::new()).map_err(|(path, message)| {
            let place = locate(&root, &path, &source).place;
            let diagnostic = Diagnostic::error(codes::REFUSED, message, place).at(&path);
            report(vec![diagnostic], &[Arc::clone(&source)])
        })?;
        Ok(value)
    }

    /// Whether null is a value of an option.
    fn may_be_null(&self, entry: &Entry, option: &str) -> bool {
        let schema = self.schemas().component(entry.kind, entry.name);
        let Some(schema) = schema.and_then(|schema| schema.get("properties")?.get(option)) else {
            return false;
        };
        let schema = self.schemas().resolve(self.schemas().option(schema));
        let branches = schema.get("anyOf").and_then(Value::as_array).into_iter().flatten();
        std::iter::once(schema).chain(branches).any(|schema| types(schema).contains(&"null"))
    }

    /// What is wrong with how a component is registered, one sentence each: its name, summary and example, and the
    /// names, descriptions and patterns of its options. Empty if nothing is.
    pub fn faults(&self, entry: &Entry) -> Vec<String> {
        let address = entry.address();
        let mut faults = Vec::new();
        let is_snake = entry.name.starts_with(|c: char| c.is_ascii_lowercase())
            && entry.name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
        if !is_snake {
            faults.push(format!("{address}: the name is not snake_case"));
        }
        if entry.summary.is_empty() {
            faults.push(format!("{address}: there is no summary"));
        }
        if entry.package.is_empty() {
            faults.push(format!("{address}: the registering crate is not named"));
        }
        for option in self.options(entry) {
            if option.name == "type" {
                faults.push(format!("{address}: an option cannot be called `type`"));
            }
            if option.description.is_empty() {
                faults.push(format!("{address}: `{}` has no description", option.name));
            }
            // In a recipe that extends another, `null` gives an option its default.
            if option.default.is_some_and(|default| !default.is_null()) && self.may_be_null(entry, &option.name) {
                faults.push(format!("{address}: `{}` may be null, which is not its default", option.name));
            }
        }
        let schema = self.schemas().component(entry.kind, entry.name);
        let twice = schema.and_then(|schema| schema.get(NAMED_TWICE)?.as_array());
        for name in twice.into_iter().flatten().filter_map(Value::as_str) {
            faults.push(format!("{address}: `{name}` is both a shared option and one of its own"));
        }
        for pattern in self.schemas().unread_patterns(entry) {
            faults.push(format!("{address}: the pattern `{pattern}` cannot be read"));
        }
        match entry.example_value() {
            Ok(example) if example.get("type") != Some(&Value::from(entry.name)) => {
                faults.push(format!("{address}: the example is not of this type"));
            }
            Ok(_) => {
                if let Err(report) = self.component(entry.kind, &address, entry.example) {
                    faults.push(format!("{address}: the example is refused\n{report}"));
                }
            }
            Err(error) => faults.push(format!("{address}: the example is not YAML: {error}")),
        }
        faults
    }
}
