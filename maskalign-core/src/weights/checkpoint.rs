//! A stage's state at a step, as a safetensors file with a header.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::tensor_file::{TensorFile, TensorRef, digest, write_tensors};
use super::{TensorMap, WeightsError};
use crate::files::{RunError, atomic_write};

/// The one metadata key of a checkpoint's safetensors file; one, so that equal states give equal bytes. It holds a BLAKE3 in
/// hexadecimal, a space, and the header as JSON; the checksum is over that JSON, and over names, shapes and values.
const METADATA_KEY: &str = "maskalign-checkpoint-v2";
/// The key of earlier versions: a JSON object of header and checksum, which was over the tensors alone.
const FIRST_METADATA_KEY: &str = "maskalign-checkpoint-v1";

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
        Ok(Stored::of(path, &file)?.header)
    }

    /// The header of a file that may be a checkpoint; `None` where it is another safetensors file.
    pub(crate) fn of(path: &Path, file: &TensorFile) -> Result<Option<CheckpointHeader>, RunError> {
        let metadata = file.metadata();
        match [METADATA_KEY, FIRST_METADATA_KEY].iter().any(|key| metadata.contains_key(*key)) {
            true => Ok(Some(Stored::of(path, file)?.header)),
            false => Ok(None),
        }
    }
}

/// A stage's state at a step, read back.
///
/// Tensors are named by what they are: `model.NAME`, `optimizer.exp_avg.NAME`, `optimizer.exp_avg_sq.NAME`, `ema.NAME`.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// All but the tensors.
    pub header: CheckpointHeader,
    /// The tensors by their prefixed names.
    pub tensors: TensorMap,
}

/// What a file's metadata holds.
struct Stored {
    header: CheckpointHeader,
    /// What the checksum is over besides the tensors; `None` for earlier versions, whose checksum was over the tensors alone.
    text: Option<String>,
    /// In hexadecimal.
    blake3: String,
}

impl Stored {
    fn of(path: &Path, file: &TensorFile) -> Result<Stored, RunError> {
        /// What the key of earlier versions held.
        #[derive(Deserialize)]
        struct First {
            header: CheckpointHeader,
            blake3: String,
        }
        let unread =
            |error: serde_json::Error| RunError::damaged(path, format!("its metadata does not parse: {error}"));
        let mut metadata = file.metadata();
        if let Some(text) = metadata.remove(METADATA_KEY) {
            let Some((blake3, text)) = text.split_once(' ') else {
                return Err(RunError::damaged(path, "its metadata is no checksum and header"));
            };
            let header = serde_json::from_str(text).map_err(unread)?;
            return Ok(Stored { header, text: Some(text.to_owned()), blake3: blake3.to_owned() });
        }
        let Some(text) = metadata.remove(FIRST_METADATA_KEY) else {
            let reason = format!("it is not a checkpoint: no metadata `{METADATA_KEY}`");
            return Err(RunError::damaged(path, reason));
        };
        let First { header, blake3 } = serde_json::from_str(&text).map_err(unread)?;
        Ok(Stored { header, text: None, blake3 })
    }

    /// Reads the tensors and checks that every byte is as it was written.
    fn with_tensors(self, path: &Path, file: TensorFile) -> Result<Checkpoint, RunError> {
        let Stored { header, text, blake3 } = self;
        let tensors = file.read_all().map_err(|error| damaged(path, error))?;
        let text = text.unwrap_or_default();
        if digest(text.as_bytes(), &TensorRef::all_of(&tensors)).to_string() != blake3 {
            return Err(RunError::damaged(path, "its content differs from its checksum"));
        }
        Ok(Checkpoint { header, tensors })
    }
}

/// A header and the checksum over it and the tensors, ready to be written before them.
pub(crate) struct Sealed(String);

