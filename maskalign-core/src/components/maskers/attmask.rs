//! Masks at the patches that a teacher attends to most, or least.

use maskalign_engine::random::Stream;
use maskalign_registry::Refusal;

use super::{Counts, Mask, MaskInput, Masker, PlannedMasker};
use crate::{component, nn::Grid, register};

fn always() -> f64 {
    1.0
}

/// Which patches are masked.
#[component]
#[derive(Copy, Default, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
enum Hides {
    /// Those that are attended to most.
    #[default]
    High,
    /// Those that are attended to least.
    Low,
}

/// Masks the patches that the class token of the teacher's last block attends to most (AttMask, arXiv 2203.12719: `AttMask-High`),
/// or least (`AttMask-Low`). With `reveal`, some of the most attended are shown all the same (`AttMask-Hint`). The share is drawn
/// for a micro-batch, and whether an image is masked at all for each.
#[component]
struct AttMask {
    /// The teacher that is asked, by its name under `teachers`.
    #[schemars(extend("x-reference" = "teacher"))]
    teacher: String,
    /// Share of the patches that is masked.
    #[schemars(range(min = 0.0, max = 1.0))]
    ratio: f64,
    /// How far the share may be from `ratio`: it is uniform within.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    ratio_spread: f64,
    /// Which patches are masked: `high` or `low`.
    #[serde(default)]
    hides: Hides,
    /// Share of the patches, the most attended, of which some are shown: as many as the share that is masked has of it.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    reveal: f64,
    /// How likely an image is masked; the others are seen whole.
    #[serde(default = "always")]
    #[schemars(extend("exclusiveMinimum" = 0), range(max = 1.0))]
    probability: f64,
}

impl Masker for AttMask {
    fn plan(&self, grid: Grid) -> Result<Box<dyn PlannedMasker>, Refusal> {
        let patches = grid.patches();
        let (least, most) = (self.ratio - self.ratio_spread, self.ratio + self.ratio_spread);
        if least < 0.0 || most > 1.0 {
            let message =
                format!("{} around {} reaches from {least} to {most}: no share", self.ratio_spread, self.ratio);
            return Err(Refusal::new("ratio_spread", message).related(["ratio"], "the middle"));
        }
        if share(patches, most) == 0 {
            return Err(Refusal::new("ratio", format!("masks none of {patches} patches")));
        }
        if share(patches, most) == patches {
            return Err(Refusal::new(
                "ratio",
                format!("masks all of {patches} patches: the student would see nothing"),
            ));
        }
        if self.reveal > 0.0 && self.hides == Hides::Low {
            return Err(Refusal::new("reveal", "the most attended patches are shown anyway")
                .related(["hides"], "`low` masks the others")
                .help("leave `reveal` out, or use `hides: high`"));
        }
        Ok(Box::new(PlannedAttMask { options: self.clone(), patches }))
    }

    fn teacher(&self) -> Option<&str> {
        Some(&self.teacher)
    }
}

/// As many of the patches as the official code takes.
fn share(patches: usize, share: f64) -> usize {
    (patches as f64 * share) as usize
}

/// Options that fit so many patches.
struct PlannedAttMask {
    options: AttMask,
    patches: usize,
}

impl PlannedAttMask {
    fn ratio(&self, shared: &mut Stream) -> f64 {
        let AttMask { ratio, ratio_spread, .. } = self.options;
        // Nothing is drawn where there is nothing to draw.
        if ratio_spread > 0.0 { ratio + ratio_spread * (2.0 * shared.uniform() - 1.0) } else { ratio }
    }

    fn mask(&self, ratio: f64, input: &MaskInput, rng: &mut Stream) -> Mask {
        let all = || (0..self.patches as u32).collect::<Vec<_>>();
        if self.options.probability < 1.0 && rng.uniform() >= self.options.probability {
            return Mask { visible: all(), masked: Vec::new() };
        }
        let mut order = all();
        let attention = |patch: u32| input.attention[patch as usize];
        order.sort_by(|&a, &b| attention(b).total_cmp(&attention(a)).then(a.cmp(&b)));
        if self.options.hides == Hides::Low {
            order.reverse();
        }
        let mut is_masked = vec![false; self.patches];
        order[..share(self.patches, ratio)].iter().for_each(|&patch| is_masked[patch as usize] = true);
        let top = share(self.patches, self.options.reveal);
        let revealed = share(self.patches, self.options.reveal * ratio).min(top);
        for place in rng.permutation(top).into_iter().take(revealed) {
            is_masked[order[place] as usize] = false;
        }
        let (masked, visible) = all().into_iter().partition(|&patch| is_masked[patch as usize]);
        Mask { visible, masked }
    }
}

