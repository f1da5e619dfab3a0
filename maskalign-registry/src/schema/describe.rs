//! The values that a schema admits, in words.

use serde_json::{Value, json};

use super::{Schemas, reference, types, words};
use crate::{
    plugin::Kind,
    wording::{number, with_article},
};

impl Schemas {
    /// The values that a schema admits, in words.
    pub(crate) fn expected(&self, schema: &Value) -> String {
        let mut forms = Vec::new();
        self.forms(schema, &mut forms, 0);
        forms.dedup();
        match forms.as_slice() {
            [] => "any value".to_owned(),
            [one] => one.clone(),
            [init @ .., last] => format!("{} or {last}", init.join(", ")),
        }
    }

    fn forms(&self, schema: &Value, forms: &mut Vec<String>, depth: usize) {
        const DEEPEST: usize = 4;
        let schema = self.resolve(schema);
        if let Some(expected) = schema.get("x-expected").and_then(Value::as_str) {
            forms.push(expected.replacen("number", &format!("number{}", range(schema)), 1));
            return;
        }
        if let Some(kind) = reference(schema).and_then(Kind::from_name) {
            forms.push(format!("{} (a mapping with `type`)", with_article(kind.name())));
            return;
        }
        if depth > DEEPEST {
            forms.push("a value".to_owned());
            return;
        }
        if let Some(values) = words(schema) {
            forms.push(match values.as_slice() {
                [one] => format!("`{one}`"),
                _ => {
                    let quoted: Vec<String> = values.iter().map(|v| format!("`{v}`")).collect();
                    format!("one of {}", quoted.join(", "))
                }
            });
            return;
        }
        for keyword in ["anyOf", "oneOf", "allOf"] {
            if let Some(branches) = schema.get(keyword).and_then(Value::as_array) {
                for branch in branches {
                    if branch.get("type") != Some(&json!("null")) {
                        self.forms(branch, forms, depth + 1);
                    }
                }
                return;
            }
        }
        for name in types(schema) {
            let form = match name {
                "integer" => format!("a whole number{}", range(schema)),
                "number" => format!("a number{}", range(schema)),
                "boolean" => "`true` or `false`".to_owned(),
                "string" => "a string".to_owned(),
                "array" => self.list_form(schema, depth),
                "object" => "a mapping".to_owned(),
                _ => continue,
            };
            forms.push(form);
        }
    }

    fn list_form(&self, schema: &Value, depth: usize) -> String {
        let count = |keyword| schema.get(keyword).and_then(Value::as_u64);
        let length = match (count("minItems"), count("maxItems")) {
            (Some(low), Some(high)) if low == high => format!(" of {low}"),
            (Some(low), Some(high)) => format!(" of {low} to {high}"),
            (Some(low), None) if low > 0 => format!(" of at least {low}"),
            (_, Some(high)) => format!(" of at most {high}"),
            _ => String::new(),
        };
        match schema.get("items") {
            Some(items @ Value::Object(_)) => {
                let mut forms = Vec::new();
                self.forms(items, &mut forms, depth + 1);
                format!("a list{length}, each {}", forms.join(" or "))
            }
            _ => format!("a list{length}"),
        }
    }
}

/// ` of at least 1`, ` between 0 and 1`, or nothing.
pub(crate) fn range(schema: &Value) -> String {
    let bound = |keyword| schema.get(keyword).filter(|bound| bound.is_number() && !is_huge(bound)).map(shown_bound);
    let low = (bound("minimum"), bound("exclusiveMinimum"));
    let high = (bound("maximum"), bound("exclusiveMaximum"));
    match (low, high) {
        ((Some(low), None), (Some(high), None)) => format!(" from {low} to {high}"),
        ((Some(low), _), (_, Some(high))) => format!(" of at least {low} and below {high}"),
        ((_, Some(low)), (Some(high), _)) => format!(" above {low} and at most {high}"),
        ((_, Some(low)), (_, Some(high))) => format!(" above {low} and below {high}"),
        ((Some(low), _), _) => format!(" of at least {low}"),
        ((_, Some(low)), _) => format!(" above {low}"),
        (_, (Some(high), _)) => format!(" of at most {high}"),
        (_, (_, Some(high))) => format!(" below {high}"),
        _ => String::new(),
    }
}

/// A bound as a person writes it: 1, not 1.0.
pub(crate) fn shown_bound(bound: &Value) -> String {
    match bound.as_f64() {
        Some(value) if bound.is_f64() => number(value),
        _ => bound.to_string(),
    }
}

/// Whether a bound is just the limit of 32 or 64 bits, which is not worth mentioning.
fn is_huge(bound: &Value) -> bool {
    bound.as_f64().is_some_and(|bound| bound.abs() > 2e9)
}
