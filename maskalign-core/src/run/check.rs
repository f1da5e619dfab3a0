//! Whether a run directory is whole.

use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use super::directory::RunDir;
use crate::files::RunError;

/// One of a run's files, and whether it is as it was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Item {
    /// Its path inside the run directory.
    pub name: String,
    /// Whether it is there, is as it was written, and agrees with the others.
    pub whole: bool,
    /// What it holds, or what is wrong with it.
    pub says: String,
}

impl Item {
    /// One that is whole.
    pub fn whole(name: impl Into<String>, says: impl Into<String>) -> Item {
        Item { name: name.into(), whole: true, says: says.into() }
    }

    /// One that is not.
    pub fn broken(name: impl Into<String>, says: impl Into<String>) -> Item {
        Item { name: name.into(), whole: false, says: says.into() }
    }

    fn of<T>(name: &str, read: Result<T, RunError>, says: impl FnOnce(T) -> String) -> Item {
        match read {
            Ok(value) => Item::whole(name, says(value)),
            Err(RunError::Damaged { reason, .. }) => Item::broken(name, reason),
            Err(RunError::Outdated { .. }) => Item::broken(name, "an earlier version wrote it, without a checksum"),
            Err(RunError::NotPlain { found, .. }) => Item::broken(name, format!("it is {found}")),
            Err(error) => Item::broken(name, error.to_string()),
        }
    }
}

/// What was found in a run directory.
#[derive(Debug)]
pub struct Findings {
    /// The run's files.
    pub items: Vec<Item>,
    /// The fingerprint of the recipe that the manifest names, where that is whole.
    pub fingerprint: Option<String>,
}

/// Reads everything that a run left and that it would go on from. Nothing is changed, and nothing is locked.
///
/// Whether the recipe is the one of the manifest is left to who can read recipes.
///
/// # Errors
/// The folder is no run's, or cannot be read at all.
pub fn check(path: &Path) -> Result<Findings, RunError> {
    let run = RunDir::look_at(path)?;
    let says = match run.is_in_use() {
        true => "in use by another process: what it is writing now may look damaged",
        false => "not in use",
    };
    let mut items = vec![Item::whole(".maskalign-run", says)];
    let manifest = run.read_manifest();
    let fingerprint = manifest.as_ref().ok().and_then(Option::as_ref).map(|manifest| manifest.fingerprint.clone());
    let ended = matches!(&manifest, Ok(Some(manifest)) if manifest.ended.is_some());
    let begun = run.is_trained()?;
    items.push(Item::of("recipe.resolved.yaml", there(run.read_recipe(), &run.recipe_path(), begun), |there| {
        if there { "there".into() } else { "not written yet".into() }
    }));
    items.push(Item::of("manifest.json", there(manifest, &run.manifest_path(), begun), |there| match (there, ended) {
        (false, _) => "not written yet".into(),
        (true, true) => "the run has ended".into(),
        (true, false) => "the run has not ended, or goes on".into(),
    }));
    items.extend(metrics(&run, ended));
    let mut finished = Vec::new();
    for stage in run.stages()? {
        let inside = |name: &str| format!("checkpoints/{stage}/{name}");
        let agrees = |theirs: &str| match &fingerprint {
            Some(own) if own != theirs => Err(RunError::damaged(path, "it is of another recipe than the manifest")),
            _ => Ok(()),
        };
        for (step, file) in run.checkpoints(&stage)? {
            let read = run.read_checkpoint(&stage, step);
            let read = read.and_then(|checkpoint| agrees(&checkpoint.header.fingerprint).map(|()| checkpoint));
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            items.push(Item::of(&inside(&name), read, |read| format!("{} tensors", read.tensors.len())));
        }
        for (step, file) in run.bests(&stage)? {
            let read = run.read_best(&stage, step);
            let read = read.and_then(|best| agrees(&best.header.fingerprint).map(|()| best));
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            items.push(Item::of(&inside(&name), read, |read| format!("{} tensors", read.tensors.len())));
        }
        match run.failed(&stage) {
            Ok(None) => {}
            Ok(Some((failed, _))) => {
                let says = format!("the {} of step {} was not finite", failed.what, failed.step);
                items.push(Item::whole(inside(&format!("failed-{:08}.json", failed.step)), says));
            }
            Err(error) => items.push(Item::of(&inside("failed-*"), Err::<(), _>(error), |()| String::new())),
        }
        match run.read_done(&stage) {
            Ok(None) => {}
            Ok(Some(done)) => {
                let read = agrees(&done.fingerprint).and_then(|()| run.check_metrics(done.metrics_records));
                items.push(Item::of(&inside("done.json"), read, |()| format!("finished after step {}", done.step)));
                let left = run.read_final(&stage, &done);
                items.push(Item::of(&inside("final.safetensors"), left, |left| {
                    format!("{} tensors", left.tensors.len())
                }));
                finished.push((stage, Some(done.results)));
            }
            Err(error) => {
                items.push(Item::of(&inside("done.json"), Err::<(), _>(error), |()| String::new()));
                finished.push((stage, None));
            }
        }
    }
    items.push(summary(&run, &finished, ended));
    Ok(Findings { items, fingerprint })
}

