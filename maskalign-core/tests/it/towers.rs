//! Towers built from files of timm's (`tests/fixtures/weights/make_wrapped.py`) compute what timm computes, or are refused
//! with the cause.

use std::{collections::BTreeMap, path::Path};

use maskalign_core::{
    Context, Device, ImageBatch, Tape,
    components::{
        students::{PlannedStudent, Student},
        towers::{Environment, MissingWeights, PlanContext, TrainedStudents},
    },
    nn::{FinalNorm, Init},
    plugin::Build,
    weights::write_safetensors,
};
use maskalign_registry::{Kind, Refusal, Registry, Slot, StudentTag};

use crate::support::{fixture, part, relative_error};

fn student(weights: &Path, options: &str) -> Result<std::sync::Arc<dyn PlannedStudent>, Refusal> {
    let weights = weights.display();
    let arch = "arch: { dim: 8, depth: 4, heads: 2, patch: 7 }";
    let text = format!("{{ type: vit, {arch}, positions: learned, weights: '{weights}'{options} }}");
    let options = Registry::global().unwrap().component(Kind::Student, "student", &text).unwrap();
    let slot: Slot<StudentTag> = serde_json::from_value(options).unwrap();
    let student: Box<dyn Student> = slot.build().unwrap();
    student.plan(&PlanContext {
        data_size: 28,
        students: &BTreeMap::new(),
        student: None,
        environment: Environment::Checked,
        missing_weights: MissingWeights::Refused,
    })
}

#[test]
fn towers_without_a_class_token_its_position_or_a_final_norm_compute_what_timm_does() {
    let mut all = fixture("tests/fixtures/weights/wrapped.safetensors");
    let images = all.remove("images").unwrap();
    let images = ImageBatch { pixels: images.data, batch: 2, size: 28 };
    let cx = Context::new(Device::Cpu, 1);
    let folder = tempfile::tempdir().unwrap();
    for (case, options, norm) in [
        ("same_plain", "", FinalNorm::Own),
        ("same_nested", "", FinalNorm::Own),
        ("no_class_token", ", cls_token: false", FinalNorm::Fresh),
        ("no_class_position", "", FinalNorm::Own),
        ("average", "", FinalNorm::Fresh),
    ] {
        let mut tower = part(&mut all, &format!("{case}|"));
        let expected = match tower.remove("hidden") {
            Some(hidden) => hidden,
            None => fixture("tests/fixtures/weights/wrapped.safetensors").remove("same_plain|hidden").unwrap(),
        };
        let file = folder.path().join(format!("{case}.safetensors"));
        write_safetensors(&file, &tower, None).unwrap();
        let planned = student(&file, options).unwrap_or_else(|refusal| panic!("{case}: {refusal}"));
        assert_eq!(planned.shape().final_norm, norm, "{case}");
        let student = planned.build(&Init::new(cx.device(), 0, "x"), &TrainedStudents::default()).unwrap();
        let features = student.forward(&cx, &mut Tape::inference(), &images, None, None, &|_| false).unwrap();
        let error = relative_error(&features.last.to_vec(), &expected.data);
        assert!(error < 1e-5, "{case}: {error:.1e}");
    }
    let refusal = student(&folder.path().join("no_class_token.safetensors"), "").map(|_| ()).unwrap_err();
    assert!(refusal.message.contains("a tower without a class token"), "{refusal}");
}
