//! Several rectangles to predict, and what a large one has beside them.

use maskalign_engine::{Result, random::Stream};
use maskalign_registry::Refusal;

use super::{Counts, Mask, MaskInput, Masker, PlannedMasker};
use crate::{component, nn::Grid, register};

/// Tries of a context before it is allowed one rectangle more.
const TRIES: usize = 20;
/// Micro-batches and images that are drawn to know how many patches there will be.
const TRIALS: (u64, usize) = (48, 8);

fn blocks() -> usize {
    4
}
fn scale() -> [f64; 2] {
    [0.15, 0.2]
}
fn aspect() -> [f64; 2] {
    [0.75, 1.5]
}
fn context_scale() -> [f64; 2] {
    [0.85, 1.0]
}
fn min_visible() -> usize {
    10
}

/// Rectangles that are predicted one by one, from a large square without them (I-JEPA, arXiv 2301.08243, section 3).
///
/// The sizes are drawn for a micro-batch, the places for each image. All images of a micro-batch see as many patches as the
/// one that sees the fewest: of the others the last ones, row by row, are left out. A patch may be in several rectangles, and
/// is predicted in each.
#[component]
struct MultiBlock {
    /// Rectangles of an image.
    #[serde(default = "blocks")]
    #[schemars(range(min = 1, max = 64))]
    blocks: usize,
    /// Smallest and largest area of a rectangle, as a share of the patches.
    #[serde(default = "scale")]
    #[schemars(inner(range(min = 0.0, max = 1.0)))]
    scale: [f64; 2],
    /// Smallest and largest height over width of a rectangle. One draw chooses area and shape, as in the official code.
    #[serde(default = "aspect")]
    #[schemars(inner(range(min = 0.01, max = 100.0)))]
    aspect: [f64; 2],
    /// Smallest and largest area of the square that is seen, before the rectangles are taken out.
    #[serde(default = "context_scale")]
    #[schemars(inner(range(min = 0.0, max = 1.0)))]
    context_scale: [f64; 2],
    /// A square that leaves no more patches visible than this is drawn again; after 20 tries one rectangle more may be seen
    /// (the official code's `min_keep`). Where that would happen in more than one of a hundred images, it is refused.
    #[serde(default = "min_visible")]
    min_visible: usize,
}

impl Masker for MultiBlock {
    fn plan(&self, grid: Grid) -> Result<Box<dyn PlannedMasker>, Refusal> {
        for (option, [low, high]) in
            [("scale", self.scale), ("aspect", self.aspect), ("context_scale", self.context_scale)]
        {
            if low > high {
                return Err(Refusal::new(option, format!("expected [smallest, largest], found [{low}, {high}]")));
            }
        }
        if grid.rows < 2 || grid.columns < 2 {
            return Err(Refusal::whole(format!(
                "rectangles need two rows and columns of patches, the student has {grid}"
            )));
        }
        let mut planned = PlannedMultiBlock { grid, options: self.clone(), counts: Counts { visible: 0, masked: 0 } };
        let sizes = [0.0, 1.0].map(|u| size(grid, self.scale, self.aspect, u));
        // The first is the lowest, the last may be the narrowest.
        if sizes.iter().any(|(rows, columns)| rows * columns == 0) {
            let message = format!("the smallest rectangle has none of {} patches", grid.patches());
            return Err(Refusal::new("scale", message));
        }
        let context = size(grid, self.context_scale, [1.0, 1.0], 0.0);
        if context.0 * context.1 <= self.min_visible {
            let message = format!(
                "more than {} patches are to be seen, and the smallest square has {}",
                self.min_visible,
                context.0 * context.1
            );
            return Err(Refusal::new("min_visible", message).related(["context_scale"], "the square"));
        }
        let mut crowded = 0;
        for trial in 0..TRIALS.0 {
            let mut rngs: Vec<Stream> =
                (0..TRIALS.1 as u64).map(|image| Stream::new(0, "multi_block trial", trial, image)).collect();
            let shared = &mut Stream::new(0, "multi_block sizes", trial, 0);
            let input = MaskInput { epoch: 0, image: 0, crop: 0, attention: &[] };
            let drawn = planned.draw_batch(&vec![input; TRIALS.1], &mut rngs, shared);
            let is_seen = |mask: &Mask| mask.visible.iter().any(|patch| mask.masked.contains(patch));
            crowded += drawn.iter().filter(|mask| is_seen(mask)).count();
            let Counts { visible, masked } = &mut planned.counts;
            (*visible, *masked) = ((*visible).max(drawn[0].visible.len()), (*masked).max(drawn[0].masked.len()));
        }
        let all = TRIALS.0 as usize * TRIALS.1;
        if crowded * 100 > all {
            let message = format!(
                "of {all} images {crowded} have no more than {} patches beside their {} rectangles",
                self.min_visible, self.blocks
            );
            let refusal = Refusal::new("min_visible", message).related(["scale"], "the areas of rectangles");
            return Err(refusal.help("lower it, or take fewer or smaller rectangles"));
        }
        Ok(Box::new(planned))
    }
}

