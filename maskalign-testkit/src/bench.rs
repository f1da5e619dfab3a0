//! Benchmarks of the stages' own steps on synthetic images.

use std::{collections::BTreeMap, time::Instant};

use maskalign_engine::peak_memory_mib;
use maskalign_engine::{
    Context, ImageBatch, Tape,
    ops::{self},
    random::Stream,
};
use maskalign_registry::{Recipe, Refusal, decode_options};
use serde::Serialize;
use serde_json::{Value, json};

use maskalign_core::{
    components::{
        students::StudentModel,
        towers::{Environment, MissingWeights, StudentPlan, TowerShape, TrainedStudents},
    },
    error::{Error, Result},
    nn::Arch,
    stages::{
        Finetune, ForwardTimes, MicroBatch, Phases, PlannedObjective, PlannedPretrain, Pretrain, StageContext, Step,
        Task, Trainer,
    },
};

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// The step of the recipe's pre-training stage.
    Pretrain,
    /// A supervised step of its student: every patch visible, 1000 classes.
    Finetune,
    /// Its student's features, as k-NN extracts them.
    Features,
}

/// What is timed, and for how many steps.
#[derive(Clone, Copy, Debug)]
pub struct BenchOptions {
    /// What is timed.
    pub job: Job,
    /// Steps that are timed, after one that warms up.
    pub steps: usize,
    /// Images of a step; `None` for the recipe's micro-batch.
    pub batch: Option<usize>,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct BenchReport {
    /// Images per second of the fastest step.
    pub images_per_s_best: f64,
    /// Images per second of the median step.
    pub images_per_s_median: f64,
    /// Images of a step.
    pub batch: usize,
    /// Threads.
    pub threads: usize,
    /// The forms of the operators, and their instruction set.
    pub kernels: String,
    /// Mean seconds of a step by phase.
    pub phases: BTreeMap<&'static str, f64>,
    /// Arithmetic of an image in GFLOP (a multiply-add counts as two), as if dense: every teacher row, the student's forward
    /// pass, and twice that for its backward pass.
    pub gflop_per_image: f64,
    /// GFLOP/s of the median step.
    pub gflops: f64,
    /// The machine's measured peak of fused multiply-adds, where the kernels can tell.
    pub peak_gflops: Option<f64>,
    /// Peak memory of the process in MiB, where the system reports it.
    pub peak_mib: Option<f64>,
    /// The losses, including that of the first step.
    pub losses: Vec<f32>,
}

/// Gives the micro-batch of each step.
pub type Source<'a> = &'a mut dyn FnMut(usize) -> Result<MicroBatch>;

/// Times steps of the recipe's first pre-training stage, with random weights where the real ones cannot be found.
///
/// # Errors
/// A recipe without such a stage, or one that its components refuse.
pub fn bench(cx: &Context, recipe: &Recipe, options: BenchOptions) -> Result<BenchReport> {
    let batch = Stages::new(recipe, cx, options.batch)?.planned;
    let (sizes, batch) = (batch.crop_sizes(), batch.training().batch.effective);
    let mut synthetic = |step: usize| Ok(synthetic(step, batch, &sizes));
    bench_on(cx, recipe, options, &mut synthetic)
}

/// As [`bench()`], on given images.
///
/// # Errors
/// As [`bench()`].
pub fn bench_on(cx: &Context, recipe: &Recipe, options: BenchOptions, source: Source) -> Result<BenchReport> {
    let Stages { name, options: slot, planned } = Stages::new(recipe, cx, options.batch)?;
    let batch = planned.training().batch.effective;
    let at = |error| match error {
        Error::Refused(refusal) => located(refusal, name),
        other => other,
    };
    let (student, trained) = (planned.student().shape(), TrainedStudents::default());
    match options.job {
        Job::Pretrain => {
            let counts = planned.counts();
            let visible = student.held().count(counts.visible, counts.masked);
            let heads: f64 = planned.objectives().iter().map(|o| head_flop(o, &student, visible)).sum();
            let teachers = planned.teacher_shapes();
            let teachers = teachers.iter().map(|(tower, crops)| *crops as f64 * tower_flop(tower, tower.tokens()));
            let towers: f64 = planned.student_tokens().iter().map(|tokens| tower_flop(&student, *tokens)).sum();
            let gflop = teachers.sum::<f64>() + 3.0 * (towers + heads);
            let mut model = planned.model(cx, &trained).map_err(at)?;
            let mut trainer = planned.training().trainer_for(batch * 1000);
            time_training(cx, options, batch, &mut model, &mut trainer, gflop / 1e9, source)
        }
        Job::Finetune => {
            let mut student = slot["student"].clone();
            student["drop_path"] = json!(0.2);
            let finetune: Finetune = decode_options(json!({
                "epochs": 1, "data": one_view(slot["data"].clone()), "student": student, "optimizer": slot["optimizer"],
                "schedule": { "type": "constant" }, "batch": { "effective": batch }, "classes": 1000,
            }))?;
            let students = BTreeMap::new();
            let planned = finetune
                .plan_finetune(&context(name, recipe, &students, cx))
                .map_err(|mut all| located(all.swap_remove(0), name))?;
            let mut model = planned.model(&planned.init(cx), &trained).map_err(at)?;
            let shape = model.student().shape();
            let gflop = 3.0 * tower_flop(&shape, shape.tokens()) / 1e9;
            let mut trainer = planned.training().trainer_for(batch * 1000);
            let mut labelled = |step: usize| {
                let mut batch = source(step)?;
                batch.labels = batch.indices.iter().map(|&i| Some((i % 1000) as u32)).collect();
                Ok(batch)
            };
            time_training(cx, options, batch, &mut model, &mut trainer, gflop, &mut labelled)
        }
        Job::Features => {
            let model = planned.student().build(&planned.init(cx), &trained).map_err(at)?;
            let gflop = tower_flop(&student, student.tokens()) / 1e9;
            time_features(cx, options, batch, &*model, gflop, source)
        }
    }
}

/// The recipe's first pre-training stage, with the batch replaced.
struct Stages<'a> {
    name: &'a str,
    options: Value,
    planned: PlannedPretrain,
}

