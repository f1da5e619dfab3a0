//! Selection, averages and mixtures of rows.

use dfdx::prelude::{
    Axis, Cpu, Device, GatherTo, HasShape, MeanTo, OwnedTape, PutTape, ReshapeTo, TensorFromVec, TryConcatAlong,
    TryMatMul, TryStack,
};
use maskalign_kernels::elementwise::{self as ew, Write};

use super::{composed as run_composed, composed_one, made_on_cpu, through_host, through_host_one};
use crate::{
    context::{Context, Form},
    error::Result,
    graph::{Float, Graph, Matrix, Taped},
    host::cpu,
    tape::Tape,
    tensor::Tensor,
};

/// Indices into `[batch * tokens]` from token indices within each image, of which `rows` holds `rows.len() / batch` for
/// each.
pub fn flat_rows(rows: &[u32], batch: usize, tokens: usize) -> Vec<u32> {
    let each = rows.len() / batch;
    rows.iter().enumerate().map(|(i, &row)| ((i / each.max(1)) * tokens) as u32 + row).collect()
}

/// Gathers rows of several matrices of equal width, by index into their concatenation; a row may be taken many times.
///
/// # Errors
/// Out of memory on the device.
pub fn gather_rows(cx: &Context, tape: &mut Tape, sources: &[&Tensor], index: &[u32]) -> Result<Tensor> {
    match cx.form("gather_rows", sources)? {
        Form::Composed => composed_one(cx, tape, sources, |g, m| composed_gather_rows(g, m, index)),
        Form::Gpu => through_host_one(cx, tape, "gather_rows", sources, |cx, tape, copies| {
            gather_rows(cx, tape, &copies.iter().collect::<Vec<_>>(), index)
        }),
        Form::Cpu => {
            let records = tape.wants(sources);
            let columns = sources[0].columns();
            let mut y = vec![0.0; index.len() * columns];
            let slices: Vec<&[f32]> = sources.iter().map(|x| x.cpu()).collect();
            ew::gather_rows(cx.pool(), &slices, columns, index, &mut y);
            let y = made_on_cpu(cx, y, index.len(), columns, records)?;
            if records {
                let (pool, _) = cx.handles();
                let (out, index) = (y.slot(), index.to_vec());
                let sources: Vec<_> = sources.iter().map(|x| (x.wanted(), x.len())).collect();
                tape.record(move |g| {
                    let Some(dy) = g.take_cpu(&out) else { return Ok(()) };
                    let mut buffers: Vec<Vec<f32>> = sources
                        .iter()
                        .map(|(slot, len)| g.lend(slot.as_ref()).unwrap_or_else(|| vec![0.0; *len]))
                        .collect();
                    let mut targets: Vec<&mut [f32]> = buffers.iter_mut().map(Vec::as_mut_slice).collect();
                    ew::scatter_add_rows(&pool, &dy, columns, &index, &mut targets);
                    for ((slot, _), buffer) in sources.iter().zip(buffers) {
                        g.give_back(slot.as_ref(), Some(buffer))?;
                    }
                    Ok(())
                });
            }
            Ok(y)
        }
    }
}

/// Indices as a tensor.
fn at(index: impl Iterator<Item = usize>) -> Result<dfdx::prelude::Tensor<(usize,), usize, Cpu>> {
    let index: Vec<usize> = index.collect();
    let len = index.len();
    Ok(cpu().try_tensor_from_vec(index, (len,))?)
}

/// Rows of several matrices by index into their concatenation.
pub(super) fn composed_gather_rows<E: Float>(g: &mut Graph<E>, sources: &[Matrix<E>], rows: &[u32]) -> Result<Matrix<E>>
where
    Cpu: Device<E>,
{
    let mut all = sources[0].clone();
    for source in &sources[1..] {
        let next = source.clone();
        all = g.run(&all, |all| (all, next.put_tape(OwnedTape::default())).try_concat_along(Axis::<0>))?;
    }
    let at = at(rows.iter().map(|&i| i as usize))?;
    g.run(&all, |all| all.try_gather(at))
}

