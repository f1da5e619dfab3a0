//! A recipe's stages, one after another, in a run directory.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use maskalign_engine::{Context, Recompute};
use maskalign_registry::{Code, Kind, Recipe, Refusal};

use crate::{
    components::towers::{Environment, MissingWeights, TrainedStudents},
    error::{Error, Result},
    events::{Event, Events, Mark},
    plugin::Build,
    run::{
        BestRecord, CheckpointHeader, DataRecord, FailedStep, FileRecord, Manifest, Origin, Resumption, RunDir,
        RunError, StageRecord, StopFlag, as_text, fail_point, this_moment,
    },
    stages::{PlannedStage, StageContext, StageRun, StageSummary},
    weights,
};

/// A recipe whose every stage fits: what runs.
pub struct Plan {
    stages: Vec<(String, Box<dyn PlannedStage>)>,
    unread: Vec<(String, Vec<Refusal>)>,
}

impl Plan {
    /// What is known of every stage before the first step, by name in order.
    pub fn summaries(&self) -> impl Iterator<Item = (&str, &StageSummary)> {
        self.stages.iter().map(|(name, stage)| (name.as_str(), stage.summary()))
    }

    /// The stages that are left out of a plan without a look at files, with what only files would tell.
    pub fn unread(&self) -> impl Iterator<Item = (&str, &[Refusal])> {
        self.unread.iter().map(|(name, refusals)| (name.as_str(), &refusals[..]))
    }
}

/// How a recipe is planned.
#[derive(Clone, Copy, Debug)]
pub struct PlanOptions {
    /// Whether files are looked at.
    pub environment: Environment,
    /// What becomes of a tower whose weights cannot be found.
    pub missing_weights: MissingWeights,
    /// What is kept for the backward pass, for the memory estimate.
    pub recompute: Recompute,
}

/// Checks all that can be known before the first step, and gives what runs.
///
/// # Errors
/// Every refusal of every stage, with its path from the recipe's root.
pub fn plan(recipe: &Recipe, options: PlanOptions) -> Result<Plan, Vec<Refusal>> {
    let PlanOptions { environment, missing_weights, recompute } = options;
    let (mut students, mut classifiers) = (BTreeMap::new(), BTreeMap::new());
    let mut failed = BTreeSet::new();
    let mut stages = Vec::new();
    let mut refusals = Vec::new();
    let mut unread: Vec<(String, Vec<Refusal>)> = Vec::new();
    for (name, slot) in &recipe.stages {
        let cx = StageContext {
            name,
            seed: recipe.seed,
            students: &students,
            classifiers: &classifiers,
            environment,
            missing_weights,
            recompute,
        };
        let planned = match Build::build(slot) {
            Ok(stage) => stage.plan(&cx),
            Err(refusal) => Err(vec![refusal]),
        };
        match planned {
            Ok(stage) => {
                if let Some(student) = &stage.summary().student {
                    students.insert(name.clone(), student.clone());
                }
                if let Some(classifier) = stage.classifier() {
                    classifiers.insert(name.clone(), classifier);
                }
                stages.push((name.clone(), stage));
            }
            Err(more) => {
                // A stage that builds on one that was refused is not blamed for that.
                let is_unread = |stage: &str| unread.iter().any(|(name, _)| name == stage);
                let builds_on_unread = more.iter().any(|refusal| refusal.follows_from(Kind::Stage, is_unread));
                let own = more.into_iter().filter(|r| !r.follows_from(Kind::Stage, |stage| failed.contains(stage)));
                let mut own: Vec<Refusal> = own.map(|r| r.under(name).under("stages")).collect();
                if own.is_empty() && builds_on_unread {
                    let message = "it builds on a stage of which files would tell more";
                    own.push(Refusal::whole(message).unread().under(name).under("stages"));
                }
                match !own.is_empty() && own.iter().all(|refusal| *refusal.code() == Code::Unread) {
                    true => unread.push((name.clone(), own)),
                    false => refusals.extend(own),
                }
                failed.insert(name.clone());
            }
        }
    }
    match refusals.is_empty() {
        true => Ok(Plan { stages, unread }),
        false => Err(refusals),
    }
}

