//! What training stages share: options, optimizer steps, checkpoints, and the loop.

mod average;
mod best;
mod failing;
mod options;
mod run;
mod trainer;

pub use average::MovingAverage;
pub use best::{Best, EvalMetric};
pub use options::{BatchSize, Checkpoints, Length, PlannedTraining, Precision, Training};
pub(in crate::stages) use run::load_kept;
pub(crate) use run::noted_best;
pub use run::{EpochEvaluation, Loop, Trained, finish, train};
pub(super) use trainer::saved_parameters;
pub(in crate::stages) use trainer::{DROP_PATH, branch_scales_of};
pub use trainer::{ForwardTimes, MicroBatch, Phases, Step, Task, Term, Trainer, branch_scales, count_parameters};
