//! What the tests of all operators share: composed forms are checked against finite differences in `f64`, and the forms of
//! an operator against each other.

use std::{collections::BTreeMap, sync::atomic::Ordering::Relaxed};

use dfdx::prelude::{
    Axes2, Axis, Cpu, HasShape, PermuteTo, ReshapeTo, SumTo, Tensor as CpuTensor, TensorFromVec, TryAdd, TryMul,
};
use maskalign_gpu::pretend::{self, Counts};

use crate::{
    context::{Context, Forms},
    device::Device,
    error::{Error, Result},
    graph::{Graph, Matrix},
    host::cpu,
    random::Stream,
    tape::{Gradient, Tape},
    tensor::Tensor,
};

/// Normally distributed values, always the same for a key.
pub(crate) fn normal(key: &str, len: usize) -> Vec<f64> {
    let mut stream = Stream::new(7, key, 0, 0);
    (0..len).map(|_| stream.normal()).collect()
}

/// As [`normal`].
pub(crate) fn floats(key: &str, len: usize) -> Vec<f32> {
    normal(key, len).into_iter().map(|v| v as f32).collect()
}

/// Rows of positive values that sum to 1.
pub(crate) fn distributions(key: &str, rows: usize, columns: usize) -> Vec<f32> {
    let mut values = floats(key, rows * columns);
    for row in values.chunks_mut(columns) {
        let sum: f32 = row.iter().map(|v| v.abs()).sum();
        for v in row {
            *v = v.abs() / sum;
        }
    }
    values
}

/// The norm of the difference over the norm of the reference.
fn difference(got: impl IntoIterator<Item = f64>, expected: impl IntoIterator<Item = f64>) -> f64 {
    let (got, expected): (Vec<f64>, Vec<f64>) = (got.into_iter().collect(), expected.into_iter().collect());
    assert_eq!(got.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let error = norm(&mut got.iter().zip(&expected).map(|(a, b)| a - b));
    error / norm(&mut expected.iter().copied()).max(1e-12)
}

/// Checks values against expected ones by that relative norm.
#[track_caller]
pub(crate) fn near(name: &str, got: &[f32], expected: &[f32], tolerance: f64) {
    let wide = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
    let (got, expected) = (wide(got), wide(expected));
    // What cancels to nothing leaves rounding, which no norm of the reference excuses.
    let rounding = 0.1 / expected.iter().map(|v| v * v).sum::<f64>().sqrt().max(1e-12);
    let error = difference(got, expected);
    // Not `>=`: what is no number must fail.
    assert!(error < tolerance * rounding.max(1.0), "{name}: {error:e}");
}

/// A pretended GPU in the host's memory, with almost no operators of its own.
pub(crate) fn gpu() -> (Context, std::sync::Arc<Counts>) {
    let (gpu, counts) = pretend::open();
    (Context::new(Device::Gpu(gpu), 1), counts)
}

/// How the inputs of a composed form reach the loss.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Reach {
    /// Through the operator alone.
    Alone,
    /// Also along a second path, recorded before the operator.
    AlsoBefore,
    /// Also along a second path, recorded after the operator.
    AlsoAfter,
    /// Through the operator alone, as transposed views of the leaves.
    Strided,
}

type M = Matrix<f64>;
type Scalar = CpuTensor<(), f64, Cpu>;

/// The sum of the values with random weights, so that every value counts.
fn weighted(g: &mut Graph<f64>, y: &M, key: &str) -> Scalar {
    let (rows, columns) = *y.shape();
    let weights: M = cpu().tensor_from_vec(normal(key, rows * columns), (rows, columns));
    g.run(y, |y| y.try_mul(weights)?.try_reshape_like(&(rows * columns,))?.try_sum::<(), Axis<0>>()).unwrap()
}

