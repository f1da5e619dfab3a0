//! The pixels of the patches.

use maskalign_engine::{Context, Result, Tape, Tensor, ops};
use maskalign_registry::Refusal;

use super::{ImageTarget, Normalize, PlannedTarget, Target, TargetContext, TargetInput, TargetSource};
use crate::{
    component,
    components::towers::{TowerShape, input as tower_input},
    register,
};

/// The pixels of each patch in the student's statistics, ordered row, column, channel (MAE, arXiv 2111.06377).
#[component]
struct Pixels {
    /// How each patch is normalised; `standardize` is MAE's `norm_pix_loss`.
    #[serde(default)]
    normalize: Normalize,
}

impl Target for Pixels {
    fn plan(&self, cx: &TargetContext) -> Result<PlannedTarget, Refusal> {
        if cx.tokens.cls {
            return Err(Refusal::whole("the class token has no pixels")
                .beside(["tokens"], "`cls` is asked for here")
                .help("leave `cls` out of `tokens`"));
        }
        let patch = cx.student.arch.patch;
        Ok(PlannedTarget {
            outputs: 1,
            depth: 1,
            levels: vec![0],
            width: 3 * patch * patch,
            source: TargetSource::Images(Box::new(PlannedPixels { normalize: self.normalize, student: cx.student })),
        })
    }
}

/// The patches of a student.
struct PlannedPixels {
    normalize: Normalize,
    student: TowerShape,
}

impl ImageTarget for PlannedPixels {
    fn outputs(&self, cx: &Context, input: &TargetInput) -> Result<Vec<Tensor>> {
        let (student, masks) = (self.student, input.masks);
        let (tower, patch) = (tower_input(student.image_size, student.statistics), student.arch.patch);
        let width = 3 * patch * patch;
        let wanted = masks.rows(input.tokens, false);
        let matrix = |patches: Option<&[u32]>| -> Result<Tensor> {
            let pixels = channels_last(&tower.patchify(cx, input.images, patch, patches), width);
            let rows = pixels.len() / width;
            cx.tensor(pixels, rows, width)
        };
        if !self.normalize.needs_every_token() {
            return Ok(vec![self.normalize.apply(cx, &matrix(Some(&wanted))?)?]);
        }
        let all = self.normalize.apply(cx, &matrix(None)?)?;
        let rows = masks.rows_among(input.tokens, false, student.grid.patches());
        Ok(vec![ops::gather_rows(cx, &mut Tape::inference(), &[&all], &rows)?])
    }
}

/// Rows of channel, row, column as rows of row, column, channel.
fn channels_last(planes: &[f32], width: usize) -> Vec<f32> {
    let area = width / 3;
    let mut out = Vec::with_capacity(planes.len());
    for patch in planes.chunks_exact(width) {
        out.extend((0..area).flat_map(|i| [patch[i], patch[area + i], patch[2 * area + i]]));
    }
    out
}

register!(target "pixels" => Pixels, "the pixels of the patches",
    example: "{ type: pixels, normalize: standardize }", paper: "MAE, arXiv 2111.06377");
