//! What the tests of stages share.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use maskalign_core::{
    Context, Device, Recompute,
    components::towers::{Environment, MissingWeights, StudentPlan, TrainedStudents},
    events::Events,
    nn::Reach,
    plugin::Build,
    run::{Mode, RunDir, StopFlag},
    stages::{PlannedStage, Stage, StageContext, StageRun},
    weights::{TensorMap, read},
};
use maskalign_registry::{Input, LoadRequest, NoRecipes, Recipe, Registry, Slot, StudentTag, decode_options};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// A file of this workspace, by its path from this crate's folder.
///
/// # Panics
/// It cannot be read.
pub(crate) fn fixture(path: &str) -> TensorMap {
    read(&Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).expect("the fixture")
}

/// Takes the tensors whose names begin with `prefix` out of `tensors`, without it.
pub(crate) fn part(tensors: &mut TensorMap, prefix: &str) -> TensorMap {
    let names: Vec<String> = tensors.keys().filter(|name| name.starts_with(prefix)).cloned().collect();
    names.into_iter().map(|name| (name[prefix.len()..].to_owned(), tensors.remove(&name).expect("listed"))).collect()
}

/// The options of the one stage of a recipe.
///
/// # Panics
/// The recipe is not sound.
pub(crate) fn stage<S: DeserializeOwned>(recipe: &str) -> S {
    let request = LoadRequest {
        input: Input::Text { name: "recipe".into(), text: recipe.into() },
        sets: &[],
        env: &|_| None,
        builtins: &NoRecipes,
    };
    let loaded = Recipe::load(&request, Registry::global().expect("a registry"));
    let loaded = loaded.unwrap_or_else(|report| panic!("{}", report.render()));
    decode_options(loaded.recipe().stages[0].options_value()).expect("its options")
}

/// Plans without a look at files, as the first stage of a recipe.
pub(crate) fn planned<P>(plan: impl FnOnce(&StageContext) -> P) -> P {
    plan(&StageContext {
        name: "stage",
        seed: 0,
        students: &BTreeMap::new(),
        classifiers: &BTreeMap::new(),
        environment: Environment::Ignored,
        missing_weights: MissingWeights::Refused,
        recompute: Recompute::Never,
    })
}

/// The results of the one stage of a recipe, or its refusals: an earlier stage `pretrain` leaves the student of a weights
/// file, whose training reaches some of its blocks.
pub(crate) fn on_student<S: Stage + DeserializeOwned>(
    recipe: &str,
    weights: &str,
    blocks: usize,
) -> Result<Value, Vec<String>> {
    let arch = json!({ "dim": 24, "depth": 3, "heads": 3, "patch": 7 });
    let options = json!({ "type": "vit", "positions": "learned", "arch": arch });
    let slot: Slot<StudentTag> = serde_json::from_value(options).expect("a student");
    planned(|context| {
        let context = StageContext { environment: Environment::Checked, ..*context };
        let tower = Build::build(&slot).and_then(|student| student.plan(&context.towers(28))).expect("it fits");
        let student =
            StudentPlan { tower, reach: Reach { blocks, norm: true, qkv: false }, init_scope: "pretrain".into() };
        let students = BTreeMap::from([("pretrain".to_string(), student)]);
        let plan = stage::<S>(recipe).plan(&StageContext { students: &students, ..context });
        let plan = plan.map_err(|refusals| refusals.iter().map(ToString::to_string).collect::<Vec<_>>())?;
        let mut trained = TrainedStudents::default();
        trained.insert("pretrain", Arc::new(fixture(weights)));
        Ok(run(&*plan, &trained))
    })
}

/// The results of a planned stage, which runs in a directory of its own.
///
/// # Panics
/// It fails.
fn run(plan: &dyn PlannedStage, trained: &TrainedStudents) -> Value {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let dir = RunDir::create(folder.path().join("run"), Mode::Fresh).expect("a run directory");
    let outcome = plan.run(StageRun {
        cx: &Context::new(Device::Cpu, 2),
        name: "stage",
        seed: 0,
        trained,
        dir: &dir,
        fingerprint: "",
        stop: &StopFlag::new(),
        events: &mut Events::new(Vec::new()),
        step_limit: None,
        workers: 1,
        replay: None,
    });
    outcome.unwrap_or_else(|error| panic!("{error}")).results
}

/// Norm of the difference over norm of the reference.
pub(crate) fn relative_error(ours: &[f32], theirs: &[f32]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    norm(&mut ours.iter().zip(theirs).map(|(a, b)| f64::from(*a) - f64::from(*b)))
        / norm(&mut theirs.iter().map(|v| f64::from(*v)))
}
