//! What a recipe means: eleven papers, composition, defaults, origins, and the round trip.

use std::{collections::HashMap, fs, path::Path};

use maskalign_registry::{
    Input, LoadRequest, Loaded, NoRecipes, Origin, Recipe, RecipeSource, Refusal, Report, ShowOrigin, diff,
};
use serde_json::{Value, json};

use crate::components::registry;

fn folder() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/recipes"))
}

fn load_with(
    text: &str,
    sets: &[&str],
    env: &HashMap<&str, &str>,
    builtins: &dyn RecipeSource,
) -> Result<Loaded, Report> {
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    let request = LoadRequest {
        input: Input::Text { name: "recipe.yaml".to_owned(), text: text.to_owned() },
        sets: &sets,
        env: &|name| env.get(name).map(|value| (*value).to_owned()),
        builtins,
    };
    Recipe::load(&request, registry())
}

fn load(text: &str, sets: &[&str]) -> Loaded {
    let env = HashMap::from([("IMAGENET_DIR", "/data/imagenet")]);
    load_with(text, sets, &env, &Papers).unwrap_or_else(|report| panic!("{report}"))
}

fn refuse(text: &str, sets: &[&str]) -> Report {
    let env = HashMap::from([("IMAGENET_DIR", "/data/imagenet")]);
    load_with(text, sets, &env, &Papers).expect_err("a mistake")
}

/// The papers as built-in recipes.
struct Papers;

impl RecipeSource for Papers {
    fn builtin(&self, name: &str) -> Option<&str> {
        match name {
            "mae_vitb" => Some(include_str!("../recipes/mae_vitb.yaml")),
            "maskalign_vitb_clip" => Some(include_str!("../recipes/maskalign_vitb_clip.yaml")),
            "circle" => Some("extends: round"),
            "round" => Some("extends: circle"),
            _ => None,
        }
    }

    fn names(&self) -> Vec<&str> {
        vec!["circle", "mae_vitb", "maskalign_vitb_clip", "round"]
    }
}

const MAE: &str = include_str!("../recipes/mae_vitb.yaml");

#[test]
fn eleven_papers_are_recipes_that_survive_a_round_trip() {
    let mut seen = 0;
    for file in fs::read_dir(folder()).expect("the folder") {
        let path = file.expect("an entry").path();
        let text = fs::read_to_string(&path).expect("text");
        let loaded = load(&text, &[]);
        for show in [ShowOrigin::No, ShowOrigin::Yes] {
            let yaml = loaded.resolved_yaml(show);
            let again = load_with(&yaml, &[], &HashMap::new(), &NoRecipes)
                .unwrap_or_else(|report| panic!("{}: {report}\n{yaml}", path.display()));
            assert_eq!(again.recipe(), loaded.recipe(), "{}", path.display());
            assert_eq!(again.fingerprint(), loaded.fingerprint());
        }
        // Another implementation reads the same values.
        let other: Value = serde_yaml::from_str(&loaded.resolved_yaml(ShowOrigin::Yes)).expect("YAML");
        assert_eq!(&other, loaded.resolved(), "{}", path.display());
        seen += 1;
    }
    assert_eq!(seen, 11);
}

#[test]
fn defaults_are_filled_at_every_level() {
    let loaded = load(MAE, &[]);
    let stage = &loaded.resolved()["stages"]["pretrain"];
    assert_eq!(stage["objectives"]["pixels"]["weight"], json!(1.0));
    assert_eq!(stage["objectives"]["pixels"]["aligner"]["levels"], json!("all"));
    assert_eq!(stage["data"]["transforms"][1]["probability"], json!(0.5));
    assert_eq!(stage["optimizer"]["base_batch"], json!(256));
    assert_eq!(loaded.recipe().stages["pretrain"].options["student"]["positions"], json!("sincos"));
}

#[test]
fn a_component_that_is_there_by_default_has_its_own_defaults_filled() {
    let loaded = load("name: x\nstages: { knn: { type: knn, dataset: { type: sample } } }", &[]);
    assert_eq!(loaded.resolved()["stages"]["knn"]["transforms"], json!([{ "type": "resize", "size": 224 }]));
}

#[test]
fn a_base_gives_what_the_recipe_leaves_out() {
    let loaded =
        load("name: mae_short\nextends: mae_vitb\nstages: { pretrain: { epochs: 3, masker: { ratio: 0.5 } } }", &[]);
    let stage = &loaded.resolved()["stages"]["pretrain"];
    assert_eq!(loaded.recipe().name, "mae_short");
    assert_eq!(stage["epochs"], json!(3.0));
    assert_eq!(stage["masker"]["type"], json!("random"));
    assert_eq!(stage["masker"]["ratio"], json!(0.5));
    assert_eq!(stage["student"]["arch"], json!("base_16"));
}

