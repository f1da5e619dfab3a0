//! Batches: their order, their errors, and that threads change nothing.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::data::datasets::{Sample, Split};
use crate::data::transforms::{HorizontalFlip, RandomResizedCrop};
use crate::data::{
    Batch, DataError, Dataset, Images, Interpolation, Loader, LoaderConfig, OnError, Order, Position, RgbImage, Size,
    Transform, ViewCrop,
};

/// Images of 2 x 2 pixels that hold their number; some are unreadable, one panics.
struct Numbered {
    count: usize,
    bad: Vec<usize>,
    panics: Option<usize>,
    odd: Option<usize>,
    reads: AtomicUsize,
}

impl Numbered {
    fn new(count: usize) -> Self {
        Self { count, bad: Vec::new(), panics: None, odd: None, reads: AtomicUsize::new(0) }
    }
}

impl Images for Numbered {
    fn len(&self) -> usize {
        self.count
    }
    fn image(&self, index: usize) -> Result<RgbImage, DataError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        // Later images of a batch are ready first.
        std::thread::sleep(Duration::from_micros(200 * (3 - index as u64 % 4)));
        assert!(self.panics != Some(index), "boom");
        if self.bad.contains(&index) {
            return Err(DataError::Other(format!("{} is bad", self.name(index))));
        }
        let width = if self.odd == Some(index) { 3 } else { 2 };
        Ok(RgbImage { width, height: 2, pixels: vec![index as u8; width * 6] })
    }
    fn label(&self, index: usize) -> Option<u32> {
        Some(index as u32 % 3)
    }
    fn classes(&self) -> Option<Vec<String>> {
        None
    }
    fn name(&self, index: usize) -> String {
        format!("number {index}")
    }
    fn size(&self) -> Option<(usize, usize)> {
        Some((2, 2))
    }
    fn fingerprint(&self) -> String {
        String::new()
    }
}

const CONFIG: LoaderConfig = LoaderConfig {
    seed: 5,
    batch: 4,
    micro: 4,
    order: Order::Shuffled,
    on_error: OnError::Fail,
    workers: 0,
    prefetch: 2,
};

fn loader(images: Numbered, config: LoaderConfig) -> Loader {
    Loader::new(Arc::new(images), Arc::new([]), config).unwrap()
}

fn augmented(config: LoaderConfig) -> Loader {
    let crop = RandomResizedCrop {
        size: Size::Side(16),
        scale: [0.3, 1.0],
        ratio: [0.75, 1.33],
        interpolation: Interpolation::Bicubic,
    };
    let transforms: Vec<Box<dyn Transform>> = vec![Box::new(crop), Box::new(HorizontalFlip { p: 0.5 })];
    let images = Sample { split: Split::Test, limit: Some(50) }.open().unwrap();
    Loader::new(Arc::from(images), transforms.into(), config).unwrap()
}

fn taken(loader: &Loader, from: Position, steps: u64) -> Vec<Batch> {
    loader.batches(from, Some(steps)).map(Result::unwrap).collect()
}

const START: Position = Position { epoch: 0, step: 0 };

#[test]
fn threads_and_read_ahead_change_nothing() {
    let config = LoaderConfig { batch: 8, micro: 4, ..CONFIG };
    let alone = taken(&augmented(config), START, 15);
    assert_eq!(alone.len(), 30);
    for (workers, prefetch) in [(1, 0), (1, 5), (3, 1), (4, 8)] {
        assert_eq!(taken(&augmented(LoaderConfig { workers, prefetch, ..config }), START, 15), alone);
    }
}

/// Three crops: two of a view, one of another.
fn cropped(keep: &[usize], config: LoaderConfig) -> Loader {
    let crop = |side: usize| -> Arc<[Box<dyn Transform>]> {
        let (size, interpolation) = (Size::Side(side), Interpolation::Bicubic);
        let crop = RandomResizedCrop { size, scale: [0.3, 1.0], ratio: [0.75, 1.33], interpolation };
        Arc::new([Box::new(crop) as Box<dyn Transform>])
    };
    let all = [("large", 0, 16), ("large", 1, 16), ("small", 0, 8)];
    let crops = keep.iter().map(|&place| {
        let (view, copy, side) = all[place];
        ViewCrop::of_view(view, copy, crop(side), (side, side))
    });
    let images = Sample { split: Split::Test, limit: Some(50) }.open().unwrap();
    let shared: Vec<Box<dyn Transform>> = vec![Box::new(HorizontalFlip { p: 0.5 })];
    Loader::of_crops(Arc::from(images), shared.into(), crops.collect(), config).unwrap()
}

