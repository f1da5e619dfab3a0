//! `maskalign init`: a recipe for a folder of images, chosen from the images and the machine.

use std::{
    fmt::Write as _,
    io::Write as _,
    path::{Path, PathBuf},
    time::Instant,
};

use maskalign_core::{
    Recompute,
    components::towers::{Environment, MissingWeights},
    data::{Dataset, Images},
    pipeline::{self, PlanOptions},
    plugin::Build,
    run::atomic_write,
};
use maskalign_registry::{DatasetTag, Input, LoadRequest, Loaded, Recipe, Slot};
use maskalign_testkit::bench::{self, BenchOptions, Job};
use serde_json::json;

use super::{
    machine::Machine,
    schema::{SCHEMA, schema_beside},
};
use crate::{failure::Failure, output, recipes::Embedded, session::Session, table::count};

const EXAMPLES: &str = "\
Examples:
  maskalign init ~/photos                  writes photos.yaml
  maskalign init data/flowers flowers.yaml
  maskalign run flowers.yaml";

/// Images that are opened to see how large they are.
const LOOKED_AT: usize = 64;
/// Updates in which a student of the smaller sizes learns more than colours: with 400 small photographs some minutes.
const UPDATES: f64 = 1600.0;
/// Steps that are timed.
const TIMED: usize = 3;
/// Images whose views are compared at most, when it is over.
const COMPARED: usize = 1000;
/// The share of free memory that a step may take.
const SHARE_OF_MEMORY: f64 = 0.6;

/// Write a recipe for a folder of images
///
/// Asks nothing: looks at the images, with labels (one folder a class, or `train` and `val` of that kind) or without, and at
/// the memory of this machine, and writes a recipe with comments that pre-trains a student on them. It makes a few steps to say
/// how long that takes here. Change the recipe as you like. The schema of recipes is written beside it, unless one is there, so
/// that an editor completes and checks it.
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
    #[command(flatten)]
    machine: Machine,
}

/// What there is to see of a folder of images.
struct Seen {
    images: usize,
    /// Seconds that it takes to read one.
    seconds: f64,
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
    /// The highest learning rate.
    peak: f64,
    /// Images of a step that is timed.
    timed: usize,
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
        let time = self.seconds(session, &seen, &sizes).map(about);
        let threads = self.machine.threads();
        let text =
            recipe(&name, (&train, held_out.as_deref()), &seen, &sizes, micro, time.as_deref().zip(Some(threads)));
        atomic_write(&file, "recipe", |out| out.write_all(text.as_bytes()))?;
        let schema = schema_beside(session, &file)?;
        let labels = seen.classes.map_or("without labels".to_owned(), |classes| format!("in {classes} classes"));
        Ok(output::print(&format!(
            "wrote {file}: {images} images {labels}, at {size} pixels\n{schema}\
             {updates} updates{time}\n\
             next: `maskalign validate {file}` shows steps and memory, `maskalign run {file}` trains\n",
            updates = count(sizes.updates(&seen)),
            time = time.map_or(String::new(), |time| format!(": {time} with {threads} threads of this machine")),
            file = file.display(),
            images = count(seen.images as u64),
            size = sizes.image,
        ))?)
    }

    /// How long training takes on this machine, from a few steps; unknown where they cannot be made.
    fn seconds(&self, session: &Session, seen: &Seen, sizes: &Sizes) -> Option<f64> {
        let loaded = elsewhere(session, sizes, sizes.timed)?;
        let cx = self.machine.open().ok()?;
        let options = BenchOptions { job: Job::Pretrain, steps: TIMED, batch: None };
        let report = bench::bench(&cx, loaded.recipe(), options).ok()?;
        // Images are read by a thread of their own while steps are made, if there is one.
        let step = 1.0 / report.images_per_s_median;
        let each = if cx.threads() > 1 { step.max(seen.seconds) } else { step + seen.seconds };
        Some(each * (sizes.updates(seen) * sizes.effective as u64) as f64)
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
    let began = Instant::now();
    for index in (0..images.len()).step_by(step) {
        match images.image(index) {
            Ok(image) => sides.push(image.width.min(image.height)),
            Err(error) => failed.push(error),
        }
    }
    let seconds = began.elapsed().as_secs_f64() / (sides.len() + failed.len()).max(1) as f64;
    sides.sort_unstable();
    let Some(&side) = sides.get(sides.len() / 2) else {
        let first = failed.first().map_or(String::new(), |error| format!(", {error} among them"));
        return Err(Failure::mistake(format!(
            "none of {} images that were looked at can be read{first}",
            failed.len()
        )));
    };
    let classes = images.label(0).and_then(|_| images.classes()).map(|classes| classes.len());
    Ok(Seen { images: images.len(), seconds, classes, side, unreadable: failed.len() })
}

