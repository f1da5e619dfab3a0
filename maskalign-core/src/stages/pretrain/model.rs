//! The models of a pre-training stage, and a step's loss.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use maskalign_engine::{Context, ImageBatch, Role, Tape, Tensor, ops, random::Stream};
use maskalign_registry::{LevelRef, Refusal};

use super::{Freezing, Masking, PlannedObjective, PlannedPretrain, freezing::layer};
use crate::{
    components::{
        aligners::{AlignInput, AlignerModel},
        maskers::MaskInput,
        students::StudentModel,
        targets::{TargetInput, TargetSource},
        teachers::{Level, Pass, TeacherBuild, TeacherModel, Wants},
        tokens::Masks,
        towers::{Tap, TowerShape, TrainedStudents},
    },
    error::{Error, Result},
    nn::{Features, Init, Param, Reach},
    stages::{ForwardTimes, MicroBatch, Task, Term, branch_scales, under},
};

/// What a teacher gives for a micro-batch.
struct Taught {
    levels: BTreeMap<usize, Level>,
    /// Queries, keys and values of blocks.
    qkv: BTreeMap<usize, Level>,
}

/// A plan promised what the model does not give.
fn no_qkv(whose: &str) -> Error {
    Error::Usage(format!("{whose} gives no queries, keys and values of its blocks"))
}

/// The models of a pre-training stage, and its loss.
pub struct PretrainModel {
    student: Box<dyn StudentModel>,
    /// By name, with what each is asked for.
    teachers: BTreeMap<String, (Box<dyn TeacherModel>, Wants)>,
    masking: Option<Masking>,
    objectives: Vec<(PlannedObjective, Box<dyn AlignerModel>)>,
    freezing: Option<Freezing>,
    /// Layers of the student that parameters are of, by name, where layers are frozen; those of objectives are of the deepest
    /// that is read.
    layers: BTreeMap<String, usize>,
    /// The share of the stage that was done before the last loss.
    progress: f64,
    seed: u64,
    reach: Reach,
    kept: BTreeSet<usize>,
    times: ForwardTimes,
    /// Of the losses since they were last asked for.
    terms: Vec<Vec<Term>>,
}

impl PretrainModel {
    /// Builds student, alignments and, where there is a device, teachers: a plan has none.
    pub(super) fn new(
        plan: &PlannedPretrain,
        cx: Option<&Context>,
        init: &Init,
        trained: &TrainedStudents,
    ) -> Result<Self> {
        let mut student = plan.student.build(init, trained).map_err(|e| under(e, "student"))?;
        student.set_reach(plan.reach());
        let mut teachers = BTreeMap::new();
        for (name, (teacher, wants)) in &plan.teachers {
            let Some(cx) = cx else { break };
            let mut build = TeacherBuild { cx, trained, student: Some((&plan.student, &mut *student)) };
            let mut teacher = teacher.build(&mut build).map_err(|error| under(under(error, name), "teachers"))?;
            teacher.visit(&mut |p| p.name = format!("teachers.{name}.{}", p.name));
            teachers.insert(name.clone(), (teacher, wants.clone()));
        }
        let heads = init.of_role(Role::Head);
        let several = plan.objectives.len() > 1;
        let mut objectives = Vec::new();
        for objective in &plan.objectives {
            let mut aligner = objective.aligner.build(&heads)?;
            if several {
                aligner.visit(&mut |p| p.name = format!("{}.{}", objective.name, p.name));
            }
            objectives.push((objective.clone(), aligner));
        }
        let mut layers = BTreeMap::new();
        if plan.freezing.is_some() {
            student.visit(&mut |p| layers.extend(layer(&p.name).map(|layer| (p.name.clone(), layer))));
            for (objective, aligner) in &mut objectives {
                aligner.visit(&mut |p| layers.extend([(p.name.clone(), objective.deepest_layer())]));
            }
        }
        let mut model = PretrainModel {
            freezing: plan.freezing.clone(),
            layers,
            progress: 0.0,
            student,
            teachers,
            masking: plan.masking.clone(),
            objectives,
            seed: plan.seed,
            reach: plan.reach(),
            kept: plan.kept(),
            times: ForwardTimes::default(),
            terms: Vec::new(),
        };
        model.check_names()?;
        Ok(model)
    }

