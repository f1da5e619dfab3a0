//! Linear layers: `act(x W^T + b)`.

use std::{ops::Range, sync::Arc};

use dfdx::prelude::{
    Axes2, Axis, BroadcastTo, Cpu, Device, HasShape, PermuteTo, ReshapeTo, TryAdd, TryMatMul, TryMul, TrySub,
};
use maskalign_kernels::{
    Buf, Epilogue,
    block::{self as kernel},
    elementwise::{self as ew, Write},
    gemm::PackedB,
};

use super::{Replaced, composed_one, made_on_cpu, through_host_one};
use crate::{
    context::{Context, Form},
    error::Result,
    graph::{Float, Graph, Matrix, Taped, Vector},
    tape::Tape,
    tensor::Tensor,
};

/// The activation that a linear layer applies to its product.
///
/// ```
/// # use maskalign_engine::{Context, Device, Error, Init, Tape, nn::{Bias, Linear}, ops::Act};
/// # let cx = Context::new(Device::Cpu, 1);
/// let layer = Linear::new(&Init::blank(cx.device()), "fc", 2, 4, Bias::With)?;
/// let x = cx.tensor(vec![1.0; 4], 1, 4)?;
/// for act in [Act::None, Act::Gelu, Act::QuickGelu] {
///     assert_eq!(layer.forward(&cx, &mut Tape::inference(), &x, act)?.to_vec(), [0.0, 0.0]);
/// }
/// # Ok::<(), Error>(())
/// ```
pub use maskalign_kernels::gemm::Act;

/// A frozen weight in the layout that is fastest on the device.
#[derive(Clone)]
pub struct Packed(pub(super) Arc<PackedB>);

/// What a linear layer multiplies by and adds.
#[derive(Clone)]
pub struct LinearWeights {
    /// `[out, in]`, as checkpoints store it; without values where `packed` has them.
    pub weight: Tensor,
    /// `[1, out]`.
    pub bias: Option<Tensor>,
    /// The weight in the layout that is fastest on the device.
    pub packed: Option<Packed>,
}

impl LinearWeights {
    /// How many columns the result has.
    pub fn outputs(&self) -> usize {
        self.packed.as_ref().map_or(self.weight.rows(), |packed| packed.0.n())
    }

    pub(super) fn tensors(&self) -> Vec<&Tensor> {
        [&self.weight].into_iter().chain(&self.bias).collect()
    }

    pub(super) fn replaced(&self, by: &mut Replaced) -> Self {
        LinearWeights { weight: by.next(), bias: by.next_for(self.bias.as_ref()), packed: self.packed.clone() }
    }

    /// The layer as CPU kernels take it.
    pub(super) fn kernel(&self) -> kernel::Linear<'_> {
        let bias = self.bias.as_ref().map(Tensor::cpu);
        match &self.packed {
            Some(packed) => kernel::Linear::packed(&packed.0, bias),
            None => kernel::Linear::dense(self.weight.cpu(), bias),
        }
    }
}

/// Some rows of a frozen weight `[out, in]`, in the device's packed layout if it has one.
pub fn pack(cx: &Context, weight: &Tensor, rows: Range<usize>) -> Option<Packed> {
    if cx.form("pack", &[weight]) != Ok(Form::Cpu) {
        return None;
    }
    let inputs = weight.columns();
    let values = &weight.cpu()[rows.start * inputs..rows.end * inputs];
    Some(Packed(Arc::new(kernel::pack_weight(values, rows.len(), inputs))))
}

/// `act(x W^T + b)`: `[rows, in] -> [rows, out]`.
///
/// # Errors
/// Out of memory on the device.
pub fn linear(cx: &Context, tape: &mut Tape, x: &Tensor, layer: &LinearWeights, act: Act) -> Result<Tensor> {
    let inputs: Vec<&Tensor> = [x].into_iter().chain(layer.tensors()).collect();
    match cx.form("linear", &inputs)? {
        Form::Composed => composed_one(cx, tape, &inputs, |g, m| {
            let y = composed(g, &m[0], &m[1], m.get(2))?;
            activate(g, y, act)
        }),
        Form::Gpu => through_host_one(cx, tape, "linear", &inputs, |cx, tape, copies| {
            linear(cx, tape, &copies[0], &layer.replaced(&mut Replaced::new(&copies[1..])), act)
        }),
        Form::Cpu => on_cpu(cx, tape, x, layer, act),
    }
}

