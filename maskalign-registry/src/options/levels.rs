//! [`Levels`]: a choice of a tower's outputs.

use std::{borrow::Cow, fmt};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, MapAccess, SeqAccess, Visitor, value::MapAccessDeserializer},
    ser::{SerializeMap as _, SerializeSeq as _},
};

use crate::plugin::Refusal;

/// One output of a tower.
///
/// ```
/// use maskalign_registry::{LevelRef, Levels};
///
/// let levels = Levels::Last(2).resolve(12)?;
/// assert_eq!(levels, [LevelRef::Block(10), LevelRef::Block(11)]);
/// assert_eq!(LevelRef::Embed.to_string(), "embed");
/// # Ok::<(), maskalign_registry::Refusal>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LevelRef {
    /// The tokens that enter the first block.
    Embed,
    /// The output of that block, counted from 0.
    Block(usize),
}

impl fmt::Display for LevelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LevelRef::Embed => f.write_str("embed"),
            LevelRef::Block(index) => write!(f, "{index}"),
        }
    }
}

/// One item of a list of levels, before the depth is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LevelIndex {
    /// `embed`.
    Embed,
    /// A block: 0-based, or negative from the end.
    Block(i64),
}

/// Which outputs of a tower: `all`, `{last: K}`, or a list of 0-based blocks, negative from the
/// end, and `embed`.
///
/// ```
/// use maskalign_registry::{LevelRef, Levels};
///
/// let levels: Levels = serde_json::from_value(serde_json::json!(["embed", 0, -1])).expect("what a recipe may say");
/// assert_eq!(levels.resolve(12)?, [LevelRef::Embed, LevelRef::Block(0), LevelRef::Block(11)]);
/// assert!(levels.resolve(1).is_err(), "in a tower of one block, 0 and -1 are the same");
/// # Ok::<(), maskalign_registry::Refusal>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Levels {
    /// Every block.
    #[default]
    All,
    /// The last K blocks.
    Last(usize),
    /// These, in this order.
    List(Vec<LevelIndex>),
}

impl Levels {
    /// The chosen outputs of a tower of `depth` blocks, in the order written.
    ///
    /// # Errors
    /// A level that the tower lacks, or one named twice, at `last` or at its index in the list.
    pub fn resolve(&self, depth: usize) -> Result<Vec<LevelRef>, Refusal> {
        match self {
            Levels::All => Ok((0..depth).map(LevelRef::Block).collect()),
            Levels::Last(count) if *count <= depth => Ok((depth - count..depth).map(LevelRef::Block).collect()),
            Levels::Last(count) => {
                let message =
                    format!("the last {count} levels of a tower of {depth}: at most {depth} can be asked for");
                Err(Refusal::new("last", message))
            }
            Levels::List(items) => {
                let mut resolved = Vec::with_capacity(items.len());
                for (at, item) in items.iter().enumerate() {
                    let refuse = |message| Refusal::new(at.to_string(), message);
                    let level = match *item {
                        LevelIndex::Embed => LevelRef::Embed,
                        LevelIndex::Block(index) => LevelRef::Block(block_index(index, depth).map_err(refuse)?),
                    };
                    if let Some(first) = resolved.iter().position(|earlier| *earlier == level) {
                        let refusal = refuse(format!("level {level} is listed twice"));
                        return Err(refusal.related([first.to_string().as_str()], "first listed here"));
                    }
                    resolved.push(level);
                }
                Ok(resolved)
            }
        }
    }
}

/// A block of a tower of `depth` blocks: counted from 0, or from the end where `index` is negative.
///
/// ```
/// use maskalign_registry::block_index;
///
/// assert_eq!(block_index(-1, 12), Ok(11));
/// assert!(block_index(12, 12).is_err());
/// ```
///
/// # Errors
/// The tower has no such block; the message names those that it has.
pub fn block_index(index: i64, depth: usize) -> Result<usize, String> {
    let absolute = if index < 0 {
        usize::try_from(index.unsigned_abs()).ok().and_then(|back| depth.checked_sub(back))
    } else {
        usize::try_from(index).ok().filter(|index| *index < depth)
    };
    absolute.ok_or_else(|| match depth {
        0 => format!("level {index} of a tower without blocks"),
        _ => format!(
            "level {index} of a tower of {depth} blocks: levels go from 0 to {}, or from -{depth} to -1",
            depth - 1
        ),
    })
}

impl Serialize for LevelIndex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            LevelIndex::Embed => serializer.serialize_str("embed"),
            LevelIndex::Block(index) => serializer.serialize_i64(*index),
        }
    }
}