    /// Refuses two parameters of one name: checkpoints, optimizer state and exports go by names.
    fn check_names(&mut self) -> Result<(), Refusal> {
        let mut names: BTreeSet<String> = self.student.shapes().into_iter().map(|(name, _)| name).collect();
        for (objective, aligner) in &mut self.objectives {
            for (name, _) in aligner.shapes() {
                if names.contains(&name) {
                    let message = format!("a parameter is called `{name}`, as another one of the stage");
                    let refusal = Refusal::new("aligner", message).under(&objective.name).under("objectives");
                    return Err(refusal.help("its author gives it a name of its own, such as `align.norm`"));
                }
                names.insert(name);
            }
        }
        Ok(())
    }

    /// The tower that is trained.
    pub fn student(&self) -> &dyn StudentModel {
        &*self.student
    }

    /// Freezes the layers whose time is over, and what is read of them alone.
    fn freeze(&mut self, progress: f64) {
        self.progress = progress;
        let Some(freezing) = &self.freezing else { return };
        let layers = &self.layers;
        let mut freeze = |p: &mut Param| {
            if layers.get(&p.name).is_some_and(|&layer| freezing.is_frozen(layer, progress)) {
                p.set_trained(false);
            }
        };
        self.student.visit(&mut freeze);
        self.objectives.iter_mut().for_each(|(_, aligner)| aligner.visit(&mut freeze));
    }

    /// Whether all that an objective trains is frozen.
    fn is_over(&self, objective: &PlannedObjective) -> bool {
        let frozen = |freezing: &Freezing| freezing.is_frozen(objective.deepest_layer(), self.progress);
        self.freezing.as_ref().is_some_and(frozen)
    }

    /// The teachers that run.
    pub fn teachers(&self) -> impl Iterator<Item = &dyn TeacherModel> {
        self.teachers.values().map(|(teacher, _)| &**teacher)
    }

    /// The objectives, in order.
    pub(super) fn objectives(&self) -> impl Iterator<Item = &PlannedObjective> {
        self.objectives.iter().map(|(objective, _)| objective)
    }

    /// The blocks of the student that the objectives look at.
    pub(super) fn kept(&self) -> &BTreeSet<usize> {
        &self.kept
    }

    /// The teacher whose attention masks are drawn by.
    pub(super) fn attended(&self) -> Option<&dyn TeacherModel> {
        let name = self.masking.as_ref()?.teacher.as_ref()?;
        self.teachers.get(name).map(|(teacher, _)| &**teacher)
    }

    /// The teachers, with what each is asked for.
    pub(super) fn taught(&self) -> impl Iterator<Item = (&str, &dyn TeacherModel, &Wants)> {
        self.teachers.iter().map(|(name, (teacher, wants))| (name.as_str(), &**teacher, wants))
    }

    fn draw(&self, batch: &MicroBatch, passes: &mut BTreeMap<String, Pass>) -> Masks {
        let patches = self.student.shape().grid.patches();
        let Some(Masking { masker, teacher }) = &self.masking else {
            return Masks::all_visible(batch.images.batch, patches);
        };
        let attention =
            teacher.as_ref().and_then(|name| passes.get_mut(name)).map(|pass| std::mem::take(&mut pass.attention));
        let stream = |purpose, image: usize| Stream::new(self.seed, purpose, batch.epoch, image as u64);
        let input = |(i, &image): (usize, &usize)| {
            let attention = attention.as_ref().map_or(&[][..], |all| &all[i * patches..][..patches]);
            MaskInput { epoch: batch.epoch, image, attention }
        };
        let inputs: Vec<MaskInput> = batch.indices.iter().enumerate().map(input).collect();
        let mut streams: Vec<Stream> = batch.indices.iter().map(|&image| stream("mask", image)).collect();
        let mut shared = stream("masks of a micro-batch", batch.indices[0]);
        Masks::join(&masker.draw_batch(&inputs, &mut streams, &mut shared))
    }