impl<'a> Stages<'a> {
    fn new(recipe: &'a Recipe, cx: &Context, batch: Option<usize>) -> Result<Self> {
        let (name, slot) = recipe.stages.iter().find(|(_, slot)| slot.name == "pretrain").ok_or_else(|| {
            Error::Usage("the recipe has no stage of type `pretrain`: `bench` times its step, or its student".into())
        })?;
        let mut options = slot.options_value();
        let size = batch.map(|b| json!(b)).unwrap_or_else(|| {
            let batch = &options["batch"];
            if batch["micro"].is_null() { batch["effective"].clone() } else { batch["micro"].clone() }
        });
        options["batch"] = json!({ "effective": size });
        // Its rates are meant for the recipe's own batch, and no timing depends on them.
        options["schedule"] = json!({ "type": "constant" });
        let stage: Pretrain = decode_options(options.clone()).map_err(|r| located(r, name))?;
        let students = BTreeMap::new();
        let planned = stage
            .plan_pretrain(&context(name, recipe, &students, cx))
            .map_err(|mut all| located(all.swap_remove(0), name))?;
        Ok(Stages { name, options, planned })
    }
}

/// A context for planning that needs no files: timings do not depend on them.
fn context<'a>(
    name: &'a str,
    recipe: &Recipe,
    students: &'a BTreeMap<String, StudentPlan>,
    cx: &Context,
) -> StageContext<'a> {
    StageContext {
        name,
        seed: recipe.seed,
        students,
        classifiers: const { &BTreeMap::new() },
        environment: Environment::Ignored,
        missing_weights: MissingWeights::Random,
        recompute: cx.recompute(),
    }
}

fn located(refusal: Refusal, stage: &str) -> Error {
    Error::Refused(refusal.under(stage).under("stages"))
}

/// Multiplications and additions of an alignment's linear outputs for one image of `tokens` tokens.
fn head_flop(objective: &PlannedObjective, student: &TowerShape, tokens: usize) -> f64 {
    2.0 * (tokens * student.arch.dim * objective.target.width * objective.level_weights.len()) as f64
}

/// Data whose images are those of its first view, where it has views.
fn one_view(mut data: Value) -> Value {
    let Some(views) = data.as_object_mut().and_then(|data| data.remove("views")) else { return data };
    let first = views.as_object().and_then(|views| views.values().next()).map(|view| view["transforms"].clone());
    if let (Some(Value::Array(further)), Some(Value::Array(transforms))) = (first, data.get_mut("transforms")) {
        transforms.extend(further);
    }
    data
}

