//! Variables without a value.

use serde_json::Value;

use super::checker::{Checker, Unset};
use crate::{
    diagnostic::{Diagnostic, codes},
    schema::{reference, types, words},
    yaml::Node,
};

impl Checker<'_> {
    /// A scalar whose variables have no value.
    pub(super) fn unset(
        &mut self,
        node: &Node,
        schema: &Value,
        text: &str,
        diagnostics: &[Diagnostic],
    ) -> Option<Value> {
        let is_unset = |diagnostic: &Diagnostic| diagnostic.code == codes::UNSET_VARIABLE;
        if self.unset == Unset::Mistake || !diagnostics.iter().all(is_unset) {
            for diagnostic in diagnostics {
                self.report(diagnostic.clone());
            }
            return None;
        }
        if !self.takes_scalar(schema) {
            self.wrong_type(node, schema);
            return None;
        }
        // A variable in free text is kept as text: planning does not depend on it.
        let pattern = schema.get("pattern").and_then(Value::as_str).map(|pattern| self.schemas.pattern(pattern));
        let fits = |text: &String| pattern.is_none_or(|pattern| pattern.is_some_and(|pattern| pattern.is_match(text)));
        let is_free =
            types(schema).contains(&"string") && words(schema).is_none() && schema.get("x-reference").is_none();
        if is_free && let Some(text) = [text.to_owned(), text.replace('$', "")].into_iter().find(fits) {
            return Some(Value::String(text));
        }
        self.leave_unknown(diagnostics.to_vec());
        None
    }

    pub(super) fn leave_unknown(&mut self, diagnostics: Vec<Diagnostic>) {
        let noted = self.unknown.iter().any(|noted| noted.path == self.path);
        if !noted {
            self.unknown.extend(diagnostics.into_iter().map(|diagnostic| diagnostic.at(&self.path)));
        }
    }

    /// Whether a schema admits any scalar.
    fn takes_scalar(&self, schema: &Value) -> bool {
        let schema = self.schemas.resolve(schema);
        if reference(schema).is_some() {
            return false;
        }
        for keyword in ["anyOf", "oneOf", "allOf"] {
            if let Some(branches) = schema.get(keyword).and_then(Value::as_array) {
                return branches.iter().any(|branch| self.takes_scalar(branch));
            }
        }
        let names = types(schema);
        names.is_empty() || names.iter().any(|name| !matches!(*name, "array" | "object"))
    }
}