    /// What teachers and pixels give for a micro-batch: masks, and each objective's targets.
    pub(super) fn teach(&mut self, cx: &Context, batch: &MicroBatch) -> Result<(Masks, Vec<Vec<Tensor>>)> {
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
            self.draw(batch, &mut passes)
        };
        let drawn = started.elapsed().as_secs_f64();
        let _span = tracing::info_span!("teacher").entered();
        let mut levels = BTreeMap::new();
        for ((name, (teacher, wants)), pass) in self.teachers.iter().zip(passes.into_values()) {
            let mut qkv = BTreeMap::new();
            for &block in &wants.qkv {
                let x = teacher.queries_keys_values(cx, &pass, block)?;
                qkv.insert(block, Level { x: x.ok_or_else(|| no_qkv(&format!("teacher `{name}`")))?, only: None });
            }
            levels.insert(name.as_str(), Taught { levels: teacher.finish(cx, pass, wants, &masks)?, qkv });
        }
        let targets = self
            .objectives
            .iter()
            .map(|(objective, _)| match self.is_over(objective) {
                true => Ok(Vec::new()),
                false => self.targets(cx, objective, images, &masks, &levels),
            })
            .collect::<Result<_>>()?;
        self.times.mask += drawn - attended;
        self.times.teacher += started.elapsed().as_secs_f64() - (drawn - attended);
        Ok((masks, targets))
    }

    fn targets(
        &self,
        cx: &Context,
        objective: &PlannedObjective,
        images: &ImageBatch,
        masks: &Masks,
        taught: &BTreeMap<&str, Taught>,
    ) -> Result<Vec<Tensor>> {
        let input = TargetInput { images, masks, tokens: objective.tokens };
        match &objective.target.source {
            TargetSource::Images(target) => Ok(target.outputs(cx, &input)?),
            TargetSource::Teacher { name, target, .. } => {
                let given = |name: &str| Some((&*self.teachers.get(name)?.0, taught.get(name)?));
                let Some((teacher, taught)) = given(name) else {
                    return Err(Error::Usage(format!("teacher `{name}` is not there")));
                };
                let levels = if target.relations().is_some() { &taught.qkv } else { &taught.levels };
                let wanted = objective.levels.iter().map(|level| {
                    levels.get(level).ok_or_else(|| Error::Usage(format!("teacher `{name}` gave no level {level}")))
                });
                Ok(target.outputs(cx, &input, teacher, &wanted.collect::<Result<Vec<_>>>()?)?)
            }
        }
    }

    /// Each objective's predictions from the student's hidden states.
    pub(super) fn align(
        &self,
        cx: &Context,
        tape: &mut Tape,
        features: &Features,
        masks: &Masks,
    ) -> Result<Vec<Vec<Tensor>>> {
        let held = self.student.shape().held();
        let mut normed: BTreeMap<LevelRef, Tensor> = BTreeMap::new();
        // Those of a block once too.
        let mut qkv: BTreeMap<usize, Tensor> = BTreeMap::new();
        let mut predictions = Vec::new();
        for (objective, aligner) in &self.objectives {
            if self.is_over(objective) {
                predictions.push(Vec::new());
                continue;
            }
            let needs = objective.aligner.needs();
            let mut levels = Vec::with_capacity(needs.levels.len());
            for level in &needs.levels {
                if let (true, LevelRef::Block(block)) = (objective.relates, level) {
                    if !qkv.contains_key(block) {
                        let found = self.student.queries_keys_values(cx, tape, features, *block)?;
                        qkv.insert(*block, found.ok_or_else(|| no_qkv("the student"))?);
                    }
                    levels.push(qkv[block].clone());
                    continue;
                }
                let x = match level {
                    LevelRef::Embed => &features.embed,
                    LevelRef::Block(i) => &features.hidden[i],
                };
                if needs.tap == Tap::Block {
                    levels.push(x.clone());
                    continue;
                }
                // One norm for all objectives that look through it.
                if !normed.contains_key(level) {
                    normed.insert(*level, self.student.norm(cx, tape, x)?);
                }
                levels.push(normed[level].clone());
            }
            let input = AlignInput { levels: &levels, held, masks, tokens: objective.tokens };
            predictions.push(aligner.forward(cx, tape, &input)?);
        }
        Ok(predictions)
    }
}

