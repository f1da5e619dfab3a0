//! What configuration files beside weights say of the tower in them: Hugging Face's `config.json` and
//! `preprocessor_config.json`, timm's `config.json`, and open_clip's `open_clip_config.json`.

use std::{
    fs,
    io::Read as _,
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{
    WeightsError,
    checkpoint::CheckpointHeader,
    hub::WEIGHT_FILES,
    read::weights_file,
    tensor_file::TensorFile,
    timm_names::{SaidActivation, TimmName, timm_name},
};
use crate::data::regular_file::{OpenError, open_regular};

/// The names of the documents, the one of the program that saved `open_clip_*` weights first for those.
const DOCUMENTS: [&str; 3] = ["config.json", "preprocessor_config.json", "open_clip_config.json"];
/// The endings of weights.
const ENDINGS: [&str; 5] = ["safetensors", "bin", "pt", "pth", "ckpt"];
/// A configuration that lists the names of a hundred thousand classes is smaller.
const MOST_BYTES: u64 = 16 << 20;

/// What a document says, and where.
#[derive(Clone, Debug, PartialEq)]
pub struct Said<T> {
    /// What it says.
    pub value: T,
    /// The index of the document in [`Description::documents`].
    pub document: usize,
    /// The keys and indices that lead to it.
    pub at: Vec<String>,
}

impl<T> Said<T> {
    /// What follows from it, said at the same place.
    pub fn map<U>(&self, read: impl FnOnce(&T) -> U) -> Said<U> {
        Said { value: read(&self.value), document: self.document, at: self.at.clone() }
    }
}

/// What the documents beside weights say of the tower in the weights. What none of them says is `None`.
#[derive(Clone, Debug, Default)]
pub struct Description {
    /// The documents: path and text.
    pub documents: Vec<(PathBuf, String)>,
    /// Channels.
    pub dim: Option<Said<usize>>,
    /// Blocks.
    pub depth: Option<Said<usize>>,
    /// Attention heads.
    pub heads: Option<Said<usize>>,
    /// Channels inside the MLP.
    pub mlp: Option<Said<usize>>,
    /// Side of a patch in pixels.
    pub patch: Option<Said<usize>>,
    /// Side of the square image that its authors feed it, in pixels.
    pub image_size: Option<Said<usize>>,
    /// Activation of the MLPs.
    pub activation: Option<Said<SaidActivation>>,
    /// Added to the variance in LayerNorms.
    pub eps: Option<Said<f64>>,
    /// Whether a class token leads.
    pub cls_token: Option<Said<bool>>,
    /// Register tokens.
    pub registers: Option<Said<usize>>,
    /// Whether the MLPs are gated (SwiGLU).
    pub gated: Option<Said<bool>>,
    /// Outputs of the projection.
    pub projection: Option<Said<usize>>,
    /// Initial value of learned scales of the branches (LayerScale), where there are any.
    pub layer_scale: Option<Said<f64>>,
    /// Blocks that training reached; the others have their initial values.
    pub trained_blocks: Option<Said<usize>>,
    /// Whether a classifier of it reads the mean of the patches' tokens, else the class token.
    pub reads_mean: Option<Said<bool>>,
    /// Mean of each colour channel, for values in [0, 1].
    pub mean: Option<Said<[f64; 3]>>,
    /// Standard deviation of each colour channel.
    pub std: Option<Said<[f64; 3]>>,
}

/// What a stage's checkpoints note of its student under, in their headers' `meta`: a document as timm's `config.json`.
pub const NOTED_TOWER: &str = "tower";
/// How many blocks of a student training reached, where those are not all, in that document.
pub const TRAINED_BLOCKS: &str = "trained_blocks";

/// Reads the documents beside weights. They count where the weights have a name that the programs give that write such
/// documents, or are the only ones in their folder; else it is not known whose they are. A checkpoint of a run notes itself
/// what there is to know.
///
/// # Errors
/// A document that cannot be read, or is no JSON.
pub fn describe(weights: &Path) -> Result<Description, WeightsError> {
    let mut description = Description::default();
    // A folder without weights is refused where these are read.
    let weights = &weights_file(weights).unwrap_or_else(|_| weights.to_owned());
    if let Some(tower) = noted_tower(weights) {
        description.documents.push((weights.clone(), format!("{tower:#}")));
        description.add(DOCUMENTS[0], &tower);
        return Ok(description);
    }
    let Some(folder) = folder_described(weights) else { return Ok(description) };
    let name = weights.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let mut names = DOCUMENTS;
    if name.starts_with("open_clip") {
        names.rotate_right(1);
    }
    for name in names {
        let path = folder.join(name);
        let Some(text) = read_document(&path)? else { continue };
        let value: Value = serde_json::from_str(&text).map_err(|error| {
            WeightsError::format(&path, format!("it stands beside weights, and is no JSON: {error}"))
        })?;
        description.documents.push((path, text));
        description.add(name, &value);
    }
    Ok(description)
}

/// What a checkpoint of a run notes of its student; `None` for another file.
fn noted_tower(weights: &Path) -> Option<Value> {
    let file = TensorFile::open(weights).ok()?;
    let mut header = CheckpointHeader::of(weights, &file).ok()??;
    header.meta.get_mut(NOTED_TOWER).map(Value::take).filter(Value::is_object)
}

/// The folder whose documents describe the weights.
fn folder_described(weights: &Path) -> Option<PathBuf> {
    if weights.is_dir() {
        return Some(weights.to_owned());
    }
    let folder = match weights.parent()? {
        here if here.as_os_str().is_empty() => Path::new("."),
        folder => folder,
    };
    let name = weights.file_name()?.to_str()?;
    let is_shard = name.contains("-of-") || name.ends_with(".index.json");
    if WEIGHT_FILES.contains(&name) || is_shard {
        return Some(folder.to_owned());
    }
    let is_weights = |path: &Path| {
        path.extension().and_then(|ending| ending.to_str()).is_some_and(|ending| ENDINGS.contains(&ending))
    };
    let others = fs::read_dir(folder).ok()?.flatten().filter(|entry| is_weights(&entry.path()));
    (others.take(2).count() <= 1).then(|| folder.to_owned())
}

/// The text of a document; `None` where there is none.
fn read_document(path: &Path) -> Result<Option<String>, WeightsError> {
    let refused = |reason: String| WeightsError::format(path, format!("it stands beside weights, and {reason}"));
    if !path.exists() {
        return Ok(None);
    }
    let (file, _) = open_regular(path).map_err(|error| match error {
        OpenError::NotRegular(what) => refused(format!("is {what}")),
        OpenError::Io(error) => refused(format!("cannot be opened: {error}")),
    })?;
    let mut text = String::new();
    match file.take(MOST_BYTES + 1).read_to_string(&mut text) {
        Ok(bytes) if bytes as u64 > MOST_BYTES => Err(refused(format!("has more than {MOST_BYTES} bytes"))),
        Ok(_) => Ok(Some(text)),
        Err(error) => Err(refused(format!("cannot be read: {error}"))),
    }
}

/// A part of a document, and where it is.
#[derive(Clone)]
struct Part<'v> {
    value: &'v Value,
    document: usize,
    at: Vec<String>,
}

