//! The schema for editors and the decoder agree on structure. The oracle for the schema is the
//! `jsonschema` crate, and the YAML is read by another parser than the decoder's.

use jsonschema::Validator;
use maskalign_registry::{Input, LoadRequest, NoRecipes, Recipe, recipe_schema};
use serde_json::Value;

use crate::components::registry;

const GOOD: &str = include_str!("../recipes/maskalign_vitb_clip.yaml");

/// One edit of a good recipe each: what is replaced, and by what.
const BAD: &[(&str, &str)] = &[
    ("name: maskalign_vitb_clip", "name: 3"),
    ("name: maskalign_vitb_clip", "name: \"\""),
    ("name: maskalign_vitb_clip", "name: a b"),
    ("name: maskalign_vitb_clip\n", ""),
    ("name: maskalign_vitb_clip", "nam: x"),
    ("seed: 0", "seed: -1"),
    ("seed: 0", "seed: 0.5"),
    ("seed: 0", "seed: zero"),
    ("seed: 0", "seed: 0\nsteps: 3"),
    ("seed: 0", "seed: [0]"),
    ("stages:\n", "stages:\n  other: 3\n"),
    ("stages:\n", "stages:\n  other: { epochs: 3 }\n"),
    ("stages:\n", "stages:\n  a.b: { type: knn, dataset: { type: sample } }\n"),
    ("    type: pretrain\n", ""),
    ("    type: pretrain\n", "    type: pre_train\n"),
    ("    epochs: 200\n", ""),
    ("    epochs: 200\n", "    epochs: 0\n"),
    ("    epochs: 200\n", "    epochs: -5\n"),
    ("    epochs: 200\n", "    epochs: true\n"),
    ("    epochs: 200\n", "    epochs: 200\n    warmup_epochs: 3\n"),
    ("type: image_folder", "type: image_foldr"),
    ("root: \"${IMAGENET_DIR}/train\"", "root: 3"),
    ("root: \"${IMAGENET_DIR}/train\"", "root: a, on_error: stop"),
    (", root: \"${IMAGENET_DIR}/train\"", ""),
    ("size: 224", "size: 0"),
    ("size: 224", "size: big"),
    ("size: 224", "size: 224.5"),
    ("scale: [0.2, 1.0]", "scale: [0.2]"),
    ("scale: [0.2, 1.0]", "scale: [0.2, 1.0, 2.0]"),
    ("scale: [0.2, 1.0]", "scale: [0.2, 1.5]"),
    ("scale: [0.2, 1.0]", "scale: 0.2"),
    ("- { type: horizontal_flip }", "- horizontal_flip"),
    ("- { type: horizontal_flip }", "- { type: horizontal_flip, probability: 2 }"),
    ("- { type: horizontal_flip }", "- { type: vertical_flip }"),
    ("arch: base_16, drop_path", "arch: base_17, drop_path"),
    ("arch: base_16, drop_path", "drop_path"),
    ("drop_path: 0.1", "drop_path: 1.0"),
    ("drop_path: 0.1", "drop_path: -0.1"),
    ("drop_path: 0.1", "drop_path: [0.1]"),
    ("drop_path: 0.1", "cls_token: 1"),
    ("drop_path: 0.1", "positions: sinus"),
    ("clip: { type: clip, arch: base_16, weights: \"hf://openai/clip-vit-base-patch16\" }", "clip: [1]"),
    ("hf://openai/clip-vit-base-patch16", "hf://clip-vit-base-patch16"),
    ("\"hf://openai/clip-vit-base-patch16\"", "{ stage: 3 }"),
    ("\"hf://openai/clip-vit-base-patch16\"", "{ stag: pretrain }"),
    ("masker: { type: attention, teacher: clip, ratio: 0.7 }", "masker: random"),
    ("masker: { type: attention, teacher: clip, ratio: 0.7 }", "masker: { type: attention, ratio: 0.7 }"),
    ("masker: { type: attention, teacher: clip, ratio: 0.7 }", "masker: { ratio: 0.7 }"),
    ("masker: { type: attention, teacher: clip, ratio: 0.7 }", "masker: { type: random, teacher: clip }"),
    ("ratio: 0.7", "ratio: 1"),
    ("ratio: 0.7", "ratio: { from: 0.5 }"),
    ("ratio: 0.7", "ratio: { from: 0.5, to: 1.5 }"),
    ("ratio: 0.7", "ratio: { from: 0.5, to: 0.6, shape: step }"),
    ("ratio: 0.7", "ratio: most"),
    ("ratio: 0.7", "visible: 0"),
    ("levels: { last: 5 }", "levels: { last: 0 }"),
    ("levels: { last: 5 }", "levels: { first: 5 }"),
    ("levels: { last: 5 }", "levels: []"),
    ("levels: { last: 5 }", "levels: [0.5]"),
    ("levels: { last: 5 }", "levels: [first]"),
    ("levels: { last: 5 }", "levels: some"),
    ("normalize: whiten", "normalize: white"),
    ("tokens: [cls, visible]", "tokens: []"),
    ("tokens: [cls, visible]", "tokens: cls"),
    ("tokens: [cls, visible]", "tokens: [cls, seen]"),
    ("        tokens: [cls, visible]\n", ""),
    ("weight: 2.0", "weight: -1"),
    ("weight: 2.0", "weigth: 2.0"),
    ("loss: { type: smooth_l1 }", "loss: { type: smooth_l1, beta: 0 }"),
    ("loss: { type: smooth_l1 }", "loss: { type: mse, beta: 1 }"),
    ("betas: [0.9, 0.95]", "betas: [0.9, 1.95]"),
    ("no_decay: [distill_weights]", "no_decay: [3]"),
    ("batch: { effective: 1024, micro: 128 }", "batch: { effective: 1024 }"),
    ("batch: { effective: 1024, micro: 128 }", "batch: 1024"),
    ("micro: 128", "micro: 4294967296"),
];

