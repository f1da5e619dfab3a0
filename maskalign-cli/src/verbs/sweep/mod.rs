//! `maskalign sweep`: the runs of a grid of values, one process each.

mod grid;
mod processes;
mod table;

use std::{
    fs,
    num::{NonZeroU64, NonZeroUsize},
    path::{Path, PathBuf},
};

use clap::ArgGroup;
use maskalign_core::{
    components::towers::{Environment, MissingWeights},
    pipeline::{self, Plan, PlanOptions},
    run::{RunDir, RunError, RunState, overview},
};
use maskalign_registry::{Diagnostic, Loaded, Report, diff};

use self::{
    grid::{Axis, Seeds},
    processes::{Ended, Processes},
    table::{Format, Row},
};
use super::machine::{Machine, at_least_one};
use crate::{
    failure::Failure,
    output,
    recipes::{self, Sets},
    session::Session,
    table::Table,
};

const EXAMPLES: &str = "\
Examples:
  maskalign sweep mine.yaml --grid stages.pretrain.masker.ratio=0.5,0.7,0.9 --seeds 0..3 --out sweeps/ratio
  maskalign sweep mine.yaml --grid 'stages.pretrain.masker={type: random, ratio: 0.7},{type: block, ratio: 0.7}' \\
      --seeds 0,1 --jobs 2 --out sweeps/masker --format markdown
  maskalign sweep mine.yaml --seeds 0..5 --out sweeps/seeds --dry-run

The same command goes on with a sweep that was stopped; with more values or seeds, it runs those that are missing.
Ctrl-C, SIGTERM and SIGHUP stop every run with its state saved.";

/// Run a recipe with every combination of some values, and average over seeds
///
/// Checks every combination before the first one starts. Each is a run of its own in a directory below --out that is named
/// after its values, with its output in a file NAME.log beside it. Runs that are there already are continued or, if they are
/// done, left as they are. The sweep goes on where a run fails, and says so at the end, with exit code 1. For each
/// combination it prints the mean of every result over the seeds, and the standard error of that mean.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES, group = ArgGroup::new("varied").args(["grid", "seeds"]).multiple(true).required(true))]
pub(crate) struct Args {
    /// A recipe's file, or the name of a built-in recipe
    recipe: PathBuf,
    #[command(flatten)]
    sets: Sets,
    /// A value to vary: its path as in --set, and values separated by commas; may be repeated
    #[arg(long, value_name = "PATH=A,B")]
    grid: Vec<String>,
    /// Seeds to run every combination with: 0..3 (that is 0, 1 and 2), 0..=3 or 1,5,7 [default: the recipe's own]
    #[arg(long, value_parser = str::parse::<Seeds>)]
    seeds: Option<Seeds>,
    /// The folder of the sweep, with a run directory for each combination and seed
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Runs at a time, each in a process of its own; they share the threads
    #[arg(long, value_name = "N", default_value = "1", value_parser = at_least_one::<NonZeroUsize>)]
    jobs: NonZeroUsize,
    /// List the runs and what would become of each, and start none
    #[arg(long)]
    dry_run: bool,
    /// How results are written
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// End each training stage after this many optimizer steps
    #[arg(long, value_name = "N", value_parser = at_least_one::<NonZeroU64>)]
    steps: Option<NonZeroU64>,
    #[command(flatten)]
    machine: Machine,
    /// Threads of each run that read images, 0 to read them between steps [default: 1, or 0 with one thread]
    #[arg(long, value_name = "N", help_heading = "Machine")]
    workers: Option<usize>,
}

/// A run of the sweep.
struct Job {
    /// The combination that it is of.
    combination: usize,
    /// What is set in the recipe.
    sets: Vec<String>,
    name: String,
    path: PathBuf,
    state: State,
}

/// What becomes of a run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// It has not begun.
    New,
    /// It goes on.
    Stopped,
    Done,
    /// Another process runs it.
    Elsewhere,
}

