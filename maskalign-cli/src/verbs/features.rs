//! `maskalign features`: what a trained student makes of a folder of images, and which of them are alike.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use clap::ValueEnum;
use maskalign_core::{
    Context, Recompute,
    chart::escape,
    components::{
        students::StudentModel,
        towers::{Environment, MissingWeights, TrainedStudents},
    },
    data::{Position, RgbImage, jpeg},
    error::Error,
    nn::Init,
    pipeline::{self, Plan, PlanOptions},
    run::{Checkpoint, RunDir, StopFlag, atomic_write},
    stages::{Data, FeatureTap, OpenData, Pooling, Tower, View, centre_and_scale, image_batch, nearest_others},
};
use maskalign_registry::Loaded;
use serde_json::json;

use super::{machine::Machine, runs::csv_line};
use crate::{failure::Failure, output, recipes, session::Session, signals, table::count};

const EXAMPLES: &str = "\
Examples:
  maskalign features runs/photos ~/photos --out features
  maskalign features runs/photos ~/photos --out features --neighbours 10 --stage pretrain

In Python: numpy.load(\"features/features.npy\"), a row for each line of features/images.csv.";

/// Images whose neighbours are shown on the page.
const SHOWN: usize = 24;
/// Side of an image on the page, in pixels.
const THUMBNAIL: usize = 112;
/// Images that go through the student together.
const BATCH: usize = 32;

/// Compute the features of a folder of images with a trained student, and list which images are alike
///
/// Needs no labels. Writes a folder with features.npy (a row of 32-bit numbers for each image), images.csv (the image of each
/// row), neighbours.csv (for each image those that are most alike), and neighbours.html, a page that shows some of them and
/// needs no other file.
///
/// How alike two images are is the cosine of their features after the mean of all has been subtracted: without that, the
/// features of one student all point much the same way, and every cosine is near 1. features.npy has them as they are.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The run directory
    run: PathBuf,
    /// The folder of images
    images: PathBuf,
    /// The folder to write
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// The stage whose student it is [default: the last that trains one]
    #[arg(long, value_name = "NAME")]
    stage: Option<String>,
    /// Neighbours of each image
    #[arg(long, value_name = "K", default_value_t = 5)]
    neighbours: usize,
    /// How the tokens of an image become one feature
    #[arg(long, value_enum, default_value_t)]
    pooling: Pooled,
    /// Replace the files if they are there
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    machine: Machine,
}

/// How tokens become one feature.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Pooled {
    /// The mean of the patches' tokens.
    #[default]
    Mean,
    /// The class token.
    Cls,
}

/// The features of images that could be read.
struct Found {
    /// Their places in the folder's list.
    places: Vec<usize>,
    names: Vec<String>,
    features: Vec<f32>,
    width: usize,
    skipped: usize,
}

impl Args {
    pub(crate) fn run(self, session: &Session) -> Result<(), Failure> {
        let files = ["features.npy", "images.csv", "neighbours.csv", "neighbours.html"].map(|name| self.out.join(name));
        if let Some(there) = files.iter().find(|file| file.symlink_metadata().is_ok()).filter(|_| !self.force) {
            return Err(Failure::mistake(format!("{} is there already", there.display()))
                .help("name another folder with `--out`, or replace the files with `--force`"));
        }
        let dir = RunDir::look_at(&self.run)?;
        let (loaded, plan) = planned(session, &dir)?;
        let stage = self.stage(&dir, &plan)?;
        let cx = self.machine.open()?;
        let student = student(&cx, &loaded, &plan, &dir, &stage)?;
        let shape = student.shape();
        let pooling = match self.pooling {
            Pooled::Mean => Pooling::Mean,
            Pooled::Cls => Pooling::Cls,
        };
        pooling.check("the student", &shape).map_err(|refusal| Failure::mistake(refusal.message))?;
        let data = images(&self.images, shape.image_size)?;
        let stop = StopFlag::new();
        signals::watch(&stop).map_err(|error| Failure::failed(format!("cannot watch for signals: {error}")))?;
        let view = View { pooling, tap: FeatureTap::Block, batch: BATCH };
        let found = features(&cx, &Tower::Student(&*student), &data, view, &stop)?;
        let mut unit = found.features.clone();
        centre_and_scale(&mut unit, found.width).map_err(|error| Failure::failed(error.to_string()))?;
        let nearest = nearest_others(&cx, &unit, found.width, self.neighbours)?;
        fs::create_dir_all(&self.out)
            .map_err(|error| Failure::failed(format!("cannot create {}: {error}", self.out.display())))?;
        let [npy, list, neighbours, page] = &files;
        let write = |path: &Path, bytes: &[u8]| atomic_write(path, "features", |file| file.write_all(bytes));
        write(npy, &as_npy(&found.features, found.width))?;
        let rows = found.names.iter().enumerate().map(|(row, name)| csv_line([row.to_string(), name.clone()]));
        write(list, (csv_line(["row", "image"].map(str::to_owned)) + &rows.collect::<String>()).as_bytes())?;
        write(neighbours, neighbours_csv(&found.names, &nearest).as_bytes())?;
        let rows = shown(found.names.len());
        let thumbnails = thumbnails(&images(&self.images, THUMBNAIL)?, &found, &rows, &nearest)?;
        write(page, page_of(&found.names, &rows, &nearest, &thumbnails).as_bytes())?;
        let skipped = match found.skipped {
            0 => String::new(),
            skipped => format!(", {} that could not be read left out", count(skipped as u64)),
        };
        Ok(output::print(&format!(
            "{} images{skipped}, {} numbers each, of the student of `{stage}`\nwrote {}, {}, {}\nto look at: {}\n",
            count(found.names.len() as u64),
            found.width,
            npy.display(),
            list.display(),
            neighbours.display(),
            page.display(),
        ))?)
    }

