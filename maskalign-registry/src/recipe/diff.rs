//! Comparing recipes: fingerprints and differences.

use serde_json::{Map, Value};

/// The fingerprint of a resolved recipe, such as one read back from a run.
pub fn fingerprint(resolved: &Value) -> String {
    let mut resolved = resolved.clone();
    if let Value::Object(object) = &mut resolved {
        object.shift_remove("description");
    }
    blake3::hash(resolved.to_string().as_bytes()).to_hex().to_string()
}

/// The differences between two resolved recipes, one line each: `path: old -> new`.
pub fn diff(old: &Value, new: &Value) -> Vec<String> {
    let mut lines = Vec::new();
    diff_at("", Some(old), Some(new), &mut lines);
    lines
}

fn diff_at(path: &str, old: Option<&Value>, new: Option<&Value>, lines: &mut Vec<String>) {
    if let (Some(Value::Object(old)), Some(Value::Object(new))) = (old, new) {
        let join = |key: &str| {
            if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
        };
        for (key, value) in old {
            diff_at(&join(key), Some(value), new.get(key), lines);
        }
        for (key, value) in new.iter().filter(|(key, _)| !old.contains_key(*key)) {
            diff_at(&join(key), None, Some(value), lines);
        }
        let shared = |a: &Map<String, Value>, b: &Map<String, Value>| -> Vec<String> {
            a.keys().filter(|key| b.contains_key(*key)).cloned().collect()
        };
        let (before, after) = (shared(old, new), shared(new, old));
        if before != after {
            lines.push(format!("{path}: order {} -> {}", before.join(", "), after.join(", ")));
        }
        return;
    }
    if old != new {
        let shown = |value: Option<&Value>| value.map_or("absent".to_owned(), Value::to_string);
        lines.push(format!("{path}: {} -> {}", shown(old), shown(new)));
    }
}
