//! `pictures/`: what stages show, as PNG files.

use super::{Event, Picture, Sink};
use crate::{
    data::png,
    error::{Error, Result},
    run::{PictureRecord, RunDir},
};

/// The folder of pictures in a run directory.
pub struct PicturesFolder<'a> {
    dir: &'a RunDir,
}

impl<'a> PicturesFolder<'a> {
    /// The sink of a directory; nothing is made yet.
    pub fn new(dir: &'a RunDir) -> Self {
        PicturesFolder { dir }
    }
}

impl Sink for PicturesFolder<'_> {
    fn handle(&mut self, event: &Event) -> Result<()> {
        let Event::Picture(Picture { stage, name, caption, image }) = event else { return Ok(()) };
        let file =
            png(image).map_err(|error| Error::Usage(format!("the picture `{name}` cannot be written: {error}")))?;
        let record = PictureRecord { stage: stage.clone(), name: name.clone(), caption: caption.clone() };
        Ok(self.dir.write_picture(&record, &file)?)
    }

    fn takes_pictures(&self) -> bool {
        true
    }
}