    /// The stage whose student is asked for: it must have ended.
    fn stage(&self, dir: &RunDir, plan: &Plan) -> Result<String, Failure> {
        let with_student = plan.summaries().filter(|(_, summary)| summary.student.is_some());
        let names: Vec<&str> = with_student.map(|(name, _)| name).collect();
        let has_ended = |name: &&str| dir.is_finished(name).unwrap_or(false);
        let ended: Vec<&str> = names.iter().copied().filter(|name| has_ended(name)).collect();
        let shown = self.run.display();
        match &self.stage {
            Some(stage) if ended.contains(&stage.as_str()) => Ok(stage.clone()),
            Some(stage) if names.contains(&stage.as_str()) => {
                Err(Failure::mistake(format!("stage `{stage}` of {shown} has not ended"))
                    .help(format!("go on with it: maskalign run --resume {shown}")))
            }
            Some(stage) => Err(Failure::mistake(format!("{shown} has no stage `{stage}` that trains a student"))
                .help(format!("stages that do: {}", names.join(", ")))),
            None => match ended.last() {
                Some(stage) => Ok((*stage).to_owned()),
                None => Err(Failure::mistake(format!("no stage of {shown} has left a student"))
                    .help(format!("go on with it: maskalign run --resume {shown}"))),
            },
        }
    }
}

/// The recipe of a run, and the plan of its stages, whatever became of its data.
fn planned(session: &Session, dir: &RunDir) -> Result<(Loaded, Plan), Failure> {
    let path = dir.recipe_path();
    let loaded = recipes::load_anywhere(session.registry, &path, &[])?;
    let options = PlanOptions {
        environment: Environment::Ignored,
        missing_weights: MissingWeights::Random,
        recompute: Recompute::Never,
    };
    let plan =
        pipeline::plan(loaded.recipe(), options).map_err(|refusals| Failure::Recipe(loaded.locate_all(&refusals)))?;
    Ok((loaded, plan))
}

/// The student that a stage left.
fn student(
    cx: &Context,
    loaded: &Loaded,
    plan: &Plan,
    dir: &RunDir,
    stage: &str,
) -> Result<Box<dyn StudentModel>, Failure> {
    let mut trained = TrainedStudents::default();
    let mut found = None;
    for (name, summary) in plan.summaries() {
        let Some(student) = &summary.student else { continue };
        if dir.is_finished(name)? {
            let left = Checkpoint::load_parameters(&dir.final_path(name)?)?;
            trained.insert(name, Arc::new(left.into_parameters().0));
        }
        if name == stage {
            found = Some(student);
            break;
        }
    }
    let Some(found) = found else { return Err(Failure::mistake(format!("stage `{stage}` trains no student"))) };
    let init = Init::new(cx.device(), loaded.recipe().seed, &*found.init_scope);
    let mut model = found.tower.build(&init, &trained)?;
    model.set_reach(found.reach);
    model.load(trained.get(stage)?).map_err(Error::from)?;
    Ok(model)
}

