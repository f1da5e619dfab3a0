//! Students and teachers: shapes, determinism, gradients, saving, agreement of CPU and composed forms.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use maskalign_engine::{
    Context, Device, ImageBatch, Tape,
    ops::{self, Distance},
    random::Stream,
};
use maskalign_registry::{Kind, Refusal, Registry, Slot, StudentTag, TeacherTag};

use super::{
    Faults, LARGE, ROUND_OFF, built, composed, count, fused, matrix, moved, normal, relative_difference, same_bits,
    slope_error, square_sum,
};
use maskalign_core::{
    components::{
        students::{PlannedStudent, Student, StudentModel},
        teachers::{PlannedTeacher, TeacherBuild, TeacherModel, Wants},
        tokens::{Masks, Tokens},
        towers::{Environment, MissingWeights, PlanContext, StudentPlan, TowerShape, TrainedStudents},
    },
    error::{Error, Result},
    nn::{Init, Reach, Role, SeenPatches},
    plugin::Build,
};

/// Sides of images in pixels; a tower must accept one of them.
const SIZES: [usize; 5] = [28, 32, 42, 224, 256];

pub(super) fn images(batch: usize, size: usize) -> ImageBatch {
    let mut stream = Stream::new(0, "conformance images", 0, 0);
    let pixels = (0..batch * 3 * size * size).map(|_| stream.uniform() as f32).collect();
    ImageBatch { pixels, batch, size }
}

/// The context to plan a tower by itself: images of this size, no environment, no weights.
fn plan_alone(data_size: usize, students: &BTreeMap<String, StudentPlan>) -> PlanContext<'_> {
    PlanContext {
        data_size,
        students,
        student: None,
        environment: Environment::Ignored,
        missing_weights: MissingWeights::Random,
    }
}

/// The first size that a tower accepts.
fn fitting_size(plan: impl Fn(usize) -> Result<TowerShape, Refusal>, faults: &mut Faults) -> Option<usize> {
    let size = SIZES.into_iter().find(|&size| plan(size).is_ok());
    if size.is_none() {
        let refusal = plan(224).err().map(|refusal| refusal.to_string()).unwrap_or_default();
        faults.add(format_args!("its example refuses images of {SIZES:?} pixels: {refusal}"));
    }
    size
}

pub(super) fn student(text: &str, faults: &mut Faults) {
    let Some(builder) = built::<StudentTag>(text, faults) else { return };
    let students = BTreeMap::new();
    let plan = |data_size| plan_alone(data_size, &students);
    let Some(size) = fitting_size(|size| builder.plan(&plan(size)).map(|planned| planned.shape()), faults) else {
        return;
    };
    if let Err(error) = run_student(&*builder, &plan(size), faults) {
        faults.add(format_args!("at {size} pixels: {error}"));
    }
}

fn run_student(builder: &dyn Student, plan: &PlanContext, faults: &mut Faults) -> Result<()> {
    let (cx, dev) = (fused(), Device::Cpu);
    let planned = builder.plan(plan)?;
    let (shape, trained) = (planned.shape(), TrainedStudents::default());
    let mut student = planned.build(&Init::new(&dev, 1, "conformance"), &trained)?;
    faults.unless(student.shape() == shape, "the shape it is built with is not the planned one");
    let shapes = planned.build(&Init::shapes(), &trained)?.shapes();
    faults.unless(shapes == student.shapes(), "its parameters differ between `Init::shapes` and `Init::new`");
    let images = images(2, plan.data_size);
    let patches = shape.grid.patches();
    let kept = patches.div_ceil(3);
    let group = |first: usize, each: usize| -> Vec<u32> {
        (0..2).flat_map(|image| (first..first + each).map(move |i| ((i * 2 + image) % patches) as u32)).collect()
    };
    // Even and odd grids alike: a third of the patches each, none of them twice.
    let (visible, masked) = (group(0, kept), group(kept, kept.min(patches.div_ceil(2) - kept)));
    let seen = SeenPatches { visible: &visible, masked: &masked, uneven: None };
    for (seen, tokens) in [(None, shape.tokens()), (Some(seen), shape.held().count(kept, masked.len() / 2))] {
        let rows = 2 * tokens;
        let run = || -> Result<(usize, usize, Vec<f32>)> {
            let features = student.forward(&cx, &mut Tape::inference(), &images, seen, None, &|_| true)?;
            let x = student.norm(&cx, &mut Tape::inference(), &features.last)?;
            let (rows, columns) = x.shape();
            Ok((rows, columns, x.to_vec()))
        };
        let (got, columns, values) = run()?;
        faults.unless(
            (got, columns) == (rows, shape.arch.dim),
            format_args!("{tokens} tokens of 2 images give {:?}, not {:?}", (got, columns), (rows, shape.arch.dim)),
        );
        faults.unless(values.iter().all(|v| v.is_finite()), "its hidden states are not finite");
        faults.unless(same_bits(&values, &run()?.2), "its hidden states differ from call to call");
    }
    let shapes = student.shapes();
    if count(&shapes) > LARGE {
        return Ok(());
    }
    let trial = Trial { images: &images, seen };
    let values = trial.values(&cx, &*student)?;
    let apart = relative_difference(&values, &trial.values(&composed(), &*student)?);
    faults.unless(
        apart < ROUND_OFF,
        format_args!("its hidden states differ by {apart:.1e} between the CPU's and the composed operators"),
    );
    let mut other = planned.build(&Init::new(&dev, 2, "conformance"), &trained)?;
    other.load(&student.to_host())?;
    faults
        .unless(same_bits(&values, &trial.values(&cx, &*other)?), "its hidden states differ after saving and loading");
    check_reach(&cx, &mut *student, &trial, faults)?;
    check_gradients(&cx, &mut *student, &trial, faults)
}

