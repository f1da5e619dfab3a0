//! [`With`]: options that several components share, together with a component's own.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, DeserializeOwned, Visitor, value::Error as ProbeError},
    forward_to_deserialize_any,
    ser::Error as _,
};
use serde_json::{Value, json};

use super::Options;
use crate::plugin::decode_part;

/// Options that several components share, such as those of every stage that trains.
///
/// It is a struct that derives what any options struct derives, including `deny_unknown_fields`; see [`With`].
pub trait SharedOptions: JsonSchema + Serialize + DeserializeOwned {
    /// The options that follow a component's own when a recipe is written; the others precede them.
    const LAST: &'static [&'static str] = &[];
}

/// A component's own options `O` together with shared options `S`. In a recipe they form one mapping.
///
/// The schema defines the shared options once, and each component that has them refers to that definition. A name in
/// both structs is an error in the registration, which [`Registry::faults`](crate::Registry::faults) reports.
///
/// A component is usually a struct of its own around it, so that it can implement the trait of its kind:
/// ```
/// use maskalign_registry::{SharedOptions, With, decode_options};
/// use schemars::JsonSchema;
/// use serde::{Deserialize, Serialize};
/// use serde_json::json;
///
/// #[derive(Serialize, Deserialize, JsonSchema)]
/// #[serde(deny_unknown_fields)]
/// struct Training {
///     /// Epochs to train for.
///     epochs: f64,
///     /// Images of an update.
///     batch: u32,
/// }
///
/// impl SharedOptions for Training {
///     const LAST: &'static [&'static str] = &["batch"];
/// }
///
/// #[derive(Serialize, Deserialize, JsonSchema)]
/// #[serde(deny_unknown_fields)]
/// struct ProbeOptions {
///     /// The stage whose student is measured.
///     student: String,
/// }
///
/// #[derive(Serialize, Deserialize, JsonSchema)]
/// #[serde(transparent)]
/// struct Probe(With<Training, ProbeOptions>);
///
/// let probe: Probe = decode_options(json!({ "student": "pretrain", "batch": 8, "epochs": 90 })).unwrap();
/// assert_eq!(probe.0.own.student, "pretrain");
/// assert_eq!(probe.0.shared.batch, 8);
/// assert_eq!(serde_json::to_string(&probe).unwrap(), r#"{"epochs":90.0,"student":"pretrain","batch":8}"#);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct With<S, O> {
    /// The shared options.
    pub shared: S,
    /// The component's own options.
    pub own: O,
}

impl<'de, S: SharedOptions, O: DeserializeOwned> Deserialize<'de> for With<S, O> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let known = field_names::<S>();
        let options = Options::deserialize(deserializer)?;
        let (shared, own): (Options, Options) =
            options.into_iter().partition(|(name, _)| known.contains(&name.as_str()));
        Ok(With { shared: decode_part(Value::Object(shared))?, own: decode_part(Value::Object(own))? })
    }
}

/// The keys that a struct decodes, which its derived `Deserialize` passes to the format.
fn field_names<T: DeserializeOwned>() -> &'static [&'static str] {
    struct Probe<'p>(&'p mut &'static [&'static str]);

    impl<'de> Deserializer<'de> for Probe<'_> {
        type Error = ProbeError;

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, ProbeError> {
            Err(de::Error::custom("there is nothing to decode"))
        }

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            visitor: V,
        ) -> Result<V::Value, ProbeError> {
            *self.0 = fields;
            self.deserialize_any(visitor)
        }

        forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
            unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }

    let mut names: &'static [&'static str] = &[];
    // Decoding fails, but only after it has named its fields.
    let _ = T::deserialize(Probe(&mut names));
    names
}

impl<S: SharedOptions, O: Serialize> Serialize for With<S, O> {
    fn serialize<T: Serializer>(&self, serializer: T) -> Result<T::Ok, T::Error> {
        let map = |value: Result<Value, serde_json::Error>| match value {
            Ok(Value::Object(map)) => Ok(map),
            Ok(other) => Err(T::Error::custom(format_args!("options are a mapping, not {other}"))),
            Err(error) => Err(T::Error::custom(error)),
        };
        let (last, first) = split_last::<S>(map(serde_json::to_value(&self.shared))?);
        let own = map(serde_json::to_value(&self.own))?;
        serializer.collect_map(first.into_iter().chain(own).chain(last))
    }
}

/// The shared options that follow a component's own, and those that precede them.
fn split_last<S: SharedOptions>(map: Options) -> (Options, Options) {
    map.into_iter().partition(|(name, _)| S::LAST.contains(&name.as_str()))
}

impl<S: SharedOptions, O: JsonSchema> JsonSchema for With<S, O> {
    fn inline_schema() -> bool {
        // A newtype around it then has this schema itself, not a reference to it.
        true
    }

    fn schema_name() -> Cow<'static, str> {
        O::schema_name()
    }

    fn schema_id() -> Cow<'static, str> {
        Cow::Owned(format!("With<{}, {}>", S::schema_id(), O::schema_id()))
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let mut whole = O::json_schema(generator);
        let own = take_map(&mut whole, "properties");
        let mut shared = S::json_schema(generator);
        let properties = take_map(&mut shared, "properties");
        // The generator chooses the definition's name; a struct whose schema is inline has none.
        let definition = generator.subschema_for::<S>();
        let definition = definition.get("$ref").and_then(Value::as_str);
        let refer = |(name, schema): (String, Value)| match definition {
            Some(definition) => (name.clone(), json!({ "$ref": format!("{definition}/properties/{name}") })),
            None => (name, schema),
        };
        let twice: Vec<Value> =
            properties.keys().filter(|name| own.contains_key(*name)).map(|name| json!(name)).collect();
        let (last, first) = split_last::<S>(properties.into_iter().map(refer).collect());
        let mut options = first;
        options.extend(own);
        options.extend(last);
        let mut required = take_list(&mut shared, "required");
        required.extend(take_list(&mut whole, "required"));
        required.sort_by_key(|name| options.keys().position(|option| *name == option.as_str()));
        whole.insert("properties".to_owned(), Value::Object(options));
        if !required.is_empty() {
            whole.insert("required".to_owned(), Value::Array(required));
        }
        if !twice.is_empty() {
            whole.insert(NAMED_TWICE.to_owned(), Value::Array(twice));
        }
        whole
    }
}

/// The keyword under which a schema lists names that are in both structs.
pub(crate) const NAMED_TWICE: &str = "x-named-twice";

fn take_map(schema: &mut Schema, keyword: &str) -> Options {
    match schema.remove(keyword) {
        Some(Value::Object(map)) => map,
        _ => Options::new(),
    }
}

fn take_list(schema: &mut Schema, keyword: &str) -> Vec<Value> {
    match schema.remove(keyword) {
        Some(Value::Array(list)) => list,
        _ => Vec::new(),
    }
}
