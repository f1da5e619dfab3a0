//! Mutated recipes and flags: whatever is written, the answer is a recipe or a report with places.

mod components;

use components::registry;
use maskalign_registry::{Input, LoadRequest, Recipe, RecipeSource, Report, ShowOrigin, diagnostic::codes};

const CASES: usize = 20_400;

const SEEDS: [&str; 6] = [
    include_str!("recipes/crossmae_vitb.yaml"),
    include_str!("recipes/data2vec_vitb.yaml"),
    include_str!("recipes/ijepa_vith.yaml"),
    include_str!("recipes/maskalign_vitb_clip.yaml"),
    include_str!("recipes/simmim_vitb.yaml"),
    "name: short\nextends: [mae, mae]\nstages:\n  pretrain: &p\n    epochs: ${EPOCHS:-3}\n    masker: { ratio: 0.5 }\n  again:\n    <<: *p\n    epochs: 2\n",
];

const FLAGS: [&str; 10] = [
    "stages.pretrain.masker.ratio=0.75",
    "stages.pretrain.masker={type: random, ratio: .75}",
    "~stages.pretrain.masker",
    "stages.pretrain.data.transforms.0.size=196",
    "stages.pretrain.teachers.\"a.b\"={type: ema, momentum: 1}",
    "name=x",
    "seed=${SEED:-3}",
    "stages.pretrain.masker.type=block",
    "stages={}",
    "stages.pretrain.objectives.features.weight={from: 0, to: 1}",
];

const PIECES: [&str; 56] = [
    "0",
    "-1",
    "1e400",
    "-.inf",
    ".nan",
    "18446744073709551616",
    "0x1F",
    "1_000",
    "yes",
    "null",
    "~",
    "''",
    "\"",
    "'",
    "[",
    "]",
    "{",
    "}",
    ",",
    ":",
    ": ",
    "- ",
    "? ",
    "&a ",
    "*a",
    "*p",
    "<<: *p",
    "<<: ",
    "!!str ",
    "!x ",
    "|",
    ">-\n",
    "#",
    "\t",
    "\r\n",
    "\u{0}",
    "\u{feff}",
    "\u{2028}",
    "名",
    "e\u{301}",
    "😀",
    "${",
    "}",
    "${EPOCHS}",
    "${X:-",
    "$$",
    "---\n",
    "...\n",
    "%YAML 1.2\n",
    "type: ",
    "type: random",
    "extends: mae\n",
    "extends: loop\n",
    "ratio: 0.7",
    "\n",
    "        ",
];

struct Builtins;

impl RecipeSource for Builtins {
    fn builtin(&self, name: &str) -> Option<&str> {
        match name {
            "mae" => Some(include_str!("recipes/mae_vitb.yaml")),
            "loop" => Some("extends: loop\nname: loop"),
            _ => None,
        }
    }

    fn names(&self) -> Vec<&str> {
        vec!["loop", "mae"]
    }
}

/// SplitMix64: the cases are the same on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    fn pick<'a>(&mut self, items: &[&'a str]) -> &'a str {
        items[self.below(items.len())]
    }
}

fn boundary(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0)
}

/// The byte ranges of words and numbers, which are what edits in place replace.
fn tokens(text: &str) -> Vec<(usize, usize)> {
    let mut tokens = Vec::new();
    let mut start = None;
    for (at, c) in text.char_indices().chain([(text.len(), ' ')]) {
        let inside = c.is_alphanumeric() || matches!(c, '_' | '.' | '-' | '/');
        match (inside, start) {
            (true, None) => start = Some(at),
            (false, Some(from)) => {
                tokens.push((from, at));
                start = None;
            }
            _ => {}
        }
    }
    tokens
}

fn mutate(text: &str, random: &mut Random) -> String {
    let mut text = text.to_owned();
    for _ in 0..=random.below(3) {
        let tokens = tokens(&text);
        let lines: Vec<&str> = text.split_inclusive('\n').collect();
        text = match random.below(9) {
            // In place: these mostly stay YAML.
            0..=2 if !tokens.is_empty() => {
                let (from, to) = tokens[random.below(tokens.len())];
                let (other_from, other_to) = tokens[random.below(tokens.len())];
                let other = text[other_from..other_to].to_owned();
                format!("{}{other}{}", &text[..from], &text[to..])
            }
            3 if !tokens.is_empty() => {
                let (from, to) = tokens[random.below(tokens.len())];
                let piece = random.pick(&PIECES[..12]);
                format!("{}{piece}{}", &text[..from], &text[to..])
            }
            4 if !tokens.is_empty() => {
                let (from, to) = tokens[random.below(tokens.len())];
                let at = boundary(&text, from + random.below(to - from));
                format!("{}x{}", &text[..at], &text[at..])
            }
            5 if lines.len() > 1 => {
                let gone = random.below(lines.len());
                lines.iter().enumerate().filter(|(at, _)| *at != gone).map(|(_, line)| *line).collect()
            }
            6 if lines.len() > 1 => {
                let (from, to) = (random.below(lines.len()), random.below(lines.len()));
                let mut lines = lines.clone();
                lines.insert(to, lines[from]);
                lines.concat()
            }
            7 => {
                let at = boundary(&text, random.below(text.len() + 1));
                format!("{}{}{}", &text[..at], random.pick(&PIECES), &text[at..])
            }
            _ => {
                let from = boundary(&text, random.below(text.len() + 1));
                let to = boundary(&text, from + random.below(24));
                format!("{}{}", &text[..from], &text[to.max(from)..])
            }
        };
    }
    text
}

