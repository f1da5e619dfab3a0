//! Aligners: shapes for odd sizes, gradients, determinism, save and load.

use maskalign_engine::{
    Context, Device, Tape, Tensor,
    ops::{self, Distance},
    random::Stream,
};
use maskalign_registry::AlignerTag;

use super::{
    Faults, LARGE, ROUND_OFF, built, composed, count, fused, matrix, moved, normal, relative_difference, same_bits,
    slope_error, square_sum,
};
use maskalign_core::{
    components::{
        aligners::{AlignInput, AlignPlan, Aligner, AlignerModel},
        maskers::{Counts, Mask},
        relations::{Relation, Relations},
        tokens::{Masks, Tokens},
        towers::TowerShape,
    },
    error::Result,
    nn::{Arch, FinalNorm, Grid, Init, MaskedPatches, Statistics},
};

/// Prefixes of a vision transformer's parameter names. An alignment's parameters are stored beside them in checkpoints.
const TOWER: [&str; 6] = ["cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.", "norm_pre."];
const BATCH: usize = 3;
const COUNTS: Counts = Counts { visible: 7, masked: 11 };

/// What stages ask of aligners, at odd sizes. An aligner may refuse some of it, but not all.
fn plans() -> Vec<AlignPlan> {
    let tokens = |cls, visible, masked| Tokens { cls, visible, masked };
    let grid = Grid { rows: 5, columns: 5 };
    let student = |cls_token| TowerShape {
        arch: Arch { dim: 12, depth: 3, heads: 3, mlp: 20, patch: 2 },
        grid,
        image_size: 10,
        cls_token,
        learned_positions: false,
        masked_patches: MaskedPatches::Drop,
        layer_scale: None,
        final_norm: FinalNorm::Own,
        projection: None,
        statistics: Statistics::IMAGENET,
        eps: 1e-6,
    };
    let plan = |cls_token, tokens, target_depth, target_levels: &[usize], wanted: &[usize]| AlignPlan {
        relations: None,
        blocks: 1,
        student: student(cls_token),
        counts: COUNTS,
        tokens,
        target_depth,
        target_levels: target_levels.to_vec(),
        outputs: target_levels.len(),
        wanted: wanted.to_vec(),
        width: 9,
    };
    let mut plans = Vec::new();
    for groups in [
        tokens(true, true, false),
        tokens(false, true, false),
        tokens(true, false, false),
        tokens(false, false, true),
        tokens(false, true, true),
        tokens(true, true, true),
    ] {
        for cls_token in [true, false] {
            plans.push(plan(cls_token, groups, 3, &[0, 1, 2], &[0, 1, 2]));
            plans.push(plan(cls_token, groups, 3, &[0, 1, 2], &[0, 2]));
            plans.push(plan(cls_token, groups, 5, &[1, 4], &[0, 1]));
            plans.push(plan(cls_token, groups, 1, &[0], &[0]));
        }
    }
    plans
}

/// The same of targets of relations, for aligners of those.
fn relation_plans() -> Vec<AlignPlan> {
    let relations = Relations { of: vec![Relation::Qk, Relation::Vv], heads: 4 };
    let one_level = plans().into_iter().filter(|plan| plan.outputs == 1);
    one_level
        .map(|plan| AlignPlan {
            outputs: 2,
            wanted: vec![0, 1],
            width: plan.tokens.count(plan.counts.visible, plan.counts.masked),
            relations: Some(relations.clone()),
            ..plan
        })
        .collect()
}

/// Rows of each output for each compared token.
fn rows_of_a_token(plan: &AlignPlan) -> usize {
    plan.relations.as_ref().map_or(1, |relations| relations.heads)
}

pub(super) fn check(text: &str, faults: &mut Faults) {
    let Some(builder) = built::<AlignerTag>(text, faults) else { return };
    if builder.shares().is_some() {
        // It is planned by the objective whose it is.
        return;
    }
    let mut refusals = Vec::new();
    let mut accepted = Vec::new();
    let tried = if builder.relates() { relation_plans() } else { plans() };
    for plan in tried {
        match builder.plan(&plan) {
            Ok(_) => accepted.push(plan),
            Err(refusal) => refusals.push(refusal.to_string()),
        }
    }
    if accepted.is_empty() {
        refusals.sort_unstable();
        refusals.dedup();
        return faults.add(format_args!("it refuses every plan that was tried: {}", refusals.join("; ")));
    }
    let large = accepted.first().is_some_and(|plan| {
        let aligner = builder.plan(plan).map(|planned| planned.build(&Init::shapes()));
        aligner.is_ok_and(|aligner| aligner.is_ok_and(|mut aligner| count(&aligner.shapes()) > LARGE))
    });
    let tried = if large { 1 } else { accepted.len() };
    for plan in &accepted[..tried] {
        let before = faults.0.len();
        if let Err(error) = check_plan(&*builder, plan, faults) {
            faults.add(format_args!("{}: {error}", describe(plan)));
        }
        // The other plans would say it again.
        if faults.0.len() > before {
            return;
        }
    }
}

