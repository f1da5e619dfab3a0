//! Steps recorded from the PyTorch implementation, replayed by the stage's own step.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use maskalign_core::{
    Context, Device, Forms, Recompute,
    error::Error,
    weights::{TensorFile, TensorMap},
};
use maskalign_registry::{Input, LoadRequest, NoRecipes, Recipe, Registry};
use maskalign_testkit::replay::{Case, CaseReport};

fn cases() -> Vec<PathBuf> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/cases");
    let mut cases: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    cases.sort();
    cases
}

fn replay(cx: &Context, path: &Path, sets: &[&str]) -> CaseReport {
    try_replay(cx, path, sets).unwrap()
}

fn try_replay(cx: &Context, path: &Path, sets: &[&str]) -> Result<CaseReport, Error> {
    let case = Case::read(path).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let teacher = folder.path().join("teacher.safetensors");
    case.write_teacher(&teacher).unwrap();
    let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
    let request = LoadRequest {
        input: Input::Text { name: "case".into(), text: case.recipe(&teacher) },
        sets: &sets,
        env: &|_| None,
        builtins: &NoRecipes,
    };
    let loaded = Recipe::load(&request, Registry::global().unwrap()).unwrap_or_else(|r| panic!("{}", r.render()));
    case.replay(cx, loaded.recipe())
}

fn contexts() -> Vec<Context> {
    vec![
        Context::new(Device::Cpu, 2).with_forms(Forms::Composed),
        Context::new(Device::Cpu, 2).with_forms(Forms::Composed).with_recompute(Recompute::Blocks),
        Context::new(Device::Cpu, 2),
        Context::new(Device::Cpu, 1).with_recompute(Recompute::Blocks),
    ]
}

#[test]
fn every_recorded_quantity_agrees_within_1e_4() {
    let cases = cases();
    assert_eq!(cases.len(), 9);
    for path in cases {
        for cx in contexts() {
            let report = replay(&cx, &path, &[]);
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            for q in &report.quantities {
                println!(
                    "{name} {} recompute {:?}: {} {:.1e} ({} of {})",
                    cx.operators(),
                    cx.recompute(),
                    q.name,
                    q.error,
                    q.worst,
                    q.tensors
                );
            }
            assert!(report.error() < 1e-4, "{name}: {:.1e}", report.error());
        }
    }
}

/// A step that differs from the official one in any of these must not pass for it.
#[test]
fn a_wrong_recipe_fails() {
    let case = cases().into_iter().find(|p| p.ends_with("paper_default.safetensors")).unwrap();
    let cx = Context::new(Device::Cpu, 1);
    for set in [
        "stages.pretrain.objectives.align.aligner.fusion=simple",
        "stages.pretrain.objectives.align.target.normalize=none",
        "stages.pretrain.optimizer.weight_decay=0.0",
        "stages.pretrain.optimizer.no_decay=[]",
        "stages.pretrain.optimizer.eps=1e-6",
        "stages.pretrain.teachers.teacher.activation=gelu",
        "stages.pretrain.student.eps=1e-5",
    ] {
        let error = replay(&cx, &case, &[set]).error();
        assert!(error > 1e-4, "`{set}` passes with {error:.1e}");
    }
}

