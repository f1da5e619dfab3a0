//! A corpus of recipes, each one edit of a shipped one: what is wrong gets its code at its place, and the schema for
//! editors and the decoder agree on structure.
//!
//! The schema is judged by the `jsonschema` crate, and the YAML that it sees is read by another parser than the decoder's.

use jsonschema::Validator;
use maskalign_core::{
    Recompute,
    components::towers::{Environment, MissingWeights},
    embedded,
    pipeline::{PlanOptions, plan},
};
use maskalign_registry::{
    Input, LoadRequest, Recipe, RecipeSource, Registry, Report, diagnostic::codes::*, recipe_schema,
};
use serde_json::Value;

/// An edit of a recipe: what is replaced, and by what.
type Edit = (&'static str, &'static str);

/// Edits that both the schema and the decoder refuse, with the decoder's code and the text that it marks.
const BAD: &[(&str, &[(Edit, &str, &str)])] = &[
    (
        "vitfreeze_vitb",
        &[
            (("first: 0.8", "first: 1"), OUT_OF_RANGE, "1"),
            (("first: 0.8, ", ""), MISSING_KEY, "freeze"),
            (("growth: cubic", "growth: quartic"), UNKNOWN_VALUE, "quartic"),
        ],
    ),
    (
        "tinymim_vitb",
        &[
            (("of: [qk, vv]", "of: [qw]"), UNKNOWN_VALUE, "qw"),
            (("of: [qk, vv]", "of: []"), OUT_OF_RANGE, "[]"),
            (("of: [qk, vv]", "heads: 0"), OUT_OF_RANGE, "0"),
            (("reduction: batchmean", "reduction: sum"), UNKNOWN_VALUE, "sum"),
        ],
    ),
    (
        "quickstart_teacher",
        &[(("classifier: { stage: train }", "classifier: head.safetensors"), WRONG_TYPE, "head.safetensors")],
    ),
    (
        "maskalign_vitb_clip",
        &[
            (("name: maskalign_vitb_clip", "name: 3"), WRONG_TYPE, "3"),
            (("name: maskalign_vitb_clip", "name: a b"), OUT_OF_RANGE, "a b"),
            (("name: maskalign_vitb_clip\n", ""), MISSING_KEY, "seed"),
            (("name: maskalign_vitb_clip", "nam: x"), UNKNOWN_KEY, "nam"),
            (("seed: 0", "seed: -1"), OUT_OF_RANGE, "-1"),
            (("seed: 0", "seed: 0.5"), WRONG_TYPE, "0.5"),
            (("seed: 0", "seed: 0\nsteps: 3"), UNKNOWN_KEY, "steps"),
            (("stages:\n", "stages:\n  other: 3\n"), WRONG_TYPE, "3"),
            (("    type: pretrain\n", ""), MISSING_KEY, "pretrain"),
            (("    type: pretrain\n", "    type: pretain\n"), UNKNOWN_TYPE, "pretain"),
            (("    epochs: 200\n", ""), MISSING_KEY, "pretrain"),
            (("    epochs: 200\n", "    epochs: 0\n"), OUT_OF_RANGE, "0"),
            (("    epochs: 200\n", "    epochs: true\n"), WRONG_TYPE, "true"),
            (("    epochs: 200\n", "    epochs: 200\n    warmup_epochs: 3\n"), UNKNOWN_KEY, "warmup_epochs"),
            (("    epochs: 200\n", "    epochs: 200\n    precision: f8\n"), UNKNOWN_VALUE, "f8"),
            (("type: image_folder", "type: image_foldr"), UNKNOWN_TYPE, "image_foldr"),
            (("type: image_folder, ", ""), MISSING_KEY, "dataset"),
            (("root: \"${IMAGENET_DIR}/train\"", "root: 3"), WRONG_TYPE, "3"),
            (("root: \"${IMAGENET_DIR}/train\"", "root: a, extensions: []"), OUT_OF_RANGE, "[]"),
            ((", root: \"${IMAGENET_DIR}/train\"", ""), MISSING_KEY, "dataset"),
            (("size: 224", "size: 0"), OUT_OF_RANGE, "0"),
            (("size: 224", "size: big"), WRONG_TYPE, "big"),
            (("scale: [0.2, 1.0]", "scale: [0.2]"), OUT_OF_RANGE, "[0.2]"),
            (("scale: [0.2, 1.0]", "scale: [0.2, 1.5]"), OUT_OF_RANGE, "1.5"),
            (("scale: [0.2, 1.0]", "scales: [0.2, 1.0]"), UNKNOWN_KEY, "scales"),
            (("- { type: horizontal_flip }", "- horizontal_flip"), WRONG_TYPE, "horizontal_flip"),
            (("- { type: horizontal_flip }", "- { type: vertical_flip }"), UNKNOWN_TYPE, "vertical_flip"),
            (("type: horizontal_flip", "type: color_jitter, hue: 0.6"), OUT_OF_RANGE, "0.6"),
            (("type: horizontal_flip", "type: color_jitter, hue: [-0.6, 0]"), OUT_OF_RANGE, "-0.6"),
            (("type: horizontal_flip", "type: color_jitter, brightness: -0.4"), OUT_OF_RANGE, "-0.4"),
            (("type: horizontal_flip", "type: color_jitter, brightness: [0.4]"), OUT_OF_RANGE, "[0.4]"),
            (("type: horizontal_flip", "type: color_jitter, brightness: strong"), WRONG_TYPE, "strong"),
            (("type: horizontal_flip", "type: grayscale, p: 1.2"), OUT_OF_RANGE, "1.2"),
            (("type: horizontal_flip", "type: gaussian_blur, sigma: -1"), OUT_OF_RANGE, "-1"),
            (("type: horizontal_flip", "type: gaussian_blur, radius: 1"), UNKNOWN_KEY, "radius"),
            (("type: horizontal_flip", "type: solarize, threshold: 300"), OUT_OF_RANGE, "300"),
            (("type: horizontal_flip", "type: random_rotation"), MISSING_KEY, "- |{ type: random_rotation }"),
            (("type: horizontal_flip", "type: random_rotation, degrees: 9, fill: [0, 0, 256]"), OUT_OF_RANGE, "256"),
            (
                ("type: horizontal_flip", "type: random_rotation, degrees: 9, interpolation: cubic"),
                UNKNOWN_VALUE,
                "cubic",
            ),
            (("type: horizontal_flip", "type: pad, padding: [1, 2, 3]"), OUT_OF_RANGE, "[1, 2, 3]"),
            (("type: horizontal_flip", "type: pad, padding: 1, mode: mirror"), UNKNOWN_VALUE, "mirror"),
            (("drop_path: 0.1", "drop_path: -0.1"), OUT_OF_RANGE, "-0.1"),
            (("drop_path: 0.1", "drop_path: [0.1]"), WRONG_TYPE, "[0.1]"),
            (("drop_path: 0.1", "cls_token: 1"), WRONG_TYPE, "1"),
            (("drop_path: 0.1", "positions: sinus"), UNKNOWN_VALUE, "sinus"),
            (("{ type: vit, arch: base_16, drop", "{ type: vit, arch: base_17, drop"), UNKNOWN_VALUE, "base_17"),
            (("{ type: vit, arch: base_16, drop", "{ type: vit, arch: { dim: 96 }, drop"), MISSING_KEY, "arch"),
            (("{ type: clip, arch", "{ type: clipp, arch"), UNKNOWN_TYPE, "clipp"),
            ((", weights: \"hf://openai/clip-vit-base-patch16\"", ""), MISSING_KEY, "clip"),
            (("\"hf://openai/clip-vit-base-patch16\"", "{ stage: 3 }"), WRONG_TYPE, "3"),
            (("\"hf://openai/clip-vit-base-patch16\"", "{}"), OUT_OF_RANGE, "weights"),
            (("\"hf://openai/clip-vit-base-patch16\"", "{ path: clip.pth }"), MISSING_KEY, "weights"),
            (("\"hf://openai/clip-vit-base-patch16\"", "{ key: clip }"), MISSING_KEY, "weights"),
            (("\"hf://openai/clip-vit-base-patch16\"", "{ path: a, key: '' }"), OUT_OF_RANGE, "''"),
            (
                ("\"hf://openai/clip-vit-base-patch16\"", "{ path: 'embedded://a', key: b }"),
                OUT_OF_RANGE,
                "'embedded://a'",
            ),
            (("drop_path: 0.1", "masked_patches: mask"), UNKNOWN_VALUE, "masked_patches: |mask"),
            (("drop_path: 0.1", "layer_scale: 0"), OUT_OF_RANGE, "0"),
            (("{ type: attention, teacher: clip, ratio: 0.7 }", "random"), WRONG_TYPE, "random"),
            (
                ("{ type: attention, teacher: clip, ratio: 0.7 }", "{ type: attention, ratio: 0.7 }"),
                MISSING_KEY,
                "masker",
            ),
            (
                ("{ type: attention, teacher: clip, ratio: 0.7 }", "{ type: random, teacher: clip }"),
                UNKNOWN_KEY,
                "teacher",
            ),
            (("ratio: 0.7", "ratio: 1.7"), OUT_OF_RANGE, "1.7"),
            (("ratio: 0.7", "ratio: most"), WRONG_TYPE, "most"),
            (("ratio: 0.7", "visible: 0"), OUT_OF_RANGE, "0"),
            (("type: features", "type: feature"), UNKNOWN_TYPE, "feature"),
            (("levels: { last: 5 }", "levels: { last: 0 }"), OUT_OF_RANGE, "0"),
            (("levels: { last: 5 }", "levels: { first: 5 }"), UNKNOWN_KEY, "first"),
            (("levels: { last: 5 }", "levels: []"), OUT_OF_RANGE, "[]"),
            (("levels: { last: 5 }", "levels: some"), OUT_OF_RANGE, "some"),
            (("normalize: whiten", "normalize: white"), UNKNOWN_VALUE, "white"),
            (("tokens: [cls, visible]", "tokens: []"), OUT_OF_RANGE, "[]"),
            (("tokens: [cls, visible]", "tokens: [cls, seen]"), UNKNOWN_VALUE, "seen"),
            (("        tokens: [cls, visible]\n", ""), MISSING_KEY, "align"),
            (("fusion: linear", "fusion: liner"), UNKNOWN_VALUE, "liner"),
            (("type: smooth_l1", "type: smooth_l1, beta: one"), WRONG_TYPE, "one"),
            (("type: smooth_l1", "type: mse, beta: 1"), UNKNOWN_KEY, "beta"),
            (("        weight: 2.0\n", "        weight: heavy\n"), WRONG_TYPE, "heavy"),
            (("        weight: 2.0\n", "        weigth: 2.0\n"), UNKNOWN_KEY, "weigth"),
            (("        weight: 2.0\n", "        ratio: 0.7\n"), UNKNOWN_KEY, "ratio"),
            (("betas: [0.9, 0.95]", "betas: [0.9]"), OUT_OF_RANGE, "[0.9]"),
            (("no_decay: [distill_weights]", "no_decay: [3]"), WRONG_TYPE, "3"),
            (("base_lr: 1.5e-4", "lr: 1.5e-4"), UNKNOWN_KEY, "lr"),
            (("min_lr: 1.0e-5", "min_lr: -1"), OUT_OF_RANGE, "-1"),
            (("type: cosine, warmup", "type: cosin, warmup"), UNKNOWN_TYPE, "cosin"),
            (("batch: { effective: 1024, micro: 128 }", "batch: 1024"), WRONG_TYPE, "1024"),
            (("effective: 1024, ", ""), MISSING_KEY, "batch"),
        ],
    ),
    (
        "quickstart",
        &[
            (("split: train }\n      transforms", "split: trian }\n      transforms"), UNKNOWN_VALUE, "trian"),
            (("{ stage: pretrain }", "{ stag: pretrain }"), UNKNOWN_KEY, "stag"),
            (("{ stage: pretrain }", "{ stage: pretrain, path: a }"), UNKNOWN_KEY, "path"),
            (("[pixels, untrained]", "[pixel]"), UNKNOWN_VALUE, "pixel"),
            (("[pixels, untrained]", "pixels"), WRONG_TYPE, "pixels"),
            (("    baselines: [pixels, untrained]\n", "    k: [0]\n"), OUT_OF_RANGE, "0"),
            (("    baselines: [pixels, untrained]\n", "    levels: last\n"), OUT_OF_RANGE, "last"),
            (("    test: { dataset: { type: sample, split: test } }\n", ""), MISSING_KEY, "knn"),
            (("dim: 96, depth: 4", "dim: 96, depth: 0"), OUT_OF_RANGE, "0"),
            (("dim: 96, depth: 4", "dim: wide, depth: 4"), WRONG_TYPE, "wide"),
        ],
    ),
];

