//! The models of a pre-training stage, and a step's loss.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use maskalign_engine::{Context, ImageBatch, Role, Tape, Tensor, ops, random::Stream};
use maskalign_registry::{LevelRef, Refusal};

use super::{
    Masking, PlannedObjective, PlannedPretrain,
    freezing::{Freezing, layer},
    views::{Group, SeenCrop},
};
use crate::{
    components::{
        aligners::{AlignInput, AlignerModel},
        maskers::MaskInput,
        students::StudentModel,
        targets::{ImageTarget, Sharpening, TargetInput, TargetSource},
        teachers::{Level, TeacherBuild, TeacherModel, Wants},
        tokens::{Masks, Tokens},
        towers::{Tap, TowerShape, TrainedStudents},
    },
    error::{Error, Result},
    nn::{Features, Init, Param, Reach, begin_as, follow},
    stages::{
        ForwardTimes, MicroBatch, Task, Term,
        training::{DROP_PATH, branch_scales_of},
        under,
    },
};

/// A plan promised what the model does not give.
fn no_qkv(whose: &str) -> Error {
    Error::Usage(format!("{whose} gives no queries, keys and values of its blocks"))
}

/// The models of a pre-training stage, and its loss.
pub struct PretrainModel {
    student: Box<dyn StudentModel>,
    /// By name, with what each is asked for.
    teachers: BTreeMap<String, Taught>,
    masking: Option<Masking>,
    objectives: Vec<PlannedObjective>,
    /// By the names of the objectives whose they are.
    aligners: BTreeMap<String, Box<dyn AlignerModel>>,
    /// Moving copies of alignments, by the teacher that they belong to and the objective that they are copied from.
    heads: BTreeMap<(String, String), Box<dyn AlignerModel>>,
    /// Of objectives whose targets are centred, by name.
    centers: BTreeMap<String, Center>,
    crops: Vec<SeenCrop>,
    /// The crops that go through the student together.
    groups: Vec<Group>,
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

/// A teacher that runs.
struct Taught {
    teacher: Box<dyn TeacherModel>,
    wants: Wants,
    /// The crops that go through it together.
    groups: Vec<Group>,
}

/// A moving mean of logits.
struct Center {
    /// `[channels]`.
    value: Param,
    momentum: f64,
    /// Sums of the logits since the last update, and how many there were.
    sums: Vec<f64>,
    rows: usize,
}

/// What teachers and pixels give for a micro-batch.
pub(super) struct Lesson {
    /// The masks of each crop.
    masks: Vec<Masks>,
    /// Of each objective, the targets of crops that were made together.
    targets: Vec<Vec<Side>>,
}

impl Lesson {
    /// The masks of some crops, one after another.
    pub(super) fn masks_of(&self, group: &Group) -> Masks {
        masks_of(&self.masks, group)
    }