fn describe(plan: &AlignPlan) -> String {
    let groups = [("cls", plan.tokens.cls), ("visible", plan.tokens.visible), ("masked", plan.tokens.masked)];
    let groups: Vec<&str> = groups.into_iter().filter(|group| group.1).map(|group| group.0).collect();
    format!(
        "tokens {}, outputs {:?} of target levels {:?} of {}, {} class token",
        groups.join(" "),
        plan.wanted,
        plan.target_levels,
        plan.target_depth,
        if plan.student.cls_token { "with a" } else { "without" }
    )
}

/// One forward pass's inputs.
struct Trial {
    levels: Vec<Tensor>,
    targets: Vec<Tensor>,
    masks: Masks,
    held: Tokens,
    tokens: Tokens,
}

impl Trial {
    fn new(plan: &AlignPlan, levels: usize) -> Self {
        let held = plan.student.held();
        let masks: Vec<Mask> = (0..BATCH as u64)
            .map(|image| {
                let order = Stream::new(0, "conformance mask", 0, image).permutation(plan.student.grid.patches());
                let mut order = order.into_iter().map(|i| i as u32);
                Mask {
                    visible: order.by_ref().take(plan.counts.visible).collect(),
                    masked: order.take(plan.counts.masked).collect(),
                }
            })
            .collect();
        let (rows, dim) = (BATCH * held.count(plan.counts.visible, plan.counts.masked), plan.student.arch.dim);
        // Queries, keys and values are side by side.
        let dim = if plan.relations.is_some() { 3 * dim } else { dim };
        let wanted = rows_of_a_token(plan) * BATCH * plan.tokens.count(plan.counts.visible, plan.counts.masked);
        let random =
            |what: &str, i: usize, rows, columns| matrix(rows, columns, normal(&format!("{what} {i}"), rows * columns));
        Trial {
            levels: (0..levels).map(|i| random("level", i, rows, dim).tracked()).collect(),
            targets: plan.wanted.iter().map(|&i| random("target", i, wanted, plan.width)).collect(),
            masks: Masks::join(&masks),
            held,
            tokens: plan.tokens,
        }
    }

    fn outputs(
        &self,
        cx: &Context,
        tape: &mut Tape,
        aligner: &dyn AlignerModel,
    ) -> maskalign_engine::Result<Vec<Tensor>> {
        let input = AlignInput { levels: &self.levels, held: self.held, masks: &self.masks, tokens: self.tokens };
        aligner.forward(cx, tape, &input)
    }

    /// Every output's values, without a gradient.
    fn values(&self, cx: &Context, aligner: &dyn AlignerModel) -> Result<Vec<f32>> {
        let outputs = self.outputs(cx, &mut Tape::inference(), aligner)?;
        Ok(outputs.iter().flat_map(|output| output.to_vec()).collect())
    }

    /// The squared distance of all outputs from their targets, and its gradients with respect to parameters and levels.
    fn gradients(
        &self,
        cx: &Context,
        aligner: &mut dyn AlignerModel,
    ) -> Result<(f32, Vec<(String, bool, Vec<f32>)>, Vec<Vec<f32>>)> {
        let mut recorder = Tape::training();
        let outputs = self.outputs(cx, &mut recorder, aligner)?;
        let mut terms = Vec::new();
        for (output, target) in outputs.iter().zip(&self.targets) {
            terms.push(ops::distance(cx, &mut recorder, output, target, Distance::Mse)?);
        }
        let loss = ops::weighted_sum(cx, &mut recorder, &terms, &vec![1.0; terms.len()])?;
        let gradients = recorder.backward(&loss)?;
        let mut parameters = Vec::new();
        aligner.visit(&mut |p| {
            let slope = if p.is_trained() { gradients.to_vec(&p.value) } else { Vec::new() };
            parameters.push((p.name.clone(), p.is_trained(), slope));
        });
        let levels = self.levels.iter().map(|level| gradients.to_vec(level)).collect();
        Ok((loss.value(), parameters, levels))
    }
}

