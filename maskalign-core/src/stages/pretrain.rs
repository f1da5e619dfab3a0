//! Pre-training: a student's features of the visible patches against targets of the intact image.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use dfdx::prelude::Cpu;
use indexmap::IndexMap;
use maskalign_registry::{
    AlignerTag, LevelRef, LossTag, MaskerTag, OptimizerTag, Refusal, Scalar as Ramp, ScheduleTag, Slot, StudentTag,
    TargetTag, TeacherTag,
};
use serde_json::json;

use super::{
    Data, Outcome, StageContext, StagePlan, StagePlugin, StageRun,
    knn::PeriodicKnn,
    memory::{self, TrainingStep},
    train::{BatchSize, Checkpoints, Length, Loop, MicroBatch, Precision, Task, Trainer, branch_scales, finish, train},
};
use crate::{
    bench::ForwardTimes,
    component,
    components::{
        aligners::{AlignInput, AlignNeeds, AlignPlan, Aligner},
        losses::Loss,
        maskers::{Counts, MaskInput, Masker},
        students::Student,
        targets::{Target, TargetContext, TargetInput, TargetPlan},
        teachers::{Teacher, Wants},
        tokens::{Masks, TokenKind, Tokens},
        towers::{PlanContext, StudentRecord, Tap, TowerShape},
    },
    context::Context,
    device::{Dev, Matrix, Scalar},
    error::Result,
    images::ImageBatch,
    nn::{Features, Grid, Init, Param},
    plugin::Build,
    random::Stream,
    register,
    tape::Recorder,
};

/// The weights of an objective's levels.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum LevelWeights {
    /// All equal, summing to 1.
    #[default]
    Uniform,
    /// i / sum of i, from 0: the first takes no part (the official `linear_decay`).
    Linear,
    /// As given.
    List(Vec<f64>),
}

impl LevelWeights {
    fn resolve(&self, levels: usize) -> Result<Vec<f64>, Refusal> {
        match self {
            LevelWeights::Uniform => Ok(vec![1.0 / levels as f64; levels]),
            LevelWeights::Linear if levels == 1 => {
                Err(Refusal::new("level_weights", "`linear` gives the only level the weight 0"))
            }
            LevelWeights::Linear => {
                let sum = (levels * (levels - 1) / 2) as f64;
                Ok((0..levels).map(|i| i as f64 / sum).collect())
            }
            LevelWeights::List(list) if list.len() != levels => {
                Err(Refusal::new("level_weights", format!("{} weights for {levels} levels", list.len())))
            }
            LevelWeights::List(list) if list.iter().all(|&w| w == 0.0) => {
                Err(Refusal::new("level_weights", "every level has the weight 0"))
            }
            LevelWeights::List(list) => Ok(list.clone()),
        }
    }
}

impl serde::Serialize for LevelWeights {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            LevelWeights::Uniform => s.serialize_str("uniform"),
            LevelWeights::Linear => s.serialize_str("linear"),
            LevelWeights::List(list) => list.serialize(s),
        }
    }
}

impl<'de> serde::Deserialize<'de> for LevelWeights {
    fn deserialize<De: serde::Deserializer<'de>>(d: De) -> Result<Self, De::Error> {
        use serde::de::Error;
        match serde_json::Value::deserialize(d)? {
            serde_json::Value::String(name) if name == "uniform" => Ok(LevelWeights::Uniform),
            serde_json::Value::String(name) if name == "linear" => Ok(LevelWeights::Linear),
            list => serde_json::from_value(list).map(LevelWeights::List).map_err(De::Error::custom),
        }
    }
}

impl schemars::JsonSchema for LevelWeights {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "LevelWeights".into()
    }
    fn inline_schema() -> bool {
        true
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "x-expected": "`uniform`, `linear`, or a list of numbers",
            "anyOf": [
                { "type": "string", "enum": ["uniform", "linear"] },
                { "type": "array", "items": { "type": "number", "minimum": 0 }, "minItems": 1 },
            ],
        })
    }
}

