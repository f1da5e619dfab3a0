//! Filling in defaults at every level.

use serde_json::Value;

use crate::{
    catalog::Registry,
    plugin::Kind,
    wording::{quoted, with_article},
};

/// Fills in the defaults of a component and of everything in it.
///
/// # Errors
/// The path and message of a refusal. Only a component that is itself a default can still be refused here.
pub(crate) fn fill(
    registry: &Registry,
    kind: Kind,
    value: &mut Value,
    path: &mut Vec<String>,
) -> Result<(), (Vec<String>, String)> {
    let Value::Object(object) = value else {
        return Err((path.clone(), format!("expected {}", with_article(kind.name()))));
    };
    let Some(Value::String(name)) = object.shift_remove("type") else {
        return Err((path.clone(), format!("{} without `type`", with_article(kind.name()))));
    };
    let Some(entry) = registry.get(kind, &name) else {
        return Err((path.clone(), format!("there is no {kind} {}", quoted(&name))));
    };
    let options = Value::Object(std::mem::take(object));
    let mut options = (entry.normalize)(options).map_err(|refusal| {
        let mut path = path.clone();
        path.extend(refusal.path);
        (path, refusal.message)
    })?;
    if let Some(schema) = registry.schemas().component(kind, entry.name) {
        fill_slots(registry, schema, &mut options, path)?;
    }
    object.insert("type".to_owned(), Value::String(name));
    if let Value::Object(options) = options {
        object.extend(options);
    }
    Ok(())
}

fn fill_slots(
    registry: &Registry,
    schema: &Value,
    value: &mut Value,
    path: &mut Vec<String>,
) -> Result<(), (Vec<String>, String)> {
    let schemas = registry.schemas();
    if value.is_null() {
        return Ok(());
    }
    if let Some(kind) = schemas.slot(schema) {
        return fill(registry, kind, value, path);
    }
    let schema = schemas.without_null(schema);
    for keyword in ["anyOf", "oneOf", "allOf"] {
        if let Some(branches) = schema.get(keyword).and_then(Value::as_array) {
            for branch in branches {
                // Of several branches only mappings and lists can hold slots.
                let is_slot = schemas.slot(branch).is_some();
                if !is_slot || value.get("type").is_some() {
                    fill_slots(registry, branch, value, path)?;
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
                    fill_slots(registry, schema, member, path)?;
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
                    fill_slots(registry, schema, item, path)?;
                    path.pop();
                }
            }
        }
        _ => {}
    }
    Ok(())
}