impl<'v> Part<'v> {
    fn get(&self, key: &str) -> Option<Part<'v>> {
        let value = self.value.get(key).filter(|value| !value.is_null())?;
        let at = self.at.iter().cloned().chain([key.to_owned()]).collect();
        Some(Part { value, document: self.document, at })
    }

    fn said<T>(&self, value: T) -> Said<T> {
        Said { value, document: self.document, at: self.at.clone() }
    }

    fn read<T>(&self, read: impl FnOnce(&'v Value) -> Option<T>) -> Option<Said<T>> {
        read(self.value).map(|value| self.said(value))
    }

    fn size(&self, key: &str) -> Option<Said<usize>> {
        self.get(key)?.read(whole)
    }

    /// A size, or what a program takes where its file says nothing: then it is said by the part as a whole.
    fn size_or(&self, key: &str, default: usize) -> Option<Said<usize>> {
        self.size(key).or_else(|| Some(self.said(default)))
    }

    fn triple(&self, key: &str) -> Option<Said<[f64; 3]>> {
        self.get(key)?.read(|value| {
            let values: Vec<f64> = value.as_array()?.iter().map(Value::as_f64).collect::<Option<_>>()?;
            values.try_into().ok()
        })
    }
}

fn whole(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|value| usize::try_from(value).ok())
}

