use std::collections::BTreeMap;
use std::fmt;

use super::{HostTensor, TensorMap, WeightsError};

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

    pub(super) fn into_result(self, what: &str) -> Result<(), WeightsError> {
        if self.is_empty() {
            return Ok(());
        }
        Err(WeightsError::Mismatch { what: what.to_owned(), mismatch: Box::new(self) })
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
    let shown: Vec<_> = items.iter().take(MAX_SHOWN).map(show).collect();
    f.write_str(&shown.join(", "))?;
    if items.len() > MAX_SHOWN {
        write!(f, ", ...")?;
    }
    Ok(())
}

/// Holds tensors against those a model needs: the same names, the same shapes, finite values.
///
/// Returns the tensors as they came, or one error with all that does not fit; `what` says whose they are.
pub fn check_against(expected: &[(String, Vec<usize>)], got: TensorMap, what: &str) -> Result<TensorMap, WeightsError> {
    let expected: BTreeMap<&str, &[usize]> = expected.iter().map(|(name, shape)| (&**name, &**shape)).collect();
    let mut mismatch = Mismatch::default();
    for (name, shape) in &expected {
        match got.get(*name) {
            None => mismatch.missing.push((*name).to_owned()),
            Some(tensor) if tensor.shape != *shape => {
                mismatch.misshapen.push(((*name).to_owned(), tensor.shape.clone(), format!("{shape:?}")));
            }
            Some(tensor) => mismatch.look_for_non_finite(name, tensor),
        }
    }
    mismatch.extra.extend(got.keys().filter(|name| !expected.contains_key(name.as_str())).cloned());
    mismatch.into_result(what)?;
    Ok(got)
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

/// Levenshtein's distance in bytes; anything above `limit` where the lengths alone exceed it.
fn distance(a: &[u8], b: &[u8], limit: usize) -> usize {
    if a.len().abs_diff(b.len()) > limit {
        return limit + 1;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, &from) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &to) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(from != to);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(shape: &[usize], value: f32) -> HostTensor {
        HostTensor { shape: shape.to_vec(), data: vec![value; shape.iter().product()] }
    }

    #[test]
    fn everything_wrong_is_in_one_error() {
        let expected = [
            ("norm.weight".to_owned(), vec![4]),
            ("norm.bias".to_owned(), vec![4]),
            ("head.weight".to_owned(), vec![2, 4]),
            ("cls_token".to_owned(), vec![1, 1, 4]),
        ];
        let mut infinite = tensor(&[4], 1.0);
        infinite.data[2] = f32::NAN;
        let got = TensorMap::from([
            ("norm.wieght".to_owned(), tensor(&[4], 1.0)),
            ("norm.bias".to_owned(), infinite),
            ("head.weight".to_owned(), tensor(&[4, 2], 1.0)),
            ("cls_token".to_owned(), tensor(&[1, 1, 4], 1.0)),
        ]);
        let error = check_against(&expected, got, "teacher `clip`").unwrap_err();
        assert!(error.is_user_mistake());
        assert_eq!(
            error.to_string(),
            "teacher `clip` do not fit:\n  \
             1 missing: `norm.weight` (nearest name there: `norm.wieght`)\n  \
             1 not expected: `norm.wieght` (nearest name there: `norm.weight`)\n  \
             1 of another shape: `head.weight` is [4, 2], expected [2, 4]\n  \
             1 not finite: `norm.bias` in 1 of 4 values"
        );
    }

    #[test]
    fn long_lists_are_cut_and_counted() {
        let expected: Vec<_> = (0..25).map(|i| (format!("tensor{i:02}"), vec![1])).collect();
        let error = check_against(&expected, TensorMap::new(), "w").unwrap_err().to_string();
        assert!(error.contains("25 missing: ") && error.contains("`tensor09`, ..."), "{error}");
        assert!(!error.contains("tensor10"), "{error}");
    }

    #[test]
    fn what_fits_comes_back() {
        let got = TensorMap::from([("a".to_owned(), tensor(&[3], 2.0))]);
        assert_eq!(check_against(&[("a".to_owned(), vec![3])], got.clone(), "w").unwrap(), got);
    }
}
