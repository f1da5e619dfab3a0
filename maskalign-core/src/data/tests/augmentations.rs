//! Augmentations against torchvision and Pillow: bytes for given draws, and what is drawn by its law.
//!
//! `tests/fixtures/data/augmentations.json` is written by `make_augmentations.py` beside it.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{crc32, fixtures, noise, numbers};
use crate::data::tone::Adjustment;
use crate::data::transforms::three_augment::Choice;
use crate::data::transforms::{
    ColorJitter, GaussianBlur, Grayscale, HorizontalFlip, Pad, RandomRotation, Solarize, ThreeAugment,
};
use crate::data::{Crop, Interpolation, RgbImage, Transform, resample};
use crate::random::Stream;

fn options<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn stream(sample: u64) -> Stream {
    Stream::new(0, "test", 0, sample)
}

/// The image that the script makes for a case.
fn picture(case: &Value) -> RgbImage {
    let [width, height] = numbers(&case["image"]);
    let plain = |colour: [u8; 3]| RgbImage { width, height, pixels: colour.repeat(width * height) };
    match case["kind"].as_str().unwrap() {
        "noise" => noise(width, height),
        "smooth" => {
            let small = noise(7, 5);
            resample::resize(&small, Crop::whole(&small), width, height, Interpolation::Bicubic)
        }
        "black" => plain([0; 3]),
        "white" => plain([255; 3]),
        "red" => plain([200, 3, 3]),
        "colours" => {
            let levels = || (0..=255).step_by(5);
            let pixels = levels().flat_map(|r| levels().flat_map(move |g| levels().flat_map(move |b| [r, g, b])));
            RgbImage { width, height, pixels: pixels.collect() }
        }
        other => panic!("no picture {other}"),
    }
}

fn cases(part: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(fixtures().join("augmentations.json")).unwrap();
    let mut oracle: Value = serde_json::from_str(&text).unwrap();
    let Value::Array(cases) = oracle[part].take() else { panic!("no cases of {part}") };
    assert!(!cases.is_empty());
    cases
}

