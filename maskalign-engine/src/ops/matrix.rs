//! Products of two matrices, transposes, and the selection and concatenation of columns.

use std::ops::Range;

use dfdx::prelude::{Axes2, Axis, OwnedTape, PermuteTo, PutTape, TryConcatAlong, TryMatMul};
use maskalign_kernels::{Epilogue, MatRef, Pool, Rhs, gemm};

use super::{attention, composed_one, made_on_cpu, move_gradient, through_host_one};
use crate::{
    context::{Context, Form},
    error::Result,
    tape::{Gradient, Tape},
    tensor::Tensor,
};

/// The product `x y`: `[n, k] x [k, m] -> [n, m]`.
///
/// # Errors
/// Out of memory on the device, here and below.
///
/// # Panics
/// The shapes do not fit, here and below.
pub fn matmul(cx: &Context, tape: &mut Tape, x: &Tensor, y: &Tensor) -> Result<Tensor> {
    product(cx, tape, [x, y], Right::AsItIs)
}

/// The product `x y^T`, each row of `x` with each row of `y`: `[n, k] x [m, k] -> [n, m]`. For rows of unit length
/// ([`normalize_rows`](super::normalize_rows)) these are the cosine similarities of contrastive losses.
///
/// # Errors
/// As [`matmul`].
pub fn matmul_transposed(cx: &Context, tape: &mut Tape, x: &Tensor, y: &Tensor) -> Result<Tensor> {
    product(cx, tape, [x, y], Right::Transposed)
}

/// How the right operand of a product is taken.
#[derive(Clone, Copy, PartialEq)]
enum Right {
    AsItIs,
    Transposed,
}

fn product(cx: &Context, tape: &mut Tape, [x, y]: [&Tensor; 2], right: Right) -> Result<Tensor> {
    let (op, inner, outputs) = match right {
        Right::AsItIs => ("matmul", y.rows(), y.columns()),
        Right::Transposed => ("matmul_transposed", y.columns(), y.rows()),
    };
    assert_eq!(x.columns(), inner, "rows of the left operand are as long as the sums");
    match cx.form(op, &[x, y])? {
        Form::Composed => composed_one(cx, tape, &[x, y], |g, m| {
            let y = m[1].clone();
            match right {
                Right::AsItIs => g.run(&m[0], |x| x.try_matmul(y)),
                Right::Transposed => g.run(&m[0], |x| x.try_matmul(y.try_permute::<(usize, usize), Axes2<1, 0>>()?)),
            }
        }),
        Form::Gpu => through_host_one(cx, tape, op, &[x, y], |cx, tape, copies| {
            product(cx, tape, [&copies[0], &copies[1]], right)
        }),
        Form::Cpu => {
            let records = tape.wants(&[x, y]);
            let rows = x.rows();
            let values = multiply(cx.pool(), (rows, inner, outputs), view(x), turned(view(y), right));
            let z = made_on_cpu(cx, values, rows, outputs, records)?;
            if records {
                let (pool, _) = cx.handles();
                let (x, y, out) = (x.clone(), y.clone(), z.slot());
                tape.record(move |g| {
                    let Some(d) = g.take_cpu(&out) else { return Ok(()) };
                    let d = MatRef::row_major(&d, outputs);
                    if let Some(slot) = x.wanted() {
                        let dx = multiply(&pool, (rows, outputs, inner), d, turned(view(&y), right).t());
                        move_gradient(g, &pool, Some(&slot), dx)?;
                    }
                    if let Some(slot) = y.wanted() {
                        let dy = match right {
                            Right::AsItIs => multiply(&pool, (inner, rows, outputs), view(&x).t(), d),
                            Right::Transposed => multiply(&pool, (outputs, rows, inner), d.t(), view(&x)),
                        };
                        move_gradient(g, &pool, Some(&slot), dy)?;
                    }
                    Ok(())
                });
            }
            Ok(z)
        }
    }
}

