//! A linear probe at several learning rates, on features that are computed once.

use std::{rc::Rc, sync::Arc};

use maskalign_engine::{Context, ImageBatch, Tape, Tensor, ops, ops::Act, random::Stream};
use maskalign_registry::{OptimizerTag, Refusal, ScheduleTag, Slot};
use serde_json::{Map, Value, json};

use super::{
    Bank, BatchSize, Length, MicroBatch, OpenData, StageRun, Task, Tower, Trainer, Training, View,
    features::extract_as_they_are,
    keep,
    supervised::{best_class, class_targets},
};
use crate::{
    components::{optimizers::Optimizer, schedules::Schedule},
    error::{Error, Result},
    events::Event,
    nn::{BatchNorm, Linear, Param},
    plugin::Build,
};

/// Features that are classified together.
const ROWS: usize = 1024;

/// Learning rates that are tried, each with its optimizer.
pub(super) struct PlannedSweep {
    rates: Vec<(f64, Arc<dyn Optimizer>)>,
    schedule: Arc<dyn Schedule>,
}

impl PlannedSweep {
    /// An optimizer for each of these in place of `optimizer.base_lr`. Every refusal is noted; `None` where there is one, or
    /// no rate is tried.
    pub(super) fn plan(base_lrs: &[f64], training: &Training, refusals: &mut Vec<Refusal>) -> Option<PlannedSweep> {
        let Training { optimizer, schedule, batch, epochs, .. } = training;
        // What is wrong with these as they are was said already.
        let schedule: Arc<dyn Schedule> = Build::<ScheduleTag>::build(schedule).ok()?.into();
        let mut rates: Vec<(f64, Arc<dyn Optimizer>)> = Vec::new();
        for (at, &base_lr) in base_lrs.iter().enumerate() {
            let built = at_rate(optimizer, base_lr).and_then(|optimizer| {
                schedule.check(*epochs, optimizer.peak_lr(batch.effective))?;
                Ok(optimizer)
            });
            let named = |refusal: Refusal| Refusal::new(at.to_string(), refusal.message).under("base_lrs");
            rates.push((base_lr, keep(refusals, built.map_err(named))?.into()));
        }
        (!rates.is_empty()).then_some(PlannedSweep { rates, schedule })
    }
}

fn at_rate(optimizer: &Slot<OptimizerTag>, base_lr: f64) -> Result<Box<dyn Optimizer>, Refusal> {
    let mut slot = optimizer.clone();
    slot.options.insert("base_lr".to_owned(), base_lr.into());
    let optimizer = Build::build(&slot)?;
    optimizer.check()?;
    Ok(optimizer)
}

/// What classifiers are trained and judged on.
pub(super) struct Sides<'a> {
    /// Those that are trained on.
    pub data: &'a OpenData,
    /// Those that the accuracy is measured on.
    pub eval: &'a OpenData,
    /// Images of an update.
    pub batch: BatchSize,
    /// How long each is to be trained.
    pub length: Length,
    /// Steps after which its training ends, earlier where `--steps` says so.
    pub end: u64,
}

/// A classifier on features.
pub(super) struct Head {
    /// `head.0`, as the official checkpoints call it.
    pub norm: BatchNorm,
    /// `head.1`.
    pub head: Linear,
}

/// A classifier that is trained.
struct Trains {
    head: Head,
    features: Rc<Bank>,
}

impl Task for Trains {
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        self.head.visit(f);
    }

    fn loss(&mut self, cx: &Context, tape: &mut Tape, batch: &MicroBatch) -> Result<Tensor> {
        let features = self.features.rows(cx, &batch.indices)?;
        self.head.loss(cx, tape, &features, batch)
    }
}

