//! Masks made of rectangles.

use maskalign_engine::{Result, random::Stream};
use maskalign_registry::Refusal;

use super::{Counts, Mask, MaskInput, Masker, PlannedMasker, counts};
use crate::{component, nn::Grid, register};

/// Tries of one rectangle before a mask is taken as it is.
const TRIES: usize = 10;

fn min_block() -> usize {
    16
}
fn aspect() -> [f64; 2] {
    [0.3, 1.0 / 0.3]
}

/// Masks rectangles until enough patches are masked (BEiT, arXiv 2106.08254, algorithm 1; data2vec). An area is uniform
/// between `min_block` and what is left to mask, the logarithm of its height over its width uniform in `aspect`.
///
/// Where no rectangle fits what is left, BEiT masks fewer patches of that image; here the rest is chosen uniformly, so that
/// every image has as many.
#[component]
pub struct BlockMasker {
    /// Share of the patches that is masked; floor(N (1 - ratio)) stay visible.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    ratio: Option<f64>,
    /// Number of patches that stay visible, instead of `ratio`.
    #[serde(default)]
    #[schemars(range(min = 1))]
    visible: Option<usize>,
    /// Number of patches that are masked, instead of `ratio`.
    #[serde(default)]
    masked: Option<usize>,
    /// Smallest area of a rectangle, in patches.
    #[serde(default = "min_block")]
    #[schemars(range(min = 1))]
    min_block: usize,
    /// Largest area of a rectangle, in patches; absent: all that are to be masked.
    #[serde(default)]
    #[schemars(range(min = 1))]
    max_block: Option<usize>,
    /// Smallest and largest height over width of a rectangle.
    #[serde(default = "aspect")]
    #[schemars(inner(range(min = 0.01, max = 100.0)))]
    aspect: [f64; 2],
    /// Whether the rectangles are what stays visible, and all else is masked (data2vec 2.0, arXiv 2212.07525; UTA, arXiv
    /// 2405.19009): rectangles are rare at the border, which is masked more often then.
    #[serde(default)]
    inverse: bool,
}

impl Masker for BlockMasker {
    fn plan(&self, grid: Grid) -> Result<Box<dyn PlannedMasker>, Refusal> {
        let counts = counts("block", grid.patches(), self.ratio, self.visible, self.masked, None)?;
        let (covered, are) = match self.inverse {
            true => (counts.visible, "stay visible"),
            false => (counts.masked, "are masked"),
        };
        if self.min_block > covered {
            let message = format!("rectangles of {} patches, but only {covered} {are}", self.min_block);
            return Err(Refusal::new("min_block", message));
        }
        if let Some(most) = self.max_block.filter(|&most| most < self.min_block) {
            let message = format!("{most} is below `min_block`, {}", self.min_block);
            return Err(Refusal::new("max_block", message).related(["min_block"], "the smallest area"));
        }
        let [low, high] = self.aspect;
        if low > high {
            return Err(Refusal::new("aspect", format!("expected [smallest, largest], found [{low}, {high}]")));
        }
        Ok(Box::new(PlannedBlocks {
            grid,
            counts,
            covered,
            inverse: self.inverse,
            smallest: self.min_block as f64,
            largest: self.max_block.unwrap_or(covered),
            log_aspect: [low.ln(), high.ln()],
        }))
    }
}

/// Rectangles that fit a grid.
struct PlannedBlocks {
    grid: Grid,
    counts: Counts,
    /// Patches of an image that are under rectangles.
    covered: usize,
    /// Whether those stay visible.
    inverse: bool,
    smallest: f64,
    largest: usize,
    log_aspect: [f64; 2],
}

impl PlannedBlocks {
    /// Patches under rectangles, at most as many as are to be there.
    fn rectangles(&self, rng: &mut Stream) -> Vec<bool> {
        let mut covered = vec![false; self.grid.patches()];
        let mut count = 0;
        while count < self.covered {
            match self.rectangle(&mut covered, self.largest.min(self.covered - count), rng) {
                0 => break,
                more => count += more,
            }
        }
        covered
    }

    /// Covers one rectangle that adds at most `most` patches, and gives how many it added: 0 where none was found.
    fn rectangle(&self, covered: &mut [bool], most: usize, rng: &mut Stream) -> usize {
        let Grid { rows, columns } = self.grid;
        let between = |low: f64, high: f64, rng: &mut Stream| low + (high - low) * rng.uniform();
        for _ in 0..TRIES {
            let area = between(self.smallest, most as f64, rng);
            let aspect = between(self.log_aspect[0], self.log_aspect[1], rng).exp();
            let side = |squared: f64| squared.sqrt().round_ties_even() as usize;
            let (height, width) = (side(area * aspect), side(area / aspect));
            // BEiT takes no rectangle from edge to edge.
            if height >= rows || width >= columns {
                continue;
            }
            let (top, left) = (rng.below(rows - height + 1), rng.below(columns - width + 1));
            let patches = || (top..top + height).flat_map(|row| (left..left + width).map(move |c| row * columns + c));
            let added = patches().filter(|&patch| !covered[patch]).count();
            if (1..=most).contains(&added) {
                patches().for_each(|patch| covered[patch] = true);
                return added;
            }
        }
        0
    }
}

