//! `maskalign export`: writes a trained student with the names that other programs use.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
};

use clap::builder::{PossibleValue, PossibleValuesParser};
use maskalign_core::{
    run::{Checkpoint, CheckpointHeader, RunError, atomic_write, is_in_checkpoints},
    weights::{NOTED_TOWER, Naming, TensorMap, Writes, naming, namings, to_family, write_safetensors},
};
use serde_json::Value;

use crate::{failure::Failure, output, table::count};

/// The key of our own naming.
const TIMM: &str = "timm";

const EXAMPLES: &str = "\
Examples:
  maskalign export runs/vitb --stage pretrain --out student/   # a folder: model.safetensors, config.json
  maskalign export runs/vitb --stage pretrain --format timm --out student.safetensors
  maskalign export runs/vitb/checkpoints/pretrain/step-00010000.safetensors --format hf_vit --out s.safetensors";

/// Export a trained student to a safetensors file with another library's names
///
/// A folder has the sizes beside the weights, so that a recipe that names it as `weights` needs no `arch`, and
/// `timm.create_model("local-dir:FOLDER")` loads it.
///
/// A fine-tuned student comes with its classifier where the names are timm's: `timm.create_model(..., num_classes=K,
/// global_pool="avg")` loads it. A format that is of one model, as CLIP's, is refused for a tower of another kind.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// A run directory, or one of its checkpoints
    #[arg(value_name = "RUN_DIR|CHECKPOINT")]
    from: PathBuf,
    /// The stage whose student is exported; needed where the run has several
    #[arg(long, value_name = "NAME")]
    stage: Option<String>,
    /// The names to write
    #[arg(long, value_name = "FORMAT", value_parser = formats(), default_value = TIMM)]
    format: String,
    /// The file to write; or a folder, as `student/`: the weights in timm's format with their configuration
    #[arg(long, value_name = "FILE|FOLDER")]
    out: PathBuf,
    /// Replace what is there already
    #[arg(long)]
    force: bool,
}

/// The keys of all namings, a plugin's among them, timm's first.
fn formats() -> PossibleValuesParser {
    let (timm, others): (Vec<_>, Vec<_>) = namings().iter().partition(|naming| naming.key == TIMM);
    let value = |naming: &&'static Naming| PossibleValue::new(naming.key).help(naming.about);
    timm.iter().chain(&others).map(value).collect::<Vec<_>>().into()
}