/// What becomes of a run that would not go on exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deviation {
    /// It is refused.
    Refused,
    /// It goes on, and the manifest says so.
    Accepted,
}

/// What a run is told besides its recipe.
pub struct RunOptions<'a> {
    /// The recipe with every default, as YAML, for the run directory.
    pub resolved: &'a str,
    /// Its fingerprint.
    pub fingerprint: &'a str,
    /// Ends each training stage after this many steps.
    pub step_limit: Option<u64>,
    /// What becomes of a resumed run on another instruction set, whose last bits differ.
    pub other_kernels: Deviation,
    /// What becomes of a resumed run whose `metrics.jsonl` is damaged before its checkpoints.
    pub lost_metrics: Deviation,
    /// Threads that read images.
    pub workers: usize,
    /// What a fork has taken over into its directory; for a run that begins.
    pub origin: Option<Origin>,
    /// For the manifest.
    pub command_line: Vec<String>,
    /// The commit the binary was built from, where known.
    pub commit: Option<String>,
    /// Set by Ctrl-C, SIGTERM and SIGHUP.
    pub stop: &'a StopFlag,
    /// Told of what happens; [`MetricsFile`](crate::events::MetricsFile) among them.
    pub events: Events<'a>,
}

/// Runs the stages in order, skipping those that an interrupted run finished. Gives each stage's results.
///
/// # Errors
/// Whatever ends a run early.
pub fn run(
    cx: &Context,
    recipe: &Recipe,
    plan: Plan,
    dir: &RunDir,
    mut options: RunOptions,
) -> Result<serde_json::Map<String, serde_json::Value>> {
    let earlier = dir.read_manifest()?;
    if earlier.is_none() && options.origin.is_none() && dir.is_trained()? {
        return Err(Error::Usage(format!(
            "{} is gone, so that what the run began with is not known: put back a copy of it, or start a new run",
            dir.manifest_path().display()
        )));
    }
    // A run of which nothing is left to do shows its results anywhere.
    let mut computed_on = earlier.as_ref().map(|earlier| earlier.computed_on().to_string());
    let idle = earlier.is_some() && has_every_stage(&plan, dir, options.step_limit)?;
    if !idle {
        same_kernels(cx, computed_on.take(), &options)?;
    }
    let mut manifest = manifest(cx, recipe, &plan, earlier, &options)?;
    if let Some(resumption) = manifest.resumed.last_mut() {
        resumption.isa = (!idle).then(|| cx.operators());
        if options.lost_metrics == Deviation::Accepted {
            resumption.lost_metrics = dir.salvage_metrics()?;
        }
    }
    dir.write_recipe(options.resolved)?;
    dir.write_manifest(&manifest)?;
    let names: Vec<String> = plan.stages.iter().map(|(name, _)| name.clone()).collect();
    let mut trained = TrainedStudents::default();
    let mut results = serde_json::Map::new();
    let mut passed_over = None;
    for (place, (name, stage)) in plan.stages.into_iter().enumerate() {
        let summary = stage.summary();
        let finished = dir.finished_stage(&name)?;
        let wanted = wanted_steps(summary, options.step_limit);
        if finished.as_ref().is_some_and(|(finished, _)| finished.fingerprint != options.fingerprint) {
            return Err(Error::Usage(format!("stage `{name}` of this run was finished with another recipe")));
        }
        if let Some((finished, left)) = finished.filter(|(finished, _)| finished.is_complete(wanted)) {
            dir.check_metrics(finished.metrics_records)?;
            tracing::info!("stage `{name}` is finished already");
            options.events.pass_over(finished.metrics_records);
            if summary.student.is_some() {
                trained.insert(&name, Arc::new(left.into_student()));
            }
            results.insert(name.clone(), finished.results);
            passed_over = Some((name, finished.metrics_records, finished.step));
            continue;
        }
        passed_over = None;
        if let (Some(then), Some(resumption)) = (computed_on.take(), manifest.resumed.last_mut()) {
            // What a stage left is damaged, and it is made again.
            same_kernels(cx, Some(then), &options)?;
            resumption.isa = Some(cx.operators());
            dir.write_manifest(&manifest)?;
        }
        if dir.is_finished(&name)? {
            // Nothing is taken away before it is known what to go on from.
            dir.latest_checkpoint(&name)?;
        }
        // `--steps` may have ended it early; what came after it built on less.
        dir.reopen_stage(&name)?;
        names[place + 1..].iter().try_for_each(|later| dir.discard_stage(later))?;
        if let Some(resumption) = manifest.resumed.last_mut().filter(|resumption| resumption.stage.is_none()) {
            resumption.stage = Some(name.clone());
            resumption.step = dir.checkpoints(&name)?.last().map(|(step, _)| *step);
            dir.write_manifest(&manifest)?;
        }
        options.events.send(Event::StageStarted { stage: &name, summary })?;
        for text in summary.warnings.iter().cloned().chain(memory_warning(summary)) {
            options.events.send(Event::Warned { stage: &name, text: &text })?;
        }
        let run = StageRun {
            cx,
            name: &name,
            seed: recipe.seed,
            trained: &trained,
            dir,
            fingerprint: options.fingerprint,
            stop: options.stop,
            events: &mut options.events,
            step_limit: options.step_limit,
            workers: options.workers,
            replay: None,
        };
        let outcome = stage.run(run).map_err(|error| match error {
            Error::Refused(refusal) => Error::Refused(refusal.under(&name).under("stages")),
            other => other,
        })?;
        if !dir.is_finished(&name)? {
            options.events.sync()?;
            let header = CheckpointHeader {
                stage: name.clone(),
                step: 0,
                fingerprint: options.fingerprint.to_string(),
                metrics_records: options.events.records(),
                student: Vec::new(),
                meta: serde_json::Value::Null,
            };
            dir.finish_stage(&header, &[], outcome.results.clone())?;
        }
        fail_point("stage", "after");
        options.events.send(Event::StageEnded { stage: &name, results: &outcome.results })?;
        if let Some(student) = outcome.student {
            trained.insert(&name, student);
        }
        results.insert(name, outcome.results);
    }
    if let Some((stage, records, step)) = passed_over.filter(|_| dir.metrics_path().exists()) {
        // Nothing was left to do: what follows the last stage's records is none of the run's.
        options.events.rewind(Mark { records, stage: &stage, step })?;
    }
    options.events.sync()?;
    dir.still_has(names.iter())?;
    manifest.best = results.iter().filter_map(|(stage, results)| BestRecord::of(stage, results)).collect();
    manifest.ended = Some(this_moment());
    manifest.peak_memory_mib = maskalign_engine::peak_memory_mib();
    dir.write_manifest(&manifest)?;
    dir.still_there()?;
    Ok(results)
}