impl Trains {
    /// Trains to the end, and gives the last loss. Each epoch goes through the features in an order of its own, which follows
    /// from the seed; what is left of an epoch that batches do not divide is left out.
    fn train(
        &mut self,
        cx: &Context,
        trainer: &mut Trainer,
        sides: (BatchSize, Length, u64),
        seed: u64,
        after: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<f32> {
        let (batch, length, end) = sides;
        let (mut order, mut loss) = (Vec::new(), f32::NAN);
        while trainer.updates < end {
            let at = length.position(trainer.updates);
            if at.step == 0 {
                order = Stream::new(seed, "probe", at.epoch, 0).permutation(self.features.labels.len());
            }
            let first = at.step as usize * batch.effective;
            let mut parts = (0..batch.effective).step_by(batch.micro());
            let (features, progress) = (Rc::clone(&self.features), trainer.progress());
            let step = trainer.step(cx, self, batch.effective / batch.micro(), &mut || {
                let part = parts.next().unwrap_or(0);
                let rows = first + part..first + part + batch.micro();
                // Fewer could be read than the length was planned for.
                let indices: Vec<usize> = rows.map(|row| order[row % order.len()]).collect();
                Ok(MicroBatch {
                    crops: Vec::new(),
                    images: ImageBatch { pixels: Vec::new(), batch: indices.len(), size: 0 },
                    labels: indices.iter().map(|row| Some(features.labels[*row])).collect(),
                    indices,
                    epoch: at.epoch,
                    progress,
                })
            })?;
            loss = step.loss;
            after(trainer.updates)?;
        }
        Ok(loss)
    }
}

impl Head {
    pub(super) fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        self.norm.visit(f);
        self.head.visit(f);
    }

    /// The cross entropy of the features `[batch, width]` of a micro-batch, whose running statistics they move.
    pub(super) fn loss(
        &mut self,
        cx: &Context,
        tape: &mut Tape,
        features: &Tensor,
        batch: &MicroBatch,
    ) -> Result<Tensor> {
        let targets = class_targets(batch, self.head.outputs(), 0.0)?;
        let normed = self.norm.train(cx, tape, features)?;
        let logits = self.head.forward(cx, tape, &normed, Act::None)?;
        let targets = cx.tensor(targets, logits.rows(), logits.columns())?;
        Ok(ops::cross_entropy(cx, tape, &logits, &targets)?)
    }

    /// The logits of features, by the running statistics: `[rows, classes]`.
    pub(super) fn scores(&self, cx: &Context, features: &Tensor) -> Result<Tensor> {
        let off = &mut Tape::inference();
        let normed = self.norm.evaluate(cx, off, features)?;
        Ok(self.head.forward(cx, off, &normed, Act::None)?)
    }

    /// The share of the features whose class is found.
    fn accuracy(&self, cx: &Context, features: &Bank) -> Result<f64> {
        let mut right = 0;
        let places: Vec<usize> = (0..features.labels.len()).collect();
        for rows in places.chunks(ROWS) {
            let scores = self.scores(cx, &features.rows(cx, rows)?)?;
            let (values, classes) = (scores.values(), scores.columns());
            let found = values.chunks_exact(classes).zip(rows);
            right += found.filter(|(scores, row)| best_class(scores) == features.labels[**row] as usize).count();
        }
        Ok(right as f64 / features.labels.len() as f64)
    }
}

/// The best of several classifiers.
pub(super) struct Swept {
    /// Its steps, epochs, loss, rate and accuracy, and what there is to say of all.
    pub results: Value,
    /// It.
    pub head: Head,
    /// What trained it.
    pub trainer: Trainer,
}