/// The loss, and its gradient with respect to every input.
fn loss(
    inputs: &[((usize, usize), Vec<f64>)],
    reach: Reach,
    f: &dyn Fn(&mut Graph<f64>, &[M]) -> Result<Vec<M>>,
) -> (f64, Vec<Vec<f64>>) {
    let mut g = Graph::recording();
    // A single row stands for a vector, of which there is no transpose.
    let strided = |shape: (usize, usize)| reach == Reach::Strided && shape.0 > 1;
    let leaf = |(shape, values): &((usize, usize), Vec<f64>)| -> M {
        let shape = if strided(*shape) { (shape.1, shape.0) } else { *shape };
        cpu().tensor_from_vec(values.clone(), shape)
    };
    let leaves: Vec<M> = inputs.iter().map(leaf).collect();
    let mut x = leaves.clone();
    for (x, (shape, _)) in x.iter_mut().zip(inputs) {
        if strided(*shape) {
            *x = g.run(x, |x| x.try_permute::<_, Axes2<1, 0>>()).unwrap();
        }
    }
    let mut terms = Vec::new();
    let also = |g: &mut Graph<f64>, terms: &mut Vec<Scalar>| {
        for (i, x) in x.iter().enumerate() {
            let square = g.run(x, |x| x.try_square()).unwrap();
            terms.push(weighted(g, &square, &format!("also {i}")));
        }
    };
    if reach == Reach::AlsoBefore {
        also(&mut g, &mut terms);
    }
    for (i, y) in f(&mut g, &x).unwrap().iter().enumerate() {
        terms.push(weighted(&mut g, y, &format!("out {i}")));
    }
    if reach == Reach::AlsoAfter {
        also(&mut g, &mut terms);
    }
    let mut total = terms[0].clone();
    for term in &terms[1..] {
        total = g.run(&total, |total| total.try_add(term.clone())).unwrap();
    }
    let value = total.as_vec()[0];
    let mut gradients = g.backward(&total).unwrap();
    let of = |x: &M| {
        gradients.get_or_alloc_mut(x).unwrap();
        gradients.get(x).as_vec()
    };
    (value, leaves.iter().map(of).collect())
}

/// Checks the gradients of a composed form against central differences.
pub(crate) fn finite_differences(
    name: &str,
    shapes: &[(usize, usize)],
    f: impl Fn(&mut Graph<f64>, &[M]) -> Result<Vec<M>>,
) {
    const STEP: f64 = 1e-5;
    let with_values = |(i, &shape): (usize, &(usize, usize))| (shape, normal(&format!("input {i}"), shape.0 * shape.1));
    let mut inputs: Vec<_> = shapes.iter().enumerate().map(with_values).collect();
    for reach in [Reach::Alone, Reach::AlsoBefore, Reach::AlsoAfter, Reach::Strided] {
        let (_, gradients) = loss(&inputs, reach, &f);
        for i in 0..inputs.len() {
            let mut expected = Vec::new();
            for at in 0..inputs[i].1.len() {
                let here = inputs[i].1[at];
                let mut moved = |to: f64| {
                    inputs[i].1[at] = to;
                    loss(&inputs, reach, &f).0
                };
                expected.push((moved(here + STEP) - moved(here - STEP)) / (2.0 * STEP));
                moved(here);
            }
            let error = difference(gradients[i].iter().copied(), expected);
            assert!(error < 1e-7, "{name}, input {i}, {reach:?}: {error:e}");
        }
    }
}

/// An input of an operator under test.
#[derive(Clone)]
pub(crate) struct Input {
    shape: (usize, usize),
    pub(crate) values: Vec<f32>,
    takes_gradient: bool,
}

/// An input of normally distributed values.
pub(crate) fn input(key: &str, rows: usize, columns: usize) -> Input {
    Input { shape: (rows, columns), values: floats(key, rows * columns), takes_gradient: true }
}

impl Input {
    /// The same without a gradient, tracked or not.
    pub(crate) fn constant(self) -> Self {
        Input { takes_gradient: false, ..self }
    }

    /// The same with changed values.
    pub(crate) fn map(mut self, f: impl Fn(f32) -> f32) -> Self {
        self.values.iter_mut().for_each(|v| *v = f(*v));
        self
    }

