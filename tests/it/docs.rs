//! The code, the recipes and the messages in `docs/` are real.

use std::{fs, path::PathBuf};

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
        let name = words.find(|word| word.ends_with(".yaml")).expect("the recipe's first line names its file");
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
