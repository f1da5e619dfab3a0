//! Replays steps that were recorded from another implementation.
//!
//! A case is a safetensors file with images, masks, learning rates, starting values and what the other implementation
//! computed from them. [`Case::recipe`] gives it as a recipe, and [`Case::replay`] runs the stage's own step on it.
//!
//! `maskalign-case-v2` is for every recipe; docs/papers.md describes it. `maskalign-case-v1` holds the official code's settings
//! in place of a recipe, and knows MaskAlign and MAE alone.

mod parts;
mod v1;
mod v2;

use std::{collections::BTreeMap, path::Path, sync::Arc};

use maskalign_engine::{Context, ImageBatch, Role, Tape, random::Stream};
use maskalign_registry::{Recipe, Refusal, decode_options};
use serde::Serialize;

use maskalign_core::{
    components::{
        maskers::{Counts, Mask, MaskInput, PlannedMasker},
        teachers::Wants,
        tokens::Masks,
        towers::{Environment, MissingWeights, TrainedStudents},
    },
    error::{Error, Result},
    stages::{BatchSize, MicroBatch, PlannedPretrain, Pretrain, PretrainModel, StageContext, Task, Trainer},
    weights::{self, HostTensor, TensorMap},
};

use parts::{Ids, Malformed, Parts, masks};

/// The variable in a case's recipe that stands for the folder of its teachers' files.
const FOLDER: &str = "CASE";

/// Recorded steps.
pub struct Case {
    recipe: String,
    /// The weights of frozen teachers, by the names of their files.
    teachers: BTreeMap<String, TensorMap>,
    /// Of each step, or of all; of an image's crops the first.
    images: Vec<ImageBatch>,
    /// The further crops, each as `images`.
    crops: Vec<Vec<ImageBatch>>,
    visible: Option<Ids>,
    masked: Option<Ids>,
    /// The predicted patches of further crops; the others of these are visible.
    further_masked: Vec<Ids>,
    lr: Vec<f32>,
    steps_per_epoch: u64,
    /// Parameters before the first step.
    start: TensorMap,
    /// What the other implementation computed, of each step.
    losses: Vec<f32>,
    kept: Kept,
    expected: TensorMap,
}

