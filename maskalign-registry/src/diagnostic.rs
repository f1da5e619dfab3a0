//! Diagnostics: a code, a message, labels on spans, and help. Rendered as plain text or as JSON.

use std::{fmt, ops::Range, sync::Arc};

use serde_json::{Value, json};
use unicode_width::UnicodeWidthChar as _;

use crate::source::{Source, SourceKind};

/// The codes of diagnostics. They are stable: scripts may match on them.
pub mod codes {
    /// The text is not YAML.
    pub const SYNTAX: &str = "syntax";
    /// The file cannot be read.
    pub const UNREADABLE: &str = "unreadable";
    /// The file, its nesting or its aliases are past the limits.
    pub const TOO_LARGE: &str = "too-large";
    /// A mapping has one key twice.
    pub const DUPLICATE_KEY: &str = "duplicate-key";
    /// `extends` leads back to a recipe that is being read.
    pub const EXTENDS_CYCLE: &str = "extends-cycle";
    /// `extends` names something that is not there.
    pub const UNKNOWN_BASE: &str = "unknown-base";
    /// A `--set` that cannot be applied.
    pub const BAD_OVERRIDE: &str = "bad-override";
    /// `${VAR}` without a value and without a default.
    pub const UNSET_VARIABLE: &str = "unset-variable";
    /// `${...}` that is not `${VAR}` or `${VAR:-default}`.
    pub const BAD_VARIABLE: &str = "bad-variable";
    /// A key that nothing reads.
    pub const UNKNOWN_KEY: &str = "unknown-key";
    /// A `type` that no component has.
    pub const UNKNOWN_TYPE: &str = "unknown-type";
    /// A value of another type than expected.
    pub const WRONG_TYPE: &str = "wrong-type";
    /// A key that must be given.
    pub const MISSING_KEY: &str = "missing-key";
    /// A number, length or form outside what is allowed.
    pub const OUT_OF_RANGE: &str = "out-of-range";
    /// A word that is not among those allowed.
    pub const UNKNOWN_VALUE: &str = "unknown-value";
    /// A component refuses an option, or an option does not fit the rest of the recipe.
    pub const REFUSED: &str = "refused";
}

/// A span of a source.
#[derive(Clone, Debug)]
pub struct Place {
    /// The file or flag.
    pub source: Arc<Source>,
    /// Byte offsets into its text.
    pub span: Range<usize>,
}

impl Place {
    /// Line and column of the start, both from 1, the column in characters.
    pub fn line_column(&self) -> (usize, usize) {
        self.source.line_column(self.span.start)
    }

    /// Whether both are the same span of the same source.
    pub(crate) fn is(&self, other: &Place) -> bool {
        Arc::ptr_eq(&self.source, &other.source) && self.span == other.span
    }

    /// The text that the span covers.
    pub fn text(&self) -> &str {
        self.source.text().get(self.span.clone()).unwrap_or("")
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (line, column) = self.line_column();
        write!(f, "{}:{line}:{column}", self.source.name())
    }
}

/// A place with what to say there.
#[derive(Clone, Debug)]
pub struct Label {
    /// Where.
    pub place: Place,
    /// What to say there; empty where the message says it all.
    pub text: String,
}

/// One mistake: what, where, and the way out.
#[derive(Clone, Debug)]
pub struct Diagnostic {
    /// One of [`codes`].
    pub code: &'static str,
    /// What is wrong: a lower-case fragment.
    pub message: String,
    /// The first label is the primary one. Empty only where nothing could be read at all.
    pub labels: Vec<Label>,
    /// Ways out, each a lower-case fragment.
    pub help: Vec<String>,
    /// Keys and indices from the recipe's root to the value at fault; empty where unknown.
    pub path: Vec<String>,
    /// What may stand there, where that is a list.
    pub allowed: Vec<String>,
    /// The nearest known names.
    pub suggestions: Vec<String>,
}

impl Diagnostic {
    /// An error at a place.
    pub fn error(code: &'static str, message: impl Into<String>, place: Place) -> Diagnostic {
        Diagnostic {
            code,
            message: message.into(),
            labels: vec![Label { place, text: String::new() }],
            help: Vec::new(),
            path: Vec::new(),
            allowed: Vec::new(),
            suggestions: Vec::new(),
        }
    }

