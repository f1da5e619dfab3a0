//! What a sweep varies: `--grid` and `--seeds`, and the names of the runs that follow.

use std::{collections::BTreeSet, sync::Arc};

use maskalign_registry::{
    Diagnostic, Place, Report,
    diagnostic::codes,
    source::{Source, SourceKind},
};

/// The longest name of a value or of a run, in characters.
const LONGEST_VALUE: usize = 40;
const LONGEST_NAME: usize = 160;

/// A value of the recipe that is varied.
pub(super) struct Axis {
    /// The flag's text: `PATH=A,B`.
    source: Arc<Source>,
    /// The path, as `--set` takes it.
    pub(super) path: String,
    /// The values, each with the place in the text where it begins.
    values: Vec<(String, usize)>,
}

impl Axis {
    /// Reads `PATH=A,B`. Commas inside brackets, braces and quotes separate nothing.
    ///
    /// # Errors
    /// What is missing, at its place.
    pub(super) fn parse(text: &str) -> Result<Axis, Vec<Diagnostic>> {
        let source = Arc::new(Source::new("--grid", text, SourceKind::Flag));
        let refuse = |message: &str, span| {
            let place = Place { source: Arc::clone(&source), span };
            Diagnostic::error(codes::BAD_OVERRIDE, message, place)
                .help("write PATH=A,B,... such as stages.pretrain.masker.ratio=0.5,0.75")
        };
        let Some(end) = find(text, '=') else {
            return Err(vec![refuse("`=` and the values are missing", text.len()..text.len())]);
        };
        let (mut values, mut faults) = (Vec::new(), Vec::new());
        let mut at = end + 1;
        loop {
            let length = find(&text[at..], ',').unwrap_or(text.len() - at);
            let value = &text[at..at + length];
            let blank = value.len() - value.trim_start().len();
            match value.trim() {
                "" => faults.push(refuse("a value is missing", at..at + length)),
                value if values.iter().any(|(known, _)| known == value) => {
                    let from = at + blank;
                    faults.push(refuse("the value is there twice", from..from + value.len()));
                }
                value => values.push((value.to_owned(), at + blank)),
            }
            at += length + 1;
            if at > text.len() {
                break;
            }
        }
        let path = text[..end].to_owned();
        if path.trim().is_empty() {
            faults.push(refuse("the path is missing", 0..end));
        }
        match faults.is_empty() {
            true => Ok(Axis { source, path, values }),
            false => Err(faults),
        }
    }

    /// Its values.
    pub(super) fn values(&self) -> impl Iterator<Item = &str> {
        self.values.iter().map(|(value, _)| value.as_str())
    }

    /// The `--set` of a value.
    pub(super) fn set(&self, value: &str) -> String {
        format!("{}={value}", self.path)
    }

    /// A mistake at the whole flag.
    pub(super) fn mistake(&self, message: &str, help: &str) -> Diagnostic {
        let place = Place { source: Arc::clone(&self.source), span: 0..self.path.len() };
        Diagnostic::error(codes::BAD_OVERRIDE, message, place).help(help)
    }

    /// The place in this flag of a place in the `--set` of one of its values.
    fn place(&self, found: &Place) -> Option<Place> {
        let text = found.source.text();
        let is_flag = found.source.kind() == SourceKind::Flag;
        let (_, begin) = self.values.iter().find(|(value, _)| is_flag && self.set(value) == text)?;
        let value = self.path.len() + 1;
        let to = |at: usize| if at < value { at } else { at - value + begin };
        Some(Place { source: Arc::clone(&self.source), span: to(found.span.start)..to(found.span.end) })
    }
}

/// The first such character outside brackets, braces and quotes.
fn find(text: &str, wanted: char) -> Option<usize> {
    let (mut depth, mut quote) = (0_usize, None);
    for (at, c) in text.char_indices() {
        match (quote, c) {
            (Some(open), _) if open == c => quote = None,
            (Some(_), _) => {}
            (None, '"' | '\'') => quote = Some(c),
            (None, '[' | '{' | '(') => depth += 1,
            (None, ']' | '}' | ')') => depth = depth.saturating_sub(1),
            (None, _) if c == wanted && depth == 0 => return Some(at),
            (None, _) => {}
        }
    }
    None
}