const FINE: &[(&str, &str)] = &[
    ("seed: 0", "seed: 0"),
    ("seed: 0\n", ""),
    ("seed: 0", "seed: 18446744073709551615"),
    ("seed: 0", "description: words"),
    ("epochs: 200", "epochs: 0.5"),
    ("epochs: 200", "epochs: ${EPOCHS}"),
    ("epochs: 200", "epochs: ${EPOCHS:-3}"),
    ("size: 224", "size: 224.0"),
    ("drop_path: 0.1", "cls_token: false"),
    ("drop_path: 0.1", "drop_path: 0"),
    ("drop_path: 0.1", "weights: { stage: warm }"),
    ("drop_path: 0.1", "weights: null"),
    ("ratio: 0.7", "ratio: { from: 0.5, to: 0.7 }"),
    ("ratio: 0.7", "visible: 58"),
    ("    masker: { type: attention, teacher: clip, ratio: 0.7 }\n", ""),
    ("masker: { type: attention, teacher: clip, ratio: 0.7 }", "masker: ~"),
    ("levels: { last: 5 }", "levels: all"),
    ("levels: { last: 5 }", "levels: [embed, 0, -1]"),
    ("fusion: linear", "fusion: \"${FUSION:-sum}\""),
    ("type: smooth_l1", "type: \"${LOSS:-l1}\""),
    ("weight: 2.0", "weight: 1e-3"),
    ("ratio: 0.7", "ratio: \"${RATIO:-0.5}\""),
    ("drop_path: 0.1", "cls_token: \"${CLS:-false}\""),
    ("batch: { effective: 1024, micro: 128 }", "batch: { effective: 1024, micro: 128 }\n    knn_every: 5"),
];

fn edited((from, to): (&str, &str)) -> String {
    assert!(GOOD.contains(from), "{from}");
    GOOD.replacen(from, to, 1)
}

fn validator() -> Validator {
    jsonschema::draft7::new(&recipe_schema(registry())).expect("a schema")
}

fn schema_admits(validator: &Validator, text: &str) -> bool {
    let value: Value = serde_yaml::from_str(text).expect("YAML");
    validator.is_valid(&value)
}

fn decoder_admits(text: &str) -> bool {
    let request = LoadRequest {
        input: Input::Text { name: "recipe.yaml".to_owned(), text: text.to_owned() },
        sets: &[],
        env: &|name| {
            Some(match name {
                "EPOCHS" => "3".to_owned(),
                "FUSION" | "LOSS" | "RATIO" | "CLS" => return None,
                _ => "/images".to_owned(),
            })
        },
        builtins: &NoRecipes,
    };
    Recipe::load(&request, registry()).is_ok()
}

