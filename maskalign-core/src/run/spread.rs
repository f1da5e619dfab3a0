//! What the same measurement of several runs says together.

use serde::Serialize;

/// Mean and standard error of one number in several runs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// Runs that have it.
    pub runs: usize,
    /// The mean.
    pub mean: f64,
    /// The standard error of the mean: the standard deviation with n - 1 in the denominator, over the root of n. A single run
    /// has none.
    pub standard_error: Option<f64>,
}

/// Mean and standard error of some numbers; nothing where there are none.
pub fn spread(values: &[f64]) -> Option<Spread> {
    let runs = values.len();
    if runs == 0 {
        return None;
    }
    let (mean, variance) = moments(values);
    let standard_error = (runs > 1).then(|| (variance / runs as f64).sqrt());
    Some(Spread { runs, mean, standard_error })
}

/// The mean of some values and their variance with n - 1 in the denominator, which is not finite for a single one.
pub(crate) fn moments(values: &[f64]) -> (f64, f64) {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (mean, squares / (values.len() as f64 - 1.0))
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn mean_and_standard_error_are_numpys() {
        let cases: Value = serde_json::from_str(include_str!("../../tests/fixtures/runs/spread.json")).unwrap();
        let cases = cases.as_array().unwrap();
        for case in cases {
            let values: Vec<f64> = case["values"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
            let found = spread(&values).unwrap();
            let close = |a: f64, b: &Value| (a - b.as_f64().unwrap()).abs() <= 1e-12 * a.abs().max(1e-300);
            assert!(close(found.mean, &case["mean"]), "{case}: {found:?}");
            match found.standard_error {
                Some(error) => assert!(close(error, &case["standard_error"]), "{case}: {found:?}"),
                None => assert!(case["standard_error"].is_null() && values.len() == 1, "{case}"),
            }
        }
        assert_eq!((cases.len(), spread(&[])), (5, None));
    }
}