/// Edits of sound structure that the decoder or the plan refuses: references, depths, sizes, counts.
const MISFITS: &[(&str, &[(Edit, &str, &str)])] = &[
    (
        "maskalign_vitb_clip",
        &[
            (("masker: { type: attention, teacher: clip", "masker: { type: attention, teacher: clop"), REFUSED, "clop"),
            (("features, teacher: clip", "features, teacher: dino"), REFUSED, "dino"),
            (("levels: { last: 5 }", "levels: { last: 13 }"), REFUSED, "13"),
            (("levels: { last: 5 }", "levels: [embed, -1]"), REFUSED, "embed"),
            (("levels: { last: 5 }", "levels: [12]"), REFUSED, "12"),
            (("size: 224", "size: 225"), REFUSED, "base_16"),
            (("type: horizontal_flip", "type: color_jitter, contrast: [1.2, 0.8]"), REFUSED, "contrast"),
            (("type: horizontal_flip", "type: gaussian_blur, sigma: [2, 0.1]"), REFUSED, "sigma"),
            (("type: horizontal_flip", "type: gaussian_blur, kernel_size: 8"), REFUSED, "8"),
            (("type: horizontal_flip", "type: solarize, threshold: 0.5"), REFUSED, "0.5"),
            (("type: horizontal_flip", "type: gaussian_blur, kernel_size: 9, sigma: 0"), REFUSED, "sigma: |0"),
            (("type: horizontal_flip", "type: random_rotation, degrees: [9, -9]"), REFUSED, "degrees"),
            (("type: horizontal_flip", "type: pad, padding: 1, mode: edge, fill: 3"), REFUSED, "3"),
            (("ratio: 0.7", "visible: 197"), REFUSED, "197"),
            (("tokens: [cls, visible]", "tokens: [cls, visible, masked]"), REFUSED, "aligner"),
            (("micro: 128", "micro: 100"), REFUSED, "100"),
            (("    batch: {", "    checkpoints: { every_steps: 9, every_epochs: 2 }\n    batch: {"), REFUSED, "9"),
            (("drop_path: 0.1", "drop_path: 0.1, image_size: 65536"), REFUSED, "65536"),
            (("min_lr: 1.0e-5", "min_lr: 1.0e-3"), REFUSED, "1.0e-3"),
            (("min_lr: 1.0e-5", "warmup_lr: 1.0e-3"), REFUSED, "1.0e-3"),
            (("cosine, warmup_epochs: 20, min_lr: 1.0e-5", "multistep, milestones: [100, 200]"), REFUSED, "200"),
            (
                ("type: clip, arch: base_16", "type: clip, arch: base_16, image_size: 448"),
                REFUSED,
                "attention, teacher: |clip",
            ),
        ],
    ),
    (
        "crossmae_vitb",
        &[
            (("          attention: cross\n", ""), REFUSED, "levels"),
            (("attention: cross", "attention: full"), REFUSED, "levels"),
            (("tokens: [masked]", "tokens: [visible]"), REFUSED, "cross"),
            (("tokens: [masked]", "tokens: [visible, masked]"), REFUSED, "cross"),
            (("[embed, 0, 1,", "[embed, 1, 1,"), REFUSED, "embed, 1, |1"),
            (("10, 11]", "10, 12]"), REFUSED, "12"),
            (("predict_ratio: 0.25", "predict_ratio: 0.8"), REFUSED, "0.8"),
            (("predict_ratio: 0.25", "predict_ratio: 0"), REFUSED, "tokens"),
        ],
    ),
    (
        "simmim_vitb",
        &[
            (("cell: 2", "cell: 3"), REFUSED, "cell: |3"),
            (("ratio: 0.6, cell: 2", "masked: 30, cell: 2"), REFUSED, "masked: |30"),
        ],
    ),
    (
        "maskfeat_vitb",
        &[(("cell: 8", "cell: 5"), REFUSED, "cell: |5"), (("tokens: [masked]", "tokens: [cls]"), REFUSED, "target")],
    ),
    (
        "tinymim_vitb",
        &[
            (("level: 17", "level: 24"), REFUSED, "24"),
            (("level: -1", "level: 12"), REFUSED, "12"),
            (("of: [qk, vv]", "heads: 5"), REFUSED, "5"),
            (("of: [qk, vv]", "of: [qk, qk]"), REFUSED, "qk, |qk"),
            (("{ type: relations, level: -1 }", "{ type: decoder }"), REFUSED, "aligner"),
            (("{ type: relations, teacher: mae, level: 17, of: [qk, vv] }", "{ type: pixels }"), REFUSED, "target"),
            (("weight: 2.0", "level_weights: [1, 0]"), REFUSED, "level_weights"),
            (("arch: base_16, drop_path: 0.1", "arch: base_16, cls_token: false"), REFUSED, "aligner"),
        ],
    ),
    ("uta_vitb", &[(("ratio: 0.5, inverse", "visible: 12, inverse"), REFUSED, "masker")]),
    (
        "vitfreeze_vitb",
        &[
            (("after_epochs: 10", "after_epochs: 100"), REFUSED, "100"),
            (("levels: [11]", "levels: [10]"), REFUSED, "freeze"),
            (("    masker:", "    teachers: { ema: { type: ema, momentum: 0.9 } }\n    masker:"), REFUSED, "freeze"),
        ],
    ),
    (
        "dbot_vitb",
        &[
            (("{ stage: pretrain }", "{ stage: second }"), REFUSED, "second"),
            (("{ type: ema, momentum: 1.0 }", "{ type: ema, momentum: 1.5 }"), REFUSED, "1.5"),
        ],
    ),
    (
        "data2vec_vitb",
        &[
            (("momentum: 0.9998", "momentum: 1.5"), REFUSED, "1.5"),
            (("warmup_epochs: 10", "warmup_epochs: 10, length_epochs: 700"), REFUSED, "700"),
            (("masked: 120", "masked: 120, max_block: 2"), REFUSED, "max_block: |2"),
            (("masked: 120", "masked: 8"), REFUSED, "masker"),
            ((", masked_patches: mask_token", ""), REFUSED, "aligner"),
            (("          combine: mean\n", ""), REFUSED, "whiten"),
            (("normalize_mean: whiten", "normalize_mean: standardize_batch"), REFUSED, "standardize_batch"),
            (
                (
                    "{ type: dynamic, levels: { last: 1 }, tap: norm, fusion: simple, head: linear }",
                    "{ type: decoder }",
                ),
                REFUSED,
                "aligner",
            ),
        ],
    ),
    (
        "attmask_vits",
        &[
            // Crops that towers cannot cut into patches, or that nobody draws masks for.
            (("size: 96, scale", "size: 90, scale"), REFUSED, "local"),
            (("masked_views: [global_1, global_2]", "masked_views: [global_1, local]"), REFUSED, "[global_1, |local"),
            (("masked_views: [global_1, global_2]", "masked_views: [global_1, globl]"), REFUSED, "globl"),
            (
                ("masked_views: [global_1, global_2]", "masked_views: [global_1]"),
                REFUSED,
                "tokens: [masked]\n        views: { |student",
            ),
            // What is compared with what.
            (
                ("target: [global_1, global_2], pairs", "target: [global_1, local], pairs"),
                REFUSED,
                "[global_1, global_2, local], |target",
            ),
            (
                ("student: [global_1, global_2, local]", "student: [global_1, global_1]"),
                REFUSED,
                "[global_1, |global_1",
            ),
            (("student: [global_1, global_2, local]", "student: [globl]"), REFUSED, "globl"),
            (
                (
                    "student: [global_1, global_2, local], target: [global_1, global_2]",
                    "student: [global_1], target: [global_1]",
                ),
                REFUSED,
                "pairs: |different",
            ),
            (
                ("views: { student: [global_1, global_2] }", "views: { student: [global_1, global_2], pairs: all }"),
                REFUSED,
                "pairs: |all",
            ),
            // A student that shows no mask tokens has as many rows as its masks leave: not equally many.
            (("masked_patches: mask_token", "masked_patches: drop"), REFUSED, "masker"),
            (("ratio_spread: 0.2", "ratio_spread: 0.4"), REFUSED, "0.4"),
            (("0.2, probability: 0.5", "0.2, probability: 0.5, hides: low, reveal: 0.1"), REFUSED, "reveal: |0.1"),
            // Schedules that outlast the stage, heads that do not fit.
            (
                ("warmup_epochs: 30 }\n        tokens: [cls]", "warmup_epochs: 130 }\n        tokens: [cls]"),
                REFUSED,
                "130",
            ),
            (
                (
                    "warmup_temperature: 0.04, warmup_epochs: 30 }\n        tokens: [cls]",
                    "warmup_epochs: 30 }\n        tokens: [cls]",
                ),
                REFUSED,
                "temperature: 0.07, warmup_epochs: |30",
            ),
            (
                ("aligner: { type: shared, objective: cls }", "aligner: { type: shared, objective: classes }"),
                REFUSED,
                "classes",
            ),
            (
                ("aligner: { type: shared, objective: cls }", "aligner: { type: shared, objective: patches }"),
                REFUSED,
                "objective: |patches",
            ),
            (("tokens: [masked]", "tokens: [cls, masked]"), REFUSED, "target"),
            (("clip_each: 3.0", "clip_each: 3.0, clip_norm: 1.0"), REFUSED, "clip_each: |3.0"),
        ],
    ),
    (
        "linear_probe_vitb",
        &[
            (("micro: 512", "micro: 1"), REFUSED, "1"),
            (("weights: student.safetensors", "cls_token: false"), REFUSED, "probe"),
            (("base_lr: 0.025", "base_lr: 0.025, weight_decay: -1"), REFUSED, "-1"),
        ],
    ),
    ("quickstart_teacher", &[(("classifier: { stage: train }", "classifier: { stage: tune }"), REFUSED, "tune")]),
    (
        "quickstart",
        &[
            (("    baselines: [pixels, untrained]\n", "    levels: [5]\n"), REFUSED, "5"),
            (("    baselines: [pixels, untrained]\n", "    levels: [embed]\n    pooling: cls\n"), REFUSED, "embed"),
            (("{ stage: pretrain }", "{ stage: pretrian }"), REFUSED, "pretrian"),
            (("dim: 96, depth: 4, heads: 3", "dim: 96, depth: 4, heads: 5"), REFUSED, "5"),
        ],
    ),
];