    pub(crate) fn tensor(&self, cx: &Context) -> Result<Tensor> {
        cx.tensor(self.values.clone(), self.shape.0, self.shape.1)
    }
}

/// Values of outputs, and gradients of inputs.
#[derive(Clone, Debug)]
struct Numbers {
    outputs: Vec<Vec<f32>>,
    gradients: Vec<Option<Vec<f32>>>,
}

impl Numbers {
    fn bits(&self) -> Vec<Option<Vec<u32>>> {
        let bits = |values: &Vec<f32>| values.iter().map(|v| v.to_bits()).collect();
        let outputs = self.outputs.iter().map(|y| Some(bits(y)));
        outputs.chain(self.gradients.iter().map(|g| g.as_ref().map(bits))).collect()
    }
}

/// Whether the inputs have other consumers.
#[derive(Clone, Copy, PartialEq)]
enum Consumers {
    One,
    /// One whose gradient is added before the operator's, and one whose gradient is added after it.
    Three,
}

type Run<'a> = &'a dyn Fn(&Context, &mut Tape, &[Tensor]) -> Result<Vec<Tensor>>;

fn run(cx: &Context, x: &[Tensor], consumers: Consumers, f: Run) -> Result<Numbers> {
    let mut tape = Tape::training();
    let wanted: Vec<_> = match consumers {
        Consumers::One => Vec::new(),
        Consumers::Three => x.iter().filter_map(Tensor::wanted).zip(x.iter().map(Tensor::len)).collect(),
    };
    let other = |key: &str| -> Vec<_> {
        let one = |(i, (slot, len)): (usize, &(crate::tape::Slot, usize))| {
            (slot.clone(), Gradient::Cpu(floats(&format!("{key} {i}"), *len)))
        };
        wanted.iter().enumerate().map(one).collect()
    };
    let late = other("late");
    tape.record(move |g| late.into_iter().try_for_each(|(slot, gradient)| g.add(&slot, gradient)));
    let outputs = f(cx, &mut tape, x)?;
    let mut seeds = other("early");
    for (i, y) in outputs.iter().enumerate().filter(|(_, y)| y.is_tracked()) {
        seeds.push((y.slot(), Gradient::Cpu(floats(&format!("out {i}"), y.len()))));
    }
    let gradients = tape.backward_from(seeds)?;
    Ok(Numbers {
        outputs: outputs.iter().map(Tensor::to_vec).collect(),
        gradients: x.iter().map(|x| gradients.get(x)).collect(),
    })
}

/// Which inputs are tracked: all combinations for up to three inputs; for more, all, none, only one, and all but one.
fn combinations(n: usize) -> Vec<Vec<bool>> {
    if n <= 3 {
        return (0..1 << n).map(|mask| (0..n).map(|i| mask >> i & 1 == 1).collect()).collect();
    }
    let alone = |one: usize, value: bool| (0..n).map(|i| (i == one) == value).collect();
    let each = (0..n).flat_map(|i| [alone(i, true), alone(i, false)]);
    [vec![true; n], vec![false; n]].into_iter().chain(each).collect()
}

