//! Pre-training: a student's features of the visible patches against targets of the intact image.

mod freezing;
mod model;
mod objective;
mod pictures;
mod views;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use indexmap::IndexMap;
use maskalign_engine::{Context, Recompute};
use maskalign_registry::{Kind, MaskerTag, Refusal, SharedOptions, Slot, StageTag, StudentTag, TeacherTag, With};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use freezing::{Freeze, Freezing};
pub use model::PretrainModel;
use objective::Beside;
pub use objective::{Objective, PlannedObjective};
use views::{Group, SeenCrop, grouped};

use super::{
    EpochEvaluation, Loop, MicroBatch, Outcome, PlannedJudge, PlannedStage, PlannedTraining, Stage, StageContext,
    StageRun, StageSummary, Training, TrainingStep, finish, keep,
    knn::{PeriodicKnn, PlannedKnn},
    memory::{self, FrozenPass},
    train,
    training::{count_parameters, saved_parameters},
};
use crate::{
    component,
    components::{
        maskers::{Counts, PlannedMasker},
        students::PlannedStudent,
        targets::TargetSource,
        teachers::{PlannedTeacher, Wants},
        tokens::Tokens,
        towers::{Environment, PlanContext, StudentPlan, Tap, TowerShape, TrainedStudents},
    },
    data::Position,
    error::{Error, Result},
    events::Event,
    nn::{Init, MaskedPatches, Reach},
    plugin::Build,
    register,
};

/// Trains a student on the visible patches against targets that teachers, or the pixels, give for the intact image
/// (MaskAlign, arXiv 2211.08887).
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Pretrain(With<Periodic, With<Training, PretrainOptions>>);

/// What is measured in the course of pre-training.
#[component]
struct Periodic {
    /// Measures the student by k-NN every few epochs.
    #[serde(default)]
    knn: Option<PeriodicKnn>,
    /// Judges the student by other stages every few epochs, by name: `knn`, `linear_probe`, `few_shot`, `quality` or
    /// `retrieval`. Training is the same with and without.
    #[serde(default)]
    evaluations: IndexMap<String, PeriodicStage>,
}

impl SharedOptions for Periodic {
    const LAST: &'static [&'static str] = &["knn", "evaluations"];
}

/// A stage that judges the student in the course of pre-training.
#[component]
struct PeriodicStage {
    /// Epochs between judgements.
    #[schemars(range(min = 1))]
    every_epochs: u64,
    /// The stage, without a student: it is the one that is trained.
    stage: Slot<StageTag>,
}

/// The same, whose options fit.
struct PlannedEvaluation {
    name: String,
    every_epochs: u64,
    judge: Box<dyn PlannedJudge>,
}

/// Names that records and results have for other things.
const RESERVED: [&str; 14] = [
    "stage",
    "step",
    "steps",
    "epoch",
    "epochs",
    "loss",
    "terms",
    "levels",
    "lr",
    "lr_groups",
    "gradient_norm",
    "seconds",
    "images_per_s",
    "skipped",
];

impl Periodic {
    /// Plans the judgements of a student. `summary` is told of what they read, and of the memory of the largest.
    fn plan(
        &self,
        cx: &StageContext,
        epochs: f64,
        student: &StudentPlan,
        summary: &mut StageSummary,
    ) -> Result<Vec<PlannedEvaluation>, Vec<Refusal>> {
        let (mut planned, mut refusals, mut memory) = (Vec::new(), Vec::new(), 0);
        for (name, PeriodicStage { every_epochs, stage }) in &self.evaluations {
            let mut refuse = |refusal: Refusal| refusals.push(refusal.under(name).under("evaluations"));
            if RESERVED.contains(&name.as_str()) || name == "knn" && self.knn.is_some() {
                refuse(Refusal::whole(format!("`{name}` is the name of another number of this stage; choose another")));
            }
            if *every_epochs as f64 > epochs {
                let text = format!("{every_epochs} epochs are more than the stage's {epochs}: nothing would be judged");
                refuse(Refusal::new("every_epochs", text));
            }
            let named = format!("{}.evaluations.{name}", cx.name);
            let cx = StageContext { name: &named, ..*cx };
            let built = Build::build(stage).map_err(|refusal| vec![refusal]);
            match built.and_then(|stage| stage.plan_judge(&cx, student)) {
                Ok(judge) => {
                    let told = judge.summary();
                    summary.data.extend(told.data.iter().cloned());
                    summary.warnings.extend(told.warnings.iter().cloned());
                    memory = memory.max(told.memory);
                    planned.push(PlannedEvaluation { name: name.clone(), every_epochs: *every_epochs, judge });
                }
                Err(more) => more.into_iter().for_each(|refusal| refuse(refusal.under("stage"))),
            }
        }
        summary.memory += memory;
        if refusals.is_empty() { Ok(planned) } else { Err(refusals) }
    }
}