fn unit_weight() -> Ramp {
    Ramp::Constant(1.0)
}

/// One term of the loss.
#[component]
pub struct Objective {
    /// What the student is to match.
    target: Slot<TargetTag>,
    /// The tokens that are compared.
    #[schemars(length(min = 1))]
    tokens: Vec<TokenKind>,
    /// The map from the student's outputs to the target's shape.
    aligner: Slot<AlignerTag>,
    /// The distance between the two.
    loss: Slot<LossTag>,
    /// Weights of the target's levels: `uniform`, `linear`, or a list. A level of weight 0 takes no part: no gradient,
    /// no update, no decay of its head.
    #[serde(default)]
    level_weights: LevelWeights,
    /// Weight of the objective.
    #[serde(default = "unit_weight")]
    weight: Ramp,
}

/// Trains a student on the visible patches against targets that frozen teachers, or the pixels, give for the intact
/// image (MaskAlign, arXiv 2211.08887).
#[component]
pub struct Pretrain {
    /// Epochs to train for.
    #[schemars(extend("exclusiveMinimum" = 0))]
    epochs: f64,
    /// The images.
    data: Data,
    /// The tower that is trained.
    student: Slot<StudentTag>,
    /// Frozen towers, by name.
    #[serde(default)]
    teachers: IndexMap<String, Slot<TeacherTag>>,
    /// Chooses the patches that the student sees; absent: all of them.
    #[serde(default)]
    masker: Option<Slot<MaskerTag>>,
    /// The terms of the loss, by name.
    #[schemars(extend("minProperties" = 1))]
    objectives: IndexMap<String, Objective>,
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
    /// Measures the student by k-NN every few epochs.
    #[serde(default)]
    knn: Option<PeriodicKnn>,
}

/// Everything about a pre-training stage that follows from the recipe.
struct Shape {
    student: TowerShape,
    teachers: BTreeMap<String, TowerShape>,
    counts: Counts,
    objectives: Vec<ObjectiveShape>,
}

struct ObjectiveShape {
    name: String,
    tokens: Tokens,
    target: TargetPlan,
    align: AlignPlan,
    needs: AlignNeeds,
    level_weights: Vec<f32>,
}

impl Pretrain {
    /// Collects every refusal, not the first.
    fn shape(&self, towers: &PlanContext) -> Result<Shape, Vec<Refusal>> {
        let mut refusals = Vec::new();
        let student = keep(
            &mut refusals,
            Build::build::<Cpu>(&self.student).and_then(|s| s.plan(towers)).map_err(|r| r.under("student")),
        );
        let mut teachers = BTreeMap::new();
        for (name, slot) in &self.teachers {
            let planned = Build::build::<Cpu>(slot).and_then(|t| t.plan(towers));
            if let Some(shape) = keep(&mut refusals, planned.map_err(|r| r.under(name).under("teachers"))) {
                teachers.insert(name.clone(), shape);
            }
        }
        let Some(student) = student else { return Err(refusals) };
        let patches = student.grid.patches();
        let mut counts = Counts { visible: patches, masked: 0 };
        if let Some(slot) = &self.masker {
            let planned = Build::build::<Cpu>(slot).and_then(|masker| {
                self.check_masker(&*masker, student, &teachers)?;
                masker.plan(student.grid)
            });
            match keep(&mut refusals, planned.map_err(|r| r.under("masker"))) {
                Some(planned) => counts = planned,
                None => return Err(refusals),
            }
        }
        if self.objectives.is_empty() {
            refusals.push(Refusal::new("objectives", "expected at least one"));
        }
        // A teacher that was refused would be reported as unknown as well.
        let teachers_known = teachers.len() == self.teachers.len();
        let mut objectives = Vec::new();
        for (name, objective) in &self.objectives {
            if !teachers_known
                && objective
                    .target
                    .options
                    .get("teacher")
                    .and_then(|t| t.as_str())
                    .is_some_and(|t| self.teachers.contains_key(t) && !teachers.contains_key(t))
            {
                continue;
            }
            let shaped = objective.shape(name, student, &teachers, counts);
            if let Some(shape) = keep(&mut refusals, shaped.map_err(|r| r.under(name).under("objectives"))) {
                objectives.push(shape);
            }
        }
        match refusals.is_empty() {
            true => Ok(Shape { student, teachers, counts, objectives }),
            false => Err(refusals),
        }
    }