/// Edits that are as good as the recipe, for the schema and for the decoder.
const GOOD: &[(&str, &[Edit])] = &[
    (
        "maskalign_vitb_clip",
        &[
            ("seed: 0\n", ""),
            ("seed: 0", "seed: 18446744073709551615"),
            ("seed: 0", "description: words"),
            ("epochs: 200", "epochs: 20.5"),
            ("epochs: 200", "epochs: ${EPOCHS}"),
            ("epochs: 200", "epochs: ${UNSET:-30}"),
            ("size: 224", "size: 224.0"),
            ("size: 224", "size: [224, 224]"),
            ("drop_path: 0.1", "drop_path: 0"),
            ("drop_path: 0.1", "positions: learned"),
            ("arch: base_16, drop_path", "arch: { dim: 768, depth: 12, heads: 12, patch: 16 }, drop_path"),
            ("hf://openai/clip-vit-base-patch16", "clip.safetensors"),
            ("ratio: 0.7", "visible: 58"),
            ("ratio: 0.7", "ratio: \"${UNSET:-0.5}\""),
            ("    masker: { type: attention, teacher: clip, ratio: 0.7 }\n", ""),
            ("masker: { type: attention, teacher: clip, ratio: 0.7 }", "masker: ~"),
            ("{ type: attention, teacher: clip, ratio: 0.7 }", "{ type: random, ratio: 0.75 }"),
            ("levels: { last: 5 }", "levels: all"),
            ("levels: { last: 5 }", "levels: [0, -1]"),
            ("fusion: linear", "fusion: \"${UNSET:-sum}\""),
            ("type: smooth_l1", "type: \"${UNSET:-l1}\""),
            ("type: smooth_l1", "type: smooth_l1, beta: 0.5"),
            ("        weight: 2.0\n", ""),
            ("weight: 2.0", "weight: 1e-3"),
            ("weight: 2.0", "weight: { from: 0, to: 2, shape: cosine }"),
            ("min_lr: 1.0e-5", "min_lr: 0"),
        ],
    ),
    (
        "quickstart",
        &[
            ("[pixels, untrained]", "[]"),
            ("    batch: { effective: 64 }\n", "    batch: { effective: 64, micro: 16 }\n"),
            ("    student: { stage: pretrain }\n", "    student: { stage: pretrain }\n    k: [1, 20]\n"),
        ],
    ),
];

