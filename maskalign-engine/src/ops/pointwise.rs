//! Element-wise operators: together with those of `reduce` and `matrix`, what plugins write losses with.
//!
//! Pass [`Tensor::detached`] where an input should take no gradient.
//!
//! ```
//! use maskalign_engine::{Context, Device, Tape, ops};
//!
//! // The mean length of the rows' differences, and its gradient.
//! # fn main() -> maskalign_engine::Result<()> {
//! let cx = Context::new(Device::Cpu, 1);
//! let x = cx.tensor(vec![3.0, 4.0, 0.0, 2.0], 2, 2)?.tracked();
//! let y = cx.tensor(vec![0.0; 4], 2, 2)?;
//! let mut tape = Tape::training();
//! let difference = ops::sub(&cx, &mut tape, &x, &y)?;
//! let squares = ops::square(&cx, &mut tape, &difference)?;
//! let lengths = ops::row_sum(&cx, &mut tape, &squares)?;
//! let lengths = ops::sqrt(&cx, &mut tape, &lengths)?;
//! let loss = ops::mean(&cx, &mut tape, &lengths)?;
//! assert_eq!(loss.value(), 3.5);
//! assert_eq!(tape.backward(&loss)?.to_vec(&x), [0.3, 0.4, 0.0, 0.5]);
//! # Ok(())
//! # }
//! ```

use dfdx::prelude::{CpuError, TryAdd, TryDiv, TryMul, TrySub};
use maskalign_kernels::{elementwise as ew, for_parts};

use super::{CHUNK, add_gradient, composed_one, made_on_cpu, move_gradient, through_host_one};
use crate::{
    context::{Context, Form},
    error::Result,
    graph::{Matrix, Taped},
    tape::Tape,
    tensor::Tensor,
};

/// The result of operators of dfdx's on a matrix.
pub(super) type Pass = Result<Taped<(usize, usize), f32>, CpuError>;

/// The sum of two matrices of equal shape.
///
/// # Errors
/// Out of memory on the device, here and below.
///
/// # Panics
/// The shapes differ, here and below.
pub fn add(cx: &Context, tape: &mut Tape, x: &Tensor, y: &Tensor) -> Result<Tensor> {
    same_shape(x, y);
    match cx.form("add", &[x, y])? {
        Form::Composed => composed_one(cx, tape, &[x, y], |g, m| g.run(&m[0], |x| x.try_add(m[1].clone()))),
        Form::Gpu => add_on_gpu(cx, tape, x, y),
        Form::Cpu => {
            let records = tape.wants(&[x, y]);
            let (rows, columns) = x.shape();
            let mut sum = vec![0.0; rows * columns];
            ew::add(cx.pool(), x.cpu(), y.cpu(), &mut sum);
            let sum = made_on_cpu(cx, sum, rows, columns, records)?;
            if records {
                let (pool, _) = cx.handles();
                let (x, y, out) = (x.wanted(), y.wanted(), sum.slot());
                tape.record(move |g| {
                    let Some(d) = g.take_cpu(&out) else { return Ok(()) };
                    add_gradient(g, &pool, x.as_ref(), &d);
                    move_gradient(g, &pool, y.as_ref(), d)
                });
            }
            Ok(sum)
        }
    }
}

fn add_on_gpu(cx: &Context, tape: &mut Tape, x: &Tensor, y: &Tensor) -> Result<Tensor> {
    use crate::{tape::Gradient, tensor::Place};
    let (Place::Gpu(a), Place::Gpu(b)) = (&x.place, &y.place) else {
        unreachable!("the GPU's form of an operator is given the GPU's tensors")
    };
    let records = tape.wants(&[x, y]);
    let sum = Tensor::at(Place::Gpu(a.gpu().add(a, b)?), x.rows(), x.columns()).tracked_if(records);
    debug_assert!(sum.is_on(cx.device()));
    cx.made(&sum);
    if records {
        let (x, y, out) = (x.wanted(), y.wanted(), sum.slot());
        tape.record(move |g| {
            let Some(Gradient::Gpu(d)) = g.take(&out) else { return Ok(()) };
            // Arrays never change: both gradients may be this one.
            [x, y].iter().flatten().try_for_each(|slot| g.add(slot, Gradient::Gpu(d.clone())))
        });
    }
    Ok(sum)
}