impl Sealed {
    pub(crate) fn of(
        path: &Path,
        what: &str,
        header: &CheckpointHeader,
        tensors: &[TensorRef<'_>],
    ) -> Result<Sealed, RunError> {
        let header = serde_json::to_string(header).map_err(|error| RunError::writing(what, path, error.into()))?;
        Ok(Sealed(format!("{} {header}", digest(header.as_bytes(), tensors))))
    }

    pub(crate) fn write(&self, path: &Path, what: &str, tensors: &[TensorRef<'_>]) -> Result<(), RunError> {
        atomic_write(path, what, |file| {
            write_tensors(file, tensors, Some((METADATA_KEY, &self.0)))?;
            file.flush()
        })
    }
}

impl Checkpoint {
    /// Writes a checkpoint; what is copied is a small buffer and, from a device, one tensor at a time. Equal input gives equal bytes.
    ///
    /// `what` names the kind of file in errors.
    pub fn save(path: &Path, what: &str, header: &CheckpointHeader, tensors: &[TensorRef<'_>]) -> Result<(), RunError> {
        Sealed::of(path, what, header, tensors)?.write(path, what, tensors)
    }

    /// Reads a checkpoint to go on from and checks that every byte is as it was written.
    ///
    /// # Errors
    /// A file that cannot be read, is damaged, or is of an earlier version, in which not all was under the checksum.
    pub fn load(path: &Path) -> Result<Checkpoint, RunError> {
        let file = File::open(path).map_err(|error| RunError::reading("checkpoint", path, error))?;
        Checkpoint::of(path, file)
    }

    /// As [`Checkpoint::load`], of a file that is open.
    pub(crate) fn of(path: &Path, file: File) -> Result<Checkpoint, RunError> {
        let file = TensorFile::of(path, file).map_err(|error| damaged(path, error))?;
        let stored = Stored::of(path, &file)?;
        match stored.text {
            Some(_) => stored.with_tensors(path, file),
            None => Err(RunError::Outdated { path: path.to_owned() }),
        }
    }

    /// Reads a checkpoint for its parameters alone, which those of earlier versions have too.
    ///
    /// # Errors
    /// A file that cannot be read or is damaged.
    pub fn load_parameters(path: &Path) -> Result<Checkpoint, RunError> {
        let file = TensorFile::open(path).map_err(|error| damaged(path, error))?;
        Stored::of(path, &file)?.with_tensors(path, file)
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
        // Beside the parameters a checkpoint holds what goes on with them; a stage's final weights have no prefixes.
        let is_checkpoint = tensors.keys().any(|name| name.starts_with("model."));
        let is_beside =
            move |name: &str| name.starts_with("optimizer.") || is_checkpoint && !name.starts_with("model.");
        tensors
            .into_iter()
            .filter(|(name, _)| !is_beside(name))
            .map(|(name, tensor)| {
                let name = name.strip_prefix("model.").map_or(name.clone(), str::to_owned);
                (name, tensor)
            })
            .partition(|(name, _)| student.contains(name))
    }
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
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            assert!(matches!(Checkpoint::load(&path), Err(RunError::Damaged { .. })), "length {length}");
        }
        for byte in 0..whole.len() {
            for bit in 0..8 {
                let mut damaged = whole.clone();
                damaged[byte] ^= 1 << bit;
                fs::write(&path, &damaged).unwrap();
                let read = Checkpoint::load(&path);
                assert!(matches!(read, Err(RunError::Damaged { .. })), "byte {byte}, bit {bit}: {read:?}");
            }
        }
    }

    /// What steers a run that goes on: the step, the recipe, the count of records, what is the student's, the notes.
    #[test]
    fn a_header_that_is_valid_and_another_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.safetensors");
        Checkpoint::save(&path, "checkpoint", &header(24), &tensors(&WEIGHT, &AVERAGE)).unwrap();
        let whole = fs::read(&path).unwrap();
        for (from, to) in [
            (r#"\"step\":24"#, r#"\"step\":25"#),
            (r#"\"stage\":\"pretrain\""#, r#"\"stage\":\"pretrains\""#),
            ("f00d", "f00e"),
            (r#"\"metrics_records\":7"#, r#"\"metrics_records\":8"#),
            (r#"\"student\":[\"w\"]"#, r#"\"student\":[]   "#),
            ("0.25", "0.75"),
            (r#"\"step\":24"#, r#"\"step\":99,\"step\":24"#),
        ] {
            let header_length = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
            let text = std::str::from_utf8(&whole[8..8 + header_length]).unwrap();
            let changed = text.replacen(from, to, 1);
            assert_ne!(changed, text, "{from}");
            let mut bytes = (changed.len() as u64).to_le_bytes().to_vec();
            bytes.extend_from_slice(changed.as_bytes());
            bytes.extend_from_slice(&whole[8 + header_length..]);
            fs::write(&path, bytes).unwrap();
            let error = Checkpoint::load(&path).unwrap_err();
            assert!(matches!(error, RunError::Damaged { .. }) && error.is_user_mistake(), "{from}: {error}");
        }
    }

    /// A file that the version before this one wrote.
    #[test]
    fn a_checkpoint_of_an_earlier_version_is_answered_and_its_parameters_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.safetensors");
        let blake3 = digest(b"", &tensors(&WEIGHT, &AVERAGE)).to_string();
        let stored = json!({ "header": header(12), "blake3": blake3 }).to_string();
        let mut bytes = Vec::new();
        write_tensors(&mut bytes, &tensors(&WEIGHT, &AVERAGE), Some((FIRST_METADATA_KEY, &stored))).unwrap();
        fs::write(&path, &bytes).unwrap();
        let error = Checkpoint::load(&path).unwrap_err();
        assert!(matches!(error, RunError::Outdated { .. }) && error.is_user_mistake(), "{error}");
        assert_eq!(Checkpoint::load_parameters(&path).unwrap().header, header(12));
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert!(matches!(Checkpoint::load_parameters(&path), Err(RunError::Damaged { .. })));
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
