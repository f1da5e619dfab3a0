//! [`Scalar`]: a number, or one that changes over the stage.
//!
//! Its schema is one object with several `type`s rather than `anyOf`, like those of [`Levels`](super::Levels) and
//! [`Weights`](super::Weights): a range on the field then applies to the number, and a message can be about what was
//! written.

use std::{borrow::Cow, f64::consts::PI, fmt};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, MapAccess, Visitor, value::MapAccessDeserializer},
};

/// How a [`Scalar`] moves from one value to another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// In a straight line.
    #[default]
    Linear,
    /// Along half a cosine: slow at both ends.
    Cosine,
}

/// A number, or one that changes over the stage: `0.75` or `{from: 0.996, to: 1.0, shape: linear}`.
///
/// ```
/// use maskalign_registry::Scalar;
///
/// let momentum: Scalar = serde_json::from_value(serde_json::json!({ "from": 0.5, "to": 1.0 })).expect("a ramp");
/// assert_eq!((momentum.at(0.0), momentum.at(0.5), momentum.at(1.0)), (0.5, 0.75, 1.0));
/// assert_eq!(Scalar::from(0.75).constant(), Some(0.75));
/// ```
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
        /// How it moves between them.
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

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json, to_value};

    use super::*;

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
}
