//! Steps of data2vec for images, recorded from PyTorch by `tests/fixtures/stages/make_data2vec.py`: a student with mask
//! tokens, and a teacher that is its moving average.

use std::sync::Arc;

use maskalign_core::{
    Context, Device, Forms, ImageBatch,
    components::{
        maskers::{Counts, Mask, MaskInput, PlannedMasker},
        towers::TrainedStudents,
    },
    nn::Role,
    random::Stream,
    stages::{MicroBatch, Pretrain, PretrainModel, Task},
    weights::{HostTensor, TensorMap},
};

use crate::support::{fixture, part, planned, relative_error, stage};

const STEPS: usize = 4;
const BATCH: usize = 4;
const PATCHES: u32 = 16;

const RECIPE: &str = r"{ name: data2vec, stages: { pretrain: { type: pretrain, epochs: 1,
    data: { dataset: { type: image_folder, root: elsewhere }, transforms: [{ type: center_crop, size: 28 }] },
    student: { type: vit, arch: { dim: 16, depth: 3, heads: 2, patch: 7 }, layer_scale: 0.5, masked_patches: mask_token },
    teachers: { ema: { type: ema, momentum: { from: 0.9, to: 0.99 } } },
    masker: { type: block, masked: 6, min_block: 2 },
    objectives: { features: {
        target: { type: features, teacher: ema, levels: { last: 2 }, normalize: whiten, combine: mean,
            normalize_mean: whiten },
        tokens: [masked],
        aligner: { type: dynamic, levels: { last: 1 }, tap: norm, fusion: simple, head: linear },
        loss: { type: smooth_l1, beta: 2.0 } } },
    optimizer: { type: adamw, base_lr: 1.0, weight_decay: 0.05, clip_norm: 0.05, no_decay: [cls_token] },
    schedule: { type: constant }, batch: { effective: 4, micro: 2 } } } }";

/// The masks of each step, which stands for the epoch.
struct Recorded(Vec<u32>);

impl PlannedMasker for Recorded {
    fn counts(&self) -> Counts {
        let masked = self.0.len() / STEPS / BATCH;
        Counts { visible: PATCHES as usize - masked, masked }
    }

    fn draw(&self, input: &MaskInput, _: &mut Stream) -> Mask {
        let each = self.counts().masked;
        let masked = &self.0[(input.epoch as usize * BATCH + input.image) * each..][..each];
        Mask { visible: (0..PATCHES).filter(|i| !masked.contains(i)).collect(), masked: masked.to_vec() }
    }
}

fn of_role(model: &mut PretrainModel, roles: &[Role]) -> TensorMap {
    let mut values = TensorMap::new();
    model.visit(&mut |p| {
        if roles.contains(&p.role()) {
            values.insert(p.name.clone(), p.to_host());
        }
    });
    values
}

/// Asserts that both sides have the same tensors and that they agree.
fn assert_close(ours: &TensorMap, theirs: &TensorMap, what: &str, tolerance: f64) {
    assert!(!theirs.is_empty() && ours.keys().eq(theirs.keys()), "{what}: other names");
    for (name, tensor) in ours {
        // Softmax ignores a constant: the gradient of a key's bias is round-off.
        let compared = |tensor: &HostTensor| match name.ends_with("attn.qkv.bias") {
            true => [&tensor.data[..16], &tensor.data[32..]].concat(),
            false => tensor.data.clone(),
        };
        let error = relative_error(&compared(tensor), &compared(&theirs[name]));
        assert!(error < tolerance, "{what}, {name}: {error:.1e}");
    }
}

#[test]
fn its_steps_are_those_of_pytorch() {
    let recorded = fixture("tests/fixtures/stages/data2vec.safetensors");
    let cx = Context::new(Device::Cpu, 2);
    for cx in [cx.clone(), cx.with_forms(Forms::Composed)] {
        replay(&cx, recorded.clone());
    }
}