/// The options that are pre-training's own.
#[component]
struct PretrainOptions {
    /// The tower that is trained.
    student: Slot<StudentTag>,
    /// Towers whose features are matched, by name.
    #[serde(default)]
    teachers: IndexMap<String, Slot<TeacherTag>>,
    /// Chooses the patches that the student sees; absent: all of them.
    #[serde(default)]
    masker: Option<Slot<MaskerTag>>,
    /// The views that the masker draws for, where the data has several. Absent: all; the student sees the others whole.
    #[serde(default)]
    masked_views: Option<Vec<String>>,
    /// The terms of the loss, by name.
    #[schemars(extend("minProperties" = 1))]
    objectives: IndexMap<String, Objective>,
    /// Freezes the student's layers one after another; absent: none.
    #[serde(default)]
    freeze: Option<Freeze>,
}

/// A masker that fits, and the teacher whose attention it draws by.
#[derive(Clone)]
struct Masking {
    masker: Arc<dyn PlannedMasker>,
    teacher: Option<String>,
}

/// Pre-training whose options fit.
pub struct PlannedPretrain {
    summary: StageSummary,
    training: PlannedTraining,
    student: Arc<dyn PlannedStudent>,
    /// The teachers that are asked for something, and for what, by name.
    teachers: BTreeMap<String, (Arc<dyn PlannedTeacher>, Wants)>,
    masking: Option<Masking>,
    objectives: Vec<PlannedObjective>,
    /// The crops that objectives compare.
    crops: Vec<SeenCrop>,
    freezing: Option<Freezing>,
    knn: Option<PlannedKnn>,
    evaluations: Vec<PlannedEvaluation>,
    seed: u64,
    scope: String,
}

impl Pretrain {
    /// What runs.
    ///
    /// # Errors
    /// Every option that does not fit.
    pub fn plan_pretrain(&self, cx: &StageContext) -> Result<PlannedPretrain, Vec<Refusal>> {
        let With { shared: periodic, own: With { shared, own } } = &self.0;
        let mut refusals = Vec::new();
        let mut summary = StageSummary::default();
        let data = shared.data.plan_views(cx.environment);
        let training = shared.plan_on(data, cx, cx.name.to_string(), &mut summary, &mut refusals);
        let Some(mut training) = training else { return Err(refusals) };
        let towers = cx.towers(training.data.size);
        let models = match own.plan_models(&towers, &training) {
            Ok(models) => models,
            Err(more) => {
                refusals.extend(more);
                return Err(refusals);
            }
        };
        let Models { student, teachers, masking, objectives, crops, idle, used } = models;
        training.data.keep_crops(&used);
        summary.warnings.extend(idle.iter().map(|view| format!("no objective compares view `{view}`: it is not cut")));
        let freezing = own.freeze.and_then(|freeze| {
            let moving = teachers.iter().find(|(_, teacher)| teacher.moves());
            let planned = match moving {
                Some((name, _)) => {
                    Err(Refusal::whole("a teacher that follows the student would stop where it is frozen")
                        .in_stage(["teachers", name], "this one follows it"))
                }
                None => freeze.plan(student.shape().arch.depth, &training, &objectives),
            };
            keep(&mut refusals, planned.map_err(|refusal| refusal.under("freeze")))
        });
        let knn = periodic.knn.as_ref().and_then(|knn| {
            match knn.plan(cx, shared.epochs, student.shape().arch.dim, &mut summary) {
                Ok(planned) => Some(planned),
                Err(more) => {
                    refusals.extend(more.into_iter().map(|r| r.under("knn")));
                    None
                }
            }
        });
        if !refusals.is_empty() {
            return Err(refusals);
        }
        let mut wants = wants(&objectives, masking.as_ref());
        let (asked, idle): (BTreeMap<_, _>, BTreeMap<_, _>) =
            teachers.into_iter().partition(|(name, _)| wants.contains_key(name));
        summary
            .warnings
            .extend(idle.keys().map(|name| format!("no target and no masker asks teacher `{name}`: it is not loaded")));
        let teachers = asked
            .into_iter()
            .map(|(name, teacher)| {
                let wants = wants.remove(&name).unwrap_or_default();
                (name, (teacher, wants))
            })
            .collect();
        let mut planned = PlannedPretrain {
            summary,
            training,
            student,
            teachers,
            masking,
            objectives,
            crops,
            freezing,
            knn,
            evaluations: Vec::new(),
            seed: cx.seed,
            scope: cx.name.to_string(),
        };
        planned.summarize(cx.recompute).map_err(|error| vec![error.into_refusal()])?;
        if let Some(student) = planned.summary.student.clone() {
            planned.evaluations = periodic.plan(cx, shared.epochs, &student, &mut planned.summary)?;
        }
        Ok(planned)
    }
}

