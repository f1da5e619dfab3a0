//! Files of weights: safetensors, PyTorch's, an index of shards, checkpoints, and the towers that are recognised in them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use maskalign_core::{
    nn::Arch,
    run::{Checkpoint, CheckpointHeader, RunError},
    weights::{
        Family, HostTensor, TensorData, TensorMap, TensorRef, WeightsError, describe, naming, read, read_part,
        read_part_shapes, read_shapes, to_canonical, to_family,
    },
};
use maskalign_registry::{Input, LoadRequest, NoRecipes, Recipe, Registry};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{
    archive, committed, edited, fixtures, no_edit,
    run::{Outcome, Random, Target, edit_number},
    runs::edit_json,
    seeds, tensors,
};

/// A place for inputs.
struct Scratch {
    _folder: TempDir,
    path: PathBuf,
}

impl Scratch {
    fn new(name: &str) -> Scratch {
        let folder = tempfile::tempdir().expect("a folder");
        Scratch { path: folder.path().join(name), _folder: folder }
    }

    fn write(&self, bytes: &[u8]) -> &Path {
        fs::write(&self.path, bytes).expect("it is written");
        &self.path
    }
}

/// What a refusal says; it is a mistake of whoever named the file.
fn said(error: &WeightsError) -> String {
    assert!(error.is_user_mistake(), "{error:?}");
    error.to_string()
}

/// Bytes of the values of tensors, of which there are as many as their shapes say.
fn check_tensors(tensors: &TensorMap) -> u64 {
    let values = |(name, tensor): (&String, &HostTensor)| {
        let count = tensor.shape.iter().try_fold(1usize, |product, length| product.checked_mul(*length));
        assert_eq!(count, Some(tensor.data.len()), "{name}");
        4 * tensor.data.len() as u64
    };
    tensors.iter().map(values).sum()
}

/// Reads a file with its values and without, whole and in part.
fn read_both(path: &Path) -> Result<TensorMap, WeightsError> {
    let (whole, shapes) = (read(path), read_shapes(path));
    for key in ["model", "teacher"] {
        if let Err(error) = read_part(path, Some(key)).and(read_part_shapes(path, Some(key))) {
            assert!(!said(&error).is_empty());
        }
    }
    match (&whole, &shapes) {
        (Ok(whole), Ok(shapes)) => {
            let shape = |(name, tensor): (&String, &HostTensor)| (name.clone(), tensor.shape.clone());
            let both = [whole, shapes].map(|map| map.iter().map(shape).collect::<Vec<_>>());
            assert_eq!(both[0], both[1]);
        }
        (Ok(_), Err(error)) => panic!("it is read with values, and without: {error}"),
        // Values may be damaged where names and shapes are well.
        (Err(_), shapes) => {
            if let Err(error) = shapes {
                assert!(!said(error).is_empty());
            }
        }
    }
    whole
}

#[test]
fn safetensors() {
    let scratch = Scratch::new("model.safetensors");
    Target {
        name: "safetensors",
        committed: &committed(),
        seeds: seeds(&[
            "weights/vit_timm.safetensors",
            "weights/clip_hf.safetensors",
            "weights/sharded/model-00001-of-00002.safetensors",
        ]),
        edit: &|bytes, random| match random.one_in(2) {
            true => tensors::edit(bytes, random),
            false => edit_header(bytes, random),
        },
        mend: &tensors::mend,
        read: &|bytes| match read_both(scratch.write(bytes)) {
            Ok(tensors) => {
                let reference = SafeTensors::deserialize(bytes).expect("the reference implementation reads it");
                assert_eq!(reference.len(), tensors.len());
                for (name, tensor) in reference.iter() {
                    assert_eq!(tensor.shape(), tensors[name].shape, "{name}");
                    let ours = || tensors[name].data.iter().flat_map(|value| value.to_le_bytes());
                    assert!(tensor.dtype() != Dtype::F32 || ours().eq(tensor.data().iter().copied()), "{name}");
                }
                Outcome::Accepted(check_tensors(&tensors))
            }
            Err(error) => Outcome::Refused(said(&error)),
        },
        memory: &|bytes, accepted| (3 << 20) + 96 * bytes.len() as u64 + 4 * accepted,
        cases: 1_000,
        most_bytes: 64 << 10,
    }
    .run();
}

