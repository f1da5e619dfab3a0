//! What stands beside weights: towers saved by transformers, timm and open_clip (`tests/fixtures/weights/make_beside.py`)
//! compute what those programs compute, from a recipe that names the weights alone; and what contradicts it is refused.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use maskalign_core::{
    Context, Device, ImageBatch,
    components::{
        teachers::{Teacher, TeacherBuild, Wants},
        tokens::Masks,
        towers::{Environment, MissingWeights, PlanContext, TrainedStudents},
    },
    nn::Arch,
    plugin::Build,
    weights::{SaidActivation, timm_name},
};
use maskalign_registry::{
    Input, LoadRequest, Loaded, NoRecipes, Recipe, Registry, Report, ShowOrigin, Slot, TeacherTag, fingerprint,
};
use serde_json::{Value, json};

use crate::support::{fixture, relative_error};

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/weights/beside").join(name)
}

/// A recipe with this teacher, on images of 28 pixels.
fn recipe(teacher: &str) -> LoadRequest<'static> {
    let text = format!(
        "name: beside\nstages:\n  knn:\n    type: knn\n    train: {{ dataset: {{ type: sample, split: train }} }}\n    \
         test: {{ dataset: {{ type: sample, split: test }} }}\n    teachers:\n      teacher: {teacher}\n"
    );
    LoadRequest {
        input: Input::Text { name: "recipe.yaml".into(), text },
        sets: &[],
        env: &|_| None,
        builtins: &NoRecipes,
    }
}

fn load(teacher: &str) -> Result<Loaded, Report> {
    Recipe::load(&recipe(teacher), Registry::global().unwrap())
}

fn options(loaded: &Loaded) -> Value {
    loaded.resolved()["stages"]["knn"]["teachers"]["teacher"].clone()
}

/// The states after the last block of the teacher that a recipe resolves to.
fn last_states(loaded: &Loaded, images: &ImageBatch) -> Vec<f32> {
    let slot: Slot<TeacherTag> = serde_json::from_value(options(loaded)).unwrap();
    let teacher: Box<dyn Teacher> = slot.build().unwrap();
    let planned = teacher
        .plan(&PlanContext {
            data_size: 28,
            students: &BTreeMap::new(),
            student: None,
            environment: Environment::Checked,
            missing_weights: MissingWeights::Refused,
        })
        .unwrap_or_else(|refusal| panic!("{refusal}"));
    let cx = Context::new(Device::Cpu, 1);
    let trained = TrainedStudents::default();
    let teacher = planned.build(&mut TeacherBuild { cx: &cx, trained: &trained, student: None }).unwrap();
    let last = teacher.shape().arch.depth - 1;
    let wants = Wants { levels: [last].into(), whole: true, ..Wants::default() };
    let pass = teacher.begin(&cx, images, &wants).unwrap();
    let masks = Masks::all_visible(images.batch, teacher.shape().grid.patches());
    let found = teacher.finish(&cx, pass, &wants, &masks).unwrap();
    found[&last].x.to_vec()
}

#[test]
fn towers_compute_what_the_programs_do_that_saved_them() {
    let mut expected = fixture("tests/fixtures/weights/beside/expected.safetensors");
    let images = ImageBatch { pixels: expected.remove("images").unwrap().data, batch: 2, size: 28 };
    for (name, kind) in [
        ("clip_gelu", "clip"),
        ("clip_both", "clip"),
        ("vit", "dino"),
        ("vit", "vit"),
        ("dinov2", "dinov2"),
        ("timm", "vit"),
        ("timm_no_class", "vit"),
        ("open_clip", "clip"),
        ("open_clip_quick", "clip"),
    ] {
        let folder = case(name);
        let loaded = load(&format!("{{ type: {kind}, weights: '{}' }}", folder.display()))
            .unwrap_or_else(|report| panic!("{name}: {}", report.render()));
        let error = relative_error(&last_states(&loaded, &images), &expected[name].data);
        assert!(error < 1e-5, "{name} as {kind}: {error:.1e}");
    }
}

