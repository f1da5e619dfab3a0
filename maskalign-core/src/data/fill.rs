//! Colours as recipes write them: one brightness, or red, green and blue.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Unexpected, Visitor};
use serde::ser::{Serialize, Serializer};

/// The colour of pixels that no image is behind: a brightness from 0 to 255, or `[red, green, blue]`. Default: black.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fill(pub [u8; 3]);

impl<'de> Deserialize<'de> for Fill {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FillVisitor;

        impl<'de> Visitor<'de> for FillVisitor {
            type Value = Fill;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a whole number from 0 to 255 or [red, green, blue]")
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<Fill, E> {
                let value = u8::try_from(value).map_err(|_| E::invalid_value(Unexpected::Unsigned(value), &self))?;
                Ok(Fill([value; 3]))
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<Fill, E> {
                let value = u8::try_from(value).map_err(|_| E::invalid_value(Unexpected::Signed(value), &self))?;
                Ok(Fill([value; 3]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Fill, A::Error> {
                let mut colour = [0; 3];
                for (index, value) in colour.iter_mut().enumerate() {
                    *value = seq.next_element()?.ok_or_else(|| A::Error::invalid_length(index, &self))?;
                }
                if seq.next_element::<u8>()?.is_some() {
                    return Err(A::Error::invalid_length(4, &self));
                }
                Ok(Fill(colour))
            }
        }

        deserializer.deserialize_any(FillVisitor)
    }
}

impl Serialize for Fill {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            [red, green, blue] if red == green && green == blue => red.serialize(serializer),
            colour => colour.serialize(serializer),
        }
    }
}

impl JsonSchema for Fill {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Fill".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let value = json_schema!({ "type": "integer", "minimum": 0, "maximum": 255 });
        json_schema!({
            "anyOf": [
                value,
                { "type": "array", "items": value, "minItems": 3, "maxItems": 3 }
            ]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Fill, String> {
        serde_json::from_str(text).map_err(|error| error.to_string())
    }

    #[test]
    fn a_fill_is_one_brightness_or_a_colour() {
        assert_eq!(parse("7"), Ok(Fill([7; 3])));
        assert_eq!(parse("[1, 2, 255]"), Ok(Fill([1, 2, 255])));
        for fill in [Fill([9; 3]), Fill([1, 2, 3])] {
            assert_eq!(parse(&serde_json::to_string(&fill).unwrap()), Ok(fill));
        }
        for text in ["256", "-1", "0.5", "[1, 2]", "[1, 2, 3, 4]", "[1, 2, 256]", "\"red\""] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