/// Recipes that extend the quickstart: what they say of its stage `pretrain`, and the first mistake that is found.
/// Those with `true` are mistakes to the schema too, which does not see what is inherited.
const EXTENDING: &[(&str, &str, &str, bool)] = &[
    ("objectives: { algin: null }", NOTHING_TO_REMOVE, "null", false),
    ("checkpoints: null", NOTHING_TO_REMOVE, "null", false),
    ("objectives: { $replace: false }", WRONG_TYPE, "false", true),
    ("more: { $replace: true }", UNKNOWN_KEY, "more", true),
    ("masker: { type: null }", MISSING_KEY, "masker", true),
    ("masker: { ratoi: null }", UNKNOWN_KEY, "ratoi", true),
    ("teachers: { teacher: null }", REFUSED, "teacher", false),
    ("optimizer: null", MISSING_KEY, "pretrain", false),
    ("objectives: { align: null }", OUT_OF_RANGE, "objectives", false),
    ("data: { transforms: [null] }", WRONG_TYPE, "null", true),
    ("epochs:", WRONG_TYPE, "epochs", false),
];

/// What recipes that extend the quickstart may say of its stage `pretrain`.
const EXTENDING_WELL: &[&str] = &[
    "masker: null",
    "masker: { $replace: true, type: random, ratio: 0.5 }",
    "masker: { ratio: null, visible: 16 }",
    "knn: null",
    "student: { drop_path: 0.1 }",
    "schedule: { warmup_epochs: null, min_lr: null }",
    "objectives: { align: { weight: null } }",
    "objectives: { $replace: true, pixels: { target: { type: pixels }, tokens: [masked], aligner: { type: decoder }, \
     loss: { type: mse } } }",
    "objectives: { align: null, pixels: { target: { type: pixels }, tokens: [masked], aligner: { type: decoder }, loss: \
     { type: mse } } }",
];