#[test]
fn what_is_taken_is_in_the_resolved_recipe_with_its_place() {
    let file = case("clip_gelu").join("model.safetensors");
    let loaded = load(&format!("{{ type: clip, weights: '{}' }}", file.display())).unwrap();
    let options = options(&loaded);
    assert_eq!(options["arch"], json!({ "dim": 16, "depth": 2, "heads": 4, "mlp": 48, "patch": 7 }));
    assert_eq!(options["activation"], "gelu");
    assert_eq!(
        (&options["eps"], &options["projection"], &options["image_size"]),
        (&json!(0.01), &json!(12), &json!(14))
    );
    assert_eq!(options["statistics"], json!({ "mean": [0.1, 0.2, 0.3], "std": [0.6, 0.7, 0.8] }));

    let shown = loaded.resolved_yaml(ShowOrigin::Yes);
    let line = |name: &str, key: &str| {
        let text = fs::read_to_string(case("clip_gelu").join(name)).unwrap();
        1 + text.lines().position(|line| line.contains(&format!("\"{key}\""))).unwrap()
    };
    for (option, name, key) in [
        ("activation: gelu", "config.json", "hidden_act"),
        ("heads: 4", "config.json", "num_attention_heads"),
        ("depth: 2", "config.json", "num_hidden_layers"),
        ("image_size: 14", "preprocessor_config.json", "crop_size"),
    ] {
        let shown =
            shown.lines().find(|line| line.trim_start().starts_with(option)).unwrap_or_else(|| panic!("{shown}"));
        let place = format!("{}:{}", case("clip_gelu").join(name).display(), line(name, key));
        assert!(shown.ends_with(&place), "{shown} is said at {place}");
    }

    // The resolved recipe says it all: it is the same recipe, wherever its weights are.
    let again = load(&options.to_string()).unwrap();
    assert_eq!(fingerprint(again.resolved()), fingerprint(loaded.resolved()));
    let bare = Recipe::load_without_environment(
        &recipe(&format!("{{ type: clip, weights: '{}' }}", file.display())),
        Registry::global().unwrap(),
    )
    .unwrap();
    assert_eq!(self::options(&bare)["activation"], "quick_gelu", "no file is read for another machine");
    assert_ne!(bare.fingerprint(), loaded.fingerprint());
}

#[test]
fn what_contradicts_it_is_refused_with_both_places() {
    for (name, teacher, wrong, said) in [
        (
            "clip_gelu",
            "type: clip, activation: quick_gelu",
            "`activation` is `quick_gelu`, and these weights",
            "hidden_act",
        ),
        ("clip_gelu", "type: clip, eps: 1.0e-5", "`eps` is 0.00001, and these weights", "layer_norm_eps"),
        ("clip_gelu", "type: clip, statistics: clip", "`statistics` is `clip`, and these weights", "image_mean"),
        ("clip_gelu", "type: clip, projection: 24", "`projection` is 24, and these weights", "projection_dim"),
        (
            "clip_gelu",
            "type: clip, arch: { dim: 16, depth: 2, heads: 2, mlp: 48, patch: 7 }",
            "`arch` has 2 attention heads, and the tower in `weights` 4",
            "num_attention_heads",
        ),
        (
            "clip_gelu",
            "type: clip, arch: base_16",
            "`arch` has 768 channels, 12 blocks, 12 attention heads, 3072 channels inside the MLP, 16 pixels a side of a patch, and the tower in `weights` 16, 2, 4, 48, 7",
            "hidden_size",
        ),
        ("clip_both", "type: dino", "these weights need the activation `quick_gelu`", "hidden_act"),
        ("registers", "type: dinov2", "these weights have 4 register tokens", "num_register_tokens"),
        ("timm_no_class", "type: dino", "a tower without a class token", "class_token"),
        ("timm_no_class", "type: vit, cls_token: true", "`cls_token` is true, and these weights", "class_token"),
    ] {
        let folder = case(name);
        let report = load(&format!("{{ {teacher}, weights: '{}' }}", folder.display())).unwrap_err();
        let found = report.0.iter().find(|found| found.message.contains(wrong));
        let found = found.unwrap_or_else(|| panic!("{teacher}: {}", report.render()));
        let [ours, theirs] = &found.labels[..] else { panic!("{}", report.render()) };
        assert_eq!(ours.place.source.name(), "recipe.yaml");
        assert!(theirs.place.source.name().contains("config.json"), "{}", report.render());
        let line = theirs.place.source.line(theirs.place.span.start);
        assert!(
            line.contains(&format!("\"{said}\"")) || line.trim_start().starts_with(|c: char| c.is_ascii_digit()),
            "{line}"
        );
        assert!(!found.help.is_empty());
    }
}