/// Moves what is wrong with a value of the grid to its place there.
pub(super) fn relocate(report: &mut Report, axes: &[Axis]) {
    for label in report.0.iter_mut().flat_map(|diagnostic| &mut diagnostic.labels) {
        if let Some(place) = axes.iter().find_map(|axis| axis.place(&label.place)) {
            label.place = place;
        }
    }
}

/// The seeds of `--seeds`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seeds(pub(super) Vec<u64>);

impl std::str::FromStr for Seeds {
    type Err = String;

    fn from_str(text: &str) -> Result<Seeds, String> {
        const MOST: u64 = 10_000;
        let expected = || "expected seeds such as 0..3 (that is 0, 1 and 2), 0..=3 or 1,5,7".to_owned();
        let number = |text: &str| text.trim().parse::<u64>().map_err(|_| expected());
        let seeds: Vec<u64> = match text.split_once("..") {
            Some((first, last)) => {
                let (last, inclusive) = last.strip_prefix('=').map_or((last, 0), |last| (last, 1));
                let (first, end) = (number(first)?, number(last)?.saturating_add(inclusive));
                if end.saturating_sub(first) > MOST {
                    return Err(format!("these are more than {MOST} seeds"));
                }
                (first..end).collect()
            }
            None => text.split(',').map(number).collect::<Result<_, _>>()?,
        };
        match seeds.len() {
            0 => Err(format!("there is no seed in `{text}`: {}", expected())),
            all if seeds.iter().collect::<BTreeSet<_>>().len() < all => Err("a seed is there twice".to_owned()),
            _ => Ok(Seeds(seeds)),
        }
    }
}

/// What each path is called: its last keys, as many as tell it from the others.
pub(super) fn labels(axes: &[Axis]) -> Vec<String> {
    let keys: Vec<Vec<&str>> = axes.iter().map(|axis| axis.path.split('.').collect()).collect();
    let last = |keys: &[&str], count: usize| keys[keys.len().saturating_sub(count)..].join(".");
    let of = |own: &Vec<&str>| {
        // The type of a component says nothing without the component.
        let least = if own.last() == Some(&"type") { 2 } else { 1 };
        let is_unique = |count: &usize| keys.iter().filter(|keys| last(keys, *count) == last(own, *count)).count() == 1;
        let count = (least..own.len()).find(is_unique).unwrap_or(own.len());
        last(own, count)
    };
    keys.iter().map(of).collect()
}

/// The names of run directories: the values that each run has.
pub(super) fn names(runs: &[Vec<(String, String)>]) -> Vec<String> {
    let plain: Vec<String> = runs.iter().map(|values| name(values)).collect();
    let lower: Vec<String> = plain.iter().map(|name| name.to_lowercase()).collect();
    let is_alone = |at: usize| lower.iter().filter(|other| **other == lower[at]).count() == 1;
    let named = plain.iter().zip(runs).enumerate().map(|(at, (name, values))| match is_alone(at) {
        true => name.clone(),
        // Values whose names are the same, as those of lists and mappings may be.
        false => format!("{name}~{}", hash(values)),
    });
    named.collect()
}

fn name(values: &[(String, String)]) -> String {
    let parts = values.iter().map(|(label, value)| format!("{}={}", safe(label), safe(value)));
    let name = parts.collect::<Vec<_>>().join(",");
    match name.chars().count() > LONGEST_NAME {
        true => name.chars().take(LONGEST_NAME - 9).chain(['~']).chain(hash(values).chars()).collect(),
        false => name,
    }
}

/// Text as a part of a file's name.
fn safe(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c.is_ascii_alphanumeric() || "_-.+".contains(c) {
            true => out.push(c),
            false if !out.is_empty() && !out.ends_with('-') => out.push('-'),
            false => {}
        }
    }
    out.chars().take(LONGEST_VALUE).collect::<String>().trim_end_matches('-').to_owned()
}

