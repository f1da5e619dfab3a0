//! The recipes that are shipped.

use std::{fs, path::PathBuf};

use crate::support::{Sandbox, files_in, here};
use maskalign_core::embedded;
use serde_json::Value;

/// The recipes of a folder: their names, files and texts.
fn recipes_in(folder: PathBuf) -> Vec<(String, PathBuf, String)> {
    let recipe = |path: PathBuf| {
        let is_recipe = path.extension().is_some_and(|ending| ending == "yaml");
        let name = path.file_stem()?.to_str()?.to_owned();
        is_recipe.then(|| {
            let text = fs::read_to_string(&path).expect("text");
            (name, path, text)
        })
    };
    files_in(&folder).into_iter().filter_map(recipe).collect()
}

/// Every shipped recipe.
fn shipped() -> Vec<(String, PathBuf, String)> {
    let recipes = recipes_in(here().join("../recipes"));
    assert!(recipes.len() >= 10, "{} recipes", recipes.len());
    recipes
}

/// The recipes behind the tables of pages, and papers' in small, which the binary does not hold, with their folder's name.
fn behind_tables() -> Vec<(&'static str, String, PathBuf, String)> {
    let folders = ["agreement", "results", "small"];
    let recipes = folders.into_iter().flat_map(|folder| {
        let recipes = recipes_in(here().join("../recipes").join(folder));
        recipes.into_iter().map(move |(name, path, text)| (folder, name, path, text))
    });
    let recipes: Vec<_> = recipes.collect();
    assert!(recipes.len() >= 11, "{} recipes", recipes.len());
    recipes
}

/// An editor finds the schema by the first line; a reader finds what to type at the end of the comment.
fn check_header(text: &str, schema: &str, file: &str) {
    let comment: Vec<&str> = text.lines().take_while(|line| line.starts_with('#')).collect();
    assert_eq!(comment[0], format!("# yaml-language-server: $schema={schema}"), "{file}");
    assert!(comment.len() >= 3, "{file} says what it is, then its command");
    let command = comment.last().expect("a line").trim_start_matches('#').trim();
    let runs = ["run", "bench"].iter().any(|verb| {
        let begins = format!("maskalign {verb} recipes/{file}");
        command == begins || command.starts_with(&format!("{begins} "))
    });
    assert!(runs, "{file}: {command}");
}

#[test]
fn every_recipe_begins_with_the_modeline_what_it_is_and_its_command() {
    for (name, _, text) in shipped() {
        check_header(&text, "./recipe.schema.json", &format!("{name}.yaml"));
        let named = text.lines().any(|line| line == format!("name: {name}"));
        assert!(named, "{name}'s name is its file's");
    }
    for (folder, name, _, text) in behind_tables() {
        check_header(&text, "../recipe.schema.json", &format!("{folder}/{name}.yaml"));
        let named = text.lines().any(|line| line == format!("name: {folder}_{name}"));
        assert!(named, "{name}'s name is its folder's and its file's");
    }
}

#[test]
fn the_binary_holds_every_recipe_and_nothing_else() {
    let embedded: Vec<(&str, &str)> = embedded::RECIPES.to_vec();
    let shipped = shipped();
    let files: Vec<(&str, &str)> = shipped.iter().map(|(name, _, text)| (name.as_str(), text.as_str())).collect();
    let names = |list: &[(&str, &str)]| list.iter().map(|(name, _)| name.to_string()).collect::<Vec<_>>();
    assert_eq!(names(&embedded), names(&files));
    assert!(embedded == files, "the same text");
}

#[test]
fn every_recipe_satisfies_the_committed_schema() {
    let schema = fs::read(here().join("../recipes/recipe.schema.json")).expect("the schema");
    let schema: Value = serde_json::from_slice(&schema).expect("JSON");
    jsonschema::meta::validate(&schema).expect("a schema");
    let validator = jsonschema::draft7::new(&schema).expect("draft-07");
    let tabled = behind_tables().into_iter().map(|(_, name, path, text)| (name, path, text));
    for (name, _, text) in shipped().into_iter().chain(tabled) {
        let recipe: Value = serde_yaml::from_str(&text).expect("YAML");
        let wrong: Vec<String> =
            validator.iter_errors(&recipe).map(|error| format!("{}: {error}", error.instance_path())).collect();
        assert!(wrong.is_empty(), "{name}: {}", wrong.join("\n"));
    }
}

/// By its file and by its name, on a machine without data and weights.
#[test]
fn every_recipe_validates_without_an_environment() {
    let sandbox = Sandbox::new();
    let shipped = shipped();
    let tabled = behind_tables();
    let files = shipped.iter().map(|(_, path, _)| path).chain(tabled.iter().map(|(_, _, path, _)| path));
    let files = files.map(|path| path.to_str().expect("UTF-8"));
    let names = shipped.iter().map(|(name, _, _)| name.as_str());
    let arguments = ["validate", "--no-environment"].into_iter();
    let output = sandbox
        .command(arguments.chain(files).chain(names))
        .env("IMAGENET_DIR", "/images")
        .output()
        .expect("the command starts");
    let out = String::from_utf8_lossy(&output.stdout);
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{err}");
    assert_eq!(out.matches("no mistakes").count(), 2 * shipped.len() + tabled.len(), "{out}");
}
