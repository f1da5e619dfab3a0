//! Components that work on host data: maskers, datasets, transforms and schedules.

use maskalign_engine::random::Stream;
use maskalign_registry::{DatasetTag, Kind, MaskerTag, ScheduleTag, Slot, TransformTag};

use super::{Faults, built};
use maskalign_core::{
    components::maskers::{Mask, MaskInput, PlannedMasker},
    data::{Images, RgbImage},
    nn::Grid,
    plugin::Build,
};

const GRIDS: [(usize, usize); 6] = [(1, 1), (2, 2), (3, 5), (7, 7), (1, 13), (14, 14)];

pub(super) fn masker(text: &str, faults: &mut Faults) {
    let Some(masker) = built::<MaskerTag>(text, faults) else { return };
    let mut planned = 0;
    for (rows, columns) in GRIDS {
        let grid = Grid { rows, columns };
        // A grid may be refused: that is known before the first step.
        let Ok(drawn) = masker.plan(grid) else { continue };
        let counts = drawn.counts();
        planned += 1;
        faults.unless(counts.visible > 0, format_args!("keeps nothing of a grid of {grid}"));
        // What is in several blocks counts as often.
        let masked = counts.masked / drawn.blocks().max(1);
        faults.unless(
            counts.visible + masked <= grid.patches(),
            format_args!("plans {} + {} of {} patches", counts.visible, counts.masked, grid.patches()),
        );
        faults.unless(
            masker.plan(grid).is_ok_and(|again| again.counts() == counts),
            format_args!("plans a grid of {grid} differently the second time"),
        );
        for image in 0..5 {
            draws(&*drawn, masker.teacher().is_some(), grid, image, faults);
        }
    }
    faults.unless(planned > 0, "its example refuses every grid from 1x1 to 14x14");
}

fn draws(masker: &dyn PlannedMasker, by_attention: bool, grid: Grid, image: u64, faults: &mut Faults) {
    let counts = masker.counts();
    let mut stream = Stream::new(1, "conformance attention", 0, image);
    let attention: Vec<f32> = (0..grid.patches()).map(|_| 0.01 + stream.uniform() as f32).collect();
    let attention = if by_attention { &attention[..] } else { &[] };
    let input = MaskInput { epoch: 0, image: image as usize, crop: 0, attention };
    let draw = |seed| masker.draw(&input, &mut Stream::new(seed, "mask", 0, image));
    let mask = draw(0);
    faults.unless(mask == draw(0), format_args!("draws differently from equal streams on a grid of {grid}"));
    let blocks = masker.blocks();
    faults.unless(
        blocks > 0 && mask.masked.len().is_multiple_of(blocks),
        format_args!("draws {} masked patches, which are no {blocks} blocks of equal size", mask.masked.len()),
    );
    let stream = |image| Stream::new(0, "mask", 0, image);
    let batch = || {
        let mut rngs: Vec<Stream> = (0..3).map(stream).collect();
        masker.draw_batch(&[input; 3], &mut rngs, &mut stream(image))
    };
    let drawn = batch();
    faults
        .unless(drawn == batch(), format_args!("draws a micro-batch of a grid of {grid} differently the second time"));
    let fits = |one: &Mask| match masker.uneven() {
        true => one.visible.len() + one.masked.len() == grid.patches(),
        false => (one.visible.len(), one.masked.len()) == (drawn[0].visible.len(), drawn[0].masked.len()),
    };
    faults.unless(
        drawn.len() == 3 && drawn.iter().all(fits),
        format_args!("draws masks of different counts for a micro-batch of a grid of {grid}"),
    );
    faults.unless(
        masker.varies() || (mask.visible.len(), mask.masked.len()) == (counts.visible, counts.masked),
        format_args!(
            "draws {} visible and {} masked patches of a grid of {grid}, but planned {} and {}",
            mask.visible.len(),
            mask.masked.len(),
            counts.visible,
            counts.masked
        ),
    );
    for block in mask.masked.chunks((mask.masked.len() / blocks.max(1)).max(1)) {
        let mut all: Vec<u32> = mask.visible.iter().chain(block).copied().collect();
        all.sort_unstable();
        faults.unless(
            all.windows(2).all(|pair| pair[0] != pair[1]),
            format_args!("draws a patch of a grid of {grid} twice"),
        );
        faults.unless(
            all.iter().all(|&patch| (patch as usize) < grid.patches()),
            format_args!("draws a patch beyond a grid of {grid}"),
        );
    }
}

pub(super) fn dataset(text: &str, faults: &mut Faults) {
    let Some(dataset) = built::<DatasetTag>(text, faults) else { return };
    if dataset.needs_files() {
        return;
    }
    let Some(images) = faults.expect("opening it", dataset.open()) else { return };
    opened(&*images, faults);
    if let Some(again) = faults.expect("opening it again", dataset.open()) {
        faults.unless(
            again.fingerprint() == images.fingerprint(),
            "its fingerprint differs from one opening to the next",
        );
        faults.unless(again.len() == images.len(), "its length differs from one opening to the next");
    }
}

