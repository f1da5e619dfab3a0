//! The composed operators against finite differences in f64, and the fused ones against the composed.

use dfdx::prelude::*;
use maskalign_core::random::Stream;

fn normal(key: &str, len: usize) -> Vec<f64> {
    let mut stream = Stream::new(7, key, 0, 0);
    (0..len).map(|_| stream.normal()).collect()
}

/// Norm of the difference over norm of the reference.
fn difference(got: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let error = norm(&mut got.iter().zip(expected).map(|(a, b)| a - b));
    error / norm(&mut expected.iter().copied()).max(1e-12)
}

mod composed_operators {
    use maskalign_core::{
        device::{Matrix, Vector},
        kernels::{Act, AttentionShape, Distance, composed},
        tape::Recorder,
    };

    use super::*;

    type M = Matrix<Cpu, f64>;
    type R = Recorder<Cpu, f64>;
    type S = Tensor<(), f64, Cpu>;

    /// How the inputs reach the loss.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Reach {
        /// Through the operator alone.
        Alone,
        /// By a second way too, recorded before the operator.
        AlsoBefore,
        /// By a second way too, recorded after it.
        AlsoAfter,
        /// Through the operator alone, as transposes of what is varied.
        Strided,
    }

    struct Input {
        shape: (usize, usize),
        values: Vec<f64>,
    }

    fn input(key: &str, rows: usize, columns: usize) -> Input {
        Input { shape: (rows, columns), values: normal(key, rows * columns) }
    }

    fn vector(x: &M) -> Vector<Cpu, f64> {
        let len = x.shape().0 * x.shape().1;
        x.clone().reshape_like(&(len,))
    }

    fn constant(key: &str, rows: usize, columns: usize) -> M {
        Cpu::default().tensor_from_vec(normal(key, rows * columns), (rows, columns))
    }

    /// The values weighted at random, so that every one counts.
    fn weighted(r: &mut R, y: &M, key: &str) -> S {
        let (rows, columns) = *y.shape();
        let weights = constant(key, rows, columns);
        r.run(y, |y| y.try_mul(weights)?.try_reshape_like(&(rows * columns,))?.try_sum::<(), Axis<0>>()).unwrap()
    }

    /// The loss, and its gradient by every input.
    fn loss(inputs: &[Input], reach: Reach, f: &dyn Fn(&mut R, &[M]) -> Vec<M>) -> (f64, Vec<Vec<f64>>) {
        let dev = Cpu::default();
        let mut r = R::training();
        // A single row stands for a vector, of which there is no transpose.
        let strided = |i: &Input| reach == Reach::Strided && i.shape.0 > 1;
        let leaf = |input: &Input| -> M {
            let (rows, columns) = input.shape;
            let shape = if strided(input) { (columns, rows) } else { (rows, columns) };
            dev.tensor_from_vec(input.values.clone(), shape)
        };
        let leaves: Vec<M> = inputs.iter().map(leaf).collect();
        let mut x = leaves.clone();
        for (x, input) in x.iter_mut().zip(inputs) {
            if strided(input) {
                *x = r.run(x, |x| x.try_permute::<_, Axes2<1, 0>>()).unwrap();
            }
        }
        let mut terms = Vec::new();
        let also = |r: &mut R, terms: &mut Vec<S>| {
            for (i, x) in x.iter().enumerate() {
                let square = r.run(x, |x| x.try_square()).unwrap();
                terms.push(weighted(r, &square, &format!("also {i}")));
            }
        };
        if reach == Reach::AlsoBefore {
            also(&mut r, &mut terms);
        }
        for (i, y) in f(&mut r, &x).iter().enumerate() {
            terms.push(weighted(&mut r, y, &format!("out {i}")));
        }
        if reach == Reach::AlsoAfter {
            also(&mut r, &mut terms);
        }
        let mut total = terms[0].clone();
        for term in &terms[1..] {
            total = r.run(&total, |total| total.try_add(term.clone())).unwrap();
        }
        let value = total.as_vec()[0];
        let mut gradients = r.backward(&total).unwrap();
        let of = |x: &M| {
            gradients.get_or_alloc_mut(x).unwrap();
            gradients.get(x).as_vec()
        };
        (value, leaves.iter().map(of).collect())
    }

    /// Holds the gradients against central differences of the loss.
    fn check(name: &str, mut inputs: Vec<Input>, f: impl Fn(&mut R, &[M]) -> Vec<M>) {
        const STEP: f64 = 1e-5;
        for reach in [Reach::Alone, Reach::AlsoBefore, Reach::AlsoAfter, Reach::Strided] {
            let (_, gradients) = loss(&inputs, reach, &f);
            for i in 0..inputs.len() {
                let mut expected = Vec::new();
                for at in 0..inputs[i].values.len() {
                    let here = inputs[i].values[at];
                    inputs[i].values[at] = here + STEP;
                    let above = loss(&inputs, reach, &f).0;
                    inputs[i].values[at] = here - STEP;
                    let below = loss(&inputs, reach, &f).0;
                    inputs[i].values[at] = here;
                    expected.push((above - below) / (2.0 * STEP));
                }
                let error = difference(&gradients[i], &expected);
                assert!(error < 1e-7, "{name}, input {i}, {reach:?}: {error:e}");
            }
        }
    }

    /// A scalar as a matrix.
    fn single(x: S) -> Vec<M> {
        vec![x.reshape_like(&(1, 1))]
    }

    #[test]
    fn linear() {
        check("linear", vec![input("x", 5, 3), input("w", 4, 3), input("b", 1, 4)], |r, x| {
            vec![composed::linear(r, &x[0], &x[1], Some(&vector(&x[2]))).unwrap()]
        });
        check("linear without bias", vec![input("x", 2, 7), input("w", 1, 7)], |r, x| {
            vec![composed::linear(r, &x[0], &x[1], None).unwrap()]
        });
    }

    #[test]
    fn activations() {
        for act in [Act::None, Act::Gelu, Act::QuickGelu] {
            check(&format!("{act:?}"), vec![input("x", 3, 5)], |r, x| {
                // An activation that does nothing gives its input itself; the loss needs a value of its own.
                let y = r.run(&x[0], |x| x.try_mul(1.5)).unwrap();
                vec![composed::activate(r, y, act).unwrap()]
            });
        }
        check("gelu of a leaf", vec![input("x", 3, 5)], |r, x| vec![composed::gelu(r, &x[0]).unwrap()]);
        check("quick gelu of a leaf", vec![input("x", 3, 5)], |r, x| vec![composed::quick_gelu(r, &x[0]).unwrap()]);
    }

    #[test]
    fn activations_have_pytorchs_values() {
        // torch.nn.functional.gelu and x * sigmoid(1.702 x) in float64.
        let x: M = Cpu::default().tensor_from_vec(vec![-2.0, -0.5, 0.0, 1.0, 3.0], (1, 5));
        let gelu = [-0.04550026389635842, -0.15426876936299344, 0.0, 0.841344746068543, 2.99595030590511];
        let quick = [-0.06434137685579186, -0.1496115633936199, 0.0, 0.8457957659328212, 2.981928690292214];
        let r = &mut R::inference();
        assert!(difference(&composed::gelu(r, &x).unwrap().as_vec(), &gelu) < 1e-9);
        assert!(difference(&composed::quick_gelu(r, &x).unwrap().as_vec(), &quick) < 1e-9);
    }

    #[test]
    fn layer_norm() {
        check("layer norm", vec![input("x", 4, 5), input("g", 1, 5), input("b", 1, 5)], |r, x| {
            vec![composed::layer_norm(r, &x[0], Some((&vector(&x[1]), &vector(&x[2]))), 1e-6).unwrap()]
        });
        check("plain layer norm", vec![input("x", 3, 7)], |r, x| {
            vec![composed::layer_norm(r, &x[0], None, 1e-5).unwrap()]
        });
    }

    #[test]
    fn attention() {
        for (queries, keys) in [(3, 3), (2, 5), (4, 1)] {
            let shape = AttentionShape { batch: 2, heads: 2, queries, keys };
            let inputs = vec![input("q", 2 * queries, 6), input("k", 2 * keys, 6), input("v", 2 * keys, 6)];
            check(&format!("attention {queries} of {keys}"), inputs, |r, x| {
                vec![composed::attention(r, &x[0], &x[1], &x[2], shape).unwrap()]
            });
            let inputs = vec![input("q", 2 * queries, 6), input("kv", 2 * keys, 12)];
            check(&format!("cross attention {queries} of {keys}"), inputs, |r, x| {
                vec![composed::cross_attention(r, &x[0], &x[1], shape).unwrap()]
            });
        }
        let shape = AttentionShape { batch: 1, heads: 1, queries: 3, keys: 3 };
        check("attention of one to itself", vec![input("x", 3, 4)], |r, x| {
            vec![composed::attention(r, &x[0], &x[0], &x[0], shape).unwrap()]
        });
    }

    #[test]
    fn rows() {
        let inputs = || vec![input("a", 2, 3), input("b", 3, 3), input("c", 1, 3)];
        check("gather from three, with repeats", inputs(), |r, x| {
            vec![composed::gather_rows(r, x, &[4, 0, 0, 5, 2, 4, 4]).unwrap()]
        });
        check("gather from one", vec![input("a", 4, 3)], |r, x| vec![composed::gather_rows(r, x, &[3, 1, 3]).unwrap()]);
        check("mean of all tokens", vec![input("x", 6, 3)], |r, x| {
            vec![composed::mean_tokens(r, &x[0], 2, 0).unwrap()]
        });
        check("mean of patches", vec![input("x", 8, 3)], |r, x| vec![composed::mean_tokens(r, &x[0], 2, 1).unwrap()]);
    }

    #[test]
    fn mix() {
        let inputs = || vec![input("a", 3, 4), input("b", 3, 4), input("c", 3, 4), input("w", 5, 3)];
        for rows in [vec![0, 1, 2, 3, 4], vec![3, 1], vec![2]] {
            check(&format!("mix of rows {rows:?}"), inputs(), |r, x| composed::mix(r, &x[..3], &x[3], &rows).unwrap());
        }
    }

    #[test]
    fn distances() {
        let kinds = [
            Distance::Mse,
            Distance::L1,
            Distance::SmoothL1 { beta: 1.0 },
            Distance::SmoothL1 { beta: 0.25 },
            Distance::SmoothL1 { beta: 0.0 },
            Distance::Cosine,
            Distance::Kl,
        ];
        for kind in kinds {
            let target = constant("target", 4, 5);
            check(&format!("{kind:?}"), vec![input("x", 4, 5)], |r, x| {
                single(composed::distance(r, &x[0], &target, kind).unwrap())
            });
        }
    }

    #[test]
    fn cross_entropy() {
        let targets: Vec<f64> = normal("targets", 12)
            .chunks(3)
            .flat_map(|row| {
                let sum: f64 = row.iter().map(|v| v.abs()).sum();
                row.iter().map(move |v| v.abs() / sum).collect::<Vec<_>>()
            })
            .collect();
        check("cross entropy", vec![input("x", 4, 3)], |r, x| {
            let targets: M = x[0].device().tensor_from_vec(targets.clone(), (4, 3));
            single(composed::cross_entropy(r, &x[0], &targets).unwrap())
        });
    }
}

