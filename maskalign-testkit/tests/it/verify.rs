//! Steps recorded from the PyTorch implementation, replayed by the stage's own step.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use maskalign_core::{
    Context, Device, Forms, Recompute, embedded,
    error::Error,
    weights::{TensorFile, TensorMap},
};
use maskalign_registry::{Input, LoadRequest, Recipe, RecipeSource, Registry};
use maskalign_testkit::replay::{Case, CaseReport};

fn cases() -> Vec<PathBuf> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/cases");
    let files = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    let mut cases: Vec<PathBuf> = files.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).collect();
    cases.sort();
    cases
}

fn case(name: &str) -> PathBuf {
    cases().into_iter().find(|path| path.file_stem().unwrap() == name).unwrap()
}

/// The recipes that cases may extend.
struct Shipped;

impl RecipeSource for Shipped {
    fn builtin(&self, name: &str) -> Option<&str> {
        embedded::RECIPES.iter().find(|(known, _)| *known == name).map(|(_, text)| *text)
    }

    fn names(&self) -> Vec<&str> {
        embedded::RECIPES.iter().map(|(name, _)| *name).collect()
    }
}

fn replay(cx: &Context, path: &Path, sets: &[&str]) -> CaseReport {
    try_replay(cx, path, sets).unwrap()
}