    fn check_masker(
        &self,
        masker: &dyn Masker,
        student: TowerShape,
        teachers: &BTreeMap<String, TowerShape>,
    ) -> Result<(), Refusal> {
        let Some(name) = masker.teacher() else { return Ok(()) };
        let Some(teacher) = teachers.get(name) else {
            if self.teachers.contains_key(name) {
                return Ok(());
            }
            let known: Vec<&str> = self.teachers.keys().map(String::as_str).collect();
            return Err(Refusal::new("teacher", format!("no teacher is named `{name}`")).help(
                match known.is_empty() {
                    true => "the stage has no `teachers`".to_string(),
                    false => format!("known teachers: {}", known.join(", ")),
                },
            ));
        };
        if teacher.grid != student.grid {
            return Err(Refusal::new(
                "teacher",
                format!("`{name}` has {} patches, the student {}", teacher.grid, student.grid),
            )
            .help("set `image_size` of one of the towers so that the grids are equal"));
        }
        if !teacher.cls_token {
            return Err(Refusal::new("teacher", format!("`{name}` has no class token whose attention could be used")));
        }
        Ok(())
    }

    fn length(&self, images: usize) -> Length {
        Length { epochs: self.epochs, steps_per_epoch: (images / self.batch.effective).max(1) as u64 }
    }
}

/// Keeps the value, or notes the refusal.
pub(super) fn keep<T>(refusals: &mut Vec<Refusal>, result: Result<T, Refusal>) -> Option<T> {
    result.map_err(|refusal| refusals.push(refusal)).ok()
}

impl Objective {
    fn shape(
        &self,
        name: &str,
        student: TowerShape,
        teachers: &BTreeMap<String, TowerShape>,
        counts: Counts,
    ) -> Result<ObjectiveShape, Refusal> {
        let tokens = Tokens::from_list(&self.tokens)?;
        if tokens.masked && counts.masked == 0 {
            return Err(Refusal::new("tokens", "`masked` names no patch: nothing is masked")
                .help("give the stage a `masker`, or raise its ratio"));
        }
        let target = Build::build::<Cpu>(&self.target).map_err(|r| r.under("target"))?;
        let mut target = target.plan(&TargetContext { student, teachers, tokens }).map_err(|r| r.under("target"))?;
        let weights = self.level_weights.resolve(target.outputs)?;
        let wanted: Vec<usize> = (0..target.outputs).filter(|&i| weights[i] > 0.0).collect();
        let align = AlignPlan {
            student,
            counts,
            tokens,
            target_depth: target.depth,
            target_levels: target.levels.clone(),
            outputs: target.outputs,
            wanted: wanted.clone(),
            width: target.width,
        };
        let aligner = Build::build::<Cpu>(&self.aligner).map_err(|r| r.under("aligner"))?;
        let needs = aligner.plan(&align).map_err(|r| r.under("aligner"))?;
        Build::build::<Cpu>(&self.loss).map_err(|r| r.under("loss"))?;
        if target.outputs == target.levels.len() {
            // A level of weight 0 is neither computed nor compared.
            target.levels = wanted.iter().map(|&i| target.levels[i]).collect();
            target.outputs = target.levels.len();
        }
        let level_weights = wanted.iter().map(|&i| weights[i] as f32).collect();
        Ok(ObjectiveShape { name: name.to_string(), tokens, target, align, needs, level_weights })
    }
}

