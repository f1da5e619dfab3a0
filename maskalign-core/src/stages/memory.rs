//! Estimates of peak memory, before the first step. `tests/memory.rs` compares them with measured peaks.

use maskalign_engine::Recompute;

use super::{StageSummary, logistic::HISTORY};
use crate::components::towers::TowerShape;

/// Bytes of a value.
const FLOAT: u64 = 4;
/// The program itself and its buffers.
const BASE: u64 = 20 << 20;
/// Batches of images that exist at once: the step's, the next one, and one as it is cut into patches.
const BATCHES: u64 = 3;

/// What a step of a training stage needs room for, in values where nothing else is said.
pub struct TrainingStep<'a> {
    /// The student.
    pub student: &'a TowerShape,
    /// Images of a micro-batch.
    pub images: usize,
    /// Values of an image that is loaded: those of all its crops.
    pub pixels: usize,
    /// Tokens of an image that the student sees, in all its crops.
    pub tokens: usize,
    /// Frozen and moving towers.
    pub frozen: Vec<FrozenPass>,
    /// Values of moving copies of alignments.
    pub copied: usize,
    /// Values that are compared with targets.
    pub compared: usize,
    /// Values that alignments keep for the backward pass.
    pub aligned: usize,
    /// Whether blocks keep their input alone.
    pub recompute: Recompute,
}

/// What a step asks of a tower that is not trained.
pub struct FrozenPass {
    /// The tower.
    pub tower: TowerShape,
    /// Levels that it gives.
    pub levels: usize,
    /// Crops of an image that it sees.
    pub crops: usize,
    /// Whether it changes: it is run as a student is then.
    pub moves: bool,
}

/// Bytes for weights, gradients and two moments, and for the larger of two phases: the frozen towers' pass, and the
/// student's forward and backward passes.
pub(super) fn training(plan: &StageSummary, step: &TrainingStep) -> u64 {
    let arch = step.student.arch;
    let (dim, mlp, depth) = (arch.dim as u64, arch.mlp as u64, arch.depth as u64);
    let rows = (step.images * step.tokens) as u64;
    let kept = if step.recompute == Recompute::Blocks { dim } else { dim * 6 + mlp };
    // What the backward pass of one block holds besides: its input's and output's gradients and its own temporaries.
    let passing = rows * (6 * dim + 2 * mlp);
    let student = depth * rows * kept + passing + 2 * step.compared as u64 + step.aligned as u64;
    let passing_through = |FrozenPass { tower, levels, crops, moves }: &FrozenPass| {
        let images = step.images * crops;
        pass(tower, images, *levels).max(if *moves { block(tower, images) } else { 0 })
    };
    let teachers = step.frozen.iter().map(passing_through).max().unwrap_or(0);
    let weights: u64 = step.frozen.iter().map(|frozen| weights(&frozen.tower)).sum();
    let images = BATCHES * (step.images * step.pixels) as u64;
    let held = plan.parameters as u64 + 3 * plan.trainable as u64 + weights + step.copied as u64;
    FLOAT * (held + images + student.max(teachers)) + BASE
}

/// Bytes for a moving average of what is trained, where there is one.
pub(super) fn average(plan: &StageSummary, has_one: bool) -> u64 {
    if has_one { FLOAT * plan.trainable as u64 } else { 0 }
}

/// Bytes for training on the features of a frozen tower that runs again at each step, on a micro-batch of images some at a
/// time: its weights and pass, and what is trained with its gradient and one moment.
pub(super) fn probe(plan: &StageSummary, tower: &TowerShape, [micro, at_a_time]: [usize; 2], image_size: usize) -> u64 {
    let (trained, images) = (2 * plan.trainable as u64, BATCHES * batch(micro, image_size));
    let features = (micro * tower.arch.dim) as u64;
    FLOAT * (plan.parameters as u64 + trained + images + 4 * features + pass(tower, micro.min(at_a_time), 1)) + BASE
}

/// Bytes for a probe at several rates: the features of so many images, and a pass of some of them at a time; training on
/// features needs little.
pub(super) fn cached(tower: &TowerShape, features: usize, images: usize, image_size: usize) -> u64 {
    let held = (features * tower.arch.dim) as u64;
    FLOAT * (held + weights(tower) + BATCHES * batch(images, image_size) + pass(tower, images, 1)) + BASE
}

/// Bytes for the classes of images, some at a time.
pub(super) fn classifier(tower: &TowerShape, classes: usize, images: usize, image_size: usize) -> u64 {
    let scores = (classes * (tower.arch.dim + 2 * images)) as u64;
    // Its weights and the file that they come from; and a block of a tower that is trained passes whole.
    let block = pass(tower, images, 1).max(block(tower, images));
    FLOAT * (2 * weights(tower) + scores + BATCHES * batch(images, image_size) + block) + BASE
}

