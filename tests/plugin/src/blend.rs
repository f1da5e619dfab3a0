//! A loss.

use maskalign_core::prelude::*;

fn share() -> f32 {
    0.5
}

/// The absolute error, with a share of the squared error mixed in.
#[component]
pub struct Blend {
    /// Share of the squared error; the rest is the absolute error.
    #[serde(default = "share")]
    #[schemars(range(min = 0.0, max = 1.0))]
    squared: f32,
}

impl Loss for Blend {
    fn term(
        &self,
        cx: &Context,
        tape: &mut Tape,
        prediction: &Tensor,
        target: &Tensor,
    ) -> Result<Tensor> {
        let squared = ops::distance(cx, tape, prediction, target, Distance::Mse)?;
        let absolute = ops::distance(cx, tape, prediction, target, Distance::L1)?;
        ops::weighted_sum(cx, tape, &[squared, absolute], &[self.squared, 1.0 - self.squared])
    }
}

register!(loss "blend" => Blend, "a mix of squared and absolute error", example: "{ type: blend, squared: 0.5 }");
