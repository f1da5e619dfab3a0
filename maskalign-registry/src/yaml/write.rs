//! Values to YAML text, with a comment after each value that has one, and comments at the end of mappings.

use serde_json::Value;

use super::{Content, resolve_plain};

/// A JSON object as a YAML document. `comment` gives the comment for the value at a path, and `notes` the lines of comment
/// at the end of the mapping at a path.
pub(crate) fn write(
    document: &Value,
    comment: &dyn Fn(&[String]) -> Option<String>,
    notes: &dyn Fn(&[String]) -> Vec<String>,
) -> String {
    const COMMENT_COLUMN: usize = 48;
    let mut writer = Writer { comment, notes, path: Vec::new(), lines: Vec::new() };
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

/// A key of more bytes is written with `?`: before a colon, YAML reads keys of up to 1024 characters.
const LONGEST_KEY: usize = 1000;

struct Writer<'a> {
    comment: &'a dyn Fn(&[String]) -> Option<String>,
    notes: &'a dyn Fn(&[String]) -> Vec<String>,
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
            let name = yaml_text(key, Within::Line);
            if name.len() <= LONGEST_KEY {
                self.value(&format!("{:indent$}{name}:", ""), value, indent + 2);
            } else {
                self.lines.push((format!("{:indent$}? {name}", ""), None));
                self.value(&format!("{:indent$}:", ""), value, indent + 2);
            }
            self.path.pop();
        }
        self.note(indent);
    }

    /// The notes of the mapping at this path.
    fn note(&mut self, indent: usize) {
        let notes = (self.notes)(&self.path);
        self.lines.extend(notes.into_iter().map(|note| (format!("{:indent$}# {note}", ""), None)));
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
                if other.is_object() {
                    self.note(indent);
                }
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
            let item = |item: &Value| match item {
                Value::String(text) => string(text, Within::Brackets),
                other => yaml_flow(other),
            };
            format!("[{}]", items.iter().map(item).collect::<Vec<String>>().join(", "))
        }
        Value::Object(_) => "{}".to_owned(),
        Value::String(text) => string(text, Within::Line),
        other => other.to_string(),
    }
}

/// Where a scalar is written.
#[derive(Clone, Copy, PartialEq)]
enum Within {
    /// The rest of a line, or its beginning up to a colon.
    Line,
    /// A list in brackets.
    Brackets,
}

/// A value that is text, with dollars escaped: a single one could begin a variable.
fn string(text: &str, within: Within) -> String {
    yaml_text(&text.replace('$', "$$"), within)
}

/// Text as a YAML scalar of one line, quoted where it has to be.
fn yaml_text(text: &str, within: Within) -> String {
    let written = serde_yaml::to_string(text).expect("text can be written");
    let written = written.trim_end_matches('\n');
    let is_plain = !written.starts_with(['"', '\'']);
    // What the library cannot know: that a plain scalar stands in brackets, and what this crate's reader takes for
    // another type, a merge key or a break of the line.
    let misread = is_plain
        && (text == "<<"
            || text.trim() != text
            || !matches!(resolve_plain(text), Content::Str(_))
            || within == Within::Brackets && text.contains([',', '[', ']', '{', '}', '?', ':']));
    let breaks = |c| matches!(c, '\n' | '\r' | '\u{85}' | '\u{2028}' | '\u{2029}');
    if misread || text.contains(breaks) { double_quoted(text) } else { written.to_owned() }
}

/// Text in double quotes: JSON's escapes are valid in YAML, once the characters that YAML does not allow are escaped.
fn double_quoted(text: &str) -> String {
    let json = Value::from(text).to_string();
    let escaped = |c: char| match c {
        '\u{7f}'..='\u{9f}' | '\u{2028}' | '\u{2029}' | '\u{feff}' | '\u{fffe}' | '\u{ffff}' => {
            format!("\\u{:04x}", u32::from(c))
        }
        c => c.to_string(),
    };
    json.chars().map(escaped).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::yaml::parse_value;

    #[test]
    fn text_of_every_kind_survives_as_key_value_and_item() {
        let texts = [
            "",
            " ",
            "a",
            "a b",
            " a",
            "a ",
            "yes",
            "no",
            "y",
            "on",
            "null",
            "~",
            "true",
            "True",
            ".5",
            "1e3",
            "1_000",
            "0x1f",
            "0o17",
            "017",
            "1.",
            "+1",
            "-",
            "- a",
            "?",
            "? a",
            ":",
            ":x",
            "a: b",
            "a:b",
            "a:",
            "a #b",
            "#",
            "a#b",
            "<<",
            "=",
            "*a",
            "&a",
            "!a",
            "|",
            ">",
            "%a",
            "@a",
            "`a",
            "'",
            "\"",
            "it's",
            "say \"hi\"",
            "'a'",
            "a,b",
            "[a]",
            "{a}",
            "a]",
            "a}",
            "---",
            "--- a",
            "...",
            "a\nb",
            "a\n",
            "\na",
            " a\n  b\n\n",
            "\t",
            "a\tb",
            "\r",
            "a\r\nb",
            "\u{0}",
            "\u{7f}",
            "\u{85}",
            "a\u{85}b",
            "\u{a0}",
            "a\u{2028}b",
            "\u{2029}",
            "\u{feff}",
            "\u{fffe}",
            "é 名",
            "😀",
            "\\",
            "a\\nb",
            "C:\\a",
            "hf://org/repo",
            "2023-06-18",
            "12:30",
            ".nan",
            ".inf",
            "-.Inf",
            "99999999999999999999",
        ];
        for text in texts {
            // An empty key is refused where it is read.
            let key = if text.is_empty() { "key" } else { text };
            let value = json!({ "value": text, "list": [text, "x", [text]], "deep": [{ key: text }], key: 1 });
            let yaml = write(&value, &|_| Some("note".to_owned()), &|_| vec!["end".to_owned()]);
            assert_eq!(parse_value(&yaml).as_ref(), Ok(&value), "{text:?} as\n{yaml}");
            let other: Value = serde_yaml::from_str(&yaml).unwrap_or_else(|error| panic!("{text:?}: {error}\n{yaml}"));
            assert_eq!(other, value, "{text:?} as\n{yaml}");
        }
    }

    #[test]
    fn quotes_stand_where_they_are_needed_and_nowhere_else() {
        let value = json!({ "a": "embedded://weights", "b": "1", "c": ["x y", "x, y"], "d": "two\nlines" });
        assert_eq!(
            write(&value, &|_| None, &|_| Vec::new()),
            "a: embedded://weights\nb: '1'\nc: [x y, \"x, y\"]\nd: \"two\\nlines\"\n"
        );
    }
}
