//! A teacher that is its student's moving average. Its steps are a case that `verify` replays (`tests/fixtures/cases`).

use maskalign_core::{
    Context, Device,
    components::towers::TrainedStudents,
    nn::Role,
    stages::{Pretrain, PretrainModel, Task},
    weights::TensorMap,
};

use crate::support::{part, planned, stage};

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

fn of_role(model: &mut PretrainModel, roles: &[Role]) -> TensorMap {
    let mut values = TensorMap::new();
    model.visit(&mut |p| {
        if roles.contains(&p.role()) {
            values.insert(p.name.clone(), p.to_host());
        }
    });
    values
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