/// The difference of two matrices of equal shape.
///
/// # Errors
/// As [`add`].
pub fn sub(cx: &Context, tape: &mut Tape, x: &Tensor, y: &Tensor) -> Result<Tensor> {
    binary(cx, tape, "sub", [x, y], |x, y| x.try_sub(y), |x, y| x - y, |_, _| (1.0, -1.0))
}

/// The element-wise product of two matrices.
///
/// # Errors
/// As [`add`].
pub fn mul(cx: &Context, tape: &mut Tape, x: &Tensor, y: &Tensor) -> Result<Tensor> {
    binary(cx, tape, "mul", [x, y], |x, y| x.try_mul(y), |x, y| x * y, |x, y| (y, x))
}

/// The element-wise quotient of two matrices.
///
/// # Errors
/// As [`add`].
pub fn div(cx: &Context, tape: &mut Tape, x: &Tensor, y: &Tensor) -> Result<Tensor> {
    binary(cx, tape, "div", [x, y], |x, y| x.try_div(y), |x, y| x / y, |x, y| (1.0 / y, -x / (y * y)))
}

/// The element-wise maximum of two matrices; where they are equal, each takes half of the gradient.
///
/// # Errors
/// As [`add`].
pub fn maximum(cx: &Context, tape: &mut Tape, x: &Tensor, y: &Tensor) -> Result<Tensor> {
    binary(cx, tape, "maximum", [x, y], |x, y| x.try_maximum(y), |x, y| x.max(y), |x, y| halves(x > y, x < y))
}

/// The element-wise minimum of two matrices; where they are equal, each takes half of the gradient.
///
/// # Errors
/// As [`add`].
pub fn minimum(cx: &Context, tape: &mut Tape, x: &Tensor, y: &Tensor) -> Result<Tensor> {
    binary(cx, tape, "minimum", [x, y], |x, y| x.try_minimum(y), |x, y| x.min(y), |x, y| halves(x < y, x > y))
}

/// Every value times `factor`.
///
/// # Errors
/// As [`add`].
pub fn scale(cx: &Context, tape: &mut Tape, x: &Tensor, factor: f32) -> Result<Tensor> {
    unary(cx, tape, "scale", x, |x| x.try_mul(factor), move |x| x * factor, move |_, _| factor)
}

/// Every value plus `term`.
///
/// # Errors
/// As [`add`].
pub fn add_scalar(cx: &Context, tape: &mut Tape, x: &Tensor, term: f32) -> Result<Tensor> {
    unary(cx, tape, "add_scalar", x, |x| x.try_add(term), move |x| x + term, move |_, _| 1.0)
}

/// Every value negated.
///
/// # Errors
/// As [`add`].
pub fn neg(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    unary(cx, tape, "neg", x, |x| x.try_negate(), |x| -x, |_, _| -1.0)
}

/// The square of every value.
///
/// # Errors
/// As [`add`].
pub fn square(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    unary(cx, tape, "square", x, |x| x.try_square(), |x| x * x, |x, _| 2.0 * x)
}

/// The square root of every value.
///
/// # Errors
/// As [`add`].
pub fn sqrt(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    unary(cx, tape, "sqrt", x, |x| x.try_sqrt(), |x| x.sqrt(), |_, y| 0.5 / y)
}

/// The absolute value of every value; the derivative at 0 is 0.
///
/// # Errors
/// As [`add`].
pub fn abs(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    unary(cx, tape, "abs", x, |x| x.try_abs(), |x| x.abs(), |x, _| sign(x))
}

/// The exponential of every value.
///
/// # Errors
/// As [`add`].
pub fn exp(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    unary(cx, tape, "exp", x, |x| x.try_exp(), |x| x.exp(), |_, y| y)
}

/// The natural logarithm of every value.
///
/// # Errors
/// As [`add`].
pub fn ln(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    unary(cx, tape, "ln", x, |x| x.try_ln(), |x| x.ln(), |x, _| 1.0 / x)
}

