//! `maskalign runs metrics`: what a run measured, as columns.

use std::{collections::BTreeSet, path::PathBuf};

use maskalign_core::run::{Record, columns, read_records};
use serde_json::{Map, Value};

use super::{Pieces, cell, csv_line, told};
use crate::{
    failure::Failure,
    output,
    progress::number,
    table::{Table, count},
};

const EXAMPLES: &str = "\
Examples:
  maskalign runs metrics runs/mine                   some of the records, for people
  maskalign runs metrics runs/mine --csv > mine.csv  all of them
  maskalign runs metrics runs/mine --stage pretrain --json";

/// Rows of the table for people.
const SHOWN: u64 = 20;
/// Columns that it does not have, and beginnings of their names.
const LEFT_OUT: [&str; 5] = ["images_per_s", "skipped", "seconds.", "lr_groups.", "levels."];

/// Print the metrics of a run as columns, all stages in one table
///
/// A row is a record of metrics.jsonl: a step, or a result in the course of training. Columns are stage, step, epoch, loss,
/// lr, gradient_norm, images_per_s and skipped, then all others by name (knn.accuracy). Lines that are no records are named,
/// with exit code 1, and everything else is printed.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// The run directory
    run: PathBuf,
    /// As comma-separated values with a line of names, every record
    #[arg(long, conflicts_with = "json")]
    csv: bool,
    /// As a list of JSON objects, every record
    #[arg(long)]
    json: bool,
    /// Only the records of this stage
    #[arg(long, value_name = "STAGE")]
    stage: Option<String>,
}

impl Args {
    pub(super) fn run(self) -> Result<(), Failure> {
        let (mut stages, mut names) = (BTreeSet::new(), BTreeSet::new());
        // Those that are no steps are the results in the course of training.
        let (mut records, mut others) = (0_u64, 0_u64);
        let bad = read_records(&self.run, &mut |record| {
            if self.stage.as_deref().is_none_or(|stage| record.stage() == stage) {
                records += 1;
                others += u64::from(!record.values.contains_key("loss"));
                names.extend(record.values.keys().cloned());
            }
            stages.insert(record.stage().to_owned());
            true
        })?;
        if let Some(stage) = self.stage.as_ref().filter(|stage| !stages.contains(*stage)) {
            let failure = Failure::mistake(format!("{} has no metrics of a stage `{stage}`", self.run.display()));
            let stages: Vec<String> = stages.iter().map(|stage| format!("`{stage}`")).collect();
            return Err(match stages.as_slice() {
                [] => failure.help("it has none at all yet"),
                stages => failure.help(format!("it has those of {}", stages.join(", "))),
            });
        }
        let columns = columns(names);
        match (self.csv, self.json) {
            (true, _) => self.csv(&columns, records)?,
            (_, true) => self.json(&columns, records)?,
            _ => self.text(&columns, records, others)?,
        }
        told(&self.run, &bad)
    }

    /// Reads the records again, as many as there were.
    fn each(&self, records: u64, show: &mut dyn FnMut(u64, Record) -> Result<(), Failure>) -> Result<(), Failure> {
        let (mut at, mut outcome) = (0, Ok(()));
        read_records(&self.run, &mut |record| {
            if self.stage.as_deref().is_none_or(|stage| record.stage() == stage) {
                if at == records {
                    return false;
                }
                outcome = show(at, record);
                at += 1;
            }
            outcome.is_ok()
        })?;
        outcome
    }

    fn csv(&self, columns: &[String], records: u64) -> Result<(), Failure> {
        let mut out = Pieces(String::new());
        out.add(&csv_line(columns.iter().cloned()))?;
        self.each(records, &mut |_, record| {
            out.add(&csv_line(columns.iter().map(|name| record.values.get(name).map_or(String::new(), cell))))
        })?;
        out.flush()
    }

    fn json(&self, columns: &[String], records: u64) -> Result<(), Failure> {
        let mut out = Pieces(String::new());
        self.each(records, &mut |at, mut record| {
            let ordered: Map<String, Value> =
                columns.iter().filter_map(|name| Some((name.clone(), record.values.get_mut(name)?.take()))).collect();
            let begin = if at == 0 { "[\n  " } else { ",\n  " };
            out.add(&format!("{begin}{}", Value::Object(ordered)))
        })?;
        out.add(if records == 0 { "[]\n" } else { "\n]\n" })?;
        out.flush()
    }

    fn text(&self, columns: &[String], records: u64, others: u64) -> Result<(), Failure> {
        if records == 0 {
            return Ok(output::print("no metrics yet\n")?);
        }
        let all = columns.len();
        let is_left_out = |name: &&String| LEFT_OUT.iter().any(|left_out| name.starts_with(left_out));
        let columns: Vec<&String> = columns.iter().filter(|name| !is_left_out(name)).collect();
        let mut table = Table::default();
        table.row(columns.iter().map(|name| name.as_str()));
        // Spread over all, the first and the last among them.
        let rank = |at: u64| at * (SHOWN.min(records) - 1) / (records - 1).max(1);
        let mut shown = 0;
        self.each(records, &mut |at, record| {
            let is_step = record.values.contains_key("loss");
            if at == 0 || rank(at) != rank(at - 1) || (!is_step && others <= SHOWN) {
                shown += 1;
                let cell = |name: &&String| record.values.get(*name).map_or("-".to_owned(), |value| short(name, value));
                table.row(columns.iter().map(cell));
            }
            Ok(())
        })?;
        output::print(&table.render(0))?;
        let (rows, columns) = (count(records), columns.len());
        output::complain(&format!(
            "{shown} of {rows} records, {columns} of {all} columns: --csv and --json print everything\n"
        ));
        Ok(())
    }
}

/// A value as people read it.
fn short(name: &str, value: &Value) -> String {
    match (name, value.as_f64()) {
        ("step", _) => cell(value),
        ("epoch", Some(epoch)) => format!("{epoch:.2}"),
        ("lr", Some(lr)) => format!("{lr:.2e}"),
        ("images_per_s", Some(rate)) => format!("{rate:.0}"),
        _ => number(name, value),
    }
}
