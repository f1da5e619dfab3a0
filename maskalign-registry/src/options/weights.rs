//! [`Weights`]: where a tower's parameters come from.

use std::{borrow::Cow, fmt};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, MapAccess, Visitor, value::MapAccessDeserializer},
    ser::SerializeMap as _,
};

/// Where a tower's parameters come from: a file, `hf://org/repo[@revision][/file]`, one of several towers in such a file, or
/// the student of an earlier stage.
///
/// ```
/// use maskalign_registry::Weights;
///
/// assert_eq!(Weights::parse("teacher.safetensors"), Ok(Weights::Path("teacher.safetensors".into())));
/// let Ok(Weights::Hub { repo, revision, .. }) = Weights::parse("hf://facebook/dinov2-base@main") else {
///     panic!("it is an address of the hub");
/// };
/// assert_eq!((repo.as_str(), revision.as_deref()), ("facebook/dinov2-base", Some("main")));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Weights {
    /// A file on this machine.
    Path(String),
    /// A file of the Hugging Face hub, read from the local cache.
    Hub {
        /// `org/name`.
        repo: String,
        /// A branch, tag or commit; the cache's `main` if absent.
        revision: Option<String>,
        /// The file in the repository; the usual names are tried if absent.
        file: Option<String>,
    },
    /// One of several towers in a file.
    Part {
        /// The file: [`Weights::Path`] or [`Weights::Hub`].
        file: Box<Weights>,
        /// What stands before its tensors' names there, such as `teacher` or `model_ema`.
        key: String,
    },
    /// Weights embedded in the program.
    Embedded(String),
    /// The student of the stage of that name.
    Stage(String),
}

impl Weights {
    /// The file, and what stands before the wanted tensors' names in it where that is said; `None` for weights that are in
    /// no file.
    pub fn file(&self) -> Option<(&Weights, Option<&str>)> {
        match self {
            Weights::Path(_) | Weights::Hub { .. } => Some((self, None)),
            Weights::Part { file, key } => Some((file, Some(key))),
            Weights::Embedded(_) | Weights::Stage(_) => None,
        }
    }

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
            Weights::Part { file, key } => write!(f, "{file} under `{key}`"),
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
            Weights::Part { file, key } => {
                let mut map = serializer.serialize_map(Some(2))?;
                map.serialize_entry("path", &file.to_string())?;
                map.serialize_entry("key", key)?;
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
        struct Named {
            stage: Option<String>,
            path: Option<String>,
            key: Option<String>,
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
                match Named::deserialize(MapAccessDeserializer::new(map))? {
                    Named { stage: Some(stage), path: None, key: None } => Ok(Weights::Stage(stage)),
                    Named { stage: None, path: Some(path), key: Some(key) } => match Weights::parse(&path) {
                        Ok(file @ (Weights::Path(_) | Weights::Hub { .. })) => {
                            Ok(Weights::Part { file: Box::new(file), key })
                        }
                        Ok(_) => Err(de::Error::custom(format!("`{path}` is one tower: leave `key` out"))),
                        Err(message) => Err(de::Error::custom(message)),
                    },
                    _ => Err(de::Error::custom(format!("expected {WEIGHT_FORMS}"))),
                }
            }
        }
        deserializer.deserialize_any(Form)
    }
}

const WEIGHT_FORMS: &str =
    "a path, hf://org/repo[@revision][/file], embedded://NAME, {stage: NAME}, or {path: FILE, key: NAME}";

/// Agrees with [`Weights::parse`]: an address on the hub, embedded weights, or text without `://`.
const WEIGHT_PATTERN: &str = concat!(
    r"^hf://[^/@:\s]+/[^/@:\s]+(@[^/\s]+)?(/[^/\s]+)*$",
    r"|^embedded://[A-Za-z0-9_]+$",
    r"|^[^:]*(:+(/:+)*/?[^:/][^:]*)*(:+(/:+)*/?)?$",
);

/// As [`WEIGHT_PATTERN`], without what is embedded.
const FILE_PATTERN: &str =
    concat!(r"^hf://[^/@:\s]+/[^/@:\s]+(@[^/\s]+)?(/[^/\s]+)*$", r"|^[^:]*(:+(/:+)*/?[^:/][^:]*)*(:+(/:+)*/?)?$",);

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
                "path": {
                    "type": "string",
                    "pattern": FILE_PATTERN,
                    "minLength": 1,
                    "x-expected": "a path or hf://org/repo[@revision][/file]",
                    "description": "A file that holds several towers.",
                },
                "key": {
                    "type": "string",
                    "minLength": 1,
                    "description": "What stands before the wanted tensors' names in it, such as `teacher` or `model_ema`.",
                },
            },
            "minProperties": 1,
            "maxProperties": 2,
            "dependencies": { "path": ["key"], "key": ["path"] },
            "additionalProperties": false,
            "x-expected": WEIGHT_FORMS,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json, to_value};

    use super::*;

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
        let part = Weights::Part { file: Box::new(hub("a/b", None, None)), key: "teacher".to_owned() };
        let form = json!({"path": "hf://a/b", "key": "teacher"});
        assert_eq!(from_value::<Weights>(form.clone()).expect("a part"), part);
        assert_eq!(to_value(&part).expect("json"), form);
        for wrong in [
            json!({}),
            json!({"path": "a"}),
            json!({"key": "a"}),
            json!({"stage": "a", "key": "b"}),
            json!({"path": "embedded://a", "key": "b"}),
        ] {
            assert!(from_value::<Weights>(wrong.clone()).is_err(), "{wrong}");
        }
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
