//! The walk over a document and its schema, value by value.

use std::sync::Arc;

use serde_json::Value;

use super::{
    checker::{Checker, Unset},
    scalar::{admits, retyped},
};
use crate::{
    catalog::Registry,
    compose::Removal,
    diagnostic::{Diagnostic, Source, codes},
    plugin::Kind,
    schema::{reference, types, words},
    yaml::{Content, Node, Origin, Typing},
};

/// The outcome of checking a document.
pub(crate) struct Checked {
    /// The document as JSON, if nothing is wrong. Stages with an unknown value are left out.
    pub value: Option<Value>,
    /// Mistakes of structure.
    pub diagnostics: Vec<Diagnostic>,
    /// References to teachers and stages that do not resolve.
    pub references: Vec<Diagnostic>,
    /// The variables that stages were left out for, with their paths.
    pub unknown: Vec<Diagnostic>,
}

/// Checks a document, of which some was removed.
pub(crate) fn check(
    root: &Node,
    removals: &[Removal],
    registry: &Registry,
    fallback: &Arc<Source>,
    unset: Unset,
) -> Checked {
    let mut checker = Checker { removals, unset, ..Checker::new(root, registry, fallback) };
    let value = checker.value(root, registry.schemas().root(), None);
    let Checker { diagnostics, references, unknown, .. } = checker;
    Checked { value, diagnostics, references, unknown }
}

/// Checks a single component.
pub(crate) fn check_component(
    root: &Node,
    kind: Kind,
    registry: &Registry,
    fallback: &Arc<Source>,
) -> (Option<Value>, Vec<Diagnostic>) {
    let mut checker = Checker::new(root, registry, fallback);
    let value = checker.component(root, kind, None);
    (value, checker.diagnostics)
}

impl<'a> Checker<'a> {
    /// Checks a node and reports what is wrong. Returns its JSON if the schema admits it.
    pub(super) fn value(&mut self, node: &'a Node, schema: &'a Value, key: Option<&'a Origin>) -> Option<Value> {
        let schema = self.schemas.resolve(schema);
        if let Content::Unset { text, diagnostics } = &node.content {
            return self.unset(node, schema, text, diagnostics);
        }
        if let Some(kind) = reference(schema).and_then(Kind::from_name) {
            return self.component(node, kind, key);
        }
        if let Some(all) = schema.get("allOf").and_then(Value::as_array) {
            let before = self.diagnostics.len();
            let mut value = None;
            for part in all {
                value = self.value(node, part, key);
                if self.diagnostics.len() > before {
                    return None;
                }
            }
            return value;
        }
        for keyword in ["anyOf", "oneOf"] {
            if let Some(branches) = schema.get(keyword).and_then(Value::as_array) {
                return self.one_of(node, schema, branches, key);
            }
        }
        if let Some(words) = words(schema) {
            return self.word(node, schema, &words);
        }
        let names = types(schema);
        if !names.is_empty() && !admits(&names, node) {
            self.wrong_type(node, schema);
            return None;
        }
        if let Some(content) = retyped(&names, node) {
            let node = Node { content, origin: node.origin.clone(), typing: Typing::Text };
            return match node.content {
                Content::Int(number) => self.number(&node, schema, number as f64),
                Content::Float(number) => self.number(&node, schema, number),
                _ => Some(node.to_json()),
            };
        }
        match &node.content {
            Content::Int(number) => self.number(node, schema, *number as f64),
            Content::Float(number) => self.number(node, schema, *number),
            Content::Str(text) => self.string(node, schema, text),
            Content::Seq(items) => self.list(node, schema, items),
            Content::Map(map) => self.mapping(node, schema, map, key, None),
            Content::Null | Content::Bool(_) | Content::Unset { .. } | Content::Removed { .. } => Some(node.to_json()),
        }
    }

    /// Checks against the branch that fits the type of what was written, so that messages are about that one.
    fn one_of(
        &mut self,
        node: &'a Node,
        schema: &'a Value,
        branches: &'a [Value],
        key: Option<&'a Origin>,
    ) -> Option<Value> {
        let mut fitting: Vec<&'a Value> = branches.iter().filter(|branch| self.fits(branch, node)).collect();
        if fitting.is_empty() {
            // A slot or null: any value that is not a mapping was meant for the slot.
            fitting = branches.iter().filter(|branch| self.schemas.slot(branch).is_some()).collect();
        }
        if matches!(&node.content, Content::Map(map) if !map.contains_key("type")) {
            // What has no `type` was not meant to be a component, where it may be something else.
            let others: Vec<_> = fitting.iter().copied().filter(|branch| self.schemas.slot(branch).is_none()).collect();
            fitting = if others.is_empty() { fitting } else { others };
        }
        match fitting.as_slice() {
            [] => {
                self.wrong_type(node, schema);
                None
            }
            [only] => self.value(node, only, key),
            several => {
                let mut best: Option<Vec<Diagnostic>> = None;
                for branch in several {
                    let kept = std::mem::take(&mut self.diagnostics);
                    let value = self.value(node, branch, key);
                    let found = std::mem::replace(&mut self.diagnostics, kept);
                    if found.is_empty() {
                        return value;
                    }
                    if best.as_ref().is_none_or(|best| found.len() < best.len()) {
                        best = Some(found);
                    }
                }
                self.diagnostics.extend(best.into_iter().flatten());
                None
            }
        }
    }

    /// Whether a branch admits values of the node's type.
    fn fits(&self, branch: &Value, node: &Node) -> bool {
        let branch = self.schemas.resolve(branch);
        if reference(branch).is_some() {
            return matches!(node.content, Content::Map(_));
        }
        for keyword in ["anyOf", "oneOf", "allOf"] {
            if let Some(inner) = branch.get(keyword).and_then(Value::as_array) {
                return inner.iter().any(|inner| reference(inner).is_some() || admits(&types(inner), node));
            }
        }
        let names = types(branch);
        if names.is_empty() {
            return match words(branch) {
                Some(_) => matches!(node.content, Content::Str(_)),
                None => true,
            };
        }
        admits(&names, node)
    }

    fn list(&mut self, node: &'a Node, schema: &'a Value, items: &'a [Node]) -> Option<Value> {
        let count = items.len() as u64;
        let bound = |keyword: &str| schema.get(keyword).and_then(Value::as_u64);
        let mut sound = true;
        let too_few = bound("minItems").is_some_and(|least| count < least);
        let too_many = bound("maxItems").is_some_and(|most| count > most);
        if too_few || too_many {
            let expected = self.schemas.expected(schema);
            let message = format!("expected {expected}, found a list of {count}");
            let place = self.place(&node.origin);
            self.report(Diagnostic::error(codes::OUT_OF_RANGE, message, place));
            sound = false;
        }
        let mut values = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            let item_schema = match schema.get("items") {
                Some(Value::Array(tuple)) => tuple.get(index).or(schema.get("additionalItems")),
                other => other,
            };
            self.path.push(index.to_string());
            let value = match item_schema {
                Some(item_schema) => self.value(item, item_schema, None),
                None => Some(item.to_json()),
            };
            self.path.pop();
            match value {
                Some(value) => values.push(value),
                None => sound = false,
            }
        }
        if schema.get("uniqueItems") == Some(&Value::Bool(true)) {
            for (index, value) in values.iter().enumerate() {
                if sound && values[..index].contains(value) {
                    let place = self.place(&items[index].origin);
                    let message = "an item is repeated in a list whose items must differ";
                    self.report(Diagnostic::error(codes::OUT_OF_RANGE, message, place));
                    sound = false;
                }
            }
        }
        sound.then_some(Value::Array(values))
    }
}
