//! A classifier of timm's, recorded by `tests/fixtures/make_timm_classifier.py`: under its names a fine-tuned student
//! computes what timm computes, and what is exported is its state dictionary.

use maskalign_core::{
    Context, Device, ImageBatch, Tape,
    components::towers::TrainedStudents,
    stages::{Finetune, MicroBatch, Task},
    weights::{Family, TensorMap, naming, to_canonical, to_family},
};

use crate::support::{fixture, part, planned, stage};

const STAGE: &str = "{ name: classifier, stages: { finetune: { type: finetune, epochs: 1, classes: 5,
    data: { dataset: { type: image_folder, root: elsewhere }, transforms: [{ type: center_crop, size: 28 }] },
    student: { type: vit, arch: { dim: 16, depth: 2, heads: 2, patch: 7 } },
    optimizer: { type: adamw, base_lr: 1.0e-3 }, schedule: { type: cosine }, batch: { effective: 1 } } } }";

#[test]
fn a_fine_tuned_student_is_timms_classifier() {
    let mut recorded = fixture("../tests/fixtures/timm_classifier.safetensors");
    let (images, expected) = (recorded.remove("images").unwrap(), recorded.remove("log_probabilities").unwrap());
    let theirs = part(&mut recorded, "model.");

    let cx = Context::new(Device::Cpu, 1);
    let planned =
        planned(|context| stage::<Finetune>(STAGE).plan_finetune(context)).unwrap_or_else(|r| panic!("{r:?}"));
    let mut model = planned.model(&planned.init(&cx), &TrainedStudents::default()).unwrap();
    let mut own = TensorMap::new();
    model.visit(&mut |p| {
        if let Some(tensor) = theirs.get(&p.name) {
            assert_eq!(p.dims, tensor.shape, "{}", p.name);
            p.load(&tensor.data).unwrap();
        }
        own.insert(p.name.clone(), p.to_host());
    });

    assert_eq!(to_family(&own, naming("timm").unwrap()).unwrap(), theirs, "what is exported loads in timm, strictly");
    let tower = to_canonical(theirs, Family::Vit).unwrap().tensors;
    assert!(tower.iter().all(|(name, tensor)| own[name] == *tensor), "and the tower is read back");

    for (image, pixels) in images.data.chunks_exact(3 * 28 * 28).enumerate() {
        for class in 0..5 {
            let batch = MicroBatch {
                crops: Vec::new(),
                images: ImageBatch { pixels: pixels.to_vec(), batch: 1, size: 28 },
                labels: vec![Some(class)],
                indices: vec![image],
                epoch: 0,
                progress: 0.0,
            };
            let loss = model.loss(&cx, &mut Tape::inference(), &batch).unwrap().value();
            let expected = -expected.data[image * 5 + class as usize];
            assert!(
                (loss - expected).abs() < 1e-4 * expected.abs(),
                "image {image}, class {class}: {loss}, {expected}"
            );
        }
    }
}