/// The mean of each image's tokens from token `first` on: `[batch * tokens, C] -> [batch, C]`.
///
/// # Errors
/// Out of memory on the device.
pub fn mean_tokens(cx: &Context, tape: &mut Tape, x: &Tensor, batch: usize, first: usize) -> Result<Tensor> {
    match cx.form("mean_tokens", &[x])? {
        Form::Composed => composed_one(cx, tape, &[x], |g, m| composed_mean_tokens(g, &m[0], batch, first)),
        Form::Gpu => through_host_one(cx, tape, "mean_tokens", &[x], |cx, tape, copies| {
            mean_tokens(cx, tape, &copies[0], batch, first)
        }),
        Form::Cpu => {
            let records = tape.wants(&[x]);
            let (rows, columns) = x.shape();
            let tokens = rows / batch;
            let share = 1.0 / (tokens - first) as f32;
            let mut y = vec![0.0; batch * columns];
            for (y, x) in y.chunks_exact_mut(columns).zip(x.cpu().chunks_exact(tokens * columns)) {
                for row in x[first * columns..].chunks_exact(columns) {
                    y.iter_mut().zip(row).for_each(|(y, x)| *y += x * share);
                }
            }
            let y = made_on_cpu(cx, y, batch, columns, records)?;
            if records {
                let (out, input) = (y.slot(), x.slot());
                tape.record(move |g| {
                    let Some(dy) = g.take_cpu(&out) else { return Ok(()) };
                    let dx = g.cpu_mut(&input);
                    for (dy, dx) in dy.chunks_exact(columns).zip(dx.chunks_exact_mut(tokens * columns)) {
                        for row in dx[first * columns..].chunks_exact_mut(columns) {
                            row.iter_mut().zip(dy).for_each(|(dx, dy)| *dx += dy * share);
                        }
                    }
                    Ok(())
                });
            }
            Ok(y)
        }
    }
}

/// The mean of each image's tokens from token `first` on.
pub(super) fn composed_mean_tokens<E: Float>(
    g: &mut Graph<E>,
    x: &Matrix<E>,
    batch: usize,
    first: usize,
) -> Result<Matrix<E>>
where
    Cpu: Device<E>,
{
    let (rows, columns) = *x.shape();
    let tokens = rows / batch;
    let kept: Vec<u32> =
        (0..batch).flat_map(|image| image * tokens + first..(image + 1) * tokens).map(|i| i as u32).collect();
    let x = composed_gather_rows(g, std::slice::from_ref(x), &kept)?;
    g.run(&x, |x| x.try_reshape_like(&(batch, tokens - first, columns))?.try_mean::<(usize, usize), Axis<1>>())
}

/// `out[i] = sum_j w[rows[i], j] x[j]` for matrices `x` of equal shape; `w` is `[n, x.len()]`.
///
/// # Errors
/// Out of memory on the device.
pub fn mix(cx: &Context, tape: &mut Tape, x: &[&Tensor], w: &Tensor, rows: &[usize]) -> Result<Vec<Tensor>> {
    let inputs: Vec<&Tensor> = [w].into_iter().chain(x.iter().copied()).collect();
    match cx.form("mix", &inputs)? {
        Form::Composed => run_composed(cx, tape, &inputs, |g, m| composed_mix(g, &m[1..], &m[0], rows)),
        Form::Gpu => through_host(cx, tape, "mix", &inputs, |cx, tape, copies| {
            mix(cx, tape, &copies[1..].iter().collect::<Vec<_>>(), &copies[0], rows)
        }),
        Form::Cpu => mix_on_cpu(cx, tape, x, w, rows),
    }
}

fn mix_on_cpu(cx: &Context, tape: &mut Tape, x: &[&Tensor], w: &Tensor, rows: &[usize]) -> Result<Vec<Tensor>> {
    let records = tape.wants(x) || tape.wants(&[w]);
    let ((n, columns), levels) = (x[0].shape(), x.len());
    let part: Vec<f32> = rows.iter().flat_map(|&i| w.cpu()[i * levels..][..levels].iter().copied()).collect();
    let mut mixed: Vec<Vec<f32>> = rows.iter().map(|_| vec![0.0; n * columns]).collect();
    let inputs: Vec<&[f32]> = x.iter().map(|x| x.cpu()).collect();
    let mut outputs: Vec<&mut [f32]> = mixed.iter_mut().map(Vec::as_mut_slice).collect();
    ew::mix(cx.pool(), &part, &inputs, &mut outputs, Write::Set);
    let mixed: Vec<Tensor> =
        mixed.into_iter().map(|values| made_on_cpu(cx, values, n, columns, records)).collect::<Result<_>>()?;
    if !records {
        return Ok(mixed);
    }
    let (pool, arena) = cx.handles();
    let outs: Vec<_> = mixed.iter().map(Tensor::slot).collect();
    let (x, w, rows): (Vec<Tensor>, _, _) = (x.iter().map(|&x| x.clone()).collect(), w.wanted(), rows.to_vec());
    tape.record(move |g| {
        let doutputs: Vec<Option<Vec<f32>>> = outs.iter().map(|out| g.take_cpu(out)).collect();
        if doutputs.iter().all(Option::is_none) {
            return Ok(());
        }
        let doutputs: Vec<Vec<f32>> =
            doutputs.into_iter().map(|dy| dy.unwrap_or_else(|| vec![0.0; n * columns])).collect();
        let doutputs: Vec<&[f32]> = doutputs.iter().map(Vec::as_slice).collect();
        if let Some(slot) = w {
            let inputs: Vec<&[f32]> = x.iter().map(Tensor::cpu).collect();
            let mut dpart = vec![0.0; part.len()];
            ew::mix_backward_weights(&pool, &arena, &inputs, &doutputs, &mut dpart);
            let dw = g.cpu_mut(&slot);
            for (&row, dpart) in rows.iter().zip(dpart.chunks_exact(levels)) {
                dw[row * levels..][..levels].iter_mut().zip(dpart).for_each(|(dw, d)| *dw += d);
            }
        }
        let slots: Vec<_> = x.iter().map(Tensor::wanted).collect();
        if slots.iter().all(Option::is_none) {
            return Ok(());
        }
        let mut buffers: Vec<Vec<f32>> =
            slots.iter().map(|slot| g.lend(slot.as_ref()).unwrap_or_else(|| vec![0.0; n * columns])).collect();
        let mut dinputs: Vec<&mut [f32]> = buffers.iter_mut().map(Vec::as_mut_slice).collect();
        ew::mix_backward_inputs(&pool, &part, &doutputs, &mut dinputs, Write::Add);
        for (slot, buffer) in slots.iter().zip(buffers) {
            g.give_back(slot.as_ref(), Some(buffer))?;
        }
        Ok(())
    });
    Ok(mixed)
}

