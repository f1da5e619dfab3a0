//! Images: where they come from, what is done to each, and how batches of them reach the towers.
//!
//! All of it works on host memory, one image at a time, with a random stream keyed by the image
//! ([`Stream`]): no tensors, and nothing depends on threads or batches. What leaves is RGB in
//! [0, 1]; each tower resizes and normalises for itself.

use std::path::PathBuf;

use crate::files::{is_wrong_path, shown};
use crate::random::Stream;
use maskalign_registry::Refusal;

pub mod affine;
pub mod amount;
mod blur;
pub mod datasets;
pub mod decode;
pub mod fill;
pub mod image;
pub mod loader;
pub mod regular_file;
pub mod resample;
pub mod sheet;
pub mod size;
mod tone;
pub mod transforms;

#[cfg(test)]
mod tests;

pub use self::affine::Sampling;
pub use self::amount::Amount;
pub use self::fill::Fill;
pub use self::image::{Crop, RgbImage};
pub use self::loader::{Batch, Loader, LoaderConfig, OnError, Order, Position, ViewCrop};
pub use self::resample::Interpolation;
pub use self::sheet::{jpeg, png, sheet};
pub use self::size::Size;

/// Where images come from: the options of a dataset component.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// Grey images without content.
/// #[component]
/// struct Grey {
///     /// How many.
///     images: usize,
/// }
///
/// impl Dataset for Grey {
///     fn open(&self) -> Result<Box<dyn Images>, Refusal> {
///         Ok(Box::new(OpenGrey(self.images)))
///     }
///
///     fn needs_files(&self) -> bool {
///         false
///     }
/// }
///
/// register!(dataset "grey" => Grey, "grey images", example: "{ type: grey, images: 9 }");
/// # struct OpenGrey(usize);
/// # impl Images for OpenGrey {
/// #     fn len(&self) -> usize { self.0 }
/// #     fn image(&self, _: usize) -> Result<RgbImage, DataError> { unimplemented!() }
/// #     fn label(&self, _: usize) -> Option<u32> { None }
/// #     fn classes(&self) -> Option<Vec<String>> { None }
/// #     fn name(&self, index: usize) -> String { format!("grey {index}") }
/// #     fn size(&self) -> Option<(usize, usize)> { None }
/// #     fn fingerprint(&self) -> String { format!("grey {}", self.0) }
/// # }
///
/// assert_eq!(Grey { images: 9 }.open()?.len(), 9);
/// # Ok::<(), Error>(())
/// ```
pub trait Dataset: Send + Sync {
    /// Opens the data: reads lists and headers, not images.
    ///
    /// # Errors
    /// The option that names something missing, unreadable or malformed, with the place and the way out.
    fn open(&self) -> Result<Box<dyn Images>, Refusal>;

    /// Whether it reads files that a recipe has to name. `validate --no-environment` does not open such a dataset.
    fn needs_files(&self) -> bool;
}

/// A dataset that is open: images by index.
///
/// ```
/// # use maskalign_core::prelude::*;
/// struct Grey(usize);
///
/// impl Images for Grey {
///     fn len(&self) -> usize {
///         self.0
///     }
///     fn image(&self, _: usize) -> Result<RgbImage, DataError> {
///         Ok(RgbImage::from_grey(8, 8, &[128; 64]))
///     }
///     fn label(&self, _: usize) -> Option<u32> {
///         None
///     }
///     fn classes(&self) -> Option<Vec<String>> {
///         None
///     }
///     fn name(&self, index: usize) -> String {
///         format!("grey {index}")
///     }
///     fn size(&self) -> Option<(usize, usize)> {
///         Some((8, 8))
///     }
///     fn fingerprint(&self) -> String {
///         format!("grey {}", self.0)
///     }
/// }
///
/// assert_eq!(Grey(9).image(3).expect("it is drawn").size(), (8, 8));
/// ```
pub trait Images: Send + Sync {
    /// Number of images.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads one image; `index` is less than [`len`](Images::len).
    ///
    /// # Errors
    /// Names the image and what is wrong with it.
    fn image(&self, index: usize) -> Result<RgbImage, DataError>;

    /// The class of an image, counted from 0, where it has one.
    fn label(&self, index: usize) -> Option<u32>;

    /// The names of the classes by label, where they are known.
    fn classes(&self) -> Option<Vec<String>>;

    /// What messages call an image: its path, or its number and where it is.
    fn name(&self, index: usize) -> String;

    /// `(width, height)` of every image in pixels, where one size holds for all and is known before reading.
    fn size(&self) -> Option<(usize, usize)>;

    /// BLAKE3 in hexadecimal of the list: names, labels and sizes, not pixels of files.
    fn fingerprint(&self) -> String;

    /// What was left out, or may not be meant: a sentence each, with counts. For warnings.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }

    /// Bytes of pixels that lie in memory as long as the images are open; for estimates.
    fn resident_bytes(&self) -> u64 {
        0
    }
}

