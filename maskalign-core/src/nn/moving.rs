//! Moving averages of modules.

use maskalign_engine::{Context, Result, Tensor, ops::optim};

use super::Module;

/// Gives a module the values of another that is built alike. They are shared until one of the two changes.
pub(crate) fn begin_as(copy: &mut dyn Module, source: &mut dyn Module) {
    let mut values = values(source).into_iter();
    copy.visit(&mut |p| {
        if let Some((value, _)) = values.next() {
            p.value = value;
        }
    });
}

/// Moves what is trained of a module: `copy = momentum copy + (1 - momentum) source`, where both are built alike.
///
/// # Errors
/// Out of memory on the device.
pub(crate) fn follow(cx: &Context, copy: &mut dyn Module, source: &mut dyn Module, momentum: f64) -> Result<()> {
    if momentum == 1.0 {
        // It stays as it is.
        return Ok(());
    }
    let mut values = values(source).into_iter();
    let mut outcome = Ok(());
    copy.visit(&mut |p| {
        let Some((value, is_trained)) = values.next() else { return };
        // What does not change is its own mean, to the bit.
        if is_trained && outcome.is_ok() {
            outcome = optim::ema(cx, &mut p.value, &value, momentum);
        }
    });
    outcome
}

/// The values of a module in their order, and whether updates change them.
fn values(module: &mut dyn Module) -> Vec<(Tensor, bool)> {
    let mut all = Vec::new();
    module.visit(&mut |p| all.push((p.value.clone().detached(), p.is_trained())));
    all
}