impl PlannedMasker for PlannedBlocks {
    fn counts(&self) -> Counts {
        self.counts
    }

    fn draw(&self, _: &MaskInput, rng: &mut Stream) -> Mask {
        let mut is_covered = self.rectangles(rng);
        let mut missing = self.covered - is_covered.iter().filter(|&&covered| covered).count();
        if missing > 0 {
            for patch in rng.permutation(is_covered.len()) {
                if missing > 0 && !is_covered[patch] {
                    is_covered[patch] = true;
                    missing -= 1;
                }
            }
        }
        let is_masked = |patch: &u32| is_covered[*patch as usize] != self.inverse;
        let (masked, visible) = (0..is_covered.len() as u32).partition(is_masked);
        Mask { visible, masked }
    }
}

register!(masker "block" => BlockMasker, "masks rectangles of patches",
    example: "{ type: block, masked: 120 }", paper: "BEiT, arXiv 2106.08254, algorithm 1");

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(side: usize, text: &str) -> Result<Box<dyn PlannedMasker>, Refusal> {
        let masker: BlockMasker = serde_json::from_str(text).expect("options");
        masker.plan(Grid { rows: side, columns: side })
    }

    /// The averages are of 100,000 masks of BEiT's law, drawn by `tests/fixtures/stages/make_block_masks.py`.
    #[test]
    fn rectangles_follow_beits_law() {
        const DRAWS: usize = 20_000;
        let side = 14;
        let planned = PlannedBlocks {
            grid: Grid { rows: side, columns: side },
            counts: Counts { visible: 76, masked: 120 },
            covered: 120,
            inverse: false,
            smallest: 16.0,
            largest: 120,
            log_aspect: aspect().map(f64::ln),
        };
        let (mut count, mut full, mut edges, mut corner, mut centre, mut border) = (0, 0, 0, 0, 0, 0);
        for image in 0..DRAWS {
            let mask = planned.rectangles(&mut Stream::new(3, "mask", 0, image as u64));
            let masked = mask.iter().filter(|&&masked| masked).count();
            let differ = |a: usize, b: usize| usize::from(mask[a] != mask[b]);
            count += masked;
            full += usize::from(masked == 120);
            edges += (0..side * (side - 1)).map(|i| differ(i, i + side)).sum::<usize>();
            edges += (0..side * side).filter(|i| (i + 1) % side > 0).map(|i| differ(i, i + 1)).sum::<usize>();
            corner += usize::from(mask[0]);
            centre += usize::from(mask[7 * side + 7]);
            border += usize::from(mask[7]);
        }
        for (what, sum, expected, tolerance) in [
            ("patches", count, 119.52961, 0.03),
            ("full masks", full, 0.69679, 0.015),
            ("edges", edges, 42.48844, 0.25),
            ("corner", corner, 0.08568, 0.01),
            ("centre", centre, 0.9414, 0.01),
            ("border", border, 0.36933, 0.015),
        ] {
            let mean = sum as f64 / DRAWS as f64;
            assert!((mean - expected).abs() < tolerance, "{what}: {mean}, expected {expected}");
        }
    }

    #[test]
    fn every_image_has_as_many_masked_patches() {
        let planned = blocks(14, r#"{ "masked": 120 }"#).unwrap();
        let input = MaskInput { epoch: 0, image: 0, crop: 0, attention: &[] };
        for image in 0..200 {
            let Mask { visible, masked } = planned.draw(&input, &mut Stream::new(1, "mask", 0, image));
            let mut all = [&visible[..], &masked].concat();
            all.sort_unstable();
            assert_eq!((masked.len(), all), (120, (0..196).collect()));
        }
    }

    /// The same draws, with the two sides exchanged.
    #[test]
    fn an_inverse_mask_keeps_what_a_mask_hides() {
        let (mask, keep) = (blocks(14, r#"{ "masked": 98 }"#), blocks(14, r#"{ "visible": 98, "inverse": true }"#));
        let (mask, keep) = (mask.unwrap(), keep.unwrap());
        let input = MaskInput { epoch: 0, image: 0, crop: 0, attention: &[] };
        for image in 0..50 {
            let draw = |masker: &dyn PlannedMasker| masker.draw(&input, &mut Stream::new(1, "mask", 0, image));
            let (hidden, kept) = (draw(&*mask), draw(&*keep));
            assert_eq!((hidden.masked, hidden.visible), (kept.visible, kept.masked));
        }
    }

    #[test]
    fn rectangles_that_cannot_be_are_refused() {
        for (text, option) in [
            (r#"{ "masked": 10 }"#, "min_block"),
            (r#"{ "visible": 10, "inverse": true }"#, "min_block"),
            (r#"{ "masked": 100, "max_block": 8 }"#, "max_block"),
            (r#"{ "masked": 100, "aspect": [2.0, 1.0] }"#, "aspect"),
            (r#"{ "ratio": 0.5, "masked": 100 }"#, "masked"),
        ] {
            assert_eq!(blocks(14, text).map(|_| ()).unwrap_err().path, [option], "{text}");
        }
    }
}
