//! The order of the crates and of the command line's modules, read from their source.

use std::{
    fs,
    path::{Path, PathBuf},
};

#[path = "../../maskalign-registry/tests/it/layers.rs"]
mod source;

/// Each crate with those of the workspace that it may depend on, itself aside.
const MAY_USE: &[(&str, &[&str])] = &[
    ("kernels", &[]),
    ("gpu", &[]),
    ("macros", &[]),
    ("registry", &[]),
    ("engine", &["kernels", "gpu"]),
    ("core", &["engine", "macros", "registry"]),
    ("testkit", &["core", "engine", "registry"]),
    ("cli", &["core", "registry", "testkit"]),
];

/// The command line's modules, the lowest first.
const CLI: &[&str] = &[
    "output", "table", "render", "panics", "signals", "failure", "recipes", "progress", "report", "logging", "session",
    "verbs",
];

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests stand in the workspace").to_owned()
}

#[test]
fn a_module_of_the_command_line_uses_only_those_below_it() {
    assert_eq!(source::faults(&workspace().join("maskalign-cli/src"), CLI), [""; 0]);
}

#[test]
fn a_crate_depends_on_those_below_it_alone() {
    for (name, may) in MAY_USE {
        let manifest =
            fs::read_to_string(workspace().join(format!("maskalign-{name}/Cargo.toml"))).expect("a manifest");
        let used = manifest.lines().filter_map(|line| {
            let (used, rest) = line.strip_prefix("maskalign-")?.split_once(['.', ' '])?;
            (!rest.starts_with("core/")).then_some(used)
        });
        for used in used {
            assert!(may.contains(&used), "maskalign-{name} depends on maskalign-{used}");
        }
    }
}

#[test]
fn dfdx_the_kernels_and_the_gpu_are_named_in_the_engine_alone() {
    for name in ["registry", "macros", "core", "testkit", "cli"] {
        for path in sources(&workspace().join(format!("maskalign-{name}/src"))) {
            let text = fs::read_to_string(&path).expect("a source file is text");
            for line in text.lines().filter(|line| !line.trim_start().starts_with("//")) {
                for other in ["dfdx::", "maskalign_kernels::", "maskalign_gpu::"] {
                    assert!(!line.contains(other), "{}: {line}", path.display());
                }
            }
        }
    }
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let paths = entries.map(|entry| entry.expect("an entry").path());
    paths
        .flat_map(|path| match path.is_dir() {
            true => sources(&path),
            false if path.extension().is_some_and(|extension| extension == "rs") => vec![path],
            false => Vec::new(),
        })
        .collect()
}