/// The side of a square, in one of the ways in which it is written: a number, `[height, width]`, `[channels, height,
/// width]`, or a mapping.
fn side(value: &Value) -> Option<usize> {
    match value {
        Value::Array(sides) => match sides[..] {
            [ref height, ref width] | [_, ref height, ref width] if height == width => whole(height),
            _ => None,
        },
        Value::Object(named) => match (named.get("height"), named.get("width"), named.get("shortest_edge")) {
            (Some(height), Some(width), _) if height == width => whole(height),
            (None, None, Some(edge)) => whole(edge),
            _ => None,
        },
        number => whole(number),
    }
}

/// What Hugging Face's classes take where `config.json` says nothing: channels, blocks, heads, channels inside the MLP,
/// patch, activation, eps, registers.
struct Defaults {
    mlp: usize,
    patch: usize,
    activation: &'static str,
    eps: f64,
    registers: usize,
}

impl Defaults {
    /// Of a class that this crate has towers for; their channels are 768, and their blocks and heads 12.
    fn of(model_type: &str) -> Option<Defaults> {
        let plain = Defaults { mlp: 3072, patch: 16, activation: "gelu", eps: 1e-12, registers: 0 };
        Some(match model_type {
            "clip" | "clip_vision_model" => Defaults { patch: 32, activation: "quick_gelu", eps: 1e-5, ..plain },
            "vit" | "vit_mae" | "deit" => plain,
            "vit_msn" => Defaults { eps: 1e-6, ..plain },
            "dinov2" => Defaults { patch: 14, eps: 1e-6, ..plain },
            "dinov2_with_registers" => Defaults { eps: 1e-6, registers: 4, ..plain },
            _ => return None,
        })
    }
}

impl Description {
    /// Takes up what a document says and no earlier one has said.
    fn add(&mut self, name: &str, value: &Value) {
        let root = Part { value, document: self.documents.len() - 1, at: Vec::new() };
        let found = match name {
            "preprocessor_config.json" => of_preprocessor(&root),
            "open_clip_config.json" => of_open_clip(&root),
            _ if root.get("architecture").is_some() => of_timm(&root),
            _ => of_transformers(&root),
        };
        // The size of images that are fed counts for more than the one that positions were made for.
        if name == "preprocessor_config.json" && found.image_size.is_some() {
            self.image_size = None;
        }
        let Description { documents: _, dim, depth, heads, mlp, patch, image_size, activation, .. } = found;
        or(&mut self.dim, dim);
        or(&mut self.depth, depth);
        or(&mut self.heads, heads);
        or(&mut self.mlp, mlp);
        or(&mut self.patch, patch);
        or(&mut self.image_size, image_size);
        or(&mut self.activation, activation);
        let Description { eps, cls_token, registers, gated, projection, mean, std, .. } = found;
        let Description { layer_scale, trained_blocks, reads_mean, .. } = found;
        or(&mut self.reads_mean, reads_mean);
        or(&mut self.layer_scale, layer_scale);
        or(&mut self.trained_blocks, trained_blocks);
        or(&mut self.eps, eps);
        or(&mut self.cls_token, cls_token);
        or(&mut self.registers, registers);
        or(&mut self.gated, gated);
        or(&mut self.projection, projection);
        or(&mut self.mean, mean);
        or(&mut self.std, std);
    }
}

fn or<T>(known: &mut Option<T>, found: Option<T>) {
    if known.is_none() {
        *known = found;
    }
}

