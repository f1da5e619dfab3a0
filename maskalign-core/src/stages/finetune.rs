//! Supervised training of a student: fine-tuning after a pre-training stage, or from random initialisation.

use maskalign_engine::{
    Context, ImageBatch, Role, Tape, Tensor,
    ops::{self, Act},
    random::Stream,
};
use maskalign_registry::{OptimizerTag, Refusal, ScheduleTag, Slot, StudentTag};
use rand_distr::{Beta, Distribution};

use super::{
    Data, OpenData, Outcome, Stage, StageContext, StagePlan, StageRun,
    data::image_batch,
    keep,
    knn::Pooling,
    memory::{self, TrainingStep},
    train::{BatchSize, Checkpoints, Length, Loop, MicroBatch, Precision, Task, Trainer, branch_scales, finish, train},
    under,
};
use crate::{
    component,
    components::{
        students::StudentModel,
        towers::{PlanContext, StudentRecord, TowerShape},
    },
    error::{Error, Result},
    nn::{Bias, Init, Linear, Norm, Param, Reach},
    plugin::Build,
    register,
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
pub struct Mixup {
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
#[component]
pub struct Finetune {
    /// Epochs to train for.
    #[schemars(extend("exclusiveMinimum" = 0), range(max = 1000000.0))]
    epochs: f64,
    /// The labelled images.
    data: Data,
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
    /// The rule that updates parameters.
    optimizer: Slot<OptimizerTag>,
    /// The learning rate over time.
    schedule: Slot<ScheduleTag>,
    /// Images of an update.
    batch: BatchSize,
    /// Numbers that are computed with; only f32 for now.
    #[serde(default)]
    precision: Precision,
    /// When checkpoints are written and which are kept.
    #[serde(default)]
    checkpoints: Checkpoints,
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
        scales: Option<&crate::nn::BranchScales>,
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
        let off = (self.label_smoothing / classes as f64) as f32;
        let on = (1.0 - self.label_smoothing) as f32 + off;
        let mut targets = vec![off; images.batch * classes];
        for (i, label) in batch.labels.iter().enumerate() {
            let label = label.map(|l| l as usize).filter(|&l| l < classes).ok_or_else(|| {
                Refusal::new("data", format!("image {} has no label below {classes}", batch.indices[i]))
            })?;
            targets[i * classes + label] = on;
        }
        let Some(mixing) = self.mixing else { return Ok(targets) };
        let mut rng = Stream::new(self.seed, "mixing", batch.epoch, batch.indices[0] as u64);
        let paste = mixing.cutmix > 0.0 && (mixing.mixup == 0.0 || rng.uniform() < mixing.switch);
        let alpha = if paste { mixing.cutmix } else { mixing.mixup };
        if alpha == 0.0 {
            return Ok(targets);
        }
        let beta = Beta::new(alpha, alpha).expect("positive coefficients");
        let mut kept: f64 = beta.sample(&mut rng);
        let (size, area) = (images.size, images.size * images.size);
        let original = images.pixels.clone();
        // Each image meets the one opposite in the batch, as in timm.
        let opposite = |i: usize| images.batch - 1 - i;
        if paste {
            let side = (size as f64 * (1.0 - kept).sqrt()) as usize;
            let (cy, cx) = (rng.below(size), rng.below(size));
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
        let unmixed = targets.clone();
        for i in 0..images.batch {
            for class in 0..classes {
                targets[i * classes + class] = unmixed[i * classes + class] * kept as f32
                    + unmixed[opposite(i) * classes + class] * (1.0 - kept) as f32;
            }
        }
        Ok(targets)
    }
}

impl Task for Classifier {
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        self.student.visit(f);
        self.norm.iter_mut().for_each(|n| n.visit(f));
        self.head.visit(f);
    }

    fn student(&mut self) -> &mut dyn StudentModel {
        &mut *self.student
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

    /// BEiT's rule: the embedding is layer 0, block i is layer i + 1, the rest depth + 1.
    fn lr_scale(&self, parameter: &str) -> f64 {
        let depth = self.student.shape().arch.depth;
        let layer = match parameter.strip_prefix("blocks.").and_then(|rest| rest.split('.').next()) {
            Some(block) => block.parse::<usize>().expect("blocks are numbered") + 1,
            None if ["cls_token", "pos_embed", "patch_embed."].iter().any(|p| parameter.starts_with(p)) => 0,
            None => depth + 1,
        };
        self.layer_decay.powi((depth + 1 - layer) as i32)
    }
}

impl Finetune {
    /// The student that the stage leaves, without weights.
    fn record(&self, stage: &str, shape: TowerShape) -> StudentRecord {
        let reach = self.reach(&shape);
        StudentRecord { slot: self.student.clone(), shape, reach, weights: None, init_scope: stage.to_string() }
    }

    /// The mean of the tokens has a norm of its own.
    fn reach(&self, shape: &TowerShape) -> Reach {
        Reach { blocks: shape.arch.depth, norm: self.pooling == Pooling::Cls }
    }

    fn length(&self, images: usize) -> Length {
        Length::new(self.epochs, images, self.batch.effective)
    }

    /// The number of classes, which the labels must stay below.
    fn classes_of(&self, data: &OpenData) -> Result<usize, Refusal> {
        data.check_labels("supervised training").map_err(|r| r.under("data"))?;
        let most = largest_label(data);
        let named = data.images.classes().map(|c| c.len());
        let classes = self.classes.or(named).unwrap_or(most + 1).max(2);
        if most >= classes {
            return Err(Refusal::new("classes", format!("{classes} classes, but the data has the label {most}")));
        }
        Ok(classes)
    }

    /// Refuses data that no accuracy could be measured on.
    fn check_eval(eval: &OpenData, data: &OpenData, classes: usize) -> Result<(), Refusal> {
        if eval.size != data.size {
            let message = format!("images of {} pixels, those of `data` have {}", eval.size, data.size);
            return Err(Refusal::new("transforms", message));
        }
        eval.check_labels("an accuracy")?;
        eval.check_classes(data, "data")?;
        match largest_label(eval) {
            most if most < classes => Ok(()),
            most => Err(Refusal::new("dataset", format!("the label {most}, but the student learns {classes} classes"))),
        }
    }

    fn build(&self, towers: &PlanContext, init: &Init, seed: u64, classes: usize) -> Result<Classifier> {
        let mut student = Build::build(&self.student)
            .map_err(|r| r.under("student"))?
            .build(towers, init)
            .map_err(|e| under(e, "student"))?;
        let shape = student.shape();
        let mean = self.pooling == Pooling::Mean;
        student.set_reach(self.reach(&shape));
        let init = &init.of_role(Role::Head);
        let weight = init.truncated_normal("head.weight", &[classes, shape.arch.dim], self.head_std)?;
        Ok(Classifier {
            norm: mean.then(|| Norm::new(init, "fc_norm", shape.arch.dim, 1e-6)).transpose()?,
            head: Linear::from_weight(init, "head", weight, Bias::With)?,
            student,
            seed,
            layer_decay: self.layer_decay,
            label_smoothing: self.label_smoothing,
            mixing: self.mixing,
        })
    }

    /// The model and the trainer of this stage, for timings.
    ///
    /// # Errors
    /// What planning and loading answer.
    pub fn prepare(
        &self,
        cx: &Context,
        stage: &StageContext,
        data_size: usize,
        images: usize,
        classes: usize,
    ) -> Result<(Classifier, Trainer)> {
        let init = Init::new(cx.device(), stage.seed, stage.name);
        let model = self.build(&stage.towers(data_size), &init, stage.seed, classes)?;
        Ok((model, Trainer::new(&self.optimizer, &self.schedule, self.batch.effective, self.length(images))?))
    }
}

impl Stage for Finetune {
    fn plan(&self, cx: &StageContext) -> Result<StagePlan, Vec<Refusal>> {
        let mut refusals = Vec::new();
        keep(&mut refusals, self.batch.check());
        keep(&mut refusals, self.checkpoints.check());
        if self.mixing.is_some() && self.batch.micro() == 1 {
            refusals.push(Refusal::new("mixing", "images are mixed within a micro-batch, which holds one image"));
        }
        let mut plan = StagePlan { epochs: Some(self.epochs), ..StagePlan::default() };
        let size = keep(&mut refusals, self.data.size(cx.environment).map_err(|r| r.under("data")));
        let mut classes = self.classes.unwrap_or(1000);
        let mut open = |data: &Data, name: &str, refusals: &mut Vec<Refusal>| {
            let open = keep(
                refusals,
                data.may_open(cx.environment).then(|| data.open()).transpose().map_err(|r| r.under(name)),
            );
            open.flatten().inspect(|open| {
                plan.data.push(open.record(format!("{}.{name}", cx.name)));
                plan.memory += open.images.resident_bytes();
            })
        };
        if size.is_some() {
            let data = open(&self.data, "data", &mut refusals);
            let eval = self.eval.as_ref().and_then(|eval| open(eval, "eval", &mut refusals));
            if let Some(data) = &data {
                plan.images = Some(data.images.len());
                plan.steps = Some(self.length(data.images.len()).steps());
                keep(&mut refusals, data.training(cx.seed, self.batch.effective, self.batch.micro(), 0).map(drop));
                classes = keep(&mut refusals, self.classes_of(data)).unwrap_or(classes);
            }
            if let Some((eval, data)) = eval.zip(data) {
                keep(&mut refusals, Self::check_eval(&eval, &data, classes).map_err(|r| r.under("eval")));
            }
        }
        let length = self.length(plan.images.unwrap_or(self.batch.effective));
        keep(&mut refusals, Trainer::new(&self.optimizer, &self.schedule, self.batch.effective, length).map(drop));
        let Some(size) = size else { return Err(refusals) };
        let towers = cx.towers(size);
        let shape = Build::build(&self.student).and_then(|s| s.plan(&towers)).map_err(|r| r.under("student"));
        let Some(shape) = keep(&mut refusals, shape) else { return Err(refusals) };
        if self.pooling == Pooling::Cls && !shape.cls_token {
            refusals.push(Refusal::new("pooling", "`cls` needs a student with a class token"));
        }
        if !refusals.is_empty() {
            return Err(refusals);
        }
        match self.build(&towers, &Init::shapes(), cx.seed, classes) {
            Ok(mut model) => model.visit(&mut |p| {
                plan.parameters += p.len();
                plan.trainable += if p.is_trained() { p.len() } else { 0 };
            }),
            Err(error) => return Err(vec![Refusal::whole(error.to_string())]),
        }
        plan.tokens = Some((shape.tokens(), shape.tokens()));
        let step = TrainingStep {
            student: &shape,
            images: self.batch.micro(),
            image_size: size,
            tokens: shape.tokens(),
            frozen: Vec::new(),
            compared: self.batch.micro() * classes,
            aligned: 0,
            recompute: cx.recompute,
        };
        plan.memory += memory::training(&plan, &step);
        plan.student = Some(self.record(cx.name, shape));
        Ok(plan)
    }

    fn run(&self, mut run: StageRun) -> Result<Outcome> {
        let stage = run.stage;
        let data = self.data.open().map_err(|r| r.under("data"))?;
        let length = self.length(data.images.len());
        let towers = stage.towers(data.size);
        let init = Init::new(run.cx.device(), stage.seed, stage.name);
        let mut model = self.build(&towers, &init, stage.seed, self.classes_of(&data)?)?;
        let mut trainer = Trainer::new(&self.optimizer, &self.schedule, self.batch.effective, length)?;
        let plan = Loop {
            data: &data,
            batch: self.batch,
            length,
            checkpoints: &self.checkpoints,
            after_epoch: &mut |_, _: &mut Classifier, _| Ok(None),
        };
        let mut trained = train(&mut run, &mut model, &mut trainer, plan)?;
        if let Some(eval) = &self.eval {
            let eval = eval.open().map_err(|r| r.under("eval"))?;
            let (accuracy, skipped) = accuracy(&mut run, &model, &eval, self.batch.micro())?;
            trained.results["accuracy"] = accuracy.into();
            if skipped > 0 {
                trained.results["eval_skipped"] = skipped.into();
            }
        }
        let weights = finish(&run, &mut model, trainer, &trained)?;
        let record = StudentRecord { weights: Some(weights), ..self.record(stage.name, model.student.shape()) };
        Ok(Outcome { results: trained.results, student: Some(record), metric_records: trained.metric_records })
    }
}

/// The largest label; 0 without any.
fn largest_label(data: &OpenData) -> usize {
    (0..data.images.len()).filter_map(|i| data.images.label(i)).max().unwrap_or(0) as usize
}

/// Share of the images whose class the model finds, and how many could not be read.
fn accuracy(run: &mut StageRun, model: &Classifier, data: &OpenData, batch: usize) -> Result<(f64, usize)> {
    let (mut right, mut seen) = (0usize, 0usize);
    let classes = model.head.outputs();
    for batch in data.pass(batch, run.workers)?.batches(Default::default(), None) {
        let mut batch = batch?;
        let images = image_batch(&mut batch);
        let logits = model.logits(&run.cx, &mut Tape::inference(), &images, None)?.to_vec();
        for (row, label) in logits.chunks_exact(classes).zip(&batch.labels) {
            let best = (0..classes).max_by(|&a, &b| row[a].total_cmp(&row[b]).then(b.cmp(&a)));
            right += usize::from(best.map(|b| b as u32) == *label && label.is_some());
        }
        if let Some(stop) = run.stop.get() {
            return Err(super::train::stopped(run, stop));
        }
        seen += batch.indices.len();
        run.progress.count("evaluation", seen as u64, data.images.len() as u64);
    }
    if seen == 0 {
        return Err(Error::Usage(format!("none of the {} images of `eval` can be read", data.images.len())));
    }
    Ok((right as f64 / seen as f64, data.images.len() - seen))
}

register!(stage "finetune" => Finetune, "trains a student and a linear head on labelled images",
    example: r#"{ type: finetune, epochs: 5, data: { dataset: { type: sample, split: train } },
      eval: { dataset: { type: sample, split: test } },
      student: { type: vit, arch: { dim: 96, depth: 4, heads: 3, patch: 4 } },
      optimizer: { type: adamw, base_lr: 1.0e-3 }, schedule: { type: cosine }, batch: { effective: 64 } }"#,
    paper: "MAE, arXiv 2111.06377, appendix A.1");