/// Edits numbers and text of a header.
fn edit_header(bytes: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    let end = bytes.iter().rposition(|byte| *byte == b'}')?;
    let (header, data) = bytes.split_at(end + 1);
    let mut header = header.get(8..)?.to_vec();
    if random.one_in(3) {
        header = edited(&header, random);
    } else {
        edit_number(&mut header, random);
    }
    Some([&bytes[..8], &header, data].concat())
}

#[test]
fn pytorch() {
    let scratch = Scratch::new("model.pth");
    Target {
        name: "pytorch",
        committed: &committed(),
        seeds: seeds(&[
            "weights/views.pth",
            "weights/views_protocol4.bin",
            "weights/refused.pth",
            "weights/dino_full.pth",
            "weights/maskalign.pth",
            "weights/clip_torchscript.pt",
        ]),
        edit: &archive::edit,
        mend: &archive::mend,
        read: &|bytes| match read_both(scratch.write(bytes)) {
            Ok(tensors) => Outcome::Accepted(check_tensors(&tensors)),
            Err(error) => Outcome::Refused(said(&error)),
        },
        memory: &|bytes, accepted| (2 << 20) + 256 * bytes.len() as u64 + 4 * accepted,
        cases: 2_000,
        most_bytes: 128 << 10,
    }
    .run();
}

#[test]
fn index() {
    let scratch = Scratch::new("model.safetensors.index.json");
    for name in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
        let shard = fixtures().join("weights/sharded").join(name);
        fs::copy(shard, scratch.path.with_file_name(name)).expect("a copy");
    }
    Target {
        name: "index",
        committed: &committed(),
        seeds: seeds(&["weights/sharded/model.safetensors.index.json"]),
        edit: &no_edit,
        mend: &|bytes| bytes,
        read: &|bytes| match read_both(scratch.write(bytes)) {
            Ok(tensors) => {
                // What the reader has no use for may be no text.
                if let Ok(index) = serde_json::from_slice::<Value>(bytes) {
                    let names = index["weight_map"].as_object().expect("names");
                    assert!(names.keys().all(|name| tensors.contains_key(name)));
                }
                Outcome::Accepted(check_tensors(&tensors))
            }
            // A shard that the index names and that is not there.
            Err(error @ WeightsError::Io { .. }) => Outcome::Refused(error.to_string()),
            Err(error) => Outcome::Refused(said(&error)),
        },
        memory: &|bytes, accepted| (3 << 20) + 64 * bytes.len() as u64 + 4 * accepted,
        cases: 800,
        most_bytes: 32 << 10,
    }
    .run();
}

/// What stands beside weights: the same text as each of the documents that are read there.
#[test]
fn beside() {
    let scratch = Scratch::new("model.safetensors");
    scratch.write(b"");
    Target {
        name: "beside",
        committed: &committed(),
        seeds: seeds(&[
            "weights/beside/clip_both/config.json",
            "weights/beside/clip_gelu/preprocessor_config.json",
            "weights/beside/dinov2/config.json",
            "weights/beside/open_clip_quick/open_clip_config.json",
            "weights/beside/timm_no_class/config.json",
        ]),
        edit: &edit_json,
        mend: &|bytes| bytes,
        read: &|bytes| {
            for name in ["config.json", "preprocessor_config.json", "open_clip_config.json"] {
                fs::write(scratch.path.with_file_name(name), bytes).expect("it is written");
            }
            read_beside(&scratch.path)
        },
        memory: &|bytes, accepted| (8 << 20) + 512 * bytes.len() as u64 + 4 * accepted,
        cases: 400,
        most_bytes: 16 << 10,
    }
    .run();
}

