//! A choice of patches led by the teacher's attention.

use maskalign_engine::{Result, random::Stream};
use maskalign_registry::Refusal;

use super::{Counts, Mask, MaskInput, Masker, PlannedMasker, counts, split};
use crate::{component, nn::Grid, register};

/// Draws an order of the patches without replacement, proportional to the attention that the class token of the
/// teacher's last block pays them, and keeps the first: well-attended patches tend to stay visible (MaskAlign,
/// arXiv 2211.08887, section 3.2).
#[component]
pub struct AttentionMasker {
    /// The teacher that is asked, by its name under `teachers`.
    #[schemars(extend("x-reference" = "teacher"))]
    teacher: String,
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

impl Masker for AttentionMasker {
    fn plan(&self, grid: Grid) -> Result<Box<dyn PlannedMasker>, Refusal> {
        let counts = counts("attention", grid.patches(), self.ratio, self.visible, self.masked, self.predict_ratio)?;
        Ok(Box::new(PlannedAttention { counts }))
    }

    fn teacher(&self) -> Option<&str> {
        Some(&self.teacher)
    }
}

/// Counts that fit a grid.
struct PlannedAttention {
    counts: Counts,
}

impl PlannedMasker for PlannedAttention {
    fn counts(&self) -> Counts {
        self.counts
    }

    fn draw(&self, input: &MaskInput, rng: &mut Stream) -> Mask {
        // Gumbel top-k: sorting log w + Gumbel noise draws without replacement in proportion to w.
        let mut keyed: Vec<(f64, u32)> = input
            .attention
            .iter()
            .enumerate()
            .map(|(i, &w)| {
                let uniform = rng.uniform().max(f64::MIN_POSITIVE);
                (f64::from(w).ln() - (-uniform.ln()).ln(), i as u32)
            })
            .collect();
        keyed.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        split(keyed.into_iter().map(|(_, i)| i).collect(), self.counts)
    }
}

register!(masker "attention" => AttentionMasker, "keeps patches that the teacher attends to",
    example: "{ type: attention, teacher: clip, ratio: 0.7 }", paper: "MaskAlign, arXiv 2211.08887, section 3.2");

#[cfg(test)]
mod tests {
    use super::*;

    /// The probability of each patch to be among the first two of three, weights 1, 2, 5, by hand: for patch 0,
    /// 1/8 + 2/8 (1/6) + 5/8 (1/3) = 0.375; for patch 1, 2/8 + 1/8 (2/7) + 5/8 (2/3); `torch.multinomial` without
    /// replacement is this law.
    #[test]
    fn patches_are_kept_in_proportion_to_attention() {
        let masker =
            AttentionMasker { teacher: "t".into(), ratio: None, visible: Some(2), masked: None, predict_ratio: None };
        let masker = masker.plan(Grid { rows: 1, columns: 3 }).unwrap();
        let input = MaskInput { epoch: 0, image: 0, crop: 0, attention: &[0.125, 0.25, 0.625] };
        let mut kept = [0; 3];
        for image in 0..20_000 {
            let mask = masker.draw(&input, &mut Stream::new(7, "mask", 0, image));
            mask.visible.iter().for_each(|&i| kept[i as usize] += 1);
        }
        for (kept, expected) in kept.iter().zip([0.375, 0.702_381, 0.922_619]) {
            assert!((f64::from(*kept) / 20_000.0 - expected).abs() < 0.015, "{kept} of 20000, expected {expected}");
        }
    }
}
