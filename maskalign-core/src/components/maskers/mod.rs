//! Which patches the student sees. Maskers live on the host and draw one image at a time from a keyed stream.

mod attention;
mod attmask;
mod block;
mod multi_block;
mod random;
mod random_share;

pub use attention::AttentionMasker;
pub use block::BlockMasker;
pub use random::RandomMasker;

use maskalign_engine::Result;
use maskalign_engine::random::Stream;
use maskalign_registry::Refusal;

pub use crate::nn::Counts;
use crate::nn::Grid;

/// What a masker draws from.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// The patches that the teacher attends to most come first.
/// fn order(input: &MaskInput) -> Vec<u32> {
///     let mut order: Vec<u32> = (0..input.attention.len() as u32).collect();
///     order.sort_by(|&a, &b| input.attention[b as usize].total_cmp(&input.attention[a as usize]));
///     order
/// }
///
/// assert_eq!(order(&MaskInput { epoch: 0, image: 5, crop: 0, attention: &[0.1, 0.7, 0.2] }), [1, 2, 0]);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct MaskInput<'a> {
    /// The epoch.
    pub epoch: u64,
    /// The image's place in the dataset.
    pub image: usize,
    /// Which of its crops it is, where there are several.
    pub crop: usize,
    /// The attention that the class token of [`Masker::teacher`] pays to each patch, mean over heads; empty where none is
    /// named.
    pub attention: &'a [f32],
}

/// The patches of one image.
///
/// ```
/// # use maskalign_core::prelude::*;
/// // Of four patches, the student sees two and predicts the others.
/// let mask = Mask { visible: vec![2, 0], masked: vec![1, 3] };
/// let batch = Masks::join(&[mask.clone(), mask]);
/// assert_eq!((batch.batch, batch.visible_of(1)), (2, &[2, 0][..]));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mask {
    /// What the student sees, in this order.
    pub visible: Vec<u32>,
    /// What is to be predicted.
    pub masked: Vec<u32>,
}

/// A masker's options.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// Keeps one patch, at any place.
/// #[component]
/// struct Single {}
///
/// impl Masker for Single {
///     fn plan(&self, grid: Grid) -> Result<Box<dyn PlannedMasker>, Refusal> {
///         Ok(Box::new(PlannedSingle { patches: grid.patches() }))
///     }
/// }
///
/// register!(masker "single" => Single, "keeps one patch", example: "{ type: single }");
/// # struct PlannedSingle { patches: usize }
/// # impl PlannedMasker for PlannedSingle {
/// #     fn counts(&self) -> Counts { Counts { visible: 1, masked: self.patches - 1 } }
/// #     fn draw(&self, _: &MaskInput, rng: &mut Stream) -> Mask { unimplemented!() }
/// # }
///
/// let planned = Single {}.plan(Grid { rows: 2, columns: 3 })?;
/// assert_eq!(planned.counts(), Counts { visible: 1, masked: 5 });
/// # Ok::<(), Error>(())
/// ```
pub trait Masker: Send + Sync {
    /// Checks them against the student's patches, and gives what draws.
    ///
    /// # Errors
    /// Which option does not fit the grid.
    fn plan(&self, grid: Grid) -> Result<Box<dyn PlannedMasker>, Refusal>;

    /// The teacher whose attention is needed, by its name in the recipe.
    fn teacher(&self) -> Option<&str> {
        None
    }
}

/// A masker whose options fit.
///
/// ```
/// # use maskalign_core::prelude::*;
/// struct PlannedSingle {
///     patches: usize,
/// }
///
/// impl PlannedMasker for PlannedSingle {
///     fn counts(&self) -> Counts {
///         Counts { visible: 1, masked: self.patches - 1 }
///     }
///
///     fn draw(&self, _: &MaskInput, rng: &mut Stream) -> Mask {
///         let order = rng.permutation(self.patches).into_iter().map(|patch| patch as u32).collect();
///         split(order, self.counts())
///     }
/// }
///
/// let input = MaskInput { epoch: 0, image: 0, crop: 0, attention: &[] };
/// let mask = PlannedSingle { patches: 6 }.draw(&input, &mut Stream::new(0, "mask", 0, 0));
/// assert_eq!((mask.visible.len(), mask.masked.len()), (1, 5));
/// ```
pub trait PlannedMasker: Send + Sync {
    /// How many patches of each image stay visible and are predicted.
    fn counts(&self) -> Counts;

    /// The mask of one image; the stream is keyed by seed, epoch and image.
    fn draw(&self, input: &MaskInput, rng: &mut Stream) -> Mask;

    /// The masks of a micro-batch, with equally many visible and equally many predicted patches, but for a masker that is
    /// [uneven](PlannedMasker::uneven). Each image has its stream; `shared` is for what they have in common, and is keyed by
    /// seed, epoch and the first of them: the views of an image share it.
    fn draw_batch(&self, images: &[MaskInput], rngs: &mut [Stream], _shared: &mut Stream) -> Vec<Mask> {
        images.iter().zip(rngs).map(|(input, rng)| self.draw(input, rng)).collect()
    }

