//! Histograms of oriented gradients.

use std::{
    f32::consts::PI,
    sync::{Mutex, PoisonError},
};

use maskalign_engine::{Context, Result, Tensor};
use maskalign_registry::Refusal;

use super::{ImageTarget, PlannedTarget, Target, TargetContext, TargetInput, TargetSource};
use crate::{
    component,
    components::towers::{TowerShape, input as tower_input},
    register,
};

/// Colours, each with gradients of its own.
const COLOURS: usize = 3;

fn bins() -> usize {
    9
}

/// Histograms of oriented gradients (HOG) of the image in the student's statistics (MaskFeat, arXiv 2112.09133): Sobel's
/// derivatives of each colour, mirrored at the border; in each cell, the magnitudes by their angle modulo half a turn, scaled to
/// length 1. A patch's values are ordered colour, bin, row and column of its cells.
///
/// Without MaskFeat's Gaussian window, which its code for images does not use either, and without the overlapping blocks of
/// Dalal and Triggs.
#[component]
struct Hog {
    /// Side of a cell in pixels, which divides the student's patch; absent: half a patch, or all of one whose side is odd.
    #[serde(default)]
    #[schemars(range(min = 1))]
    cell: Option<usize>,
    /// Bins of half a turn.
    #[serde(default = "bins")]
    #[schemars(range(min = 1, max = 360))]
    bins: usize,
}

impl Target for Hog {
    fn plan(&self, cx: &TargetContext) -> Result<PlannedTarget, Refusal> {
        if cx.tokens.cls {
            return Err(Refusal::whole("the class token has no gradients")
                .beside(["tokens"], "`cls` is asked for here")
                .help("leave `cls` out of `tokens`"));
        }
        let patch = cx.student.arch.patch;
        let cell = self.cell.unwrap_or(if patch.is_multiple_of(2) { patch / 2 } else { patch });
        if !patch.is_multiple_of(cell) {
            return Err(Refusal::new(
                "cell",
                format!("patches of {patch} pixels are not a whole number of cells of {cell}"),
            )
            .in_stage(["student", "arch"], "the student's patches"));
        }
        if cx.student.image_size < 2 {
            return Err(Refusal::whole("an image of one pixel has no gradients"));
        }
        let cells = (patch / cell).pow(2);
        Ok(PlannedTarget {
            outputs: 1,
            depth: 1,
            levels: vec![0],
            width: COLOURS * self.bins * cells,
            source: TargetSource::Images(Box::new(PlannedHog { cell, bins: self.bins, student: cx.student })),
        })
    }
}

/// Cells that fit a student's patches.
struct PlannedHog {
    cell: usize,
    bins: usize,
    student: TowerShape,
}

impl PlannedHog {
    /// Adds the histogram of one cell of a plane, whose upper left pixel is `(top, left)`; one bin every `stride` values.
    fn cell(&self, plane: &[f32], (top, left): (usize, usize), out: &mut [f32], stride: usize) {
        let size = self.student.image_size;
        // Mirrored at the border without repeating it.
        let before = |i: usize| if i == 0 { 1 } else { i - 1 };
        let after = |i: usize| if i + 1 == size { size - 2 } else { i + 1 };
        for y in top..top + self.cell {
            let [above, here, below] = [before(y), y, after(y)].map(|y| &plane[y * size..][..size]);
            for x in left..left + self.cell {
                let (west, east) = (before(x), after(x));
                // Differences first: those of equal pixels are exactly none.
                let across =
                    (above[west] - above[east]) + 2.0 * (here[west] - here[east]) + (below[west] - below[east]);
                let down = (above[west] - below[west]) + 2.0 * (above[x] - below[x]) + (above[east] - below[east]);
                let turn = (across.atan2(down) / PI * self.bins as f32).floor() as isize;
                out[turn.rem_euclid(self.bins as isize) as usize * stride] += across.hypot(down);
            }
        }
        let length = (0..self.bins).map(|bin| out[bin * stride].powi(2)).sum::<f32>().sqrt().max(1e-12);
        (0..self.bins).for_each(|bin| out[bin * stride] /= length);
    }