/// The recipes of the binary.
struct Embedded;

impl RecipeSource for Embedded {
    fn builtin(&self, name: &str) -> Option<&str> {
        embedded::RECIPES.iter().find(|(known, _)| *known == name).map(|(_, text)| *text)
    }

    fn names(&self) -> Vec<&str> {
        embedded::RECIPES.iter().map(|(name, _)| *name).collect()
    }
}

#[test]
fn what_a_recipe_does_not_take_over_is_checked_against_what_it_extends() {
    let validator = validator();
    let recipe = |says: &str| format!("extends: quickstart\nname: x\nstages:\n  pretrain:\n    {says}\n");
    for (says, code, marked, schema_sees) in EXTENDING {
        let text = recipe(says);
        let report = check(&text).expect_err(says);
        let first = &report.0[0];
        let at = first.place().map(|place| place.text().to_owned()).unwrap_or_default();
        assert_eq!((first.code, at.as_str()), (*code, *marked), "{says}:\n{report}");
        assert_eq!(admits(&validator, &text), !schema_sees, "{says}");
    }
    for says in EXTENDING_WELL {
        let text = recipe(says);
        assert!(admits(&validator, &text), "{says}");
        if let Err(report) = check(&text) {
            panic!("{says}:\n{report}");
        }
    }
    for says in ["objectives: { align: null }", "$replace: true", "epochs: null"] {
        let text = recipe(says).replacen("extends: quickstart\n", "", 1);
        assert!(!admits(&validator, &text), "without `extends`: {says}");
        assert!(check(&text).is_err(), "without `extends`: {says}");
    }
}