impl Sizes {
    fn of(seen: &Seen) -> Sizes {
        // A patch is about an eighth to a fourteenth of the side; more images bear a larger student.
        let (image, arch, decoder, peak, timed) = match (seen.side, seen.images) {
            (..48, _) => (
                32,
                "{ dim: 192, depth: 6, heads: 3, patch: 4 }",
                "{ type: decoder, dim: 96, depth: 2, heads: 3 }",
                5e-4,
                16,
            ),
            (48..128, _) => (
                64,
                "{ dim: 192, depth: 8, heads: 3, patch: 8 }",
                "{ type: decoder, dim: 96, depth: 2, heads: 3 }",
                5e-4,
                16,
            ),
            (_, ..20_000) => (
                128,
                "{ dim: 192, depth: 12, heads: 3, patch: 16 }",
                "{ type: decoder, dim: 128, depth: 2, heads: 4 }",
                5e-4,
                16,
            ),
            (_, ..200_000) => (224, "small_16", "{ type: decoder, dim: 256, depth: 4, heads: 8 }", 3e-4, 4),
            _ => (224, "base_16", "{ type: decoder, dim: 512, depth: 8, heads: 16 }", 1.5e-4, 2),
        };
        // The largest power of two that leaves twenty steps an epoch, from 8 to 256.
        let effective = (3..=8).rev().map(|power| 1 << power).find(|batch| batch * 20 <= seen.images).unwrap_or(8);
        let effective = effective.min(seen.images.max(1));
        let epochs = (UPDATES * effective as f64 / seen.images as f64).ceil().clamp(10.0, 400.0) as usize;
        Sizes { image, arch, decoder, peak, timed: timed.min(effective), effective, epochs }
    }

