//! Sizes as recipes write them: one number or two.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};
use serde::ser::{Serialize, Serializer};

/// The largest side in pixels that a transform may ask for.
pub const MAX_SIDE: usize = 16_384;

/// A size in pixels: `224`, or `[height, width]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// One number; the transform says which side or sides it means.
    Side(usize),
    /// Height and width.
    HeightWidth(usize, usize),
}

impl Size {
    /// `(width, height)`, one number meaning a square.
    pub fn as_square(self) -> (usize, usize) {
        match self {
            Size::Side(side) => (side, side),
            Size::HeightWidth(height, width) => (width, height),
        }
    }

    /// Refuses sides of 0 and sides no image has.
    ///
    /// # Errors
    /// Names `option` and the range.
    pub fn check(self, option: &str) -> Result<(), maskalign_registry::Refusal> {
        let (width, height) = self.as_square();
        match [height, width].iter().find(|&&side| side == 0 || side > MAX_SIDE) {
            Some(side) => Err(maskalign_registry::Refusal::new(
                option,
                format!("expected a size of 1 to {MAX_SIDE} pixels, found {side}"),
            )),
            None => Ok(()),
        }
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizeVisitor;

        impl<'de> Visitor<'de> for SizeVisitor {
            type Value = Size;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a size in pixels, such as 224 or [height, width]")
            }

            fn visit_u64<E: Error>(self, side: u64) -> Result<Size, E> {
                usize::try_from(side).map(Size::Side).map_err(|_| E::custom("the size is too large"))
            }

            fn visit_i64<E: Error>(self, side: i64) -> Result<Size, E> {
                usize::try_from(side).map(Size::Side).map_err(|_| E::custom("expected a size of at least 1 pixel"))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Size, A::Error> {
                let height = seq.next_element()?.ok_or_else(|| A::Error::invalid_length(0, &self))?;
                let width = seq.next_element()?.ok_or_else(|| A::Error::invalid_length(1, &self))?;
                if seq.next_element::<usize>()?.is_some() {
                    return Err(A::Error::invalid_length(3, &self));
                }
                Ok(Size::HeightWidth(height, width))
            }
        }

        deserializer.deserialize_any(SizeVisitor)
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match *self {
            Size::Side(side) => side.serialize(serializer),
            Size::HeightWidth(height, width) => [height, width].serialize(serializer),
        }
    }
}

impl JsonSchema for Size {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Size".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let side = json_schema!({ "type": "integer", "minimum": 1, "maximum": MAX_SIDE });
        json_schema!({
            "anyOf": [
                side,
                { "type": "array", "items": side, "minItems": 2, "maxItems": 2 }
            ]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Size, String> {
        serde_json::from_str(text).map_err(|error| error.to_string())
    }

    #[test]
    fn a_size_is_one_number_or_height_and_width() {
        assert_eq!(parse("224"), Ok(Size::Side(224)));
        assert_eq!(parse("[3, 5]"), Ok(Size::HeightWidth(3, 5)));
        assert_eq!(Size::HeightWidth(3, 5).as_square(), (5, 3));
        for size in [Size::Side(7), Size::HeightWidth(1, 2)] {
            assert_eq!(parse(&serde_json::to_string(&size).unwrap()), Ok(size));
        }
    }

    #[test]
    fn anything_else_is_refused_with_what_is_expected() {
        for text in ["\"224\"", "[1]", "[1, 2, 3]", "{}", "1.5", "-1"] {
            let message = parse(text).unwrap_err();
            assert!(message.contains("size") && message.contains("pixel"), "{text}: {message}");
        }
        assert!(Size::Side(0).check("size").is_err());
        assert!(Size::HeightWidth(8, MAX_SIDE + 1).check("size").is_err());
        assert!(Size::HeightWidth(1, MAX_SIDE).check("size").is_ok());
    }
}
