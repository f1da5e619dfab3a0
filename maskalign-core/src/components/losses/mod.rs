//! The distance between an aligned output and its target.

mod cosine;
mod cross_entropy;
mod kl;
mod l1;
mod mse;
mod smooth_l1;

use maskalign_engine::{Context, Result, Tape, Tensor};

/// A loss.
///
/// ```
/// # use maskalign_core::{Device, prelude::*};
/// /// The squared error.
/// #[component]
/// struct Squared {}
///
/// impl Loss for Squared {
///     fn term(&self, cx: &Context, tape: &mut Tape, prediction: &Tensor, target: &Tensor) -> Result<Tensor> {
///         let difference = ops::sub(cx, tape, prediction, target)?;
///         let squares = ops::square(cx, tape, &difference)?;
///         ops::mean(cx, tape, &squares)
///     }
/// }
///
/// register!(loss "squared" => Squared, "the squared error", example: "{ type: squared }");
/// # let cx = Context::new(Device::Cpu, 1);
///
/// let (x, y) = (cx.tensor(vec![1.0, 4.0], 1, 2)?, cx.tensor(vec![1.0, 2.0], 1, 2)?);
/// assert_eq!(Squared {}.term(&cx, &mut Tape::training(), &x, &y)?.value(), 2.0);
/// # Ok::<(), Error>(())
/// ```
pub trait Loss: Send + Sync {
    /// The distance of predictions from targets, both `[rows, channels]`; the target takes no gradient.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn term(&self, cx: &Context, tape: &mut Tape, prediction: &Tensor, target: &Tensor) -> Result<Tensor>;
}
