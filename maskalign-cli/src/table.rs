//! Aligned columns of text, and numbers as people read them.

use serde_json::Value;

/// Rows of cells: the first column is aligned left, the others right.
#[derive(Default)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
    others: Align,
}

/// Where the cells of a column stand.
#[derive(Clone, Copy, Default, PartialEq)]
enum Align {
    Left,
    #[default]
    Right,
}

impl Table {
    /// A table whose columns are all aligned left.
    pub(crate) fn of_words() -> Table {
        Table { rows: Vec::new(), others: Align::Left }
    }

    /// Adds a row.
    pub(crate) fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    /// The rows, each after `indent` spaces and ended by a newline.
    pub(crate) fn render(&self, indent: usize) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let cells = |column: usize| self.rows.iter().filter_map(move |row| row.get(column));
        let widths: Vec<usize> =
            (0..columns).map(|column| cells(column).map(|cell| cell.chars().count()).max().unwrap_or(0)).collect();
        let mut out = String::new();
        for row in &self.rows {
            let mut line = " ".repeat(indent);
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                match (column, self.others) {
                    (0, _) => line.push_str(&format!("{cell:<width$}")),
                    (_, Align::Left) => line.push_str(&format!("  {cell:<width$}")),
                    (_, Align::Right) => line.push_str(&format!("  {cell:>width$}")),
                }
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

/// A count with thousands separators: `85,798,656`.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// An amount of memory: `812 MiB`, `5.4 GiB`.
pub(crate) fn bytes(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    match mib {
        mib if mib < 1024.0 => format!("{:.0} MiB", mib.ceil()),
        mib => format!("{:.1} GiB", mib / 1024.0),
    }
}

/// A share as per cent: `83.1 %`.
pub(crate) fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// Seconds as `0:05`, `12:40` or `3:02:05`.
pub(crate) fn clock(seconds: f64) -> String {
    // The cast saturates, so that a rate of almost nothing does not overflow.
    let seconds = seconds.round() as u64;
    let (hours, minutes, rest) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match hours {
        0 => format!("{minutes}:{rest:02}"),
        _ => format!("{hours}:{minutes:02}:{rest:02}"),
    }
}

/// The values under a value that are no mappings, with their paths, in order.
pub(crate) fn leaves(value: &Value) -> Vec<(String, &Value)> {
    let mut found = Vec::new();
    let mut open = vec![(String::new(), value)];
    while let Some((path, value)) = open.pop() {
        match value {
            Value::Object(entries) => {
                // The last one put in is taken out first.
                for (key, value) in entries.iter().rev() {
                    let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                    open.push((path, value));
                }
            }
            value => found.push((path, value)),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_easily() {
        assert_eq!(count(999), "999");
        assert_eq!(count(85_798_656), "85,798,656");
        assert_eq!(bytes(850_000_000), "811 MiB");
        assert_eq!(bytes(6 << 30), "6.0 GiB");
        assert_eq!(percent(0.8312), "83.1 %");
        assert_eq!(clock(5.4), "0:05");
        assert_eq!(clock(10_925.0), "3:02:05");
    }

    #[test]
    fn columns_line_up() {
        let mut table = Table::default();
        table.row(["", "accuracy"]);
        table.row(["pixels", "82.0 %"]);
        assert_eq!(table.render(2), "          accuracy\n  pixels    82.0 %\n");
        let mut table = Table::of_words();
        table.row(["a", "long", "c"]);
        table.row(["aa", "b", "c"]);
        assert_eq!(table.render(0), "a   long  c\naa  b     c\n");
    }
}