/// A copy of `paper_default` with a change to its configuration and its tensors.
fn altered(config: &dyn Fn(&mut serde_json::Value), tensors: &dyn Fn(&mut TensorMap)) -> (tempfile::TempDir, PathBuf) {
    use safetensors::{Dtype, tensor::TensorView};

    let original = cases().into_iter().find(|p| p.ends_with("paper_default.safetensors")).unwrap();
    let file = TensorFile::open(&original).unwrap();
    let mut metadata: std::collections::HashMap<String, String> = file.metadata().into_iter().collect();
    let mut settings = serde_json::from_str(&metadata["config"]).unwrap();
    config(&mut settings);
    metadata.insert("config".into(), settings.to_string());
    let mut all = file.read_all().unwrap();
    tensors(&mut all);
    let bytes: BTreeMap<&String, Vec<u8>> =
        all.iter().map(|(name, t)| (name, t.data.iter().flat_map(|v| v.to_le_bytes()).collect())).collect();
    let views = all.iter().map(|(name, t)| (name, TensorView::new(Dtype::F32, t.shape.clone(), &bytes[name]).unwrap()));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("case.safetensors");
    std::fs::write(&path, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
    (folder, path)
}

#[test]
fn a_file_that_is_not_a_whole_case_is_refused_by_what_it_lacks() {
    let reshape = |name: &'static str, shape: &'static [usize]| {
        move |tensors: &mut TensorMap| {
            let tensor = tensors.get_mut(name).unwrap();
            tensor.shape = shape.to_vec();
            tensor.data.truncate(shape.iter().product());
        }
    };
    let each: [(&dyn Fn(&mut TensorMap), &str); 7] = [
        (&|_| {}, ""),
        (&reshape("ids_keep", &[4, 4, 0]), "`ids_keep` is [4, 4, 0]: it names no patch"),
        (&reshape("ids_keep", &[0, 4, 10]), "it names no patch"),
        (&reshape("expect.loss", &[3]), "and 3 losses do not fit together"),
        (&|t| drop(t.remove("expect.loss")), "no tensor `expect.loss`"),
        (&|t| t.get_mut("ids_keep").unwrap().data[1] = 0.5, "a patch that an image does not have"),
        (&|t| t.get_mut("ids_keep").unwrap().data[..10].fill(7.0), "names a patch twice"),
    ];
    for (change, says) in each {
        let (_folder, path) = altered(&|_| {}, change);
        let read = Case::read(&path).map(drop).map_err(|error| (error.is_users(), error.to_string()));
        match says {
            "" => assert_eq!(read, Ok(())),
            says => assert!(matches!(&read, Err((true, message)) if message.contains(says)), "{says}: {read:?}"),
        }
    }
}

#[test]
fn settings_that_are_not_known_are_refused_with_those_that_are() {
    for (setting, says) in [
        ("method", "expected `maskalign` or `mae`"),
        ("teacher_kind", "expected `clip` or `dino`"),
        ("fusion", "expected one of `simple`, `linear`, `sum`"),
        ("head", "expected one of `linear`, `norm_linear`, `linear_norm`, `mlp`, `mlp2`"),
        ("target_norm", "expected one of `none`, `l2`, `whiten`, `bn`"),
        ("loss", "expected one of `l1`, `l2`, `smoothl1`, `cosine`"),
        ("loss_weights", "expected out, topN, midN, mean or linear_decay"),
        ("mask", "expected `attention` or `random`"),
    ] {
        let (_folder, path) = altered(&|config| config[setting] = "bogus".into(), &|_| {});
        let error = Case::read(&path).map(drop).unwrap_err().to_string();
        assert!(error.contains("bogus") && error.contains(says), "{setting}: {error}");
    }
}

#[test]
fn micro_batches_are_replayed_and_other_batches_refused() {
    let case = cases().into_iter().find(|p| p.ends_with("paper_default.safetensors")).unwrap();
    let cx = Context::new(Device::Cpu, 1);
    let whole = replay(&cx, &case, &[]);
    let halves = replay(&cx, &case, &["stages.pretrain.batch.micro=2"]);
    assert!(halves.error() < 1e-4, "{:.1e}", halves.error());
    assert_ne!(halves.losses, whole.losses, "two passes add up in another order");
    for (set, says) in [
        ("stages.pretrain.batch.effective=8", "batch.effective`: 8 images, the case has 4"),
        ("stages.pretrain.batch.micro=3", "3 does not divide"),
        ("stages.pretrain.masker.ratio=0.5", "masker`: leaves 18 patches of an image visible"),
        ("~stages.pretrain.masker", "masker`: leaves 36 patches"),
    ] {
        let error = try_replay(&cx, &case, &[set]).unwrap_err().to_string();
        assert!(error.contains(says), "{set}: {error}");
    }
}

#[test]
fn a_loss_that_is_not_finite_is_told_without_advice_for_runs() {
    let (_folder, path) = altered(&|_| {}, &|t| t.get_mut("images").unwrap().data[0] = f32::NAN);
    let error = try_replay(&Context::new(Device::Cpu, 1), &path, &[]).unwrap_err();
    assert!(!error.is_users());
    assert!(error.to_string().ends_with("e-4)") || error.to_string().ends_with("e-3)"), "{error}");
}
