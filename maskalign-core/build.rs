//! Writes the list of shipped recipes from the folder that holds them, so that a new recipe is a new file and no more.

use std::{env, error::Error, fs, path::Path};

fn main() -> Result<(), Box<dyn Error>> {
    let package = env::var("CARGO_MANIFEST_DIR")?;
    // `recipes` here is a link to the checkout's folder, and in a published package a copy of it. Where a checkout has
    // no links (Windows), a file stands in its place.
    let folder = ["recipes", "../recipes"].map(|path| Path::new(&package).join(path)).into_iter().find(|f| f.is_dir());
    let folder = folder.ok_or("there is no folder `recipes`, in the package or beside it")?.canonicalize()?;
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed={}", folder.display());
    let mut recipes = Vec::new();
    for entry in fs::read_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|ending| ending == "yaml") {
            let text = |part: Option<&str>| part.map(str::to_owned).ok_or(format!("{} is not UTF-8", path.display()));
            recipes.push((text(path.file_stem().and_then(|stem| stem.to_str()))?, text(path.to_str())?));
        }
    }
    recipes.sort();
    let rows: Vec<String> =
        recipes.iter().map(|(name, path)| format!("    ({name:?}, include_str!({path:?})),\n")).collect();
    fs::write(Path::new(&env::var("OUT_DIR")?).join("recipes.rs"), format!("&[\n{}]\n", rows.concat()))?;
    Ok(())
}