#[test]
fn crops_of_an_image_are_their_own_whatever_others_are_cut() {
    let config = LoaderConfig { batch: 8, micro: 4, ..CONFIG };
    let all = taken(&cropped(&[0, 1, 2], config), START, 7);
    assert_eq!((all[0].size, all[0].crops.len(), all[0].crops[1].1), ((16, 16), 2, (8, 8)));
    assert_eq!((all[0].images.len(), all[0].crops[1].0.len()), (4 * 3 * 256, 4 * 3 * 64));
    assert_ne!(all[0].images, all[0].crops[0].0, "each crop of a view has a stream of its own");
    assert_eq!(taken(&cropped(&[0, 1, 2], LoaderConfig { workers: 3, ..config }), START, 7), all);
    for (batch, whole) in taken(&cropped(&[1, 2], config), START, 7).iter().zip(&all) {
        assert_eq!((&batch.images, &batch.crops[..]), (&whole.crops[0].0, &whole.crops[1..]));
    }
}

#[test]
fn an_unreadable_image_leaves_all_its_crops() {
    let images = Numbered { bad: vec![1], ..Numbered::new(6) };
    let config = LoaderConfig { order: Order::Sequential, on_error: OnError::Skip, batch: 3, micro: 3, ..CONFIG };
    let crop = |copy| ViewCrop::of_view("same", copy, Arc::new([]), (2, 2));
    let loader = Loader::of_crops(Arc::new(images), Arc::new([]), vec![crop(0), crop(1)], config).unwrap();
    let batches = taken(&loader, START, 2);
    let shown = |pixels: &[f32]| pixels.chunks(12).map(|image| (image[0] * 255.0).round() as u8).collect::<Vec<_>>();
    assert_eq!((shown(&batches[0].images), shown(&batches[0].crops[0].0)), (vec![0, 2], vec![0, 2]));
    assert_eq!(shown(&batches[1].crops[0].0), [3, 4, 5]);
}

#[test]
fn an_iteration_may_begin_anywhere() {
    let loader = augmented(LoaderConfig { batch: 8, micro: 4, workers: 2, ..CONFIG });
    let whole = taken(&loader, START, 15);
    assert_eq!(loader.steps_per_epoch(), 6);
    for skip in [1usize, 5, 6, 7, 13] {
        let from = Position { epoch: skip as u64 / 6, step: skip as u64 % 6 };
        assert_eq!(whole[2 * skip].at, from);
        assert_eq!(taken(&loader, from, 15 - skip as u64), whole[2 * skip..]);
    }
}

#[test]
fn an_epoch_shows_every_image_at_most_once_and_epochs_differ() {
    let loader = loader(Numbered::new(10), CONFIG);
    assert_eq!(loader.steps_per_epoch(), 2);
    let batches = taken(&loader, START, 4);
    let of_epoch = |epoch: u64| -> Vec<usize> {
        batches.iter().filter(|batch| batch.at.epoch == epoch).flat_map(|batch| batch.indices.clone()).collect()
    };
    for epoch in [0, 1] {
        let mut shown = of_epoch(epoch);
        assert_eq!(shown.len(), 8);
        shown.sort_unstable();
        shown.dedup();
        assert_eq!(shown.len(), 8);
    }
    assert_ne!(of_epoch(0), of_epoch(1));
}

#[test]
fn crops_depend_on_the_image_and_the_epoch_not_on_the_batch() {
    let one = taken(&augmented(LoaderConfig { batch: 10, micro: 10, ..CONFIG }), START, 5);
    let other = taken(&augmented(LoaderConfig { batch: 25, micro: 5, ..CONFIG }), START, 2);
    let image_of = |batches: &[Batch], wanted: usize| -> Vec<f32> {
        let image_len = 3 * 16 * 16;
        let (batch, place) = batches
            .iter()
            .find_map(|batch| Some((batch, batch.indices.iter().position(|&index| index == wanted)?)))
            .unwrap();
        batch.images[place * image_len..][..image_len].to_vec()
    };
    for index in 0..50 {
        assert_eq!(image_of(&one, index), image_of(&other, index));
    }
}

#[test]
fn a_batch_holds_images_labels_and_places() {
    let config = LoaderConfig { order: Order::Sequential, ..CONFIG };
    let batches = taken(&loader(Numbered::new(10), config), START, 99);
    let sizes: Vec<usize> = batches.iter().map(Batch::len).collect();
    assert_eq!(sizes, [4, 4, 2]);
    let last = &batches[2];
    assert_eq!((last.indices.as_slice(), last.size), ([8, 9].as_slice(), (2, 2)));
    assert_eq!(last.labels, [Some(2), Some(0)]);
    let expected: Vec<f32> = [8.0, 9.0].into_iter().flat_map(|value| [value / 255.0; 12]).collect();
    assert_eq!(last.images, expected);
}

#[test]
fn a_failure_names_the_image_and_ends_the_iteration() {
    for workers in [0, 2] {
        let images = Numbered { bad: vec![6, 7], ..Numbered::new(12) };
        let mut batches =
            loader(images, LoaderConfig { workers, order: Order::Sequential, ..CONFIG }).batches(START, None);
        assert!(batches.next().unwrap().is_ok());
        assert_eq!(batches.next().unwrap().unwrap_err().to_string(), "number 6 is bad");
        assert!(batches.next().is_none());
    }
}

