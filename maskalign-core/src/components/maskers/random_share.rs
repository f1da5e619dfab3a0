//! A uniform choice of patches, as many as are drawn for each image.

use maskalign_engine::random::Stream;
use maskalign_registry::Refusal;

use super::{Counts, Mask, MaskInput, Masker, PlannedMasker, split};
use crate::{component, nn::Grid, register};

fn always() -> f64 {
    1.0
}

/// Masks patches chosen uniformly; their share is drawn for each image, and whether it is masked at all (iBOT, arXiv 2111.07832,
/// `pred_shape` `rand` with `pred_ratio` and `pred_ratio_var`). The student shows mask tokens.
#[component]
struct RandomShare {
    /// The least and the greatest share of the patches that is masked; uniform between them.
    #[schemars(inner(range(min = 0.0, max = 1.0)))]
    ratio: [f64; 2],
    /// How likely an image is masked; the others are seen whole.
    #[serde(default = "always")]
    #[schemars(extend("exclusiveMinimum" = 0), range(max = 1.0))]
    probability: f64,
}

impl Masker for RandomShare {
    fn plan(&self, grid: Grid) -> Result<Box<dyn PlannedMasker>, Refusal> {
        let (patches, [low, high]) = (grid.patches(), self.ratio);
        if low > high {
            return Err(Refusal::new("ratio", format!("from {low} to {high} there is no share"))
                .help("write the smaller one first"));
        }
        let most = (patches as f64 * high) as usize;
        if most == 0 || most == patches {
            let what = if most == 0 { "none" } else { "all" };
            return Err(Refusal::new("ratio", format!("masks {what} of {patches} patches")));
        }
        Ok(Box::new(PlannedShare { ratio: self.ratio, probability: self.probability, patches }))
    }
}

/// Shares that fit so many patches.
struct PlannedShare {
    ratio: [f64; 2],
    probability: f64,
    patches: usize,
}

impl PlannedMasker for PlannedShare {
    fn counts(&self) -> Counts {
        let masked = (self.patches as f64 * self.ratio[1]) as usize;
        Counts { visible: self.patches - masked, masked }
    }

    fn draw(&self, _: &MaskInput, rng: &mut Stream) -> Mask {
        let is_masked = self.probability >= 1.0 || rng.uniform() < self.probability;
        let [low, high] = self.ratio;
        let share = if is_masked { low + (high - low) * rng.uniform() } else { 0.0 };
        let masked = (self.patches as f64 * share) as usize;
        let order = rng.permutation(self.patches).into_iter().map(|patch| patch as u32).collect();
        split(order, Counts { visible: self.patches - masked, masked })
    }

    fn varies(&self) -> bool {
        self.uneven()
    }

    fn uneven(&self) -> bool {
        self.probability < 1.0 || self.ratio[0] < self.ratio[1]
    }
}

register!(masker "random_share" => RandomShare, "masks a share of patches that is drawn for each image",
    example: "{ type: random_share, ratio: [0.1, 0.5], probability: 0.5 }", paper: "iBOT, arXiv 2111.07832");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_uniform_between_their_bounds_and_some_images_are_whole() {
        let masker = RandomShare { ratio: [0.1, 0.5], probability: 0.5 }.plan(Grid { rows: 14, columns: 14 }).unwrap();
        let input = MaskInput { epoch: 0, image: 0, crop: 0, attention: &[] };
        let (mut whole, mut shares) = (0, Vec::new());
        for image in 0..4000 {
            let mask = masker.draw(&input, &mut Stream::new(3, "mask", 0, image));
            assert_eq!(mask.visible.len() + mask.masked.len(), 196);
            match mask.masked.len() {
                0 => whole += 1,
                masked => shares.push(masked as f64 / 196.0),
            }
        }
        assert!((1870..2130).contains(&whole), "{whole} of 4000, four standard errors around half");
        let mean = shares.iter().sum::<f64>() / shares.len() as f64;
        // Floors take half a patch on average; the standard error is .4 / sqrt(12 * 2000).
        assert!((mean - (0.3 - 0.5 / 196.0)).abs() < 4.0 * 0.0026, "{mean}");
        let (least, most) = shares.iter().fold((1.0_f64, 0.0_f64), |(l, m), share| (l.min(*share), m.max(*share)));
        assert!(least >= 19.0 / 196.0 && most <= 98.0 / 196.0, "{least} to {most}");
    }

    #[test]
    fn shares_that_mask_nothing_or_everything_are_refused() {
        let refused = |ratio| RandomShare { ratio, probability: 1.0 }.plan(Grid { rows: 2, columns: 2 }).err();
        for ratio in [[0.0, 0.1], [0.5, 1.0], [0.6, 0.5]] {
            assert_eq!(refused(ratio).map(|refusal| refusal.path), Some(vec!["ratio".to_owned()]), "{ratio:?}");
        }
        assert!(refused([0.25, 0.75]).is_none());
    }
}
