//! `docs/reference.md`, written from what is registered.

use std::fmt::Write;

use crate::support::{assert_committed, here};
use maskalign_core::embedded;
use maskalign_registry::{Entry, Kind, OptionDoc, Registry, recipe_schema};
use serde_json::Value;

const INTRODUCTION: &str = "\
What a recipe may say: the components of each kind, their options, and the mappings and words that several of them share.
`maskalign explain KIND.NAME` prints the same of one component, plugins included, and an editor with a YAML language
server shows it while a recipe is written.

A component is chosen by `type`; its options stand beside it. An option without a default must be given unless it says
*may be left out*. Every scalar may be a variable, `${NAME}` or `${NAME:-default}`.
";

fn registry() -> &'static Registry {
    // A built-in that nothing mentions might not be linked.
    assert!(!embedded::RECIPES.is_empty());
    Registry::global().expect("no two components have one name")
}

/// Text as a cell of a table.
fn cell(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

/// Whether a definition of the schema is a mapping or a set of words that components share.
fn is_shared(name: &str) -> bool {
    !name.contains('.') && Kind::from_name(name).is_none()
}

/// The first shared definition that a schema points to.
fn shared_in(schema: &Value) -> Option<&str> {
    match schema {
        Value::Object(fields) => {
            let own = fields
                .get("$ref")
                .and_then(Value::as_str)
                .and_then(|target| target.strip_prefix("#/definitions/"))
                .filter(|name| is_shared(name));
            own.or_else(|| fields.values().find_map(shared_in))
        }
        Value::Array(items) => items.iter().find_map(shared_in),
        _ => None,
    }
}

fn default_of(default: Option<&Value>, required: bool) -> String {
    match default {
        _ if required => "required".to_owned(),
        None | Some(Value::Null) => "*may be left out*".to_owned(),
        Some(value) => format!("`{value}`"),
    }
}

fn link(name: &str) -> String {
    format!("[{name}](#{})", name.to_lowercase())
}

/// What may be written for an option, with a link to where that is described.
fn expected(option: &OptionDoc, schema: &Value) -> String {
    let mut text = cell(&option.expected);
    if let Some(name) = shared_in(schema) {
        let _ = write!(text, "; see {}", link(name));
    } else if let Some(kind) = option.kind.and_then(Kind::from_name) {
        let _ = write!(text, "; see [{0}](#{0})", kind.plural());
    }
    text
}

const HEADING: &str = "| option | value | default | meaning |\n|---|---|---|---|\n";

fn component(out: &mut String, registry: &Registry, entry: &Entry, schema: &Value) {
    let _ = write!(out, "\n### {}\n\n{}", entry.address(), cell(entry.summary));
    if !entry.paper.is_empty() {
        let _ = write!(out, " ({})", entry.paper);
    }
    let example = match entry.kind {
        Kind::Stage | Kind::Teacher => format!("NAME: {}", entry.example),
        Kind::Transform => format!("- {}", entry.example),
        kind => format!("{kind}: {}", entry.example),
    };
    let _ = write!(out, "\n\n```yaml\n{example}\n```\n");
    let options = registry.options(entry);
    if options.is_empty() {
        return;
    }
    let _ = write!(out, "\n{HEADING}");
    for option in &options {
        let property = &schema["definitions"][entry.address()]["properties"][&option.name];
        let _ = writeln!(
            out,
            "| `{}` | {} | {} | {} |",
            option.name,
            expected(option, property),
            default_of(option.default.as_ref(), option.required),
            cell(&option.description)
        );
    }
}

/// What a shared mapping's key takes: another mapping, a component, or whatever the type says.
fn takes(schema: &Value) -> String {
    if let Some(name) = shared_in(schema) {
        return link(name);
    }
    let target = |value: &Value| {
        let name = value["$ref"].as_str()?.strip_prefix("#/definitions/")?;
        let kind = Kind::from_name(name)?;
        Some(format!("[{}](#{})", kind.name(), kind.plural()))
    };
    if let Some(kind) = target(schema) {
        return kind;
    }
    if let Some(kind) = target(&schema["items"]) {
        return format!("a list, each a {kind}");
    }
    if let Some(words) = schema["x-expected"].as_str() {
        return cell(words);
    }
    let mut choices = schema["anyOf"].as_array().into_iter().flatten();
    if let Some(words) = choices.find_map(|choice| choice["enum"].as_array()) {
        let words: Vec<String> = words.iter().map(|word| format!("`{}`", word.as_str().unwrap_or_default())).collect();
        return words.join(", ");
    }
    let types = match &schema["type"] {
        Value::Array(all) => all.iter().filter_map(Value::as_str).collect(),
        Value::String(one) => vec![one.as_str()],
        _ => Vec::new(),
    };
    let described = [
        ("integer", "a whole number"),
        ("number", "a number"),
        ("array", "a list"),
        ("object", "a mapping"),
        ("boolean", "`true` or `false`"),
        ("string", "a string"),
    ];
    let named = described.iter().find(|(name, _)| types.contains(name));
    let mut text = named.map_or("a value", |(_, words)| words).to_owned();
    if let Some(least) = schema["minimum"].as_f64() {
        let _ = write!(text, " of at least {least}");
    }
    text
}

fn shared(out: &mut String, name: &str, schema: &Value) {
    let _ = write!(out, "\n### {name}\n\n{}\n", schema["description"].as_str().unwrap_or_default());
    if let Some(properties) = schema["properties"].as_object() {
        let required = schema["required"].as_array().into_iter().flatten();
        let required: Vec<&str> = required.filter_map(Value::as_str).collect();
        let _ = write!(out, "\n{HEADING}");
        for (key, property) in properties {
            let _ = writeln!(
                out,
                "| `{key}` | {} | {} | {} |",
                takes(property),
                default_of(property.get("default"), required.contains(&key.as_str())),
                cell(property["description"].as_str().unwrap_or_default())
            );
        }
    }
    for choice in schema["anyOf"].as_array().into_iter().flatten() {
        let Some(words) = choice["enum"].as_array() else {
            continue;
        };
        let _ = write!(out, "\n| word | meaning |\n|---|---|\n");
        for (index, word) in words.iter().enumerate() {
            let meaning = choice["markdownEnumDescriptions"][index].as_str().unwrap_or_default();
            let _ = writeln!(out, "| `{}` | {} |", word.as_str().unwrap_or_default(), cell(meaning));
        }
    }
}

fn reference() -> String {
    let registry = registry();
    let schema = recipe_schema(registry);
    let mut out = format!(
        "# Reference of components\n\n\
         <!-- Written by `SNAPSHOTS=overwrite cargo test -p maskalign-tests reference::`; edits are overwritten. -->\n\n\
         {INTRODUCTION}\n"
    );
    for kind in Kind::ALL {
        let names: Vec<String> = registry
            .of_kind(kind)
            .map(|entry| format!("[{}](#{})", entry.name, entry.address().replace('.', "")))
            .collect();
        let _ = writeln!(out, "* [{0}](#{0}): {1}", kind.plural(), names.join(", "));
    }
    out.push_str("* [shared mappings and words](#shared-mappings-and-words)\n");
    for kind in Kind::ALL {
        let _ = write!(out, "\n## {}\n\n{}\n", kind.plural(), kind.description());
        for entry in registry.of_kind(kind) {
            component(&mut out, registry, entry, &schema);
        }
    }
    out.push_str("\n## shared mappings and words\n\nWhat the options of several components take.\n");
    let definitions = schema["definitions"].as_object().expect("definitions");
    for (name, definition) in definitions.iter().filter(|(name, _)| is_shared(name)) {
        shared(&mut out, name, definition);
    }
    out
}

#[test]
fn the_committed_reference_is_the_one_of_this_registry() {
    assert_committed(&here().join("../docs/reference.md"), reference());
}

/// What the page shows can be copied: each example stands for its component, complete and well-formed.
#[test]
fn every_example_is_a_component_of_its_kind() {
    let registry = registry();
    let mut seen = 0;
    for entry in registry.entries() {
        let checked = registry.component(entry.kind, "example", entry.example);
        let checked = checked.unwrap_or_else(|report| panic!("{}: {report}", entry.address()));
        assert_eq!(checked["type"], entry.name, "{}", entry.address());
        for option in registry.options(entry) {
            assert!(!option.description.is_empty(), "{}: {}", entry.address(), option.name);
        }
        seen += 1;
    }
    assert!(seen >= 25, "{seen} components");
}

/// Every link of the page leads to one of its headings, under the names that Markdown gives them.
#[test]
fn every_link_of_the_reference_has_its_heading() {
    let page = reference();
    let anchors: Vec<String> = page
        .lines()
        .filter_map(|line| line.strip_prefix('#'))
        .map(|line| line.trim_start_matches('#').trim().to_lowercase().replace(' ', "-").replace('.', ""))
        .collect();
    for link in page.split("](#").skip(1) {
        let target = link.split(')').next().expect("a target");
        assert!(anchors.iter().any(|anchor| anchor == target), "#{target}");
    }
}