/// Every value to a power; values must be positive if `exponent` is not a whole number.
///
/// # Errors
/// As [`add`].
pub fn powf(cx: &Context, tape: &mut Tape, x: &Tensor, exponent: f32) -> Result<Tensor> {
    unary(
        cx,
        tape,
        "powf",
        x,
        |x| x.try_powf(exponent),
        move |x| x.powf(exponent),
        move |x, _| exponent * x.powf(exponent - 1.0),
    )
}

/// Every value clamped to `min..=max`; the derivative is 1 inside the range and 0 outside.
///
/// # Errors
/// As [`add`].
pub fn clamp(cx: &Context, tape: &mut Tape, x: &Tensor, min: f32, max: f32) -> Result<Tensor> {
    unary(
        cx,
        tape,
        "clamp",
        x,
        |x| x.try_clamp(min, max),
        move |x| x.clamp(min, max),
        move |x, _| f32::from((min..=max).contains(&x)),
    )
}

/// ReLU: every value, or 0 where it is negative; the derivative at 0 is 0.
///
/// # Errors
/// As [`add`].
pub fn relu(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    unary(cx, tape, "relu", x, |x| x.try_relu(), |x| x.max(0.0), |x, _| f32::from(x > 0.0))
}

/// `1 / (1 + exp(-x))` of every value.
///
/// # Errors
/// As [`add`].
pub fn sigmoid(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    unary(cx, tape, "sigmoid", x, |x| x.try_sigmoid(), |x| 1.0 / (1.0 + (-x).exp()), |_, y| y * (1.0 - y))
}

/// The hyperbolic tangent of every value.
///
/// # Errors
/// As [`add`].
pub fn tanh(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    unary(cx, tape, "tanh", x, |x| x.try_tanh(), |x| x.tanh(), |_, y| 1.0 - y * y)
}

/// `sum_i weights[i] x[i]` of matrices of equal shape, without a gradient.
///
/// # Errors
/// As [`add`].
pub fn weighted_mean(cx: &Context, x: &[&Tensor], weights: &[f32]) -> Result<Tensor> {
    assert_eq!(x.len(), weights.len(), "there is a weight for each matrix");
    let off = &mut Tape::inference();
    match cx.form("weighted_mean", x)? {
        Form::Composed => composed_one(cx, off, x, |_, m| {
            let mut total = m[0].clone().try_mul(weights[0])?;
            for (x, &weight) in m.iter().zip(weights).skip(1) {
                total.try_axpy(1.0, x, weight)?;
            }
            Ok(total)
        }),
        Form::Gpu => through_host_one(cx, off, "weighted_mean", x, |cx, _, copies| {
            weighted_mean(cx, &copies.iter().collect::<Vec<_>>(), weights)
        }),
        Form::Cpu => {
            let (rows, columns) = x[0].shape();
            let mut mean = vec![0.0; rows * columns];
            for (x, &weight) in x.iter().zip(weights) {
                ew::axpy(cx.pool(), weight, x.cpu(), &mut mean);
            }
            cx.output(mean, rows, columns)
        }
    }
}

fn same_shape(x: &Tensor, y: &Tensor) {
    assert_eq!(x.shape(), y.shape(), "both matrices have one shape");
}

/// 1, 0 or -1.
fn sign(x: f32) -> f32 {
    f32::from(x > 0.0) - f32::from(x < 0.0)
}

/// The derivatives with respect to the first and the second of two values, of which one was chosen.
fn halves(first: bool, second: bool) -> (f32, f32) {
    let slope = |mine: bool, other: bool| 0.5 * (1.0 + f32::from(mine) - f32::from(other));
    (slope(first, second), slope(second, first))
}

/// An element-wise operator: its composed form, its value at `x`, and its derivative there, from `x` and the value.
fn unary(
    cx: &Context,
    tape: &mut Tape,
    op: &'static str,
    x: &Tensor,
    composed: impl FnOnce(Taped<(usize, usize), f32>) -> Pass,
    value: impl Fn(f32) -> f32 + Sync,
    slope: impl Fn(f32, f32) -> f32 + Sync + 'static,
) -> Result<Tensor> {
    match cx.form(op, &[x])? {
        Form::Composed => composed_one(cx, tape, &[x], |g, m| g.run(&m[0], composed)),
        Form::Gpu => {
            through_host_one(cx, tape, op, &[x], |cx, tape, copies| unary_on_cpu(cx, tape, &copies[0], value, slope))
        }
        Form::Cpu => unary_on_cpu(cx, tape, x, value, slope),
    }
}

