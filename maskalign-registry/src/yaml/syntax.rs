//! Syntax errors, and what was probably meant.

use std::ops::Range;

use granit_parser::{ErrorKind, ScanError};

use super::MAX_DEPTH;
use crate::diagnostic::{Diagnostic, Place, Source, codes};

/// Explains why the parser stopped. Its text begins at an offset of the source.
pub(super) fn not_yaml(
    source: &Source,
    offset: usize,
    error: &ScanError,
    place: &dyn Fn(Range<usize>) -> Place,
) -> Diagnostic {
    let text = &source.text()[offset..];
    let at = error.marker().byte_offset().unwrap_or_else(|| {
        let index = error.marker().index();
        text.char_indices().nth(index).map_or(text.len(), |(at, _)| at)
    });
    let at = at.min(text.len());
    let here = place(at..at + text[at..].chars().next().map_or(0, char::len_utf8));
    if matches!(error.kind(), ErrorKind::RecursionLimitExceeded) {
        return Diagnostic::error(codes::TOO_LARGE, too_deep(), here);
    }
    let info = error.info();
    // The parser says `while parsing a node, did not find ...`; the place says the first half.
    let message = match info.split_once(", ") {
        Some((context, rest)) if context.starts_with("while ") => rest,
        _ => info.as_str(),
    };
    let range = source.line_range(offset + at);
    let line_start = range.start.saturating_sub(offset);
    let line = &source.text()[range.clone()];
    if let Some(tab) = tab_in_indentation(text, line_start) {
        let message = "not valid YAML: a tab in the indentation";
        return Diagnostic::error(codes::SYNTAX, message, place(tab..tab + 1))
            .help("YAML is indented with spaces: replace the tab");
    }
    // The parser took the mistyped key for the beginning of a multi-line scalar, and stopped on the line after it.
    let before = range.start.checked_sub(1).filter(|end| *end >= offset);
    let before = before.map(|end| source.line_range(end)).filter(|range| range.start >= offset);
    for range in [Some(range), before].into_iter().flatten() {
        if let Some((span, help)) = mistyped_key(&source.text()[range.clone()]) {
            let start = range.start - offset;
            let place = place(start + span.start..start + span.end);
            let message = format!("not valid YAML: {message}");
            return Diagnostic::error(codes::SYNTAX, message, place).help(help);
        }
    }
    let mut diagnostic = Diagnostic::error(codes::SYNTAX, format!("not valid YAML: {message}"), here);
    if line.contains("${") && line.contains(['[', '{']) {
        diagnostic = diagnostic.help("inside `{ }` and `[ ]` a variable needs quotes: \"${NAME}\"");
    } else if info.contains("mapping values are not allowed") {
        diagnostic = diagnostic.help("keys of one mapping stand in one column, and text that holds `: ` needs quotes");
    } else if info.contains("did not find expected key") {
        diagnostic = diagnostic.help("keys of one mapping stand in one column: check this line's indentation");
    } else if matches!(error.kind(), ErrorKind::UnknownAnchor) {
        diagnostic = diagnostic.help("define the anchor with `&name` above its first `*name`");
    } else if let Some(open) = open_bracket(&text[..line_start]) {
        diagnostic =
            diagnostic.label(place(open..open + 1), "opened here and not closed on its line").help("close the bracket");
    }
    diagnostic
}

pub(super) fn too_deep() -> String {
    format!("nested deeper than {MAX_DEPTH} levels")
}

/// Why a line or a key that looks like `key: value` is not one: where, and how to fix it.
pub(crate) fn mistyped_key(text: &str) -> Option<(Range<usize>, String)> {
    let comment = text.find(" #").unwrap_or(text.len());
    let text = &text[..comment];
    for (odd, name, plain) in [
        ('\u{ff1a}', "a full-width colon", "`: `"),
        ('\u{a0}', "a no-break space", "a space"),
        ('\u{3000}', "a full-width space", "a space"),
    ] {
        if let Some(at) = text.find(odd).filter(|at| !text[..*at].contains(['"', '\''])) {
            return Some((at..at + odd.len_utf8(), format!("this is {name}: write {plain}")));
        }
    }
    let key = text.trim_start_matches([' ', '-']);
    let start = text.len() - key.len();
    let (name, value) = key.split_once(':')?;
    let is_name = !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || c == '_');
    // Neither `a: b`, which is valid, nor an address such as `hf://a`.
    let glued = !value.is_empty() && !value.starts_with([' ', '/', ':', '\t']);
    (is_name && glued).then(|| {
        let end = key.trim_end().len();
        (start..start + end, format!("put a space after the colon: `{name}: {}`", value.trim_end()))
    })
}

/// The first tab in the indentation of the line at an offset, or of the one after it, where the parser stops if it
/// takes the line for a multi-line scalar.
fn tab_in_indentation(text: &str, line_start: usize) -> Option<usize> {
    let mut start = line_start;
    for line in text[line_start..].split_inclusive('\n').take(2) {
        let indent = line.len() - line.trim_start_matches([' ', '\t']).len();
        if let Some(tab) = line[..indent].find('\t') {
            return Some(start + tab);
        }
        start += line.len();
    }
    None
}

/// The innermost `[` or `{` left open in a text, not counting comments and quotes that close on their line.
fn open_bracket(text: &str) -> Option<usize> {
    let mut open = Vec::new();
    let mut start = 0;
    for line in text.split_inclusive('\n') {
        let mut quote = None;
        let mut before = ' ';
        for (at, c) in line.char_indices() {
            match (quote, c) {
                (Some(end), c) if c == end && before != '\\' => quote = None,
                (Some(_), _) => {}
                (None, '#') if before.is_whitespace() => break,
                (None, '"' | '\'') if !before.is_alphanumeric() => quote = Some(c),
                (None, '[' | '{') => open.push(start + at),
                (None, ']' | '}') => {
                    open.pop();
                }
                (None, _) => {}
            }
            before = c;
        }
        start += line.len();
    }
    open.pop()
}
