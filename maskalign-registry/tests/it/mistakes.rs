//! What each mistake prints. A case is `mistakes/NAME.yaml`; its report is `mistakes/NAME.snap`, which
//! `INSTA_UPDATE=always cargo test -p maskalign-registry` rewrites.
//!
//! Comments at the top of a case give it flags and an environment: `# --set PATH=VALUE`, `# env NAME=VALUE`.

use std::{collections::HashMap, fs};

use maskalign_registry::{Input, LoadRequest, Recipe, RecipeSource, Report};
use serde_json::Value;

use crate::components::registry;

struct Papers;

impl RecipeSource for Papers {
    fn builtin(&self, name: &str) -> Option<&str> {
        match name {
            "mae_vitb" => Some(include_str!("../recipes/mae_vitb.yaml")),
            "maskalign_vitb_clip" => Some(include_str!("../recipes/maskalign_vitb_clip.yaml")),
            _ => None,
        }
    }

    fn names(&self) -> Vec<&str> {
        vec!["mae_vitb", "maskalign_vitb_clip"]
    }
}

/// The flags and variables that comments of a recipe give: `# --set PATH=VALUE`, `# env NAME=VALUE`.
pub(crate) fn said_in_comments(text: &str) -> (Vec<String>, HashMap<&str, &str>) {
    let mut sets = Vec::new();
    let mut variables = HashMap::new();
    for line in text.lines() {
        if let Some(set) = line.strip_prefix("# --set ") {
            sets.push(set.to_owned());
        } else if let Some((name, value)) = line.strip_prefix("# env ").and_then(|l| l.split_once('=')) {
            variables.insert(name, value);
        }
    }
    (sets, variables)
}

fn report_of(name: &str, text: &str) -> Report {
    let (sets, variables) = said_in_comments(text);
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
    insta::glob!("../mistakes", "*.yaml", |path| {
        let text = fs::read_to_string(path).expect("text");
        let name = path.file_name().and_then(|name| name.to_str()).expect("a name");
        let report = report_of(name, &text);
        let mut settings = insta::Settings::clone_current();
        settings.set_snapshot_path("../mistakes");
        settings.set_prepend_module_to_snapshot(false);
        settings.set_omit_expression(true);
        settings.remove_snapshot_suffix();
        settings.remove_input_file();
        settings.bind(|| insta::assert_snapshot!(name.trim_end_matches(".yaml"), report.render()));
        for (diagnostic, json) in report.0.iter().zip(report.to_json().as_array().expect("a list")) {
            let place = diagnostic.place().expect("a place");
            assert_eq!(json["line"], Value::from(place.line_column().0));
            assert_eq!(json["file"], Value::from(place.source.name()));
            assert_eq!(json["code"], Value::from(diagnostic.code));
        }
    });
}
