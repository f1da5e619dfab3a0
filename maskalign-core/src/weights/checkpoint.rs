//! A stage's state at a step, as a safetensors file with a header.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::tensor_file::{TensorFile, TensorRef, digest, write_tensors};
use super::{TensorMap, WeightsError};
use crate::files::{RunError, atomic_write};

/// The one metadata key of a checkpoint's safetensors file; one, so that equal states give equal bytes.
const METADATA_KEY: &str = "maskalign-checkpoint-v1";

/// All of a checkpoint but its tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckpointHeader {
    /// The stage's name.
    pub stage: String,
    /// Optimizer steps done.
    pub step: u64,
    /// Fingerprint of the recipe.
    pub fingerprint: String,
    /// Records in `metrics.jsonl` so far (`run::Metrics::records`).
    pub metrics_records: u64,
    /// Names of the parameters that are the student's, which later stages and exports take; the rest aligned it.
    pub student: Vec<String>,
    /// What else the stage needs to go on. It must depend on the state alone (no times, no hash map's order).
    pub meta: Value,
}

impl CheckpointHeader {
    /// The header of a checkpoint, whose tensors are not read.
    ///
    /// # Errors
    /// Where the file cannot be read or is no checkpoint.
    pub fn read(path: &Path) -> Result<CheckpointHeader, RunError> {
        let file = TensorFile::open(path).map_err(|error| damaged(path, error))?;
        Ok(stored(path, &file)?.header.into_owned())
    }

    /// The header of a file that may be a checkpoint; `None` where it is another safetensors file.
    pub(crate) fn of(path: &Path, file: &TensorFile) -> Result<Option<CheckpointHeader>, RunError> {
        match file.metadata().contains_key(METADATA_KEY) {
            true => Ok(Some(stored(path, file)?.header.into_owned())),
            false => Ok(None),
        }
    }
}

/// A stage's state at a step, read back.
///
/// Tensors are named by what they are: `model.NAME`, `optimizer.exp_avg.NAME`, `optimizer.exp_avg_sq.NAME`.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// All but the tensors.
    pub header: CheckpointHeader,
    /// The tensors by their prefixed names.
    pub tensors: TensorMap,
}

/// What the metadata key holds.
#[derive(Serialize, Deserialize)]
struct Stored<'a> {
    header: Cow<'a, CheckpointHeader>,
    /// BLAKE3 over names, shapes and values: a damaged file is known as such.
    blake3: String,
}

impl Checkpoint {
    /// Writes a checkpoint; what is copied is a small buffer and, from a device, one tensor at a time. Equal input gives equal bytes.
    ///
    /// `what` names the kind of file in errors.
    pub fn save(path: &Path, what: &str, header: &CheckpointHeader, tensors: &[TensorRef<'_>]) -> Result<(), RunError> {
        let blake3 = digest(tensors).to_string();
        let stored = serde_json::to_string(&Stored { header: Cow::Borrowed(header), blake3 })
            .map_err(|error| RunError::writing(what, path, error.into()))?;
        atomic_write(path, what, |file| {
            write_tensors(file, tensors, Some((METADATA_KEY, &stored)))?;
            file.flush()
        })
    }

    /// Reads a checkpoint and checks that every byte is as it was written.
    pub fn load(path: &Path) -> Result<Checkpoint, RunError> {
        let file = TensorFile::open(path).map_err(|error| damaged(path, error))?;
        let Stored { header, blake3 } = stored(path, &file)?;
        let header = header.into_owned();
        let tensors = file.read_all().map_err(|error| damaged(path, error))?;
        if digest(&TensorRef::all_of(&tensors)).to_string() != blake3 {
            return Err(RunError::damaged(path, "its content differs from its checksum"));
        }
        Ok(Checkpoint { header, tensors })
    }

    /// The student's parameters under their own names.
    pub fn into_student(self) -> TensorMap {
        self.into_parameters().0
    }

    /// The student's parameters under their own names, and those that were trained beside it: an alignment's or a
    /// classifier's.
    pub fn into_parameters(self) -> (TensorMap, TensorMap) {
        let Checkpoint { header, tensors } = self;
        let student: BTreeSet<String> = header.student.into_iter().collect();
        tensors
            .into_iter()
            .filter(|(name, _)| !name.starts_with("optimizer."))
            .map(|(name, tensor)| {
                // A stage's final weights have no prefix.
                let name = name.strip_prefix("model.").map_or(name.clone(), str::to_owned);
                (name, tensor)
            })
            .partition(|(name, _)| student.contains(name))
    }
}

fn stored(path: &Path, file: &TensorFile) -> Result<Stored<'static>, RunError> {
    let metadata = file.metadata();
    let text = metadata
        .get(METADATA_KEY)
        .ok_or_else(|| RunError::damaged(path, format!("it is not a checkpoint: no metadata `{METADATA_KEY}`")))?;
    serde_json::from_str(text).map_err(|error| RunError::damaged(path, format!("its metadata does not parse: {error}")))
}

fn damaged(path: &Path, error: WeightsError) -> RunError {
    match error {
        WeightsError::Io { source, .. } => RunError::reading("checkpoint", path, source),
        WeightsError::Format { reason, .. } => RunError::damaged(path, reason),
        other => RunError::damaged(path, other.to_string()),
    }
}

/// Which checkpoints stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// The newest so many; at least one is always kept.
    pub keep_last: usize,
    /// Besides those, each whose step is a multiple of this.
    pub keep_every: Option<u64>,
}

