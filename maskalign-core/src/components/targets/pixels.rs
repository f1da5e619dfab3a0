//! The pixels of the patches.

use maskalign_registry::Refusal;

use super::{Normalize, TargetContext, TargetInput, TargetPlan, TargetPlugin};
use crate::{
    component,
    components::towers::{Tap, input},
    context::Context,
    device::{Dev, Matrix},
    error::{Result, device},
    kernels::flat_rows,
    register,
};

/// The pixels of each patch in the student's statistics, ordered row, column, channel (MAE, arXiv 2111.06377).
#[component]
pub struct Pixels {
    /// How each patch is normalised; `standardize` is MAE's `norm_pix_loss`.
    #[serde(default)]
    normalize: Normalize,
}

impl TargetPlugin for Pixels {
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

    fn outputs<D: Dev>(&self, cx: &Context<D>, plan: &TargetPlan, input_: &TargetInput<D>) -> Result<Vec<Matrix<D>>> {
        let TargetInput { images, masks, student, .. } = *input_;
        let tower = input(student.image_size, student.statistics);
        let wanted = masks.rows(input_.tokens, false);
        let matrix = |patches: Option<&[u32]>| -> Result<Matrix<D>> {
            let planes = tower.patchify(&*cx.kernels, images, student.arch.patch, patches);
            let pixels = channels_last(&planes, plan.width);
            let rows = pixels.len() / plan.width;
            cx.dev.try_tensor_from_vec(pixels, (rows, plan.width)).map_err(device)
        };
        if !plan.whole {
            return Ok(vec![self.normalize.apply(cx, &matrix(Some(&wanted))?)?]);
        }
        let all = self.normalize.apply(cx, &matrix(None)?)?;
        let rows = flat_rows(&wanted, masks.batch, student.grid.patches());
        Ok(vec![cx.kernels.gather_rows(&mut crate::tape::Recorder::inference(), &[all], &rows)?])
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
