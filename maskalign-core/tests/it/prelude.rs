//! Every item of the prelude has an example, which compiles since it is a test of the documentation.

use std::{fs, path::Path};

/// The crates that the prelude takes items from, each with its name in paths and its folder.
const CRATES: &[(&str, &str)] = &[
    ("crate", "maskalign-core"),
    ("maskalign_engine", "maskalign-engine"),
    ("maskalign_registry", "maskalign-registry"),
    ("maskalign_macros", "maskalign-macros"),
];

/// A source file: its crate's name in paths, its place below `src`, and its text.
struct Source {
    of: &'static str,
    place: String,
    text: String,
}

#[test]
fn every_item_of_the_prelude_has_an_example() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let mut sources = Vec::new();
    for &(of, folder) in CRATES {
        collect(of, &workspace.join(folder).join("src"), "", &mut sources);
    }
    let root = &sources.iter().find(|source| source.place == "lib.rs").expect("this crate's").text;
    let items = items(root);
    assert!(items.len() > 100, "{} items were found", items.len());
    let faults: Vec<String> = items.iter().filter_map(|item| fault(&sources, item)).collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn an_item_without_an_example_is_named() {
    let root = "pub mod prelude {\n    pub use crate::{\n        a::{self, Bare, Shown as Other},\n        b::Moved,\n    };\n}\n";
    let items = items(root);
    assert_eq!(items, ["crate::a", "crate::a::Bare", "crate::a::Shown", "crate::b::Moved"]);
    let source = |place: &str, text: &str| Source { of: "crate", place: place.into(), text: text.into() };
    let a = "//! A module.\n//! ```text\n//! a\n//! ```\n\n/// No example.\n#[derive(Debug)]\npub struct Bare;\n\n/// ```\n/// Shown;\n/// ```\npub struct Shown;\n";
    let sources = [source("a/mod.rs", a), source("b.rs", "pub use c::Moved;\n"), source("c.rs", "pub fn Moved() {}\n")];
    let faults: Vec<String> = items.iter().filter_map(|item| fault(&sources, item)).collect();
    assert_eq!(
        faults,
        [
            "`crate::a` has no example in a/mod.rs",
            "`crate::a::Bare` has no example in a/mod.rs",
            "`crate::b::Moved` has no example in c.rs"
        ]
    );
}

fn collect(of: &'static str, folder: &Path, place: &str, sources: &mut Vec<Source>) {
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|name| name.to_str()).expect("names are ASCII");
        if path.is_dir() {
            collect(of, &path, &format!("{place}{name}/"), sources);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            let text = fs::read_to_string(&path).expect("a source file is text");
            sources.push(Source { of, place: format!("{place}{name}"), text });
        }
    }
}

/// The paths that the prelude of `lib.rs` re-exports.
fn items(root: &str) -> Vec<String> {
    let prelude = root.split("pub mod prelude {").nth(1).and_then(|rest| rest.split("\n}\n").next());
    let mut items = Vec::new();
    for tree in prelude.expect("there is a prelude").split("pub use ").skip(1) {
        let tree: String = tree.split(';').next().unwrap_or_default().split('\n').map(str::trim).collect();
        expand("", &tree, &mut items);
    }
    items
}

/// The paths of a tree such as `a::{self, b, c::{d as e}}`, without new names.
fn expand(before: &str, tree: &str, paths: &mut Vec<String>) {
    if let Some((head, group)) = tree.split_once('{') {
        let group = group.strip_suffix('}').expect("a group ends");
        let (mut depth, mut start) = (0, 0);
        for (at, c) in group.char_indices().chain([(group.len(), ',')]) {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    expand(&format!("{before}{head}"), group[start..at].trim(), paths);
                    start = at + 1;
                }
                _ => {}
            }
        }
    } else if tree == "self" {
        paths.push(before.trim_end_matches("::").to_owned());
    } else if !tree.is_empty() {
        let path = tree.split(" as ").next().unwrap_or_default();
        paths.push(format!("{before}{path}"));
    }
}

/// What is wrong with an item: its definition cannot be found, or has no example.
fn fault(sources: &[Source], item: &str) -> Option<String> {
    let segments: Vec<&str> = item.split("::").collect();
    let [of, modules @ .., name] = &segments[..] else { return Some(format!("`{item}` is no path")) };
    let module = modules.join("/");
    let in_module = |source: &&Source| {
        let rest = source.place.strip_prefix(module.as_str());
        source.of == *of && rest.is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
    };
    let mut found = definitions(sources.iter().filter(in_module), name);
    if found.is_empty() {
        found = definitions(sources.iter().filter(|source| source.of == *of), name);
    }
    if found.is_empty() {
        found = definitions(sources.iter(), name);
    }
    // A re-export may have what the definition's own crate cannot: an example of its use in this one.
    found.extend(sources.iter().flat_map(|source| {
        let line = |line: &&str| line.starts_with("pub use ") && line.ends_with(&format!("::{name};"));
        documentation(&source.text, line).into_iter().map(|docs| (source.place.clone(), docs))
    }));
    match &found[..] {
        [] => Some(format!("`{item}` is defined nowhere")),
        _ if found.iter().any(|(_, docs)| has_example(docs)) => None,
        [(place, _), ..] => Some(format!("`{item}` has no example in {place}")),
    }
}

/// Where an item is defined, each with its documentation.
fn definitions<'s>(sources: impl Iterator<Item = &'s Source>, name: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for source in sources {
        if source.place == format!("{name}.rs") || source.place == format!("{name}/mod.rs") {
            let docs = source.text.lines().map_while(|line| line.strip_prefix("//!"));
            found.push((source.place.clone(), docs.collect::<Vec<_>>().join("\n")));
        }
        let line = |line: &&str| {
            let kinds = ["pub struct ", "pub enum ", "pub trait ", "pub fn ", "pub type ", "macro_rules! "];
            let rest = kinds.iter().find_map(|kind| line.strip_prefix(kind)?.strip_prefix(name));
            rest.is_some_and(|rest| !rest.starts_with(|c: char| c == '_' || c.is_alphanumeric()))
        };
        found.extend(documentation(&source.text, line).into_iter().map(|docs| (source.place.clone(), docs)));
    }
    found
}

/// The doc comments above the lines that are asked for.
fn documentation(text: &str, is_wanted: impl Fn(&&str) -> bool) -> Vec<String> {
    let lines: Vec<&str> = text.lines().collect();
    let above = |at: usize| {
        let above = lines[..at].iter().rev().take_while(|line| !line.is_empty());
        let mut docs: Vec<&str> = above.filter_map(|line| line.strip_prefix("///")).collect();
        docs.reverse();
        docs.join("\n")
    };
    (0..lines.len()).filter(|&at| is_wanted(&lines[at])).map(above).collect()
}

/// Whether rustdoc compiles something of it.
fn has_example(docs: &str) -> bool {
    let fences = docs.lines().filter_map(|line| line.trim().strip_prefix("```"));
    fences.step_by(2).any(|language| matches!(language, "" | "no_run" | "should_panic"))
}
