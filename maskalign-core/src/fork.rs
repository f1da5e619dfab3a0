//! A run that goes on from another one, under a changed recipe and in a directory of its own.
//!
//! What the other run did under options that are the same is taken over: stages that are finished, then the weights and the
//! optimizer of the first stage that is not, or whose options differ. So the new directory looks as one whose run was
//! interrupted there, and goes on as any such run does.

use std::path::{Path, PathBuf};

use maskalign_registry::Refusal;
use serde_json::Value;

use crate::{
    error::{Error, Result},
    events::StageSummary,
    nn::Role,
    pipeline::Plan,
    run::{Checkpoint, FinishedStage, Manifest, Origin, RunDir, as_text, fail_point, pictures},
    stages::{Length, noted_best},
    weights::{TensorMap, TensorRef},
};

/// Where a run is to go on from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    /// The directory of the run.
    pub run: PathBuf,
    /// The checkpoint; absent: the last one of the first stage that is not the same or not finished.
    pub at: Option<At>,
}

/// A checkpoint of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct At {
    /// The stage; absent: the one that has a checkpoint of this step.
    pub stage: Option<String>,
    /// Optimizer steps done.
    pub step: u64,
}

/// A fork whose parts fit.
#[derive(Debug)]
pub struct Fork {
    origin: RunDir,
    /// Finished stages, with what they left.
    finished: Vec<(String, FinishedStage, Checkpoint)>,
    /// What a stage goes on from.
    checkpoint: Option<Checkpoint>,
    /// The best state that the checkpoint counts on.
    best: Option<Checkpoint>,
    record: Origin,
}

impl Fork {
    /// What is taken over from where.
    pub fn record(&self) -> &Origin {
        &self.record
    }

    /// Puts what is taken over into the directory of the new run, which must be empty. Until that run writes its manifest, the
    /// directory is marked as one that is no run yet: a fork that is killed here is begun anew.
    ///
    /// # Errors
    /// Files that cannot be read or written; something of the other run is damaged.
    pub fn take_over(self, dir: &RunDir, fingerprint: &str) -> Result<Origin> {
        fail_point("fork", "before");
        dir.begin_fork()?;
        let mut records = 0;
        for (name, done, mut left) in self.finished {
            records = records.max(done.metrics_records);
            fingerprint.clone_into(&mut left.header.fingerprint);
            dir.finish_stage(&left.header, &TensorRef::all_of(&left.tensors), done.results)?;
            for picture in pictures(self.origin.path()).iter().filter(|picture| picture.stage == name) {
                // What cannot be shown is no reason not to go on.
                let png = picture.path(self.origin.path()).and_then(|path| std::fs::read(path).ok());
                png.map_or(Ok(()), |png| dir.write_picture(picture, &png))?;
            }
        }
        records = self.checkpoint.as_ref().map_or(records, |checkpoint| checkpoint.header.metrics_records);
        dir.take_metrics(&self.origin, records)?;
        if let Some(mut best) = self.best {
            fingerprint.clone_into(&mut best.header.fingerprint);
            dir.save_best(&best.header, &TensorRef::all_of(&best.tensors))?;
        }
        if let Some(mut checkpoint) = self.checkpoint {
            fingerprint.clone_into(&mut checkpoint.header.fingerprint);
            dir.save_checkpoint(&checkpoint.header, &TensorRef::all_of(&checkpoint.tensors))?;
        }
        Ok(self.record)
    }
}

/// A recipe, resolved: the one of the other run, and the one to go on under.
#[derive(Clone, Copy)]
pub struct Recipes<'a> {
    /// That of the other run.
    pub then: &'a Value,
    /// The one to go on under.
    pub now: &'a Value,
    /// What differs, one line each.
    pub differences: &'a [String],
}

