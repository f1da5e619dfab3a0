//! Numbers, strings and enumerations: type, range and format.

use serde_json::{Number, Value};

use super::checker::Checker;
use crate::{
    diagnostic::{Diagnostic, codes},
    schema::{range, shown_bound, types},
    wording::{nearest, number, quoted},
    yaml::{Content, Node, Origin, Typing, integer, resolve_plain},
};

impl Checker<'_> {
    pub(super) fn wrong_type(&mut self, node: &Node, schema: &Value) {
        let expected = self.schemas.expected(schema);
        let message = format!("expected {expected}, found {}{}", node.content.describe(), from_variable(node));
        let mut diagnostic = Diagnostic::error(codes::WRONG_TYPE, message, self.place(&node.origin));
        if let Some(help) = self.likely_typo(node, schema) {
            diagnostic = diagnostic.help(help);
        }
        self.report(diagnostic);
    }

    pub(super) fn number(&mut self, node: &Node, schema: &Value, number: f64) -> Option<Value> {
        if !number.is_finite() {
            let message = format!("expected a finite number, found `{}`", self.shown(node));
            let place = self.place(&node.origin);
            self.report(Diagnostic::error(codes::OUT_OF_RANGE, message, place));
            return None;
        }
        let bound = |keyword: &str| schema.get(keyword).and_then(Value::as_f64);
        let shown = |keyword: &str| schema.get(keyword).map(shown_bound).unwrap_or_default();
        // Whole numbers are compared exactly: as a float, the greatest `u64` rounds up by one.
        const PAST_U64: f64 = 18_446_744_073_709_551_616.0;
        let exceeds = match (&node.content, schema.get("maximum").and_then(Value::as_u64)) {
            (Content::Int(number), Some(bound)) => *number > i128::from(bound),
            (_, Some(u64::MAX)) => number >= PAST_U64,
            _ => bound("maximum").is_some_and(|bound| number > bound),
        };
        let fault = if bound("minimum").is_some_and(|bound| number < bound) {
            Some(format!("must be at least {}", shown("minimum")))
        } else if exceeds {
            Some(format!("must be at most {}", shown("maximum")))
        } else if bound("exclusiveMinimum").is_some_and(|bound| number <= bound) {
            Some(format!("must be above {}", shown("exclusiveMinimum")))
        } else if bound("exclusiveMaximum").is_some_and(|bound| number >= bound) {
            Some(format!("must be below {}", shown("exclusiveMaximum")))
        } else if bound("multipleOf").is_some_and(|step| step > 0.0 && number % step != 0.0) {
            Some(format!("must be a multiple of {}", shown("multipleOf")))
        } else {
            None
        };
        if let Some(fault) = fault {
            let name = match self.path.as_slice() {
                [] => String::new(),
                [.., list, index] if index.parse::<usize>().is_ok() => format!("`{list}.{index}` "),
                [.., name] => format!("`{name}` "),
            };
            let message = format!("{name}{fault}, found {}{}", self.shown(node), from_variable(node));
            let mut diagnostic = Diagnostic::error(codes::OUT_OF_RANGE, message, self.place(&node.origin));
            let range = range(schema);
            if !range.is_empty() {
                let noun = if types(schema).contains(&"number") { "number" } else { "whole number" };
                diagnostic = diagnostic.help(format!("expected a {noun}{range}"));
            }
            self.report(diagnostic);
            return None;
        }
        match &node.content {
            Content::Int(number) => integer(*number).map(Value::Number),
            _ if types(schema).contains(&"integer") && !types(schema).contains(&"number") => {
                integer(number as i128).map(Value::Number)
            }
            _ => Number::from_f64(number).map(Value::Number),
        }
    }

    /// A number as it was written, if it was written in a file or flag.
    #[expect(clippy::unused_self, reason = "a rule of the checker, called like the others")]
    fn shown(&self, node: &Node) -> String {
        match (&node.origin, node.origin.place()) {
            (Origin::File(_) | Origin::Flag(_), Some(place)) => place.text().to_owned(),
            _ => match &node.content {
                Content::Int(number) => number.to_string(),
                Content::Float(value) => number(*value),
                other => other.describe(),
            },
        }
    }

    pub(super) fn string(&mut self, node: &Node, schema: &Value, text: &str) -> Option<Value> {
        let length = text.chars().count() as u64;
        let bound = |keyword: &str| schema.get(keyword).and_then(Value::as_u64);
        let expected = schema.get("x-expected").and_then(Value::as_str);
        let fault = if bound("minLength").is_some_and(|least| length < least) {
            Some(match (length, expected) {
                (0, Some(expected)) => format!("an empty string: expected {expected}"),
                (0, None) => "an empty string".to_owned(),
                _ => format!("expected at least {} characters", bound("minLength").unwrap_or(0)),
            })
        } else if bound("maxLength").is_some_and(|most| length > most) {
            Some(format!("expected at most {} characters", bound("maxLength").unwrap_or(0)))
        } else {
            let pattern = schema.get("pattern").and_then(Value::as_str);
            match pattern.and_then(|pattern| self.schemas.pattern(pattern)) {
                Some(pattern) if !pattern.is_match(text) => {
                    let expected = match expected {
                        Some(expected) => expected.to_owned(),
                        None => format!("text of the form {}", pattern.as_str()),
                    };
                    Some(format!("expected {expected}, found the string {}", quoted(text)))
                }
                _ => None,
            }
        };
        if let Some(fault) = fault {
            let message = format!("{fault}{}", from_variable(node));
            let place = self.place(&node.origin);
            self.report(Diagnostic::error(codes::OUT_OF_RANGE, message, place));
            return None;
        }
        let known = match schema.get("x-reference").and_then(Value::as_str) {
            Some("teacher") => self.teacher(node, text),
            Some("stage") => self.stage(node, text),
            _ => true,
        };
        known.then(|| Value::String(text.to_owned()))
    }

    pub(super) fn word(&mut self, node: &Node, schema: &Value, words: &[String]) -> Option<Value> {
        let json = node.to_json();
        let admitted = schema.get("const") == Some(&json)
            || schema.get("enum").and_then(Value::as_array).is_some_and(|values| values.contains(&json));
        if admitted {
            return Some(json);
        }
        let Content::Str(text) = &node.content else {
            self.wrong_type(node, schema);
            return None;
        };
        let name = self.path.last().cloned().unwrap_or_default();
        let what = match name.parse::<usize>() {
            Ok(_) => self.path.iter().rev().nth(1).cloned().unwrap_or_default(),
            Err(_) => name,
        };
        let message = format!("{} is not a value of `{what}`{}", quoted(text), from_variable(node));
        let diagnostic = Diagnostic::error(codes::UNKNOWN_VALUE, message, self.place(&node.origin))
            .allowing(nearest(text, words.iter().map(String::as_str)), words.iter().map(String::as_str));
        self.report(diagnostic);
        None
    }
}

