//! A step whose loss or gradient is not finite is made again under a watch, which tells where that began.

use maskalign_engine::watch::{Pass, Seen, Watch};
use serde_json::{Map, Value};

use super::{MicroBatch, PlannedTraining, Task, Term, Trainer};
use crate::{
    error::{Error, Result},
    nn::Role,
    run::{BadParameter, FailedBatch, FailedStep, FirstOperator, OPERATORS_BEFORE, OperatorRecord, number},
    stages::{OpenData, StageRun},
};

/// Makes the trainer's next step and looks at it. Where it is finite, it has been made: the state is another one then.
///
/// # Errors
/// What ends a step early besides values that are not finite.
pub(super) fn examine(
    run: &StageRun,
    task: &mut dyn Task,
    trainer: &mut Trainer,
    training: &PlannedTraining,
    data: &OpenData,
) -> Result<FailedStep> {
    let (step, progress, lr) = (trainer.updates, trainer.progress(), trainer.lr());
    let length = &training.length;
    let parameters = bad_parameters(task);
    task.take_terms();
    let watch = Watch::default();
    let cx = run.cx.clone().with_watch(&watch);
    let batch = training.batch;
    let loader = data.training(run.seed, batch.effective, batch.micro(), 0)?;
    let mut batches = loader.batches(length.position(step), Some(1));
    let mut indices: Vec<Vec<usize>> = Vec::new();
    let stepped = trainer.step(&cx, task, batch.effective / batch.micro(), &mut || {
        let batch = run.stop.while_waiting(|| batches.next()).expect("batches for a step")?;
        indices.push(batch.indices.clone());
        Ok(MicroBatch::of(batch, progress))
    });
    let mut terms = task.take_terms();
    let (what, value, repeats) = match stepped {
        Ok(stepped) => {
            terms = vec![stepped.terms];
            ("loss", f64::from(stepped.loss), false)
        }
        Err(Error::NonFinite { what, value, .. }) => (what, value, true),
        Err(other) => return Err(other),
    };
    let mut terms = terms.into_iter();
    let micro_batches = indices.into_iter().map(|indices| {
        let images = indices.iter().map(|&index| data.images.name(index)).collect();
        let (terms, levels) = recorded(terms.next().unwrap_or_default());
        FailedBatch { indices, images, terms, levels }
    });
    Ok(FailedStep {
        stage: run.name.to_owned(),
        step,
        epoch: step as f64 / length.steps_per_epoch as f64,
        lr,
        what: what.to_owned(),
        value: number(value),
        micro_batches: micro_batches.collect(),
        parameters,
        first: first_operator(task, &watch.seen()),
        repeats,
        kernels: run.cx.operators(),
    })
}

/// The parameters that were not finite before the step. Running statistics are left out: the step has moved them already,
/// and does not read them.
fn bad_parameters(task: &mut dyn Task) -> Vec<BadParameter> {
    let mut found = Vec::new();
    task.visit(&mut |p| {
        if p.role() == Role::Buffer {
            return;
        }
        let not_finite = p.value.values().iter().filter(|value| !value.is_finite()).count();
        if not_finite > 0 {
            found.push(BadParameter { name: p.name.clone(), not_finite, values: p.len() });
        }
    });
    found
}

/// Terms of a loss and their levels, as `metrics.jsonl` has them.
fn recorded(terms: Vec<Term>) -> (Map<String, Value>, Map<String, Value>) {
    let (mut values, mut all_levels) = (Map::new(), Map::new());
    for Term { name, value, levels } in terms {
        values.insert(name.clone(), number(value));
        if !levels.is_empty() {
            let levels: Map<String, Value> =
                levels.into_iter().map(|(level, value)| (level.to_string(), number(value))).collect();
            all_levels.insert(name, levels.into());
        }
    }
    (values, all_levels)
}

/// What made the first value that is not finite, with what came before it.
fn first_operator(task: &mut dyn Task, seen: &[Seen]) -> Option<FirstOperator> {
    let (last, before) = seen.split_last().filter(|(last, _)| last.not_finite > 0)?;
    let shown = &before[before.len().saturating_sub(OPERATORS_BEFORE)..];
    let mut records: Vec<OperatorRecord> = shown.iter().chain([last]).map(record).collect();
    task.visit(&mut |p| {
        for (record, seen) in records.iter_mut().zip(shown.iter().chain([last])) {
            if seen.reads(&p.value) {
                record.parameters.push(p.name.clone());
            }
            if seen.is_gradient_of(&p.value) {
                record.gradient_of = Some(p.name.clone());
            }
        }
    });
    let made_by = records.pop()?;
    Some(FirstOperator { made_by, not_finite: last.not_finite, number: seen.len(), before: records })
}

fn record(seen: &Seen) -> OperatorRecord {
    let pass = match seen.pass {
        Pass::Forward => "forward",
        Pass::Backward => "backward",
    };
    OperatorRecord {
        operator: seen.operator.to_owned(),
        pass: pass.to_owned(),
        parameters: Vec::new(),
        gradient_of: None,
        shape: [seen.shape.0, seen.shape.1],
        largest: seen.largest,
    }
}