fn on_cpu(cx: &Context, tape: &mut Tape, x: &Tensor, layer: &LinearWeights, act: Act) -> Result<Tensor> {
    let ((rows, inputs), outputs) = (x.shape(), layer.outputs());
    let (pool, arena) = cx.handles();
    let records = tape.wants(&[x]) || tape.wants(&layer.tensors());
    let mut pre: Option<Buf> = (records && act != Act::None).then(|| arena.take(rows * outputs));
    let mut y = vec![0.0; rows * outputs];
    let epilogue = Epilogue { act, pre: pre.as_deref_mut(), ..Epilogue::default() };
    kernel::linear(&pool, layer.kernel(), rows, inputs, outputs, x.cpu(), &mut y, epilogue);
    let y = made_on_cpu(cx, y, rows, outputs, records)?;
    if records {
        let (x, layer, out) = (x.clone(), layer.clone(), y.slot());
        tape.record(move |g| {
            let Some(mut dy) = g.take_cpu(&out) else { return Ok(()) };
            if let Some(mut pre) = pre {
                let mut value = arena.take(pre.len());
                ew::activation_and_slope(&pool, act, &mut pre, &mut value);
                ew::multiply(&pool, &pre, &mut dy);
            }
            let (weight, bias) = (layer.weight.wanted(), layer.bias.as_ref().and_then(Tensor::wanted));
            let (mut dw, mut db) = (g.lend(weight.as_ref()), g.lend(bias.as_ref()));
            kernel::linear_backward_params(
                &pool,
                &arena,
                rows,
                inputs,
                outputs,
                x.cpu(),
                &dy,
                dw.as_deref_mut(),
                db.as_deref_mut(),
            );
            g.give_back(weight.as_ref(), dw)?;
            g.give_back(bias.as_ref(), db)?;
            if let Some(slot) = x.wanted() {
                let dx = g.cpu_mut(&slot);
                kernel::linear_backward_input(&pool, layer.weight.cpu(), rows, inputs, outputs, &dy, dx, Write::Add);
            }
            Ok(())
        });
    }
    Ok(y)
}

/// `x W^T + b`.
pub(super) fn composed<E: Float>(
    g: &mut Graph<E>,
    x: &Matrix<E>,
    w: &Matrix<E>,
    b: Option<&Matrix<E>>,
) -> Result<Matrix<E>>
where
    Cpu: Device<E>,
{
    let y = g.run(x, |x| x.try_matmul(w.clone().try_permute::<(usize, usize), Axes2<1, 0>>()?))?;
    match b {
        Some(b) => {
            let b = row(g, b, *y.shape())?;
            g.run(&y, |y| y.try_add(b))
        }
        None => Ok(y),
    }
}

/// A row `[1, columns]` repeated.
pub(super) fn row<E: Float>(g: &mut Graph<E>, x: &Matrix<E>, shape: (usize, usize)) -> Result<Matrix<E>>
where
    Cpu: Device<E>,
{
    let x: Vector<E> = g.run(x, |x| x.try_reshape_like(&(shape.1,)))?;
    g.run(&x, |x| x.try_broadcast_like::<_, Axis<0>>(&shape))
}

/// An activation by name.
pub(super) fn activate<E: Float>(g: &mut Graph<E>, x: Matrix<E>, act: Act) -> Result<Matrix<E>>
where
    Cpu: Device<E>,
{
    match act {
        Act::None => Ok(x),
        Act::Gelu => gelu(g, &x),
        Act::QuickGelu => quick_gelu(g, &x),
    }
}

/// The exact GELU, `x Phi(x)`.
///
/// The second term of dfdx's gradient is too large by a factor of sqrt 2. What is added here has the value 0 and the
/// gradient that corrects this: `k (p - stop(p))` with `p = exp(-x^2/2)`, `k = (sqrt 2 - 1)/sqrt(2 pi)`.
pub(super) fn gelu<E: Float>(g: &mut Graph<E>, x: &Matrix<E>) -> Result<Matrix<E>>
where
    Cpu: Device<E>,
{
    let k = (std::f64::consts::SQRT_2 - 1.0) / (2.0 * std::f64::consts::PI).sqrt();
    let bell = |x: Taped<(usize, usize), E>| x.try_square()?.try_mul(E::of(-0.5))?.try_exp()?.try_mul(E::of(k));
    let stopped = Graph::inference().run(x, bell)?;
    let bell = g.run(x, bell)?;
    let correction = g.run(&bell, |bell| bell.try_sub(stopped))?;
    let wrong = g.run(x, |x| x.try_accurate_gelu())?;
    g.run(&wrong, |y| y.try_add(correction))
}

/// `x sigmoid(1.702 x)`, the activation of OpenAI's CLIP.
pub(super) fn quick_gelu<E: Float>(g: &mut Graph<E>, x: &Matrix<E>) -> Result<Matrix<E>>
where
    Cpu: Device<E>,
{
    let gate = g.run(x, |x| x.try_mul(E::of(1.702))?.try_sigmoid())?;
    g.run(&gate, |gate| gate.try_mul(x.clone()))
}