#[test]
fn a_type_that_changes_replaces_the_component_whole() {
    let base = "extends: mae_vitb\nstages:\n  pretrain:\n    masker: { type: block, masked: 75 }";
    let stage = &load(base, &[]).resolved()["stages"]["pretrain"]["masker"].clone();
    assert_eq!(stage, &json!({ "type": "block", "masked": 75 }));
    // The same by flags, in either order.
    for sets in [
        ["stages.pretrain.masker.type=block", "stages.pretrain.masker.masked=75"],
        ["stages.pretrain.masker.masked=75", "stages.pretrain.masker.type=block"],
    ] {
        let loaded = load("extends: mae_vitb", &sets);
        assert_eq!(&loaded.resolved()["stages"]["pretrain"]["masker"], stage);
    }
}

/// Files of a folder, and what their last one means.
fn load_files(name: &str, files: &[(&str, &str)]) -> Result<Loaded, Report> {
    let dir = std::env::temp_dir().join(format!("maskalign-{name}-{}", std::process::id()));
    fs::create_dir_all(&dir).expect("a folder");
    for (file, text) in files {
        fs::write(dir.join(file), text).expect("written");
    }
    let last = files.last().expect("a file").0;
    let request = LoadRequest {
        input: Input::Path(dir.join(last)),
        sets: &[],
        env: &|_| Some("/data".to_owned()),
        builtins: &Papers,
    };
    let loaded = Recipe::load(&request, registry());
    fs::remove_dir_all(&dir).expect("removed");
    loaded
}

const KNN: &str = "knn: { type: knn, dataset: { type: sample } }";

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().expect("a mapping").keys().map(String::as_str).collect()
}

#[test]
fn null_removes_what_is_inherited() {
    let text = "extends: maskalign_vitb_clip
stages:
  pretrain:
    student: { drop_path: null }
    teachers: { clip: null }
    masker: null
    objectives:
      align: null
      pixels: { target: { type: pixels }, tokens: [visible], aligner: { type: decoder, dim: 8, depth: 1, heads: 1 }, loss: { type: mse } }
";
    let loaded = load(text, &[]);
    let stage = &loaded.resolved()["stages"]["pretrain"];
    assert_eq!(keys(&stage["objectives"]), ["pixels"]);
    assert_eq!((&stage["teachers"], &stage["masker"]), (&json!({}), &Value::Null));
    // An option has its default again.
    assert_eq!(stage["student"]["drop_path"], json!(0.0));
    let removed: Vec<String> = loaded.removals().iter().map(|removal| removal.path[2..].join(".")).collect();
    assert_eq!(removed, ["student.drop_path", "teachers.clip", "masker", "objectives.align"]);
    // The same by flags, in both forms.
    let pixels = "stages.pretrain.objectives.pixels={target: {type: pixels}, tokens: [visible], \
                  aligner: {type: decoder, dim: 8, depth: 1, heads: 1}, loss: {type: mse}}";
    let null = |path: &str| format!("stages.pretrain.{path}=null");
    let tilde = |path: &str| format!("~stages.pretrain.{path}");
    for form in [&null as &dyn Fn(&str) -> String, &tilde] {
        let sets = ["student.drop_path", "teachers.clip", "masker", "objectives.align"].map(form);
        let sets: Vec<&str> = sets.iter().map(String::as_str).chain([pixels]).collect();
        assert_eq!(load("extends: maskalign_vitb_clip", &sets).fingerprint(), loaded.fingerprint());
    }
}

#[test]
fn replace_starts_a_mapping_anew() {
    let text = "extends: mae_vitb
stages:
  pretrain:
    masker: { $replace: true, type: random, visible: 49 }
    objectives:
      $replace: true
      raw: { target: { type: pixels }, tokens: [masked], aligner: { type: decoder, dim: 8, depth: 1, heads: 1 }, loss: { type: l1 } }
";
    let stage = &load(text, &[]).resolved()["stages"]["pretrain"].clone();
    assert_eq!(keys(&stage["objectives"]), ["raw"]);
    assert_eq!((&stage["masker"]["ratio"], &stage["masker"]["visible"]), (&Value::Null, &json!(49)));
    // Without it, the ratio would be there too.
    let merged = load(&text.replacen("$replace: true, ", "", 1), &[]);
    assert_eq!(merged.resolved()["stages"]["pretrain"]["masker"]["ratio"], json!(0.75));
}

