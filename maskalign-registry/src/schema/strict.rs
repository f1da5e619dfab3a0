//! The schemas that documents are checked against.

use std::collections::{BTreeMap, HashMap};

use regex::Regex;
use schemars::{
    generate::SchemaSettings,
    transform::{ReplacePrefixItems, Transform as _},
};
use serde_json::{Map, Value, json};

use super::{
    keywords::{ANNOTATIONS, each_subschema},
    reference,
};
use crate::plugin::{Entry, Kind};

/// The strict schemas that documents are checked against.
#[derive(Debug)]
pub struct Schemas {
    root: Value,
    components: BTreeMap<Kind, BTreeMap<&'static str, Value>>,
    definitions: Map<String, Value>,
    /// Every `pattern`, compiled once.
    patterns: HashMap<String, Regex>,
}

impl Schemas {
    pub(crate) fn build(entries: &[&'static Entry]) -> Schemas {
        let mut generator = SchemaSettings::draft07()
            .with(|settings| {
                // Without the transform that moves siblings of `$ref` into `allOf`: descriptions
                // beside `$ref` are what editors show, and `tidy` moves everything else.
                settings.transforms = vec![Box::new(ReplacePrefixItems::default())];
            })
            .into_generator();
        let mut components: BTreeMap<Kind, BTreeMap<&'static str, Value>> = BTreeMap::new();
        for entry in entries {
            let mut schema = (entry.schema)(&mut generator);
            ReplacePrefixItems::default().transform(&mut schema);
            let mut schema = schema.to_value();
            tidy(&mut schema);
            close(&mut schema);
            components.entry(entry.kind).or_default().insert(entry.name, schema);
        }
        let mut definitions = generator.take_definitions(true);
        for schema in definitions.values_mut() {
            tidy(schema);
        }
        definitions.sort_keys();
        let root = strict_root();
        let mut patterns = Vec::new();
        for schema in components.values().flat_map(BTreeMap::values).chain(definitions.values()) {
            collect_patterns(schema, &mut patterns);
        }
        collect_patterns(&root, &mut patterns);
        let patterns =
            patterns.into_iter().filter_map(|pattern| Some((pattern.clone(), Regex::new(&pattern).ok()?))).collect();
        Schemas { root, components, definitions, patterns }
    }

    /// The schema of a whole recipe, without `extends`.
    pub fn root(&self) -> &Value {
        &self.root
    }

    /// The schema of a component's options, without `type`.
    pub fn component(&self, kind: Kind, name: &str) -> Option<&Value> {
        self.components.get(&kind)?.get(name)
    }

    /// The shared definitions that components refer to.
    pub fn definitions(&self) -> &Map<String, Value> {
        &self.definitions
    }

    /// A `pattern` of these schemas, compiled; `None` if Rust's `regex` cannot read it.
    pub fn pattern(&self, pattern: &str) -> Option<&Regex> {
        self.patterns.get(pattern)
    }

    /// The patterns of a component's options that Rust's `regex` cannot read.
    pub(crate) fn unread_patterns(&self, entry: &Entry) -> Vec<String> {
        let mut found = Vec::new();
        if let Some(schema) = self.component(entry.kind, entry.name) {
            collect_patterns(schema, &mut found);
            let properties = schema.get("properties").and_then(Value::as_object);
            for (_, option) in properties.into_iter().flatten().filter(|(_, option)| reference(option).is_some()) {
                collect_patterns(self.option(option), &mut found);
            }
        }
        found.retain(|pattern| !self.patterns.contains_key(pattern));
        found
    }

    /// Follows references to shared definitions, but not to kinds, which are slots.
    pub(crate) fn resolve<'s>(&'s self, schema: &'s Value) -> &'s Value {
        let mut schema = schema;
        // Definitions that refer to each other in a circle lead to no schema.
        for _ in 0..=(2 * self.definitions.len()) {
            match reference(schema) {
                Some(name) if Kind::from_name(name).is_none() => match self.referred(name) {
                    Some(target) => schema = target,
                    None => return schema,
                },
                _ => return schema,
            }
        }
        schema
    }

    /// The target of a reference: a definition, or an option of a definition that components share.
    fn referred(&self, reference: &str) -> Option<&Value> {
        match reference.split_once('/') {
            Some((name, option)) => self.definitions.get(name)?.pointer(&format!("/{option}")),
            None => self.definitions.get(reference),
        }
    }

    /// The schema of an option, which for a shared one is in the definition.
    pub(crate) fn option<'s>(&'s self, schema: &'s Value) -> &'s Value {
        match reference(schema) {
            Some(shared) if shared.contains('/') => self.referred(shared).unwrap_or(schema),
            _ => schema,
        }
    }

    /// The kind of component that fills this place, if it is a slot, looking through `null` branches and references.
    pub(crate) fn slot(&self, schema: &Value) -> Option<Kind> {
        let schema = self.without_null(schema);
        reference(schema).and_then(Kind::from_name)
    }

    /// The schema without its `null` branch and without wrappers around a single schema.
    pub(crate) fn without_null<'s>(&'s self, schema: &'s Value) -> &'s Value {
        const DEEPEST: usize = 16;
        let mut schema = self.resolve(schema);
        for _ in 0..DEEPEST {
            let branches = ["anyOf", "oneOf", "allOf"].iter().find_map(|keyword| schema.get(keyword)?.as_array());
            let Some(branches) = branches else {
                return schema;
            };
            let mut present = branches.iter().filter(|branch| branch.get("type") != Some(&json!("null")));
            match (present.next(), present.next()) {
                (Some(only), None) => schema = self.resolve(only),
                _ => return schema,
            }
        }
        schema
    }
}

fn collect_patterns(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(object) => {
            if let Some(Value::String(pattern)) = object.get("pattern") {
                found.push(pattern.clone());
            }
            object.values().for_each(|value| collect_patterns(value, found));
        }
        Value::Array(items) => items.iter().for_each(|item| collect_patterns(item, found)),
        _ => {}
    }
}