    /// In how many blocks of equal size an image's predicted patches come, one after another. What is in two blocks is
    /// predicted twice, and those of a block are predicted without a look at the others.
    fn blocks(&self) -> usize {
        1
    }

    /// Whether micro-batches have different counts: those of [`PlannedMasker::counts`] are about the most then.
    fn varies(&self) -> bool {
        false
    }

    /// Whether the images of a micro-batch have different counts; together their visible and predicted patches are all
    /// patches then, so that a student that shows mask tokens has equally many rows of each.
    fn uneven(&self) -> bool {
        false
    }
}

/// The visible and predicted counts that `ratio`, `visible` and `predict_ratio` mean for `patches` patches.
///
/// A ratio keeps `floor(N (1 - r))` patches, and of the rest `floor(N (r - predict_ratio))` are not predicted, both computed
/// in double precision as the official code does (MAE, MaskAlign; CrossMAE).
///
/// # Errors
/// None or several of them are given, or no mask of the patches has such counts; names the option.
///
/// ```
/// # use maskalign_core::prelude::*;
/// assert_eq!(counts("random", 196, Some(0.75), None, None, None)?, Counts { visible: 49, masked: 147 });
/// assert!(counts("random", 196, Some(0.75), Some(49), None, None).is_err());
/// # Ok::<(), Error>(())
/// ```
pub fn counts(
    masker: &str,
    patches: usize,
    ratio: Option<f64>,
    visible: Option<usize>,
    masked: Option<usize>,
    predict_ratio: Option<f64>,
) -> Result<Counts, Refusal> {
    let (option, visible) = match (ratio, visible, masked) {
        (Some(ratio), None, None) => ("ratio", (patches as f64 * (1.0 - ratio)) as usize),
        (None, Some(visible), None) => ("visible", visible),
        (None, None, Some(masked)) => ("masked", patches.saturating_sub(masked)),
        (None, None, None) => {
            return Err(Refusal::whole(format!("`{masker}` needs one of `ratio`, `visible` and `masked`")));
        }
        _ => {
            let second = if visible.is_some() { "visible" } else { "masked" };
            return Err(Refusal::new(second, "only one of `ratio`, `visible` and `masked` may be given")
                .related(["ratio"], "given here")
                .related(["visible"], "given here")
                .related(["masked"], "given here"));
        }
    };
    if visible == 0 {
        return Err(Refusal::new(option, format!("keeps none of {patches} patches: the student would see nothing")));
    }
    if visible > patches {
        return Err(Refusal::new(option, format!("{visible} visible patches, but an image has {patches}")));
    }
    let hidden = patches - visible;
    let masked = match predict_ratio {
        None => hidden,
        Some(share) => {
            // Where masked patches are counted, their share is that of the count.
            let masked = ratio.unwrap_or(hidden as f64 / patches as f64);
            if share > masked {
                let wanted = (patches as f64 * share).round() as usize;
                let message = format!("{wanted} patches to predict, but only {hidden} of {patches} are masked");
                return Err(Refusal::new("predict_ratio", message).related([option], "what is masked"));
            }
            hidden - (patches as f64 * (masked - share)) as usize
        }
    };
    Ok(Counts { visible, masked })
}

/// An order of the patches as a mask: the first `visible` are seen, the next are predicted. The predicted ones are
/// sorted, so that an order says no more than the choice.
///
/// ```
/// # use maskalign_core::prelude::*;
/// let mask = split(vec![4, 1, 3, 0, 2], Counts { visible: 2, masked: 2 });
/// assert_eq!(mask, Mask { visible: vec![4, 1], masked: vec![0, 3] });
/// ```
pub fn split(mut order: Vec<u32>, counts: Counts) -> Mask {
    let mut masked = order.split_off(counts.visible);
    masked.truncate(counts.masked);
    masked.sort_unstable();
    Mask { visible: order, masked }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers are torch's `int(N * (1 - ratio))`.
    #[test]
    fn ratios_keep_what_the_official_code_keeps() {
        for (patches, ratio, kept) in
            [(196, 0.7, 58), (196, 0.75, 49), (36, 0.7, 10), (36, 0.25, 27), (196, 0.0, 196), (49, 0.9, 4)]
        {
            let counts = counts("random", patches, Some(ratio), None, None, None).unwrap();
            assert_eq!(counts.visible, kept, "{patches} patches at {ratio}");
            assert_eq!(counts.masked, patches - kept);
        }
    }

    #[test]
    fn impossible_counts_name_the_option() {
        assert_eq!(counts("random", 49, Some(0.99), None, None, None).unwrap_err().path, ["ratio"]);
        assert_eq!(counts("random", 49, None, Some(50), None, None).unwrap_err().path, ["visible"]);
        assert_eq!(counts("random", 49, None, None, Some(49), None).unwrap_err().path, ["masked"]);
        assert_eq!(counts("random", 49, Some(0.5), None, None, Some(0.8)).unwrap_err().path, ["predict_ratio"]);
        assert_eq!(counts("random", 49, Some(0.5), Some(4), None, None).unwrap_err().path, ["visible"]);
        let none = counts("random", 49, None, None, None, None).unwrap_err();
        assert_eq!(none.message, "`random` needs one of `ratio`, `visible` and `masked`");
    }
}
