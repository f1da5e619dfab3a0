//! Decoders give what was recorded of PyTorch: cross-attention by `tests/fixtures/make_crossmae_decoder.py`, and MILAN's by
//! running its published code (`fixtures/papers/make_derived.py`).

use std::path::Path;

use maskalign_core::{
    Context, Device, Forms, Tape, Tensor,
    components::{
        aligners::{AlignInput, AlignPlan},
        maskers::Counts,
        tokens::{Masks, Tokens},
        towers::TowerShape,
    },
    nn::{Arch, FinalNorm, Grid, Init, MaskedPatches, Statistics},
    ops::{self, Distance},
    plugin::Build,
    weights::{self, HostTensor, TensorMap},
};
use maskalign_registry::{AlignerTag, Kind, Registry, Slot};

const BATCH: usize = 2;
const WIDTH: usize = 9;
const TOLERANCE: f64 = 1e-4;

const CROSSMAE: &str = "../tests/fixtures/crossmae_decoder.safetensors";
const MILAN: &str = "tests/fixtures/papers/milan_decoder.safetensors";

/// The tensors of a case in a file, its name cut off.
fn recorded(file: &str, case: &str) -> TensorMap {
    let all = weights::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
    let own = |(name, tensor): (String, HostTensor)| Some((name.strip_prefix(case)?.strip_prefix('.')?.into(), tensor));
    all.into_iter().filter_map(own).collect()
}

fn plan(case: &Case) -> AlignPlan {
    AlignPlan {
        relations: None,
        blocks: 1,
        student: TowerShape {
            arch: Arch { dim: 12, depth: 2, heads: 3, mlp: 20, patch: 2 },
            grid: Grid { rows: 3, columns: 3 },
            image_size: 6,
            cls_token: true,
            learned_positions: false,
            masked_patches: MaskedPatches::Drop,
            layer_scale: None,
            final_norm: FinalNorm::Own,
            projection: None,
            statistics: Statistics::IMAGENET,
            eps: 1e-6,
        },
        counts: Counts { visible: 3, masked: case.masked },
        tokens: case.tokens,
        target_depth: 1,
        target_levels: vec![0],
        outputs: 1,
        wanted: vec![0],
        width: WIDTH,
    }
}

fn matrix(tensor: &HostTensor, columns: usize) -> Tensor {
    Tensor::new(&Device::Cpu, tensor.data.clone(), tensor.data.len() / columns, columns).unwrap()
}

/// Norm of the difference over norm of what was recorded.
fn difference(got: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let error = norm(&mut got.iter().zip(expected).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    error / norm(&mut expected.iter().map(|v| f64::from(*v)))
}

/// What was recorded.
struct Case {
    file: &'static str,
    name: &'static str,
    /// Options of the decoder.
    options: &'static str,
    /// Predicted patches of an image.
    masked: usize,
    /// The tokens that come out.
    tokens: Tokens,
}

fn replay(case: &Case) {
    let recorded = recorded(case.file, case.name);
    let text = format!("{{ type: decoder, dim: 8, depth: 2, heads: 2, mlp: 20, {} }}", case.options);
    let value = Registry::global().unwrap().component(Kind::Aligner, "decoder", &text).unwrap();
    let slot: Slot<AlignerTag> = serde_json::from_value(value).unwrap();
    let builder = slot.build().unwrap();
    let plan = plan(case);
    let given = (0..).map_while(|i| recorded.get(&format!("values.levels.{i}")));
    let levels: Vec<Tensor> = given.map(|level| matrix(level, 12).tracked()).collect();
    let planned = builder.plan(&plan).unwrap();
    assert_eq!(planned.needs().levels.len(), levels.len());
    let patches = |name: &str| recorded[name].data.iter().map(|&v| v as u32).collect();
    let masks = Masks::even(BATCH, patches("visible"), patches("masked"));

    let composed = Context::new(Device::Cpu, 1).with_forms(Forms::Composed);
    for cx in [composed, Context::new(Device::Cpu, 2)] {
        let mut aligner = planned.build(&Init::new(cx.device(), 0, "test")).unwrap();
        let (mut names, mut compared) = (Vec::new(), Vec::new());
        aligner.visit(&mut |p| {
            let value = &recorded[&format!("values.{}", p.name)];
            assert_eq!(p.dims, value.shape, "{}", p.name);
            if !p.is_trained() {
                compared.push((p.name.clone(), difference(&p.value.to_vec(), &value.data)));
            }
            p.load(&value.data).unwrap();
            names.push(p.name.clone());
        });
        let parameters = recorded.keys().filter(|k| k.starts_with("values.") && !k.starts_with("values.levels."));
        assert_eq!(names.len(), parameters.count());

        let mut tape = Tape::training();
        let held = Tokens { cls: true, visible: true, masked: false };
        let input = AlignInput { levels: &levels, held, masks: &masks, tokens: plan.tokens };
        let outputs = aligner.forward(&cx, &mut tape, &input).unwrap();
        assert_eq!(outputs.len(), 1);
        compared.push(("output".into(), difference(&outputs[0].to_vec(), &recorded["output"].data)));
        let target = matrix(&recorded["target"], WIDTH);
        let loss = ops::distance(&cx, &mut tape, &outputs[0], &target, Distance::Mse).unwrap();
        compared.push(("loss".into(), difference(&[loss.value()], &recorded["loss"].data)));
        let gradients = tape.backward(&loss).unwrap();
        let mut of = |name: String, got: Vec<f32>| {
            let error = difference(&got, &recorded[&format!("gradients.{name}")].data);
            compared.push((format!("gradient of {name}"), error));
        };
        for (i, level) in levels.iter().enumerate() {
            of(format!("levels.{i}"), gradients.to_vec(level));
        }
        aligner.visit(&mut |p| {
            if p.is_trained() {
                of(p.name.clone(), gradients.to_vec(&p.value));
            }
        });
        // Every gradient that was recorded, the output, the loss and the positions.
        assert_eq!(compared.len(), 3 + recorded.keys().filter(|k| k.starts_with("gradients.")).count());
        for (name, error) in &compared {
            assert!(*error < TOLERANCE, "{}, {}, {name}: {error:.1e}", case.name, cx.operators());
        }
    }
}

fn crossmae(name: &'static str, options: &'static str) -> Case {
    Case { file: CROSSMAE, name, options, masked: 4, tokens: Tokens { masked: true, ..Tokens::default() } }
}

#[test]
fn a_mix_of_levels_for_each_block_agrees_with_pytorch() {
    replay(&crossmae("mixed", "attention: cross, tap: block, levels: [embed, 0, 1]"));
}

#[test]
fn one_level_for_all_blocks_agrees_with_pytorch() {
    replay(&crossmae("single", "attention: cross, tap: block, levels: [-1]"));
}

/// Its blocks normalise mask tokens alone: the student's are attended to as they were embedded.
#[test]
fn masked_queries_are_those_of_milans_code() {
    let tokens = Tokens { cls: true, visible: true, masked: true };
    let options = "attention: masked_queries, tap: norm";
    replay(&Case { file: MILAN, name: "masked_queries", options, masked: 6, tokens });
}
