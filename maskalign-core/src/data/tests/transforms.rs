//! Resampling byte for byte, boxes by their law.

use serde_json::{Value, json};

use super::{crc32, noise, numbers, oracle};
use crate::data::transforms::rand_augment::Op;
use crate::data::transforms::{CenterCrop, HorizontalFlip, RandAugment, RandomErasing, RandomResizedCrop, Resize};
use crate::data::{Crop, RgbImage, Size, Transform, output_size, resample};
use crate::random::Stream;

fn options<T: serde::de::DeserializeOwned>(value: &Value) -> T {
    serde_json::from_value(value.clone()).unwrap()
}

fn crop(value: &Value) -> Crop {
    let side = |name: &str| value[name].as_u64().unwrap() as usize;
    Crop { top: side("top"), left: side("left"), height: side("height"), width: side("width") }
}

fn assert_described(image: &RgbImage, case: &Value) {
    let [width, height] = numbers(&case["size"]);
    assert_eq!(image.size(), (width, height), "{case}");
    assert_eq!(crc32(&image.pixels), case["crc32"].as_u64().unwrap(), "{case}");
}

#[test]
fn resizing_gives_pillows_bytes() {
    for case in oracle("resize").as_array().unwrap() {
        let [width, height] = numbers(&case["image"]);
        let [new_width, new_height] = numbers(&case["size"]);
        let image = noise(width, height);
        let mixed =
            resample::resize(&image, crop(&case["crop"]), new_width, new_height, options(&case["interpolation"]));
        assert_described(&mixed, case);
    }
}

#[test]
fn resize_and_center_crop_give_torchvisions_bytes() {
    for case in oracle("transforms").as_array().unwrap() {
        let [width, height] = numbers(&case["image"]);
        let transform: Box<dyn Transform> = match case.get("resize") {
            Some(resize) => Box::new(options::<Resize>(resize)),
            None => Box::new(options::<CenterCrop>(&case["center_crop"])),
        };
        transform.check().unwrap();
        let changed = transform.apply(noise(width, height), &mut Stream::new(0, "test", 0, 0));
        assert_described(&changed, case);
        assert_eq!(transform.output_size(Some((width, height))), Some(changed.size()), "{case}");
    }
}

/// Means within five standard errors of torchvision's, both over many draws.
#[test]
fn boxes_follow_torchvisions_law() {
    const DRAWS: usize = 40_000;
    for law in oracle("box_law")["laws"].as_array().unwrap() {
        let transform: RandomResizedCrop = options(&json!({ "size": 8, "scale": law["scale"], "ratio": law["ratio"] }));
        let [width, height] = numbers(&law["image"]);
        let mut rng = Stream::new(1, "test", 0, 0);
        let mut sums = [0.0; 6];
        for _ in 0..DRAWS {
            let Crop { top, left, height: h, width: w } = transform.draw(width, height, &mut rng);
            assert!(left + w <= width && top + h <= height);
            let [w, h, left, top] = [w, h, left, top].map(|side| side as f64);
            let [whole_width, whole_height] = [width, height].map(|side| side as f64);
            let row = [
                w * h / (whole_width * whole_height),
                (w / h).ln(),
                (top + h / 2.0) / whole_height,
                (left + w / 2.0) / whole_width,
                top,
                left,
            ];
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += value;
            }
        }
        let names = ["area", "log_shape", "center_y", "center_x", "top", "left"];
        for (name, sum) in names.into_iter().zip(sums) {
            let (mean, expected) = (sum / DRAWS as f64, law["mean"][name].as_f64().unwrap());
            let error = law["std"][name].as_f64().unwrap() * (2.0 / DRAWS as f64).sqrt();
            assert!((mean - expected).abs() <= 5.0 * error, "{name}: {mean}, torchvision {expected} ({law})");
        }
    }
}