/// Reduces what schemars generates to the subset that is checked.
fn tidy(schema: &mut Value) {
    if let Value::Object(object) = schema {
        object.shift_remove("title");
        object.shift_remove("$schema");
        if let Some(format) = object.shift_remove("format") {
            bound_by_format(object, &format);
        }
        if let Some(Value::String(description)) = object.get_mut("description") {
            *description = unwrap_lines(description);
        }
        merge_enum_branches(object);
        bound_ramp(object);
        wrap_reference(object);
    }
    each_subschema(schema, &mut tidy);
}

/// Closes the object, unless the schema says otherwise.
fn close(schema: &mut Value) {
    if let Value::Object(object) = schema {
        object.entry("type").or_insert(json!("object"));
        if !object.contains_key("additionalProperties") {
            object.insert("additionalProperties".to_owned(), json!(false));
        }
    }
}

/// Turns `uint8` and the like into bounds; other formats are not checked.
fn bound_by_format(object: &mut Map<String, Value>, format: &Value) {
    let (low, high) = match format.as_str() {
        Some("uint8") => (json!(0), json!(u8::MAX)),
        Some("uint16") => (json!(0), json!(u16::MAX)),
        Some("uint32") => (json!(0), json!(u32::MAX)),
        Some("uint64" | "uint") => (json!(0), json!(u64::MAX)),
        Some("int8") => (json!(i8::MIN), json!(i8::MAX)),
        Some("int16") => (json!(i16::MIN), json!(i16::MAX)),
        Some("int32") => (json!(i32::MIN), json!(i32::MAX)),
        Some("int64" | "int") => (json!(i64::MIN), json!(i64::MAX)),
        _ => return,
    };
    if !object.contains_key("exclusiveMinimum") {
        object.entry("minimum").or_insert(low);
    }
    if !object.contains_key("exclusiveMaximum") {
        object.entry("maximum").or_insert(high);
    }
}

