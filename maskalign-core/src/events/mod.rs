//! What happens in a run: one stream of events, and the sinks that take it.
//!
//! A sink is one file that implements [`Sink`]. An error of a sink ends the run: a metric that could not be written is
//! missing for good. On resume every sink is rewound to where the checkpoint was made.

mod metrics;
mod pictures;
mod summary;
mod tensorboard;

use std::{collections::BTreeMap, path::Path};

use serde::{Serialize, Serializer};
use serde_json::Value;

pub use metrics::MetricsFile;
pub use pictures::PicturesFolder;
pub use summary::{SavedParameter, StageSummary};
pub use tensorboard::TensorBoardFile;

use crate::{
    chart::Chart,
    data::{RgbImage, png},
    error::{Error, Result},
};

/// Something that happened.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// A line for a log.
/// fn line(event: &Event) -> Option<String> {
///     match event {
///         Event::Saved { path } => Some(format!("saved {}", path.display())),
///         Event::Warned { stage, text } => Some(format!("{stage}: {text}")),
///         _ => None,
///     }
/// }
///
/// let event = Event::Warned { stage: "pretrain", text: "3 images were left out" };
/// assert_eq!((line(&event), event.is_recorded()), (Some("pretrain: 3 images were left out".into()), false));
/// ```
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
    /// A part of a stage's results, as soon as it is there. A stage that trains sends these after its training;
    /// what it has before is [evaluated](Event::Evaluated).
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
    /// A stage shows what it does.
    Picture(&'a Picture),
    /// A stage has made its updates. What it leaves is written after this: a run that is killed in between comes here again.
    Trained {
        /// Its name.
        stage: &'a str,
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
        matches!(self, Event::Step(_) | Event::Evaluated(_) | Event::Result { .. })
    }
}

/// Where the time of a step went, in seconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct StepSeconds {
    /// Waiting for images.
    pub data: f64,
    /// Teachers and targets.
    pub teacher: f64,
    /// Drawing masks.
    pub mask: f64,
    /// The student's forward pass, alignments and losses.
    pub student: f64,
    /// The backward pass.
    pub backward: f64,
    /// Gradient norm and update.
    pub optimizer: f64,
}

/// One optimizer step, as metrics and progress bars show it.
#[derive(Clone, Debug, Default, Serialize)]
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
    /// What each of its terms adds to it; empty where none has a name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub terms: BTreeMap<String, f64>,
    /// The distances that terms are made of, by term and level, where a term has several.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub levels: BTreeMap<String, BTreeMap<usize, f64>>,
    /// The learning rate.
    pub lr: f64,
    /// The learning rates of groups of parameters, where they differ.
    #[serde(skip_serializing_if = "Vec::is_empty", serialize_with = "as_mapping")]
    pub lr_groups: Vec<(String, f64)>,
    /// Norm of all gradients together, before clipping.
    pub gradient_norm: f64,
    /// Where the time went.
    pub seconds: StepSeconds,
    /// Images of the effective batch per second.
    pub images_per_s: f64,
    /// Images that could not be read so far, where they are skipped.
    pub skipped: usize,
}

fn as_mapping<S: Serializer>(pairs: &[(String, f64)], s: S) -> std::result::Result<S::Ok, S::Error> {
    s.collect_map(pairs.iter().map(|(name, value)| (name, value)))
}

/// A picture of what a stage does, for people. A later one of the same stage and name replaces it.
#[derive(Clone, Debug)]
pub struct Picture {
    /// The stage.
    pub stage: String,
    /// What it is called: letters, digits, `-` and `_`.
    pub name: String,
    /// What there is to see, in a sentence.
    pub caption: String,
    /// The picture.
    pub drawing: Drawing,
}

impl Picture {
    /// Its pixels as a PNG file.
    ///
    /// # Errors
    /// An image that the format cannot hold.
    fn png(&self, image: &RgbImage) -> Result<Vec<u8>> {
        png(image).map_err(|error| Error::Usage(format!("the picture `{}` cannot be written: {error}", self.name)))
    }
}

/// What a picture is made of.
#[derive(Clone, Debug)]
pub enum Drawing {
    /// Pixels.
    Image(RgbImage),
    /// Lines, marks and text.
    Chart(Chart),
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
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// Losses by record, cut back to where a checkpoint was made.
/// fn rewind(losses: &mut Vec<f32>, to: Mark) {
///     losses.truncate(to.records as usize);
/// }
///
/// let mut losses = vec![3.0, 2.0, 1.0];
/// rewind(&mut losses, Mark { records: 2, stage: "pretrain", step: 2 });
/// assert_eq!(losses, [3.0, 2.0]);
/// ```
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
///
/// ```
/// # use maskalign_core::prelude::*;
/// use std::cell::Cell;
///
/// /// Counts checkpoints.
/// struct Count<'a>(&'a Cell<usize>);
///
/// impl Sink for Count<'_> {
///     fn handle(&mut self, event: &Event) -> Result<(), Error> {
///         if let Event::Saved { .. } = event {
///             self.0.set(self.0.get() + 1);
///         }
///         Ok(())
///     }
/// }
///
/// let saved = Cell::new(0);
/// let mut events = Events::new(vec![Box::new(Count(&saved))]);
/// events.send(Event::Saved { path: "final.safetensors".as_ref() })?;
/// assert_eq!(saved.get(), 1);
/// # Ok::<(), Error>(())
/// ```
pub trait Sink {
    /// Takes one event.
    ///
    /// # Errors
    /// What could not be kept; the run ends with it.
    fn handle(&mut self, event: &Event) -> Result<()>;

