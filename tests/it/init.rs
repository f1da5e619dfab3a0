//! `maskalign init`: a recipe for a folder, which validates and runs as it is.

use std::{fs, path::Path};

use crate::support::Sandbox;

/// A small image of its own grey.
fn image(path: &Path, side: usize, grey: u8) {
    fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
    let mut file = format!("P6\n{side} {side}\n255\n").into_bytes();
    file.extend((0..3 * side * side).map(|i| grey.wrapping_add((i % 251) as u8)));
    fs::write(path, file).expect("an image");
}

fn ok(sandbox: &Sandbox, arguments: &[&str]) -> String {
    let output = sandbox.run(arguments);
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_folder_becomes_a_recipe_that_runs() {
    let sandbox = Sandbox::new();
    let work = sandbox.work();
    for i in 0..40 {
        image(&work.join(format!("My photos' \"best\"/{i}.ppm")), 24, i);
    }
    fs::write(work.join("My photos' \"best\"/broken.ppm"), "P6\n24 24\n255\n").expect("written");
    let said = ok(&sandbox, &["init", "My photos' \"best\""]);
    assert!(said.contains("wrote my-photos---best.yaml: 41 images without labels, at 32 pixels"), "{said}");
    let text = fs::read_to_string(work.join("my-photos---best.yaml")).expect("the recipe");
    assert!(text.contains("on_error: skip") && text.contains("# "), "{text}");
    // What is said of the time, of the size and of the rate.
    assert!(
        text.contains("updates, ")
            && text.contains("threads of the machine")
            && said.contains("threads of this machine")
    );
    assert!(
        text.contains("11 to 24 pixels a side") && text.contains("here 5.0e-4") && text.contains("base_lr: 1.60e-2"),
        "{text}"
    );
    ok(&sandbox, &["validate", "my-photos---best.yaml"]);
    ok(&sandbox, &["run", "my-photos---best.yaml", "--steps", "2", "-q"]);

    let again = sandbox.run(["init", "My photos' \"best\""]);
    assert_eq!(again.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&again.stderr).contains("is there already"));
    ok(&sandbox, &["init", "My photos' \"best\"", "--force"]);
}

#[test]
fn labels_and_what_is_held_out_are_seen() {
    let sandbox = Sandbox::new();
    let work = sandbox.work();
    for split in ["train", "val"] {
        for class in ["cat", "dog"] {
            for i in 0..12 {
                image(&work.join(format!("pets/{split}/{class}/{i}.ppm")), 64, i);
            }
        }
    }
    let said = ok(&sandbox, &["init", "pets", "mine.yaml"]);
    assert!(said.contains("24 images in 2 classes, at 64 pixels"), "{said}");
    let results = ok(&sandbox, &["run", "mine.yaml", "--steps", "1", "-q", "--set", "stages.knn.k=[3]"]);
    assert!(results.contains("student") && results.contains("accuracy"), "{results}");
    // Classes alone: what needs no labels is measured, and how to add an evaluation is said in the recipe.
    ok(&sandbox, &["init", "pets/train", "classes.yaml"]);
    let classes = fs::read_to_string(work.join("classes.yaml")).expect("a recipe");
    assert!(classes.contains("add\n  # a stage `knn`") && classes.contains("type: quality"), "{classes}");
    ok(&sandbox, &["validate", "classes.yaml"]);
}

#[test]
fn what_holds_no_images_is_refused() {
    let sandbox = Sandbox::new();
    fs::create_dir(sandbox.work().join("empty")).expect("a folder");
    image(&sandbox.work().join("torn/one.ppm"), 8, 1);
    fs::write(sandbox.work().join("torn/one.ppm"), "P6").expect("written");
    for (folder, says) in [
        ("nowhere", "nowhere"),
        ("empty", "no images in `empty`"),
        ("torn", "none of 1 images"),
        ("good.yaml", "good.yaml"),
    ] {
        let output = sandbox.run(["init", folder, "new.yaml"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(says), "{said}");
        assert!(!sandbox.work().join("new.yaml").exists());
    }
}
