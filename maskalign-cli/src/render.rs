//! Colours. Text is coloured here and stripped again by `anstream` where the stream is no terminal or `NO_COLOR` is set,
//! so that what a pipe gets is exactly the registry's plain text.

use anstyle::{AnsiColor, Color, Style};
use clap::builder::Styles;
use maskalign_registry::{Diagnostic, Report};

const fn bold(color: AnsiColor) -> Style {
    Style::new().bold().fg_color(Some(Color::Ansi(color)))
}

/// Errors and the marks under what is wrong.
pub(crate) const ERROR: Style = bold(AnsiColor::Red);
/// Line numbers, margins, and marks at second places.
pub(crate) const GUTTER: Style = bold(AnsiColor::Blue);
/// Names and headings.
pub(crate) const STRONG: Style = Style::new().bold();

/// The colours of `--help`.
pub(crate) const HELP: Styles = Styles::styled()
    .header(bold(AnsiColor::Green))
    .usage(bold(AnsiColor::Green))
    .literal(bold(AnsiColor::Cyan))
    .placeholder(Style::new().fg_color(Some(Color::Ansi(AnsiColor::Cyan))))
    .error(ERROR);

/// Text in a style.
pub(crate) fn paint(style: Style, text: &str) -> String {
    format!("{style}{text}{style:#}")
}

/// A report in colour.
pub(crate) fn report(report: &Report) -> String {
    let parts: Vec<String> = report.0.iter().map(diagnostic).collect();
    parts.join("\n")
}

/// Colours the plain text line by line, so that both say the same.
fn diagnostic(diagnostic: &Diagnostic) -> String {
    let plain = diagnostic.render();
    let mut out = String::new();
    for (index, line) in plain.lines().enumerate() {
        let painted = match index {
            0 => head(line, diagnostic),
            _ => body(line),
        };
        out.push_str(&painted);
        out.push('\n');
    }
    out
}

/// `file:line:column: error[code]: message`.
fn head(line: &str, diagnostic: &Diagnostic) -> String {
    let tag = format!("error[{}]", diagnostic.code);
    match line.split_once(&tag) {
        Some((place, message)) => {
            format!("{place}{}{}", paint(ERROR, &tag), paint(STRONG, message))
        }
        None => line.to_string(),
    }
}

/// A source line, the marks under it, a second place or a help.
fn body(line: &str) -> String {
    let margin = line.find(|c: char| !c.is_ascii_digit() && c != ' ').unwrap_or(line.len());
    let (gutter, rest) = line.split_at(margin);
    if let Some(help) = rest.strip_prefix("= help:") {
        return format!("{gutter}{}{help}", paint(GUTTER, "= help:"));
    }
    if let Some(place) = rest.strip_prefix(":::") {
        return format!("{gutter}{}{place}", paint(GUTTER, ":::"));
    }
    let Some(shown) = rest.strip_prefix('|') else {
        // The second line of a message of several.
        return line.to_string();
    };
    let bar = paint(GUTTER, &format!("{gutter}|"));
    let is_marks = gutter.trim().is_empty() && shown.trim_start().starts_with(['^', '-']);
    let painted = match shown.trim_start().starts_with('^') {
        _ if !is_marks => shown.to_string(),
        true => paint(ERROR, shown),
        false => paint(GUTTER, shown),
    };
    format!("{bar}{painted}")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use maskalign_registry::{
        Place,
        source::{Source, SourceKind},
    };

    use super::*;

    #[test]
    fn colours_change_no_character() {
        let text = "name: x\nratio: 0.5\nratio: 0.6\n";
        let source = Arc::new(Source::new("r.yaml", text, SourceKind::File));
        let place = |span| Place { source: Arc::clone(&source), span };
        let found = Report(vec![
            Diagnostic::error("duplicate-key", "`ratio` is given twice", place(19..24))
                .label(place(8..13), "first here")
                .help("remove one"),
        ]);
        let coloured = report(&found);
        assert_eq!(anstream::adapter::strip_str(&coloured).to_string(), found.render());
        let red = ERROR.render().to_string();
        assert!(coloured.contains(&format!("{red} ^^^^^")), "{coloured:?}");
        assert_ne!(coloured, found.render());
    }
}
