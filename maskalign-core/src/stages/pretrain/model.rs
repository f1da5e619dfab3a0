//! The models of a pre-training stage, and a step's loss.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use maskalign_engine::{
    Context, ImageBatch, Role, Tape, Tensor,
    ops::{self},
    random::Stream,
};
use maskalign_registry::{LevelRef, Refusal, Scalar as Ramp};

use super::{
    super::{
        StageContext,
        train::{MicroBatch, Task, branch_scales},
        under,
    },
    Pretrain, Shape,
    objective::ObjectiveShape,
};
use crate::{
    bench::ForwardTimes,
    components::{
        aligners::{AlignInput, AlignerModel},
        losses::Loss,
        maskers::{Counts, MaskInput, Masker},
        students::StudentModel,
        targets::{Target, TargetInput},
        teachers::{TeacherModel, Wants},
        tokens::{Masks, Tokens},
        towers::{PlanContext, Tap, TowerShape},
    },
    error::{Error, Result},
    nn::{Features, Grid, Init, Param},
    plugin::Build,
};

/// The models of a pre-training stage, and its loss.
pub struct PretrainModel {
    /// The tower that is trained.
    pub student: Box<dyn StudentModel>,
    teachers: BTreeMap<String, (Box<dyn TeacherModel>, Wants)>,
    masker: Option<Box<dyn Masker>>,
    counts: Counts,
    objectives: Vec<BuiltObjective>,
    seed: u64,
    grid: Grid,
    kept: BTreeSet<usize>,
    times: ForwardTimes,
    /// Masks to use in place of the masker's, one micro-batch each, first to last (replayed steps).
    pub given_masks: std::collections::VecDeque<Masks>,
}

struct BuiltObjective {
    shape: ObjectiveShape,
    target: Box<dyn Target>,
    aligner: Box<dyn AlignerModel>,
    loss: Box<dyn Loss>,
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

impl PretrainModel {
    /// Builds teachers, student and alignments. Teachers are left out where `init` makes shapes alone.
    pub(super) fn build(
        stage: &Pretrain,
        cx: &StageContext,
        shape: Shape,
        context: &Context,
        towers: &PlanContext,
        init: &Init,
    ) -> Result<Self> {
        let masker = stage.masker.as_ref().map(Build::build).transpose()?;
        let mut teachers = BTreeMap::new();
        // A teacher that nobody asks is not even loaded.
        for (name, wants) in shape.wants().into_iter().filter(|_| init.draws()) {
            let in_teachers = |error| under(under(error, &name), "teachers");
            let built = Build::build(&stage.teachers[&name]).map_err(Error::from);
            let teacher = built.and_then(|teacher| teacher.build(towers, context)).map_err(in_teachers)?;
            check_projection(&name, &*teacher, &shape).map_err(|refusal| in_teachers(refusal.into()))?;
            teachers.insert(name, (teacher, wants));
        }
        let mut student = Build::build(&stage.student)?.build(towers, init).map_err(|e| under(e, "student"))?;
        let (reach, kept) = (shape.reach(), shape.kept());
        student.set_reach(reach);
        let mut model = PretrainModel {
            grid: shape.student.grid,
            student,
            teachers,
            masker,
            counts: shape.counts,
            objectives: build_objectives(stage, shape.objectives, &init.of_role(Role::Head))?,
            seed: cx.seed,
            kept,
            times: ForwardTimes::default(),
            given_masks: Default::default(),
        };
        model.check_names()?;
        Ok(model)
    }

    /// Refuses two parameters of one name: checkpoints, optimizer state and exports go by names.
    fn check_names(&mut self) -> Result<(), Refusal> {
        let mut names: BTreeSet<String> = self.student.shapes().into_iter().map(|(name, _)| name).collect();
        for objective in &mut self.objectives {
            for (name, _) in objective.aligner.shapes() {
                if names.contains(&name) {
                    let message = format!("a parameter is called `{name}`, as another one of the stage");
                    let refusal = Refusal::new("aligner", message).under(&objective.shape.name).under("objectives");
                    return Err(refusal.help("its author gives it a name of its own, such as `align.norm`"));
                }
                names.insert(name);
            }
        }
        Ok(())
    }

    fn draw(&mut self, batch: &MicroBatch, attention: Option<&[f32]>) -> Masks {
        if let Some(masks) = self.given_masks.pop_front() {
            return masks;
        }
        let (images, patches) = (batch.images.batch, self.grid.patches());
        let Some(masker) = &self.masker else {
            return Masks::all_visible(images, patches);
        };
        let draw = |(i, &index): (usize, &usize)| {
            let input = MaskInput { grid: self.grid, attention: attention.map(|a| &a[i * patches..][..patches]) };
            masker.draw(&input, &mut Stream::new(self.seed, "mask", batch.epoch, index as u64))
        };
        Masks::join(&batch.indices.iter().enumerate().map(draw).collect::<Vec<_>>())
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
        let outputs = |o: &BuiltObjective| (o.shape.align.width * o.shape.align.wanted.len()) as f64;
        self.objectives.iter().map(|o| 2.0 * tokens as f64 * dim * outputs(o)).sum()
    }

    /// Attention and hidden states for the given masks, for comparison with another implementation's.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn inspect(&mut self, cx: &Context, images: &ImageBatch, masks: &Masks) -> Result<Inspection> {
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
            inspection.teacher_hidden = levels.into_iter().map(|(i, level)| (i, level.x.to_vec())).collect();
        }
        let visible = Some(masks.visible.as_slice());
        let features = self.student.forward(cx, &mut Tape::inference(), images, visible, None, &|_| true)?;
        inspection.student_hidden = features.hidden.iter().map(|(i, x)| (*i, x.to_vec())).collect();
        Ok(inspection)
    }
}