/// Hugging Face's `config.json`: of a vision tower alone, or of one with a text tower beside it.
fn of_transformers(root: &Part) -> Description {
    // Files of CLIP's first versions have the same twice; what is in the second then counts.
    let vision = root.get("vision_config_dict").or_else(|| root.get("vision_config"));
    let part = vision.as_ref().unwrap_or(root);
    let model_type = root.get("model_type").and_then(|part| part.value.as_str()).unwrap_or_default();
    let Some(defaults) = Defaults::of(model_type) else {
        if part.get("patch_size").is_none() {
            // Of a text tower, or of something else.
            return Description::default();
        }
        return Description { activation: activation_of(part, "hidden_act"), ..sizes_of_transformers(part) };
    };
    let dim = part.size_or("hidden_size", 768);
    let mlp = match (part.size("intermediate_size"), part.get("mlp_ratio"), &dim) {
        (Some(mlp), ..) => Some(mlp),
        (None, Some(ratio), Some(dim)) => ratio.read(|ratio| inside_mlp(dim.value, ratio)),
        (None, None, Some(dim)) if model_type.starts_with("dinov2") => Some(part.said(4 * dim.value)),
        _ => Some(part.said(defaults.mlp)),
    };
    let projection = match model_type {
        "clip" => root.size_or("projection_dim", 512),
        "clip_vision_model" => part.size_or("projection_dim", 512),
        _ => None,
    };
    let activation = activation_of(part, "hidden_act");
    let eps = part.get("layer_norm_eps").and_then(|eps| eps.read(Value::as_f64));
    Description {
        dim,
        mlp,
        depth: part.size_or("num_hidden_layers", 12),
        heads: part.size_or("num_attention_heads", 12),
        patch: part.size_or("patch_size", defaults.patch),
        activation: activation.or_else(|| Some(part.said(named_activation(defaults.activation)))),
        eps: eps.or_else(|| Some(part.said(defaults.eps))),
        registers: part.size_or("num_register_tokens", defaults.registers),
        projection,
        ..sizes_of_transformers(part)
    }
}

/// What is written in Hugging Face's `config.json`, whatever the class.
fn sizes_of_transformers(part: &Part) -> Description {
    Description {
        dim: part.size("hidden_size"),
        depth: part.size("num_hidden_layers"),
        heads: part.size("num_attention_heads"),
        mlp: part.size("intermediate_size"),
        patch: part.get("patch_size").and_then(|patch| patch.read(side)),
        image_size: part.get("image_size").and_then(|size| size.read(side)),
        eps: part.get("layer_norm_eps").and_then(|eps| eps.read(Value::as_f64)),
        registers: part.size("num_register_tokens"),
        gated: part.get("use_swiglu_ffn").and_then(|gated| gated.read(Value::as_bool)),
        ..Description::default()
    }
}

fn activation_of(part: &Part, key: &str) -> Option<Said<SaidActivation>> {
    part.get(key)?.read(|name| name.as_str().map(named_activation))
}

fn named_activation(name: &str) -> SaidActivation {
    match name {
        "quick_gelu" => SaidActivation::QuickGelu,
        "gelu" | "gelu_python" => SaidActivation::Gelu,
        other => SaidActivation::Other(other.to_owned()),
    }
}

fn inside_mlp(dim: usize, ratio: &Value) -> Option<usize> {
    let inside = (ratio.as_f64()? * dim as f64).floor();
    (0.0..1e9).contains(&inside).then_some(inside as usize)
}

/// Hugging Face's `preprocessor_config.json`.
fn of_preprocessor(root: &Part) -> Description {
    let is_off = |key: &str| root.get(key).filter(|part| part.value == &Value::Bool(false));
    let crop = root.get("crop_size").filter(|_| is_off("do_center_crop").is_none());
    let image_size = crop.or_else(|| root.get("size").filter(|_| is_off("do_resize").is_none()));
    let (mean, std) = match is_off("do_normalize") {
        Some(off) => (Some(off.said([0.0; 3])), Some(off.said([1.0; 3]))),
        None => (root.triple("image_mean"), root.triple("image_std")),
    };
    Description { image_size: image_size.and_then(|size| size.read(side)), mean, std, ..Description::default() }
}

