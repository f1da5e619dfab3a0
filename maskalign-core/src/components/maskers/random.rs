//! A uniform choice of patches.

use maskalign_engine::{Result, random::Stream};
use maskalign_registry::Refusal;

use super::{Counts, Mask, MaskInput, Masker, PlannedMasker, counts, split};
use crate::{component, nn::Grid, register};

fn cell() -> usize {
    1
}

/// Keeps patches chosen uniformly, in random order (MAE, arXiv 2111.06377, section 3), or squares of patches (SimMIM, arXiv
/// 2111.09886, section 3.2).
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
    /// Side in patches of the squares that are kept or masked whole; shares are then of squares.
    #[serde(default = "cell")]
    #[schemars(range(min = 1))]
    cell: usize,
}

impl RandomMasker {
    /// A number of patches as one of squares.
    fn squares(&self, option: &str, patches: Option<usize>) -> Result<Option<usize>, Refusal> {
        let area = self.cell.pow(2);
        match patches {
            Some(patches) if !patches.is_multiple_of(area) => {
                let message = format!("{patches} patches are not a whole number of squares of {area}");
                Err(Refusal::new(option, message).related(["cell"], "the side of a square"))
            }
            patches => Ok(patches.map(|patches| patches / area)),
        }
    }
}

impl Masker for RandomMasker {
    fn plan(&self, grid: Grid) -> Result<Box<dyn PlannedMasker>, Refusal> {
        let cell = self.cell;
        if ![grid.rows, grid.columns].iter().all(|side| side.is_multiple_of(cell)) {
            let message = format!("{grid} patches are not a whole number of squares of {cell}x{cell}");
            return Err(Refusal::new("cell", message).help("a side of the grid must be a multiple of it"));
        }
        let (visible, masked) = (self.squares("visible", self.visible)?, self.squares("masked", self.masked)?);
        let squares = grid.patches() / cell.pow(2);
        let chosen =
            counts("random", squares, self.ratio, visible, masked, self.predict_ratio).map_err(|mut refusal| {
                if cell > 1 {
                    refusal.message = refusal.message.replace("patches", "squares");
                }
                refusal
            })?;
        let counts = Counts { visible: chosen.visible * cell.pow(2), masked: chosen.masked * cell.pow(2) };
        Ok(Box::new(PlannedRandom { counts, squares, cell, columns: grid.columns }))
    }
}

/// Counts that fit a grid.
struct PlannedRandom {
    counts: Counts,
    squares: usize,
    cell: usize,
    columns: usize,
}

impl PlannedRandom {
    /// The patches of a square, row by row.
    fn patches(&self, square: usize) -> impl Iterator<Item = u32> {
        let (cell, columns) = (self.cell, self.columns);
        let across = columns / cell;
        let first = square / across * cell * columns + square % across * cell;
        (0..cell.pow(2)).map(move |i| (first + i / cell * columns + i % cell) as u32)
    }
}

impl PlannedMasker for PlannedRandom {
    fn counts(&self) -> Counts {
        self.counts
    }

    fn draw(&self, _: &MaskInput, rng: &mut Stream) -> Mask {
        let order = rng.permutation(self.squares).into_iter().flat_map(|square| self.patches(square)).collect();
        split(order, self.counts)
    }
}

register!(masker "random" => RandomMasker, "keeps patches chosen uniformly",
    example: "{ type: random, ratio: 0.75 }", paper: "MAE, arXiv 2111.06377, section 3");

#[cfg(test)]
mod tests {
    use super::*;

    fn squares(text: &str, side: usize) -> Result<Box<dyn PlannedMasker>, Refusal> {
        let masker: RandomMasker = serde_json::from_str(text).expect("options");
        masker.plan(Grid { rows: side, columns: side })
    }

    /// SimMIM's code masks ceil(49 * 0.6) = 30 squares of four patches.
    #[test]
    fn squares_are_masked_whole_and_each_as_often() {
        let planned = squares(r#"{ "ratio": 0.6, "cell": 2 }"#, 14).unwrap();
        assert_eq!(planned.counts(), Counts { visible: 76, masked: 120 });
        let input = MaskInput { epoch: 0, image: 0, crop: 0, attention: &[] };
        let mut often = [0; 49];
        for image in 0..5000 {
            let Mask { visible, masked } = planned.draw(&input, &mut Stream::new(5, "mask", 0, image));
            let mut all = [&visible[..], &masked].concat();
            all.sort_unstable();
            assert_eq!(all, (0..196).collect::<Vec<_>>());
            let square = |patch: &u32| (patch / 28 * 7 + patch % 14 / 2) as usize;
            let mut of = [0; 49];
            for patch in &masked {
                of[square(patch)] += 1;
            }
            assert!(of.iter().all(|&patches| patches == 0 || patches == 4), "{of:?}");
            of.iter().zip(&mut often).for_each(|(patches, often)| *often += patches / 4);
        }
        for times in often {
            let share = f64::from(times) / 5000.0;
            assert!((share - 30.0 / 49.0).abs() < 0.03, "{share}");
        }
    }

    #[test]
    fn squares_that_do_not_fit_are_refused() {
        for (text, option) in [
            (r#"{ "ratio": 0.6, "cell": 3 }"#, "cell"),
            (r#"{ "masked": 30, "cell": 2 }"#, "masked"),
            (r#"{ "visible": 30, "cell": 2 }"#, "visible"),
        ] {
            assert_eq!(squares(text, 14).map(drop).unwrap_err().path, [option], "{text}");
        }
        let refusal = squares(r#"{ "ratio": 0.99, "cell": 2 }"#, 14).map(drop).unwrap_err();
        assert_eq!(refusal.message, "keeps none of 49 squares: the student would see nothing");
    }
}