    /// The values of one patch.
    fn patch(&self, planes: &[f32], patch: usize, out: &mut [f32]) {
        let (side, columns, area) =
            (self.student.arch.patch, self.student.grid.columns, self.student.image_size.pow(2));
        let (top, left, each) = (patch / columns * side, patch % columns * side, side / self.cell);
        for (plane, out) in planes.chunks_exact(area).zip(out.chunks_exact_mut(self.bins * each * each)) {
            for cell in 0..each * each {
                let corner = (top + cell / each * self.cell, left + cell % each * self.cell);
                self.cell(plane, corner, &mut out[cell..], each * each);
            }
        }
    }
}

impl ImageTarget for PlannedHog {
    fn outputs(&self, cx: &Context, input: &TargetInput) -> Result<Vec<Tensor>> {
        let (student, masks) = (self.student, input.masks);
        let size = student.image_size;
        let width = COLOURS * self.bins * (student.arch.patch / self.cell).pow(2);
        // One patch that is the whole image: its normalised planes.
        let planes = tower_input(size, student.statistics).patchify(cx, input.images, size, None);
        let wanted = masks.rows(input.tokens, false);
        let each = wanted.len() / masks.batch;
        let mut rows = vec![0.0; wanted.len() * width];
        {
            let images: Vec<Mutex<&mut [f32]>> = rows.chunks_exact_mut(each * width).map(Mutex::new).collect();
            cx.pool().run(images.len(), &|image| {
                let mut rows = images[image].lock().unwrap_or_else(PoisonError::into_inner);
                let planes = &planes[image * COLOURS * size * size..][..COLOURS * size * size];
                for (row, &patch) in rows.chunks_exact_mut(width).zip(&wanted[image * each..]) {
                    self.patch(planes, patch as usize, row);
                }
            });
        }
        Ok(vec![cx.tensor(rows, wanted.len(), width)?])
    }
}

register!(target "hog" => Hog, "histograms of oriented gradients",
    example: "{ type: hog }", paper: "MaskFeat, arXiv 2112.09133");

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use maskalign_engine::{Device, ImageBatch};

    use super::*;
    use crate::{
        components::{
            maskers::Counts,
            tokens::{Masks, Tokens},
        },
        nn::{Arch, VitConfig},
    };

    fn planned(text: &str, tokens: Tokens) -> Result<PlannedTarget, Refusal> {
        let arch = Arch { dim: 8, depth: 1, heads: 2, mlp: 8, patch: 4 };
        let student = TowerShape::from(&VitConfig::plain(arch, 8));
        let hog: Hog = serde_json::from_str(text).expect("options");
        let counts = Counts { visible: 2, masked: 2 };
        hog.plan(&TargetContext { student, teachers: &BTreeMap::default(), tokens, counts })
    }

    const MASKED: Tokens = Tokens { cls: false, visible: false, masked: true };

    /// Along a slope, all of a cell's length is in the bin of its direction; a colour that is even has none.
    #[test]
    fn a_slope_has_one_direction() {
        let cx = Context::new(Device::Cpu, 2);
        let TargetSource::Images(target) = planned("{}", MASKED).unwrap().source else { panic!("of images") };
        let masks = Masks::even(1, vec![1, 2, 3], vec![0]);
        for (slope, bin) in [((0.0, 0.1), 4), ((0.1, 0.0), 0), ((0.1, 0.1), 2), ((0.1, -0.1), 6)] {
            let red = |i: usize| 0.5 + slope.0 * (i / 8) as f32 + slope.1 * (i % 8) as f32;
            let pixels = (0..64).map(red).chain([0.5; 128]).collect();
            let images = ImageBatch { pixels, batch: 1, size: 8 };
            let input = TargetInput { images: &images, masks: &masks, tokens: MASKED };
            let found = target.outputs(&cx, &input).unwrap()[0].to_vec();
            // The last of the patch's 2x2 cells does not touch the border of the image.
            let cell: Vec<f32> = found.iter().skip(3).step_by(4).copied().collect();
            let expected = |i: usize| if i == bin { 1.0 } else { 0.0 };
            assert!((0..27).all(|i| (cell[i] - expected(i)).abs() < 1e-6), "{slope:?}: {cell:?}");
        }
    }

    #[test]
    fn cells_that_do_not_fit_are_refused() {
        assert_eq!(planned(r#"{ "cell": 3 }"#, MASKED).map(drop).unwrap_err().path, ["cell"]);
        assert!(planned("{}", Tokens { cls: true, ..MASKED }).is_err());
        assert_eq!(planned(r#"{ "cell": 4, "bins": 6 }"#, MASKED).unwrap().width, 18);
    }
}
