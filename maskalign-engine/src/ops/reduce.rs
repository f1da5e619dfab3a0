//! Sums, means and maxima of rows and columns, softmax, and broadcasts of rows and columns.

use dfdx::prelude::{Axis, BroadcastTo, HasShape, MaxTo, MeanTo, ReshapeTo, SumTo, TryMul};
use maskalign_kernels::{Pool, for_parts};

use super::{
    CHUNK, Standardize, composed_one, loss::contiguous_log_softmax, made_on_cpu, move_gradient,
    norm::composed_standardize, through_host_one,
};
use crate::{
    context::{Context, Form},
    error::Result,
    graph::{Graph, Matrix},
    tape::Tape,
    tensor::Tensor,
};

/// The softmax of each row.
///
/// # Errors
/// Out of memory on the device, here and below.
pub fn softmax(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    let operator = ByRows {
        op: "softmax",
        width: x.columns(),
        composed: |g: &mut Graph, x: &Matrix| g.run(x, |x| contiguous_log_softmax(x)?.try_exp()),
        value: |x: &[f32], y: &mut [f32]| {
            let shift = log_sum_exp(x);
            y.iter_mut().zip(x).for_each(|(y, x)| *y = (x - shift).exp());
        },
        gradient: |_: &[f32], y: &[f32], d: &[f32], dx: &mut [f32]| {
            let along = total(y.len(), |i| d[i] * y[i]) as f32;
            dx.iter_mut().zip(y.iter().zip(d)).for_each(|(dx, (y, d))| *dx = y * (d - along));
        },
    };
    by_rows(cx, tape, x, operator)
}

/// The logarithm of the softmax of each row.
///
/// # Errors
/// As [`softmax`].
pub fn log_softmax(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    let operator = ByRows {
        op: "log_softmax",
        width: x.columns(),
        composed: |g: &mut Graph, x: &Matrix| g.run(x, contiguous_log_softmax),
        value: |x: &[f32], y: &mut [f32]| {
            let shift = log_sum_exp(x);
            y.iter_mut().zip(x).for_each(|(y, x)| *y = x - shift);
        },
        gradient: |_: &[f32], y: &[f32], d: &[f32], dx: &mut [f32]| {
            let sum = total(d.len(), |i| d[i]) as f32;
            dx.iter_mut().zip(y.iter().zip(d)).for_each(|(dx, (y, d))| *dx = d - y.exp() * sum);
        },
    };
    by_rows(cx, tape, x, operator)
}

/// Each row scaled to unit length (PyTorch's `F.normalize`): divided by its L2 norm, or by 1e-12 if that is larger.
///
/// # Errors
/// As [`softmax`].
pub fn normalize_rows(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    const EPS: f32 = 1e-12;
    fn length(x: &[f32]) -> f32 {
        total(x.len(), |i| x[i] * x[i]).sqrt() as f32
    }
    let operator = ByRows {
        op: "normalize_rows",
        width: x.columns(),
        composed: |g: &mut Graph, x: &Matrix| composed_standardize(g, x, Standardize::Length),
        value: |x: &[f32], y: &mut [f32]| {
            let length = length(x).max(EPS);
            y.iter_mut().zip(x).for_each(|(y, x)| *y = x / length);
        },
        gradient: |x: &[f32], y: &[f32], d: &[f32], dx: &mut [f32]| {
            let length = length(x);
            let along = if length < EPS { 0.0 } else { total(y.len(), |i| d[i] * y[i]) as f32 };
            dx.iter_mut().zip(y.iter().zip(d)).for_each(|(dx, (y, d))| *dx = (d - y * along) / length.max(EPS));
        },
    };
    by_rows(cx, tape, x, operator)
}

/// Each row's sum: `[rows, columns] -> [rows, 1]`.
///
/// # Errors
/// As [`softmax`].
pub fn row_sum(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    let operator = ByRows {
        op: "row_sum",
        width: 1,
        composed: |g: &mut Graph, x: &Matrix| {
            let rows = x.shape().0;
            g.run(x, |x| x.try_sum::<(usize,), Axis<1>>()?.try_reshape_like(&(rows, 1)))
        },
        value: |x: &[f32], y: &mut [f32]| y[0] = total(x.len(), |i| x[i]) as f32,
        gradient: |_: &[f32], _: &[f32], d: &[f32], dx: &mut [f32]| dx.fill(d[0]),
    };
    by_rows(cx, tape, x, operator)
}