mod fused_operators {
    use std::sync::Arc;

    use maskalign_core::{
        device::{Matrix, Scalar, Vector},
        error::Result,
        kernels::{
            Act, AdamStep, AttentionShape, BlockRun, Distance, Kernels, Standardize, composed::Composed, fused::Fused,
        },
        nn::{Bias, Block, BlockConfig, Init, Linear, Norm, Param},
        tape::{Recorder, gradient},
    };

    use super::*;

    type M = Matrix<Cpu>;
    type R = Recorder<Cpu>;
    type K = dyn Kernels<Cpu>;

    fn floats(key: &str, len: usize) -> Vec<f32> {
        normal(key, len).into_iter().map(|v| v as f32).collect()
    }

    fn matrix(key: &str, rows: usize, columns: usize) -> M {
        Cpu::default().tensor_from_vec(floats(key, rows * columns), (rows, columns))
    }

    fn wide(values: &[f32]) -> Vec<f64> {
        values.iter().map(|&v| f64::from(v)).collect()
    }

    /// Every value at random, around 0; those of scales around 1.
    fn shake(p: &mut Param<Cpu>) {
        let around = if p.name.contains("norm") || p.name.contains("gamma") { 1.0 } else { 0.0 };
        let values: Vec<f32> = floats(&p.name, p.len()).iter().map(|v| around + 0.3 * v).collect();
        p.load(&values);
    }

