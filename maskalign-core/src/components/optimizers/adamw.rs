//! AdamW.

use maskalign_engine::{
    Context, Gradients, Result, Tensor,
    ops::optim::{self, AdamStep},
};
use maskalign_registry::{Refusal, Scalar};

use super::{Optimizer, Update, base_batch, check_weight_decay, linear_rule, no_weight_decay};
use crate::{component, nn::Param, register};

fn betas() -> [f64; 2] {
    [0.9, 0.999]
}
fn eps() -> f64 {
    1e-8
}

/// Adam with decoupled weight decay (arXiv 1711.05101), in PyTorch's order of operations.
///
/// Tensors of rank 1 or less and biases never decay (the official rule).
#[component]
struct AdamW {
    /// Peak learning rate for a batch of `base_batch`; the rate is base_lr * effective batch / base_batch.
    #[schemars(range(min = 0.0))]
    base_lr: f64,
    /// Images that `base_lr` is meant for.
    #[serde(default = "base_batch")]
    #[schemars(range(min = 1))]
    base_batch: usize,
    /// Decoupled weight decay.
    #[serde(default = "no_weight_decay")]
    weight_decay: Scalar,
    /// Decay rates of the first and second moment.
    #[serde(default = "betas")]
    #[schemars(inner(range(min = 0.0, max = 1.0)))]
    betas: [f64; 2],
    /// Added to the root of the second moment.
    #[serde(default = "eps")]
    #[schemars(range(min = 0.0))]
    eps: f64,
    /// Largest norm of all gradients together; larger ones are scaled down. Absent: no clipping.
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0))]
    clip_norm: Option<f64>,
    /// Largest norm of the gradient of each parameter by itself, as DINO's code clips. Absent: no such clipping.
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0))]
    clip_each: Option<f64>,
    /// Further parameters that do not decay: beginnings or ends of names.
    #[serde(default)]
    #[schemars(inner(length(min = 1)))]
    no_decay: Vec<String>,
}

impl AdamW {
    fn decays(&self, parameter: &Param) -> bool {
        let name = &parameter.name;
        let spared = parameter.dims.len() <= 1
            || name.rsplit_once('.').is_some_and(|(_, own)| own == "bias")
            || self.no_decay.iter().any(|part| name.ends_with(part) || name.starts_with(part));
        !spared
    }
}

impl Optimizer for AdamW {
    fn peak_lr(&self, effective_batch: usize) -> f64 {
        linear_rule(self.base_lr, effective_batch, self.base_batch)
    }

    fn clip_norm(&self) -> Option<f64> {
        self.clip_norm
    }

    fn clip_each(&self) -> Option<f64> {
        self.clip_each
    }

    fn state_names(&self) -> &'static [&'static str] {
        &["exp_avg", "exp_avg_sq"]
    }

    fn check(&self) -> Result<(), Refusal> {
        check_weight_decay(&self.weight_decay)?;
        if self.clip_each.is_some() && self.clip_norm.is_some() {
            return Err(Refusal::new("clip_each", "gradients are clipped all together already")
                .related(["clip_norm"], "given here")
                .help("keep one of the two"));
        }
        match self.betas.iter().position(|&beta| beta >= 1.0) {
            Some(i) => {
                let message = format!("expected a decay rate below 1, found {}", self.betas[i]);
                Err(Refusal::new(i.to_string(), message).under("betas"))
            }
            None => Ok(()),
        }
    }

    fn update(
        &self,
        cx: &Context,
        parameter: &mut Param,
        gradients: &Gradients,
        state: &mut [Tensor],
        u: Update,
    ) -> Result<()> {
        let [first, second] = state else { unreachable!("two names, two vectors") };
        let weight_decay = if self.decays(parameter) { self.weight_decay.at(u.progress) } else { 0.0 };
        let step = AdamStep {
            lr: u.lr,
            betas: (self.betas[0], self.betas[1]),
            eps: self.eps,
            weight_decay,
            step: u.step,
            gradient_scale: u.gradient_scale,
        };
        optim::adamw(cx, &mut parameter.value, [first, second], gradients, step)
    }
}

register!(optimizer "adamw" => AdamW, "Adam with decoupled weight decay",
    example: "{ type: adamw, base_lr: 1.5e-4, weight_decay: 0.05, betas: [0.9, 0.95] }", paper: "arXiv 1711.05101");
