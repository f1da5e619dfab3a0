//! Stages: what is known before the first step, and what two steps leave.
//!
//! A stage that names an earlier one, as `{stage: NAME}`, is given a small student in its place and a classifier of it, and
//! the embedded images are a few: a plugin's evaluation runs here as it is written.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
};

use maskalign_engine::{Device, Recompute};
use maskalign_registry::{Kind, Slot, StageTag};
use serde_json::{Value, json};

use super::{Faults, LARGE, fused, tower::small_student};
use maskalign_core::{
    components::towers::{Environment, MissingWeights, StudentPlan, TrainedStudents},
    error::{Error, Result},
    events::{Events, MetricsFile, StageSummary},
    nn::{Init, Reach},
    plugin::Build,
    run::{CheckpointHeader, Mode, RunDir, StopFlag},
    stages::{Finetune, PlannedClassifier, PlannedStage, Stage, StageContext, StageRun, Task},
    weights::{TensorMap, TensorRef},
};

/// Embedded images that a dataset is reduced to.
const IMAGES: usize = 64;

/// The side of the embedded images in pixels. The students of the stages that an example names are made for it.
const SIZE: usize = 28;

pub(super) fn check(text: &str, files: Environment, faults: &mut Faults) {
    let Some(mut options) = faults.slot(Kind::Stage, text) else { return };
    let mut named = BTreeSet::new();
    shrink(&mut options, &mut named);
    let slot: Result<Slot<StageTag>, _> = serde_json::from_value(options);
    let Some(slot) = faults.expect("filling its defaults", slot) else { return };
    let Some(stage) = faults.expect("building it on the CPU", slot.build()) else { return };
    let Some(earlier) = faults.expect("building a small student", Earlier::new(&named)) else { return };
    let Some((planned, environment)) = plan(&*stage, &earlier, files, faults) else { return };
    let summary = planned.summary();
    if environment == Environment::Ignored || summary.parameters > LARGE {
        return;
    }
    if let Err(error) = run(&*planned, &earlier, faults) {
        faults.add(format_args!("it plans, but does not run: {error}"));
    }
}

/// Reduces datasets to a few of the embedded images, and notes the stages that are named.
fn shrink(options: &mut Value, named: &mut BTreeSet<String>) {
    match options {
        Value::Array(items) => items.iter_mut().for_each(|item| shrink(item, named)),
        Value::Object(entries) => {
            if entries.get("type") == Some(&json!("sample")) {
                let limit = entries.get("limit").and_then(Value::as_u64).map_or(IMAGES, |limit| limit as usize);
                entries.insert("limit".into(), json!(limit.min(IMAGES)));
            }
            if let (1, Some(stage)) = (entries.len(), entries.get("stage").and_then(Value::as_str)) {
                named.insert(stage.to_string());
            }
            entries.values_mut().for_each(|value| shrink(value, named));
        }
        _ => {}
    }
}

/// The earlier stages, as far as a later one can tell.
struct Earlier {
    students: BTreeMap<String, StudentPlan>,
    classifiers: BTreeMap<String, Arc<dyn PlannedClassifier>>,
    trained: TrainedStudents,
    /// What each stage leaves in the run directory.
    left: BTreeMap<String, TensorMap>,
}

impl Earlier {
    fn new(named: &BTreeSet<String>) -> Result<Earlier> {
        let tower = small_student(SIZE);
        let reach = Reach { blocks: tower.shape().arch.depth, norm: true, qkv: false };
        let mut earlier = Earlier {
            students: BTreeMap::new(),
            classifiers: BTreeMap::new(),
            trained: TrainedStudents::default(),
            left: BTreeMap::new(),
        };
        for stage in named {
            let init = Init::new(&Device::Cpu, 1, stage.as_str());
            let parameters = tower.build(&init, &earlier.trained)?.to_host();
            earlier.trained.insert(stage, Arc::new(parameters));
            let student = StudentPlan { tower: Arc::clone(&tower), reach, init_scope: stage.clone() };
            earlier.students.insert(stage.clone(), student);
        }
        let (classifiers, left) = earlier.classifiers()?;
        Ok(Earlier { classifiers, left, ..earlier })
    }

    /// A classifier of each student before its training, as if that had come after the student's stage under its name.
    fn classifiers(&self) -> Result<(BTreeMap<String, Arc<dyn PlannedClassifier>>, BTreeMap<String, TensorMap>)> {
        let (mut classifiers, mut left) = (BTreeMap::new(), BTreeMap::new());
        for stage in self.students.keys() {
            let finetune: Finetune = serde_json::from_value(json!({
                "epochs": 1, "batch": { "effective": 16 },
                "data": { "dataset": { "type": "sample", "split": "train", "limit": IMAGES } },
                "student": { "type": "vit", "weights": { "stage": stage } },
                "optimizer": { "type": "adamw", "base_lr": 0.001 }, "schedule": { "type": "constant" },
            }))
            .map_err(|error| Error::Usage(error.to_string()))?;
            let context = StageContext { name: stage, ..self.context(Environment::Checked) };
            let planned = finetune.plan_finetune(&context).map_err(|mut all| Error::Refused(all.swap_remove(0)))?;
            let mut model = planned.model(&planned.init(&fused()), &self.trained)?;
            let mut kept = TensorMap::new();
            model.visit(&mut |p| {
                if p.role().is_kept() {
                    kept.insert(p.name.clone(), p.to_host());
                }
            });
            left.insert(stage.clone(), kept);
            classifiers.extend(planned.classifier().map(|classifier| (stage.clone(), classifier)));
        }
        Ok((classifiers, left))
    }