#[test]
fn skipping_takes_the_next_readable_image_and_counts() {
    let plain = taken(&loader(Numbered::new(12), CONFIG), START, 6);
    let mut recorded = None;
    for workers in [0, 3] {
        let images = Numbered { bad: vec![2, 3, 11], ..Numbered::new(12) };
        let batches = taken(&loader(images, LoaderConfig { on_error: OnError::Skip, workers, ..CONFIG }), START, 6);
        for (batch, plain) in batches.iter().zip(&plain) {
            let stand_in = |&index: &usize| match index {
                2 | 3 => 4,
                11 => 0,
                readable => readable,
            };
            assert_eq!(batch.indices, plain.indices.iter().map(stand_in).collect::<Vec<_>>());
            let values = batch.images.chunks(12).map(|image| (image[0] * 255.0).round() as usize);
            assert_eq!(values.collect::<Vec<_>>(), batch.indices);
        }
        let unreadable: BTreeSet<usize> = batches.iter().flat_map(|batch| batch.unreadable.clone()).collect();
        assert_eq!(unreadable, [2, 3, 11].into());
        assert_eq!(*recorded.get_or_insert(batches.clone()), batches);
    }
}

#[test]
fn evaluation_leaves_unreadable_images_out() {
    let images = Numbered { bad: vec![1, 4, 5, 6, 7, 9], ..Numbered::new(10) };
    let config = LoaderConfig { order: Order::Sequential, on_error: OnError::Skip, workers: 2, ..CONFIG };
    let batches = taken(&loader(images, config), START, 99);
    let places: Vec<_> = batches.iter().map(|batch| batch.indices.clone()).collect();
    assert_eq!(places, [vec![0, 2, 3], vec![8]]);
    assert_eq!(batches[0].images.len(), 3 * 12);
}

#[test]
fn a_dataset_without_a_readable_image_is_an_error() {
    let images = Numbered { bad: (0..5).collect(), ..Numbered::new(5) };
    let mut batches = loader(images, LoaderConfig { on_error: OnError::Skip, ..CONFIG }).batches(START, None);
    let error = batches.next().unwrap().unwrap_err();
    assert!(matches!(error, DataError::NothingReadable { count: 5, .. }), "{error}");
}

#[test]
fn a_panic_is_an_error_that_names_the_image_even_when_skipping() {
    for workers in [0, 2] {
        let images = Numbered { panics: Some(3), ..Numbered::new(8) };
        let config = LoaderConfig { workers, on_error: OnError::Skip, order: Order::Sequential, ..CONFIG };
        let error = loader(images, config).batches(START, None).next().unwrap().unwrap_err();
        assert!(error.to_string().contains("number 3") && error.to_string().contains("boom"), "{error}");
    }
}

#[test]
fn an_image_of_another_size_is_an_error_that_names_it() {
    let images = Numbered { odd: Some(1), ..Numbered::new(8) };
    let config = LoaderConfig { order: Order::Sequential, ..CONFIG };
    let error = loader(images, config).batches(START, None).next().unwrap().unwrap_err();
    assert!(error.to_string().contains("number 1 is 3 x 2"), "{error}");
}

#[test]
fn threads_end_when_the_iteration_is_dropped() {
    let images = Arc::new(Numbered::new(1000));
    let config = LoaderConfig { workers: 3, prefetch: 4, ..CONFIG };
    let loader = Loader::new(images.clone(), Arc::new([]), config).unwrap();
    let mut batches = loader.batches(START, None);
    batches.next().unwrap().unwrap();
    drop(batches);
    drop(loader);
    // No thread holds the dataset any more, and no more was read than one batch and what may be read ahead of it.
    assert_eq!(Arc::strong_count(&images), 1);
    assert!(images.reads.load(Ordering::Relaxed) <= 4 * (1 + 5));
}

#[test]
fn nothing_is_read_past_the_last_step() {
    let images = Arc::new(Numbered::new(100));
    let config = LoaderConfig { workers: 3, prefetch: 8, ..CONFIG };
    let loader = Loader::new(images.clone(), Arc::new([]), config).unwrap();
    assert_eq!(loader.batches(START, Some(3)).count(), 3);
    assert_eq!(images.reads.load(Ordering::Relaxed), 12);
}

#[test]
fn what_cannot_be_batched_is_refused_beforehand() {
    let refused = |count: usize, config: LoaderConfig| {
        Loader::new(Arc::new(Numbered::new(count)), Arc::new([]), config).err().unwrap().path
    };
    assert_eq!(refused(0, CONFIG), ["dataset"]);
    assert_eq!(refused(3, CONFIG), ["batch"]);
    assert_eq!(refused(9, LoaderConfig { micro: 3, ..CONFIG }), ["batch"]);
    let flip: Vec<Box<dyn Transform>> = vec![Box::new(HorizontalFlip { p: 2.0 })];
    let refusal = Loader::new(Arc::new(Numbered::new(9)), flip.into(), CONFIG).err().unwrap();
    assert_eq!(refusal.path, ["transforms", "0", "p"]);
}