/// Finds what of a run is taken over under another recipe. Nothing is written.
///
/// # Errors
/// The run cannot be read, has no such checkpoint, or has nothing to take over; in the inner result: what of the recipe
/// keeps the checkpoint from being gone on with.
pub fn fork(from: &Parent, recipes: Recipes, plan: &Plan) -> Result<Result<Fork, Vec<Refusal>>> {
    let origin = RunDir::look_at(&from.run)?;
    let shown = from.run.display();
    let Some(manifest) = origin.read_manifest()? else {
        return Err(Error::Usage(format!(
            "the run in {shown} was ended before it began: there is nothing to go on from"
        )));
    };
    let stage_of = |recipe: &'_ Value, name: &str| recipe.get("stages").and_then(|stages| stages.get(name)).cloned();
    let chosen = from.at.as_ref().map(|at| chosen(&origin, at, plan)).transpose()?;
    let mut finished = Vec::new();
    let mut checkpoint = None;
    let mut refusals = Vec::new();
    for (name, summary) in plan.summaries() {
        let (then, now) = (stage_of(recipes.then, name), stage_of(recipes.now, name));
        let is_chosen = chosen.as_ref().is_some_and(|(stage, _)| stage == name);
        let done = origin.read_done(name)?.filter(|done| done.is_complete(summary.steps.unwrap_or(0)));
        if let (Some(done), true, false) = (done, then == now, is_chosen) {
            let left = origin.read_final(name, &done)?;
            finished.push((name.to_owned(), done, left));
            continue;
        }
        if let (Some((chosen, step)), false) = (&chosen, is_chosen) {
            let message =
                format!("step {step} of `{chosen}` was reached after this stage, which the run did not finish so");
            let place = differences(then.as_ref(), now.as_ref()).into_iter().next().unwrap_or_default();
            let help = format!("leave the stage as the run has it, or go on from it: `--from {shown}`");
            refusals.push(refusal(name, &place, message).help(help));
            break;
        }
        let Some(then) = then else { break };
        let found = match &chosen {
            Some((_, step)) => Some(origin.read_checkpoint(name, *step)?),
            None => newest(&origin, name)?,
        };
        if let Some(found) = found {
            let stage = Stage { name, then: &then, now: now.as_ref().unwrap_or(&Value::Null), summary };
            refusals.extend(stage.faults(&found, &manifest, &from.run));
            checkpoint = Some(found);
        }
        break;
    }
    if !refusals.is_empty() {
        return Ok(Err(refusals));
    }
    if finished.is_empty() && checkpoint.is_none() {
        let first = plan.summaries().next().map_or("", |(name, _)| name);
        return Err(Error::Usage(format!(
            "nothing of the run in {shown} can be gone on with: it has neither a checkpoint of stage `{first}` nor what that stage \
             leaves under these options"
        )));
    }
    let best = checkpoint.as_ref().map_or(Ok(None), |checkpoint| best_of(&origin, checkpoint))?;
    let record = Origin {
        run: as_text(&std::path::absolute(&from.run).unwrap_or_else(|_| from.run.clone())),
        fingerprint: manifest.fingerprint,
        finished_stages: finished.iter().map(|(name, _, _)| name.clone()).collect(),
        stage: checkpoint.as_ref().map(|checkpoint: &Checkpoint| checkpoint.header.stage.clone()),
        step: checkpoint.as_ref().map(|checkpoint| checkpoint.header.step),
        differences: recipes.differences.to_vec(),
    };
    Ok(Ok(Fork { origin, finished, checkpoint, best, record }))
}

/// The best state that a checkpoint counts on. The run keeps those that its own newest checkpoint needs.
fn best_of(origin: &RunDir, checkpoint: &Checkpoint) -> Result<Option<Checkpoint>> {
    let Some(step) = noted_best(&checkpoint.header) else { return Ok(None) };
    let stage = &checkpoint.header.stage;
    let advised = |error| {
        let at = checkpoint.header.step;
        Error::Usage(format!(
            "the checkpoint of step {at} of `{stage}` counts on the best state, of step {step}: {error}; go on from a later \
             checkpoint"
        ))
    };
    origin.read_best(stage, step).map(Some).map_err(advised)
}

/// The stage and the step of the checkpoint that is asked for.
fn chosen(origin: &RunDir, at: &At, plan: &Plan) -> Result<(String, u64)> {
    let mut known = Vec::new();
    let mut found = Vec::new();
    for (name, _) in plan.summaries() {
        let steps: Vec<u64> = origin.checkpoints(name)?.into_iter().map(|(step, _)| step).collect();
        if steps.contains(&at.step) && at.stage.as_ref().is_none_or(|stage| stage == name) {
            found.push(name.to_owned());
        }
        if let [_, ..] = steps.as_slice() {
            let steps: Vec<String> = steps.iter().map(u64::to_string).collect();
            known.push(format!("{name}: {}", steps.join(", ")));
        }
    }
    let run = origin.path().display();
    match (found.pop(), found.pop()) {
        (Some(stage), None) => Ok((stage, at.step)),
        (Some(one), Some(two)) => Err(Error::Usage(format!(
            "step {step} is a checkpoint of `{two}` and of `{one}`: name the stage, as in {run}@{two}:{step}",
            step = at.step
        ))),
        (None, _) => {
            let of = at.stage.as_ref().map_or(String::new(), |stage| format!(" of stage `{stage}`"));
            let there = match known.is_empty() {
                true => "it has none".to_owned(),
                false => format!("there are those of {}", known.join("; ")),
            };
            Err(Error::Usage(format!("the run in {run} has no checkpoint{of} at step {}: {there}", at.step)))
        }
    }
}

