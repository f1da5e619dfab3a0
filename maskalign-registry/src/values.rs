//! Values that several components' options share: [`Scalar`], [`Levels`], [`Weights`].
//!
//! Each writes its schema as one object with several `type`s rather than as `anyOf`: a range on the
//! field then applies to the number, and a message can speak of what was written.

use std::{borrow::Cow, f64::consts::PI, fmt};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, MapAccess, SeqAccess, Visitor, value::MapAccessDeserializer},
    ser::{SerializeMap as _, SerializeSeq as _},
};

use crate::refusal::Refusal;

/// How a [`Scalar`] goes from one value to another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// In a straight line.
    #[default]
    Linear,
    /// Along half a cosine: slow at both ends.
    Cosine,
}

/// A number, or one that moves over the stage: `0.75` or `{from: 0.996, to: 1.0, shape: linear}`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scalar {
    /// The same value throughout.
    Constant(f64),
    /// From one value at the stage's start to another at its end.
    Ramp {
        /// The value at progress 0.
        from: f64,
        /// The value at progress 1.
        to: f64,
        /// The way between them.
        shape: Shape,
    },
}

impl Scalar {
    /// The value at a progress in `0..=1`; progress outside is clamped to it.
    pub fn at(&self, progress: f64) -> f64 {
        let progress = progress.clamp(0.0, 1.0);
        match *self {
            Scalar::Constant(value) => value,
            Scalar::Ramp { from, to, shape } => match shape {
                Shape::Linear => from + (to - from) * progress,
                Shape::Cosine => to + (from - to) * (1.0 + (PI * progress).cos()) / 2.0,
            },
        }
    }

    /// The smallest and the largest value that [`Scalar::at`] takes.
    pub fn bounds(&self) -> (f64, f64) {
        match *self {
            Scalar::Constant(value) => (value, value),
            Scalar::Ramp { from, to, .. } => (from.min(to), from.max(to)),
        }
    }

    /// The value, where it is the same throughout.
    pub fn constant(&self) -> Option<f64> {
        let (low, high) = self.bounds();
        (low == high).then_some(low)
    }
}

impl From<f64> for Scalar {
    fn from(value: f64) -> Scalar {
        Scalar::Constant(value)
    }
}

impl fmt::Display for Scalar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Scalar::Constant(value) => write!(f, "{value}"),
            Scalar::Ramp { from, to, shape } => {
                let shape = match shape {
                    Shape::Linear => "linear",
                    Shape::Cosine => "cosine",
                };
                write!(f, "{from} to {to}, {shape}")
            }
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RampForm {
    from: f64,
    to: f64,
    #[serde(default)]
    shape: Shape,
}

impl Serialize for Scalar {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match *self {
            Scalar::Constant(value) => serializer.serialize_f64(value),
            Scalar::Ramp { from, to, shape } => RampForm { from, to, shape }.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;
        impl<'de> Visitor<'de> for Form {
            type Value = Scalar;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(SCALAR_FORMS)
            }
            fn visit_f64<E: de::Error>(self, value: f64) -> Result<Scalar, E> {
                Ok(Scalar::Constant(value))
            }
            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Scalar, E> {
                Ok(Scalar::Constant(value as f64))
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Scalar, E> {
                Ok(Scalar::Constant(value as f64))
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Scalar, A::Error> {
                let RampForm { from, to, shape } = RampForm::deserialize(MapAccessDeserializer::new(map))?;
                Ok(Scalar::Ramp { from, to, shape })
            }
        }
        deserializer.deserialize_any(Form)
    }
}

const SCALAR_FORMS: &str = "a number, or {from, to, shape}";

impl JsonSchema for Scalar {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Scalar".into()
    }

    /// A range on the field lands beside `type`, where it binds the number; the registry copies it
    /// to the properties of schemas marked `x-ramp`.
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": ["number", "object"],
            "properties": {
                "from": { "type": "number", "description": "The value at the stage's start." },
                "to": { "type": "number", "description": "The value at the stage's end." },
                "shape": {
                    "type": "string",
                    "enum": ["linear", "cosine"],
                    "default": "linear",
                    "description": "A straight line, or half a cosine.",
                },
            },
            "required": ["from", "to"],
            "additionalProperties": false,
            "x-expected": SCALAR_FORMS,
            "x-ramp": true,
        })
    }
}

/// One output of a tower.
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
    /// The outputs meant in a tower of `depth` blocks, in the order written.
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
                        LevelIndex::Block(index) => block_index(index, depth).map_err(refuse)?,
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

