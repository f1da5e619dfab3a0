//! Students and targets.

use std::collections::BTreeMap;

use dfdx::prelude::{Cpu, HasShape};
use maskalign_registry::{StudentTag, TargetTag};

use super::{Faults, built, fused, same_bits};
use crate::{
    components::{
        students::StudentBuilder,
        targets::{TargetContext, TargetInput},
        tokens::{Masks, Tokens},
        towers::{PlanContext, TowerShape},
    },
    error::Result,
    images::ImageBatch,
    nn::{Arch, Grid, Init, Statistics},
    random::Stream,
    tape::Recorder,
};

fn images(batch: usize, size: usize) -> ImageBatch {
    let mut stream = Stream::new(0, "conformance images", 0, 0);
    let pixels = (0..batch * 3 * size * size).map(|_| stream.uniform() as f32).collect();
    ImageBatch { pixels, batch, size }
}

pub(super) fn student(text: &str, faults: &mut Faults) {
    let Some(builder) = built::<StudentTag>(text, faults) else { return };
    let students = BTreeMap::new();
    let sizes = [28, 32, 42, 224, 256];
    let plan = |data_size| PlanContext { data_size, students: &students, environment: false, random_weights: true };
    let Some(size) = sizes.into_iter().find(|&size| builder.plan(&plan(size)).is_ok()) else {
        let refusal = builder.plan(&plan(224)).err().map(|refusal| refusal.to_string()).unwrap_or_default();
        return faults.add(format_args!("its example refuses images of {sizes:?} pixels: {refusal}"));
    };
    if let Err(error) = run_student(&*builder, &plan(size), faults) {
        faults.add(format_args!("at {size} pixels: {error}"));
    }
}

fn run_student(builder: &dyn StudentBuilder<Cpu>, plan: &PlanContext, faults: &mut Faults) -> Result<()> {
    let (cx, dev) = (fused(), Cpu::default());
    let shape = builder.plan(plan)?;
    let mut student = builder.build(plan, &Init::new(&dev, 1, "conformance"))?;
    faults.unless(student.shape() == shape, "the shape it is built with is not the planned one");
    let planned = builder.build(plan, &Init::shapes(&dev))?.shapes();
    faults.unless(planned == student.shapes(), "its parameters differ between `Init::shapes` and `Init::new`");
    let images = images(2, plan.data_size);
    let patches = shape.grid.patches();
    let kept = patches.div_ceil(3);
    let visible: Vec<u32> =
        (0..2).flat_map(|image| (0..kept).map(move |i| ((i * 2 + image) % patches) as u32)).collect();
    for (visible, tokens) in [(None, patches), (Some(&visible[..]), kept)] {
        let rows = 2 * (tokens + usize::from(shape.cls_token));
        let run = || -> Result<(usize, usize, Vec<f32>)> {
            let features = student.forward(&cx, &mut Recorder::inference(), &images, visible, None, &|_| true)?;
            let x = student.norm(&cx, &mut Recorder::inference(), &features.last)?;
            let (rows, columns) = *x.shape();
            Ok((rows, columns, x.as_vec()))
        };
        let (got, columns, values) = run()?;
        faults.unless(
            (got, columns) == (rows, shape.arch.dim),
            format_args!("{tokens} patches of 2 images give {:?}, not {:?}", (got, columns), (rows, shape.arch.dim)),
        );
        faults.unless(values.iter().all(|v| v.is_finite()), "its hidden states are not finite");
        faults.unless(same_bits(&values, &run()?.2), "its hidden states differ from call to call");
    }
    Ok(())
}

pub(super) fn target(text: &str, faults: &mut Faults) {
    let Some(target) = built::<TargetTag>(text, faults) else { return };
    let shape = TowerShape {
        arch: Arch { dim: 12, depth: 3, heads: 3, mlp: 20, patch: 2 },
        grid: Grid { rows: 5, columns: 5 },
        image_size: 10,
        cls_token: true,
        projection: None,
        statistics: Statistics::IMAGENET,
    };
    let teachers = BTreeMap::new();
    let tokens = Tokens { cls: false, visible: true, masked: true };
    let plan = match target.plan(&TargetContext { student: shape, teachers: &teachers, tokens }) {
        // One that reads a teacher refuses, as there is none here; the end-to-end tests run those.
        Err(_) => return,
        Ok(plan) => plan,
    };
    faults.unless(plan.outputs > 0 && plan.width > 0, "it plans no output");
    if plan.teacher.is_some() {
        return;
    }
    let images = images(2, shape.image_size);
    let masks = Masks { batch: 2, visible: vec![3, 0, 7, 24, 1, 2], masked: vec![5, 6, 9, 10] };
    let input = TargetInput { images: &images, masks: &masks, tokens, student: shape, teacher: None };
    let Some(outputs) = faults.expect("computing it", target.outputs(&fused(), &plan, &input)) else { return };
    faults.unless(
        outputs.len() == plan.outputs,
        format_args!("it gives {} outputs, not {}", outputs.len(), plan.outputs),
    );
    for output in &outputs {
        faults.unless(
            *output.shape() == (10, plan.width),
            format_args!("an output is {:?}, not {:?}", output.shape(), (10, plan.width)),
        );
        faults.unless(output.as_vec().iter().all(|v| v.is_finite()), "an output is not finite");
    }
}
