//! What `bench` times is the step that `run` takes.

use std::{collections::BTreeMap, fs};

use maskalign_core::{
    Context, Device, ImageBatch, Recompute,
    components::towers::{Environment, MissingWeights},
    data::Position,
    events::{Events, MetricsFile},
    pipeline::{self, Deviation, PlanOptions, RunOptions},
    run::{Mode, RunDir, StopFlag},
    stages::{MicroBatch, Pretrain, StageContext},
};
use maskalign_registry::{Input, LoadRequest, NoRecipes, Recipe, Registry, ShowOrigin, decode_options};
use maskalign_testkit::bench::{BenchOptions, Job, bench_on};

const STEPS: usize = 5;
const BATCH: usize = 24;

/// The quickstart's method, small. The rate is constant: a schedule's length is not that of the measurement.
const RECIPE: &str = r#"
name: same
seed: 3
stages:
  pretrain:
    type: pretrain
    epochs: 1
    data:
      dataset: { type: sample, split: train, limit: 240 }
      transforms: [{ type: random_resized_crop, size: 28, scale: [0.5, 1.0] }]
    student: { type: vit, arch: { dim: 32, depth: 3, heads: 2, patch: 4 }, drop_path: 0.2 }
    teachers:
      teacher: { type: vit, arch: { dim: 96, depth: 6, heads: 3, patch: 4 }, weights: "embedded://quickstart_teacher" }
    masker: { type: attention, teacher: teacher, ratio: 0.5 }
    objectives:
      pixels:
        target: { type: pixels, normalize: standardize }
        tokens: [masked]
        aligner: { type: decoder, dim: 16, depth: 1, heads: 2 }
        loss: { type: mse }
    optimizer: { type: adamw, base_lr: 1.0e-2, weight_decay: 0.05 }
    schedule: { type: constant }
    batch: { effective: 24 }
"#;

#[test]
fn the_first_losses_are_those_of_run_on_the_same_data() {
    let request = LoadRequest {
        input: Input::Text { name: "same".into(), text: RECIPE.into() },
        sets: &[],
        env: &|_| None,
        builtins: &NoRecipes,
    };
    let loaded = Recipe::load(&request, Registry::global().unwrap()).unwrap_or_else(|r| panic!("{}", r.render()));
    let cx = Context::new(Device::Cpu, 2);

    let folder = tempfile::tempdir().unwrap();
    let dir = RunDir::create(folder.path().join("run"), Mode::Fresh).unwrap();
    let how = PlanOptions {
        environment: Environment::Checked,
        missing_weights: MissingWeights::Refused,
        recompute: Recompute::Never,
    };
    let plan = pipeline::plan(loaded.recipe(), how).unwrap_or_else(|_| panic!("the recipe is sound"));
    let options = RunOptions {
        resolved: &loaded.resolved_yaml(ShowOrigin::No),
        fingerprint: &loaded.fingerprint(),
        step_limit: Some(STEPS as u64),
        other_kernels: Deviation::Refused,
        lost_metrics: Deviation::Refused,
        workers: 0,
        origin: None,
        command_line: Vec::new(),
        commit: None,
        stop: &StopFlag::new(),
        events: Events::new(vec![Box::new(MetricsFile::new(&dir))]),
    };
    pipeline::run(&cx, loaded.recipe(), plan, &dir, options).unwrap();
    let metrics = fs::read_to_string(dir.metrics_path()).unwrap();
    let run: Vec<f32> = metrics
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64().unwrap() as f32)
        .collect();

    let stage: Pretrain = decode_options(loaded.recipe().stages["pretrain"].options_value()).unwrap();
    let students = BTreeMap::new();
    let context = StageContext {
        name: "pretrain",
        seed: loaded.recipe().seed,
        students: &students,
        classifiers: &BTreeMap::new(),
        environment: Environment::Checked,
        missing_weights: MissingWeights::Refused,
        recompute: Recompute::Never,
    };
    let planned = stage.plan_pretrain(&context).unwrap_or_else(|refusals| panic!("{refusals:?}"));
    let data = planned.training().data.open().unwrap();
    let loader = data.training(loaded.recipe().seed, BATCH, BATCH, 0).unwrap();
    let mut batches = loader.batches(Position::default(), Some(STEPS as u64));
    let mut source = |step: usize| {
        let batch = batches.next().expect("a batch for every step")?;
        Ok(MicroBatch {
            crops: Vec::new(),
            images: ImageBatch { batch: batch.len(), size: batch.size.0, pixels: batch.images },
            labels: batch.labels,
            indices: batch.indices,
            epoch: batch.at.epoch,
            progress: step as f64 / 10.0,
        })
    };
    let options = BenchOptions { job: Job::Pretrain, steps: STEPS - 1, batch: Some(BATCH) };
    let report = bench_on(&cx, loaded.recipe(), options, &mut source).unwrap();
    assert_eq!(run.len(), STEPS);
    assert!(run.windows(2).all(|pair| pair[0] != pair[1]), "the losses tell steps apart: {run:?}");
    assert_eq!(run, report.losses);
}