/// Checks all forms of an operator.
///
/// * The CPU form agrees with the composed one, in values and gradients, and has the same bits on any number of threads.
/// * The pretended GPU has the same bits as the CPU, counts what fell back (all but `add`), and keeps nothing.
/// * An input has a gradient if and only if it is tracked and takes one; gradients are added to what is there already.
/// * Two inputs may be the same tensor.
/// * Every failed allocation is an error of the device, after which the engine still works.
/// * Inputs on another device are refused.
pub(crate) fn forms(
    op: &'static str,
    inputs: &[Input],
    f: impl Fn(&Context, &mut Tape, &[Tensor]) -> Result<Vec<Tensor>>,
) {
    let f: Run = &f;
    let shapes: Vec<_> = inputs.iter().map(|i| i.shape).collect();
    let name = format!("{op} of {shapes:?}");
    let composed = Context::new(Device::Cpu, 1).with_forms(Forms::Composed);
    let best = Context::new(Device::Cpu, 1);
    let all = vec![true; inputs.len()];
    let of = |cx: &Context, tracked: &[bool], consumers| -> Result<Numbers> {
        let tensor = |(input, &tracked): (&Input, &bool)| Ok(input.tensor(cx)?.tracked_if(tracked));
        let x: Vec<Tensor> = inputs.iter().zip(tracked).map(tensor).collect::<Result<_>>()?;
        run(cx, &x, consumers, f)
    };
    let compare = |what: &str, got: &Numbers, expected: &Numbers| {
        for (i, (got, expected)) in got.outputs.iter().zip(&expected.outputs).enumerate() {
            near(&format!("{name}, {what}, output {i}"), got, expected, 2e-5);
        }
        for (i, pair) in got.gradients.iter().zip(&expected.gradients).enumerate() {
            let place = format!("{name}, {what}, gradient of input {i}");
            match pair {
                (Some(got), Some(expected)) => near(&place, got, expected, 2e-5),
                (got, expected) => assert_eq!(got.is_some(), expected.is_some(), "{place}"),
            }
        }
    };
    for tracked in combinations(inputs.len()) {
        let what = format!("tracked {tracked:?}");
        let reference = of(&composed, &tracked, Consumers::One).unwrap();
        let got = of(&best, &tracked, Consumers::One).unwrap();
        compare(&what, &got, &reference);
        for (i, (input, gradient)) in inputs.iter().zip(&got.gradients).enumerate() {
            assert_eq!(gradient.is_some(), tracked[i] && input.takes_gradient, "{name}, {what}, gradient {i}");
        }
        let (cx, counts) = gpu();
        assert!(of(&cx, &tracked, Consumers::One).unwrap().bits() == got.bits(), "{name}, {what}, on the GPU");
        let falls = if op == "add" { BTreeMap::new() } else { BTreeMap::from([(op, 1)]) };
        assert_eq!(cx.fallbacks(), falls, "{name}");
        assert_eq!(counts.live.load(Relaxed), 0, "{name}, {what}: memory of the GPU outlives the tape");
    }
    let (cx, counts) = gpu();
    let alone = of(&best, &all, Consumers::One).unwrap();
    let shared = of(&best, &all, Consumers::Three).unwrap();
    compare("three consumers", &shared, &of(&composed, &all, Consumers::Three).unwrap());
    // Sums of another order: a GPU adds an operator's gradient as a whole.
    compare("three consumers on the GPU", &of(&cx, &all, Consumers::Three).unwrap(), &shared);
    for (i, (sum, one)) in shared.gradients.iter().zip(&alone.gradients).enumerate() {
        let len = inputs[i].values.len();
        let mut expected = one.clone().unwrap_or_else(|| vec![0.0; len]);
        for key in ["early", "late"] {
            expected.iter_mut().zip(floats(&format!("{key} {i}"), len)).for_each(|(sum, v)| *sum += v);
        }
        near(&format!("{name}, sum of the gradients of input {i}"), sum.as_ref().unwrap(), &expected, 1e-5);
    }
    for threads in [2, 3] {
        let again = of(&Context::new(Device::Cpu, threads), &all, Consumers::Three).unwrap();
        assert!(again.bits() == shared.bits(), "{name}: {threads} threads give other bits than one");
    }
    for cx in [&best, &composed, &cx] {
        twice(cx, &name, inputs, f);
    }
    refused(&cx, op, inputs, f);
    assert_eq!(counts.live.load(Relaxed), 0, "{name}");
    for failing in 1.. {
        counts.fail_in.store(failing, Relaxed);
        let outcome = of(&cx, &all, Consumers::One);
        let reached = counts.fail_in.swap(0, Relaxed) == 0;
        assert_eq!(counts.live.load(Relaxed), 0, "{name}: failed allocation {failing} leaks");
        match outcome {
            Ok(numbers) => {
                assert!(!reached, "{name}: failed allocation {failing} goes unseen");
                assert!(numbers.bits() == alone.bits(), "{name}, after failed allocations");
                break;
            }
            Err(Error::Device(text)) => assert!(text.contains("out of memory on pretended"), "{name}: {text}"),
            Err(other) => panic!("{name}: {other}"),
        }
    }
}

