//! Batches: read ahead by threads that never change what they hold.

use std::collections::{HashSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{DataError, Images, RgbImage, Transform, output_size};
use crate::random::Stream;
use maskalign_registry::Refusal;

/// What to do with an image that cannot be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub enum OnError {
    /// Stop, naming the image.
    #[default]
    Fail,
    /// In training, take the next readable image of the dataset in its place; in evaluation, leave it out. Either way
    /// it is counted.
    Skip,
}

/// The order of the images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Each epoch in an order of its own, drawn from (seed, "shuffle", epoch); images that do not fill a batch are left
    /// for another epoch; epoch follows epoch without end.
    Shuffled,
    /// One pass in the dataset's order, the last batch as large as what is left.
    Sequential,
}

/// How batches are made. `workers` and `prefetch` change how fast, never what.
#[derive(Clone, Copy, Debug)]
pub struct LoaderConfig {
    /// The run's seed.
    pub seed: u64,
    /// Images in one optimizer step.
    pub batch: usize,
    /// Images in one [`Batch`]; divides `batch`, whose parts then follow one another.
    pub micro: usize,
    /// The order of the images.
    pub order: Order,
    /// What to do with an image that cannot be read.
    pub on_error: OnError,
    /// Threads beside the calling one, which helps while it waits; with 0 it does all, and nothing is read ahead.
    pub workers: usize,
    /// Batches read ahead.
    pub prefetch: usize,
}

/// A place in training: the step counts from 0 within its epoch.
///
/// ```
/// # use maskalign_core::prelude::*;
/// assert_eq!(Position::default(), Position { epoch: 0, step: 0 });
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Whole epochs before.
    pub epoch: u64,
    /// Optimizer steps before, in this epoch.
    pub step: u64,
}

/// One crop of every image.
///
/// ```
/// # use maskalign_core::data::ViewCrop;
/// let halves = ViewCrop::of_view("half", 1, Vec::new().into(), (16, 16));
/// assert_eq!((halves.view.as_str(), halves.copy, halves.size), ("half", 1, (16, 16)));
/// ```
#[derive(Clone)]
pub struct ViewCrop {
    /// The view that it is one of; empty where an image has one view alone.
    pub view: String,
    /// Which of that view's.
    pub copy: usize,
    /// `(width, height)` in pixels.
    pub size: (usize, usize),
    /// What is done to the image after the transforms that all crops share.
    transforms: Arc<[Box<dyn Transform>]>,
}

impl ViewCrop {
    /// A crop of a view, whose transforms make images of the given size of what the shared ones leave. It has random streams
    /// of its own.
    pub fn of_view(view: &str, copy: usize, transforms: Arc<[Box<dyn Transform>]>, size: (usize, usize)) -> Self {
        ViewCrop { view: view.to_owned(), copy, size, transforms }
    }

    /// What the shared transforms leave, of the given size.
    fn whole(size: (usize, usize)) -> Self {
        ViewCrop::of_view("", 0, Arc::default(), size)
    }

    fn stream(&self, seed: u64, purpose: &str, epoch: u64, index: usize) -> Stream {
        Stream::new(seed, format!("{purpose}, {} {}", self.view, self.copy).as_str(), epoch, index as u64)
    }
}

/// Images that enter the towers together.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// `[B, 3, height, width]` red, green and blue in [0, 1]: of data with several crops, the first.
    pub images: Vec<f32>,
    /// The further crops, in order, each `[B, 3, height, width]` with its `(width, height)`.
    pub crops: Vec<(Vec<f32>, (usize, usize))>,
    /// `[B]` classes, where the dataset has them.
    pub labels: Vec<Option<u32>>,
    /// `[B]` places in the dataset.
    pub indices: Vec<usize>,
    /// `(width, height)` in pixels.
    pub size: (usize, usize),
    /// The optimizer step that it belongs to.
    pub at: Position,
    /// Which part of that step: 0, 1, ..., `batch / micro - 1`.
    pub part: usize,
    /// Places in the dataset of the unreadable images met for this batch.
    pub unreadable: Vec<usize>,
}

impl Batch {
    /// Number of images.
    pub fn len(&self) -> usize {
        self.indices.len()
    }

    /// Whether it holds no image; no batch of a loader does.
    pub fn is_empty(&self) -> bool {
        self.indices.is_empty()
    }
}

/// A dataset, what is done to its images, and how they are batched.
#[derive(Clone)]
pub struct Loader {
    source: Arc<Source>,
}

