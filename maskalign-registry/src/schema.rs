//! The schemas of all that is registered: strict ones for the decoder, one draft-07 document for
//! editors.
//!
//! Both come from the same structs, so that an editor and the decoder agree on structure. The
//! editor's document differs in three ways: `${VARIABLE}` is legal for any scalar; a component is
//! chosen by `if`/`then` on `type`, which is the form in which yaml-language-server both completes
//! the options of the chosen component and complains of the one that is wrong; and a recipe that
//! extends another is held to definitions in which nothing is required.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use regex::Regex;
use schemars::{
    generate::SchemaSettings,
    transform::{ReplacePrefixItems, Transform as _},
};
use serde_json::{Map, Value, json};

use crate::{
    plugin::{Entry, Kind, OptionDoc, Registry},
    source::number,
};

const DEFINITIONS: &str = "#/definitions/";

/// Keywords that say something of a value without restricting it.
const ANNOTATIONS: [&str; 6] = ["description", "markdownDescription", "default", "examples", "title", "deprecated"];

/// The strict schemas that the decoder walks.
#[derive(Debug)]
pub struct Schemas {
    root: Value,
    components: BTreeMap<Kind, BTreeMap<&'static str, Value>>,
    definitions: Map<String, Value>,
    /// Every `pattern`, compiled once.
    patterns: HashMap<String, Regex>,
}

