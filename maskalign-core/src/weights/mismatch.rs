//! What keeps tensors from fitting a model: missing, extra, misshapen and non-finite ones.

use std::fmt;

use maskalign_registry::source::visible_lines;

use super::HostTensor;

/// So many names of each kind are printed; the count is always that of all.
const MAX_SHOWN: usize = 10;
/// Beyond so many candidates no nearest name is looked for.
const MAX_CANDIDATES: usize = 4096;

/// All that keeps tensors from fitting a model.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mismatch {
    /// Needed and not there.
    pub missing: Vec<String>,
    /// There and not needed.
    pub extra: Vec<String>,
    /// Name, shape found, shape needed in words.
    pub misshapen: Vec<(String, Vec<usize>, String)>,
    /// Name, number of values that are NaN or infinite, number of values.
    pub non_finite: Vec<(String, usize, usize)>,
}

impl Mismatch {
    /// Whether everything fits.
    pub fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.extra.is_empty() && self.misshapen.is_empty() && self.non_finite.is_empty()
    }

    /// Notes a tensor's values that are not finite.
    pub(super) fn look_for_non_finite(&mut self, name: &str, tensor: &HostTensor) {
        let count = tensor.data.iter().filter(|value| !value.is_finite()).count();
        if count > 0 {
            self.non_finite.push((name.to_owned(), count, tensor.data.len()));
        }
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let near = |name: &str, candidates: &[String]| match nearest(name, candidates) {
            Some(candidate) => format!(" (nearest name there: `{candidate}`)"),
            None => String::new(),
        };
        write!(f, "do not fit:")?;
        list(f, "missing", &self.missing, |name| format!("`{name}`{}", near(name, &self.extra)))?;
        list(f, "not expected", &self.extra, |name| format!("`{name}`{}", near(name, &self.missing)))?;
        list(f, "of another shape", &self.misshapen, |(name, found, needed)| {
            format!("`{name}` is {found:?}, expected {needed}")
        })?;
        list(f, "not finite", &self.non_finite, |(name, count, all)| format!("`{name}` in {count} of {all} values"))
    }
}

fn list<T>(f: &mut fmt::Formatter<'_>, kind: &str, items: &[T], show: impl Fn(&T) -> String) -> fmt::Result {
    if items.is_empty() {
        return Ok(());
    }
    write!(f, "\n  {} {kind}: ", items.len())?;
    let shown: Vec<_> =
        items.iter().take(MAX_SHOWN).map(|item| visible_lines(&show(item)).replace('\n', " ")).collect();
    f.write_str(&shown.join(", "))?;
    if items.len() > MAX_SHOWN {
        write!(f, ", ...")?;
    }
    Ok(())
}

/// The candidate with the fewest edits to `name`, if that is few enough to be a slip.
fn nearest<'a>(name: &str, candidates: &'a [String]) -> Option<&'a str> {
    let limit = (name.len() / 4).clamp(2, 5);
    candidates
        .iter()
        .take(MAX_CANDIDATES)
        .map(|candidate| (distance(name.as_bytes(), candidate.as_bytes(), limit), candidate.as_str()))
        .filter(|(distance, _)| *distance <= limit)
        .min()
        .map(|(_, candidate)| candidate)
}

/// Levenshtein's distance in bytes, or `limit + 1` where it is more than `limit`.
///
/// Looks at the pairs of places alone that are at most `limit` apart: names of a hostile file may be long, and all alike.
fn distance(a: &[u8], b: &[u8], limit: usize) -> usize {
    let beyond = limit + 1;
    if a.len().abs_diff(b.len()) > limit {
        return beyond;
    }
    let mut row: Vec<usize> = (0..=b.len()).map(|place| place.min(beyond)).collect();
    for (i, &from) in a.iter().enumerate() {
        let places = i.saturating_sub(limit)..b.len().min(i + limit + 1);
        let mut diagonal = row[places.start];
        row[places.start] = if places.start == 0 { (i + 1).min(beyond) } else { beyond };
        for j in places.clone() {
            let substituted = diagonal + usize::from(from != b[j]);
            // What the row above has not reached is too far.
            diagonal = if j >= i + limit { beyond } else { row[j + 1] };
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1).min(beyond);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against the distance over all pairs of places.
    #[test]
    fn a_distance_within_the_limit_is_exact() {
        let plain = |a: &[u8], b: &[u8]| {
            let mut row: Vec<usize> = (0..=b.len()).collect();
            for (i, from) in a.iter().enumerate() {
                let above = row.clone();
                row[0] = i + 1;
                for (j, to) in b.iter().enumerate() {
                    row[j + 1] = (above[j] + usize::from(from != to)).min(row[j] + 1).min(above[j + 1] + 1);
                }
            }
            row[b.len()]
        };
        let words: Vec<Vec<u8>> = (0..243u32)
            .flat_map(|number| {
                (0..6).map(move |length| (0..length).map(|at| (number / 3u32.pow(at) % 3) as u8).collect())
            })
            .collect();
        for (a, b) in words.iter().zip(words.iter().cycle().skip(97)).chain(words.iter().zip(words.iter().rev())) {
            for limit in 0..4 {
                assert_eq!(distance(a, b, limit), plain(a, b).min(limit + 1), "{a:?} {b:?} {limit}");
            }
        }
    }
}
