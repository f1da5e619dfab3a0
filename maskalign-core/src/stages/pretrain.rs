//! Pre-training: a student's features of the visible patches against targets of the intact image.

mod model;
mod objective;

use std::collections::{BTreeMap, BTreeSet};

use indexmap::IndexMap;
use maskalign_engine::{Context, Device};
use maskalign_registry::{LevelRef, MaskerTag, OptimizerTag, Refusal, ScheduleTag, Slot, StudentTag, TeacherTag};

pub use model::{Inspection, PretrainModel};
pub use objective::Objective;

use self::objective::ObjectiveShape;
use super::{
    Data, Outcome, Stage, StageContext, StagePlan, StageRun, keep,
    knn::PeriodicKnn,
    memory::{self, TrainingStep},
    train::{BatchSize, Checkpoints, Length, Loop, Precision, Task, Trainer, finish, train},
};
use crate::{
    component,
    components::{
        maskers::{Counts, Masker},
        teachers::Wants,
        towers::{PlanContext, StudentRecord, Tap, TowerShape},
    },
    error::Result,
    nn::{Init, Reach},
    plugin::Build,
    register,
};

/// Trains a student on the visible patches against targets that frozen teachers, or the pixels, give for the intact
/// image (MaskAlign, arXiv 2211.08887).
#[component]
pub struct Pretrain {
    /// Epochs to train for.
    #[schemars(extend("exclusiveMinimum" = 0), range(max = 1000000.0))]
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
    /// The teacher whose attention the masker asks for.
    mask_teacher: Option<String>,
    objectives: Vec<ObjectiveShape>,
}

impl Shape {
    /// The blocks of the student that the objectives look at.
    fn kept(&self) -> BTreeSet<usize> {
        let levels = self.objectives.iter().flat_map(|o| &o.needs.levels);
        let block = |level: &LevelRef| match level {
            LevelRef::Block(i) => Some(*i),
            LevelRef::Embed => None,
        };
        levels.filter_map(block).collect()
    }

    /// What each teacher is asked for, by name.
    fn wants(&self) -> BTreeMap<String, Wants> {
        let mut all: BTreeMap<String, Wants> = BTreeMap::new();
        for objective in &self.objectives {
            if let Some(teacher) = &objective.target.teacher {
                let wants = all.entry(teacher.clone()).or_default();
                wants.levels.extend(&objective.target.levels);
                wants.whole |= objective.target.whole;
                wants.tokens = wants.tokens.union(objective.tokens);
            }
        }
        if let Some(teacher) = &self.mask_teacher {
            all.entry(teacher.clone()).or_default().attention = true;
        }
        all
    }

    /// How much of the student the loss depends on.
    fn reach(&self) -> Reach {
        Reach {
            blocks: self.kept().last().map_or(0, |last| last + 1),
            norm: self.objectives.iter().any(|o| o.needs.tap == Tap::Norm),
        }
    }
}

