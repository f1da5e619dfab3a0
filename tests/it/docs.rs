//! The code, the recipes and the messages in `docs/` are real.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::support::{Sandbox, assert_committed, files_in, here};

fn page(name: &str) -> PathBuf {
    here().join("../docs").join(name)
}

fn read(file: &PathBuf) -> String {
    fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// The fenced blocks of a language.
fn blocks(text: &str, language: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some(found) = line.strip_prefix("```") else { continue };
        let body: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
        if found == language {
            blocks.push(body.join("\n") + "\n");
        }
    }
    blocks
}

#[test]
fn the_code_for_plugin_authors_is_that_of_the_plugin_that_is_tested() {
    let plugin = here().join("plugin");
    let mut sources = files_in(&plugin.join("src"));
    sources.extend(files_in(&plugin.join("tests")));
    let sources: Vec<String> = sources.iter().map(read).collect();
    let blocks = blocks(&read(&page("plugins.md")), "rust");
    assert!(blocks.len() >= 5, "{} blocks", blocks.len());
    for block in blocks {
        assert!(sources.iter().any(|source| source.contains(&block)), "not in tests/plugin:\n{block}");
    }
    let manifest = read(&plugin.join("Cargo.toml"));
    for name in ["serde", "inventory", "schemars"] {
        assert!(!manifest.contains(name), "a plugin needs no {name} of its own");
    }
}