impl Args {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let folder = self.folder();
        let file = folder.map_or(self.out.clone(), |folder| folder.join("model.safetensors"));
        self.check_out(&file)?;
        let path = match self.from.is_dir() {
            true => self.outcome()?,
            false => self.from.clone(),
        };
        if !path.is_file() {
            return Err(Failure::mistake(format!("there is no checkpoint {}", path.display())));
        }
        let checkpoint = Checkpoint::load_parameters(&path).map_err(|error| match error {
            RunError::Damaged { .. } => Failure::mistake(error.to_string())
                .help("expected a run directory, or a file of its `checkpoints` such as STAGE/final.safetensors"),
            other => other.into(),
        })?;
        let noted = checkpoint.header.meta.get(NOTED_TOWER).cloned();
        let (mut tower, beside) = checkpoint.into_parameters();
        if tower.is_empty() {
            return Err(Failure::mistake(format!("{} holds no student", path.display()))
                .help("name a stage that trains one with `--stage`"));
        }
        // What aligned a student is of no use to others; a classifier is what fine-tuning is for.
        let classifier = is_classifier(&beside);
        let naming = naming(&self.format).expect("clap takes the keys alone");
        let config = match (folder, noted) {
            (None, _) => None,
            (Some(_), _) if naming.key != TIMM => {
                return Err(Failure::mistake("a folder is written in timm's format alone")
                    .help("name a file with `--out`, such as student.safetensors"));
            }
            (Some(_), None) => {
                return Err(Failure::mistake(format!("{} does not note the sizes of its tower", path.display()))
                    .help("it is of an earlier version: name a file with `--out`, such as student.safetensors"));
            }
            (Some(folder), Some(noted)) => Some((folder, config_of(noted, &beside, classifier))),
        };
        if classifier && naming.writes == Writes::Classifier {
            tower.extend(beside);
        } else if classifier {
            tracing::warn!("the classifier is left out: this naming is of a tower alone; `--format timm` holds both");
        }
        let renamed = to_family(&tower, naming).map_err(|error| {
            Failure::from(error).help("`timm` names every tower; `hf_vit` is for plain ones with a class token")
        })?;
        if let Some((folder, config)) = &config {
            std::fs::create_dir_all(folder)
                .map_err(|error| Failure::mistake(format!("{} cannot be made: {error}", folder.display())))?;
            atomic_write(&folder.join("config.json"), "configuration", |out| writeln!(out, "{config:#}"))?;
        }
        write_safetensors(&file, &renamed, None)?;
        let values: usize = renamed.values().map(|tensor| tensor.data.len()).sum();
        let (tensors, values, out) = (renamed.len(), count(values as u64), file.display());
        Ok(output::print(&format!("wrote {tensors} tensors, {values} parameters, to {out}\n"))?)
    }

    /// The folder to write, where it is not a file.
    fn folder(&self) -> Option<&Path> {
        self.out.to_string_lossy().ends_with(std::path::is_separator).then_some(&*self.out)
    }

    /// Refuses what cannot or must not be written, before anything is read.
    fn check_out(&self, file: &Path) -> Result<(), Failure> {
        let out = file.display();
        let another = |message: String| Err(Failure::mistake(message).help("name another file with `--out`"));
        if file.is_dir() {
            return Err(Failure::mistake(format!("{out} is a folder"))
                .help(format!("name a file with `--out`, or `{out}/` to write weights and configuration into it")));
        }
        let is_there = |path: &Path| path.symlink_metadata().is_ok();
        let config = self.folder().map(|folder| folder.join("config.json"));
        if let Some(there) = [Some(file), config.as_deref()].into_iter().flatten().find(|path| is_there(path))
            && !self.force
        {
            return Err(Failure::mistake(format!("{} is there already", there.display()))
                .help("name another file with `--out`, or replace it with `--force`"));
        }
        let folder = match self.out.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        if !folder.is_dir() {
            return another(format!("there is no folder {} to write {} to", folder.display(), self.out.display()));
        }
        if is_in_checkpoints(if self.out.is_dir() { &self.out } else { folder }) {
            return another(format!("{out} is among a run's own checkpoints, which are read by `--resume`"));
        }
        Ok(())
    }

    /// The weights that a finished stage left: `checkpoints/STAGE/final.safetensors`.
    fn outcome(&self) -> Result<PathBuf, Failure> {
        let checkpoints = self.from.join("checkpoints");
        let outcome = |stage: &str| checkpoints.join(stage).join("final.safetensors");
        let mut finished = finished_stages(&checkpoints, outcome);
        if self.stage.is_none() && finished.len() > 1 {
            // Stages that only evaluate leave no student. What is damaged is told where it is read.
            finished.retain(|stage| !CheckpointHeader::read(&outcome(stage)).is_ok_and(|left| left.student.is_empty()));
        }
        let known = match finished.as_slice() {
            [] => {
                return Err(Failure::mistake(format!("no stage of the run in {} left a student", self.from.display()))
                    .help("export one of its checkpoints instead: checkpoints/STAGE/step-N.safetensors"));
            }
            stages => format!("finished stages: {}", stages.join(", ")),
        };
        match (&self.stage, finished.as_slice()) {
            (Some(stage), stages) if stages.contains(stage) => Ok(outcome(stage)),
            (Some(stage), _) => {
                Err(Failure::mistake(format!("the run in {} has no finished stage `{stage}`", self.from.display()))
                    .help(known))
            }
            (None, [stage]) => Ok(outcome(stage)),
            (None, _) => {
                Err(Failure::mistake(format!("which stage of {}? name it with `--stage`", self.from.display()))
                    .help(known))
            }
        }
    }
}

/// timm's `config.json`: what the checkpoint notes of the tower, with its classifier where it has one.
fn config_of(mut noted: Value, beside: &TensorMap, classifier: bool) -> Value {
    let classes = beside.get("head.weight").and_then(|weight| weight.shape.first()).filter(|_| classifier);
    if let Some(&classes) = classes {
        let pooled = if beside.keys().any(|name| name.starts_with("fc_norm.")) { "avg" } else { "token" };
        noted["num_classes"] = classes.into();
        noted["pretrained_cfg"]["num_classes"] = classes.into();
        noted["global_pool"] = pooled.into();
        noted["model_args"]["global_pool"] = pooled.into();
        if let Some(arguments) = noted["model_args"].as_object_mut() {
            arguments.remove("fc_norm");
        }
    }
    noted
}

/// Whether everything that was trained beside a student is a classifier's.
fn is_classifier(beside: &TensorMap) -> bool {
    !beside.is_empty() && beside.keys().all(|name| name.starts_with("head.") || name.starts_with("fc_norm."))
}

/// The stages with weights, sorted.
fn finished_stages(checkpoints: &Path, outcome: impl Fn(&str) -> PathBuf) -> Vec<String> {
    let entries = checkpoints.read_dir().into_iter().flatten().flatten();
    let mut stages: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    stages.retain(|stage| outcome(stage).is_file());
    stages.sort();
    stages
}