/// A step that failed, as it was then and as it is when it is made again.
pub struct Replay {
    /// What the run left of it.
    pub then: FailedStep,
    /// What came of it now.
    pub now: FailedStep,
}

/// Makes the last step again of which a run kept that it was not finite; of the given stage, or else of the first that has
/// one. The run's directory is read, and nothing in it is changed.
///
/// # Errors
/// No step failed; a record of it is damaged; the recipe is not the run's.
pub fn replay(
    cx: &Context,
    recipe: &Recipe,
    fingerprint: &str,
    plan: &Plan,
    dir: &RunDir,
    stage: Option<&str>,
) -> Result<Replay> {
    if let Some(stage) = stage.filter(|stage| plan.stages.iter().all(|(name, _)| name != stage)) {
        let known: Vec<&str> = plan.stages.iter().map(|(name, _)| name.as_str()).collect();
        return Err(Error::Usage(format!("the run has no stage `{stage}`; its stages: {}", known.join(", "))));
    }
    let mut trained = TrainedStudents::default();
    for (name, planned) in &plan.stages {
        let failed = match stage.is_none_or(|stage| stage == name) {
            true => dir.failed(name)?,
            false => None,
        };
        let Some((then, state)) = failed else {
            if let Some(done) = dir.read_done(name)?.filter(|_| planned.summary().student.is_some()) {
                trained.insert(name, Arc::new(dir.read_final(name, &done)?.into_student()));
            }
            continue;
        };
        if state.header.fingerprint != fingerprint {
            return Err(Error::Usage(format!("the step of stage `{name}` that failed is of another recipe")));
        }
        let ended = planned.run(StageRun {
            cx,
            name,
            seed: recipe.seed,
            trained: &trained,
            dir,
            fingerprint,
            stop: &StopFlag::new(),
            events: &mut Events::new(Vec::new()),
            step_limit: None,
            workers: 0,
            replay: Some(&state),
        });
        return match ended {
            Err(Error::Replayed(now)) => Ok(Replay { then, now: *now }),
            Err(error) => Err(error),
            Ok(_) => Err(Error::Usage(format!("stage `{name}` does not train by steps that can be made again"))),
        };
    }
    let of = stage.map_or(String::new(), |stage| format!(" of stage `{stage}`"));
    let dir = dir.path().display();
    Err(Error::Usage(format!("no step{of} of the run in {dir} was kept for a loss or gradient that is not finite")))
}