/// As [`forms`], and also checks the CPU's gradients against central differences of the CPU's values: a coarse check, but
/// one that is independent of dfdx.
pub(crate) fn forms_and_slopes(
    op: &'static str,
    inputs: &[Input],
    f: impl Fn(&Context, &mut Tape, &[Tensor]) -> Result<Vec<Tensor>>,
) {
    const STEP: f32 = 1.0 / 128.0;
    forms(op, inputs, &f);
    let cx = Context::new(Device::Cpu, 1);
    let of = |inputs: &[Input]| {
        let x: Vec<Tensor> = inputs.iter().map(|input| input.tensor(&cx).unwrap().tracked()).collect();
        run(&cx, &x, Consumers::One, &f).unwrap()
    };
    // The loss of which `run` takes the gradient.
    let loss = |inputs: &[Input]| -> f64 {
        let outputs = of(inputs).outputs;
        let term = |(i, y): (usize, &Vec<f32>)| -> f64 {
            normal(&format!("out {i}"), y.len()).iter().zip(y).map(|(w, y)| w * f64::from(*y)).sum()
        };
        outputs.iter().enumerate().map(term).sum()
    };
    let gradients = of(inputs).gradients;
    let mut moved = inputs.to_vec();
    for (i, gradient) in gradients.iter().enumerate() {
        let mut expected = Vec::new();
        for at in 0..inputs[i].values.len() {
            let here = inputs[i].values[at];
            let mut with = |value: f32| {
                moved[i].values[at] = value;
                loss(&moved)
            };
            expected.push(((with(here + STEP) - with(here - STEP)) / f64::from(2.0 * STEP)) as f32);
            with(here);
        }
        near(&format!("slopes of {op} by input {i}"), gradient.as_ref().unwrap(), &expected, 2e-3);
    }
}

/// A tensor that is given as two inputs gets the sum of both gradients, or one of them if the other input is detached.
fn twice(cx: &Context, name: &str, inputs: &[Input], f: Run) {
    for (i, j) in (0..inputs.len()).flat_map(|j| (0..j).map(move |i| (i, j))) {
        if inputs[i].shape != inputs[j].shape || !inputs[i].takes_gradient || !inputs[j].takes_gradient {
            continue;
        }
        let mut x: Vec<Tensor> = inputs.iter().map(|input| input.tensor(cx).unwrap().tracked()).collect();
        x[j] = inputs[i].tensor(cx).unwrap().tracked();
        let apart = run(cx, &x, Consumers::One, f).unwrap();
        let [a, b] = [i, j].map(|i| apart.gradients[i].clone().unwrap());
        x[j] = x[i].clone();
        let one = run(cx, &x, Consumers::One, f).unwrap();
        assert!(one.outputs == apart.outputs, "{name}, inputs {i} and {j} are one");
        let sum: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
        // Terms that cancel leave less than their rounding.
        let scale = a.iter().chain(&b).fold(0.0f32, |m, v| m.max(v.abs()));
        for (got, expected) in one.gradients[i].as_ref().unwrap().iter().zip(&sum) {
            assert!((got - expected).abs() <= 1e-5 * scale, "{name}, {i} and {j} are one: {got} and {expected}");
        }
        x[j] = x[i].clone().detached();
        let half = run(cx, &x, Consumers::One, f).unwrap();
        near(&format!("{name}, input {j} is {i} detached"), half.gradients[i].as_ref().unwrap(), &a, 1e-5);
    }
}

fn refused(cx: &Context, op: &'static str, inputs: &[Input], f: Run) {
    for i in 0..inputs.len() {
        let mut x: Vec<Tensor> = inputs.iter().map(|input| input.tensor(cx).unwrap()).collect();
        x[i] = inputs[i].tensor(&cx.on_host()).unwrap();
        let error = f(cx, &mut Tape::training(), &x).err();
        assert_eq!(error, Some(Error::Devices { op }), "input {i} lies elsewhere");
    }
}