/// New images every step, uniform in [0, 1], with crops of these sides.
fn synthetic(step: usize, batch: usize, sizes: &[usize]) -> MicroBatch {
    let mut stream = Stream::new(0, "bench", step as u64, 0);
    let mut crops = sizes.iter().map(|&size| {
        let pixels = (0..batch * 3 * size * size).map(|_| (stream.bits() >> 8) as f32 / (1 << 24) as f32).collect();
        ImageBatch { pixels, batch, size }
    });
    MicroBatch {
        images: crops.next().expect("an image has a crop"),
        crops: crops.collect(),
        labels: vec![None; batch],
        indices: (step * batch..(step + 1) * batch).collect(),
        epoch: step as u64,
        progress: 0.0,
    }
}

/// Multiplications and additions of one image's forward pass over `tokens` tokens.
fn tower_flop(tower: &TowerShape, tokens: usize) -> f64 {
    let Arch { dim, depth, mlp, patch, .. } = tower.arch;
    let (tokens, dim, mlp) = (tokens as f64, dim as f64, mlp as f64);
    let block = 2.0 * tokens * (4.0 * dim * dim + 2.0 * dim * mlp) + 4.0 * tokens * tokens * dim;
    depth as f64 * block + 2.0 * tokens * dim * (3 * patch * patch) as f64
}

fn time_training<T: Task>(
    cx: &Context,
    options: BenchOptions,
    batch: usize,
    task: &mut T,
    trainer: &mut Trainer,
    gflop: f64,
    source: Source,
) -> Result<BenchReport> {
    let mut timer = Timer::default();
    for step in 0..=options.steps {
        let images = Instant::now();
        let mut next = Some(source(step)?);
        let data = images.elapsed().as_secs_f64();
        let started = Instant::now();
        let Step { loss, phases, .. } = trainer.step(cx, task, 1, &mut || Ok(next.take().expect("one micro-batch")))?;
        timer.losses.push(loss);
        let forward = task.take_times();
        // The first step warms up.
        if step > 0 {
            timer.steps.push(started.elapsed().as_secs_f64());
            timer.add(phases, forward, data);
        }
    }
    Ok(timer.report(cx, batch, gflop))
}

fn time_features(
    cx: &Context,
    options: BenchOptions,
    batch: usize,
    student: &dyn StudentModel,
    gflop: f64,
    source: Source,
) -> Result<BenchReport> {
    let mut timer = Timer::default();
    for step in 0..=options.steps {
        let images = source(step)?.images;
        let started = Instant::now();
        let off = &mut Tape::inference();
        let features = student.forward(cx, off, &images, None, None, &|_| false)?;
        let x = ops::mean_tokens(cx, off, &features.last, batch, usize::from(student.shape().cls_token))?;
        timer.losses.push(x.to_vec()[0]);
        if step > 0 {
            timer.steps.push(started.elapsed().as_secs_f64());
            timer.add(
                Phases { forward: started.elapsed().as_secs_f64(), ..Phases::default() },
                ForwardTimes::default(),
                0.0,
            );
        }
    }
    Ok(timer.report(cx, batch, gflop))
}

#[derive(Default)]
struct Timer {
    steps: Vec<f64>,
    losses: Vec<f32>,
    phases: BTreeMap<&'static str, f64>,
}

impl Timer {
    fn add(&mut self, phases: Phases, forward: ForwardTimes, data: f64) {
        for (name, seconds) in [
            ("teacher", forward.teacher),
            ("mask", forward.mask),
            ("student forward", phases.forward - forward.teacher - forward.mask),
            ("backward", phases.backward),
            ("optimizer", phases.optimizer),
            ("data", data),
        ] {
            *self.phases.entry(name).or_default() += seconds;
        }
    }

    fn report(mut self, cx: &Context, batch: usize, gflop: f64) -> BenchReport {
        let count = self.steps.len().max(1);
        self.steps.sort_by(f64::total_cmp);
        let best = self.steps.first().copied().unwrap_or(f64::INFINITY);
        let middle = count / 2;
        let median = match (self.steps.get(middle), count % 2) {
            (Some(&upper), 0) => f64::midpoint(self.steps[middle - 1], upper),
            (Some(&middle), _) => middle,
            (None, _) => f64::INFINITY,
        };
        self.phases.values_mut().for_each(|seconds| *seconds /= count as f64);
        BenchReport {
            images_per_s_best: batch as f64 / best,
            images_per_s_median: batch as f64 / median,
            batch,
            threads: cx.threads(),
            kernels: cx.operators(),
            phases: self.phases,
            gflop_per_image: gflop,
            gflops: gflop * batch as f64 / median,
            // Memory first: the probe takes buffers of its own.
            peak_mib: peak_memory_mib(),
            peak_gflops: cx.peak_gflops(),
            losses: self.losses,
        }
    }
}