fn check_plan(builder: &dyn Aligner, plan: &AlignPlan, faults: &mut Faults) -> Result<()> {
    let here = describe(plan);
    let planned = builder.plan(plan)?;
    let (cx, dev) = (fused(), Device::Cpu);
    let build = |seed| planned.build(&Init::new(&dev, seed, "conformance"));
    let mut aligner = build(1)?;
    let trial = Trial::new(plan, planned.needs().levels.len());

    let outputs = trial.outputs(&cx, &mut Tape::inference(), &*aligner)?;
    if outputs.len() != plan.wanted.len() {
        faults.add(format_args!("{here}: it gives {} outputs, not {}", outputs.len(), plan.wanted.len()));
        return Ok(());
    }
    let rows = rows_of_a_token(plan) * BATCH * plan.tokens.count(plan.counts.visible, plan.counts.masked);
    for output in &outputs {
        if output.shape() != (rows, plan.width) {
            faults.add(format_args!("{here}: an output is {:?}, not {:?}", output.shape(), (rows, plan.width)));
            return Ok(());
        }
    }

    // The names are those of checkpoints, and known without building.
    let shapes = aligner.shapes();
    let mut names: Vec<&String> = shapes.iter().map(|(name, _)| name).collect();
    names.sort();
    for pair in names.windows(2).filter(|pair| pair[0] == pair[1]) {
        faults.add(format_args!("{here}: two parameters are called `{}`", pair[0]));
    }
    for name in names.into_iter().filter(|name| TOWER.iter().any(|part| name.starts_with(part))) {
        faults.add(format_args!("{here}: `{name}` is what a student calls a parameter of its own"));
    }
    faults.unless(
        planned.build(&Init::shapes())?.shapes() == shapes,
        format_args!("{here}: its parameters differ between `Init::shapes` and `Init::new`"),
    );

    let first = trial.values(&cx, &*aligner)?;
    faults.unless(first.iter().all(|v| v.is_finite()), format_args!("{here}: an output is not finite"));
    faults.unless(
        same_bits(&first, &trial.values(&cx, &*aligner)?),
        format_args!("{here}: outputs differ from call to call"),
    );
    let again = trial.values(&cx, &*build(1)?)?;
    faults.unless(
        same_bits(&first, &again),
        format_args!("{here}: outputs differ between two that were built from one seed"),
    );
    let apart = relative_difference(&first, &trial.values(&composed(), &*aligner)?);
    faults.unless(
        apart < ROUND_OFF,
        format_args!("{here}: outputs differ by {apart:.1e} between the CPU's and the composed operators"),
    );

    let mut other = build(2)?;
    let saved = aligner.to_host();
    other.load(&saved)?;
    faults.unless(
        same_bits(&first, &trial.values(&cx, &*other)?),
        format_args!("{here}: outputs differ after saving and loading"),
    );

    let (_, parameters, levels) = trial.gradients(&cx, &mut *aligner)?;
    for (name, _, slope) in parameters.iter().filter(|parameter| parameter.1) {
        faults.unless(
            slope.iter().any(|v| *v != 0.0),
            format_args!("{here}: no gradient reaches `{name}`; where it has no part, call `set_trained(false)`"),
        );
        faults.unless(
            slope.iter().all(|v| v.is_finite()),
            format_args!("{here}: the gradient of `{name}` is not finite"),
        );
    }
    for (i, slope) in levels.iter().enumerate() {
        faults.unless(
            slope.iter().any(|v| *v != 0.0),
            format_args!("{here}: no gradient reaches level {i}, which it asks for"),
        );
    }
    slopes(&cx, &mut *aligner, trial, &parameters, &levels, &here, faults)
}

/// Checks the gradient against a finite difference along its own direction, over all parameters and inputs at once.
fn slopes(
    cx: &Context,
    aligner: &mut dyn AlignerModel,
    mut trial: Trial,
    parameters: &[(String, bool, Vec<f32>)],
    levels: &[Vec<f32>],
    here: &str,
    faults: &mut Faults,
) -> Result<()> {
    let norm = (parameters.iter().map(|p| square_sum(&p.2)).sum::<f64>()
        + levels.iter().map(|level| square_sum(level)).sum::<f64>())
    .sqrt();
    if norm == 0.0 {
        return Ok(());
    }
    let start = aligner.to_host();
    let level_values: Vec<Vec<f32>> = trial.levels.iter().map(|level| level.to_vec()).collect();
    let off = slope_error(norm, |distance| {
        let mut loaded = Ok(());
        let mut slope = parameters.iter();
        aligner.visit(&mut |p| {
            if let (Some((name, true, slope)), Some(values)) = (slope.next(), start.get(&p.name)) {
                debug_assert_eq!(*name, p.name);
                loaded = loaded.clone().and(p.load(&moved(&values.data, slope, distance, norm)));
            }
        });
        for ((level, values), slope) in trial.levels.iter_mut().zip(&level_values).zip(levels) {
            let (rows, columns) = level.shape();
            *level = matrix(rows, columns, moved(values, slope, distance, norm)).tracked();
        }
        loaded?;
        Ok(trial.gradients(cx, aligner)?.0)
    })?;
    aligner.load(&start)?;
    faults.unless(
        off < 0.05,
        format_args!("{here}: its gradients are off by {:.0} % from finite differences", 100.0 * off),
    );
    Ok(())
}
