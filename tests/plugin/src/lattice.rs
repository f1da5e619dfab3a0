//! A masker.

use maskalign_core::prelude::*;

/// Keeps one patch of every `cell` x `cell` square, at an offset drawn per image.
#[component]
pub struct Lattice {
    /// Side of the square in patches.
    #[schemars(range(min = 2))]
    cell: usize,
}

impl Lattice {
    /// Squares from top to bottom and from left to right; those at the far edges may be cut off.
    fn squares(&self, grid: Grid) -> (usize, usize) {
        (
            grid.rows.div_ceil(self.cell),
            grid.columns.div_ceil(self.cell),
        )
    }
}

impl Masker for Lattice {
    fn plan(&self, grid: Grid) -> Result<Counts, Refusal> {
        if self.cell > grid.rows.max(grid.columns) {
            return Err(Refusal::new(
                "cell",
                format!("a square of {} patches in a grid of {grid}", self.cell),
            ));
        }
        let (down, across) = self.squares(grid);
        let visible = down * across;
        Ok(Counts {
            visible,
            masked: grid.patches() - visible,
        })
    }

    fn draw(&self, input: &MaskInput, rng: &mut Stream) -> Mask {
        let grid = input.grid;
        let (down, across) = self.squares(grid);
        let mut visible = Vec::new();
        for square in 0..down * across {
            let (top, left) = (square / across * self.cell, square % across * self.cell);
            let row = top + rng.below(self.cell.min(grid.rows - top));
            let column = left + rng.below(self.cell.min(grid.columns - left));
            visible.push((row * grid.columns + column) as u32);
        }
        let masked = (0..grid.patches() as u32)
            .filter(|patch| !visible.contains(patch))
            .collect();
        Mask { visible, masked }
    }
}

register!(masker "lattice" => Lattice, "keeps one patch of every square", example: "{ type: lattice, cell: 2 }");
