//! Replays steps that were recorded from another implementation.
//!
//! A case file (`maskalign-case-v1`, safetensors) holds images, masks, learning rates, starting weights and what the
//! other implementation computed from them. [`Case::recipe`] says the same as a recipe; [`Case::replay`] runs the
//! stage's own step on it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
};

use maskalign_engine::{Context, ImageBatch, Tape, random::Stream};
use maskalign_registry::{Recipe, Refusal, decode_options};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use maskalign_core::{
    components::{
        aligners::{Fusion, Head},
        maskers::{Counts, Mask, MaskInput, PlannedMasker},
        teachers::Wants,
        tokens::Masks,
        towers::{Environment, MissingWeights, TrainedStudents},
    },
    error::{Error, Result},
    stages::{BatchSize, MicroBatch, Pretrain, PretrainModel, StageContext, Task},
    weights::{self, HostTensor, TensorMap},
};

/// Recorded steps.
pub struct Case {
    config: Config,
    images: ImageBatch,
    /// Of each step, the visible patches of each image.
    masks: Vec<Masks>,
    lr: Vec<f32>,
    /// What the other implementation computed, of each step.
    losses: Vec<f32>,
    teacher: TensorMap,
    student: TensorMap,
    expected: TensorMap,
}

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

/// The largest relative error of one kind of quantity.
#[derive(Clone, Debug, Serialize)]
pub struct Quantity {
    /// What was compared: `attention`, `teacher hidden`, `student hidden`, `loss`, `gradients`, `parameters`.
    pub name: &'static str,
    /// The norm of the difference over the norm of the reference, for the worst tensor.
    pub error: f64,
    /// The name of that tensor.
    pub worst: String,
    /// The number of tensors that were compared.
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
        let file = weights::TensorFile::open(path)?;
        let metadata = file.metadata();
        if metadata.get("format").map(String::as_str) != Some("maskalign-case-v1") {
            return Err(malformed("its metadata has no such `format`"));
        }
        let config = metadata.get("config").ok_or_else(|| malformed("no `config`"))?;
        let config: Config = serde_json::from_str(config).map_err(|e| malformed(&format!("`config`: {e}")))?;
        let mut tensors = file.read_all()?;
        let mut take = |name: &str| tensors.remove(name).ok_or_else(|| malformed(&format!("no tensor `{name}`")));
        let (images, lr, ids) = (take("images")?, take("lr")?, take("ids_keep")?);
        let losses = take("expect.loss")?.data;
        let [batch, 3, height, width] = images.shape[..] else { return Err(malformed("`images` is not [B, 3, H, W]")) };
        let [steps, rows, kept] = ids.shape[..] else { return Err(malformed("`ids_keep` is not [steps, B, K]")) };
        if ids.data.is_empty() {
            return Err(malformed(&format!("`ids_keep` is {:?}: it names no patch", ids.shape)));
        }
        if height != width || rows != batch || lr.data.len() != steps || losses.len() != steps {
            return Err(malformed(&format!(
                "`images` {:?}, `ids_keep` {:?}, `lr` {:?} and {} losses do not fit together",
                images.shape,
                ids.shape,
                lr.shape,
                losses.len()
            )));
        }
        if config.student.patch == 0 || !config.student.image.is_multiple_of(config.student.patch) {
            return Err(malformed("the student's image is not a whole number of patches"));
        }
        let side = config.student.image / config.student.patch;
        let patches = side.checked_mul(side).and_then(|patches| u32::try_from(patches).ok());
        let patches = patches.ok_or_else(|| malformed("the student's image has too many patches"))?;
        if ids.data.iter().any(|&i| i < 0.0 || i >= patches as f32 || i.fract() != 0.0) {
            return Err(malformed("`ids_keep` names a patch that an image does not have"));
        }
        let mut masks = Vec::with_capacity(steps);
        for step in ids.data.chunks_exact(batch * kept) {
            let visible: Vec<u32> = step.iter().map(|&i| i as u32).collect();
            let mut masked = Vec::new();
            for image in visible.chunks_exact(kept) {
                let seen: BTreeSet<u32> = image.iter().copied().collect();
                if seen.len() < kept {
                    return Err(malformed("`ids_keep` names a patch twice"));
                }
                masked.extend((0..patches).filter(|i| !seen.contains(i)));
            }
            masks.push(Masks { batch, visible, masked });
        }
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
            losses,
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
            "weights": teacher.to_string_lossy(), "eps": eps,
        }});
        if c.mask == MaskKind::Attention && !self.masks[0].masked.is_empty() {
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

    /// Replays the steps with the stage of `recipe`, in its micro-batches, and compares.
    ///
    /// # Errors
    /// A recipe whose batch or number of visible patches differs from the case's; any error of a step.
    pub fn replay(&self, cx: &Context, recipe: &Recipe) -> Result<CaseReport> {
        let (name, slot) = recipe.stages.first().ok_or_else(|| Error::Usage("the recipe has no stage".into()))?;
        let located = |error| match error {
            Error::Refused(refusal) => Error::Refused(refusal.under(name).under("stages")),
            other => other,
        };
        let students = BTreeMap::new();
        let context = StageContext {
            name,
            seed: recipe.seed,
            students: &students,
            classifiers: &BTreeMap::new(),
            environment: Environment::Checked,
            missing_weights: MissingWeights::Refused,
            recompute: cx.recompute(),
        };
        let stage: Pretrain = decode_options(slot.options_value()).map_err(|r| located(r.into()))?;
        let planned = stage.plan_pretrain(&context).map_err(|mut all| located(all.swap_remove(0).into()))?;
        let batch = planned.training().batch;
        self.check_batch(batch).map_err(|refusal| located(refusal.into()))?;
        let (kept, visible) = (self.masks[0].visible_each(), planned.counts().visible);
        if visible != kept {
            let message = format!("leaves {visible} patches of an image visible, the case's `ids_keep` names {kept}");
            return Err(located(Refusal::new("masker", message).help("the masks come from the case").into()));
        }
        let planned = planned.with_masker(Arc::new(RecordedMasks(self.masks.clone())));
        let mut trainer = planned.training().trainer_for(self.images.batch);
        let mut model = planned.model(cx, &TrainedStudents::default()).map_err(located)?;
        let mut shapes = Vec::new();
        model.visit(&mut |p| {
            if p.role().is_saved() {
                shapes.push((p.name.clone(), p.dims.clone()));
            }
        });
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
        let mut loaded = Ok(());
        model.visit(&mut |p| {
            if let Some(tensor) = self.student.get(&p.name) {
                loaded = loaded.clone().and(p.load(&tensor.data));
            }
        });
        loaded?;

        if let Some(expected) = self.expected.get("attention_cls") {
            let inspection = self.inspect(cx, &model)?;
            compared.add("attention", "attention_cls", &inspection.attention, &expected.data);
            for (kind, prefix, states) in [
                ("teacher hidden", "teacher_hidden.", &inspection.teacher_hidden),
                ("student hidden", "student_hidden.", &inspection.student_hidden),
            ] {
                for (key, expected) in self.expected.iter().filter(|(key, _)| key.starts_with(prefix)) {
                    let block: usize = key[prefix.len()..].parse().unwrap_or(usize::MAX);
                    // Blocks that the loss does not need do not run.
                    if block < model.student().shape().arch.depth
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
            let parts = self.images.batch / batch.micro();
            let mut next = (0..parts).map(|part| self.micro_batch(step, part, batch.micro()));
            let mut micro_batches = || Ok(next.next().expect("as many as there are parts"));
            let stepped = trainer.step_at(cx, &mut model, parts, &mut micro_batches, f64::from(lr))?;
            losses.push(stepped.loss);
            if step == 0 {
                let mut reached = BTreeMap::new();
                let gradients = trainer.gradients().expect("a step was made");
                model.visit(&mut |p| {
                    if p.is_trained() {
                        reached.insert(p.name.clone(), gradients.to_vec(&p.value));
                    }
                });
                self.compare_by_name(&mut compared, "gradients", "grad.", &reached);
            }
        }
        let mut parameters = BTreeMap::new();
        model.visit(&mut |p| {
            parameters.insert(p.name.clone(), p.to_host().data);
        });
        parameters.retain(|name, _| self.expected.contains_key(&format!("param.{name}")));
        for (step, (loss, expected)) in losses.iter().zip(&self.losses).enumerate() {
            compared.add("loss", &format!("loss[{step}]"), &[*loss], &[*expected]);
        }
        self.compare_by_name(&mut compared, "parameters", "param.", &parameters);
        Ok(CaseReport { quantities: compared.0, losses })
    }

    /// Refuses a batch that the case does not hold.
    fn check_batch(&self, batch: BatchSize) -> Result<(), Refusal> {
        if batch.effective != self.images.batch {
            let message = format!("{} images, the case has {}", batch.effective, self.images.batch);
            return Err(Refusal::new("effective", message).help("leave it as the case has it").under("batch"));
        }
        batch.check()
    }

    /// Attention and hidden states for the first step's masks.
    fn inspect(&self, cx: &Context, model: &PretrainModel) -> Result<Inspection> {
        let mut inspection = Inspection::default();
        for teacher in model.teachers() {
            let levels = (0..teacher.shape().arch.depth).collect();
            let wants = Wants { levels, attention: true, whole: true, ..Wants::default() };
            let mut pass = teacher.begin(cx, &self.images, &wants)?;
            inspection.attention = std::mem::take(&mut pass.attention);
            let levels = teacher.finish(cx, pass, &wants, &self.masks[0])?;
            inspection.teacher_hidden = levels.into_iter().map(|(i, level)| (i, level.x.to_vec())).collect();
        }
        let seen = Some(self.masks[0].seen());
        let off = &mut Tape::inference();
        let features = model.student().forward(cx, off, &self.images, seen, None, &|_| true)?;
        inspection.student_hidden = features.hidden.iter().map(|(i, x)| (*i, x.to_vec())).collect();
        Ok(inspection)
    }

    fn micro_batch(&self, step: usize, part: usize, size: usize) -> MicroBatch {
        let each = self.images.pixels.len() / self.images.batch;
        let pixels = self.images.pixels[part * size * each..][..size * each].to_vec();
        MicroBatch {
            images: ImageBatch { pixels, batch: size, size: self.images.size },
            labels: vec![None; size],
            indices: (part * size..(part + 1) * size).collect(),
            epoch: step as u64,
            progress: 0.0,
        }
    }

    /// Compares tensors with one prefix; a tensor that only one side has is an infinite error.
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

/// What is compared besides losses and gradients.
#[derive(Default)]
struct Inspection {
    /// Attention of the teacher's class token, `[batch, patches]`.
    attention: Vec<f32>,
    /// The teacher's hidden states, every token, by block: `[batch * tokens, channels]`.
    teacher_hidden: BTreeMap<usize, Vec<f32>>,
    /// The student's hidden states of the visible tokens, by block.
    student_hidden: BTreeMap<usize, Vec<f32>>,
}

/// The masks of each step. The step takes the place of the epoch.
struct RecordedMasks(Vec<Masks>);

impl PlannedMasker for RecordedMasks {
    fn counts(&self) -> Counts {
        Counts { visible: self.0[0].visible_each(), masked: self.0[0].masked_each() }
    }

    fn draw(&self, input: &MaskInput, _: &mut Stream) -> Mask {
        let masks = &self.0[input.epoch as usize];
        Mask { visible: masks.visible_of(input.image).to_vec(), masked: masks.masked_of(input.image).to_vec() }
    }
}

/// Softmax is invariant to a constant, so the gradient of the keys' bias is zero in theory, and AdamW turns its round-off
/// into updates of full size.
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