    fn linear(outputs: usize, inputs: usize, bias: Bias) -> Linear<Cpu> {
        let mut layer = Linear::new(&Init::new(&Cpu::default(), 3, "test"), "layer", outputs, inputs, bias).unwrap();
        layer.each_mut(&mut shake);
        layer
    }

    fn block(dim: usize, heads: usize, mlp: usize, act: Act, layer_scale: bool) -> Block<Cpu> {
        let config = BlockConfig { dim, heads, mlp, eps: 1e-6, act, layer_scale };
        let mut block = Block::new(&Init::new(&Cpu::default(), 3, "test"), "blocks.0", config).unwrap();
        block.each_mut(&mut shake);
        block
    }

    fn parameters(each: impl FnOnce(&mut dyn FnMut(&Param<Cpu>))) -> Vec<Vector<Cpu>> {
        let mut all = Vec::new();
        each(&mut |p| all.push(p.vector()));
        all
    }

    /// Results and gradients, in order.
    type Numbers = Vec<Vec<f32>>;

    /// Runs an operator with a backward pass. With `strided` its inputs are transposes, whose values do not lie row by
    /// row; each input is taken by a second consumer too.
    fn numbers(
        kernels: &K,
        inputs: &[M],
        parameters: &[Vector<Cpu>],
        strided: bool,
        f: &dyn Fn(&K, &mut R, &[M]) -> Result<Vec<M>>,
    ) -> Numbers {
        let mut r = R::training();
        let leaves: Vec<M> = match strided {
            false => inputs.to_vec(),
            true => inputs.iter().map(|x| x.clone().permute::<_, Axes2<1, 0>>().contiguous()).collect(),
        };
        let x: Vec<M> = match strided {
            false => leaves.clone(),
            true => leaves.iter().map(|x| r.run(x, |x| x.try_permute::<_, Axes2<1, 0>>()).unwrap()).collect(),
        };
        let mut terms: Vec<Scalar<Cpu>> = Vec::new();
        let mut add = |r: &mut R, y: &M, key: String| {
            let (rows, columns) = *y.shape();
            let weights = matrix(&key, rows, columns);
            terms.push(
                r.run(y, |y| y.try_mul(weights)?.try_reshape_like(&(rows * columns,))?.try_sum::<(), Axis<0>>())
                    .unwrap(),
            );
        };
        for (i, x) in x.iter().enumerate() {
            add(&mut r, x, format!("before {i}"));
        }
        let outputs = f(kernels, &mut r, &x).unwrap();
        for (i, y) in outputs.iter().enumerate() {
            add(&mut r, y, format!("out {i}"));
        }
        for (i, x) in x.iter().enumerate() {
            add(&mut r, x, format!("after {i}"));
        }
        let mut total = terms[0].clone();
        for term in &terms[1..] {
            total = r.run(&total, |total| total.try_add(term.clone())).unwrap();
        }
        let mut gradients = r.backward(&total).unwrap();
        let mut all: Numbers = outputs.iter().map(|y| y.as_vec()).collect();
        all.extend(leaves.iter().map(|x| gradient(&mut gradients, x).unwrap().as_vec()));
        all.extend(parameters.iter().map(|p| gradient(&mut gradients, p).unwrap().as_vec()));
        all
    }

