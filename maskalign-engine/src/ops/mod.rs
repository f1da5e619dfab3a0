//! Operators: the functions that models are written with.
//!
//! There is one file for each group of operators. It holds the function that models call with its contract, the composed
//! reference, the CPU form, and the gradient. Matrices are `[rows, columns]` with rows = images x tokens. Every operator
//! records its gradient on the tape that it is given, for those of its inputs that take one; two inputs may be the same
//! tensor. Where a device has no form of an operator, the CPU form runs: inputs are copied to the host and outputs back, and
//! so are gradients; [`Context::fallbacks`] counts these. Errors are those of the device: out of memory.
//!
//! ```
//! # use maskalign_engine::{Context, Device, Error, Tape, ops};
//! # let cx = Context::new(Device::Cpu, 1);
//! let x = cx.tensor(vec![1.0, -2.0], 1, 2)?.tracked();
//! let mut tape = Tape::training();
//! let positive = ops::relu(&cx, &mut tape, &x)?;
//! let loss = ops::mean(&cx, &mut tape, &positive)?;
//! assert_eq!(loss.value(), 0.5);
//! assert_eq!(tape.backward(&loss)?.to_vec(&x), [0.5, 0.0]);
//! # Ok::<(), Error>(())
//! ```

mod attention;
mod batch_norm;
mod block;
#[cfg(test)]
mod check;
mod linear;
mod loss;
mod matrix;
mod norm;
pub mod optim;
mod pointwise;
mod reduce;
mod relation;
mod rows;

use std::mem;

use dfdx::prelude::{ReshapeTo, TensorFromVec};

pub use attention::{AttentionShape, attention, cross_attention};
pub use batch_norm::{BatchStatistics, batch_norm, batch_norm_by};
pub use block::{Begun, BlockRun, BlockWeights, begin_block, block, class_attention_by_head, finish_block};
pub use linear::{Act, LinearWeights, Packed, linear, pack};
pub use loss::{Distance, cross_entropy, distance, weighted_sum};
pub use matrix::{concat_columns, matmul, matmul_transposed, slice_columns, transposed};
pub use norm::{NormWeights, Standardize, layer_norm, standardize};
pub use pointwise::{
    abs, add, add_scalar, clamp, div, exp, ln, maximum, minimum, mul, neg, powf, relu, scale, sigmoid, sqrt, square,
    sub, tanh, weighted_mean,
};
pub use reduce::{
    broadcast_column, broadcast_row, column_mean, column_sum, log_softmax, mean, normalize_rows, row_max, row_mean,
    row_sum, softmax, sum,
};
pub use relation::{RelationShape, Third, relation};
pub use rows::{flat_rows, gather_rows, mean_tokens, mix};

use crate::{
    context::Context,
    device::Device,
    error::Result,
    graph::{Graph, Matrix, finder, shares_storage},
    host::cpu,
    tape::{Gradient, Gradients, Slot, Tape},
    tensor::{Place, Tensor},
};

/// Values that one task of the pool handles: 64 KiB, a share of the L2 cache.
const CHUNK: usize = 16 * 1024;

/// Runs the composed form of an operator, on a graph of its own that is dropped with its temporaries.
pub(crate) fn composed(
    cx: &Context,
    tape: &mut Tape,
    inputs: &[&Tensor],
    f: impl FnOnce(&mut Graph, &[Matrix]) -> Result<Vec<Matrix>>,
) -> Result<Vec<Tensor>> {
    let mut matrices: Vec<Matrix> = Vec::with_capacity(inputs.len());
    for x in inputs {
        let shared = match &x.place {
            Place::Cpu(values) => Some(values.matrix(x.rows(), x.columns())?),
            Place::Gpu(_) => None,
        };
        matrices.push(match shared {
            // dfdx has no gradient for a tensor that an operator takes twice: the second is a copy with its own.
            Some(matrix) if !matrices.iter().any(|y| shares_storage(&matrix, y)) => matrix,
            _ => cpu().try_tensor_from_vec(x.to_vec(), x.shape())?,
        });
    }
    let records = tape.wants(inputs);
    let mut graph = if records { Graph::recording() } else { Graph::inference() };
    let mut outputs = f(&mut graph, &matrices)?;
    let mut made = Vec::with_capacity(outputs.len());
    for y in &mut outputs {
        // Gradients lie as the values do: a broadcast row's has one row, a transpose's another order.
        *y = graph.run(y, |y| y.try_contiguous())?;
        let (rows, columns) = *dfdx::prelude::HasShape::shape(y);
        made.push(cx.output(y.as_vec(), rows, columns)?.tracked_if(records));
    }
    if records {
        let outputs: Vec<_> = made.iter().zip(&outputs).map(|(outer, inner)| (outer.slot(), finder(inner))).collect();
        let wanted: Vec<_> = inputs.iter().zip(&matrices).map(|(x, m)| (x.wanted(), finder(m))).collect();
        // The graph has clones of the inputs' storage: with these here, nobody changes it in place.
        let inputs: Vec<Tensor> = inputs.iter().map(|&x| x.clone()).collect();
        tape.record(move |g| {
            let seed = |(slot, find)| g.take(&slot).map(|gradient| (find, on_host_values(gradient)));
            let seeds: Vec<_> = outputs.into_iter().filter_map(seed).collect();
            if seeds.is_empty() {
                return Ok(());
            }
            let mut found = graph.backward_from(seeds)?;
            drop(inputs);
            for (slot, find) in wanted {
                if let Some(slot) = slot {
                    let gradient = mem::take(find(&mut found)?);
                    g.add(&slot, Gradient::Cpu(gradient))?;
                }
            }
            Ok(())
        });
    }
    Ok(made)
}

