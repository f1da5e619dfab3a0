//! Operators on single values, rows and columns: what losses of one's own are written from.
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

use dfdx::prelude::{Axis, BroadcastTo, CpuError, HasShape, MeanTo, ReshapeTo, SumTo, TryAdd, TryDiv, TryMul, TrySub};
use maskalign_kernels::elementwise as ew;

use super::{add_gradient, composed_one, loss::contiguous_log_softmax, made_on_cpu, move_gradient, through_host_one};
use crate::{Context, Matrix, Result, Tape, Tensor, context::Form, graph::Taped};

type Pass<E> = Result<Taped<(usize, usize), E>, CpuError>;

/// Sum of two matrices of equal shape.
///
/// # Errors
/// Out of memory on the device, here and below.
///
/// # Panics
/// The shapes differ, here and below.
pub fn add(cx: &Context, tape: &mut Tape, x: &Tensor, y: &Tensor) -> Result<Tensor> {
    same_shape(x, y);
    match cx.form("add", &[x, y])? {
        Form::Composed => binary(cx, tape, "add", x, y, |x, y| x.try_add(y)),
        Form::Gpu => add_on_gpu(cx, tape, x, y),
        Form::Cpu => {
            let records = tape.wants(&[x, y]);
            let (rows, columns) = x.shape();
            let mut sum = vec![0.0; rows * columns];
            ew::add(cx.pool(), x.cpu(), y.cpu(), &mut sum);
            let sum = made_on_cpu(sum, rows, columns, records)?;
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

/// Difference of two matrices of equal shape.
///
/// # Errors
/// As [`add`].
pub fn sub(cx: &Context, tape: &mut Tape, x: &Tensor, y: &Tensor) -> Result<Tensor> {
    binary(cx, tape, "sub", x, y, |x, y| x.try_sub(y))
}

/// Product of two matrices, value by value.
///
/// # Errors
/// As [`add`].
pub fn mul(cx: &Context, tape: &mut Tape, x: &Tensor, y: &Tensor) -> Result<Tensor> {
    binary(cx, tape, "mul", x, y, |x, y| x.try_mul(y))
}

/// Quotient of two matrices, value by value.
///
/// # Errors
/// As [`add`].
pub fn div(cx: &Context, tape: &mut Tape, x: &Tensor, y: &Tensor) -> Result<Tensor> {
    binary(cx, tape, "div", x, y, |x, y| x.try_div(y))
}

/// The larger of two matrices' values; where they are equal, both take half of the gradient.
///
/// # Errors
/// As [`add`].
pub fn maximum(cx: &Context, tape: &mut Tape, x: &Tensor, y: &Tensor) -> Result<Tensor> {
    binary(cx, tape, "maximum", x, y, |x, y| x.try_maximum(y))
}

/// Every value times `factor`.
///
/// # Errors
/// As [`add`].
pub fn scale(cx: &Context, tape: &mut Tape, x: &Tensor, factor: f32) -> Result<Tensor> {
    unary(cx, tape, "scale", x, |x| x.try_mul(factor))
}

/// Every value plus `term`.
///
/// # Errors
/// As [`add`].
pub fn add_scalar(cx: &Context, tape: &mut Tape, x: &Tensor, term: f32) -> Result<Tensor> {
    unary(cx, tape, "add_scalar", x, |x| x.try_add(term))
}

/// Every value's square.
///
/// # Errors
/// As [`add`].
pub fn square(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    unary(cx, tape, "square", x, |x| x.try_square())
}

/// Every value's root.
///
/// # Errors
/// As [`add`].
pub fn sqrt(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    unary(cx, tape, "sqrt", x, |x| x.try_sqrt())
}

/// Every value's magnitude; the slope at 0 is 0.
///
/// # Errors
/// As [`add`].
pub fn abs(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    unary(cx, tape, "abs", x, |x| x.try_abs())
}

/// Every value's exponential.
///
/// # Errors
/// As [`add`].
pub fn exp(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    unary(cx, tape, "exp", x, |x| x.try_exp())
}

/// Every value's natural logarithm.
///
/// # Errors
/// As [`add`].
pub fn ln(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    unary(cx, tape, "ln", x, |x| x.try_ln())
}

/// Softmax of each row.
///
/// # Errors
/// As [`add`].
pub fn softmax(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    unary(cx, tape, "softmax", x, |x| contiguous_log_softmax(x)?.try_exp())
}

/// Logarithm of the softmax of each row.
///
/// # Errors
/// As [`add`].
pub fn log_softmax(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    unary(cx, tape, "log_softmax", x, contiguous_log_softmax)
}

/// Each row's sum: `[rows, columns] -> [rows, 1]`.
///
/// # Errors
/// As [`add`].
pub fn row_sum(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    unary(cx, tape, "row_sum", x, |x| {
        let rows = x.shape().0;
        x.try_sum::<(usize,), Axis<1>>()?.try_reshape_like(&(rows, 1))
    })
}

/// Each row's mean: `[rows, columns] -> [rows, 1]`.
///
/// # Errors
/// As [`add`].
pub fn row_mean(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    unary(cx, tape, "row_mean", x, |x| {
        let rows = x.shape().0;
        x.try_mean::<(usize,), Axis<1>>()?.try_reshape_like(&(rows, 1))
    })
}

/// The sum of all values, `[1, 1]`.
///
/// # Errors
/// As [`add`].
pub fn sum(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    unary(cx, tape, "sum", x, |x| {
        let (rows, columns) = *x.shape();
        x.try_reshape_like(&(rows * columns,))?.try_sum::<(), Axis<0>>()?.try_reshape_like(&(1, 1))
    })
}

/// The mean of all values, `[1, 1]`.
///
/// # Errors
/// As [`add`].
pub fn mean(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    unary(cx, tape, "mean", x, |x| {
        let (rows, columns) = *x.shape();
        x.try_reshape_like(&(rows * columns,))?.try_mean::<(), Axis<0>>()?.try_reshape_like(&(1, 1))
    })
}

/// A column repeated: `[rows, 1] -> [rows, columns]`.
///
/// # Errors
/// As [`add`].
pub fn broadcast_column(cx: &Context, tape: &mut Tape, x: &Tensor, columns: usize) -> Result<Tensor> {
    assert_eq!(x.columns(), 1, "a column is one value wide");
    unary(cx, tape, "broadcast_column", x, |x| {
        let rows = x.shape().0;
        x.try_reshape_like(&(rows,))?.try_broadcast_like::<_, Axis<1>>(&(rows, columns))
    })
}

/// A row repeated: `[1, columns] -> [rows, columns]`.
///
/// # Errors
/// As [`add`].
pub fn broadcast_row(cx: &Context, tape: &mut Tape, x: &Tensor, rows: usize) -> Result<Tensor> {
    assert_eq!(x.rows(), 1, "a row is one value high");
    unary(cx, tape, "broadcast_row", x, |x| {
        let columns = x.shape().1;
        x.try_reshape_like(&(columns,))?.try_broadcast_like::<_, Axis<0>>(&(rows, columns))
    })
}

/// `sum_i weights[i] x[i]` of matrices of equal shape; takes no gradient.
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
            cx.tensor(mean, rows, columns)
        }
    }
}

fn same_shape(x: &Tensor, y: &Tensor) {
    assert_eq!(x.shape(), y.shape(), "both matrices have one shape");
}

/// An operator on single values that every device runs by its composed form; a GPU's tensors go by the host.
fn unary(
    cx: &Context,
    tape: &mut Tape,
    op: &'static str,
    x: &Tensor,
    f: impl FnOnce(Taped<(usize, usize), f32>) -> Pass<f32>,
) -> Result<Tensor> {
    if cx.form(op, &[x])? == Form::Gpu {
        cx.count_fallback(op);
    }
    composed_one(cx, tape, &[x], |g, m| g.run(&m[0], f))
}

/// As [`unary`], for two matrices of equal shape.
fn binary(
    cx: &Context,
    tape: &mut Tape,
    op: &'static str,
    x: &Tensor,
    y: &Tensor,
    f: impl FnOnce(Taped<(usize, usize), f32>, Matrix) -> Pass<f32>,
) -> Result<Tensor> {
    same_shape(x, y);
    if cx.form(op, &[x, y])? == Form::Gpu {
        cx.count_fallback(op);
    }
    composed_one(cx, tape, &[x, y], |g, m| {
        let y = m[1].clone();
        g.run(&m[0], |x| f(x, y))
    })
}
