//! The order of this crate's modules.

use std::path::Path;

#[path = "../../../maskalign-registry/tests/it/layers.rs"]
mod source;

/// The crate's modules, the lowest first.
const LAYERS: &[&str] = &[
    "chart",
    "plugin",
    "files",
    "nn",
    "data",
    "weights",
    "embedded",
    "run",
    "error",
    "components",
    "events",
    "stages",
    "kinds",
    "pipeline",
    "fork",
];

/// The modules of its folders, the lowest first.
const FOLDERS: &[(&str, &[&str])] = &[
    ("files", &["plain", "error", "fail_point", "atomic"]),
    (
        "data",
        &[
            "size",
            "amount",
            "fill",
            "image",
            "sheet",
            "regular_file",
            "resample",
            "tone",
            "blur",
            "affine",
            "decode",
            "datasets",
            "transforms",
            "loader",
        ],
    ),
    (
        "weights",
        &[
            "mismatch",
            "error",
            "fit",
            "element",
            "positions",
            "naming",
            "families",
            "part",
            "pickle",
            "tensor_file",
            "torch_file",
            "checkpoint",
            "hub",
            "timm_names",
            "read",
            "head",
            "beside",
        ],
    ),
    (
        "run",
        &[
            "clock",
            "stop",
            "spread",
            "seal",
            "metrics",
            "manifest",
            "pictures",
            "failed",
            "directory",
            "compare",
            "overview",
            "check",
        ],
    ),
    (
        "components",
        &[
            "losses",
            "schedules",
            "optimizers",
            "maskers",
            "tokens",
            "relations",
            "beside",
            "towers",
            "students",
            "aligners",
            "teachers",
            "targets",
        ],
    ),
    ("events", &["summary", "metrics", "pictures", "tensorboard"]),
    (
        "stages",
        &[
            "outline",
            "logistic",
            "memory",
            "eigenvalues",
            "data",
            "training",
            "pictures",
            "features",
            "measured",
            "neighbours",
            "supervised",
            "knn",
            "finetune",
            "probe_sweep",
            "linear_probe",
            "classifiers",
            "evaluate",
            "quality",
            "retrieval",
            "few_shot",
            "pretrain",
        ],
    ),
];

#[test]
fn a_module_uses_only_those_below_it() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    assert_eq!(source::faults(&src, LAYERS), [""; 0]);
}

#[test]
fn a_module_of_a_folder_uses_only_those_below_it() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let faults = |(folder, layers): &(&str, &[&str])| {
        source::faults(&src.join(folder), layers)
            .into_iter()
            .map(|fault| format!("{folder}: {fault}"))
            .collect::<Vec<_>>()
    };
    let faults: Vec<String> = FOLDERS.iter().flat_map(faults).collect();
    assert_eq!(faults, [""; 0]);
}
