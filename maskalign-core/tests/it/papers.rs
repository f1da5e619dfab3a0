//! Shipped recipes and components' defaults against the papers' own code: what it says (`fixtures/papers/recipes.json`, read
//! by hand) and what it computes (`fixtures/papers/derived.json`, recorded by `make_derived.py` beside it).

use std::{collections::BTreeMap, fs, path::Path};

use maskalign_core::{
    Context, Device, ImageBatch, Recompute, Tape, Tensor,
    components::{
        aligners::AlignInput,
        maskers::{Counts, counts},
        optimizers::{Optimizer, Update},
        schedules::Schedule,
        targets::{Normalize, TargetInput, TargetSource},
        teachers::Teacher,
        tokens::{Masks, Tokens},
        towers::{Environment, MissingWeights, PlanContext, TrainedStudents},
    },
    embedded,
    nn::{Arch, Init, Param, Role, Statistics},
    ops,
    plugin::Build,
    stages::{Finetune, LinearProbe, MicroBatch, PlannedPretrain, PlannedTraining, Pretrain, StageContext, Task},
};
use maskalign_registry::{
    Input, Kind, LoadRequest, Loaded, Recipe, RecipeSource, Registry, Scalar, ScheduleTag, Slot, TeacherTag,
    decode_options,
};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::support::{planned, relative_error};

const IMAGENET: usize = 1_281_167;
const TOLERANCE: f64 = 1e-6;

fn recorded(file: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/papers").join(file);
    serde_json::from_str(&fs::read_to_string(path).expect("the fixture")).expect("JSON")
}

fn derived(key: &str) -> Value {
    recorded("derived.json")[key].take()
}

fn list(value: &Value) -> &Vec<Value> {
    value.as_array().unwrap_or_else(|| panic!("no list: {value}"))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}"))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("no number: {value}"))
}

fn whole(value: &Value) -> usize {
    value.as_u64().unwrap_or_else(|| panic!("no count: {value}")) as usize
}

fn floats(value: &Value) -> Vec<f32> {
    list(value).iter().map(|value| number(value) as f32).collect()
}

fn wholes(value: &Value) -> Vec<u32> {
    list(value).iter().map(|value| whole(value) as u32).collect()
}

fn close(ours: f64, theirs: f64) -> bool {
    (ours - theirs).abs() <= TOLERANCE * theirs.abs()
}

/// The same values; numbers by [`TOLERANCE`], whether they are written as whole ones or not.
fn same(ours: &Value, theirs: &Value) -> bool {
    match (ours, theirs) {
        (Value::Number(_), Value::Number(_)) => close(number(ours), number(theirs)),
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, value)| b.get(key).is_some_and(|other| same(value, other)))
        }
        _ => ours == theirs,
    }
}

fn at<'v>(value: &'v Value, path: &str) -> Option<&'v Value> {
    path.split('.').try_fold(value, |value, key| match value {
        Value::Array(items) => items.get(key.parse::<usize>().ok()?),
        other => other.get(key),
    })
}

/// The paths of all values that are no mappings and no lists.
fn leaves(value: &Value, path: &str, found: &mut Vec<String>) {
    let below = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    match value {
        Value::Object(fields) => fields.iter().for_each(|(key, value)| leaves(value, &below(key), found)),
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(i, value)| leaves(value, &below(&i.to_string()), found));
        }
        _ => found.push(path.to_owned()),
    }
}

struct Shipped;

impl RecipeSource for Shipped {
    fn builtin(&self, name: &str) -> Option<&str> {
        embedded::RECIPES.iter().find(|(known, _)| *known == name).map(|(_, text)| *text)
    }

    fn names(&self) -> Vec<&str> {
        embedded::RECIPES.iter().map(|(name, _)| *name).collect()
    }
}

fn guide() -> String {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/recipes.md");
    fs::read_to_string(page).expect("the guide")
}

