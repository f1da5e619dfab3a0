//! Diagnostics as plain text, for a terminal.

use std::ops::Range;

use unicode_width::UnicodeWidthChar as _;

use super::{Diagnostic, Label};
use crate::wording::{visible, visible_lines};

impl Diagnostic {
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
        // The file could not be read, or is empty: there is no line to show.
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::diagnostic::{Place, Source, SourceKind};

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