    /// Adds a way out.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Diagnostic {
        self.help.push(help.into());
        self
    }

    /// Adds a second place.
    #[must_use]
    pub fn label(mut self, place: Place, text: impl Into<String>) -> Diagnostic {
        self.labels.push(Label { place, text: text.into() });
        self
    }

    /// Says what the primary place shows.
    #[must_use]
    pub fn says(mut self, text: impl Into<String>) -> Diagnostic {
        if let Some(label) = self.labels.first_mut() {
            label.text = text.into();
        }
        self
    }

    /// Sets the path from the recipe's root.
    #[must_use]
    pub fn at(mut self, path: &[String]) -> Diagnostic {
        self.path = path.to_vec();
        self
    }

    /// Names what is allowed and what is near, and says both in the help.
    #[must_use]
    pub fn allowing<'a>(
        mut self,
        suggestions: impl IntoIterator<Item = &'a str>,
        allowed: impl IntoIterator<Item = &'a str>,
    ) -> Diagnostic {
        self.suggestions.extend(suggestions.into_iter().map(str::to_owned));
        self.allowed.extend(allowed.into_iter().map(str::to_owned));
        if !self.suggestions.is_empty() {
            self.help.push(format!("did you mean {}?", list(&self.suggestions, "or")));
        }
        if !self.allowed.is_empty() {
            self.help.push(format!("known here: {}", list(&self.allowed, "and")));
        }
        self
    }

    /// The primary place.
    pub fn place(&self) -> Option<&Place> {
        self.labels.first().map(|label| &label.place)
    }

    /// The diagnostic as data: `code`, `severity`, `message`, `file`, `line`, `column`, `end` (line and column),
    /// `source_line`, `flag` (the text of the flag, where that is the source), `path`, `help`, `allowed`,
    /// `suggestions`, `related`.
    pub fn to_json(&self) -> Value {
        let position = |place: &Place| {
            let (line, column) = place.line_column();
            let (end_line, end_column) = place.source.line_column(place.span.end);
            let mut position = json!({
                "file": place.source.name(),
                "line": line,
                "column": column,
                "end": { "line": end_line, "column": end_column },
                "source_line": place.source.line(place.span.start),
            });
            // Flags share a name, so that nothing else tells them apart.
            if place.source.kind() == SourceKind::Flag {
                position["flag"] = json!(place.source.text());
            }
            position
        };
        let mut object = json!({
            "code": self.code,
            "severity": "error",
            "message": self.message,
            "path": self.path,
            "help": self.help,
            "allowed": self.allowed,
            "suggestions": self.suggestions,
        });
        if let (Value::Object(object), Some(Value::Object(position))) = (&mut object, self.place().map(position)) {
            object.extend(position);
        }
        let related: Vec<Value> = self
            .labels
            .iter()
            .skip(1)
            .map(|label| {
                let mut related = position(&label.place);
                related["message"] = json!(label.text);
                related
            })
            .collect();
        object["related"] = json!(related);
        object
    }

    /// Plain text: `file:line:column: error[code]: message`, the marked source lines, the help.
    pub fn render(&self) -> String {
        let mut out = String::new();
        if let Some(place) = self.place() {
            out.push_str(&format!("{}: ", visible(&place.to_string())));
        }
        out.push_str(&format!("error[{}]: {}\n", self.code, visible_lines(&self.message)));
        let gutter = self.labels.iter().map(|label| label.place.line_column().0.to_string().len()).max().unwrap_or(1);
        for (index, label) in self.labels.iter().enumerate() {
            if index > 0 {
                let place = visible(&label.place.to_string());
                out.push_str(&format!("{:gutter$} ::: {place}\n", ""));
            }
            let mark = if index == 0 { '^' } else { '-' };
            render_label(&mut out, label, gutter, mark);
        }
        for help in &self.help {
            out.push_str(&format!("{:gutter$} = help: {}\n", "", visible(help)));
        }
        out
    }
}

/// How many columns of a source line are shown.
const SHOWN_COLUMNS: usize = 100;

fn render_label(out: &mut String, label: &Label, gutter: usize, mark: char) {
    let (line_number, _) = label.place.line_column();
    let text = label.place.source.text();
    if text.is_empty() {
        // A file that could not be read, or holds nothing: there is no line to show.
        return;
    }
    let start = label.place.span.start.min(text.len());
    let Range { start: line_start, end: line_end } = label.place.source.line_range(start);
    let end = label.place.span.end.clamp(start, line_end.max(start));

    // Cells of the terminal: each character shown, with its width and its byte offset.
    let mut cells: Vec<(usize, String, usize)> = Vec::new();
    for (offset, c) in text[line_start..line_end].char_indices() {
        let (shown, width) = match c {
            '\t' => ("    ".to_owned(), 4),
            '\r' | '\u{feff}' => continue,
            c if c.is_control() => ("\u{fffd}".to_owned(), 1),
            c => (c.to_string(), c.width().unwrap_or(0)),
        };
        cells.push((line_start + offset, shown, width));
    }
    let columns_before = |offset: usize, cells: &[(usize, String, usize)]| -> usize {
        cells.iter().take_while(|cell| cell.0 < offset).map(|cell| cell.2).sum()
    };

    let total: usize = cells.iter().map(|cell| cell.2).sum();
    let mut marked_from = columns_before(start, &cells);
    let mut cut_left = false;
    let mut cut_right = false;
    if total > SHOWN_COLUMNS {
        let first = marked_from.saturating_sub(SHOWN_COLUMNS / 2).min(total - SHOWN_COLUMNS);
        let mut column = 0;
        let mut skipped = 0;
        cells.retain(|cell| {
            let inside = column >= first && column + cell.2 <= first + SHOWN_COLUMNS;
            if column < first {
                skipped += cell.2;
            }
            column += cell.2;
            inside
        });
        cut_left = skipped > 0;
        cut_right = first + SHOWN_COLUMNS < total;
        marked_from = columns_before(start, &cells) + usize::from(cut_left);
    }
    let marked_to = columns_before(end, &cells) + usize::from(cut_left);
    let marks = marked_to.saturating_sub(marked_from).max(1);

    let mut shown: String = cells.into_iter().map(|cell| cell.1).collect();
    if cut_left {
        shown.insert(0, '\u{2026}');
    }
    if cut_right {
        shown.push('\u{2026}');
    }
    let shown = shown.trim_end();
    out.push_str(&format!("{:gutter$} |\n", ""));
    out.push_str(&format!("{line_number:>gutter$} | {shown}\n"));
    let marks: String = std::iter::repeat_n(mark, marks).collect();
    let line = format!("{:gutter$} | {:marked_from$}{marks} {}", "", "", visible(&label.text));
    out.push_str(line.trim_end());
    out.push('\n');
}

