//! Mutated recipes and flags, read and planned with every built-in component: whatever is written, the answer is a plan
//! or a report whose every mistake has a place, soon.

use std::time::{Duration, Instant};

use maskalign_core::{
    Recompute,
    components::towers::{Environment, MissingWeights},
    embedded,
    pipeline::{PlanOptions, plan},
};
use maskalign_registry::{
    Input, LoadRequest, Loaded, Recipe, RecipeSource, Registry, Report, ShowOrigin, diagnostic::codes,
};

const CASES: usize = 20_400;
/// What a case may take, in a build that is not optimised, on a machine that does other things.
const PATIENCE: Duration = Duration::from_secs(5);

/// Small models, so that planning them is quick, and data that planning does not open.
const SEEDS: [&str; 5] = [
    "\
name: small
seed: 0
stages:
  pretrain:
    type: pretrain
    epochs: 2
    data:
      dataset: { type: image_folder, root: \"${IMAGENET_DIR}/train\" }
      transforms:
        - { type: random_resized_crop, size: 28, scale: [0.2, 1.0] }
        - { type: horizontal_flip }
    student: { type: vit, arch: { dim: 32, depth: 3, heads: 2, patch: 7 }, drop_path: 0.1 }
    teachers:
      clip: { type: clip, arch: { dim: 24, depth: 3, heads: 2, patch: 7 }, weights: \"hf://a/b\" }
    masker: { type: attention, teacher: clip, ratio: 0.7 }
    objectives:
      align:
        target: { type: features, teacher: clip, levels: { last: 2 }, normalize: whiten }
        tokens: [cls, visible]
        aligner: { type: dynamic, fusion: sum, head: linear }
        loss: { type: smooth_l1, beta: 2.0 }
        weight: { from: 0, to: 2.0, shape: cosine }
    optimizer: { type: adamw, base_lr: 1.5e-4, weight_decay: 0.05, betas: [0.9, 0.95], clip_norm: 3 }
    schedule: { type: cosine, warmup_epochs: 1, min_lr: 1.0e-5 }
    batch: { effective: 64, micro: 16 }
    checkpoints: { every_epochs: 1, keep_last: 3 }
",
    "\
name: decoded
stages:
  pretrain:
    type: pretrain
    epochs: 2
    data: { dataset: { type: image_folder, root: images }, transforms: [{ type: resize, size: [28, 28] }] }
    student: { type: vit, arch: { dim: 32, depth: 3, heads: 2, patch: 7 } }
    masker: { type: random, ratio: 0.75, predict_ratio: 0.25 }
    objectives:
      pixels:
        target: { type: pixels, normalize: standardize }
        tokens: [masked]
        aligner: { type: decoder, levels: [embed, 0, -1], attention: cross, dim: 16, depth: 2, heads: 2 }
        loss: { type: mse }
    optimizer: { type: adamw, base_lr: 1.5e-4 }
    schedule: { type: multistep, milestones: [1], gamma: 0.1 }
    batch: { effective: 64 }
  knn:
    type: knn
    student: { stage: pretrain }
    baselines: [untrained]
    train: { dataset: { type: image_folder, root: images }, transforms: [{ type: center_crop, size: 28 }] }
    test: { dataset: { type: image_folder, root: images }, transforms: [{ type: center_crop, size: 28 }] }
    k: [10, 20]
",
    "\
name: tuned
stages:
  pretrain: &p
    type: finetune
    epochs: 1
    data: { dataset: { type: image_folder, root: images }, transforms: [{ type: center_crop, size: 28 }] }
    student: { type: vit, arch: { dim: 32, depth: 3, heads: 2, patch: 7 }, image_size: 28 }
    classes: 10
    optimizer: { type: adamw, base_lr: 1.5e-4 }
    schedule: { type: constant }
    batch: { effective: 8 }
  again:
    <<: *p
    epochs: 2
    student: { type: vit, weights: { stage: pretrain } }
",
    "name: short\nextends: [decoded, decoded]\nstages:\n  pretrain: &p\n    epochs: ${EPOCHS:-3}\n    masker: &m { ratio: 0.5 }\n  knn:\n    <<: { pooling: cls }\n    batch: 8\n    k: [5]\n",
    "extends: maskalign_vitb_clip\nname: large\nstages:\n  pretrain:\n    masker: { ratio: 0.5 }\n    teachers: { clip: { image_size: 224 } }\n",
];

const FLAGS: [&str; 14] = [
    "stages.pretrain.masker.ratio=0.75",
    "stages.pretrain.masker={type: random, ratio: .75}",
    "~stages.pretrain.masker",
    "stages.pretrain.data.transforms.0.size=56",
    "stages.pretrain.teachers.\"a.b\"={type: vit, weights: {stage: pretrain}}",
    "name=x",
    "seed=${SEED:-3}",
    "stages.pretrain.masker.type=random",
    "stages={}",
    "stages.pretrain.student.arch.dim=64",
    "stages.pretrain.optimizer.base_lr=1e-3",
    "stages.pretrain.schedule={type: constant}",
    "stages.pretrain.epochs=${EPOCHS:-0.5}",
    "stages.pretrain.batch={effective: 32, micro: 8}",
];

const PIECES: [&str; 66] = [
    "0",
    "-1",
    "1e400",
    "-.inf",
    ".nan",
    "18446744073709551615",
    "18446744073709551616",
    "-9223372036854775808",
    "9007199254740993",
    "4294967296",
    "1048576",
    "65536",
    "1024",
    "256",
    "1e300",
    "1e-300",
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
    "extends: small\n",
    "extends: loop\n",
    "ratio: 0.7",
    "\n",
    "        ",
];
/// What replaces a number: what may fit, and what is far too large.
const NUMBERS: [&str; 20] = [
    "0",
    "1",
    "2",
    "3",
    "4",
    "7",
    "8",
    "14",
    "28",
    "56",
    "64",
    "0.25",
    "0.5",
    "256",
    "1024",
    "4096",
    "65536",
    "1048576",
    "4294967296",
    "1e300",
];

/// The pieces that replace a word in place: these mostly stay YAML.
const IN_PLACE: usize = 22;

struct Builtins;

impl RecipeSource for Builtins {
    fn builtin(&self, name: &str) -> Option<&str> {
        match name {
            "small" => Some(SEEDS[0]),
            "decoded" => Some(SEEDS[1]),
            "loop" => Some("extends: loop\nname: loop"),
            _ => embedded::RECIPES.iter().find(|(known, _)| *known == name).map(|(_, text)| *text),
        }
    }

    fn names(&self) -> Vec<&str> {
        vec!["decoded", "loop", "small"]
    }
}

fn registry() -> &'static Registry {
    Registry::global().expect("no two components have one name")
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
    for _ in 0..=random.below(3).min(random.below(3)) {
        let tokens = tokens(&text);
        let is_number = |(from, to): &(usize, usize)| text[*from..*to].parse::<f64>().is_ok();
        let numbers: Vec<(usize, usize)> = tokens.iter().copied().filter(is_number).collect();
        let lines: Vec<&str> = text.split_inclusive('\n').collect();
        text = match random.below(14) {
            // Numbers for numbers: these mostly reach a plan.
            9.. if !numbers.is_empty() => {
                let (from, to) = numbers[random.below(numbers.len())];
                format!("{}{}{}", &text[..from], random.pick(&NUMBERS), &text[to..])
            }
            // In place: these mostly stay YAML.
            0..=2 if !tokens.is_empty() => {
                let (from, to) = tokens[random.below(tokens.len())];
                let (other_from, other_to) = tokens[random.below(tokens.len())];
                let other = text[other_from..other_to].to_owned();
                format!("{}{other}{}", &text[..from], &text[to..])
            }
            3 if !tokens.is_empty() => {
                let (from, to) = tokens[random.below(tokens.len())];
                let piece = random.pick(&PIECES[..IN_PLACE]);
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

/// Whether the machine has the variables of the recipes.
#[derive(Clone, Copy)]
enum Machine {
    Ready,
    /// `validate --no-environment` on a machine without them.
    Elsewhere,
}

fn read(text: String, sets: &[String], machine: Machine) -> Result<Loaded, Report> {
    let env = |name: &str| match machine {
        Machine::Ready => (name == "IMAGENET_DIR").then(|| "/images".to_owned()),
        Machine::Elsewhere => None,
    };
    let input = Input::Text { name: "mutant.yaml".to_owned(), text };
    let request = LoadRequest { input, sets, env: &env, builtins: &Builtins };
    match machine {
        Machine::Ready => Recipe::load(&request, registry()),
        Machine::Elsewhere => Recipe::load_without_environment(&request, registry()),
    }
}

fn check(text: String, sets: &[String], machine: Machine) -> Result<(), Report> {
    let loaded = read(text, sets, machine)?;
    // What loads must survive the way back.
    if let Machine::Ready = machine {
        let yaml = loaded.resolved_yaml(ShowOrigin::Yes);
        let again = read(yaml.clone(), &[], Machine::Ready).unwrap_or_else(|report| panic!("{report}\n{yaml}"));
        assert_eq!(again.resolved(), loaded.resolved());
    }
    let options = PlanOptions {
        environment: Environment::Ignored,
        missing_weights: MissingWeights::Refused,
        recompute: Recompute::Never,
    };
    plan(loaded.recipe(), options).map(drop).map_err(|refusals| {
        assert!(!refusals.is_empty());
        loaded.locate_all(&refusals)
    })
}

fn reached_decoding(code: &str) -> bool {
    [
        codes::UNKNOWN_KEY,
        codes::UNKNOWN_TYPE,
        codes::UNKNOWN_VALUE,
        codes::WRONG_TYPE,
        codes::MISSING_KEY,
        codes::OUT_OF_RANGE,
        codes::REFUSED,
    ]
    .contains(&code)
}

/// How the cases of one worker ended.
#[derive(Clone, Copy, Default)]
struct Ends {
    planned: usize,
    /// Refused by a plan.
    unplanned: usize,
    decoded: usize,
    refused: usize,
}

fn run(worker: usize, workers: usize) -> Ends {
    let mut random = Random(20_230_618);
    let mut ends = Ends::default();
    for case in 0..CASES {
        let seed = random.pick(&SEEDS);
        let (text, sets) = match case % 3 {
            0 => (seed.to_owned(), vec![mutate(random.pick(&FLAGS), &mut random)]),
            1 => (mutate(seed, &mut random), vec![random.pick(&FLAGS).to_owned()]),
            _ => (mutate(seed, &mut random), Vec::new()),
        };
        if case % workers != worker {
            continue;
        }
        let machine = if case % 2 == 0 { Machine::Ready } else { Machine::Elsewhere };
        let began = Instant::now();
        let outcome = check(text.clone(), &sets, machine);
        let took = began.elapsed();
        assert!(took < PATIENCE, "{took:?} for\n{text}\n{sets:?}");
        let Err(report) = outcome else {
            ends.planned += 1;
            continue;
        };
        assert!(!report.0.is_empty(), "refused for no reason:\n{text}\n{sets:?}");
        for diagnostic in &report.0 {
            let place = diagnostic.place().expect("a place");
            assert!(place.span.end <= place.source.text().len());
            assert!(place.span.start <= place.span.end);
            assert!(!diagnostic.message.is_empty());
            // The whole recipe is the place only of what is wrong with it as a whole.
            let somewhere = !reached_decoding(diagnostic.code) || place.span.end > 0;
            assert!(somewhere, "no place:\n{}\n{text}\n{sets:?}", diagnostic.render());
        }
        let shown = report.render();
        let safe = |c: char| c == '\n' || !c.is_control();
        assert!(shown.chars().all(safe), "{shown:?}");
        assert_eq!(report.to_json().as_array().map(Vec::len), Some(report.0.len()));
        if report.0.iter().all(|diagnostic| diagnostic.code == codes::REFUSED) {
            ends.unplanned += 1;
        } else if report.0.iter().any(|diagnostic| reached_decoding(diagnostic.code)) {
            ends.decoded += 1;
        } else {
            ends.refused += 1;
        }
    }
    ends
}

#[test]
fn what_is_mutated_is_sound() {
    for seed in SEEDS {
        check(seed.to_owned(), &[], Machine::Ready).unwrap_or_else(|report| panic!("{report}"));
    }
}

#[test]
fn mutated_recipes_and_flags_end_soon_with_a_plan_or_with_mistakes_at_their_places() {
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let ends: Vec<Ends> = std::thread::scope(|scope| {
        let started: Vec<_> = (0..workers).map(|worker| scope.spawn(move || run(worker, workers))).collect();
        started.into_iter().map(|worker| worker.join().expect("no panic")).collect()
    });
    let sum = |part: fn(&Ends) -> usize| ends.iter().map(part).sum::<usize>();
    let (planned, unplanned) = (sum(|e| e.planned), sum(|e| e.unplanned));
    let (decoded, refused) = (sum(|e| e.decoded), sum(|e| e.refused));
    let counts =
        format!("{planned} planned, {unplanned} refused by a plan, {decoded} by the decoder, {refused} before it");
    println!("{counts}");
    assert_eq!(planned + unplanned + decoded + refused, CASES);
    assert!((planned + unplanned + decoded) * 3 >= CASES, "{counts}");
    assert!([planned, unplanned, decoded, refused].iter().all(|part| *part > CASES / 50), "{counts}");
}