/// `out[i] = sum_j w[rows[i], j] x[j]`.
pub(super) fn composed_mix<E: Float>(
    g: &mut Graph<E>,
    x: &[Matrix<E>],
    w: &Matrix<E>,
    rows: &[usize],
) -> Result<Vec<Matrix<E>>>
where
    Cpu: Device<E>,
{
    let ((n, c), levels) = (*x[0].shape(), x.len());
    let stacked: Matrix<E> = g.run(&x[0], |first| {
        let rest = x[1..].iter().map(|x| x.clone().put_tape(OwnedTape::default()));
        let all: Vec<_> = std::iter::once(first).chain(rest).collect();
        all.try_stack()?.try_reshape_like(&(levels, n * c))
    })?;
    let index = at(rows.iter().copied())?;
    let mixed: Matrix<E> = g.run(w, |w| {
        let w: Taped<(usize, usize), E> = w.try_gather(index)?;
        w.try_matmul(stacked)
    })?;
    (0..rows.len())
        .map(|i| {
            let index = at(std::iter::once(i))?;
            g.run(&mixed, |m| {
                let row: Taped<(usize, usize), E> = m.try_gather(index)?;
                row.try_reshape_like(&(n, c))
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{finite_differences, forms, input};

    #[test]
    fn composed_gradients_are_finite_differences() {
        finite_differences("gather from three, with repeats", &[(2, 3), (3, 3), (1, 3)], |g, x| {
            Ok(vec![composed_gather_rows(g, x, &[4, 0, 0, 5, 2, 4, 4])?])
        });
        finite_differences("gather from one", &[(4, 3)], |g, x| Ok(vec![composed_gather_rows(g, x, &[3, 1, 3])?]));
        finite_differences("mean of all tokens", &[(6, 3)], |g, x| Ok(vec![composed_mean_tokens(g, &x[0], 2, 0)?]));
        finite_differences("mean of patches", &[(8, 3)], |g, x| Ok(vec![composed_mean_tokens(g, &x[0], 2, 1)?]));
        for rows in [vec![0, 1, 2, 3, 4], vec![3, 1], vec![2]] {
            finite_differences(&format!("mix of rows {rows:?}"), &[(3, 4), (3, 4), (3, 4), (5, 3)], |g, x| {
                composed_mix(g, &x[..3], &x[3], &rows)
            });
        }
    }

    #[test]
    fn rows_are_found_by_image_and_token() {
        assert_eq!(flat_rows(&[0, 2, 1, 1], 2, 3), [0, 2, 4, 4]);
    }

    #[test]
    fn the_forms_agree() {
        forms("gather_rows", &[input("x", 9, 7), input("z", 2, 7), input("u", 1, 7)], |cx, tape, x| {
            let sources: Vec<&Tensor> = x.iter().collect();
            Ok(vec![gather_rows(cx, tape, &sources, &[11, 0, 9, 9, 8, 10, 0, 11, 11, 3])?])
        });
        forms("gather_rows", &[input("x", 4, 65), input("y", 4, 65)], |cx, tape, x| {
            Ok(vec![gather_rows(cx, tape, &[&x[0], &x[1]], &[7, 3, 0, 3])?])
        });
        for first in [0, 1, 2] {
            forms("mean_tokens", &[input("x", 9, 7)], |cx, tape, x| Ok(vec![mean_tokens(cx, tape, &x[0], 3, first)?]));
        }
    }

    #[test]
    fn the_forms_of_mix_agree() {
        for (levels, columns) in [(1, 3), (3, 7), (12, 33)] {
            let mut inputs: Vec<_> = (0..levels).map(|i| input(&format!("x{i}"), 11, columns)).collect();
            inputs.push(input("w", levels + 1, levels));
            for rows in [(0..=levels).collect::<Vec<_>>(), vec![levels], vec![levels, 0]] {
                forms("mix", &inputs, |cx, tape, x| {
                    mix(cx, tape, &x[..levels].iter().collect::<Vec<_>>(), &x[levels], &rows)
                });
            }
        }
    }
}
