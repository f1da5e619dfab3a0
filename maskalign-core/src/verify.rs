//! Replaying steps that another implementation recorded.
//!
//! A case file (`maskalign-case-v1`, safetensors) holds images, masks, learning rates, starting weights and what the
//! other implementation computed from them. [`Case::recipe`] says the same as a recipe; [`Case::replay`] runs the
//! stage's own step on it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use dfdx::prelude::HasShape;
use maskalign_registry::{Recipe, decode_options};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    components::tokens::Masks,
    context::Context,
    device::Dev,
    error::{Error, Result},
    images::ImageBatch,
    stages::{MicroBatch, Pretrain, StageContext, Task},
    tape::gradient,
    weights::{self, HostTensor, TensorMap},
};

/// Recorded steps.
pub struct Case {
    config: Config,
    images: ImageBatch,
    /// Of each step, the visible patches of each image.
    masks: Vec<Masks>,
    lr: Vec<f32>,
    teacher: TensorMap,
    student: TensorMap,
    expected: TensorMap,
}

#[derive(Deserialize)]
struct Config {
    method: String,
    student: Tower,
    teacher: Tower,
    teacher_kind: String,
    fusion: String,
    head: String,
    target_norm: String,
    loss: String,
    loss_weights: String,
    mask: String,
    mask_ratio: f64,
    decoder: Option<Tower>,
    norm_pix: bool,
    optimizer: OptimizerConfig,
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

/// The largest relative error of one kind of quantity.
#[derive(Clone, Debug, Serialize)]
pub struct Quantity {
    /// What was compared: `attention`, `teacher hidden`, `student hidden`, `loss`, `gradients`, `parameters`.
    pub name: &'static str,
    /// Norm of the difference over norm of the reference, of the worst tensor.
    pub error: f64,
    /// That tensor.
    pub worst: String,
    /// How many were compared.
    pub tensors: usize,
}

/// A replayed case.
#[derive(Clone, Debug, Serialize)]
pub struct CaseReport {
    /// Every kind of quantity that the case records.
    pub quantities: Vec<Quantity>,
    /// The losses as computed here.
    pub losses: Vec<f32>,
}

impl CaseReport {
    /// The largest error of all; infinite where a quantity is missing.
    pub fn error(&self) -> f64 {
        self.quantities.iter().map(|q| q.error).fold(0.0, f64::max)
    }
}

impl Case {
    /// Reads a case file.
    ///
    /// # Errors
    /// A file that cannot be read or is not a case.
    pub fn read(path: &Path) -> Result<Self> {
        let malformed = |what: &str| Error::Usage(format!("{}: not a maskalign-case-v1 file: {what}", path.display()));
        let metadata = weights::TensorFile::open(path)?.metadata();
        if metadata.get("format").map(String::as_str) != Some("maskalign-case-v1") {
            return Err(malformed("its metadata has no such `format`"));
        }
        let config = metadata.get("config").ok_or_else(|| malformed("no `config`"))?;
        let config: Config = serde_json::from_str(config).map_err(|e| malformed(&format!("`config`: {e}")))?;
        let mut tensors = weights::TensorFile::open(path)?.read_all()?;
        let mut take = |name: &str| tensors.remove(name).ok_or_else(|| malformed(&format!("no tensor `{name}`")));
        let (images, lr, ids) = (take("images")?, take("lr")?, take("ids_keep")?);
        let [batch, 3, height, width] = images.shape[..] else { return Err(malformed("`images` is not [B, 3, H, W]")) };
        let [steps, rows, _] = ids.shape[..] else { return Err(malformed("`ids_keep` is not [steps, B, K]")) };
        if height != width || rows != batch || lr.data.len() != steps {
            return Err(malformed("`images`, `ids_keep` and `lr` do not fit together"));
        }
        if config.student.patch == 0 || !config.student.image.is_multiple_of(config.student.patch) {
            return Err(malformed("the student's image is not a whole number of patches"));
        }
        let patches = (config.student.image / config.student.patch).pow(2) as u32;
        if ids.data.iter().any(|&i| i < 0.0 || i >= patches as f32) {
            return Err(malformed("`ids_keep` names a patch that an image does not have"));
        }
        let masks = ids
            .data
            .chunks_exact((ids.data.len() / steps.max(1)).max(1))
            .map(|step| {
                let visible: Vec<u32> = step.iter().map(|&i| i as u32).collect();
                let each = visible.len() / batch;
                let masked = visible
                    .chunks_exact(each)
                    .flat_map(|kept| {
                        let kept: BTreeSet<u32> = kept.iter().copied().collect();
                        (0..patches).filter(move |i| !kept.contains(i))
                    })
                    .collect();
                Masks { batch, visible, masked }
            })
            .collect();
        let mut part = |prefix: &str| -> TensorMap {
            let names: Vec<String> = tensors.keys().filter(|n| n.starts_with(prefix)).cloned().collect();
            names.into_iter().map(|n| (n[prefix.len()..].to_string(), tensors.remove(&n).expect("listed"))).collect()
        };
        Ok(Case {
            teacher: part("teacher."),
            student: part("student."),
            expected: part("expect."),
            images: ImageBatch { pixels: images.data, batch, size: height },
            masks,
            lr: lr.data,
            config,
        })
    }

