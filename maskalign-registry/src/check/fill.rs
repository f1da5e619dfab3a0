//! Filling in defaults at every level.

use serde_json::Value;

use super::slots::each_slot;
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
    each_slot(registry, entry, &mut options, path, &mut |kind, value, path| fill(registry, kind, value, path))?;
    object.insert("type".to_owned(), Value::String(name));
    if let Value::Object(options) = options {
        object.extend(options);
    }
    Ok(())
}