/// Two images, and the patches of each that are seen.
struct Trial<'a> {
    images: &'a ImageBatch,
    seen: SeenPatches<'a>,
}

impl Trial<'_> {
    /// The last hidden states after the final norm.
    fn values(&self, cx: &Context, student: &dyn StudentModel) -> Result<Vec<f32>> {
        let off = &mut Tape::inference();
        let features = student.forward(cx, off, self.images, Some(self.seen), None, &|_| false)?;
        Ok(student.norm(cx, off, &features.last)?.to_vec())
    }

    /// The squared distance of those from fixed values, and its gradient with respect to every trained parameter.
    fn gradients(&self, cx: &Context, student: &mut dyn StudentModel) -> Result<(f32, Vec<(String, Vec<f32>)>)> {
        let mut tape = Tape::training();
        let features = student.forward(cx, &mut tape, self.images, Some(self.seen), None, &|_| false)?;
        let x = student.norm(cx, &mut tape, &features.last)?;
        let (rows, columns) = x.shape();
        let target = matrix(rows, columns, normal("student", rows * columns));
        let loss = ops::distance(cx, &mut tape, &x, &target, Distance::Mse)?;
        let gradients = tape.backward(&loss)?;
        let mut found = Vec::new();
        student.visit(&mut |p| {
            if p.is_trained() {
                found.push((p.name.clone(), gradients.to_vec(&p.value)));
            }
        });
        Ok((loss.value(), found))
    }
}

/// A student that runs only its first block gives the same as that block in the whole tower.
fn check_reach(cx: &Context, student: &mut dyn StudentModel, trial: &Trial, faults: &mut Faults) -> Result<()> {
    let first = |student: &dyn StudentModel| -> Result<Vec<f32>> {
        let off = &mut Tape::inference();
        let features = student.forward(cx, off, trial.images, Some(trial.seen), None, &|i| i == 0)?;
        Ok(features.hidden.get(&0).map(|x| x.to_vec()).unwrap_or_default())
    };
    let trained = |student: &mut dyn StudentModel| {
        let mut count = 0;
        student.visit(&mut |p| count += usize::from(p.is_trained()));
        count
    };
    let whole = Reach { blocks: student.shape().arch.depth, norm: true, qkv: false };
    student.set_reach(whole);
    let (expected, all) = (first(student)?, trained(student));
    student.set_reach(Reach { blocks: 1, ..Reach::default() });
    faults.unless(same_bits(&expected, &first(student)?), "its first block differs when it is to run alone");
    faults.unless(trained(student) < all, "it trains parameters that `set_reach` says no loss needs");
    student.set_reach(whole);
    Ok(())
}

/// Every trained parameter has a gradient, and together the gradients agree with finite differences.
fn check_gradients(cx: &Context, student: &mut dyn StudentModel, trial: &Trial, faults: &mut Faults) -> Result<()> {
    let (_, slopes) = trial.gradients(cx, student)?;
    for (name, slope) in &slopes {
        faults.unless(
            slope.iter().any(|v| *v != 0.0) && slope.iter().all(|v| v.is_finite()),
            format_args!("no finite gradient reaches `{name}`; where it has no part, call `set_trained(false)`"),
        );
    }
    let norm = slopes.iter().map(|(_, slope)| square_sum(slope)).sum::<f64>().sqrt();
    if norm == 0.0 {
        return Ok(());
    }
    let start = student.to_host();
    let off = slope_error(norm, |distance| {
        let mut loaded = Ok(());
        let mut slopes = slopes.iter();
        student.visit(&mut |p| {
            if p.is_trained()
                && let Some((name, slope)) = slopes.next()
            {
                loaded = loaded.clone().and(p.load(&moved(&start[name].data, slope, distance, norm)));
            }
        });
        loaded?;
        Ok(trial.gradients(cx, student)?.0)
    })?;
    student.load(&start)?;
    faults.unless(off < 0.05, format_args!("its gradients are off by {:.0} % from finite differences", 100.0 * off));
    Ok(())
}

