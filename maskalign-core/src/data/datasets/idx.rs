//! Files in the format of MNIST.

use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::MultiGzDecoder;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::files::{existing_file, open_named};
use crate::data::{DataError, Dataset, Images, RgbImage};
use maskalign_registry::Refusal;

/// Grey images and labels in MNIST's file format (idx), packed with gzip or plain.
///
/// MNIST, Fashion-MNIST, KMNIST and EMNIST come so. Grey becomes red, green and blue of one value. The whole part asked
/// for is held in memory.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Idx {
    /// The file with the images (idx3-ubyte).
    pub images: String,
    /// The file with the labels (idx1-ubyte). Default: no labels.
    #[serde(default)]
    pub labels: Option<String>,
    /// The names of the classes by label. Default: none.
    #[serde(default)]
    pub classes: Option<Vec<String>>,
    /// How many images to leave out at the start.
    #[serde(default)]
    pub skip: usize,
    /// How many images to take at most. Default: all.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub limit: Option<usize>,
}

impl Dataset for Idx {
    fn open(&self) -> Result<Box<dyn Images>, Refusal> {
        if self.limit == Some(0) {
            return Err(Refusal::new("limit", "expected at least 1 image, found 0"));
        }
        let part = Part { skip: self.skip, limit: self.limit };
        let (mut images, total) = in_file("images", &self.images, |read| read_images(read, part))?;
        if images.len() == 0 {
            return Err(Refusal::new("skip", format!("no image is left: `{}` holds {total}", self.images))
                .help(format!("leave out fewer than {total}")));
        }
        images.file.clone_from(&self.images);
        if let Some(file) = &self.labels {
            let (labels, label_total) = in_file("labels", file, |read| read_labels(read, part))?;
            if label_total != total {
                return Err(Refusal::new("labels", format!("`{file}` has {label_total} labels for {total} images"))
                    .help("name the label file that belongs to the images"));
            }
            images.labels = Some(labels);
        }
        images.classes.clone_from(&self.classes);
        images.check_classes()?;
        Ok(Box::new(images))
    }

    fn needs_files(&self) -> bool {
        true
    }
}

/// Which images of a file are wanted.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub skip: usize,
    pub limit: Option<usize>,
}

impl Part {
    /// How many to leave out and to take of `total`.
    fn of(self, total: usize) -> (usize, usize) {
        let skip = self.skip.min(total);
        (skip, self.limit.map_or(total - skip, |limit| limit.min(total - skip)))
    }
}

/// Grey images of one size in memory.
pub(super) struct GreyImages {
    width: usize,
    height: usize,
    /// Number of the first image in its file.
    first: usize,
    pixels: Vec<u8>,
    pub labels: Option<Vec<u8>>,
    pub classes: Option<Vec<String>>,
    /// The file, for messages.
    pub file: String,
}

impl GreyImages {
    fn area(&self) -> usize {
        self.width * self.height
    }

    fn check_classes(&self) -> Result<(), Refusal> {
        let (Some(classes), Some(labels)) = (&self.classes, &self.labels) else {
            return Ok(());
        };
        match labels.iter().position(|&label| usize::from(label) >= classes.len()) {
            Some(at) => Err(Refusal::new(
                "classes",
                format!(
                    "{} names for labels that go up to {} or more (image {})",
                    classes.len(),
                    labels[at],
                    self.first + at
                ),
            )
            .help("name every class, from label 0 on")),
            None => Ok(()),
        }
    }
}

impl Images for GreyImages {
    fn len(&self) -> usize {
        self.pixels.len() / self.area()
    }

    fn image(&self, index: usize) -> Result<RgbImage, DataError> {
        let area = self.area();
        Ok(RgbImage::from_grey(self.width, self.height, &self.pixels[index * area..][..area]))
    }

    fn label(&self, index: usize) -> Option<u32> {
        self.labels.as_ref().map(|labels| u32::from(labels[index]))
    }

    fn classes(&self) -> Option<Vec<String>> {
        self.classes.clone()
    }

    fn name(&self, index: usize) -> String {
        format!("image {} of {}", self.first + index, self.file)
    }

    fn size(&self) -> Option<(usize, usize)> {
        Some((self.width, self.height))
    }

    fn resident_bytes(&self) -> u64 {
        self.pixels.len() as u64
    }

    /// Covers the pixels too: they are in memory, and the images have no names of their own.
    fn fingerprint(&self) -> String {
        let mut hash = blake3::Hasher::new();
        for side in [self.len(), self.height, self.width] {
            hash.update(&(side as u64).to_le_bytes());
        }
        hash.update(&self.pixels);
        hash.update(self.labels.as_deref().unwrap_or_default());
        hash.finalize().to_hex().to_string()
    }
}

/// Opens `path` as named by `option`, and puts the path in front of what `read` has to say.
fn in_file<T>(option: &str, path: &str, read: impl FnOnce(&mut Unpacked) -> Result<T, String>) -> Result<T, Refusal> {
    let found = existing_file(option, path)?;
    let (file, metadata) = open_named(option, path, &found)?;
    let refused = |message: String| {
        Refusal::new(option, format!("`{path}`: {message}"))
            .help("expected an idx file as MNIST has them: idx3-ubyte for images, idx1-ubyte for labels, packed with gzip or not")
    };
    let mut file = Unpacked::new(file, metadata.len()).map_err(|error| refused(error.to_string()))?;
    read(&mut file).map_err(refused)
}