/// The models of a pre-training stage, and its loss.
pub struct PretrainModel<D: Dev> {
    /// The tower that is trained.
    pub student: Box<dyn Student<D>>,
    teachers: BTreeMap<String, (Box<dyn Teacher<D>>, Wants)>,
    masker: Option<Box<dyn Masker>>,
    counts: Counts,
    objectives: Vec<BuiltObjective<D>>,
    seed: u64,
    grid: Grid,
    kept: BTreeSet<usize>,
    times: ForwardTimes,
    /// Masks to use in place of the masker's, one micro-batch each, first to last (replayed steps).
    pub given_masks: std::collections::VecDeque<Masks>,
}

struct BuiltObjective<D: Dev> {
    shape: ObjectiveShape,
    target: Box<dyn Target<D>>,
    aligner: Box<dyn Aligner<D>>,
    loss: Box<dyn Loss<D>>,
    weight: Ramp,
}

/// What a replay compares besides losses and gradients.
pub struct Inspection {
    /// Attention of the teacher's class token, `[batch, patches]`.
    pub attention: Vec<f32>,
    /// The teacher's hidden states, every token, by block: `[batch * tokens, channels]`.
    pub teacher_hidden: BTreeMap<usize, Vec<f32>>,
    /// The student's hidden states of the visible tokens, by block.
    pub student_hidden: BTreeMap<usize, Vec<f32>>,
}

impl<D: Dev> PretrainModel<D> {
    fn build(
        stage: &Pretrain,
        cx: &StageContext,
        shape: Shape,
        context: &Context<D>,
        towers: &PlanContext,
        init: &Init<D>,
    ) -> Result<Self> {
        let mut wants: BTreeMap<&str, Wants> = BTreeMap::new();
        for objective in &shape.objectives {
            if let Some(teacher) = &objective.target.teacher {
                let wants = wants.entry(teacher).or_default();
                wants.levels.extend(&objective.target.levels);
                wants.whole |= objective.target.whole;
                wants.tokens = wants.tokens.union(objective.tokens);
            }
        }
        let masker = stage.masker.as_ref().map(|slot| Build::build::<D>(slot)).transpose()?;
        if let Some(teacher) = masker.as_ref().and_then(|m| m.teacher()) {
            let (name, _) = shape.teachers.get_key_value(teacher).expect("planned");
            wants.entry(name).or_default().attention = true;
        }
        let mut teachers = BTreeMap::new();
        // A teacher that nobody asks is not even loaded.
        for (name, wants) in wants {
            let slot = &stage.teachers[name];
            let teacher = if init.draws() {
                let built = Build::build::<D>(slot).and_then(|t| {
                    t.build(towers, context).map_err(|e| match e {
                        crate::error::Error::Refused(refusal) => refusal,
                        other => Refusal::whole(other.to_string()),
                    })
                });
                built.map_err(|r| r.under(name).under("teachers"))?
            } else {
                continue;
            };
            if teacher.shape().projection.is_none()
                && shape
                    .objectives
                    .iter()
                    .any(|o| o.target.teacher.as_deref() == Some(name) && o.target.tap == Tap::Projection)
            {
                return Err(Refusal::new("weights", "hold no projection, which a target's `tap` asks for")
                    .under(name)
                    .under("teachers")
                    .into());
            }
            teachers.insert(name.to_string(), (teacher, wants));
        }
        let mut student = Build::build::<D>(&stage.student)?.build(towers, init).map_err(|e| under(e, "student"))?;

        let several = shape.objectives.len() > 1;
        let mut objectives = Vec::new();
        let (mut reach, mut norm, mut kept) = (0, false, BTreeSet::new());
        for objective in shape.objectives {
            let recipe = &stage.objectives[&objective.name];
            let mut aligner = Build::build::<D>(&recipe.aligner)?.build(&objective.align, init)?;
            if several {
                aligner.visit(&mut |p| p.name = format!("{}.{}", objective.name, p.name));
            }
            for level in &objective.needs.levels {
                if let LevelRef::Block(i) = level {
                    kept.insert(*i);
                    reach = reach.max(i + 1);
                }
            }
            norm |= objective.needs.tap == Tap::Norm;
            objectives.push(BuiltObjective {
                target: Build::build::<D>(&recipe.target)?,
                aligner,
                loss: Build::build::<D>(&recipe.loss)?,
                weight: recipe.weight,
                shape: objective,
            });
        }
        student.set_reach(reach, norm);
        Ok(PretrainModel {
            grid: shape.student.grid,
            student,
            teachers,
            masker,
            counts: shape.counts,
            objectives,
            seed: cx.seed,
            kept,
            times: ForwardTimes::default(),
            given_masks: Default::default(),
        })
    }

