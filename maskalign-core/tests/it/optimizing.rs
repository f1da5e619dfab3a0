//! Schedules and LARS over 20 updates, recorded from MAE's published code, timm and PyTorch by `tests/fixtures/stages/make_training.py`.

use maskalign_core::{
    Context, Device, ImageBatch, Tape, Tensor,
    error::{Error, Result},
    nn::{Init, Param},
    ops::{self, Distance},
    stages::{LinearProbe, MicroBatch, PlannedTraining, Task},
};

use crate::support::{fixture, planned, relative_error, stage};

const UPDATES: usize = 20;

fn training(optimizer: &str, schedule: &str) -> PlannedTraining {
    let recipe = format!(
        "{{ name: probe, stages: {{ probe: {{ type: linear_probe, epochs: 5, classes: 5,
        data: {{ dataset: {{ type: image_folder, root: elsewhere }}, transforms: [{{ type: center_crop, size: 28 }}] }},
        student: {{ type: vit, arch: {{ dim: 16, depth: 2, heads: 2, patch: 7 }} }},
        optimizer: {optimizer}, schedule: {schedule}, batch: {{ effective: 256 }} }} }} }}"
    );
    let plan = planned(|context| stage::<LinearProbe>(&recipe).plan_probe(context));
    plan.unwrap_or_else(|r| panic!("{r:?}")).training().clone()
}

#[test]
fn rates_of_twenty_updates_are_those_of_mae_timm_and_pytorch() {
    let recorded = fixture("tests/fixtures/stages/training.safetensors");
    for (name, schedule) in [
        ("cosine_mae", "{ type: cosine, warmup_epochs: 2, min_lr: 1.0e-3 }"),
        ("cosine_timm", "{ type: cosine, warmup_epochs: 2, warmup_lr: 0.01, min_lr: 1.0e-3 }"),
        ("multistep", "{ type: multistep, milestones: [2, 3], gamma: 0.2 }"),
    ] {
        // Four updates an epoch.
        let mut trainer = training("{ type: lars, base_lr: 0.3 }", schedule).trainer_for(4 * 256);
        let theirs = &recorded[&format!("schedule.{name}")].data;
        assert_eq!(theirs.len(), UPDATES);
        for (update, theirs) in theirs.iter().map(|rate| f64::from(*rate)).enumerate() {
            trainer.updates = update as u64;
            let ours = trainer.lr();
            assert!((ours - theirs).abs() <= 1e-5 * theirs, "{name}, update {update}: {ours}, there {theirs}");
        }
    }
}

/// A matrix and a vector that are drawn to other targets at each step.
struct Drawn {
    parameters: [Param; 2],
    targets: Vec<[Tensor; 2]>,
    step: usize,
}

impl Task for Drawn {
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        self.parameters.iter_mut().for_each(f);
    }

    fn loss(&mut self, cx: &Context, tape: &mut Tape, _: &MicroBatch) -> Result<Tensor> {
        let pairs = self.parameters.iter().zip(&self.targets[self.step]);
        let terms = pairs.map(|(p, target)| ops::distance(cx, tape, &p.value, target, Distance::Mse));
        let terms = terms.collect::<std::result::Result<Vec<_>, _>>().map_err(Error::from)?;
        self.step += 1;
        Ok(ops::weighted_sum(cx, tape, &terms, &[1.0, 1.0])?)
    }
}

#[test]
fn twenty_updates_by_lars_are_those_of_maes_code() {
    let recorded = fixture("tests/fixtures/stages/training.safetensors");
    let cx = Context::new(Device::Cpu, 1);
    let init = Init::new(cx.device(), 0, "drawn");
    let names = [("weight", vec![5, 7]), ("bias", vec![7])];
    let parameters = names.clone().map(|(name, dims)| {
        let mut p = init.constant(name, &dims, 0.0).unwrap();
        p.load(&recorded[&format!("lars.start.{name}")].data).unwrap();
        p
    });
    let target = |name: &str, step: usize, (rows, columns): (usize, usize)| {
        let all = &recorded[&format!("lars.target.{name}")].data;
        cx.tensor(all[step * rows * columns..][..rows * columns].to_vec(), rows, columns).unwrap()
    };
    let targets = (0..UPDATES).map(|step| [target("weight", step, (5, 7)), target("bias", step, (1, 7))]).collect();
    let mut task = Drawn { parameters, targets, step: 0 };
    let lars = "{ type: lars, base_lr: 1.0, weight_decay: 0.05, trust_coefficient: 0.01 }";
    let mut trainer = training(lars, "{ type: constant }").trainer_for(UPDATES * 256);
    for (step, lr) in recorded["lars.lr"].data.iter().enumerate() {
        let images = ImageBatch { pixels: vec![0.0; 3], batch: 1, size: 1 };
        let batch = MicroBatch { images, crops: vec![], labels: vec![None], indices: vec![0], epoch: 0, progress: 0.0 };
        let mut batches = Some(batch).into_iter();
        let mut next = || Ok(batches.next().expect("one"));
        trainer.step_at(&cx, &mut task, 1, &mut next, f64::from(*lr)).unwrap();
        for p in &task.parameters {
            let theirs = &recorded[&format!("lars.expect.{}", p.name)].data[step * p.len()..][..p.len()];
            let error = relative_error(&p.value.to_vec(), theirs);
            assert!(error < 1e-5, "step {step}, {}: {error:.1e}", p.name);
        }
    }
}