impl PlannedMasker for PlannedAttMask {
    fn counts(&self) -> Counts {
        let masked = share(self.patches, self.options.ratio + self.options.ratio_spread);
        Counts { visible: self.patches - masked, masked }
    }

    fn draw(&self, input: &MaskInput, rng: &mut Stream) -> Mask {
        self.mask(self.options.ratio, input, rng)
    }

    fn draw_batch(&self, images: &[MaskInput], rngs: &mut [Stream], shared: &mut Stream) -> Vec<Mask> {
        let ratio = self.ratio(shared);
        images.iter().zip(rngs).map(|(input, rng)| self.mask(ratio, input, rng)).collect()
    }

    fn varies(&self) -> bool {
        let AttMask { ratio_spread, reveal, probability, .. } = self.options;
        ratio_spread > 0.0 || reveal > 0.0 || probability < 1.0
    }

    fn uneven(&self) -> bool {
        // Patches that are revealed were masked before, unless there are more of them than of the masked ones.
        let AttMask { ratio, ratio_spread, reveal, probability, .. } = self.options;
        probability < 1.0 || share(self.patches, reveal) > share(self.patches, ratio - ratio_spread)
    }
}

register!(masker "attmask" => AttMask, "masks the patches that a teacher attends to most",
    example: "{ type: attmask, teacher: ema, ratio: 0.3, ratio_spread: 0.2, probability: 0.5 }",
    paper: "AttMask, arXiv 2203.12719");

#[cfg(test)]
mod tests {
    use super::*;

    const ATTENTION: [f32; 6] = [0.1, 0.3, 0.05, 0.2, 0.25, 0.1];

    fn options() -> AttMask {
        let ratio = 0.5;
        let (ratio_spread, reveal, probability) = (0.0, 0.0, 1.0);
        AttMask { teacher: "t".into(), ratio, ratio_spread, hides: Hides::High, reveal, probability }
    }

    fn drawn(options: AttMask, images: usize) -> Vec<Mask> {
        let planned = options.plan(Grid { rows: 2, columns: 3 }).unwrap();
        let inputs: Vec<MaskInput> =
            (0..images).map(|image| MaskInput { epoch: 0, image, crop: 0, attention: &ATTENTION }).collect();
        let mut streams: Vec<Stream> = (0..images as u64).map(|image| Stream::new(7, "mask", 0, image)).collect();
        planned.draw_batch(&inputs, &mut streams, &mut Stream::new(7, "shared", 0, 0))
    }

    #[test]
    fn the_most_attended_patches_are_masked_or_the_least() {
        assert_eq!(drawn(options(), 1)[0], Mask { visible: vec![0, 2, 5], masked: vec![1, 3, 4] });
        let low = AttMask { hides: Hides::Low, ratio: 0.34, ..options() };
        assert_eq!(drawn(low, 1)[0].masked, [2, 5], "of equal ones the last, as it is the least of both orders");
    }

    #[test]
    fn half_of_the_images_are_masked_and_all_alike() {
        let options = AttMask { probability: 0.5, ratio_spread: 0.3, ..options() };
        let masks = drawn(options, 400);
        let counts: std::collections::BTreeSet<usize> = masks.iter().map(|mask| mask.masked.len()).collect();
        assert_eq!(counts.len(), 2, "none, or one number for the micro-batch: {counts:?}");
        let masked = masks.iter().filter(|mask| !mask.masked.is_empty()).count();
        assert!((150..250).contains(&masked), "{masked}");
    }

    #[test]
    fn hints_are_among_the_most_attended() {
        let options = AttMask { reveal: 0.67, ..options() };
        for mask in drawn(options, 50) {
            // Of the four most attended, two are shown; three were masked, so that one or two of them remain.
            assert!(mask.masked.iter().all(|patch| [1, 3, 4].contains(patch)), "{mask:?}");
            assert!((1..=2).contains(&mask.masked.len()), "{mask:?}");
        }
    }
}