/// The images of a folder, at the size that the student runs at.
fn images(folder: &Path, size: usize) -> Result<OpenData, Failure> {
    let data = json!({
        "dataset": { "type": "image_folder", "root": folder.to_string_lossy() },
        "transforms": [{ "type": "resize", "size": size }, { "type": "center_crop", "size": size }],
        "on_error": "skip",
    });
    let data: Data = serde_json::from_value(data).expect("what a recipe may say");
    let planned = data.plan(Environment::Checked).map_err(|refusal| {
        let failure = Failure::mistake(refusal.message);
        match refusal.help {
            Some(help) => failure.help(help),
            None => failure,
        }
    })?;
    Ok(planned.open()?.clone())
}

/// One feature for each image that can be read.
fn features(cx: &Context, tower: &Tower, data: &OpenData, view: View, stop: &StopFlag) -> Result<Found, Failure> {
    let mut found = Found { places: Vec::new(), names: Vec::new(), features: Vec::new(), width: 0, skipped: 0 };
    let loader = data.pass(view.batch, 1).map_err(|refusal| Failure::mistake(refusal.message))?;
    let mut batches = loader.batches(Position::default(), None);
    while let Some(batch) = stop.while_waiting(|| batches.next()) {
        let mut batch = batch.map_err(Error::from)?;
        found.places.extend(&batch.indices);
        found.names.extend(batch.indices.iter().map(|place| data.images.name(*place)));
        let features = tower.features(cx, &image_batch(&mut batch), view)?;
        found.width = features.columns();
        found.features.extend_from_slice(&features.values());
        if let Some(stop) = stop.get() {
            return Err(Failure::Told(stop.exit_code()));
        }
    }
    found.skipped = data.images.len() - found.names.len();
    match found.names.is_empty() {
        true => Err(Failure::mistake("none of the images can be read")),
        false => Ok(found),
    }
}

/// Rows of 32-bit numbers as numpy's format 1.0: a magic number, the length of the header, the header padded to 64 bytes.
fn as_npy(values: &[f32], width: usize) -> Vec<u8> {
    let header =
        format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({}, {width}), }}", values.len() / width.max(1));
    let start = 10;
    let padded = (start + header.len() + 1).next_multiple_of(64) - start;
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((padded as u16).to_le_bytes());
    bytes.extend(format!("{header:<width$}\n", width = padded - 1).bytes());
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    bytes
}

fn neighbours_csv(names: &[String], nearest: &[Vec<(usize, f32)>]) -> String {
    let mut out = csv_line(["image", "rank", "neighbour", "similarity"].map(str::to_owned));
    for (name, nearest) in names.iter().zip(nearest) {
        for (rank, (place, similarity)) in nearest.iter().enumerate() {
            let cells = [name.clone(), (rank + 1).to_string(), names[*place].clone(), similarity.to_string()];
            out.push_str(&csv_line(cells));
        }
    }
    out
}

/// The images that are shown with their neighbours: equally spaced ones.
fn shown(images: usize) -> Vec<usize> {
    let shown = SHOWN.min(images);
    (0..shown).map(|at| at * images / shown).collect()
}

/// The images of a page as JPEG files, by their rows: those of `rows` and their neighbours.
fn thumbnails(
    data: &OpenData,
    found: &Found,
    rows: &[usize],
    nearest: &[Vec<(usize, f32)>],
) -> Result<BTreeMap<usize, Vec<u8>>, Failure> {
    let neighbours = rows.iter().flat_map(|&row| nearest[row].iter().map(|(other, _)| *other));
    let wanted: BTreeSet<usize> = rows.iter().copied().chain(neighbours).collect();
    let places = wanted.iter().map(|&row| found.places[row]).collect();
    let loader = data.pick(places).pass(1, 0).map_err(|refusal| Failure::mistake(refusal.message))?;
    let mut files = BTreeMap::new();
    let wanted: Vec<usize> = wanted.into_iter().collect();
    for batch in loader.batches(Position::default(), None) {
        let batch = batch.map_err(Error::from)?;
        // What cannot be read any more is left out, and its place is none of this batch.
        let Some(row) = batch.indices.first().and_then(|at| wanted.get(*at)) else { continue };
        let image = RgbImage::from_planes(&batch.images, batch.size.0);
        let file = jpeg(&image).map_err(|error| Failure::failed(format!("a picture cannot be written: {error}")))?;
        files.insert(*row, file);
    }
    Ok(files)
}

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #5f6368; --line: #d5d8dc; --ground: #ffffff; --panel: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #a5abb3; --line: #3c4248; --ground: #15181b; --panel: #1e2226; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 64rem; background: var(--ground); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0; } p { margin: .25rem 0 .75rem; max-width: 46rem; }
section { display: grid; gap: .5rem; grid-template-columns: repeat(auto-fill, minmax(6rem, 1fr)); padding: .6rem;
          margin-bottom: .75rem; background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; }
