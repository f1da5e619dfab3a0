//! Supervised training of a student: fine-tuning after a pre-training stage, or from random initialisation.

use std::sync::Arc;

use maskalign_engine::{
    Context, ImageBatch, Recompute, Role, Tape, Tensor,
    ops::{self, Act},
    random::Stream,
};
use maskalign_registry::{Refusal, Slot, StudentTag, With};
use rand_distr::{Beta, Distribution};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Data, MicroBatch, Outcome, PlannedData, PlannedStage, PlannedTraining, Pooling, Stage, StageContext, StageRun,
    StageSummary, Task, Training, TrainingStep, branch_scales, keep, memory,
    supervised::{Classify, Kept, Labelled, PlannedClassifier, PlannedSupervised, class_targets},
    training::{count_parameters, load_kept, saved_parameters},
    under,
};
use crate::{
    component,
    components::{
        students::StudentModel,
        towers::{StudentPlan, TowerShape, TrainedStudents},
    },
    error::Result,
    nn::{Bias, BranchScales, Init, Linear, Norm, Param, Reach},
    register,
    weights::TensorMap,
};

fn one() -> f64 {
    1.0
}
fn half() -> f64 {
    0.5
}
fn head_std() -> f64 {
    2e-5
}

/// Mixing of images and labels within a micro-batch (timm's `Mixup`).
#[component]
#[derive(Copy)]
struct Mixup {
    /// Both coefficients of the Beta distribution that blends are drawn from; 0: no blending.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    mixup: f64,
    /// Both coefficients of the Beta distribution that pasted areas are drawn from; 0: no pasting.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    cutmix: f64,
    /// Probability of pasting where both are on.
    #[serde(default = "half")]
    #[schemars(range(min = 0.0, max = 1.0))]
    switch: f64,
}

/// Trains a student and a linear head on labelled images; the loss is the cross entropy.
///
/// The head reads the mean of the patches' tokens through a fresh LayerNorm (MAE's and MaskAlign's fine-tuning), or the
/// class token.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Finetune(With<Kept, With<Training, FinetuneOptions>>);

/// The options that are fine-tuning's own.
#[component]
struct FinetuneOptions {
    /// Labelled images on which the accuracy is measured at the end; absent: it is not.
    #[serde(default)]
    eval: Option<Data>,
    /// The tower: with `weights: {stage: NAME}` an earlier stage's, without weights from random initialisation.
    student: Slot<StudentTag>,
    /// What the head reads.
    #[serde(default)]
    pooling: Pooling,
    /// Factor on the learning rate from layer to layer towards the input; 1: none (BEiT's layer decay).
    #[serde(default = "one")]
    #[schemars(extend("exclusiveMinimum" = 0), range(max = 1.0))]
    layer_decay: f64,
    /// Share of the target that is spread over all classes.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    label_smoothing: f64,
    /// Mixing of images and labels; absent: none.
    #[serde(default)]
    mixing: Option<Mixup>,
    /// Standard deviation of the head's initial weights, a truncated normal.
    #[serde(default = "head_std")]
    #[schemars(range(min = 0.0))]
    head_std: f64,
    /// Number of classes; absent: the dataset's.
    #[serde(default)]
    #[schemars(range(min = 2, max = 1000000))]
    classes: Option<usize>,
}

/// A student with a classification head.
pub struct Classifier {
    student: Box<dyn StudentModel>,
    norm: Option<Norm>,
    head: Linear,
    seed: u64,
    layer_decay: f64,
    label_smoothing: f64,
    mixing: Option<Mixup>,
}

impl Classifier {
    /// The tower.
    pub fn student(&self) -> &dyn StudentModel {
        &*self.student
    }

    fn logits(
        &self,
        cx: &Context,
        tape: &mut Tape,
        images: &ImageBatch,
        scales: Option<&BranchScales>,
    ) -> Result<Tensor> {
        let shape = self.student.shape();
        let features = self.student.forward(cx, tape, images, None, scales, &|_| false)?;
        let pooled = match &self.norm {
            Some(norm) => {
                let mean = ops::mean_tokens(cx, tape, &features.last, images.batch, usize::from(shape.cls_token))?;
                norm.forward(cx, tape, &mean)?
            }
            None => {
                let rows: Vec<u32> = (0..images.batch).map(|i| (i * features.tokens) as u32).collect();
                let cls = ops::gather_rows(cx, tape, &[&features.last], &rows)?;
                self.student.norm(cx, tape, &cls)?
            }
        };
        Ok(self.head.forward(cx, tape, &pooled, Act::None)?)
    }

