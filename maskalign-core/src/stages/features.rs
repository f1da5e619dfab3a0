//! One feature an image, of frozen towers: what k-NN and other evaluations read.

use maskalign_engine::{Context, ImageBatch, Tape, Tensor, ops};
use maskalign_registry::{LevelIndex, LevelRef, Levels, Refusal};

use super::{OpenData, StageRun, image_batch, memory::block_rows};
use crate::{
    component,
    components::{
        students::StudentModel,
        teachers::{TeacherModel, Wants},
        tokens::Masks,
        towers::{Tap, TowerShape},
    },
    data::Position,
    error::{Error, Result},
    events::Event,
};

/// How a tower's tokens become one feature.
///
/// ```
/// # use maskalign_core::prelude::*;
/// # let config = VitConfig::plain(Arch { dim: 8, depth: 2, heads: 2, mlp: 32, patch: 4 }, 8);
/// # let student = TowerShape::from(&config);
/// /// A feature of the class token needs one.
/// fn check(pooling: Pooling, tower: &TowerShape) -> Result<(), Refusal> {
///     match pooling {
///         Pooling::Cls if !tower.cls_token => Err(Refusal::new("pooling", "the tower has no class token")),
///         _ => Ok(()),
///     }
/// }
///
/// assert!(check(Pooling::Cls, &TowerShape { cls_token: false, ..student }).is_err());
/// ```
#[component]
#[derive(Copy, Default, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Pooling {
    /// The mean of the patches' tokens after the last block.
    #[default]
    Mean,
    /// The class token after the last block.
    Cls,
}

impl Pooling {
    /// Refuses a class token that the tower called `whose` does not have.
    ///
    /// # Errors
    /// Names `pooling`.
    pub fn check(self, whose: &str, tower: &TowerShape) -> Result<(), Refusal> {
        if self == Pooling::Cls && !tower.cls_token {
            return Err(Refusal::new("pooling", format!("`cls` needs a class token, and {whose} has none"))
                .help("`mean` reads the patches' tokens"));
        }
        Ok(())
    }
}

/// Where a tower's features are taken.
///
/// ```
/// # use maskalign_core::prelude::*;
/// let tap: FeatureTap = serde_json::from_value("norm".into()).expect("what a recipe may say");
/// assert_eq!((tap, FeatureTap::default()), (FeatureTap::Norm, FeatureTap::Block));
/// ```
#[component]
#[derive(Copy, Default, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum FeatureTap {
    /// The residual stream after the last block.
    #[default]
    Block,
    /// After the final norm.
    Norm,
}

/// How features are taken.
///
/// ```
/// # use maskalign_core::prelude::*;
/// let view = View { pooling: Pooling::Mean, tap: FeatureTap::Norm, batch: 64 };
/// assert_eq!(View { batch: 1, ..view }.pooling, Pooling::Mean);
/// ```
#[derive(Clone, Copy)]
pub struct View {
    /// How tokens become one feature.
    pub pooling: Pooling,
    /// Where tokens are taken.
    pub tap: FeatureTap,
    /// Images that go through a tower together.
    pub batch: usize,
}