/// Names in backticks with commas, the last joined by `word`.
pub(crate) fn list(names: &[String], word: &str) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    match quoted.as_slice() {
        [] => String::new(),
        [one] => one.clone(),
        [init @ .., last] => format!("{} {word} {last}", init.join(", ")),
    }
}

/// Text on one line, with nothing in it that a terminal would act on.
pub(crate) fn visible(text: &str) -> String {
    let show = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.chars().map(show).collect()
}

/// As [`visible`], for a message of several lines, such as a list of all that does not fit.
fn visible_lines(text: &str) -> String {
    let lines: Vec<String> = text.lines().map(visible).collect();
    lines.join("\n")
}

/// User text for a message: in backticks, line breaks as YAML escapes them, other control characters hidden, cut when
/// long.
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

/// Every mistake found, in the order of their places.
#[derive(Clone, Debug, Default)]
pub struct Report(pub Vec<Diagnostic>);

impl Report {
    /// Plain text, a blank line between diagnostics.
    pub fn render(&self) -> String {
        let parts: Vec<String> = self.0.iter().map(Diagnostic::render).collect();
        parts.join("\n")
    }

    /// A list of [`Diagnostic::to_json`].
    pub fn to_json(&self) -> Value {
        Value::Array(self.0.iter().map(Diagnostic::to_json).collect())
    }

    /// Sorts by source, in the order in which `sources` lists them, then by offset; drops repeats.
    pub(crate) fn sort(&mut self, sources: &[Arc<Source>]) {
        let rank = |diagnostic: &Diagnostic| {
            diagnostic.place().map_or((0, 0), |place| {
                let source =
                    sources.iter().position(|source| Arc::ptr_eq(source, &place.source)).unwrap_or(sources.len());
                (source, place.span.start)
            })
        };
        self.0.sort_by_key(rank);
        self.0.dedup_by(|a, b| rank(a) == rank(b) && a.message == b.message);
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render())
    }
}

impl std::error::Error for Report {}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(text: &str, span: Range<usize>) -> String {
        let source = Arc::new(Source::new("r.yaml", text, SourceKind::File));
        Diagnostic::error("syntax", "wrong", Place { source, span }).help("do better").render()
    }

    #[test]
    fn the_mark_stands_under_what_is_marked() {
        let text = "name: x\nseed: abc # no\n";
        assert_eq!(
            mark(text, 14..17),
            "r.yaml:2:7: error[syntax]: wrong\n  |\n2 | seed: abc # no\n  |       ^^^\n  = help: do better\n"
        );
    }

    #[test]
    fn tabs_and_wide_characters_take_their_columns() {
        let text = "\t名前: abc";
        let start = text.find("abc").expect("there");
        let shown = mark(text, start..start + 3);
        // The column counts characters; the marks count terminal cells: 4 for the tab, 2 for each
        // of the wide characters.
        assert!(shown.starts_with("r.yaml:1:6: "), "{shown}");
        assert!(shown.contains("1 |     名前: abc\n  |           ^^^\n"), "{shown}");
    }

    #[test]
    fn a_long_line_is_cut_around_the_mark() {
        let text = format!("{}needle{}", "a".repeat(500), "b".repeat(500));
        let shown = mark(&text, 500..506);
        let lines: Vec<&str> = shown.lines().collect();
        assert!(lines[2].chars().count() < SHOWN_COLUMNS + 8, "{shown}");
        let at = lines[3].find('^').expect("a mark");
        let line: Vec<char> = lines[2].chars().collect();
        assert_eq!(line[at..at + 6].iter().collect::<String>(), "needle");
    }

    #[test]
    fn control_characters_never_reach_the_terminal() {
        let shown = mark("a: \u{1b}[31mred", 3..4);
        assert!(!shown.contains('\u{1b}'), "{shown:?}");
    }

    #[test]
    fn an_offset_past_the_end_is_shown_at_the_end() {
        assert!(mark("", 0..0).starts_with("r.yaml:1:1: "));
        assert!(mark("a:\n", 3..3).starts_with("r.yaml:2:1: "));
    }
}