/// Bytes for the features of `count` images of `size` pixels at the towers' levels, `images` at a time, and for the products of
/// their values: kept in double precision, and twice more while eigenvalues are sought.
pub(super) fn quality(towers: &[(TowerShape, usize)], count: usize, size: usize, images: usize) -> u64 {
    let of_tower = |(tower, levels): &(TowerShape, usize)| {
        let (width, levels) = (tower.arch.dim, *levels as u64);
        let block = block_rows(width).min(count);
        let level = FLOAT * ((count + block) * width) as u64 + 8 * (width * width / 2) as u64;
        let centred = FLOAT * (count * width) as u64;
        let passing = FLOAT * pass(tower, images, levels as usize);
        levels * level + centred + (8 * 2 * (width * width) as u64).max(passing) + FLOAT * (block * block) as u64
    };
    let held = held_for(towers);
    towers.iter().map(of_tower).max().unwrap_or(0) + FLOAT * (held + BATCHES * batch(images, size)) + BASE
}

/// Bytes for two views' features of `count` images at the towers' levels, and once more of one level while they are compared.
pub(super) fn pairs(towers: &[(TowerShape, usize)], count: usize) -> u64 {
    let of_tower = |(tower, levels): &(TowerShape, usize)| 2 * FLOAT * ((levels + 2) * count * tower.arch.dim) as u64;
    towers.iter().map(of_tower).max().unwrap_or(0)
}

/// A measurement of frozen features against those of other images, by nearest neighbours.
#[derive(Clone, Copy)]
pub(super) struct NeighbourSearch {
    /// Images whose neighbours are sought. Those that are searched go by in blocks.
    pub seekers: usize,
    /// Neighbours of each.
    pub k: usize,
    /// Side of an image that is loaded, in pixels.
    pub image_size: usize,
    /// Images that go through a tower together.
    pub images: usize,
}

impl NeighbourSearch {
    /// Bytes for towers, each with the number of levels that are measured in one pass, and for pixels. They follow one
    /// another.
    pub(super) fn bytes(&self, towers: &[(TowerShape, usize)], pixels: bool) -> u64 {
        let raw = batch(1, self.image_size);
        let searches = towers.iter().map(|(tower, levels)| self.of_features(tower.arch.dim, *levels));
        let searches = searches.chain(pixels.then(|| self.of_features(raw as usize, 1))).max().unwrap_or(0);
        let held = held_for(towers);
        let passing = towers.iter().map(|(tower, levels)| pass(tower, self.images, *levels)).max().unwrap_or(0);
        searches + FLOAT * (held + BATCHES * batch(self.images, self.image_size) + passing) + BASE
    }

    /// Bytes for features of `width` values at so many levels: of each level the seekers' features, a block of those that
    /// are searched as it fills, and the lists of neighbours; and once a block that is searched with the similarities in it.
    pub(super) fn of_features(&self, width: usize, levels: usize) -> u64 {
        let block = block_rows(width).min(self.seekers);
        let level =
            FLOAT * ((self.seekers + block) * width) as u64 + NEIGHBOUR * (self.seekers * LISTED * self.k) as u64;
        levels as u64 * level + FLOAT * (block * (2 * width + block)) as u64
    }
}

/// Bytes for the features of so many searched images at the towers' levels and as pixels, `images` at a time, and for the
/// similarities of some seekers to all of them, with what they are sorted in.
pub(super) fn ranking(
    towers: &[(TowerShape, usize)],
    pixels: bool,
    [searched, seekers]: [usize; 2],
    size: usize,
    images: usize,
) -> u64 {
    let raw = batch(1, size) as usize;
    let of_features = |width: usize, levels: usize| FLOAT * (levels * (searched + block_rows(width)) * width) as u64;
    let held = towers.iter().map(|(tower, levels)| of_features(tower.arch.dim, *levels));
    let held = held.chain(pixels.then(|| of_features(raw, 1))).max().unwrap_or(0);
    let parameters = held_for(towers);
    let passing = towers.iter().map(|(tower, levels)| pass(tower, images, *levels)).max().unwrap_or(0);
    // A similarity is sorted beside whether it is of an image of the class: on some threads at a time.
    let ranked = ((ranked_rows(searched).min(seekers).min(images) + 2 * THREADS) * searched) as u64;
    held + FLOAT * (parameters + BATCHES * batch(images, size) + passing.max(ranked)) + BASE
}

/// Classifiers that are fitted to the features of a few images by logistic regression.
#[derive(Clone, Copy)]
pub(super) struct Fits {
    /// Images that the classifiers are fitted to, together.
    pub images: usize,
    /// Images that one of them is fitted to, at most.
    pub most: usize,
    /// Classes that they tell apart.
    pub classes: usize,
    /// Classifiers of each level.
    pub fits: usize,
    /// Images that they classify.
    pub tested: usize,
}