#[test]
fn what_is_removed_stays_away_through_every_level() {
    let pixels = "{ target: { type: pixels }, tokens: [masked], aligner: { type: decoder, dim: 8, depth: 1, heads: 1 }, \
                  loss: { type: l1 } }";
    let middle = format!(
        "extends: mae_vitb\nstages: {{ pretrain: {{ objectives: {{ pixels: null, raw: {pixels} }} }}, {KNN} }}"
    );
    let anew = format!(
        "extends: mae_vitb\nstages: {{ pretrain: {{ objectives: {{ $replace: true, raw: {pixels} }} }}, {KNN} }}"
    );
    let objectives = |files: &[(&str, &str)]| {
        let loaded = load_files("levels", files).unwrap_or_else(|report| panic!("{report}"));
        keys(&loaded.resolved()["stages"]["pretrain"]["objectives"]).join(" ")
    };
    for middle in [&middle, &anew] {
        let top = "extends: middle.yaml\nstages: { pretrain: { epochs: 1 } }";
        assert_eq!(objectives(&[("middle.yaml", middle), ("top.yaml", top)]), "raw");
        // The later of two bases wins, by what it removed too.
        let plain = ("plain.yaml", "extends: mae_vitb\nseed: 3");
        let top = ("top.yaml", "extends: [plain.yaml, middle.yaml]");
        assert_eq!(objectives(&[("middle.yaml", middle), plain, top]), "raw");
        let top = ("top.yaml", "extends: [middle.yaml, plain.yaml]");
        assert_eq!(objectives(&[("middle.yaml", middle), plain, top]), "raw pixels");
    }
    // What comes back is new: nothing of the old one is left, and it stands last.
    let top = format!("extends: middle.yaml\nstages: {{ pretrain: {{ objectives: {{ pixels: {pixels} }} }} }}");
    let loaded = load_files("again", &[("middle.yaml", &middle), ("top.yaml", &top)]).expect("sound");
    let objectives = &loaded.resolved()["stages"]["pretrain"]["objectives"];
    assert_eq!(keys(objectives), ["raw", "pixels"]);
    assert_eq!(objectives["pixels"], objectives["raw"]);
    assert!(loaded.removals().is_empty());
    // What a base removed is not there to be removed again.
    let top = "extends: middle.yaml\nstages: { pretrain: { objectives: { pixels: null } } }";
    let report = load_files("twice", &[("middle.yaml", &middle), ("top.yaml", top)]).expect_err("twice");
    assert_eq!((report.0.len(), report.0[0].code), (1, "nothing-to-remove"), "{report}");
    assert_eq!(report.0[0].allowed, ["raw"]);
}

#[test]
fn a_stage_that_is_removed_and_written_again_runs_last() {
    let base = format!("extends: mae_vitb\nstages: {{ {KNN}, more: {{ type: knn, dataset: {{ type: sample }} }} }}");
    let files = |top: &str| load_files("order", &[("base.yaml", &base), ("top.yaml", top)]).expect("sound");
    let order = |loaded: &Loaded| keys(&loaded.resolved()["stages"]).join(" ");
    assert_eq!(order(&files("extends: base.yaml\nstages: { knn: null }")), "pretrain more");
    assert_eq!(order(&files(&format!("extends: base.yaml\nstages: {{ {KNN} }}"))), "pretrain knn more");
    let removed =
        load("extends: mae_vitb", &[&format!("stages={{{KNN}}}"), "~stages.knn", &KNN.replace("knn: ", "stages.knn=")]);
    assert_eq!(order(&removed), "knn");
}

#[test]
fn nothing_is_removed_by_a_variable_or_by_nothing() {
    let text = "extends: mae_vitb\nname: x\nstages:\n  pretrain:\n    epochs: ${E}\n    optimizer: ${O:-null}\n";
    let env = HashMap::from([("E", "null"), ("IMAGENET_DIR", "/data")]);
    let report = load_with(text, &[], &env, &Papers).expect_err("two that are no values");
    assert_eq!(report.0.iter().map(|found| found.code).collect::<Vec<_>>(), ["wrong-type", "wrong-type"], "{report}");
    let report = refuse("extends: mae_vitb\nname: x\nstages:\n  pretrain:\n    masker:\n", &[]);
    assert_eq!((report.0.len(), report.0[0].code), (1, "wrong-type"), "{report}");
    assert!(report.0[0].help[0].contains("write `null`"), "{report}");
}

