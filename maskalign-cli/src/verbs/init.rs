//! `maskalign init`: a recipe for a folder of images, chosen from the images and the machine.

use std::{
    fmt::Write as _,
    io::Write as _,
    path::{Path, PathBuf},
};

use maskalign_core::{
    Recompute,
    components::towers::{Environment, MissingWeights},
    data::{Dataset, Images},
    pipeline::{self, PlanOptions},
    plugin::Build,
    run::atomic_write,
};
use maskalign_registry::{DatasetTag, Input, LoadRequest, Recipe, Slot};
use serde_json::json;

use super::schema::{SCHEMA, schema_beside};
use crate::{failure::Failure, output, recipes::Embedded, session::Session, table::count};

const EXAMPLES: &str = "\
Examples:
  maskalign init ~/photos                  writes photos.yaml
  maskalign init data/flowers flowers.yaml
  maskalign run flowers.yaml";

/// Images that are opened to see how large they are.
const LOOKED_AT: usize = 64;
/// Updates that a student of this size needs at least to learn something.
const UPDATES: f64 = 4000.0;
/// The share of free memory that a step may take.
const SHARE_OF_MEMORY: f64 = 0.6;

/// Write a recipe for a folder of images
///
/// Asks nothing: looks at the images, with labels (one folder a class, or `train` and `val` of that kind) or without, and at
/// the memory of this machine, and writes a recipe with comments that pre-trains a student on them. Change it as you like. The
/// schema of recipes is written beside it, unless one is there, so that an editor completes and checks it.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The folder: images, one folder a class, or `train` and `val`
    images: PathBuf,
    /// Where to write the recipe [default: the folder's name, in the current folder]
    file: Option<PathBuf>,
    /// Replace the file if it is there
    #[arg(long)]
    force: bool,
}

/// What there is to see of a folder of images.
struct Seen {
    images: usize,
    classes: Option<usize>,
    /// The median of the shorter sides of some images, in pixels.
    side: usize,
    /// Images among those that cannot be read.
    unreadable: usize,
}

/// The sizes that follow.
struct Sizes {
    /// Pixels of a side.
    image: usize,
    /// The architecture, as recipes say it.
    arch: &'static str,
    decoder: &'static str,
    effective: usize,
    epochs: usize,
}

impl Args {
    pub(crate) fn run(self, session: &Session) -> Result<(), Failure> {
        let (train, held_out) = splits(&self.images);
        let seen = look(open(&train)?.as_ref())?;
        let held_out = held_out.filter(|path| seen.classes.is_some() && open(path).is_ok());
        let name = self.name();
        let file = self.file.clone().unwrap_or_else(|| PathBuf::from(format!("{name}.yaml")));
        if file.symlink_metadata().is_ok() && !self.force {
            return Err(Failure::mistake(format!("{} is there already", file.display()))
                .help("name another file, or replace it with `--force`"));
        }
        let sizes = Sizes::of(&seen);
        let micro = micro_batch(session, &sizes);
        let text = recipe(&name, &train, held_out.as_deref(), &seen, &sizes, micro);
        atomic_write(&file, "recipe", |out| out.write_all(text.as_bytes()))?;
        let schema = schema_beside(session, &file)?;
        let labels = seen.classes.map_or("without labels".to_owned(), |classes| format!("in {classes} classes"));
        Ok(output::print(&format!(
            "wrote {file}: {images} images {labels}, at {size} pixels\n{schema}\
             next: `maskalign validate {file}` shows steps and memory, `maskalign run {file}` trains\n",
            file = file.display(),
            images = count(seen.images as u64),
            size = sizes.image,
        ))?)
    }

    /// What the recipe is called: as the folder is.
    fn name(&self) -> String {
        let path = self.images.canonicalize().unwrap_or_else(|_| self.images.clone());
        let name = path.file_name().map_or_else(|| "images".into(), |name| name.to_string_lossy());
        let plain: String =
            name.chars().map(|c| if c.is_ascii_alphanumeric() || "-_".contains(c) { c } else { '-' }).collect();
        match plain.trim_matches('-') {
            "" => "images".to_owned(),
            name => name.to_lowercase(),
        }
    }
}

