//! The rule that updates parameters.

mod adamw;
mod lars;

use maskalign_engine::{Context, Gradients, Result, Tensor};
use maskalign_registry::{Refusal, Scalar};

use crate::nn::Param;

/// What changes from one update to the next.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// A decay of weights that grows in the course of the stage.
/// fn decay(decay: &Ramp, update: Update) -> f64 {
///     update.lr * decay.at(update.progress)
/// }
///
/// let update = Update { lr: 0.1, progress: 0.5, step: 50, gradient_scale: 1.0 };
/// assert_eq!(decay(&Ramp::Constant(0.5), update), 0.05);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Update {
    /// Learning rate of this parameter.
    pub lr: f64,
    /// Share of the stage that is done, in 0..=1, for options that change over time.
    pub progress: f64,
    /// Number of this update, from 1.
    pub step: u64,
    /// What gradients are multiplied by first (clipping).
    pub gradient_scale: f32,
}

/// An optimizer.
///
/// ```
/// # use maskalign_core::{Device, prelude::*};
/// /// Follows the sign of the gradient.
/// #[component]
/// struct Sign {
///     /// The length of a step.
///     lr: f64,
/// }
///
/// impl Optimizer for Sign {
///     fn peak_lr(&self, _: usize) -> f64 {
///         self.lr
///     }
///     fn clip_norm(&self) -> Option<f64> {
///         None
///     }
///     fn state_names(&self) -> &'static [&'static str] {
///         &[]
///     }
///     fn check(&self) -> Result<(), Refusal> {
///         Ok(())
///     }
///     fn update(&self, _: &Context, p: &mut Param, g: &Gradients, _: &mut [Tensor], u: Update) -> Result<()> {
///         let (values, gradient) = (p.value.to_vec(), g.to_vec(&p.value));
///         let next: Vec<f32> = values.iter().zip(&gradient).map(|(v, g)| v - u.lr as f32 * g.signum()).collect();
///         p.load(&next)
///     }
/// }
///
/// register!(optimizer "sign" => Sign, "the sign of the gradient", example: "{ type: sign, lr: 0.001 }");
/// # let cx = Context::new(Device::Cpu, 1);
/// # let mut p = Init::new(cx.device(), 0, "x").constant("w", &[1], 1.0)?;
/// # let mut tape = Tape::training();
/// # let loss = ops::square(&cx, &mut tape, &p.value)?;
/// # let gradients = tape.backward(&loss)?;
/// # let update = Update { lr: 0.5, progress: 0.0, step: 1, gradient_scale: 1.0 };
/// # Sign { lr: 0.5 }.update(&cx, &mut p, &gradients, &mut [], update)?;
/// # assert_eq!(p.value.to_vec(), [0.5]);
/// # Ok::<(), Error>(())
/// ```
pub trait Optimizer: Send + Sync {
    /// Peak learning rate for an effective batch.
    fn peak_lr(&self, effective_batch: usize) -> f64;
    /// The gradient norm beyond which gradients are scaled down.
    fn clip_norm(&self) -> Option<f64>;
    /// The norm beyond which the gradient of one parameter is scaled down, each by itself.
    fn clip_each(&self) -> Option<f64> {
        None
    }
    /// Names of the tensors kept for each parameter, as checkpoints call them.
    fn state_names(&self) -> &'static [&'static str];
    /// Refuses options that contradict each other.
    ///
    /// # Errors
    /// Names the option.
    fn check(&self) -> Result<(), Refusal>;
    /// Updates one parameter in place; `state` has one vector for each of [`Optimizer::state_names`], zero at
    /// first.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn update(
        &self,
        cx: &Context,
        parameter: &mut Param,
        gradients: &Gradients,
        state: &mut [Tensor],
        update: Update,
    ) -> Result<()>;
}

/// The peak learning rate of a batch by the linear rule (arXiv 1706.02677): `base_lr` is meant for `base_batch` images.
fn linear_rule(base_lr: f64, effective_batch: usize, base_batch: usize) -> f64 {
    base_lr * effective_batch as f64 / base_batch as f64
}

/// The images that papers mean `base_lr` for.
fn base_batch() -> usize {
    256
}

fn no_weight_decay() -> Scalar {
    Scalar::Constant(0.0)
}

/// Refuses a weight decay that is negative at any time.
fn check_weight_decay(weight_decay: &Scalar) -> Result<(), Refusal> {
    match weight_decay.bounds().0 < 0.0 {
        true => Err(Refusal::new("weight_decay", format!("must not be negative, found {weight_decay}"))),
        false => Ok(()),
    }
}