#[test]
fn what_was_removed_is_shown_where_it_was() {
    let text = "extends: maskalign_vitb_clip
name: x
stages:
  pretrain:
    student: { drop_path: null }
    objectives:
      $replace: true
      raw: { target: { type: pixels }, tokens: [visible], aligner: { type: decoder, dim: 8, depth: 1, heads: 1 }, loss: { type: mse } }
";
    let loaded = load(text, &["~stages.pretrain.teachers.clip", "stages.pretrain.masker=null"]);
    let yaml = loaded.resolved_yaml(ShowOrigin::Yes);
    for expected in [
        "  # default; recipe.yaml:5 removes built-in:maskalign_vitb_clip:15\n",
        "  # default; --set stages.pretrain.masker=null removes built-in:maskalign_vitb_clip:18\n",
        "      # without `clip` of built-in:maskalign_vitb_clip:17, by --set ~stages.pretrain.teachers.clip\n",
        "      # in the place of built-in:maskalign_vitb_clip:19, by recipe.yaml:7\n",
    ] {
        assert!(yaml.contains(expected), "{expected} in\n{yaml}");
    }
    let with_dino = "extends: maskalign_vitb_clip
name: x
stages: { pretrain: { teachers: { dino: { type: dino, arch: base_16, weights: a } }, objectives: { align: null,
  more: { target: { type: features, teacher: dino }, tokens: [cls], aligner: { type: dynamic, fusion: sum, head: linear },
  loss: { type: mse } } } } }
";
    let yaml =
        load(with_dino, &["~stages.pretrain.teachers.clip", "~stages.pretrain.masker"]).resolved_yaml(ShowOrigin::Yes);
    for expected in [
        "      # without `clip` of built-in:maskalign_vitb_clip:17, by --set ~stages.pretrain.teachers.clip\n",
        "      # without `align` of built-in:maskalign_vitb_clip:20, by recipe.yaml:3\n",
    ] {
        assert!(yaml.contains(expected), "{expected} in\n{yaml}");
    }
    let again = load_with(&yaml, &[], &HashMap::new(), &NoRecipes).unwrap_or_else(|report| panic!("{report}\n{yaml}"));
    assert_eq!(keys(&again.resolved()["stages"]["pretrain"]["objectives"]), ["more"]);
}

#[test]
fn a_type_without_a_value_below_leaves_no_options_behind() {
    let base = MAE.replace("type: random, ratio", "type: \"${M}\", ratio");
    let request = LoadRequest {
        input: Input::Text {
            name: "top.yaml".to_owned(),
            text: "extends: mae\nstages: { pretrain: { masker: { type: block, masked: 75 } } }".to_owned(),
        },
        sets: &[],
        env: &|name| (name == "IMAGENET_DIR").then(|| "/data".to_owned()),
        builtins: &One(&base),
    };
    let loaded = Recipe::load(&request, registry()).unwrap_or_else(|report| panic!("{report}"));
    assert_eq!(loaded.resolved()["stages"]["pretrain"]["masker"], json!({ "type": "block", "masked": 75 }));
}

/// One built-in recipe, `mae`.
struct One<'a>(&'a str);

impl RecipeSource for One<'_> {
    fn builtin(&self, name: &str) -> Option<&str> {
        (name == "mae").then_some(self.0)
    }

    fn names(&self) -> Vec<&str> {
        vec!["mae"]
    }
}

#[test]
fn lists_are_replaced_and_later_bases_win() {
    let dir = std::env::temp_dir().join(format!("maskalign-extends-{}", std::process::id()));
    fs::create_dir_all(dir.join("deep")).expect("a folder");
    let write = |name: &str, text: &str| fs::write(dir.join(name), text).expect("written");
    write("a.yaml", "extends: mae_vitb\nseed: 1\ndescription: a");
    write(
        "deep/b.yaml",
        "extends: ../a.yaml\nseed: 2\nstages: { pretrain: { data: { transforms: [{ type: horizontal_flip }] } } }",
    );
    write("top.yaml", "extends: [a.yaml, deep/b.yaml]\nname: top");
    let request = LoadRequest {
        input: Input::Path(dir.join("top.yaml")),
        sets: &[],
        env: &|_| Some("/data".to_owned()),
        builtins: &Papers,
    };
    let loaded = Recipe::load(&request, registry()).unwrap_or_else(|report| panic!("{report}"));
    fs::remove_dir_all(&dir).expect("removed");
    assert_eq!(loaded.recipe().name, "top");
    assert_eq!(loaded.recipe().seed, 2);
    assert_eq!(loaded.recipe().description.as_deref(), Some("a"));
    assert_eq!(
        loaded.resolved()["stages"]["pretrain"]["data"]["transforms"],
        json!([{ "type": "horizontal_flip", "probability": 0.5 }])
    );
}

