//! Reading weights files of every format, with or without their values.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use super::checkpoint::{Checkpoint, CheckpointHeader};
use super::hub::WEIGHT_FILES;
use super::part::under;
use super::tensor_file::TensorFile;
use super::{HostTensor, TensorMap, WeightsError, torch_file};
use crate::files::RunError;

/// An index of shards names files and tensors only.
const MAX_INDEX_BYTES: u64 = 64 << 20;

/// Reads all tensors of a weights file as `f32`, by the names they have there.
///
/// Known by their content: safetensors; PyTorch's zip files (`.pth`, `.pt`, `.bin`, TorchScript too), read without running
/// anything in them and unwrapped where a training script put the weights under `model`, `state_dict`, `teacher` or the
/// like; and the `*.index.json` of a file in shards. A folder stands for the weights file in it, and a run directory for what
/// its one stage that trained a student left. A checkpoint of a run stands for its student: the optimizer's state and what the
/// student was aligned with are left out.
///
/// Half, brain, double and integer numbers become `f32`. Memory is bounded by a small multiple of the file's size, whatever
/// it claims.
///
/// # Errors
/// A file that is missing, truncated, damaged or of another kind, with the way out where there is one.
pub fn read(path: &Path) -> Result<TensorMap, WeightsError> {
    read_part(path, None)
}

/// As [`read`], of several towers in a file those whose names begin with `key`, such as `teacher` or `model_ema`.
///
/// # Errors
/// As there; nothing is called so, with what there is.
pub fn read_part(path: &Path, key: Option<&str>) -> Result<TensorMap, WeightsError> {
    read_values(path, key, &student)
}

/// As [`read_part`], of a checkpoint of a run all parameters: what was trained beside the student too.
pub(super) fn read_with_head(path: &Path, key: Option<&str>) -> Result<TensorMap, WeightsError> {
    read_values(path, key, &|_, checkpoint| Ok(with_head(checkpoint)))
}

fn read_values(path: &Path, key: Option<&str>, of_checkpoint: OfCheckpoint) -> Result<TensorMap, WeightsError> {
    let of_safetensors = |path: &Path| {
        let file = TensorFile::open(path)?;
        match checkpoint_header(path, &file)? {
            None => chosen(path, key, file.read_all()?),
            Some(_) => of_checkpoint(path, Checkpoint::load_parameters(path).map_err(|error| not_read(path, error))?),
        }
    };
    read_with(path, &of_safetensors, &|path| torch_file::read(path, key))
}

/// What is taken of a checkpoint of a run.
type OfCheckpoint<'a> = &'a dyn Fn(&Path, Checkpoint) -> Result<TensorMap, WeightsError>;

/// The tensors under `key`.
fn chosen(path: &Path, key: Option<&str>, tensors: TensorMap) -> Result<TensorMap, WeightsError> {
    match key {
        None => Ok(tensors),
        Some(key) => under(key, tensors).map_err(|reason| WeightsError::format(path, reason)),
    }
}

/// As [`read`], without the values: the headers of safetensors and the descriptions in PyTorch's files are all that is
/// looked at.
///
/// # Errors
/// As there, but for values that are damaged.
pub fn read_shapes(path: &Path) -> Result<TensorMap, WeightsError> {
    read_part_shapes(path, None)
}

/// As [`read_part`], without the values.
///
/// # Errors
/// As there, but for values that are damaged.
pub fn read_part_shapes(path: &Path, key: Option<&str>) -> Result<TensorMap, WeightsError> {
    shapes(path, key, &student)
}

/// As [`read_with_head`], without the values.
pub(super) fn read_shapes_with_head(path: &Path, key: Option<&str>) -> Result<TensorMap, WeightsError> {
    shapes(path, key, &|_, checkpoint| Ok(with_head(checkpoint)))
}

fn shapes(path: &Path, key: Option<&str>, of_checkpoint: OfCheckpoint) -> Result<TensorMap, WeightsError> {
    let of_safetensors = |path: &Path| {
        let file = TensorFile::open(path)?;
        let shapes = file.shapes().into_iter().map(|(name, shape)| (name, HostTensor::shape_only(shape)));
        let tensors: TensorMap = shapes.collect();
        match checkpoint_header(path, &file)? {
            None => chosen(path, key, tensors),
            Some(header) => of_checkpoint(path, Checkpoint { header, tensors }),
        }
    };
    read_with(path, &of_safetensors, &|path| torch_file::read_shapes(path, key))
}