impl Fits {
    /// Bytes for towers with their levels, and for pixels, images of `size` pixels going through `batch` at a time. They
    /// follow one another.
    pub(super) fn bytes(&self, towers: &[(TowerShape, usize)], pixels: bool, size: usize, images: usize) -> u64 {
        let raw = batch(1, size) as usize;
        let fitted = towers.iter().map(|(tower, levels)| self.of_features(tower.arch.dim, *levels));
        let fitted = fitted.chain(pixels.then(|| self.of_features(raw, 1))).max().unwrap_or(0);
        let held = held_for(towers);
        let passing = towers.iter().map(|(tower, levels)| pass(tower, images, *levels)).max().unwrap_or(0);
        fitted + FLOAT * (held + BATCHES * batch(images, size) + passing) + BASE
    }

    /// Bytes for features of `width` values at so many levels: the classifiers, with the larger of two: the features that they
    /// are fitted to, once more those of one of them, and its search for the optimum; and a block of those that are classified,
    /// with their scores.
    fn of_features(&self, width: usize, levels: usize) -> u64 {
        let classifier = 8 * ((width + 1) * self.classes) as u64;
        // The steps and changes that directions come from, the point, the next, their gradients and what leads from one to
        // the other.
        let search = classifier * (2 * HISTORY as u64 + 6) + 8 * (self.most * self.classes) as u64;
        let fitting = FLOAT * ((levels * self.images + self.most) * width) as u64 + search;
        let block = block_rows(width).min(self.tested.max(self.images));
        let scores = 8 * (block * self.classes) as u64;
        let classifying = FLOAT * ((levels + 1) * block * width + levels * self.fits * self.tested) as u64 + scores;
        (levels * self.fits) as u64 * classifier + fitting.max(classifying)
    }
}

/// Threads that an estimate counts with where each needs room of its own.
const THREADS: usize = 4;

/// Seekers whose similarities to all of `searched` images are held at once.
pub(super) fn ranked_rows(searched: usize) -> usize {
    const VALUES: usize = 1 << 24;
    (VALUES / searched.max(1)).clamp(1, 256)
}

/// Bytes of a neighbour: its similarity and its place.
const NEIGHBOUR: u64 = 8;

/// How many times as many neighbours as are wanted a list holds before it is cut.
pub(super) const LISTED: usize = 2;

/// Rows of a block of features of `width` values: as many as a matrix product is fast with, and fewer where features are
/// as wide as images are.
pub(super) fn block_rows(width: usize) -> usize {
    const VALUES: usize = 1 << 24;
    (VALUES / width.max(1)).clamp(1, 1024)
}

/// Values of a batch of images.
fn batch(images: usize, size: usize) -> u64 {
    (images * 3 * size * size) as u64
}

/// Values of towers, and of what they were built from: what an earlier stage left, or a file.
fn held_for(towers: &[(TowerShape, usize)]) -> u64 {
    towers.iter().map(|(tower, _)| 2 * weights(tower)).sum()
}

/// Weights of a frozen tower.
fn weights(tower: &TowerShape) -> u64 {
    let (dim, mlp, depth) = (tower.arch.dim as u64, tower.arch.mlp as u64, tower.arch.depth as u64);
    depth * (4 * dim * dim + 2 * dim * mlp) + dim * 3 * (tower.arch.patch as u64).pow(2)
}

/// Values of a block of a tower whose weights may be trained: all rows pass it together, and through its MLP.
fn block(tower: &TowerShape, images: usize) -> u64 {
    (13 * images * tower.tokens() * tower.arch.dim) as u64
}

/// Values of a pass over `images` images that keeps `levels` of its levels. Blocks run some rows at a time, so that
/// what passes through their MLPs counts for little.
fn pass(tower: &TowerShape, images: usize, levels: usize) -> u64 {
    let (dim, cut) = (tower.arch.dim as u64, 3 * (tower.arch.patch as u64).pow(2));
    (images * tower.tokens()) as u64 * (cut + dim).max((4 + levels as u64) * dim)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{Arch, VitConfig};

    /// The features of 1.28 million images to search are not among what is held: those of 50,000 seekers are.
    #[test]
    fn imagenet_fits_at_every_level() {
        let tower = TowerShape::from(&VitConfig::plain(Arch::named("base_16").expect("a name"), 224));
        let search = NeighbourSearch { seekers: 50_000, k: 20, image_size: 224, images: 64 };
        let gib = |levels| search.bytes(&[(tower, levels)], false) as f64 / f64::from(1 << 30);
        assert!(gib(12) < 6.0 && gib(1) < 1.4, "{:.2} and {:.2} GiB", gib(12), gib(1));
    }
}
