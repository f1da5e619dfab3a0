//! Values that know where they come from.

use indexmap::IndexMap;
use serde_json::{Number, Value};

use crate::{
    diagnostic::{Diagnostic, Place, SourceKind},
    wording::{number, quoted},
};

/// Where a value comes from.
#[derive(Clone, Debug)]
pub enum Origin {
    /// A recipe file or an embedded recipe.
    File(Place),
    /// `--set`.
    Flag(Place),
    /// An environment variable, or the default written beside its name.
    Variable {
        /// The variable.
        name: String,
        /// Where `${...}` stands.
        at: Place,
    },
    /// Not written anywhere: the component's default.
    Default,
}

impl Origin {
    /// Where it was written; nothing for defaults.
    pub fn place(&self) -> Option<&Place> {
        match self {
            Origin::File(place) | Origin::Flag(place) | Origin::Variable { at: place, .. } => Some(place),
            Origin::Default => None,
        }
    }

    pub(crate) fn new(place: Place) -> Origin {
        match place.source.kind() {
            SourceKind::File | SourceKind::Builtin => Origin::File(place),
            SourceKind::Flag => Origin::Flag(place),
        }
    }
}

/// A value with its origin.
#[derive(Clone, Debug)]
pub struct Node {
    /// The value.
    pub content: Content,
    /// Where it comes from.
    pub origin: Origin,
    /// What decides the type of a scalar.
    pub(crate) typing: Typing,
}

/// What decides the type of a scalar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Typing {
    /// Its text: it is a plain scalar.
    Text,
    /// Its syntax: it is quoted, tagged, or a collection.
    Fixed,
    /// The option that it is given to: it is quoted, but consists of one variable alone. Inside `{ }` a variable has to
    /// be quoted.
    Option,
}

/// What a [`Node`] holds.
#[derive(Clone, Debug)]
pub enum Content {
    /// `null`, `~`, or nothing.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A whole number between the least `i64` and the greatest `u64`.
    Int(i128),
    /// Any other number; may be infinite or not a number.
    Float(f64),
    /// Text.
    Str(String),
    /// A list.
    Seq(Vec<Node>),
    /// A mapping.
    Map(Mapping),
    /// A scalar with a `${...}` that has no value; an error where it is read.
    Unset {
        /// The scalar, with `$NAME` where a value is missing.
        text: String,
        /// What is wrong with its variables.
        diagnostics: Vec<Diagnostic>,
    },
    /// What a `null` removed, while recipes are merged; a composed document has none.
    Removed {
        /// The key of what was there.
        was: Box<Origin>,
    },
}

/// A mapping in the order in which it was written.
pub type Mapping = IndexMap<String, Member>;

/// A value of a mapping, with the origin of its key.
#[derive(Clone, Debug)]
pub struct Member {
    /// Where the key stands.
    pub key: Origin,
    /// The value.
    pub value: Node,
}

impl Content {
    /// What it is, for messages: ``the string `abc` ``, `a mapping`.
    pub(crate) fn describe(&self) -> String {
        match self {
            Content::Null | Content::Removed { .. } => "nothing".to_owned(),
            Content::Bool(value) => format!("the boolean `{value}`"),
            Content::Int(value) => format!("the number `{value}`"),
            Content::Float(value) => format!("the number `{}`", number(*value)),
            Content::Str(text) => format!("the string {}", quoted(text)),
            Content::Seq(_) => "a list".to_owned(),
            Content::Map(_) => "a mapping".to_owned(),
            Content::Unset { .. } => "an unset variable".to_owned(),
        }
    }
}

impl Node {
    /// The mapping, where it is one.
    pub fn as_map(&self) -> Option<&Mapping> {
        match &self.content {
            Content::Map(map) => Some(map),
            _ => None,
        }
    }

    /// The text, where it is text.
    pub fn as_str(&self) -> Option<&str> {
        match &self.content {
            Content::Str(text) => Some(text),
            _ => None,
        }
    }

    /// The value under a key or an index.
    pub fn child(&self, segment: &str) -> Option<&Node> {
        match &self.content {
            Content::Map(map) => map.get(segment).map(|member| &member.value),
            Content::Seq(items) => items.get(segment.parse::<usize>().ok()?),
            _ => None,
        }
    }

    /// As [`Node::child`], to change it.
    pub(crate) fn child_mut(&mut self, segment: &str) -> Option<&mut Node> {
        match &mut self.content {
            Content::Map(map) => map.get_mut(segment).map(|member| &mut member.value),
            Content::Seq(items) => items.get_mut(segment.parse::<usize>().ok()?),
            _ => None,
        }
    }

    /// A value that was not written in a recipe, with one origin for all of it.
    pub(crate) fn of_json(value: &Value, origin: &Origin) -> Node {
        let content = match value {
            Value::Null => Content::Null,
            Value::Bool(value) => Content::Bool(*value),
            Value::Number(number) => match (number.as_i64(), number.as_u64()) {
                (Some(whole), _) => Content::Int(whole.into()),
                (None, Some(whole)) => Content::Int(whole.into()),
                (None, None) => Content::Float(number.as_f64().unwrap_or(f64::NAN)),
            },
            Value::String(text) => Content::Str(text.clone()),
            Value::Array(items) => Content::Seq(items.iter().map(|item| Node::of_json(item, origin)).collect()),
            Value::Object(members) => {
                let member = |value| Member { key: origin.clone(), value: Node::of_json(value, origin) };
                Content::Map(members.iter().map(|(key, value)| (key.clone(), member(value))).collect())
            }
        };
        Node { content, origin: origin.clone(), typing: Typing::Fixed }
    }

    /// The value as JSON; numbers that JSON lacks and unset variables become null.
    pub fn to_json(&self) -> Value {
        match &self.content {
            Content::Null | Content::Unset { .. } | Content::Removed { .. } => Value::Null,
            Content::Bool(value) => Value::Bool(*value),
            Content::Int(value) => integer(*value).map_or(Value::Null, Value::Number),
            Content::Float(value) => Number::from_f64(*value).map_or(Value::Null, Value::Number),
            Content::Str(text) => Value::String(text.clone()),
            Content::Seq(items) => items.iter().map(Node::to_json).collect(),
            Content::Map(map) => map.iter().map(|(key, member)| (key.clone(), member.value.to_json())).collect(),
        }
    }
}

/// A whole number as JSON, where it fits 64 bits.
pub(crate) fn integer(value: i128) -> Option<Number> {
    i64::try_from(value).map(Number::from).or_else(|_| u64::try_from(value).map(Number::from)).ok()
}
