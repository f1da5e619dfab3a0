//! Options that stages share are to a recipe what they were when every stage's struct repeated them.
//!
//! The oracle is the repetition: the same two stages, once with a struct each that holds everything, once with
//! [`With`].

use std::collections::HashMap;

use jsonschema::Validator;
use maskalign_registry::{
    DatasetTag, Entry, Input, Kind, LoadRequest, Loaded, NoRecipes, OptimizerTag, Recipe, Registry, Report, Scalar,
    ScheduleTag, SharedOptions, Slot, StudentTag, With, decode_options, recipe_schema,
};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};
use serde_json::{Value, json};

use crate::components;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Precision {
    /// 32 bits.
    #[default]
    F32,
    /// 16 bits.
    Bf16,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Batch {
    /// Images of an update.
    #[schemars(range(min = 1))]
    effective: u32,
    /// Images of a pass.
    #[serde(deserialize_with = "even")]
    micro: u32,
}

fn even<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let value = u32::deserialize(deserializer)?;
    if value % 2 == 0 { Ok(value) } else { Err(D::Error::custom("must be even")) }
}

fn cosine() -> Slot<ScheduleTag> {
    Slot::new("cosine")
}

/// Lists of fields, so that a struct that repeats them and structs that share them have the same ones.
macro_rules! options {
    ($(#[$attr:meta])* $name:ident { $($first:tt)* } { $($own:tt)* } { $($last:tt)* }) => {
        $(#[$attr])*
        #[derive(Debug, Serialize, Deserialize, JsonSchema)]
        #[serde(deny_unknown_fields)]
        struct $name { $($first)* $($own)* $($last)* }
    };
}

macro_rules! with_training {
    ($callback:ident $name:ident { $($own:tt)* }) => {
        $callback! { $name {
            /// Epochs to train for.
            #[schemars(extend("exclusiveMinimum" = 0), range(max = 1000000.0))]
            epochs: f64,
            /// The images.
            data: Slot<DatasetTag>,
        } { $($own)* } {
            /// The rule that updates parameters.
            optimizer: Slot<OptimizerTag>,
            /// The learning rate over time.
            #[serde(default = "cosine")]
            schedule: Slot<ScheduleTag>,
            /// Images of an update.
            batch: Batch,
            /// Share of the old average that is kept.
            #[serde(default)]
            #[schemars(range(min = 0, max = 1))]
            momentum: Option<Scalar>,
            /// Numbers that are computed with.
            #[serde(default)]
            precision: Precision,
        } }
    };
}

/// Own options of the two stages.
macro_rules! finetune {
    ($callback:ident $name:ident) => {
        $callback! { options $name {
            /// The tower.
            student: Slot<StudentTag>,
            /// Share of the target that is spread over all classes.
            #[serde(default)]
            #[schemars(range(min = 0.0, max = 1.0))]
            label_smoothing: f64,
            /// Number of classes; absent: the dataset's.
            #[serde(default)]
            #[schemars(range(min = 2))]
            classes: Option<u32>,
        } }
    };
}
macro_rules! probe {
    ($callback:ident $name:ident) => {
        $callback! { options $name {
            /// The frozen tower.
            student: Slot<StudentTag>,
            /// The block whose output is read.
            #[serde(deserialize_with = "even")]
            block: u32,
        } }
    };
}
macro_rules! alone {
    (options $name:ident { $($own:tt)* }) => { options! { $name {} { $($own)* } {} } };
}

with_training!(options Training {});
impl SharedOptions for Training {
    const LAST: &'static [&'static str] = &["optimizer", "schedule", "batch", "momentum", "precision"];
}
finetune!(alone FinetuneOptions);
probe!(alone ProbeOptions);
type Probe = With<Training, ProbeOptions>;

/// As core has it: a type of its own, with the attributes that `#[component]` writes.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(transparent, deny_unknown_fields)]
struct Finetune(With<Training, FinetuneOptions>);

finetune!(with_training RepeatedFinetune);
probe!(with_training RepeatedProbe);

const FINETUNE: &str = "{ type: finetune, epochs: 1, data: { type: sample }, student: { type: vit, arch: base_16 }, \
    optimizer: { type: adamw, base_lr: 1.5e-4, weight_decay: 0.05, betas: [0.9, 0.95] }, batch: { effective: 8, micro: 8 } }";
const PROBE: &str = "{ type: probe, epochs: 1, data: { type: sample }, student: { type: vit, arch: base_16 }, block: 2, \
    optimizer: { type: adamw, base_lr: 1.5e-4, weight_decay: 0.05, betas: [0.9, 0.95] }, batch: { effective: 8, micro: 8 } }";

macro_rules! stage {
    ($options:ty, $name:literal, $example:ident) => {
        Entry::of::<$options>(Kind::Stage, $name, &()).summary("a stage").example($example).package("fakes")
    };
}
static SHARED: [Entry; 2] = [stage!(Finetune, "finetune", FINETUNE), stage!(Probe, "probe", PROBE)];
static REPEATED: [Entry; 2] = [stage!(RepeatedFinetune, "finetune", FINETUNE), stage!(RepeatedProbe, "probe", PROBE)];

/// The components of the other tests, with these stages.
fn registry(stages: &'static [Entry]) -> Registry {
    let others = components::registry().entries().filter(|entry| entry.kind != Kind::Stage);
    Registry::from_entries(others.chain(stages)).expect("names are unique")
}

const RECIPE: &str = "\
name: shared
seed: 0
stages:
  tune:
    type: finetune
    student: { type: vit, arch: base_16 }
    epochs: 3
    data: { type: sample }
    label_smoothing: 0.1
    optimizer: { type: adamw, base_lr: 1.5e-4, weight_decay: 0.05, betas: [0.9, 0.95] }
    batch: { effective: 8, micro: 4 }
  probe:
    type: probe
    batch: { effective: 8, micro: 4 }
    block: 2
    data: { type: sample }
    epochs: 90
    momentum: { from: 0.5, to: 1 }
    optimizer: { type: adamw, base_lr: 1.5e-4, weight_decay: 0.05, betas: [0.9, 0.95] }
    student: { type: vit, arch: base_16, weights: { stage: tune } }
";

fn load(registry: &Registry, text: &str) -> Result<Loaded, Report> {
    let env = HashMap::from([("EPOCHS", "3")]);
    let request = LoadRequest {
        input: Input::Text { name: "recipe.yaml".to_owned(), text: text.to_owned() },
        sets: &[],
        env: &|name| env.get(name).map(|value| (*value).to_owned()),
        builtins: &NoRecipes,
    };
    Recipe::load(&request, registry)
}

#[test]
fn a_recipe_means_the_same_and_is_written_out_in_the_same_order() {
    let shared = load(&registry(&SHARED), RECIPE).unwrap_or_else(|report| panic!("{report}"));
    let repeated = load(&registry(&REPEATED), RECIPE).unwrap_or_else(|report| panic!("{report}"));
    assert_eq!(shared.resolved().to_string(), repeated.resolved().to_string());
    assert_eq!(shared.fingerprint(), repeated.fingerprint());
    let keys = |stage: &str| -> Vec<String> {
        shared.resolved()["stages"][stage].as_object().expect("a stage").keys().cloned().collect()
    };
    assert_eq!(keys("probe")[..4], ["type", "epochs", "data", "student"]);
    // A default that is a component has its own defaults filled in, as everywhere.
    assert_eq!(shared.resolved()["stages"]["tune"]["schedule"]["min_lr"], json!(0.0));
}

/// What is replaced, by what, and the place and code of the first mistake.
const MISTAKES: &[(&str, &str, &str, &str)] = &[
    ("    epochs: 3\n", "    epoch: 3\n", "recipe.yaml:7:5", "unknown-key"),
    ("    label_smoothing: 0.1\n", "    label_smooth: 0.1\n", "recipe.yaml:9:5", "unknown-key"),
    ("    block: 2\n", "    blocks: 2\n", "recipe.yaml:15:5", "unknown-key"),
    ("    block: 2\n", "    block: 2\n    classes: 3\n", "recipe.yaml:16:5", "unknown-key"),
    ("    block: 2\n", "    block: 2\n    base_lr: 3\n", "recipe.yaml:16:5", "unknown-key"),
    ("    block: 2\n", "    block: 2\n    micro: 3\n", "recipe.yaml:16:5", "unknown-key"),
    ("    epochs: 3\n", "    epochs: many\n", "recipe.yaml:7:13", "wrong-type"),
    ("    epochs: 3\n", "    epochs: 0\n", "recipe.yaml:7:13", "out-of-range"),
    ("    epochs: 3\n", "    epochs: ${UNSET}\n", "recipe.yaml:7:13", "unset-variable"),
    ("    epochs: 3\n", "", "recipe.yaml:4:3", "missing-key"),
    ("    block: 2\n", "", "recipe.yaml:12:3", "missing-key"),
    ("    block: 2\n    data: { type: sample }\n    epochs: 90\n", "", "recipe.yaml:12:3", "missing-key"),
    ("effective: 8, micro: 4 }\n  probe", "effective: 8 }\n  probe", "recipe.yaml:11:5", "missing-key"),
    ("effective: 8, micro: 4 }\n  probe", "effective: 0, micro: 4 }\n  probe", "recipe.yaml:11:25", "out-of-range"),
    ("effective: 8, micro: 4 }\n  probe", "effective: 8, micro: 3 }\n  probe", "recipe.yaml:11:35", "refused"),
    ("    block: 2\n", "    block: 3\n", "recipe.yaml:15:12", "refused"),
    ("    label_smoothing: 0.1\n", "    precision: f8\n", "recipe.yaml:9:16", "unknown-value"),
    ("    label_smoothing: 0.1\n", "    label_smoothing: 2\n", "recipe.yaml:9:22", "out-of-range"),
    ("from: 0.5, to: 1", "from: 0.5, to: 2", "recipe.yaml:18:32", "out-of-range"),
    ("    momentum: { from: 0.5, to: 1 }\n", "    momentum: 2\n", "recipe.yaml:18:15", "out-of-range"),
    ("{ type: sample }\n    label", "sample\n    label", "recipe.yaml:8:11", "wrong-type"),
    ("{ type: sample }\n    label", "{ type: smaple }\n    label", "recipe.yaml:8:19", "unknown-type"),
];

#[test]
fn a_mistake_is_reported_in_the_same_words_at_the_same_place() {
    let (shared, repeated) = (registry(&SHARED), registry(&REPEATED));
    for (from, to, place, code) in MISTAKES {
        assert!(RECIPE.contains(from), "{from}");
        let text = RECIPE.replacen(from, to, 1);
        let report = load(&shared, &text).expect_err("a mistake");
        let first = &report.0[0];
        let found = first.place().map(ToString::to_string).unwrap_or_default();
        assert_eq!((found.as_str(), first.code), (*place, *code), "{to:?}\n{report}");
        assert_eq!(report.render(), load(&repeated, &text).expect_err("a mistake").render());
    }
    // Shared options and own ones are known alike.
    let report = load(&shared, &RECIPE.replacen("    epochs: 3\n", "    epoch: 3\n    clases: 4\n", 1));
    let report = report.expect_err("two mistakes");
    let suggested: Vec<&[String]> = report.0.iter().map(|found| found.suggestions.as_slice()).collect();
    assert_eq!(suggested, [["epochs"], ["classes"]], "{report}");
}

#[test]
fn options_are_explained_wherever_they_are_described() {
    let (shared, repeated) = (registry(&SHARED), registry(&REPEATED));
    for name in ["finetune", "probe"] {
        let of = |registry: &Registry| registry.options(registry.get(Kind::Stage, name).expect("registered"));
        assert_eq!(of(&shared), of(&repeated));
        assert_eq!(of(&shared)[1].description, "The images.");
        assert_eq!(shared.faults(shared.get(Kind::Stage, name).expect("registered")), Vec::<String>::new());
    }
}

#[test]
fn the_schema_describes_shared_options_once_and_stays_closed() {
    let document = recipe_schema(&registry(&SHARED));
    jsonschema::meta::validate(&document).expect("a schema");
    let definitions = &document["definitions"];
    assert_eq!(definitions["Training"]["properties"]["epochs"]["description"], "Epochs to train for.");
    for (kind, shared) in [("stage.", "Training"), ("partial.stage.", "partial.Training")] {
        for name in ["finetune", "probe"] {
            let stage = &definitions[format!("{kind}{name}")];
            assert_eq!(stage["additionalProperties"], json!(false));
            let target = format!("#/definitions/{shared}/properties/epochs");
            assert_eq!(stage["properties"]["epochs"], json!({ "$ref": target }));
        }
    }
    let required = &definitions["stage.probe"]["required"];
    assert_eq!(*required, json!(["type", "epochs", "data", "student", "block", "optimizer", "batch"]));
    let texts = document.to_string().matches("Epochs to train for.").count();
    // Once for recipes, once for those that extend others.
    assert_eq!(texts, 2);
}

#[test]
fn the_schema_admits_what_it_admitted_with_the_options_repeated() {
    let validator =
        |stages| -> Validator { jsonschema::draft7::new(&recipe_schema(&registry(stages))).expect("a schema") };
    let (shared, repeated) = (validator(&SHARED), validator(&REPEATED));
    let admits = |validator: &Validator, text: &str| {
        let value: Value = serde_yaml::from_str(text).expect("YAML");
        validator.is_valid(&value)
    };
    assert!(admits(&shared, RECIPE));
    let extends = "extends: other\nname: x\nstages: { tune: { epochs: 3, label_smoothing: 0.1 } }\n";
    assert!(admits(&shared, extends));
    assert!(!admits(&shared, &extends.replace("epochs", "epoch")));
    for (from, to, _, code) in MISTAKES {
        let text = RECIPE.replacen(from, to, 1);
        assert_eq!(admits(&shared, &text), admits(&repeated, &text), "{to:?}");
        let is_structure = !["refused", "unset-variable"].contains(code);
        assert_eq!(!admits(&shared, &text), is_structure, "{to:?}");
    }
}

#[test]
fn decoding_says_where_in_either_part_it_stopped() {
    let options = |edit: fn(&mut Value)| {
        let mut options = json!({
            "epochs": 1, "data": { "type": "sample" }, "student": { "type": "vit" }, "block": 2,
            "optimizer": { "type": "adamw" }, "batch": { "effective": 8, "micro": 8 },
        });
        edit(&mut options);
        options
    };
    let path = |edit: fn(&mut Value)| decode_options::<Probe>(options(edit)).expect_err("refused").path;
    assert_eq!(decode_options::<Probe>(options(|_| {})).expect("sound").own.block, 2);
    assert_eq!(path(|options| options["batch"]["micro"] = json!(3)), ["batch", "micro"]);
    assert_eq!(path(|options| options["block"] = json!(3)), ["block"]);
    assert_eq!(path(|options| options["blocks"] = json!(3)), ["blocks"]);

    #[derive(Debug, Deserialize)]
    struct Outer {
        probe: Probe,
        after: bool,
    }
    let outer = |probe: Value, after: Value| decode_options::<Outer>(json!({ "probe": probe, "after": after }));
    let inner = outer(options(|options| options["batch"]["micro"] = json!(3)), json!(true)).expect_err("refused");
    assert_eq!(inner.path, ["probe", "batch", "micro"]);
    // What was noted of one failure is not said of the next.
    assert_eq!(outer(options(|_| {}), json!("x")).expect_err("refused").path, ["after"]);
    let sound = outer(options(|_| {}), json!(true)).expect("sound");
    assert!(sound.after && sound.probe.shared.epochs == 1.0);
}

#[test]
fn options_may_be_shared_in_several_groups() {
    #[derive(Debug, Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Supervised {
        /// Number of classes.
        classes: u32,
    }
    impl SharedOptions for Supervised {}
    type Nested = With<Training, With<Supervised, ProbeOptions>>;
    const EXAMPLE: &str = "{ type: nested, classes: 3, epochs: 1, data: { type: sample }, block: 2, \
        student: { type: vit, arch: base_16 }, batch: { effective: 8, micro: 8 }, \
        optimizer: { type: adamw, base_lr: 1.5e-4, weight_decay: 0.05, betas: [0.9, 0.95] } }";
    static NESTED: [Entry; 1] = [stage!(Nested, "nested", EXAMPLE)];
    let registry = registry(&NESTED);
    assert_eq!(registry.faults(&NESTED[0]), Vec::<String>::new());
    let names: Vec<String> = registry.options(&NESTED[0]).into_iter().map(|option| option.name).collect();
    assert_eq!(names[..5], ["epochs", "data", "classes", "student", "block"]);
    let definitions = &recipe_schema(&registry)["definitions"];
    let classes = &definitions["stage.nested"]["properties"]["classes"];
    assert_eq!(*classes, json!({ "$ref": "#/definitions/Supervised/properties/classes" }));
    let bad = EXAMPLE.replace("classes: 3", "classes: x");
    let report = registry.component(Kind::Stage, "nested.yaml", &bad).expect_err("no number");
    assert_eq!(report.0[0].path, ["classes"]);
    let mut odd = NESTED[0].example_value().expect("YAML");
    odd.as_object_mut().expect("a mapping").remove("type");
    odd["block"] = json!(3);
    assert_eq!(decode_options::<Nested>(odd).expect_err("odd").path, ["block"]);
}

#[test]
fn an_option_that_is_shared_and_own_is_a_fault() {
    #[derive(Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Clash {
        /// Again.
        #[serde(default)]
        epochs: f64,
        /// Its own.
        #[serde(default)]
        classes: u32,
    }
    static CLASH: [Entry; 1] = [stage!(With<Training, Clash>, "clash", FINETUNE)];
    let faults = registry(&CLASH).faults(&CLASH[0]);
    let expected = "stage.clash: `epochs` is both a shared option and one of its own";
    assert_eq!(faults.iter().filter(|fault| fault.contains("shared option")).collect::<Vec<_>>(), [expected]);
}