impl Task for PretrainModel {
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        self.student.visit(f);
        self.objectives.iter_mut().for_each(|o| o.aligner.visit(f));
    }

    fn student(&mut self) -> &mut dyn StudentModel {
        &mut *self.student
    }

    fn take_times(&mut self) -> ForwardTimes {
        std::mem::take(&mut self.times)
    }

    fn loss(&mut self, cx: &Context, tape: &mut Tape, batch: &MicroBatch) -> Result<Tensor> {
        let (masks, targets) = self.teach(cx, batch)?;
        debug_assert_eq!(self.counts.visible, masks.visible_each());
        let _span = tracing::info_span!("student").entered();
        let depth = self.student.shape().arch.depth;
        let scales = branch_scales(self.student.drop_path(), depth, self.seed, batch.epoch, &batch.indices);
        let kept = |i: usize| self.kept.contains(&i);
        let features = self.student.forward(cx, tape, &batch.images, Some(&masks.visible), scales.as_ref(), &kept)?;
        let mut terms = Vec::new();
        let mut weights = Vec::new();
        for (objective, (predictions, targets)) in
            self.objectives.iter().zip(self.align(cx, tape, &features, &masks)?.iter().zip(targets))
        {
            let weight = objective.weight.at(batch.progress) as f32;
            for ((prediction, target), level_weight) in
                predictions.iter().zip(&targets).zip(&objective.shape.level_weights)
            {
                terms.push(objective.loss.term(cx, tape, prediction, target)?);
                weights.push(weight * level_weight);
            }
        }
        Ok(ops::weighted_sum(cx, tape, &terms, &weights)?)
    }
}

impl PretrainModel {
    /// What frozen towers and pixels give for a micro-batch: masks, and each objective's targets.
    fn teach(&mut self, cx: &Context, batch: &MicroBatch) -> Result<(Masks, Vec<Vec<Tensor>>)> {
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
            let asked = self.masker.as_ref().and_then(|m| m.teacher()).map(str::to_owned);
            let attention = asked.map(|name| std::mem::take(&mut passes.get_mut(&name).expect("planned").attention));
            self.draw(batch, attention.as_deref())
        };
        let drawn = started.elapsed().as_secs_f64();
        let _span = tracing::info_span!("teacher").entered();
        let mut levels = BTreeMap::new();
        for (name, pass) in passes {
            let (teacher, wants) = &self.teachers[&name];
            levels.insert(name, teacher.finish(cx, pass, wants, &masks)?);
        }
        let student = self.student.shape();
        let outputs = |o: &BuiltObjective| {
            let teacher = o.shape.target.teacher.as_ref().map(|name| (&levels[name], &*self.teachers[name].0));
            let input = TargetInput { images, masks: &masks, tokens: o.shape.tokens, student, teacher };
            o.target.outputs(cx, &o.shape.target, &input)
        };
        let targets = self.objectives.iter().map(outputs).collect::<Result<_, _>>()?;
        self.times.mask += drawn - attended;
        self.times.teacher += started.elapsed().as_secs_f64() - (drawn - attended);
        Ok((masks, targets))
    }

    /// Each objective's predictions from the student's hidden states.
    fn align(&self, cx: &Context, tape: &mut Tape, features: &Features, masks: &Masks) -> Result<Vec<Vec<Tensor>>> {
        let held = Tokens { cls: self.student.shape().cls_token, visible: true, masked: false };
        let mut normed: BTreeMap<LevelRef, Tensor> = BTreeMap::new();
        let mut predictions = Vec::new();
        for o in &self.objectives {
            let mut levels = Vec::with_capacity(o.shape.needs.levels.len());
            for level in &o.shape.needs.levels {
                let x = match level {
                    LevelRef::Embed => &features.embed,
                    LevelRef::Block(i) => &features.hidden[i],
                };
                if o.shape.needs.tap == Tap::Block {
                    levels.push(x.clone());
                    continue;
                }
                // One norm for all objectives that look through it.
                if !normed.contains_key(level) {
                    normed.insert(*level, self.student.norm(cx, tape, x)?);
                }
                levels.push(normed[level].clone());
            }
            let input = AlignInput { levels: &levels, held, masks, tokens: o.shape.tokens };
            predictions.push(o.aligner.forward(cx, tape, &input)?);
        }
        Ok(predictions)
    }
}

/// Refuses weights without the projection that a target taps: CLIP's files come with and without it.
fn check_projection(name: &str, teacher: &dyn TeacherModel, shape: &Shape) -> Result<(), Refusal> {
    let taps = |o: &ObjectiveShape| o.target.teacher.as_deref() == Some(name) && o.target.tap == Tap::Projection;
    match teacher.shape().projection.is_none() && shape.objectives.iter().any(taps) {
        true => Err(Refusal::new("weights", "hold no projection, which a target's `tap` asks for")),
        false => Ok(()),
    }
}

fn build_objectives(stage: &Pretrain, shapes: Vec<ObjectiveShape>, init: &Init) -> Result<Vec<BuiltObjective>> {
    let several = shapes.len() > 1;
    let mut built = Vec::new();
    for shape in shapes {
        let recipe = &stage.objectives[&shape.name];
        let mut aligner = Build::build(&recipe.aligner)?.build(&shape.align, init)?;
        if several {
            aligner.visit(&mut |p| p.name = format!("{}.{}", shape.name, p.name));
        }
        built.push(BuiltObjective {
            target: Build::build(&recipe.target)?,
            aligner,
            loss: Build::build(&recipe.loss)?,
            weight: recipe.weight,
            shape,
        });
    }
    Ok(built)
}