/// The newest checkpoint of a stage that is whole. Nothing is set aside: the run is another's.
fn newest(origin: &RunDir, stage: &str) -> Result<Option<Checkpoint>> {
    let mut first = None;
    for (step, _) in origin.checkpoints(stage)?.into_iter().rev() {
        match origin.read_checkpoint(stage, step) {
            Ok(checkpoint) => return Ok(Some(checkpoint)),
            Err(error) => {
                tracing::warn!("{error}: the checkpoint before it is looked at");
                first.get_or_insert(error);
            }
        }
    }
    first.map_or(Ok(None), |error| Err(error.into()))
}

/// The stage that is to go on.
struct Stage<'a> {
    name: &'a str,
    then: &'a Value,
    now: &'a Value,
    summary: &'a StageSummary,
}

impl Stage<'_> {
    /// What keeps it from going on from a checkpoint.
    fn faults(&self, checkpoint: &Checkpoint, then: &Manifest, run: &Path) -> Vec<Refusal> {
        let step = checkpoint.header.step;
        let weights = format!(
            "the weights alone are taken by `weights: {}/checkpoints/{}/step-{step:08}.safetensors`",
            run.display(),
            self.name
        );
        let same = |path: &[&str]| at(self.then, path) == at(self.now, path);
        if !same(&["type"]) {
            let message = "the stage of the run is of another type";
            return vec![refusal(self.name, &["type".to_owned()], message)];
        }
        let mut found = Vec::new();
        if !same(&["optimizer", "type"]) {
            let name = |stage| at(stage, &["optimizer", "type"]).and_then(Value::as_str).unwrap_or("none").to_owned();
            let message = format!(
                "the checkpoint has the state of `{}`, with which `{}` cannot go on",
                name(self.then),
                name(self.now)
            );
            let path = ["optimizer".to_owned(), "type".to_owned()];
            found.push(refusal(self.name, &path, message).help(weights.clone()));
        }
        found.extend(self.length_fault(step, then, &weights));
        found.extend(self.state_faults(&checkpoint.tensors, step, &weights));
        found
    }

    /// The step of the checkpoint must be the same place in the data, and not behind the end.
    fn length_fault(&self, step: u64, then: &Manifest, weights: &str) -> Option<Refusal> {
        let images_then = then.data.iter().find(|data| data.stage == self.name).map(|data| data.images as usize);
        let images_now = self.summary.data.iter().find(|(what, _, _)| what == self.name).map(|(_, images, _)| *images);
        let steps = |stage: &Value, images: Option<usize>| {
            let effective = at(stage, &["batch", "effective"])?.as_u64().filter(|batch| *batch > 0)?;
            Some(Length::new(1.0, images?, effective as usize).steps_per_epoch)
        };
        if let (Some(before), Some(after)) = (steps(self.then, images_then), steps(self.now, images_now))
            && before != after
        {
            let path: &[&str] = match at(self.then, &["batch", "effective"]) == at(self.now, &["batch", "effective"]) {
                true => &["data"],
                false => &["batch", "effective"],
            };
            let path: Vec<String> = path.iter().map(|key| (*key).to_owned()).collect();
            let message = format!(
                "the checkpoint is after step {step} of {before} an epoch, and an epoch has {after} now: it would go on in \
                 another place of the data"
            );
            return Some(refusal(self.name, &path, message).help(weights));
        }
        let end = self.summary.steps.filter(|end| *end < step)?;
        let message = format!("the checkpoint is after step {step}, and the stage ends after {end}");
        Some(
            refusal(self.name, &["epochs".to_owned()], message)
                .help("ask for more epochs, or go on from an earlier checkpoint with `@STEP`"),
        )
    }

    /// The parameters must have the names and the shapes of the checkpoint's.
    fn state_faults(&self, tensors: &TensorMap, step: u64, weights: &str) -> Vec<Refusal> {
        let has_state = tensors.keys().any(|name| name.starts_with("optimizer."));
        let of_optimizer = |parameter: &str| {
            let is_its = |rest: &str| rest.split_once('.').is_some_and(|(_, name)| name == parameter);
            tensors.keys().filter_map(|name| name.strip_prefix("optimizer.")).any(is_its)
        };
        let differences = differences(Some(self.then), Some(self.now));
        let (mut found, mut told): (Vec<Refusal>, Vec<bool>) = (Vec::new(), Vec::new());
        for parameter in &self.summary.saved {
            let name = &parameter.name;
            let message = match tensors.get(&format!("model.{name}")) {
                None => format!("`{name}` is not in the checkpoint of step {step}"),
                Some(tensor) if tensor.shape != parameter.dims => {
                    format!("`{name}` is {:?}, and {:?} in the checkpoint of step {step}", parameter.dims, tensor.shape)
                }
                Some(_) if parameter.is_trained && has_state && !of_optimizer(name) => {
                    format!("`{name}` is trained, and was not when the checkpoint of step {step} was made")
                }
                Some(_) => continue,
            };
            let is_students = parameter.role == Role::Student;
            if told.contains(&is_students) {
                continue;
            }
            told.push(is_students);
            let changed: Vec<&Vec<String>> = differences.iter().filter(|path| path[0] != "type").collect();
            let mut places = changed.iter().filter(|path| (path[0] == "student") == is_students && !is_free(path));
            if !found.is_empty() && places.clone().next().is_none() {
                // It follows from what was said already.
                continue;
            }
            let first = places.next().or_else(|| changed.first()).map(|path| (*path).clone()).unwrap_or_default();
            let mut fault = refusal(self.name, &first, message);
            for place in places {
                let path: Vec<&str> =
                    ["stages", self.name].into_iter().chain(place.iter().map(String::as_str)).collect();
                fault = fault.related(path, "this differs from the run's too");
            }
            found.push(fault.help(weights));
        }
        found
    }
}