    /// Targets `[batch, classes]`, and the images mixed in place where that is on.
    fn targets(&self, images: &mut ImageBatch, batch: &MicroBatch) -> Result<Vec<f32>> {
        let classes = self.head.outputs();
        let mut targets = class_targets(batch, classes, self.label_smoothing)?;
        let Some(mixing) = self.mixing else { return Ok(targets) };
        let mut rng = Stream::new(self.seed, "mixing", batch.epoch, batch.indices[0] as u64);
        let paste = mixing.cutmix > 0.0 && (mixing.mixup == 0.0 || rng.uniform() < mixing.switch);
        let alpha = if paste { mixing.cutmix } else { mixing.mixup };
        if alpha == 0.0 {
            return Ok(targets);
        }
        let beta = Beta::new(alpha, alpha).expect("positive coefficients");
        let kept: f64 = beta.sample(&mut rng);
        let centre = paste.then(|| (rng.below(images.size), rng.below(images.size)));
        mix(images, &mut targets, kept, centre);
        Ok(targets)
    }
}

/// Mixes each image and its target `[batch, classes]` with the one opposite in the batch, as timm does: a share `kept` of it
/// stays. With the row and column of a centre a box of the other image is pasted around it, without one they are blended.
fn mix(images: &mut ImageBatch, targets: &mut [f32], mut kept: f64, centre: Option<(usize, usize)>) {
    let (size, area) = (images.size, images.size * images.size);
    let original = images.pixels.clone();
    let opposite = |i: usize| images.batch - 1 - i;
    if let Some((cy, cx)) = centre {
        let side = (size as f64 * (1.0 - kept).sqrt()) as usize;
        let range = |c: usize| c.saturating_sub(side / 2)..(c + side / 2).min(size);
        let (rows, columns) = (range(cy), range(cx));
        for i in 0..images.batch {
            for channel in 0..3 {
                for row in rows.clone() {
                    let at = |image: usize| (image * 3 + channel) * area + row * size;
                    let from = &original[at(opposite(i))..][columns.clone()];
                    images.pixels[at(i)..][columns.clone()].copy_from_slice(from);
                }
            }
        }
        kept = 1.0 - (rows.len() * columns.len()) as f64 / area as f64;
    } else {
        for i in 0..images.batch {
            let other = &original[opposite(i) * 3 * area..][..3 * area];
            for (v, o) in images.pixels[i * 3 * area..][..3 * area].iter_mut().zip(other) {
                *v = *v * kept as f32 + o * (1.0 - kept) as f32;
            }
        }
    }
    let (unmixed, classes) = (targets.to_vec(), targets.len() / images.batch);
    for i in 0..images.batch {
        for class in 0..classes {
            targets[i * classes + class] = unmixed[i * classes + class] * kept as f32
                + unmixed[opposite(i) * classes + class] * (1.0 - kept) as f32;
        }
    }
}

impl Task for Classifier {
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        self.student.visit(f);
        self.norm.iter_mut().for_each(|n| n.visit(f));
        self.head.visit(f);
    }

    fn tower(&self) -> Option<(TowerShape, Reach)> {
        let shape = self.student.shape();
        // The mean of the tokens has a norm of its own.
        Some((shape, Reach { blocks: shape.arch.depth, norm: self.norm.is_none(), qkv: false }))
    }

    fn loss(&mut self, cx: &Context, tape: &mut Tape, batch: &MicroBatch) -> Result<Tensor> {
        let mut images = batch.images.clone();
        let targets = self.targets(&mut images, batch)?;
        let depth = self.student.shape().arch.depth;
        let scales = branch_scales(self.student.drop_path(), depth, self.seed, batch.epoch, &batch.indices);
        let logits = self.logits(cx, tape, &images, scales.as_ref())?;
        let targets = cx.tensor(targets, logits.rows(), logits.columns())?;
        Ok(ops::cross_entropy(cx, tape, &logits, &targets)?)
    }

    fn lr_scale(&self, parameter: &str) -> f64 {
        self.layer_scale(self.layer(parameter))
    }

    fn lr_groups(&self) -> Vec<(String, f64)> {
        let depth = self.student.shape().arch.depth;
        let name = |layer: usize| match layer {
            0 => "embedding".to_owned(),
            head if head > depth => "head".to_owned(),
            block => format!("blocks.{}", block - 1),
        };
        let layers = 0..if self.layer_decay == 1.0 { 0 } else { depth + 2 };
        layers.map(|layer| (name(layer), self.layer_scale(layer))).collect()
    }
}

impl Classifier {
    /// BEiT's rule: the embedding is layer 0, block i is layer i + 1, the rest depth + 1.
    fn layer(&self, parameter: &str) -> usize {
        let depth = self.student.shape().arch.depth;
        match parameter.strip_prefix("blocks.").and_then(|rest| rest.split('.').next()) {
            Some(block) => block.parse::<usize>().expect("blocks are numbered") + 1,
            None if ["cls_token", "pos_embed", "patch_embed."].iter().any(|p| parameter.starts_with(p)) => 0,
            None => depth + 1,
        }
    }

