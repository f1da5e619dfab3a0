//! The order of modules, read from their source: each may use those below it, and none above.
//!
//! It depends on nothing but `std`, so that any crate of the workspace can include this file in its tests by `#[path]`.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// What breaks the order of the modules of a crate, or of one of its modules, one sentence each; empty where it holds.
///
/// `folder` is the crate's `src`, or a folder of it with `mod.rs`; `layers` names every module in it, the lowest first.
/// Where the order holds, no modules use each other in a circle. `lib.rs` and unit tests may use anything (also a module
/// under `#[cfg(test)]`, and a file `tests.rs`), and so may macros, where they expand. What `mod.rs` defines lies below the
/// modules beside it; what it exports of a module's is that module's.
pub(super) fn faults(folder: &Path, layers: &[&str]) -> Vec<String> {
    let mut faults = Vec::new();
    let mut modules = Vec::new();
    let prefix = module_of(folder);
    let own = ["lib.rs", "mod.rs"].iter().find_map(|name| fs::read_to_string(folder.join(name)).ok());
    let own = own.unwrap_or_default();
    for path in entries(folder) {
        let name = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default().to_owned();
        let is_test = own.contains(&format!("#[cfg(test)]\nmod {name};"));
        if !is_test && !matches!(name.as_str(), "lib" | "main" | "mod") {
            modules.push((name, path));
        }
    }
    for layer in layers {
        if !modules.iter().any(|(name, _)| name == layer) {
            faults.push(format!("`{layer}` is a layer, and no module"));
        }
    }
    let is_crate = prefix.is_empty();
    let statements = Statements::of(&code(&own), layers);
    if !is_crate {
        faults.extend(statements.used.iter().map(|layer| format!("mod.rs uses `{layer}`, which is above it")));
    }
    for (name, path) in modules {
        let Some(at) = layers.iter().position(|layer| *layer == name) else {
            faults.push(format!("`{name}` is a module, and no layer"));
            continue;
        };
        for (file, module) in files(&path, &prefix) {
            let text = fs::read_to_string(&file).expect("a source file is text");
            let shown = file.strip_prefix(folder).expect("it is below").display().to_string();
            for used in used(&text, &module, &prefix) {
                let layer = if is_crate { &used } else { statements.exported.get(&used).unwrap_or(&used) };
                match layers.iter().position(|other| other == layer) {
                    Some(other) if other > at => faults.push(format!("{shown} uses `{layer}`, which is above it")),
                    None if is_crate && used.starts_with(char::is_uppercase) => {
                        faults.push(format!("{shown} uses `{used}` without naming its module"));
                    }
                    _ => {}
                }
            }
        }
    }
    faults
}

/// The path of the module that a folder is, below `src`.
fn module_of(folder: &Path) -> Vec<String> {
    let names: Vec<String> = folder.iter().map(|name| name.to_string_lossy().into_owned()).collect();
    names.iter().rposition(|name| name == "src").map(|src| names[src + 1..].to_vec()).unwrap_or_default()
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    paths
}

/// The source files at or below `path`, each with the path of its module.
fn files(path: &Path, parent: &[String]) -> Vec<(PathBuf, Vec<String>)> {
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let mut module = parent.to_vec();
    if stem != "mod" {
        module.push(stem.to_owned());
    }
    if path.is_dir() {
        return entries(path).iter().flat_map(|path| files(path, &module)).collect();
    }
    let is_source = path.extension().is_some_and(|extension| extension == "rs") && stem != "tests";
    if is_source { vec![(path.to_owned(), module)] } else { Vec::new() }
}

/// A source without comments and unit tests.
fn code(text: &str) -> String {
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    code.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// What `mod.rs` says of the modules beside it.
#[derive(Default)]
struct Statements {
    /// What it exports, each name with its module.
    exported: BTreeMap<String, String>,
    /// The modules that it uses itself.
    used: Vec<String>,
}

impl Statements {
    fn of(code: &str, layers: &[&str]) -> Self {
        let mut statements = Statements::default();
        let mut rest = String::new();
        for statement in code.split_inclusive(';') {
            let (before, imported) = statement.split_once("use ").unwrap_or((statement, ""));
            let visibility = before.rsplit('\n').next().unwrap_or_default();
            if imported.is_empty() || !(visibility.is_empty() || visibility.starts_with("pub")) {
                rest.push_str(statement);
                continue;
            }
            let mut paths = Vec::new();
            tree(imported, &[], &mut paths);
            for mut path in paths.into_iter().filter(|path| layers.contains(&path[0].as_str())) {
                let name = path.pop().expect("it has a first name");
                let layer = path.into_iter().next().unwrap_or_else(|| name.clone());
                if visibility.is_empty() {
                    statements.used.push(layer);
                } else {
                    statements.exported.insert(name, layer);
                }
            }
        }
        let names = |layer: &&&str| {
            let start = format!("{layer}::");
            let mut found = rest.match_indices(&start).map(|(at, _)| rest[..at].trim_end_matches("self::"));
            found.any(|before| !before.ends_with(|c: char| matches!(c, '_' | ':') || c.is_alphanumeric()))
        };
        statements.used.extend(layers.iter().filter(names).map(|layer| (*layer).to_owned()));
        statements
    }
}

/// The names after `prefix` in the paths that start at `crate::` or at `super::`, in the source of `module`.
fn used(text: &str, module: &[String], prefix: &[String]) -> Vec<String> {
    let code = code(text);
    let mut paths = Vec::new();
    let mut at = 0;
    while let Some(found) = ["crate::", "super::"].iter().filter_map(|start| code[at..].find(start)).min() {
        let start = at + found;
        // `$crate::` is resolved where a macro is used, and `my_crate::` is another crate.
        let is_own = !code[..start].ends_with(|c: char| matches!(c, '$' | '_' | ':') || c.is_alphanumeric());
        let (mut rest, mut base) = match code[start..].strip_prefix("crate::") {
            Some(rest) => (rest, &[][..]),
            None => (&code[start..], module),
        };
        while let Some(after) = rest.strip_prefix("super::") {
            (rest, base) = (after, &base[..base.len().saturating_sub(1)]);
        }
        at = code.len() - rest.len();
        if is_own {
            tree(rest, base, &mut paths);
        }
    }
    let after = |path: &Vec<String>| path.strip_prefix(prefix)?.first().cloned();
    let mut names: Vec<String> = paths.iter().filter_map(after).collect();
    names.sort();
    names.dedup();
    names
}

/// The paths of a tree such as `a::{self, b, c::{d as e}}` at the start of a text; returns what follows it.
fn tree<'t>(text: &'t str, before: &[String], paths: &mut Vec<Vec<String>>) -> &'t str {
    if let Some(mut group) = text.strip_prefix('{') {
        loop {
            group = group.trim_start_matches(|c: char| c == ',' || c.is_whitespace());
            if group.is_empty() || group.starts_with('}') {
                return group.strip_prefix('}').unwrap_or_default();
            }
            let rest = tree(group, before, paths);
            // A new name, or what is no tree.
            let end = rest.find([',', '}']).unwrap_or(rest.len());
            group = &rest[end..];
        }
    }
    let end = text.find(|c: char| c != '_' && !c.is_alphanumeric()).unwrap_or(text.len());
    let (name, rest) = text.split_at(end);
    let mut path = before.to_vec();
    if !name.is_empty() && name != "self" {
        path.push(name.to_owned());
    }
    match rest.strip_prefix("::") {
        Some(rest) if !name.is_empty() => tree(rest, &path, paths),
        _ => {
            if !path.is_empty() {
                paths.push(path);
            }
            rest
        }
    }
}