#[test]
fn recipes_that_extend_each_other_are_refused_with_the_chain() {
    let report = refuse("name: x\nextends: circle", &[]);
    assert_eq!(report.0.len(), 1, "{report}");
    assert_eq!(report.0[0].code, "extends-cycle");
    let chain = "built-in:circle -> built-in:round -> built-in:circle";
    assert!(report.0[0].message.contains(chain), "{report}");
}

#[test]
fn bases_named_over_and_over_are_read_once() {
    // Without memory of what was read, 2^30 merges.
    let dir = std::env::temp_dir().join(format!("maskalign-fan-{}", std::process::id()));
    fs::create_dir_all(&dir).expect("a folder");
    for level in 0..30 {
        let text = format!("extends: [l{0}.yaml, l{0}.yaml]", level + 1);
        fs::write(dir.join(format!("l{level}.yaml")), text).expect("written");
    }
    fs::write(dir.join("l30.yaml"), MAE).expect("written");
    let request = LoadRequest {
        input: Input::Path(dir.join("l0.yaml")),
        sets: &[],
        env: &|_| Some("/data".to_owned()),
        builtins: &NoRecipes,
    };
    let loaded = Recipe::load(&request, registry()).unwrap_or_else(|report| panic!("{report}"));
    fs::remove_dir_all(&dir).expect("removed");
    assert_eq!(loaded.recipe().name, "mae_vitb");
}

#[test]
fn flags_set_replace_and_delete() {
    let loaded = load(
        MAE,
        &[
            "stages.pretrain.masker.ratio=0.5",
            "stages.pretrain.student={type: vit, arch: large_16}",
            "stages.pretrain.data.transforms.0.size=196",
            "~stages.pretrain.data.transforms.1",
            "stages.\"pretrain\".knn_every=5",
            "seed=7",
        ],
    );
    let stage = &loaded.resolved()["stages"]["pretrain"];
    assert_eq!(stage["masker"]["ratio"], json!(0.5));
    assert_eq!(stage["student"]["arch"], json!("large_16"));
    assert_eq!(stage["data"]["transforms"].as_array().map(Vec::len), Some(1));
    assert_eq!(stage["data"]["transforms"][0]["size"], json!(196));
    assert_eq!(stage["knn_every"], json!(5));
    assert_eq!(loaded.recipe().seed, 7);
    let without = load(MAE, &["~stages.pretrain.masker"]);
    assert_eq!(without.resolved()["stages"]["pretrain"]["masker"], Value::Null);
}

#[test]
fn variables_are_typed_by_how_they_are_written() {
    let env = HashMap::from([("EPOCHS", "12"), ("EMPTY", ""), ("IMAGENET_DIR", "/i")]);
    let load = |line: &str| {
        let text = MAE.replace("    epochs: 800", line);
        load_with(&text, &[], &env, &Papers).map(|l| l.resolved()["stages"]["pretrain"]["epochs"].clone())
    };
    assert_eq!(load("    epochs: ${EPOCHS}").expect("a number"), json!(12.0));
    assert_eq!(load("    epochs: ${OTHER:-3}").expect("a number"), json!(3.0));
    assert_eq!(load("    epochs: ${EMPTY:-4}").expect("a number"), json!(4.0));
    // In quotes, which `{ }` makes necessary, the option decides: a name stays text.
    assert_eq!(load("    epochs: \"${EPOCHS}\"").expect("a number"), json!(12.0));
    assert_eq!(load("    epochs: \"${EPOCHS}0\"").expect_err("text").0[0].code, "wrong-type");
    assert_eq!(load("    epochs: 3\n    knn_every: ${OTHER:-x}").expect_err("text").0[0].code, "wrong-type");
    let named = MAE.replace("name: mae_vitb", "name: \"${EPOCHS}\"");
    assert_eq!(load_with(&named, &[], &env, &Papers).expect("text").recipe().name, "12");
    assert_eq!(load("    epochs: ${OTHER}").expect_err("unset").0[0].code, "unset-variable");
    assert_eq!(load("    epochs: ${OTHER:-${EPOCHS}}").expect_err("nested").0[0].code, "bad-variable");
    // What a flag replaces need not be set.
    let text = MAE.replace("    epochs: 800", "    epochs: ${OTHER}");
    let loaded = load_with(&text, &["stages.pretrain.epochs=1"], &env, &Papers).expect("replaced");
    assert_eq!(loaded.resolved()["stages"]["pretrain"]["epochs"], json!(1.0));
}