#[test]
fn where_no_box_fits_the_middle_is_torchvisions() {
    let transform: RandomResizedCrop = options(&json!({ "size": 8, "scale": [1.0, 1.0] }));
    for case in oracle("box_law")["middles"].as_array().unwrap() {
        let [width, height] = numbers(&case["image"]);
        let drawn = transform.draw(width, height, &mut Stream::new(0, "test", 0, 0));
        assert_eq!(drawn, crop(&case["crop"]), "{case}");
    }
}

#[test]
fn any_image_down_to_one_pixel_can_be_cropped() {
    let transform: RandomResizedCrop = options(&json!({ "size": [5, 4] }));
    for (width, height) in [(1, 1), (1, 500), (500, 1), (2, 3)] {
        for seed in 0..20 {
            let mut rng = Stream::new(seed, "test", 0, 0);
            assert_eq!(transform.apply(noise(width, height), &mut rng).size(), (4, 5));
        }
    }
}

#[test]
fn a_flip_mirrors_rows_and_happens_as_often_as_asked() {
    let image = RgbImage { width: 2, height: 2, pixels: (0..12).collect() };
    let flipped = vec![3, 4, 5, 0, 1, 2, 9, 10, 11, 6, 7, 8];
    let mut rng = Stream::new(0, "test", 0, 0);
    assert_eq!(HorizontalFlip { p: 1.0 }.apply(image.clone(), &mut rng).pixels, flipped);
    assert_eq!(HorizontalFlip { p: 0.0 }.apply(image.clone(), &mut rng), image);
    let often = (0..10_000).filter(|_| HorizontalFlip { p: 0.3 }.apply(image.clone(), &mut rng) != image).count();
    assert!(often.abs_diff(3000) < 200, "{often}");
}

#[test]
fn sizes_are_known_before_reading_where_they_can_be() {
    let resize = |size| -> Box<dyn Transform> { Box::new(options::<Resize>(&json!({ "size": size }))) };
    assert_eq!(resize(json!(256)).output_size(None), None);
    assert_eq!(resize(json!(256)).output_size(Some((500, 375))), Some((341, 256)));
    assert_eq!(resize(json!([4, 6])).output_size(None), Some((6, 4)));
    let chain: Vec<Box<dyn Transform>> = vec![
        resize(json!(256)),
        Box::new(options::<CenterCrop>(&json!({ "size": 224 }))),
        Box::new(options::<HorizontalFlip>(&json!({}))),
    ];
    assert_eq!(output_size(&chain, None), Some((224, 224)));
    assert_eq!(output_size(&[], Some((28, 28))), Some((28, 28)));
}

#[test]
fn options_that_make_no_sense_are_refused_by_name() {
    let crop = |value: Value| options::<RandomResizedCrop>(&value).check().unwrap_err().path;
    assert_eq!(crop(json!({ "size": 0 })), ["size"]);
    for scale in [json!([0.0, 1.0]), json!([0.5, 0.2]), json!([0.5, 1.1])] {
        assert_eq!(crop(json!({ "size": 8, "scale": scale })), ["scale"]);
    }
    assert_eq!(crop(json!({ "size": 8, "ratio": [2.0, 0.5] })), ["ratio"]);
    assert_eq!(HorizontalFlip { p: 1.5 }.check().unwrap_err().path, ["p"]);
    assert_eq!(HorizontalFlip { p: f64::NAN }.check().unwrap_err().path, ["p"]);
    assert_eq!(CenterCrop { size: Size::HeightWidth(8, 0) }.check().unwrap_err().path, ["size"]);
}

#[test]
fn defaults_are_torchvisions() {
    let crop: RandomResizedCrop = options(&json!({ "size": 224 }));
    assert_eq!((crop.scale, crop.ratio), ([0.08, 1.0], [0.75, 4.0 / 3.0]));
    assert_eq!(options::<HorizontalFlip>(&json!({})).p, 0.5);
}