fn load(text: String, sets: &[String]) -> Result<(), Report> {
    let request = LoadRequest {
        input: Input::Text { name: "mutant.yaml".to_owned(), text },
        sets,
        env: &|name| (name == "IMAGENET_DIR").then(|| "/images".to_owned()),
        builtins: &Builtins,
    };
    let loaded = Recipe::load(&request, registry())?;
    // What loads must survive the way back.
    let again = LoadRequest {
        input: Input::Text { name: "again.yaml".to_owned(), text: loaded.resolved_yaml(ShowOrigin::Yes) },
        sets: &[],
        env: &|_| None,
        builtins: &Builtins,
    };
    let again = Recipe::load(&again, registry())
        .unwrap_or_else(|report| panic!("{report}\n{}", loaded.resolved_yaml(ShowOrigin::Yes)));
    assert_eq!(again.resolved(), loaded.resolved());
    Ok(())
}

fn reached_decoding(report: &Report) -> bool {
    report.0.iter().any(|diagnostic| {
        [
            codes::UNKNOWN_KEY,
            codes::UNKNOWN_TYPE,
            codes::UNKNOWN_VALUE,
            codes::WRONG_TYPE,
            codes::MISSING_KEY,
            codes::OUT_OF_RANGE,
            codes::REFUSED,
        ]
        .contains(&diagnostic.code)
    })
}

#[test]
fn mutated_recipes_and_flags_never_panic_and_every_refusal_has_a_place() {
    let mut random = Random(20_230_618);
    let (mut accepted, mut decoded, mut refused) = (0, 0, 0);
    for case in 0..CASES {
        let text = random.pick(&SEEDS);
        let (text, sets) = match case % 3 {
            0 => (text.to_owned(), vec![mutate(random.pick(&FLAGS), &mut random)]),
            1 => (mutate(text, &mut random), vec![random.pick(&FLAGS).to_owned()]),
            _ => (mutate(text, &mut random), Vec::new()),
        };
        let Err(report) = load(text.clone(), &sets) else {
            accepted += 1;
            continue;
        };
        assert!(!report.0.is_empty(), "refused for no reason:\n{text}\n{sets:?}");
        for diagnostic in &report.0 {
            let place = diagnostic.place().expect("a place");
            assert!(place.span.end <= place.source.text().len());
            assert!(place.span.start <= place.span.end);
            assert!(!diagnostic.message.is_empty());
        }
        let shown = report.render();
        let safe = |c: char| c == '\n' || !c.is_control();
        assert!(shown.chars().all(safe), "{shown:?}");
        assert_eq!(report.to_json().as_array().map(Vec::len), Some(report.0.len()));
        if reached_decoding(&report) {
            decoded += 1;
        } else {
            refused += 1;
        }
    }
    assert!(
        (accepted + decoded) * 3 >= CASES,
        "{accepted} accepted, {decoded} refused by the decoder, {refused} before it"
    );
    assert!(refused > CASES / 20 && decoded > CASES / 5 && accepted > CASES / 20, "{accepted} {decoded} {refused}");
}

fn refusal_of(text: String) -> Report {
    load(text, &[]).expect_err("past a limit")
}

#[test]
fn what_is_past_a_limit_is_refused_at_once() {
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
    assert_eq!(report.0[0].place().map(|place| place.line_column()), Some((2, 7)));
}

#[test]
fn a_folder_or_a_missing_file_is_refused_by_name() {
    for (path, fragment) in [(std::env::temp_dir(), "is a folder"), ("nowhere/mea.yaml".into(), "there is no recipe")] {
        let request = LoadRequest { input: Input::Path(path), sets: &[], env: &|_| None, builtins: &Builtins };
        let report = Recipe::load(&request, registry()).expect_err("no recipe");
        assert!(report.0[0].message.contains(fragment), "{report}");
    }
}