/// How the tensors of one file are read.
type ReadFile<'a> = &'a dyn Fn(&Path) -> Result<TensorMap, WeightsError>;

/// Reads a file, or the shards of an index.
fn read_with(path: &Path, safetensors: ReadFile, torch: ReadFile) -> Result<TensorMap, WeightsError> {
    let path = weights_file(path)?;
    refuse_lone_shard(&path)?;
    match kind_of(&path)? {
        Kind::Index => read_shards(&path, safetensors, torch),
        Kind::Safetensors => safetensors(&path),
        Kind::Torch => torch(&path),
    }
}

/// Refuses one of several shards by its name, `NAME-00001-of-00002.ENDING`: it holds a part of a tower.
fn refuse_lone_shard(path: &Path) -> Result<(), WeightsError> {
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let number = |text: &str| text.parse::<u32>().ok().filter(|_| text.len() == 5);
    let counts = stem.rsplit_once("-of-").and_then(|(rest, all)| {
        let (name, shard) = rest.rsplit_once('-')?;
        Some((name, number(shard)?, number(all)?))
    });
    let Some((name, shard, all)) = counts.filter(|(.., all)| *all > 1) else { return Ok(()) };
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or("safetensors");
    let index = path.with_file_name(format!("{name}.{ending}.index.json"));
    let way = match index.is_file() {
        true => format!("name the index of all, {}", index.display()),
        false => format!("get all {all} with their index, `{name}.{ending}.index.json`, and name that"),
    };
    Err(WeightsError::format(path, format!("it is shard {shard} of {all}, a part of a tower; {way}")))
}

/// What a run wrote beside the tensors; `None` where the file is not a run's.
fn checkpoint_header(path: &Path, file: &TensorFile) -> Result<Option<CheckpointHeader>, WeightsError> {
    CheckpointHeader::of(path, file).map_err(|error| not_read(path, error))
}

fn student(path: &Path, checkpoint: Checkpoint) -> Result<TensorMap, WeightsError> {
    let stage = checkpoint.header.stage.clone();
    let tensors = checkpoint.into_student();
    match tensors.is_empty() {
        true => Err(WeightsError::format(path, format!("the stage `{stage}` of this checkpoint trains no student"))),
        false => Ok(tensors),
    }
}

fn with_head(checkpoint: Checkpoint) -> TensorMap {
    let (mut tensors, beside) = checkpoint.into_parameters();
    tensors.extend(beside);
    tensors
}

fn not_read(path: &Path, error: RunError) -> WeightsError {
    match error {
        RunError::Io { source, .. } => WeightsError::io(path, source),
        RunError::Damaged { reason, .. } => WeightsError::format(path, reason),
        other => WeightsError::format(path, other.to_string()),
    }
}

/// The files that [`read`] opens for `path`: itself, or an index and its shards. Sorted.
pub fn files_of(path: &Path) -> Result<Vec<PathBuf>, WeightsError> {
    let path = weights_file(path)?;
    match kind_of(&path)? {
        Kind::Index => {
            let mut files: Vec<_> = Index::read(&path)?.shards(&path)?.into_keys().collect();
            files.push(path);
            files.sort();
            Ok(files)
        }
        Kind::Safetensors | Kind::Torch => Ok(vec![path]),
    }
}

enum Kind {
    Safetensors,
    Torch,
    Index,
}

/// A folder's weights file, or the path itself.
pub(super) fn weights_file(path: &Path) -> Result<PathBuf, WeightsError> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    if let Some(file) = WEIGHT_FILES.iter().map(|name| path.join(name)).find(|file| file.is_file()) {
        return Ok(file);
    }
    if let Some(file) = of_run(path)? {
        return Ok(file);
    }
    let names = WEIGHT_FILES.join(", ");
    Err(WeightsError::format(path, format!("it is a folder that holds none of {names}, and no run; name the file")))
}

/// What a stage of a run leaves.
pub(super) const LEFT: &str = "final.safetensors";