/// Which parameters a case has after its last step.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kept {
    /// Some.
    Some,
    /// At least those that are trained.
    All,
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
        let mut parts = Parts::of(weights::TensorFile::open(path)?)?;
        let format = parts.note("format").unwrap_or_default();
        let read = match format.as_str() {
            "maskalign-case-v1" => v1::read(parts),
            "maskalign-case-v2" => v2::read(parts),
            _ => {
                let text =
                    "not a case file: the `format` of its metadata is neither maskalign-case-v1 nor maskalign-case-v2";
                return Err(Error::Usage(format!("{}: {text}", path.display())));
            }
        };
        read.map_err(|Malformed(what)| Error::Usage(format!("{}: not a {format} file: {what}", path.display())))
    }

    /// Writes the weights of frozen teachers to the folder that [`Case::variable`] names in the recipe.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write_teachers(&self, folder: &Path) -> Result<()> {
        for (name, tensors) in &self.teachers {
            weights::write_safetensors(&folder.join(format!("{name}.safetensors")), tensors, None)?;
        }
        Ok(())
    }

    /// The case as a recipe.
    pub fn recipe(&self) -> &str {
        &self.recipe
    }

    /// The value of a variable in the recipe: `${CASE}` is the folder of teachers' files. So is any other: a shipped recipe
    /// that the case extends names its data by one, and the case replaces the data.
    pub fn variable(folder: &Path) -> impl Fn(&str) -> Option<String> {
        move |_| Some(folder.to_string_lossy().into_owned())
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
        let masks = self.masks(&planned).map_err(|refusal| located(refusal.into()))?;
        let planned = match masks.is_empty() {
            true => planned,
            false => {
                let recorded = self.recorded_masks(&planned, &masks)?;
                planned.with_masker(Arc::new(recorded))
            }
        };
        let mut trainer = planned.training().trainer_for(self.batch().saturating_mul(self.steps_per_epoch as usize));
        let mut model = planned.model(cx, &TrainedStudents::default()).map_err(located)?;
        if model.student().drop_path() > 0.0 {
            let refusal = Refusal::new("drop_path", "a case records steps without stochastic depth");
            return Err(located(refusal.help("set it to 0").under("student").into()));
        }
        let mut shapes = Vec::new();
        model.visit(&mut |p| {
            if p.role().is_saved() {
                shapes.push((p.name.clone(), p.dims.clone()));
            }
        });
        let mut compared = Compared::default();
        // A recipe whose models have other parameters than the case cannot agree with it.
        let known: BTreeMap<&String, &Vec<usize>> = shapes.iter().map(|(name, dims)| (name, dims)).collect();
        let absent = self.start.keys().filter(|name| !known.contains_key(name));
        let misshapen = shapes.iter().filter(|(name, dims)| self.start.get(name).is_none_or(|t| t.shape != *dims));
        for name in absent.chain(misshapen.map(|(name, _)| name)) {
            compared.add("starting weights", name, &[], &[1.0]);
        }
        if !compared.0.is_empty() {
            return Ok(CaseReport { quantities: compared.0, losses: Vec::new() });
        }
        let mut loaded = Ok(());
        model.visit(&mut |p| {
            if let Some(tensor) = self.start.get(&p.name) {
                loaded = loaded.clone().and(p.load(&tensor.data));
            }
        });
        loaded?;

        if let Some(expected) = self.expected.get("attention_cls") {
            let inspection = self.inspect(cx, &model, &masks[0])?;
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
        let losses = self.steps(cx, &mut trainer, &mut model, batch, &mut compared)?;
        let mut parameters = BTreeMap::new();
        model.visit(&mut |p| {
            if self.kept == Kept::All && p.is_trained() || self.expected.contains_key(&format!("param.{}", p.name)) {
                parameters.insert(p.name.clone(), p.to_host().data);
            }
        });
        self.compare_by_name(&mut compared, "parameters", "param.", &parameters);
        Ok(CaseReport { quantities: compared.0, losses })
    }

    /// Makes the steps and compares what each gives; gives their losses.
    fn steps(
        &self,
        cx: &Context,
        trainer: &mut Trainer,
        model: &mut PretrainModel,
        batch: BatchSize,
        compared: &mut Compared,
    ) -> Result<Vec<f32>> {
        let parts = self.batch() / batch.micro();
        let mut losses = Vec::new();
        let mut terms: BTreeMap<String, Vec<f32>> = BTreeMap::new();
        for (step, &lr) in self.lr.iter().enumerate() {
            let progress = trainer.progress();
            if let Some(expected) = self.expected.get("progress") {
                let expected = expected.data.get(step..=step).unwrap_or_default();
                compared.add("progress", &format!("progress[{step}]"), &[progress as f32], expected);
            }
            let mut next = (0..parts).map(|part| self.micro_batch(step, part, batch.micro(), progress));
            let mut micro_batches = || Ok(next.next().expect("as many as there are parts"));
            let stepped = trainer.step_at(cx, model, parts, &mut micro_batches, f64::from(lr))?;
            compared.add("loss", &format!("loss[{step}]"), &[stepped.loss], &[self.losses[step]]);
            losses.push(stepped.loss);
            for term in stepped.terms {
                terms.entry(term.name).or_default().push(term.value as f32);
            }
            if step == 0 {
                let mut reached = BTreeMap::new();
                let gradients = trainer.gradients().expect("a step was made");
                model.visit(&mut |p| {
                    if p.is_trained() {
                        reached.insert(p.name.clone(), gradients.to_vec(&p.value));
                    }
                });
                self.compare_by_name(compared, "gradients", "grad.", &reached);
            }
            let mut moving = BTreeMap::new();
            model.visit(&mut |p| {
                if p.role() == Role::Moving {
                    moving.insert(p.name.clone(), p.to_host().data);
                }
            });
            self.compare_by_name(compared, "moving teachers", &format!("moving.{step}."), &moving);
        }
        terms.retain(|name, _| self.expected.contains_key(&format!("term.{name}")));
        self.compare_by_name(compared, "terms", "term.", &terms);
        Ok(losses)
    }

    /// Images of a step.
    fn batch(&self) -> usize {
        self.images[0].batch
    }

    /// The masks of each step; none where all patches are visible and nobody recorded so. Refuses a recipe with other
    /// masks than the case's.
    fn masks(&self, planned: &PlannedPretrain) -> Result<Vec<Masks>, Refusal> {
        let (counts, patches) = (planned.counts(), planned.student().shape().grid.patches());
        let (visible, masked) = (self.visible.as_ref(), self.masked.as_ref());
        let blocks = planned.mask_blocks();
        if let Some(ids) = masked.filter(|ids| !ids.each.is_multiple_of(blocks)) {
            let message = format!("predicts {blocks} blocks, of which the case's {} patches are no multiple", ids.each);
            return Err(Refusal::new("masker", message).help("the masks come from the case"));
        }
        let masks = masks(visible, masked, patches, blocks).map_err(|Malformed(what)| Refusal::new("student", what))?;
        let named = match masks.first() {
            Some(masks) => masks.counts_of(0),
            None => Counts { visible: patches, masked: 0 },
        };
        // A teacher's attention says what is masked, where nothing was recorded.
        if masks.is_empty() && planned.masks_follow_a_teacher() {
            return Ok(masks);
        }
        // Those of a masker that draws them are not known beforehand.
        if counts == named || planned.masks_vary() {
            return Ok(masks);
        }
        let text =
            |counts: Counts| format!("{} patches of an image visible and {} masked", counts.visible, counts.masked);
        let message = format!("leaves {}, the case {}", text(counts), text(named));
        Err(Refusal::new("masker", message).help("the masks come from the case"))
    }

    /// The masks of every crop: `first` are those of the first.
    fn recorded_masks(&self, planned: &PlannedPretrain, first: &[Masks]) -> Result<RecordedMasks> {
        let patches = planned.student().shape().grid.patches();
        let mut crops = vec![first.to_vec()];
        for masked in &self.further_masked {
            let masks = masks(None, Some(masked), patches, 1);
            crops.push(masks.map_err(|Malformed(what)| Error::Usage(what))?);
        }
        if crops.len() != planned.masked_crops() {
            let text = format!("masks of {} crops, where the recipe masks {}", crops.len(), planned.masked_crops());
            return Err(Error::Usage(format!("the case has {text}")));
        }
        Ok(RecordedMasks(crops))
    }

    /// Refuses a batch that the case does not hold.
    fn check_batch(&self, batch: BatchSize) -> Result<(), Refusal> {
        if batch.effective != self.batch() {
            let message = format!("{} images, the case has {}", batch.effective, self.batch());
            return Err(Refusal::new("effective", message).help("leave it as the case has it").under("batch"));
        }
        batch.check()
    }

    /// Attention and hidden states for the first step's masks.
    fn inspect(&self, cx: &Context, model: &PretrainModel, masks: &Masks) -> Result<Inspection> {
        let images = &self.images[0];
        let mut inspection = Inspection::default();
        for teacher in model.teachers() {
            let levels = (0..teacher.shape().arch.depth).collect();
            let wants = Wants { levels, attention: true, whole: true, ..Wants::default() };
            let mut pass = teacher.begin(cx, images, &wants)?;
            inspection.attention = std::mem::take(&mut pass.attention);
            let levels = teacher.finish(cx, pass, &wants, masks)?;
            inspection.teacher_hidden = levels.into_iter().map(|(i, level)| (i, level.x.to_vec())).collect();
        }
        let seen = Some(masks.seen());
        let off = &mut Tape::inference();
        let features = model.student().forward(cx, off, images, seen, None, &|_| true)?;
        inspection.student_hidden = features.hidden.iter().map(|(i, x)| (*i, x.to_vec())).collect();
        Ok(inspection)
    }

    /// A part of a step's images; where they are among those of all steps stands for their places in a dataset.
    fn micro_batch(&self, step: usize, part: usize, size: usize, progress: f64) -> MicroBatch {
        let images = &self.images[step % self.images.len()];
        let first = step * images.batch + part * size;
        let part_of = |images: &ImageBatch| {
            let each = images.pixels.len() / images.batch;
            let pixels = images.pixels[part * size * each..][..size * each].to_vec();
            ImageBatch { pixels, batch: size, size: images.size }
        };
        MicroBatch {
            images: part_of(images),
            crops: self.crops.iter().map(|crop| part_of(&crop[step % crop.len()])).collect(),
            labels: vec![None; size],
            indices: (first..first + size).collect(),
            epoch: step as u64 / self.steps_per_epoch,
            progress,
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

/// The masks of each crop in each step.
struct RecordedMasks(Vec<Vec<Masks>>);

impl PlannedMasker for RecordedMasks {
    fn counts(&self) -> Counts {
        self.0[0][0].counts_of(0)
    }

    fn draw(&self, input: &MaskInput, _: &mut Stream) -> Mask {
        let batch = self.0[0][0].batch;
        let (step, image) = (input.image / batch, input.image % batch);
        let masks = &self.0[input.crop][step];
        Mask { visible: masks.visible_of(image).to_vec(), masked: masks.masked_of(image).to_vec() }
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