#[test]
fn schema_and_decoder_agree_on_what_is_wrong() {
    assert!(BAD.len() >= 60);
    let validator = validator();
    for edit in BAD {
        let text = edited(*edit);
        assert!(!decoder_admits(&text), "the decoder admits {edit:?}");
        assert!(!schema_admits(&validator, &text), "the schema admits {edit:?}");
    }
}

#[test]
fn schema_and_decoder_agree_on_what_is_right() {
    assert!(FINE.len() >= 20);
    let validator = validator();
    for edit in FINE {
        let text = edited(*edit);
        assert!(decoder_admits(&text), "the decoder refuses {edit:?}");
        assert!(schema_admits(&validator, &text), "the schema refuses {edit:?}");
    }
}

#[test]
fn a_recipe_that_extends_may_leave_required_keys_and_types_to_its_base() {
    let validator = validator();
    for text in [
        "extends: base.yaml",
        "extends: [a, b]\nseed: 3",
        "extends: a\nstages: { pretrain: { epochs: 3 } }",
        "extends: a\nstages: { pretrain: { masker: { ratio: 0.5 } } }",
        "extends: a\nstages: { pretrain: { masker: { type: attention } } }",
        "extends: a\nstages: { pretrain: { objectives: { align: { loss: { beta: 2 } } } } }",
        "extends: a\nstages: { pretrain: { teachers: { ema: { momentum: { to: 1 } } } } }",
        "extends: a\nstages: { knn: null }",
        "extends: a\nstages: { pretrain: { optimizer: null, objectives: { align: null }, teachers: { clip: ~ } } }",
        "extends: a\nstages: { pretrain: { masker: { type: random, ratio: null } } }",
        "extends: a\nstages: { pretrain: { objectives: { align: { loss: { beta: null }, tokens: null, weight: null } } } }",
        "extends: a\nstages: { pretrain: { type: pretrain, epochs: null, data: { transforms: null } } }",
        "extends: a\nstages: { $replace: true, knn: { type: knn } }",
        "extends: a\nstages: { pretrain: { $replace: true, masker: { $replace: true, ratio: 0.5 } } }",
        "extends: a\nstages: { pretrain: { masker: { type: random, $replace: true, ratio: 0.5 } } }",
        "extends: a\nstages: { pretrain: { objectives: { $replace: true, a: { $replace: true, weight: 2 } } } }",
    ] {
        assert!(schema_admits(&validator, text), "{text}");
    }
    for text in [
        "extends: 3",
        "extends: a\nseed: x",
        "extends: a\nstages: { pretrain: { epoch: 3 } }",
        "extends: a\nstages: { pretrain: { masker: { ratoi: 0.5 } } }",
        "extends: a\nstages: { pretrain: { masker: { type: random, teacher: clip } } }",
        "extends: a\nstages: { pretrain: { masker: { ratio: 2 } } }",
        "extends: a\nstages: { pretrain: { ratio: null } }",
        "extends: a\nstages: { pretrain: { masker: { type: null } } }",
        "extends: a\nstages: { pretrain: { data: { transforms: [null] } } }",
        "extends: a\nstages: { pretrain: { masker: { type: random, teacher: null } } }",
        "extends: a\nstages: { pretrain: { objectives: { $replace: false } } }",
        "extends: a\nstages: { pretrain: { objectives: { $replace: \"${YES}\" } } }",
        "name: a\nstages: { knn: null }",
        "name: a\nstages: { $replace: true, knn: { type: knn, dataset: { type: sample } } }",
        "name: a\nstages: { knn: { $replace: true, type: knn, dataset: { type: sample } } }",
    ] {
        assert!(!schema_admits(&validator, text), "{text}");
    }
}

#[test]
fn the_schema_is_the_same_each_time_and_small_enough_for_editors() {
    let first = recipe_schema(registry()).to_string();
    assert_eq!(first, recipe_schema(registry()).to_string());
    assert!(first.len() < 400_000, "{} bytes", first.len());
    jsonschema::meta::validate(&recipe_schema(registry())).expect("a valid schema");
}
