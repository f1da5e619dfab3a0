//! Run directories in which one file is another: what `runs check` says, and what a run would go on from.

use std::{collections::BTreeMap, fs, path::Path};

use maskalign_core::run::{CheckpointHeader, Item, Manifest, Mode, RunDir, RunError, check};
use maskalign_core::weights::{TensorData, TensorRef};
use serde_json::{Map, Value, json};

use super::{
    committed, edited,
    run::{Outcome, Random, Target, edit_number},
    tensors,
};

const STAGE: &str = "pretrain";
const CHECKPOINT: &str = "checkpoints/pretrain/step-00000006.safetensors";
const DONE: &str = "checkpoints/pretrain/done.json";

/// The files of a run that has ended, by their paths in it.
fn made() -> BTreeMap<String, Vec<u8>> {
    let folder = tempfile::tempdir().expect("a folder");
    let run = RunDir::create(folder.path(), Mode::Fresh).expect("a run");
    let manifest = Manifest {
        version: "0.1.0".into(),
        fingerprint: "f00d".into(),
        isa: "fused, avx2".into(),
        started: "2023-06-18T09:30:00Z".into(),
        ended: Some("2023-06-18T09:40:00Z".into()),
        ..Manifest::default()
    };
    run.write_recipe("name: x\nstages: {}\n").expect("it is written");
    run.write_manifest(&manifest).expect("it is written");
    let mut metrics = run.metrics(0).expect("there are none");
    let values = [0.5f32; 6];
    let tensors = || vec![TensorRef { name: "model.w".into(), shape: vec![2, 3], data: TensorData::Host(&values) }];
    let header = |step: u64, metrics_records: u64| CheckpointHeader {
        stage: STAGE.into(),
        step,
        fingerprint: "f00d".into(),
        metrics_records,
        student: vec!["w".into()],
        meta: json!({ "epoch": 0.25 }),
    };
    for step in 0..6u64 {
        metrics.append(&json!({ "stage": STAGE, "step": step, "loss": 0.5 })).expect("it is written");
        if step % 3 == 2 {
            run.mark_metrics(metrics.sync().expect("it is there")).expect("it is written");
            run.save_checkpoint(&header(step + 1, metrics.records()), &tensors()).expect("it is written");
        }
    }
    run.finish_stage(&header(6, 6), &tensors(), json!({ "loss": 0.5 })).expect("it is written");
    drop(run);
    let mut files = BTreeMap::new();
    let mut open = vec![folder.path().to_owned()];
    while let Some(next) = open.pop() {
        for entry in fs::read_dir(&next).expect("a folder").flatten() {
            match entry.path().is_dir() {
                true => open.push(entry.path()),
                false => {
                    let inside = entry.path().strip_prefix(folder.path()).expect("inside").display().to_string();
                    files.insert(inside, fs::read(entry.path()).expect("a file"));
                }
            }
        }
    }
    assert_eq!(files.len(), 10, "{:?}", files.keys());
    files
}

/// Writes a run anew, with one file replaced.
fn lay_out(folder: &Path, files: &BTreeMap<String, Vec<u8>>, replaced: &str, bytes: &[u8]) {
    let _ = fs::remove_dir_all(folder);
    for (name, content) in files {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().expect("it is inside")).expect("a folder");
        fs::write(path, if name == replaced { bytes } else { content }).expect("it is written");
    }
}

/// A checksum over a JSON object without its own entry, as the format of these files is described.
fn checksum(mut entries: Map<String, Value>) -> String {
    entries.shift_remove("blake3");
    blake3::hash(&serde_json::to_vec(&entries).expect("it is JSON")).to_hex().to_string()
}

fn is_sealed(bytes: &[u8]) -> bool {
    let read = serde_json::from_slice::<Map<String, Value>>(bytes);
    read.is_ok_and(|entries| entries.get("blake3") == Some(&Value::from(checksum(entries.clone()))))
}

