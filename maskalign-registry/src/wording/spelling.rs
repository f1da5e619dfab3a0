//! Suggestions: the known names closest in spelling to an unknown one.

use std::collections::BTreeSet;

/// Names of more bytes than this are not compared: it takes the product of their lengths.
const LONGEST: usize = 256;

/// The candidates that `name` may be a misspelling of, nearest first, at most three.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    if name.len() > LONGEST {
        return Vec::new();
    }
    let written = name.to_lowercase();
    let length = written.chars().count();
    let mut scored: Vec<(usize, &str)> = Vec::new();
    for candidate in candidates.into_iter().filter(|candidate| candidate.len() <= LONGEST) {
        let distance = strsim::osa_distance(&written, &candidate.to_lowercase());
        let longest = length.max(candidate.chars().count());
        let contains = length >= 3
            && candidate.len() >= 3
            && (candidate.contains(written.as_str()) || written.contains(candidate));
        if distance * 3 <= longest.max(3) {
            scored.push((distance * 2, candidate));
        } else if contains || is_short_for(&written, candidate) {
            scored.push((longest + distance, candidate));
        }
    }
    scored.sort_unstable();
    scored.dedup();
    scored.into_iter().take(3).map(|(_, candidate)| candidate).collect()
}

/// The edit distance between two names, ignoring case.
pub(crate) fn distance(a: &str, b: &str) -> usize {
    strsim::osa_distance(&a.to_lowercase(), &b.to_lowercase())
}

/// Whether every word of a name is in the other, in any order: `lr` for `base_lr`.
fn is_short_for(written: &str, candidate: &str) -> bool {
    let split = |name: &str| -> BTreeSet<String> { name.split(['_', '-', ' ']).map(str::to_owned).collect() };
    split(written).is_subset(&split(candidate))
}
