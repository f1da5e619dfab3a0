//! One feature an image, of frozen towers: what k-NN and other evaluations read.

use maskalign_engine::{Context, ImageBatch, Tape, Tensor, ops};
use maskalign_registry::Refusal;

use super::{OpenData, StageRun, image_batch};
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
        let batch = images.batch;
        let off = &mut Tape::inference();
        if batch > view.batch {
            let each = images.pixels.len() / batch;
            let part = |pixels: &[f32]| {
                let part = ImageBatch { pixels: pixels.to_vec(), batch: pixels.len() / each, size: images.size };
                self.features(cx, &part, view)
            };
            let parts: Vec<Tensor> = images.pixels.chunks(view.batch * each).map(part).collect::<Result<_>>()?;
            let rows: Vec<u32> = (0..batch as u32).collect();
            return Ok(ops::gather_rows(cx, off, &parts.iter().collect::<Vec<_>>(), &rows)?);
        }
        let normed = view.tap == FeatureTap::Norm;
        let (x, shape): (Tensor, TowerShape) = match self {
            Tower::Pixels => {
                let width = images.pixels.len() / batch;
                return Ok(cx.tensor(images.pixels.clone(), batch, width)?);
            }
            Tower::Student(student) => {
                let last = student.forward(cx, off, images, None, None, &|_| false)?.last;
                (if normed { student.norm(cx, off, &last)? } else { last }, student.shape())
            }
            Tower::Teacher(teacher) => {
                let last = teacher.shape().arch.depth - 1;
                let wants = Wants { levels: [last].into(), whole: true, ..Wants::default() };
                let pass = teacher.begin(cx, images, &wants)?;
                let masks = Masks::all_visible(batch, teacher.shape().grid.patches());
                let mut levels = teacher.finish(cx, pass, &wants, &masks)?;
                let x = levels.remove(&last).ok_or_else(|| Error::Usage("a teacher gave no last level".into()))?.x;
                (if normed { teacher.tap(cx, &x, Tap::Norm)? } else { x }, teacher.shape())
            }
        };
        match view.pooling {
            Pooling::Mean => Ok(ops::mean_tokens(cx, off, &x, batch, usize::from(shape.cls_token))?),
            Pooling::Cls => {
                let rows: Vec<u32> = (0..batch).map(|i| (i * shape.tokens()) as u32).collect();
                Ok(ops::gather_rows(cx, off, &[&x], &rows)?)
            }
        }
    }
}

/// Features of length 1 with their labels.
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

/// The features of all images that can be read.
///
/// # Errors
/// An image without a label; none that can be read; a stop that the user asked for.
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
    let mut bank = Bank { features: Vec::new(), width: 0, labels: Vec::new(), skipped: 0 };
    let all = data.images.len() as u64;
    let mut batches = data.pass(view.batch, run.workers)?.batches(Position::default(), None);
    while let Some(batch) = run.stop.while_waiting(|| batches.next()) {
        let mut batch = batch?;
        for (label, index) in batch.labels.iter().zip(&batch.indices) {
            let label = label.ok_or_else(|| Refusal::whole(format!("{} has no label", data.images.name(*index))))?;
            bank.labels.push(label);
        }
        let x = tower.features(run.cx, &image_batch(&mut batch), view)?;
        bank.width = x.columns();
        bank.features.extend(x.to_vec());
        run.events.send(Event::Progress { what: "features", done: bank.labels.len() as u64, all })?;
        run.check_stop()?;
    }
    bank.skipped = data.images.len() - bank.labels.len();
    if bank.labels.is_empty() {
        return Err(Error::Usage(format!("none of the {all} images of `{}` can be read", run.name)));
    }
    for row in bank.features.chunks_exact_mut(bank.width) {
        let length = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt().max(1e-12);
        for v in row {
            *v = (f64::from(*v) / length) as f32;
        }
    }
    Ok(bank)
}