    fn draw(&mut self, batch: &MicroBatch, attention: Option<&[f32]>) -> Masks {
        if let Some(masks) = self.given_masks.pop_front() {
            return masks;
        }
        let images = batch.images.batch;
        let Some(masker) = &self.masker else {
            return Masks::all_visible(images, self.grid.patches());
        };
        let patches = self.grid.patches();
        let masks: Vec<_> = batch
            .indices
            .iter()
            .enumerate()
            .map(|(i, &index)| {
                let input = MaskInput { grid: self.grid, attention: attention.map(|a| &a[i * patches..][..patches]) };
                masker.draw(&input, &mut Stream::new(self.seed, "mask", batch.epoch, index as u64))
            })
            .collect();
        Masks::join(&masks)
    }

    fn see(
        &self,
        cx: &Context<D>,
        r: &mut Recorder<D>,
        images: &ImageBatch,
        masks: &Masks,
        scales: Option<&crate::nn::BranchScales>,
    ) -> Result<Features<D>> {
        // Every patch in order needs no gathering; a masker that keeps all of them still chooses the order.
        let visible = (self.masker.is_some() || !self.given_masks.is_empty()).then_some(masks.visible.as_slice());
        self.student.forward(cx, r, images, visible, scales, &|i| self.kept.contains(&i))
    }

    /// Visible patches of an image.
    pub fn visible(&self) -> usize {
        self.counts.visible
    }

    /// The teachers that run.
    pub fn teacher_shapes(&self) -> Vec<TowerShape> {
        self.teachers.values().map(|(teacher, _)| teacher.shape()).collect()
    }

    /// Multiplications and additions of the alignments' linear outputs for one image of so many tokens.
    pub fn heads_flop(&self, tokens: usize) -> f64 {
        let dim = self.student.shape().arch.dim as f64;
        let outputs = |o: &BuiltObjective<D>| (o.shape.align.width * o.shape.align.wanted.len()) as f64;
        self.objectives.iter().map(|o| 2.0 * tokens as f64 * dim * outputs(o)).sum()
    }

    /// Attention and hidden states for the given masks, for comparison with another implementation's.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn inspect(&mut self, cx: &Context<D>, images: &ImageBatch, masks: &Masks) -> Result<Inspection> {
        let mut inspection =
            Inspection { attention: Vec::new(), teacher_hidden: BTreeMap::new(), student_hidden: BTreeMap::new() };
        for (teacher, _) in self.teachers.values() {
            let wants = Wants {
                levels: (0..teacher.shape().arch.depth).collect(),
                attention: true,
                whole: true,
                ..Wants::default()
            };
            let mut pass = teacher.begin(cx, images, &wants)?;
            inspection.attention = std::mem::take(&mut pass.attention);
            let levels = teacher.finish(cx, pass, &wants, masks)?;
            inspection.teacher_hidden = levels.into_iter().map(|(i, level)| (i, level.x.as_vec())).collect();
        }
        let visible = Some(masks.visible.as_slice());
        let features = self.student.forward(cx, &mut Recorder::inference(), images, visible, None, &|_| true)?;
        inspection.student_hidden = features.hidden.iter().map(|(i, x)| (*i, x.as_vec())).collect();
        Ok(inspection)
    }
}

/// Prefixes the path of a refusal.
pub(super) fn under(error: crate::error::Error, segment: &str) -> crate::error::Error {
    match error {
        crate::error::Error::Refused(refusal) => refusal.under(segment).into(),
        other => other,
    }
}

