//! Weights as others write them: files from PyTorch and safetensors (`scripts/make_weight_fixtures.py`), every naming of one
//! tiny tower, and resizes recorded from `F.interpolate`.

use std::fs;
use std::path::{Path, PathBuf};

use maskalign_core::weights::{
    Canonical, Family, HostTensor, TensorFile, TensorMap, WeightsError, check_against, files_of, naming, read,
    read_part, read_part_shapes, read_shapes, resize_positions, to_canonical, to_family, write_safetensors,
};
use maskalign_core::{Pool, resize_images_bicubic};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/weights").join(name)
}

fn canonical(name: &str, family: Family) -> Canonical {
    to_canonical(read(&fixture(name)).unwrap(), family).unwrap()
}

fn rules(canonical: &Canonical) -> Vec<(&str, &str)> {
    canonical.ignored.iter().map(|(name, rule)| (name.as_str(), *rule)).collect()
}

fn refusal<T>(result: Result<T, WeightsError>) -> String {
    match result {
        Ok(_) => panic!("expected an error"),
        Err(error) => error.to_string(),
    }
}

/// Renamed to the naming of that key.
fn written(tensors: &TensorMap, key: &str) -> Result<TensorMap, WeightsError> {
    to_family(tensors, naming(key).expect("a built-in naming"))
}

#[test]
fn every_clip_naming_gives_the_same_tower() {
    let expected = canonical("clip_timm.safetensors", Family::Clip);
    assert_eq!(expected.naming, "timm");
    assert_eq!(rules(&expected), [("head.bias", "bias that CLIP does not have, all zero")]);
    assert_eq!(expected.tensors.len(), 2 * 12 + 8);
    assert_eq!(expected.tensors["cls_token"].shape, [1, 1, 8]);
    assert_eq!(expected.tensors["pos_embed"].shape, [1, 10, 8]);
    assert_eq!(expected.tensors["head.weight"].shape, [6, 8]);
    for (file, name) in [
        ("clip_open_clip.safetensors", "OpenAI / open_clip"),
        ("clip_openai_bare.safetensors", "OpenAI / open_clip"),
        ("clip_torchscript.pt", "OpenAI / open_clip"),
        ("clip_hf.safetensors", "Hugging Face CLIP"),
        ("clip_hf_bare.safetensors", "Hugging Face CLIP"),
    ] {
        let found = canonical(file, Family::Clip);
        assert_eq!(found.naming, name, "{file}");
        assert_eq!(found.tensors, expected.tensors, "{file}");
    }
}

#[test]
fn the_text_tower_is_left_out_by_rules_that_name_it() {
    assert_eq!(
        rules(&canonical("clip_open_clip.safetensors", Family::Clip)),
        [
            ("ln_final.bias", "text tower"),
            ("ln_final.weight", "text tower"),
            ("logit_scale", "contrastive loss"),
            ("positional_embedding", "text tower"),
            ("text_projection", "text tower"),
            ("token_embedding.weight", "text tower"),
            ("transformer.resblocks.0.ln_1.weight", "text tower"),
        ]
    );
    assert_eq!(
        rules(&canonical("clip_hf.safetensors", Family::Clip)),
        [
            ("logit_scale", "contrastive loss"),
            ("text_model.embeddings.token_embedding.weight", "text tower"),
            ("text_projection.weight", "text tower"),
            ("vision_model.embeddings.position_ids", "position ids"),
        ]
    );
}

#[test]
fn every_plain_naming_gives_the_same_tower() {
    let expected = canonical("vit_timm.safetensors", Family::Vit);
    assert_eq!(expected.tensors, read(&fixture("vit_timm.safetensors")).unwrap());
    let hf = canonical("vit_hf.safetensors", Family::Dino);
    assert_eq!(hf.tensors, expected.tensors);
    assert_eq!(rules(&hf), [("pooler.dense.bias", "pooler"), ("pooler.dense.weight", "pooler")]);
    assert_eq!(canonical("sharded", Family::Vit).tensors, expected.tensors);

    let dino = canonical("dino_full.pth", Family::Dino);
    assert_eq!(dino.tensors, expected.tensors);
    let head = "head of the self-distillation";
    assert_eq!(rules(&dino), [("head.last_layer.weight_g", head), ("head.mlp.0.weight", head)]);
}