    /// Writes the teacher's weights to a file that [`Case::recipe`] can name; nothing where the case has no teacher.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write_teacher(&self, path: &Path) -> Result<()> {
        match self.teacher.is_empty() {
            true => Ok(()),
            false => Ok(weights::write_safetensors(path, &self.teacher, None)?),
        }
    }

    /// The case as a recipe (JSON, which is YAML), with the teacher's weights at `teacher`.
    pub fn recipe(&self, teacher: &Path) -> String {
        let c = &self.config;
        let masks = self.masks.first();
        let mut stage = json!({
            "type": "pretrain",
            "epochs": 1,
            "data": {
                "dataset": { "type": "sample", "split": "train" },
                "transforms": [{ "type": "resize", "size": [self.images.size, self.images.size] }],
            },
            "student": { "type": "vit", "arch": c.student.arch(), "image_size": c.student.image },
            "masker": { "type": "random", "ratio": c.mask_ratio },
            "optimizer": {
                "type": "adamw", "base_lr": 1.0, "base_batch": self.images.batch, "betas": c.optimizer.betas,
                "eps": c.optimizer.eps, "weight_decay": c.optimizer.weight_decay, "no_decay": ["distill_weights"],
            },
            "schedule": { "type": "constant" },
            "batch": { "effective": self.images.batch },
        });
        let all_visible = masks.is_some_and(|m| m.masked.is_empty());
        if c.method == "mae" {
            let d = c.decoder.as_ref().unwrap_or(&c.student);
            stage["objectives"] = json!({ "pixels": {
                "target": { "type": "pixels", "normalize": if c.norm_pix { "standardize" } else { "none" } },
                "tokens": ["masked"],
                "aligner": { "type": "decoder", "dim": d.dim, "depth": d.depth, "heads": d.heads, "mlp": d.mlp },
                "loss": { "type": "mse" },
            }});
            return json!({ "name": "case", "stages": { "pretrain": stage } }).to_string();
        }
        let (levels, level_weights) = match c.loss_weights.as_str() {
            "out" => (json!({ "last": 1 }), "uniform"),
            "linear_decay" => (json!("all"), "linear"),
            other => match (other.strip_prefix("top"), other.strip_prefix("mid")) {
                (Some(k), _) => (json!({ "last": k.parse::<usize>().unwrap_or(0) }), "uniform"),
                (_, Some(k)) => (json!([k.parse::<i64>().unwrap_or(0)]), "uniform"),
                _ => (json!("all"), "uniform"),
            },
        };
        let normalize = if c.target_norm == "bn" { "standardize_batch" } else { &c.target_norm };
        let (loss, weight) = match c.loss.as_str() {
            "l2" => ("mse", 1.0),
            "smoothl1" => ("smooth_l1", 2.0),
            other => (other, 1.0),
        };
        let eps = if c.teacher_kind == "dino" { 1e-12 } else { 1e-5 };
        stage["teachers"] = json!({ "teacher": {
            "type": c.teacher_kind, "arch": c.teacher.arch(), "image_size": c.teacher.image,
            "weights": teacher.to_string_lossy(), "eps": eps,
        }});
        if c.mask == "attention" && !all_visible {
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

    /// Replays the steps with the stage of `recipe` and compares.
    ///
    /// # Errors
    /// A recipe whose models do not have the case's parameters; whatever ends a step early.
    pub fn replay<D: Dev>(&self, cx: &Context<D>, recipe: &Recipe) -> Result<CaseReport> {
        let (name, slot) = recipe.stages.first().ok_or_else(|| Error::Usage("the recipe has no stage".into()))?;
        let stage: Pretrain = decode_options(slot.options_value()).map_err(|r| r.under(name).under("stages"))?;
        let students = BTreeMap::new();
        let context = StageContext {
            name,
            seed: recipe.seed,
            students: &students,
            environment: true,
            random_weights: false,
            recompute: cx.recompute,
        };
        let located = |error| match error {
            Error::Refused(refusal) => Error::Refused(refusal.under(name).under("stages")),
            other => other,
        };
        let (mut model, mut trainer) =
            stage.prepare(cx, &context, self.images.size, self.images.batch).map_err(located)?;
        let mut shapes = Vec::new();
        model.visit(&mut |p| shapes.push((p.name.clone(), p.dims.clone())));
        let mut compared = Compared::default();
        // A recipe whose models have other parameters than the case cannot agree with it.
        let known: BTreeMap<&String, &Vec<usize>> = shapes.iter().map(|(name, dims)| (name, dims)).collect();
        let absent = self.student.keys().filter(|name| !known.contains_key(name));
        let misshapen = shapes.iter().filter(|(name, dims)| self.student.get(name).is_none_or(|t| t.shape != *dims));
        for name in absent.chain(misshapen.map(|(name, _)| name)) {
            compared.add("starting weights", name, &[], &[1.0]);
        }
        if !compared.0.is_empty() {
            return Ok(CaseReport { quantities: compared.0, losses: Vec::new() });
        }
        model.visit(&mut |p| p.load(&self.student[&p.name].data));

        if let Some(expected) = self.expected.get("attention_cls") {
            let inspection = model.inspect(cx, &self.images, &self.masks[0])?;
            compared.add("attention", "attention_cls", &inspection.attention, &expected.data);
            for (kind, prefix, states) in [
                ("teacher hidden", "teacher_hidden.", &inspection.teacher_hidden),
                ("student hidden", "student_hidden.", &inspection.student_hidden),
            ] {
                for (key, expected) in self.expected.iter().filter(|(key, _)| key.starts_with(prefix)) {
                    let block: usize = key[prefix.len()..].parse().unwrap_or(usize::MAX);
                    // Blocks that the loss does not need do not run.
                    if block < model.student.shape().arch.depth
                        && kind == "student hidden"
                        && !states.contains_key(&block)
                    {
                        continue;
                    }
                    compared.add(kind, key, states.get(&block).map_or(&[], Vec::as_slice), &expected.data);
                }
            }
        }
        let mut losses = Vec::new();
        for (step, &lr) in self.lr.iter().enumerate() {
            model.given_masks.push_back(self.masks[step].clone());
            let stepped = trainer.step_at(cx, &mut model, 1, &mut || Ok(self.micro_batch()), f64::from(lr))?;
            losses.push(stepped.loss);
            if step == 0 {
                let mut reached = BTreeMap::new();
                let gradients = trainer.gradients().expect("a step was made");
                let mut outcome = Ok(());
                model.visit(&mut |p| {
                    if p.trainable && outcome.is_ok() {
                        match gradient(gradients, &p.value) {
                            Ok(g) => {
                                debug_assert_eq!(g.shape().0, p.len());
                                reached.insert(p.name.clone(), g.as_vec());
                            }
                            Err(error) => outcome = Err(error),
                        }
                    }
                });
                outcome?;
                self.compare_by_name(&mut compared, "gradients", "grad.", &reached);
            }
        }
        let mut parameters = BTreeMap::new();
        model.visit(&mut |p| {
            parameters.insert(p.name.clone(), p.to_host().data);
        });
        parameters.retain(|name, _| self.expected.contains_key(&format!("param.{name}")));
        let recorded = &self.expected["loss"].data;
        for (step, (loss, expected)) in losses.iter().zip(recorded).enumerate() {
            compared.add("loss", &format!("loss[{step}]"), &[*loss], &[*expected]);
        }
        self.compare_by_name(&mut compared, "parameters", "param.", &parameters);
        Ok(CaseReport { quantities: compared.0, losses })
    }

    fn micro_batch(&self) -> MicroBatch {
        MicroBatch {
            images: self.images.clone(),
            labels: vec![None; self.images.batch],
            indices: (0..self.images.batch).collect(),
            epoch: 0,
            progress: 0.0,
        }
    }

    /// Compares tensors of one prefix; one that only one side has is an infinite error.
    fn compare_by_name(
        &self,
        compared: &mut Compared,
        kind: &'static str,
        prefix: &str,
        ours: &BTreeMap<String, Vec<f32>>,
    ) {
        let recorded = |name: &String| self.expected.get(&format!("{prefix}{name}"));
        for (name, values) in ours {
            let expected = recorded(name).map_or(&[][..], |t: &HostTensor| &t.data);
            compared.add(kind, name, &without_key_bias(name, values), &without_key_bias(name, expected));
        }
        for key in self.expected.keys().filter_map(|k| k.strip_prefix(prefix)) {
            if !ours.contains_key(key) {
                compared.add(kind, key, &[], &[1.0]);
            }
        }
    }
}

/// Softmax ignores a constant: the gradient of a key's bias is zero in theory, and AdamW turns its round-off into whole
/// steps.
fn without_key_bias(name: &str, values: &[f32]) -> Vec<f32> {
    let third = values.len() / 3;
    match name.ends_with("attn.qkv.bias") {
        true => [&values[..third], &values[2 * third..]].concat(),
        false => values.to_vec(),
    }
}

#[derive(Default)]
struct Compared(Vec<Quantity>);

impl Compared {
    fn add(&mut self, kind: &'static str, tensor: &str, ours: &[f32], expected: &[f32]) {
        let error = match ours.len() == expected.len() {
            true => {
                let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
                let difference = norm(&mut ours.iter().zip(expected).map(|(a, b)| f64::from(*a) - f64::from(*b)));
                let error = difference / (norm(&mut expected.iter().map(|v| f64::from(*v))) + 1e-30);
                if error.is_nan() { f64::INFINITY } else { error }
            }
            false => f64::INFINITY,
        };
        let quantity = match self.0.iter_mut().find(|q| q.name == kind) {
            Some(quantity) => quantity,
            None => {
                self.0.push(Quantity { name: kind, error: 0.0, worst: tensor.to_string(), tensors: 0 });
                self.0.last_mut().expect("just pushed")
            }
        };
        quantity.tensors += 1;
        if error > quantity.error {
            quantity.error = error;
            quantity.worst = tensor.to_string();
        }
    }
}