impl<D: Dev> Task<D> for PretrainModel<D> {
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param<D>)) {
        self.student.visit(f);
        self.objectives.iter_mut().for_each(|o| o.aligner.visit(f));
    }

    fn take_times(&mut self) -> ForwardTimes {
        std::mem::take(&mut self.times)
    }

    fn loss(&mut self, cx: &Context<D>, r: &mut Recorder<D>, batch: &MicroBatch) -> Result<Scalar<D>> {
        let images = &batch.images;
        let started = Instant::now();
        let mut passes = BTreeMap::new();
        {
            let _span = tracing::info_span!("teacher").entered();
            for (name, (teacher, wants)) in &self.teachers {
                passes.insert(name.clone(), teacher.begin(cx, images, wants)?);
            }
        }
        let attended = started.elapsed().as_secs_f64();
        let masks = {
            let _span = tracing::info_span!("mask").entered();
            let attention = self
                .masker
                .as_ref()
                .and_then(|m| m.teacher())
                .map(|name| std::mem::take(&mut passes.get_mut(name).expect("planned").attention));
            self.draw(batch, attention.as_deref())
        };
        let drawn = started.elapsed().as_secs_f64();
        let targets: Vec<Vec<Matrix<D>>> = {
            let _span = tracing::info_span!("teacher").entered();
            let mut levels = BTreeMap::new();
            for (name, pass) in passes {
                let (teacher, wants) = &self.teachers[&name];
                levels.insert(name, teacher.finish(cx, pass, wants, &masks)?);
            }
            let student = self.student.shape();
            self.objectives
                .iter()
                .map(|o| {
                    let teacher = o.shape.target.teacher.as_ref().map(|name| (&levels[name], &*self.teachers[name].0));
                    let input = TargetInput { images, masks: &masks, tokens: o.shape.tokens, student, teacher };
                    o.target.outputs(cx, &o.shape.target, &input)
                })
                .collect::<Result<_>>()?
        };
        self.times.mask += drawn - attended;
        self.times.teacher += started.elapsed().as_secs_f64() - (drawn - attended);
        let _span = tracing::info_span!("student").entered();
        let shape = self.student.shape();
        let scales = branch_scales(self.student.drop_path(), shape.arch.depth, self.seed, batch.epoch, &batch.indices);
        let features = self.see(cx, r, images, &masks, scales.as_ref())?;
        let held = Tokens { cls: shape.cls_token, visible: true, masked: false };
        let mut terms = Vec::new();
        let mut weights = Vec::new();
        let mut normed: BTreeMap<LevelRef, Matrix<D>> = BTreeMap::new();
        for (o, targets) in self.objectives.iter().zip(targets) {
            let weight = o.weight.at(batch.progress) as f32;
            let mut levels = Vec::with_capacity(o.shape.needs.levels.len());
            for level in &o.shape.needs.levels {
                let x = match level {
                    LevelRef::Embed => &features.embed,
                    LevelRef::Block(i) => &features.hidden[i],
                };
                levels.push(match o.shape.needs.tap {
                    Tap::Norm => {
                        if !normed.contains_key(level) {
                            normed.insert(*level, self.student.norm(cx, r, x)?);
                        }
                        normed[level].clone()
                    }
                    _ => x.clone(),
                });
            }
            let input = AlignInput { levels: &levels, held, masks: &masks, tokens: o.shape.tokens };
            let predictions = o.aligner.forward(cx, r, &input)?;
            for ((prediction, target), level_weight) in predictions.iter().zip(&targets).zip(&o.shape.level_weights) {
                terms.push(o.loss.term(cx, r, prediction, target)?);
                weights.push(weight * level_weight);
            }
        }
        debug_assert_eq!(self.counts.visible, masks.visible_each());
        cx.kernels.weighted_sum(r, &terms, &weights)
    }
}