/// Holds what `change` makes of every case's image against what was recorded.
fn assert_recorded(part: &str, change: impl Fn(&Value, RgbImage) -> RgbImage) {
    let cases = cases(part);
    let differs = |case: &&Value| {
        let changed = change(case, picture(case));
        let [width, height] = numbers(&case["size"]);
        changed.size() != (width, height) || crc32(&changed.pixels) != case["crc32"].as_u64().unwrap()
    };
    let wrong: Vec<String> = cases.iter().filter(differs).map(Value::to_string).collect();
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

fn adjustment(name: &str, amount: f64) -> Adjustment {
    match name {
        "brightness" => Adjustment::Brightness(amount),
        "contrast" => Adjustment::Contrast(amount),
        "saturation" => Adjustment::Saturation(amount),
        _ => Adjustment::Hue(amount),
    }
}

#[test]
fn every_adjustment_of_colour_gives_torchvisions_bytes() {
    assert_recorded("adjustments", |case, image| {
        adjustment(case["adjustment"].as_str().unwrap(), case["amount"].as_f64().unwrap()).apply(image)
    });
}

#[test]
fn whole_draws_of_color_jitter_give_torchvisions_bytes() {
    assert_recorded("jitters", |case, image| {
        let drawn = case["drawn"].as_array().unwrap();
        drawn
            .iter()
            .fold(image, |image, step| adjustment(step[0].as_str().unwrap(), step[1].as_f64().unwrap()).apply(image))
    });
}

#[test]
fn grey_images_are_torchvisions() {
    assert_recorded("greys", |_, image| Grayscale { p: 1.0 }.apply(image, &mut stream(0)));
}

#[test]
fn solarized_images_are_torchvisions() {
    assert_recorded("solarized", |case, image| {
        let solarize: Solarize = options(json!({ "threshold": case["threshold"] }));
        solarize.check().unwrap();
        solarize.apply(image, &mut stream(0))
    });
}

#[test]
fn without_a_kernel_size_blurred_images_are_pillows() {
    assert_recorded("box_blurs", |case, image| {
        let blur: GaussianBlur = options(json!({ "sigma": case["sigma"] }));
        blur.check().unwrap();
        let sigma = blur.draw(&mut stream(0)).expect("p is 1");
        assert_eq!(sigma, case["sigma"].as_f64().unwrap());
        blur.blurred(image, sigma)
    });
}

/// PyTorch's sums are in single precision and in an order of its own: one level, where a value lies between two.
#[test]
fn with_a_kernel_size_blurred_images_are_torchvisions_but_for_the_rounding_of_its_sums() {
    let (mut values, mut differing) = (0, 0);
    for case in cases("kernel_blurs") {
        let blur: GaussianBlur = options(json!({ "sigma": case["sigma"], "kernel_size": case["kernel_size"] }));
        blur.check().unwrap();
        let blurred = blur.blurred(picture(&case), case["sigma"].as_f64().unwrap());
        let hex = case["bytes"].as_str().unwrap();
        let recorded = (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap());
        assert_eq!(2 * blurred.pixels.len(), hex.len());
        for (ours, theirs) in blurred.pixels.into_iter().zip(recorded) {
            assert!(ours.abs_diff(theirs) <= 1, "{ours} for {theirs}: {case}");
            values += 1;
            differing += usize::from(ours != theirs);
        }
    }
    assert!(differing * 1000 <= values, "{differing} of {values}");
}

#[test]
fn turned_images_are_torchvisions() {
    assert_recorded("rotations", |case, image| {
        let rotation: RandomRotation = options(case["options"].clone());
        rotation.check().unwrap();
        rotation.turned(image, case["degrees"].as_f64().unwrap())
    });
}

#[test]
fn borders_are_torchvisions() {
    assert_recorded("pads", |case, image| {
        let pad: Pad = options(case["options"].clone());
        pad.check().unwrap();
        let size = pad.output_size(Some(image.size()));
        let padded = pad.apply(image, &mut stream(0));
        assert_eq!(size, Some(padded.size()), "{case}");
        padded
    });
}

/// Mean and standard deviation of what is drawn, against those of the uniform law; and no value beyond its ends.
fn assert_uniform(what: &str, values: &[f64], (low, high): (f64, f64)) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count;
    let width = high - low;
    // Five standard errors of the mean; those of the variance are width^2 sqrt(1/180 n).
    assert!((mean - f64::midpoint(low, high)).abs() < 5.0 * width / (12.0 * count).sqrt(), "{what}: mean {mean}");
    assert!(
        (variance - width.powi(2) / 12.0).abs() < 5.0 * width.powi(2) / (180.0 * count).sqrt(),
        "{what}: variance {variance}"
    );
    assert!(values.iter().all(|value| (low..=high).contains(value)), "{what}: beyond [{low}, {high}]");
}

/// How often something with a probability happens, within five standard errors.
fn assert_share(what: &str, happened: usize, draws: usize, p: f64) {
    let (expected, error) = (p * draws as f64, (p * (1.0 - p) * draws as f64).sqrt());
    assert!((happened as f64 - expected).abs() <= 5.0 * error, "{what}: {happened} of {draws}, expected {expected}");
}