pub(super) fn teacher(text: &str, faults: &mut Faults) {
    let Some(builder) = built::<TeacherTag>(text, faults) else { return };
    let students = BTreeMap::new();
    let plan = |size| {
        let student = small_student(size);
        builder.plan(&PlanContext { student: Some(&student), ..plan_alone(size, &students) })
    };
    let Some(size) = fitting_size(|size| plan(size).map(|planned| planned.shape()), faults) else { return };
    let outcome = plan(size).map_err(Error::from).and_then(|planned| run_teacher(&*planned, size, faults));
    if let Err(error) = outcome {
        faults.add(format_args!("at {size} pixels: {error}"));
    }
}

/// What a teacher gives for two images.
struct Taught {
    attention: Vec<f32>,
    /// Every token of each level, `[batch * tokens, channels]`.
    whole: Vec<Vec<f32>>,
    /// The compared rows of the last level.
    compared: Vec<f32>,
    /// Queries, keys and values of the first block and the last, where the teacher gives them.
    qkv: Vec<Option<Vec<f32>>>,
}

/// A student for tests of other components, for images of `size` pixels; it has a class token.
pub(super) fn small_student(size: usize) -> Arc<dyn PlannedStudent> {
    let patch = if size.is_multiple_of(7) { 7 } else { 8 };
    let text = format!("{{ type: vit, arch: {{ dim: 12, depth: 2, heads: 3, patch: {patch} }} }}");
    let registry = Registry::global().expect("checked before");
    let options = registry.component(Kind::Student, "small", &text).expect("a student of ours");
    let slot: Slot<StudentTag> = serde_json::from_value(options).expect("with its defaults");
    let student = slot.build().and_then(|student| student.plan(&plan_alone(size, &BTreeMap::new())));
    student.expect("a student of ours for images of these sizes")
}

fn run_teacher(planned: &dyn PlannedTeacher, size: usize, faults: &mut Faults) -> Result<()> {
    let (shape, trained) = (planned.shape(), TrainedStudents::default());
    if 12 * shape.arch.depth * shape.arch.dim.pow(2) > LARGE {
        return Ok(());
    }
    let (images, patches) = (images(2, size), shape.grid.patches());
    let small = small_student(size);
    let student = |seed| small.build(&Init::new(&Device::Cpu, seed, "conformance"), &trained);
    let tokens = Tokens { cls: shape.cls_token, visible: true, masked: false };
    let visible: Vec<u32> = [0, 1].into_iter().chain([patches as u32 - 1, 0]).collect();
    let masks = Masks::even(2, visible, Vec::new());
    let last = shape.arch.depth - 1;
    let run = |cx: &Context| -> Result<(TowerShape, Taught)> {
        let mut student = student(1)?;
        let mut build = TeacherBuild { cx, trained: &trained, student: Some((&small, &mut *student)) };
        let teacher = planned.build(&mut build)?;
        let attention = planned.gives_attention();
        let wants = Wants { levels: (0..=last).collect(), attention, whole: true, ..Wants::default() };
        let mut pass = teacher.begin(cx, &images, &wants)?;
        let attention = std::mem::take(&mut pass.attention);
        let whole = teacher.finish(cx, pass, &wants, &masks)?.into_values().map(|level| level.x.to_vec()).collect();
        let wants = Wants { levels: [last].into(), tokens, ..Wants::default() };
        let pass = teacher.begin(cx, &images, &wants)?;
        let compared = teacher.finish(cx, pass, &wants, &masks)?.remove(&last).map(|level| match level.only {
            Some(_) => level.x.to_vec(),
            None => compared_rows(&level.x.to_vec(), &masks, &shape),
        });
        let mut qkv = Vec::new();
        if planned.gives_qkv() {
            let wants = Wants { qkv: [0, last].into(), ..Wants::default() };
            let pass = teacher.begin(cx, &images, &wants)?;
            for &block in &wants.qkv {
                qkv.push(teacher.queries_keys_values(cx, &pass, block)?.map(|x| x.to_vec()));
            }
        }
        Ok((teacher.shape(), Taught { attention, whole, compared: compared.unwrap_or_default(), qkv }))
    };
    let (built, taught) = run(&fused())?;
    faults.unless(
        built.arch == shape.arch && built.grid == shape.grid,
        "the shape it is built with is not the planned one",
    );
    let (width, all) = (shape.arch.dim, shape.tokens());
    for level in &taught.whole {
        let wanted = 2 * all * width;
        faults.unless(level.len() == wanted, format_args!("a level holds {} values, not {wanted}", level.len()));
        faults.unless(level.iter().all(|v| v.is_finite()), "a level is not finite");
    }
    for qkv in &taught.qkv {
        let len = qkv.as_ref().map_or(0, Vec::len);
        let wanted = 2 * all * 3 * width;
        faults.unless(len == wanted, format_args!("queries, keys and values are {len} numbers, not {wanted}"));
    }
    if planned.gives_attention() {
        let sums = taught.attention.chunks(patches).map(|image| image.iter().sum::<f32>());
        faults.unless(
            taught.attention.len() == 2 * patches && sums.clone().all(|sum| sum > 0.0 && sum <= 1.0 + 1e-4),
            "its attention is no share for each patch",
        );
    }
    let expected = compared_rows(&taught.whole[last], &masks, &shape);
    let apart = relative_difference(&expected, &taught.compared);
    faults.unless(
        expected.len() == taught.compared.len() && apart < ROUND_OFF,
        format_args!("the compared rows differ by {apart:.1e} from the same rows of all"),
    );
    let again = run(&fused())?.1;
    let same = taught.whole.iter().zip(&again.whole).all(|(a, b)| same_bits(a, b));
    faults.unless(same, "its levels differ from call to call");
    let other = run(&composed())?.1;
    let mut apart = relative_difference(&taught.attention, &other.attention);
    for (a, b) in taught.whole.iter().zip(&other.whole) {
        apart = apart.max(relative_difference(a, b));
    }
    for (a, b) in taught.qkv.iter().flatten().zip(other.qkv.iter().flatten()) {
        apart = apart.max(relative_difference(a, b));
    }
    faults.unless(
        apart < ROUND_OFF,
        format_args!("its levels differ by {apart:.1e} between the CPU's and the composed operators"),
    );
    let build = |student: &mut dyn StudentModel| {
        planned.build(&mut TeacherBuild { cx: &fused(), trained: &trained, student: Some((&small, student)) })
    };
    check_movement(&build, student(1)?, student(2)?, faults)
}