/// What features are taken from.
///
/// ```
/// # use maskalign_core::{Device, prelude::*};
/// # let cx = Context::new(Device::Cpu, 1);
/// let view = View { pooling: Pooling::Mean, tap: FeatureTap::Block, batch: 2 };
/// let images = ImageBatch { pixels: vec![0.5; 2 * 3 * 8 * 8], batch: 2, size: 8 };
/// assert_eq!(Tower::Pixels.features(&cx, &images, view)?.shape(), (2, 192));
/// # Ok::<(), Error>(())
/// ```
pub enum Tower<'a> {
    /// The images themselves.
    Pixels,
    /// A student.
    Student(&'a dyn StudentModel),
    /// A teacher.
    Teacher(&'a dyn TeacherModel),
}

impl Tower<'_> {
    /// One feature an image, `[batch, width]`. More images than [`View::batch`] go through the tower one part after another:
    /// the room that a pass needs does not grow with the batch.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn features(&self, cx: &Context, images: &ImageBatch, view: View) -> Result<Tensor> {
        if images.batch <= view.batch {
            return Ok(self.levels(cx, images, view, None)?.remove(0));
        }
        let each = images.pixels.len() / images.batch;
        let part = |pixels: &[f32]| {
            let part = ImageBatch { pixels: pixels.to_vec(), batch: pixels.len() / each, size: images.size };
            self.features(cx, &part, view)
        };
        let parts: Vec<Tensor> = images.pixels.chunks(view.batch * each).map(part).collect::<Result<_>>()?;
        let rows: Vec<u32> = (0..images.batch as u32).collect();
        Ok(ops::gather_rows(cx, &mut Tape::inference(), &parts.iter().collect::<Vec<_>>(), &rows)?)
    }

    /// One feature an image of each of these levels, `[batch, width]` each, from one pass of all images; without `levels`,
    /// of the last level that the tower computes. Pixels have no levels, and give one feature in any case.
    ///
    /// # Errors
    /// Out of memory on the device; a level that the tower does not compute.
    pub fn levels(
        &self,
        cx: &Context,
        images: &ImageBatch,
        view: View,
        levels: Option<&[LevelRef]>,
    ) -> Result<Vec<Tensor>> {
        self.states(cx, images, view.tap, levels)?.iter().map(|state| state.pooled(cx, view.pooling)).collect()
    }

    /// The tokens of each of these levels; as [`Tower::levels`].
    pub(super) fn states(
        &self,
        cx: &Context,
        images: &ImageBatch,
        tap: FeatureTap,
        levels: Option<&[LevelRef]>,
    ) -> Result<Vec<State>> {
        let off = &mut Tape::inference();
        let batch = images.batch;
        let missing = |level: &LevelRef| Error::Usage(format!("a tower gave no level {level}"));
        let (states, shape): (Vec<Tensor>, TowerShape) = match self {
            Tower::Pixels => {
                let width = images.pixels.len() / batch;
                return Ok(vec![State { x: cx.tensor(images.pixels.clone(), batch, width)?, batch, tokens: None }]);
            }
            Tower::Student(student) => {
                let keep = |block| levels.is_some_and(|levels| levels.contains(&LevelRef::Block(block)));
                let mut features = student.forward(cx, off, images, None, None, &keep)?;
                let states = match levels {
                    None => vec![features.last],
                    Some(levels) => levels
                        .iter()
                        .map(|level| match level {
                            LevelRef::Embed => Ok(features.embed.clone()),
                            LevelRef::Block(block) => features.hidden.remove(block).ok_or_else(|| missing(level)),
                        })
                        .collect::<Result<_>>()?,
                };
                (states, student.shape())
            }
            Tower::Teacher(teacher) => {
                let shape = teacher.shape();
                let last = [LevelRef::Block(shape.arch.depth - 1)];
                let levels = levels.unwrap_or(&last);
                let blocks = levels.iter().filter_map(|level| match level {
                    LevelRef::Block(block) => Some(*block),
                    LevelRef::Embed => None,
                });
                let wants = Wants { levels: blocks.collect(), whole: true, ..Wants::default() };
                let pass = teacher.begin(cx, images, &wants)?;
                let embed = pass.features.embed.clone();
                let masks = Masks::all_visible(batch, shape.grid.patches());
                let mut found = teacher.finish(cx, pass, &wants, &masks)?;
                let states = levels.iter().map(|level| match level {
                    LevelRef::Embed => Ok(embed.clone()),
                    LevelRef::Block(block) => found.remove(block).map(|found| found.x).ok_or_else(|| missing(level)),
                });
                (states.collect::<Result<_>>()?, shape)
            }
        };
        let state = |x: Tensor| -> Result<State> {
            let off = &mut Tape::inference();
            let x = match (tap, self) {
                (FeatureTap::Norm, Tower::Student(student)) => student.norm(cx, off, &x)?,
                (FeatureTap::Norm, Tower::Teacher(teacher)) => teacher.tap(cx, &x, Tap::Norm)?,
                _ => x,
            };
            Ok(State { x, batch, tokens: Some((shape.tokens(), shape.cls_token)) })
        };
        states.into_iter().map(state).collect()
    }
}