#[test]
fn a_size_of_ones_own_is_no_contradiction_and_null_takes_the_datas() {
    let folder = case("clip_gelu");
    let with = |size: &str| {
        let loaded = load(&format!("{{ type: clip, weights: '{}', image_size: {size} }}", folder.display())).unwrap();
        options(&loaded)["image_size"].clone()
    };
    assert_eq!(with("21"), json!(21));
    assert_eq!(with("null"), Value::Null);
}

#[test]
fn it_counts_only_where_it_is_known_whose_it_is() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["model.safetensors", "config.json"] {
        fs::copy(case("clip_gelu").join(name), folder.path().join(name)).unwrap();
    }
    let heads = |file: &str| {
        let file = folder.path().join(file);
        load(&format!("{{ type: clip, weights: '{}' }}", file.display())).map(|loaded| options(&loaded)["arch"].clone())
    };
    let known = |arch: Result<Value, Report>| !arch.unwrap().is_null();
    assert!(known(heads("model.safetensors")));
    fs::rename(folder.path().join("model.safetensors"), folder.path().join("laion.safetensors")).unwrap();
    assert!(known(heads("laion.safetensors")), "the only weights there");
    fs::write(folder.path().join("other.pth"), "").unwrap();
    assert!(!known(heads("laion.safetensors")), "one of two");
    fs::copy(folder.path().join("laion.safetensors"), folder.path().join("model.safetensors")).unwrap();
    assert!(known(heads("model.safetensors")), "it has the name that the programs give");
    // Not of weights at all, and not readable.
    fs::write(folder.path().join("config.json"), "{ \"model_type\": \"bert\", \"hidden_size\": 12 }").unwrap();
    assert!(!known(heads("model.safetensors")));
    fs::write(folder.path().join("config.json"), "{ \"hidden_size\": ").unwrap();
    let report = heads("model.safetensors").unwrap_err();
    assert!(
        report.0[0].message.contains("config.json: it stands beside weights, and is no JSON"),
        "{}",
        report.render()
    );
    fs::write(folder.path().join("config.json"), "{ \"patch_size\": 7, \"layer_norm_eps\": -1 }").unwrap();
    let report = heads("model.safetensors").unwrap_err();
    assert!(report.0[0].place().unwrap().source.name().ends_with("config.json"), "{}", report.render());
}