/// An idx file's content, unpacked as it is read.
pub(super) struct Unpacked<'a> {
    read: Box<dyn Read + 'a>,
    /// Bytes of the file as it is stored.
    stored: u64,
    is_packed: bool,
}

impl<'a> Unpacked<'a> {
    /// From a file of `stored` bytes, packed with gzip or not.
    pub(super) fn new(file: impl Read + 'a, stored: u64) -> io::Result<Self> {
        let mut file = BufReader::with_capacity(1 << 16, file);
        let is_packed = file.fill_buf()?.starts_with(&[0x1F, 0x8B]);
        let read: Box<dyn Read + 'a> = if is_packed { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) };
        Ok(Self { read, stored, is_packed })
    }

    /// Refuses what the header announces where the file cannot hold it, before anything is unpacked: `header` and then
    /// `items` of `size` bytes each.
    fn check_holds(&self, header: u64, items: usize, size: usize) -> Result<(), String> {
        /// No packed images are so much smaller, and small files may be.
        const MAX_RATIO: u64 = 100;
        const SMALL: u64 = 64 << 20;
        let announced = (items as u64).checked_mul(size as u64).and_then(|bytes| bytes.checked_add(header));
        let announced = announced.ok_or_else(|| format!("the header announces {items} items, which no file holds"))?;
        match self.is_packed {
            false if self.stored < announced => {
                let whole = self.stored.saturating_sub(header) / size.max(1) as u64;
                Err(format!("the header announces {items} items, the file ends after {whole}: get it again"))
            }
            false if self.stored > announced => {
                Err(format!("the file goes on after the {items} items its header announces: it is not what it says"))
            }
            true if announced > SMALL && announced / MAX_RATIO > self.stored => Err(format!(
                "the header announces {announced} bytes in a file of {}: packed images are not so small",
                self.stored
            )),
            _ => Ok(()),
        }
    }
}

impl Read for Unpacked<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.read.read(into)
    }
}

/// Reads images from an unpacked idx file, and how many it holds in all.
pub(super) fn read_images(read: &mut Unpacked<'_>, part: Part) -> Result<(GreyImages, usize), String> {
    const MAX_SIDE: usize = 4096;
    let [total, height, width] = read_header::<3>(read)?;
    if !(1..=MAX_SIDE).contains(&width) || !(1..=MAX_SIDE).contains(&height) {
        return Err(format!("expected images of 1 to {MAX_SIDE} pixels a side, found {width} x {height}"));
    }
    read.check_holds(16, total, width * height)?;
    let (pixels, skip) = read_part(read, total, width * height, part)?;
    Ok((GreyImages { width, height, first: skip, pixels, labels: None, classes: None, file: String::new() }, total))
}

/// Reads labels from an unpacked idx file, and how many it holds in all.
pub(super) fn read_labels(read: &mut Unpacked<'_>, part: Part) -> Result<(Vec<u8>, usize), String> {
    let [total] = read_header::<1>(read)?;
    read.check_holds(8, total, 1)?;
    Ok((read_part(read, total, 1, part)?.0, total))
}

fn read_header<const DIMS: usize>(read: &mut dyn Read) -> Result<[usize; DIMS], String> {
    let mut number = || {
        let mut bytes = [0; 4];
        read.read_exact(&mut bytes).map(|()| bytes).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => "the file ends inside its header".to_string(),
            _ => error.to_string(),
        })
    };
    let expected = [0, 0, 8, DIMS as u8];
    let magic = number()?;
    if magic != expected {
        return Err(format!(
            "expected a file that begins with {expected:02x?} (bytes without sign, {DIMS} dimensions), found {magic:02x?}"
        ));
    }
    let mut dims = [0; DIMS];
    for dim in &mut dims {
        *dim = u32::from_be_bytes(number()?) as usize;
    }
    Ok(dims)
}

/// Reads the wanted items of `size` bytes each, and how many were left out before them.
fn read_part(read: &mut dyn Read, total: usize, size: usize, part: Part) -> Result<(Vec<u8>, usize), String> {
    let (skip, take) = part.of(total);
    let (skip_bytes, take_bytes) = ((skip as u64) * size as u64, (take as u64) * size as u64);
    let skipped = io::copy(&mut read.take(skip_bytes), &mut io::sink()).map_err(|error| error.to_string())?;
    // As much as is announced and no more: grown by doubling it would take up to twice the room.
    let mut items = Vec::new();
    items.try_reserve_exact(take_bytes as usize).map_err(|_| format!("no memory for {take_bytes} bytes"))?;
    let got = read.take(take_bytes).read_to_end(&mut items).map_err(|error| error.to_string())? as u64;
    if skipped + got < skip_bytes + take_bytes {
        let whole = (skipped + got) / size as u64;
        return Err(format!("the header announces {total} items, the file ends after {whole}: get it again"));
    }
    if skip + take == total && read.read(&mut [0]).map_err(|error| error.to_string())? > 0 {
        return Err(format!("the file goes on after the {total} items its header announces: it is not what it says"));
    }
    Ok((items, skip))
}

crate::register!(dataset "idx" => Idx, "grey images in MNIST's file format",
    example: "{ type: idx, images: train-images-idx3-ubyte.gz, labels: train-labels-idx1-ubyte.gz }");
