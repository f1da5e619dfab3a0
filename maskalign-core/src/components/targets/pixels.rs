//! The pixels of the patches.

use maskalign_engine::{
    Context, Result, Tape, Tensor,
    ops::{self, flat_rows},
};
use maskalign_registry::Refusal;

use super::{Normalize, Target, TargetContext, TargetInput, TargetPlan};
use crate::{
    component,
    components::towers::{Tap, input},
    register,
};

/// The pixels of each patch in the student's statistics, ordered row, column, channel (MAE, arXiv 2111.06377).
#[component]
pub struct Pixels {
    /// How each patch is normalised; `standardize` is MAE's `norm_pix_loss`.
    #[serde(default)]
    normalize: Normalize,
}

impl Target for Pixels {
    fn plan(&self, cx: &TargetContext) -> Result<TargetPlan, Refusal> {
        if cx.tokens.cls {
            return Err(Refusal::whole("the class token has no pixels")
                .beside(["tokens"], "`cls` is asked for here")
                .help("leave `cls` out of `tokens`"));
        }
        let patch = cx.student.arch.patch;
        Ok(TargetPlan {
            teacher: None,
            levels: vec![0],
            outputs: 1,
            depth: 1,
            width: 3 * patch * patch,
            tap: Tap::Block,
            whole: self.normalize == Normalize::StandardizeBatch,
        })
    }

    fn outputs(&self, cx: &Context, plan: &TargetPlan, input_: &TargetInput) -> Result<Vec<Tensor>> {
        let TargetInput { images, masks, student, .. } = *input_;
        let tower = input(student.image_size, student.statistics);
        let wanted = masks.rows(input_.tokens, false);
        let matrix = |patches: Option<&[u32]>| -> Result<Tensor> {
            let planes = tower.patchify(cx, images, student.arch.patch, patches);
            let pixels = channels_last(&planes, plan.width);
            let rows = pixels.len() / plan.width;
            cx.tensor(pixels, rows, plan.width)
        };
        if !plan.whole {
            return Ok(vec![self.normalize.apply(cx, &matrix(Some(&wanted))?)?]);
        }
        let all = self.normalize.apply(cx, &matrix(None)?)?;
        let rows = flat_rows(&wanted, masks.batch, student.grid.patches());
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
