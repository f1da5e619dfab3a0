//! `manifest.json`: the record of how a run was made.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::files::RunError;

/// The result that says of a stage that it ended before its last step, since nothing better was waited for.
pub const STOPPED_EARLY: &str = "stopped_early";

/// `manifest.json`: with what, where and when a run was made. Times are RFC 3339 in UTC.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Manifest {
    /// Version of MaskAlign.
    pub version: String,
    /// Commit that the binary was built from, where known.
    pub commit: Option<String>,
    /// The command line that began the run, one argument an entry.
    pub command_line: Vec<String>,
    /// The folder that relative paths of the recipe start from: that of the process which began the run. Of a name that is
    /// not Unicode what can be shown.
    pub working_directory: Option<PathBuf>,
    /// The recipe's fingerprint.
    pub fingerprint: String,
    /// The recipe's seed.
    pub seed: u64,
    /// The device in words, as in `cpu` or `cuda:0`.
    pub device: String,
    /// Worker threads.
    pub threads: usize,
    /// The kernels that it began with, as in `fused, avx2`: with others, the last bits differ.
    pub isa: String,
    /// The weights that the recipe names.
    pub weights: Vec<FileRecord>,
    /// The data of each stage.
    pub data: Vec<DataRecord>,
    /// The stages, in their order.
    pub stages: Vec<StageRecord>,
    /// The stages that left their best state, known when the run ended.
    pub best: Vec<BestRecord>,
    /// When the run began.
    pub started: String,
    /// When it ended; absent while it runs, and after a kill.
    pub ended: Option<String>,
    /// The most memory that the process had resident, in MiB, where the system tells; known when it ended.
    #[serde(default)]
    pub peak_memory_mib: Option<f64>,
    /// The run that it goes on from, where it is a fork.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// Each time it was resumed, in order.
    pub resumed: Vec<Resumption>,
}

/// What a fork took over, and from where.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The directory of the other run.
    pub run: PathBuf,
    /// The fingerprint of its recipe.
    pub fingerprint: String,
    /// Its stages that were taken over as they were.
    pub finished_stages: Vec<String>,
    /// The stage that went on from a checkpoint of it; absent where what follows the finished stages began anew.
    pub stage: Option<String>,
    /// Optimizer steps of that checkpoint.
    pub step: Option<u64>,
    /// Where the recipes differ, one line each.
    pub differences: Vec<String>,
}

impl Manifest {
    /// The kernels that the run was computed with last.
    pub fn computed_on(&self) -> &str {
        self.resumed.iter().rev().find_map(|resumption| resumption.isa.as_deref()).unwrap_or(&self.isa)
    }

    /// Seconds from when the run began to when it ended, pauses before it was resumed among them; `None` while it runs.
    ///
    /// ```
    /// # use maskalign_core::run::Manifest;
    /// let manifest = Manifest {
    ///     started: "2023-06-18T09:30:00Z".into(),
    ///     ended: Some("2023-06-18T09:31:30Z".into()),
    ///     ..Manifest::default()
    /// };
    /// assert_eq!(manifest.seconds(), Some(90.0));
    /// ```
    pub fn seconds(&self) -> Option<f64> {
        let moment = |text: &str| text.parse::<jiff::Timestamp>().ok();
        Some((moment(self.ended.as_deref()?)?.as_second() - moment(&self.started)?.as_second()) as f64)
    }

    /// What a resumed run reads otherwise than it did at first: it would not go on exactly.
    pub fn differences(&self, resumed: &Manifest) -> Vec<String> {
        let mut found = Vec::new();
        for now in &resumed.data {
            let Some(then) = self.data.iter().find(|then| then.stage == now.stage) else { continue };
            if then != now {
                let list = if then.images == now.images { ", another list" } else { "" };
                found.push(format!("data of `{}`: {} images then, {} now{list}", now.stage, then.images, now.images));
            }
        }
        for now in &resumed.weights {
            let Some(then) = self.weights.iter().find(|then| then.path == now.path) else { continue };
            if then != now {
                found.push(format!("{}: its content has changed", now.path.display()));
            }
        }
        found
    }
}

/// What a stage is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageRecord {
    /// Its name.
    pub name: String,
    /// Images of its data.
    pub images: Option<u64>,
    /// Parameters of its models: all, and those that are trained.
    pub parameters: u64,
    /// Parameters that are trained.
    pub trainable: u64,
    /// Side of the square images that its student runs at, in pixels; absent of a stage that trains none.
    #[serde(default)]
    pub image_size: Option<u64>,
}

/// The state that a stage left since it was the best.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct BestRecord {
    /// The stage's name.
    pub stage: String,
    /// Updates that had been made when it was measured.
    pub step: u64,
    /// What decided.
    pub metric: String,
    /// Its value; absent where it is not known.
    pub value: Option<f64>,
    /// Updates that were made in all.
    pub steps: u64,
    /// Whether the stage ended before its last step, since nothing better was waited for.
    pub stopped_early: bool,
}