/// Each row's mean: `[rows, columns] -> [rows, 1]`.
///
/// # Errors
/// As [`softmax`].
pub fn row_mean(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    let operator = ByRows {
        op: "row_mean",
        width: 1,
        composed: |g: &mut Graph, x: &Matrix| {
            let rows = x.shape().0;
            g.run(x, |x| x.try_mean::<(usize,), Axis<1>>()?.try_reshape_like(&(rows, 1)))
        },
        value: |x: &[f32], y: &mut [f32]| y[0] = (total(x.len(), |i| x[i]) / x.len() as f64) as f32,
        gradient: |x: &[f32], _: &[f32], d: &[f32], dx: &mut [f32]| dx.fill(d[0] / x.len() as f32),
    };
    by_rows(cx, tape, x, operator)
}

/// Each row's largest value: `[rows, columns] -> [rows, 1]`. Where several values are equal, each takes the
/// whole gradient.
///
/// # Errors
/// As [`softmax`].
pub fn row_max(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    let operator = ByRows {
        op: "row_max",
        width: 1,
        composed: |g: &mut Graph, x: &Matrix| {
            let rows = x.shape().0;
            g.run(x, |x| x.try_contiguous()?.try_max::<(usize,), Axis<1>>()?.try_reshape_like(&(rows, 1)))
        },
        value: |x: &[f32], y: &mut [f32]| y[0] = x.iter().copied().fold(f32::NEG_INFINITY, f32::max),
        gradient: |x: &[f32], y: &[f32], d: &[f32], dx: &mut [f32]| {
            dx.iter_mut().zip(x).for_each(|(dx, x)| *dx = if *x == y[0] { d[0] } else { 0.0 });
        },
    };
    by_rows(cx, tape, x, operator)
}

/// A column, broadcast: `[rows, 1] -> [rows, columns]`.
///
/// # Errors
/// As [`softmax`].
///
/// # Panics
/// `x` has more than one column.
pub fn broadcast_column(cx: &Context, tape: &mut Tape, x: &Tensor, columns: usize) -> Result<Tensor> {
    assert_eq!(x.columns(), 1, "a column is one value wide");
    let operator = ByRows {
        op: "broadcast_column",
        width: columns,
        composed: |g: &mut Graph, x: &Matrix| {
            let rows = x.shape().0;
            g.run(x, |x| x.try_reshape_like(&(rows,))?.try_broadcast_like::<_, Axis<1>>(&(rows, columns)))
        },
        value: |x: &[f32], y: &mut [f32]| y.fill(x[0]),
        gradient: |_: &[f32], _: &[f32], d: &[f32], dx: &mut [f32]| dx[0] = total(d.len(), |i| d[i]) as f32,
    };
    by_rows(cx, tape, x, operator)
}

/// A row, broadcast: `[1, columns] -> [rows, columns]`.
///
/// # Errors
/// As [`softmax`].
///
/// # Panics
/// `x` has more than one row.
pub fn broadcast_row(cx: &Context, tape: &mut Tape, x: &Tensor, rows: usize) -> Result<Tensor> {
    assert_eq!(x.rows(), 1, "a row is one value high");
    let op = "broadcast_row";
    match cx.form(op, &[x])? {
        Form::Composed => composed_one(cx, tape, &[x], |g, m| super::linear::row(g, &m[0], (rows, x.columns()))),
        Form::Gpu => through_host_one(cx, tape, op, &[x], |cx, tape, copies| broadcast_row(cx, tape, &copies[0], rows)),
        Form::Cpu => {
            let records = tape.wants(&[x]);
            let columns = x.columns();
            let y = made_on_cpu(cx, x.cpu().repeat(rows), rows, columns, records)?;
            if records {
                let (pool, _) = cx.handles();
                let (x, out) = (x.wanted(), y.slot());
                tape.record(move |g| {
                    let Some(d) = g.take_cpu(&out) else { return Ok(()) };
                    let sums = column_totals(&pool, (rows, columns), 1.0, |i, _| d[i]);
                    move_gradient(g, &pool, x.as_ref(), sums)
                });
            }
            Ok(y)
        }
    }
}

/// Each column's sum: `[rows, columns] -> [1, columns]`.
///
/// # Errors
/// As [`softmax`].
pub fn column_sum(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    of_columns(cx, tape, "column_sum", x, 1.0)
}

/// Each column's mean: `[rows, columns] -> [1, columns]`.
///
/// # Errors
/// As [`softmax`].
pub fn column_mean(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    of_columns(cx, tape, "column_mean", x, 1.0 / x.rows() as f32)
}

/// The sum of all values, `[1, 1]`.
///
/// # Errors
/// As [`softmax`].
pub fn sum(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    of_all(cx, tape, "sum", x, 1.0)
}

/// The mean of all values, `[1, 1]`.
///
/// # Errors
/// As [`softmax`].
pub fn mean(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    of_all(cx, tape, "mean", x, 1.0 / x.len() as f32)
}