    /// What the learning rate of a layer's parameters is multiplied by.
    fn layer_scale(&self, layer: usize) -> f64 {
        self.layer_decay.powi((self.student.shape().arch.depth + 1 - layer) as i32)
    }
}

impl Classify for Classifier {
    fn classes(&self) -> usize {
        self.head.outputs()
    }

    fn scores(&self, cx: &Context, images: &ImageBatch) -> Result<Tensor> {
        self.logits(cx, &mut Tape::inference(), images, None)
    }
}

/// Fine-tuning whose options fit.
pub struct PlannedFinetune {
    summary: StageSummary,
    plan: Arc<FinetunePlan>,
}

/// What is trained, and on what.
struct FinetunePlan {
    supervised: PlannedSupervised,
    options: FinetuneOptions,
    seed: u64,
    scope: String,
}

impl Finetune {
    /// What runs.
    ///
    /// # Errors
    /// Every option that does not fit.
    pub fn plan_finetune(&self, cx: &StageContext) -> Result<PlannedFinetune, Vec<Refusal>> {
        let With { shared: kept, own: With { shared, own } } = &self.0;
        let mut refusals = Vec::new();
        let mut summary = StageSummary::default();
        if own.mixing.is_some() && shared.batch.micro() == 1 {
            refusals.push(Refusal::new("mixing", "images are mixed within a micro-batch, which holds one image"));
        }
        if own.mixing.is_some_and(|mixing| mixing.mixup == 0.0 && mixing.cutmix == 0.0) {
            refusals.push(
                Refusal::new("mixing", "`mixup` and `cutmix` are both 0: nothing is mixed")
                    .help("the paper's are `{ mixup: 0.8, cutmix: 1.0 }`; leave `mixing` out for none"),
            );
        }
        let labelled = Labelled { classes: own.classes, eval: own.eval.as_ref(), student: &own.student, kept: *kept };
        let planned = PlannedSupervised::plan(cx, shared, labelled, &mut summary, &mut refusals);
        let Some(supervised) = planned else { return Err(refusals) };
        let student = Arc::clone(&supervised.student);
        let shape = student.shape();
        keep(&mut refusals, own.pooling.check("the student", &shape));
        if !refusals.is_empty() {
            return Err(refusals);
        }
        let plan = FinetunePlan { supervised, options: own.clone(), seed: cx.seed, scope: cx.name.to_string() };
        plan.summarize(cx.recompute, &mut summary).map_err(|error| vec![error.into_refusal()])?;
        summary.student =
            Some(StudentPlan { reach: plan.reach(&shape), tower: student, init_scope: cx.name.to_string() });
        Ok(PlannedFinetune { summary, plan: Arc::new(plan) })
    }
}

impl PlannedFinetune {
    /// Data, optimizer and length.
    pub fn training(&self) -> &PlannedTraining {
        &self.plan.supervised.training
    }

    /// The model at its beginning.
    ///
    /// # Errors
    /// Weights that have gone or changed since they were planned; out of memory.
    pub fn model(&self, init: &Init, trained: &TrainedStudents) -> Result<Classifier> {
        self.plan.model(init, trained)
    }

    /// How its initial values are drawn.
    pub fn init(&self, cx: &Context) -> Init {
        self.plan.init(cx)
    }
}

impl FinetunePlan {
    /// Counts parameters and estimates memory.
    fn summarize(&self, recompute: Recompute, summary: &mut StageSummary) -> Result<()> {
        let mut model = self.model(&Init::shapes(), &TrainedStudents::default())?;
        (summary.parameters, summary.trainable) = count_parameters(&mut model);
        summary.saved = saved_parameters(&mut model);
        let (shape, micro) = (self.supervised.student.shape(), self.supervised.training.batch.micro());
        summary.tokens = Some((shape.tokens(), shape.tokens()));
        let step = TrainingStep {
            student: &shape,
            images: micro,
            pixels: 3 * self.supervised.training.data.size.pow(2),
            tokens: shape.tokens(),
            frozen: Vec::new(),
            copied: 0,
            compared: micro * self.supervised.classes.classes,
            aligned: 0,
            recompute,
        };
        summary.memory +=
            memory::training(summary, &step) + memory::average(summary, self.supervised.kept.ema.is_some());
        Ok(())
    }

    /// The mean of the tokens has a norm of its own.
    fn reach(&self, shape: &TowerShape) -> Reach {
        Reach { blocks: shape.arch.depth, norm: self.options.pooling == Pooling::Cls, qkv: false }
    }