/// What a tower says of some images at a level, before it is pooled.
pub(super) struct State {
    /// `[batch * tokens, width]`; of pixels `[batch, width]`.
    pub x: Tensor,
    /// Images.
    pub batch: usize,
    /// Tokens of an image, and whether a class token leads them; pixels have none.
    pub tokens: Option<(usize, bool)>,
}

impl State {
    /// One feature an image, `[batch, width]`.
    pub(super) fn pooled(&self, cx: &Context, pooling: Pooling) -> Result<Tensor> {
        let off = &mut Tape::inference();
        let Some((tokens, cls_token)) = self.tokens else { return Ok(self.x.clone()) };
        Ok(match pooling {
            Pooling::Mean => ops::mean_tokens(cx, off, &self.x, self.batch, usize::from(cls_token))?,
            Pooling::Cls => {
                let rows: Vec<u32> = (0..self.batch).map(|i| (i * tokens) as u32).collect();
                ops::gather_rows(cx, off, &[&self.x], &rows)?
            }
        })
    }
}

/// The levels that features of the tower called `whose` are taken from, of which `blocks` run; absent where no option
/// asks for any.
///
/// # Errors
/// Names a level in `levels` that the tower has not.
pub(super) fn resolve_levels(
    levels: Option<&Levels>,
    whose: &str,
    tower: &TowerShape,
    blocks: usize,
) -> Result<Option<Vec<LevelRef>>, Refusal> {
    let Some(levels) = levels else { return Ok(None) };
    let untrained = format!("training reaches {blocks} of the {} blocks; the others are left out", tower.arch.depth);
    let found = levels.resolve(blocks).map_err(|mut refusal| {
        refusal.message = format!("{whose}: {}", refusal.message);
        match blocks < tower.arch.depth {
            true => refusal.help(untrained.clone()),
            false => refusal,
        }
    });
    let found = found.map_err(|refusal| refusal.under("levels"))?;
    if found.is_empty() {
        return Err(Refusal::new("levels", format!("{whose} has no block that was trained")).help(untrained));
    }
    Ok(Some(found))
}

/// Refuses the class token before it has seen anything.
///
/// # Errors
/// Names the level in `levels`.
pub(super) fn check_levels(levels: Option<&Levels>, pooling: Pooling) -> Result<(), Refusal> {
    let Some(Levels::List(levels)) = levels.filter(|_| pooling == Pooling::Cls) else { return Ok(()) };
    match levels.iter().position(|level| *level == LevelIndex::Embed) {
        None => Ok(()),
        Some(at) => {
            let message = "before the first block, the class token is the same for every image";
            Err(Refusal::new(at.to_string(), message)
                .under("levels")
                .related(["pooling"], "the class token is asked for here")
                .help("leave `embed` out, or read the patches' tokens with `pooling: mean`"))
        }
    }
}

/// Features with their labels.
///
/// ```
/// # use maskalign_core::prelude::*;
/// let bank = Bank { features: vec![1.0, 0.0, 0.6, 0.8], width: 2, labels: vec![4, 7], skipped: 0 };
/// let second: &[f32] = &bank.features[bank.width..];
/// assert_eq!((second, bank.labels[1]), (&[0.6, 0.8][..], 7));
/// ```
pub struct Bank {
    /// `[images, width]`, row by row.
    pub features: Vec<f32>,
    /// Values of a feature.
    pub width: usize,
    /// The classes.
    pub labels: Vec<u32>,
    /// Images that could not be read.
    pub skipped: usize,
}

impl Bank {
    /// Some of the features, `[rows, width]`.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub(super) fn rows(&self, cx: &Context, rows: &[usize]) -> Result<Tensor> {
        let row = |row: &usize| &self.features[row * self.width..(row + 1) * self.width];
        Ok(cx.tensor(rows.iter().flat_map(row).copied().collect(), rows.len(), self.width)?)
    }
}

