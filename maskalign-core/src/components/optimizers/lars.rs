//! LARS.

use maskalign_engine::{
    Context, Gradients, Result, Tensor,
    ops::optim::{self, LarsStep},
};
use maskalign_registry::{Refusal, Scalar};

use super::{Optimizer, Update, base_batch, check_weight_decay, linear_rule, no_weight_decay};
use crate::{component, nn::Param, register};

fn momentum() -> f64 {
    0.9
}
fn trust_coefficient() -> f64 {
    0.001
}

/// Gradient descent with momentum whose rate adapts to each tensor (arXiv 1708.03888), as MAE's and MaskAlign's linear
/// probes use it for their large batches: `trust_coefficient |p| / |g|` scales a tensor's gradient `g`.
///
/// Tensors of rank 1 or less (biases, norms) neither decay nor scale.
#[component]
struct Lars {
    /// Peak learning rate for a batch of `base_batch`; the rate is base_lr * effective batch / base_batch.
    #[schemars(range(min = 0.0))]
    base_lr: f64,
    /// Images that `base_lr` is meant for.
    #[serde(default = "base_batch")]
    #[schemars(range(min = 1))]
    base_batch: usize,
    /// Added to the gradient, times the parameter, before it is scaled.
    #[serde(default = "no_weight_decay")]
    weight_decay: Scalar,
    /// What is kept of the former direction.
    #[serde(default = "momentum")]
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1))]
    momentum: f64,
    /// Share of a tensor's length that one update moves it by, times the learning rate.
    #[serde(default = "trust_coefficient")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    trust_coefficient: f64,
}

impl Optimizer for Lars {
    fn peak_lr(&self, effective_batch: usize) -> f64 {
        linear_rule(self.base_lr, effective_batch, self.base_batch)
    }

    fn clip_norm(&self) -> Option<f64> {
        None
    }

    fn state_names(&self) -> &'static [&'static str] {
        &["mu"]
    }

    fn check(&self) -> Result<(), Refusal> {
        check_weight_decay(&self.weight_decay)
    }

    fn update(
        &self,
        cx: &Context,
        parameter: &mut Param,
        gradients: &Gradients,
        state: &mut [Tensor],
        u: Update,
    ) -> Result<()> {
        let [mu] = state else { unreachable!("one name, one tensor") };
        let adapts = parameter.dims.len() > 1;
        let step = LarsStep {
            lr: u.lr,
            momentum: self.momentum,
            weight_decay: self.weight_decay.at(u.progress),
            trust: adapts.then_some(self.trust_coefficient),
            gradient_scale: u.gradient_scale,
        };
        optim::lars(cx, &mut parameter.value, mu, gradients, step)
    }
}

register!(optimizer "lars" => Lars, "gradient descent with momentum whose rate adapts to each tensor",
    example: "{ type: lars, base_lr: 0.1 }", paper: "arXiv 1708.03888; MAE, arXiv 2111.06377, appendix A.1");