#[test]
fn what_a_configuration_leaves_out_is_what_transformers_takes() {
    let defaults = fs::read_to_string(case("defaults.json")).unwrap();
    let defaults: BTreeMap<String, Value> = serde_json::from_str(&defaults).unwrap();
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("model.safetensors"), "").unwrap();
    for (model_type, theirs) in &defaults {
        let vision = if model_type == "clip" { json!({}) } else { Value::Null };
        let config = json!({ "model_type": model_type, "vision_config": vision });
        fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let kind = if model_type.starts_with("clip") { "clip" } else { "dino" };
        let loaded = load(&format!("{{ type: {kind}, weights: '{}' }}", folder.path().display()));
        let ours = options(&loaded.unwrap_or_else(|report| panic!("{}", report.render())));
        let arch: Arch = serde_json::from_value(ours["arch"].clone()).unwrap();
        let ours = json!({
            "arch": { "dim": arch.dim, "depth": arch.depth, "heads": arch.heads, "mlp": arch.mlp, "patch": arch.patch },
            "eps": ours["eps"],
            "activation": ours.get("activation").cloned().unwrap_or(json!("gelu")),
        });
        assert_eq!(ours, *theirs, "{model_type}");
    }
    assert_eq!(defaults.len(), 7);
}

#[test]
fn timms_names_say_what_timms_code_does() {
    let names = fs::read_to_string(case("names.json")).unwrap();
    let names: BTreeMap<String, Value> = serde_json::from_str(&names).unwrap();
    let mut known = 0;
    for (name, theirs) in &names {
        let Some(ours) = timm_name(name) else { continue };
        let activation = match ours.activation {
            SaidActivation::Gelu => "GELU",
            SaidActivation::QuickGelu => "QuickGELU",
            SaidActivation::Other(_) => "?",
        };
        let ours = json!({
            "dim": ours.dim, "depth": ours.depth, "heads": ours.heads, "mlp": 4 * ours.dim, "patch": ours.patch,
            "registers": ours.registers, "cls_token": ours.cls_token, "eps": ours.eps, "activation": activation,
        });
        assert_eq!(ours, *theirs, "{name}");
        known += 1;
    }
    assert!(known > 40, "{known} of {} names are known", names.len());
}