/// Whether a file is there; an error where one is missing that a stage cannot have begun without.
fn there<T>(read: Result<Option<T>, RunError>, path: &Path, needed: bool) -> Result<bool, RunError> {
    match read? {
        None if needed => Err(RunError::damaged(path, "it is gone; put back a copy of it")),
        found => Ok(found.is_some()),
    }
}

fn metrics(run: &RunDir, ended: bool) -> Vec<Item> {
    let (names, whole) = (["metrics.marks.json", "metrics.jsonl"], run.whole_metrics());
    match whole {
        Ok((marks, records, tail)) => {
            let mut says = format!("{records} records");
            let mut is_whole = !tail.torn && (tail.records == 0 || !ended);
            match (tail.records, tail.torn) {
                (0, false) => {}
                (more, false) => says += &format!(", and {more} since, which `--resume` makes again"),
                (_, true) => says += ", and a torn line, which `--resume` cuts off",
            }
            if marks == 0 && tail.records == 0 && !tail.torn {
                is_whole = true;
            }
            let metrics = if is_whole { Item::whole(names[1], says) } else { Item::broken(names[1], says) };
            vec![Item::whole(names[0], format!("{marks} marks")), metrics]
        }
        Err(error) => {
            let at_marks = error.damaged_path().is_some_and(|path| path.ends_with(names[0]));
            vec![Item::of(names[usize::from(!at_marks)], Err::<(), _>(error), |()| String::new())]
        }
    }
}

/// Whether the summary has each finished stage's results, where these are known, and no others.
fn summary(run: &RunDir, finished: &[(String, Option<Value>)], ended: bool) -> Item {
    let name = "summary.json";
    let summary = match run.read_summary() {
        Ok(summary) => summary,
        Err(error) => return Item::of(name, Err::<(), _>(error), |()| String::new()),
    };
    for (stage, results) in finished {
        match summary.get(stage) {
            Some(found) if results.as_ref().is_none_or(|results| results == found) => {}
            None if !ended => {}
            _ => {
                return Item::broken(name, format!("it has not the results of `{stage}`, which `--resume` puts there"));
            }
        }
    }
    match summary.keys().find(|stage| finished.iter().all(|(known, _)| known != *stage)) {
        Some(stage) => Item::broken(name, format!("it has results of `{stage}`, which is not finished")),
        None => Item::whole(name, format!("results of {} stages", summary.len())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::{Manifest, Mode};

    #[test]
    fn a_run_that_goes_on_is_looked_at_without_its_lock() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(check(folder.path()), Err(RunError::NotARun { .. })));
        let run = RunDir::create(folder.path(), Mode::Fresh).unwrap();
        let first = || check(folder.path()).unwrap().items.remove(0);
        assert!(first().whole && first().says.starts_with("in use"), "{:?}", first());
        run.write_manifest(&Manifest::default()).unwrap();
        assert!(check(folder.path()).unwrap().items.iter().all(|item| item.whole));
        drop(run);
        assert_eq!(first().says, "not in use");
        RunDir::create(folder.path(), Mode::Resume).unwrap();
    }
}
