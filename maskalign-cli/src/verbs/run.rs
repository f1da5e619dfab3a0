//! `maskalign run`: from a recipe to a run directory.

use std::{
    ffi::OsString,
    num::NonZeroU64,
    path::{Path, PathBuf},
    time::SystemTime,
};

use clap::ArgGroup;
use maskalign_core::{
    Context,
    components::towers::{Environment, MissingWeights},
    error::Result as CoreResult,
    events::{Events, MetricsFile, PicturesFolder, Sink, TensorBoardFile},
    fork::{self, At, Fork, Parent, Recipes},
    pipeline::{self, Deviation, Plan, PlanOptions, RunOptions},
    run::{Mode, Origin, RunDir, RunError, StopFlag},
};
use maskalign_registry::{Loaded, ShowOrigin, diff};
use serde_json::{Map, Value};

use super::{
    machine::{Machine, at_least_one},
    outline,
};
use crate::{
    failure::Failure,
    output,
    progress::{Reporter, number, undoubled},
    recipes::{self, Sets},
    render::{self, paint},
    report,
    session::{COMMIT, Session},
    signals,
    table::{self, Table, count},
};

const EXAMPLES: &str = "\
Examples:
  maskalign run quickstart
  maskalign init photos && maskalign run photos.yaml --out runs/photos     your own images
  maskalign run mine.yaml --set stages.pretrain.epochs=5 --out runs/short
  maskalign run mine.yaml --steps 20              end each training stage after 20 steps
  maskalign run --resume runs/short               go on after Ctrl-C, SIGTERM or a power cut
  maskalign run mine.yaml --out runs/short --force
  maskalign run --from runs/short --set stages.pretrain.epochs=50 --out runs/longer
  maskalign run --from runs/short@400 --set stages.pretrain.optimizer.base_lr=1e-4
  maskalign run mine.yaml --out runs/job --resume-or-start     for schedulers: the same command each time

Ctrl-C, SIGTERM and SIGHUP save the state and exit with 130, 143 and 129; SIGUSR1 saves it and goes on.";

/// Run a recipe: train and evaluate what it says
///
/// Checks the recipe, makes a run directory (recipe, manifest, metrics, checkpoints, summary), runs the stages in order
/// and prints their results. What was
/// measured is then in report.html, to look at.
#[derive(clap::Args)]
#[command(
    after_help = EXAMPLES,
    group = ArgGroup::new("what").args(["recipe", "resume", "from"]).multiple(true).required(true),
    group = ArgGroup::new("resuming").args(["resume", "resume_or_start"])
)]
pub(crate) struct Args {
    /// A recipe's file, or the name of a built-in recipe; may be left out with --resume and --from
    recipe: Option<PathBuf>,
    #[command(flatten)]
    sets: Sets,
    /// The run directory to make [default: runs/NAME-TIME]
    #[arg(long, value_name = "DIR", conflicts_with = "resume")]
    out: Option<PathBuf>,
    /// Go on with the run in this directory, from its last checkpoint
    ///
    /// The recipe must be the one of that run, and so must the instruction set; threads and the other flags may differ.
    #[arg(long, value_name = "DIR")]
    resume: Option<PathBuf>,
    /// Begin a run that goes on from another one, under its recipe with what --set changes, or under another recipe
    ///
    /// Finished stages whose options are the same are taken over. The next one goes on from its last checkpoint, with weights,
    /// optimizer and place in the data; @STEP or @STAGE:STEP names an earlier one. What follows begins anew. The new run's
    /// manifest.json says what it goes on from, and what differs.
    #[arg(long, value_name = "RUN[@STEP]", value_parser = from, conflicts_with = "resume")]
    from: Option<Parent>,
    /// Start the run in --out, or go on with it where it is there; a run that is done ends at once, with exit code 0
    #[arg(long, requires = "out", conflicts_with = "force")]
    resume_or_start: bool,
    /// Go on where another instruction set computes: the last bits differ, and manifest.json says so
    #[arg(long, requires = "resuming", help_heading = "Machine")]
    accept_other_kernels: bool,
    /// Go on where metrics.jsonl is damaged, with what is valid in it; manifest.json says how much is lost
    #[arg(long, requires = "resuming")]
    accept_lost_metrics: bool,
    /// Replace the run that is in the run directory; deletes only files that a run made
    #[arg(long, conflicts_with = "resume", requires = "out")]
    force: bool,
    /// End each training stage after this many optimizer steps in all, those before a --resume among them
    #[arg(long, value_name = "N", value_parser = at_least_one::<NonZeroU64>)]
    steps: Option<NonZeroU64>,
    #[command(flatten)]
    machine: Machine,
    /// Threads that read images, 0 to read them between steps [default: 1, or 0 with one thread]
    #[arg(long, value_name = "N", help_heading = "Machine")]
    workers: Option<usize>,
    /// Write losses, rates and accuracies for TensorBoard too: tensorboard --logdir DIR
    ///
    /// They go into the folder `tensorboard` of the run directory. A resumed run is told again; steps that it made
    /// without are added then.
    #[arg(long, help_heading = "Logging")]
    tensorboard: bool,
    /// Write a trace of the run to a new file in Chrome's format, for chrome://tracing or ui.perfetto.dev
    #[arg(long, value_name = "FILE", help_heading = "Logging")]
    pub trace: Option<PathBuf>,
}