/// Joins the lines of each paragraph, since doc comments are wrapped by hand, and leaves out the Rust example at their end.
fn unwrap_lines(text: &str) -> String {
    let text = text.split("\n```").next().unwrap_or_default().trim_end();
    let paragraphs: Vec<String> =
        text.split("\n\n").map(|paragraph| paragraph.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    paragraphs.join("\n\n")
}

/// Turns `oneOf: [{const: a, description}, ...]`, which schemars writes for documented unit
/// variants, into one `enum` with descriptions.
fn merge_enum_branches(object: &mut Map<String, Value>) {
    let Some(branches) = object.get("oneOf").and_then(Value::as_array) else {
        return;
    };
    let mut words = Vec::new();
    let mut descriptions = Vec::new();
    for branch in branches {
        let description = branch.get("description").and_then(Value::as_str).unwrap_or("");
        match (branch.get("const"), branch.get("enum").and_then(Value::as_array)) {
            (Some(word @ Value::String(_)), _) => {
                words.push(word.clone());
                descriptions.push(json!(unwrap_lines(description)));
            }
            (None, Some(values)) if values.iter().all(Value::is_string) => {
                words.extend(values.iter().cloned());
                descriptions.extend(values.iter().map(|_| json!(unwrap_lines(description))));
            }
            _ => return,
        }
    }
    object.shift_remove("oneOf");
    object.insert("type".to_owned(), json!("string"));
    object.insert("enum".to_owned(), Value::Array(words));
    object.insert("markdownEnumDescriptions".to_owned(), Value::Array(descriptions));
}

/// A range on a [`Scalar`](crate::Scalar) field binds both ends of a ramp too.
fn bound_ramp(object: &mut Map<String, Value>) {
    if object.shift_remove("x-ramp").is_none() {
        return;
    }
    for bound in ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"] {
        let Some(value) = object.get(bound).cloned() else {
            continue;
        };
        for end in ["from", "to"] {
            let pointer = object.get_mut("properties").and_then(|properties| properties.get_mut(end));
            if let Some(Value::Object(end)) = pointer {
                end.insert(bound.to_owned(), value.clone());
            }
        }
    }
}

/// Draft-07 ignores keywords beside `$ref`: those that restrict the value move into an `allOf` with it.
fn wrap_reference(object: &mut Map<String, Value>) {
    let restricts = |keyword: &str| keyword != "$ref" && !ANNOTATIONS.contains(&keyword);
    if !object.contains_key("$ref") || !object.keys().any(|keyword| restricts(keyword)) {
        return;
    }
    let (annotations, rest): (Map<String, Value>, Map<String, Value>) =
        std::mem::take(object).into_iter().partition(|(keyword, _)| ANNOTATIONS.contains(&keyword.as_str()));
    let (reference, rest): (Map<String, Value>, Map<String, Value>) =
        rest.into_iter().partition(|(keyword, _)| keyword == "$ref");
    *object = annotations;
    object.insert("allOf".to_owned(), json!([reference, rest]));
}

const NAME_PATTERN: &str = "^[A-Za-z0-9][A-Za-z0-9_.-]*$";
const STAGE_NAME_PATTERN: &str = "^[A-Za-z_][A-Za-z0-9_-]*$";

pub(super) fn strict_root() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {
                "type": "string",
                "pattern": NAME_PATTERN,
                "x-expected": "letters, digits, `_`, `-` and `.`, beginning with a letter or digit",
                "description": "The recipe's name; run directories are named after it.",
            },
            "description": {
                "type": ["string", "null"],
                "description": "What the recipe is for; it changes nothing.",
            },
            "seed": {
                "type": "integer",
                "minimum": 0,
                "maximum": u64::MAX,
                "default": 0,
                "description": "Everything random follows from it.",
            },
            "stages": {
                "type": "object",
                "minProperties": 1,
                "propertyNames": {
                    "pattern": STAGE_NAME_PATTERN,
                    "x-expected": "letters, digits, `_` and `-`, beginning with a letter",
                },
                "additionalProperties": { "$ref": "#/definitions/stage" },
                "description": "Named stages, run in the order in which they are written.",
            },
        },
        "required": ["name", "stages"],
        "additionalProperties": false,
    })
}