#[test]
fn every_operation_of_rand_augment_gives_timms_bytes() {
    let cases = oracle("augment");
    let mut wrong = Vec::new();
    for case in cases.as_array().unwrap() {
        let [width, height] = numbers(&case["image"]);
        let image = match case["kind"].as_str().unwrap() {
            "noise" => noise(width, height),
            _ => resample::resize(
                &noise(7, 5),
                Crop { top: 0, left: 0, height: 5, width: 7 },
                width,
                height,
                options(&json!("bicubic")),
            ),
        };
        let op: Op = options(&case["op"]);
        let changed = op.apply(image, case["magnitude"].as_f64().unwrap(), case["sign"].as_f64().unwrap());
        if crc32(&changed.pixels) != case["crc32"].as_u64().unwrap() {
            wrong.push(case.to_string());
        }
    }
    assert!(wrong.is_empty(), "{} of 180:\n{}", wrong.len(), wrong.join("\n"));
}

/// Of two operations drawn with replacement, each applied to half of the images, a quarter of images see none.
#[test]
fn rand_augment_leaves_its_share_of_images_alone() {
    const DRAWS: u64 = 4000;
    let transform: RandAugment = options(&json!({}));
    let image = noise(9, 8);
    let alone = |i: u64| transform.apply(image.clone(), &mut Stream::new(0, "test", i, 0)) == image;
    let share = (0..DRAWS).filter(|&i| alone(i)).count() as f64 / DRAWS as f64;
    // Contrast and equalisation leave noise of all values nearly alone: a little more than a quarter.
    assert!((0.23..0.40).contains(&share), "{share}");
    let never: RandAugment = options(&json!({ "prob": 0.0 }));
    assert_eq!(never.apply(image.clone(), &mut Stream::new(0, "test", 0, 0)), image);
}

#[test]
fn erased_boxes_follow_timms_law() {
    const DRAWS: usize = 40_000;
    let law = oracle("erasing_law");
    let side = law["size"].as_u64().unwrap() as usize;
    let transform: RandomErasing = options(&json!({ "prob": 1.0 }));
    let mut rng = Stream::new(1, "test", 0, 0);
    let mut sums = [0.0; 4];
    for _ in 0..DRAWS {
        let Crop { top, left, height, width } = transform.draw((side, side), &mut rng).expect("ten tries suffice");
        let [h, w, top, left] = [height, width, top, left].map(|v| v as f64);
        let row = [h * w / (side * side) as f64, (h / w).ln(), top + h / 2.0, left + w / 2.0];
        sums.iter_mut().zip(row).for_each(|(sum, v)| *sum += v);
    }
    for (name, sum) in ["area", "log_aspect", "center_y", "center_x"].into_iter().zip(sums) {
        let (mean, expected) = (sum / DRAWS as f64, law["mean"][name].as_f64().unwrap());
        let error = law["std"][name].as_f64().unwrap() * (2.0 / DRAWS as f64).sqrt();
        assert!((mean - expected).abs() < 5.0 * error, "{name}: {mean}, timm has {expected} +- {error}");
    }
}

#[test]
fn erasing_fills_one_box_with_normalised_noise() {
    let mean = crate::nn::Statistics::IMAGENET.mean;
    for (mode, colours) in [("const", 1), ("rand", 1), ("pixel", 2)] {
        let transform: RandomErasing = options(&json!({ "prob": 1.0, "mode": mode }));
        let mut planes = vec![0.5; 3 * 32 * 24];
        transform.apply_planes(&mut planes, (32, 24), &mut Stream::new(0, "test", 3, 0));
        for (channel, plane) in planes.chunks_exact(32 * 24).enumerate() {
            let mut changed: Vec<f32> = plane.iter().copied().filter(|&v| v != 0.5).collect();
            assert!(changed.len() >= 10 && changed.len() <= 32 * 24 / 3 + 32, "{mode}: {}", changed.len());
            changed.dedup();
            assert!(changed.len() >= colours && (colours > 1 || changed.len() == 1), "{mode}: {changed:?}");
            assert!(mode != "const" || changed[0] == mean[channel]);
        }
    }
    let never: RandomErasing = options(&json!({ "prob": 0.0 }));
    let mut planes = vec![0.5; 3 * 32 * 24];
    never.apply_planes(&mut planes, (32, 24), &mut Stream::new(0, "test", 3, 0));
    assert!(planes.iter().all(|&v| v == 0.5));
}