/// The folder to train on, and the one that is held out, where a folder has both.
fn splits(folder: &Path) -> (PathBuf, Option<PathBuf>) {
    let first = |names: &[&str]| names.iter().map(|name| folder.join(name)).find(|path| path.is_dir());
    match first(&["train", "training"]) {
        Some(train) => (train, first(&["val", "valid", "validation", "test"])),
        None => (folder.to_owned(), None),
    }
}

fn open(folder: &Path) -> Result<Box<dyn Images>, Failure> {
    let slot: Slot<DatasetTag> = serde_json::from_value(dataset(folder)).expect("a dataset with its options");
    let opened = slot.build().and_then(|dataset: Box<dyn Dataset>| dataset.open());
    opened.map_err(|refusal| {
        let failure = Failure::mistake(refusal.message);
        match refusal.help {
            Some(help) => failure.help(help),
            None => failure,
        }
    })
}

fn dataset(folder: &Path) -> serde_json::Value {
    json!({ "type": "image_folder", "root": folder.to_string_lossy() })
}

/// Opens some of the images, evenly spread.
fn look(images: &dyn Images) -> Result<Seen, Failure> {
    let step = images.len().div_ceil(LOOKED_AT).max(1);
    let (mut sides, mut failed) = (Vec::new(), Vec::new());
    for index in (0..images.len()).step_by(step) {
        match images.image(index) {
            Ok(image) => sides.push(image.width.min(image.height)),
            Err(error) => failed.push(error),
        }
    }
    sides.sort_unstable();
    let Some(&side) = sides.get(sides.len() / 2) else {
        let first = failed.first().map_or(String::new(), |error| format!(", {error} among them"));
        return Err(Failure::mistake(format!(
            "none of {} images that were looked at can be read{first}",
            failed.len()
        )));
    };
    let classes = images.label(0).and_then(|_| images.classes()).map(|classes| classes.len());
    Ok(Seen { images: images.len(), classes, side, unreadable: failed.len() })
}

impl Sizes {
    fn of(seen: &Seen) -> Sizes {
        // A patch is about an eighth to a fourteenth of the side; more images bear a larger student.
        let (image, arch, decoder) = match (seen.side, seen.images) {
            (..48, _) => {
                (32, "{ dim: 192, depth: 6, heads: 3, patch: 4 }", "{ type: decoder, dim: 96, depth: 2, heads: 3 }")
            }
            (48..128, _) => {
                (64, "{ dim: 192, depth: 8, heads: 3, patch: 8 }", "{ type: decoder, dim: 96, depth: 2, heads: 3 }")
            }
            (_, ..20_000) => {
                (128, "{ dim: 192, depth: 12, heads: 3, patch: 16 }", "{ type: decoder, dim: 128, depth: 2, heads: 4 }")
            }
            (_, ..200_000) => (224, "small_16", "{ type: decoder, dim: 256, depth: 4, heads: 8 }"),
            _ => (224, "base_16", "{ type: decoder, dim: 512, depth: 8, heads: 16 }"),
        };
        // The largest power of two that leaves twenty steps an epoch, from 8 to 256.
        let effective = (3..=8).rev().map(|power| 1 << power).find(|batch| batch * 20 <= seen.images).unwrap_or(8);
        let effective = effective.min(seen.images.max(1));
        let epochs = (UPDATES * effective as f64 / seen.images as f64).ceil().clamp(10.0, 800.0) as usize;
        Sizes { image, arch, decoder, effective, epochs }
    }
}

/// The largest micro-batch whose step fits the memory that is free here.
fn micro_batch(session: &Session, sizes: &Sizes) -> usize {
    let free = maskalign_core::available_memory_mib().map_or(f64::INFINITY, |mib| mib * f64::from(1 << 20));
    let mut micro = sizes.effective;
    while micro > 1
        && micro.is_multiple_of(2)
        && memory(session, sizes, micro).is_some_and(|needed| needed > SHARE_OF_MEMORY * free)
    {
        micro /= 2;
    }
    micro
}

/// What a step needs, as `validate` estimates it; the images themselves make no difference.
fn memory(session: &Session, sizes: &Sizes, micro: usize) -> Option<f64> {
    let nowhere = Seen { images: 1, classes: None, side: 1, unreadable: 0 };
    let text = recipe("memory", Path::new("elsewhere"), None, &nowhere, sizes, micro);
    let request = LoadRequest {
        input: Input::Text { name: "init".to_owned(), text },
        sets: &[],
        env: &|_| None,
        builtins: &Embedded,
    };
    let loaded = Recipe::load_without_environment(&request, session.registry).ok()?;
    let options = PlanOptions {
        environment: Environment::Ignored,
        missing_weights: MissingWeights::Refused,
        recompute: Recompute::Never,
    };
    let plan = pipeline::plan(loaded.recipe(), options).ok()?;
    plan.summaries().map(|(_, summary)| summary.memory as f64).reduce(f64::max)
}

