//! The papers' recipes train: small in CI for other papers than MaskAlign's, and MaskAlign's own at its full size.

use std::{
    fs,
    io::{BufWriter, Write},
    path::Path,
};

use crate::support::{Sandbox, files_in, here};
use serde_json::{Value, json};

/// The towers of `fixtures/clip_tiny.safetensors`, on the embedded images of 28 x 28 pixels.
const SMALL: [&str; 5] = [
    "stages.pretrain.data.dataset={type: sample, split: train, limit: 32}",
    "stages.pretrain.data.transforms=[{type: random_resized_crop, size: 28, scale: [0.2, 1.0]}, {type: horizontal_flip}]",
    "stages.pretrain.student.arch={dim: 32, depth: 6, heads: 4, patch: 4}",
    "stages.pretrain.batch={effective: 8, micro: 4}",
    // A small batch's peak lies below the papers' last rate.
    "stages.pretrain.schedule.min_lr=0",
];

fn shipped(name: &str) -> String {
    let path = here().join(format!("../recipes/{name}.yaml"));
    path.to_str().expect("UTF-8").to_owned()
}

/// The losses that a run wrote down.
fn losses(run: &Path) -> Vec<f64> {
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).expect("metrics");
    let loss = |line: &str| {
        let record: Value = serde_json::from_str(line).expect("a whole line");
        record["loss"].as_f64().expect("a number")
    };
    metrics.lines().map(loss).collect()
}

/// Two steps of a shipped recipe at the size of the fixture; gives their losses.
fn two_steps(recipe: &str, sets: &[&str]) -> Vec<f64> {
    let sandbox = Sandbox::new();
    let recipe = shipped(recipe);
    let mut arguments = vec!["run", recipe.as_str(), "--steps", "2", "--out", "run"];
    arguments.extend(["--threads", "1", "--device", "cpu", "-q"]);
    for set in SMALL.iter().chain(sets) {
        arguments.extend(["--set", set]);
    }
    let output = sandbox.run(arguments);
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{recipe}: {err}");
    losses(&sandbox.work().join("run"))
}

fn clip_tiny() -> [String; 2] {
    let file = here().join("fixtures/clip_tiny.safetensors");
    [
        "stages.pretrain.teachers.clip.arch={dim: 32, depth: 6, heads: 4, patch: 4}".to_owned(),
        format!("stages.pretrain.teachers.clip.weights={}", file.display()),
    ]
}

#[track_caller]
fn assert_between(losses: &[f64], least: f64, most: f64) {
    assert_eq!(losses.len(), 2);
    for loss in losses {
        assert!((least..=most).contains(loss), "{losses:?}");
    }
}

/// An untrained decoder says about zero, and pixels that each patch standardises have a variance of one.
#[test]
fn mae_trains() {
    let decoder = "stages.pretrain.objectives.pixels.aligner";
    let sets = ["dim=16", "depth=2", "heads=2"].map(|set| format!("{decoder}.{set}"));
    let losses = two_steps("mae_vitb", &sets.each_ref().map(String::as_str));
    assert_between(&losses, 0.5, 3.0);
}

/// As for MAE's decoder.
#[test]
fn crossmae_trains() {
    let decoder = "stages.pretrain.objectives.pixels.aligner";
    let small = ["levels=[embed, 0, 1, 2, 3, 4, 5]", "dim=16", "depth=3", "heads=2"];
    let sets = small.map(|set| format!("{decoder}.{set}"));
    let losses = two_steps("crossmae_vitb", &sets.each_ref().map(String::as_str));
    assert_between(&losses, 0.5, 3.0);
}

/// 2 (1 - cos): features of an untrained student point anywhere, which is near 2 and never past 4.
#[test]
fn the_unmasked_teacher_trains() {
    let sets = clip_tiny();
    let losses = two_steps("umt_image_vitb", &sets.each_ref().map(String::as_str));
    assert_between(&losses, 1.7, 2.3);
}

/// As for the unmasked teacher.
#[test]
fn milan_trains() {
    let decoder = "stages.pretrain.objectives.features.aligner";
    let mut sets = clip_tiny().to_vec();
    sets.extend(["dim=16", "depth=2", "heads=2"].map(|set| format!("{decoder}.{set}")));
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    assert_between(&two_steps("milan_vitb", &sets), 1.7, 2.3);
}