#[test]
fn a_dollar_is_written_twice_and_survives_a_round_trip() {
    let loaded = load(MAE, &["stages.pretrain.data.dataset.root=\"a$$b $c é \\t 名\""]);
    let root = &loaded.resolved()["stages"]["pretrain"]["data"]["dataset"]["root"];
    assert_eq!(root, &json!("a$b $c é \t 名"));
    let again = load(&loaded.resolved_yaml(ShowOrigin::Yes), &[]);
    assert_eq!(again.resolved(), loaded.resolved());
}

#[test]
fn anchors_and_merge_keys_are_resolved() {
    let text = MAE.replace(
        "        - { type: horizontal_flip }",
        "        - &flip { type: horizontal_flip, probability: 0.25 }\n        - *flip\n        - { <<: *flip, probability: 0.75 }\n        - { probability: 1.0, <<: [*flip] }",
    );
    let transforms = load(&text, &[]).resolved()["stages"]["pretrain"]["data"]["transforms"].clone();
    let probabilities: Vec<&Value> =
        transforms.as_array().expect("a list")[1..].iter().map(|t| &t["probability"]).collect();
    assert_eq!(probabilities, [&json!(0.25), &json!(0.25), &json!(0.75), &json!(1.0)]);
}

#[test]
fn every_value_knows_who_set_it() {
    let env = HashMap::from([("IMAGENET_DIR", "/data"), ("EPOCHS", "5")]);
    let text = "extends: mae_vitb\nname: mine\nstages:\n  pretrain:\n    epochs: ${EPOCHS}\n";
    let loaded = load_with(text, &["seed=3"], &env, &Papers).expect("a recipe");
    let line = |path: &[&str]| {
        let origin = loaded.origin_of(path);
        let place = origin.place().map(ToString::to_string);
        (
            match origin {
                Origin::File(_) => "file",
                Origin::Flag(_) => "flag",
                Origin::Variable { .. } => "variable",
                Origin::Default => "default",
            },
            place.unwrap_or_default(),
        )
    };
    assert_eq!(line(&["name"]), ("file", "recipe.yaml:2:7".to_owned()));
    assert_eq!(line(&["seed"]), ("flag", "--set:1:6".to_owned()));
    assert_eq!(line(&["stages", "pretrain", "epochs"]), ("variable", "recipe.yaml:5:13".to_owned()));
    assert_eq!(line(&["stages", "pretrain", "student", "arch"]), ("file", "built-in:mae_vitb:15:33".to_owned()));
    assert_eq!(line(&["stages", "pretrain", "student", "drop_path"]), ("default", String::new()));
    let yaml = loaded.resolved_yaml(ShowOrigin::Yes);
    for expected in ["# --set seed=3", "# $EPOCHS at recipe.yaml:5", "# default", "# built-in:mae_vitb:15"] {
        assert!(yaml.contains(expected), "{expected} in\n{yaml}");
    }
}

#[test]
fn the_fingerprint_follows_the_meaning_and_not_the_writing() {
    let base = load(MAE, &[]).fingerprint();
    assert_eq!(base.len(), 64);
    let rewritten = MAE.replace("seed: 0\n", "").replace("epochs: 800", "epochs: 8.0e2");
    assert_eq!(load(&rewritten, &["description=no matter"]).fingerprint(), base);
    assert_eq!(load("extends: mae_vitb", &[]).fingerprint(), base);
    assert_ne!(load(MAE, &["stages.pretrain.epochs=801"]).fingerprint(), base);
    assert_ne!(load(MAE, &["seed=1"]).fingerprint(), base);
}

