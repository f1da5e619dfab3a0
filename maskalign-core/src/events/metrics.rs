//! `metrics.jsonl`: one line for each recorded event.

use serde::Serialize;
use serde_json::{Value, json};

use super::{Evaluation, Event, Mark, Sink};
use crate::{
    error::Result,
    run::{Metrics, RunDir},
};

/// The record of a part of a stage's results.
pub(super) fn result_record(stage: &str, result: &Value) -> Value {
    let mut record = json!({ "stage": stage });
    if let (Value::Object(record), Value::Object(result)) = (&mut record, result) {
        result.iter().for_each(|(name, value)| _ = record.insert(name.clone(), value.clone()));
    }
    record
}

/// The metrics file of a run directory.
pub struct MetricsFile<'a> {
    dir: &'a RunDir,
    /// Opened when the first stage says where it begins, which cuts off what a resumed run will write again.
    file: Option<Metrics>,
}

impl<'a> MetricsFile<'a> {
    /// The sink of a directory; nothing is opened yet.
    pub fn new(dir: &'a RunDir) -> Self {
        MetricsFile { dir, file: None }
    }

    fn append(&mut self, record: &impl Serialize) -> Result<()> {
        // The stream rewinds before a stage's first record.
        Ok(self.file.as_mut().map_or(Ok(()), |file| file.append(record))?)
    }
}

impl Sink for MetricsFile<'_> {
    fn handle(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::Step(report) => self.append(report),
            Event::Evaluated(Evaluation { stage, step, epoch, name, result }) => {
                self.append(&json!({ "stage": stage, "step": step, "epoch": epoch, name: result }))
            }
            Event::Result { stage, result } => self.append(&result_record(stage, result)),
            _ => Ok(()),
        }
    }

    fn rewind(&mut self, to: Mark) -> Result<()> {
        // Closed first: the file is opened again at that length.
        self.file = None;
        self.file = Some(self.dir.metrics(to.records)?);
        Ok(())
    }

    fn sync(&mut self) -> Result<()> {
        match &self.file {
            Some(file) => Ok(self.dir.mark_metrics(file.sync()?)?),
            None => Ok(()),
        }
    }
}