/// Whether nothing is left to do of a run: it has ended, and its stages have made the steps that the plan asks for.
///
/// # Errors
/// A record of it is damaged, or of an earlier version.
pub fn is_done(plan: &Plan, dir: &RunDir, step_limit: Option<u64>) -> Result<bool> {
    let has_ended = dir.read_manifest()?.is_some_and(|manifest| manifest.ended.is_some());
    Ok(has_ended && has_every_stage(plan, dir, step_limit)?)
}

/// Whether every stage has been finished with the steps that are asked for.
fn has_every_stage(plan: &Plan, dir: &RunDir, step_limit: Option<u64>) -> Result<bool> {
    for (name, summary) in plan.summaries() {
        if dir.read_done(name)?.is_none_or(|done| !done.is_complete(wanted_steps(summary, step_limit))) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The steps that a stage is to make, 0 for one that makes none.
fn wanted_steps(summary: &StageSummary, step_limit: Option<u64>) -> u64 {
    summary.steps.map_or(0, |all| step_limit.map_or(all, |limit| all.min(limit)))
}

/// Refuses to go on with other kernels, unless that is accepted.
fn same_kernels(cx: &Context, then: Option<String>, options: &RunOptions) -> Result<()> {
    let now = cx.operators();
    match then.filter(|then| *then != now) {
        None => Ok(()),
        Some(then) if options.other_kernels == Deviation::Accepted => {
            tracing::warn!(
                "the run was computed with kernels `{then}` and goes on with `{now}`: it will not end with the bits of one \
                 that was not interrupted"
            );
            Ok(())
        }
        Some(then) => Err(Error::Usage(format!(
            "the run was computed with kernels `{then}`, and would go on with `{now}`, whose last bits differ: choose those \
             with `MASKALIGN_ISA`, resume it on a machine that has them, or accept other bits with `--accept-other-kernels`"
        ))),
    }
}

/// Says before the first step that a stage will not fit: the allocator ends the process without a word of advice.
fn memory_warning(summary: &StageSummary) -> Option<String> {
    let gib = |mib: f64| mib / 1024.0;
    let needed = summary.memory as f64 / f64::from(1 << 20);
    let free = maskalign_engine::available_memory_mib().filter(|free| needed > *free)?;
    Some(format!(
        "it needs about {:.1} GiB, and {:.1} GiB are free: lower `batch.micro`, or use `--recompute`",
        gib(needed),
        gib(free)
    ))
}

/// The files that `weights` name, wherever a component of the recipe has such an option.
fn weight_files(recipe: &Recipe) -> Result<Vec<FileRecord>, RunError> {
    let mut named = BTreeSet::new();
    let mut open: Vec<serde_json::Value> = recipe.stages.values().map(|slot| slot.options_value()).collect();
    while let Some(value) = open.pop() {
        match value {
            serde_json::Value::Array(items) => open.extend(items),
            serde_json::Value::Object(mut entries) => {
                let weights = entries.get("weights").map(|weights| weights.get("path").unwrap_or(weights));
                named.extend(weights.and_then(|weights| weights.as_str()).map(str::to_owned));
                open.extend(entries.values_mut().map(serde_json::Value::take));
            }
            _ => {}
        }
    }
    let mut records = Vec::new();
    for spec in named {
        if let Some(content) = spec.strip_prefix("embedded://").and_then(crate::embedded::weights_file) {
            records.push(FileRecord::of_bytes(&spec, content));
            continue;
        }
        let found = weights::locate(&spec).ok().filter(|path| path.exists());
        for file in found.and_then(|path| weights::files_of(&path).ok()).into_iter().flatten() {
            records.push(FileRecord::of(&file)?);
        }
    }
    Ok(records)
}

/// The manifest's record of a stage.
fn stage_record(name: &str, summary: &StageSummary) -> StageRecord {
    let left = summary.student.as_ref().filter(|_| summary.trainable > 0);
    StageRecord {
        name: name.to_owned(),
        images: summary.images.map(|images| images as u64),
        parameters: summary.parameters as u64,
        trainable: summary.trainable as u64,
        image_size: left.map(|student| student.shape().image_size as u64),
    }
}

/// The manifest of a run that begins, or goes on from `earlier`.
fn manifest(
    cx: &Context,
    recipe: &Recipe,
    plan: &Plan,
    earlier: Option<Manifest>,
    options: &RunOptions,
) -> Result<Manifest> {
    let now = this_moment();
    let data = plan.summaries().flat_map(|(_, summary)| &summary.data);
    let begun = Manifest {
        version: env!("CARGO_PKG_VERSION").to_string(),
        commit: options.commit.clone(),
        command_line: options.command_line.clone(),
        working_directory: std::env::current_dir().ok().map(|folder| as_text(&folder)),
        fingerprint: options.fingerprint.to_string(),
        seed: recipe.seed,
        device: cx.device().name(),
        threads: cx.threads(),
        isa: cx.operators(),
        weights: weight_files(recipe)?,
        data: data
            .map(|(stage, images, fingerprint)| DataRecord {
                stage: stage.clone(),
                images: *images as u64,
                fingerprint: fingerprint.clone(),
            })
            .collect(),
        stages: plan.summaries().map(|(name, summary)| stage_record(name, summary)).collect(),
        best: Vec::new(),
        started: now.clone(),
        ended: None,
        peak_memory_mib: None,
        origin: options.origin.clone(),
        resumed: Vec::new(),
    };
    let Some(earlier) = earlier else { return Ok(begun) };
    if earlier.fingerprint != begun.fingerprint {
        return Err(Error::Usage(
            "the recipe is not the one that the run's manifest.json names: put back `recipe.resolved.yaml`, name the recipe \
             that the run began with, or start a new run"
                .into(),
        ));
    }
    let differences = earlier.differences(&begun);
    if !differences.is_empty() {
        return Err(Error::Usage(format!(
            "the run cannot go on exactly, since it reads something else now:\n  {}\nrestore it, or start a new run",
            differences.join("\n  ")
        )));
    }
    let resumption = Resumption { at: now, command_line: begun.command_line, ..Resumption::default() };
    Ok(Manifest {
        command_line: earlier.command_line,
        working_directory: earlier.working_directory,
        started: earlier.started,
        isa: earlier.isa,
        origin: earlier.origin,
        resumed: earlier.resumed.into_iter().chain([resumption]).collect(),
        ..begun
    })
}
