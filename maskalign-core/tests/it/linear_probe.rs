//! Steps of a linear probe, recorded from PyTorch and timm by `tests/fixtures/stages/make_linear_probe.py`.

use maskalign_core::{
    Context, Device, Forms, ImageBatch,
    components::towers::TrainedStudents,
    nn::{Init, Role},
    stages::{Classify, LinearProbe, MicroBatch, MovingAverage, Probe, Task},
    weights::TensorMap,
};

use crate::support::{fixture, on_student, part, planned, relative_error, stage};

const RECIPE: &str = "{ name: probe, stages: { probe: { type: linear_probe, epochs: 1, classes: 5,
    data: { dataset: { type: image_folder, root: elsewhere }, transforms: [{ type: center_crop, size: 28 }] },
    student: { type: vit, arch: { dim: 16, depth: 2, heads: 2, patch: 7 } },
    optimizer: { type: lars, base_lr: 0.1 }, schedule: { type: cosine }, batch: { effective: 12, micro: 6 } } } }";

fn batch(recorded: &TensorMap, rows: std::ops::Range<usize>) -> MicroBatch {
    let pixels = 3 * 28 * 28;
    MicroBatch {
        crops: Vec::new(),
        images: ImageBatch {
            pixels: recorded["images"].data[rows.start * pixels..rows.end * pixels].to_vec(),
            batch: rows.len(),
            size: 28,
        },
        labels: recorded["labels"].data[rows.clone()].iter().map(|label| Some(*label as u32)).collect(),
        indices: rows.collect(),
        epoch: 0,
        progress: 0.0,
    }
}

fn values(probe: &mut Probe, roles: &[Role]) -> TensorMap {
    let mut values = TensorMap::new();
    probe.visit(&mut |p| {
        if roles.contains(&p.role()) {
            values.insert(p.name.clone(), p.to_host());
        }
    });
    values
}

#[test]
fn its_steps_are_those_of_pytorch_and_timm() {
    let mut recorded = fixture("tests/fixtures/stages/linear_probe.safetensors");
    let student = part(&mut recorded, "student.");
    let head = part(&mut recorded, "head.");
    let cx = Context::new(Device::Cpu, 2);
    for cx in [cx.clone(), cx.with_forms(Forms::Composed)] {
        let plan =
            planned(|context| stage::<LinearProbe>(RECIPE).plan_probe(context)).unwrap_or_else(|r| panic!("{r:?}"));
        let mut probe = plan.model(&Init::new(cx.device(), 0, "probe"), &TrainedStudents::default()).unwrap();
        probe.visit(&mut |p| {
            let given = p.name.strip_prefix("head.").map_or(student.get(&p.name), |name| head.get(name));
            p.load(&given.unwrap_or_else(|| panic!("timm has no {}", p.name)).data).unwrap();
        });
        let average = Some(MovingAverage { momentum: 0.6 });
        let mut trainer = plan.training().trainer_for(12).with_average(average);
        for (step, lr) in recorded["lr"].data.iter().enumerate() {
            let before = values(&mut probe, &[Role::Head]);
            let mut parts = (0..2).map(|part| batch(&recorded, step * 12 + part * 6..step * 12 + (part + 1) * 6));
            let mut next = || Ok(parts.next().unwrap());
            let loss = trainer.step_at(&cx, &mut probe, 2, &mut next, f64::from(*lr)).unwrap().loss;
            let expected = recorded["expect.loss"].data[step];
            assert!((loss - expected).abs() < 1e-5 * expected, "step {step}: {loss}, {expected}");
            let after = values(&mut probe, &[Role::Head, Role::Buffer]);
            assert_eq!(after.len(), 4);
            for (name, ours) in &after {
                let error = relative_error(&ours.data, &recorded[&format!("expect.{step}.{name}")].data);
                assert!(error < 1e-5, "step {step}, {name}: {error:.1e}");
            }
            let roles = [Role::Head, Role::Buffer];
            let averaged = trainer.averaged(&mut probe, |probe| Ok(values(probe, &roles))).unwrap();
            for (name, ours) in &averaged {
                let error = relative_error(&ours.data, &recorded[&format!("expect.{step}.ema.{name}")].data);
                assert!(error < 1e-5, "step {step}, average of {name}: {error:.1e}");
            }
            assert_eq!(values(&mut probe, &roles), after, "what is trained is back in its place");
            // One step moves a weight by little: its direction is compared by itself.
            for (name, before) in &before {
                let moved: Vec<f32> =
                    before.data.iter().zip(&after[name].data).map(|(from, to)| (from - to) / lr).collect();
                let error = relative_error(&moved, &recorded[&format!("expect.{step}.mu.{name}")].data);
                assert!(error < 1e-3, "step {step}, direction of {name}: {error:.1e}");
            }
        }
        let frozen = values(&mut probe, &[Role::Frozen]);
        assert!(
            !frozen.is_empty() && frozen.iter().all(|(name, tensor)| student[name] == *tensor),
            "the student stays"
        );
        let scores = probe.scores(&cx, &batch(&recorded, 0..12).images).unwrap().to_vec();
        let error = relative_error(&scores, &recorded["expect.scores"].data);
        assert!(error < 1e-5, "scores: {error:.1e}");
    }
}