/// The features of all images that can be read, of length 1.
///
/// # Errors
/// An image without a label; none that can be read; a feature that is not finite; a stop that the user asked for.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// The features of a student's final norm, for a probe.
/// fn features(run: &mut StageRun, student: &dyn StudentModel, data: &OpenData) -> Result<Bank, Error> {
///     let view = View { pooling: Pooling::Mean, tap: FeatureTap::Norm, batch: 64 };
///     extract(run, &Tower::Student(student), data, view)
/// }
/// ```
pub fn extract(run: &mut StageRun, tower: &Tower, data: &OpenData, view: View) -> Result<Bank> {
    let mut bank = extract_as_they_are(run, tower, data, view)?;
    scale_to_length_1(&mut bank.features, bank.width)?;
    Ok(bank)
}

/// The same of the length that the tower gives them.
///
/// # Errors
/// As [`extract`], but for features that are not finite.
pub(super) fn extract_as_they_are(run: &mut StageRun, tower: &Tower, data: &OpenData, view: View) -> Result<Bank> {
    let (mut features, mut width) = (Vec::new(), 0);
    let cx = run.cx;
    let seen = each_batch(run, tower, data, view, None, &mut |_, state, _| {
        let x = state.pooled(cx, view.pooling)?;
        width = x.columns();
        if features.is_empty() {
            features.reserve_exact(data.images.len() * width);
        }
        features.extend_from_slice(&x.values());
        Ok(())
    })?;
    Ok(Bank { features, width, labels: seen.labels(data)?, skipped: seen.skipped })
}

/// What a pass over images saw, besides features.
pub(super) struct Seen {
    /// The places in the dataset of the images that could be read, in order.
    pub places: Vec<usize>,
    /// Images that could not be read.
    pub skipped: usize,
}

impl Seen {
    /// The classes of the images that could be read.
    ///
    /// # Errors
    /// An image without a label.
    pub(super) fn labels(&self, data: &OpenData) -> Result<Vec<u32>> {
        let label = |&place: &usize| {
            let missing = || Refusal::whole(format!("{} has no label", data.images.name(place)));
            Ok(data.images.label(place).ok_or_else(missing)?)
        };
        self.places.iter().map(label).collect()
    }
}

/// The features of all images that can be read, of length 1, in one pass: a block of [`block_rows`] rows goes to `take` as
/// soon as it is full, with the place of its level in `levels`, so that no more than one block of each level is held here.
///
/// # Errors
/// As [`extract`], and those of `take`.
pub(super) fn extract_blocks(
    run: &mut StageRun,
    tower: &Tower,
    data: &OpenData,
    view: View,
    levels: Option<&[LevelRef]>,
    take: &mut dyn FnMut(usize, Tensor) -> Result<()>,
) -> Result<Seen> {
    let cx = run.cx;
    let mut blocks = Blocks::default();
    let mut block = |level: usize, mut values: Vec<f32>, width: usize| {
        scale_to_length_1(&mut values, width)?;
        let rows = values.len() / width;
        take(level, cx.tensor(values, rows, width)?)
    };
    let seen = each_batch(run, tower, data, view, levels, &mut |level, state, _| {
        blocks.add(level, &state.pooled(cx, view.pooling)?, &mut block)
    })?;
    blocks.finish(&mut block)?;
    Ok(seen)
}

/// Rows that become blocks of [`block_rows`] rows, of each level by itself.
#[derive(Default)]
pub(super) struct Blocks {
    /// The width of each level, and the values of the rows that make no block yet.
    pending: Vec<(usize, Vec<f32>)>,
}

impl Blocks {
    /// Adds rows of a level, and gives the blocks that are full: the level, the values and the width.
    pub(super) fn add(
        &mut self,
        level: usize,
        rows: &Tensor,
        full: &mut dyn FnMut(usize, Vec<f32>, usize) -> Result<()>,
    ) -> Result<()> {
        let width = rows.columns();
        if self.pending.len() <= level {
            self.pending.push((width, Vec::new()));
        }
        let pending = &mut self.pending[level].1;
        pending.extend_from_slice(&rows.values());
        let size = block_rows(width) * width;
        while pending.len() >= size {
            let rest = pending.split_off(size);
            full(level, std::mem::replace(pending, rest), width)?;
        }
        Ok(())
    }