/// The models of the stage, and how they are compared.
struct Models {
    student: Arc<dyn PlannedStudent>,
    teachers: BTreeMap<String, Arc<dyn PlannedTeacher>>,
    masking: Option<Masking>,
    objectives: Vec<PlannedObjective>,
    /// The crops that objectives compare.
    crops: Vec<SeenCrop>,
    /// The views of which no crop is compared.
    idle: BTreeSet<String>,
    /// The crops that are compared, by their places among those of the data.
    used: BTreeSet<usize>,
}

impl PretrainOptions {
    /// Collects every refusal, not the first.
    fn plan_models(&self, towers: &PlanContext, training: &PlannedTraining) -> Result<Models, Vec<Refusal>> {
        let mut refusals = Vec::new();
        let student = keep(
            &mut refusals,
            Build::build(&self.student).and_then(|s| s.plan(towers)).map_err(|r| r.under("student")),
        );
        let with_student = PlanContext { student: student.as_ref(), ..*towers };
        let mut teachers: BTreeMap<String, Arc<dyn PlannedTeacher>> = BTreeMap::new();
        for (name, slot) in &self.teachers {
            let planned = Build::build(slot).and_then(|t| t.plan(&with_student));
            if let Some(teacher) = keep(&mut refusals, planned.map_err(|r| r.under(name).under("teachers"))) {
                teachers.insert(name.clone(), teacher.into());
            }
        }
        let Some(student) = student else { return Err(refusals) };
        let shape = student.shape();
        let masking = match &self.masker {
            None => Some(None),
            Some(slot) => {
                let planned = self.plan_masker(slot, shape, &teachers);
                keep(&mut refusals, planned.map_err(|r| r.under("masker"))).map(Some)
            }
        };
        let all = Counts { visible: shape.grid.patches(), masked: 0 };
        let counts = masking.as_ref().map(|masking| masking.as_ref().map_or(all, |m| m.masker.counts()));
        let blocks = masking.as_ref().and_then(Option::as_ref).map_or(1, |masking| masking.masker.blocks());
        let data = &training.data;
        let (masked, sees_sizes) = (self.masked_views.as_deref(), student.sees_sizes());
        let crops = views::crops(data.crops(), data.size, &shape, self.masker.is_some(), masked, sees_sizes);
        let crops = keep(&mut refusals, crops);
        let shapes = teachers.iter().map(|(name, teacher)| (name.clone(), teacher.shape())).collect();
        let shares: Vec<Option<(String, Tokens)>> = self.objectives.values().map(Objective::shares).collect();
        let owners = self.objectives.keys().zip(&shares).filter(|(_, shares)| shares.is_none());
        let owners: BTreeSet<&str> = owners.map(|(name, _)| name.as_str()).collect();
        let mut planned = BTreeMap::new();
        // Those that share the map of another follow all that have one of their own.
        for is_shared in [false, true] {
            let of_kind = self.objectives.iter().zip(&shares).filter(|(_, shares)| shares.is_some() == is_shared);
            let mut found = Vec::new();
            for ((name, objective), _) in of_kind {
                let through_it = shares.iter().flatten().filter(|(owner, _)| owner == name);
                let beside = Beside {
                    student: shape,
                    teachers: &shapes,
                    counts,
                    blocks,
                    crops: crops.as_deref(),
                    size: data.size,
                    is_uneven: masking.as_ref().and_then(Option::as_ref).is_some_and(|masking| masking.masker.uneven()),
                    others: through_it.fold(Tokens::default(), |all, (_, tokens)| all.union(*tokens)),
                    planned: &planned,
                    owners: &owners,
                };
                let checked = objective.plan(name, &beside).and_then(|planned| match planned {
                    Some(planned) => Self::check_assignments(&planned, &teachers, training, towers.environment)
                        .and_then(|()| planned.check_qkv(&*student, &teachers).map_err(|refusal| vec![refusal]))
                        .map(|()| Some(planned)),
                    None => Ok(None),
                });
                match checked {
                    Ok(objective) => found.extend(objective),
                    Err(more) => refusals.extend(more.into_iter().map(|r| r.under(name).under("objectives"))),
                }
            }
            planned.extend(found.into_iter().map(|objective| (objective.name.clone(), objective)));
        }
        let mut objectives: Vec<PlannedObjective> =
            self.objectives.keys().filter_map(|name| planned.remove(name)).collect();
        let mut crops = crops.unwrap_or_default();
        let compared = objectives.iter().map(|objective| &objective.compared);
        let used: BTreeSet<usize> = compared.flat_map(|of| of.student().into_iter().chain(of.target())).collect();
        let all_views: BTreeSet<String> = crops.iter().map(|crop| crop.view.clone()).collect();
        for objective in &mut objectives {
            objective.compared = objective.compared.placed(&used);
        }
        crops = used.iter().map(|&place| crops[place].clone()).collect();
        let idle = all_views.into_iter().filter(|view| crops.iter().all(|crop| crop.view != *view)).collect();
        // A teacher that was refused is not reported as unknown as well.
        let refused = |name: &str| self.teachers.contains_key(name) && !teachers.contains_key(name);
        refusals.retain(|refusal| !refusal.follows_from(Kind::Teacher, refused));
        match masking {
            Some(masking) if refusals.is_empty() => {
                Ok(Models { student, teachers, masking, objectives, crops, idle, used })
            }
            _ => Err(refusals),
        }
    }

