//! Images with a border.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Deserializer, Error, SeqAccess, Visitor};
use serde::ser::Serializer;
use serde::{Deserialize, Serialize};

use crate::data::image::reflected;
use crate::data::{Fill, RgbImage, Transform};
use crate::random::Stream;
use maskalign_registry::Refusal;

/// The widest border in pixels.
const WIDEST: usize = 4096;

/// Puts a border around an image.
///
/// The law is torchvision's `Pad` on Pillow images.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Pad {
    /// Width of the border in pixels: one number for all sides, `[left and right, top and bottom]`, or
    /// `[left, top, right, bottom]`.
    pub padding: Padding,
    /// What a `constant` border is filled with: a value from 0 to 255, or `[red, green, blue]`.
    #[serde(default)]
    pub fill: Fill,
    /// What the border shows.
    #[serde(default)]
    pub mode: PadMode,
}

/// What a border shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PadMode {
    /// One colour: `fill`.
    #[default]
    Constant,
    /// The outermost pixel.
    Edge,
    /// The mirrored image, the outermost pixel not repeated.
    Reflect,
    /// The mirrored image, the outermost pixel repeated.
    Symmetric,
}

impl PadMode {
    /// The pixel of `count` that a place outside of them shows; `None` for the constant colour.
    fn source(self, place: isize, count: usize) -> Option<usize> {
        let whole = count as isize;
        match self {
            PadMode::Constant => usize::try_from(place).ok().filter(|&place| place < count),
            PadMode::Edge => Some(place.clamp(0, whole - 1) as usize),
            PadMode::Reflect => Some(reflected(place, count)),
            PadMode::Symmetric => {
                let along = place.rem_euclid(2 * whole);
                Some(along.min(2 * whole - 1 - along) as usize)
            }
        }
    }
}

impl Transform for Pad {
    fn apply(&self, image: RgbImage, _: &mut Stream) -> RgbImage {
        let (width, height) = self.padding.around(image.size());
        let sources = |before: usize, padded: usize, count: usize| -> Vec<Option<usize>> {
            (0..padded).map(|place| self.mode.source(place as isize - before as isize, count)).collect()
        };
        let columns = sources(self.padding.left, width, image.width);
        let rows = sources(self.padding.top, height, image.height);
        let mut pixels = Vec::with_capacity(3 * width * height);
        let (from, _) = image.pixels.as_chunks::<3>();
        for row in rows {
            for &column in &columns {
                let pixel = row.zip(column).map_or(self.fill.0, |(row, column)| from[row * image.width + column]);
                pixels.extend(pixel);
            }
        }
        RgbImage { width, height, pixels }
    }

    fn output_size(&self, input: Option<(usize, usize)>) -> Option<(usize, usize)> {
        input.map(|size| self.padding.around(size))
    }

    fn check(&self) -> Result<(), Refusal> {
        let Padding { left, top, right, bottom } = self.padding;
        if let Some(width) = [left, top, right, bottom].into_iter().find(|&width| width > WIDEST) {
            return Err(Refusal::new("padding", format!("expected 0 to {WIDEST} pixels, found {width}")));
        }
        if self.mode != PadMode::Constant && self.fill != Fill::default() {
            return Err(Refusal::new("fill", "a border that shows the image is not filled")
                .help("set `mode: constant`, or leave `fill` out"));
        }
        Ok(())
    }
}

/// Widths of a border in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Padding {
    /// Columns before the image.
    pub left: usize,
    /// Rows above it.
    pub top: usize,
    /// Columns behind it.
    pub right: usize,
    /// Rows below it.
    pub bottom: usize,
}

impl Padding {
    /// `(width, height)` with the border around an image of `(width, height)`.
    fn around(self, (width, height): (usize, usize)) -> (usize, usize) {
        (self.left + width + self.right, self.top + height + self.bottom)
    }
}

const FORMS: &str =
    "a whole number of pixels up to 4096, [left and right, top and bottom], or [left, top, right, bottom]";

impl<'de> Deserialize<'de> for Padding {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PaddingVisitor;

        impl<'de> Visitor<'de> for PaddingVisitor {
            type Value = Padding;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(FORMS)
            }

            fn visit_u64<E: Error>(self, width: u64) -> Result<Padding, E> {
                let all = usize::try_from(width).map_err(|_| E::custom("the border is too wide"))?;
                Ok(Padding { left: all, top: all, right: all, bottom: all })
            }

            fn visit_i64<E: Error>(self, width: i64) -> Result<Padding, E> {
                let width = u64::try_from(width).map_err(|_| E::custom("expected a border of at least 0 pixels"))?;
                self.visit_u64(width)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Padding, A::Error> {
                let mut widths = Vec::with_capacity(4);
                while let Some(width) = seq.next_element()? {
                    widths.push(width);
                }
                match widths[..] {
                    [across, down] => Ok(Padding { left: across, top: down, right: across, bottom: down }),
                    [left, top, right, bottom] => Ok(Padding { left, top, right, bottom }),
                    _ => Err(A::Error::invalid_length(widths.len(), &self)),
                }
            }
        }

        deserializer.deserialize_any(PaddingVisitor)
    }
}

impl Serialize for Padding {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Padding { left, top, right, bottom } = *self;
        match left == right && top == bottom {
            true if left == top => left.serialize(serializer),
            true => [left, top].serialize(serializer),
            false => [left, top, right, bottom].serialize(serializer),
        }
    }
}

impl JsonSchema for Padding {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Padding".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let width = json_schema!({ "type": "integer", "minimum": 0, "maximum": WIDEST });
        let list = |count: usize| {
            json_schema!({
                "type": "array", "items": width, "minItems": count, "maxItems": count, "x-expected": FORMS
            })
        };
        json_schema!({ "anyOf": [width, list(2), list(4)], "x-expected": FORMS })
    }
}

crate::register!(transform "pad" => Pad, "puts a border around an image",
    example: "{ type: pad, padding: 4, mode: reflect }");