impl StagePlugin for Pretrain {
    fn plan(&self, cx: &StageContext) -> Result<StagePlan, Vec<Refusal>> {
        let mut refusals = Vec::new();
        keep(&mut refusals, self.batch.check());
        let size = keep(&mut refusals, self.data.size(cx.environment).map_err(|r| r.under("data")));
        let mut plan = StagePlan { epochs: Some(self.epochs), ..StagePlan::default() };
        if self.data.may_open(cx.environment)
            && let Some(data) = size.and_then(|_| keep(&mut refusals, self.data.open().map_err(|r| r.under("data"))))
        {
            plan.images = Some(data.images.len());
            plan.memory += data.images.resident_bytes();
            plan.data.push((cx.name.to_string(), data.images.len(), data.images.fingerprint()));
            if let Err(refusal) = data.training(cx.seed, self.batch.effective, self.batch.micro(), 0) {
                if refusals.is_empty() {
                    refusals.push(refusal);
                }
            } else {
                plan.steps = Some(self.length(data.images.len()).steps());
            }
        }
        let length = self.length(plan.images.unwrap_or(self.batch.effective));
        let trainer = Trainer::<Cpu>::new(&self.optimizer, &self.schedule, self.batch.effective, length);
        keep(&mut refusals, trainer.map(drop));
        let Some(size) = size else { return Err(refusals) };
        let towers = cx.towers(size);
        let shape = match self.shape(&towers) {
            Ok(shape) => shape,
            Err(more) => {
                refusals.extend(more);
                return Err(refusals);
            }
        };
        if let Some(knn) = &self.knn {
            keep(&mut refusals, knn.check(cx.environment).map_err(|r| r.under("knn")));
        }
        if !refusals.is_empty() {
            return Err(refusals);
        }
        let micro = self.batch.micro();
        let levels = |teacher: &str| {
            let of = |o: &&ObjectiveShape| o.target.teacher.as_deref() == Some(teacher);
            shape.objectives.iter().filter(of).map(|o| o.level_weights.len()).sum()
        };
        let frozen: Vec<(TowerShape, usize)> = shape.teachers.iter().map(|(name, t)| (*t, levels(name))).collect();
        let (student, counts) = (shape.student, shape.counts);
        let visible = counts.visible + usize::from(student.cls_token);
        plan.tokens = Some((visible, student.tokens()));
        plan.student = Some(StudentRecord {
            slot: self.student.clone(),
            shape: student,
            weights: None,
            init_scope: cx.name.to_string(),
        });
        let dev = Cpu::default();
        let compared: usize = shape
            .objectives
            .iter()
            .map(|o| micro * o.tokens.count(counts.visible, counts.masked) * o.align.width * o.level_weights.len())
            .sum();
        let kept = |o: &ObjectiveShape| {
            let aligner = Build::build::<Cpu>(&self.objectives[&o.name].aligner);
            aligner.map_or(0, |aligner| aligner.kept(&o.align, cx.recompute))
        };
        let aligned: usize = shape.objectives.iter().map(kept).sum();
        let model =
            PretrainModel::build(self, cx, shape, &Context::new(dev.clone(), 1, false), &towers, &Init::shapes(&dev));
        match model {
            Ok(mut model) => {
                model.visit(&mut |p| {
                    plan.parameters += p.len();
                    plan.trainable += if p.trainable { p.len() } else { 0 };
                });
                let step = TrainingStep {
                    student: &student,
                    images: micro,
                    image_size: size,
                    tokens: visible,
                    frozen,
                    compared,
                    aligned: micro * aligned,
                    recompute: cx.recompute,
                };
                plan.memory += memory::training(&plan, &step);
            }
            Err(error) => return Err(vec![Refusal::whole(error.to_string())]),
        }
        Ok(plan)
    }