/// Rows and columns of a rectangle, where `u` in [0, 1) chooses among areas and shapes: always one less than the grid has.
fn size(grid: Grid, [low, high]: [f64; 2], [narrow, wide]: [f64; 2], u: f64) -> (usize, usize) {
    let area = ((grid.patches() as f64 * (low + u * (high - low))) as usize) as f64;
    let aspect = narrow + u * (wide - narrow);
    let side = |length: f64, most: usize| (length.round_ties_even() as usize).min(most - 1);
    (side((area * aspect).sqrt(), grid.rows), side((area / aspect).sqrt(), grid.columns))
}

/// Rectangles and a square that fit a grid.
struct PlannedMultiBlock {
    grid: Grid,
    options: MultiBlock,
    /// About the most that there will be.
    counts: Counts,
}

impl PlannedMultiBlock {
    /// The patches of a rectangle somewhere in the grid. As in the official code it never touches the last row and column.
    fn rectangle(&self, (rows, columns): (usize, usize), rng: &mut Stream) -> Vec<u32> {
        let at = |all: usize, length: usize, rng: &mut Stream| rng.below(all - length);
        let (top, left) = (at(self.grid.rows, rows, rng), at(self.grid.columns, columns, rng));
        let row = |row: usize| (left..left + columns).map(move |column| (row * self.grid.columns + column) as u32);
        (top..top + rows).flat_map(row).collect()
    }

    fn draw_sized(&self, block: (usize, usize), context: (usize, usize), rng: &mut Stream) -> Mask {
        let targets: Vec<Vec<u32>> = (0..self.options.blocks).map(|_| self.rectangle(block, rng)).collect();
        // With no rectangle left out the whole square is seen, which is large enough.
        for avoided in (0..=targets.len()).rev() {
            for _ in 0..TRIES {
                let mut visible = self.rectangle(context, rng);
                visible.retain(|patch| !targets[..avoided].iter().any(|target| target.contains(patch)));
                if visible.len() > self.options.min_visible {
                    return Mask { visible, masked: targets.concat() };
                }
            }
        }
        Mask { visible: self.rectangle(context, rng), masked: targets.concat() }
    }
}

impl PlannedMasker for PlannedMultiBlock {
    fn counts(&self) -> Counts {
        self.counts
    }

    fn blocks(&self) -> usize {
        self.options.blocks
    }

    fn varies(&self) -> bool {
        true
    }

    fn draw(&self, input: &MaskInput, rng: &mut Stream) -> Mask {
        let shared = &mut rng.clone();
        let mut drawn = self.draw_batch(std::slice::from_ref(input), std::slice::from_mut(rng), shared);
        drawn.pop().expect("one image, one mask")
    }

    fn draw_batch(&self, images: &[MaskInput], rngs: &mut [Stream], shared: &mut Stream) -> Vec<Mask> {
        let MultiBlock { scale, aspect, context_scale, .. } = self.options;
        let block = size(self.grid, scale, aspect, shared.uniform());
        let context = size(self.grid, context_scale, [1.0, 1.0], shared.uniform());
        let mut masks: Vec<Mask> =
            images.iter().zip(rngs).map(|(_, rng)| self.draw_sized(block, context, rng)).collect();
        let fewest = masks.iter().map(|mask| mask.visible.len()).min().unwrap_or(0);
        for mask in &mut masks {
            mask.visible.truncate(fewest);
        }
        masks
    }
}

