//! What the runs of a sweep measured: mean and standard error over seeds, for each combination of values.

use std::path::Path;

use maskalign_core::run::{Spread, aim, results, spread};
use serde_json::{Value, json};

use crate::{
    failure::Failure,
    progress::number,
    table::Table,
    verbs::runs::{cell, csv_line},
};

/// The most results that a table for people shows.
const MOST: usize = 8;

/// How results are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    /// For people.
    #[default]
    Text,
    /// A table in Markdown.
    Markdown,
    /// A line for each combination and result, all digits.
    Csv,
    /// The same as JSON.
    Json,
}

/// The results of one combination of values.
pub(super) struct Row {
    /// The values, in the order of the paths.
    pub(super) values: Vec<String>,
    /// Runs that are asked for, and those that are done.
    pub(super) runs: (usize, usize),
    /// Each result by stage and name.
    results: Vec<((String, String), Spread)>,
}

impl Row {
    /// Reads the results of the runs that are done.
    ///
    /// # Errors
    /// The results of one cannot be read.
    pub(super) fn read(values: Vec<String>, all: usize, done: &[&Path]) -> Result<Row, Failure> {
        let mut found: Vec<((String, String), Vec<f64>)> = Vec::new();
        for run in done {
            for result in results(run)? {
                let key = (result.stage, result.name);
                match found.iter_mut().find(|(known, _)| *known == key) {
                    Some((_, values)) => values.push(result.last),
                    None => found.push((key, vec![result.last])),
                }
            }
        }
        let results = found.into_iter().filter_map(|(key, values)| Some((key, spread(&values)?)));
        Ok(Row { values, runs: (all, done.len()), results: results.collect() })
    }
}

/// The table, and what is to be said beside it.
pub(super) fn table(paths: &[String], labels: &[String], rows: &[Row], format: Format) -> (String, String) {
    match format {
        Format::Json => (format!("{:#}\n", as_json(paths, rows)), String::new()),
        Format::Csv => (csv(paths, rows), String::new()),
        Format::Text | Format::Markdown => wide(labels, rows, format),
    }
}

fn as_json(paths: &[String], rows: &[Row]) -> Value {
    let rows = rows.iter().map(|row| {
        let values: serde_json::Map<String, Value> =
            paths.iter().cloned().zip(row.values.iter().map(|value| json!(value))).collect();
        let results = row.results.iter().map(|((stage, name), spread)| {
            let mut result = json!({ "stage": stage, "result": name });
            if let (Value::Object(result), Value::Object(spread)) = (&mut result, json!(spread)) {
                result.extend(spread);
            }
            result
        });
        let (all, done) = row.runs;
        json!({ "values": values, "runs": all, "done": done, "results": results.collect::<Vec<_>>() })
    });
    rows.collect()
}

fn csv(paths: &[String], rows: &[Row]) -> String {
    let rest = ["stage", "result", "runs", "mean", "standard_error"].map(str::to_owned);
    let mut out = csv_line(paths.iter().cloned().chain(rest));
    for row in rows {
        for ((stage, name), Spread { runs, mean, standard_error }) in &row.results {
            let numbers = [json!(runs), json!(mean), json!(standard_error)];
            let cells = row.values.iter().chain([stage, name]).cloned();
            out.push_str(&csv_line(cells.chain(numbers.iter().map(cell))));
        }
    }
    out
}

/// A row for each combination, and a column for each result whose name tells whether more of it is better.
fn wide(labels: &[String], rows: &[Row], format: Format) -> (String, String) {
    let mut names: Vec<&(String, String)> = Vec::new();
    for (name, _) in rows.iter().flat_map(|row| &row.results) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let all = names.len();
    names.retain(|(_, name)| {
        let is_part = name.split('.').any(|part| ["classes", "confusion", "by_k"].contains(&part));
        aim(name).is_some() && !is_part
    });
    names.truncate(MOST);
    let heading = labels.iter().cloned().chain(["runs".to_owned()]);
    let heading: Vec<String> = heading.chain(names.iter().map(|(stage, name)| format!("{stage} {name}"))).collect();
    let mut lines = vec![heading];
    for row in rows {
        let (wanted, done) = row.runs;
        let runs = if done == wanted { done.to_string() } else { format!("{done} of {wanted}") };
        let result = |name: &&(String, String)| {
            let found = row.results.iter().find(|(known, _)| known == *name);
            found.map_or_else(|| "-".to_owned(), |(_, spread)| shown(&name.1, spread))
        };
        lines.push(row.values.iter().cloned().chain([runs]).chain(names.iter().map(result)).collect());
    }
    let text = match format {
        Format::Markdown => markdown(&lines, labels.len()),
        _ => {
            let mut table = Table::of_words();
            for line in lines {
                table.row(line);
            }
            table.render(0)
        }
    };
    let left_out = all - names.len();
    let note = match left_out {
        0 => String::new(),
        _ => format!("{left_out} more results: --format csv and --format json have all\n"),
    };
    (text, note)
}

fn markdown(lines: &[Vec<String>], labels: usize) -> String {
    let escaped = |cell: &String| cell.replace('|', "\\|");
    let line = |cells: &Vec<String>| format!("| {} |\n", cells.iter().map(escaped).collect::<Vec<_>>().join(" | "));
    let mut out = String::new();
    for (at, cells) in lines.iter().enumerate() {
        out.push_str(&line(cells));
        if at == 0 {
            let numbers = cells.len() - labels;
            out.push_str(&format!("|{}{}\n", "---|".repeat(labels), "---:|".repeat(numbers)));
        }
    }
    out
}

/// `81.20 ± 0.25 %`.
fn shown(name: &str, spread: &Spread) -> String {
    let is_share = number(name, &json!(0.5)).ends_with('%');
    let (factor, digits, unit) = if is_share { (100.0, 2, " %") } else { (1.0, 4, "") };
    let mean = factor * spread.mean;
    match spread.standard_error {
        Some(error) => format!("{mean:.digits$} ± {:.digits$}{unit}", factor * error),
        None => format!("{mean:.digits$}{unit}"),
    }
}