fn registry() -> &'static Registry {
    Registry::global().expect("no two components have one name")
}

fn edited(recipe: &str, (from, to): Edit) -> String {
    let shipped = embedded::RECIPES.iter().find(|(name, _)| *name == recipe);
    let (_, text) = shipped.unwrap_or_else(|| panic!("{recipe} is embedded"));
    assert!(text.contains(from), "{recipe} no longer holds {from:?}");
    text.replacen(from, to, 1)
}

fn variables(name: &str) -> Option<String> {
    match name {
        "IMAGENET_DIR" => Some("/images".to_owned()),
        "EPOCHS" => Some("30".to_owned()),
        _ => None,
    }
}

/// What is wrong with a recipe, as `validate --no-environment` sees it.
fn check(text: &str) -> Result<(), Report> {
    let request = LoadRequest {
        input: Input::Text { name: "recipe.yaml".to_owned(), text: text.to_owned() },
        sets: &[],
        env: &variables,
        builtins: &Embedded,
    };
    let loaded = Recipe::load(&request, registry())?;
    let options = PlanOptions {
        environment: Environment::Ignored,
        missing_weights: MissingWeights::Refused,
        recompute: Recompute::Never,
    };
    match plan(loaded.recipe(), options) {
        Ok(_) => Ok(()),
        Err(refusals) => Err(loaded.locate_all(&refusals)),
    }
}