impl Args {
    pub(crate) fn run(self, session: &Session) -> Result<(), Failure> {
        // A run is resumed under its lock from the start; a fresh one leaves no directory behind if it is refused.
        let there = self.out.as_ref().filter(|out| self.resume_or_start && out.is_dir());
        let resumed = self.resume.as_ref().or(there);
        let resumed = resumed.map(|path| match RunDir::create(path, Mode::Resume) {
            // A fork that was killed at its very beginning begins again.
            Err(RunError::HalfForked { .. }) if self.resume_or_start && self.from.is_some() => {
                RunDir::create(path, Mode::Fresh)
            }
            opened => opened,
        });
        let resumed = resumed.transpose()?;
        let prepared = self.prepare(session, resumed.as_ref()).and_then(|(loaded, plan, cx)| {
            let fork = self.from.as_ref().filter(|_| resumed.as_ref().is_none_or(RunDir::is_new));
            let fork = fork.map(|from| self.fork(session, from, &loaded, &plan)).transpose()?;
            Ok((loaded, plan, cx, fork))
        });
        let (loaded, plan, cx, fork) = match prepared {
            Ok(prepared) => prepared,
            Err(failure) => {
                resumed.map(RunDir::withdraw).transpose()?;
                return Err(failure);
            }
        };
        let step_limit = self.steps.map(NonZeroU64::get);
        let dir = match resumed {
            Some(dir) if self.resume_or_start && pipeline::is_done(&plan, &dir, step_limit)? => {
                let results = dir.read_summary()?;
                return Ok(output::print(&format!("{}the run is done\n", table_of_results(&results, dir.path())))?);
            }
            Some(dir) => dir,
            None => {
                let name = &loaded.recipe().name;
                #[expect(clippy::disallowed_methods, reason = "a folder that nobody named is named by the date")]
                let path = self.out.clone().unwrap_or_else(|| RunDir::default_path(name, SystemTime::now()));
                RunDir::create(path, if self.force { Mode::Force } else { Mode::Fresh })?
            }
        };
        session.trace.begin();
        let stop = StopFlag::new();
        signals::watch(&stop).map_err(|error| Failure::failed(format!("cannot watch for signals: {error}")))?;
        let mut reporter = Reporter::new(session.screen.clone(), session.verbosity.quiet);
        reporter.say(&format!("{}\n{}", paint(render::STRONG, &loaded.recipe().name), outline::text(loaded.recipe())));
        let origin = match fork {
            None => None,
            Some(fork) => {
                reporter.say(&taken_over(fork.record()));
                Some(fork.take_over(&dir, &loaded.fingerprint())?)
            }
        };
        let exported = plan.summaries().filter(|(_, summary)| summary.student.is_some() && summary.trainable > 0);
        let exported = exported.last().map(|(name, _)| name.to_owned());
        let job = Job { args: &self, loaded: &loaded, dir: &dir, stop: &stop, arguments: session.arguments };
        let outcome = job.run_on(&cx, plan, origin, &mut reporter);
        reporter.clear();
        let results = match outcome {
            Ok(results) => results,
            Err(error) => {
                if error.is_users() {
                    // What is corrected may go to the same place.
                    dir.withdraw()?;
                }
                return Err(Failure::located(error, &loaded));
            }
        };
        output::print(&table_of_results(&results, dir.path()))?;
        // The run is done, whatever becomes of its page.
        let page = dir.report_path();
        match report::write(&[dir.path()], &page) {
            Ok(()) => output::print(&format!("report: {}\n", page.display()))?,
            Err(failure) => tracing::warn!("no report was written: {}", failure.text().trim_end()),
        }
        reporter.say(&next_steps(dir.path(), exported.as_deref()));
        Ok(())
    }

