//! Recipes that are wrong in every way that edits find: read from a file with flags, composed and checked.

mod run;

use std::{fs, path::Path};

use maskalign_registry::{Input, LoadRequest, Loaded, NoRecipes, Recipe, RecipeSource, Report, ShowOrigin};
use serde_json::Value;

use crate::{components::registry, mistakes::said_in_comments};
use run::{Outcome, Random, Target, any_decimal, files_in};

/// What a word may become.
const WORDS: [&str; 30] = [
    "null",
    "~",
    "yes",
    ".nan",
    "-.inf",
    "''",
    "\"",
    "[",
    "]",
    "{",
    "}",
    ": ",
    "- ",
    "? ",
    "&a ",
    "*a",
    "<<: *a",
    "!!str ",
    "!x ",
    "|",
    ">-\n",
    "#",
    "\t",
    "\r\n",
    "\u{0}",
    "\u{feff}",
    "${X:-1}",
    "${IMAGENET_DIR}",
    "---\n",
    "extends: mae_vitb\n",
];

struct Papers;

impl RecipeSource for Papers {
    fn builtin(&self, name: &str) -> Option<&str> {
        match name {
            "mae_vitb" => Some(include_str!("../../recipes/mae_vitb.yaml")),
            "maskalign_vitb_clip" => Some(include_str!("../../recipes/maskalign_vitb_clip.yaml")),
            "circle" => Some("extends: circle"),
            _ => None,
        }
    }

    fn names(&self) -> Vec<&str> {
        vec!["circle", "mae_vitb", "maskalign_vitb_clip"]
    }
}

/// Comments at the top give flags and an environment, as in `tests/mistakes`.
fn load(path: &Path, bytes: &[u8], environment: bool) -> Result<Loaded, Report> {
    fs::write(path, bytes).expect("it is written");
    let text = String::from_utf8_lossy(bytes);
    let (sets, mut variables) = said_in_comments(&text);
    variables.entry("IMAGENET_DIR").or_insert("/data/imagenet");
    let request = LoadRequest {
        input: Input::Path(path.to_owned()),
        sets: &sets,
        env: &|name| environment.then(|| variables.get(name).map(|value| (*value).to_owned())).flatten(),
        builtins: &Papers,
    };
    match environment {
        true => Recipe::load(&request, registry()),
        false => Recipe::load_without_environment(&request, registry()),
    }
}

/// What is accepted means the same after it is written out.
fn check_accepted(loaded: &Loaded) {
    for show in [ShowOrigin::No, ShowOrigin::Yes] {
        let yaml = loaded.resolved_yaml(show);
        let request = LoadRequest {
            input: Input::Text { name: "again.yaml".to_owned(), text: yaml.clone() },
            sets: &[],
            env: &|_| None,
            builtins: &NoRecipes,
        };
        let again = Recipe::load(&request, registry()).unwrap_or_else(|report| panic!("{report}\n{yaml}"));
        assert_eq!(again.resolved(), loaded.resolved(), "{yaml}");
        assert_eq!(again.fingerprint(), loaded.fingerprint(), "{yaml}");
        // Another implementation reads the same values, but for dollars, which recipes double.
        let other: Value = serde_yaml::from_str(&yaml).unwrap_or_else(|error| panic!("{error}\n{yaml}"));
        assert_eq!(&without_dollars(&other), &without_dollars(loaded.resolved()), "{yaml}");
    }
}

/// A value whose texts have no dollars.
fn without_dollars(value: &Value) -> Value {
    match value {
        Value::String(text) => text.replace('$', "").into(),
        Value::Array(items) => items.iter().map(without_dollars).collect(),
        Value::Object(entries) => {
            entries.iter().map(|(name, value)| (name.replace('$', ""), without_dollars(value))).collect()
        }
        other => other.clone(),
    }
}

fn check_refused(report: &Report) -> Outcome {
    assert!(!report.0.is_empty(), "refused for no reason");
    for diagnostic in &report.0 {
        let place = diagnostic.place().expect("a place");
        let text = place.source.text();
        assert!(place.span.start <= place.span.end && place.span.end <= text.len());
        assert!(text.is_char_boundary(place.span.start) && text.is_char_boundary(place.span.end));
        assert!(!diagnostic.message.is_empty());
    }
    assert_eq!(report.to_json().as_array().map(Vec::len), Some(report.0.len()));
    Outcome::Refused(report.render())
}

/// Edits words and lines, so that what comes out is mostly YAML.
fn edit(bytes: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(bytes).ok()?;
    let is_word = |c: char| c.is_alphanumeric() || matches!(c, '_' | '.' | '-' | '/');
    let words: Vec<(usize, &str)> = text.split(|c| !is_word(c)).map(|word| (at(text, word), word)).collect();
    let words: Vec<(usize, &str)> = words.into_iter().filter(|(_, word)| !word.is_empty()).collect();
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    if words.is_empty() {
        return None;
    }
    let &(start, word) = random.pick(&words);
    let replaced = |new: &str| format!("{}{new}{}", &text[..start], &text[start + word.len()..]);
    let line = random.below(lines.len());
    let mut edited = lines.clone();
    Some(
        match random.below(8) {
            0 => replaced(random.pick(&words).1),
            1 => replaced(any_decimal(random)),
            2 => replaced(random.pick::<&str>(&WORDS)),
            3 => format!("{}{}{}", &text[..start], *random.pick(&WORDS), &text[start..]),
            4 => {
                edited.remove(line);
                edited.concat()
            }
            5 => {
                let to = random.below(lines.len());
                edited.insert(to, lines[line]);
                edited.concat()
            }
            6 => {
                let indented = format!("{}{}", " ".repeat(random.below(5)), lines[line].trim_start_matches(' '));
                edited[line] = &indented;
                edited.concat()
            }
            _ => {
                let path: Vec<&str> = (0..=random.below(4)).map(|_| random.pick(&words).1).collect();
                format!("# --set {}={}\n{text}", path.join("."), random.pick(&words).1)
            }
        }
        .into_bytes(),
    )
}

/// Where a part of a text begins in it.
fn at(text: &str, part: &str) -> usize {
    part.as_ptr() as usize - text.as_ptr() as usize
}

#[test]
fn recipes() {
    let tests = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests"));
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("fuzzed.yaml");
    let seeds = [files_in(&tests.join("recipes")), files_in(&tests.join("mistakes"))].concat();
    Target {
        name: "recipes",
        committed: &tests.join("fuzz"),
        seeds: seeds.into_iter().filter(|(name, _)| name.contains(".yaml")).collect(),
        edit: &edit,
        mend: &|bytes| bytes,
        read: &|bytes| {
            if let Err(report) = load(&path, bytes, false) {
                check_refused(&report);
            }
            match load(&path, bytes, true) {
                Ok(loaded) => {
                    check_accepted(&loaded);
                    Outcome::Accepted(0)
                }
                Err(report) => check_refused(&report),
            }
        },
        memory: &|bytes, _| (8 << 20) + 4096 * bytes.len() as u64,
        cases: 1_000,
        most_bytes: 64 << 10,
    }
    .run();
}
