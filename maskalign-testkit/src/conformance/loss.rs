//! Losses: finite, lowest at the target, correct gradients, the same in every form of the operators.

use maskalign_engine::{Context, Tape};
use maskalign_registry::LossTag;

use super::{Faults, ROUND_OFF, built, composed, fused, matrix, normal, relative_difference};
use maskalign_core::{components::losses::Loss, error::Result};

/// Rows and channels, odd ones among them.
const SHAPES: [(usize, usize); 4] = [(1, 2), (5, 7), (3, 16), (2, 33)];
/// Half the step of a central difference; large, because values are in single precision.
const STEP: f32 = 1e-2;

pub(super) fn check(text: &str, faults: &mut Faults) {
    let Some(loss) = built::<LossTag>(text, faults) else { return };
    for (rows, columns) in SHAPES {
        if let Err(error) = check_shape(&*loss, rows, columns, faults) {
            faults.add(format_args!("on {rows} rows of {columns} channels: {error}"));
        }
    }
}

fn check_shape(loss: &dyn Loss, rows: usize, columns: usize, faults: &mut Faults) -> Result<()> {
    let size = format!("on {rows} rows of {columns} channels");
    let target = normal("target", rows * columns);
    // Farther from the target than a finite difference reaches, so that a kink there is not stepped over.
    let far = |(t, d): (&f32, f32)| t + d + 2.0 * STEP * d.signum();
    let prediction: Vec<f32> = target.iter().zip(normal("prediction", rows * columns)).map(far).collect();
    let value = |cx: &Context, prediction: &[f32]| -> Result<f32> {
        let (x, t) = (matrix(rows, columns, prediction.to_vec()), matrix(rows, columns, target.clone()));
        Ok(loss.term(cx, &mut Tape::inference(), &x, &t)?.value())
    };
    let with_gradient = |cx: &Context| -> Result<(f32, Vec<f32>)> {
        let (x, t) = (matrix(rows, columns, prediction.clone()).tracked(), matrix(rows, columns, target.clone()));
        let mut recorder = Tape::training();
        let term = loss.term(cx, &mut recorder, &x, &t)?;
        let gradients = recorder.backward(&term)?;
        Ok((term.value(), gradients.to_vec(&x)))
    };

    let mut seen = Vec::new();
    for cx in [fused(), composed()] {
        let (at, analytic) = with_gradient(&cx)?;
        let name = cx.operators();
        faults.unless(at.is_finite(), format_args!("is {at} {size}"));
        faults.unless(
            with_gradient(&cx)? == (at, analytic.clone()),
            format_args!("differs from call to call {size} ({name})"),
        );
        let (apart, equal) = (value(&cx, &prediction)?, value(&cx, &target)?);
        faults.unless(
            apart.to_bits() == at.to_bits(),
            format_args!("differs with and without gradients {size} ({name})"),
        );
        faults.unless(
            equal.is_finite() && equal <= apart + 1e-6,
            format_args!("is {equal} at the target and {apart} far from it {size} ({name})"),
        );
        let numeric = differences(&prediction, |p| value(&cx, p))?;
        let largest = analytic.iter().chain(&numeric).fold(0.0, |m: f32, v| m.max(v.abs()));
        let worst = analytic.iter().zip(&numeric).map(|(a, n)| (a - n).abs()).fold(0.0, f32::max);
        faults.unless(
            worst <= 0.02 * largest + 1e-4,
            format_args!(
                "its gradient is off by {worst:.1e} (largest {largest:.1e}) from finite differences {size} ({name})"
            ),
        );
        seen.push((at, analytic));
    }
    if let [(a, da), (b, db)] = &seen[..] {
        let apart = relative_difference(&[*a], &[*b]).max(relative_difference(da, db));
        faults.unless(
            apart < ROUND_OFF,
            format_args!("differs by {apart:.1e} between the CPU's and the composed operators {size}"),
        );
    }
    Ok(())
}

/// Central differences of a function of many values.
fn differences(at: &[f32], f: impl Fn(&[f32]) -> Result<f32>) -> Result<Vec<f32>> {
    (0..at.len())
        .map(|i| {
            let moved = |by: f32| {
                let mut values = at.to_vec();
                values[i] += by;
                f(&values)
            };
            Ok((moved(STEP)? - moved(-STEP)?) / (2.0 * STEP))
        })
        .collect()
}
