//! One draft-07 schema of every recipe, for editors.
//!
//! It differs from the strict schemas in three ways: `${VARIABLE}` is legal for any scalar; a component is chosen by
//! `if`/`then` on `type`, which is the form in which yaml-language-server both completes the options of the chosen
//! component and reports the one that is wrong; and a recipe that extends another is checked against definitions in
//! which nothing is required, everything named may be `null`, and a mapping may start anew (`$replace`).

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::{
    Schemas,
    keywords::{ANNOTATIONS, DEFINITIONS, each_subschema},
    reference,
    strict::strict_root,
};
use crate::{
    compose::REPLACE,
    plugin::{Entry, Kind},
};

/// One JSON Schema (draft-07) of every recipe that this binary reads, for editors.
pub(crate) fn document(schemas: &Schemas, entries: &[&'static Entry]) -> Value {
    let mut definitions: BTreeMap<String, Value> = BTreeMap::new();
    for (name, schema) in schemas.definitions() {
        definitions.insert(name.clone(), schema.clone());
    }
    for kind in Kind::ALL {
        definitions.insert(kind.name().to_owned(), kind_definition(entries, kind, ""));
        for entry in of_kind(entries, kind) {
            definitions.insert(entry.address(), branch(schemas, entry));
        }
    }
    let partial: Vec<(String, Value)> = definitions
        .iter()
        .filter(|(name, _)| Kind::from_name(name).is_none())
        .map(|(name, schema)| {
            let mut schema = schema.clone();
            make_partial(&mut schema);
            (format!("{PARTIAL}{name}"), schema)
        })
        .collect();
    definitions.extend(partial);
    for kind in Kind::ALL {
        let any = any_branch(&definitions, entries, kind);
        definitions.insert(format!("partial.{kind}.any"), any);
        definitions.insert(format!("partial.{kind}"), kind_definition(entries, kind, "partial."));
    }
    for (name, schema) in &mut definitions {
        admit_variables(schema);
        if name.starts_with(PARTIAL) {
            admit_removals(schema);
            admit_replacement(schema);
        }
        add_markdown(schema);
    }
    let definitions: Map<String, Value> = definitions.into_iter().collect();
    let mut root = editor_root();
    admit_variables(&mut root);
    if let Some(stages) = root.pointer_mut("/then/properties/stages") {
        admit_removals(stages);
    }
    root["definitions"] = Value::Object(definitions);
    drop_unused(&mut root);
    root
}

fn of_kind(entries: &[&'static Entry], kind: Kind) -> impl Iterator<Item = &'static Entry> {
    entries.iter().copied().filter(move |entry| entry.kind == kind)
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
fn kind_definition(entries: &[&'static Entry], kind: Kind, prefix: &str) -> Value {
    let names: Vec<&str> = of_kind(entries, kind).map(|entry| entry.name).collect();
    let summaries: Vec<&str> = of_kind(entries, kind).map(|entry| entry.summary).collect();
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

/// Requires nothing, and refers to partial definitions.
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

/// Before the names of definitions for recipes that extend others.
const PARTIAL: &str = "partial.";

/// Lets `null` remove every entry and option of a recipe that extends another. What a component is cannot be removed.
fn admit_removals(schema: &mut Value) {
    if schema.get("if").is_some() && schema.get("properties").is_none() {
        // A branch on `type`, which refers to where its options are.
        return;
    }
    each_subschema(schema, &mut admit_removals);
    let Value::Object(object) = schema else {
        return;
    };
    if let Some(Value::Object(properties)) = object.get_mut("properties") {
        properties.iter_mut().filter(|(name, _)| *name != "type").for_each(|(_, option)| admit_null(option));
    }
    if let Some(entry @ Value::Object(_)) = object.get_mut("additionalProperties") {
        admit_null(entry);
        admit_replacement(schema);
    }
}

fn admit_null(schema: &mut Value) {
    let is_null = |branch: &Value| branch.get("type") == Some(&json!("null"));
    let Value::Object(object) = schema else {
        return;
    };
    let (annotations, mut rest): (Map<String, Value>, Map<String, Value>) =
        std::mem::take(object).into_iter().partition(|(keyword, _)| ANNOTATIONS.contains(&keyword.as_str()));
    *object = annotations;
    let is_shared = rest.get("$ref").and_then(Value::as_str).is_some_and(|target| target.contains("/properties/"));
    let names = types_of(&rest);
    if rest.is_empty() || is_shared || names.iter().any(|name| name == "null") {
        // It may be anything, the option that it refers to may be null, or it may be null itself.
    } else if !names.is_empty() && !rest.contains_key("enum") && !rest.contains_key("const") {
        rest.insert("type".to_owned(), names.into_iter().map(Value::String).chain([json!("null")]).collect());
    } else {
        match rest.get_mut("anyOf").and_then(Value::as_array_mut) {
            Some(branches) if branches.iter().any(is_null) => {}
            Some(branches) => branches.push(json!({ "type": "null" })),
            None => {
                let either = json!([rest, { "type": "null" }]);
                rest = Map::from_iter([("anyOf".to_owned(), either)]);
            }
        }
    }
    object.extend(rest);
}

/// Lets a mapping of named entries or options start anew.
fn admit_replacement(schema: &mut Value) {
    let Value::Object(object) = schema else {
        return;
    };
    let is_there = object.get("properties").is_some_and(|properties| properties.get(REPLACE).is_some());
    if is_there || !object.contains_key("additionalProperties") {
        return;
    }
    let properties = object.entry("properties").or_insert_with(|| json!({}));
    properties[REPLACE] = json!({
        "const": true,
        "description": "Starts this mapping anew: nothing that is inherited in it stays.",
    });
    if let Some(Value::String(pattern)) = object.get_mut("propertyNames").and_then(|names| names.get_mut("pattern")) {
        *pattern = format!("(?:{pattern})|^{}$", REPLACE.replace('$', r"\$"));
    }
}

/// A component whose `type` is set by a base: any option of any component of the kind.
fn any_branch(definitions: &BTreeMap<String, Value>, entries: &[&'static Entry], kind: Kind) -> Value {
    let mut options: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
    for entry in of_kind(entries, kind) {
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
        // A branch on `type`, whose condition must stay exact.
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

/// Adds the message that editors show for a string that does not match the pattern.
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

/// Editors escape `description`, so a description with Markdown is also given as `markdownDescription`.
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
            // A reference to an option of a definition uses the definition.
            let name = reference(schema).and_then(|reference| reference.split('/').next());
            found.extend(name.map(str::to_owned));
            object.values().for_each(|value| collect_references(value, found));
        }
        Value::Array(items) => items.iter().for_each(|item| collect_references(item, found)),
        _ => {}
    }
}