    /// Gives the rows that are left.
    pub(super) fn finish(self, full: &mut dyn FnMut(usize, Vec<f32>, usize) -> Result<()>) -> Result<()> {
        let left = self.pending.into_iter().enumerate().filter(|(_, (_, rows))| !rows.is_empty());
        left.into_iter().try_for_each(|(level, (width, rows))| full(level, rows, width))
    }
}

/// Gives what a tower says of each batch of images to `take`, one level after another by its place, with the places of the
/// images in the dataset.
///
/// # Errors
/// No image that can be read; a stop that the user asked for; those of `take`.
pub(super) fn each_batch(
    run: &mut StageRun,
    tower: &Tower,
    data: &OpenData,
    view: View,
    levels: Option<&[LevelRef]>,
    take: &mut dyn FnMut(usize, State, &[usize]) -> Result<()>,
) -> Result<Seen> {
    each_batch_of(run, tower, data, (view, 0), levels, take)
}

/// As [`each_batch`], of a pass with a number: transforms that draw at random draw anew in each.
pub(super) fn each_batch_of(
    run: &mut StageRun,
    tower: &Tower,
    data: &OpenData,
    (view, pass): (View, u64),
    levels: Option<&[LevelRef]>,
    take: &mut dyn FnMut(usize, State, &[usize]) -> Result<()>,
) -> Result<Seen> {
    let mut places = Vec::new();
    let all = data.images.len();
    let mut batches = data.pass(view.batch, run.workers)?.batches(Position { epoch: pass, step: 0 }, None);
    while let Some(batch) = run.stop.while_waiting(|| batches.next()) {
        let mut batch = batch?;
        places.extend(&batch.indices);
        let states = tower.states(run.cx, &image_batch(&mut batch), view.tap, levels)?;
        states.into_iter().enumerate().try_for_each(|(level, state)| take(level, state, &batch.indices))?;
        run.events.send(Event::Progress { what: "features", done: places.len() as u64, all: all as u64 })?;
        run.check_stop()?;
    }
    if places.is_empty() {
        return Err(Error::Usage(format!("none of the {all} images of `{}` can be read", run.name)));
    }
    let skipped = all - places.len();
    Ok(Seen { places, skipped })
}

/// Subtracts the mean of all rows from each, and divides each by its length. The features of one tower all point much the
/// same way: what tells images apart is how they differ from the mean. A row that is the mean stays 0.
///
/// ```
/// # use maskalign_core::stages::centre_and_scale;
/// let mut rows = vec![100.0, 1.0, 100.0, -1.0];
/// centre_and_scale(&mut rows, 2)?;
/// assert_eq!(rows, [0.0, 1.0, 0.0, -1.0], "their cosine was nearly 1, and is -1");
/// # Ok::<(), maskalign_core::error::Error>(())
/// ```
///
/// # Errors
/// A row that is not finite.
pub fn centre_and_scale(rows: &mut [f32], width: usize) -> Result<()> {
    let count = rows.len() as f64 / width as f64;
    let mut mean = vec![0.0f64; width];
    for row in rows.chunks_exact(width) {
        mean.iter_mut().zip(row).for_each(|(mean, value)| *mean += f64::from(*value) / count);
    }
    for row in rows.chunks_exact_mut(width) {
        row.iter_mut().zip(&mean).for_each(|(value, mean)| *value = (f64::from(*value) - mean) as f32);
    }
    scale_to_length_1(rows, width)
}

/// Divides each row by its length.
///
/// # Errors
/// A row that is not finite.
pub fn scale_to_length_1(rows: &mut [f32], width: usize) -> Result<()> {
    for row in rows.chunks_exact_mut(width) {
        let length = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt().max(1e-12);
        if !length.is_finite() {
            return Err(Error::Usage("a feature is not finite: the weights of its tower are no good".into()));
        }
        for v in row {
            *v = (f64::from(*v) / length) as f32;
        }
    }
    Ok(())
}