    /// Of each objective, the outputs of the first crops that its target was computed from.
    pub(super) fn first_targets(&self) -> impl Iterator<Item = &[Tensor]> {
        self.targets.iter().map(|sides| sides.first().map_or(&[][..], |side| &side.outputs))
    }
}

/// One side of a comparison: what an objective compares of some crops.
pub(super) struct Side {
    crops: Vec<usize>,
    /// Rows of each image, crop after crop.
    lengths: Vec<usize>,
    /// A matrix for each level.
    pub(super) outputs: Vec<Tensor>,
}

fn masks_of(masks: &[Masks], group: &Group) -> Masks {
    match group.crops[..] {
        [crop] => masks[crop].clone(),
        _ => Masks::concat(&group.crops.iter().map(|&crop| &masks[crop]).collect::<Vec<_>>()),
    }
}

/// The images of some crops, one after another.
fn images_of<'a>(batch: &'a MicroBatch, group: &Group) -> Cow<'a, ImageBatch> {
    let crop = |place: usize| if place == 0 { &batch.images } else { &batch.crops[place - 1] };
    match group.crops[..] {
        [place] => Cow::Borrowed(crop(place)),
        _ => Cow::Owned(ImageBatch {
            pixels: group.crops.iter().flat_map(|&place| crop(place).pixels.iter().copied()).collect(),
            batch: group.crops.iter().map(|&place| crop(place).batch).sum(),
            size: crop(group.crops[0]).size,
        }),
    }
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
            let (wants, groups) = (wants.clone(), plan.teacher_groups(name));
            teachers.insert(name.clone(), Taught { teacher, wants, groups });
        }
        let several = plan.objectives.len() > 1;
        let rename = |owner: &str, aligner: &mut dyn AlignerModel| {
            if several {
                aligner.visit(&mut |p| p.name = format!("{owner}.{}", p.name));
            }
        };
        let heads = init.of_role(Role::Head);
        let mut aligners = BTreeMap::new();
        for objective in plan.objectives.iter().filter(|objective| objective.shares.is_none()) {
            let mut aligner = objective.aligner.build(&heads)?;
            rename(&objective.name, &mut *aligner);
            aligners.insert(objective.name.clone(), aligner);
        }
        let mut layers = BTreeMap::new();
        if plan.freezing.is_some() {
            student.visit(&mut |p| layers.extend(layer(&p.name).map(|layer| (p.name.clone(), layer))));
            for objective in &plan.objectives {
                let Some(aligner) = aligners.get_mut(&objective.name) else { continue };
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
            objectives: plan.objectives.clone(),
            aligners,
            heads: BTreeMap::new(),
            centers: BTreeMap::new(),
            crops: plan.crops.clone(),
            groups: plan.student_groups(),
            seed: plan.seed,
            reach: plan.reach(),
            kept: plan.kept(),
            times: ForwardTimes::default(),
            terms: Vec::new(),
        };
        model.check_names()?;
        if let Some(cx) = cx {
            model.copy_heads(cx, &rename)?;
        }
        Ok(model)
    }

    /// Makes the moving copies of alignments, which begin as these, and the centres, which begin as 0.
    fn copy_heads(&mut self, cx: &Context, rename: &dyn Fn(&str, &mut dyn AlignerModel)) -> Result<()> {
        let init = Init::blank(cx.device()).of_role(Role::Moving);
        for objective in &self.objectives {
            let TargetSource::MovingHead { name: teacher, sharpening, .. } = &objective.target.source else { continue };
            let owner = owner(objective);
            let key = (teacher.clone(), owner.to_owned());
            if !self.heads.contains_key(&key) {
                let mut head = objective.aligner.build(&init)?;
                rename(owner, &mut *head);
                begin_as(&mut *head, &mut **self.aligners.get_mut(owner).expect("each map has an owner"));
                head.visit(&mut |p| p.name = format!("teachers.{teacher}.{}", p.name));
                self.heads.insert(key, head);
            }
            let width = objective.target.width;
            let value = init.constant(format!("teachers.{teacher}.{}.center", objective.name), &[width], 0.0)?;
            let center = Center { value, momentum: sharpening.center_momentum, sums: vec![0.0; width], rows: 0 };
            self.centers.insert(objective.name.clone(), center);
        }
        Ok(())
    }

    /// Refuses two parameters of one name: checkpoints, optimizer state and exports go by names.
    fn check_names(&mut self) -> Result<(), Refusal> {
        let mut names: BTreeSet<String> = self.student.shapes().into_iter().map(|(name, _)| name).collect();
        for objective in &self.objectives {
            let Some(aligner) = self.aligners.get_mut(&objective.name) else { continue };
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
        self.aligners.values_mut().for_each(|aligner| aligner.visit(&mut freeze));
    }

    /// Whether all that an objective trains is frozen.
    fn is_over(&self, objective: &PlannedObjective) -> bool {
        let frozen = |freezing: &Freezing| freezing.is_frozen(objective.deepest_layer(), self.progress);
        self.freezing.as_ref().is_some_and(frozen)
    }

    /// The teachers that run.
    pub fn teachers(&self) -> impl Iterator<Item = &dyn TeacherModel> {
        self.teachers.values().map(|taught| &*taught.teacher)
    }

    /// The objectives, in order.
    pub(super) fn objectives(&self) -> impl Iterator<Item = &PlannedObjective> {
        self.objectives.iter()
    }

    /// The crops that go through the student together.
    pub(super) fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// The blocks of the student that the objectives look at.
    pub(super) fn kept(&self) -> &BTreeSet<usize> {
        &self.kept
    }

    /// The teacher whose attention masks are drawn by.
    pub(super) fn attended(&self) -> Option<&dyn TeacherModel> {
        let name = self.masking.as_ref()?.teacher.as_ref()?;
        self.teachers.get(name).map(|taught| &*taught.teacher)
    }

    /// The teachers, with what each is asked for.
    pub(super) fn taught(&self) -> impl Iterator<Item = (&str, &dyn TeacherModel, &Wants)> {
        self.teachers.iter().map(|(name, taught)| (name.as_str(), &*taught.teacher, &taught.wants))
    }

    /// The masks of each crop. `attention` is what the masker's teacher pays the patches of each, by crop.
    fn draw(&self, batch: &MicroBatch, attention: &BTreeMap<usize, Vec<f32>>) -> Vec<Masks> {
        let shape = self.student.shape();
        let mask = |(place, crop): (usize, &SeenCrop)| {
            let patches = crop.patches(&shape);
            let (Some(Masking { masker, .. }), true) = (&self.masking, crop.is_masked) else {
                return Masks::all_visible(batch.images.batch, patches);
            };
            let attention = attention.get(&place);
            let purpose = crop.purpose("mask");
            let stream = |purpose: &str, image: usize| Stream::new(self.seed, purpose, batch.epoch, image as u64);
            let input = |(i, &image): (usize, &usize)| {
                let attention = attention.map_or(&[][..], |all| &all[i * patches..][..patches]);
                MaskInput { epoch: batch.epoch, image, crop: place, attention }
            };
            let inputs: Vec<MaskInput> = batch.indices.iter().enumerate().map(input).collect();
            let mut streams: Vec<Stream> = batch.indices.iter().map(|&image| stream(&purpose, image)).collect();
            let mut shared = stream("masks of a micro-batch", batch.indices[0]);
            Masks::join(&masker.draw_batch(&inputs, &mut streams, &mut shared))
        };
        self.crops.iter().enumerate().map(mask).collect()
    }

    /// What teachers and pixels give for a micro-batch: masks, and each objective's targets.
    pub(super) fn teach(&mut self, cx: &Context, batch: &MicroBatch) -> Result<Lesson> {
        let started = Instant::now();
        let attending = self.masking.as_ref().and_then(|masking| masking.teacher.as_deref());
        let (mut passes, mut attention) = (Vec::new(), BTreeMap::new());
        {
            let _span = tracing::info_span!("teacher").entered();
            for (name, taught) in &self.teachers {
                for group in &taught.groups {
                    let images = images_of(batch, group);
                    let mut pass = taught.teacher.begin(cx, &images, &taught.wants)?;
                    if attending == Some(name.as_str()) {
                        let all = std::mem::take(&mut pass.attention);
                        let each = all.len() / group.crops.len();
                        let of_crops = group.crops.iter().copied().zip(all.chunks_exact(each.max(1)));
                        attention.extend(of_crops.map(|(crop, of_crop)| (crop, of_crop.to_vec())));
                    }
                    passes.push((name, taught, group, images, pass));
                }
            }
        }
        let attended = started.elapsed().as_secs_f64();
        let masks = {
            let _span = tracing::info_span!("mask").entered();
            self.draw(batch, &attention)
        };
        let drawn = started.elapsed().as_secs_f64();
        let _span = tracing::info_span!("teacher").entered();
        let mut targets: Vec<Vec<Side>> = self.objectives.iter().map(|_| Vec::new()).collect();
        let over: Vec<bool> = self.objectives.iter().map(|objective| self.is_over(objective)).collect();
        for (name, taught, group, images, pass) in passes {
            let of_group = masks_of(&masks, group);
            let mut qkv = BTreeMap::new();
            for &block in &taught.wants.qkv {
                let x = taught.teacher.queries_keys_values(cx, &pass, block)?;
                qkv.insert(block, Level { x: x.ok_or_else(|| no_qkv(&format!("teacher `{name}`")))?, only: None });
            }
            let levels = taught.teacher.finish(cx, pass, &taught.wants, &of_group)?;
            for ((objective, sides), &is_over) in self.objectives.iter().zip(&mut targets).zip(&over) {
                let compared = objective.compared.target();
                let is_asked = group.crops.iter().any(|crop| compared.contains(crop));
                if objective.target.teacher() != Some(name) || !is_asked || is_over {
                    continue;
                }
                let levels = if objective.target.relations().is_some() { &qkv } else { &levels };
                let lengths = objective.lengths(&of_group);
                let is_moving = matches!(objective.target.source, TargetSource::MovingHead { .. });
                if !is_moving && lengths.iter().all(|length| *length == 0) {
                    // No image of these has a token that is compared.
                    sides.push(Side { crops: group.crops.clone(), lengths, outputs: Vec::new() });
                    continue;
                }
                let wanted = objective.levels.iter().map(|level| {
                    levels.get(level).ok_or_else(|| Error::Usage(format!("teacher `{name}` gave no level {level}")))
                });
                let wanted = wanted.collect::<Result<Vec<_>>>()?;
                let input = TargetInput { images: &images, masks: &of_group, tokens: objective.tokens };
                let teacher = &*taught.teacher;
                let outputs = match &objective.target.source {
                    TargetSource::Images(_) => continue,
                    TargetSource::Teacher { target, .. } => target.outputs(cx, &input, teacher, &wanted)?,
                    TargetSource::MovingHead { tap, sharpening, .. } => {
                        let center = self.centers.get_mut(&objective.name);
                        let head = self.heads.get(&(name.clone(), owner(objective).to_owned()));
                        let (Some(center), Some(head)) = (center, head) else {
                            return Err(Error::Usage(format!("teacher `{name}` has no head")));
                        };
                        let head = Assigning { teacher, tap: *tap, head: &**head, sharpening, epoch: batch.epoch };
                        head.logits(cx, &input, wanted[0], center)?.into_iter().collect()
                    }
                };
                sides.push(Side { crops: group.crops.clone(), lengths, outputs });
            }
        }
        for ((objective, sides), &is_over) in self.objectives.iter().zip(&mut targets).zip(&over) {
            let TargetSource::Images(target) = &objective.target.source else { continue };
            if is_over {
                continue;
            }
            for group in super::grouped(objective.compared.target(), &self.crops) {
                let (images, of_group) = (images_of(batch, &group), masks_of(&masks, &group));
                let input = TargetInput { images: &images, masks: &of_group, tokens: objective.tokens };
                let lengths = objective.lengths(&of_group);
                let outputs = match of_group.uneven {
                    _ if lengths.iter().all(|length| *length == 0) => Vec::new(),
                    None => target.outputs(cx, &input)?,
                    Some(_) => self.uneven_outputs(cx, &**target, &input)?,
                };
                sides.push(Side { crops: group.crops, lengths, outputs });
            }
        }
        self.times.mask += drawn - attended;
        self.times.teacher += started.elapsed().as_secs_f64() - (drawn - attended);
        Ok(Lesson { masks, targets })
    }

    /// What a target of images gives where these have different counts: it is asked for every patch.
    fn uneven_outputs(&self, cx: &Context, target: &dyn ImageTarget, input: &TargetInput) -> Result<Vec<Tensor>> {
        let patches = self.student.shape().grid.patches();
        let all = Masks::all_visible(input.masks.batch, patches);
        let every = TargetInput { masks: &all, tokens: Tokens { visible: true, ..Tokens::default() }, ..*input };
        let rows = input.masks.rows_among(input.tokens, false, patches);
        let outputs = target.outputs(cx, &every)?;
        let gather = |x: &Tensor| ops::gather_rows(cx, &mut Tape::inference(), &[x], &rows);
        Ok(outputs.iter().map(gather).collect::<maskalign_engine::Result<_>>()?)
    }

    /// Each objective's predictions from the student's hidden states of some crops; none where it compares none of them.
    pub(super) fn align(
        &self,
        cx: &Context,
        tape: &mut Tape,
        group: &Group,
        features: &Features,
        masks: &Masks,
    ) -> Result<Vec<Option<Side>>> {
        let held = self.student.shape().held();
        let mut normed: BTreeMap<LevelRef, Tensor> = BTreeMap::new();
        // Those of a block once too.
        let mut qkv: BTreeMap<usize, Tensor> = BTreeMap::new();
        let mut predictions = Vec::new();
        let each = features.batch / group.crops.len();
        for objective in &self.objectives {
            let compared = objective.compared.student();
            let chosen: Vec<usize> =
                (0..group.crops.len()).filter(|&place| compared.contains(&group.crops[place])).collect();
            if chosen.is_empty() || self.is_over(objective) {
                predictions.push(None);
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
            let mut of_chosen = Cow::Borrowed(masks);
            if chosen.len() < group.crops.len() {
                let images = || chosen.iter().flat_map(|&crop| crop * each..(crop + 1) * each);
                let tokens = features.tokens;
                let rows: Vec<u32> =
                    images().flat_map(|image| (image * tokens..(image + 1) * tokens).map(|row| row as u32)).collect();
                for level in &mut levels {
                    *level = ops::gather_rows(cx, tape, &[level], &rows)?;
                }
                of_chosen = Cow::Owned(masks.pick(images()));
            }
            let lengths = objective.lengths(&of_chosen);
            let input = AlignInput { levels: &levels, held, masks: &of_chosen, tokens: objective.tokens };
            let outputs = match lengths.iter().all(|length| *length == 0) {
                true => Vec::new(),
                false => self.aligners[owner(objective)].forward(cx, tape, &input)?,
            };
            let crops = chosen.iter().map(|&place| group.crops[place]).collect();
            predictions.push(Some(Side { crops, lengths, outputs }));
        }
        Ok(predictions)
    }

    /// The distances of an objective's predictions from its targets, one list for each level, with the share of the
    /// compared images that each distance is the mean of. An image counts alike, however many of its tokens are compared.
    fn compare(
        cx: &Context,
        tape: &mut Tape,
        objective: &PlannedObjective,
        predictions: &[Side],
        targets: &[Side],
    ) -> Result<Vec<Vec<(Tensor, f32)>>> {
        let mut terms: Vec<Vec<(Tensor, f32)>> = objective.level_weights.iter().map(|_| Vec::new()).collect();
        let pairs: BTreeSet<&(usize, usize)> = objective.compared.pairs.iter().collect();
        for prediction in predictions {
            let each = prediction.lengths.len() / prediction.crops.len();
            for target in targets {
                for compared in chunks(&pairs, objective.compared.crosses, prediction, target) {
                    let images = compared.iter().flat_map(|&(student, target)| {
                        (0..each).map(move |image| (student * each + image, target * each + image))
                    });
                    let mut by_length: BTreeMap<usize, Vec<(usize, usize)>> = BTreeMap::new();
                    for (student, target) in images {
                        by_length.entry(prediction.lengths[student]).or_default().push((student, target));
                    }
                    by_length.remove(&0);
                    for images in by_length.values() {
                        let (rows, of_target): (Vec<usize>, Vec<usize>) = images.iter().copied().unzip();
                        let share = images.len() as f32 / (each * pairs.len()) as f32;
                        let off = &mut Tape::inference();
                        for (level, terms) in terms.iter_mut().enumerate() {
                            let x = prediction.rows_of(cx, tape, level, &rows)?;
                            let y = target.rows_of(cx, off, level, &of_target)?;
                            terms.push((objective.loss.term(cx, tape, &x, &y)?, share));
                        }
                    }
                }
            }
        }
        Ok(terms)
    }
}

/// Pairs of places among the crops of a prediction and of a target, in parts that are compared at once: all, or those of one
/// crop of the target where crops are compared with others, so that no copy of many times the rows is made.
fn chunks(
    pairs: &BTreeSet<&(usize, usize)>,
    crosses: bool,
    prediction: &Side,
    target: &Side,
) -> Vec<Vec<(usize, usize)>> {
    let mut parts: Vec<Vec<(usize, usize)>> = Vec::new();
    for (place, of_target) in target.crops.iter().enumerate() {
        let students = prediction.crops.iter().enumerate();
        let with = students.filter(|(_, of_student)| pairs.contains(&(**of_student, *of_target)));
        let with = with.map(|(student, _)| (student, place));
        match parts.last_mut().filter(|_| !crosses) {
            Some(part) => part.extend(with),
            None => parts.push(with.collect()),
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

impl Side {
    /// The rows of some images, in this order.
    fn rows_of(
        &self,
        cx: &Context,
        tape: &mut Tape,
        level: usize,
        images: &[usize],
    ) -> maskalign_engine::Result<Tensor> {
        let x = &self.outputs[level];
        if images.len() == self.lengths.len() && images.iter().copied().eq(0..images.len()) {
            return Ok(x.clone());
        }
        let mut starts = vec![0];
        starts.extend(self.lengths.iter().scan(0, |end, length| {
            *end += length;
            Some(*end)
        }));
        let rows: Vec<u32> =
            images.iter().flat_map(|&image| (starts[image]..starts[image + 1]).map(|row| row as u32)).collect();
        ops::gather_rows(cx, tape, &[x], &rows)
    }
}

/// The objective whose map an objective goes through.
fn owner(objective: &PlannedObjective) -> &str {
    objective.shares.as_deref().unwrap_or(&objective.name)
}

/// A moving head at work.
struct Assigning<'a> {
    teacher: &'a dyn TeacherModel,
    tap: Tap,
    head: &'a dyn AlignerModel,
    sharpening: &'a Sharpening,
    epoch: u64,
}

impl Assigning<'_> {
    /// Centred and sharpened logits of the compared tokens, `None` where no image has one. Those of all tokens of their kind
    /// are added to the centre.
    fn logits(
        &self,
        cx: &Context,
        input: &TargetInput,
        level: &Level,
        center: &mut Center,
    ) -> maskalign_engine::Result<Option<Tensor>> {
        let shape = self.teacher.shape();
        let (batch, tokens) = (input.masks.batch, shape.tokens());
        let of_cls = input.tokens.cls;
        let kind = Tokens { cls: of_cls, visible: !of_cls, masked: false };
        let held = Tokens { cls: shape.cls_token, visible: true, masked: false };
        let (patches, per_image) = (shape.grid.patches(), if of_cls { 1 } else { shape.grid.patches() });
        // Some images at a time: the logits of all their patches are many.
        let at_a_time = (LOGITS / (per_image * center.sums.len())).clamp(1, batch);
        let off = &mut Tape::inference();
        let mut kept = Vec::new();
        for first in (0..batch).step_by(at_a_time) {
            let images = first..(first + at_a_time).min(batch);
            let rows: Vec<u32> = (images.start * tokens..images.end * tokens).map(|row| row as u32).collect();
            let x = ops::gather_rows(cx, off, &[&level.x], &rows)?;
            let x = self.teacher.tap(cx, &x, self.tap)?;
            let masks = Masks::all_visible(images.len(), patches);
            let head = AlignInput { levels: &[x], held, masks: &masks, tokens: kind };
            let logits = self.head.forward(cx, off, &head)?.swap_remove(0);
            center.add(&logits);
            if of_cls {
                kept.push(logits);
                continue;
            }
            let wanted = input.masks.pick(images).rows_among(input.tokens, false, patches);
            if !wanted.is_empty() {
                kept.push(ops::gather_rows(cx, off, &[&logits], &wanted)?);
            }
        }
        let rows: Vec<u32> = (0..kept.iter().map(Tensor::rows).sum::<usize>()).map(|row| row as u32).collect();
        let logits = match &kept[..] {
            [] => return Ok(None),
            [all] => all.clone(),
            _ => ops::gather_rows(cx, off, &kept.iter().collect::<Vec<_>>(), &rows)?,
        };
        let value = &center.value.value;
        let row = cx.tensor(value.to_vec(), 1, center.sums.len())?;
        let center = ops::broadcast_row(cx, off, &row, logits.rows())?;
        let centred = ops::sub(cx, off, &logits, &center)?;
        ops::scale(cx, off, &centred, self.sharpening.temperature_at(self.epoch).recip() as f32).map(Some)
    }
}

/// Logits that are held at once while a centre is computed.
const LOGITS: usize = 1 << 24;

impl Center {
    fn add(&mut self, logits: &Tensor) {
        let width = self.sums.len();
        for row in logits.values().chunks_exact(width) {
            self.sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += f64::from(*value));
        }
        self.rows += logits.rows();
    }

    /// Moves towards the mean of what was added since.
    fn follow(&mut self) -> maskalign_engine::Result<()> {
        if self.rows == 0 {
            return Ok(());
        }
        let (keep, rows) = (self.momentum, self.rows as f64);
        let old = self.value.value.to_vec();
        let new =
            old.iter().zip(&self.sums).map(|(old, sum)| (keep * f64::from(*old) + (1.0 - keep) * sum / rows) as f32);
        self.value.load(&new.collect::<Vec<f32>>())?;
        self.sums.fill(0.0);
        self.rows = 0;
        Ok(())
    }
}

impl Task for PretrainModel {
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        self.student.visit(f);
        for objective in &self.objectives {
            if let Some(aligner) = self.aligners.get_mut(&objective.name) {
                aligner.visit(f);
            }
        }
        self.teachers.values_mut().for_each(|taught| taught.teacher.visit(f));
        self.heads.values_mut().for_each(|head| head.visit(f));
        self.centers.values_mut().for_each(|center| f(&mut center.value));
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

    fn held_epochs(&self, parameter: &str) -> f64 {
        let several = self.objectives.len() > 1;
        let of = |objective: &PlannedObjective| {
            let own = if several { parameter.strip_prefix(&format!("{}.", objective.name)) } else { Some(parameter) };
            own.filter(|_| objective.shares.is_none()).map_or(0.0, |own| objective.aligner.held_epochs(own))
        };
        self.objectives.iter().map(of).fold(0.0, f64::max)
    }

    fn loss(&mut self, cx: &Context, tape: &mut Tape, batch: &MicroBatch) -> Result<Tensor> {
        self.freeze(batch.progress);
        let lesson = self.teach(cx, batch)?;
        let _span = tracing::info_span!("student").entered();
        let (depth, rate) = (self.student.shape().arch.depth, self.student.drop_path());
        let kept = |i: usize| self.kept.contains(&i);
        let mut predictions: Vec<Vec<Side>> = self.objectives.iter().map(|_| Vec::new()).collect();
        let mut last = None;
        for group in &self.groups {
            let (images, masks) = (images_of(batch, group), lesson.masks_of(group));
            let (seed, crops) = (self.seed, &self.crops);
            let streams = group.crops.iter().flat_map(|&crop| {
                let purpose = crops[crop].purpose(DROP_PATH);
                let stream = move |&image: &usize| Stream::new(seed, &purpose, batch.epoch, image as u64);
                batch.indices.iter().map(stream)
            });
            let scales = branch_scales_of(rate, depth, streams);
            let (seen, runs_at) = (Some(masks.seen()), self.crops[group.crops[0]].runs_at);
            let features = match runs_at == self.student.shape().image_size {
                true => self.student.forward(cx, tape, &images, seen, scales.as_ref(), &kept)?,
                false => self.student.forward_at(cx, tape, &images, runs_at, seen, scales.as_ref(), &kept)?,
            };
            let aligned = self.align(cx, tape, group, &features, &masks)?;
            predictions.iter_mut().zip(aligned).for_each(|(all, side)| all.extend(side));
            last = Some(features.last);
        }
        let (mut terms, mut weights, mut records) = (Vec::new(), Vec::new(), Vec::new());
        for ((objective, predictions), targets) in self.objectives.iter().zip(&predictions).zip(&lesson.targets) {
            if self.is_over(objective) {
                continue;
            }
            let weight = objective.weight.at(batch.progress) as f32;
            let compared = Self::compare(cx, tape, objective, predictions, targets)?;
            let mut distances = Vec::new();
            let mut value = 0.0;
            for (of_level, level_weight) in compared.into_iter().zip(&objective.level_weights) {
                let mut distance = 0.0;
                for (term, share) in of_level {
                    distance += f64::from(term.value()) * f64::from(share);
                    terms.push(term);
                    weights.push(weight * level_weight * share);
                }
                value += distance * f64::from(weight * level_weight);
                distances.push(distance);
            }
            let levels = objective.levels.iter().copied().zip(distances.iter().copied());
            records.push(Term {
                name: objective.name.clone(),
                value,
                // A target that is the mean of its levels has one distance, and one of relations several of one level.
                levels: levels.filter(|_| distances.len() > 1 && distances.len() == objective.levels.len()).collect(),
            });
        }
        self.terms.push(records);
        if let (true, Some(last)) = (terms.is_empty(), last) {
            // No image of the micro-batch has a token that is compared.
            terms.push(ops::mean(cx, tape, &last)?);
            weights.push(0.0);
        }
        Ok(ops::weighted_sum(cx, tape, &terms, &weights)?)
    }

    fn after_update(&mut self, cx: &Context, progress: f64) -> Result<()> {
        for taught in self.teachers.values_mut() {
            taught.teacher.after_update(cx, &mut *self.student, progress)?;
        }
        for ((teacher, owner), head) in &mut self.heads {
            let momentum = self.teachers.get(teacher).and_then(|taught| taught.teacher.momentum(progress));
            let (Some(momentum), Some(source)) = (momentum, self.aligners.get_mut(owner)) else { continue };
            follow(cx, &mut **head, &mut **source, momentum)?;
        }
        self.centers.values_mut().try_for_each(Center::follow)?;
        Ok(())
    }
}
