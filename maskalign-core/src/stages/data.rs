//! The data of a stage: a dataset and what is done to its images.

use std::{collections::BTreeSet, sync::Arc};

use indexmap::IndexMap;
use maskalign_engine::ImageBatch;
use maskalign_registry::{DatasetTag, Refusal, Slot, TransformTag};

use super::{StageSummary, keep};
use crate::{
    component,
    components::towers::Environment,
    data::{DataError, Images, Loader, LoaderConfig, OnError, Order, RgbImage, Transform, ViewCrop, output_size},
    error::Error,
    plugin::Build,
};

/// A dataset, and what is done to each of its images. It yields RGB in [0, 1]: towers normalise for themselves.
///
/// ```
/// # use maskalign_core::prelude::*;
/// let recipe = serde_json::json!({ "dataset": { "type": "sample", "split": "test" } });
/// let data: Data = serde_json::from_value(recipe).expect("what a recipe may say");
/// assert_eq!(data.plan(Environment::Checked)?.size, 28);
/// # Ok::<(), Error>(())
/// ```
#[component]
pub struct Data {
    /// Where the images come from.
    pub dataset: Slot<DatasetTag>,
    /// What is done to each image, in order; the last must fix the size, unless `views` do.
    #[serde(default)]
    pub transforms: Vec<Slot<TransformTag>>,
    /// Several crops of each image, by name, for stages that compare them: `pretrain` alone. What is done to each follows
    /// `transforms`. The first view's size is the one that towers are told.
    #[serde(default)]
    pub views: IndexMap<String, ImageView>,
    /// What to do with an image that cannot be read.
    #[serde(default)]
    pub on_error: OnError,
}

/// One or several crops of each image, made alike (SwAV's multi-crop, arXiv 2006.09882, section 3.2; DINO's global and local
/// views).
///
/// ```
/// # use maskalign_core::prelude::*;
/// let recipe = serde_json::json!({ "count": 4, "transforms": [{ "type": "random_resized_crop", "size": 96 }] });
/// let local: ImageView = serde_json::from_value(recipe).expect("what a recipe may say");
/// assert_eq!(local.count, 4);
/// ```
#[component]
pub struct ImageView {
    /// How many crops.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 64))]
    pub count: usize,
    /// What is done to the image for each of them, in order; the last must fix the size.
    #[serde(default)]
    pub transforms: Vec<Slot<TransformTag>>,
}

fn one() -> usize {
    1
}

/// Data that is open, with its transforms built. A clone shares both.
///
/// ```
/// # use maskalign_core::prelude::*;
/// # let recipe = serde_json::json!({ "dataset": { "type": "sample", "split": "test" } });
/// # let data: Data = serde_json::from_value(recipe).expect("what a recipe may say");
/// # let planned = data.plan(Environment::Checked)?;
/// let open: &OpenData = planned.open()?;
/// open.check_labels("a probe")?;
/// let (purpose, images, _) = open.record("probe".to_string());
/// assert_eq!((purpose.as_str(), images), ("probe", open.images.len()));
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone)]
pub struct OpenData {
    /// The images.
    pub images: Arc<dyn Images>,
    transforms: Arc<[Box<dyn Transform>]>,
    /// Of data with views.
    crops: Vec<ViewCrop>,
    on_error: OnError,
    /// Side of the square images in pixels: the first view's, where there are views.
    pub size: usize,
}

/// Data whose size is known, and which is open where files are looked at.
///
/// ```
/// # use maskalign_core::prelude::*;
/// # let recipe = serde_json::json!({ "dataset": { "type": "sample", "split": "test" } });
/// # let data: Data = serde_json::from_value(recipe).expect("what a recipe may say");
/// let planned: PlannedData = data.plan(Environment::Checked)?;
/// if let Some(open) = planned.opened() {
///     assert_eq!(open.size, planned.size);
/// }
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone)]
pub struct PlannedData {
    /// Side of the square images in pixels: the first view's, where there are views.
    pub size: usize,
    /// Of data with views.
    crops: Vec<ViewCrop>,
    open: Option<OpenData>,
}

impl PlannedData {
    /// The crops of each image, where data has views: those of the first view first.
    pub fn crops(&self) -> &[ViewCrop] {
        &self.crops
    }

    /// Leaves out crops, by their places: nobody asks for them. Those that stay are as they were.
    pub(super) fn keep_crops(&mut self, keep: &BTreeSet<usize>) {
        let chosen = |crops: &[ViewCrop]| keep.iter().filter_map(|&place| crops.get(place).cloned()).collect();
        self.crops = chosen(&self.crops);
        if let Some(open) = &mut self.open {
            open.crops = chosen(&open.crops);
        }
    }

    /// The data, where files were looked at.
    pub fn opened(&self) -> Option<&OpenData> {
        self.open.as_ref()
    }

