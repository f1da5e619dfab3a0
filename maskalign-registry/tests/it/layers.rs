//! The order of a crate's modules, read from its source: each may use those below it, and none above.
//!
//! It depends on nothing but `std`, so that any crate of the workspace can include this file in its tests by `#[path]`.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// What breaks the order of a crate's top-level modules, one sentence each; empty where it holds.
///
/// `src` is the folder with `lib.rs`, and `layers` names every module in it, the lowest first. Where the order holds,
/// no modules use each other in a circle. `lib.rs` and unit tests may use anything (also a module that `lib.rs` has under
/// `#[cfg(test)]`, and a file `tests.rs`), and so may macros, where they expand.
pub(super) fn faults(src: &Path, layers: &[&str]) -> Vec<String> {
    let mut faults = Vec::new();
    let mut modules = Vec::new();
    let root = fs::read_to_string(src.join("lib.rs")).unwrap_or_default();
    for path in entries(src) {
        let name = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default().to_owned();
        let is_test = root.contains(&format!("#[cfg(test)]\nmod {name};"));
        if !is_test && !matches!(name.as_str(), "lib" | "main") {
            modules.push((name, path));
        }
    }
    for layer in layers {
        if !modules.iter().any(|(name, _)| name == layer) {
            faults.push(format!("`{layer}` is a layer, and no module"));
        }
    }
    for (name, path) in modules {
        let Some(own) = layers.iter().position(|layer| *layer == name) else {
            faults.push(format!("`{name}` is a module, and no layer"));
            continue;
        };
        for (file, depth) in files(&path, 1) {
            let text = fs::read_to_string(&file).expect("a source file is text");
            let shown = file.strip_prefix(src).expect("it is below").display().to_string();
            for used in used(&text, depth) {
                match layers.iter().position(|layer| *layer == used) {
                    Some(layer) if layer > own => faults.push(format!("{shown} uses `{used}`, which is above it")),
                    None if used.starts_with(char::is_uppercase) => {
                        faults.push(format!("{shown} uses `{used}` without naming its module"));
                    }
                    _ => {}
                }
            }
        }
    }
    faults
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    paths
}

/// The source files of a module, each with the number of `super::` that leads from it to the crate's root.
fn files(path: &Path, depth: usize) -> Vec<(PathBuf, usize)> {
    if path.is_file() {
        let is_folder = path.file_stem().is_some_and(|stem| stem == "mod");
        let depth = if is_folder { depth - 1 } else { depth };
        let is_source = path.extension().is_some_and(|extension| extension == "rs");
        return if is_source && path.file_stem().is_some_and(|stem| stem != "tests") {
            vec![(path.to_owned(), depth)]
        } else {
            Vec::new()
        };
    }
    entries(path).iter().flat_map(|path| files(path, depth + 1)).collect()
}

/// The names that follow `crate::`, or as many `super::` as lead to the root, outside comments and unit tests.
fn used(text: &str, depth: usize) -> Vec<String> {
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    let code: String = code.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let code = code.replace(&"super::".repeat(depth), "crate::");
    let mut names = Vec::new();
    let mut rest = code.as_str();
    while let Some(at) = rest.find("crate::") {
        // `$crate::` is resolved where a macro is used, and `my_crate::` is another crate.
        let is_own = !rest[..at].ends_with(|c: char| c == '$' || c == '_' || c.is_alphanumeric());
        rest = &rest[at + "crate::".len()..];
        if !is_own {
            continue;
        }
        match rest.strip_prefix('{') {
            Some(group) => names.extend(heads(group)),
            None => names.push(name(rest)),
        }
    }
    names.sort();
    names.dedup();
    names
}

/// The first name of each path of `a::b, c::{d, e}, f}`.
fn heads(group: &str) -> Vec<String> {
    let mut heads = vec![name(group.trim_start())];
    let mut depth = 0;
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => heads.push(name(group[at + 1..].trim_start())),
            _ => {}
        }
    }
    heads.retain(|head| !head.is_empty());
    heads
}

fn name(path: &str) -> String {
    path.chars().take_while(|c| *c == '_' || c.is_alphanumeric()).collect()
}
