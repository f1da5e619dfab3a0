//! What a tower's input is normalised by.

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// Mean and standard deviation of each colour channel, for values in [0, 1]. In a recipe a name or the numbers:
/// `imagenet`, `clip`, `inception` (.5 for all), or `{mean: [R, G, B], std: [R, G, B]}`.
///
/// ```
/// # use maskalign_core::prelude::*;
/// let grey = Statistics { mean: [0.5; 3], std: [0.5; 3] };
/// assert_ne!(grey, Statistics::IMAGENET);
/// assert_eq!(grey.name(), Some("inception"));
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Statistics {
    /// Red, green, blue.
    pub mean: [f32; 3],
    /// Red, green, blue.
    pub std: [f32; 3],
}

/// (name, values)
const NAMED: [(&str, Statistics); 3] =
    [("imagenet", Statistics::IMAGENET), ("clip", Statistics::CLIP), ("inception", Statistics::INCEPTION)];

impl Statistics {
    /// Of ImageNet, used by DINO, MAE and every student.
    pub const IMAGENET: Self = Statistics { mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225] };
    /// Of CLIP's training images.
    pub const CLIP: Self =
        Statistics { mean: [0.48145466, 0.4578275, 0.40821073], std: [0.26862954, 0.261_302_6, 0.275_777_1] };
    /// From [0, 1] to [-1, 1]: ViT's first weights and SigLIP's. timm's name; Hugging Face's is `IMAGENET_STANDARD`.
    pub const INCEPTION: Self = Statistics { mean: [0.5; 3], std: [0.5; 3] };

    /// The name, where these have one.
    pub fn name(&self) -> Option<&'static str> {
        NAMED.iter().find(|(_, named)| named == self).map(|(name, _)| *name)
    }

    /// Those of that name.
    pub fn named(name: &str) -> Option<Self> {
        NAMED.iter().find(|(known, _)| *known == name).map(|(_, named)| *named)
    }
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(inline)]
struct Values {
    /// Mean of red, green and blue, for values in [0, 1].
    mean: [f64; 3],
    /// Standard deviation of red, green and blue.
    #[schemars(inner(range(min = 1e-6)))]
    std: [f64; 3],
}

impl Serialize for Statistics {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        if let Some(name) = self.name() {
            return name.serialize(s);
        }
        // The shortest decimals that are these numbers, rather than all digits of their binary values.
        let decimals = |values: [f32; 3]| values.map(|value| value.to_string().parse().unwrap_or(f64::from(value)));
        Values { mean: decimals(self.mean), std: decimals(self.std) }.serialize(s)
    }
}

impl<'de> Deserialize<'de> for Statistics {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        match serde_json::Value::deserialize(d)? {
            serde_json::Value::String(name) => {
                Statistics::named(&name).ok_or_else(|| D::Error::custom(format!("unknown statistics `{name}`")))
            }
            values => {
                let Values { mean, std } = serde_json::from_value(values).map_err(D::Error::custom)?;
                let Statistics { mean, std } =
                    Statistics { mean: mean.map(|value| value as f32), std: std.map(|value| value as f32) };
                if mean.iter().any(|value| !value.is_finite())
                    || std.iter().any(|value| value.is_nan() || *value <= 0.0)
                {
                    return Err(D::Error::custom("a mean is no number, or a standard deviation is not above 0"));
                }
                Ok(Statistics { mean, std })
            }
        }
    }
}

impl JsonSchema for Statistics {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Statistics".into()
    }
    fn inline_schema() -> bool {
        true
    }
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let values = Values::json_schema(generator);
        json_schema!({
            "x-expected": "`imagenet`, `clip`, `inception`, or {mean: [R, G, B], std: [R, G, B]}",
            "anyOf": [{ "type": "string", "enum": NAMED.map(|(name, _)| name) }, values],
        })
    }
}