#[test]
fn both_dinov2_namings_give_the_same_tower() {
    let expected = canonical("dinov2_timm.safetensors", Family::Dinov2);
    assert_eq!(expected.tensors["blocks.1.ls2.gamma"].shape, [8]);
    assert_eq!(rules(&expected), [("mask_token", "mask token of the pre-training")]);
    let hf = canonical("dinov2_hf.safetensors", Family::Dinov2);
    assert_eq!(hf.tensors, expected.tensors);
    assert_eq!(rules(&hf), [("dinov2.embeddings.mask_token", "mask token of the pre-training")]);
}

#[test]
fn an_official_maskalign_checkpoint_gives_its_student() {
    let found = canonical("maskalign.pth", Family::Vit);
    assert_eq!(found.tensors, canonical("vit_timm.safetensors", Family::Vit).tensors);
    assert_eq!(
        rules(&found),
        [
            ("clip_model.visual.class_embedding", "frozen teacher"),
            ("clip_model.visual.conv1.weight", "frozen teacher"),
            ("distill_heads.0.bias", "alignment of the pre-training"),
            ("distill_heads.0.weight", "alignment of the pre-training"),
            ("distill_weights", "alignment of the pre-training"),
        ]
    );
}

#[test]
fn an_mae_checkpoints_decoder_is_left_out() {
    let mut map = read(&fixture("vit_timm.safetensors")).unwrap();
    for name in ["mask_token", "decoder_embed.weight", "decoder_blocks.0.norm1.weight"] {
        map.insert(name.into(), HostTensor { shape: vec![1], data: vec![1.0] });
    }
    let found = to_canonical(map, Family::Vit).unwrap();
    let decoder = "decoder of the pre-training";
    assert_eq!(
        rules(&found),
        [
            ("decoder_blocks.0.norm1.weight", decoder),
            ("decoder_embed.weight", decoder),
            ("mask_token", "mask token of the pre-training"),
        ]
    );
}

#[test]
fn a_crossmae_checkpoints_decoder_is_left_out() {
    let mut map = read(&fixture("vit_timm.safetensors")).unwrap();
    let decoder = ["dec_norms.0.weight", "decoder_blocks.0.cross_attn.kv.weight", "mask_token", "wfm.linear.weight"];
    for name in decoder {
        map.insert(name.into(), HostTensor { shape: vec![1], data: vec![1.0] });
    }
    // The published encoder has no final norm.
    map.retain(|name, _| !name.starts_with("norm."));
    let found = to_canonical(map, Family::Vit).unwrap();
    assert_eq!(found.ignored.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), decoder);
}

#[test]
fn every_number_format_and_every_view_of_a_pytorch_file_is_read() {
    for file in ["views.pth", "views_protocol4.bin"] {
        let read = read(&fixture(file)).unwrap();
        let expect = |name: &str, shape: &[usize], data: &[f32]| {
            assert_eq!(read[name], HostTensor { shape: shape.to_vec(), data: data.to_vec() }, "{file} {name}");
        };
        let base: Vec<f32> = (0..24).map(|v| v as f32).collect();
        let transposed: Vec<f32> = (0..6).flat_map(|x| (0..4).map(move |y| (y * 6 + x) as f32)).collect();
        expect("base", &[4, 6], &base);
        expect("transposed", &[6, 4], &transposed);
        expect("sliced", &[2, 3], &[6.0, 8.0, 10.0, 12.0, 14.0, 16.0]);
        expect("expanded", &[3, 2], &[0.0; 6]);
        expect("scalar", &[], &[15.0]);
        expect("parameter", &[6], &base[..6]);
        expect("empty", &[0, 3], &[]);
        for name in ["half", "brain", "double"] {
            expect(name, &[2], &[1.5, -2.0]);
        }
        for name in ["long", "int", "short", "char"] {
            expect(name, &[2], &[7.0, -8.0]);
        }
        expect("byte", &[2], &[7.0, 200.0]);
        expect("bool", &[2], &[1.0, 0.0]);
        assert_eq!(read.len(), 16, "{file}");
    }
}