/// The rows of the class token and the visible patches, out of the rows of all tokens.
fn compared_rows(whole: &[f32], masks: &Masks, shape: &TowerShape) -> Vec<f32> {
    let (width, tokens) = (shape.arch.dim, Tokens { cls: shape.cls_token, visible: true, masked: false });
    let rows = masks.rows(tokens, shape.cls_token);
    let each = rows.len() / masks.batch;
    let row = |(i, token): (usize, &u32)| {
        let start = (i / each * shape.tokens() + *token as usize) * width;
        whole[start..start + width].to_vec()
    };
    rows.iter().enumerate().flat_map(row).collect()
}

/// The parameters that change after an update have the role `Moving`, and hold all of the teacher's state.
fn check_movement(
    build: &dyn Fn(&mut dyn StudentModel) -> Result<Box<dyn TeacherModel>>,
    mut before: Box<dyn StudentModel>,
    mut after: Box<dyn StudentModel>,
    faults: &mut Faults,
) -> Result<()> {
    let mut teacher = build(&mut *before)?;
    let start = teacher.to_host();
    teacher.after_update(&fused(), &mut *after, 0.5)?;
    let mut moving = BTreeSet::new();
    teacher.visit(&mut |p| match p.role() {
        Role::Frozen => {
            let stays = same_bits(&start[&p.name].data, &p.to_host().data);
            faults.unless(stays, format_args!("an update changes `{}`, whose role is `Frozen`", p.name));
        }
        Role::Moving => {
            moving.insert(p.name.clone());
        }
        role => faults.add(format_args!("`{}` has the role {role:?}: a teacher's are `Frozen` or `Moving`", p.name)),
    });
    if moving.is_empty() {
        return Ok(());
    }
    let saved = teacher.to_host();
    let mut again = build(&mut *before)?;
    again.load(&saved)?;
    for teacher in [&mut teacher, &mut again] {
        teacher.after_update(&fused(), &mut *after, 0.75)?;
    }
    let (one, other) = (teacher.to_host(), again.to_host());
    let differ = moving.iter().find(|name| !same_bits(&one[*name].data, &other[*name].data));
    if let Some(name) = differ {
        faults.add(format_args!(
            "its parameters do not hold all of its state: `{name}` differs after saving and loading"
        ));
    }
    Ok(())
}
