//! The guide for one's own images: every command of it, in its order, on small images.

use std::{fs, path::Path};

use serde_json::Value;

use crate::support::{Sandbox, ends, here};

/// The commands of the page.
fn commands() -> Vec<String> {
    let page = fs::read_to_string(here().join("../docs/your_own_images.md")).expect("a page");
    let blocks = page.split("```sh\n").skip(1);
    let blocks = blocks.filter_map(|rest| Some(rest.split_once("```")?.0));
    blocks.flat_map(str::lines).map(str::to_owned).collect()
}

/// A small image: a grey of its own, darker on one side.
fn image(path: &Path, grey: u8) {
    let side = 32;
    let mut file = format!("P6\n{side} {side}\n255\n").into_bytes();
    file.extend((0..3 * side * side).map(|i| grey.saturating_sub((i % 96) as u8)));
    fs::write(path, file).expect("an image");
}

#[test]
fn every_command_of_the_guide_does_what_it_says() {
    let sandbox = Sandbox::new();
    let work = sandbox.work();
    fs::create_dir(work.join("photos")).expect("a folder");
    for at in 0..9_u8 {
        image(&work.join(format!("photos/{at}.ppm")), 20 * at + 60);
    }
    fs::write(work.join("photos/broken.ppm"), "P6\n32 32\n255\n").expect("written");
    let commands = commands();
    assert_eq!(commands.len(), 5, "{commands:?}");
    for command in &commands {
        let mut words = shlex::split(command).expect("a command line");
        assert_eq!(words.remove(0), "maskalign");
        if words[0] == "run" {
            // What takes minutes with photographs is cut short.
            words.extend(["--steps", "4"].map(str::to_owned));
        }
        ends(&sandbox.run(&words), 0, &[]);
    }
    let recipe = fs::read_to_string(work.join("photos.yaml")).expect("a recipe");
    assert!(recipe.starts_with("# yaml-language-server: $schema=./recipe.schema.json\n"), "{recipe}");
    let schema = fs::read(work.join("recipe.schema.json")).expect("a schema");
    let schema: Value = serde_json::from_slice(&schema).expect("JSON");
    let document: Value = serde_yaml::from_str(&recipe).expect("YAML");
    let validator = jsonschema::validator_for(&schema).expect("a schema");
    assert!(validator.is_valid(&document), "an editor accepts what was written");

    let features = fs::read(work.join("features/features.npy")).expect("features");
    let header = 10 + usize::from(u16::from_le_bytes([features[8], features[9]]));
    let text = String::from_utf8_lossy(&features[10..header]).into_owned();
    assert!(text.contains("'shape': (9, 192)"), "{text}");
    let values: Vec<f64> = features[header..]
        .chunks_exact(4)
        .map(|bytes| f64::from(f32::from_le_bytes(bytes.try_into().expect("four bytes"))))
        .collect();
    let rows: Vec<&[f64]> = values.chunks_exact(192).collect();
    let unit = |row: &[f64]| -> Vec<f64> {
        let length = row.iter().map(|v| v * v).sum::<f64>().sqrt();
        row.iter().map(|v| v / length).collect()
    };
    // The mean is subtracted, so that cosines tell something.
    let mean: Vec<f64> = (0..192).map(|at| rows.iter().map(|row| row[at]).sum::<f64>() / 9.0).collect();
    let centred: Vec<Vec<f64>> =
        rows.iter().map(|row| unit(&row.iter().zip(&mean).map(|(v, mean)| v - mean).collect::<Vec<_>>())).collect();
    let cosine = |a: usize, b: usize| centred[a].iter().zip(&centred[b]).map(|(a, b)| a * b).sum::<f64>();
    let read = |name: &str| fs::read_to_string(work.join("features").join(name)).expect("a file");
    let list = read("images.csv");
    let names: Vec<&str> = list.lines().skip(1).filter_map(|line| Some(line.split_once(',')?.1)).collect();
    assert!(names.len() == 9 && names.iter().all(|name| Path::new(&work.join(name)).is_file()), "{list}");
    let found = read("neighbours.csv");
    let found: Vec<Vec<&str>> = found.lines().skip(1).map(|line| line.split(',').collect()).collect();
    assert_eq!(found.len(), 9 * 5);
    for cells in &found {
        let place = |name: &str| names.iter().position(|known| *known == name).expect("an image");
        let (own, other, rank) = (place(cells[0]), place(cells[2]), cells[1].parse::<usize>().expect("a rank"));
        let similarity = cells[3].parse::<f64>().expect("a cosine");
        assert!(own != other && (similarity - cosine(own, other)).abs() < 1e-5, "{cells:?}");
        let nearer = (0..9).filter(|at| *at != own && cosine(own, *at) > similarity + 1e-5).count();
        assert!(nearer < rank, "{cells:?}");
    }
    let page = read("neighbours.html");
    assert_eq!(
        page.matches("src=\"data:image/jpeg;base64,").count(),
        9 * 6,
        "each image and its five, in the page itself"
    );
    assert!(page.contains("alt=\"photos/0.ppm\"") && page.contains("9 of 9 images"), "{page}");
    assert!(!page.contains("file:") && !page.contains("http"), "{page}");
    let report = fs::read_to_string(work.join("runs/photos/report.html")).expect("a report");
    assert!(report.contains("student before training") && report.contains("pair_accuracy"), "whether it has learnt");
    assert!(report.contains("maskalign features runs/photos FOLDER-OF-IMAGES"), "what to do next");
    assert!(fs::metadata(work.join("student.safetensors")).expect("weights").len() > 1_000_000);

    let again = sandbox.run(["features", "runs/photos", "photos", "--out", "features"]);
    ends(&again, 2, &["features.npy is there already", "--force"]);
    let elsewhere = |arguments: &[&str], says: &[&str]| {
        ends(&sandbox.run([&["features"], arguments, &["--out", "other"]].concat()), 2, says);
        assert!(!work.join("other").exists());
    };
    elsewhere(&["photos", "photos"], &["photos"]);
    elsewhere(&["runs/photos", "gone"], &["gone"]);
    elsewhere(&["runs/photos", "photos", "--stage", "knn"], &["no stage `knn` that trains a student", "pretrain"]);
}
