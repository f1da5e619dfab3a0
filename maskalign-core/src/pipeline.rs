//! A recipe's stages, one after another, in a run directory.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::SystemTime,
};

use maskalign_engine::{Context, Recompute};
use maskalign_registry::{Recipe, Refusal};

use crate::{
    components::towers::{StudentRecord, no_student},
    error::{Error, Result},
    plugin::Build,
    run::{
        CheckpointHeader, DataRecord, FileRecord, Manifest, Resumption, RunDir, RunError, StopFlag, fail_point, rfc3339,
    },
    stages::{Progress, StageContext, StagePlan, StageRun},
    weights,
};

/// What is known of every stage before the first step, by name in order.
pub type Plans = Vec<(String, StagePlan)>;

/// How a recipe is planned.
#[derive(Clone, Copy, Debug)]
pub struct PlanOptions {
    /// Whether files may be looked at.
    pub environment: bool,
    /// Whether towers get random weights where theirs cannot be found (timings alone).
    pub random_weights: bool,
    /// Whether blocks are recomputed, for the memory estimate.
    pub recompute: Recompute,
}

/// Checks all that can be known before the first step.
///
/// # Errors
/// Every refusal of every stage, with its path from the recipe's root.
pub fn plan(recipe: &Recipe, options: PlanOptions) -> Result<Plans, Vec<Refusal>> {
    let mut students = BTreeMap::new();
    let mut failed = Vec::new();
    let mut plans = Vec::new();
    let mut refusals = Vec::new();
    for (name, slot) in &recipe.stages {
        let cx = StageContext {
            name,
            seed: recipe.seed,
            students: &students,
            environment: options.environment,
            random_weights: options.random_weights,
            recompute: options.recompute,
        };
        let planned = match Build::build(slot) {
            Ok(stage) => stage.plan(&cx),
            Err(refusal) => Err(vec![refusal]),
        };
        match planned {
            Ok(plan) => {
                if let Some(student) = &plan.student {
                    students.insert(name.clone(), student.clone());
                }
                plans.push((name.clone(), plan));
            }
            Err(more) => {
                // A stage that builds on one that was refused is not blamed for that.
                let follows = |r: &Refusal| failed.iter().any(|stage: &String| r.message == no_student(stage));
                refusals.extend(more.into_iter().filter(|r| !follows(r)).map(|r| r.under(name).under("stages")));
                failed.push(name.clone());
            }
        }
    }
    match refusals.is_empty() {
        true => Ok(plans),
        false => Err(refusals),
    }
}

/// What a run is told besides its recipe.
pub struct RunOptions<'a> {
    /// The recipe with every default, as YAML, for the run directory.
    pub resolved: &'a str,
    /// Its fingerprint.
    pub fingerprint: &'a str,
    /// Ends each training stage after this many steps.
    pub step_limit: Option<u64>,
    /// Threads that read images.
    pub workers: usize,
    /// For the manifest.
    pub command_line: Vec<String>,
    /// The commit the binary was built from, where known.
    pub commit: Option<String>,
    /// Name of the device.
    pub device: String,
    /// Set by Ctrl-C, SIGTERM and SIGHUP.
    pub stop: &'a StopFlag,
    /// Told of what happens.
    pub progress: &'a mut dyn Progress,
}