/// As [`composed`], for an operator with one output.
pub(crate) fn composed_one(
    cx: &Context,
    tape: &mut Tape,
    inputs: &[&Tensor],
    f: impl FnOnce(&mut Graph, &[Matrix]) -> Result<Matrix>,
) -> Result<Tensor> {
    only(composed(cx, tape, inputs, |graph, inputs| Ok(vec![f(graph, inputs)?])))
}

/// Runs an operator on the host for a device that has no form of it: copies inputs there, and outputs and gradients back.
pub(crate) fn through_host(
    cx: &Context,
    tape: &mut Tape,
    op: &'static str,
    inputs: &[&Tensor],
    f: impl FnOnce(&Context, &mut Tape, &[Tensor]) -> Result<Vec<Tensor>>,
) -> Result<Vec<Tensor>> {
    cx.count_fallback(op);
    let copy = |x: &&Tensor| -> Result<Tensor> {
        Ok(Tensor::new(&Device::Cpu, x.to_vec(), x.rows(), x.columns())?.tracked_if(x.is_tracked()))
    };
    let copies: Vec<Tensor> = inputs.iter().map(copy).collect::<Result<_>>()?;
    let records = tape.wants(inputs);
    let mut inner = if records { Tape::training() } else { Tape::inference() };
    let outputs = f(&cx.on_host(), &mut inner, &copies)?;
    let mut made = Vec::with_capacity(outputs.len());
    for y in &outputs {
        made.push(cx.output(y.to_vec(), y.rows(), y.columns())?.tracked_if(records));
    }
    if records {
        let outputs: Vec<_> = made.iter().zip(&outputs).map(|(outer, inner)| (outer.slot(), inner.slot())).collect();
        let wanted: Vec<_> = inputs.iter().zip(&copies).map(|(x, copy)| (x.wanted(), copy.slot())).collect();
        tape.record(move |g| {
            let seed = |(outer, inner)| g.take(&outer).map(|gradient| (inner, Gradient::Cpu(on_host_values(gradient))));
            let seeds: Vec<_> = outputs.into_iter().filter_map(seed).collect();
            if seeds.is_empty() {
                return Ok(());
            }
            let mut found = inner.backward_from(seeds)?;
            for (outer, inner) in wanted {
                if let (Some(outer), Some(gradient)) = (outer, found.take(&inner)) {
                    g.add(&outer, gradient)?;
                }
            }
            Ok(())
        });
    }
    Ok(made)
}

/// As [`through_host`], for an operator with one output.
pub(crate) fn through_host_one(
    cx: &Context,
    tape: &mut Tape,
    op: &'static str,
    inputs: &[&Tensor],
    f: impl FnOnce(&Context, &mut Tape, &[Tensor]) -> Result<Tensor>,
) -> Result<Tensor> {
    only(through_host(cx, tape, op, inputs, |cx, tape, inputs| Ok(vec![f(cx, tape, inputs)?])))
}

fn only(outputs: Result<Vec<Tensor>>) -> Result<Tensor> {
    Ok(outputs?.pop().expect("one output"))
}

fn on_host_values(gradient: Gradient) -> Vec<f32> {
    match gradient {
        Gradient::Cpu(values) => values,
        Gradient::Gpu(array) => array.download(),
    }
}

/// The output of an operator on the CPU, tracked if the operator records its gradient.
fn made_on_cpu(cx: &Context, values: Vec<f32>, rows: usize, columns: usize, records: bool) -> Result<Tensor> {
    Ok(cx.output(values, rows, columns)?.tracked_if(records))
}

/// Adds `more` to the gradient of a tensor that takes one, on the pool's threads, in the gradient's own buffer.
fn add_gradient(g: &mut Gradients, pool: &maskalign_kernels::Pool, slot: Option<&Slot>, more: &[f32]) {
    if let Some(slot) = slot {
        maskalign_kernels::elementwise::axpy(pool, 1.0, more, g.cpu_mut(slot));
    }
}

/// As [`add_gradient`], for values that nothing else needs: the first addend becomes the buffer.
fn move_gradient(g: &mut Gradients, pool: &maskalign_kernels::Pool, slot: Option<&Slot>, more: Vec<f32>) -> Result<()> {
    let Some(slot) = slot else { return Ok(()) };
    match g.take_cpu(slot) {
        Some(mut sum) => {
            maskalign_kernels::elementwise::axpy(pool, 1.0, &more, &mut sum);
            g.add(slot, Gradient::Cpu(sum))
        }
        None => g.add(slot, Gradient::Cpu(more)),
    }
}

/// Copies of the tensors in a struct of weights, to be replaced by others.
pub(crate) struct Replaced<'a>(std::slice::Iter<'a, Tensor>);

impl<'a> Replaced<'a> {
    pub(crate) fn new(tensors: &'a [Tensor]) -> Self {
        Replaced(tensors.iter())
    }

    pub(crate) fn next(&mut self) -> Tensor {
        self.0.next().expect("as many as there were").clone()
    }

    pub(crate) fn next_for(&mut self, of: Option<&Tensor>) -> Option<Tensor> {
        of.map(|_| self.next())
    }
}