#[test]
fn every_whole_recipe_in_the_guide_validates() {
    let sandbox = Sandbox::new();
    let recipes: Vec<String> =
        blocks(&read(&page("recipes.md")), "yaml").into_iter().filter(|block| block.starts_with("# recipe")).collect();
    assert!(recipes.len() >= 3, "{} recipes", recipes.len());
    for (i, recipe) in recipes.iter().enumerate() {
        // `# recipe NAME.yaml`: later ones may extend it.
        let first = recipe.lines().next().unwrap_or_default();
        let mut words = first.split_whitespace().map(|word| word.trim_end_matches(':'));
        let name = words
            .find(|word| Path::new(word).extension().is_some_and(|ending| ending == "yaml"))
            .expect("the recipe's first line names its file");
        fs::write(sandbox.work().join(name), recipe).expect("the recipe is written");
        let output = sandbox.run(["validate", "--no-environment", name]);
        assert!(output.status.success(), "recipe {i}:\n{recipe}\n{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn the_guide_to_mistakes_shows_what_is_printed() {
    let sandbox = Sandbox::new();
    let file = page("mistakes.md");
    let committed = read(&file);
    let (mut text, mut shown) = (String::new(), 0);
    let mut lines = committed.lines();
    while let Some(line) = lines.next() {
        text.push_str(&format!("{line}\n"));
        if line != "```console" {
            continue;
        }
        let body: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
        let typed = body.first().copied().unwrap_or_default();
        let words = typed.strip_prefix("$ maskalign ").unwrap_or_else(|| panic!("not a command: {typed}"));
        let output = sandbox.run(words.split(' ').map(|word| word.trim_matches('\'')));
        assert_eq!(output.status.code(), Some(2), "{typed}");
        text.push_str(&format!("{typed}\n"));
        for line in sandbox.redact(&String::from_utf8_lossy(&output.stderr)).lines() {
            text.push_str(&format!("{}\n", line.trim_end()));
        }
        text.push_str("```\n");
        shown += 1;
    }
    assert_eq!(shown, 10);
    assert_committed(&file, text);
}

/// What a page links to, but for headings and the web.
fn links(page: &str) -> Vec<&str> {
    let targets = page.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    targets.filter(|target| !target.starts_with('#') && !target.contains("://")).collect()
}

#[test]
fn the_book_has_every_page_and_every_link_its_file() {
    let folder = here().join("../docs");
    let is_page = |path: &PathBuf| path.extension().is_some_and(|ending| ending == "md");
    let pages: Vec<PathBuf> = files_in(&folder).into_iter().filter(is_page).collect();
    for page in &pages {
        for target in links(&read(page)) {
            let file = target.split('#').next().unwrap_or(target);
            assert!(folder.join(file).is_file(), "{}: there is no {target}", page.display());
        }
    }
    let summary = read(&page("SUMMARY.md"));
    let mut listed = links(&summary);
    listed.push("SUMMARY.md");
    listed.sort_unstable();
    let names: Vec<&str> = pages.iter().filter_map(|page| page.file_name()?.to_str()).collect();
    assert_eq!(listed, names, "docs/SUMMARY.md names every page once");
}

#[test]
fn the_version_that_is_cited_is_this_one() {
    let citation: serde_json::Value = serde_yaml::from_str(&read(&here().join("../CITATION.cff"))).expect("YAML");
    assert_eq!(citation["version"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn the_readme_asks_for_the_rust_that_cargo_asks_for() {
    let asked = format!("With Rust ({} or newer)", env!("CARGO_PKG_RUST_VERSION"));
    assert!(read(&here().join("../README.md")).contains(&asked), "not in README.md: {asked}");
}

/// The commands run, and what is shown of files is in them.
#[cfg(unix)]
#[test]
fn the_way_of_a_paper_is_as_it_is_told() {
    let text = read(&page("new_paper.md"));
    let root = here().join("..");
    let sandbox = Sandbox::new();
    for folder in ["recipes", "tests"] {
        std::os::unix::fs::symlink(root.join(folder), sandbox.work().join(folder)).expect("a link");
    }
    let files = ["recipes/fd_vitb.yaml", "recipes/small/fd.yaml", "tests/fixtures/cases/fd.py"];
    let files = files.map(|file| read(&root.join(file)));
    let shown = [blocks(&text, "yaml"), blocks(&text, "python")].concat();
    assert_eq!(shown.len(), 3);
    for block in shown {
        assert!(files.iter().any(|file| file.contains(&block)), "in no file:\n{block}");
    }
    let commands = blocks(&text, "sh").concat();
    let commands: Vec<&str> = commands.lines().filter_map(|line| line.strip_prefix("maskalign ")).collect();
    assert_eq!(commands.len(), 7, "{commands:?}");
    for command in commands {
        let output = sandbox.command(command.split(' ')).env("IMAGENET_DIR", "/images").output().expect("it starts");
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// The table of papers counts lines of recipes and of components' files, and names cases.
#[test]
fn the_table_of_papers_counts_what_is_there() {
    let lines = |path: PathBuf| read(&path).lines().count().to_string();
    let text = read(&page("papers.md"));
    let rows =
        text.lines().skip_while(|line| !line.starts_with("|---")).skip(1).take_while(|line| line.starts_with('|'));
    let mut recipes = Vec::new();
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        let [_, recipe, components, oracle, _] = cells[..] else { panic!("five columns: {row}") };
        let counted = |text: &str| {
            text.split_once("`, ").map(|(name, count)| (name.trim_matches('`').to_owned(), count.to_owned()))
        };
        let (name, count) = counted(recipe).unwrap_or_else(|| panic!("{recipe}"));
        assert_eq!(lines(here().join(format!("../recipes/{name}.yaml"))), count, "{name}");
        recipes.push(name);
        for (name, count) in components.split("; ").filter_map(counted) {
            let count = count.split_whitespace().next().unwrap_or_default();
            let file = here().join("../maskalign-core/src/components").join(&name);
            assert_eq!(lines(file), count, "{name}");
        }
        if let Some((case, _)) = oracle.split_once("case `").and_then(|(_, rest)| rest.split_once('`')) {
            assert!(here().join(format!("fixtures/cases/{case}.safetensors")).is_file(), "{case}");
        }
    }
    let small = files_in(&here().join("../recipes/small"));
    for recipe in small.iter().filter_map(|path| path.file_stem()?.to_str()) {
        assert!(recipes.iter().any(|name| name.starts_with(&format!("{recipe}_"))), "{recipe} is not in the table");
    }
}