impl Loader {
    /// One crop of each image: what the transforms leave.
    ///
    /// # Errors
    /// Refuses (`transforms`, `dataset`, `batch`) images whose size is not fixed, a batch larger than the dataset, and
    /// micro-batches that do not divide the batch.
    pub fn new(
        images: Arc<dyn Images>,
        transforms: Arc<[Box<dyn Transform>]>,
        config: LoaderConfig,
    ) -> Result<Self, Refusal> {
        for (index, transform) in transforms.iter().enumerate() {
            transform.check().map_err(|refusal| refusal.under(index.to_string()).under("transforms"))?;
        }
        let size = output_size(&transforms, images.size()).ok_or_else(|| {
            Refusal::new("transforms", "the images have different sizes after the transforms")
                .help("end with one that fixes the size: `random_resized_crop`, `center_crop`, or `resize` with `[height, width]`")
        })?;
        Self::of_crops(images, transforms, vec![ViewCrop::whole(size)], config)
    }

    /// Several crops of each image, at least one, each after the transforms that they share.
    ///
    /// # Errors
    /// As for [`Loader::new`], but for sizes.
    pub fn of_crops(
        images: Arc<dyn Images>,
        transforms: Arc<[Box<dyn Transform>]>,
        crops: Vec<ViewCrop>,
        config: LoaderConfig,
    ) -> Result<Self, Refusal> {
        let (count, LoaderConfig { batch, micro, .. }) = (images.len(), config);
        if count == 0 {
            return Err(Refusal::new("dataset", "there are no images"));
        }
        if batch == 0 || micro == 0 || batch % micro != 0 {
            return Err(Refusal::new(
                "batch",
                format!("micro-batches of {micro} images do not make up a batch of {batch}"),
            )
            .help("choose a `micro` that divides `effective`"));
        }
        if config.order == Order::Shuffled && count < batch {
            return Err(Refusal::new(
                "batch",
                format!("a batch of {batch} images is larger than the dataset of {count}"),
            )
            .help(format!("choose an `effective` of at most {count}")));
        }
        Ok(Self { source: Arc::new(Source { images, transforms, config, crops, unreadable: Mutex::default() }) })
    }

    /// `(width, height)` in pixels of every image's first crop.
    pub fn size(&self) -> (usize, usize) {
        self.source.crops[0].size
    }

    /// The dataset.
    pub fn images(&self) -> &Arc<dyn Images> {
        &self.source.images
    }

    /// Optimizer steps in one epoch: floor(images / batch) in training; in evaluation the last, smaller one counts too.
    pub fn steps_per_epoch(&self) -> u64 {
        self.source.steps_per_epoch()
    }

    /// The batches from a position on: `steps` optimizer steps of them, or else without end (shuffled) or up to the end
    /// of the dataset (sequential). What they hold does not depend on where the iteration began.
    pub fn batches(&self, from: Position, steps: Option<u64>) -> Batches {
        let source = self.source.clone();
        let per_epoch = source.steps_per_epoch();
        let limit = match source.config.order {
            Order::Shuffled => u64::MAX,
            Order::Sequential => per_epoch.saturating_sub(from.step),
        };
        let parts = (source.config.batch / source.config.micro) as u64;
        let plan = Plan { from, parts, end: limit.min(steps.unwrap_or(u64::MAX)).saturating_mul(parts), per_epoch };
        let workers = source.config.workers;
        let shared = Arc::new(Shared {
            capacity: if workers == 0 { 1 } else { source.config.prefetch + 1 },
            source,
            plan,
            queue: Mutex::default(),
            work: Condvar::new(),
            done: Condvar::new(),
        });
        let threads = (0..workers).filter_map(|index| spawn(index, &shared)).collect();
        Batches { shared, threads, ended: false }
    }
}

fn spawn(index: usize, shared: &Arc<Shared>) -> Option<JoinHandle<()>> {
    let shared = shared.clone();
    let spawned = thread::Builder::new().name(format!("loader-{index}")).spawn(move || shared.serve());
    // The calling thread does what no other does, so that fewer threads are slower, not wrong.
    spawned.inspect_err(|error| tracing::warn!(%error, "cannot start a loader thread")).ok()
}

/// The batches of a [`Loader`], in order. After an error it ends. Dropping it ends its threads.
pub struct Batches {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    ended: bool,
}