impl Task for PretrainModel {
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        self.student.visit(f);
        self.objectives.iter_mut().for_each(|(_, aligner)| aligner.visit(f));
        self.teachers.values_mut().for_each(|(teacher, _)| teacher.visit(f));
    }

    fn tower(&self) -> Option<(TowerShape, Reach)> {
        Some((self.student.shape(), self.reach))
    }

    fn take_times(&mut self) -> ForwardTimes {
        std::mem::take(&mut self.times)
    }

    fn take_terms(&mut self) -> Vec<Vec<Term>> {
        std::mem::take(&mut self.terms)
    }

    fn lr_scale(&self, parameter: &str) -> f64 {
        match (&self.freezing, self.layers.get(parameter)) {
            (Some(freezing), Some(&layer)) => freezing.scale(layer, self.progress),
            _ => 1.0,
        }
    }

    fn loss(&mut self, cx: &Context, tape: &mut Tape, batch: &MicroBatch) -> Result<Tensor> {
        self.freeze(batch.progress);
        let (masks, targets) = self.teach(cx, batch)?;
        let _span = tracing::info_span!("student").entered();
        let depth = self.student.shape().arch.depth;
        let scales = branch_scales(self.student.drop_path(), depth, self.seed, batch.epoch, &batch.indices);
        let kept = |i: usize| self.kept.contains(&i);
        let features = self.student.forward(cx, tape, &batch.images, Some(masks.seen()), scales.as_ref(), &kept)?;
        let (mut terms, mut weights, mut records) = (Vec::new(), Vec::new(), Vec::new());
        let predictions = self.align(cx, tape, &features, &masks)?;
        for ((objective, _), (predictions, targets)) in self.objectives.iter().zip(predictions.iter().zip(targets)) {
            if predictions.is_empty() {
                continue;
            }
            let weight = objective.weight.at(batch.progress) as f32;
            let first = terms.len();
            for ((prediction, target), level_weight) in predictions.iter().zip(&targets).zip(&objective.level_weights) {
                terms.push(objective.loss.term(cx, tape, prediction, target)?);
                weights.push(weight * level_weight);
            }
            let distances: Vec<f64> = terms[first..].iter().map(|term| f64::from(term.value())).collect();
            let levels = objective.levels.iter().copied().zip(distances.iter().copied());
            records.push(Term {
                name: objective.name.clone(),
                value: distances.iter().zip(&weights[first..]).map(|(term, weight)| term * f64::from(*weight)).sum(),
                // A target that is the mean of its levels has one distance, and one of relations several of one level.
                levels: levels.filter(|_| distances.len() > 1 && distances.len() == objective.levels.len()).collect(),
            });
        }
        self.terms.push(records);
        Ok(ops::weighted_sum(cx, tape, &terms, &weights)?)
    }

    fn after_update(&mut self, cx: &Context, progress: f64) -> Result<()> {
        for (teacher, _) in self.teachers.values_mut() {
            teacher.after_update(cx, &mut *self.student, progress)?;
        }
        Ok(())
    }
}