impl Retention {
    /// Of checkpoints in ascending order of steps, those to delete.
    pub(crate) fn to_delete(self, checkpoints: &[(u64, PathBuf)]) -> impl Iterator<Item = &Path> {
        let old = checkpoints.len().saturating_sub(self.keep_last.max(1));
        checkpoints[..old]
            .iter()
            .filter(move |(step, _)| !self.keep_every.is_some_and(|every| every > 0 && step % every == 0))
            .map(|(_, path)| path.as_path())
    }
}

#[cfg(test)]
mod tests {
    use crate::weights::TensorData;
    use std::fs;

    use serde_json::json;

    use super::*;

    fn header(step: u64) -> CheckpointHeader {
        CheckpointHeader {
            stage: "pretrain".into(),
            step,
            fingerprint: "f00d".into(),
            metrics_records: 7,
            student: vec!["w".into()],
            meta: json!({ "epoch": 0.25, "scale": 1.0e-300 }),
        }
    }

    fn tensors<'a>(weight: &'a [f32], average: &'a [f32]) -> Vec<TensorRef<'a>> {
        vec![
            TensorRef { name: "optimizer.exp_avg.w".into(), shape: vec![2, 3], data: TensorData::Host(average) },
            TensorRef { name: "model.w".into(), shape: vec![2, 3], data: TensorData::Host(weight) },
            TensorRef { name: "model.none".into(), shape: vec![0, 4], data: TensorData::Host(&[]) },
        ]
    }

    const WEIGHT: [f32; 6] = [1.0, -0.0, f32::MIN_POSITIVE / 2.0, 4.0, f32::MAX, -6.5];
    const AVERAGE: [f32; 6] = [0.5; 6];

    #[test]
    fn a_checkpoint_reads_back_bit_for_bit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.safetensors");
        Checkpoint::save(&path, "checkpoint", &header(12), &tensors(&WEIGHT, &AVERAGE)).unwrap();
        let read = Checkpoint::load(&path).unwrap();
        assert_eq!(read.header, header(12));
        let bits = |data: &[f32]| data.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&read.tensors["model.w"].data), bits(&WEIGHT));
        assert_eq!(read.tensors["optimizer.exp_avg.w"].shape, [2, 3]);
        assert_eq!(read.tensors["model.none"].shape, [0, 4]);
    }

    #[test]
    fn the_student_is_told_from_what_was_trained_beside_it() {
        let checkpoint = |names: &[&str]| {
            let tensor = || crate::weights::HostTensor { shape: vec![1], data: vec![1.0] };
            let tensors = names.iter().map(|name| (name.to_string(), tensor())).collect();
            let (student, beside) = Checkpoint { header: header(12), tensors }.into_parameters();
            let names = |map: TensorMap| map.into_keys().collect::<Vec<_>>().join(" ");
            (names(student), names(beside))
        };
        let both = ("w".to_owned(), "head.weight".to_owned());
        assert_eq!(checkpoint(&["model.w", "model.head.weight", "optimizer.exp_avg.w"]), both);
        assert_eq!(checkpoint(&["w", "head.weight"]), both);
    }

    #[test]
    fn equal_states_give_equal_bytes_in_any_order() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("a"), folder.path().join("b"));
        Checkpoint::save(&a, "checkpoint", &header(3), &tensors(&WEIGHT, &AVERAGE)).unwrap();
        let mut reversed = tensors(&WEIGHT, &AVERAGE);
        reversed.reverse();
        Checkpoint::save(&b, "checkpoint", &header(3), &reversed).unwrap();
        assert_eq!(fs::read(a).unwrap(), fs::read(b).unwrap());
    }

    #[test]
    fn every_damaged_byte_and_every_truncation_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.safetensors");
        Checkpoint::save(&path, "checkpoint", &header(12), &tensors(&WEIGHT, &AVERAGE)).unwrap();
        let whole = fs::read(&path).unwrap();
        let data_starts = whole.len() - 2 * 6 * 4;
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            assert!(matches!(Checkpoint::load(&path), Err(RunError::Damaged { .. })), "length {length}");
        }
        for byte in data_starts..whole.len() {
            let mut damaged = whole.clone();
            damaged[byte] ^= 1;
            fs::write(&path, damaged).unwrap();
            let error = Checkpoint::load(&path).unwrap_err().to_string();
            assert!(error.contains("checksum"), "{error}");
        }
    }

    #[test]
    fn a_weights_file_is_not_taken_for_a_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.safetensors");
        crate::weights::write_safetensors(&path, &TensorMap::new(), None).unwrap();
        let error = Checkpoint::load(&path).unwrap_err().to_string();
        assert!(error.contains("not a checkpoint"), "{error}");
    }

    #[test]
    fn a_shape_that_does_not_fit_its_data_writes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.safetensors");
        let wrong = [TensorRef { name: "w".into(), shape: vec![2], data: TensorData::Host(&WEIGHT) }];
        assert!(Checkpoint::save(&path, "checkpoint", &header(0), &wrong).is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_last_few_and_every_nth_stay() {
        let all: Vec<_> = (1..=10).map(|i| (i * 100, PathBuf::from(i.to_string()))).collect();
        let deleted = |keep_last, keep_every| {
            Retention { keep_last, keep_every }
                .to_delete(&all)
                .map(|p| p.to_str().unwrap())
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(deleted(3, None), "1 2 3 4 5 6 7");
        assert_eq!(deleted(2, Some(300)), "1 2 4 5 7 8");
        assert_eq!(deleted(0, Some(0)), "1 2 3 4 5 6 7 8 9");
        assert_eq!(deleted(99, None), "");
    }
}
