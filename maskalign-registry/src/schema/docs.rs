//! The options of a component, for `explain` and for the reference.

use std::collections::BTreeSet;

use serde::Serialize;
use serde_json::Value;

use super::{Schemas, required};
use crate::plugin::{Entry, Kind};

/// One option of a component, for `explain` and for the reference.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OptionDoc {
    /// The key in the recipe.
    pub name: String,
    /// The admitted values, in words: `a number of at least 0`.
    pub expected: String,
    /// Whether it is required.
    pub required: bool,
    /// The default.
    pub default: Option<Value>,
    /// The doc comment of the field.
    pub description: String,
    /// The kind of component that fills it, if it is a slot.
    pub kind: Option<&'static str>,
}

/// The options of a component, for people.
pub(crate) fn option_docs(schemas: &Schemas, entry: &Entry) -> Vec<OptionDoc> {
    let Some(schema) = schemas.component(entry.kind, entry.name) else {
        return Vec::new();
    };
    let required: BTreeSet<&str> = required(schema).collect();
    let properties = schema.get("properties").and_then(Value::as_object);
    properties
        .into_iter()
        .flatten()
        .map(|(name, schema)| {
            let schema = schemas.option(schema);
            let target = schemas.without_null(schema);
            let description = schema.get("description").or_else(|| target.get("description"));
            OptionDoc {
                name: name.clone(),
                expected: schemas.expected(schema),
                required: required.contains(name.as_str()),
                default: schema.get("default").cloned(),
                description: description.and_then(Value::as_str).unwrap_or("").to_owned(),
                kind: schemas.slot(schema).map(Kind::name),
            }
        })
        .collect()
}