/// Each column's sum times `factor`.
fn of_columns(cx: &Context, tape: &mut Tape, op: &'static str, x: &Tensor, factor: f32) -> Result<Tensor> {
    let (rows, columns) = x.shape();
    match cx.form(op, &[x])? {
        Form::Composed => composed_one(cx, tape, &[x], |g, m| {
            g.run(&m[0], |x| x.try_sum::<(usize,), Axis<0>>()?.try_mul(factor)?.try_reshape_like(&(1, columns)))
        }),
        Form::Gpu => {
            through_host_one(cx, tape, op, &[x], |cx, tape, copies| of_columns(cx, tape, op, &copies[0], factor))
        }
        Form::Cpu => {
            let records = tape.wants(&[x]);
            let from = x.cpu();
            let sums = column_totals(cx.pool(), (rows, columns), f64::from(factor), |i, _| from[i]);
            let y = made_on_cpu(cx, sums, 1, columns, records)?;
            if records {
                let (pool, _) = cx.handles();
                let (x, out) = (x.wanted(), y.slot());
                tape.record(move |g| {
                    let Some(mut d) = g.take_cpu(&out) else { return Ok(()) };
                    for d in &mut d {
                        *d *= factor;
                    }
                    move_gradient(g, &pool, x.as_ref(), d.repeat(rows))
                });
            }
            Ok(y)
        }
    }
}

/// The sum of all values, times `factor`.
fn of_all(cx: &Context, tape: &mut Tape, op: &'static str, x: &Tensor, factor: f32) -> Result<Tensor> {
    match cx.form(op, &[x])? {
        Form::Composed => composed_one(cx, tape, &[x], |g, m| {
            let len = x.len();
            g.run(&m[0], |x| {
                x.try_reshape_like(&(len,))?.try_sum::<(), Axis<0>>()?.try_mul(factor)?.try_reshape_like(&(1, 1))
            })
        }),
        Form::Gpu => through_host_one(cx, tape, op, &[x], |cx, tape, copies| of_all(cx, tape, op, &copies[0], factor)),
        Form::Cpu => {
            let records = tape.wants(&[x]);
            let from = x.cpu();
            let mut parts = vec![0.0; from.len().div_ceil(CHUNK)];
            for_parts(cx.pool(), &mut parts, 1, |chunk, part| {
                let values = &from[chunk * CHUNK..from.len().min((chunk + 1) * CHUNK)];
                part[0] = total(values.len(), |i| values[i]) as f32;
            });
            let sum = total(parts.len(), |i| parts[i]) * f64::from(factor);
            let y = made_on_cpu(cx, vec![sum as f32], 1, 1, records)?;
            if records {
                let (pool, _) = cx.handles();
                let (x, len, out) = (x.wanted(), x.len(), y.slot());
                tape.record(move |g| {
                    let Some(d) = g.take_cpu(&out) else { return Ok(()) };
                    move_gradient(g, &pool, x.as_ref(), vec![d[0] * factor; len])
                });
            }
            Ok(y)
        }
    }
}

/// The sum of terms, in double precision and in an order that vectorises.
fn total(len: usize, term: impl Fn(usize) -> f32) -> f64 {
    const LANES: usize = 8;
    let mut lanes = [0.0f64; LANES];
    for start in (0..len / LANES * LANES).step_by(LANES) {
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane += f64::from(term(start + l));
        }
    }
    let rest: f64 = (len / LANES * LANES..len).map(|i| f64::from(term(i))).sum();
    lanes.iter().sum::<f64>() + rest
}

/// Each column's sum of `term(index, column)`, times `factor`, in double precision.
pub(super) fn column_totals(
    pool: &Pool,
    (rows, columns): (usize, usize),
    factor: f64,
    term: impl Fn(usize, usize) -> f32 + Sync,
) -> Vec<f32> {
    const TILE: usize = 64;
    let mut all = vec![0.0; columns];
    for_parts(pool, &mut all, TILE, |start, out| {
        let mut sums = [0.0f64; TILE];
        for row in 0..rows {
            for (j, sum) in sums[..out.len()].iter_mut().enumerate() {
                *sum += f64::from(term(row * columns + start + j, start + j));
            }
        }
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out = (sum * factor) as f32);
    });
    all
}

/// Logarithm of the sum of exponentials.
fn log_sum_exp(x: &[f32]) -> f32 {
    let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    largest + total(x.len(), |i| (x[i] - largest).exp()).ln() as f32
}

/// An operator that computes each row of the output, `width` values wide, from the same row of the input.
struct ByRows<C, V, G> {
    op: &'static str,
    width: usize,
    composed: C,
    /// `value(x, y)` writes to the output's row.
    value: V,
    /// `gradient(x, y, dy, dx)` writes to the gradient of the input's row, which is zeros before.
    gradient: G,
}