    /// The data that a run reads.
    ///
    /// # Errors
    /// It was planned without a look at files.
    pub fn open(&self) -> Result<&OpenData, Error> {
        self.open.as_ref().ok_or_else(|| Error::Usage("the data was not looked at: plan with the environment".into()))
    }
}

impl Data {
    /// Builds the transforms, finds out the size of the images, and opens the dataset where files are looked at or none are
    /// needed.
    ///
    /// # Errors
    /// Names the option that names something missing, sizes that are not known or not square, or views: one view of each
    /// image is read.
    pub fn plan(&self, environment: Environment) -> Result<PlannedData, Refusal> {
        if !self.views.is_empty() {
            return Err(Refusal::new("views", "one view of each image is read here, and these are several")
                .help("a `pretrain` stage compares views; give this one `transforms` alone"));
        }
        self.plan_views(environment)
    }

    /// As [`Data::plan`], for a stage that reads views.
    ///
    /// # Errors
    /// As there, but for views.
    pub fn plan_views(&self, environment: Environment) -> Result<PlannedData, Refusal> {
        let transforms = built(&self.transforms).map_err(|refusal| refusal.under("transforms"))?;
        if !self.views.is_empty() {
            return self.plan_crops(environment, transforms);
        }
        let known = square(output_size(&transforms, None));
        if let Some(Err(refusal)) = known {
            return Err(refusal);
        }
        let dataset = Build::build(&self.dataset).map_err(|r| r.under("dataset"))?;
        if dataset.needs_files() && environment == Environment::Ignored {
            return match known {
                Some(size) => Ok(PlannedData { size: size?, crops: Vec::new(), open: None }),
                None => Err(Refusal::new("transforms", "the size of the images cannot be known without the data")
                    .help("end with a transform that fixes it, such as `center_crop`")),
            };
        }
        let images = dataset.open().map_err(|r| r.under("dataset"))?;
        let size = square(output_size(&transforms, images.size())).unwrap_or_else(|| {
            Err(Refusal::new("transforms", "the images have different sizes after the transforms").help(
                "end with one that fixes the size: `random_resized_crop`, `center_crop`, or `resize` with [height, width]",
            ))
        })?;
        Ok(self.opened(images, transforms, Vec::new(), size))
    }

    fn opened(
        &self,
        images: Box<dyn Images>,
        transforms: Vec<Box<dyn Transform>>,
        crops: Vec<ViewCrop>,
        size: usize,
    ) -> PlannedData {
        let (images, transforms) = (Arc::from(images), transforms.into());
        let open = OpenData { images, transforms, crops: crops.clone(), on_error: self.on_error, size };
        PlannedData { size, crops, open: Some(open) }
    }

    /// The rest of [`Data::plan_views`] where there are views.
    fn plan_crops(&self, environment: Environment, shared: Vec<Box<dyn Transform>>) -> Result<PlannedData, Refusal> {
        let of = |name: &str, refusal: Refusal| refusal.under(name).under("views");
        let mut views = Vec::new();
        for (name, view) in &self.views {
            let transforms = built(&view.transforms).map_err(|refusal| of(name, refusal.under("transforms")))?;
            views.push((name, view.count, transforms));
        }
        let dataset = Build::build(&self.dataset).map_err(|r| r.under("dataset"))?;
        let is_closed = dataset.needs_files() && environment == Environment::Ignored;
        let images = (!is_closed).then(|| dataset.open().map_err(|r| r.under("dataset"))).transpose()?;
        let input = output_size(&shared, images.as_ref().and_then(|images| images.size()));
        let mut crops = Vec::new();
        for (name, count, transforms) in views {
            let side = square(output_size(&transforms, input)).unwrap_or_else(|| {
                Err(Refusal::new("transforms", "the images have different sizes after the transforms")
                    .help("end with one that fixes the size: `random_resized_crop` or `center_crop`"))
            });
            let side = side.map_err(|refusal| of(name, refusal))?;
            let transforms: Arc<[Box<dyn Transform>]> = transforms.into();
            crops.extend((0..count).map(|copy| ViewCrop::of_view(name, copy, Arc::clone(&transforms), (side, side))));
        }
        let size = crops.first().map_or(0, |crop| crop.size.0);
        Ok(match images {
            Some(images) => self.opened(images, shared, crops, size),
            None => PlannedData { size, crops, open: None },
        })
    }
}

fn built(transforms: &[Slot<TransformTag>]) -> Result<Vec<Box<dyn Transform>>, Refusal> {
    let build = |(i, slot): (usize, &Slot<TransformTag>)| {
        let built = Build::build(slot).and_then(|t| t.check().map(|()| t));
        built.map_err(|r| r.under(i.to_string()))
    };
    transforms.iter().enumerate().map(build).collect()
}