/// Where a mistake is to be marked: the text itself, or `before|marked` where it stands several times. A place inside
/// the edit is meant before a key above it, and that before what follows.
fn expected_at(text: &str, recipe: &str, edit: Edit, marked: &str) -> usize {
    if let Some((before, marked)) = marked.split_once('|') {
        let context = format!("{before}{marked}");
        assert_eq!(text.matches(&context).count(), 1, "{context:?} stands once");
        return text.find(&context).expect("it stands") + before.len();
    }
    let shipped = embedded::RECIPES.iter().find(|(name, _)| *name == recipe).expect("embedded").1;
    let start = shipped.find(edit.0).expect("the edit applies");
    let inside = edit.1.find(marked).map(|at| start + at);
    let above = || text[..start].rfind(&format!(" {marked}:")).map(|at| at + 1);
    let below = || text[start..].find(marked).map(|at| start + at);
    inside.or_else(above).or_else(below).unwrap_or_else(|| panic!("{marked:?} is not in the recipe"))
}

/// Line and column of a byte offset, both from 1.
fn line_column(text: &str, at: usize) -> (usize, usize) {
    let before = &text[..at];
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

/// Whether the recipe has one mistake, with this code, that marks this text there; what was found where not.
fn blames(recipe: &str, edit: Edit, code: &str, marked: &str) -> Option<String> {
    let text = edited(recipe, edit);
    let Err(report) = check(&text) else {
        return Some("no mistake is found".to_owned());
    };
    let at = line_column(&text, expected_at(&text, recipe, edit, marked));
    let marked = marked.rsplit('|').next().unwrap_or(marked);
    let right = match report.0.as_slice() {
        [only] => only.code == code && only.place().is_some_and(|p| p.text() == marked && p.line_column() == at),
        _ => false,
    };
    (!right).then(|| format!("expected one {code} at {marked:?}, {}:{}, found\n{report}", at.0, at.1))
}

fn validator() -> Validator {
    jsonschema::draft7::new(&recipe_schema(registry())).expect("a schema")
}

fn admits(validator: &Validator, text: &str) -> bool {
    let value: Value = serde_yaml::from_str(text).expect("YAML");
    validator.is_valid(&value)
}

/// Every edit of a table with its recipe's name.
fn all<T>(table: &[(&'static str, &'static [T])]) -> Vec<(&'static str, &'static T)> {
    table.iter().flat_map(|(recipe, edits)| edits.iter().map(move |edit| (*recipe, edit))).collect()
}

#[test]
fn every_mistake_of_structure_is_marked_and_the_schema_refuses_it_too() {
    let edits = all(BAD);
    assert!(edits.len() >= 60, "{} bad recipes", edits.len());
    let validator = validator();
    let mut wrong = Vec::new();
    for (recipe, (edit, code, marked)) in edits {
        let text = edited(recipe, *edit);
        if let Some(what) = blames(recipe, *edit, code, marked) {
            wrong.push(format!("{recipe} {edit:?}: {what}"));
        }
        if admits(&validator, &text) {
            wrong.push(format!("{recipe} {edit:?}: the schema admits it"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_does_not_fit_together_is_marked_though_the_structure_is_sound() {
    let validator = validator();
    let mut wrong = Vec::new();
    for (recipe, (edit, code, marked)) in all(MISFITS) {
        let text = edited(recipe, *edit);
        if let Some(what) = blames(recipe, *edit, code, marked) {
            wrong.push(format!("{recipe} {edit:?}: {what}"));
        }
        if !admits(&validator, &text) {
            wrong.push(format!("{recipe} {edit:?}: the schema refuses it"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn good_recipes_please_the_schema_and_the_decoder() {
    let edits = all(GOOD);
    assert!(edits.len() >= 20, "{} good recipes", edits.len());
    let validator = validator();
    let mut wrong = Vec::new();
    for (recipe, edit) in edits {
        let text = edited(recipe, *edit);
        if let Err(report) = check(&text) {
            wrong.push(format!("{recipe} {edit:?}: {report}"));
        }
        if !admits(&validator, &text) {
            wrong.push(format!("{recipe} {edit:?}: the schema refuses it"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Two things that no JSON Schema can see.
#[test]
fn doubled_keys_and_unset_variables_are_the_decoders() {
    for ((from, to), code, marked) in [
        (("seed: 0\n", "seed: 0\nseed: 1\n"), DUPLICATE_KEY, "0\n|seed"),
        (("    epochs: 200\n", "    epochs: ${NOT_SET}\n"), UNSET_VARIABLE, "${NOT_SET}"),
        (("    epochs: 200\n", "    epochs: ${2}\n"), BAD_VARIABLE, "${2}"),
        (("name: maskalign", "extends: nowhere.yaml\nname: maskalign"), UNKNOWN_BASE, "nowhere.yaml"),
    ] {
        let wrong = blames("maskalign_vitb_clip", (from, to), code, marked);
        assert!(wrong.is_none(), "{to:?}: {}", wrong.unwrap_or_default());
    }
}

/// References are told with the rest, whether the structure is sound or not, and once.
#[test]
fn names_that_are_not_there_are_told_with_every_other_mistake() {
    let text = edited("quickstart", ("attention, teacher: teacher", "attention, teacher: techer"))
        .replace("features, teacher: teacher", "features, teacher: teachr")
        .replace("{ stage: pretrain }", "{ stage: pretrian }");
    let found = |text: &str| -> Vec<(String, Vec<String>)> {
        let report = check(text).expect_err("three names");
        report.0.into_iter().map(|d| (d.path.last().cloned().unwrap_or_default(), d.suggestions)).collect()
    };
    let names = |name: &str, near: &str| (name.to_owned(), vec![near.to_owned()]);
    let expected = [names("teacher", "teacher"), names("teacher", "teacher"), names("stage", "pretrain")];
    assert_eq!(found(&text), expected);
    // Planning stops at the student, before it comes to any name.
    let broken = text.replace("dim: 96, depth: 4, heads: 3", "dim: 96, depth: 4, heads: 5");
    assert_eq!(found(&broken).len(), 4);
    let unsound = found(&text.replace("seed: 0", "seed: -1"));
    assert_eq!((unsound.len(), &unsound[1..]), (4, &expected[..]));
}