#[test]
fn the_difference_of_two_recipes_names_paths_and_values() {
    let old = load(MAE, &[]);
    let new = load(MAE, &["stages.pretrain.epochs=3", "stages.pretrain.masker={type: block, masked: 75}"]);
    let lines = diff(old.resolved(), new.resolved());
    for expected in [
        "stages.pretrain.epochs: 800.0 -> 3.0",
        "stages.pretrain.masker.type: \"random\" -> \"block\"",
        "stages.pretrain.masker.masked: absent -> 75",
        "stages.pretrain.masker.cell: 1 -> absent",
    ] {
        assert!(lines.iter().any(|line| line == expected), "{expected} in {lines:#?}");
    }
    assert!(diff(old.resolved(), old.resolved()).is_empty());
}

#[test]
fn a_refusal_is_put_where_its_option_stands() {
    let loaded = load(MAE, &["stages.pretrain.masker.ratio=0.9"]);
    let at = |refusal: Refusal| {
        let diagnostic = loaded.locate(&refusal.under("pretrain").under("stages"));
        (diagnostic.place().map(ToString::to_string).unwrap_or_default(), diagnostic.labels[0].text.clone())
    };
    let ratio = Refusal::new("ratio", "hides all patches").under("masker");
    assert_eq!(at(ratio), ("--set:1:30".to_owned(), String::new()));
    // An option left at its default is shown at the component.
    let cell = Refusal::new("cell", "does not divide the grid").under("masker");
    assert_eq!(at(cell), ("recipe.yaml:16:5".to_owned(), "`cell` is 1 by default".to_owned()));
}

fn places(diagnostic: &maskalign_registry::Diagnostic) -> Vec<String> {
    diagnostic.labels.iter().map(|label| label.place.to_string()).collect()
}

fn in_stage(refusal: Refusal) -> Refusal {
    refusal.under("pretrain").under("stages")
}

#[test]
fn of_conflicting_options_the_one_set_last_is_blamed() {
    let refusal = || {
        let whole = Refusal::whole("no outputs for `masked`").beside(["tokens"], "asked for here");
        in_stage(whole.under("aligner").under("pixels").under("objectives"))
    };
    let key = places(&load(MAE, &[]).locate(&refusal()));
    assert_eq!(key.len(), 2, "{key:?}");
    let tokens = "stages.pretrain.objectives.pixels.tokens=[masked]";
    let found = load(MAE, &[tokens]).locate(&refusal());
    assert_eq!(places(&found), ["--set:1:35".to_owned(), key[0].clone()]);
    assert_eq!(found.path.last().map(String::as_str), Some("tokens"));
    let aligner = "stages.pretrain.objectives.pixels.aligner.type=decoder";
    let found = load(MAE, &[tokens, aligner]).locate(&refusal());
    assert_eq!(found.labels[0].place.source.text(), aligner);
    assert_eq!(found.labels[1].place.source.text(), tokens);
    // What is not given cannot be shown.
    let absent = in_stage(Refusal::new("ratio", "too much").related(["cell"], "given here").under("masker"));
    assert_eq!(places(&load(MAE, &[]).locate(&absent)).len(), 1);
}

#[test]
fn a_component_that_a_flag_chose_is_blamed_there_and_a_scalar_for_what_it_abbreviates() {
    let sets = ["stages.pretrain.masker.type=block", "stages.pretrain.masker.masked=3"];
    let loaded = load(MAE, &sets);
    for refusal in [Refusal::whole("does not fit"), Refusal::new("cell", "missing")] {
        let found = loaded.locate(&in_stage(refusal.under("masker")));
        assert_eq!(found.labels[0].place.source.text(), sets[0], "{}", found.render());
    }
    let arch = Refusal::new("patch", "does not divide").under("arch").under("student");
    let found = loaded.locate(&in_stage(arch));
    assert_eq!((found.labels[0].place.text(), found.labels[0].text.as_str()), ("base_16", ""));
}

#[test]
fn refusals_are_reported_in_the_order_of_sources_and_equal_ones_once() {
    let sets = ["stages.pretrain.epochs=7", "seed=1"];
    let loaded = load("extends: mae_vitb\nname: x\nstages: { pretrain: { batch: { micro: 7 } } }", &sets);
    let refusals: Vec<Refusal> = [
        Refusal::new("epochs", "too many"),
        Refusal::new("ratio", "too much").under("masker"),
        Refusal::new("micro", "no divisor").under("batch"),
        Refusal::new("dataset", "225 pixels").under("data"),
        Refusal::new("arch", "225 pixels").under("student"),
    ]
    .map(in_stage)
    .into();
    let report = loaded.locate_all(&refusals);
    let names: Vec<&str> = report.0.iter().map(|d| d.labels[0].place.source.name()).collect();
    assert_eq!(names, ["recipe.yaml", "built-in:mae_vitb", "built-in:mae_vitb", "--set"], "{report}");
    assert!(report.0.iter().any(|d| d.labels.len() == 2 && d.labels[1].text == "here too"), "{report}");
}