    /// Updates of the training.
    fn updates(&self, seen: &Seen) -> u64 {
        (self.epochs * (seen.images / self.effective).max(1)) as u64
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
    let loaded = elsewhere(session, sizes, micro)?;
    let options = PlanOptions {
        environment: Environment::Ignored,
        missing_weights: MissingWeights::Refused,
        recompute: Recompute::Never,
    };
    let plan = pipeline::plan(loaded.recipe(), options).ok()?;
    plan.summaries().map(|(_, summary)| summary.memory as f64).reduce(f64::max)
}

/// The recipe of these sizes for images that are not there, with this micro-batch.
fn elsewhere(session: &Session, sizes: &Sizes, micro: usize) -> Option<Loaded> {
    let nowhere = Seen { images: 1, seconds: 0.0, classes: None, side: 1, unreadable: 0 };
    let text = recipe("elsewhere", (Path::new("elsewhere"), None), &nowhere, sizes, micro, None);
    let request = LoadRequest {
        input: Input::Text { name: "init".to_owned(), text },
        sets: &[],
        env: &|_| None,
        builtins: &Embedded,
    };
    Recipe::load_without_environment(&request, session.registry).ok()
}

/// A time in words.
fn about(seconds: f64) -> String {
    let (minutes, hours, days) = (seconds / 60.0, seconds / 3600.0, seconds / 86_400.0);
    match () {
        () if seconds < 45.0 => "less than a minute".to_owned(),
        () if minutes < 1.5 => "about a minute".to_owned(),
        () if minutes < 90.0 => format!("about {minutes:.0} minutes"),
        () if hours < 48.0 => format!("about {hours:.0} hours"),
        () => format!("about {days:.0} days"),
    }
}

/// The recipe, to train on one folder and be judged on another where there are two; `time` says how long it takes with so many
/// threads.
fn recipe(
    name: &str,
    (train, held_out): (&Path, Option<&Path>),
    seen: &Seen,
    sizes: &Sizes,
    micro: usize,
    time: Option<(&str, usize)>,
) -> String {
    let Sizes { image, arch, decoder, peak, effective, epochs, .. } = sizes;
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
         # {updates} updates{time}. More epochs go on helping, most with few images.\n    epochs: {epochs}\n    data:\n      \
         dataset: {{ type: image_folder, root: {root} }}{on_error}\n      transforms:\n        \
         # Crops of a fifth to all of an image, {least} to {side} pixels a side, are scaled to `size`. A larger one shows more and\n        \
         # takes longer: at twice the side there are four times as many patches.\n        \
         - {{ type: random_resized_crop, size: {image}, scale: [0.2, 1.0] }}\n        \
         # Remove this where left and right are not alike, as in text.\n        - {{ type: horizontal_flip }}\n    \
         student: {{ type: vit, arch: {arch} }}\n    masker: {{ type: random, ratio: 0.75 }}\n    objectives:\n      pixels:\n        \
         target: {{ type: pixels, normalize: standardize }}\n        tokens: [masked]\n        aligner: {decoder}\n        \
         loss: {{ type: mse }}\n    \
         # The highest rate is base_lr * effective / 256, here {peak:.1e}: keep that where you change the batch.\n    \
         optimizer: {{ type: adamw, base_lr: {base_lr:.2e}, weight_decay: 0.05, betas: [0.9, 0.95] }}\n    \
         # The rate grows for a twentieth of the epochs, then falls: with other `epochs` change this too.\n    \
         schedule: {{ type: cosine, warmup_epochs: {warmup} }}\n    \
         # `micro` images go through the student at once: lower it where memory is short; the results stay the same.\n    \
         batch: {{ effective: {effective}, micro: {micro} }}\n",
        images = count(seen.images as u64),
        side = seen.side,
        least = (seen.side as f64 * 0.2_f64.sqrt()).round(),
        base_lr = peak * 256.0 / *effective as f64,
        time = time.map_or(String::new(), |(time, threads)| {
            format!(", {time} with {threads} threads of the machine that this was written on")
        }),
        updates = count(sizes.updates(seen)),
        root = root(train),
        warmup = (*epochs as f64 / 20.0).ceil(),
    );
    let view = format!(
        "transforms: [{{ type: resize, size: {image} }}, {{ type: center_crop, size: {image} }}]{}",
        if seen.unreadable > 0 { ", on_error: skip" } else { "" }
    );
    if let Some(held_out) = held_out {
        let _ = write!(
            text,
            "  # How well its features tell the classes apart, by the nearest neighbours of images that were held out.\n  \
             knn:\n    type: knn\n    student: {{ stage: pretrain }}\n    baselines: [pixels, untrained]\n    \
             train: {{ dataset: {{ type: image_folder, root: {} }}, {view} }}\n    \
             test: {{ dataset: {{ type: image_folder, root: {} }}, {view} }}\n",
            root(train),
            root(held_out),
        );
        return text;
    }
    if seen.images > 1 {
        let _ = write!(
            text,
            "  # Whether it has learnt something, without labels: two crops of an image, in other colours, are to be found by each\n  \
             # other among those of all images (`pair_accuracy`). `untrained` is the student as it began.\n  \
             quality:\n    type: quality\n    student: {{ stage: pretrain }}\n    baselines: [untrained]\n    \
             images: {COMPARED}\n    data: {{ dataset: {{ type: image_folder, root: {root} }}, {view} }}\n    views:\n      \
             - {{ type: random_resized_crop, size: {image}, scale: [0.5, 1.0] }}\n      - {{ type: horizontal_flip }}\n      \
             - {{ type: color_jitter, brightness: 0.4, contrast: 0.4, saturation: 0.4 }}\n",
            root = root(train),
        );
    }
    if seen.classes.is_some() {
        text.push_str(
            "  # To see how well its features tell the classes apart, put some images of each class into a second folder, and add\n  \
             # a stage `knn` (`maskalign explain stage.knn`).\n",
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_leave_steps_and_few_images_are_seen_often() {
        let sizes = |images: usize| {
            let Sizes { effective, epochs, .. } =
                Sizes::of(&Seen { images, seconds: 0.0, classes: None, side: 300, unreadable: 0 });
            (effective, epochs)
        };
        assert_eq!(sizes(3), (3, 400));
        assert_eq!(sizes(200), (8, 64));
        assert_eq!(sizes(5600), (256, 74));
        assert_eq!(sizes(1_281_167), (256, 10));
    }

    #[test]
    fn times_are_told_in_words() {
        let told = [20.0, 70.0, 240.0, 7200.0, 1e6].map(about);
        assert_eq!(told, ["less than a minute", "about a minute", "about 4 minutes", "about 2 hours", "about 12 days"]);
    }
}