#[test]
fn a_file_that_would_run_code_is_refused_by_name() {
    let error = refusal(read(&fixture("refused.pth")));
    assert!(error.contains("`__builtin__.print`") && error.contains("state_dict"), "{error}");
}

#[test]
fn files_of_other_kinds_are_refused_with_the_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.pth");
    for (content, hint) in [
        (&b""[..], "empty"),
        (b"\x80\x02\x8a\nl\xfcF\xf9 j\xa8P\x19.\x80\x02M", "torch.save(torch.load(FILE"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\x89PNG\r\n\x1a\n0000000000000000", "neither safetensors nor"),
        (b"{\"weight_map\": 3}", "index of shards"),
        (b"{\"weight_map\": {\"a\": \"../w.pth\"}}", "outside its folder"),
        (b"PK\x03\x04", "truncated or damaged"),
    ] {
        fs::write(&path, content).unwrap();
        let error = refusal(read(&path));
        assert!(error.contains(hint) && error.contains("w.pth"), "{error}");
    }
    let error = refusal(read(&folder.path().join("absent.safetensors")));
    assert!(error.contains("absent.safetensors") && error.contains("No such file"), "{error}");
    let error = refusal(read(&folder.path().join("")));
    assert!(error.contains("model.safetensors, "), "{error}");
}

#[test]
fn truncated_and_damaged_pytorch_files_end_in_words() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.pth");
    let whole = fs::read(fixture("views.pth")).unwrap();
    for length in (0..whole.len()).step_by(37) {
        fs::write(&path, &whole[..length]).unwrap();
        assert!(!refusal(read(&path)).is_empty());
    }
    let before = read(&fixture("views.pth")).unwrap();
    let mut refused = 0;
    for at in (0..whole.len()).step_by(7) {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x55;
        fs::write(&path, damaged).unwrap();
        match read(&path) {
            Err(_) => refused += 1,
            // Bytes that carry no tensor may change; tensors may not, since every entry has a checksum.
            Ok(tensors) => assert_eq!(tensors, before, "byte {at}"),
        }
    }
    assert!(refused > whole.len() / 7 / 4, "{refused} of {}", whole.len());
}

#[test]
fn a_shard_that_is_missing_or_incomplete_is_named() {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture("sharded")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    let index = folder.path().join("model.safetensors.index.json");
    assert_eq!(files_of(&index).unwrap().len(), 3);
    assert_eq!(files_of(folder.path()).unwrap(), files_of(&index).unwrap());
    let second = folder.path().join("model-00002-of-00002.safetensors");
    write_safetensors(&second, &TensorMap::new(), None).unwrap();
    let error = refusal(read(&index));
    assert!(error.contains("model-00002-of-00002") && error.contains("lacks `"), "{error}");
    fs::remove_file(second).unwrap();
    assert!(refusal(read(&index)).contains("model-00002-of-00002"));
}