pub(super) fn from_variable(node: &Node) -> String {
    match &node.origin {
        Origin::Variable { name, .. } => format!(" (from the variable `{name}`)"),
        _ => String::new(),
    }
}

/// The value of a quoted scalar that is one variable, if the types admit no string.
pub(super) fn retyped(names: &[&str], node: &Node) -> Option<Content> {
    match &node.content {
        Content::Str(text) if node.typing == Typing::Option && !names.contains(&"string") => {
            let content = resolve_plain(text);
            let is_scalar = matches!(content, Content::Bool(_) | Content::Int(_) | Content::Float(_));
            (is_scalar && admits_content(names, &content)).then_some(content)
        }
        _ => None,
    }
}

/// Whether one of the types admits the node's value.
pub(super) fn admits(names: &[&str], node: &Node) -> bool {
    admits_content(names, &node.content) || retyped(names, node).is_some()
}

fn admits_content(names: &[&str], content: &Content) -> bool {
    let has = |name: &str| names.contains(&name);
    match content {
        Content::Null | Content::Removed { .. } => has("null"),
        Content::Bool(_) => has("boolean"),
        Content::Int(_) => has("integer") || has("number"),
        // As in JSON Schema, 3.0 is an integer. Infinity and NaN are refused later, as numbers.
        Content::Float(number) => has("number") || (has("integer") && number.fract() == 0.0),
        Content::Str(_) => has("string"),
        Content::Seq(_) => has("array"),
        Content::Map(_) => has("object"),
        Content::Unset { .. } => true,
    }
}
