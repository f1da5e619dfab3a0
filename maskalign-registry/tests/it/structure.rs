//! The crate's modules are layers.

use std::{fs, path::Path};

use crate::layers::faults;

/// The lowest first: the order in which `lib.rs` lists them.
const LAYERS: [&str; 10] =
    ["wording", "diagnostic", "yaml", "compose", "plugin", "options", "schema", "catalog", "check", "recipe"];

#[test]
fn no_module_uses_one_above_it() {
    let src = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src"));
    let found = faults(src, &LAYERS);
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn what_breaks_the_order_is_found_however_it_is_written() {
    let src = std::env::temp_dir().join(format!("maskalign-layers-{}", std::process::id()));
    fs::create_dir_all(src.join("high")).expect("a folder");
    let write = |name: &str, text: &str| fs::write(src.join(name), text).expect("written");
    write("lib.rs", "mod low;\nmod high;\nuse crate::high::Top;\n");
    write("stray.rs", "");
    write(
        "low.rs",
        "// crate::high\nuse std::fmt;\nfn f() { crate::high::f(); $crate::high::g(); other_crate::high::h(); }\n\
         #[cfg(test)]\nmod tests {\n    use crate::top::T;\n}\n",
    );
    write("middle.rs", "use super::high::{A, B};\nuse crate::{Thing, low::{C, high}, a_macro};\n");
    write("high/mod.rs", "use super::top;\nuse crate::{\n    low::{D, E},\n    top::F,\n};\n");
    write("high/part.rs", "use super::top;\nuse super::super::top::G;\n");
    write("top.rs", "use crate::{high, low, middle};\n");
    let found = faults(&src, &["low", "middle", "high", "top", "gone"]);
    fs::remove_dir_all(&src).expect("removed");
    assert_eq!(
        found,
        [
            "`gone` is a layer, and no module",
            "high/mod.rs uses `top`, which is above it",
            "high/part.rs uses `top`, which is above it",
            "low.rs uses `high`, which is above it",
            "middle.rs uses `Thing` without naming its module",
            "middle.rs uses `high`, which is above it",
            "`stray` is a module, and no layer",
        ]
    );
}

#[test]
fn the_modules_of_a_folder_have_an_order_too() {
    let root = std::env::temp_dir().join(format!("maskalign-folder-{}", std::process::id()));
    let folder = root.join("src/stages");
    fs::create_dir_all(folder.join("top")).expect("a folder");
    let write = |name: &str, text: &str| fs::write(folder.join(name), text).expect("written");
    let own =
        "mod low;\nmod middle;\nmod top;\n\npub use low::Low;\npub use top::{Loop, Top as Other};\nuse middle::M;\n\n";
    write("mod.rs", &format!("{own}pub struct Own;\nfn f(x: top::Part) {{ self::low::f() }}\n"));
    write("low.rs", "use super::{Own, middle::f};\nuse crate::{nn::top, stages::{Loop, low::g}};\n");
    write("middle.rs", "use super::{Low, low};\nuse crate::top;\n");
    write("top/mod.rs", "mod part;\nuse super::{Low, middle};\nuse part::f;\n");
    write("top/part.rs", "use super::super::middle;\nuse super::g;\n");
    let found = faults(&folder, &["low", "middle", "top"]);
    fs::remove_dir_all(&root).expect("removed");
    assert_eq!(
        found,
        [
            "mod.rs uses `middle`, which is above it",
            "mod.rs uses `low`, which is above it",
            "mod.rs uses `top`, which is above it",
            "low.rs uses `top`, which is above it",
            "low.rs uses `middle`, which is above it",
        ]
    );
}