    fn run<D: Dev>(&self, mut run: StageRun<D>) -> Result<Outcome> {
        let stage = run.stage;
        let data = self.data.open().map_err(|r| r.under("data"))?;
        let towers = stage.towers(data.size);
        let shape = self.shape(&towers).map_err(|mut all| all.swap_remove(0))?;
        let student_shape = shape.student;
        let length = self.length(data.images.len());
        let init = Init::new(&run.cx.dev, stage.seed, stage.name);
        let mut model = PretrainModel::build(self, &stage, shape, &run.cx, &towers, &init)?;
        let mut trainer = Trainer::new(&self.optimizer, &self.schedule, self.batch.effective, length)?;
        let knn = self.knn.as_ref().map(|knn| knn.open().map_err(|r| r.under("knn"))).transpose()?;
        let trained = train(
            &mut run,
            &mut model,
            &mut trainer,
            Loop {
                data: &data,
                batch: self.batch,
                length,
                checkpoints: &self.checkpoints,
                after_epoch: &mut |run, model: &mut PretrainModel<D>, epochs| {
                    let Some(knn) = knn.as_ref().filter(|knn| epochs % knn.every_epochs == 0) else { return Ok(None) };
                    let result = knn.measure(run, &*model.student, epochs)?;
                    run.progress.result(run.stage.name, &result);
                    Ok(Some(result))
                },
            },
        )?;
        let mut results =
            json!({ "steps": trainer.updates, "epochs": trainer.updates as f64 / length.steps_per_epoch as f64 });
        if let Some(report) = &trained.last {
            results["loss"] = json!(report.loss);
        }
        if !trained.measured.is_empty() {
            results["knn"] = json!(trained.measured);
        }
        let weights = finish(&run, &mut model, trainer, trained.metric_records, &results)?;
        let record = StudentRecord {
            slot: self.student.clone(),
            shape: student_shape,
            weights: Some(std::sync::Arc::new(weights.into_iter().filter(|(n, _)| is_tower(n)).collect())),
            init_scope: stage.name.to_string(),
        };
        Ok(Outcome { results, student: Some(record), metric_records: trained.metric_records })
    }
}

/// Whether a parameter belongs to the student's tower, not to an alignment.
pub fn is_tower(name: &str) -> bool {
    ["cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.", "norm_pre."].iter().any(|p| name.starts_with(p))
}

/// Replays and timings call the stage's own step.
impl Pretrain {
    /// The models and the trainer of this stage, for `data_size` pixels and `images` images.
    ///
    /// # Errors
    /// What planning and loading answer.
    pub fn prepare<D: Dev>(
        &self,
        cx: &Context<D>,
        stage: &StageContext,
        data_size: usize,
        images: usize,
    ) -> Result<(PretrainModel<D>, Trainer<D>)> {
        let towers = stage.towers(data_size);
        let shape = self.shape(&towers).map_err(|mut all| all.swap_remove(0))?;
        let init = Init::new(&cx.dev, stage.seed, stage.name);
        let model = PretrainModel::build(self, stage, shape, cx, &towers, &init)?;
        let trainer = Trainer::new(&self.optimizer, &self.schedule, self.batch.effective, self.length(images))?;
        Ok((model, trainer))
    }

    /// Images of an update.
    pub fn batch(&self) -> BatchSize {
        self.batch
    }

    /// The images.
    pub fn data(&self) -> &Data {
        &self.data
    }

    /// The tower that is trained.
    pub fn student(&self) -> &Slot<StudentTag> {
        &self.student
    }
}

register!(stage "pretrain" => Pretrain, "trains a student against teachers or pixels",
    example: r#"{ type: pretrain, epochs: 10, data: { dataset: { type: sample, split: train } },
      student: { type: vit, arch: { dim: 96, depth: 4, heads: 3, patch: 4 } },
      masker: { type: random, ratio: 0.75 },
      objectives: { pixels: { target: { type: pixels, normalize: standardize }, tokens: [masked],
        aligner: { type: decoder, dim: 64, depth: 1, heads: 2 }, loss: { type: mse } } },
      optimizer: { type: adamw, base_lr: 1.5e-4 }, schedule: { type: cosine }, batch: { effective: 64 } }"#,
    paper: "MaskAlign, arXiv 2211.08887");