impl Iterator for Batches {
    type Item = Result<Batch, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.ended {
            match self.shared.take_next().map(|open| self.finish(open)) {
                // Every image of it was left out.
                Some(Ok(batch)) if batch.is_empty() => {}
                Some(Ok(batch)) => return Some(Ok(batch)),
                Some(Err(error)) => {
                    self.ended = true;
                    self.shared.stop();
                    return Some(Err(error));
                }
                None => self.ended = true,
            }
        }
        None
    }
}

impl Batches {
    fn finish(&mut self, open: Arc<OpenBatch>) -> Result<Batch, DataError> {
        let source = &self.shared.source;
        let Filled { mut crops, outcomes } = std::mem::take(&mut *lock(&open.filled));
        let mut batch = Batch {
            images: Vec::new(),
            crops: Vec::new(),
            labels: Vec::with_capacity(outcomes.len()),
            indices: Vec::with_capacity(outcomes.len()),
            size: source.crops[0].size,
            at: open.at,
            part: open.part,
            unreadable: Vec::new(),
        };
        for (place, outcome) in outcomes.into_iter().enumerate() {
            let Outcome { unreadable, chosen } = outcome;
            batch.unreadable.extend(unreadable);
            if let Some(index) = chosen? {
                let kept = batch.indices.len();
                if kept < place {
                    for (crop, pixels) in source.crops.iter().zip(&mut crops) {
                        let len = image_len(crop.size);
                        pixels.copy_within(place * len..(place + 1) * len, kept * len);
                    }
                }
                batch.indices.push(index);
                batch.labels.push(source.images.label(index));
            }
        }
        let kept = batch.indices.len();
        let mut all = source.crops.iter().zip(crops).map(|(crop, mut pixels)| {
            pixels.truncate(kept * image_len(crop.size));
            (pixels, crop.size)
        });
        batch.images = all.next().expect("there is a crop").0;
        batch.crops = all.collect();
        Ok(batch)
    }
}

impl Drop for Batches {
    fn drop(&mut self) {
        self.shared.stop();
        for thread in self.threads.drain(..) {
            // A worker catches the panics of the components it calls; one of its own has nothing left to tell.
            let _ = thread.join();
        }
    }
}

/// What images are and how they are made; the same for every iteration.
struct Source {
    images: Arc<dyn Images>,
    transforms: Arc<[Box<dyn Transform>]>,
    config: LoaderConfig,
    /// At least one.
    crops: Vec<ViewCrop>,
    /// Images known to be unreadable: saves trying again, and changes no result.
    unreadable: Mutex<HashSet<usize>>,
}

/// What became of one place in a batch.
struct Outcome {
    /// Unreadable images met on the way.
    unreadable: Vec<usize>,
    /// The image that was put there, `None` where it was left out.
    chosen: Result<Option<usize>, DataError>,
}

impl Source {
    fn steps_per_epoch(&self) -> u64 {
        let (count, batch) = (self.images.len(), self.config.batch);
        match self.config.order {
            Order::Shuffled => (count / batch) as u64,
            Order::Sequential => count.div_ceil(batch) as u64,
        }
    }

    /// Makes the image for one place of a batch, or the one that stands in for it: its crops.
    fn make(&self, index: usize, epoch: u64) -> (Outcome, Option<Vec<RgbImage>>) {
        const MOST_IN_A_ROW: usize = 1000;
        let failed = |unreadable, error| (Outcome { unreadable, chosen: Err(error) }, None);
        let count = self.images.len();
        let tries = match (self.config.on_error, self.config.order) {
            (OnError::Fail, _) | (OnError::Skip, Order::Sequential) => 1,
            (OnError::Skip, Order::Shuffled) => count.min(MOST_IN_A_ROW),
        };
        let mut unreadable = Vec::new();
        for offset in 0..tries {
            let candidate = (index + offset) % count;
            let is_last = offset + 1 == tries;
            if lock(&self.unreadable).contains(&candidate) && !is_last {
                unreadable.push(candidate);
                continue;
            }
            let error = match self.make_one(candidate, epoch) {
                Ok(crops) => {
                    return (Outcome { unreadable, chosen: Ok(Some(candidate)) }, Some(crops));
                }
                Err(error) => error,
            };
            if self.config.on_error == OnError::Fail || matches!(error, DataError::Panicked { .. }) {
                return failed(unreadable, error);
            }
            unreadable.push(candidate);
            if lock(&self.unreadable).insert(candidate) {
                tracing::warn!("skipped: {error}");
            }
            if is_last && self.config.order == Order::Shuffled {
                let source = Box::new(error);
                let name = self.images.name(candidate);
                return failed(unreadable, DataError::NothingReadable { count: tries, name, source });
            }
        }
        (Outcome { unreadable, chosen: Ok(None) }, None)
    }