#[cfg(test)]
mod tests {
    use dfdx::prelude::TensorFromVec;

    use super::*;
    use crate::{
        context::Forms,
        device::Device,
        host::cpu,
        ops::check::{finite_differences, forms, input, near},
    };

    #[test]
    fn composed_gradients_are_finite_differences() {
        finite_differences("linear", &[(5, 3), (4, 3), (1, 4)], |g, x| {
            Ok(vec![composed(g, &x[0], &x[1], Some(&x[2]))?])
        });
        finite_differences("linear without bias", &[(2, 7), (1, 7)], |g, x| Ok(vec![composed(g, &x[0], &x[1], None)?]));
        for act in [Act::None, Act::Gelu, Act::QuickGelu] {
            finite_differences(&format!("{act:?}"), &[(3, 5)], |g, x| {
                // An activation that does nothing gives its input itself; the loss needs a value of its own.
                let y = g.run(&x[0], |x| x.try_mul(1.5))?;
                Ok(vec![activate(g, y, act)?])
            });
        }
        finite_differences("gelu of a leaf", &[(3, 5)], |g, x| Ok(vec![gelu(g, &x[0])?]));
        finite_differences("quick gelu of a leaf", &[(3, 5)], |g, x| Ok(vec![quick_gelu(g, &x[0])?]));
    }

    #[test]
    fn activations_have_pytorchs_values() {
        // torch.nn.functional.gelu and x * sigmoid(1.702 x) in float64.
        let x: Matrix<f64> = cpu().tensor_from_vec(vec![-2.0, -0.5, 0.0, 1.0, 3.0], (1, 5));
        let expected_gelu = [-0.04550026389635842, -0.15426876936299344, 0.0, 0.841344746068543, 2.99595030590511];
        let expected_quick = [-0.06434137685579186, -0.1496115633936199, 0.0, 0.8457957659328212, 2.981928690292214];
        let g = &mut Graph::inference();
        for (got, expected) in [(gelu(g, &x).unwrap(), expected_gelu), (quick_gelu(g, &x).unwrap(), expected_quick)] {
            for (got, expected) in got.as_vec().into_iter().zip(expected) {
                assert!((got - expected).abs() < 1e-9, "{got} and {expected}");
            }
        }
    }

    #[test]
    fn the_forms_agree() {
        for (rows, inputs, outputs) in [(1, 1, 1), (7, 5, 3), (37, 19, 65), (130, 67, 33)] {
            for act in [Act::None, Act::Gelu, Act::QuickGelu] {
                let all = [input("x", rows, inputs), input("w", outputs, inputs), input("b", 1, outputs)];
                forms("linear", &all, |cx, tape, x| {
                    let layer = LinearWeights { weight: x[1].clone(), bias: Some(x[2].clone()), packed: None };
                    Ok(vec![linear(cx, tape, &x[0], &layer, act)?])
                });
                forms("linear", &all[..2], |cx, tape, x| {
                    let layer = LinearWeights { weight: x[1].clone(), bias: None, packed: None };
                    Ok(vec![linear(cx, tape, &x[0], &layer, act)?])
                });
            }
        }
    }

    #[test]
    fn an_input_may_be_the_weight() {
        forms("linear", &[input("x", 6, 6), input("w", 6, 6)], |cx, tape, x| {
            let layer = LinearWeights { weight: x[1].clone(), bias: None, packed: None };
            Ok(vec![linear(cx, tape, &x[0], &layer, Act::Gelu)?])
        });
    }

    #[test]
    fn a_packed_weight_gives_what_the_weight_gives() {
        let cx = Context::new(Device::Cpu, 2);
        for (rows, inputs, outputs) in [(3, 5, 7), (41, 33, 70)] {
            let tensor = |i: super::super::check::Input, rows, columns| cx.tensor(i.values, rows, columns).unwrap();
            let x = tensor(input("x", rows, inputs), rows, inputs);
            let dense = LinearWeights {
                weight: tensor(input("w", outputs, inputs), outputs, inputs),
                bias: Some(tensor(input("b", 1, outputs), 1, outputs)),
                packed: None,
            };
            let mut packed = dense.clone();
            packed.packed = pack(&cx, &dense.weight, 0..outputs);
            packed.weight = dense.weight.emptied().unwrap();
            assert!(packed.packed.is_some() && packed.outputs() == outputs);
            let [got, expected] =
                [&packed, &dense].map(|layer| linear(&cx, &mut Tape::inference(), &x, layer, Act::Gelu).unwrap());
            near("packed", &got.to_vec(), &expected.to_vec(), 1e-6);
            let composed = cx.clone().with_forms(Forms::Composed);
            assert!(pack(&composed, &dense.weight, 0..outputs).is_none(), "the composed form has no layout of its own");
        }
    }
}
