//! `pictures/`: what stages show, as PNG and SVG files.

use super::{Drawing, Event, Picture, Sink};
use crate::{
    chart::{Curve, End, curves},
    error::Result,
    run::{CURVE, PictureFormat, PictureRecord, RunDir, read_series},
};

/// What each stage that trains has a curve of: its name, its path in `metrics.jsonl`, its title, and what stands for its end.
const CURVES: [(&str, &str, &str, End); 2] =
    [("loss", "loss", "Loss", End::MeanOfEpoch), ("rate", "lr", "Learning rate", End::Last)];

/// The folder of pictures in a run directory.
pub struct PicturesFolder<'a> {
    dir: &'a RunDir,
}

impl<'a> PicturesFolder<'a> {
    /// The sink of a directory; nothing is made yet.
    pub fn new(dir: &'a RunDir) -> Self {
        PicturesFolder { dir }
    }

    fn write(&self, picture: &Picture) -> Result<()> {
        let Picture { stage, name, caption, drawing } = picture;
        let (format, file) = match drawing {
            Drawing::Chart(chart) => (PictureFormat::Svg, chart.file().into_bytes()),
            Drawing::Image(image) => (PictureFormat::Png, picture.png(image)?),
        };
        let record = PictureRecord { stage: stage.clone(), name: name.clone(), caption: caption.clone(), format };
        Ok(self.dir.write_picture(&record, &file)?)
    }

    /// The curves of a stage that trained.
    fn curves(&self, ended: &str) -> Result<()> {
        let wanted = |stage: &str, path: &str| stage == ended && CURVES.iter().any(|(_, wanted, ..)| *wanted == path);
        // What is damaged is left out: others tell of it.
        let (stages, _) = read_series(self.dir.path(), &wanted)?;
        for (name, path, title, end) in CURVES {
            let points = stages.first().and_then(|(_, series)| series.get(path)).cloned().unwrap_or_default();
            if let Some(chart) = curves(title, &[Curve { name: title.to_lowercase(), points, end }]) {
                let (stage, name) = (ended.to_owned(), format!("{CURVE}{name}"));
                self.write(&Picture {
                    stage,
                    name,
                    caption: chart.label().to_owned(),
                    drawing: Drawing::Chart(chart),
                })?;
            }
        }
        Ok(())
    }
}

impl Sink for PicturesFolder<'_> {
    fn handle(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::Picture(picture) => self.write(picture),
            Event::Trained { stage } => self.curves(stage),
            _ => Ok(()),
        }
    }

    fn takes_pictures(&self) -> bool {
        true
    }
}