#[test]
fn everything_wrong_with_a_file_is_in_one_error() {
    let mut map = read(&fixture("clip_hf.safetensors")).unwrap();
    let layer = "vision_model.encoder.layers.1";
    map.remove(&format!("{layer}.self_attn.k_proj.bias"));
    map.remove("vision_model.pre_layrnorm.weight");
    let fc1 = map.remove(&format!("{layer}.mlp.fc1.weight")).unwrap();
    map.insert(format!("{layer}.mlp.fc11.weight"), fc1);
    map.get_mut(&format!("{layer}.mlp.fc2.weight")).unwrap().shape.reverse();
    map.get_mut("vision_model.embeddings.class_embedding").unwrap().data[3] = f32::INFINITY;
    map.insert(
        "vision_model.encoder.layers.99999999999.norm.weight".into(),
        HostTensor { shape: vec![], data: vec![1.0] },
    );
    let error = to_canonical(map, Family::Clip).unwrap_err().of("teacher `clip`");
    assert!(error.is_user_mistake());
    assert_eq!(
        error.to_string(),
        "teacher `clip`: weights of family clip (in Hugging Face CLIP naming) do not fit:\n  \
         3 missing: `vision_model.encoder.layers.1.self_attn.k_proj.bias`, `vision_model.pre_layrnorm.weight`, \
         `vision_model.encoder.layers.1.mlp.fc1.weight` (nearest name there: `vision_model.encoder.layers.1.mlp.fc11.weight`)\n  \
         2 not expected: `vision_model.encoder.layers.1.mlp.fc11.weight` \
         (nearest name there: `vision_model.encoder.layers.1.mlp.fc1.weight`), \
         `vision_model.encoder.layers.99999999999.norm.weight`\n  \
         1 of another shape: `vision_model.encoder.layers.1.mlp.fc2.weight` is [16, 8], expected [8, 16]\n  \
         1 not finite: `vision_model.embeddings.class_embedding` in 1 of 8 values"
    );
}

#[test]
fn a_file_of_another_family_is_refused_with_the_type_to_use() {
    let refused = |file: &str, family| refusal(to_canonical(read(&fixture(file)).unwrap(), family));
    for family in [Family::Dino, Family::Vit, Family::Dinov2] {
        assert!(refused("clip_hf.safetensors", family).contains("use `type: clip`"));
        assert!(refused("clip_timm.safetensors", family).contains("use `type: clip`"));
    }
    assert!(refused("dinov2_timm.safetensors", Family::Dino).contains("use `type: dinov2`"));
    assert!(refused("dinov2_hf.safetensors", Family::Vit).contains("use `type: dinov2`"));
    assert!(refused("vit_timm.safetensors", Family::Dinov2).contains("use `type: vit` or `dino`"));
    assert!(refused("vit_hf.safetensors", Family::Clip).contains("use `type: vit` or `dino`"));
    let error = refusal(to_canonical(read(&fixture("resizes.safetensors")).unwrap(), Family::Vit));
    assert!(error.contains("no vision transformer is found among") && error.contains("`images`"), "{error}");
}

#[test]
fn a_gap_in_the_blocks_is_missing_tensors() {
    let mut map = read(&fixture("vit_timm.safetensors")).unwrap();
    map.retain(|name, _| !name.starts_with("blocks.0."));
    let error = refusal(to_canonical(map, Family::Vit));
    assert!(error.contains("12 missing: `blocks.0.norm1.weight`"), "{error}");
}

#[test]
fn exported_names_are_those_of_the_other_files() {
    for (export, file, family, stripped) in [
        ("timm", "vit_timm.safetensors", Family::Vit, ""),
        ("hf_vit", "vit_hf.safetensors", Family::Dino, ""),
        ("hf_dinov2", "dinov2_hf.safetensors", Family::Dinov2, "dinov2."),
        ("hf_clip", "clip_hf.safetensors", Family::Clip, ""),
        ("openai", "clip_open_clip.safetensors", Family::Clip, ""),
    ] {
        let found = canonical(file, family);
        let ignored: Vec<_> = found.ignored.iter().map(|(name, _)| name.as_str()).collect();
        let mut original = read(&fixture(file)).unwrap();
        original.retain(|name, _| !ignored.contains(&name.as_str()));
        let original: TensorMap =
            original.into_iter().map(|(name, t)| (name.strip_prefix(stripped).unwrap().to_owned(), t)).collect();
        assert_eq!(written(&found.tensors, export).unwrap(), original, "{file}");
    }
    let clip = canonical("clip_timm.safetensors", Family::Clip);
    let error = refusal(written(&clip.tensors, "hf_vit"));
    assert!(error.contains("`head.weight`") && error.contains("`norm_pre.bias`"), "{error}");
}