    /// Writes what the earlier stages leave.
    fn write(&self, dir: &RunDir) -> Result<()> {
        for (stage, left) in &self.left {
            let header = CheckpointHeader {
                stage: stage.clone(),
                step: 0,
                fingerprint: "example".into(),
                metrics_records: 0,
                student: self.trained.get(stage)?.keys().cloned().collect(),
                meta: Value::Null,
            };
            dir.finish_stage(&header, &TensorRef::all_of(left), json!({}))?;
        }
        Ok(())
    }

    fn context(&self, environment: Environment) -> StageContext<'_> {
        StageContext {
            name: "example",
            seed: 0,
            students: &self.students,
            classifiers: &self.classifiers,
            environment,
            missing_weights: match environment {
                Environment::Checked => MissingWeights::Refused,
                Environment::Ignored => MissingWeights::Random,
            },
            recompute: Recompute::Never,
        }
    }
}

/// The planned stage: as it runs, if the files that it names are or must be there; otherwise as planned without them.
fn plan(
    stage: &dyn Stage,
    earlier: &Earlier,
    files: Environment,
    faults: &mut Faults,
) -> Option<(Box<dyn PlannedStage>, Environment)> {
    let environment = match stage.plan(&earlier.context(Environment::Checked)) {
        Err(_) if files == Environment::Ignored => Environment::Ignored,
        _ => Environment::Checked,
    };
    let plans = [(); 2].map(|()| {
        stage
            .plan(&earlier.context(environment))
            .map_err(|refusals| refusals.iter().map(|refusal| refusal.to_string()).collect::<Vec<_>>().join("; "))
    });
    let [planned, again] = plans.map(|plan| faults.expect("planning its example", plan));
    let (planned, again) = (planned?, again?);
    let (first, second) = (planned.summary(), again.summary());
    faults.unless(first.memory > 0, "it plans no memory");
    faults.unless(first.trainable <= first.parameters, "it trains more parameters than it has");
    let known = |plan: &StageSummary| (plan.images, plan.parameters, plan.trainable, plan.steps, plan.memory);
    faults.unless(known(first) == known(second), "it plans differently the second time");
    Some((planned, environment))
}

/// What a stage leaves: its results, and its student's parameters.
type Left = (Value, Option<Vec<f32>>);

/// Runs two steps: twice without a break, and once with a stop between them.
fn run(planned: &dyn PlannedStage, earlier: &Earlier, faults: &mut Faults) -> Result<()> {
    let folder = tempfile::tempdir().map_err(|error| Error::Usage(error.to_string()))?;
    let leaves =
        |dir: &str, mode, steps| -> Result<Left> { leave(planned, earlier, &folder.path().join(dir), mode, steps) };
    let whole = leaves("whole", Mode::Fresh, 2)?;
    let (results, student) = &whole;
    faults.unless(results.is_object(), "its results are no mapping: `summary.json` has them by name");
    let promised = planned.summary().student.is_some();
    faults.unless(
        student.is_some() == promised,
        if promised { "it plans a student, and leaves none" } else { "it leaves a student that it did not plan" },
    );
    faults.unless(
        student.iter().flatten().all(|value| value.is_finite()),
        "its student has values that are not finite after two steps",
    );
    faults.unless(leaves("again", Mode::Fresh, 2)? == whole, "a second run leaves something else");
    leaves("stopped", Mode::Fresh, 1)?;
    faults.unless(leaves("stopped", Mode::Resume, 2)? == whole, "a run that was resumed leaves something else");
    Ok(())
}

fn leave(planned: &dyn PlannedStage, earlier: &Earlier, dir: &Path, mode: Mode, steps: u64) -> Result<Left> {
    let dir = RunDir::create(dir, mode)?;
    dir.write_recipe("name: example\n")?;
    dir.reopen_stage("example")?;
    if mode == Mode::Fresh {
        earlier.write(&dir)?;
    }
    let outcome = planned.run(StageRun {
        cx: &fused(),
        name: "example",
        seed: 0,
        trained: &earlier.trained,
        dir: &dir,
        fingerprint: "example",
        stop: &StopFlag::new(),
        events: &mut Events::new(vec![Box::new(MetricsFile::new(&dir))]),
        step_limit: Some(steps),
        workers: 0,
        replay: None,
    })?;
    let student = outcome.student.map(|parameters| parameters.values().flat_map(|p| p.data.iter().copied()).collect());
    Ok((outcome.results, student))
}
