//! Towers built from files of timm's (`tests/fixtures/weights/make_wrapped.py` and `make_scaled.py`) compute what timm
//! computes, or are refused with the cause.

use std::{collections::BTreeMap, path::Path};

use maskalign_core::{
    Context, Device, ImageBatch, Tape,
    components::{
        students::{PlannedStudent, Student},
        towers::{Environment, MissingWeights, PlanContext, TrainedStudents},
    },
    nn::{FinalNorm, Init, SeenPatches},
    plugin::Build,
    weights::{HostTensor, TensorMap, write_safetensors},
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

/// The names of a file's tensors, changed.
fn renamed(tensors: &TensorMap, name: impl Fn(&str) -> String) -> TensorMap {
    tensors.iter().map(|(old, tensor)| (name(old), tensor.clone())).collect()
}

#[test]
fn layer_scale_needs_no_class_token_and_goes_by_either_name() {
    let mut all = fixture("tests/fixtures/weights/scaled.safetensors");
    let images = ImageBatch { pixels: all.remove("images").unwrap().data, batch: 2, size: 28 };
    let mut timm = part(&mut all, "no_class|");
    let expected = timm.remove("hidden").unwrap();
    let beit = renamed(&timm, |name| name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"));
    assert!(beit.contains_key("blocks.3.gamma_2") && !beit.contains_key("blocks.3.ls2.gamma"));
    let cx = Context::new(Device::Cpu, 1);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tower.safetensors");
    for tensors in [&timm, &beit] {
        write_safetensors(&file, tensors, None).unwrap();
        let planned =
            student(&file, ", layer_scale: 0.1, cls_token: false").unwrap_or_else(|refusal| panic!("{refusal}"));
        let student = planned.build(&Init::new(cx.device(), 0, "x"), &TrainedStudents::default()).unwrap();
        let features = student.forward(&cx, &mut Tape::inference(), &images, None, None, &|_| false).unwrap();
        let error = relative_error(&features.last.to_vec(), &expected.data);
        assert!(error < 1e-5, "{error:.1e}");
    }
    let refusal = student(&file, ", layer_scale: 0.1").map(|_| ()).unwrap_err();
    assert!(refusal.message.contains("a tower without a class token"), "{refusal}");
    assert!(refusal.help.iter().any(|help| help.contains("cls_token: false")), "{refusal}");
}

/// A file's mask token is read under every name and shape that programs give it; that of a decoder is the decoder's.
#[test]
fn a_mask_token_is_read_where_the_file_has_one() {
    let mut all = fixture("tests/fixtures/weights/scaled.safetensors");
    let images = ImageBatch { pixels: all.remove("images").unwrap().data, batch: 2, size: 28 };
    let mut timm = part(&mut all, "masked|");
    let [expected, masked, seen] = ["hidden", "masked", "seen"].map(|name| timm.remove(name).unwrap().data);
    let [masked, visible] = [masked, seen].map(|all| all.iter().map(|&i| i as u32).collect::<Vec<_>>());
    let cx = Context::new(Device::Cpu, 1);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tower.safetensors");
    let flat = |mut tensors: TensorMap, name: &str| {
        tensors.get_mut(name).unwrap().shape = vec![1, 8];
        tensors
    };
    let without = |mut tensors: TensorMap| {
        tensors.remove("mask_token");
        tensors
    };
    let mut of_decoder = timm.clone();
    of_decoder.insert("decoder_embed.weight".into(), HostTensor { shape: vec![8, 8], data: vec![0.0; 64] });
    for (what, tensors, is_read) in [
        ("timm's name", timm.clone(), true),
        ("below an encoder", renamed(&timm, |name| format!("encoder.{name}")), true),
        ("below wrappers", renamed(&timm, |name| format!("module._orig_mod.{name}")), true),
        ("DINOv2's shape", flat(timm.clone(), "mask_token"), true),
        ("iBOT's name", flat(renamed(&timm, |name| name.replace("mask_token", "masked_embed")), "masked_embed"), true),
        ("a decoder's", of_decoder, false),
        ("none", without(timm.clone()), false),
    ] {
        write_safetensors(&file, &tensors, None).unwrap();
        let planned = student(&file, ", layer_scale: 0.1, masked_patches: mask_token");
        let planned = planned.unwrap_or_else(|refusal| panic!("{what}: {refusal}"));
        let student = planned.build(&Init::new(cx.device(), 0, "x"), &TrainedStudents::default()).unwrap();
        let seen = SeenPatches { visible: &visible, masked: &masked, uneven: None };
        let features = student.forward(&cx, &mut Tape::inference(), &images, Some(seen), None, &|_| false).unwrap();
        let error = relative_error(&features.last.to_vec(), &expected);
        assert_eq!(error < 1e-5, is_read, "{what}: {error:.1e}");
    }
    // A tower that shows none leaves it out.
    write_safetensors(&file, &timm, None).unwrap();
    let planned = student(&file, ", layer_scale: 0.1").unwrap_or_else(|refusal| panic!("{refusal}"));
    let mut student = planned.build(&Init::new(cx.device(), 0, "x"), &TrainedStudents::default()).unwrap();
    student.visit(&mut |p| assert_ne!(p.name, "mask_token"));
}
