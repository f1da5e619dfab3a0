//! A place in a component's options that another component fills.

use std::{borrow::Cow, fmt, marker::PhantomData};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _, ser::SerializeMap as _};
use serde_json::{Map, Value};

use crate::{plugin::KindTag, wording::with_article};

/// The options of a component as a map; `type` is not among them.
pub type Options = Map<String, Value>;

/// A component named by its `type`, with its options still undecoded.
///
/// In YAML it is a mapping with `type` and the options; in a schema it is a reference to the definition of the kind. An
/// options struct holds nested components as slots, so that whoever decodes the outer one need not know the inner.
pub struct Slot<K> {
    /// The value of `type`.
    pub name: String,
    /// Every other key.
    pub options: Options,
    kind: PhantomData<fn() -> K>,
}

impl<K> Slot<K> {
    /// A slot filled by the component `name` with its defaults.
    pub fn new(name: impl Into<String>) -> Slot<K> {
        Slot::with(name, Options::new())
    }

    /// A slot filled by the component `name` with these options.
    pub fn with(name: impl Into<String>, options: Options) -> Slot<K> {
        Slot { name: name.into(), options, kind: PhantomData }
    }

    /// The options as a JSON object, which is what decoding takes.
    pub fn options_value(&self) -> Value {
        Value::Object(self.options.clone())
    }
}

impl<K> Clone for Slot<K> {
    fn clone(&self) -> Self {
        Slot::with(self.name.clone(), self.options.clone())
    }
}

impl<K> PartialEq for Slot<K> {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name && self.options == other.options
    }
}

impl<K> fmt::Debug for Slot<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot").field("name", &self.name).field("options", &self.options).finish()
    }
}

impl<K> Serialize for Slot<K> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(1 + self.options.len()))?;
        map.serialize_entry("type", &self.name)?;
        for (key, value) in &self.options {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

impl<'de, K: KindTag> Deserialize<'de> for Slot<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut options = Options::deserialize(deserializer)?;
        match options.shift_remove("type") {
            Some(Value::String(name)) => Ok(Slot::with(name, options)),
            Some(other) => Err(D::Error::custom(format_args!("`type` must be {}, found {other}", name_of::<K>()))),
            None => Err(D::Error::custom(format_args!("missing `type`: {}", name_of::<K>()))),
        }
    }
}

fn name_of<K: KindTag>() -> String {
    format!("the name of {}", with_article(K::KIND.name()))
}

impl<K: KindTag> JsonSchema for Slot<K> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        Cow::Owned(format!("{}_slot", K::KIND))
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "$ref": format!("#/definitions/{}", K::KIND) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugin::MaskerTag;

    #[test]
    fn a_slot_writes_back_what_it_read_with_the_type_first() {
        let slot: Slot<MaskerTag> =
            serde_json::from_str(r#"{"ratio": 0.7, "type": "random", "cell": 2}"#).expect("a slot");
        assert_eq!(slot.name, "random");
        assert_eq!(serde_json::to_string(&slot).expect("json"), r#"{"type":"random","ratio":0.7,"cell":2}"#);
    }

    #[test]
    fn a_slot_without_a_type_says_which_kind_it_wants() {
        let refusal = serde_json::from_str::<Slot<MaskerTag>>(r#"{"ratio": 0.7}"#).expect_err("no type").to_string();
        assert!(refusal.contains("the name of a masker"), "{refusal}");
    }
}
