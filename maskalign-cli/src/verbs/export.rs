//! `maskalign export`: a trained student under the names that other programs use.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use maskalign_core::{
    run::Checkpoint,
    weights::{Export, to_family, write_safetensors},
};

use crate::{failure::Failure, output, table::count};

const EXAMPLES: &str = "\
Examples:
  maskalign export runs/vitb --stage pretrain --format timm --out student.safetensors
  maskalign export runs/vitb/checkpoints/pretrain/step-00010000.safetensors --format hf_vit --out s.safetensors";

/// Export a trained student to a safetensors file with another library's names
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
    #[arg(long, value_enum, default_value_t)]
    format: Names,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Replace the file if it is there
    #[arg(long)]
    force: bool,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Names {
    /// timm's, which the official MaskAlign checkpoints use too
    #[default]
    Timm,
    /// Hugging Face's ViTModel
    HfVit,
    /// Hugging Face's Dinov2Model
    HfDinov2,
    /// The vision tower of Hugging Face's CLIPModel
    HfClip,
    /// The vision tower of OpenAI's and open_clip's CLIP
    Openai,
}

impl From<Names> for Export {
    fn from(names: Names) -> Export {
        match names {
            Names::Timm => Export::Timm,
            Names::HfVit => Export::HfVit,
            Names::HfDinov2 => Export::HfDinov2,
            Names::HfClip => Export::HfClip,
            Names::Openai => Export::OpenAi,
        }
    }
}

impl Args {
    pub fn run(self) -> Result<(), Failure> {
        if self.out.symlink_metadata().is_ok() && !self.force {
            return Err(Failure::mistake(format!("{} is there already", self.out.display()))
                .help("name another file with `--out`, or replace it with `--force`"));
        }
        let path = match self.from.is_dir() {
            true => self.outcome()?,
            false => self.from.clone(),
        };
        if !path.is_file() {
            return Err(Failure::mistake(format!("there is no checkpoint {}", path.display())));
        }
        let tower = Checkpoint::load(&path)?.into_student();
        if tower.is_empty() {
            return Err(Failure::mistake(format!("{} holds no student", path.display()))
                .help("name a stage that trains one with `--stage`"));
        }
        let renamed = to_family(&tower, self.format.into())?;
        write_safetensors(&self.out, &renamed, None)?;
        let values: usize = renamed.values().map(|tensor| tensor.data.len()).sum();
        let (tensors, values, out) = (renamed.len(), count(values as u64), self.out.display());
        Ok(output::print(&format!("wrote {tensors} tensors, {values} parameters, to {out}\n"))?)
    }

    /// The weights that a finished stage left: `checkpoints/STAGE/final.safetensors`.
    fn outcome(&self) -> Result<PathBuf, Failure> {
        let checkpoints = self.from.join("checkpoints");
        let outcome = |stage: &str| checkpoints.join(stage).join("final.safetensors");
        let finished = finished_stages(&checkpoints, outcome);
        let known = match finished.as_slice() {
            [] => "no stage of this run is finished".to_string(),
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

/// The stages with weights, sorted.
fn finished_stages(checkpoints: &Path, outcome: impl Fn(&str) -> PathBuf) -> Vec<String> {
    let entries = checkpoints.read_dir().into_iter().flatten().flatten();
    let mut stages: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    stages.retain(|stage| outcome(stage).is_file());
    stages.sort();
    stages
}