fn try_replay(cx: &Context, path: &Path, sets: &[&str]) -> Result<CaseReport, Error> {
    let case = Case::read(path).unwrap();
    let folder = tempfile::tempdir().unwrap();
    case.write_teachers(folder.path()).unwrap();
    let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
    let request = LoadRequest {
        input: Input::Text { name: "case".into(), text: case.recipe().to_owned() },
        sets: &sets,
        env: &Case::variable(folder.path()),
        builtins: &Shipped,
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
    for path in cases() {
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

/// Nine of the official code; and one of each script that records a paper's steps, in the same folder.
#[test]
fn every_case_and_every_script_is_there() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/cases");
    let mut scripts: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    scripts.retain(|path| path.extension().is_some_and(|e| e == "py") && path.file_stem().unwrap() != "recording");
    for script in &mut scripts {
        assert!(script.set_extension("safetensors"));
    }
    scripts.sort();
    let format =
        |path: &PathBuf| TensorFile::open(path).unwrap().metadata().into_iter().find(|(key, _)| key == "format");
    let (papers, official): (Vec<PathBuf>, Vec<PathBuf>) =
        cases().into_iter().partition(|path| format(path).unwrap().1 == "maskalign-case-v2");
    assert_eq!(papers, scripts);
    assert_eq!(official.len(), 9);
}

/// Values of papers' recipes, each with another one that must not pass for it.
const PAPERS: &[(&str, &[&str])] = &[
    (
        "vitfreeze",
        &[
            "freeze=null",
            "freeze.first=0.6",
            "freeze.growth=squared",
            "freeze.after_epochs=0",
            "schedule={type: constant}",
            "objectives.fine.target.cell=2",
            "objectives.fine.aligner.levels=[0]",
            "objectives.last.aligner.tap=block",
            "objectives.last.weight=0.5",
        ],
    ),
    (
        "dbot",
        &[
            "teachers.teacher.momentum=0.9",
            "objectives.features.target.normalize=whiten",
            "objectives.features.target.tap=norm",
            "objectives.features.tokens=[masked]",
            "objectives.features.loss.beta=1.0",
            "objectives.features.aligner.tap=block",
            "optimizer.betas=[0.9, 0.999]",
            "optimizer.no_decay=[cls_token]",
        ],
    ),
    (
        "hybrid_distill",
        &[
            "objectives.features.target.normalize=none",
            "objectives.features.loss.beta=1.0",
            "objectives.relations.target.level=-1",
            "objectives.relations.target.of=[vv]",
            "objectives.relations.target.teacher=clip",
            "objectives.relations.aligner.level=-1",
            "objectives.relations.weight=1.0",
            "optimizer.no_decay=[]",
        ],
    ),
    (
        "uta",
        &[
            "student.statistics=imagenet",
            "objectives.features.target.tap=norm",
            "objectives.features.tokens=[visible]",
            "objectives.features.aligner.tap=block",
            "objectives.features.loss={type: mse}",
            "optimizer.betas=[0.9, 0.999]",
            "optimizer.no_decay=[cls_token]",
        ],
    ),
    (
        "tinymim",
        &[
            "objectives.relations.target.level=1",
            "objectives.relations.target.of=[qk]",
            "objectives.relations.target.of=[qk, kk]",
            "objectives.relations.target.heads=2",
            "objectives.relations.tokens=[visible]",
            "objectives.relations.aligner.level=-2",
            "objectives.relations.loss.reduction=mean",
            "objectives.relations.weight=1.0",
            "optimizer.betas=[0.9, 0.999]",
        ],
    ),
    (
        "data2vec",
        &[
            "epochs=2",
            "teachers.ema.momentum.to=0.98",
            "student.layer_scale=null",
            "objectives.features.target.normalize_mean=none",
            "objectives.features.target.levels={last: 1}",
            "objectives.features.loss.beta=1.0",
            "objectives.features.aligner.tap=block",
            "optimizer.clip_norm=3.0",
            "optimizer.no_decay=[]",
        ],
    ),
    (
        "simmim",
        &[
            "student.layer_scale=null",
            "objectives.pixels.target.normalize=standardize",
            "objectives.pixels.loss={type: mse}",
            "objectives.pixels.aligner.tap=block",
            "optimizer.no_decay=[]",
            "optimizer.clip_norm=0.1",
        ],
    ),
    (
        "maskfeat",
        &[
            "student.positions=sincos",
            "objectives.gradients.target.cell=4",
            "objectives.gradients.target.bins=8",
            "objectives.gradients.aligner.head=linear",
            "objectives.gradients.aligner.tap=norm",
            "objectives.gradients.loss={type: l1}",
            "optimizer.clip_norm=null",
            "optimizer.no_decay=[cls_token]",
        ],
    ),
    (
        "eva",
        &[
            "student.statistics=imagenet",
            "objectives.features.target.tap=norm",
            "objectives.features.tokens=[visible]",
            "objectives.features.loss={type: mse}",
            "optimizer.betas=[0.9, 0.999]",
            "optimizer.eps=1e-8",
            "optimizer.no_decay=[cls_token]",
        ],
    ),
    (
        "ijepa",
        &[
            "objectives.features.aligner.heads=1",
            "objectives.features.target.normalize=none",
            "objectives.features.target.tap=block",
            "objectives.features.loss.beta=2.0",
            "objectives.features.aligner.tap=block",
            "teachers.ema.momentum=0.9",
            "optimizer.weight_decay=0.04",
        ],
    ),
    (
        "fd",
        &[
            "student.layer_scale=null",
            "objectives.features.target.normalize=none",
            "objectives.features.target.tap=block",
            "objectives.features.tokens=[visible]",
            "objectives.features.loss.beta=1.0",
            "optimizer.no_decay=[]",
        ],
    ),
    (
        "attmask",
        &[
            "student.positions=sincos",
            "teachers.ema.momentum=0.996",
            "masker.hides=low",
            "masker.ratio=0.5",
            "objectives.cls.views.pairs=all",
            "objectives.cls.views.student=[global_1, global_2]",
            "objectives.cls.target.center_momentum=0.5",
            "objectives.patches.target.temperature=0.06",
            "objectives.patches.target.warmup_temperature=0.05",
            "objectives.cls.loss.temperature=0.2",
            "objectives.patches.weight=0.5",
            "objectives.cls.aligner.freeze_last_layer=0",
            "objectives.cls.aligner.freeze_last_layer=2",
            "optimizer.clip_each=0.1",
            "optimizer.weight_decay=0.04",
        ],
    ),
    (
        "attmask_uneven",
        &[
            "objectives.patches.target.center_momentum=0.5",
            "objectives.patches.views.student=[global_1]",
            "objectives.patches.weight=0.5",
            "optimizer.clip_each=0.1",
        ],
    ),
];

/// A step that differs from the recorded one in any of these must not pass for it.
#[test]
fn a_wrong_recipe_fails() {
    let default = case("paper_default");
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
        let error = replay(&cx, &default, &[set]).error();
        assert!(error > 1e-4, "`{set}` passes with {error:.1e}");
    }
    for (name, sets) in PAPERS {
        for set in *sets {
            let set = format!("stages.pretrain.{set}");
            let error = replay(&cx, &case(name), &[&set]).error();
            assert!(error > 1e-4, "{name}: `{set}` passes with {error:.1e}");
        }
    }
}

type Header = std::collections::HashMap<String, String>;

/// A copy of a case with a change to its header and its tensors.
fn altered(name: &str, header: &dyn Fn(&mut Header), tensors: &dyn Fn(&mut TensorMap)) -> (tempfile::TempDir, PathBuf) {
    use safetensors::{Dtype, tensor::TensorView};

    let file = TensorFile::open(&case(name)).unwrap();
    let mut metadata: Header = file.metadata().into_iter().collect();
    header(&mut metadata);
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

fn with_setting(name: &str, value: &str) -> (tempfile::TempDir, PathBuf) {
    let change = |header: &mut Header| {
        let mut settings: serde_json::Value = serde_json::from_str(&header["config"]).unwrap();
        settings[name] = value.into();
        header.insert("config".into(), settings.to_string());
    };
    altered("paper_default", &change, &|_| {})
}

fn reshape(name: &'static str, shape: &'static [usize]) -> impl Fn(&mut TensorMap) {
    move |tensors: &mut TensorMap| {
        let tensor = tensors.get_mut(name).unwrap();
        tensor.shape = shape.to_vec();
        tensor.data.truncate(shape.iter().product());
    }
}

/// What reading says of a case: whether it is the user's to mend, and the message.
fn said(path: &Path) -> Result<(), (bool, String)> {
    Case::read(path).map(drop).map_err(|error| (error.is_users(), error.to_string()))
}

#[test]
fn a_file_that_is_not_a_whole_case_is_refused_by_what_it_lacks() {
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
        let (_folder, path) = altered("paper_default", &|_| {}, change);
        let read = said(&path);
        match says {
            "" => assert_eq!(read, Ok(())),
            says => assert!(matches!(&read, Err((true, message)) if message.contains(says)), "{says}: {read:?}"),
        }
    }
}

#[test]
fn a_case_of_a_recipe_is_refused_by_what_is_wrong_with_it() {
    let insert = |name: &'static str, like: &'static str| {
        move |tensors: &mut TensorMap| {
            let tensor = tensors[like].clone();
            tensors.insert(name.to_owned(), tensor);
        }
    };
    let each: [(&dyn Fn(&mut Header), &dyn Fn(&mut TensorMap), &str); 13] = [
        (&|_| {}, &|_| {}, ""),
        (&|h| drop(h.insert("format".into(), "maskalign-case-v3".into())), &|_| {}, "neither maskalign-case-v1 nor"),
        (&|h| drop(h.remove("recipe")), &|_| {}, "its metadata has no `recipe`"),
        (&|h| drop(h.insert("steps_per_epoch".into(), "0".into())), &|_| {}, "not a whole number above 0"),
        (&|_| {}, &|t| drop(t.remove("lr")), "no tensor `lr`"),
        (&|_| {}, &reshape("lr", &[3]), "3 rates, 4 losses and images of 4 steps do not fit together"),
        (&|_| {}, &reshape("images", &[4, 4, 3, 28, 14]), "neither [B, 3, side, side] nor"),
        (&|_| {}, &reshape("images", &[4, 0, 3, 28, 28]), "it has no pixel"),
        (&|_| {}, &reshape("masked", &[2, 4, 6]), "of 4 steps and 4 images each"),
        (&|_| {}, &|t| t.get_mut("masked").unwrap().data[1] = -2.0, "holds -2, a patch that an image does not have"),
        (&|_| {}, &insert("expect.hidden", "lr"), "`expect.hidden`, which means nothing"),
        (&|_| {}, &insert("expect.moving.4.x", "lr"), "`expect.moving.4.x`, which means nothing"),
        (&|_| {}, &insert("teacher.../x.weight", "lr"), "is not named teacher.TEACHER.TENSOR"),
    ];
    for (header, tensors, says) in each {
        let (_folder, path) = altered("data2vec", header, tensors);
        match (says, said(&path)) {
            ("", read) => assert_eq!(read, Ok(())),
            (says, read) => {
                assert!(matches!(&read, Err((true, message)) if message.contains(says)), "{says}: {read:?}");
            }
        }
    }
}

/// What only the recipe tells.
#[test]
fn a_case_that_does_not_go_with_its_recipe_is_refused_or_not_comparable() {
    let cx = Context::new(Device::Cpu, 1);
    let refused: [(&dyn Fn(&mut TensorMap), &str, &str); 4] = [
        (&|t| t.get_mut("masked").unwrap().data[0] = 16.0, "", "holds 16, a patch that an image does not have"),
        (&|t| t.get_mut("masked").unwrap().data[..6].fill(7.0), "", "names a patch twice"),
        (&|t| drop(t.remove("masked")), "", "10 patches of an image visible and 6 masked, the case 16"),
        (&|_| {}, "stages.pretrain.student.drop_path=0.1", "without stochastic depth"),
    ];
    for (tensors, set, says) in refused {
        let (_folder, path) = altered("data2vec", &|_| {}, tensors);
        let sets: Vec<&str> = Some(set).filter(|set| !set.is_empty()).into_iter().collect();
        let error = try_replay(&cx, &path, &sets).unwrap_err();
        assert!(error.is_users() && error.to_string().contains(says), "{says}: {error}");
    }
    let missing: [&'static str; 5] = [
        "start.mask_token",
        "start.teachers.ema.cls_token",
        "expect.grad.cls_token",
        "expect.param.mask_token",
        "expect.moving.2.teachers.ema.cls_token",
    ];
    for name in missing {
        let (_folder, path) = altered("data2vec", &|_| {}, &|t| drop(t.remove(name).unwrap()));
        assert_eq!(replay(&cx, &path, &[]).error(), f64::INFINITY, "{name}");
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
        let (_folder, path) = with_setting(setting, "bogus");
        let error = Case::read(&path).map(drop).unwrap_err().to_string();
        assert!(error.contains("bogus") && error.contains(says), "{setting}: {error}");
    }
}

#[test]
fn micro_batches_are_replayed_and_other_batches_refused() {
    let default = case("paper_default");
    let cx = Context::new(Device::Cpu, 1);
    let whole = replay(&cx, &default, &[]);
    let halves = replay(&cx, &default, &["stages.pretrain.batch.micro=2"]);
    assert!(halves.error() < 1e-4, "{:.1e}", halves.error());
    assert_ne!(halves.losses, whole.losses, "two passes add up in another order");
    for (set, says) in [
        ("stages.pretrain.batch.effective=8", "batch.effective`: 8 images, the case has 4"),
        ("stages.pretrain.batch.micro=3", "3 does not divide"),
        ("stages.pretrain.masker.ratio=0.5", "masker`: leaves 18 patches of an image visible"),
        ("~stages.pretrain.masker", "masker`: leaves 36 patches"),
    ] {
        let error = try_replay(&cx, &default, &[set]).unwrap_err().to_string();
        assert!(error.contains(says), "{set}: {error}");
    }
}

#[test]
fn a_loss_that_is_not_finite_is_told_without_advice_for_runs() {
    let (_folder, path) = altered("paper_default", &|_| {}, &|t| t.get_mut("images").unwrap().data[0] = f32::NAN);
    let error = try_replay(&Context::new(Device::Cpu, 1), &path, &[]).unwrap_err();
    assert!(!error.is_users());
    assert!(error.to_string().ends_with("e-4)") || error.to_string().ends_with("e-3)"), "{error}");
}