/// Loads a recipe with a teacher of each kind that has these weights: what is taken is in it, what is refused has a place.
fn read_beside(weights: &Path) -> Outcome {
    let description = match describe(weights) {
        Ok(description) => description,
        Err(error) => return Outcome::Refused(said(&error)),
    };
    for at in description.patch.iter().chain(&description.heads).map(|said| (said.document, &said.at)) {
        let text = &description.documents[at.0].1;
        let mut value: &Value = &serde_json::from_str(text).expect("JSON");
        for key in at.1 {
            value = &value[key.as_str()];
        }
        assert!(!value.is_null(), "{:?} is said in {text}", at.1);
    }
    let mut refused = Vec::new();
    for kind in ["clip", "dino", "dinov2", "vit"] {
        let teacher = json!({ "type": kind, "weights": weights.to_string_lossy() });
        let data = json!({ "dataset": { "type": "sample", "split": "test" } });
        let knn = json!({ "type": "knn", "train": data, "test": data, "teachers": { "teacher": teacher } });
        let request = LoadRequest {
            input: Input::Text {
                name: "recipe".into(),
                text: json!({ "name": "beside", "stages": { "knn": knn } }).to_string(),
            },
            sets: &[],
            env: &|_| None,
            builtins: &NoRecipes,
        };
        match Recipe::load(&request, Registry::global().expect("a registry")) {
            Ok(loaded) => {
                let again = serde_json::from_value::<Arch>(
                    loaded.resolved()["stages"]["knn"]["teachers"]["teacher"]["arch"].clone(),
                );
                let said = [&description.dim, &description.depth, &description.heads, &description.patch];
                assert!(again.is_ok() || said.iter().any(|said| said.is_none()));
            }
            Err(report) => {
                assert!(report.0.iter().all(|mistake| mistake.place().is_some()), "{report}");
                refused.push(report.to_string());
            }
        }
    }
    match refused.len() {
        4 => Outcome::Refused(refused.swap_remove(0)),
        _ => Outcome::Accepted(description.documents.iter().map(|(_, text)| text.len() as u64).sum()),
    }
}

#[test]
fn towers() {
    let scratch = Scratch::new("model.safetensors");
    Target {
        name: "towers",
        committed: &committed(),
        seeds: seeds(&[
            "weights/clip_hf.safetensors",
            "weights/clip_hf_bare.safetensors",
            "weights/clip_open_clip.safetensors",
            "weights/clip_openai_bare.safetensors",
            "weights/clip_timm.safetensors",
            "weights/dinov2_hf.safetensors",
            "weights/dinov2_timm.safetensors",
            "weights/vit_hf.safetensors",
            "weights/vit_timm.safetensors",
        ]),
        edit: &tensors::edit,
        mend: &tensors::mend,
        read: &|bytes| read_towers(scratch.write(bytes)),
        memory: &|bytes, accepted| (4 << 20) + 256 * bytes.len() as u64 + 32 * accepted,
        cases: 800,
        most_bytes: 64 << 10,
    }
    .run();
}

/// Looks for a tower of each family, in the values and in the shapes alone.
fn read_towers(path: &Path) -> Outcome {
    let (whole, shapes) = match (read(path), read_shapes(path)) {
        (Ok(whole), Ok(shapes)) => (whole, shapes),
        (Err(error), _) | (_, Err(error)) => return Outcome::Refused(said(&error)),
    };
    let mut refused = None;
    let mut accepted = None;
    for family in [Family::Clip, Family::Dino, Family::Dinov2, Family::Vit] {
        let of_shapes = to_canonical(shapes.clone(), family);
        match to_canonical(whole.clone(), family) {
            Ok(found) => {
                let bytes = check_tensors(&found.tensors);
                accepted = Some(accepted.unwrap_or(0) + bytes + check_tensors(&whole));
                assert!(of_shapes.is_ok(), "{of_shapes:?}");
                // What is written in its naming is the same tower when it is read.
                let key = if family == Family::Clip { "hf_clip" } else { "timm" };
                if let Ok(written) = to_family(&found.tensors, naming(key).expect("a naming")) {
                    let again = to_canonical(written, family).unwrap_or_else(|error| panic!("{family:?}: {error}"));
                    let (mut again, mut found) = (again.tensors, found.tensors);
                    if !found.contains_key("cls_token") {
                        // A position for a class token that is not there belongs to nothing: it may go.
                        again.remove("pos_embed");
                        found.remove("pos_embed");
                    }
                    assert!(again == found, "{family:?}: another tower");
                }
            }
            Err(error) => refused = Some(said(&error)),
        }
        if let Err(error) = of_shapes {
            assert!(!said(&error).is_empty());
        }
    }
    match accepted {
        Some(bytes) => Outcome::Accepted(bytes),
        None => Outcome::Refused(refused.expect("some family was refused")),
    }
}