    /// Everything that is needed before the run directory is made: the recipe, the plan of its stages, and the device.
    fn prepare(&self, session: &Session, resumed: Option<&RunDir>) -> Result<(Loaded, Plan, Context), Failure> {
        let loaded = match (resumed, &self.recipe) {
            (Some(dir), _) => self.resumed_recipe(session, dir)?,
            (None, Some(recipe)) => recipes::load(session.registry, recipe, &self.sets.sets)?,
            (None, None) => match &self.from {
                Some(from) => recipes::load(session.registry, &self.origin_recipe(from)?, &self.sets.sets)?,
                None => return Err(Failure::mistake("no recipe is named")),
            },
        };
        let plan = planned(&loaded, &self.machine, resumed)?;
        let cx = self.machine.open()?;
        Ok((loaded, plan, cx))
    }

    /// The recipe of the run to go on from.
    fn origin_recipe(&self, from: &Parent) -> Result<PathBuf, Failure> {
        let dir = RunDir::look_at(&from.run)?;
        let is_same = |out: &PathBuf| match (out.canonicalize(), from.run.canonicalize()) {
            (Ok(out), Ok(run)) => out == run,
            _ => false,
        };
        if self.out.as_ref().is_some_and(is_same) {
            let message =
                format!("{} is the run to go on from: a fork has a directory of its own", dir.path().display());
            return Err(
                Failure::mistake(message).help("name another one with `--out`, or go on in this one with `--resume`")
            );
        }
        match dir.read_recipe()? {
            Some(_) => Ok(dir.recipe_path()),
            None => Err(Failure::mistake(format!(
                "the run in {} was ended before it wrote its recipe",
                dir.path().display()
            ))),
        }
    }

    /// What is taken over from another run.
    fn fork(&self, session: &Session, from: &Parent, loaded: &Loaded, plan: &Plan) -> Result<Fork, Failure> {
        let own = recipes::load(session.registry, &self.origin_recipe(from)?, &[])?;
        let differences = diff(own.resolved(), loaded.resolved());
        let recipes = Recipes { then: own.resolved(), now: loaded.resolved(), differences: &differences };
        fork::fork(from, recipes, plan)?.map_err(|refusals| Failure::Recipe(loaded.locate_all(&refusals)))
    }

    /// The recipe of a resumed run: the run's own, or the one given, which must mean the same.
    fn resumed_recipe(&self, session: &Session, dir: &RunDir) -> Result<Loaded, Failure> {
        let own = match dir.read_recipe()? {
            None => None,
            Some(_) => Some(recipes::load(session.registry, &dir.recipe_path(), &[])?),
        };
        let given = match (&self.recipe, &own) {
            (Some(recipe), _) => recipes::load(session.registry, recipe, &self.sets.sets)?,
            (None, Some(_)) => recipes::load(session.registry, &dir.recipe_path(), &self.sets.sets)?,
            (None, None) if self.from.is_some() && dir.is_new() => {
                let from = self.from.as_ref().expect("it was looked at");
                recipes::load(session.registry, &self.origin_recipe(from)?, &self.sets.sets)?
            }
            (None, None) => {
                return Err(Failure::mistake(format!(
                    "the run in {} was ended before it wrote its recipe",
                    dir.path().display()
                ))
                .help(format!("name the recipe too: maskalign run RECIPE --resume {}", dir.path().display())));
            }
        };
        match own {
            Some(own) if own.fingerprint() != given.fingerprint() => {
                let differences = diff(own.resolved(), given.resolved());
                let shown: Vec<String> = differences.iter().map(|line| format!("\n  {line}")).collect();
                let message = format!(
                    "the recipe differs from the one of the run in {}:{}",
                    dir.path().display(),
                    shown.concat()
                );
                let extra = if self.recipe.is_some() { "the recipe" } else { "`--set`" };
                Err(Failure::mistake(message)
                    .help(format!("leave {extra} out to go on with the run's own, or start a new run with `--out`")))
            }
            _ => Ok(given),
        }
    }
}