    /// Refuses assignments of a teacher that does not follow the student, a warm-up that the stage does not reach the end of,
    /// and prototypes that have no room on this machine.
    fn check_assignments(
        objective: &PlannedObjective,
        teachers: &BTreeMap<String, Arc<dyn PlannedTeacher>>,
        training: &PlannedTraining,
        environment: Environment,
    ) -> Result<(), Vec<Refusal>> {
        let TargetSource::MovingHead { name, sharpening, .. } = &objective.target.source else { return Ok(()) };
        if teachers.get(name).is_some_and(|teacher| !teacher.moves()) {
            let message = format!("`{name}` does not follow the student, and there is no head for it to assign by");
            let refusal = Refusal::new("teacher", message).under("target");
            return Err(vec![refusal.help("use a teacher of `type: ema`")]);
        }
        if objective.shares.is_none() && environment == Environment::Checked {
            let mut head = 0;
            let built = objective.aligner.build(&Init::shapes());
            built.map_err(|error| vec![Error::from(error).into_refusal()])?.visit(&mut |p| head += p.len());
            // Its values, their gradients, two moments, and the teacher's copy.
            let needed = (5 * size_of::<f32>() * head) as f64 / f64::from(1 << 20);
            if let Some(free) = maskalign_engine::available_memory_mib().filter(|free| needed > *free) {
                let message = format!(
                    "with {} prototypes the head and the teacher's copy of it take {:.0} GiB, and {:.0} GiB are free",
                    objective.target.width,
                    needed / 1024.0,
                    free / 1024.0
                );
                let refusal = Refusal::new("prototypes", message).under("target");
                return Err(vec![
                    refusal.beside(["aligner"], "the head").help("choose fewer, or a narrower bottleneck"),
                ]);
            }
        }
        let epochs = training.length.epochs;
        match sharpening.warmup {
            Some((_, warmup)) if warmup as f64 > epochs => {
                let message = format!("{warmup} epochs of warm-up are more than the stage's {epochs}");
                Err(vec![Refusal::new("warmup_epochs", message).under("target")])
            }
            _ => Ok(()),
        }
    }