fn block_index(index: i64, depth: usize) -> Result<LevelRef, String> {
    let absolute = if index < 0 {
        usize::try_from(index.unsigned_abs()).ok().and_then(|back| depth.checked_sub(back))
    } else {
        usize::try_from(index).ok().filter(|index| *index < depth)
    };
    absolute.map(LevelRef::Block).ok_or_else(|| match depth {
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

/// Where a tower's parameters come from: a file, `hf://org/repo[@revision][/file]`, or the student
/// of an earlier stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Weights {
    /// A file on this machine.
    Path(String),
    /// A file of the Hugging Face hub, read from the local cache.
    Hub {
        /// `org/name`.
        repo: String,
        /// A branch, tag or commit; the cache's `main` where absent.
        revision: Option<String>,
        /// The file inside the repository; the usual names are tried where absent.
        file: Option<String>,
    },
    /// Weights that travel inside the program.
    Embedded(String),
    /// The student that the stage of that name leaves.
    Stage(String),
}

impl Weights {
    /// Reads a path or an `hf://` address.
    ///
    /// # Errors
    /// An `hf://` address that is not `hf://org/repo[@revision][/file]`, or another scheme.
    pub fn parse(text: &str) -> Result<Weights, String> {
        if let Some(name) = text.strip_prefix("embedded://") {
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
            return match !name.is_empty() && name.chars().all(plain) {
                true => Ok(Weights::Embedded(name.to_owned())),
                false => Err(format!("`{text}` is not embedded://NAME")),
            };
        }
        let Some(address) = text.strip_prefix("hf://") else {
            return match text {
                "" => Err(format!("an empty path: expected {WEIGHT_FORMS}")),
                _ if text.contains("://") => Err(format!("`{text}` is none of {WEIGHT_FORMS}")),
                _ => Ok(Weights::Path(text.to_owned())),
            };
        };
        let malformed = || format!("`{text}` is not hf://org/repo[@revision][/file]");
        let (org, rest) = address.split_once('/').ok_or_else(malformed)?;
        let (head, file) = match rest.split_once('/') {
            Some((head, file)) => (head, Some(file)),
            None => (rest, None),
        };
        let (name, revision) = match head.split_once('@') {
            Some((name, revision)) => (name, Some(revision)),
            None => (head, None),
        };
        let parts = [Some(org), Some(name), revision, file];
        if parts.into_iter().flatten().any(str::is_empty)
            || [org, name].into_iter().any(|part| part.contains(['@', ':']))
            || address.contains(char::is_whitespace)
            || file.is_some_and(|file| file.split('/').any(|part| matches!(part, "" | "." | "..")))
        {
            return Err(malformed());
        }
        Ok(Weights::Hub {
            repo: format!("{org}/{name}"),
            revision: revision.map(str::to_owned),
            file: file.map(str::to_owned),
        })
    }
}

impl fmt::Display for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Weights::Path(path) => f.write_str(path),
            Weights::Hub { repo, revision, file } => {
                write!(f, "hf://{repo}")?;
                if let Some(revision) = revision {
                    write!(f, "@{revision}")?;
                }
                if let Some(file) = file {
                    write!(f, "/{file}")?;
                }
                Ok(())
            }
            Weights::Embedded(name) => write!(f, "embedded://{name}"),
            Weights::Stage(name) => write!(f, "the student of stage `{name}`"),
        }
    }
}

impl Serialize for Weights {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Weights::Stage(name) => {
                let mut map = serializer.serialize_map(Some(1))?;
                map.serialize_entry("stage", name)?;
                map.end()
            }
            Weights::Path(_) | Weights::Hub { .. } | Weights::Embedded(_) => serializer.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for Weights {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct StageForm {
            stage: String,
        }
        struct Form;
        impl<'de> Visitor<'de> for Form {
            type Value = Weights;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(WEIGHT_FORMS)
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<Weights, E> {
                Weights::parse(value).map_err(E::custom)
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Weights, A::Error> {
                let form = StageForm::deserialize(MapAccessDeserializer::new(map))?;
                Ok(Weights::Stage(form.stage))
            }
        }
        deserializer.deserialize_any(Form)
    }
}

const WEIGHT_FORMS: &str = "a path, hf://org/repo[@revision][/file], embedded://NAME, or {stage: NAME}";

/// Agrees with [`Weights::parse`]: an address of the hub, or text without `://`.
const WEIGHT_PATTERN: &str = concat!(
    r"^hf://[^/@:\s]+/[^/@:\s]+(@[^/\s]+)?(/[^/\s]+)*$",
    r"|^embedded://[A-Za-z0-9_]+$",
    r"|^[^:]*(:+(/:+)*/?[^:/][^:]*)*(:+(/:+)*/?)?$",
);

impl JsonSchema for Weights {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Weights".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": ["string", "object"],
            "pattern": WEIGHT_PATTERN,
            "minLength": 1,
            "properties": {
                "stage": {
                    "type": "string",
                    "x-reference": "stage",
                    "description": "The earlier stage whose student is meant.",
                },
            },
            "required": ["stage"],
            "additionalProperties": false,
            "x-expected": WEIGHT_FORMS,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{from_value, json, to_value};

