//! What happens in a run: one stream of events, and the sinks that take it.
//!
//! A sink is one file that implements [`Sink`]. An error of a sink ends the run: a metric that could not be written is
//! missing for good. On resume every sink is rewound to where the checkpoint was made.

mod metrics;
mod summary;

use std::path::Path;

use serde::Serialize;
use serde_json::Value;

pub use metrics::MetricsFile;
pub use summary::StageSummary;

use crate::error::Result;

/// Something that happened.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A stage begins, or goes on.
    StageStarted {
        /// Its name.
        stage: &'a str,
        /// What is known of it.
        summary: &'a StageSummary,
    },
    /// An update was made.
    Step(&'a StepReport),
    /// A result that a stage has while it trains, such as the accuracy after an epoch.
    Evaluated(&'a Evaluation),
    /// A part of a stage's results, as soon as it is there.
    Result {
        /// The stage.
        stage: &'a str,
        /// The numbers, by name.
        result: &'a Value,
    },
    /// Work without an update goes on: `done` of `all` units.
    Progress {
        /// What is counted.
        what: &'a str,
        /// So many are done.
        done: u64,
        /// Of so many.
        all: u64,
    },
    /// A checkpoint was written.
    Saved {
        /// The file.
        path: &'a Path,
    },
    /// What is no mistake, but may not be meant.
    Warned {
        /// The stage.
        stage: &'a str,
        /// One sentence.
        text: &'a str,
    },
    /// A stage is finished.
    StageEnded {
        /// Its name.
        stage: &'a str,
        /// Its results.
        results: &'a Value,
    },
}

impl Event<'_> {
    /// Whether it is a measurement, which stays in the run's records.
    pub fn is_recorded(&self) -> bool {
        matches!(self, Event::Step(_) | Event::Evaluated(_))
    }
}

/// One optimizer step, as metrics and progress bars show it.
#[derive(Clone, Debug, Serialize)]
pub struct StepReport {
    /// The stage.
    pub stage: String,
    /// The step, from 0.
    pub step: u64,
    /// Steps of the stage.
    #[serde(skip)]
    pub steps: u64,
    /// The fractional epoch at which the step began.
    pub epoch: f64,
    /// The loss, averaged over the effective batch.
    pub loss: f32,
    /// The learning rate.
    pub lr: f64,
    /// Norm of all gradients together, before clipping.
    pub gradient_norm: f64,
    /// Images of the effective batch per second.
    pub images_per_s: f64,
    /// Images that could not be read so far, where they are skipped.
    pub skipped: usize,
}

/// A result that a stage has while it trains.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// The stage.
    pub stage: String,
    /// The number of steps that were done.
    pub step: u64,
    /// Epochs that were done.
    pub epoch: f64,
    /// What was measured, such as `knn`.
    pub name: String,
    /// The numbers, by name.
    pub result: Value,
}

/// Where a run stands: how many recorded events there are, and in which stage and step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark<'a> {
    /// Recorded events since the run began.
    pub records: u64,
    /// The stage.
    pub stage: &'a str,
    /// Updates of that stage.
    pub step: u64,
}

/// Takes the events of a run.
pub trait Sink {
    /// Takes one event.
    ///
    /// # Errors
    /// What could not be kept; the run ends with it.
    fn handle(&mut self, event: &Event) -> Result<()>;

    /// Forgets what was recorded after the mark: the run goes on from there, and the same events come again.
    ///
    /// # Errors
    /// What could not be undone.
    fn rewind(&mut self, _to: Mark) -> Result<()> {
        Ok(())
    }

    /// Makes what was recorded last: a checkpoint that counts it is about to be written.
    ///
    /// # Errors
    /// What could not be kept.
    fn sync(&mut self) -> Result<()> {
        Ok(())
    }
}

/// The stream of a run.
pub struct Events<'a> {
    sinks: Vec<Box<dyn Sink + 'a>>,
    records: u64,
}

impl<'a> Events<'a> {
    /// A stream into some sinks, which are told of each event in this order.
    pub fn new(sinks: Vec<Box<dyn Sink + 'a>>) -> Self {
        Events { sinks, records: 0 }
    }

    /// How many recorded events there are, for checkpoints.
    pub fn records(&self) -> u64 {
        self.records
    }

    /// Tells every sink.
    ///
    /// # Errors
    /// The first sink's that fails.
    pub fn send(&mut self, event: Event) -> Result<()> {
        self.records += u64::from(event.is_recorded());
        self.sinks.iter_mut().try_for_each(|sink| sink.handle(&event))
    }

    /// Goes back, or on, to where a checkpoint or a finished stage was.
    ///
    /// # Errors
    /// The first sink's that fails.
    pub fn rewind(&mut self, to: Mark) -> Result<()> {
        self.records = to.records;
        self.sinks.iter_mut().try_for_each(|sink| sink.rewind(to))
    }

    /// Makes what was recorded last.
    ///
    /// # Errors
    /// The first sink's that fails.
    pub fn sync(&mut self) -> Result<()> {
        self.sinks.iter_mut().try_for_each(|sink| sink.sync())
    }
}
