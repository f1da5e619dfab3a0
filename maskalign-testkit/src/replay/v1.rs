//! The format `maskalign-case-v1`: steps of MaskAlign and MAE, with the official code's settings instead of a recipe.

use maskalign_core::components::aligners::{Fusion, Head};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    Case, FOLDER, Kept,
    parts::{Ids, Malformed, Parts, masks},
};

/// The other implementation's settings under its own names; a case with any other name is refused.
#[derive(Deserialize)]
struct Config {
    method: Method,
    student: Tower,
    teacher: Tower,
    teacher_kind: TeacherKind,
    fusion: Fusion,
    head: Head,
    target_norm: TargetNorm,
    loss: LossKind,
    loss_weights: LossWeights,
    mask: MaskKind,
    mask_ratio: f64,
    decoder: Option<Tower>,
    norm_pix: bool,
    optimizer: OptimizerConfig,
}

#[derive(Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Method {
    MaskAlign,
    Mae,
}

#[derive(Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum TeacherKind {
    Clip,
    Dino,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum TargetNorm {
    None,
    L2,
    Whiten,
    Bn,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum LossKind {
    L1,
    L2,
    SmoothL1,
    Cosine,
}

#[derive(Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum MaskKind {
    Attention,
    Random,
}

/// The weights of the teacher's levels in the loss.
#[derive(Deserialize)]
#[serde(try_from = "String")]
enum LossWeights {
    /// The last levels, this many, with equal weights.
    Top(usize),
    /// The level of one block alone.
    Mid(usize),
    /// All levels, with larger weights for later ones.
    LinearDecay,
    /// All levels, with equal weights.
    Mean,
}

impl TryFrom<String> for LossWeights {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        let after = |prefix: &str| name.strip_prefix(prefix).and_then(|number| number.parse().ok());
        match name.as_str() {
            "out" => Ok(LossWeights::Top(1)),
            "linear_decay" => Ok(LossWeights::LinearDecay),
            "mean" => Ok(LossWeights::Mean),
            _ => match (after("top").filter(|levels| *levels > 0), after("mid")) {
                (Some(levels), _) => Ok(LossWeights::Top(levels)),
                (_, Some(block)) => Ok(LossWeights::Mid(block)),
                _ => Err(format!("unknown `loss_weights` `{name}`, expected out, topN, midN, mean or linear_decay")),
            },
        }
    }
}

#[derive(Deserialize)]
struct Tower {
    dim: usize,
    depth: usize,
    heads: usize,
    mlp: usize,
    patch: usize,
    image: usize,
}

impl Tower {
    fn arch(&self) -> Value {
        json!({ "dim": self.dim, "depth": self.depth, "heads": self.heads, "mlp": self.mlp, "patch": self.patch })
    }
}

#[derive(Deserialize)]
struct OptimizerConfig {
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
}

/// Reads what a file of this format holds.
pub(super) fn read(mut parts: Parts) -> Result<Case, Malformed> {
    let config: Config =
        serde_json::from_str(&parts.metadata("config")?).map_err(|error| Malformed(format!("`config`: {error}")))?;
    let images = parts.images("images")?;
    let (lr, visible) = (parts.take("lr")?.data, parts.ids("ids_keep")?);
    let losses = parts.take("expect.loss")?.data;
    let Ids { steps, batch, .. } = visible;
    if images.len() != 1 || batch != images[0].batch || lr.len() != steps || losses.len() != steps {
        return Err(Malformed(format!(
            "{} images, `ids_keep` of {steps} steps and {batch} images, {} rates and {} losses do not fit together",
            images[0].batch,
            lr.len(),
            losses.len()
        )));
    }
    let patches = patches(&config)?;
    masks(Some(&visible), None, patches, 1)?;
    let teacher = parts.under("teacher.");
    let is_whole = visible.each == patches;
    Ok(Case {
        recipe: recipe(&config, images[0].batch, images[0].size, is_whole),
        teachers: (!teacher.is_empty()).then(|| ("teacher".to_owned(), teacher)).into_iter().collect(),
        images,
        crops: Vec::new(),
        visible: Some(visible),
        masked: None,
        further_masked: Vec::new(),
        lr,
        steps_per_epoch: 1,
        start: parts.under("student."),
        losses,
        kept: Kept::Some,
        expected: parts.under("expect."),
    })
}