fn unary_on_cpu(
    cx: &Context,
    tape: &mut Tape,
    x: &Tensor,
    value: impl Fn(f32) -> f32 + Sync,
    slope: impl Fn(f32, f32) -> f32 + Sync + 'static,
) -> Result<Tensor> {
    let records = tape.wants(&[x]);
    let (rows, columns) = x.shape();
    let mut y = vec![0.0; x.len()];
    let from = x.cpu();
    for_parts(cx.pool(), &mut y, CHUNK, |start, y| {
        y.iter_mut().zip(&from[start..]).for_each(|(y, x)| *y = value(*x));
    });
    let y = made_on_cpu(cx, y, rows, columns, records)?;
    if records {
        let (pool, _) = cx.handles();
        let (x, kept, out) = (x.clone(), y.clone(), y.slot());
        tape.record(move |g| {
            let Some(mut d) = g.take_cpu(&out) else { return Ok(()) };
            let (from, to) = (x.cpu(), kept.cpu());
            for_parts(&pool, &mut d, CHUNK, |start, d| {
                let pairs = from[start..].iter().zip(&to[start..]);
                d.iter_mut().zip(pairs).for_each(|(d, (x, y))| *d *= slope(*x, *y));
            });
            move_gradient(g, &pool, x.wanted().as_ref(), d)
        });
    }
    Ok(y)
}

/// As [`unary`], for two matrices of equal shape: `slopes` gives the derivative with respect to each.
fn binary(
    cx: &Context,
    tape: &mut Tape,
    op: &'static str,
    [x, y]: [&Tensor; 2],
    composed: impl FnOnce(Taped<(usize, usize), f32>, Matrix) -> Pass,
    value: impl Fn(f32, f32) -> f32 + Sync,
    slopes: impl Fn(f32, f32) -> (f32, f32) + Sync + 'static,
) -> Result<Tensor> {
    same_shape(x, y);
    match cx.form(op, &[x, y])? {
        Form::Composed => composed_one(cx, tape, &[x, y], |g, m| {
            let y = m[1].clone();
            g.run(&m[0], |x| composed(x, y))
        }),
        Form::Gpu => through_host_one(cx, tape, op, &[x, y], |cx, tape, copies| {
            binary_on_cpu(cx, tape, [&copies[0], &copies[1]], value, slopes)
        }),
        Form::Cpu => binary_on_cpu(cx, tape, [x, y], value, slopes),
    }
}