impl PlannedData {
    /// The same images under other transforms.
    ///
    /// # Errors
    /// A transform's, or sizes that are not known or not square.
    pub(super) fn under(&self, transforms: &[Slot<TransformTag>]) -> Result<PlannedData, Refusal> {
        let transforms = built(transforms)?;
        let images = self.open.as_ref().and_then(|open| open.images.size());
        let size = square(output_size(&transforms, images)).unwrap_or_else(|| {
            Err(Refusal::whole("the images have different sizes after these transforms")
                .help("end with one that fixes the size, such as `random_resized_crop`"))
        })?;
        let transforms: Arc<[Box<dyn Transform>]> = transforms.into();
        let open =
            self.open.as_ref().map(|open| OpenData { transforms: Arc::clone(&transforms), size, ..open.clone() });
        Ok(PlannedData { size, crops: Vec::new(), open })
    }
}

/// The side of square images, where their size is known.
fn square(size: Option<(usize, usize)>) -> Option<Result<usize, Refusal>> {
    size.map(|(width, height)| match width == height {
        true => Ok(width),
        false => Err(Refusal::new(
            "transforms",
            format!("the images are {width} x {height} pixels after the transforms; towers take squares"),
        )
        .help("end with a transform such as `center_crop`")),
    })
}

impl OpenData {
    /// Batches for training: `batch` images an optimizer step in micro-batches of `micro`.
    ///
    /// # Errors
    /// The batch does not fit the dataset.
    pub fn training(&self, seed: u64, batch: usize, micro: usize, workers: usize) -> Result<Loader, Refusal> {
        self.loader(seed, batch, micro, workers, Order::Shuffled)
    }

    /// One pass in order.
    ///
    /// # Errors
    /// There are no images.
    pub fn pass(&self, batch: usize, workers: usize) -> Result<Loader, Refusal> {
        self.loader(0, batch, batch, workers, Order::Sequential)
    }

    fn loader(&self, seed: u64, batch: usize, micro: usize, workers: usize, order: Order) -> Result<Loader, Refusal> {
        let config = LoaderConfig { seed, batch, micro, order, on_error: self.on_error, workers, prefetch: 2 };
        let (images, transforms) = (Arc::clone(&self.images), Arc::clone(&self.transforms));
        match self.crops.is_empty() {
            true => Loader::new(images, transforms, config),
            false => Loader::of_crops(images, transforms, self.crops.clone(), config),
        }
    }
}

impl OpenData {
    /// So many images of these, equally spaced: whatever the order, each class has its share.
    #[must_use]
    pub fn spread(&self, count: usize) -> OpenData {
        let all = self.images.len();
        if count >= all { self.clone() } else { self.pick(spread(all, count)) }
    }

    /// The images at some places.
    #[must_use]
    pub fn pick(&self, places: Vec<usize>) -> OpenData {
        OpenData { images: Arc::new(Picked { images: Arc::clone(&self.images), places }), ..self.clone() }
    }

    /// What classes are called, by label: their names where the data has any, else their numbers.
    pub(super) fn class_names(&self) -> impl Fn(usize) -> String + use<> {
        let names = self.images.classes();
        move |label| names.as_ref().and_then(|names| names.get(label).cloned()).unwrap_or_else(|| label.to_string())
    }

    /// Refuses data without labels; `purpose` says what needs them.
    ///
    /// # Errors
    /// Names the first image without one.
    pub fn check_labels(&self, purpose: &str) -> Result<(), Refusal> {
        match (0..self.images.len()).find(|&i| self.images.label(i).is_none()) {
            None => Ok(()),
            Some(0) => Err(Refusal::new("dataset", format!("the images have no labels, which {purpose} needs"))),
            Some(i) => {
                let name = self.images.name(i);
                Err(Refusal::new("dataset", format!("{name} has no label, which {purpose} needs")))
            }
        }
    }

    /// Refuses classes that are named otherwise than those of `other`: labels are numbers, counted in each dataset.
    ///
    /// # Errors
    /// Names the first class that differs.
    pub fn check_classes(&self, other: &OpenData, other_name: &str) -> Result<(), Refusal> {
        let (Some(own), Some(others)) = (self.images.classes(), other.images.classes()) else { return Ok(()) };
        let quoted = |name: Option<&String>| name.map_or("missing".to_string(), |name| format!("`{name}`"));
        match (0..own.len().max(others.len())).find(|&i| own.get(i) != others.get(i)) {
            None => Ok(()),
            Some(i) => Err(Refusal::new(
                "dataset",
                format!("class {i} is {}, but {} in `{other_name}`", quoted(own.get(i)), quoted(others.get(i))),
            )
            .help("both need the same classes: one folder for each, empty or not")),
        }
    }

    /// What the manifest says of the data: what for, how many images, and the fingerprint of the list.
    pub fn record(&self, name: String) -> (String, usize, String) {
        (name, self.images.len(), self.images.fingerprint())
    }
}

