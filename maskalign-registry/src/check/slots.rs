//! The components inside a component's options.

use serde_json::Value;

use crate::{
    catalog::Registry,
    plugin::{Entry, Kind},
};

/// What is done with a component, at its path.
pub(crate) type Visit<'v, E> = dyn FnMut(Kind, &mut Value, &mut Vec<String>) -> Result<(), E> + 'v;

/// Calls `visit` with every component that the options of another hold, but not with those inside them: `visit` goes on.
///
/// # Errors
/// The first that `visit` gives.
pub(crate) fn each_slot<E>(
    registry: &Registry,
    holder: &Entry,
    options: &mut Value,
    path: &mut Vec<String>,
    visit: &mut Visit<E>,
) -> Result<(), E> {
    match registry.schemas().component(holder.kind, holder.name) {
        Some(schema) => walk(registry, schema, options, path, visit),
        None => Ok(()),
    }
}

fn walk<E>(
    registry: &Registry,
    schema: &Value,
    value: &mut Value,
    path: &mut Vec<String>,
    visit: &mut Visit<E>,
) -> Result<(), E> {
    let schemas = registry.schemas();
    if value.is_null() {
        return Ok(());
    }
    if let Some(kind) = schemas.slot(schema) {
        return visit(kind, value, path);
    }
    let schema = schemas.without_null(schema);
    for keyword in ["anyOf", "oneOf", "allOf"] {
        if let Some(branches) = schema.get(keyword).and_then(Value::as_array) {
            for branch in branches {
                // Of several branches only mappings and lists can hold slots.
                let is_slot = schemas.slot(branch).is_some();
                if !is_slot || value.get("type").is_some() {
                    walk(registry, branch, value, path, visit)?;
                }
            }
            return Ok(());
        }
    }
    match value {
        Value::Object(object) => {
            let properties = schema.get("properties").and_then(Value::as_object);
            for (name, member) in object.iter_mut() {
                let schema =
                    properties.and_then(|properties| properties.get(name)).or(schema.get("additionalProperties"));
                if let Some(schema) = schema {
                    path.push(name.clone());
                    walk(registry, schema, member, path, visit)?;
                    path.pop();
                }
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter_mut().enumerate() {
                let schema = match schema.get("items") {
                    Some(Value::Array(tuple)) => tuple.get(index),
                    other => other,
                };
                if let Some(schema) = schema {
                    path.push(index.to_string());
                    walk(registry, schema, item, path, visit)?;
                    path.pop();
                }
            }
        }
        _ => {}
    }
    Ok(())
}