    fn model(&self, init: &Init, trained: &TrainedStudents) -> Result<Classifier> {
        let mut student = self.supervised.student.build(init, trained).map_err(|e| under(e, "student"))?;
        let shape = student.shape();
        student.set_reach(self.reach(&shape));
        let init = &init.of_role(Role::Head);
        let weight = init.truncated_normal(
            "head.weight",
            &[self.supervised.classes.classes, shape.arch.dim],
            self.options.head_std,
        )?;
        let mean = self.options.pooling == Pooling::Mean;
        Ok(Classifier {
            norm: mean.then(|| Norm::new(init, "fc_norm", shape.arch.dim, 1e-6)).transpose()?,
            head: Linear::from_weight(init, "head", weight, Bias::With)?,
            student,
            seed: self.seed,
            layer_decay: self.options.layer_decay,
            label_smoothing: self.options.label_smoothing,
            mixing: self.options.mixing,
        })
    }

    fn init(&self, cx: &Context) -> Init {
        Init::new(cx.device(), self.seed, &*self.scope)
    }
}

impl PlannedClassifier for FinetunePlan {
    fn tower(&self) -> TowerShape {
        self.supervised.student.shape()
    }

    fn classes(&self) -> usize {
        self.supervised.classes.classes
    }

    fn data(&self) -> &PlannedData {
        &self.supervised.training.data
    }

    fn build(&self, cx: &Context, trained: &TrainedStudents, left: &TensorMap) -> Result<Box<dyn Classify>> {
        let mut model = self.model(&self.init(cx), trained)?;
        load_kept(&mut model, left)?;
        Ok(Box::new(model))
    }
}

impl Stage for Finetune {
    fn plan(&self, cx: &StageContext) -> Result<Box<dyn PlannedStage>, Vec<Refusal>> {
        Ok(Box::new(self.plan_finetune(cx)?))
    }
}

impl PlannedStage for PlannedFinetune {
    fn summary(&self) -> &StageSummary {
        &self.summary
    }

    fn classifier(&self) -> Option<Arc<dyn PlannedClassifier>> {
        Some(Arc::clone(&self.plan) as Arc<dyn PlannedClassifier>)
    }

    fn run(&self, mut run: StageRun) -> Result<Outcome> {
        let mut model = self.model(&self.init(run.cx), run.trained)?;
        self.plan.supervised.train(&mut run, &mut model)
    }
}

register!(stage "finetune" => Finetune, "trains a student and a linear head on labelled images",
    example: "{ type: finetune, epochs: 5, data: { dataset: { type: sample, split: train } },
      eval: { dataset: { type: sample, split: test } },
      student: { type: vit, arch: { dim: 96, depth: 4, heads: 3, patch: 4 } },
      optimizer: { type: adamw, base_lr: 1.0e-3 }, schedule: { type: cosine }, batch: { effective: 64 } }",
    paper: "MAE, arXiv 2111.06377, appendix A.1");

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::weights::read;

    /// What timm's `Mixup` makes of the same draws (`tests/fixtures/stages/make_training.py`).
    #[test]
    fn images_and_targets_are_mixed_as_timm_does() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/stages/training.safetensors");
        let recorded = read(&file).unwrap();
        let images = &recorded["mix.images"];
        let size = images.shape[3];
        let labels = recorded["mix.labels"].data.iter().map(|label| Some(*label as u32)).collect::<Vec<_>>();
        let cases = recorded.keys().filter_map(|name| name.strip_prefix("mix.")?.strip_suffix(".draw"));
        let mut seen = 0;
        for case in cases {
            let [pastes, kept, row, column] = recorded[&format!("mix.{case}.draw")].data[..] else { panic!("{case}") };
            let mut mixed = ImageBatch { pixels: images.data.clone(), batch: labels.len(), size };
            let batch = MicroBatch {
                images: mixed.clone(),
                crops: Vec::new(),
                labels: labels.clone(),
                indices: (0..labels.len()).collect(),
                epoch: 0,
                progress: 0.0,
            };
            let mut targets = class_targets(&batch, 5, 0.1).unwrap();
            let centre = (pastes == 1.0).then_some((row as usize, column as usize));
            mix(&mut mixed, &mut targets, f64::from(kept), centre);
            for (what, ours) in [("images", &mixed.pixels), ("targets", &targets)] {
                let theirs = &recorded[&format!("mix.{case}.{what}")].data;
                assert_eq!(ours.len(), theirs.len(), "{case}: {what}");
                for (ours, theirs) in ours.iter().zip(theirs) {
                    assert!(
                        (ours - theirs).abs() <= 1e-5 * theirs.abs() + 1e-7,
                        "{case}: {what} {ours}, timm {theirs}"
                    );
                }
            }
            seen += 1;
        }
        assert_eq!(seen, 6);
    }
}