/// What the one stage of a run left that trained a student, or what the stage of a folder in its `checkpoints` left. `None`
/// for any other folder.
fn of_run(folder: &Path) -> Result<Option<PathBuf>, WeightsError> {
    let refuse = |reason: String| Err(WeightsError::format(folder, reason));
    let left = folder.join(LEFT);
    if left.is_file() {
        return Ok(Some(left));
    }
    if folder.parent().is_some_and(|parent| parent.ends_with("checkpoints")) {
        return refuse("the stage has not ended; name one of its checkpoints, step-N.safetensors".to_owned());
    }
    let checkpoints = folder.join("checkpoints");
    if !checkpoints.is_dir() {
        return Ok(None);
    }
    let entries = fs::read_dir(&checkpoints).map_err(|error| WeightsError::io(&checkpoints, error))?;
    let mut stages: Vec<String> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    stages.sort();
    let left = |stage: &String| checkpoints.join(stage).join(LEFT);
    // What is damaged is told where it is read. Stages that only evaluate leave no student.
    let is_student = |path: &Path| !CheckpointHeader::read(path).is_ok_and(|header| header.student.is_empty());
    stages.retain(|stage| left(stage).is_file() && is_student(&left(stage)));
    match stages.as_slice() {
        [stage] => Ok(Some(left(stage))),
        [] => refuse(
            "it is a run directory in which no stage has left a student; name one of its checkpoints, \
             checkpoints/STAGE/step-N.safetensors"
                .to_owned(),
        ),
        [first, ..] => refuse(format!(
            "it is a run directory in which the stages `{}` left students; name one of them: {}",
            stages.join("`, `"),
            checkpoints.join(first).display()
        )),
    }
}

fn kind_of(path: &Path) -> Result<Kind, WeightsError> {
    let mut start = Vec::new();
    File::open(path)
        .and_then(|file| file.take(64).read_to_end(&mut start))
        .map_err(|error| WeightsError::io(path, error))?;
    let reason = match start.as_slice() {
        [] => "the file is empty",
        // First, since the header's length may look like anything; no text has zero bytes.
        [_, _, _, _, _, 0, 0, 0, b'{', ..] => return Ok(Kind::Safetensors),
        [b'P', b'K', 3 | 5, ..] => return Ok(Kind::Torch),
        [b'{', ..] => return Ok(Kind::Index),
        [0x80, 2..=5, ..] => {
            "it is in PyTorch's format of before 1.6, which is not read; save it anew: \
             `torch.save(torch.load(FILE, map_location=\"cpu\"), NEW_FILE)`"
        }
        start if start.starts_with(b"version https://git-lfs") => {
            "it is a Git LFS pointer, not the file itself; get the file with `git lfs pull`"
        }
        start if start.trim_ascii_start().starts_with(b"<") => {
            "it is a web page, not weights; download the file itself"
        }
        start if start.len() < 9 => "the file is truncated",
        _ => "it is neither safetensors nor a PyTorch zip file (.pth, .pt, .bin) nor an index of shards",
    };
    Err(WeightsError::format(path, reason))
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    /// Tensor's name to shard's file.
    weight_map: BTreeMap<String, String>,
}

impl Index {
    fn read(path: &Path) -> Result<Index, WeightsError> {
        let io = |error| WeightsError::io(path, error);
        if fs::metadata(path).map_err(io)?.len() > MAX_INDEX_BYTES {
            return Err(WeightsError::format(path, "it is too large for an index of shards"));
        }
        let text = fs::read(path).map_err(io)?;
        serde_json::from_slice(&text)
            .map_err(|error| WeightsError::format(path, format!("it is not a readable index of shards: {error}")))
    }

    /// The tensors of each shard, by its path.
    fn shards(self, index: &Path) -> Result<BTreeMap<PathBuf, BTreeSet<String>>, WeightsError> {
        let mut shards: BTreeMap<PathBuf, BTreeSet<String>> = BTreeMap::new();
        for (tensor, file) in self.weight_map {
            let mut parts = Path::new(&file).components();
            if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
                return Err(WeightsError::format(index, format!("it names a shard `{file}` outside its folder")));
            }
            shards.entry(index.with_file_name(file)).or_default().insert(tensor);
        }
        Ok(shards)
    }
}

fn read_shards(index: &Path, safetensors: ReadFile, torch: ReadFile) -> Result<TensorMap, WeightsError> {
    let mut tensors = TensorMap::new();
    for (shard, expected) in Index::read(index)?.shards(index)? {
        let read = match kind_of(&shard)? {
            Kind::Safetensors => safetensors(&shard)?,
            Kind::Torch => torch(&shard)?,
            Kind::Index => {
                return Err(WeightsError::format(&shard, "it is an index where a shard is expected"));
            }
        };
        if let Some(missing) = expected.iter().find(|name| !read.contains_key(*name)) {
            return Err(WeightsError::format(&shard, format!("it lacks `{missing}`, which the index places there")));
        }
        tensors.extend(read);
    }
    Ok(tensors)
}