impl State {
    fn word(self) -> &'static str {
        match self {
            State::New => "starts",
            State::Stopped => "goes on",
            State::Done => "is done",
            State::Elsewhere => "is run by another process",
        }
    }
}

impl Args {
    pub(crate) fn run(self, session: &Session) -> Result<(), Failure> {
        let axes = self.axes()?;
        let labels = grid::labels(&axes);
        let combinations = combinations(&axes);
        let mut jobs = self.jobs_of(&axes, &labels, &combinations);
        self.check(session, &axes, &combinations, &mut jobs)?;
        if self.dry_run {
            return Ok(output::print(&listed(&jobs))?);
        }
        let told = |text: &str| {
            if !session.verbosity.quiet {
                output::complain(text);
            }
        };
        let ended = self.processes().run(&mut jobs, &told)?;
        for job in jobs.iter_mut().filter(|job| job.state == State::Elsewhere) {
            job.state = taken(&job.path).unwrap_or(State::Elsewhere);
        }
        let done = |job: &&Job| job.state == State::Done;
        let count = jobs.iter().filter(done).count();
        if let Some(stop) = ended.stopped {
            let message = format!("{}: {count} of {} runs are done", stop.name(), jobs.len());
            let failure = Failure::Message { message, help: Vec::new(), code: stop.exit_code() };
            return Err(failure.help("the same command goes on with the others"));
        }
        let mut rows = Vec::new();
        for (at, values) in combinations.into_iter().enumerate() {
            let all: Vec<&Job> = jobs.iter().filter(|job| job.combination == at).collect();
            let paths: Vec<&Path> = all.iter().copied().filter(done).map(|job| job.path.as_path()).collect();
            rows.push(Row::read(values, all.len(), &paths)?);
        }
        let paths: Vec<String> = axes.iter().map(|axis| axis.path.clone()).collect();
        let (text, note) = table::table(&paths, &labels, &rows, self.format);
        output::print(&text)?;
        told(&note);
        ended.failure(&jobs)
    }

    /// What is varied.
    fn axes(&self) -> Result<Vec<Axis>, Failure> {
        let (mut axes, mut faults): (Vec<Axis>, Vec<Diagnostic>) = Default::default();
        for text in &self.grid {
            match Axis::parse(text) {
                Ok(axis) if axes.iter().any(|known| known.path == axis.path) => {
                    faults.push(axis.mistake("this path is varied twice", "name all its values in one `--grid`"));
                }
                Ok(axis) if axis.path == "seed" && self.seeds.is_some() => {
                    faults.push(axis.mistake("`--seeds` varies this already", "name the seeds once"));
                }
                Ok(axis) => axes.push(axis),
                Err(more) => faults.extend(more),
            }
        }
        if faults.is_empty() { Ok(axes) } else { Err(Failure::Recipe(Report(faults))) }
    }

    /// The runs: of each combination one with every seed.
    fn jobs_of(&self, axes: &[Axis], labels: &[String], combinations: &[Vec<String>]) -> Vec<Job> {
        let seeds: Vec<Option<u64>> = match &self.seeds {
            Some(Seeds(seeds)) => seeds.iter().copied().map(Some).collect(),
            None => vec![None],
        };
        let (mut jobs, mut named) = (Vec::new(), Vec::new());
        for (combination, values) in combinations.iter().enumerate() {
            for seed in &seeds {
                let mut sets = self.sets.sets.clone();
                sets.extend(axes.iter().zip(values).map(|(axis, value)| axis.set(value)));
                sets.extend(seed.map(|seed| format!("seed={seed}")));
                let mut parts: Vec<(String, String)> = labels.iter().cloned().zip(values.iter().cloned()).collect();
                parts.extend(seed.map(|seed| ("seed".to_owned(), seed.to_string())));
                named.push(parts);
                let (name, path) = (String::new(), PathBuf::new());
                jobs.push(Job { combination, sets, name, path, state: State::New });
            }
        }
        for (job, name) in jobs.iter_mut().zip(grid::names(&named)) {
            job.path = self.out.join(&name);
            job.name = name;
        }
        jobs
    }