fn binary_on_cpu(
    cx: &Context,
    tape: &mut Tape,
    [x, y]: [&Tensor; 2],
    value: impl Fn(f32, f32) -> f32 + Sync,
    slopes: impl Fn(f32, f32) -> (f32, f32) + Sync + 'static,
) -> Result<Tensor> {
    let records = tape.wants(&[x, y]);
    let (rows, columns) = x.shape();
    let mut z = vec![0.0; x.len()];
    let (a, b) = (x.cpu(), y.cpu());
    for_parts(cx.pool(), &mut z, CHUNK, |start, z| {
        let pairs = a[start..].iter().zip(&b[start..]);
        z.iter_mut().zip(pairs).for_each(|(z, (a, b))| *z = value(*a, *b));
    });
    let z = made_on_cpu(cx, z, rows, columns, records)?;
    if records {
        let (pool, _) = cx.handles();
        let (x, y, out) = (x.clone(), y.clone(), z.slot());
        tape.record(move |g| {
            let Some(mut d) = g.take_cpu(&out) else { return Ok(()) };
            let (a, b) = (x.cpu(), y.cpu());
            let times = |d: &mut [f32], start: usize, slope: &dyn Fn(f32, f32) -> f32| {
                let pairs = a[start..].iter().zip(&b[start..]);
                d.iter_mut().zip(pairs).for_each(|(d, (a, b))| *d *= slope(*a, *b));
            };
            if let Some(slot) = x.wanted() {
                let mut d = if y.is_tracked() { d.clone() } else { std::mem::take(&mut d) };
                for_parts(&pool, &mut d, CHUNK, |start, d| times(d, start, &|a, b| slopes(a, b).0));
                move_gradient(g, &pool, Some(&slot), d)?;
            }
            if let Some(slot) = y.wanted() {
                for_parts(&pool, &mut d, CHUNK, |start, d| times(d, start, &|a, b| slopes(a, b).1));
                move_gradient(g, &pool, Some(&slot), d)?;
            }
            Ok(())
        });
    }
    Ok(z)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{Input, forms, forms_and_slopes, input};

    type Unary = fn(&Context, &mut Tape, &Tensor) -> Result<Tensor>;
    type Binary = fn(&Context, &mut Tape, &Tensor, &Tensor) -> Result<Tensor>;

    /// Values that are not near a kink.
    fn away_from_zero(key: &str, rows: usize, columns: usize) -> Input {
        input(key, rows, columns).map(|v| v + 0.1f32.copysign(v))
    }

    #[test]
    fn operators_on_one_matrix_agree_in_their_forms_and_with_their_slopes() {
        let all: [(&'static str, Unary); 13] = [
            ("scale", |cx, tape, x| scale(cx, tape, x, -2.5)),
            ("add_scalar", |cx, tape, x| add_scalar(cx, tape, x, 0.75)),
            ("neg", neg),
            ("square", square),
            ("sqrt", sqrt),
            ("abs", abs),
            ("exp", exp),
            ("ln", ln),
            ("powf", |cx, tape, x| powf(cx, tape, x, 2.5)),
            ("clamp", |cx, tape, x| clamp(cx, tape, x, -0.05, 1.05)),
            ("relu", relu),
            ("sigmoid", sigmoid),
            ("tanh", tanh),
        ];
        for (op, f) in all {
            for (rows, columns) in [(1, 1), (5, 7), (131, 257)] {
                let mut x = away_from_zero("x", rows, columns);
                match op {
                    "sqrt" | "ln" | "powf" => x = x.map(|v| 0.5 + v.abs()),
                    "clamp" => x = x.map(|v| if (v - 1.05).abs() < 0.02 { 1.2 } else { v }),
                    _ => {}
                }
                match rows {
                    131 => forms(op, &[x], |cx, tape, x| Ok(vec![f(cx, tape, &x[0])?])),
                    _ => forms_and_slopes(op, &[x], |cx, tape, x| Ok(vec![f(cx, tape, &x[0])?])),
                }
            }
        }
    }

    #[test]
    fn operators_on_two_matrices_agree_in_their_forms_and_with_their_slopes() {
        let all: [(&'static str, Binary); 6] =
            [("add", add), ("sub", sub), ("mul", mul), ("div", div), ("maximum", maximum), ("minimum", minimum)];
        for (op, f) in all {
            let y = away_from_zero("y", 5, 7).map(|v| v + 0.5f32.copysign(v));
            forms_and_slopes(op, &[input("x", 5, 7), y], |cx, tape, x| Ok(vec![f(cx, tape, &x[0], &x[1])?]));
            let y = away_from_zero("y", 131, 257);
            forms(op, &[input("x", 131, 257), y], |cx, tape, x| Ok(vec![f(cx, tape, &x[0], &x[1])?]));
        }
        // One tensor in both places.
        for (op, f) in [("add", add as Binary), ("mul", mul), ("maximum", maximum)] {
            forms_and_slopes(op, &[input("x", 3, 5)], |cx, tape, x| Ok(vec![f(cx, tape, &x[0], &x[0])?]));
        }
    }

    #[test]
    fn weighted_means_agree_in_their_forms() {
        let all = ["a", "b", "c"].map(|key| input(key, 7, 33).constant());
        forms("weighted_mean", &all, |cx, _, x| {
            Ok(vec![weighted_mean(cx, &x.iter().collect::<Vec<_>>(), &[0.2, -1.5, 0.75])?])
        });
    }
}
