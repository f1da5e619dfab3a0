//! A run's directory: what was asked, what was measured, and where to go on.
//!
//! ```text
//! DIR/
//!   .maskalign-run                         marks the folder, holds the lock, lists extra files of the run
//!   recipe.resolved.yaml                   the recipe with every default
//!   manifest.json                          where, when and with what the run was made
//!   metrics.jsonl                          one record a line, appended
//!   metrics.marks.json                     how far that was at each checkpoint, and its checksum up to there
//!   tensorboard/                           the same for TensorBoard, where that is asked for
//!   summary.json                           each finished stage's results under its name
//!   pictures/                              what stages show of a few images, and an index of it
//!   report.html                            results and curves as a page, written when the run ends
//!   checkpoints/STAGE/step-00001234.safetensors
//!   checkpoints/STAGE/best-00001234.safetensors   the best state so far, where it is kept
//!   checkpoints/STAGE/failed-00001234.safetensors the state before a step whose loss or gradient is not finite
//!   checkpoints/STAGE/failed-00001234.json what is known of that step
//!   checkpoints/STAGE/final.safetensors    the stage's outcome
//!   checkpoints/STAGE/done.json            the stage is finished; its results
//! ```
//!
//! Every file but `metrics.jsonl` and TensorBoard's appears whole or not at all ([`atomic_write`]); those two are cut back
//! to the checkpoint's position on resume. So a process may be killed at any moment, and the run goes on from its last
//! checkpoint. What steers it then is under a checksum: checkpoints whole, the manifest, `done.json`, the marks, and by them
//! the metrics; what is not as it was written is passed over for an older checkpoint, or refused. Nothing here knows tensors of a device: weights pass as `f32` slices.

mod check;
mod clock;
mod compare;
mod directory;
mod failed;
mod manifest;
mod metrics;
mod overview;
mod pictures;
mod seal;
mod spread;
mod stop;

pub use check::{Findings, Item, check};
pub(crate) use clock::this_moment;
pub use compare::{
    Aim, BadLines, Difference, Metric, Record, Series, aim, columns, differences, measured, read_records, read_series,
    results,
};
pub use directory::{FinishedStage, Mode, RunDir, is_in_checkpoints};
pub(crate) use failed::number;
pub use failed::{BadParameter, FailedBatch, FailedStep, FirstOperator, OPERATORS_BEFORE, OperatorRecord};
pub(crate) use manifest::as_text;
pub use manifest::{BestRecord, DataRecord, FileRecord, Manifest, Origin, Resumption, STOPPED_EARLY, StageRecord};
pub use metrics::{Metrics, MetricsMark};
pub use overview::{Headline, Overview, Position, RunState, find, overview};
pub use pictures::{CURVE, PictureFormat, PictureRecord, pictures};
pub(crate) use spread::moments;
pub use spread::{Spread, spread};
pub use stop::{Stop, StopFlag};

pub use crate::{
    files::{RunError, atomic_write, fail_point},
    weights::{Checkpoint, CheckpointHeader, Retention},
};