figure { margin: 0; min-width: 0; } figure:first-child img { outline: 3px solid var(--ink); outline-offset: -3px; }
img { display: block; width: 100%; height: auto; border-radius: .25rem; }
figcaption { font-size: .8rem; line-height: 1.3; overflow-wrap: anywhere; }
b { display: block; font-variant-numeric: tabular-nums; } .soft { color: var(--soft); }
";

/// A page with some images, each before its neighbours, that needs no other file.
fn page_of(
    names: &[String],
    rows: &[usize],
    nearest: &[Vec<(usize, f32)>],
    thumbnails: &BTreeMap<usize, Vec<u8>>,
) -> String {
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>Images that are alike - MaskAlign</title>\n<style>{STYLE}</style>\n</head>\n<body>\n\
         <h1>Images that are alike</h1>\n\
         <p>{} of {} images, evenly spread, each in a box of its own: first the image, framed, then those whose features are most \
         like its own, the nearest first.</p>\n\
         <p class=\"soft\">The number is the cosine of the two features after the mean of all {} has been subtracted: 1 is the \
         same direction, 0 no more alike than any two images, below 0 less. All neighbours are in neighbours.csv.</p>\n",
        count(rows.len() as u64),
        count(names.len() as u64),
        count(names.len() as u64),
    );
    let figure = |out: &mut String, row: usize, similarity: Option<f32>| {
        let Some(file) = thumbnails.get(&row) else { return };
        let name = &names[row];
        let short = name.rsplit(['/', '\\']).next().unwrap_or(name);
        let says = similarity.map_or("<b>image</b>".to_owned(), |cosine| format!("<b>{cosine:.3}</b>"));
        let alt = similarity.map_or(name.clone(), |cosine| format!("{name}, cosine {cosine:.3}"));
        let _ = writeln!(
            out,
            "<figure><img alt=\"{}\" src=\"data:image/jpeg;base64,{}\"/><figcaption>{says}<span class=\"soft\">{}</span>\
             </figcaption></figure>",
            escape(&alt),
            BASE64_STANDARD.encode(file),
            escape(short)
        );
    };
    for &row in rows {
        out.push_str("<section>\n");
        figure(&mut out, row, None);
        for (other, similarity) in &nearest[row] {
            // A rounded cosine that is nothing has no sign.
            figure(&mut out, *other, Some((1000.0 * similarity).round() / 1000.0 + 0.0));
        }
        out.push_str("</section>\n");
    }
    out + "</body>\n</html>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_what_numpy_reads() {
        let bytes = as_npy(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3);
        assert_eq!((&bytes[..8], bytes.len()), (&b"\x93NUMPY\x01\x00"[..], 128 + 24));
        let header = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
        let text = std::str::from_utf8(&bytes[10..10 + header]).expect("text");
        assert!(
            text.starts_with("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }") && text.ends_with('\n')
        );
        assert_eq!(bytes[128..132], 1.0_f32.to_le_bytes());
    }

    #[test]
    fn a_page_shows_each_image_before_its_neighbours() {
        let names = ["in/a b.png", "c<d>.png"].map(str::to_owned);
        let nearest = [vec![(1, 0.5)], vec![(0, 0.5)]];
        let files = BTreeMap::from([(0, b"one".to_vec()), (1, b"two".to_vec())]);
        let page = page_of(&names, &shown(2), &nearest, &files);
        assert!(page.contains("alt=\"in/a b.png\" src=\"data:image/jpeg;base64,b25l\""), "{page}");
        assert!(page.contains("alt=\"c&lt;d&gt;.png, cosine 0.500\"") && page.contains("<b>0.500</b>"), "{page}");
        assert!(page.contains("2 of 2 images") && !page.contains("file:"), "{page}");
        assert_eq!((shown(100).len(), shown(100)[23], shown(3)), (24, 95, vec![0, 1, 2]));
        let csv = neighbours_csv(&names, &[vec![(1, 0.5)], vec![]]);
        assert_eq!(csv, "image,rank,neighbour,similarity\nin/a b.png,1,c<d>.png,0.5\n");
    }
}