#[test]
fn what_was_loaded_is_held_against_what_a_model_needs() {
    let tower = canonical("clip_hf.safetensors", Family::Clip).tensors;
    let needed: Vec<_> = tower.iter().map(|(name, tensor)| (name.clone(), tensor.shape.clone())).collect();
    assert!(check_against(&needed, tower.clone(), "teacher `clip`").is_ok());
    let error = refusal(check_against(&needed[1..], tower, "teacher `clip`"));
    assert!(error.contains("1 not expected"), "{error}");
}

/// Largest difference, with the shapes held equal.
fn difference(a: &HostTensor, b: &HostTensor) -> f32 {
    assert_eq!(a.shape, b.shape);
    a.data.iter().zip(&b.data).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// PyTorch's `f32` differs from its own `f64` by 1.3e-6 on these images; rounding is all that may differ here.
const ROUNDING: f32 = 3e-6;

#[test]
fn resized_positions_are_those_of_pytorch() {
    let recorded = read(&fixture("resizes.safetensors")).unwrap();
    for grid in [6, 13] {
        let resized = resize_positions(&recorded["positions"], grid).unwrap();
        let expected = &recorded[&format!("positions_{grid}")];
        assert!(difference(&resized, expected) < ROUNDING, "{grid}: {}", difference(&resized, expected));
        assert_eq!(resized.data[..5], recorded["positions"].data[..5]);
    }
}

#[test]
fn resized_images_are_those_of_pytorch() {
    let recorded = read(&fixture("resizes.safetensors")).unwrap();
    let images = &recorded["images"];
    for [height, width] in [[14, 10], [9, 25], [1, 1]] {
        let on = |threads| resize_images_bicubic(&Pool::new(threads), &images.data, [2, 3, 16, 12], [height, width]);
        let data = on(1);
        assert!((2..4).all(|threads| on(threads) == data), "the number of threads changes the result");
        let resized = HostTensor { shape: vec![2, 3, height, width], data };
        let expected = &recorded[&format!("images_{height}x{width}")];
        assert!(difference(&resized, expected) < ROUNDING, "{height}: {}", difference(&resized, expected));
    }
}

#[test]
fn written_files_have_the_same_bytes_each_time() {
    let folder = tempfile::tempdir().unwrap();
    let tower = canonical("vit_timm.safetensors", Family::Vit).tensors;
    let (a, b) = (folder.path().join("a.safetensors"), folder.path().join("b.safetensors"));
    write_safetensors(&a, &tower, Some(("maskalign", "{}"))).unwrap();
    write_safetensors(&b, &tower.clone(), Some(("maskalign", "{}"))).unwrap();
    assert_eq!(fs::read(&a).unwrap(), fs::read(&b).unwrap());
    let file = TensorFile::open(&a).unwrap();
    assert_eq!(file.metadata()["maskalign"], "{}");
    assert_eq!(file.shapes()["cls_token"], [1, 1, 8]);
    assert_eq!(file.read_all().unwrap(), tower);
}

#[test]
fn names_and_shapes_are_known_without_the_values() {
    let shapes = |map: TensorMap| map.into_iter().map(|(name, t)| (name, t.shape)).collect::<Vec<_>>();
    for (name, family) in [
        ("clip_timm.safetensors", Family::Clip),
        ("clip_open_clip.safetensors", Family::Clip),
        ("clip_torchscript.pt", Family::Clip),
        ("clip_hf.safetensors", Family::Clip),
        ("sharded", Family::Vit),
        ("dino_full.pth", Family::Dino),
        ("dinov2_hf.safetensors", Family::Dinov2),
        ("maskalign.pth", Family::Vit),
    ] {
        let found = read_shapes(&fixture(name)).unwrap();
        assert!(found.values().all(HostTensor::is_shape_only), "{name}");
        let planned = to_canonical(found.clone(), family).unwrap().tensors;
        assert_eq!(shapes(found), shapes(read(&fixture(name)).unwrap()), "{name}");
        assert_eq!(shapes(planned), shapes(canonical(name, family).tensors), "{name}");
    }
    let mut turned = read_shapes(&fixture("clip_open_clip.safetensors")).unwrap();
    turned.insert("visual.proj".into(), HostTensor::shape_only(vec![6, 8]));
    let error = refusal(to_canonical(turned, Family::Clip));
    assert!(error.contains("`visual.proj` is [8, 6], expected [8, 8]"), "{error}");
}

#[test]
fn a_naming_of_one_model_is_refused_for_another_tower() {
    let plain = canonical("vit_timm.safetensors", Family::Vit).tensors;
    for (export, missing) in
        [("openai", "norm_pre.weight"), ("hf_clip", "norm_pre.bias"), ("hf_dinov2", "blocks.1.ls2.gamma")]
    {
        let error = refusal(written(&plain, export));
        assert!(error.contains("missing: ") && error.contains(missing), "{export:?}: {error}");
    }
    let scaled = canonical("dinov2_timm.safetensors", Family::Dinov2).tensors;
    let error = refusal(written(&scaled, "hf_vit"));
    assert!(error.contains("4 not expected") && error.contains("blocks.0.ls1.gamma"), "{error}");
    let mut without = plain.clone();
    without.remove("cls_token");
    assert!(refusal(written(&without, "hf_vit")).contains("1 missing: `cls_token`"));
    // timm keeps no position for a class token that is not there.
    assert_eq!(written(&without, "timm").unwrap()["pos_embed"].shape[1], plain["pos_embed"].shape[1] - 1);
}

#[test]
fn the_embedded_teacher_is_what_its_run_left() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/quickstart_teacher.safetensors");
    let mut embedded = maskalign_core::embedded::weights("quickstart_teacher").unwrap();
    embedded.retain(|name, _| !name.starts_with("head."));
    assert_eq!(read(&file).unwrap(), embedded);
}