impl BestRecord {
    /// The record of a stage with these results, where it left its best state.
    pub(crate) fn of(stage: &str, results: &Value) -> Option<BestRecord> {
        let best = results.get("best")?;
        let metric = best.get("metric")?.as_str()?;
        Some(BestRecord {
            stage: stage.to_owned(),
            step: best.get("step")?.as_u64()?,
            metric: metric.to_owned(),
            value: best.get(metric).and_then(Value::as_f64),
            steps: results.get("steps")?.as_u64()?,
            stopped_early: results.get(STOPPED_EARLY) == Some(&Value::Bool(true)),
        })
    }
}

/// A start of a run that went on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resumption {
    /// When.
    pub at: String,
    /// The command line, one argument an entry.
    pub command_line: Vec<String>,
    /// The kernels that it went on with, other ones than before among them where that was accepted; absent where nothing
    /// was left to compute.
    #[serde(default)]
    pub isa: Option<String>,
    /// The stage that it went on in; absent where nothing was left to compute.
    #[serde(default)]
    pub stage: Option<String>,
    /// Updates that this stage had made by its newest checkpoint; absent where it had none, and began.
    #[serde(default)]
    pub step: Option<u64>,
    /// Records of `metrics.jsonl` that were found to be lost, where it was accepted to go on without them.
    #[serde(default)]
    pub lost_metrics: Option<u64>,
}

/// A path as JSON can hold it.
pub(crate) fn as_text(path: &Path) -> PathBuf {
    PathBuf::from(path.to_string_lossy().into_owned())
}

/// A file that a run read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Where it was; of a name that is not Unicode what can be shown.
    pub path: PathBuf,
    /// Its size in bytes.
    pub bytes: u64,
    /// BLAKE3 of its content, in hexadecimal.
    pub blake3: String,
}

impl FileRecord {
    /// Measures a file: one pass over its content, no copy in memory.
    pub fn of(path: &Path) -> Result<FileRecord, RunError> {
        let reading = |source| RunError::reading("file", path, source);
        let file = File::open(path).map_err(reading)?;
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(file).map_err(reading)?;
        Ok(FileRecord { path: as_text(path), bytes: hasher.count(), blake3: hasher.finalize().to_hex().to_string() })
    }
}

impl FileRecord {
    /// Measures what is in memory, such as weights that the binary holds.
    pub fn of_bytes(path: impl Into<PathBuf>, content: &[u8]) -> FileRecord {
        let blake3 = blake3::hash(content).to_hex().to_string();
        FileRecord { path: path.into(), bytes: content.len() as u64, blake3 }
    }
}

/// What a stage trained or was measured on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataRecord {
    /// The stage's name.
    pub stage: String,
    /// Number of images.
    pub images: u64,
    /// BLAKE3 of the list of images, in hexadecimal.
    pub fingerprint: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_record_holds_size_and_blake3() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w");
        std::fs::write(&path, "abc").unwrap();
        let record = FileRecord::of(&path).unwrap();
        assert_eq!(record.bytes, 3);
        // b3sum of "abc", from BLAKE3's published examples.
        assert_eq!(record.blake3, "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85");
    }

    #[test]
    fn data_and_weights_that_changed_are_named() {
        let data = |images, list: &str| DataRecord { stage: "pretrain".into(), images, fingerprint: list.into() };
        let first = Manifest {
            weights: vec![FileRecord::of_bytes("w", b"abc")],
            data: vec![data(8, "a")],
            ..Manifest::default()
        };
        assert!(first.differences(&first.clone()).is_empty());
        let fewer = Manifest { data: vec![data(7, "b")], ..first.clone() };
        assert_eq!(first.differences(&fewer), ["data of `pretrain`: 8 images then, 7 now"]);
        let renamed = Manifest { data: vec![data(8, "b")], ..first.clone() };
        assert_eq!(first.differences(&renamed), ["data of `pretrain`: 8 images then, 8 now, another list"]);
        let other = Manifest { weights: vec![FileRecord::of_bytes("w", b"abd")], ..first.clone() };
        assert_eq!(first.differences(&other), ["w: its content has changed"]);
    }

    #[test]
    fn the_kernels_that_computed_last_are_those_of_the_last_resumption_that_computed() {
        let on = |isa: Option<&str>| Resumption { isa: isa.map(str::to_owned), ..Resumption::default() };
        let mut manifest = Manifest { isa: "fused, avx512".into(), ..Manifest::default() };
        assert_eq!(manifest.computed_on(), "fused, avx512");
        manifest.resumed = vec![on(None), on(Some("fused, avx2")), on(None)];
        assert_eq!(manifest.computed_on(), "fused, avx2");
    }

    #[test]
    fn a_manifest_of_an_older_version_still_reads() {
        let manifest: Manifest = serde_json::from_str(r#"{ "version": "0.0.1", "seed": 3 }"#).unwrap();
        assert_eq!((manifest.version.as_str(), manifest.seed, manifest.threads), ("0.0.1", 3, 0));
    }
}
