//! Images that come with the program.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::idx::{Part, Unpacked, read_images, read_labels};
use crate::data::{Dataset, Images};
use maskalign_registry::Refusal;

/// A part of Fashion-MNIST inside the program: 5,600 images to train on and 1,000 to test with, 28 x 28 grey, 10 classes.
///
/// Made by `scripts/make_sample.py`; the classes take turns, so that any first part is balanced. Copyright 2017 Zalando
/// SE, MIT licence: see `data/fashion_mnist/LICENSE`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sample {
    /// Which part: no image is in both.
    pub split: Split,
    /// How many images to take at most, from the first on. Default: all.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub limit: Option<usize>,
}

/// A part of the sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub enum Split {
    /// 5,600 images from Fashion-MNIST's training part.
    Train,
    /// 1,000 images from Fashion-MNIST's test part.
    Test,
}

macro_rules! embedded {
    ($file:literal) => {
        include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/data/fashion_mnist/", $file))
    };
}

const CLASSES: [&str; 10] =
    ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"];

impl Dataset for Sample {
    fn open(&self) -> Result<Box<dyn Images>, Refusal> {
        if self.limit == Some(0) {
            return Err(Refusal::new("limit", "expected at least 1 image, found 0"));
        }
        let (images, labels, name): (&[u8], &[u8], _) = match self.split {
            Split::Train => (embedded!("train-images.idx.gz"), embedded!("train-labels.idx.gz"), "training"),
            Split::Test => (embedded!("test-images.idx.gz"), embedded!("test-labels.idx.gz"), "test"),
        };
        let damaged = |message: String| Refusal::new("split", format!("the embedded images are damaged: {message}"));
        let part = Part { skip: 0, limit: self.limit };
        let unpack =
            |bytes: &'static [u8]| Unpacked::new(bytes, bytes.len() as u64).map_err(|error| damaged(error.to_string()));
        let (mut data, _) = read_images(&mut unpack(images)?, part).map_err(damaged)?;
        data.labels = Some(read_labels(&mut unpack(labels)?, part).map_err(damaged)?.0);
        data.classes = Some(CLASSES.map(String::from).to_vec());
        data.file = format!("the embedded {name} images");
        Ok(Box::new(data))
    }

    fn needs_files(&self) -> bool {
        false
    }
}

crate::register!(dataset "sample" => Sample, "a part of Fashion-MNIST inside the program, 28 x 28 pixels",
    example: "{ type: sample, split: train }", paper: "Fashion-MNIST, arXiv 1708.07747");