/// Reads `RUN`, `RUN@STEP` or `RUN@STAGE:STEP`. A folder may have an `@` in its name.
fn from(text: &str) -> Result<Parent, String> {
    let whole = Parent { run: PathBuf::from(text), at: None };
    let Some((run, at)) = text.rsplit_once('@').filter(|_| !whole.run.is_dir()) else { return Ok(whole) };
    let (stage, step) = match at.split_once(':') {
        Some((stage, step)) => (Some(stage.to_owned()), step),
        None => (None, at),
    };
    let step = step.parse().map_err(|_| "expected RUN, RUN@STEP or RUN@STAGE:STEP, with a whole number of steps")?;
    Ok(Parent { run: PathBuf::from(run), at: Some(At { stage, step }) })
}

/// What a fork goes on from, for people.
fn taken_over(origin: &Origin) -> String {
    let stages = origin.finished_stages.iter().map(|stage| format!("`{stage}` as it ended")).collect::<Vec<_>>();
    let on = origin.stage.iter().zip(origin.step).map(|(stage, step)| format!("`{stage}` after step {step}"));
    let parts: Vec<String> = stages.into_iter().chain(on).collect();
    let mut text = format!("from {}: {}\n", origin.run.display(), parts.join(", "));
    for line in &origin.differences {
        text.push_str(&format!("  {line}\n"));
    }
    let moves_rates =
        |line: &String| [".epochs:", ".schedule", ".optimizer", ".batch"].iter().any(|part| line.contains(part));
    if origin.stage.is_some() && origin.differences.iter().any(moves_rates) {
        text.push_str(
            "  the learning rate goes on where the changed recipe has it at that step: it may jump, as where a longer schedule has \
             not fallen so far\n",
        );
    }
    text
}

/// What runs of a recipe, on the files that are there. Where it is a run's and is refused, that run's place is said.
pub(super) fn planned(loaded: &Loaded, machine: &Machine, run: Option<&RunDir>) -> Result<Plan, Failure> {
    let options = PlanOptions {
        environment: Environment::Checked,
        missing_weights: MissingWeights::Refused,
        recompute: machine.recompute(),
    };
    pipeline::plan(loaded.recipe(), options).map_err(|refusals| {
        let mut report = loaded.locate_all(&refusals);
        if let Some(place) = run.and_then(elsewhere) {
            report.0 = report.0.into_iter().map(|diagnostic| diagnostic.help(place.clone())).collect();
        }
        Failure::Recipe(report)
    })
}

/// Says where a run was started, if that is another folder: its recipe's relative paths start from there.
fn elsewhere(dir: &RunDir) -> Option<String> {
    let started = dir.read_manifest().ok()??.working_directory?;
    let here = std::env::current_dir().ok()?;
    // The manifest holds what can be shown of a name.
    (started.to_string_lossy() != here.to_string_lossy())
        .then(|| format!("the run was started in {}; resume it from there", started.display()))
}

/// A run that only needs a device.
struct Job<'a> {
    args: &'a Args,
    loaded: &'a Loaded,
    dir: &'a RunDir,
    stop: &'a StopFlag,
    arguments: &'a [OsString],
}