/// A shipped recipe, or the guide's for fine-tuning.
fn written(name: &str) -> String {
    if name != "finetune" {
        return Shipped.builtin(name).unwrap_or_else(|| panic!("no recipe {name}")).to_owned();
    }
    let guide = guide();
    let begin = guide.find("# recipe finetuned.yaml").expect("the guide's recipe");
    let length = guide[begin..].find("```").expect("the end of the block");
    guide[begin..begin + length].to_owned()
}

/// What a recipe's readers are told of it before its values: its leading comment, or the page that holds it.
fn told(name: &str) -> String {
    let lines = match name {
        "finetune" => guide(),
        _ => written(name).lines().map_while(|line| line.strip_prefix('#')).collect::<Vec<_>>().join(" "),
    };
    lines.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn loaded(name: &str, sets: &[&str]) -> Loaded {
    let sets: Vec<String> = sets.iter().map(|&set| set.to_owned()).collect();
    let request = LoadRequest {
        input: Input::Text { name: name.to_owned(), text: written(name) },
        sets: &sets,
        env: &|name| (name == "IMAGENET_DIR").then(|| "imagenet".to_owned()),
        builtins: &Shipped,
    };
    let loaded = Recipe::load(&request, Registry::global().expect("a registry"));
    loaded.unwrap_or_else(|report| panic!("{name}: {}", report.render()))
}

fn options<S: DeserializeOwned>(loaded: &Loaded, stage: &str) -> S {
    decode_options(loaded.recipe().stages[stage].options_value()).expect("its options")
}

fn pretrain(name: &str, sets: &[&str]) -> PlannedPretrain {
    let stage: Pretrain = options(&loaded(name, sets), "pretrain");
    let context = StageContext {
        name: "pretrain",
        seed: 0,
        students: &BTreeMap::new(),
        classifiers: &BTreeMap::new(),
        environment: Environment::Ignored,
        missing_weights: MissingWeights::Random,
        recompute: Recompute::Never,
    };
    stage.plan_pretrain(&context).unwrap_or_else(|refusals| panic!("{name}: {refusals:?}"))
}

fn tensor(values: &Value, columns: usize) -> Tensor {
    let values = floats(values);
    let rows = values.len() / columns;
    Tensor::new(&Device::Cpu, values, rows, columns).expect("a matrix")
}

/// Every value of a recipe is the paper's, or differs for a reason that its readers are told; nothing is left unread.
#[test]
fn recipes_say_what_the_papers_code_says() {
    let recorded = recorded("recipes.json");
    let own: Vec<&str> = list(&recorded["our_own"]).iter().map(text).collect();
    let recipes = recorded["recipes"].as_object().expect("recipes");
    let of_papers = |name: &str| !name.starts_with("quickstart") && !name.starts_with("bench");
    for (name, _) in embedded::RECIPES.iter().filter(|(name, _)| of_papers(name)) {
        assert!(recipes.contains_key(*name), "nobody read the code of {name}");
    }
    for (name, recipe) in recipes {
        assert!(recorded["repositories"].get(text(&recipe["repository"])).is_some(), "{name}");
        let resolved = loaded(name, &[]).resolved().clone();
        let stage = &resolved["stages"][text(&recipe["stage"])];
        let told = told(name);
        let explained = |entry: &Value| {
            assert!(told.contains(text(&entry["said"])), "{name} does not say: {}", entry["said"]);
        };
        let values = list(&recipe["values"]);
        for entry in values {
            let path = text(&entry["path"]);
            let ours = at(stage, path).unwrap_or_else(|| panic!("{name} has no {path}"));
            assert!(!text(&entry["read"]).is_empty(), "{name}: {path}");
            let theirs = &entry["value"];
            let Some(because) = entry.get("because") else {
                assert!(
                    same(ours, theirs),
                    "{name}: {path} is {ours}, the paper's code has {theirs} ({})",
                    entry["read"]
                );
                continue;
            };
            assert!(!text(because).is_empty());
            assert!(same(ours, &entry["ours"]), "{name}: {path} is {ours}, recorded as {}", entry["ours"]);
            assert!(!same(ours, theirs), "{name}: {path} is the paper's: no reason is needed");
            explained(entry);
        }
        for entry in list(&recipe["differences"]) {
            assert!(["what", "theirs", "ours", "because", "read"].iter().all(|key| !text(&entry[key]).is_empty()));
            explained(entry);
        }
        list(&recipe["not_read"]).iter().for_each(explained);

        let mut paths = Vec::new();
        leaves(stage, "", &mut paths);
        let covers = |known: &str, path: &str| {
            path.strip_prefix(known).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        for path in paths {
            let read = values.iter().any(|entry| covers(text(&entry["path"]), &path));
            assert!(
                read || own.iter().any(|known| covers(known, &path)),
                "{name}: nobody read {path} in the paper's code"
            );
        }
    }
}

/// What a line of a header sets: `--set A`, `--set 'B'`.
fn sets_in(line: &str) -> Vec<String> {
    let shown = line.split("--set ").skip(1);
    shown
        .map(|rest| match rest.strip_prefix('\'') {
            Some(quoted) => quoted.split('\'').next().unwrap_or_default().to_owned(),
            None => rest.split([' ', '`', ')']).next().unwrap_or_default().to_owned(),
        })
        .collect()
}

/// The ablations that headers show change the recipe, and fit it.
#[test]
fn what_headers_set_is_there_to_be_set() {
    let mut lines = 0;
    for (name, text) in embedded::RECIPES {
        let header = text.lines().map_while(|line| line.strip_prefix('#'));
        for line in header.filter(|line| line.contains("--set ") && !line.contains("maskalign run")) {
            let sets = sets_in(line);
            let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
            let changed = loaded(name, &sets);
            assert_ne!(changed.resolved(), loaded(name, &[]).resolved(), "{name}: {line}");
            if changed.recipe().stages.contains_key("pretrain") {
                pretrain(name, &sets);
            }
            lines += 1;
        }
    }
    assert!(lines > 10, "{lines} lines");
}

#[test]
fn defaults_of_components_are_those_of_the_papers_code() {
    let recorded = recorded("recipes.json");
    let registry = Registry::global().expect("a registry");
    for entry in list(&recorded["components"]) {
        let (component, path) = (text(&entry["component"]), text(&entry["path"]));
        let kind = Kind::from_name(text(&entry["kind"])).expect("a kind");
        let value = registry.component(kind, "component", component).unwrap_or_else(|r| panic!("{}", r.render()));
        let ours = at(&value, path).unwrap_or_else(|| panic!("{component} has no {path}"));
        assert!(
            same(ours, &entry["value"]),
            "{component}: {path} is {ours}, there {} ({})",
            entry["value"],
            entry["read"]
        );
        assert!(recorded["repositories"].get(text(&entry["repository"])).is_some(), "{component}");
    }
    for (name, sizes) in recorded["towers"].as_object().expect("towers") {
        let Arch { dim, depth, heads, mlp, patch } = Arch::named(name).expect("a name");
        let ours = [dim, depth, heads, mlp, patch];
        assert_eq!(ours, ["dim", "depth", "heads", "mlp", "patch"].map(|key| whole(&sizes[key])), "{name}");
    }
    for (name, projection) in recorded["projections"].as_object().expect("projections") {
        let text = format!("{{ type: clip, arch: {name}, weights: x }}");
        let value = registry.component(Kind::Teacher, "teacher", &text).unwrap_or_else(|r| panic!("{}", r.render()));
        let slot: Slot<TeacherTag> = serde_json::from_value(value).expect("a slot");
        let teacher: Box<dyn Teacher> = slot.build().expect("a teacher");
        let context = PlanContext {
            data_size: 224,
            students: &BTreeMap::new(),
            student: None,
            environment: Environment::Ignored,
            missing_weights: MissingWeights::Refused,
        };
        let planned = teacher.plan(&context).unwrap_or_else(|refusal| panic!("{refusal}"));
        assert_eq!(planned.shape().projection, Some(whole(&projection["outputs"])), "{name}");
    }
    // What a recipe leaves out of a student, planning fills in.
    let absent = &recorded["absent_of_a_student"];
    for name in ["maskalign_vitb_clip", "mae_vitb", "umt_image_vitb", "data2vec_vitb"] {
        let shape = pretrain(name, &[]).student().shape();
        assert!(close(shape.eps, number(&absent["eps"]["value"])), "{name}");
        assert_eq!(
            (shape.statistics, text(&absent["statistics"]["value"])),
            (Statistics::IMAGENET, "imagenet"),
            "{name}"
        );
    }
    for (name, ours) in [("imagenet", Statistics::IMAGENET), ("clip", Statistics::CLIP)] {
        let theirs = &recorded["statistics"][name];
        assert_eq!(
            (ours.mean.to_vec(), ours.std.to_vec()),
            (floats(&theirs["mean"]), floats(&theirs["std"])),
            "{name}"
        );
    }
}

/// The training of a recipe's stage, whatever its kind.
fn training(name: &str) -> PlannedTraining {
    match name {
        "finetune" | "finetune_vitb" | "finetune_vitl" | "finetune_vitb_mae" | "finetune_vitl_mae" => {
            let stage: Finetune = options(&loaded(name, &["~stages.finetune.student.weights"]), "finetune");
            planned(|context| stage.plan_finetune(context)).unwrap_or_else(|r| panic!("{r:?}")).training().clone()
        }
        "linear_probe_vitb" | "linear_probe_vitl" => {
            // The learning rate is MaskAlign's; the schedule that is recorded has it too.
            let stage: LinearProbe = options(&loaded(name, &["stages.probe.classes=1000"]), "probe");
            planned(|context| stage.plan_probe(context)).unwrap_or_else(|r| panic!("{r:?}")).training().clone()
        }
        _ => pretrain(name, &[]).training().clone(),
    }
}

/// Rates at the beginning, around the end of the warm-up, in the middle and at the end of training on ImageNet.
#[test]
fn learning_rates_are_those_of_the_papers_code() {
    let mut schedules = derived("schedules");
    schedules["finetune"] = derived("finetune")["schedule"].take();
    let schedules = schedules.as_object().expect("schedules");
    assert_eq!(schedules.len(), 13);
    for (name, theirs) in schedules {
        let training = training(name);
        let mut trainer = training.trainer_for(IMAGENET);
        let mut ours = |update: usize| {
            trainer.updates = update as u64;
            trainer.lr()
        };
        let peak = training.optimizer.peak_lr(training.batch.effective);
        assert!(close(peak, number(&theirs["peak"])), "{name}: {peak}, there {}", theirs["peak"]);
        let per_epoch = whole(&theirs["per_epoch"]);
        // Where updates are pairs of an odd number of halves, theirs lie between ours.
        let between = theirs.get("iterations").is_some_and(|i| !whole(i).is_multiple_of(per_epoch));
        for rate in list(&theirs["rates"]) {
            let (update, theirs_now) = (whole(&rate[0]), number(&rate[1]));
            let warmup = theirs.get("warmup_to_the_peak").map(whole).filter(|warmup| update < *warmup);
            let expected = match warmup {
                Some(warmup) => theirs_now * (warmup - 1) as f64 / warmup as f64,
                None => theirs_now,
            };
            let mine = ours(update);
            if between && !update.is_multiple_of(per_epoch) {
                let around = [ours(update.saturating_sub(1)), ours(update + 1)];
                let (low, high) = (around[0].min(around[1]), around[0].max(around[1]));
                assert!((low..=high).contains(&expected), "{name}, update {update}: {around:?}, there {expected}");
            } else {
                assert!(
                    (mine - expected).abs() <= TOLERANCE * expected.abs() + 1e-12 * peak,
                    "{name}, update {update}: {mine}, there {expected}"
                );
            }
        }
    }
}

/// Whether an update moves a parameter that has no gradient but for decay.
fn decays(cx: &Context, optimizer: &dyn Optimizer, p: &mut Param) -> bool {
    let (rows, columns) = p.value.shape();
    p.load(&vec![1.0; rows * columns]).expect("room");
    let mut tape = Tape::training();
    let nothing = ops::scale(cx, &mut tape, &p.value, 0.0).expect("room");
    let loss = ops::sum(cx, &mut tape, &nothing).expect("room");
    let gradients = tape.backward(&loss).expect("gradients");
    let mut state = [0, 1].map(|_| Tensor::zeros(cx.device(), rows, columns).expect("room"));
    let update = Update { lr: 0.1, progress: 0.0, step: 1, gradient_scale: 1.0 };
    optimizer.update(cx, p, &gradients, &mut state, update).expect("an update");
    p.value.to_vec()[0] < 1.0
}

/// What makes a pre-training recipe small: towers of 16 channels over 16 patches.
fn small(depth: usize, teacher: Option<(&str, usize)>, more: &[&str]) -> Vec<String> {
    let tower = |depth: usize| format!("{{dim: 16, depth: {depth}, heads: 2, patch: 7}}");
    let mut sets = vec![
        "stages.pretrain.data.transforms=[{type: center_crop, size: 28}]".to_owned(),
        format!("stages.pretrain.student.arch={}", tower(depth)),
    ];
    if let Some((name, depth)) = teacher {
        let teacher = format!("stages.pretrain.teachers.{name}");
        sets.push(format!("{teacher}.arch={}", tower(depth)));
        sets.push(format!("{teacher}.image_size=28"));
        sets.extend((name == "clip").then(|| format!("{teacher}.projection=8")));
    }
    sets.extend(more.iter().map(|set| (*set).to_owned()));
    sets
}

fn small_recipes() -> Vec<(&'static str, Vec<String>)> {
    let decoder = |objective: &str| {
        ["dim=16", "depth=2", "heads=2"].map(|set| format!("stages.pretrain.objectives.{objective}.aligner.{set}"))
    };
    let with = |objective: &str, mut sets: Vec<String>| {
        sets.extend(decoder(objective));
        sets
    };
    let mut crossmae = with("pixels", small(12, None, &[]));
    crossmae.push("stages.pretrain.objectives.pixels.aligner.depth=3".into());
    vec![
        ("maskalign_vitb_clip", small(12, Some(("clip", 12)), &[])),
        ("maskalign_vitb_dino", small(12, Some(("dino", 12)), &[])),
        ("maskalign_vitl_clip_b", small(24, Some(("clip", 12)), &[])),
        ("maskalign_vitl_clip_l", small(24, Some(("clip", 24)), &[])),
        ("mae_vitb", with("pixels", small(12, None, &[]))),
        ("crossmae_vitb", crossmae),
        ("milan_vitb", with("features", small(12, Some(("clip", 12)), &[]))),
        ("umt_image_vitb", small(12, Some(("clip", 12)), &["stages.pretrain.masker.visible=4"])),
        ("data2vec_vitb", small(12, None, &["stages.pretrain.masker={type: block, masked: 8, min_block: 2}"])),
    ]
}

fn small_recipe(name: &str, more: &[&str]) -> PlannedPretrain {
    let (_, sets) = small_recipes().into_iter().find(|(known, _)| *known == name).expect("a recipe");
    let sets: Vec<&str> = sets.iter().map(String::as_str).chain(more.iter().copied()).collect();
    pretrain(name, &sets)
}

/// Which parameters decay, and which no loss reaches; and the numbers that the optimizer is made with.
#[test]
fn groups_of_pre_training_are_those_of_the_papers_code() {
    let (groups, optimizers) = (derived("groups"), derived("optimizers"));
    let cx = Context::new(Device::Cpu, 1);
    assert_eq!(groups.as_object().expect("groups").len(), small_recipes().len());
    for (name, _) in small_recipes() {
        let theirs = groups[name].as_object().unwrap_or_else(|| panic!("nobody recorded {name}"));
        let plan = small_recipe(name, &[]);
        let mut model = plan.model(&cx, &TrainedStudents::default()).expect("a model");
        let (mut ours, mut idle) = (BTreeMap::new(), Vec::new());
        model.visit(&mut |p| match p.is_trained() {
            true => {
                ours.insert(p.name.clone(), decays(&cx, &*plan.training().optimizer, p));
            }
            false if [Role::Student, Role::Head].contains(&p.role()) => idle.push(p.name.clone()),
            false => {}
        });
        for (parameter, fact) in theirs {
            match fact["gradient"].as_bool().expect("a fact") {
                true => {
                    let ours = ours.get(parameter).unwrap_or_else(|| panic!("{name}: {parameter} is not trained"));
                    assert_eq!(fact["decays"], *ours, "{name}: {parameter}");
                }
                false => assert!(idle.contains(parameter), "{name}: {parameter} has no gradient there"),
            }
        }
        for parameter in ours.keys() {
            assert!(theirs.contains_key(parameter), "{name}: {parameter} is not there");
        }
        let loaded = loaded(name, &[]);
        let optimizer = &loaded.resolved()["stages"]["pretrain"]["optimizer"];
        for key in ["betas", "eps"] {
            assert!(same(&optimizer[key], &optimizers[name][key]), "{name}: {key}");
        }
    }
}

#[test]
fn masks_keep_and_predict_what_the_papers_code_does() {
    let masks = derived("masks");
    for code in ["maskalign", "mae"] {
        for case in list(&masks[code]) {
            let (patches, ratio) = (whole(&case[0]), number(&case[1]));
            let ours = counts("random", patches, Some(ratio), None, None, None).expect("counts");
            let visible = whole(&case[2]);
            assert_eq!(ours, Counts { visible, masked: patches - visible }, "{code}: {case}");
        }
    }
    for case in list(&masks["crossmae"]) {
        let [patches, visible, masked] = [0, 3, 4].map(|i| whole(&case[i]));
        let ours = counts("random", patches, Some(number(&case[1])), None, None, Some(number(&case[2])));
        assert_eq!(ours.expect("counts"), Counts { visible, masked }, "CrossMAE: {case}");
    }
}

/// Features in every way that MaskAlign's code knows, with variances at which eps counts; pixels through MAE's loss.
#[test]
fn targets_are_normalised_as_the_papers_code_does() {
    let targets = derived("targets");
    let cx = Context::new(Device::Cpu, 1);
    let features = &targets["features"];
    let hidden = tensor(&features["hidden"], 6);
    let masks = Masks::even(2, wholes(&features["visible"]), Vec::new());
    let rows = masks.rows(Tokens { cls: true, visible: true, masked: false }, true);
    let rows = ops::flat_rows(&rows, 2, 5);
    for (theirs, ours) in [
        ("none", Normalize::None),
        ("l2", Normalize::L2),
        ("whiten", Normalize::Whiten),
        ("bn", Normalize::StandardizeBatch),
    ] {
        let normed = ours.apply(&cx, &hidden).expect("room");
        let got = ops::gather_rows(&cx, &mut Tape::inference(), &[&normed], &rows).expect("room").to_vec();
        let error = relative_error(&got, &floats(&features["expect"][theirs]));
        assert!(error < 2e-6, "{theirs}: {error:.1e}");
    }

    let pixels = &targets["pixels"];
    let plan = small_recipe("mae_vitb", &[]);
    let objective = &plan.objectives()[0];
    let TargetSource::Images(target) = &objective.target.source else { panic!("pixels are of images") };
    let images = ImageBatch { pixels: floats(&pixels["images"]), batch: 2, size: 28 };
    let masks = Masks::even(2, wholes(&pixels["visible"]), wholes(&pixels["masked"]));
    let input = TargetInput { images: &images, masks: &masks, tokens: objective.tokens };
    let target = target.outputs(&cx, &input).expect("a target");
    let predicted = tensor(&pixels["predicted"], 147);
    let loss = objective.loss.term(&cx, &mut Tape::inference(), &predicted, &target[0]).expect("a loss");
    let loss = f64::from(loss.value() * objective.level_weights[0]) * objective.weight.at(0.0);
    assert!((loss - number(&pixels["loss"])).abs() < 1e-5 * loss, "{loss}, there {}", pixels["loss"]);
}

/// The weighted sum of an objective's terms for given outputs and targets of every level.
fn objective_loss(plan: &PlannedPretrain, outputs: &[Tensor], targets: &[Tensor]) -> f64 {
    let cx = Context::new(Device::Cpu, 1);
    let objective = &plan.objectives()[0];
    let term = |(&level, &weight): (&usize, &f32)| {
        let term = objective.loss.term(&cx, &mut Tape::inference(), &outputs[level], &targets[level]).expect("a loss");
        f64::from(term.value() * weight) * objective.weight.at(0.0)
    };
    objective.levels.iter().zip(&objective.level_weights).map(term).sum()
}

#[test]
fn losses_are_those_of_the_papers_code() {
    let losses = derived("losses");
    let levels = |side: &str| list(&losses[side]).iter().map(|level| tensor(level, 4)).collect::<Vec<_>>();
    let (student, teacher) = (levels("student"), levels("teacher"));
    for case in list(&losses["cases"]) {
        let (weights, kind) = (text(&case["weights"]), text(&case["kind"]));
        let levels = match weights {
            "mean" | "linear_decay" => "all",
            "out" => "{last: 1}",
            "top5" => "{last: 5}",
            "top3" => "{last: 3}",
            _ => "[4]",
        };
        let (loss, weight) = match kind {
            "smoothl1" => ("smooth_l1", 2),
            "l2" => ("mse", 1),
            _ => ("l1", 1),
        };
        let level_weights = if weights == "linear_decay" { "linear" } else { "uniform" };
        let objective = "stages.pretrain.objectives.align";
        let mut sets = small(6, Some(("clip", 6)), &[]);
        sets.extend([
            format!("{objective}.target.levels={levels}"),
            format!("{objective}.loss={{type: {loss}}}"),
            format!("{objective}.weight={weight}"),
            format!("{objective}.level_weights={level_weights}"),
        ]);
        let plan = pretrain("maskalign_vitb_clip", &sets.iter().map(String::as_str).collect::<Vec<_>>());
        let (ours, theirs) = (objective_loss(&plan, &student, &teacher), number(&case["loss"]));
        assert!(close(ours, theirs), "{weights}, {kind}: {ours}, there {theirs}");
    }
    let milan = &losses["milan"];
    let plan = small_recipe("milan_vitb", &[]);
    let mut outputs = vec![tensor(&milan["prediction"], 6); 12];
    outputs[0] = outputs[11].clone();
    let targets = vec![tensor(&milan["target"], 6); 12];
    let (ours, theirs) = (objective_loss(&plan, &outputs, &targets), number(&milan["loss"]));
    assert!(close(ours, theirs), "MILAN: {ours}, there {theirs}");
}

/// The guide's fine-tuning has the groups and factors of MaskAlign's `param_groups_lrd`, and its `fc_norm` that of
/// `models_vit.py`: what is pooled here is so small that eps counts.
#[test]
fn fine_tuning_is_that_of_the_papers_code() {
    let recorded = derived("finetune");
    let cx = Context::new(Device::Cpu, 1);
    let sets = [
        "~stages.finetune.student.weights",
        "~stages.finetune.mixing",
        "stages.finetune.student.arch={dim: 8, depth: 4, heads: 2, patch: 7}",
        "stages.finetune.data.transforms=[{type: center_crop, size: 28}]",
        "stages.finetune.classes=5",
    ];
    let loaded = loaded("finetune", &sets);
    let plan = planned(|context| options::<Finetune>(&loaded, "finetune").plan_finetune(context));
    let plan = plan.unwrap_or_else(|refusals| panic!("{refusals:?}"));
    let mut model = plan.model(&plan.init(&cx), &TrainedStudents::default()).expect("a model");

    let small = &recorded["small"];
    model.visit(&mut |p| {
        if p.is_trained() {
            p.load(&floats(&small["values"][&p.name])).unwrap_or_else(|error| panic!("{}: {error}", p.name));
        }
    });
    let batch = MicroBatch {
        crops: Vec::new(),
        images: ImageBatch { pixels: floats(&small["images"]), batch: 2, size: 28 },
        labels: wholes(&small["labels"]).into_iter().map(Some).collect(),
        indices: vec![0, 1],
        epoch: 0,
        progress: 0.0,
    };
    let loss = f64::from(model.loss(&cx, &mut Tape::training(), &batch).expect("a loss").value());
    let theirs = number(&small["loss"]);
    assert!((loss - theirs).abs() < 1e-5 * theirs, "{loss}, there {theirs}");

    let mut ours = BTreeMap::new();
    model.visit(&mut |p| {
        if p.is_trained() {
            ours.insert(p.name.clone(), decays(&cx, &*plan.training().optimizer, p));
        }
    });
    let groups = recorded["groups"].as_object().expect("groups");
    assert!(ours.keys().eq(groups.keys()), "other parameters: {:?}", ours.keys());
    for (name, decays) in &ours {
        assert_eq!(groups[name]["decays"], *decays, "{name}");
        let scale = groups[name].get("scale").map_or(1.0, number);
        assert!((model.lr_scale(name) - scale).abs() < 1e-12, "{name}: {}, there {scale}", model.lr_scale(name));
    }
    let optimizer = &loaded.resolved()["stages"]["finetune"]["optimizer"];
    for key in ["betas", "eps"] {
        assert!(same(&optimizer[key], &recorded["optimizer"][key]), "{key}");
    }
}

/// A linear layer, then a LayerNorm, of inputs so small that its eps counts.
#[test]
fn umts_heads_are_those_of_its_code() {
    let heads = derived("heads");
    let cx = Context::new(Device::Cpu, 1);
    let plan = small_recipe("umt_image_vitb", &[]);
    let objective = &plan.objectives()[0];
    let mut aligner = objective.aligner.build(&Init::new(cx.device(), 0, "heads")).expect("heads");
    let mut loaded = 0;
    aligner.visit(&mut |p| {
        if p.name.ends_with(".0.weight") {
            p.load(&floats(&heads["weight"])).expect("its shape");
            loaded += 1;
        }
    });
    assert_eq!(loaded, 6);
    let levels = vec![tensor(&heads["inputs"], 16); 6];
    let visible = Tokens { visible: true, ..Tokens::default() };
    let masks = Masks::even(2, (0..10).map(|i| i % 5).collect(), (0..22).map(|i| 5 + i % 11).collect());
    let input = AlignInput { levels: &levels, held: visible, masks: &masks, tokens: visible };
    let outputs = aligner.forward(&cx, &mut Tape::inference(), &input).expect("outputs");
    assert_eq!(outputs.len(), 6);
    for output in outputs {
        let error = relative_error(&output.to_vec(), &floats(&heads["outputs"]));
        assert!(error < 1e-5, "{error:.1e}");
    }
}

/// DINO's momentum, as the example of `ema` has it, and SimMIM's rates.
#[test]
fn values_over_time_are_those_of_the_papers_code() {
    let momentum = derived("momentum");
    let text = serde_json::json!({ "from": momentum["from"], "to": momentum["to"], "shape": "cosine" });
    let ours: Scalar = serde_json::from_value(text).expect("a ramp");
    let steps = whole(&momentum["steps"]);
    for (step, theirs) in list(&momentum["values"]).iter().enumerate() {
        let ours = ours.at(step as f64 / steps as f64);
        assert!(close(ours, number(theirs)), "step {step}: {ours}, there {theirs}");
    }

    let multistep = derived("multistep");
    let text =
        format!("{{ type: multistep, milestones: [700], warmup_epochs: 10, warmup_lr: {} }}", multistep["warmup_lr"]);
    let value = Registry::global().expect("a registry").component(Kind::Schedule, "schedule", &text);
    let slot: Slot<ScheduleTag> =
        serde_json::from_value(value.unwrap_or_else(|r| panic!("{}", r.render()))).expect("a slot");
    let schedule: Box<dyn Schedule> = slot.build().expect("a schedule");
    for rate in list(&multistep["rates"]) {
        let epoch = number(&rate[0]) / number(&multistep["per_epoch"]);
        let ours = schedule.rate(number(&multistep["peak"]), epoch, number(&multistep["epochs"]));
        assert!(close(ours, number(&rate[1])), "epoch {epoch}: {ours}, there {}", rate[1]);
    }
}
