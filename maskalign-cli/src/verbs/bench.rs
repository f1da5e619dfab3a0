//! `maskalign bench`: how fast a recipe's stage is on this machine.

use std::{num::NonZeroUsize, path::PathBuf};

use clap::ValueEnum;
use maskalign_testkit::bench::{self, BenchOptions, BenchReport, Job};
use serde_json::json;

use super::machine::{Machine, at_least_one};
use crate::{
    failure::Failure,
    output,
    recipes::{self, Sets},
    session::Session,
    table::{Table, percent},
};

const EXAMPLES: &str = "\
Examples:
  maskalign bench bench_vitti
  maskalign bench maskalign_vitb_clip --batch 16 --threads 2 --json
  maskalign bench maskalign_vitb_clip --job features --batch 32";

/// Measure the step of a recipe on synthetic images
///
/// Calls the stage's own step on new images and fresh masks each time; weights that are not on this machine are drawn at
/// random. Prints images per second, the time of each phase, GFLOP/s, the share of the machine's measured peak, and peak
/// memory.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// A recipe's file, or the name of a built-in recipe
    recipe: PathBuf,
    #[command(flatten)]
    sets: Sets,
    /// What is measured
    #[arg(long, value_enum, default_value_t)]
    job: JobName,
    /// Steps that are timed, after one that warms up
    #[arg(long, value_name = "N", default_value = "10", value_parser = at_least_one::<NonZeroUsize>)]
    steps: NonZeroUsize,
    /// Images of a step [default: the recipe's micro-batch]
    #[arg(long, value_name = "B", value_parser = at_least_one::<NonZeroUsize>)]
    batch: Option<NonZeroUsize>,
    /// Write one line of JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    machine: Machine,
    /// Write a trace of the steps to a new file in Chrome's format, for chrome://tracing or ui.perfetto.dev
    #[arg(long, value_name = "FILE", help_heading = "Logging")]
    pub trace: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum JobName {
    /// A step of the recipe's first `pretrain` stage
    #[default]
    Pretrain,
    /// A supervised step of its student: every patch visible, 1000 classes
    Finetune,
    /// Its student's features of whole images, as k-NN takes them
    Features,
}

impl From<JobName> for Job {
    fn from(name: JobName) -> Job {
        match name {
            JobName::Pretrain => Job::Pretrain,
            JobName::Finetune => Job::Finetune,
            JobName::Features => Job::Features,
        }
    }
}

impl Args {
    pub(crate) fn run(self, session: &Session) -> Result<(), Failure> {
        let loaded = recipes::load_anywhere(session.registry, &self.recipe, &self.sets.sets)?;
        // Numbers that no variable gives cannot be measured with.
        let unset = loaded.unset();
        if !unset.0.is_empty() {
            return Err(unset.into());
        }
        let cx = self.machine.open()?;
        session.trace.begin();
        let options =
            BenchOptions { job: self.job.into(), steps: self.steps.get(), batch: self.batch.map(NonZeroUsize::get) };
        let measured = bench::bench(&cx, loaded.recipe(), options);
        let report = measured.map_err(|error| Failure::located(error, &loaded))?;
        match self.json {
            true => {
                let mut data = json!(report);
                data["peak_share"] = json!(peak_share(&report));
                output::print(&format!("{data}\n"))?;
            }
            false => output::print(&text(&report))?,
        }
        Ok(())
    }
}

/// The share of the machine's peak that was reached, where the peak is known.
fn peak_share(report: &BenchReport) -> Option<f64> {
    report.peak_gflops.map(|peak| report.gflops / peak)
}

fn text(report: &BenchReport) -> String {
    let mut numbers = Table::default();
    let mut say = |name: &str, value: Option<String>| {
        numbers.row([name.to_string(), value.unwrap_or_else(|| "unknown".to_string())]);
    };
    say("images/s, best", Some(format!("{:.1}", report.images_per_s_best)));
    say("images/s, median", Some(format!("{:.1}", report.images_per_s_median)));
    say("GFLOP an image", Some(format!("{:.2}", report.gflop_per_image)));
    say("GFLOP/s", Some(format!("{:.1}", report.gflops)));
    say("GFLOP/s, peak", report.peak_gflops.map(|peak| format!("{peak:.1}")));
    say("share of the peak", peak_share(report).map(percent));
    say("peak memory, MiB", report.peak_mib.map(|mib| format!("{mib:.0}")));
    let mut phases: Vec<(&str, f64)> = report.phases.iter().map(|(name, seconds)| (*name, *seconds)).collect();
    phases.sort_by(|a, b| b.1.total_cmp(&a.1));
    let all: f64 = phases.iter().map(|(_, seconds)| seconds).sum();
    let mut times = Table::default();
    for (name, seconds) in phases {
        times.row([name.to_string(), format!("{:.2} ms", 1e3 * seconds), percent(seconds / all)]);
    }
    let BenchReport { batch, threads, kernels, .. } = report;
    format!(
        "{batch} images a step, {threads} threads, {kernels} kernels\n{}time of a step\n{}",
        numbers.render(2),
        times.render(2)
    )
}
