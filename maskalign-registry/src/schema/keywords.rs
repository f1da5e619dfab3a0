//! Reading and changing the subset of JSON Schema that is used here.

use serde_json::Value;

pub(super) const DEFINITIONS: &str = "#/definitions/";

/// Keywords that describe a value without restricting it.
pub(super) const ANNOTATIONS: [&str; 6] =
    ["description", "markdownDescription", "default", "examples", "title", "deprecated"];

/// The name of the definition that a schema refers to.
pub(crate) fn reference(schema: &Value) -> Option<&str> {
    schema.get("$ref")?.as_str()?.strip_prefix(DEFINITIONS)
}

/// The types that a schema admits; empty where it names none.
pub(crate) fn types(schema: &Value) -> Vec<&str> {
    match schema.get("type") {
        Some(Value::String(one)) => vec![one.as_str()],
        Some(Value::Array(many)) => many.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    }
}

/// The values of `enum` or `const` as text, if a schema has one.
pub(crate) fn words(schema: &Value) -> Option<Vec<String>> {
    let word = |value: &Value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Null => None,
        other => Some(other.to_string()),
    };
    match (schema.get("const"), schema.get("enum").and_then(Value::as_array)) {
        (Some(value), _) => word(value).map(|word| vec![word]),
        (None, Some(values)) => Some(values.iter().filter_map(word).collect()),
        (None, None) => None,
    }
}

/// The keys that a schema requires.
pub(crate) fn required(schema: &Value) -> impl Iterator<Item = &str> {
    let required = schema.get("required").and_then(Value::as_array);
    required.into_iter().flatten().filter_map(Value::as_str)
}

/// Applies `change` to every schema directly below this one.
pub(super) fn each_subschema(schema: &mut Value, change: &mut dyn FnMut(&mut Value)) {
    let Value::Object(object) = schema else {
        return;
    };
    for (keyword, value) in object.iter_mut() {
        match keyword.as_str() {
            "properties" | "definitions" | "patternProperties" => {
                if let Value::Object(schemas) = value {
                    schemas.values_mut().for_each(&mut *change);
                }
            }
            "anyOf" | "oneOf" | "allOf" => {
                if let Value::Array(schemas) = value {
                    schemas.iter_mut().for_each(&mut *change);
                }
            }
            "items" => match value {
                Value::Array(schemas) => schemas.iter_mut().for_each(&mut *change),
                one => change(one),
            },
            "additionalProperties"
            | "additionalItems"
            | "propertyNames"
            | "contains"
            | "not"
            | "if"
            | "then"
            | "else" => change(value),
            _ => {}
        }
    }
}