    /// Checks every run, and what is in its directory.
    ///
    /// # Errors
    /// Every mistake, once.
    fn check(
        &self,
        session: &Session,
        axes: &[Axis],
        combinations: &[Vec<String>],
        jobs: &mut [Job],
    ) -> Result<(), Failure> {
        let mut faults = Faults::default();
        let mut seen: Vec<(String, String)> = Vec::new();
        for combination in 0..combinations.len() {
            // What is planned does not depend on the seed.
            let mut plan: Option<Plan> = None;
            for job in jobs.iter_mut().filter(|job| job.combination == combination) {
                let loaded = recipes::load(session.registry, &self.recipe, &job.sets);
                let planned = loaded.and_then(|loaded| {
                    if plan.is_none() {
                        plan = Some(self.plan(&loaded)?);
                    }
                    Ok(loaded)
                });
                let loaded = match planned {
                    Ok(loaded) => loaded,
                    Err(mut report) => {
                        grid::relocate(&mut report, axes);
                        faults.add(report);
                        // Its other seeds have the same mistakes.
                        break;
                    }
                };
                let fingerprint = loaded.fingerprint();
                if let Some((_, same)) = seen.iter().find(|(known, _)| *known == fingerprint) {
                    faults.say(format!("`{same}` and `{}` are the same recipe", job.name));
                    continue;
                }
                let state = plan.as_ref().map_or(Ok(State::New), |plan| self.state(session, job, &loaded, plan));
                match state {
                    Ok(state) => job.state = state,
                    Err(message) => faults.say(message),
                }
                seen.push((fingerprint, job.name.clone()));
            }
        }
        faults.told(combinations.len())
    }

    fn plan(&self, loaded: &Loaded) -> Result<Plan, Report> {
        let options = PlanOptions {
            environment: Environment::Checked,
            missing_weights: MissingWeights::Refused,
            recompute: self.machine.recompute(),
        };
        pipeline::plan(loaded.recipe(), options).map_err(|refusals| loaded.locate_all(&refusals))
    }

    /// What is in the directory of a run.
    fn state(&self, session: &Session, job: &Job, loaded: &Loaded, plan: &Plan) -> Result<State, String> {
        let shown = job.path.display();
        let is_empty = |path: &Path| fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none());
        if job.path.symlink_metadata().is_err() || is_empty(&job.path) {
            return Ok(State::New);
        }
        let dir = match RunDir::look_at(&job.path) {
            Ok(dir) => dir,
            Err(RunError::NotARun { .. }) => return Err(format!("{shown} is there already, and is no run")),
            Err(error) => return Err(error.to_string()),
        };
        let is_running = dir.is_in_use();
        let manifest = match dir.read_manifest() {
            Ok(manifest) => manifest,
            Err(error) => return Err(error.to_string()),
        };
        let Some(manifest) = manifest else {
            return Ok(if is_running { State::Elsewhere } else { State::Stopped });
        };
        if manifest.fingerprint != loaded.fingerprint() {
            let own = recipes::load(session.registry, &dir.recipe_path(), &[]);
            let differences = own.map(|own| diff(own.resolved(), loaded.resolved())).unwrap_or_default();
            let lines: Vec<String> = differences.iter().map(|line| format!("\n  {line}")).collect();
            return Err(format!(
                "the run in {shown} is of another recipe{}{}",
                if lines.is_empty() { "" } else { ":" },
                lines.concat()
            ));
        }
        match pipeline::is_done(plan, &dir, self.steps.map(NonZeroU64::get)) {
            Ok(true) if !is_running => Ok(State::Done),
            Ok(_) if is_running => Ok(State::Elsewhere),
            Ok(_) => Ok(State::Stopped),
            Err(error) => Err(error.to_string()),
        }
    }

    /// How runs are started.
    fn processes(&self) -> Processes {
        let at_a_time = self.jobs.get();
        let threads = (self.machine.threads() / at_a_time).max(1).to_string();
        let mut flags = vec!["--resume-or-start".to_owned(), "--threads".to_owned(), threads];
        flags.extend(self.machine.flags());
        let mut flag = |name: &str, value: Option<String>| {
            flags.extend(value.map(|value| [name.to_owned(), value]).into_iter().flatten());
        };
        flag("--workers", self.workers.map(|workers| workers.to_string()));
        flag("--steps", self.steps.map(|steps| steps.to_string()));
        Processes { recipe: self.recipe.clone(), folder: self.out.clone(), flags, at_a_time }
    }
}