impl Job<'_> {
    fn run_on(
        &self,
        cx: &Context,
        plan: Plan,
        origin: Option<Origin>,
        reporter: &mut Reporter,
    ) -> CoreResult<Map<String, Value>> {
        let mut sinks: Vec<Box<dyn Sink + '_>> =
            vec![Box::new(MetricsFile::new(self.dir)), Box::new(PicturesFolder::new(self.dir))];
        if self.args.tensorboard {
            sinks.push(Box::new(TensorBoardFile::new(self.dir)));
        }
        sinks.push(Box::new(reporter));
        let options = RunOptions {
            resolved: &self.loaded.resolved_yaml(ShowOrigin::No),
            fingerprint: &self.loaded.fingerprint(),
            step_limit: self.args.steps.map(NonZeroU64::get),
            other_kernels: deviation(self.args.accept_other_kernels),
            lost_metrics: deviation(self.args.accept_lost_metrics),
            workers: self.args.workers.unwrap_or(usize::from(cx.threads() > 1)),
            origin,
            command_line: self.arguments.iter().map(|argument| argument.to_string_lossy().into_owned()).collect(),
            commit: COMMIT.map(str::to_owned),
            stop: self.stop,
            events: Events::new(sinks),
        };
        pipeline::run(cx, self.loaded.recipe(), plan, self.dir, options)
    }
}

fn deviation(accepted: bool) -> Deviation {
    if accepted { Deviation::Accepted } else { Deviation::Refused }
}

fn table_of_results(results: &Map<String, Value>, dir: &Path) -> String {
    let mut out = String::new();
    for (stage, result) in results {
        out.push_str(&format!("{}\n{}\n", paint(render::STRONG, stage), table_of(&undoubled(result))));
    }
    out.push_str(&format!("run directory: {}\n", dir.display()));
    out
}

/// What can be done with a run that has ended.
fn next_steps(dir: &Path, exported: Option<&str>) -> String {
    let commands = report::next_commands(dir, exported, true);
    commands.iter().fold("next:\n".to_owned(), |text, (command, what)| format!("{text}  {command}\n      {what}\n"))
}

/// Rows and columns of a table of results that a terminal has room for. All of them are in `summary.json`.
const MOST: (usize, usize) = (40, 12);

/// A stage's results: named rows of the same numbers as a table, everything else with one number on each line. What holds
/// nothing but named rows, such as the levels of a tower, is a group: it gives a row for each.
fn table_of(result: &Value) -> String {
    let Value::Object(entries) = result else {
        return String::new();
    };
    let mut numbers = Table::default();
    let mut lists = String::new();
    let mut tables: Vec<Rows> = Vec::new();
    for (name, value) in entries {
        match value {
            Value::Object(inner) if !inner.is_empty() && inner.values().all(Value::is_object) => {
                let rows = inner.iter().map(|(row, value)| Row {
                    group: Some(name.as_str()),
                    name: row,
                    cells: leaves(value),
                });
                Rows::add_to(&mut tables, rows.collect());
            }
            Value::Object(_) => {
                Rows::add_to(&mut tables, vec![Row { group: None, name, cells: leaves(value) }]);
            }
            Value::Array(items) => {
                for item in items {
                    let cells: Vec<String> =
                        leaves(item).iter().map(|(name, value)| format!("{name} {value}")).collect();
                    lists.push_str(&format!("  {name}: {}\n", cells.join(", ")));
                }
            }
            value => numbers.row([name.clone(), number(name, value)]),
        }
    }
    numbers.render(2) + &lists + &tables.iter().map(Rows::render).collect::<String>()
}

/// Results with numbers of the same names.
#[derive(Default)]
struct Rows<'a> {
    columns: Vec<String>,
    rows: Vec<Row<'a>>,
}

struct Row<'a> {
    group: Option<&'a str>,
    name: &'a str,
    cells: Vec<(String, String)>,
}

impl<'a> Rows<'a> {
    /// Adds rows to the last table if they share a column with it, and to a new one otherwise.
    fn add_to(tables: &mut Vec<Rows<'a>>, rows: Vec<Row<'a>>) {
        let shares =
            |table: &Rows| rows.iter().flat_map(|row| &row.cells).any(|(name, _)| table.columns.contains(name));
        if !tables.last().is_some_and(shares) {
            tables.push(Rows::default());
        }
        let Some(table) = tables.last_mut() else { return };
        for row in rows {
            for (column, _) in &row.cells {
                if !table.columns.contains(column) {
                    table.columns.push(column.clone());
                }
            }
            table.rows.push(row);
        }
    }