/// Patches of an image.
fn patches(config: &Config) -> Result<usize, Malformed> {
    let Tower { image, patch, .. } = config.student;
    if patch == 0 || !image.is_multiple_of(patch) {
        return Err(Malformed("the student's image is not a whole number of patches".to_owned()));
    }
    let side = image / patch;
    let patches = side.checked_mul(side).filter(|&patches| u32::try_from(patches).is_ok());
    patches.ok_or_else(|| Malformed("the student's image has too many patches".to_owned()))
}

/// The case as a recipe (JSON, which is YAML).
fn recipe(c: &Config, batch: usize, size: usize, is_whole: bool) -> String {
    let mut stage = json!({
        "type": "pretrain",
        "epochs": 1,
        "data": {
            "dataset": { "type": "sample", "split": "train" },
            "transforms": [{ "type": "resize", "size": [size, size] }],
        },
        "student": { "type": "vit", "arch": c.student.arch(), "image_size": c.student.image },
        "masker": { "type": "random", "ratio": c.mask_ratio },
        "optimizer": {
            "type": "adamw", "base_lr": 1.0, "base_batch": batch, "betas": c.optimizer.betas,
            "eps": c.optimizer.eps, "weight_decay": c.optimizer.weight_decay, "no_decay": ["distill_weights"],
        },
        "schedule": { "type": "constant" },
        "batch": { "effective": batch },
    });
    if c.method == Method::Mae {
        let d = c.decoder.as_ref().unwrap_or(&c.student);
        stage["objectives"] = json!({ "pixels": {
            "target": { "type": "pixels", "normalize": if c.norm_pix { "standardize" } else { "none" } },
            "tokens": ["masked"],
            "aligner": { "type": "decoder", "dim": d.dim, "depth": d.depth, "heads": d.heads, "mlp": d.mlp },
            "loss": { "type": "mse" },
        }});
        return json!({ "name": "case", "stages": { "pretrain": stage } }).to_string();
    }
    let (levels, level_weights) = match c.loss_weights {
        LossWeights::Top(levels) => (json!({ "last": levels }), "uniform"),
        LossWeights::Mid(block) => (json!([block]), "uniform"),
        LossWeights::LinearDecay => (json!("all"), "linear"),
        LossWeights::Mean => (json!("all"), "uniform"),
    };
    let normalize = match c.target_norm {
        TargetNorm::None => "none",
        TargetNorm::L2 => "l2",
        TargetNorm::Whiten => "whiten",
        TargetNorm::Bn => "standardize_batch",
    };
    let (loss, weight) = match c.loss {
        LossKind::L1 => ("l1", 1.0),
        LossKind::L2 => ("mse", 1.0),
        LossKind::SmoothL1 => ("smooth_l1", 2.0),
        LossKind::Cosine => ("cosine", 1.0),
    };
    let (teacher_type, eps) = match c.teacher_kind {
        TeacherKind::Clip => ("clip", 1e-5),
        TeacherKind::Dino => ("dino", 1e-12),
    };
    stage["teachers"] = json!({ "teacher": {
        "type": teacher_type, "arch": c.teacher.arch(), "image_size": c.teacher.image,
        "weights": format!("${{{FOLDER}}}/teacher.safetensors"), "eps": eps,
    }});
    if c.mask == MaskKind::Attention && !is_whole {
        stage["masker"] = json!({ "type": "attention", "teacher": "teacher", "ratio": c.mask_ratio });
    }
    stage["objectives"] = json!({ "align": {
        "target": { "type": "features", "teacher": "teacher", "levels": levels, "normalize": normalize },
        "tokens": ["cls", "visible"],
        "aligner": { "type": "dynamic", "fusion": c.fusion, "head": c.head },
        "loss": { "type": loss },
        "level_weights": level_weights,
        "weight": weight,
    }});
    json!({ "name": "case", "stages": { "pretrain": stage } }).to_string()
}