/// A checkpoint as a stage writes it.
fn checkpoint() -> Vec<u8> {
    let values: Vec<f32> = (0..24u8).map(f32::from).collect();
    let header = CheckpointHeader {
        stage: "pretrain".into(),
        step: 24,
        fingerprint: "f00d".into(),
        metrics_records: 7,
        student: vec!["w".into(), "none".into()],
        meta: json!({ "epoch": 0.25, "scale": 1.0e-300, "nested": [null, { "a": "b" }] }),
    };
    let tensor = |name: &str, shape: &[usize]| TensorRef {
        name: name.into(),
        shape: shape.to_vec(),
        data: TensorData::Host(&values[..shape.iter().product()]),
    };
    let tensors = [
        tensor("model.w", &[2, 3]),
        tensor("model.none", &[0, 4]),
        tensor("model.head.weight", &[4, 6]),
        tensor("optimizer.exp_avg.w", &[2, 3]),
    ];
    let scratch = Scratch::new("step.safetensors");
    Checkpoint::save(&scratch.path, "checkpoint", &header, &tensors).expect("it is written");
    fs::read(&scratch.path).expect("it was written")
}

#[test]
fn checkpoints() {
    let scratch = Scratch::new("step-00000024.safetensors");
    Target {
        name: "checkpoint",
        committed: &committed(),
        seeds: vec![("written now".into(), checkpoint())],
        edit: &|bytes, random| match random.one_in(2) {
            true => tensors::edit(bytes, random),
            false => edit_checkpoint(bytes, random),
        },
        mend: &tensors::mend,
        read: &|bytes| read_checkpoint(scratch.write(bytes), bytes),
        memory: &|bytes, accepted| (4 << 20) + 256 * bytes.len() as u64 + 16 * accepted,
        cases: 1_000,
        most_bytes: 32 << 10,
    }
    .run();
}

/// Edits the text under the checksum.
fn edit_checkpoint(bytes: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    let mut parts = tensors::Parts::of(bytes)?;
    let (seal, text) = parts.sealed()?;
    let mut edited_text = text.as_bytes().to_vec();
    if random.one_in(2) {
        edit_number(&mut edited_text, random);
    } else {
        edited_text = edited(&edited_text, random);
    }
    let sealed = format!("{seal} {}", String::from_utf8_lossy(&edited_text));
    parts.metadata.insert(tensors::CHECKPOINT.into(), sealed.into());
    Some(parts.file())
}

/// What is accepted has the right checksum, and is what is written again.
fn read_checkpoint(path: &Path, bytes: &[u8]) -> Outcome {
    let as_weights = read(path);
    if let Err(error) = as_weights.as_ref().and(read_shapes(path).as_ref()) {
        assert!(!said(error).is_empty());
    }
    if let Err(error) = CheckpointHeader::read(path) {
        assert!(error.is_user_mistake(), "{error:?}");
    }
    let parameters = Checkpoint::load_parameters(path);
    match Checkpoint::load(path) {
        Ok(checkpoint) => {
            let parts = tensors::Parts::of(bytes).expect("a safetensors file");
            let (seal, text) = parts.sealed().expect("a checkpoint");
            if parts.entries.iter().all(|entry| entry.dtype == "F32") {
                assert_eq!(parts.digest(text), seal);
            }
            assert_same(&parameters.expect("it is read for its parameters too"), &checkpoint);
            assert_eq!(CheckpointHeader::read(path).as_ref().ok(), Some(&checkpoint.header));
            let bytes = check_tensors(&checkpoint.tensors);
            let again = path.with_file_name("again.safetensors");
            Checkpoint::save(&again, "checkpoint", &checkpoint.header, &TensorRef::all_of(&checkpoint.tensors))
                .expect("it is written");
            assert_same(&Checkpoint::load(&again).expect("it was written"), &checkpoint);
            Outcome::Accepted(bytes)
        }
        Err(error @ (RunError::Damaged { .. } | RunError::Outdated { .. })) => Outcome::Refused(error.to_string()),
        Err(error) => panic!("{error:?}"),
    }
}

/// Equal to the bit: NaN is itself.
fn assert_same(a: &Checkpoint, b: &Checkpoint) {
    assert_eq!(a.header, b.header);
    let bits = |checkpoint: &Checkpoint| -> Vec<_> {
        let of = |(name, tensor): (&String, &HostTensor)| {
            (name.clone(), tensor.shape.clone(), tensor.data.iter().map(|value| value.to_bits()).collect::<Vec<_>>())
        };
        checkpoint.tensors.iter().map(of).collect()
    };
    assert_eq!(bits(a), bits(b));
}