    fn render(&self) -> String {
        // The rows of one group share its name.
        let first = self.rows.first().and_then(|row| row.group);
        let shared = first.filter(|_| self.rows.iter().all(|row| row.group == first));
        let (most_rows, most_columns) = MOST;
        let mut columns = self.columns.clone();
        if columns.len() > most_columns {
            // What is nested, such as one number for each class, is the part that grows.
            columns.retain(|column| !column.contains('.'));
        }
        if columns.is_empty() || columns.len() > most_columns {
            let (rows, columns) = (count(self.rows.len() as u64), count(self.columns.len() as u64));
            return format!("  {}: {rows} rows of up to {columns} numbers in summary.json\n", shared.unwrap_or("more"));
        }
        // What rows are counted by comes in their order, as classes in a confusion matrix do.
        columns.sort_by_key(|column| self.rows.iter().position(|row| row.name == column).unwrap_or(usize::MAX));
        let mut table = Table::default();
        table.row(std::iter::once(shared.unwrap_or_default()).chain(columns.iter().map(String::as_str)));
        for row in self.rows.iter().take(most_rows) {
            let name = match row.group.filter(|_| shared.is_none()) {
                Some(group) => format!("{group} {}", row.name),
                None => row.name.to_string(),
            };
            let cell = |column: &String| {
                row.cells.iter().find(|(name, _)| name == column).map_or(String::new(), |(_, text)| text.clone())
            };
            table.row(std::iter::once(name).chain(columns.iter().map(cell)));
        }
        let more = match self.rows.len().saturating_sub(most_rows) {
            0 => String::new(),
            more => format!("  {} more rows in summary.json\n", count(more as u64)),
        };
        table.render(2) + &more
    }
}

/// Every number under a value, with its path, as people read it.
fn leaves(value: &Value) -> Vec<(String, String)> {
    table::leaves(value).into_iter().map(|(path, value)| (path.clone(), number(&path, value))).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn accuracies_stand_side_by_side() {
        let knn = json!({
            "pixels": { "accuracy": 0.82, "by_k": { "5": 0.81 } },
            "student": { "accuracy": 0.8312 },
        });
        assert_eq!(table_of(&knn), "           accuracy  by_k.5\n  pixels     82.0 %  81.0 %\n  student    83.1 %\n");
        let levels = json!({
            "pixels": { "accuracy": 0.82 },
            "student": { "embed": { "accuracy": 0.5 }, "0": { "accuracy": 0.625 } },
        });
        assert_eq!(
            table_of(&levels),
            "                 accuracy\n  pixels           82.0 %\n  student embed    50.0 %\n  student 0        62.5 %\n"
        );
        let evaluate = json!({
            "accuracy": 0.5,
            "classes": { "cat": { "images": 2, "accuracy": 0.0 }, "dog": { "images": 2, "accuracy": 1.0 } },
            "confusion": { "cat": { "dog": 2 }, "dog": { "dog": 2 } },
        });
        assert_eq!(
            table_of(&evaluate),
            "  accuracy  50.0 %\n  classes  images  accuracy\n  cat           2     0.0 %\n  dog           2   100.0 %\n  \
             confusion  dog\n  cat          2\n  dog          2\n"
        );
        let wide: Map<String, Value> = (0..13).map(|i| (i.to_string(), json!({ i.to_string(): 1 }))).collect();
        assert_eq!(
            table_of(&json!({ "confusion": wide })),
            "  confusion: 13 rows of up to 13 numbers in summary.json\n"
        );
        let long: Map<String, Value> = (0..42).map(|i| (i.to_string(), json!({ "images": 1 }))).collect();
        assert!(table_of(&json!({ "classes": long })).ends_with("  39            1\n  2 more rows in summary.json\n"));
        let pretrain =
            json!({ "steps": 1200, "epochs": 2.0, "loss": 0.123456, "knn": [{ "epoch": 1, "accuracy": 0.5 }] });
        assert_eq!(
            table_of(&pretrain),
            "  steps    1,200\n  epochs       2\n  loss    0.1235\n  knn: epoch 1, accuracy 50.0 %\n"
        );
    }
}