/// A dataset that reads files, configured so that the files are there.
pub(super) fn check_files(kind: Kind, value: &serde_json::Value, faults: &mut Faults) {
    if kind != Kind::Dataset {
        return;
    }
    let Ok(slot) = serde_json::from_value::<Slot<DatasetTag>>(value.clone()) else { return };
    let Ok(dataset) = slot.build() else { return };
    if dataset.needs_files()
        && let Some(images) = faults.expect("opening it", dataset.open())
    {
        opened(&*images, faults);
    }
}

fn opened(images: &dyn Images, faults: &mut Faults) {
    faults.unless(!images.is_empty(), "it has no images");
    faults.unless(!images.fingerprint().is_empty(), "its fingerprint is empty");
    let len = images.len();
    let mut indices = vec![0, len / 2, len.saturating_sub(1)];
    indices.dedup();
    let classes = images.classes().map(|classes| classes.len());
    for index in indices.into_iter().filter(|&index| index < len) {
        let name = images.name(index);
        faults.unless(!name.is_empty(), format_args!("image {index} has no name for messages"));
        let Some(image) = faults.expect(&format!("reading image {index}"), images.image(index)) else { continue };
        sound(&image, &format!("image {index}"), faults);
        faults.unless(
            images.image(index).is_ok_and(|again| again == image),
            format_args!("image {index} differs when it is read again"),
        );
        faults.unless(
            images.size().is_none_or(|size| size == image.size()),
            format_args!("image {index} is {:?} pixels, but `size` says {:?}", image.size(), images.size()),
        );
        if let (Some(label), Some(classes)) = (images.label(index), classes) {
            faults.unless(
                (label as usize) < classes,
                format_args!("image {index} has label {label} of {classes} classes"),
            );
        }
    }
}

fn sound(image: &RgbImage, what: &str, faults: &mut Faults) {
    faults.unless(image.width > 0 && image.height > 0, format_args!("{what} has no pixels"));
    faults.unless(
        image.pixels.len() == image.width * image.height * 3,
        format_args!("{what} of {} x {} pixels has {} values", image.width, image.height, image.pixels.len()),
    );
}

pub(super) fn transform(text: &str, faults: &mut Faults) {
    let Some(transform) = built::<TransformTag>(text, faults) else { return };
    faults.expect("checking its options", transform.check());
    for (width, height) in [(1, 1), (31, 7), (7, 31), (28, 28), (3, 257)] {
        let pixels = (0..width * height * 3).map(|i| (i * 37 % 256) as u8).collect();
        let image = RgbImage { width, height, pixels };
        let what = format!("what it makes of {width} x {height} pixels");
        for epoch in 0..3 {
            let apply = || transform.apply(image.clone(), &mut Stream::new(0, "augment", epoch, 0));
            let changed = apply();
            sound(&changed, &what, faults);
            faults.unless(changed == apply(), format_args!("{what} differs for equal streams"));
            let planes = || {
                let mut planes = vec![0.5; 3 * changed.width * changed.height];
                transform.apply_planes(&mut planes, changed.size(), &mut Stream::new(0, "augment planes", epoch, 0));
                planes
            };
            let (first, again) = (planes(), planes());
            faults.unless(first == again, format_args!("{what}, as planes, differs for equal streams"));
            faults.unless(first.iter().all(|v| v.is_finite()), format_args!("{what}, as planes, is not finite"));
            for told in [Some((width, height)), None] {
                if let Some(size) = transform.output_size(told) {
                    faults.unless(
                        size == changed.size(),
                        format_args!(
                            "{what} is {:?} pixels, but `output_size({told:?})` says {size:?}",
                            changed.size()
                        ),
                    );
                }
            }
        }
    }
}

pub(super) fn schedule(text: &str, faults: &mut Faults) {
    let Some(schedule) = built::<ScheduleTag>(text, faults) else { return };
    // Long enough for any warm-up that an example may have.
    let epochs = 1000.0;
    if faults.expect("planning 1000 epochs", schedule.check(epochs, 1e-3)).is_none() {
        return;
    }
    for tenth in 0..=10_000 {
        let epoch = f64::from(tenth) / 10.0;
        let rate = schedule.rate(1e-3, epoch, epochs);
        if !(rate.is_finite() && rate >= 0.0) {
            return faults.add(format_args!("the rate at epoch {epoch} of {epochs} is {rate}"));
        }
        if rate.to_bits() != schedule.rate(1e-3, epoch, epochs).to_bits() {
            return faults.add(format_args!("the rate at epoch {epoch} differs from call to call"));
        }
    }
}