impl Schemas {
    pub(crate) fn build(registry: &Registry) -> Schemas {
        let mut generator = SchemaSettings::draft07()
            .with(|settings| {
                // Without the transform that moves siblings of `$ref` into `allOf`: descriptions
                // beside `$ref` are what editors show, and `tidy` moves all else.
                settings.transforms = vec![Box::new(ReplacePrefixItems::default())];
            })
            .into_generator();
        let mut components: BTreeMap<Kind, BTreeMap<&'static str, Value>> = BTreeMap::new();
        for entry in registry.entries() {
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

    /// The schema of a whole recipe, `extends` left out.
    pub fn root(&self) -> &Value {
        &self.root
    }

    /// The schema of a component's options, `type` left out.
    pub fn component(&self, kind: Kind, name: &str) -> Option<&Value> {
        self.components.get(&kind)?.get(name)
    }

    /// The shared definitions that components refer to.
    pub fn definitions(&self) -> &Map<String, Value> {
        &self.definitions
    }

    /// A `pattern` of these schemas; nothing where it is no regular expression that Rust's `regex`
    /// reads.
    pub fn pattern(&self, pattern: &str) -> Option<&Regex> {
        self.patterns.get(pattern)
    }

    /// The patterns of a component's own options that Rust's `regex` does not read.
    pub(crate) fn unread_patterns(&self, entry: &Entry) -> Vec<String> {
        let mut found = Vec::new();
        if let Some(schema) = self.component(entry.kind, entry.name) {
            collect_patterns(schema, &mut found);
        }
        found.retain(|pattern| !self.patterns.contains_key(pattern));
        found
    }

    /// Follows references to shared definitions. References to kinds are left: they are slots.
    pub(crate) fn resolve<'s>(&'s self, schema: &'s Value) -> &'s Value {
        let mut schema = schema;
        // Definitions that refer to each other in a circle name no schema at all.
        for _ in 0..self.definitions.len() + 1 {
            match reference(schema) {
                Some(name) if Kind::from_name(name).is_none() => match self.definitions.get(name) {
                    Some(target) => schema = target,
                    None => return schema,
                },
                _ => return schema,
            }
        }
        schema
    }

    /// The kind of component that fills this place, where it is a slot; seen through `null`
    /// branches and references.
    pub(crate) fn slot(&self, schema: &Value) -> Option<Kind> {
        let schema = self.without_null(schema);
        reference(schema).and_then(Kind::from_name)
    }

    /// The schema without its `null` branch, and without a wrapper of one.
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

    /// What may be written, in words.
    pub(crate) fn expected(&self, schema: &Value) -> String {
        let mut forms = Vec::new();
        self.forms(schema, &mut forms, 0);
        forms.dedup();
        match forms.as_slice() {
            [] => "any value".to_owned(),
            [one] => one.clone(),
            [init @ .., last] => format!("{} or {last}", init.join(", ")),
        }
    }

    fn forms(&self, schema: &Value, forms: &mut Vec<String>, depth: usize) {
        const DEEPEST: usize = 4;
        let schema = self.resolve(schema);
        if let Some(expected) = schema.get("x-expected").and_then(Value::as_str) {
            forms.push(expected.replacen("number", &format!("number{}", range(schema)), 1));
            return;
        }
        if let Some(kind) = reference(schema).and_then(Kind::from_name) {
            forms.push(format!("{} (a mapping with `type`)", with_article(kind.name())));
            return;
        }
        if depth > DEEPEST {
            forms.push("a value".to_owned());
            return;
        }
        if let Some(values) = words(schema) {
            forms.push(match values.as_slice() {
                [one] => format!("`{one}`"),
                _ => {
                    let quoted: Vec<String> = values.iter().map(|v| format!("`{v}`")).collect();
                    format!("one of {}", quoted.join(", "))
                }
            });
            return;
        }
        for keyword in ["anyOf", "oneOf", "allOf"] {
            if let Some(branches) = schema.get(keyword).and_then(Value::as_array) {
                for branch in branches {
                    if branch.get("type") != Some(&json!("null")) {
                        self.forms(branch, forms, depth + 1);
                    }
                }
                return;
            }
        }
        for name in types(schema) {
            let form = match name {
                "integer" => format!("a whole number{}", range(schema)),
                "number" => format!("a number{}", range(schema)),
                "boolean" => "`true` or `false`".to_owned(),
                "string" => "a string".to_owned(),
                "array" => self.list_form(schema, depth),
                "object" => "a mapping".to_owned(),
                _ => continue,
            };
            forms.push(form);
        }
    }

    fn list_form(&self, schema: &Value, depth: usize) -> String {
        let count = |keyword| schema.get(keyword).and_then(Value::as_u64);
        let length = match (count("minItems"), count("maxItems")) {
            (Some(low), Some(high)) if low == high => format!(" of {low}"),
            (Some(low), Some(high)) => format!(" of {low} to {high}"),
            (Some(low), None) if low > 0 => format!(" of at least {low}"),
            (_, Some(high)) => format!(" of at most {high}"),
            _ => String::new(),
        };
        match schema.get("items") {
            Some(items @ Value::Object(_)) => {
                let mut forms = Vec::new();
                self.forms(items, &mut forms, depth + 1);
                format!("a list{length}, each {}", forms.join(" or "))
            }
            _ => format!("a list{length}"),
        }
    }
}

pub(crate) fn with_article(noun: &str) -> String {
    let article = if noun.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
    format!("{article} {noun}")
}

/// The name of the definition that a schema refers to.
pub(crate) fn reference(schema: &Value) -> Option<&str> {
    schema.get("$ref")?.as_str()?.strip_prefix(DEFINITIONS)
}

/// The types that a schema admits; empty where it names none.
pub(crate) fn types(schema: &Value) -> Vec<&str> {
    match schema.get("type") {
        Some(Value::String(one)) => vec![one.as_str()],
        Some(Value::Array(many)) => many.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    }
}

/// The words that a schema admits, where it is a choice among words.
pub(crate) fn words(schema: &Value) -> Option<Vec<String>> {
    let word = |value: &Value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Null => None,
        other => Some(other.to_string()),
    };
    match (schema.get("const"), schema.get("enum").and_then(Value::as_array)) {
        (Some(value), _) => word(value).map(|word| vec![word]),
        (None, Some(values)) => Some(values.iter().filter_map(word).collect()),
        (None, None) => None,
    }
}

/// ` of at least 1`, ` between 0 and 1`, or nothing.
pub(crate) fn range(schema: &Value) -> String {
    let bound = |keyword| schema.get(keyword).filter(|bound| bound.is_number() && !is_huge(bound)).map(shown_bound);
    let low = (bound("minimum"), bound("exclusiveMinimum"));
    let high = (bound("maximum"), bound("exclusiveMaximum"));
    match (low, high) {
        ((Some(low), None), (Some(high), None)) => format!(" from {low} to {high}"),
        ((Some(low), _), (_, Some(high))) => format!(" of at least {low} and below {high}"),
        ((_, Some(low)), (Some(high), _)) => format!(" above {low} and at most {high}"),
        ((_, Some(low)), (_, Some(high))) => format!(" above {low} and below {high}"),
        ((Some(low), _), _) => format!(" of at least {low}"),
        ((_, Some(low)), _) => format!(" above {low}"),
        (_, (Some(high), _)) => format!(" of at most {high}"),
        (_, (_, Some(high))) => format!(" below {high}"),
        _ => String::new(),
    }
}

/// A bound as a person writes it: 1, not 1.0.
pub(crate) fn shown_bound(bound: &Value) -> String {
    match bound.as_f64() {
        Some(value) if bound.is_f64() => number(value),
        _ => bound.to_string(),
    }
}

/// Whether a bound is only that of 32 or 64 bits, which no person needs to be told.
fn is_huge(bound: &Value) -> bool {
    bound.as_f64().is_some_and(|bound| bound.abs() > 2e9)
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

/// Applies `change` to every schema directly below this one.
fn each_subschema(schema: &mut Value, change: &mut dyn FnMut(&mut Value)) {
    let Value::Object(object) = schema else {
        return;
    };
    for (keyword, value) in object.iter_mut() {
        match keyword.as_str() {
            "properties" | "definitions" | "patternProperties" => {
                if let Value::Object(schemas) = value {
                    schemas.values_mut().for_each(&mut *change);
                }
            }
            "anyOf" | "oneOf" | "allOf" => {
                if let Value::Array(schemas) = value {
                    schemas.iter_mut().for_each(&mut *change);
                }
            }
            "items" => match value {
                Value::Array(schemas) => schemas.iter_mut().for_each(&mut *change),
                one => change(one),
            },
            "additionalProperties"
            | "additionalItems"
            | "propertyNames"
            | "contains"
            | "not"
            | "if"
            | "then"
            | "else" => change(value),
            _ => {}
        }
    }
}

/// Brings what schemars writes into the subset that the decoder enforces.
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
        gather_words(object);
        bound_ramp(object);
        set_reference_apart(object);
    }
    each_subschema(schema, &mut tidy);
}