/// Runs the stages in order, skipping those that an interrupted run finished. Gives each stage's results.
///
/// # Errors
/// Whatever ends a run early.
pub fn run(
    cx: &Context,
    recipe: &Recipe,
    plans: &Plans,
    dir: &RunDir,
    options: RunOptions,
) -> Result<serde_json::Map<String, serde_json::Value>> {
    let mut manifest = manifest(cx, recipe, plans, dir.read_manifest()?, &options)?;
    dir.write_recipe(options.resolved)?;
    dir.write_manifest(&manifest)?;
    let mut students: BTreeMap<String, StudentRecord> = BTreeMap::new();
    let mut results = serde_json::Map::new();
    let mut metric_records = 0;
    for (place, ((name, plan), slot)) in plans.iter().zip(recipe.stages.values()).enumerate() {
        let finished = dir.finished_stage(name)?;
        let wanted = plan.steps.map_or(0, |all| options.step_limit.map_or(all, |limit| all.min(limit)));
        if finished.as_ref().is_some_and(|(finished, _)| finished.fingerprint != options.fingerprint) {
            return Err(Error::Usage(format!("stage `{name}` of this run was finished with another recipe")));
        }
        if let Some((finished, left)) = finished.filter(|(finished, _)| finished.step >= wanted) {
            tracing::info!("stage `{name}` is finished already");
            metric_records = finished.metrics_records;
            if let Some(record) = &plan.student {
                let weights = Some(Arc::new(left.into_student()));
                students.insert(name.clone(), StudentRecord { weights, ..record.clone() });
            }
            results.insert(name.clone(), finished.results);
            continue;
        }
        // `--steps` may have ended it early; what came after it built on less.
        dir.reopen_stage(name)?;
        plans[place + 1..].iter().try_for_each(|(later, _)| dir.discard_stage(later))?;
        options.progress.stage(name, plan);
        plan.warnings.iter().for_each(|warning| tracing::warn!("stage `{name}`: {warning}"));
        warn_of_memory(name, plan);
        let stage = StageContext {
            name,
            seed: recipe.seed,
            students: &students,
            environment: true,
            random_weights: false,
            recompute: cx.recompute(),
        };
        let run = StageRun {
            cx: cx.clone(),
            stage,
            dir,
            fingerprint: options.fingerprint,
            stop: options.stop,
            progress: &mut *options.progress,
            step_limit: options.step_limit,
            workers: options.workers,
            metric_records,
        };
        let located = |error| match error {
            Error::Refused(refusal) => Error::Refused(refusal.under(name).under("stages")),
            other => other,
        };
        let outcome = Build::build(slot).map_err(Error::from).and_then(|s| s.run(run)).map_err(located)?;
        metric_records = outcome.metric_records;
        if !dir.is_finished(name)? {
            let header = CheckpointHeader {
                stage: name.clone(),
                step: 0,
                fingerprint: options.fingerprint.to_string(),
                metrics_records: metric_records,
                student: Vec::new(),
                meta: serde_json::Value::Null,
            };
            dir.finish_stage(&header, &[], outcome.results.clone())?;
        }
        fail_point("stage", "after");
        results.insert(name.clone(), outcome.results);
        students.extend(outcome.student.map(|student| (name.clone(), student)));
    }
    manifest.ended = Some(rfc3339(SystemTime::now()));
    manifest.peak_memory_mib = maskalign_engine::peak_memory_mib();
    dir.write_manifest(&manifest)?;
    Ok(results)
}

/// Says before the first step that a stage will not fit: the allocator ends the process without a word of advice.
fn warn_of_memory(stage: &str, plan: &StagePlan) {
    let gib = |mib: f64| mib / 1024.0;
    let needed = plan.memory as f64 / f64::from(1 << 20);
    if let Some(free) = maskalign_engine::available_memory_mib().filter(|free| needed > *free) {
        tracing::warn!(
            "stage `{stage}` needs about {:.1} GiB, and {:.1} GiB are free: lower `batch.micro`, or use `--recompute`",
            gib(needed),
            gib(free)
        );
    }
}

/// The files that `weights` name, wherever a component of the recipe has such an option.
fn weight_files(recipe: &Recipe) -> Result<Vec<FileRecord>, RunError> {
    let mut named = BTreeSet::new();
    let mut open: Vec<serde_json::Value> = recipe.stages.values().map(|slot| slot.options_value()).collect();
    while let Some(value) = open.pop() {
        match value {
            serde_json::Value::Array(items) => open.extend(items),
            serde_json::Value::Object(mut entries) => {
                named.extend(entries.get("weights").and_then(|weights| weights.as_str()).map(str::to_owned));
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

/// The manifest of a run that begins, or goes on from `earlier`.
fn manifest(
    cx: &Context,
    recipe: &Recipe,
    plans: &Plans,
    earlier: Option<Manifest>,
    options: &RunOptions,
) -> Result<Manifest> {
    let now = rfc3339(SystemTime::now());
    let data = plans.iter().flat_map(|(_, plan)| &plan.data);
    let begun = Manifest {
        version: env!("CARGO_PKG_VERSION").to_string(),
        commit: options.commit.clone(),
        command_line: options.command_line.clone(),
        working_directory: std::env::current_dir().ok(),
        seed: recipe.seed,
        device: options.device.clone(),
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
        started: now.clone(),
        ended: None,
        peak_memory_mib: None,
        resumed: Vec::new(),
    };
    let Some(earlier) = earlier else { return Ok(begun) };
    let differences = earlier.differences(&begun);
    if !differences.is_empty() {
        return Err(Error::Usage(format!(
            "the run cannot go on exactly, since it reads something else now:\n  {}\nrestore it, or start a new run",
            differences.join("\n  ")
        )));
    }
    let resumption = Resumption { at: now, command_line: begun.command_line };
    Ok(Manifest {
        command_line: earlier.command_line,
        working_directory: earlier.working_directory,
        started: earlier.started,
        resumed: earlier.resumed.into_iter().chain([resumption]).collect(),
        ..begun
    })
}