fn recipe(name: &str, train: &Path, held_out: Option<&Path>, seen: &Seen, sizes: &Sizes, micro: usize) -> String {
    let Sizes { image, arch, decoder, effective, epochs } = sizes;
    let root = |path: &Path| json!(path.to_string_lossy()).to_string();
    let on_error = match seen.unreadable {
        0 => "",
        _ => "\n      # Some images cannot be read: they are left out, and counted.\n      on_error: skip",
    };
    let labels = seen.classes.map_or("without labels".to_owned(), |classes| format!("in {classes} classes"));
    let mut text = format!(
        "# yaml-language-server: $schema=./{SCHEMA}\n\
         # {images} images {labels}, {side} pixels a side (the median).\n\
         # A student learns to predict the pixels of hidden patches (MAE), which needs no weights of others. `maskalign explain\n\
         # stage.pretrain` has all options; `maskalign cp maskalign_vitb_clip` shows alignment with a teacher such as CLIP.\n\
         name: {name}\nseed: 0\nstages:\n  pretrain:\n    type: pretrain\n    \
         # About {updates} updates; more epochs go on helping, most with few images.\n    epochs: {epochs}\n    data:\n      \
         dataset: {{ type: image_folder, root: {root} }}{on_error}\n      transforms:\n        \
         - {{ type: random_resized_crop, size: {image}, scale: [0.2, 1.0] }}\n        \
         # Remove this where left and right are not alike, as in text.\n        - {{ type: horizontal_flip }}\n    \
         student: {{ type: vit, arch: {arch} }}\n    masker: {{ type: random, ratio: 0.75 }}\n    objectives:\n      pixels:\n        \
         target: {{ type: pixels, normalize: standardize }}\n        tokens: [masked]\n        aligner: {decoder}\n        \
         loss: {{ type: mse }}\n    \
         optimizer: {{ type: adamw, base_lr: 1.0e-3, weight_decay: 0.05, betas: [0.9, 0.95] }}\n    \
         schedule: {{ type: cosine, warmup_epochs: {warmup} }}\n    \
         # `micro` images go through the student at once: lower it where memory is short; the results stay the same.\n    \
         batch: {{ effective: {effective}, micro: {micro} }}\n",
        images = count(seen.images as u64),
        side = seen.side,
        updates = count((*epochs * (seen.images / *effective).max(1)) as u64),
        root = root(train),
        warmup = (*epochs as f64 / 20.0).ceil(),
    );
    let view = format!(
        "transforms: [{{ type: resize, size: {image} }}, {{ type: center_crop, size: {image} }}]{}",
        if seen.unreadable > 0 { ", on_error: skip" } else { "" }
    );
    match (held_out, seen.classes) {
        (Some(held_out), Some(_)) => {
            let _ = write!(
                text,
                "  # How well its features tell the classes apart, by the nearest neighbours of images that were held out.\n  \
                 knn:\n    type: knn\n    student: {{ stage: pretrain }}\n    baselines: [pixels, untrained]\n    \
                 train: {{ dataset: {{ type: image_folder, root: {} }}, {view} }}\n    \
                 test: {{ dataset: {{ type: image_folder, root: {} }}, {view} }}\n",
                root(train),
                root(held_out),
            );
        }
        (None, Some(_)) => text.push_str(
            "  # To see how well its features tell the classes apart, put some images of each class into a second folder, and add\n  \
             # a stage `knn` (`maskalign explain stage.knn`).\n",
        ),
        (_, None) => {}
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_leave_steps_and_few_images_are_seen_often() {
        let sizes = |images: usize| {
            let Sizes { effective, epochs, .. } = Sizes::of(&Seen { images, classes: None, side: 300, unreadable: 0 });
            (effective, epochs)
        };
        assert_eq!(sizes(3), (3, 800));
        assert_eq!(sizes(200), (8, 160));
        assert_eq!(sizes(5600), (256, 183));
        assert_eq!(sizes(1_281_167), (256, 10));
    }
}