    fn plan_masker(
        &self,
        slot: &Slot<MaskerTag>,
        student: TowerShape,
        teachers: &BTreeMap<String, Arc<dyn PlannedTeacher>>,
    ) -> Result<Masking, Refusal> {
        let masker = Build::build(slot)?;
        let teacher = masker.teacher().map(str::to_owned);
        if let Some(name) = &teacher {
            let Some(teacher) = teachers.get(name) else {
                let known: Vec<&str> = self.teachers.keys().map(String::as_str).collect();
                let refusal = Refusal::new("teacher", format!("no teacher is named `{name}`"));
                return Err(refusal.unresolved(Kind::Teacher, name).help(match known.is_empty() {
                    true => "the stage has no `teachers`".to_string(),
                    false => format!("known teachers: {}", known.join(", ")),
                }));
            };
            teacher.shape().check_grid(name, &student)?;
            if !teacher.gives_attention() {
                let message = match teacher.shape().cls_token {
                    true => format!("`{name}` does not give its attention"),
                    false => format!("`{name}` has no class token whose attention could be used"),
                };
                return Err(Refusal::new("teacher", message));
            }
        }
        let masker = masker.plan(student.grid)?;
        if masker.blocks() > 1 && student.masked_patches == MaskedPatches::MaskToken {
            return Err(Refusal::whole(
                "a patch may be in several of its blocks, and the student would show it as often",
            )
            .in_stage(["student", "masked_patches"], "set here")
            .help("leave `masked_patches` out and use the aligner `decoder`, or choose another masker"));
        }
        if masker.uneven() && student.masked_patches != MaskedPatches::MaskToken {
            let text = "the images of a micro-batch have different numbers of visible patches, and the student sees those alone";
            return Err(Refusal::whole(text)
                .in_stage(["student", "masked_patches"], "what it shows of the others")
                .help("set `masked_patches: mask_token` for the student, or choose a masker that keeps equally many"));
        }
        Ok(Masking { masker: masker.into(), teacher })
    }
}

/// What each teacher is asked for, by name.
fn wants(objectives: &[PlannedObjective], masking: Option<&Masking>) -> BTreeMap<String, Wants> {
    let mut all: BTreeMap<String, Wants> = BTreeMap::new();
    for objective in objectives {
        let (name, whole) = match &objective.target.source {
            TargetSource::Images(_) => continue,
            TargetSource::Teacher { name, whole, .. } => (name, *whole),
            // Its centre is that of all tokens.
            TargetSource::MovingHead { name, .. } => (name, true),
        };
        let wants = all.entry(name.clone()).or_default();
        match objective.target.relations() {
            Some(_) => wants.qkv.extend(&objective.levels),
            None => wants.levels.extend(&objective.levels),
        }
        wants.whole |= whole;
        wants.tokens = wants.tokens.union(objective.tokens);
    }
    if let Some(teacher) = masking.and_then(|masking| masking.teacher.as_ref()) {
        all.entry(teacher.clone()).or_default().attention = true;
    }
    all
}

impl PlannedPretrain {
    /// Counts parameters and estimates memory.
    fn summarize(&mut self, recompute: Recompute) -> Result<()> {
        let (student, counts, micro) = (self.student.shape(), self.counts(), self.training.batch.micro());
        let seen = student.held().count(counts.visible, counts.masked);
        let levels = |teacher: &str| {
            let of = |o: &&PlannedObjective| o.target.teacher() == Some(teacher);
            self.objectives.iter().filter(of).map(|o| o.level_weights.len()).sum()
        };
        let frozen = self.teachers.keys().zip(self.teacher_shapes());
        let frozen = frozen.map(|(name, (tower, crops))| {
            let moves = self.teachers[name].0.moves();
            FrozenPass { tower, levels: levels(name), crops, moves }
        });
        let frozen = frozen.collect();
        let mut model = PretrainModel::new(self, None, &Init::shapes(), &TrainedStudents::default())?;
        (self.summary.parameters, self.summary.trainable) = count_parameters(&mut model);
        self.summary.saved = saved_parameters(&mut model);
        self.summary.tokens = Some((seen, student.tokens()));
        self.summary.student =
            Some(StudentPlan { tower: Arc::clone(&self.student), reach: self.reach(), init_scope: self.scope.clone() });
        let step = TrainingStep {
            student: &student,
            images: micro,
            pixels: self.crops.iter().map(|crop| 3 * crop.size * crop.size).sum(),
            tokens: self.student_tokens().iter().sum(),
            frozen,
            copied: self.copied()?,
            compared: micro * self.objectives.iter().map(|o| o.compared(counts)).sum::<usize>(),
            aligned: micro * self.objectives.iter().map(|o| o.aligner.kept(recompute)).sum::<usize>(),
            recompute,
        };
        self.summary.memory += memory::training(&self.summary, &step);
        Ok(())
    }

