//! Quoted text, lists, articles and numbers.

/// Names in backticks with commas, the last joined by `word`.
pub(crate) fn list(names: &[String], word: &str) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    match quoted.as_slice() {
        [] => String::new(),
        [one] => one.clone(),
        [init @ .., last] => format!("{} {word} {last}", init.join(", ")),
    }
}

/// Text with every control character replaced, line breaks included, so that no terminal acts on one.
pub(crate) fn visible(text: &str) -> String {
    let show = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.chars().map(show).collect()
}

/// Text for a terminal: control characters are replaced, so that no terminal acts on one. Line breaks stay, since some
/// messages hold a list.
pub fn visible_lines(text: &str) -> String {
    let lines: Vec<String> = text.lines().map(visible).collect();
    lines.join("\n")
}

/// Text from the user, for a message: in backticks, with line breaks escaped as in YAML, other control characters
/// replaced, and shortened if long.
pub(crate) fn quoted(text: &str) -> String {
    const SHOWN: usize = 48;
    let mut shown = String::new();
    for c in text.chars().take(SHOWN) {
        match c {
            '\n' => shown.push_str("\\n"),
            '\r' => shown.push_str("\\r"),
            '\t' => shown.push_str("\\t"),
            c => shown.push_str(&visible(c.encode_utf8(&mut [0; 4]))),
        }
    }
    if text.chars().nth(SHOWN).is_some() {
        shown.push('\u{2026}');
    }
    format!("`{shown}`")
}

/// A noun with its article.
pub(crate) fn with_article(noun: &str) -> String {
    let article = if noun.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
    format!("{article} {noun}")
}

/// A number for messages: in scientific notation if it is very large or very small.
pub fn number(value: f64) -> String {
    const MANY: f64 = 1e15;
    const FEW: f64 = 1e-6;
    match value.abs() {
        size if size.is_finite() && size != 0.0 && !(FEW..MANY).contains(&size) => format!("{value:e}"),
        _ => value.to_string(),
    }
}
