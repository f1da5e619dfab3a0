//! What each mistake prints. A case is `mistakes/NAME.yaml`; its report is `mistakes/NAME.txt`.
//!
//! Comments at the top of a case give it flags and an environment: `# --set PATH=VALUE`,
//! `# env NAME=VALUE`. `MASKALIGN_UPDATE=1` rewrites the reports.

mod components;

use std::{
    collections::HashMap,
    env,
    fs::{self, DirEntry},
    path::Path,
};

use components::registry;
use maskalign_registry::{Input, LoadRequest, Recipe, RecipeSource, Report};
use serde_json::Value;

struct Papers;

impl RecipeSource for Papers {
    fn builtin(&self, name: &str) -> Option<&str> {
        (name == "mae_vitb").then_some(include_str!("recipes/mae_vitb.yaml"))
    }

    fn names(&self) -> Vec<&str> {
        vec!["mae_vitb"]
    }
}

fn report_of(name: &str, text: &str) -> Report {
    let mut sets = Vec::new();
    let mut variables = HashMap::new();
    for line in text.lines() {
        if let Some(set) = line.strip_prefix("# --set ") {
            sets.push(set.to_owned());
        } else if let Some((name, value)) = line.strip_prefix("# env ").and_then(|l| l.split_once('=')) {
            variables.insert(name, value);
        }
    }
    let request = LoadRequest {
        input: Input::Text { name: name.to_owned(), text: text.to_owned() },
        sets: &sets,
        env: &|name| variables.get(name).map(|value| (*value).to_owned()),
        builtins: &Papers,
    };
    match Recipe::load(&request, registry()) {
        Ok(_) => panic!("{name} holds no mistake"),
        Err(report) => report,
    }
}

#[test]
fn every_mistake_prints_its_report() {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/mistakes"));
    let update = env::var_os("MASKALIGN_UPDATE").is_some();
    let mut stale = Vec::new();
    let mut seen = 0;
    let mut cases: Vec<_> = fs::read_dir(folder).expect("the folder").flatten().collect();
    cases.sort_by_key(DirEntry::path);
    for case in cases {
        let path = case.path();
        if path.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        seen += 1;
        let text = fs::read_to_string(&path).expect("text");
        let name = path.file_name().and_then(|name| name.to_str()).expect("a name");
        let report = report_of(name, &text);
        let shown = report.render();
        let expected = path.with_extension("txt");
        if update {
            fs::write(&expected, &shown).expect("written");
        } else if fs::read_to_string(&expected).ok().as_deref() != Some(shown.as_str()) {
            stale.push(format!("--- {name}\n{shown}"));
        }
        for (diagnostic, json) in report.0.iter().zip(report.to_json().as_array().expect("a list")) {
            let place = diagnostic.place().expect("a place");
            assert_eq!(json["line"], Value::from(place.line_column().0));
            assert_eq!(json["file"], Value::from(place.source.name()));
            assert_eq!(json["code"], Value::from(diagnostic.code));
        }
    }
    assert!(seen >= 20, "{seen} cases");
    assert!(stale.is_empty(), "reports changed; MASKALIGN_UPDATE=1 rewrites them\n{}", stale.join("\n"));
}
