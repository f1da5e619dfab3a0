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

impl LossPlugin for Blend {
    fn term<D: Dev>(
        &self,
        cx: &Context<D>,
        r: &mut Recorder<D>,
        prediction: &Matrix<D>,
        target: &Matrix<D>,
    ) -> Result<Scalar<D>> {
        let squared = cx.kernels.distance(r, prediction, target, Distance::Mse)?;
        let absolute = cx.kernels.distance(r, prediction, target, Distance::L1)?;
        cx.kernels
            .weighted_sum(r, &[squared, absolute], &[self.squared, 1.0 - self.squared])
    }
}

register!(loss "blend" => Blend, "a mix of squared and absolute error", example: "{ type: blend, squared: 0.5 }");