fn by_rows<C, V, G>(cx: &Context, tape: &mut Tape, x: &Tensor, operator: ByRows<C, V, G>) -> Result<Tensor>
where
    C: FnOnce(&mut Graph, &Matrix) -> Result<Matrix>,
    V: Fn(&[f32], &mut [f32]) + Sync,
    G: Fn(&[f32], &[f32], &[f32], &mut [f32]) + Sync + 'static,
{
    match cx.form(operator.op, &[x])? {
        Form::Composed => composed_one(cx, tape, &[x], |g, m| (operator.composed)(g, &m[0])),
        Form::Gpu => through_host_one(cx, tape, operator.op, &[x], |cx, tape, copies| {
            by_rows_on_cpu(cx, tape, &copies[0], operator)
        }),
        Form::Cpu => by_rows_on_cpu(cx, tape, x, operator),
    }
}

fn by_rows_on_cpu<C, V, G>(cx: &Context, tape: &mut Tape, x: &Tensor, operator: ByRows<C, V, G>) -> Result<Tensor>
where
    V: Fn(&[f32], &mut [f32]) + Sync,
    G: Fn(&[f32], &[f32], &[f32], &mut [f32]) + Sync + 'static,
{
    let records = tape.wants(&[x]);
    let ((rows, columns), ByRows { width, value, gradient, .. }) = (x.shape(), operator);
    let rows_of_a_part = (CHUNK / columns.max(width).max(1)).max(1);
    let mut y = vec![0.0; rows * width];
    let from = x.cpu();
    for_parts(cx.pool(), &mut y, rows_of_a_part * width.max(1), |start, y| {
        let x = from[start / width * columns..].chunks_exact(columns);
        y.chunks_exact_mut(width).zip(x).for_each(|(y, x)| value(x, y));
    });
    let y = made_on_cpu(cx, y, rows, width, records)?;
    if records {
        let (pool, _) = cx.handles();
        let (x, kept, out) = (x.clone(), y.clone(), y.slot());
        tape.record(move |g| {
            let Some(d) = g.take_cpu(&out) else { return Ok(()) };
            let mut dx = vec![0.0; rows * columns];
            for_parts(&pool, &mut dx, rows_of_a_part * columns.max(1), |start, dx| {
                let row = start / columns;
                let x = x.cpu()[start..].chunks_exact(columns);
                let y = kept.cpu()[row * width..].chunks_exact(width);
                let d = d[row * width..].chunks_exact(width);
                for (dx, ((x, y), d)) in dx.chunks_exact_mut(columns).zip(x.zip(y).zip(d)) {
                    gradient(x, y, d, dx);
                }
            });
            move_gradient(g, &pool, x.wanted().as_ref(), dx)
        });
    }
    Ok(y)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::Device,
        ops::check::{forms, forms_and_slopes, input},
    };

    type Unary = fn(&Context, &mut Tape, &Tensor) -> Result<Tensor>;

    #[test]
    fn the_forms_agree_among_each_other_and_with_the_slopes() {
        let all: [(&'static str, Unary); 10] = [
            ("softmax", softmax),
            ("log_softmax", log_softmax),
            ("normalize_rows", normalize_rows),
            ("row_sum", row_sum),
            ("row_mean", row_mean),
            ("row_max", row_max),
            ("column_sum", column_sum),
            ("column_mean", column_mean),
            ("sum", sum),
            ("mean", mean),
        ];
        for (op, f) in all {
            for (rows, columns) in [(1, 3), (5, 7), (9, 2)] {
                forms_and_slopes(op, &[input("x", rows, columns)], |cx, tape, x| Ok(vec![f(cx, tape, &x[0])?]));
            }
            forms(op, &[input("x", 131, 257)], |cx, tape, x| Ok(vec![f(cx, tape, &x[0])?]));
        }
        for (many, few) in [(1, 1), (4, 7), (300, 131)] {
            forms_and_slopes("broadcast_row", &[input("x", 1, few)], |cx, tape, x| {
                Ok(vec![broadcast_row(cx, tape, &x[0], many)?])
            });
            forms_and_slopes("broadcast_column", &[input("x", few, 1)], |cx, tape, x| {
                Ok(vec![broadcast_column(cx, tape, &x[0], many)?])
            });
        }
    }

    #[test]
    fn large_values_and_rows_of_zeros_stay_finite() {
        let cx = Context::new(Device::Cpu, 1);
        let x = cx.tensor(vec![1e4, 0.0, -1e4, 0.0, 0.0, 0.0], 2, 3).unwrap().tracked();
        for f in [softmax, log_softmax, normalize_rows] {
            let mut tape = Tape::training();
            let y = f(&cx, &mut tape, &x).unwrap();
            let loss = sum(&cx, &mut tape, &y).unwrap();
            let gradient = tape.backward(&loss).unwrap().to_vec(&x);
            assert!(y.to_vec().iter().chain(&gradient).all(|v| v.is_finite()), "{gradient:?}");
        }
    }
}
