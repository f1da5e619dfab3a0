//! Checks tensors against those that a model needs.

use std::collections::BTreeMap;

use super::{Mismatch, TensorMap, WeightsError};

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::HostTensor;

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