#[test]
fn color_jitter_draws_each_amount_uniformly_and_all_orders_alike() {
    const DRAWS: usize = 24_000;
    let jitter: ColorJitter =
        options(json!({ "brightness": 0.4, "contrast": [0.5, 3.0], "saturation": 1.5, "hue": 0.1 }));
    jitter.check().unwrap();
    let mut rng = stream(1);
    let mut orders = BTreeMap::<Vec<usize>, usize>::new();
    let mut amounts: [Vec<f64>; 4] = Default::default();
    for _ in 0..DRAWS {
        let mut order = Vec::new();
        for drawn in jitter.draw(&mut rng) {
            let (index, amount) = match drawn {
                Adjustment::Brightness(amount) => (0, amount),
                Adjustment::Contrast(amount) => (1, amount),
                Adjustment::Saturation(amount) => (2, amount),
                Adjustment::Hue(amount) => (3, amount),
            };
            order.push(index);
            amounts[index].push(amount);
        }
        *orders.entry(order).or_default() += 1;
    }
    assert_eq!(orders.len(), 24);
    for (order, count) in orders {
        assert_share(&format!("{order:?}"), count, DRAWS, 1.0 / 24.0);
    }
    let [brightness, contrast, saturation, hue] = &amounts;
    assert_uniform("brightness", brightness, (0.6, 1.4));
    assert_uniform("contrast", contrast, (0.5, 3.0));
    // torchvision's law: the range is cut off at 0, not drawn again.
    assert_uniform("saturation", saturation, (0.0, 2.5));
    assert_uniform("hue", hue, (-0.1, 0.1));
}

#[test]
fn what_color_jitter_is_not_told_to_change_it_leaves_alone() {
    let none: ColorJitter = options(json!({}));
    assert!(none.draw(&mut stream(0)).is_empty());
    let fixed: ColorJitter = options(json!({ "brightness": [1.0, 1.0], "contrast": [2.0, 2.0], "hue": [0.0, 0.0] }));
    assert_eq!(fixed.draw(&mut stream(0)), [Adjustment::Contrast(2.0)]);
}

#[test]
fn each_happens_as_often_as_its_probability_says() {
    const DRAWS: usize = 4000;
    let image = RgbImage { width: 2, height: 1, pixels: vec![200, 10, 90, 4, 250, 128] };
    for p in [0.0, 0.2, 0.8, 1.0] {
        let transforms: [Box<dyn Transform>; 5] = [
            Box::new(options::<ColorJitter>(json!({ "brightness": [0.2, 0.5], "p": p }))),
            Box::new(Grayscale { p }),
            Box::new(options::<GaussianBlur>(json!({ "sigma": [1.0, 2.0], "p": p }))),
            Box::new(options::<Solarize>(json!({ "p": p }))),
            Box::new(HorizontalFlip { p }),
        ];
        for (index, transform) in transforms.iter().enumerate() {
            transform.check().unwrap();
            let mut rng = stream(index as u64);
            let changed = (0..DRAWS).filter(|_| transform.apply(image.clone(), &mut rng) != image).count();
            assert_share(&format!("transform {index} with p {p}"), changed, DRAWS, p);
        }
    }
}

#[test]
fn standard_deviations_and_angles_are_uniform() {
    const DRAWS: usize = 20_000;
    let mut rng = stream(2);
    let blur: GaussianBlur = options(json!({}));
    let sigmas: Vec<f64> = (0..DRAWS).map(|_| blur.draw(&mut rng).expect("p is 1")).collect();
    assert_uniform("sigma", &sigmas, (0.1, 2.0));
    let around: RandomRotation = options(json!({ "degrees": 10 }));
    let angles: Vec<f64> = (0..DRAWS).map(|_| around.draw(&mut rng)).collect();
    assert_uniform("angle around 0", &angles, (-10.0, 10.0));
    let between: RandomRotation = options(json!({ "degrees": [80, 100] }));
    let angles: Vec<f64> = (0..DRAWS).map(|_| between.draw(&mut rng)).collect();
    assert_uniform("angle in a range", &angles, (80.0, 100.0));
}