/// timm's `config.json`: the name of an architecture, arguments that change it, and what its weights were trained with.
fn of_timm(root: &Part) -> Description {
    let architecture = root.get("architecture");
    let named = architecture.as_ref().and_then(|part| part.read(|name| timm_name(name.as_str()?)));
    let arguments = root.get("model_args");
    let argument = |key: &str| arguments.as_ref().and_then(|part| part.get(key));
    let size = |key: &str, of: fn(&TimmName) -> usize| {
        let given = argument(key).and_then(|part| part.read(side));
        given.or_else(|| named.as_ref().map(|named| named.map(of)))
    };
    let dim = size("embed_dim", |named| named.dim);
    let mlp = match (argument("mlp_ratio"), &dim) {
        (Some(ratio), Some(dim)) => ratio.read(|ratio| inside_mlp(dim.value, ratio)),
        (_, Some(dim)) if named.is_some() => Some(dim.map(|dim| 4 * dim)),
        _ => None,
    };
    let activation = argument("act_layer").and_then(|part| part.read(|name| name.as_str().map(named_activation)));
    // OpenAI's own weights are offered under the name of the tower with GELU, which they were not trained with.
    let tag = root.get("pretrained_cfg").and_then(|part| part.get("tag"));
    let is_openais = tag.is_some_and(|tag| tag.value == &Value::from("openai"));
    let by_name = named.as_ref().filter(|named| !is_openais || named.value.activation == SaidActivation::QuickGelu);
    let cls_token = argument("class_token").and_then(|part| part.read(Value::as_bool));
    let reads_mean = argument("global_pool").or_else(|| root.get("global_pool")).and_then(|part| {
        part.read(|pooled| match pooled.as_str()? {
            "avg" => Some(true),
            "token" => Some(false),
            _ => None,
        })
    });
    let trained = root.get("pretrained_cfg");
    let trained = trained.as_ref().unwrap_or(root);
    Description {
        mlp,
        depth: size("depth", |named| named.depth),
        heads: size("num_heads", |named| named.heads),
        patch: size("patch_size", |named| named.patch),
        image_size: argument("img_size").or_else(|| trained.get("input_size")).and_then(|size| size.read(side)),
        activation: activation.or_else(|| Some(by_name?.map(|named| named.activation.clone()))),
        // Of a student of another value, which timm has no name for.
        eps: root
            .get("layer_norm_eps")
            .and_then(|eps| eps.read(Value::as_f64))
            .or_else(|| Some(named.as_ref()?.map(|named| named.eps))),
        trained_blocks: root.size(TRAINED_BLOCKS),
        reads_mean,
        layer_scale: argument("init_values").and_then(|part| part.read(Value::as_f64)),
        cls_token: cls_token.or_else(|| Some(named.as_ref()?.map(|named| named.cls_token))),
        registers: size("reg_tokens", |named| named.registers),
        mean: trained.triple("mean"),
        std: trained.triple("std"),
        dim,
        ..Description::default()
    }
}

/// open_clip's `open_clip_config.json`.
fn of_open_clip(root: &Part) -> Description {
    let preprocess = root.get("preprocess_cfg");
    let triple = |key: &str| preprocess.as_ref().and_then(|part| part.triple(key));
    let statistics = Description { mean: triple("mean"), std: triple("std"), ..Description::default() };
    let Some(model) = root.get("model_cfg") else { return statistics };
    let Some(vision) = model.get("vision_cfg") else { return statistics };
    let projection = model.size("embed_dim");
    let image_size = vision.get("image_size").and_then(|size| size.read(side));
    if let Some(name) = vision.get("timm_model_name") {
        let Some(named) = name.read(|name| timm_name(name.as_str()?)) else {
            return Description { image_size, projection, ..statistics };
        };
        let TimmName { dim, depth, heads, patch, registers, cls_token, eps, activation } = named.value;
        return Description {
            dim: Some(name.said(dim)),
            depth: Some(name.said(depth)),
            heads: Some(name.said(heads)),
            mlp: Some(name.said(4 * dim)),
            patch: Some(name.said(patch)),
            activation: Some(name.said(activation)),
            eps: Some(name.said(eps)),
            cls_token: Some(name.said(cls_token)),
            registers: Some(name.said(registers)),
            image_size,
            projection,
            ..statistics
        };
    }
    if vision.get("layers").is_some_and(|layers| layers.value.is_array()) {
        // A ResNet.
        return statistics;
    }
    let dim = vision.size_or("width", 768);
    let heads = dim.as_ref().and_then(|dim| {
        let width = vision.size_or("head_width", 64)?;
        (width.value > 0).then(|| width.map(|width| dim.value / width))
    });
    let mlp = dim.as_ref().and_then(|dim| match vision.get("mlp_ratio") {
        Some(ratio) => ratio.read(|ratio| inside_mlp(dim.value, ratio)),
        None => Some(vision.said(4 * dim.value)),
    });
    let quick = model.get("quick_gelu");
    let is_quick = quick.as_ref().is_some_and(|quick| quick.value == &Value::Bool(true));
    let activation = if is_quick { SaidActivation::QuickGelu } else { SaidActivation::Gelu };
    Description {
        dim,
        depth: vision.size_or("layers", 12),
        heads,
        mlp,
        patch: vision.size_or("patch_size", 16),
        image_size,
        activation: Some(quick.as_ref().unwrap_or(&model).said(activation)),
        eps: Some(vision.said(1e-5)),
        projection,
        ..statistics
    }
}
