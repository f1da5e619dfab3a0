//! The learning rate over time, set at every optimizer step from the fractional epoch.

mod constant;
mod cosine;
mod multistep;

use maskalign_engine::Result;
use maskalign_registry::{Refusal, source::number};

/// A learning rate over time.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// A straight line to zero.
/// #[component]
/// struct Line {}
///
/// impl Schedule for Line {
///     fn rate(&self, peak: f64, epoch: f64, epochs: f64) -> f64 {
///         peak * (1.0 - epoch / epochs)
///     }
///     fn check(&self, _: f64, _: f64) -> Result<(), Refusal> {
///         Ok(())
///     }
/// }
///
/// register!(schedule "line" => Line, "a straight line to zero", example: "{ type: line }");
///
/// assert_eq!(Line {}.rate(0.1, 5.0, 10.0), 0.05);
/// ```
pub trait Schedule: Send + Sync {
    /// The rate at `epoch` (fractional, from 0) of `epochs`, for a peak rate of `peak`.
    fn rate(&self, peak: f64, epoch: f64, epochs: f64) -> f64;

    /// Refuses options that do not fit the stage's length, or the peak rate of its batch.
    ///
    /// # Errors
    /// Names the option.
    fn check(&self, epochs: f64, peak: f64) -> Result<(), Refusal>;
}

/// A linear warm-up from `from` to `peak`, or `None` once it is over.
fn warmup(from: f64, peak: f64, epoch: f64, warmup_epochs: f64) -> Option<f64> {
    (epoch < warmup_epochs).then(|| from + (peak - from) * epoch / warmup_epochs)
}

/// Refuses a rate before or after the peak that lies above it.
fn check_below_peak(option: &str, rate: f64, peak: f64) -> Result<(), Refusal> {
    if rate > peak {
        let message = format!("a rate of {} is above the peak, which is {} for this batch", number(rate), number(peak));
        return Err(Refusal::new(option, message)
            .in_stage(["optimizer", "base_lr"], "the peak for a batch of `base_batch` images")
            .help("the peak is base_lr * effective batch / base_batch: lower this rate, or raise `base_lr`"));
    }
    Ok(())
}

/// Refuses a warm-up longer than the stage.
fn check_warmup(warmup_epochs: f64, epochs: f64) -> Result<(), Refusal> {
    if warmup_epochs > epochs {
        return Err(Refusal::new(
            "warmup_epochs",
            format!("a warm-up of {} epochs is longer than the schedule of {}", number(warmup_epochs), number(epochs)),
        )
        .in_stage(["epochs"], "the stage's length"));
    }
    Ok(())
}