#[test]
fn three_augment_makes_one_of_three_with_the_same_chance() {
    const DRAWS: usize = 12_000;
    let mut rng = stream(3);
    let drawn: Vec<Choice> = (0..DRAWS).map(|_| ThreeAugment::draw(&mut rng)).collect();
    let count = |which: Choice| drawn.iter().filter(|&&choice| choice == which).count();
    assert_share("grey", count(Choice::Grey), DRAWS, 1.0 / 3.0);
    assert_share("solarized", count(Choice::Solarized), DRAWS, 1.0 / 3.0);
    let sigma = |choice: &Choice| if let Choice::Blurred(sigma) = choice { Some(*sigma) } else { None };
    let sigmas: Vec<f64> = drawn.iter().filter_map(sigma).collect();
    assert_share("blurred", sigmas.len(), DRAWS, 1.0 / 3.0);
    assert_uniform("sigma", &sigmas, (0.1, 2.0));
}

/// What each choice makes is what the transforms of that name make, which are held against what was recorded.
#[test]
fn three_augment_is_made_of_grayscale_solarize_and_pillows_blur() {
    let image = noise(23, 17);
    let mut rng = stream(0);
    assert_eq!(Choice::Grey.apply(image.clone()), Grayscale { p: 1.0 }.apply(image.clone(), &mut rng));
    let solarize: Solarize = options(json!({}));
    assert_eq!(Choice::Solarized.apply(image.clone()), solarize.apply(image.clone(), &mut rng));
    let blur: GaussianBlur = options(json!({}));
    assert_eq!(Choice::Blurred(1.3).apply(image.clone()), blur.blurred(image, 1.3));
}

#[test]
fn images_of_one_pixel_and_extreme_options_give_an_image() {
    let transforms: [Box<dyn Transform>; 12] = [
        Box::new(options::<ColorJitter>(
            json!({ "brightness": 1e300, "contrast": 1e300, "saturation": 1e300, "hue": 0.5 }),
        )),
        Box::new(options::<ColorJitter>(json!({ "brightness": [0, 0], "contrast": [0, 0], "saturation": [0, 0] }))),
        Box::new(options::<GaussianBlur>(json!({ "sigma": 1000 }))),
        Box::new(options::<GaussianBlur>(json!({ "sigma": 0 }))),
        Box::new(options::<GaussianBlur>(json!({ "sigma": 1e-300, "kernel_size": 3 }))),
        Box::new(options::<GaussianBlur>(json!({ "sigma": 1000, "kernel_size": 1023 }))),
        Box::new(options::<Solarize>(json!({ "threshold": 256 }))),
        Box::new(options::<RandomRotation>(json!({ "degrees": 360, "expand": true, "interpolation": "bicubic" }))),
        Box::new(options::<RandomRotation>(json!({ "degrees": [-1e-300, 1e-300], "interpolation": "bilinear" }))),
        Box::new(options::<Pad>(json!({ "padding": 100, "mode": "reflect" }))),
        Box::new(options::<Pad>(json!({ "padding": 0 }))),
        Box::new(ThreeAugment {}),
    ];
    for (index, transform) in transforms.iter().enumerate() {
        transform.check().unwrap();
        for (width, height) in [(1, 1), (1, 9), (9, 1), (2, 2), (16, 11)] {
            for sample in 0..4 {
                let changed = transform.apply(noise(width, height), &mut stream(sample));
                assert_eq!(changed.pixels.len(), 3 * changed.width * changed.height, "{index}");
                if let Some(size) = transform.output_size(Some((width, height))) {
                    assert_eq!(changed.size(), size, "{index}");
                }
            }
        }
    }
}

#[test]
fn a_flat_image_stays_flat_under_every_blur() {
    for value in [0, 1, 100, 254, 255] {
        let flat = RgbImage::from_grey(33, 21, &[value; 33 * 21]);
        for blur in [json!({ "sigma": 1.7 }), json!({ "sigma": 40 }), json!({ "sigma": 1.7, "kernel_size": 9 })] {
            let blur: GaussianBlur = options(blur);
            assert_eq!(blur.apply(flat.clone(), &mut stream(0)), flat);
        }
    }
}