impl<'de> Deserialize<'de> for LevelIndex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;
        impl Visitor<'_> for Form {
            type Value = LevelIndex;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the index of a block, or `embed`")
            }
            fn visit_i64<E: de::Error>(self, value: i64) -> Result<LevelIndex, E> {
                Ok(LevelIndex::Block(value))
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<LevelIndex, E> {
                i64::try_from(value)
                    .map(LevelIndex::Block)
                    .map_err(|_| E::invalid_value(de::Unexpected::Unsigned(value), &self))
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<LevelIndex, E> {
                match value {
                    "embed" => Ok(LevelIndex::Embed),
                    other => Err(E::invalid_value(de::Unexpected::Str(other), &self)),
                }
            }
        }
        deserializer.deserialize_any(Form)
    }
}

impl Serialize for Levels {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Levels::All => serializer.serialize_str("all"),
            Levels::Last(count) => {
                let mut map = serializer.serialize_map(Some(1))?;
                map.serialize_entry("last", count)?;
                map.end()
            }
            Levels::List(items) => {
                let mut seq = serializer.serialize_seq(Some(items.len()))?;
                for item in items {
                    seq.serialize_element(item)?;
                }
                seq.end()
            }
        }
    }
}

impl<'de> Deserialize<'de> for Levels {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct LastForm {
            last: usize,
        }
        struct Form;
        impl<'de> Visitor<'de> for Form {
            type Value = Levels;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(LEVEL_FORMS)
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<Levels, E> {
                match value {
                    "all" => Ok(Levels::All),
                    other => Err(E::invalid_value(de::Unexpected::Str(other), &self)),
                }
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Levels, A::Error> {
                match LastForm::deserialize(MapAccessDeserializer::new(map))?.last {
                    0 => Err(de::Error::custom("`last` must be at least 1")),
                    count => Ok(Levels::Last(count)),
                }
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Levels, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = seq.next_element()? {
                    items.push(item);
                }
                if items.is_empty() {
                    return Err(de::Error::custom("the list of levels is empty"));
                }
                Ok(Levels::List(items))
            }
        }
        deserializer.deserialize_any(Form)
    }
}

const LEVEL_FORMS: &str = "`all`, {last: K}, or a list of block indices (0-based, negative from the end) and `embed`";

impl JsonSchema for Levels {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Levels".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": ["string", "array", "object"],
            "pattern": "^all$",
            "items": {
                "type": ["integer", "string"],
                "pattern": "^embed$",
                "format": "int64",
                "x-expected": "the index of a block, or `embed`",
            },
            "minItems": 1,
            "properties": {
                "last": {
                    "type": "integer",
                    "minimum": 1,
                    "description": "How many blocks, counted from the end.",
                },
            },
            "required": ["last"],
            "additionalProperties": false,
            "examples": ["all", { "last": 5 }, [0, -1]],
            "x-expected": LEVEL_FORMS,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json};

    use super::*;

    fn levels(value: serde_json::Value) -> Levels {
        from_value(value).expect("levels")
    }

    #[test]
    fn levels_resolve_against_a_depth() {
        use LevelRef::{Block, Embed};
        assert_eq!(levels(json!("all")).resolve(3), Ok(vec![Block(0), Block(1), Block(2)]));
        assert_eq!(levels(json!({"last": 2})).resolve(12), Ok(vec![Block(10), Block(11)]));
        assert_eq!(levels(json!(["embed", 0, -1])).resolve(12), Ok(vec![Embed, Block(0), Block(11)]));
    }

    #[test]
    fn levels_that_the_tower_lacks_are_refused_with_its_depth() {
        for (value, fragment) in [
            (json!({"last": 13}), "at most 12"),
            (json!([12]), "from 0 to 11"),
            (json!([-13]), "from -12 to -1"),
            (json!([11, -1]), "listed twice"),
        ] {
            let refusal = levels(value).resolve(12).expect_err("no such level");
            assert!(refusal.message.contains(fragment), "{refusal}");
        }
        assert_eq!(levels(json!([0, 12, 1])).resolve(12).expect_err("no such level").path, ["1"]);
        assert_eq!(levels(json!({"last": 13})).resolve(12).expect_err("no such level").path, ["last"]);
        for value in [json!({"last": 0}), json!([]), json!("last"), json!([1.5])] {
            assert!(from_value::<Levels>(value.clone()).is_err(), "{value}");
        }
    }
}
