//! Targets: shapes, determinism, agreement of CPU and composed forms.

use std::collections::BTreeMap;

use maskalign_engine::{Context, ops::Act};
use maskalign_registry::{Kind, TargetTag};

use super::{Faults, ROUND_OFF, built, composed, fused, relative_difference, same_bits, tower::images};
use maskalign_core::{
    components::{
        maskers::Counts,
        targets::{PlannedTarget, TargetContext, TargetInput, TargetSource},
        teachers::{Level, TeacherModel, TowerTeacher, Wants},
        tokens::{Masks, Tokens},
        towers::{TowerShape, input},
    },
    error::Result,
    nn::{Arch, Bias, FinalNorm, Init, MaskedPatches, Statistics, Vit, VitConfig},
};

/// A tower small enough to run quickly, and deep enough for the levels that papers use.
fn config() -> VitConfig {
    VitConfig {
        arch: Arch { dim: 12, depth: 12, heads: 3, mlp: 20, patch: 2 },
        input: input(10, Statistics::IMAGENET),
        cls_token: true,
        learned_positions: true,
        pre_norm: true,
        patch_bias: Bias::With,
        layer_scale: None,
        masked_patches: MaskedPatches::Drop,
        final_norm: FinalNorm::Own,
        act: Act::Gelu,
        eps: 1e-6,
        projection: Some(7),
    }
}

pub(super) fn check(text: &str, faults: &mut Faults) {
    let Some(value) = faults.slot(Kind::Target, text) else { return };
    let Some(target) = built::<TargetTag>(text, faults) else { return };
    let shape = TowerShape::from(&config());
    let name = value["teacher"].as_str().unwrap_or("teacher").to_string();
    let teachers = BTreeMap::from([(name, shape)]);
    let mut planned = 0;
    let mut refusals = Vec::new();
    for (cls, visible, masked) in [(true, true, false), (false, true, true), (false, false, true), (true, true, true)] {
        let tokens = Tokens { cls, visible, masked };
        let counts = Counts { visible: 3, masked: 2 };
        match target.plan(&TargetContext { student: shape, teachers: &teachers, tokens, counts }) {
            Ok(plan) => {
                planned += 1;
                if let Err(error) = check_plan(&plan, tokens, faults) {
                    faults.add(error);
                }
            }
            Err(refusal) => refusals.push(refusal.to_string()),
        }
    }
    faults.unless(planned > 0, format_args!("it refuses every set of tokens: {}", refusals.join("; ")));
}

fn check_plan(plan: &PlannedTarget, tokens: Tokens, faults: &mut Faults) -> Result<()> {
    faults.unless(plan.outputs > 0 && plan.width > 0, "it plans no output");
    let rows = 2 * tokens.count(3, 2) * plan.relations().map_or(1, |relations| relations.heads);
    let mut seen = Vec::new();
    for cx in [fused(), composed()] {
        let values = || outputs(plan, tokens, &cx);
        let first = values()?;
        faults.unless(
            first.len() == plan.outputs,
            format_args!("it gives {} outputs, not {}", first.len(), plan.outputs),
        );
        for (shape, output) in &first {
            let wanted = (rows, plan.width);
            faults.unless(*shape == wanted, format_args!("an output is {shape:?}, not {wanted:?}"));
            faults.unless(output.iter().all(|v| v.is_finite()), "an output is not finite");
        }
        let again = values()?;
        let same = first.iter().zip(&again).all(|((_, a), (_, b))| same_bits(a, b));
        faults.unless(same, "its outputs differ from call to call");
        seen.push(first.into_iter().flat_map(|(_, output)| output).collect::<Vec<f32>>());
    }
    let apart = relative_difference(&seen[0], &seen[1]);
    faults.unless(
        apart < ROUND_OFF,
        format_args!("its outputs differ by {apart:.1e} between the CPU's and the composed operators"),
    );
    Ok(())
}

/// Shapes and values of every output for two images.
fn outputs(plan: &PlannedTarget, tokens: Tokens, cx: &Context) -> Result<Vec<((usize, usize), Vec<f32>)>> {
    let teacher = TowerTeacher::new(Vit::new(&Init::new(cx.device(), 0, "random teacher"), config())?, cx)?;
    if let TargetSource::MovingHead { .. } = &plan.source {
        // It is made by the stage, of parts that have their own conformance.
        let values = vec![0.0; 2 * tokens.count(3, 2) * plan.width];
        return Ok(vec![((2 * tokens.count(3, 2), plan.width), values); plan.outputs]);
    }
    let images = images(2, 10);
    let masks = Masks::even(2, vec![3, 0, 7, 24, 1, 2], vec![5, 6, 9, 10]);
    let input = TargetInput { images: &images, masks: &masks, tokens };
    let outputs = match &plan.source {
        TargetSource::Images(target) => target.outputs(cx, &input)?,
        TargetSource::Teacher { whole, target, .. } => {
            let read = plan.levels.iter().copied().collect();
            let wants = match plan.relations() {
                Some(_) => Wants { qkv: read, ..Wants::default() },
                None => Wants { levels: read, whole: *whole, tokens, ..Wants::default() },
            };
            let pass = teacher.begin(cx, &images, &wants)?;
            let mut given = BTreeMap::new();
            for &block in &wants.qkv {
                let x = teacher.queries_keys_values(cx, &pass, block)?;
                given.extend(x.map(|x| (block, Level { x, only: None })));
            }
            let levels = teacher.finish(cx, pass, &wants, &masks)?;
            if wants.qkv.is_empty() {
                given = levels;
            }
            target.outputs(cx, &input, &teacher, &plan.levels.iter().map(|level| &given[level]).collect::<Vec<_>>())?
        }
        TargetSource::MovingHead { .. } => Vec::new(),
    };
    Ok(outputs.iter().map(|output| (output.shape(), output.to_vec())).collect())
}