/// What another process has made of a run by now: it runs it, or has ended it.
fn taken(path: &Path) -> Option<State> {
    match overview(path).ok()?.state {
        RunState::Running => Some(State::Elsewhere),
        RunState::Finished => Some(State::Done),
        _ => None,
    }
}

/// Every combination of values, the first path's changing last.
fn combinations(axes: &[Axis]) -> Vec<Vec<String>> {
    let mut all = vec![Vec::new()];
    for axis in axes {
        let with = |values: &Vec<String>| {
            let values = values.clone();
            axis.values().map(move |value| [values.as_slice(), &[value.to_owned()]].concat()).collect::<Vec<_>>()
        };
        all = all.iter().flat_map(with).collect();
    }
    all
}

fn listed(jobs: &[Job]) -> String {
    let mut table = Table::of_words();
    for job in jobs {
        table.row([job.path.display().to_string(), job.state.word().to_owned()]);
    }
    let done = jobs.iter().filter(|job| job.state == State::Done).count();
    format!("{}{} runs, {done} of them done\n", table.render(0), jobs.len())
}

/// Mistakes of all combinations, each once.
#[derive(Default)]
struct Faults {
    recipes: Vec<Diagnostic>,
    /// The text of each of them, and in how many combinations it was found.
    texts: Vec<(String, usize)>,
    others: Vec<String>,
}

impl Faults {
    fn add(&mut self, report: Report) {
        for diagnostic in report.0 {
            let text = crate::render::report(&Report(vec![diagnostic.clone()]));
            match self.texts.iter_mut().find(|(known, _)| *known == text) {
                Some((_, found)) => *found += 1,
                None => {
                    self.texts.push((text, 1));
                    self.recipes.push(diagnostic);
                }
            }
        }
    }

    fn say(&mut self, message: String) {
        self.others.push(message);
    }

    /// # Errors
    /// There is one.
    fn told(self, combinations: usize) -> Result<(), Failure> {
        if self.recipes.is_empty() && self.others.is_empty() {
            return Ok(());
        }
        let with_count = self.recipes.into_iter().zip(&self.texts).map(|(diagnostic, (_, found))| match *found {
            found if found == combinations => diagnostic,
            found => diagnostic.help(format!("in {found} of {combinations} combinations")),
        });
        let report = Report(with_count.collect());
        if self.others.is_empty() {
            return Err(Failure::Recipe(report));
        }
        if !report.0.is_empty() {
            output::complain(&format!("{}\n", Failure::Recipe(report).text()));
        }
        let failure = Failure::mistake(self.others.join("\n"));
        Err(failure.help("name another folder with `--out`, or leave these values out"))
    }
}

impl Ended {
    /// # Errors
    /// Runs failed.
    fn failure(&self, jobs: &[Job]) -> Result<(), Failure> {
        let elsewhere = jobs.iter().filter(|job| job.state == State::Elsewhere).count();
        if elsewhere > 0 {
            output::complain(&format!("{elsewhere} runs are not in the table: another process has them\n"));
        }
        if self.failed.is_empty() {
            return Ok(());
        }
        let lines = self.failed.iter().map(|(job, why)| {
            let log = processes::log_path(&jobs[*job].path);
            format!("\n  {}: {why} ({})", jobs[*job].name, log.display())
        });
        let message = format!("{} of {} runs failed:{}", self.failed.len(), jobs.len(), lines.collect::<String>());
        Err(Failure::failed(message).help("the same command tries these again, and leaves what is done as it is"))
    }
}