fn seal(bytes: Vec<u8>) -> Vec<u8> {
    match serde_json::from_slice::<Map<String, Value>>(&bytes) {
        Ok(mut entries) => {
            let checksum = checksum(entries.clone());
            entries.insert("blake3".into(), checksum.into());
            Value::Object(entries).to_string().into_bytes()
        }
        Err(_) => bytes,
    }
}

/// Edits one value of a JSON text.
pub(super) fn edit_json(bytes: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    let mut root: Value = serde_json::from_slice(bytes).ok()?;
    let mut place = &mut root;
    for _ in 0..random.below(5) {
        let length = match place {
            Value::Array(items) => items.len(),
            Value::Object(entries) => entries.len(),
            _ => 0,
        };
        if length == 0 {
            break;
        }
        let at = random.below(length);
        place = match place {
            Value::Array(items) => &mut items[at],
            Value::Object(entries) => entries.values_mut().nth(at)?,
            _ => break,
        };
    }
    let values = [
        Value::Null,
        json!(true),
        json!(0),
        json!(1),
        json!(-1),
        json!(7),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(0.5),
        json!(1e300),
        json!(""),
        json!("pretrain"),
        json!("../..\u{1b}[31m\n"),
        json!([]),
        json!({}),
        json!([[1], { "a": [] }]),
    ];
    match place {
        Value::Array(items) if random.one_in(2) && !items.is_empty() => {
            let copy = items[random.below(items.len())].clone();
            items.insert(random.below(items.len()), copy);
        }
        Value::Array(items) if random.one_in(2) => drop(items.pop()),
        Value::Object(entries) if random.one_in(2) => {
            let name = entries.keys().nth(random.below(entries.len()))?.clone();
            let value = entries.shift_remove(&name)?;
            if random.one_in(2) {
                entries.insert(format!("{name}\u{7}"), value);
            }
        }
        place => *place = random.pick(&values).clone(),
    }
    Some(root.to_string().into_bytes())
}

fn check_items(items: &[Item]) -> Vec<String> {
    for item in items {
        assert!(!item.name.is_empty() && !item.says.is_empty(), "{item:?}");
    }
    items.iter().filter(|item| !item.whole).map(|item| format!("{}: {}", item.name, item.says)).collect()
}

/// Does all that a resumed run does before its first step; what stops it is a mistake that is told.
fn resume(folder: &Path) -> Result<(), RunError> {
    let run = RunDir::create(folder, Mode::Resume)?;
    run.read_manifest()?;
    run.read_recipe()?;
    run.finished_stage(STAGE)?;
    if let Some(checkpoint) = run.latest_checkpoint(STAGE)? {
        run.metrics(checkpoint.header.metrics_records)?;
    }
    Ok(())
}

/// A target for one of the files: an edit and a mending that know it, and what has to be so where the run is whole.
struct Replaced<'a> {
    name: &'a str,
    file: &'a str,
    edit: &'a dyn Fn(&[u8], &mut Random) -> Option<Vec<u8>>,
    mend: &'a dyn Fn(Vec<u8>) -> Vec<u8>,
    whole: &'a dyn Fn(&[u8], &[u8]) -> bool,
}