    /// The planes of a crop.
    fn planes(&self, image: &RgbImage, crop: &ViewCrop, index: usize, epoch: u64) -> Vec<f32> {
        const PURPOSE: &str = "augment planes";
        let mut planes = vec![0.0; image_len(crop.size)];
        image.write_planes(&mut planes);
        let mut rng = match crop.view.is_empty() {
            true => Stream::new(self.config.seed, PURPOSE, epoch, index as u64),
            false => crop.stream(self.config.seed, PURPOSE, epoch, index),
        };
        for transform in self.transforms.iter().chain(&*crop.transforms) {
            transform.apply_planes(&mut planes, crop.size, &mut rng);
        }
        planes
    }

    fn make_one(&self, index: usize, epoch: u64) -> Result<Vec<RgbImage>, DataError> {
        const PURPOSE: &str = "augment";
        let fold = |image, transforms: &[Box<dyn Transform>], mut rng: Stream| {
            transforms.iter().fold(image, |image, transform| transform.apply(image, &mut rng))
        };
        let made = catch_unwind(AssertUnwindSafe(|| {
            let rng = Stream::new(self.config.seed, PURPOSE, epoch, index as u64);
            let image = fold(self.images.image(index)?, &self.transforms, rng);
            let (last, before) = self.crops.split_last().expect("there is a crop");
            let cut = |image, crop: &ViewCrop| match crop.transforms.is_empty() {
                true => image,
                false => fold(image, &crop.transforms, crop.stream(self.config.seed, PURPOSE, epoch, index)),
            };
            let mut crops: Vec<RgbImage> = before.iter().map(|crop| cut(image.clone(), crop)).collect();
            crops.push(cut(image, last));
            Ok(crops)
        }));
        let crops = made.unwrap_or_else(|panic| {
            let message = panic.downcast_ref::<&str>().map(|text| text.to_string());
            let message = message.or_else(|| panic.downcast_ref::<String>().cloned());
            Err(DataError::Panicked {
                name: self.images.name(index),
                message: message.unwrap_or_else(|| "no message".into()),
            })
        })?;
        if let Some((image, crop)) = crops.iter().zip(&self.crops).find(|(image, crop)| image.size() != crop.size) {
            let name = self.images.name(index);
            return Err(DataError::SizeDiffers { name, got: image.size(), expected: crop.size });
        }
        Ok(crops)
    }
}

/// Which images make up which batch, for one iteration. Batches are numbered from 0 at its start.
struct Plan {
    from: Position,
    /// Micro-batches in a step.
    parts: u64,
    /// Number of batches.
    end: u64,
    per_epoch: u64,
}

impl Plan {
    fn position(&self, number: u64) -> (Position, usize) {
        let step = self.from.step + number / self.parts;
        let at = match step.checked_div(self.per_epoch) {
            Some(epochs) => Position { epoch: self.from.epoch + epochs, step: step % self.per_epoch },
            None => self.from,
        };
        (at, (number % self.parts) as usize)
    }
}

/// What the threads of one iteration share.
struct Shared {
    source: Arc<Source>,
    plan: Plan,
    /// Batches that may be open at once.
    capacity: usize,
    queue: Mutex<Queue>,
    /// There is room for another batch, or the iteration stops.
    work: Condvar,
    /// A batch is full.
    done: Condvar,
}

#[derive(Default)]
struct Queue {
    /// In order; the first is the next to be delivered.
    open: VecDeque<InProgress>,
    /// Number of the next batch to open.
    next: u64,
    /// The order of the epoch that was opened last.
    order: Option<(u64, Arc<Vec<usize>>)>,
    stopped: bool,
}

struct InProgress {
    batch: Arc<OpenBatch>,
    number: u64,
    /// Places that some thread has taken on.
    claimed: usize,
    /// Places that are not yet filled.
    missing: usize,
}

struct OpenBatch {
    at: Position,
    part: usize,
    /// The image planned for each place.
    planned: Vec<usize>,
    filled: Mutex<Filled>,
}

#[derive(Default)]
struct Filled {
    /// Of each crop, `[B, 3, height, width]`.
    crops: Vec<Vec<f32>>,
    outcomes: Vec<Outcome>,
}

