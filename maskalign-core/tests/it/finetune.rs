//! Fine-tuning by the papers' settings decays and scales what timm does (`tests/fixtures/stages/make_finetune_groups.py`).

use std::{collections::BTreeMap, path::Path};

use maskalign_core::{
    Context, Device, Tape, Tensor,
    components::{optimizers::Update, towers::TrainedStudents},
    ops,
    stages::{Finetune, Task},
};

use crate::support::{planned, stage};

const RECIPE: &str = "{ name: finetune, stages: { finetune: { type: finetune, epochs: 1, classes: 5,
    data: { dataset: { type: image_folder, root: elsewhere }, transforms: [{ type: center_crop, size: 28 }] },
    student: { type: vit, arch: { dim: 8, depth: 4, heads: 2, patch: 7 }, positions: learned }, layer_decay: 0.55,
    optimizer: { type: adamw, base_lr: 3.0e-4, weight_decay: 0.05, no_decay: [pos_embed, cls_token] },
    schedule: { type: cosine }, batch: { effective: 4 } } } }";

#[test]
fn its_groups_are_timms() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/stages/finetune_groups.json");
    let recorded: BTreeMap<String, serde_json::Value> =
        serde_json::from_str(&std::fs::read_to_string(file).expect("the fixture")).expect("JSON");
    let cx = Context::new(Device::Cpu, 1);
    let plan = planned(|context| stage::<Finetune>(RECIPE).plan_finetune(context)).unwrap_or_else(|r| panic!("{r:?}"));
    let mut model = plan.model(&plan.init(&cx), &TrainedStudents::default()).unwrap();
    let optimizer = &plan.training().optimizer;
    let mut decays = BTreeMap::new();
    model.visit(&mut |p| {
        if !p.is_trained() {
            return;
        }
        let (rows, columns) = p.value.shape();
        p.load(&vec![1.0; rows * columns]).unwrap();
        // Where the gradient is zero, decay alone moves a parameter.
        let mut tape = Tape::training();
        let nothing = ops::scale(&cx, &mut tape, &p.value, 0.0).unwrap();
        let loss = ops::sum(&cx, &mut tape, &nothing).unwrap();
        let gradients = tape.backward(&loss).unwrap();
        let mut state = [0, 1].map(|_| Tensor::zeros(cx.device(), rows, columns).unwrap());
        let update = Update { lr: 0.1, progress: 0.0, step: 1, gradient_scale: 1.0 };
        optimizer.update(&cx, p, &gradients, &mut state, update).unwrap();
        decays.insert(p.name.clone(), p.value.to_vec()[0] < 1.0);
    });
    assert!(decays.keys().eq(recorded.keys()), "other parameters: {:?}", decays.keys());
    for (name, decays) in &decays {
        let (expected, scale) = (&recorded[name]["decays"], recorded[name]["scale"].as_f64().unwrap());
        assert_eq!(expected, decays, "{name}");
        let ours = model.lr_scale(name);
        assert!((ours - scale).abs() < 1e-12, "{name}: {ours}, timm {scale}");
    }
}
