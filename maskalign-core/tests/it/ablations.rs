//! The ablations of the paper's recipe change what their names say, and nothing else.

use std::{collections::BTreeMap, fs, path::Path};

use maskalign_core::{
    Recompute,
    components::towers::{Environment, MissingWeights},
    embedded,
    run::differences,
    stages::{Pretrain, StageContext},
};
use maskalign_registry::{Input, LoadRequest, Loaded, Recipe, RecipeSource, Registry, decode_options};
use serde_json::{Value, json};

const BASE: &str = "maskalign_vitb_clip";

/// What each changes, by path below `stages.pretrain`: the base's value, then its own.
fn expected() -> BTreeMap<&'static str, Vec<(&'static str, Value, Value)>> {
    const ALIGN: [&str; 5] = [
        "objectives.align.target.levels",
        "objectives.align.target.normalize",
        "objectives.align.aligner.fusion",
        "objectives.align.aligner.head",
        "objectives.align.weight",
    ];
    let [levels, normalize, fusion, head, weight] = ALIGN;
    let last = || ("objectives.align.target.levels.last", json!(5), json!(1));
    let all = || (levels, json!({ "last": 5 }), json!("all"));
    let ratio = |ratio: f64| vec![("masker.ratio", json!(0.7), json!(ratio))];
    let normalized = |by: &str| vec![(normalize, json!("whiten"), json!(by))];
    let fused = |by: &str| (fusion, json!("linear"), json!(by));
    let headed = |by: &str| vec![(head, json!("linear"), json!(by))];
    let loss = |name: &str| {
        vec![
            ("objectives.align.loss.type", json!("smooth_l1"), json!(name)),
            ("objectives.align.loss.beta", json!(1.0), Value::Null),
            (weight, json!(2.0), json!(1.0)),
        ]
    };
    BTreeMap::from([
        ("mask_ratio_00", ratio(0.0)),
        ("mask_ratio_10", ratio(0.1)),
        ("mask_ratio_20", ratio(0.2)),
        ("mask_ratio_30", ratio(0.3)),
        ("mask_ratio_40", ratio(0.4)),
        ("mask_ratio_50", ratio(0.5)),
        ("mask_ratio_60", ratio(0.6)),
        ("mask_ratio_80", ratio(0.8)),
        ("mask_ratio_90", ratio(0.9)),
        (
            "masker_random",
            vec![
                ("masker.type", json!("attention"), json!("random")),
                ("masker.teacher", json!("clip"), Value::Null),
                ("masker.cell", Value::Null, json!(1)),
            ],
        ),
        ("alignment_none", vec![last(), fused("simple")]),
        ("alignment_simple", vec![fused("simple")]),
        ("alignment_sum", vec![fused("sum")]),
        ("normalize_none", normalized("none")),
        ("normalize_l2", normalized("l2")),
        ("normalize_standardize", normalized("standardize")),
        ("normalize_standardize_batch", normalized("standardize_batch")),
        ("loss_mse", loss("mse")),
        ("loss_l1", loss("l1")),
        ("loss_cosine", loss("cosine")),
        ("levels_all", vec![all()]),
        ("levels_linear", vec![all(), ("objectives.align.level_weights", json!("uniform"), json!("linear"))]),
        ("levels_last", vec![last()]),
        ("levels_middle", vec![(levels, json!({ "last": 5 }), json!([5]))]),
        ("head_norm_linear", headed("norm_linear")),
        ("head_linear_norm", headed("linear_norm")),
        ("head_mlp", headed("mlp")),
        ("head_mlp2", headed("mlp2")),
    ])
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

fn loaded(input: Input) -> Loaded {
    let request = LoadRequest {
        input,
        sets: &[],
        env: &|name| (name == "IMAGENET_DIR").then(|| "imagenet".to_owned()),
        builtins: &Shipped,
    };
    Recipe::load(&request, Registry::global().expect("a registry"))
        .unwrap_or_else(|report| panic!("{}", report.render()))
}

#[test]
fn each_changes_what_its_name_says() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes/ablations");
    let mut expected = expected();
    let base = loaded(Input::Path(BASE.into())).resolved().clone();
    for entry in fs::read_dir(folder).expect("the folder").flatten() {
        let path = entry.path();
        let name = path.file_stem().and_then(|stem| stem.to_str()).expect("a name").to_owned();
        let expected = expected.remove(name.as_str()).unwrap_or_else(|| panic!("nobody says what {name} changes"));
        let text = fs::read_to_string(&path).expect("text");
        let comment: Vec<&str> = text.lines().take_while(|line| line.starts_with('#')).collect();
        assert_eq!(comment[0], "# yaml-language-server: $schema=../recipe.schema.json", "{name}");
        let command = format!("#   maskalign run recipes/ablations/{name}.yaml");
        assert!(comment.len() > 2 && *comment.last().expect("a line") == command, "{name}");

        let own = loaded(Input::Path(path));
        assert_eq!(own.resolved()["name"], name.as_str());
        let found: Vec<(String, Value, Value)> = differences(&[&base, own.resolved()])
            .into_iter()
            .filter(|difference| difference.path != "name")
            .map(|difference| {
                let value = |i: usize| difference.values[i].clone().unwrap_or(Value::Null);
                (difference.path.replacen("stages.pretrain.", "", 1), value(0), value(1))
            })
            .collect();
        let mut missing: Vec<_> = expected.into_iter().map(|(path, was, is)| (path.to_owned(), was, is)).collect();
        for difference in &found {
            let at = missing.iter().position(|known| known == difference);
            missing.remove(at.unwrap_or_else(|| panic!("{name} changes {difference:?} too")));
        }
        assert!(missing.is_empty(), "{name} does not change {missing:?}");

        let stage: Pretrain = decode_options(own.recipe().stages["pretrain"].options_value()).expect("its options");
        let context = StageContext {
            name: "pretrain",
            seed: 0,
            students: &BTreeMap::new(),
            classifiers: &BTreeMap::new(),
            environment: Environment::Ignored,
            missing_weights: MissingWeights::Random,
            recompute: Recompute::Never,
        };
        stage.plan_pretrain(&context).unwrap_or_else(|refusals| panic!("{name}: {refusals:?}"));
    }
    assert!(expected.is_empty(), "no recipe for {:?}", expected.keys());
}