register!(masker "multi_block" => MultiBlock, "rectangles that are predicted one by one from what is beside them",
    example: "{ type: multi_block, blocks: 4, scale: [0.15, 0.2], min_visible: 2 }", paper: "I-JEPA, arXiv 2301.08243");

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> MultiBlock {
        MultiBlock {
            blocks: blocks(),
            scale: scale(),
            aspect: aspect(),
            context_scale: context_scale(),
            min_visible: min_visible(),
        }
    }

    fn drawn(grid: Grid, options: &MultiBlock, batch: u64) -> Vec<Mask> {
        let planned = options.plan(grid).unwrap();
        let input = MaskInput { epoch: 0, image: 0, crop: 0, attention: &[] };
        let mut rngs: Vec<Stream> = (0..64).map(|image| Stream::new(3, "mask", batch, image)).collect();
        planned.draw_batch(&[input; 64], &mut rngs, &mut Stream::new(3, "sizes", batch, 0))
    }

    /// The sizes that I-JEPA's `_sample_block_size` gives for a draw, worked out in Python.
    #[test]
    fn sizes_are_the_official_ones() {
        let grid = Grid { rows: 16, columns: 16 };
        for (u, block, context) in [
            (0.0, (5, 7), (15, 15)),
            (0.25, (6, 7), (15, 15)),
            (0.5, (7, 6), (15, 15)),
            (0.75, (8, 6), (15, 15)),
            (0.999, (9, 6), (15, 15)),
        ] {
            assert_eq!(size(grid, scale(), aspect(), u), block, "{u}");
            assert_eq!(size(grid, context_scale(), [1.0, 1.0], u), context, "{u}");
        }
    }

    #[test]
    fn a_batch_has_equal_counts_and_context_and_targets_are_apart() {
        let grid = Grid { rows: 16, columns: 16 };
        let most = options().plan(grid).unwrap().counts();
        let mut sizes = std::collections::BTreeSet::new();
        for batch in 0..40 {
            let masks = drawn(grid, &options(), batch);
            let counts = |mask: &Mask| (mask.visible.len(), mask.masked.len());
            assert!(masks.iter().all(|mask| counts(mask) == counts(&masks[0])));
            assert!(masks.iter().all(|mask| mask.visible.iter().all(|patch| !mask.masked.contains(patch))));
            let (visible, masked) = counts(&masks[0]);
            assert!(visible > 10 && masked <= most.masked && masked % 4 == 0, "{visible}, {masked}, {most:?}");
            sizes.insert(masked / 4);
            // The official code never reaches the last row and column.
            assert!(masks.iter().all(|mask| mask.masked.iter().all(|patch| patch % 16 < 15 && *patch < 240)));
        }
        assert!(sizes.len() > 2, "sizes are drawn: {sizes:?}");
        let one = |seed| {
            let input = MaskInput { epoch: 0, image: 0, crop: 0, attention: &[] };
            options().plan(grid).unwrap().draw(&input, &mut Stream::new(seed, "mask", 0, 0))
        };
        assert!(one(1) == one(1) && one(1) != one(2));
    }

    #[test]
    fn what_cannot_be_drawn_is_refused() {
        let small = Grid { rows: 4, columns: 4 };
        let refused = |options: MultiBlock, grid: Grid| options.plan(grid).err().map(|refusal| refusal.path);
        assert_eq!(refused(options(), small), Some(vec!["min_visible".into()]));
        assert_eq!(refused(MultiBlock { scale: [0.3, 0.2], ..options() }, small), Some(vec!["scale".into()]));
        assert_eq!(refused(MultiBlock { scale: [0.0, 0.2], ..options() }, small), Some(vec!["scale".into()]));
        assert_eq!(refused(options(), Grid { rows: 1, columns: 40 }), Some(Vec::new()));
        assert_eq!(refused(MultiBlock { min_visible: 2, blocks: 1, ..options() }, small), None);
    }
}