/// What timm's towers are called when programs have wrapped them; written by `make_wrapped.py`.
fn wrapped(case: &str) -> TensorMap {
    let all = read(&fixture("wrapped.safetensors")).unwrap();
    let own = |(name, tensor): (String, HostTensor)| Some((name.strip_prefix(case)?.strip_prefix('|')?.into(), tensor));
    all.into_iter().filter_map(own).filter(|(name, _): &(String, _)| name != "hidden").collect()
}

#[test]
fn a_tower_is_found_whatever_programs_put_around_its_names() {
    let plain = to_canonical(wrapped("same_plain"), Family::Vit).unwrap();
    assert_eq!((plain.prefix.as_str(), plain.tensors.len()), ("", 5 + 4 * 12 + 1));
    for (case, prefix) in [
        ("same_compiled", ""),
        ("same_parallel_compiled", "module."),
        ("same_compiled_parallel", "module."),
        ("same_attribute", "net.encoder."),
        ("same_checkpointed", ""),
        ("same_chunks", ""),
        ("same_nested", ""),
        ("same_averaged", "model_ema."),
    ] {
        let found = to_canonical(wrapped(case), Family::Vit).unwrap_or_else(|error| panic!("{case}: {error}"));
        assert_eq!(found.prefix, prefix, "{case}");
        assert!(found.tensors == plain.tensors, "{case}: other tensors");
    }
    let averaged = to_canonical(wrapped("same_averaged"), Family::Vit).unwrap();
    assert_eq!(averaged.others, ["student.model."]);
    assert_eq!(averaged.ignored.len(), plain.tensors.len());
}