/// So many places among `all`, equally spaced; all of them where there are no more.
pub(super) fn spread(all: usize, count: usize) -> Vec<usize> {
    let count = count.min(all);
    (0..count).map(|index| (index as u128 * all as u128 / count as u128) as usize).collect()
}

/// Two sets of labelled images of the same classes, each with the name of its option: those that are searched, and those
/// whose like is sought.
pub(super) struct Sides<'a> {
    /// Those that are searched.
    pub searched: (&'a str, &'a Data),
    /// Those whose like is sought.
    pub seekers: (&'a str, &'a Data),
}

/// The same, whose labels, sizes and classes fit.
pub(super) struct PlannedSides {
    /// Those that are searched.
    pub searched: PlannedData,
    /// Those whose like is sought.
    pub seekers: PlannedData,
}

impl Sides<'_> {
    /// Opens both where that is allowed, and refuses them without labels, or with sizes or classes that differ; `purpose`
    /// says what needs labels. Every refusal is noted; `None` where there is one.
    pub(super) fn plan(
        &self,
        environment: Environment,
        purpose: &str,
        refusals: &mut Vec<Refusal>,
    ) -> Option<PlannedSides> {
        let mut plan = |(option, data): (&str, &Data)| {
            let planned = data.plan(environment).and_then(|planned| {
                planned.opened().map_or(Ok(()), |open| open.check_labels(purpose))?;
                Ok(planned)
            });
            keep(refusals, planned.map_err(|r| r.under(option)))
        };
        let (searched, seekers) = (plan(self.searched), plan(self.seekers));
        let (searched, seekers) = (searched?, seekers?);
        let (other, option) = (self.searched.0, self.seekers.0);
        if searched.size != seekers.size {
            let message = format!("images of {} pixels, those of `{other}` have {}", seekers.size, searched.size);
            refusals.push(Refusal::new(option, message));
            return None;
        }
        if let (Some(searched), Some(seekers)) = (searched.opened(), seekers.opened()) {
            keep(refusals, seekers.check_classes(searched, other).map_err(|r| r.under(option)))?;
        }
        Some(PlannedSides { searched, seekers })
    }

    /// Tells a stage's summary what is read for `purpose`, the stage or a part of it.
    pub(super) fn record(&self, planned: &PlannedSides, purpose: &str, summary: &mut StageSummary) {
        for ((option, _), data) in [(self.searched, &planned.searched), (self.seekers, &planned.seekers)] {
            if let Some(open) = data.opened() {
                summary.memory += open.images.resident_bytes();
                summary.warnings.extend(open.images.notes());
                summary.data.push(open.record(format!("{purpose}.{option}")));
            }
        }
    }
}

impl PlannedSides {
    /// How many images are searched, and how many seek; 0 where they were not looked at.
    pub(super) fn lengths(&self) -> [usize; 2] {
        [&self.searched, &self.seekers].map(|data| data.opened().map_or(0, |open| open.images.len()))
    }
}

/// Some of the images.
struct Picked {
    images: Arc<dyn Images>,
    places: Vec<usize>,
}

impl Images for Picked {
    fn len(&self) -> usize {
        self.places.len()
    }

    fn image(&self, index: usize) -> Result<RgbImage, DataError> {
        self.images.image(self.places[index])
    }

    fn label(&self, index: usize) -> Option<u32> {
        self.images.label(self.places[index])
    }

    fn classes(&self) -> Option<Vec<String>> {
        self.images.classes()
    }

    fn name(&self, index: usize) -> String {
        self.images.name(self.places[index])
    }

    fn size(&self) -> Option<(usize, usize)> {
        self.images.size()
    }

    fn fingerprint(&self) -> String {
        let mut list = blake3::Hasher::new();
        list.update(self.images.fingerprint().as_bytes());
        self.places.iter().for_each(|place| _ = list.update(&(*place as u64).to_le_bytes()));
        list.finalize().to_hex().to_string()
    }
}

/// The images of a loader's batch as towers take them.
///
/// ```
/// # use maskalign_core::{data::DataError, prelude::*};
/// /// The mean of all pixels.
/// fn brightness(data: &OpenData) -> Result<f32, Error> {
///     let (mut sum, mut pixels) = (0.0, 0);
///     for batch in data.pass(64, 0)?.batches(Position::default(), None) {
///         let images = image_batch(&mut batch?);
///         sum += images.pixels.iter().sum::<f32>();
///         pixels += images.pixels.len();
///     }
///     Ok(sum / pixels as f32)
/// }
/// ```
pub fn image_batch(batch: &mut crate::data::Batch) -> ImageBatch {
    ImageBatch { batch: batch.len(), size: batch.size.0, pixels: std::mem::take(&mut batch.images) }
}
