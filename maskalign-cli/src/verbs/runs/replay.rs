//! `maskalign runs replay`: a step whose loss or gradient was not finite, made again.

use std::path::PathBuf;

use maskalign_core::{
    pipeline::{self, Replay},
    run::{FailedBatch, FailedStep, OperatorRecord, RunDir},
};
use serde_json::{Map, Value, json};

use crate::{
    failure::Failure,
    output, recipes,
    render::{self, paint},
    session::Session,
    table::{Table, count},
    verbs::{Format, Written, machine::Machine, run::planned},
};

/// So many images of a micro-batch are named on a terminal; all of them are in the file and in JSON.
const NAMED: usize = 8;

/// Make the step again whose loss or gradient was not finite
///
/// A run that ends by such a step keeps the state before it. This computes the step again from there, on the same images,
/// and says which terms, parameters and operators are not finite, and how large the values were on the way. Changes
/// nothing. Exit code 0 where the step is not finite again, as the run had it; 1 where it is finite now.
#[derive(clap::Args)]
pub(super) struct Args {
    /// The run directory
    run: PathBuf,
    /// The stage whose step it is [default: the first that kept one]
    #[arg(long, value_name = "NAME")]
    stage: Option<String>,
    #[command(flatten)]
    machine: Machine,
    #[command(flatten)]
    written: Written,
}

impl Args {
    pub(super) fn run(self, session: &Session) -> Result<(), Failure> {
        let dir = RunDir::look_at(&self.run)?;
        if dir.read_recipe()?.is_none() {
            let message = format!("the run in {} was ended before it wrote its recipe", dir.path().display());
            return Err(Failure::mistake(message));
        }
        let loaded = recipes::load(session.registry, &dir.recipe_path(), &[])?;
        let plan = planned(&loaded, &self.machine, Some(&dir))?;
        let cx = self.machine.open()?;
        let stage = self.stage.as_deref();
        let replay = pipeline::replay(&cx, loaded.recipe(), &loaded.fingerprint(), &plan, &dir, stage)
            .map_err(|error| Failure::located(error, &loaded))?;
        match self.written.format() {
            Format::Json => output::print_json(&json!({ "then": replay.then, "now": replay.now }))?,
            Format::Text => output::print(&text(&replay))?,
        }
        match replay.now.repeats {
            true => Ok(()),
            false => Err(Failure::failed("the step is finite now: see what differs above")),
        }
    }
}

fn text(Replay { then, now }: &Replay) -> String {
    let head = format!("stage {}, step {}", now.stage, count(now.step));
    let mut out = format!("{}, epoch {:.2}, learning rate {:.3e}\n", paint(render::STRONG, &head), now.epoch, now.lr);
    out.push_str(&format!("the {} is {}{}\n", now.what, plain(&now.value), difference(then, now)));
    for bad in &now.parameters {
        let values = count(bad.values as u64);
        out.push_str(&format!("not finite before the step: {}, {} of {values} values\n", bad.name, bad.not_finite));
    }
    match &now.first {
        Some(first) => {
            out.push_str(&format!("it began in {} (number {} of the step)\n", first.says(), first.number));
            out.push_str(&operators(&first.before, &first.made_by));
        }
        None => out.push_str("no operator made a value that is not finite\n"),
    }
    let parts = now.micro_batches.len();
    for (place, batch) in now.micro_batches.iter().enumerate() {
        // Those before are finite.
        if place + 1 == parts || now.what != "loss" {
            out.push_str(&format!("\n{}\n", paint(render::STRONG, &format!("micro-batch {place}"))));
            out.push_str(&terms(batch));
            out.push_str(&images(batch));
        }
    }
    out
}

/// How a replay differs from what the run kept.
fn difference(then: &FailedStep, now: &FailedStep) -> String {
    let mut found = Vec::new();
    if then.value != now.value || then.what != now.what {
        found.push(format!("then the {} was {}", then.what, plain(&then.value)));
    }
    if then.kernels != now.kernels {
        found.push(format!("then the kernels were `{}`, now `{}`", then.kernels, now.kernels));
    }
    // What follows a micro-batch that is not finite was not read.
    if then.micro_batches.iter().zip(&now.micro_batches).any(|(then, now)| then.images != now.images) {
        found.push("the images are others than then: the data has changed".to_owned());
    }
    if found.is_empty() { " again".to_owned() } else { format!("; {}", found.join("; ")) }
}

/// What the operators up to the first bad one made.
fn operators(before: &[OperatorRecord], last: &OperatorRecord) -> String {
    let mut table = Table::of_words();
    let row = |record: &OperatorRecord, largest: String| {
        let of = record.gradient_of.clone().or_else(|| record.module()).unwrap_or_default();
        [
            record.operator.clone(),
            record.pass.clone(),
            of,
            format!("{} x {}", record.shape[0], record.shape[1]),
            largest,
        ]
    };
    table.row(["operator", "pass", "of", "shape", "largest value"].map(str::to_owned));
    for record in before {
        table.row(row(record, format!("{:.3e}", record.largest)));
    }
    table.row(row(last, "not finite".to_owned()));
    table.render(2)
}

fn terms(batch: &FailedBatch) -> String {
    let shown = |name: &str, value: &Value, levels: Option<&Map<String, Value>>| {
        let levels = levels.into_iter().flatten().map(|(level, value)| format!("{level}: {}", plain(value)));
        let levels = levels.collect::<Vec<_>>().join(", ");
        let levels = if levels.is_empty() { levels } else { format!(" (distance by level: {levels})") };
        format!("term {name}: {}{levels}\n", plain(value))
    };
    let all =
        batch.terms.iter().map(|(name, value)| shown(name, value, batch.levels.get(name).and_then(Value::as_object)));
    all.collect()
}

fn images(batch: &FailedBatch) -> String {
    let named = batch.indices.iter().zip(&batch.images).take(NAMED).map(|(index, name)| format!("  {index} {name}\n"));
    let more = batch.indices.len().saturating_sub(NAMED);
    let more = if more > 0 { format!("  and {more} more, in --json\n") } else { String::new() };
    format!("images, by their place in the data:\n{}{more}", named.collect::<String>())
}

/// A number, or the text in its place.
fn plain(value: &Value) -> String {
    match (value.as_str(), value.as_f64()) {
        (Some(text), _) => text.to_owned(),
        (_, Some(number)) if (1e-3..1e6).contains(&number.abs()) => format!("{number:.6}"),
        (_, Some(number)) => format!("{number:.3e}"),
        _ => value.to_string(),
    }
}