/// A closed object, where the schema does not say otherwise.
fn close(schema: &mut Value) {
    if let Value::Object(object) = schema {
        object.entry("type").or_insert(json!("object"));
        if !object.contains_key("additionalProperties") {
            object.insert("additionalProperties".to_owned(), json!(false));
        }
    }
}

/// Turns `uint8` and the like into bounds; other formats say nothing that is checked.
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

/// Doc comments are wrapped by hand: joins the lines of each paragraph.
fn unwrap_lines(text: &str) -> String {
    let paragraphs: Vec<String> =
        text.split("\n\n").map(|paragraph| paragraph.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    paragraphs.join("\n\n")
}

/// Turns `oneOf: [{const: a, description}, ...]`, which schemars writes for documented unit
/// variants, into one `enum` with descriptions.
fn gather_words(object: &mut Map<String, Value>) {
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

/// Draft-07 ignores what stands beside `$ref`: anything that restricts moves beside it in `allOf`.
fn set_reference_apart(object: &mut Map<String, Value>) {
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

fn strict_root() -> Value {
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

/// The options of a component as a person reads them.
pub(crate) fn option_docs(schemas: &Schemas, entry: &Entry) -> Vec<OptionDoc> {
    let Some(schema) = schemas.component(entry.kind, entry.name) else {
        return Vec::new();
    };
    let required: BTreeSet<&str> = required(schema).collect();
    let properties = schema.get("properties").and_then(Value::as_object);
    properties
        .into_iter()
        .flatten()
        .map(|(name, schema)| {
            let target = schemas.without_null(schema);
            let description = schema.get("description").or_else(|| target.get("description"));
            OptionDoc {
                name: name.clone(),
                expected: schemas.expected(schema),
                required: required.contains(name.as_str()),
                default: schema.get("default").cloned(),
                description: description.and_then(Value::as_str).unwrap_or("").to_owned(),
                kind: schemas.slot(schema).map(Kind::name),
            }
        })
        .collect()
}

/// The keys that a schema requires.
pub(crate) fn required(schema: &Value) -> impl Iterator<Item = &str> {
    let required = schema.get("required").and_then(Value::as_array);
    required.into_iter().flatten().filter_map(Value::as_str)
}

/// One JSON Schema (draft-07) of every recipe that this binary reads, for editors.
pub fn recipe_schema(registry: &Registry) -> Value {
    let schemas = registry.schemas();
    let mut definitions: BTreeMap<String, Value> = BTreeMap::new();
    for (name, schema) in schemas.definitions() {
        definitions.insert(name.clone(), schema.clone());
    }
    for kind in Kind::ALL {
        definitions.insert(kind.name().to_owned(), kind_definition(registry, kind, ""));
        for entry in registry.of_kind(kind) {
            definitions.insert(entry.address(), branch(schemas, entry));
        }
    }
    let partial: Vec<(String, Value)> = definitions
        .iter()
        .filter(|(name, _)| Kind::from_name(name).is_none())
        .map(|(name, schema)| {
            let mut schema = schema.clone();
            make_partial(&mut schema);
            (format!("partial.{name}"), schema)
        })
        .collect();
    definitions.extend(partial);
    for kind in Kind::ALL {
        let any = any_branch(&definitions, registry, kind);
        definitions.insert(format!("partial.{kind}.any"), any);
        definitions.insert(format!("partial.{kind}"), kind_definition(registry, kind, "partial."));
    }
    for schema in definitions.values_mut() {
        admit_variables(schema);
        add_markdown(schema);
    }
    let definitions: Map<String, Value> = definitions.into_iter().collect();
    let mut root = editor_root();
    admit_variables(&mut root);
    root["definitions"] = Value::Object(definitions);
    drop_unused(&mut root);
    root
}

fn editor_root() -> Value {
    let Value::Object(strict) = strict_root() else {
        return Value::Null;
    };
    let mut properties = strict.get("properties").cloned().unwrap_or_default();
    properties["extends"] = json!({
        "anyOf": [
            { "type": "string", "minLength": 1 },
            { "type": "array", "items": { "type": "string", "minLength": 1 } },
        ],
        "description": "Recipes to start from: paths relative to this file, or names of built-in recipes; later ones win.",
    });
    let mut stages = properties["stages"].take();
    let description = stages["description"].clone();
    properties["stages"] = json!({ "type": "object", "description": description });
    stages.as_object_mut().map(|stages| stages.shift_remove("description"));
    let mut partial = stages.clone();
    partial["additionalProperties"] = json!({ "$ref": "#/definitions/partial.stage" });
    partial.as_object_mut().map(|stages| stages.shift_remove("minProperties"));
    json!({
        "$schema": "http://json-schema.org/draft-07/schema#",
        "description": "A MaskAlign recipe: named stages, each a component with its options.",
        "type": "object",
        "properties": properties,
        "additionalProperties": false,
        "if": { "required": ["extends"] },
        "then": { "properties": { "stages": partial } },
        "else": { "properties": { "stages": stages }, "required": ["name", "stages"] },
    })
}

/// The definition of a kind: `type` chooses the branch.
fn kind_definition(registry: &Registry, kind: Kind, prefix: &str) -> Value {
    let names: Vec<&str> = registry.of_kind(kind).map(|entry| entry.name).collect();
    let summaries: Vec<&str> = registry.of_kind(kind).map(|entry| entry.summary).collect();
    let mut branches: Vec<Value> = names
        .iter()
        .map(|name| {
            json!({
                "if": { "properties": { "type": { "const": name } }, "required": ["type"] },
                "then": { "$ref": format!("{DEFINITIONS}{prefix}{kind}.{name}") },
            })
        })
        .collect();
    let mut definition = json!({
        "type": "object",
        "description": kind.description(),
        "properties": {
            "type": {
                "type": "string",
                "description": format!("The {kind}."),
                "enum": names,
                "markdownEnumDescriptions": summaries,
            },
        },
    });
    if prefix.is_empty() {
        definition["required"] = json!(["type"]);
    } else {
        branches.push(json!({
            "if": { "not": { "required": ["type"] } },
            "then": { "$ref": format!("{DEFINITIONS}{prefix}{kind}.any") },
        }));
    }
    if !branches.is_empty() {
        definition["allOf"] = Value::Array(branches);
    }
    definition
}

/// One component as it stands in a recipe: its options and `type`.
fn branch(schemas: &Schemas, entry: &Entry) -> Value {
    let mut schema = schemas.component(entry.kind, entry.name).cloned().unwrap_or_else(|| json!({}));
    let Value::Object(object) = &mut schema else {
        return schema;
    };
    let mut properties = Map::new();
    properties.insert("type".to_owned(), json!({ "const": entry.name, "description": entry.summary }));
    if let Some(Value::Object(options)) = object.shift_remove("properties") {
        properties.extend(options);
    }
    let mut required = vec![json!("type")];
    if let Some(Value::Array(options)) = object.shift_remove("required") {
        required.extend(options);
    }
    let additional = object.shift_remove("additionalProperties").unwrap_or(json!(false));
    let mut branch = json!({
        "type": "object",
        "description": entry.summary,
        "properties": properties,
        "required": required,
        "additionalProperties": additional,
    });
    if let Ok(example) = entry.example_value()
        && !example.is_null()
    {
        branch["examples"] = json!([example]);
    }
    branch
}

/// Nothing is required, and references go to partial definitions.
fn make_partial(schema: &mut Value) {
    if let Value::Object(object) = schema {
        object.shift_remove("required");
        object.shift_remove("minProperties");
        object.shift_remove("examples");
        if let Some(Value::String(target)) = object.get_mut("$ref") {
            let name = target.strip_prefix(DEFINITIONS).unwrap_or(target);
            *target = format!("{DEFINITIONS}partial.{name}");
        }
    }
    each_subschema(schema, &mut make_partial);
}

/// A component whose `type` its base decides: any option of any component of the kind.
fn any_branch(definitions: &BTreeMap<String, Value>, registry: &Registry, kind: Kind) -> Value {
    let mut options: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
    for entry in registry.of_kind(kind) {
        let properties = definitions
            .get(&format!("partial.{}", entry.address()))
            .and_then(|schema| schema.get("properties")?.as_object());
        for (name, schema) in properties.into_iter().flatten().filter(|(name, _)| *name != "type") {
            let forms = options.entry(name).or_default();
            if !forms.contains(&schema) {
                forms.push(schema);
            }
        }
    }
    let properties: Map<String, Value> = options
        .into_iter()
        .map(|(name, forms)| {
            let schema = match forms.as_slice() {
                [one] => (*one).clone(),
                many => json!({ "anyOf": many }),
            };
            (name.to_owned(), schema)
        })
        .collect();
    json!({
        "type": "object",
        "properties": properties,
        "additionalProperties": false,
    })
}

const VARIABLE_PATTERN: &str = r"\$\{";

/// Lets `${VARIABLE}` stand for any scalar.
fn admit_variables(schema: &mut Value) {
    if schema.get("if").is_some() && schema.get("then").is_some() && schema.get("properties").is_none() {
        // A branch on `type`: the condition must stay exact.
        if let Some(then) = schema.get_mut("then") {
            admit_variables(then);
        }
        return;
    }
    each_subschema(schema, &mut admit_variables);
    let Value::Object(object) = schema else {
        return;
    };
    let variable = json!({ "type": "string", "pattern": VARIABLE_PATTERN });
    if object.contains_key("const") || object.contains_key("enum") {
        let (annotations, exact): (Map<String, Value>, Map<String, Value>) =
            std::mem::take(object).into_iter().partition(|(keyword, _)| ANNOTATIONS.contains(&keyword.as_str()));
        *object = annotations;
        object.insert("anyOf".to_owned(), json!([exact, variable]));
        return;
    }
    let names: Vec<String> = types_of(object);
    let is_scalar = |name: &String| matches!(name.as_str(), "number" | "integer" | "boolean");
    if names.iter().any(|name| name == "string") {
        if let Some(Value::String(pattern)) = object.get_mut("pattern") {
            *pattern = format!("(?:{pattern})|{VARIABLE_PATTERN}");
            explain_pattern(object);
        }
    } else if names.iter().any(is_scalar) {
        let names: Vec<Value> = names.into_iter().map(Value::String).chain([json!("string")]).collect();
        object.insert("type".to_owned(), Value::Array(names));
        object.insert("pattern".to_owned(), json!(VARIABLE_PATTERN));
        explain_pattern(object);
    }
}

/// Says in words what a string that fails the pattern should have been; editors show it.
fn explain_pattern(object: &mut Map<String, Value>) {
    let expected = match object.get("x-expected").and_then(Value::as_str) {
        Some(expected) => expected.to_owned(),
        None => {
            let names: Vec<&str> = object
                .get("type")
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
                .filter_map(|name| match name {
                    "number" => Some("a number"),
                    "integer" => Some("a whole number"),
                    "boolean" => Some("true or false"),
                    _ => None,
                })
                .collect();
            if names.is_empty() {
                return;
            }
            names.join(" or ")
        }
    };
    let message = format!("expected {expected} (or a variable: ${{NAME}})");
    object.insert("patternErrorMessage".to_owned(), json!(message));
}

fn types_of(object: &Map<String, Value>) -> Vec<String> {
    match object.get("type") {
        Some(Value::String(one)) => vec![one.clone()],
        Some(Value::Array(many)) => many.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        _ => Vec::new(),
    }
}

/// Editors escape `description`; where it holds Markdown they are given it as such.
fn add_markdown(schema: &mut Value) {
    if let Value::Object(object) = schema
        && let Some(description) = object.get("description").and_then(Value::as_str)
        && description.contains(['`', '*', '_', '['])
    {
        let markdown = json!(description);
        object.insert("markdownDescription".to_owned(), markdown);
    }
    each_subschema(schema, &mut add_markdown);
}

/// Removes definitions that nothing refers to.
fn drop_unused(root: &mut Value) {
    let mut used = BTreeSet::new();
    let mut open = Vec::new();
    {
        let Value::Object(object) = &*root else {
            return;
        };
        for (_, schema) in object.iter().filter(|(keyword, _)| *keyword != "definitions") {
            collect_references(schema, &mut open);
        }
        while let Some(name) = open.pop() {
            if let Some(schema) = object.get("definitions").and_then(|all| all.get(&name))
                && used.insert(name)
            {
                collect_references(schema, &mut open);
            }
        }
    }
    if let Some(Value::Object(definitions)) = root.get_mut("definitions") {
        definitions.retain(|name, _| used.contains(name));
    }
}

fn collect_references(schema: &Value, found: &mut Vec<String>) {
    match schema {
        Value::Object(object) => {
            found.extend(reference(schema).map(str::to_owned));
            object.values().for_each(|value| collect_references(value, found));
        }
        Value::Array(items) => items.iter().for_each(|item| collect_references(item, found)),
        _ => {}
    }
}