    /// Whether it keeps pictures: where no sink does, none are made.
    fn takes_pictures(&self) -> bool {
        false
    }

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
///
/// ```
/// # use maskalign_core::prelude::*;
/// let mut events = Events::new(Vec::new());
/// events.send(Event::Progress { what: "images", done: 3, all: 9 })?;
/// assert_eq!(events.records(), 0, "progress is no measurement");
/// # Ok::<(), Error>(())
/// ```
pub struct Events<'a> {
    sinks: Vec<Box<dyn Sink + 'a>>,
    records: u64,
    /// The stage that began, until its first measurement or picture: its sinks still hold those of an earlier attempt.
    begun: Option<String>,
}

impl<'a> Events<'a> {
    /// A stream into some sinks, which are told of each event in this order.
    pub fn new(sinks: Vec<Box<dyn Sink + 'a>>) -> Self {
        Events { sinks, records: 0, begun: None }
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
        if let Event::StageStarted { stage, .. } = event {
            self.begun = Some(stage.to_string());
        }
        // Pictures are no measurements, but sinks that keep them hold those of an earlier attempt too.
        if (event.is_recorded() || matches!(event, Event::Picture(_)))
            && let Some(stage) = self.begun.take()
        {
            self.rewind(Mark { records: self.records, stage: &stage, step: 0 })?;
        }
        self.records += u64::from(event.is_recorded());
        self.sinks.iter_mut().try_for_each(|sink| sink.handle(&event))?;
        match event {
            // Nothing else makes it last: a stage that trains nothing writes no checkpoint.
            Event::Result { .. } => self.sync(),
            _ => Ok(()),
        }
    }

    /// Whether pictures are kept.
    pub fn take_pictures(&self) -> bool {
        self.sinks.iter().any(|sink| sink.takes_pictures())
    }

    /// Passes over a stage that an earlier attempt finished: what it recorded stays.
    pub fn pass_over(&mut self, records: u64) {
        self.records = records;
    }

    /// Goes back to where a checkpoint was made.
    ///
    /// # Errors
    /// The first sink's that fails.
    pub fn rewind(&mut self, to: Mark) -> Result<()> {
        (self.records, self.begun) = (to.records, None);
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

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, rc::Rc};

    use super::*;
    use crate::error::Error;

    /// Notes what it is told; fails at a step.
    struct Notes {
        told: Rc<RefCell<Vec<String>>>,
        fails_at: u64,
    }

    impl Sink for Notes {
        fn handle(&mut self, event: &Event) -> Result<()> {
            match event {
                Event::Step(report) if report.step == self.fails_at => Err(Error::Usage("the disk is full".into())),
                Event::Step(report) => {
                    self.told.borrow_mut().push(format!("step {}", report.step));
                    Ok(())
                }
                _ => Ok(()),
            }
        }

        fn rewind(&mut self, to: Mark) -> Result<()> {
            self.told.borrow_mut().push(format!("rewind to {} records, {} step {}", to.records, to.stage, to.step));
            Ok(())
        }
    }

    fn step(step: u64) -> StepReport {
        let stage = "train".to_string();
        StepReport { stage, step, steps: 9, epoch: 0.0, loss: 1.0, lr: 0.1, images_per_s: 1.0, ..StepReport::default() }
    }

    #[test]
    fn a_sink_that_fails_ends_the_stream_and_sinks_are_rewound_before_a_stage_records() {
        let told = Rc::default();
        let mut events = Events::new(vec![Box::new(Notes { told: Rc::clone(&told), fails_at: 7 })]);
        events.pass_over(4);
        let summary = StageSummary::default();
        events.send(Event::StageStarted { stage: "train", summary: &summary }).unwrap();
        for at in 0..2 {
            events.send(Event::Step(&step(at))).unwrap();
        }
        assert_eq!(events.records(), 6);
        events.rewind(Mark { records: 5, stage: "train", step: 1 }).unwrap();
        events.send(Event::Step(&step(1))).unwrap();
        assert_eq!(events.records(), 6);
        let error = events.send(Event::Step(&step(7))).unwrap_err();
        assert_eq!(error.to_string(), "the disk is full");
        let expected =
            ["rewind to 4 records, train step 0", "step 0", "step 1", "rewind to 5 records, train step 1", "step 1"];
        assert_eq!(*told.borrow(), expected);
    }
}
