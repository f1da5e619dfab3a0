//! Values to YAML text, with a comment after each value that has one.

use serde_json::Value;

use super::{Content, resolve_plain};

/// A JSON object as a YAML document. `comment` gives the comment for the value at a path.
pub(crate) fn write(document: &Value, comment: &dyn Fn(&[String]) -> Option<String>) -> String {
    const COMMENT_COLUMN: usize = 48;
    let mut writer = Writer { comment, path: Vec::new(), lines: Vec::new() };
    writer.mapping(document, 0);
    let mut out = String::new();
    for (text, comment) in writer.lines {
        match comment {
            Some(comment) => out.push_str(&format!("{text:<COMMENT_COLUMN$}  # {comment}\n")),
            None => out.push_str(&format!("{text}\n")),
        }
    }
    out
}

struct Writer<'a> {
    comment: &'a dyn Fn(&[String]) -> Option<String>,
    path: Vec<String>,
    lines: Vec<(String, Option<String>)>,
}

impl Writer<'_> {
    fn mapping(&mut self, value: &Value, indent: usize) {
        let Value::Object(object) = value else {
            return;
        };
        for (key, value) in object {
            self.path.push(key.clone());
            let head = format!("{:indent$}{}:", "", yaml_text(key));
            self.value(&head, value, indent + 2);
            self.path.pop();
        }
    }

    /// Writes a value after `head`, which is `key:` or `-`.
    fn value(&mut self, head: &str, value: &Value, indent: usize) {
        match value {
            Value::Object(object) if !object.is_empty() => {
                if head.ends_with('-') {
                    // The first key goes on the line of the dash.
                    let first = self.lines.len();
                    self.mapping(value, indent);
                    if let Some((line, _)) = self.lines.get_mut(first) {
                        *line = format!("{head} {}", line.trim_start());
                    }
                } else {
                    self.lines.push((head.to_owned(), None));
                    self.mapping(value, indent);
                }
            }
            Value::Array(items) if items.iter().any(|item| !fits_in_line(item)) => {
                self.lines.push((head.to_owned(), None));
                for (index, item) in items.iter().enumerate() {
                    self.path.push(index.to_string());
                    self.value(&format!("{:indent$}-", ""), item, indent + 2);
                    self.path.pop();
                }
            }
            other => {
                let comment = (self.comment)(&self.path);
                self.lines.push((format!("{head} {}", yaml_flow(other)), comment));
            }
        }
    }
}

/// Whether a value is written on one line: a scalar, or a list of such.
fn fits_in_line(value: &Value) -> bool {
    match value {
        Value::Object(object) => object.is_empty(),
        Value::Array(items) => items.iter().all(fits_in_line),
        _ => true,
    }
}

fn yaml_flow(value: &Value) -> String {
    match value {
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(yaml_flow).collect();
            format!("[{}]", items.join(", "))
        }
        Value::Object(_) => "{}".to_owned(),
        // A single dollar could begin a variable.
        Value::String(text) => yaml_text(&text.replace('$', "$$")),
        other => other.to_string(),
    }
}

/// Text as a YAML scalar: plain if that is safe anywhere, double-quoted otherwise.
fn yaml_text(text: &str) -> String {
    let is_word = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_' || c == '/')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '/'));
    if is_word && matches!(resolve_plain(text), Content::Str(_)) {
        return text.to_owned();
    }
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            ' '..='~' => out.push(c),
            '\u{a0}'..='\u{d7ff}' | '\u{e000}'..='\u{fefe}' | '\u{ff00}'..='\u{fffd}'
                if !matches!(c, '\u{2028}' | '\u{2029}') =>
            {
                out.push(c);
            }
            c => out.push_str(&format!("\\U{:08x}", u32::from(c))),
        }
    }
    out.push('"');
    out
}