/// Files as the programs write them, in forms that the small towers above do not have. The values are those of the named
/// repositories and of the classes' defaults in transformers.
#[test]
fn every_form_that_programs_write_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let weights = folder.path().join("model.safetensors");
    fs::write(&weights, "").unwrap();
    let taken = |kind: &str, documents: &[(&str, Value)]| {
        for (name, value) in documents {
            fs::write(folder.path().join(name), value.to_string()).unwrap();
        }
        let loaded = load(&format!("{{ type: {kind}, weights: '{}' }}", weights.display()));
        for (name, _) in documents {
            fs::remove_file(folder.path().join(name)).unwrap();
        }
        options(&loaded.unwrap_or_else(|report| panic!("{}", report.render())))
    };
    // openai/clip-vit-large-patch14, with what newer versions leave out as defaults.
    let clip = json!({ "model_type": "clip", "projection_dim": 768, "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14 } });
    let crop = json!({ "crop_size": 224, "do_center_crop": true, "size": 224, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711] });
    let options = taken("clip", &[("config.json", clip), ("preprocessor_config.json", crop)]);
    assert_eq!(
        (&options["arch"], &options["projection"], &options["activation"]),
        (&json!("large_14"), &json!(768), &json!("quick_gelu"))
    );
    assert_eq!((&options["image_size"], &options["statistics"]), (&json!(224), &json!("clip")));
    // Both towers as LAION's first files have them: what is in `vision_config_dict` counts.
    let twice = json!({ "model_type": "clip", "vision_config": { "hidden_act": "quick_gelu" },
        "vision_config_dict": { "hidden_act": "gelu", "patch_size": 16 } });
    let options = taken("clip", &[("config.json", twice)]);
    assert_eq!((&options["arch"], &options["activation"]), (&json!("base_16"), &json!("gelu")));
    // facebook/dinov2-base: made for 518 pixels, and fed 224.
    let dino = json!({ "model_type": "dinov2", "hidden_size": 768, "image_size": 518, "layer_norm_eps": 1e-6, "mlp_ratio": 4,
        "num_attention_heads": 12, "num_hidden_layers": 12, "patch_size": 14, "use_swiglu_ffn": false });
    let fed = json!({ "crop_size": { "height": 224, "width": 224 }, "size": { "shortest_edge": 256 } });
    let options = taken("dinov2", &[("config.json", dino.clone()), ("preprocessor_config.json", fed)]);
    assert_eq!((&options["arch"], &options["image_size"]), (&json!("base_14"), &json!(224)));
    assert_eq!(taken("dinov2", &[("config.json", dino)])["image_size"], 518);
    // An image that is not cropped, nor normalised.
    let plain = json!({ "do_center_crop": false, "crop_size": 200, "size": { "height": 192, "width": 192 }, "do_normalize": false });
    let options = taken("vit", &[("config.json", json!({ "model_type": "vit" })), ("preprocessor_config.json", plain)]);
    assert_eq!(
        (&options["arch"], &options["image_size"], &options["eps"]),
        (&json!("base_16"), &json!(192), &json!(1e-12))
    );
    assert_eq!(options["statistics"], json!({ "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0] }));
    // timm/vit_base_patch16_clip_224.openai: timm's own note calls these weights QuickGELU's.
    let timm = |tag: &str| {
        json!({ "architecture": "vit_base_patch16_clip_224",
        "pretrained_cfg": { "tag": tag, "input_size": [3, 224, 224], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5] } })
    };
    let options = taken("clip", &[("config.json", timm("openai"))]);
    assert_eq!(
        (&options["activation"], &options["statistics"], &options["eps"]),
        (&json!("quick_gelu"), &json!("inception"), &json!(1e-5))
    );
    assert_eq!(taken("clip", &[("config.json", timm("laion2b"))])["activation"], "gelu");
    // open_clip around a tower of timm's, and of its own.
    let open_clip = json!({ "model_cfg": { "embed_dim": 512, "vision_cfg": { "timm_model_name": "vit_base_patch16_224", "image_size": 256 } } });
    let options = taken("clip", &[("open_clip_config.json", open_clip)]);
    assert_eq!(
        (&options["arch"], &options["projection"], &options["image_size"]),
        (&json!("base_16"), &json!(512), &json!(256))
    );
    let own = json!({ "model_cfg": { "embed_dim": 1024, "quick_gelu": true,
        "vision_cfg": { "image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14 } } });
    let options = taken("clip", &[("open_clip_config.json", own)]);
    assert_eq!((&options["arch"], &options["activation"]), (&json!("huge_14"), &json!("quick_gelu")));
    // A ResNet's and a text tower's say nothing of this tower.
    let resnet = json!({ "model_cfg": { "embed_dim": 1024, "vision_cfg": { "layers": [3, 4, 6, 3], "width": 64 } } });
    assert!(taken("clip", &[("open_clip_config.json", resnet)])["arch"].is_null());
}

#[test]
fn a_student_takes_all_but_the_size_of_images() {
    let folder = case("vit");
    let text = format!(
        "name: student\nstages:\n  finetune:\n    type: finetune\n    epochs: 1\n    \
         data: {{ dataset: {{ type: sample, split: train }} }}\n    \
         student: {{ type: vit, weights: '{}', positions: learned }}\n    optimizer: {{ type: adamw, base_lr: 1.0e-3 }}\n    \
         schedule: {{ type: cosine }}\n    batch: {{ effective: 8 }}\n",
        folder.display()
    );
    let request = LoadRequest { input: Input::Text { name: "recipe.yaml".into(), text }, ..recipe("") };
    let loaded =
        Recipe::load(&request, Registry::global().unwrap()).unwrap_or_else(|report| panic!("{}", report.render()));
    let student = &loaded.resolved()["stages"]["finetune"]["student"];
    assert_eq!(student["arch"], json!({ "dim": 16, "depth": 2, "heads": 4, "mlp": 48, "patch": 7 }));
    assert_eq!(
        (&student["eps"], &student["statistics"], &student["image_size"]),
        (&json!(0.1), &json!("inception"), &Value::Null)
    );
}