impl Pretrain {
    /// Collects every refusal, not the first.
    fn shape(&self, towers: &PlanContext) -> Result<Shape, Vec<Refusal>> {
        let mut refusals = Vec::new();
        let student = keep(
            &mut refusals,
            Build::build(&self.student).and_then(|s| s.plan(towers)).map_err(|r| r.under("student")),
        );
        let mut teachers = BTreeMap::new();
        for (name, slot) in &self.teachers {
            let planned = Build::build(slot).and_then(|t| t.plan(towers));
            if let Some(shape) = keep(&mut refusals, planned.map_err(|r| r.under(name).under("teachers"))) {
                teachers.insert(name.clone(), shape);
            }
        }
        let Some(student) = student else { return Err(refusals) };
        let masked = match &self.masker {
            None => Some((Counts { visible: student.grid.patches(), masked: 0 }, None)),
            Some(slot) => {
                let planned = Build::build(slot).and_then(|masker| {
                    self.check_masker(&*masker, student, &teachers)?;
                    Ok((masker.plan(student.grid)?, masker.teacher().map(str::to_owned)))
                });
                keep(&mut refusals, planned.map_err(|r| r.under("masker")))
            }
        };
        let counts = masked.as_ref().map(|(counts, _)| *counts);
        let mut objectives = Vec::new();
        for (name, objective) in &self.objectives {
            // A teacher that was refused would be reported as unknown as well.
            let asks = objective.target.options.get("teacher").and_then(|teacher| teacher.as_str());
            if asks.is_some_and(|name| self.teachers.contains_key(name) && !teachers.contains_key(name)) {
                continue;
            }
            match objective.shape(name, student, &teachers, counts) {
                Ok(shape) => objectives.extend(shape),
                Err(more) => refusals.extend(more.into_iter().map(|r| r.under(name).under("objectives"))),
            }
        }
        match masked {
            Some((counts, mask_teacher)) if refusals.is_empty() => {
                Ok(Shape { student, teachers, counts, mask_teacher, objectives })
            }
            _ => Err(refusals),
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
        teacher.check_grid(name, &student)?;
        if !teacher.cls_token {
            return Err(Refusal::new("teacher", format!("`{name}` has no class token whose attention could be used")));
        }
        Ok(())
    }

    /// The student that the stage leaves, without weights.
    fn record(&self, stage: &str, shape: TowerShape, reach: Reach) -> StudentRecord {
        StudentRecord { slot: self.student.clone(), shape, reach, weights: None, init_scope: stage.to_string() }
    }

    fn length(&self, images: usize) -> Length {
        Length::new(self.epochs, images, self.batch.effective)
    }
}

impl Stage for Pretrain {
    fn plan(&self, cx: &StageContext) -> Result<StagePlan, Vec<Refusal>> {
        let mut refusals = Vec::new();
        keep(&mut refusals, self.batch.check());
        keep(&mut refusals, self.checkpoints.check());
        let size = keep(&mut refusals, self.data.size(cx.environment).map_err(|r| r.under("data")));
        let mut plan = StagePlan { epochs: Some(self.epochs), ..StagePlan::default() };
        if self.data.may_open(cx.environment)
            && let Some(data) = size.and_then(|_| keep(&mut refusals, self.data.open().map_err(|r| r.under("data"))))
        {
            plan.images = Some(data.images.len());
            plan.memory += data.images.resident_bytes();
            plan.data.push(data.record(cx.name.to_string()));
            if let Err(refusal) = data.training(cx.seed, self.batch.effective, self.batch.micro(), 0) {
                if refusals.is_empty() {
                    refusals.push(refusal);
                }
            } else {
                plan.steps = Some(self.length(data.images.len()).steps());
            }
        }
        let length = self.length(plan.images.unwrap_or(self.batch.effective));
        let trainer = Trainer::new(&self.optimizer, &self.schedule, self.batch.effective, length);
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
            let width = shape.student.arch.dim;
            let planned = knn.plan(cx, self.epochs, width, &mut plan);
            refusals.extend(planned.err().into_iter().flatten().map(|r| r.under("knn")));
        }
        if !refusals.is_empty() {
            return Err(refusals);
        }
        let micro = self.batch.micro();
        let levels = |teacher: &str| {
            let of = |o: &&ObjectiveShape| o.target.teacher.as_deref() == Some(teacher);
            shape.objectives.iter().filter(of).map(|o| o.level_weights.len()).sum()
        };
        let asked = shape.wants();
        let idle = shape.teachers.keys().filter(|name| !asked.contains_key(*name));
        plan.warnings
            .extend(idle.map(|name| format!("no target and no masker asks teacher `{name}`: it is not loaded")));
        let frozen: Vec<(TowerShape, usize)> = asked.keys().map(|name| (shape.teachers[name], levels(name))).collect();
        let (student, counts) = (shape.student, shape.counts);
        let visible = counts.visible + usize::from(student.cls_token);
        plan.tokens = Some((visible, student.tokens()));
        plan.student = Some(self.record(cx.name, student, shape.reach()));
        let compared: usize = shape
            .objectives
            .iter()
            .map(|o| micro * o.tokens.count(counts.visible, counts.masked) * o.align.width * o.level_weights.len())
            .sum();
        let kept = |o: &ObjectiveShape| {
            let aligner = Build::build(&self.objectives[&o.name].aligner);
            aligner.map_or(0, |aligner| aligner.kept(&o.align, cx.recompute))
        };
        let aligned: usize = shape.objectives.iter().map(kept).sum();
        let model = PretrainModel::build(self, cx, shape, &Context::new(Device::Cpu, 1), &towers, &Init::shapes());
        match model {
            Ok(mut model) => {
                model.visit(&mut |p| {
                    plan.parameters += p.len();
                    plan.trainable += if p.is_trained() { p.len() } else { 0 };
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

    fn run(&self, mut run: StageRun) -> Result<Outcome> {
        let stage = run.stage;
        let data = self.data.open().map_err(|r| r.under("data"))?;
        let towers = stage.towers(data.size);
        let shape = self.shape(&towers).map_err(|mut all| all.swap_remove(0))?;
        let (student_shape, reach) = (shape.student, shape.reach());
        let length = self.length(data.images.len());
        let init = Init::new(run.cx.device(), stage.seed, stage.name);
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
                after_epoch: &mut |run, model: &mut PretrainModel, epochs| {
                    let Some(knn) = knn.as_ref().filter(|knn| epochs % knn.every_epochs == 0) else { return Ok(None) };
                    let result = knn.measure(run, &*model.student, epochs)?;
                    run.progress.result(run.stage.name, &result);
                    Ok(Some(result))
                },
            },
        )?;
        let weights = finish(&run, &mut model, trainer, &trained)?;
        let record = StudentRecord { weights: Some(weights), ..self.record(stage.name, student_shape, reach) };
        Ok(Outcome { results: trained.results, student: Some(record), metric_records: trained.metric_records })
    }
}

/// Replays and timings call the stage's own step.
impl Pretrain {
    /// The models and the trainer of this stage, for `data_size` pixels and `images` images.
    ///
    /// # Errors
    /// What planning and loading answer.
    pub fn prepare(
        &self,
        cx: &Context,
        stage: &StageContext,
        data_size: usize,
        images: usize,
    ) -> Result<(PretrainModel, Trainer)> {
        let towers = stage.towers(data_size);
        let shape = self.shape(&towers).map_err(|mut all| all.swap_remove(0))?;
        let init = Init::new(cx.device(), stage.seed, stage.name);
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