fn replay(cx: &Context, mut recorded: TensorMap) {
    let plan = planned(|context| stage::<Pretrain>(RECIPE).plan_pretrain(context)).unwrap_or_else(|r| panic!("{r:?}"));
    let masks = recorded["masked"].data.iter().map(|i| *i as u32).collect();
    let plan = plan.with_masker(Arc::new(Recorded(masks)));
    let mut trainer = plan.training().trainer_for(STEPS * BATCH);
    let start = part(&mut recorded, "student.");
    let mut model = plan.model(cx, &TrainedStudents::default()).unwrap();
    model.visit(&mut |p| {
        // The teacher starts as the student, whose values are replaced here.
        let name = p.name.strip_prefix("teachers.ema.").unwrap_or(&p.name);
        p.load(&start.get(name).unwrap_or_else(|| panic!("nobody recorded {name}")).data).unwrap();
    });
    let pixels = recorded["images"].data.clone();
    let each = pixels.len() / BATCH;
    for step in 0..STEPS {
        let mut parts = [0..2, 2..4].into_iter().map(|rows: std::ops::Range<usize>| MicroBatch {
            images: ImageBatch { pixels: pixels[rows.start * each..rows.end * each].to_vec(), batch: 2, size: 28 },
            labels: vec![None; 2],
            indices: rows.collect(),
            epoch: step as u64,
            progress: 0.0,
        });
        let mut next = || Ok(parts.next().unwrap());
        let lr = f64::from(recorded["lr"].data[step]);
        let loss = trainer.step_at(cx, &mut model, 2, &mut next, lr).unwrap().loss;
        let expected = recorded["expect.loss"].data[step];
        assert!((loss - expected).abs() < 1e-5 * expected, "step {step}: {loss}, {expected}");
        if step == 0 {
            let gradients = trainer.gradients().unwrap();
            let mut ours = TensorMap::new();
            model.visit(&mut |p| {
                if p.is_trained() {
                    let tensor = HostTensor { shape: p.dims.clone(), data: gradients.to_vec(&p.value) };
                    ours.insert(p.name.clone(), tensor);
                }
            });
            assert_close(&ours, &part(&mut recorded, "expect.grad."), "gradients", 1e-5);
        }
    }
    // AdamW's first steps make whole steps of small gradients' round-off: the tolerance is that of `verify`.
    let ours = of_role(&mut model, &[Role::Student, Role::Head]);
    assert_close(&ours, &part(&mut recorded, "expect.param."), "parameters", 1e-4);
    let ema = part(&mut of_role(&mut model, &[Role::Moving]), "teachers.ema.");
    assert_close(&ema, &part(&mut recorded, "expect.ema."), "the moving average", 1e-4);
}

/// It shares the student's values until one of the two changes.
#[test]
fn the_teacher_starts_as_the_student_and_is_refused_where_no_student_is_trained() {
    let cx = Context::new(Device::Cpu, 1);
    let plan = planned(|context| stage::<Pretrain>(RECIPE).plan_pretrain(context)).unwrap_or_else(|r| panic!("{r:?}"));
    let mut model = plan.model(&cx, &TrainedStudents::default()).unwrap();
    let mut all = of_role(&mut model, &[Role::Student, Role::Moving]);
    let teacher = part(&mut all, "teachers.ema.");
    assert!(teacher.len() > 40 && teacher == all);

    let probe = r"{ name: knn, stages: { knn: { type: knn, teachers: { mean: { type: ema, momentum: 0.9 } },
        train: { dataset: { type: sample, split: train } }, test: { dataset: { type: sample, split: test } } } } }";
    let refusals = planned(|context| {
        use maskalign_core::stages::Stage;
        stage::<maskalign_core::stages::Knn>(probe).plan(context).map(|_| ()).unwrap_err()
    });
    let message = refusals[0].to_string();
    assert!(message.contains("follows the student that a stage trains"), "{message}");
}