/// Names and shapes of `openai/clip-vit-base-patch16`'s vision part.
fn clip_base_16() -> Vec<(String, Vec<usize>)> {
    let mut tensors = Vec::new();
    let mut add = |name: &str, shape: &[usize]| tensors.push((name.to_owned(), shape.to_vec()));
    let tower = "vision_model";
    add(&format!("{tower}.embeddings.class_embedding"), &[768]);
    add(&format!("{tower}.embeddings.patch_embedding.weight"), &[768, 3, 16, 16]);
    add(&format!("{tower}.embeddings.position_embedding.weight"), &[197, 768]);
    let mut layer = |name: &str, rows: usize, columns: Option<usize>| {
        let weight: Vec<usize> = std::iter::once(rows).chain(columns).collect();
        add(&format!("{tower}.{name}.weight"), &weight);
        add(&format!("{tower}.{name}.bias"), &[rows]);
    };
    // The misspelling is theirs.
    layer("pre_layrnorm", 768, None);
    for block in 0..12 {
        let block = format!("encoder.layers.{block}");
        for part in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            layer(&format!("{block}.self_attn.{part}"), 768, Some(768));
        }
        layer(&format!("{block}.layer_norm1"), 768, None);
        layer(&format!("{block}.mlp.fc1"), 3072, Some(768));
        layer(&format!("{block}.mlp.fc2"), 768, Some(3072));
        layer(&format!("{block}.layer_norm2"), 768, None);
    }
    layer("post_layernorm", 768, None);
    add("visual_projection.weight", &[512, 768]);
    tensors
}

/// Writes tensors of small pseudo-random values as safetensors: the header's length, the header, the values.
fn write_random(path: &Path, tensors: &[(String, Vec<usize>)]) -> std::io::Result<u64> {
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in tensors {
        let start = end;
        end += 4 * shape.iter().product::<usize>();
        let entry = json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, end] });
        header.insert(name.clone(), entry);
    }
    let mut header = Value::Object(header).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut file = BufWriter::with_capacity(1 << 20, fs::File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    let mut state = 1u32;
    for (name, shape) in tensors {
        let centre = if name.contains("norm") && name.ends_with(".weight") { 1.0 } else { 0.0 };
        for _ in 0..shape.iter().product::<usize>() {
            // The constants of Numerical Recipes; the upper bits are good enough.
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let uniform = (state >> 8) as f32 / (1 << 24) as f32 - 0.5;
            file.write_all(&(centre + 0.07 * uniform).to_le_bytes())?;
        }
    }
    file.flush()?;
    Ok(8 + header.len() as u64 + end as u64)
}

/// The recipe as it is shipped, but for its batch: a folder of JPEGs, and a file of CLIP-B/16's names and sizes in the hub
/// cache where Hugging Face's tools would have put it.
#[test]
fn the_papers_vit_b_takes_two_steps_at_full_size() {
    let sandbox = Sandbox::new();
    let (images, cache) = (sandbox.work().join("images"), sandbox.work().join("hub"));
    for class in ["blobs", "stripes"] {
        let folder = images.join("train").join(class);
        fs::create_dir_all(&folder).expect("a folder");
        for file in files_in(&here().join("fixtures/images").join(class)) {
            fs::copy(&file, folder.join(file.file_name().expect("a name"))).expect("a copy");
        }
    }
    let repository = cache.join("models--openai--clip-vit-base-patch16");
    let snapshot = repository.join("snapshots/0000");
    fs::create_dir_all(&snapshot).expect("a folder");
    fs::create_dir_all(repository.join("refs")).expect("a folder");
    fs::write(repository.join("refs/main"), "0000").expect("written");
    let bytes = write_random(&snapshot.join("model.safetensors"), &clip_base_16()).expect("room for the weights");
    assert!((340_000_000..350_000_000).contains(&bytes), "{bytes} bytes");

    let recipe = shipped("maskalign_vitb_clip");
    let batch = "stages.pretrain.batch={effective: 2, micro: 2}";
    let output = sandbox
        .command(["run", &recipe, "--steps", "2", "--out", "run", "--set", batch, "--device", "cpu"])
        .args(["--set", "stages.pretrain.schedule.min_lr=0"])
        .env("IMAGENET_DIR", &images)
        .env("HF_HUB_CACHE", &cache)
        .output()
        .expect("the command starts");
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{err}");
    let run = sandbox.work().join("run");
    // What the official code's untrained ViT-B gives for the same images and targets of normal values, however it is drawn.
    let derived = fs::read(here().join("../maskalign-core/tests/fixtures/papers/derived.json")).expect("the fixture");
    let derived: Value = serde_json::from_slice(&derived).expect("JSON");
    let start =
        derived["start"]["losses"].as_array().expect("losses").iter().map(|loss| loss.as_f64().expect("a loss"));
    let (least, most) = start.fold((f64::INFINITY, 0.0_f64), |(least, most), loss| (least.min(loss), most.max(loss)));
    assert_between(&losses(&run), 0.97 * least, 1.03 * most);
    let summary = fs::read(run.join("summary.json")).expect("a summary");
    let summary: Value = serde_json::from_slice(&summary).expect("JSON");
    assert_eq!(summary["pretrain"]["steps"], 2);
}