/// Eight digits that stand for values (FNV-1a).
fn hash(values: &[(String, String)]) -> String {
    let mut hash: u32 = 0x811c_9dc5;
    for byte in values.iter().flat_map(|(label, value)| label.bytes().chain([0]).chain(value.bytes()).chain([0])) {
        hash = (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
    }
    format!("{hash:08x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axis(text: &str) -> Axis {
        Axis::parse(text).unwrap_or_else(|faults| panic!("{}", faults[0].message))
    }

    #[test]
    fn values_are_separated_by_commas_outside_brackets() {
        let values = |text: &str| axis(text).values().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(values("a.b=1,2"), ["1", "2"]);
        assert_eq!(values("a= 0.5 , x"), ["0.5", "x"]);
        assert_eq!(values("a={ type: b, c: [1, 2] },[3, 4],'x,y'"), ["{ type: b, c: [1, 2] }", "[3, 4]", "'x,y'"]);
        let faults = |text: &str| -> Vec<(String, std::ops::Range<usize>)> {
            let faults = Axis::parse(text).err().unwrap_or_default();
            faults.into_iter().map(|fault| (fault.message.clone(), fault.labels[0].place.span.clone())).collect()
        };
        assert_eq!(faults("a"), [("`=` and the values are missing".into(), 1..1)]);
        assert_eq!(faults("a="), [("a value is missing".into(), 2..2)]);
        assert_eq!(
            faults("a=1,,1,"),
            [
                ("a value is missing".into(), 4..4),
                ("the value is there twice".into(), 5..6),
                ("a value is missing".into(), 7..7),
            ]
        );
        assert_eq!(faults("=1"), [("the path is missing".into(), 0..0)]);
    }

    #[test]
    fn a_place_in_a_set_is_one_in_the_grid() {
        let axis = axis("a.b=1, abc");
        let source = Arc::new(Source::new("--set", "a.b=abc", SourceKind::Flag));
        let to = |span| axis.place(&Place { source: Arc::clone(&source), span }).map(|place| place.text().to_owned());
        assert_eq!(to(4..7).as_deref(), Some("abc"));
        assert_eq!(to(2..3).as_deref(), Some("b"));
        let other = Arc::new(Source::new("--set", "a.b=ab", SourceKind::Flag));
        assert!(axis.place(&Place { source: other, span: 4..6 }).is_none());
    }

    #[test]
    fn seeds_are_ranges_or_lists() {
        let seeds = |text: &str| text.parse::<Seeds>().map(|seeds| seeds.0);
        assert_eq!(seeds("0..3"), Ok(vec![0, 1, 2]));
        assert_eq!(seeds("2..=3"), Ok(vec![2, 3]));
        assert_eq!(seeds("7, 1"), Ok(vec![7, 1]));
        for wrong in ["", "3..3", "1,1", "a", "-1", "0..x", "0..10000000"] {
            assert!(seeds(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn runs_are_named_by_their_values() {
        let axes = [axis("stages.a.masker.type=x,y"), axis("stages.a.lr=1"), axis("stages.b.lr=1"), axis("seed=1")];
        assert_eq!(labels(&axes), ["masker.type", "a.lr", "b.lr", "seed"]);
        let run = |values: &[(&str, &str)]| -> Vec<(String, String)> {
            values.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
        };
        let named = names(&[run(&[("ratio", "0.5"), ("seed", "1")]), run(&[("masker", "{type: a, b: [1]}")])]);
        assert_eq!(named, ["ratio=0.5,seed=1", "masker=type-a-b-1"]);
        let alike = names(&[run(&[("x", "[1, 2]")]), run(&[("x", "[1 2]")])]);
        assert!(alike[0] != alike[1] && alike[0].starts_with("x=1-2~"), "{alike:?}");
        let long = names(&[run(&[("x", &"y".repeat(100)), ("z", &"1".repeat(100))])]);
        assert!(long[0].len() < 100, "{long:?}");
    }
}