#[test]
fn sizes_are_known_before_reading_but_for_images_that_grow_with_their_angle() {
    let rotation = |expand: bool| options::<RandomRotation>(json!({ "degrees": 10, "expand": expand }));
    assert_eq!(rotation(false).output_size(Some((5, 3))), Some((5, 3)));
    assert_eq!(rotation(true).output_size(Some((5, 3))), None);
    let pad = |padding: Value| options::<Pad>(json!({ "padding": padding })).output_size(Some((5, 3)));
    assert_eq!(pad(json!(2)), Some((9, 7)));
    assert_eq!(pad(json!([2, 1])), Some((9, 5)));
    assert_eq!(pad(json!([1, 2, 3, 4])), Some((9, 9)));
    assert_eq!(options::<Pad>(json!({ "padding": 2 })).output_size(None), None);
}

#[test]
fn options_that_make_no_sense_are_refused_by_name() {
    fn refused<T: Transform + serde::de::DeserializeOwned>(value: Value) -> Vec<String> {
        options::<T>(value.clone()).check().expect_err(&value.to_string()).path
    }
    for option in ["brightness", "contrast", "saturation"] {
        for amount in [json!(-0.1), json!([-0.1, 1.0]), json!([1.2, 0.8])] {
            assert_eq!(refused::<ColorJitter>(json!({ option: amount })), [option]);
        }
    }
    for amount in [json!(0.6), json!(-0.1), json!([-0.6, 0.0]), json!([0.0, 0.51]), json!([0.1, -0.1])] {
        assert_eq!(refused::<ColorJitter>(json!({ "hue": amount })), ["hue"]);
    }
    for sigma in [json!(-1), json!([-0.1, 2.0]), json!([2.0, 0.1]), json!(1001)] {
        assert_eq!(refused::<GaussianBlur>(json!({ "sigma": sigma })), ["sigma"]);
    }
    assert_eq!(refused::<GaussianBlur>(json!({ "sigma": [0.0, 2.0], "kernel_size": 9 })), ["sigma"]);
    for side in [0, 2, 8, 1025] {
        assert_eq!(refused::<GaussianBlur>(json!({ "kernel_size": side })), ["kernel_size"]);
    }
    for threshold in [-1.0, 0.5, 256.5] {
        assert_eq!(refused::<Solarize>(json!({ "threshold": threshold })), ["threshold"]);
    }
    for degrees in [json!(-1), json!(361), json!([10, -10]), json!([-400, 0])] {
        assert_eq!(refused::<RandomRotation>(json!({ "degrees": degrees })), ["degrees"]);
    }
    assert_eq!(refused::<Pad>(json!({ "padding": 5000 })), ["padding"]);
    assert_eq!(refused::<Pad>(json!({ "padding": 1, "fill": 3, "mode": "edge" })), ["fill"]);
    for p in [-0.1, 1.1] {
        assert_eq!(refused::<ColorJitter>(json!({ "p": p })), ["p"]);
        assert_eq!(refused::<Grayscale>(json!({ "p": p })), ["p"]);
        assert_eq!(refused::<GaussianBlur>(json!({ "p": p })), ["p"]);
        assert_eq!(refused::<Solarize>(json!({ "p": p })), ["p"]);
    }
    assert_eq!(Grayscale { p: f64::NAN }.check().unwrap_err().path, ["p"]);
}

#[test]
fn borders_are_written_back_as_briefly_as_they_can_be() {
    for padding in [json!(3), json!([1, 2]), json!([1, 2, 3, 2])] {
        let pad: Pad = options(json!({ "padding": padding }));
        assert_eq!(serde_json::to_value(&pad).unwrap()["padding"], padding);
    }
    for padding in [json!(-1), json!([1]), json!([1, 2, 3]), json!("1"), json!(1.5)] {
        assert!(serde_json::from_value::<Pad>(json!({ "padding": padding })).is_err());
    }
}