/// A stage that tries several rates on a student of random values.
fn tried(rest: &str) -> Result<serde_json::Value, Vec<String>> {
    let recipe = format!(
        "{{ name: probe, stages: {{ probe: {{ type: linear_probe, epochs: 3, student: {{ type: vit, weights: {{ stage: pretrain }} }},
        data: {{ dataset: {{ type: sample, split: train, limit: 300 }} }}, optimizer: {{ type: adamw, base_lr: 1.0 }},
        schedule: {{ type: cosine, min_lr: 1.0e-6 }}, batch: {{ effective: 30 }}, pooling: mean, {rest} }} }} }}"
    );
    on_student::<LinearProbe>(&recipe, "tests/fixtures/stages/knn_tower.safetensors", 3)
}

#[test]
fn the_best_of_several_rates_is_left() {
    let eval = "eval: { dataset: { type: sample, split: test, limit: 120 } }";
    let results = tried(&format!("{eval}, base_lrs: [1.0e-4, 0.1, 1.0e+40, 0.1]")).unwrap();
    let by_lr = results["by_lr"].as_object().unwrap();
    assert_eq!(by_lr.len(), 3, "{results}");
    assert!(by_lr.values().any(|found| found["diverged_at_step"].is_u64()), "{results}");
    let accuracy = |rate: &str| by_lr[rate]["accuracy"].as_f64().unwrap();
    assert!(accuracy("0.1") > accuracy("0.0001") && accuracy("0.1") > 0.3, "{results}");
    assert_eq!((&results["base_lr"], &results["accuracy"]), (&0.1.into(), &by_lr["0.1"]["accuracy"]));
    assert_eq!(results["steps"], 30);
    let refusals = |rest: &str| tried(rest).unwrap_err().join("; ");
    let unjudged = refusals("base_lrs: [0.1]");
    assert!(unjudged.contains("`base_lrs`: without `eval` there are no images to tell the best rate by"), "{unjudged}");
    let low = refusals(&format!("{eval}, base_lrs: [0.1, 1.0e-7]"));
    assert!(low.contains("`base_lrs.1`: ") && low.contains("min_lr") | low.contains("above the peak"), "{low}");
}

#[test]
fn a_micro_batch_of_one_image_and_a_class_token_that_is_not_there_are_refused() {
    let refusals = |from: &str, to: &str| {
        let recipe = RECIPE.replace(from, to);
        let refusals = planned(|context| stage::<LinearProbe>(&recipe).plan_probe(context)).map(|_| ()).unwrap_err();
        refusals.iter().map(|refusal| refusal.to_string()).collect::<Vec<_>>().join("; ")
    };
    let one = refusals("micro: 6", "micro: 1");
    assert!(one.contains("a micro-batch needs two images"), "{one}");
    let one = refusals("effective: 12, micro: 6", "effective: 1");
    assert!(one.contains("a micro-batch needs two images"), "{one}");
    let no_class_token = refusals("patch: 7 }", "patch: 7 }, cls_token: false");
    assert!(no_class_token.contains("`cls` needs a class token, and the student has none"), "{no_class_token}");
}