/// Changes one image: the options of a transform component.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// Darkens an image by a share that is drawn.
/// #[component]
/// struct Darken {}
///
/// impl Transform for Darken {
///     fn apply(&self, mut image: RgbImage, rng: &mut Stream) -> RgbImage {
///         let share = rng.uniform();
///         image.pixels.iter_mut().for_each(|value| *value = (*value as f64 * share) as u8);
///         image
///     }
///     fn output_size(&self, input: Option<(usize, usize)>) -> Option<(usize, usize)> {
///         input
///     }
///     fn check(&self) -> Result<(), Refusal> {
///         Ok(())
///     }
/// }
///
/// register!(transform "darken" => Darken, "darkens an image", example: "{ type: darken }");
///
/// let white = RgbImage::from_grey(1, 1, &[255]);
/// assert!(Darken {}.apply(white, &mut Stream::new(0, "augment", 0, 0)).pixels[0] < 255);
/// ```
pub trait Transform: Send + Sync {
    /// The changed image. Draws from `rng` alone, which is keyed by the image and the epoch.
    fn apply(&self, image: RgbImage, rng: &mut Stream) -> RgbImage;

    /// Changes what all transforms together have made, as `[3, height, width]` numbers in [0, 1]: for those that draw
    /// values which eight bits cannot hold. `rng` is keyed like that of [`apply`](Transform::apply), but another.
    fn apply_planes(&self, _planes: &mut [f32], _size: (usize, usize), _rng: &mut Stream) {}

    /// `(width, height)` after it, given the size before it; `None` where that depends on the image.
    fn output_size(&self, input: Option<(usize, usize)>) -> Option<(usize, usize)>;

    /// Whether the options make sense together.
    ///
    /// # Errors
    /// The option at fault and what it may be.
    fn check(&self) -> Result<(), Refusal>;
}

/// `(width, height)` in pixels after a chain of transforms, `None` where it depends on the image.
pub fn output_size(transforms: &[Box<dyn Transform>], input: Option<(usize, usize)>) -> Option<(usize, usize)> {
    transforms.iter().fold(input, |size, transform| transform.output_size(size))
}

/// Why an image, or a batch of them, is not to be had.
///
/// ```
/// # use maskalign_core::prelude::*;
/// let error = DataError::Other("image 7 is not in the archive; list it anew".into());
/// assert!(error.is_user_mistake());
/// assert_eq!(error.to_string(), "image 7 is not in the archive; list it anew");
/// ```
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The file is not there or cannot be read.
    #[error("cannot read {path}: {source}", path = shown(path))]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Something else is in the file's place; it was not opened.
    #[error("{path} is {what}, not a file; remove it, or set `on_error: skip`", path = shown(path))]
    NotAFile {
        /// The path.
        path: PathBuf,
        /// What it is, with its article.
        what: &'static str,
    },
    /// The file ends too early.
    #[error("{path} is truncated: {message}; get the file again, or set `on_error: skip`", path = shown(path))]
    Truncated {
        /// The file.
        path: PathBuf,
        /// What is missing.
        message: String,
    },
    /// The file is not an image, or a broken one.
    #[error("{path} is not an image that can be read: {message}; remove it, or set `on_error: skip`", path = shown(path))]
    Decode {
        /// The file.
        path: PathBuf,
        /// What the decoder said.
        message: String,
    },
    /// The image is larger than [`decode::MAX_PIXELS`].
    #[error(
        "{path} is too large: {width} x {height} pixels, where {limit} are the limit; make it smaller, or set `on_error: skip`",
        path = shown(path), limit = decode::MAX_PIXELS
    )]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Columns.
        width: usize,
        /// Rows.
        height: usize,
    },
    /// The images of one batch have different sizes.
    #[error(
        "{name} is {} x {} pixels after the transforms, where {} x {} was expected; end `transforms` with one that fixes the size, such as `center_crop`",
        got.0, got.1, expected.0, expected.1
    )]
    SizeDiffers {
        /// The image.
        name: String,
        /// Its width and height.
        got: (usize, usize),
        /// The width and height of the batch.
        expected: (usize, usize),
    },
    /// A dataset or a transform panicked: a bug in that component.
    #[error("a dataset or transform panicked on {name}: {message}; this is a bug in that component")]
    Panicked {
        /// The image.
        name: String,
        /// The panic's message.
        message: String,
    },
    /// With `on_error: skip`, too many images in a row cannot be read.
    #[error("{count} images in a row cannot be read, {name} the last of them: {source}")]
    NothingReadable {
        /// How many were tried.
        count: usize,
        /// The last image tried.
        name: String,
        /// What was wrong with it.
        source: Box<DataError>,
    },
    /// A dataset's own failure that fits none of the above; the message names the image.
    #[error("{0}")]
    Other(String),
}

impl DataError {
    /// Whether the user can put it right with other images or transforms (exit code 2); else it is a failure of the
    /// machine or of a component (exit code 1).
    pub fn is_user_mistake(&self) -> bool {
        match self {
            DataError::Read { source, .. } => is_wrong_path(source),
            DataError::Panicked { .. } => false,
            DataError::NothingReadable { source, .. } => source.is_user_mistake(),
            DataError::NotAFile { .. }
            | DataError::Truncated { .. }
            | DataError::Decode { .. }
            | DataError::TooLarge { .. }
            | DataError::SizeDiffers { .. }
            | DataError::Other(_) => true,
        }
    }
}