/// One place of one batch for a thread to fill.
struct Task {
    batch: Arc<OpenBatch>,
    number: u64,
    place: usize,
}

impl Shared {
    /// A worker's life.
    fn serve(&self) {
        let mut queue = lock(&self.queue);
        while !queue.stopped {
            match self.claim(&mut queue) {
                Some(task) => {
                    drop(queue);
                    self.fill(task);
                    queue = lock(&self.queue);
                }
                None if queue.next >= self.plan.end => return,
                None => queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Waits for the next batch, filling it and the following ones meanwhile; `None` at the end.
    fn take_next(&self) -> Option<Arc<OpenBatch>> {
        let mut queue = lock(&self.queue);
        loop {
            if queue.open.front().is_some_and(|front| front.missing == 0) {
                let front = queue.open.pop_front()?;
                drop(queue);
                self.work.notify_all();
                return Some(front.batch);
            }
            if queue.open.is_empty() && queue.next >= self.plan.end {
                return None;
            }
            match self.claim(&mut queue) {
                Some(task) => {
                    drop(queue);
                    self.fill(task);
                    queue = lock(&self.queue);
                }
                None => queue = self.done.wait(queue).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    fn stop(&self) {
        lock(&self.queue).stopped = true;
        self.work.notify_all();
    }

    /// The first place that nobody has taken on, opening another batch where there is room.
    fn claim(&self, queue: &mut Queue) -> Option<Task> {
        let index = match queue.open.iter().position(|open| open.claimed < open.batch.planned.len()) {
            Some(index) => index,
            None if queue.open.len() < self.capacity && queue.next < self.plan.end => {
                self.open(queue);
                queue.open.len() - 1
            }
            None => return None,
        };
        let open = &mut queue.open[index];
        open.claimed += 1;
        Some(Task { batch: open.batch.clone(), number: open.number, place: open.claimed - 1 })
    }

    fn open(&self, queue: &mut Queue) {
        let LoaderConfig { seed, batch, micro, order, .. } = self.source.config;
        let number = queue.next;
        let (at, part) = self.plan.position(number);
        let count = self.source.images.len();
        let start = at.step as usize * batch + part * micro;
        let range = start.min(count)..(start + micro).min(count);
        let planned: Vec<usize> = match order {
            Order::Sequential => range.collect(),
            Order::Shuffled => {
                let order = match &queue.order {
                    Some((epoch, order)) if *epoch == at.epoch => order.clone(),
                    _ => Arc::new(Stream::new(seed, "shuffle", at.epoch, 0).permutation(count)),
                };
                let planned = order[range].to_vec();
                queue.order = Some((at.epoch, order));
                planned
            }
        };
        let filled = Filled {
            crops: self.source.crops.iter().map(|crop| vec![0.0; planned.len() * image_len(crop.size)]).collect(),
            outcomes: planned.iter().map(|_| Outcome { unreadable: Vec::new(), chosen: Ok(None) }).collect(),
        };
        let missing = planned.len();
        let batch = Arc::new(OpenBatch { at, part, planned, filled: Mutex::new(filled) });
        queue.open.push_back(InProgress { batch, number, claimed: 0, missing });
        queue.next += 1;
    }

    fn fill(&self, Task { batch, number, place }: Task) {
        let (outcome, made) = self.source.make(batch.planned[place], batch.at.epoch);
        let mut crops = Vec::new();
        if let (Some(images), Ok(Some(index))) = (made, &outcome.chosen) {
            let pairs = images.iter().zip(&self.source.crops);
            crops.extend(pairs.map(|(image, crop)| self.source.planes(image, crop, *index, batch.at.epoch)));
        }
        {
            let mut filled = lock(&batch.filled);
            for (planes, into) in crops.iter().zip(&mut filled.crops) {
                into[place * planes.len()..][..planes.len()].copy_from_slice(planes);
            }
            filled.outcomes[place] = outcome;
        }
        let mut queue = lock(&self.queue);
        if let Some(open) = queue.open.iter_mut().find(|open| open.number == number) {
            open.missing -= 1;
            if open.missing == 0 {
                drop(queue);
                self.done.notify_all();
            }
        }
    }
}

/// Values of an image.
fn image_len((width, height): (usize, usize)) -> usize {
    3 * width * height
}

/// A lock that a panic elsewhere does not take away: what it guards is whole between any two statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