/// Trains a classifier at each rate, each from the same beginning, and gives `told` what comes of it by the rate. Returns the
/// one with the highest accuracy, of several the first.
///
/// # Errors
/// No rate at which the loss stays finite; whatever ends a run early.
pub(super) fn sweep(
    run: &mut StageRun,
    plan: &PlannedSweep,
    sides: &Sides,
    (tower, view): (&Tower, View),
    fresh: &dyn Fn() -> Result<Head>,
    told: &mut dyn FnMut(&mut StageRun, &str, &Value) -> Result<()>,
) -> Result<Swept> {
    let features = Rc::new(extract_as_they_are(run, tower, sides.data, view)?);
    let held_out = extract_as_they_are(run, tower, sides.eval, view)?;
    let Sides { batch, length, end, .. } = *sides;
    let all = end * plan.rates.len() as u64;
    let mut by_lr = Map::new();
    let mut best: Option<(f64, Swept)> = None;
    for (at, (rate, optimizer)) in plan.rates.iter().enumerate() {
        let mut trains = Trains { head: fresh()?, features: Rc::clone(&features) };
        let mut trainer = Trainer::new(Arc::clone(optimizer), Arc::clone(&plan.schedule), batch.effective, length);
        let (cx, seed) = (run.cx, run.seed);
        let trained = trains.train(cx, &mut trainer, (batch, length, end), seed, &mut |done| {
            run.events.send(Event::Progress { what: "steps", done: at as u64 * end + done, all })?;
            run.check_stop()
        });
        let result = match trained {
            Ok(loss) => {
                let accuracy = trains.head.accuracy(cx, &held_out)?;
                if best.as_ref().is_none_or(|(highest, _)| accuracy > *highest) {
                    let epochs = trainer.updates as f64 / length.steps_per_epoch as f64;
                    let results = json!({
                        "steps": trainer.updates, "epochs": epochs, "loss": loss, "base_lr": rate, "accuracy": accuracy,
                    });
                    best = Some((accuracy, Swept { results, head: trains.head, trainer }));
                }
                json!({ "accuracy": accuracy, "loss": loss })
            }
            // A rate that is too high is a result.
            Err(Error::NonFinite { step, .. }) => json!({ "diverged_at_step": step }),
            Err(error) => return Err(error),
        };
        let name = rate.to_string();
        told(run, &name, &result)?;
        by_lr.insert(name, result);
    }
    let Some((_, mut best)) = best else {
        let help = "lower them, or lengthen `schedule.warmup_epochs`";
        return Err(Refusal::new("base_lrs", "at none of these rates the loss stayed finite").help(help).into());
    };
    best.results["by_lr"] = Value::Object(by_lr);
    for (name, skipped) in [("skipped", features.skipped), ("eval_skipped", held_out.skipped)] {
        if skipped > 0 {
            best.results[name] = skipped.into();
        }
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use maskalign_engine::{Device, Init, Role, nn::Bias};

    use super::*;
    use crate::weights::read;

    /// Steps of PyTorch's classifiers and its AdamW at several rates (`tests/fixtures/stages/make_probe_sweep.py`), on the
    /// same features in the same order.
    #[test]
    fn classifiers_at_several_rates_are_those_of_pytorch() {
        let recorded = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/stages/probe_sweep.safetensors");
        let recorded = read(&recorded).unwrap();
        let cached = |name: &str| Bank {
            features: recorded[name].data.clone(),
            width: recorded[name].shape[1],
            labels: recorded[&format!("{name}_labels")].data.iter().map(|&label| label as u32).collect(),
            skipped: 0,
        };
        let (features, held_out) = (Rc::new(cached("train")), cached("test"));
        let training: Training = serde_json::from_value(json!({
            "epochs": 3, "data": { "dataset": { "type": "sample", "split": "train" } }, "batch": { "effective": 12, "micro": 6 },
            "optimizer": { "type": "adamw", "base_lr": 1.0, "base_batch": 12, "betas": [0.9, 0.999] },
            "schedule": { "type": "cosine", "warmup_epochs": 1 },
        }))
        .unwrap();
        let rates: Vec<f64> = recorded["rates"].data.iter().map(|&rate| f64::from(rate)).collect();
        let mut refusals = Vec::new();
        let plan = PlannedSweep::plan(&rates, &training, &mut refusals).unwrap();
        let cx = Context::new(Device::Cpu, 2);
        let init = &Init::new(cx.device(), 0, "probe").of_role(Role::Head);
        let length = Length::new(3.0, features.labels.len(), 12);
        for (at, (rate, optimizer)) in plan.rates.iter().enumerate() {
            let (classes, width) = (recorded["weight"].shape[0], features.width);
            let weight = init.truncated_normal("head.1.weight", &[classes, width], 0.01).unwrap();
            let mut head = Linear::from_weight(init, "head.1", weight, Bias::With).unwrap();
            head.weight.load(&recorded["weight"].data).unwrap();
            let head = Head { norm: BatchNorm::plain(init, "head.0", width, 1e-6).unwrap(), head };
            let mut trains = Trains { head, features: Rc::clone(&features) };
            let mut trainer = Trainer::new(Arc::clone(optimizer), Arc::clone(&plan.schedule), 12, length);
            let loss = trains.train(&cx, &mut trainer, (training.batch, length, length.steps()), 0, &mut |_| Ok(()));
            let near = |what: &str, ours: &[f32], theirs: &[f32]| {
                let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
                let error = norm(&mut ours.iter().zip(theirs).map(|(a, b)| f64::from(*a) - f64::from(*b)))
                    / norm(&mut theirs.iter().map(|v| f64::from(*v)));
                assert!(error < 1e-5, "rate {rate}: {what} off by {error:.1e}");
            };
            near("loss", &[loss.unwrap()], &recorded["losses"].data[at..=at]);
            trains.visit(&mut |p| near(&p.name, &p.to_host().data, &recorded[&format!("{at}.{}", p.name)].data));
            let accuracy = trains.head.accuracy(&cx, &held_out).unwrap() as f32;
            near("accuracy", &[accuracy], &recorded["accuracies"].data[at..=at]);
        }
    }
}