/// Whether an option of a stage has nothing to do with its parameters.
fn is_free(path: &[String]) -> bool {
    const FREE: [&str; 8] = ["epochs", "schedule", "batch", "checkpoints", "data", "eval", "masker", "knn"];
    FREE.contains(&path[0].as_str()) || path.last().is_some_and(|key| key == "drop_path")
}

/// A refusal at a place of a stage.
fn refusal(stage: &str, path: &[String], message: impl Into<String>) -> Refusal {
    let path = ["stages".to_owned(), stage.to_owned()].into_iter().chain(path.iter().cloned());
    path.rev().fold(Refusal::whole(message), Refusal::under)
}

fn at<'v>(value: &'v Value, path: &[&str]) -> Option<&'v Value> {
    path.iter().try_fold(value, |value, key| value.get(key))
}

/// The paths of the values that two stages do not share, in the order of the second.
fn differences(then: Option<&Value>, now: Option<&Value>) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    differ(&mut Vec::new(), then, now, &mut found);
    found
}

fn differ(path: &mut Vec<String>, then: Option<&Value>, now: Option<&Value>, found: &mut Vec<Vec<String>>) {
    if let (Some(Value::Object(then)), Some(Value::Object(now))) = (then, now) {
        let gone = then.iter().filter(|(key, _)| !now.contains_key(*key)).map(|(key, value)| (key, Some(value), None));
        let there = now.iter().map(|(key, value)| (key, then.get(key), Some(value)));
        for (key, then, now) in there.chain(gone) {
            path.push(key.clone());
            differ(path, then, now, found);
            path.pop();
        }
    } else if then != now && !path.is_empty() {
        found.push(path.clone());
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_differs_in_a_stage_is_named_by_its_keys() {
        let then =
            json!({ "type": "a", "student": { "arch": { "dim": 8 }, "drop_path": 0.0 }, "list": [1, 2], "gone": 1 });
        let now = json!({ "type": "a", "student": { "arch": { "dim": 16 }, "drop_path": 0.5 }, "list": [1, 3], "new.key": {} });
        let expected: [&[&str]; 5] =
            [&["student", "arch", "dim"], &["student", "drop_path"], &["list"], &["new.key"], &["gone"]];
        assert_eq!(differences(Some(&then), Some(&now)), expected);
        assert!(differences(Some(&then), Some(&then)).is_empty());
        let refused = refusal("pre", &differences(Some(&then), Some(&now))[0], "no");
        assert_eq!(refused.path, ["stages", "pre", "student", "arch", "dim"]);
    }
}