    /// Values of moving copies of alignments.
    fn copied(&self) -> Result<usize> {
        let mut all = 0;
        for objective in &self.objectives {
            let is_moving = matches!(objective.target.source, TargetSource::MovingHead { .. });
            if is_moving && objective.shares.is_none() {
                objective.aligner.build(&Init::shapes())?.visit(&mut |p| all += p.len());
            }
        }
        Ok(all)
    }

    /// The crops that go through the student together.
    fn student_groups(&self) -> Vec<Group> {
        let crops: BTreeSet<usize> =
            self.objectives.iter().flat_map(|objective| objective.compared.student()).collect();
        grouped(crops, &self.crops)
    }

    /// The crops that go through a teacher together: those that its targets are compared with, and those that masks are drawn
    /// for by its attention.
    fn teacher_groups(&self, name: &str) -> Vec<Group> {
        let of = self.objectives.iter().filter(|objective| objective.target.teacher() == Some(name));
        let mut crops: BTreeSet<usize> = of.flat_map(|objective| objective.compared.target()).collect();
        if self.masking.as_ref().is_some_and(|masking| masking.teacher.as_deref() == Some(name)) {
            crops.extend((0..self.crops.len()).filter(|&crop| self.crops[crop].is_masked));
        }
        grouped(crops, &self.crops)
    }

    /// Crops of an image that masks are drawn for.
    pub fn masked_crops(&self) -> usize {
        self.crops.iter().filter(|crop| crop.is_masked).count()
    }

    /// Sides in pixels of the crops of an image, in the order of a micro-batch.
    pub fn crop_sizes(&self) -> Vec<usize> {
        self.crops.iter().map(|crop| crop.size).collect()
    }

    /// The blocks of the student whose outputs the objectives look at, or whose next block's attention.
    fn kept(&self) -> BTreeSet<usize> {
        let kept = |objective: &PlannedObjective| {
            let read = objective.student_blocks();
            match objective.relates {
                true => read.filter_map(|block| block.checked_sub(1)).collect::<Vec<_>>(),
                false => read.collect(),
            }
        };
        self.objectives.iter().flat_map(kept).collect()
    }

    /// How much of the student the loss depends on.
    fn reach(&self) -> Reach {
        let blocks = self.kept().last().map_or(0, |last| last + 1);
        let mut attended = self.objectives.iter().filter(|o| o.relates);
        Reach {
            blocks,
            qkv: attended.any(|o| o.student_blocks().any(|block| block == blocks)),
            norm: self.objectives.iter().any(|o| o.aligner.needs().tap == Tap::Norm),
        }
    }

    /// Visible and predicted patches of an image.
    pub fn counts(&self) -> Counts {
        let all = Counts { visible: self.student.shape().grid.patches(), masked: 0 };
        self.masking.as_ref().map_or(all, |masking| masking.masker.counts())
    }

    /// In how many blocks the predicted patches of an image come.
    pub fn mask_blocks(&self) -> usize {
        self.masking.as_ref().map_or(1, |masking| masking.masker.blocks())
    }

    /// Whether micro-batches have different counts of visible and predicted patches.
    pub fn masks_vary(&self) -> bool {
        self.masking.as_ref().is_some_and(|masking| masking.masker.varies())
    }

    /// Whether a teacher's attention says which patches are masked.
    pub fn masks_follow_a_teacher(&self) -> bool {
        self.masking.as_ref().is_some_and(|masking| masking.teacher.is_some())
    }

    /// Draws masks by another masker: a replay's.
    #[must_use]
    pub fn with_masker(self, masker: Arc<dyn PlannedMasker>) -> Self {
        let teacher = self.masking.as_ref().and_then(|masking| masking.teacher.clone());
        PlannedPretrain { masking: Some(Masking { masker, teacher }), ..self }
    }

    /// Data, optimizer and length.
    pub fn training(&self) -> &PlannedTraining {
        &self.training
    }

    /// The student.
    pub fn student(&self) -> &Arc<dyn PlannedStudent> {
        &self.student
    }

    /// The shapes of the teachers that run, each with the number of an image's crops that it sees.
    pub fn teacher_shapes(&self) -> Vec<(TowerShape, usize)> {
        let crops = |name: &str| self.teacher_groups(name).iter().map(|group| group.crops.len()).sum();
        self.teachers.iter().map(|(name, (teacher, _))| (teacher.shape(), crops(name))).collect()
    }