    /// Fused on 1, 2 and 3 threads: near the composed operator, and the same bits whatever the threads.
    fn agree(name: &str, of: impl Fn(&K) -> Numbers) {
        let expected = of(&Composed::new(1));
        let got = of(&Fused::new(1));
        assert_eq!(got.len(), expected.len());
        for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
            let error = difference(&wide(got), &wide(expected));
            assert!(error < 2e-5, "{name}, number {i}: {error:e}");
        }
        for threads in [2, 3] {
            let again = of(&Fused::new(threads));
            let bits = |numbers: &Numbers| -> Vec<Vec<u32>> {
                numbers.iter().map(|v| v.iter().map(|v| v.to_bits()).collect()).collect()
            };
            assert!(bits(&again) == bits(&got), "{name}: {threads} threads give other bits than one");
        }
    }

    fn check(name: &str, inputs: &[M], parameters: &[Vector<Cpu>], f: impl Fn(&K, &mut R, &[M]) -> Result<Vec<M>>) {
        for strided in [false, true] {
            let name = format!("{name}{}", if strided { " of strided inputs" } else { "" });
            agree(&name, |kernels| numbers(kernels, inputs, parameters, strided, &f));
        }
    }

    fn single(x: Scalar<Cpu>) -> Vec<M> {
        vec![x.reshape_like(&(1, 1))]
    }

    #[test]
    fn linear_and_embed() {
        for (rows, inputs, outputs) in [(1, 1, 1), (7, 5, 3), (37, 19, 65), (130, 67, 33)] {
            for act in [Act::None, Act::Gelu, Act::QuickGelu] {
                for bias in [Bias::With, Bias::Without] {
                    let layer = linear(outputs, inputs, bias);
                    let all = parameters(|f| layer.each(f));
                    let x = matrix("x", rows, inputs);
                    let name = format!("linear {rows} x {inputs} -> {outputs} {act:?}, bias {bias:?}");
                    check(&name, &[x], &all, |k, r, x| Ok(vec![k.linear(r, &x[0], &layer, act)?]));
                }
            }
            let layer = linear(outputs, inputs, Bias::With);
            let all = parameters(|f| layer.each(f));
            let data = matrix("data", rows, inputs);
            let strided = matrix("strided", inputs, rows).permute::<(usize, usize), Axes2<1, 0>>();
            for (name, data) in [("embed", data), ("embed of strided data", strided)] {
                agree(name, |k| numbers(k, &[], &all, false, &|k, r, _| Ok(vec![k.embed(r, &data, &layer)?])));
            }
        }
    }

    #[test]
    fn frozen_weights_are_packed_without_a_change() {
        for (rows, inputs, outputs) in [(3, 5, 7), (41, 33, 70)] {
            let layer = linear(outputs, inputs, Bias::With);
            let x = matrix("x", rows, inputs);
            agree("packed", |k| {
                let mut layer = layer.clone();
                layer.pack(k).unwrap();
                vec![k.linear(&mut R::inference(), &x, &layer, Act::Gelu).unwrap().as_vec()]
            });
        }
    }

    #[test]
    fn layer_norm() {
        for (rows, columns) in [(1, 2), (5, 7), (33, 65)] {
            let x = matrix("x", rows, columns);
            let mut norm = Norm::new(&Init::new(&Cpu::default(), 1, "test"), "norm", columns, 1e-6).unwrap();
            norm.each_mut(&mut shake);
            let all = parameters(|f| norm.each(f));
            check("layer norm", std::slice::from_ref(&x), &all, |k, r, x| Ok(vec![k.layer_norm(r, &x[0], &norm)?]));
            let plain = Norm::plain(1e-5);
            check("plain layer norm", &[x], &[], |k, r, x| Ok(vec![k.layer_norm(r, &x[0], &plain)?]));
        }
    }

    #[test]
    fn attention() {
        for (batch, heads, width, queries, keys) in
            [(1, 1, 3, 1, 1), (2, 3, 5, 7, 7), (3, 2, 9, 5, 17), (1, 2, 32, 50, 3), (2, 1, 64, 70, 130)]
        {
            let shape = AttentionShape { batch, heads, queries, keys };
            let dim = heads * width;
            let inputs =
                [matrix("q", batch * queries, dim), matrix("k", batch * keys, dim), matrix("v", batch * keys, dim)];
            check(&format!("attention {shape:?}"), &inputs, &[], |k, r, x| {
                Ok(vec![k.attention(r, &x[0], &x[1], &x[2], shape)?])
            });
            let inputs = [matrix("q", batch * queries, dim), matrix("kv", batch * keys, 2 * dim)];
            check(&format!("cross attention {shape:?}"), &inputs, &[], |k, r, x| {
                Ok(vec![k.cross_attention(r, &x[0], &x[1], shape)?])
            });
        }
    }

    #[test]
    fn queries_keys_and_values_may_be_one_and_the_same() {
        let x = matrix("x", 6, 5);
        let shape = AttentionShape { batch: 2, heads: 1, queries: 3, keys: 3 };
        check("attention", std::slice::from_ref(&x), &[], |k, r, x| {
            Ok(vec![k.attention(r, &x[0], &x[0], &x[0], shape)?])
        });
        check("keys and values", &[x.clone(), matrix("q", 4, 5)], &[], |k, r, x| {
            let shape = AttentionShape { queries: 2, ..shape };
            Ok(vec![k.attention(r, &x[1], &x[0], &x[0], shape)?])
        });
    }

    #[test]
    fn blocks() {
        for (dim, heads, mlp, batch, tokens) in [(6, 2, 11, 2, 5), (33, 3, 65, 3, 17), (16, 1, 8, 1, 1)] {
            for (layer_scale, drop_path, act) in [
                (false, false, Act::Gelu),
                (true, true, Act::QuickGelu),
                (false, true, Act::Gelu),
                (true, false, Act::None),
            ] {
                let block = block(dim, heads, mlp, act, layer_scale);
                let all = parameters(|f| block.each(f));
                let scale = |key: &str| -> Arc<[f32]> {
                    let drops = normal(key, batch);
                    drops.iter().enumerate().map(|(i, v)| if i > 0 && *v < 0.0 { 0.0 } else { 1.25 }).collect()
                };
                let x = matrix("x", batch * tokens, dim);
                for recompute in [false, true] {
                    let branch_scale = drop_path.then(|| (scale("attention"), scale("mlp")));
                    let run = BlockRun { batch, tokens, branch_scale, recompute };
                    let name = format!(
                        "block of {dim}, layer scale {layer_scale}, drop path {drop_path}, recompute {recompute}"
                    );
                    check(&name, std::slice::from_ref(&x), &all, |k, r, x| Ok(vec![k.block(r, &x[0], &block, &run)?]));
                }
            }
        }
    }

    #[test]
    fn recomputed_blocks_give_the_same_bits() {
        let block = block(18, 3, 37, Act::Gelu, true);
        let all = parameters(|f| block.each(f));
        let x = matrix("x", 22, 18);
        let of = |kernels: &K, recompute| {
            let run = BlockRun { batch: 2, tokens: 11, branch_scale: None, recompute };
            numbers(kernels, std::slice::from_ref(&x), &all, false, &|k, r, x| {
                Ok(vec![k.block(r, &x[0], &block, &run)?])
            })
        };
        assert!(of(&Fused::new(2), true) == of(&Fused::new(2), false));
        assert!(of(&Composed::new(1), true) == of(&Composed::new(1), false));
    }

    #[test]
    fn the_last_block_runs_in_two_halves() {
        for (dim, heads, mlp, batch, tokens) in [(6, 2, 11, 2, 5), (33, 3, 65, 3, 18)] {
            for (packed, layer_scale) in [(false, true), (true, false), (true, true)] {
                let block = block(dim, heads, mlp, Act::QuickGelu, layer_scale);
                let contiguous = matrix("x", batch * tokens, dim);
                let strided = matrix("x", dim, batch * tokens).permute::<(usize, usize), Axes2<1, 0>>();
                let run = BlockRun { batch, tokens, ..Default::default() };
                let some: Vec<u32> = (0..batch as u32).flat_map(|i| [0, 1 + i % 2, tokens as u32 - 1]).collect();
                for x in [contiguous, strided] {
                    for rows in [None, Some(&some[..])] {
                        agree(&format!("last block of {dim}, packed {packed}, rows {rows:?}"), |k| {
                            let mut block = block.clone();
                            if packed {
                                block.pack_split(k).unwrap();
                            }
                            let begun = k.begin_block(&x, &block, &run).unwrap();
                            let attention = begun.attention.clone();
                            let y = k.finish_block(&x, &block, &run, begun, rows).unwrap();
                            vec![attention, y.as_vec()]
                        });
                    }
                }
            }
        }
    }

    #[test]
    fn sums_rows_and_means() {
        let (x, y) = (matrix("x", 9, 7), matrix("y", 9, 7));
        check("add", &[x.clone(), y.clone()], &[], |k, r, x| Ok(vec![k.add(r, &x[0], &x[1])?]));
        let strided = matrix("c", 7, 9).permute::<(usize, usize), Axes2<1, 0>>();
        for constant in [y.clone(), strided] {
            check("add a constant", std::slice::from_ref(&x), &[], |k, r, x| {
                Ok(vec![k.add_constant(r, &x[0], &constant)?])
            });
        }
        check("gather", &[x.clone(), matrix("z", 2, 7), matrix("u", 1, 7)], &[], |k, r, x| {
            Ok(vec![k.gather_rows(r, x, &[11, 0, 9, 9, 8, 10, 0, 11, 11, 3])?])
        });
        for first in [0, 1, 2] {
            check("mean of tokens", std::slice::from_ref(&x), &[], |k, r, x| {
                Ok(vec![k.mean_tokens(r, &x[0], 3, first)?])
            });
        }
        check("weighted sum", &[matrix("s", 1, 1), matrix("t", 1, 1), matrix("u", 1, 1)], &[], |k, r, x| {
            let terms: Vec<Scalar<Cpu>> = x.iter().map(|x| x.clone().reshape_like(&())).collect();
            Ok(single(k.weighted_sum(r, &terms, &[0.5, -2.0, 0.0])?))
        });
    }

    #[test]
    fn mix() {
        for (levels, columns) in [(1, 3), (3, 7), (12, 33)] {
            let mut inputs: Vec<M> = (0..levels).map(|i| matrix(&format!("x{i}"), 11, columns)).collect();
            inputs.push(matrix("w", levels + 1, levels));
            for rows in [(0..=levels).collect::<Vec<_>>(), vec![levels], vec![levels, 0]] {
                check(&format!("mix of {levels}, rows {rows:?}"), &inputs, &[], |k, r, x| {
                    k.mix(r, &x[..levels], &x[levels], &rows)
                });
            }
        }
    }

    #[test]
    fn targets() {
        for (rows, columns) in [(2, 3), (7, 33), (65, 5)] {
            let contiguous = [matrix("a", rows, columns), matrix("b", rows, columns), matrix("c", rows, columns)];
            let strided =
                ["a", "b", "c"].map(|key| matrix(key, columns, rows).permute::<(usize, usize), Axes2<1, 0>>());
            for x in [contiguous, strided] {
                for kind in [Standardize::Length, Standardize::Rows, Standardize::All] {
                    agree(&format!("{kind:?}"), |k| vec![k.standardize(&x[0], kind).unwrap().as_vec()]);
                }
                agree("weighted mean", |k| vec![k.weighted_mean(&x, &[0.2, -1.5, 0.75]).unwrap().as_vec()]);
            }
        }
    }

    #[test]
    fn distances() {
        let kinds = [
            Distance::Mse,
            Distance::L1,
            Distance::SmoothL1 { beta: 2.0 },
            Distance::SmoothL1 { beta: 0.1 },
            Distance::SmoothL1 { beta: 0.0 },
            Distance::Cosine,
            Distance::Kl,
        ];
        for (rows, columns) in [(1, 2), (5, 7), (67, 33)] {
            let strided = matrix("target", columns, rows).permute::<(usize, usize), Axes2<1, 0>>();
            for target in [matrix("target", rows, columns), strided] {
                for kind in kinds {
                    check(&format!("{kind:?} {rows} x {columns}"), &[matrix("x", rows, columns)], &[], |k, r, x| {
                        Ok(single(k.distance(r, &x[0], &target, kind)?))
                    });
                }
            }
            let targets: Vec<f32> = floats("classes", rows * columns)
                .chunks(columns)
                .flat_map(|row| {
                    let sum: f32 = row.iter().map(|v| v.abs()).sum();
                    row.iter().map(move |v| v.abs() / sum)
                })
                .collect();
            check(&format!("cross entropy {rows} x {columns}"), &[matrix("x", rows, columns)], &[], |k, r, x| {
                Ok(single(k.cross_entropy(r, &x[0], targets.clone())?))
            });
        }
    }

    #[test]
    fn updates() {
        let dev = Cpu::default();
        for len in [1, 7, 1003, 70_001] {
            agree(&format!("adamw of {len}"), |k| {
                let mut parameter = Param::new(&dev, "p", &[len], floats("p", len)).unwrap();
                let other = Param::new(&dev, "other", &[3], floats("other", 3)).unwrap();
                let zeros = || -> Vector<Cpu> { dev.tensor_from_vec(vec![0.0; len], (len,)) };
                let (mut first, mut second, mut norms) = (zeros(), zeros(), Vec::new());
                for step in 1..4u64 {
                    let mut gradients = Gradients::leaky();
                    let buffer: &mut Vec<f32> = gradients.get_or_alloc_mut(&parameter.value).unwrap();
                    buffer.copy_from_slice(&floats(&format!("g{step}"), len));
                    let buffer: &mut Vec<f32> = gradients.get_or_alloc_mut(&other.value).unwrap();
                    buffer.copy_from_slice(&floats("h", 3));
                    for parameters in [vec![parameter.vector(), other.vector()], vec![other.vector()], Vec::new()] {
                        norms.push(k.square_sum(&mut gradients, &parameters).unwrap() as f32);
                    }
                    let step = AdamStep {
                        lr: 0.01 * step as f64,
                        betas: (0.9, 0.95),
                        eps: 1e-8,
                        weight_decay: 0.05,
                        step,
                        gradient_scale: 0.5,
                    };
                    k.adamw(&mut parameter, &mut gradients, &mut first, &mut second, step).unwrap();
                }
                vec![parameter.value.as_vec(), first.as_vec(), second.as_vec(), norms]
            });
        }
    }
}