#[test]
fn one_of_several_towers_is_chosen_by_its_key() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("two.safetensors");
    write_safetensors(&file, &wrapped("same_averaged"), None).unwrap();
    let plain = to_canonical(wrapped("same_plain"), Family::Vit).unwrap().tensors;
    let take = |key| to_canonical(read_part(&file, Some(key)).unwrap(), Family::Vit).unwrap().tensors;
    assert!(take("model_ema") == plain && take("student.model") == take("student") && take("student") != plain);
    let error = refusal(read_part_shapes(&file, Some("teacher")));
    assert!(error.contains("under `teacher`") && error.contains("begin with `model_ema`, `student`"), "{error}");
    // PyTorch's dictionaries are keys too: DINO's file holds both networks.
    let dino = |key| read_part(&fixture("dino_full.pth"), Some(key)).unwrap();
    let teacher = to_canonical(dino("teacher"), Family::Dino).unwrap();
    assert_eq!(teacher.tensors, canonical("dino_full.pth", Family::Dino).tensors);
    assert!(dino("student").keys().eq(["student.module.backbone.cls_token"]));
}

/// A block that is missing from a numbering in chunks is missing, and not closed up.
#[test]
fn a_missing_chunk_is_told() {
    let mut map = wrapped("same_chunks");
    map.retain(|name, _| !name.starts_with("blocks.1.2."));
    let error = refusal(to_canonical(map, Family::Vit));
    assert!(error.contains("missing") && error.contains("blocks.2."), "{error}");
}

/// Names and shapes take many times their bytes in memory, and so they are only read where tensors stand behind them.
#[test]
fn files_that_describe_more_than_they_hold_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let entries: Vec<String> = (0..40_000)
        .map(|i| format!("\"tensor.{i}\":{{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}}"))
        .collect();
    let header = format!("{{{}}}", entries.join(","));
    let file = folder.path().join("empty.safetensors");
    fs::write(&file, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()).unwrap();
    let error = refusal(read_shapes(&file));
    assert!(error.contains("0 bytes of tensors: it describes more than it holds"), "{error}");

    let file = folder.path().join("memo.pth");
    let mut archive = zip::ZipWriter::new(fs::File::create(&file).unwrap());
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    archive.start_file("archive/data.pkl", stored).unwrap();
    // An empty dictionary, noted in memory again and again.
    let pickle = [&[0x80, 2, b'}'][..], &[b'q', 1].repeat(1 << 20), b"."].concat();
    std::io::Write::write_all(&mut archive, &pickle).unwrap();
    archive.finish().unwrap();
    let error = refusal(read_shapes(&file));
    assert!(error.contains("it describes more than it holds"), "{error}");
}

#[test]
fn refusals_of_towers_name_the_cause() {
    let error = refusal(to_canonical(wrapped("distilled"), Family::Vit));
    assert!(error.contains("a distillation token (`dist_token`)") && error.contains("without distillation"), "{error}");
    let folder = tempfile::tempdir().unwrap();
    let shard = folder.path().join("model-00001-of-00002.safetensors");
    write_safetensors(&shard, &wrapped("same_plain"), None).unwrap();
    let error = refusal(read_shapes(&shard));
    assert!(error.contains("shard 1 of 2") && error.contains("get all 2"), "{error}");
    fs::write(folder.path().join("model.safetensors.index.json"), "{}").unwrap();
    let error = refusal(read(&shard));
    assert!(error.contains("name the index of all"), "{error}");
    let only = folder.path().join("model-00001-of-00001.safetensors");
    fs::rename(&shard, &only).unwrap();
    assert!(read(&only).is_ok(), "one shard of one is whole");
}
