//! A masker.

use maskalign_core::prelude::*;

/// Keeps one patch of every `cell` x `cell` square, at an offset drawn per image.
#[component]
pub struct Lattice {
    /// Side of the square in patches.
    #[schemars(range(min = 2))]
    cell: usize,
}

impl Masker for Lattice {
    fn plan(&self, grid: Grid) -> Result<Box<dyn PlannedMasker>, Refusal> {
        if self.cell > grid.rows.max(grid.columns) {
            return Err(Refusal::new(
                "cell",
                format!("a square of {} patches in a grid of {grid}", self.cell),
            ));
        }
        Ok(Box::new(Squares {
            grid,
            cell: self.cell,
            down: grid.rows.div_ceil(self.cell),
            across: grid.columns.div_ceil(self.cell),
        }))
    }
}

/// A grid in squares; those at the far edges may be cut off.
struct Squares {
    grid: Grid,
    cell: usize,
    down: usize,
    across: usize,
}

impl PlannedMasker for Squares {
    fn counts(&self) -> Counts {
        let visible = self.down * self.across;
        Counts {
            visible,
            masked: self.grid.patches() - visible,
        }
    }

    fn draw(&self, _: &MaskInput, rng: &mut Stream) -> Mask {
        let Squares { grid, cell, down, across } = *self;
        let mut visible = Vec::new();
        for square in 0..down * across {
            let (top, left) = (square / across * cell, square % across * cell);
            let row = top + rng.below(cell.min(grid.rows - top));
            let column = left + rng.below(cell.min(grid.columns - left));
            visible.push((row * grid.columns + column) as u32);
        }
        let masked = (0..grid.patches() as u32)
            .filter(|patch| !visible.contains(patch))
            .collect();
        Mask { visible, masked }
    }
}

register!(masker "lattice" => Lattice, "keeps one patch of every square", example: "{ type: lattice, cell: 2 }");
