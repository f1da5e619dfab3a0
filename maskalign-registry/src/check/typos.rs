//! Common typing errors in values and keys, and how to write what was meant.

use serde_json::Value;

use super::checker::Checker;
use crate::{
    schema::{required, types},
    yaml::{Content, Member, Node, mistyped_key, resolve_plain},
};

impl Checker<'_> {
    /// The likely reason for a value of the wrong type.
    pub(super) fn likely_typo(&self, node: &Node, schema: &Value) -> Option<String> {
        let names = types(schema);
        let has = |name: &str| names.contains(&name);
        match &node.content {
            Content::Str(text) => {
                let is_yes = ["yes", "no", "on", "off"].contains(&text.to_lowercase().as_str());
                if has("boolean") && is_yes {
                    return Some("write `true` or `false`: in YAML 1.2 `yes` and `no` are text".to_owned());
                }
                let is_number = |text: &str| matches!(resolve_plain(text), Content::Int(_) | Content::Float(_));
                let numeric = has("number") || has("integer");
                let quoted_word = has("boolean") && matches!(resolve_plain(text), Content::Bool(_));
                if quoted_word || (numeric && is_number(text)) {
                    return Some("remove the quotes: quoted values are text".to_owned());
                }
                if has("number") && text.ends_with('%') {
                    return Some("write a fraction such as 0.75, not a percentage".to_owned());
                }
                if let Some(name) = text.strip_prefix('$').filter(|name| is_variable(name)) {
                    return Some(format!("a variable needs braces: ${{{name}}}"));
                }
                if numeric && let Some(help) = mistyped_number(text) {
                    return Some(help);
                }
                if has("object")
                    && let Some((_, help)) = mistyped_key(text)
                {
                    return Some(help);
                }
                has("array").then(|| format!("write a list: [{text}]"))
            }
            Content::Int(_) | Content::Float(_) | Content::Bool(_) => {
                let text = self.place(&node.origin).text().to_owned();
                if has("string") && !has("array") {
                    return Some(format!("quote it to make it text: \"{text}\""));
                }
                has("array").then(|| format!("write a list: [{text}]"))
            }
            Content::Null => Some(self.help_for_null()),
            _ => None,
        }
    }

    /// What to do if no value is written.
    fn help_for_null(&self) -> String {
        let name = self.path.last().map_or("", String::as_str);
        let held = self.frames.last().map(|frame| (frame.schema, frame.depth));
        match held {
            _ if name.parse::<usize>().is_ok() => "give a value, or remove the item".to_owned(),
            Some((schema, depth)) if depth + 1 == self.path.len() && !required(schema).any(|key| key == name) => {
                "give a value, or remove the key to use the default".to_owned()
            }
            _ => "give a value: it has no default".to_owned(),
        }
    }

    /// The likely reason for an unknown key.
    #[expect(clippy::unused_self, reason = "a rule of the checker, called like the others")]
    pub(super) fn likely_key_typo(&self, name: &str, member: &Member) -> Option<String> {
        if name.contains("${") {
            return Some("a variable stands for a value, not for a key".to_owned());
        }
        if !matches!(member.value.content, Content::Null) {
            return None;
        }
        if let Some((_, help)) = mistyped_key(name) {
            return Some(help);
        }
        let place = member.key.place()?;
        let before = place.source.text().get(..place.span.start)?.strip_suffix(',')?;
        let whole: String = before.chars().rev().take_while(char::is_ascii_digit).collect();
        let is_fraction = !whole.is_empty() && name.chars().all(|c| c.is_ascii_digit());
        let whole: String = whole.chars().rev().collect();
        is_fraction.then(|| format!("a decimal point is a dot: {whole}.{name}"))
    }
}

/// Whether text is the name of a variable.
fn is_variable(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// How to write in YAML what was meant as a number.
fn mistyped_number(text: &str) -> Option<String> {
    let is_number = |text: &str| matches!(resolve_plain(text), Content::Int(_) | Content::Float(_));
    let dotted = text.replacen(',', ".", 1);
    if text.contains(',') && is_number(&dotted) {
        return Some(format!("a decimal point is a dot: {dotted}"));
    }
    let joined = text.replace(['_', ' ', '\''], "");
    if joined != text && is_number(&joined) {
        return Some(format!("write the digits together: {joined}"));
    }
    let bare = text.trim_start_matches(['+', '-', '.']).to_lowercase();
    ["inf", "infinity", "nan"].contains(&bare.as_str()).then(|| "only finite numbers can be used".to_owned())
}