fn view(x: &Tensor) -> MatRef<'_> {
    MatRef::row_major(x.cpu(), x.columns())
}

fn turned(y: MatRef<'_>, right: Right) -> MatRef<'_> {
    match right {
        Right::AsItIs => y,
        Right::Transposed => y.t(),
    }
}

/// `a b` of `[m, k]` and `[k, n]`.
fn multiply(pool: &Pool, (m, k, n): (usize, usize, usize), a: MatRef, b: MatRef) -> Vec<f32> {
    let mut c = vec![0.0; m * n];
    gemm(pool, m, n, k, a, Rhs::Strided(b), &mut c, n, Epilogue::default());
    c
}

/// The transpose: `[rows, columns] -> [columns, rows]`.
///
/// # Errors
/// As [`matmul`].
pub fn transposed(cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
    fn turn(x: &[f32], columns: usize) -> Vec<f32> {
        (0..columns).flat_map(|j| x.iter().skip(j).step_by(columns).copied()).collect()
    }
    let op = "transposed";
    match cx.form(op, &[x])? {
        Form::Composed => {
            composed_one(cx, tape, &[x], |g, m| g.run(&m[0], |x| x.try_permute::<(usize, usize), Axes2<1, 0>>()))
        }
        Form::Gpu => through_host_one(cx, tape, op, &[x], |cx, tape, copies| transposed(cx, tape, &copies[0])),
        Form::Cpu => {
            let records = tape.wants(&[x]);
            let (rows, columns) = x.shape();
            let y = made_on_cpu(cx, turn(x.cpu(), columns), columns, rows, records)?;
            if records {
                let (pool, _) = cx.handles();
                let (x, out) = (x.wanted(), y.slot());
                tape.record(move |g| {
                    let Some(d) = g.take_cpu(&out) else { return Ok(()) };
                    move_gradient(g, &pool, x.as_ref(), turn(&d, rows))
                });
            }
            Ok(y)
        }
    }
}

/// A range of columns: `[rows, columns] -> [rows, range]`.
///
/// # Errors
/// As [`matmul`].
pub fn slice_columns(cx: &Context, tape: &mut Tape, x: &Tensor, range: Range<usize>) -> Result<Tensor> {
    let (rows, columns) = x.shape();
    assert!(range.start < range.end && range.end <= columns, "columns {range:?} of {columns}");
    let op = "slice_columns";
    match cx.form(op, &[x])? {
        Form::Composed => composed_one(cx, tape, &[x], |g, m| attention::columns(g, &m[0], range)),
        Form::Gpu => {
            through_host_one(cx, tape, op, &[x], |cx, tape, copies| slice_columns(cx, tape, &copies[0], range))
        }
        Form::Cpu => {
            let records = tape.wants(&[x]);
            let width = range.len();
            let y = x.cpu().chunks_exact(columns).flat_map(|row| &row[range.clone()]).copied().collect();
            let y = made_on_cpu(cx, y, rows, width, records)?;
            if records {
                let (x, out) = (x.slot(), y.slot());
                tape.record(move |g| {
                    let Some(d) = g.take_cpu(&out) else { return Ok(()) };
                    for (dx, d) in g.cpu_mut(&x).chunks_exact_mut(columns).zip(d.chunks_exact(width)) {
                        dx[range.clone()].iter_mut().zip(d).for_each(|(dx, d)| *dx += d);
                    }
                    Ok(())
                });
            }
            Ok(y)
        }
    }
}

/// Matrices with the same number of rows, concatenated along their columns:
/// `[rows, a], [rows, b], ... -> [rows, a + b + ...]`.
///
/// # Errors
/// As [`matmul`].
pub fn concat_columns(cx: &Context, tape: &mut Tape, sources: &[&Tensor]) -> Result<Tensor> {
    let rows = sources[0].rows();
    assert!(sources.iter().all(|x| x.rows() == rows), "matrices side by side have equally many rows");
    let op = "concat_columns";
    match cx.form(op, sources)? {
        Form::Composed => composed_one(cx, tape, sources, |g, m| {
            let mut all = m[0].clone();
            for next in &m[1..] {
                let next = next.clone().put_tape(OwnedTape::default());
                all = g.run(&all, |all| (all, next).try_concat_along(Axis::<1>))?;
            }
            Ok(all)
        }),
        Form::Gpu => through_host_one(cx, tape, op, sources, |cx, tape, copies| {
            concat_columns(cx, tape, &copies.iter().collect::<Vec<_>>())
        }),
        Form::Cpu => {
            let records = tape.wants(sources);
            let columns = sources.iter().map(|x| x.columns()).sum();
            let mut y = Vec::with_capacity(rows * columns);
            for row in 0..rows {
                for x in sources {
                    y.extend_from_slice(&x.cpu()[row * x.columns()..][..x.columns()]);
                }
            }
            let y = made_on_cpu(cx, y, rows, columns, records)?;
            if records {
                let sources: Vec<_> = sources.iter().map(|x| (x.wanted(), x.columns())).collect();
                let out = y.slot();
                tape.record(move |g| {
                    let Some(d) = g.take_cpu(&out) else { return Ok(()) };
                    let mut start = 0;
                    for (slot, width) in sources {
                        if let Some(slot) = slot {
                            let part = d.chunks_exact(columns).flat_map(|row| &row[start..start + width]);
                            g.add(&slot, Gradient::Cpu(part.copied().collect()))?;
                        }
                        start += width;
                    }
                    Ok(())
                });
            }
            Ok(y)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{forms, forms_and_slopes, input};

    #[test]
    fn products_agree_in_their_forms_and_with_their_slopes() {
        for (n, k, m) in [(1, 1, 1), (3, 5, 4), (4, 4, 4)] {
            forms_and_slopes("matmul", &[input("x", n, k), input("y", k, m)], |cx, tape, x| {
                Ok(vec![matmul(cx, tape, &x[0], &x[1])?])
            });
            forms_and_slopes("matmul_transposed", &[input("x", n, k), input("y", m, k)], |cx, tape, x| {
                Ok(vec![matmul_transposed(cx, tape, &x[0], &x[1])?])
            });
        }
        forms("matmul", &[input("x", 37, 65), input("y", 65, 131)], |cx, tape, x| {
            Ok(vec![matmul(cx, tape, &x[0], &x[1])?])
        });
        forms("matmul_transposed", &[input("x", 37, 65), input("y", 131, 65)], |cx, tape, x| {
            Ok(vec![matmul_transposed(cx, tape, &x[0], &x[1])?])
        });
        forms_and_slopes("matmul_transposed", &[input("x", 5, 3)], |cx, tape, x| {
            Ok(vec![matmul_transposed(cx, tape, &x[0], &x[0])?])
        });
    }

    #[test]
    fn rearranged_matrices_agree_in_their_forms_and_with_their_slopes() {
        for (rows, columns) in [(1, 4), (5, 7), (33, 65)] {
            forms_and_slopes("transposed", &[input("x", rows, columns)], |cx, tape, x| {
                Ok(vec![transposed(cx, tape, &x[0])?])
            });
            for range in [0..columns, 1..3, columns - 1..columns] {
                forms_and_slopes("slice_columns", &[input("x", rows, columns)], |cx, tape, x| {
                    Ok(vec![slice_columns(cx, tape, &x[0], range.clone())?])
                });
            }
        }
        let all = [input("x", 5, 2), input("y", 5, 7), input("z", 5, 7)];
        forms_and_slopes("concat_columns", &all, |cx, tape, x| {
            Ok(vec![concat_columns(cx, tape, &x.iter().collect::<Vec<_>>())?])
        });
        forms_and_slopes("concat_columns", &all[..1], |cx, tape, x| {
            Ok(vec![concat_columns(cx, tape, &[&x[0], &x[0]])?])
        });
    }
}
