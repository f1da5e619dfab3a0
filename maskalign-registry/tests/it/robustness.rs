//! Input past a limit, or that is no recipe at all, is refused at once and by name.
#![expect(clippy::format_collect, reason = "a few lines of a test's text")]

use maskalign_registry::{Input, LoadRequest, Recipe, RecipeSource, Report, diagnostic::codes};

use crate::components::registry;

struct Builtins;

impl RecipeSource for Builtins {
    fn builtin(&self, name: &str) -> Option<&str> {
        match name {
            "mae" => Some(include_str!("../recipes/mae_vitb.yaml")),
            "loop" => Some("extends: loop\nname: loop"),
            _ => None,
        }
    }

    fn names(&self) -> Vec<&str> {
        vec!["loop", "mae"]
    }
}

fn load(text: String) -> Result<(), Report> {
    let request = LoadRequest {
        input: Input::Text { name: "huge.yaml".to_owned(), text },
        sets: &[],
        env: &|_| None,
        builtins: &Builtins,
    };
    Recipe::load(&request, registry()).map(drop)
}

fn refusal_of(text: String) -> Report {
    load(text).expect_err("past a limit")
}

#[test]
fn input_past_a_limit_is_refused_at_once() {
    let bomb: String = (0..40)
        .map(|level| format!("a{level}: &a{level} [{}]\n", vec![format!("*a{}", level - 1); 9].join(", ")))
        .skip(1)
        .collect();
    let huge = format!("name: {}", "x".repeat(2 << 20));
    let deep = format!("name: {}{}", "[".repeat(5000), "]".repeat(5000));
    let deep_block: String = (0..500).map(|level| format!("{}a:\n", " ".repeat(level))).collect();
    let wide = format!("name: [{}]", "1,".repeat(200_000));
    for text in [format!("a0: &a0 x\n{bomb}"), huge, deep, deep_block, wide] {
        let report = refusal_of(text);
        assert!(report.0.iter().any(|d| [codes::TOO_LARGE, codes::SYNTAX].contains(&d.code)), "{report}");
    }
}

#[test]
fn a_thousand_mistakes_are_cut_short() {
    let keys: String = (0..50_000).map(|key| format!("key_{}: 1\n", key % 25_000)).collect();
    let report = refusal_of(keys);
    assert_eq!(report.0.len(), 100);
    assert!(report.0[99].help.iter().any(|help| help.contains("more mistakes")), "{report}");
}

#[test]
fn bytes_that_are_no_text_are_refused_with_their_offset() {
    let path = std::env::temp_dir().join(format!("maskalign-bytes-{}.yaml", std::process::id()));
    std::fs::write(&path, b"name: x\nseed: \xff\xfe\n").expect("written");
    let request = LoadRequest { input: Input::Path(path.clone()), sets: &[], env: &|_| None, builtins: &Builtins };
    let report = Recipe::load(&request, registry()).expect_err("not text");
    std::fs::remove_file(&path).expect("removed");
    assert!(report.0[0].message.contains("offset 14"), "{report}");
    assert_eq!(report.0[0].place().map(maskalign_registry::Place::line_column), Some((2, 7)));
}

#[test]
fn a_folder_or_a_missing_file_is_refused_by_name() {
    for (path, fragment) in [(std::env::temp_dir(), "is a folder"), ("nowhere/mea.yaml".into(), "there is no recipe")] {
        let request = LoadRequest { input: Input::Path(path), sets: &[], env: &|_| None, builtins: &Builtins };
        let report = Recipe::load(&request, registry()).expect_err("no recipe");
        assert!(report.0[0].message.contains(fragment), "{report}");
    }
}
