//! A uniform choice of patches.

use maskalign_engine::{Result, random::Stream};
use maskalign_registry::Refusal;

use super::{Counts, Mask, MaskInput, Masker, PlannedMasker, counts, split};
use crate::{component, nn::Grid, register};

/// Keeps patches chosen uniformly, in random order (MAE, arXiv 2111.06377, section 3).
#[component]
pub struct RandomMasker {
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
    /// Share of all patches that is predicted, of those masked; absent: all that are masked.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    predict_ratio: Option<f64>,
}

impl Masker for RandomMasker {
    fn plan(&self, grid: Grid) -> Result<Box<dyn PlannedMasker>, Refusal> {
        let counts = counts("random", grid.patches(), self.ratio, self.visible, self.masked, self.predict_ratio)?;
        Ok(Box::new(PlannedRandom { counts, patches: grid.patches() }))
    }
}

/// Counts that fit a grid.
struct PlannedRandom {
    counts: Counts,
    patches: usize,
}

impl PlannedMasker for PlannedRandom {
    fn counts(&self) -> Counts {
        self.counts
    }

    fn draw(&self, _: &MaskInput, rng: &mut Stream) -> Mask {
        split(rng.permutation(self.patches).into_iter().map(|i| i as u32).collect(), self.counts)
    }
}

register!(masker "random" => RandomMasker, "keeps patches chosen uniformly",
    example: "{ type: random, ratio: 0.75 }", paper: "MAE, arXiv 2111.06377, section 3");