#[test]
fn json_names_the_flag_and_the_line() {
    let sets = ["seed=3", "stages.pretrain.epochs=0"];
    let mistakes = refuse(&MAE.replace("ratio: 0.75", "ratio: 2"), &sets).to_json();
    assert_eq!(mistakes[1]["flag"], json!(sets[1]));
    assert_eq!(mistakes[1]["source_line"], json!(sets[1]));
    assert_eq!(mistakes[0]["flag"], json!(null));
    assert!(mistakes[0]["source_line"].as_str().is_some_and(|line| line.ends_with("ratio: 2 }")), "{mistakes}");
}

#[test]
fn unresolved_names_are_reported_with_what_cannot_be_planned() {
    let text = include_str!("../recipes/maskalign_vitb_clip.yaml")
        .replace("attention, teacher: clip", "attention, teacher: clop");
    let loaded = load(&text, &[]);
    let micro = in_stage(Refusal::new("micro", "no divisor").under("batch"));
    // Planning stopped before it came to the masker.
    let report = loaded.locate_all([&micro]);
    assert_eq!(report.0.len(), 2, "{report}");
    assert_eq!(report.0[0].suggestions, ["clip"]);
    // It came to it, in words of its own.
    let masker = in_stage(Refusal::new("teacher", "no such teacher").under("masker"));
    assert_eq!(loaded.locate_all([&micro, &masker]).render(), report.render());
}

#[test]
fn without_the_environment_an_unset_variable_is_any_valid_scalar() {
    let knn = "  knn:\n    type: knn\n    dataset: { type: sample }\n    neighbours: [\"${K}\"]\n";
    let load = |text: &str| {
        let request = LoadRequest {
            input: Input::Text { name: "recipe.yaml".to_owned(), text: text.to_owned() },
            sets: &[],
            env: &|_| None,
            builtins: &Papers,
        };
        Recipe::load_without_environment(&request, registry())
    };
    let left_out = |loaded: &Loaded| -> Vec<String> {
        loaded
            .unplanned()
            .into_iter()
            .map(|(stage, report)| format!("{stage} {}", report.0[0].place().expect("a place")))
            .collect()
    };
    // Text stands for itself.
    let loaded = load(MAE).expect("sound");
    assert!(left_out(&loaded).is_empty());
    assert_eq!(loaded.resolved()["stages"]["pretrain"]["data"]["dataset"]["root"], json!("$IMAGENET_DIR/train"));
    for (from, to) in [
        ("epochs: 800", "epochs: ${E}"),
        ("ratio: 0.75", "ratio: \"${R}\""),
        ("type: random, ratio: 0.75", "type: \"${M}\", ratio: 0.75"),
        ("normalize: standardize", "normalize: \"${N}\""),
    ] {
        let loaded = load(&format!("{}{knn}", MAE.replace(from, to))).unwrap_or_else(|report| panic!("{report}"));
        assert!(loaded.recipe().stages.is_empty());
        assert_eq!(left_out(&loaded).len(), 2, "{to}");
    }
    let loaded = load(&MAE.replace("seed: 0", "seed: ${S}").replace("name: mae_vitb", "name: ${N}")).expect("sound");
    assert_eq!((loaded.recipe().seed, loaded.recipe().name.as_str()), (0, "N"));
    // What no scalar can be, and what is no variable, are mistakes on every machine.
    assert_eq!(load(&MAE.replace("{ type: random, ratio: 0.75 }", "[\"${M}\"]")).expect_err("a list").0.len(), 1);
    assert_eq!(load(&MAE.replace("epochs: 800", "epochs: ${A-B}")).expect_err("no name").0[0].code, "bad-variable");
    // Other mistakes in such a stage are found.
    let report = load(&MAE.replace("epochs: 800", "epochs: ${E}").replace("0.75", "7")).expect_err("out of range");
    assert_eq!(report.0.len(), 1, "{report}");
}

#[test]
fn a_flag_appends_an_item_to_a_list() {
    let loaded = load(MAE, &["stages.pretrain.data.transforms.2.type=horizontal_flip"]);
    let transforms = &loaded.resolved()["stages"]["pretrain"]["data"]["transforms"];
    assert_eq!(transforms[2], json!({ "type": "horizontal_flip", "probability": 0.5 }));
}