    fn levels(value: serde_json::Value) -> Levels {
        from_value(value).expect("levels")
    }

    #[test]
    fn a_ramp_moves_from_its_start_to_its_end() {
        let linear: Scalar = from_value(json!({"from": 0.996, "to": 1.0})).expect("a ramp");
        assert_eq!([linear.at(0.0), linear.at(0.5), linear.at(1.0)], [0.996, 0.998, 1.0]);
        // 0.04 -> 0.4 along a cosine, as I-JEPA's decay: a quarter of the way is at
        // 0.4 - 0.36 * (1 + cos(pi / 4)) / 2.
        let cosine: Scalar = from_value(json!({"from": 0.04, "to": 0.4, "shape": "cosine"})).expect("a ramp");
        assert!((cosine.at(0.25) - 0.092_720_779_386).abs() < 1e-9);
        assert_eq!(cosine.at(7.0), 0.4);
    }

    #[test]
    fn a_scalar_reads_integers_and_writes_back_what_it_means() {
        let scalar: Scalar = from_value(json!(2)).expect("an integer is a number");
        assert_eq!(scalar, Scalar::Constant(2.0));
        let ramp = json!({"from": 0.0, "to": 1.0, "shape": "linear"});
        assert_eq!(to_value(from_value::<Scalar>(ramp.clone()).expect("a ramp")).expect("json"), ramp);
        assert!(from_value::<Scalar>(json!({"from": 0, "to": 1, "shpae": "linear"})).is_err());
        assert!(from_value::<Scalar>(json!("fast")).is_err());
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

    #[test]
    fn weights_name_a_file_a_repository_or_a_stage() {
        let hub = |repo: &str, revision: Option<&str>, file: Option<&str>| Weights::Hub {
            repo: repo.to_owned(),
            revision: revision.map(str::to_owned),
            file: file.map(str::to_owned),
        };
        for (text, weights) in [
            ("teacher.safetensors", Weights::Path("teacher.safetensors".to_owned())),
            ("/a b/c:d", Weights::Path("/a b/c:d".to_owned())),
            ("hf://openai/clip", hub("openai/clip", None, None)),
            ("embedded://teacher", Weights::Embedded("teacher".to_owned())),
            ("hf://a/b@v1/c/d.bin", hub("a/b", Some("v1"), Some("c/d.bin"))),
        ] {
            assert_eq!(Weights::parse(text), Ok(weights.clone()));
            assert_eq!(to_value(&weights).expect("json"), json!(text));
        }
        assert_eq!(
            from_value::<Weights>(json!({"stage": "pretrain"})).expect("a stage"),
            Weights::Stage("pretrain".to_owned())
        );
    }

    #[test]
    fn the_pattern_for_weights_accepts_what_parsing_accepts() {
        let pattern = regex::Regex::new(WEIGHT_PATTERN).expect("a pattern");
        for text in [
            "a",
            "a/b",
            "./a",
            "/",
            "a:b",
            "C:\\x",
            "c:/x",
            "hf",
            "hf:",
            "hf:/a",
            "a::b",
            "hf://a/b",
            "hf://a/b@c",
            "hf://a/b/c",
            "hf://a/b@c/d/e",
            "hf://",
            "hf://a",
            "hf://a/",
            "hf://a//b",
            "hf://a/b c",
            "http://a/b",
            "s3://x",
            "hf://a/b@",
            "hf://a@b/c",
            "a/b/",
            "://",
            "x:",
            ":/://",
            ":/:/a",
        ] {
            assert_eq!(pattern.is_match(text), Weights::parse(text).is_ok(), "{text:?}");
        }
    }
}
