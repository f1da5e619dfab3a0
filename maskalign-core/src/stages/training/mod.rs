//! What training stages share: options, optimizer steps, checkpoints, and the loop.

mod options;
mod run;
mod trainer;

pub use options::{BatchSize, Checkpoints, Length, PlannedTraining, Precision, Training};
pub use run::{EpochEvaluation, Loop, Trained, finish, train};
pub(super) use trainer::saved_parameters;
pub use trainer::{ForwardTimes, MicroBatch, Phases, Step, Task, Term, Trainer, branch_scales, count_parameters};