impl Replaced<'_> {
    fn run(self) {
        let folder = tempfile::tempdir().expect("a folder");
        let folder = folder.path().join("run");
        let files = made();
        let original = &files[self.file];
        Target {
            name: self.name,
            committed: &committed(),
            seeds: vec![("written now".into(), original.clone())],
            edit: self.edit,
            mend: self.mend,
            read: &|bytes| {
                lay_out(&folder, &files, self.file, bytes);
                let outcome = match check(&folder) {
                    Ok(findings) => match check_items(&findings.items) {
                        broken if broken.is_empty() => {
                            assert!((self.whole)(bytes, original), "{:?}", String::from_utf8_lossy(bytes));
                            Outcome::Accepted(bytes.len() as u64)
                        }
                        broken => Outcome::Refused(broken.join("\n")),
                    },
                    Err(error) => Outcome::Refused(error.to_string()),
                };
                match resume(&folder) {
                    Ok(()) => outcome,
                    Err(error) => {
                        assert!(error.is_user_mistake(), "{error:?}");
                        match outcome {
                            Outcome::Refused(message) => Outcome::Refused(format!("{message}\n{error}")),
                            Outcome::Accepted(_) => panic!("it is whole, and not resumed: {error}"),
                        }
                    }
                }
            },
            memory: &|bytes, accepted| (4 << 20) + 512 * bytes.len() as u64 + 16 * accepted,
            cases: 250,
            most_bytes: 16 << 10,
        }
        .run();
    }
}

#[test]
fn manifest() {
    Replaced {
        name: "run-manifest",
        file: "manifest.json",
        edit: &edit_json,
        mend: &seal,
        whole: &|bytes, _| is_sealed(bytes),
    }
    .run();
}

#[test]
fn done() {
    Replaced { name: "run-done", file: DONE, edit: &edit_json, mend: &seal, whole: &|bytes, _| is_sealed(bytes) }.run();
}

#[test]
fn marks() {
    Replaced {
        name: "run-marks",
        file: "metrics.marks.json",
        edit: &edit_json,
        mend: &seal,
        whole: &|bytes, _| is_sealed(bytes),
    }
    .run();
}

#[test]
fn summary() {
    let value = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).ok();
    Replaced {
        name: "run-summary",
        file: "summary.json",
        edit: &edit_json,
        mend: &|bytes| bytes,
        whole: &|bytes, original| value(bytes) == value(original),
    }
    .run();
}

#[test]
fn metrics() {
    let edit = |bytes: &[u8], random: &mut Random| {
        let mut lines: Vec<Vec<u8>> = bytes.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
        let at = random.below(lines.len());
        lines.get(at)?;
        match random.below(5) {
            0 => drop(lines.remove(at)),
            1 => lines.insert(at, lines.get(at)?.clone()),
            2 => drop(edit_number(lines.get_mut(at)?, random)),
            3 => {
                let other = random.below(lines.len());
                lines.swap(at, other);
            }
            _ => *lines.get_mut(at)? = [edit_json(&lines[at], random)?, b"\n".to_vec()].concat(),
        }
        Some(lines.concat())
    };
    Replaced {
        name: "run-metrics",
        file: "metrics.jsonl",
        edit: &edit,
        mend: &|bytes| bytes,
        whole: &|bytes, original| bytes.starts_with(original),
    }
    .run();
}

#[test]
fn checkpoint() {
    let edit = |bytes: &[u8], random: &mut Random| {
        let mut parts = tensors::Parts::of(bytes)?;
        if random.one_in(2) {
            parts.edit(random)?;
        } else {
            let text = parts.sealed()?.1.as_bytes();
            let text = if random.one_in(2) { edited(text, random) } else { edit_json(text, random)? };
            let sealed = format!("0 {}", String::from_utf8_lossy(&text));
            parts.metadata.insert(tensors::CHECKPOINT.into(), sealed.into());
        }
        Some(parts.file())
    };
    Replaced {
        name: "run-checkpoint",
        file: CHECKPOINT,
        edit: &edit,
        mend: &tensors::mend,
        whole: &|bytes, _| {
            let parts = tensors::Parts::of(bytes).expect("a safetensors file");
            let (seal, text) = parts.sealed().expect("a checkpoint");
            parts.entries.iter().any(|entry| entry.dtype != "F32") || parts.digest(text) == seal
        },
    }
    .run();
}

#[test]
fn marker() {
    Replaced {
        name: "run-marker",
        file: ".maskalign-run",
        edit: &super::no_edit,
        mend: &|bytes| bytes,
        whole: &|_, _| true,
    }
    .run();
}