    /// The student's tokens of each crop that it sees.
    pub fn student_tokens(&self) -> Vec<usize> {
        let (student, counts) = (self.student.shape(), self.counts());
        let rows = |crop: &SeenCrop| match crop.is_masked {
            true => student.held().count(counts.visible, counts.masked),
            false => student.held().count(crop.patches(&student), 0),
        };
        self.student_groups().iter().flat_map(|group| &group.crops).map(|&crop| rows(&self.crops[crop])).collect()
    }

    /// The terms of the loss.
    pub fn objectives(&self) -> &[PlannedObjective] {
        &self.objectives
    }

    /// How its initial values are drawn.
    pub fn init(&self, cx: &Context) -> Init {
        Init::new(cx.device(), self.seed, &*self.scope)
    }

    /// The models at their beginning.
    ///
    /// # Errors
    /// Weights that have gone or changed since they were planned; out of memory.
    pub fn model(&self, cx: &Context, trained: &TrainedStudents) -> Result<PretrainModel> {
        PretrainModel::new(self, Some(cx), &self.init(cx), trained)
    }
}

impl PlannedPretrain {
    /// What is to be known of the student after so many epochs, by name.
    fn judge(&self, run: &mut StageRun, model: &mut PretrainModel, epochs: u64) -> Result<Value> {
        let mut found = Map::new();
        if let Some(knn) = self.knn.as_ref().filter(|knn| epochs.is_multiple_of(knn.every_epochs)) {
            found.insert("knn".to_owned(), knn.measure(run, model.student())?);
        }
        for PlannedEvaluation { name, every_epochs, judge } in &self.evaluations {
            if epochs.is_multiple_of(*every_epochs) {
                found.insert(name.clone(), judge.judge(run, model.student())?);
            }
        }
        Ok(Value::Object(found))
    }

    /// Sends pictures of the first images of the first epoch, so that they are the same whenever they are made.
    fn show(&self, run: &mut StageRun, model: &mut PretrainModel) -> Result<()> {
        if !run.events.take_pictures() {
            return Ok(());
        }
        let PlannedTraining { data, batch, .. } = &self.training;
        let loader = data.open()?.training(run.seed, batch.effective, batch.micro(), 0)?;
        let Some(first) = loader.batches(Position::default(), Some(1)).next() else { return Ok(()) };
        let batch = MicroBatch::of(first?, 1.0);
        for picture in model.pictures(run.cx, run.name, &batch)? {
            run.events.send(Event::Picture(&picture))?;
        }
        Ok(())
    }
}

impl Stage for Pretrain {
    fn plan(&self, cx: &StageContext) -> Result<Box<dyn PlannedStage>, Vec<Refusal>> {
        Ok(Box::new(self.plan_pretrain(cx)?))
    }
}

impl PlannedStage for PlannedPretrain {
    fn summary(&self) -> &StageSummary {
        &self.summary
    }

    fn run(&self, mut run: StageRun) -> Result<Outcome> {
        let mut model = self.model(run.cx, run.trained)?;
        let mut trainer = self.training.trainer();
        let mut measure = |run: &mut StageRun, model: &mut PretrainModel, epochs| self.judge(run, model, epochs);
        let is_judged = self.knn.is_some() || !self.evaluations.is_empty();
        let evaluation =
            is_judged.then_some(EpochEvaluation { name: None, every: 1, best: None, measure: &mut measure });
        let trained = train(&mut run, &mut model, &mut trainer, Loop { training: &self.training, evaluation })?;
        self.show(&mut run, &mut model)?;
        let weights = finish(&run, &mut model, trainer, &trained)?;
        Ok(Outcome { results: trained.results, student: Some(weights) })
    }
}

register!(stage "pretrain" => Pretrain, "trains a student against teachers or pixels",
    example: "{ type: pretrain, epochs: 10, data: { dataset: { type: sample, split: train } },
      student: { type: vit, arch: { dim: 96, depth: 4, heads: 3, patch: 4 } },
      masker: { type: random, ratio: 0.75 },
      objectives: { pixels: { target: { type: pixels, normalize: standardize }, tokens: [masked],
        aligner: { type: decoder, dim: 64, depth: 1, heads: 2 }, loss: { type: mse } } },
      optimizer: { type: adamw, base_lr: 1.5e-4 }, schedule: { type: cosine }, batch: { effective: 64 } }",
    paper: "MaskAlign, arXiv 2211.08887");
