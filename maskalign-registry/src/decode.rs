//! Nodes to typed configuration. Every mistake is collected, each with its place.
//!
//! The walk follows the strict schemas of [`Schemas`]: structure is decided there, so that editors
//! and the decoder agree. A component whose structure holds is then decoded into its own struct,
//! which may still refuse a value.

use std::sync::Arc;

use serde_json::{Map, Number, Value};

use crate::{
    diagnostic::{Diagnostic, Place, codes, list, quoted},
    plugin::{Entry, Kind, Registry, distance, nearest},
    schema::{Schemas, reference, required, shown_bound, types, with_article, words},
    source::{
        Content, Mapping, Member, Node, Origin, Source, SourceKind, Typing, integer, key_slip, number, resolve_plain,
    },
};

/// What a variable without a value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unset {
    /// A mistake.
    Mistake,
    /// Some scalar that fits: the recipe is not run on this machine.
    Unknown,
}

/// What checking a document found.
pub(crate) struct Checked {
    /// The document as JSON, where nothing is wrong. Stages that hold an unknown value are left out.
    pub value: Option<Value>,
    /// What is wrong with its structure.
    pub diagnostics: Vec<Diagnostic>,
    /// Names of teachers and stages that are not there.
    pub references: Vec<Diagnostic>,
    /// The variables that stages were left out for, with their paths.
    pub unknown: Vec<Diagnostic>,
}

/// Checks a document.
pub(crate) fn check(root: &Node, registry: &Registry, fallback: &Arc<Source>, unset: Unset) -> Checked {
    let mut checker = Checker { unset, ..Checker::new(root, registry, fallback) };
    let value = checker.value(root, registry.schemas().root(), None);
    let Checker { diagnostics, references, unknown, .. } = checker;
    Checked { value, diagnostics, references, unknown }
}

/// Checks one component that stands alone.
pub(crate) fn check_component(
    root: &Node,
    kind: Kind,
    registry: &Registry,
    fallback: &Arc<Source>,
) -> (Option<Value>, Vec<Diagnostic>) {
    let mut checker = Checker::new(root, registry, fallback);
    let value = checker.component(root, kind, None);
    (value, checker.diagnostics)
}

/// A mapping that encloses what is being checked.
struct Frame<'a> {
    schema: &'a Value,
    map: &'a Mapping,
    depth: usize,
    /// The component whose options these are.
    component: Option<&'static Entry>,
}

/// The component that a mapping is, and the key that says so.
#[derive(Clone, Copy)]
struct Chosen<'a> {
    entry: &'static Entry,
    key: &'a str,
}

struct Checker<'a> {
    registry: &'a Registry,
    schemas: &'a Schemas,
    root: &'a Node,
    fallback: &'a Arc<Source>,
    path: Vec<String>,
    frames: Vec<Frame<'a>>,
    diagnostics: Vec<Diagnostic>,
    references: Vec<Diagnostic>,
    unset: Unset,
    unknown: Vec<Diagnostic>,
}

impl<'a> Checker<'a> {
    fn new(root: &'a Node, registry: &'a Registry, fallback: &'a Arc<Source>) -> Checker<'a> {
        Checker {
            registry,
            schemas: registry.schemas(),
            root,
            fallback,
            path: Vec::new(),
            frames: Vec::new(),
            diagnostics: Vec::new(),
            references: Vec::new(),
            unset: Unset::Mistake,
            unknown: Vec::new(),
        }
    }

    fn place(&self, origin: &Origin) -> Place {
        origin.place().cloned().unwrap_or_else(|| Place { source: Arc::clone(self.fallback), span: 0..0 })
    }

    fn report(&mut self, diagnostic: Diagnostic) {
        let diagnostic = diagnostic.at(&self.path);
        self.diagnostics.push(diagnostic);
    }

    /// The JSON of a node that the schema admits; what is wrong is reported here.
    fn value(&mut self, node: &'a Node, schema: &'a Value, key: Option<&'a Origin>) -> Option<Value> {
        let schema = self.schemas.resolve(schema);
        if let Content::Unset { text, diagnostics } = &node.content {
            return self.unset(node, schema, text, diagnostics);
        }
        if let Some(kind) = reference(schema).and_then(Kind::from_name) {
            return self.component(node, kind, key);
        }
        if let Some(all) = schema.get("allOf").and_then(Value::as_array) {
            let before = self.diagnostics.len();
            let mut value = None;
            for part in all {
                value = self.value(node, part, key);
                if self.diagnostics.len() > before {
                    return None;
                }
            }
            return value;
        }
        for keyword in ["anyOf", "oneOf"] {
            if let Some(branches) = schema.get(keyword).and_then(Value::as_array) {
                return self.one_of(node, schema, branches, key);
            }
        }
        if let Some(words) = words(schema) {
            return self.word(node, schema, &words);
        }
        let names = types(schema);
        if !names.is_empty() && !admits(&names, node) {
            self.wrong_type(node, schema);
            return None;
        }
        if let Some(content) = retyped(&names, node) {
            let node = Node { content, origin: node.origin.clone(), typing: Typing::Text };
            return match node.content {
                Content::Int(number) => self.number(&node, schema, number as f64),
                Content::Float(number) => self.number(&node, schema, number),
                _ => Some(node.to_json()),
            };
        }
        match &node.content {
            Content::Int(number) => self.number(node, schema, *number as f64),
            Content::Float(number) => self.number(node, schema, *number),
            Content::Str(text) => self.string(node, schema, text),
            Content::Seq(items) => self.list(node, schema, items),
            Content::Map(map) => self.mapping(node, schema, map, key, None),
            Content::Null | Content::Bool(_) | Content::Unset { .. } => Some(node.to_json()),
        }
    }

    /// A scalar whose variables have no value.
    fn unset(&mut self, node: &Node, schema: &Value, text: &str, diagnostics: &[Diagnostic]) -> Option<Value> {
        let is_unset = |diagnostic: &Diagnostic| diagnostic.code == codes::UNSET_VARIABLE;
        if self.unset == Unset::Mistake || !diagnostics.iter().all(is_unset) {
            for diagnostic in diagnostics {
                self.report(diagnostic.clone());
            }
            return None;
        }
        if !self.takes_scalar(schema) {
            self.wrong_type(node, schema);
            return None;
        }
        // Free text stands for itself: whatever it is, the same is planned.
        let pattern = schema.get("pattern").and_then(Value::as_str).map(|pattern| self.schemas.pattern(pattern));
        let fits = |text: &String| pattern.is_none_or(|pattern| pattern.is_some_and(|pattern| pattern.is_match(text)));
        let is_free =
            types(schema).contains(&"string") && words(schema).is_none() && schema.get("x-reference").is_none();
        if is_free && let Some(text) = [text.to_owned(), text.replace('$', "")].into_iter().find(fits) {
            return Some(Value::String(text));
        }
        self.leave_unknown(diagnostics.to_vec());
        None
    }

    fn leave_unknown(&mut self, diagnostics: Vec<Diagnostic>) {
        let noted = self.unknown.iter().any(|noted| noted.path == self.path);
        if !noted {
            self.unknown.extend(diagnostics.into_iter().map(|diagnostic| diagnostic.at(&self.path)));
        }
    }

    /// Whether a schema admits some scalar.
    fn takes_scalar(&self, schema: &Value) -> bool {
        let schema = self.schemas.resolve(schema);
        if reference(schema).is_some() {
            return false;
        }
        for keyword in ["anyOf", "oneOf", "allOf"] {
            if let Some(branches) = schema.get(keyword).and_then(Value::as_array) {
                return branches.iter().any(|branch| self.takes_scalar(branch));
            }
        }
        let names = types(schema);
        names.is_empty() || names.iter().any(|name| !matches!(*name, "array" | "object"))
    }

    fn wrong_type(&mut self, node: &Node, schema: &Value) {
        let expected = self.schemas.expected(schema);
        let message = format!("expected {expected}, found {}{}", node.content.describe(), from_variable(node));
        let mut diagnostic = Diagnostic::error(codes::WRONG_TYPE, message, self.place(&node.origin));
        if let Some(help) = self.slip(node, schema) {
            diagnostic = diagnostic.help(help);
        }
        self.report(diagnostic);
    }

    /// The usual reason for a value of a wrong type.
    fn slip(&self, node: &Node, schema: &Value) -> Option<String> {
        let names = types(schema);
        let has = |name: &str| names.contains(&name);
        match &node.content {
            Content::Str(text) => {
                let is_yes = ["yes", "no", "on", "off"].contains(&text.to_lowercase().as_str());
                if has("boolean") && is_yes {
                    return Some("write `true` or `false`: in YAML 1.2 `yes` and `no` are text".to_owned());
                }
                let is_number = |text: &str| matches!(resolve_plain(text), Content::Int(_) | Content::Float(_));
                let numeric = has("number") || has("integer");
                let quoted_word = has("boolean") && matches!(resolve_plain(text), Content::Bool(_));
                if quoted_word || (numeric && is_number(text)) {
                    return Some("remove the quotes: quoted values are text".to_owned());
                }
                if has("number") && text.ends_with('%') {
                    return Some("write a share such as 0.75, not a percentage".to_owned());
                }
                if let Some(name) = text.strip_prefix('$').filter(|name| is_variable(name)) {
                    return Some(format!("a variable needs braces: ${{{name}}}"));
                }
                if numeric && let Some(help) = number_slip(text) {
                    return Some(help);
                }
                if has("object")
                    && let Some((_, help)) = key_slip(text)
                {
                    return Some(help);
                }
                has("array").then(|| format!("write a list: [{text}]"))
            }
            Content::Int(_) | Content::Float(_) | Content::Bool(_) => {
                let text = self.place(&node.origin).text().to_owned();
                if has("string") && !has("array") {
                    return Some(format!("quote it to make it text: \"{text}\""));
                }
                has("array").then(|| format!("write a list: [{text}]"))
            }
            Content::Null => Some(self.nothing()),
            _ => None,
        }
    }

    /// The way out where nothing is written.
    fn nothing(&self) -> String {
        let name = self.path.last().map_or("", String::as_str);
        let held = self.frames.last().map(|frame| (frame.schema, frame.depth));
        match held {
            _ if name.parse::<usize>().is_ok() => "give a value, or remove the item".to_owned(),
            Some((schema, depth)) if depth + 1 == self.path.len() && !required(schema).any(|key| key == name) => {
                "give a value, or remove the key to have the default".to_owned()
            }
            _ => "give a value: it has no default".to_owned(),
        }
    }

    fn number(&mut self, node: &Node, schema: &Value, number: f64) -> Option<Value> {
        if !number.is_finite() {
            let message = format!("expected a finite number, found `{}`", self.shown(node));
            let place = self.place(&node.origin);
            self.report(Diagnostic::error(codes::OUT_OF_RANGE, message, place));
            return None;
        }
        let bound = |keyword: &str| schema.get(keyword).and_then(Value::as_f64);
        let shown = |keyword: &str| schema.get(keyword).map(shown_bound).unwrap_or_default();
        // Whole numbers are compared exactly: as a float the greatest `u64` is one more than it is.
        const PAST_U64: f64 = 18_446_744_073_709_551_616.0;
        let exceeds = match (&node.content, schema.get("maximum").and_then(Value::as_u64)) {
            (Content::Int(number), Some(bound)) => *number > i128::from(bound),
            (_, Some(u64::MAX)) => number >= PAST_U64,
            _ => bound("maximum").is_some_and(|bound| number > bound),
        };
        let fault = if bound("minimum").is_some_and(|bound| number < bound) {
            Some(format!("must be at least {}", shown("minimum")))
        } else if exceeds {
            Some(format!("must be at most {}", shown("maximum")))
        } else if bound("exclusiveMinimum").is_some_and(|bound| number <= bound) {
            Some(format!("must be above {}", shown("exclusiveMinimum")))
        } else if bound("exclusiveMaximum").is_some_and(|bound| number >= bound) {
            Some(format!("must be below {}", shown("exclusiveMaximum")))
        } else if bound("multipleOf").is_some_and(|step| step > 0.0 && number % step != 0.0) {
            Some(format!("must be a multiple of {}", shown("multipleOf")))
        } else {
            None
        };
        if let Some(fault) = fault {
            let name = match self.path.as_slice() {
                [] => String::new(),
                [.., list, index] if index.parse::<usize>().is_ok() => format!("`{list}.{index}` "),
                [.., name] => format!("`{name}` "),
            };
            let message = format!("{name}{fault}, found {}{}", self.shown(node), from_variable(node));
            let mut diagnostic = Diagnostic::error(codes::OUT_OF_RANGE, message, self.place(&node.origin));
            let range = crate::schema::range(schema);
            if !range.is_empty() {
                let noun = if types(schema).contains(&"number") { "number" } else { "whole number" };
                diagnostic = diagnostic.help(format!("expected a {noun}{range}"));
            }
            self.report(diagnostic);
            return None;
        }
        match &node.content {
            Content::Int(number) => integer(*number).map(Value::Number),
            _ if types(schema).contains(&"integer") && !types(schema).contains(&"number") => {
                integer(number as i128).map(Value::Number)
            }
            _ => Number::from_f64(number).map(Value::Number),
        }
    }

    /// A number as it was written, where a person wrote it here.
    fn shown(&self, node: &Node) -> String {
        match (&node.origin, node.origin.place()) {
            (Origin::File(_) | Origin::Flag(_), Some(place)) => place.text().to_owned(),
            _ => match &node.content {
                Content::Int(number) => number.to_string(),
                Content::Float(value) => number(*value),
                other => other.describe(),
            },
        }
    }

    fn string(&mut self, node: &Node, schema: &Value, text: &str) -> Option<Value> {
        let length = text.chars().count() as u64;
        let bound = |keyword: &str| schema.get(keyword).and_then(Value::as_u64);
        let expected = schema.get("x-expected").and_then(Value::as_str);
        let fault = if bound("minLength").is_some_and(|least| length < least) {
            Some(match (length, expected) {
                (0, Some(expected)) => format!("an empty string: expected {expected}"),
                (0, None) => "an empty string".to_owned(),
                _ => format!("expected at least {} characters", bound("minLength").unwrap_or(0)),
            })
        } else if bound("maxLength").is_some_and(|most| length > most) {
            Some(format!("expected at most {} characters", bound("maxLength").unwrap_or(0)))
        } else {
            let pattern = schema.get("pattern").and_then(Value::as_str);
            match pattern.and_then(|pattern| self.schemas.pattern(pattern)) {
                Some(pattern) if !pattern.is_match(text) => {
                    let expected = match expected {
                        Some(expected) => expected.to_owned(),
                        None => format!("text of the form {}", pattern.as_str()),
                    };
                    Some(format!("expected {expected}, found the string {}", quoted(text)))
                }
                _ => None,
            }
        };
        if let Some(fault) = fault {
            let message = format!("{fault}{}", from_variable(node));
            let place = self.place(&node.origin);
            self.report(Diagnostic::error(codes::OUT_OF_RANGE, message, place));
            return None;
        }
        let known = match schema.get("x-reference").and_then(Value::as_str) {
            Some("teacher") => self.teacher(node, text),
            Some("stage") => self.stage(node, text),
            _ => true,
        };
        known.then(|| Value::String(text.to_owned()))
    }

    /// Notes a name that nothing in the document has. It is no mistake of structure: what is planned can be refused as
    /// well, and says the same.
    fn misses(&mut self, diagnostic: Diagnostic) {
        let diagnostic = diagnostic.at(&self.path);
        if !self.references.iter().any(|noted| noted.path == diagnostic.path) {
            self.references.push(diagnostic);
        }
    }

    /// Looks a teacher up in the stage that encloses its name. Always true: the document says what it is.
    fn teacher(&mut self, node: &Node, name: &str) -> bool {
        let has_teachers =
            |frame: &&Frame<'a>| frame.schema.get("properties").is_some_and(|known| known.get("teachers").is_some());
        let Some(holder) = self.frames.iter().rev().find(has_teachers) else {
            return true;
        };
        let teachers = match holder.map.get("teachers").map(|member| &member.value.content) {
            Some(Content::Map(map)) => map.keys().map(String::as_str).collect(),
            None | Some(Content::Null) => Vec::new(),
            Some(_) => return true,
        };
        if !teachers.contains(&name) {
            let message = format!("no teacher is named {}{}", quoted(name), from_variable(node));
            let mut diagnostic = Diagnostic::error(codes::REFUSED, message, self.place(&node.origin));
            if teachers.is_empty() {
                diagnostic = diagnostic.help("the stage has no `teachers`");
            }
            self.misses(diagnostic.allowing(nearest(name, teachers.iter().copied()), teachers));
        }
        true
    }

    /// Looks a stage up among the earlier ones. False where it is one that cannot be known.
    fn stage(&mut self, node: &Node, name: &str) -> bool {
        let stages = self.frames.first().and_then(|root| root.map.get("stages")?.value.as_map());
        let (Some(stages), Some(own)) = (stages, self.path.get(1)) else {
            return true;
        };
        let earlier = || stages.iter().take_while(|(stage, _)| *stage != own);
        if earlier().any(|(stage, _)| stage == name) {
            let unknown: Vec<Diagnostic> = self
                .unknown
                .iter()
                .filter(|noted| noted.path.get(1).is_some_and(|stage| stage == name))
                .cloned()
                .collect();
            let known = unknown.is_empty();
            if !known {
                self.leave_unknown(unknown);
            }
            return known;
        }
        let trains = |member: &Member| {
            let kind = member.value.as_map().and_then(|map| map.get("type")?.value.as_str());
            let student = kind
                .and_then(|kind| self.schemas.component(Kind::Stage, kind))
                .and_then(|schema| schema.get("properties")?.get("student"));
            student.is_some_and(|student| self.schemas.slot(student) == Some(Kind::Student))
        };
        let known: Vec<&str> =
            earlier().filter(|(_, member)| trains(member)).map(|(stage, _)| stage.as_str()).collect();
        let message = format!("no earlier stage {} leaves a student{}", quoted(name), from_variable(node));
        let mut diagnostic = Diagnostic::error(codes::REFUSED, message, self.place(&node.origin));
        if name == own {
            diagnostic = diagnostic.help("a stage cannot start from what it leaves itself");
        } else if stages.contains_key(name) {
            diagnostic = diagnostic.help(format!("`{name}` comes later: stages run in the order in which they stand"));
        } else if known.is_empty() {
            diagnostic = diagnostic.help("no earlier stage trains one");
        }
        self.misses(diagnostic.allowing(nearest(name, known.iter().copied()), known));
        true
    }

    fn word(&mut self, node: &Node, schema: &Value, words: &[String]) -> Option<Value> {
        let json = node.to_json();
        let admitted = schema.get("const") == Some(&json)
            || schema.get("enum").and_then(Value::as_array).is_some_and(|values| values.contains(&json));
        if admitted {
            return Some(json);
        }
        let Content::Str(text) = &node.content else {
            self.wrong_type(node, schema);
            return None;
        };
        let name = self.path.last().cloned().unwrap_or_default();
        let what = match name.parse::<usize>() {
            Ok(_) => self.path.iter().rev().nth(1).cloned().unwrap_or_default(),
            Err(_) => name,
        };
        let message = format!("{} is not a value of `{what}`{}", quoted(text), from_variable(node));
        let diagnostic = Diagnostic::error(codes::UNKNOWN_VALUE, message, self.place(&node.origin))
            .allowing(nearest(text, words.iter().map(String::as_str)), words.iter().map(String::as_str));
        self.report(diagnostic);
        None
    }

    /// Takes the branch that fits what was written, so that the message speaks of that one.
    fn one_of(
        &mut self,
        node: &'a Node,
        schema: &'a Value,
        branches: &'a [Value],
        key: Option<&'a Origin>,
    ) -> Option<Value> {
        let mut fitting: Vec<&'a Value> = branches.iter().filter(|branch| self.fits(branch, node)).collect();
        if fitting.is_empty() {
            // A slot or null: whatever is no mapping was meant for the slot.
            fitting = branches.iter().filter(|branch| self.schemas.slot(branch).is_some()).collect();
        }
        match fitting.as_slice() {
            [] => {
                self.wrong_type(node, schema);
                None
            }
            [only] => self.value(node, only, key),
            several => {
                let mut best: Option<Vec<Diagnostic>> = None;
                for branch in several {
                    let kept = std::mem::take(&mut self.diagnostics);
                    let value = self.value(node, branch, key);
                    let found = std::mem::replace(&mut self.diagnostics, kept);
                    if found.is_empty() {
                        return value;
                    }
                    if best.as_ref().is_none_or(|best| found.len() < best.len()) {
                        best = Some(found);
                    }
                }
                self.diagnostics.extend(best.into_iter().flatten());
                None
            }
        }
    }

    /// Whether a branch admits values of the node's type.
    fn fits(&self, branch: &Value, node: &Node) -> bool {
        let branch = self.schemas.resolve(branch);
        if reference(branch).is_some() {
            return matches!(node.content, Content::Map(_));
        }
        for keyword in ["anyOf", "oneOf", "allOf"] {
            if let Some(inner) = branch.get(keyword).and_then(Value::as_array) {
                return inner.iter().any(|inner| reference(inner).is_some() || admits(&types(inner), node));
            }
        }
        let names = types(branch);
        if names.is_empty() {
            return match words(branch) {
                Some(_) => matches!(node.content, Content::Str(_)),
                None => true,
            };
        }
        admits(&names, node)
    }

    fn list(&mut self, node: &'a Node, schema: &'a Value, items: &'a [Node]) -> Option<Value> {
        let count = items.len() as u64;
        let bound = |keyword: &str| schema.get(keyword).and_then(Value::as_u64);
        let mut sound = true;
        let too_few = bound("minItems").is_some_and(|least| count < least);
        let too_many = bound("maxItems").is_some_and(|most| count > most);
        if too_few || too_many {
            let expected = self.schemas.expected(schema);
            let message = format!("expected {expected}, found a list of {count}");
            let place = self.place(&node.origin);
            self.report(Diagnostic::error(codes::OUT_OF_RANGE, message, place));
            sound = false;
        }
        let mut values = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            let item_schema = match schema.get("items") {
                Some(Value::Array(tuple)) => tuple.get(index).or(schema.get("additionalItems")),
                other => other,
            };
            self.path.push(index.to_string());
            let value = match item_schema {
                Some(item_schema) => self.value(item, item_schema, None),
                None => Some(item.to_json()),
            };
            self.path.pop();
            match value {
                Some(value) => values.push(value),
                None => sound = false,
            }
        }
        if schema.get("uniqueItems") == Some(&Value::Bool(true)) {
            for (index, value) in values.iter().enumerate() {
                if sound && values[..index].contains(value) {
                    let place = self.place(&items[index].origin);
                    let message = "the same item twice in a list of different ones";
                    self.report(Diagnostic::error(codes::OUT_OF_RANGE, message, place));
                    sound = false;
                }
            }
        }
        sound.then_some(Value::Array(values))
    }

    /// A mapping of options: of a component, where `chosen` says which.
    fn mapping(
        &mut self,
        node: &'a Node,
        schema: &'a Value,
        map: &'a Mapping,
        key: Option<&'a Origin>,
        chosen: Option<Chosen<'a>>,
    ) -> Option<Value> {
        let component = chosen.map(|chosen| chosen.entry);
        self.frames.push(Frame { schema, map, depth: self.path.len(), component });
        let properties = schema.get("properties").and_then(Value::as_object);
        let additional = schema.get("additionalProperties");
        let schema_of_names = schema.get("propertyNames");
        let mut missing: Vec<&str> = required(schema).filter(|name| !map.contains_key(*name)).collect();
        let mut meant = Vec::new();
        let mut sound = true;
        let mut object = Map::new();
        // A stage with a value that cannot be known is left out, and so is what stands at the top: it only ever has a
        // default.
        let may_leave_out = match self.path.as_slice() {
            [] => component.is_none(),
            [stages] => stages == "stages",
            _ => false,
        };
        for (name, member) in map {
            if chosen.is_some_and(|chosen| name == chosen.key) {
                continue;
            }
            self.path.push(name.clone());
            let unknown = self.unknown.len();
            let value = match (properties.and_then(|properties| properties.get(name)), additional) {
                (Some(schema), _) => self.value(&member.value, schema, Some(&member.key)),
                (None, Some(Value::Bool(false))) => {
                    meant.extend(self.unknown_key(name, member, properties, &missing));
                    None
                }
                (None, Some(schema @ Value::Object(_))) => {
                    if self.admits_name(name, &member.key, schema_of_names) {
                        self.value(&member.value, schema, Some(&member.key))
                    } else {
                        None
                    }
                }
                (None, _) => Some(member.value.to_json()),
            };
            self.path.pop();
            match value {
                Some(value) => {
                    object.insert(name.clone(), value);
                }
                None if may_leave_out && self.unknown.len() > unknown => {}
                None => sound = false,
            }
        }
        // A key under a wrong name is one mistake: it is unknown here, not missing there as well.
        missing.retain(|name| !meant.contains(name));
        if !missing.is_empty() {
            self.missing_keys(&missing, node, key, properties);
            sound = false;
        }
        let least = schema.get("minProperties").and_then(Value::as_u64).unwrap_or(0);
        if (map.len() as u64) < least {
            let name = self.path.last().map_or("the mapping", String::as_str);
            let message = format!("{} is empty", quoted(name));
            let place = self.place(key.unwrap_or(&node.origin));
            self.report(Diagnostic::error(codes::OUT_OF_RANGE, message, place));
            sound = false;
        }
        self.frames.pop();
        sound.then_some(Value::Object(object))
    }

    fn admits_name(&mut self, name: &str, key: &Origin, names: Option<&Value>) -> bool {
        let Some(names) = names else {
            return true;
        };
        let pattern = names.get("pattern").and_then(Value::as_str);
        match pattern.and_then(|pattern| self.schemas.pattern(pattern)) {
            Some(pattern) if !pattern.is_match(name) => {
                let expected = names.get("x-expected").and_then(Value::as_str).unwrap_or(pattern.as_str()).to_owned();
                let message = format!("the name {} must be {expected}", quoted(name));
                let place = self.place(key);
                self.report(Diagnostic::error(codes::OUT_OF_RANGE, message, place));
                false
            }
            _ => true,
        }
    }

    /// What the mapping being checked is, for messages: ``masker `random` ``.
    fn holder(&self) -> String {
        match self.frames.last() {
            Some(Frame { component: Some(entry), .. }) => format!("{} `{}`", entry.kind, entry.name),
            Some(frame) if frame.depth > 0 => format!("`{}`", self.path[..frame.depth].join(".")),
            _ => "the recipe".to_owned(),
        }
    }

    /// Required keys of one mapping that are not there: one message, however many they are.
    fn missing_keys(
        &mut self,
        names: &[&str],
        node: &Node,
        key: Option<&Origin>,
        properties: Option<&Map<String, Value>>,
    ) {
        let shown: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let message = format!("{} lacks {}", self.holder(), list(&shown, "and"));
        let mut diagnostic = Diagnostic::error(codes::MISSING_KEY, message, self.place(blamed(node, key)));
        let outer = self.frames.len().checked_sub(2).and_then(|at| self.frames.get(at));
        if let Some(sibling) = outer.and_then(|outer| self.sibling(outer)) {
            diagnostic = diagnostic.allowing([sibling], []);
        } else {
            for name in names {
                let Some(schema) = properties.and_then(|properties| properties.get(*name)) else {
                    continue;
                };
                let description = schema
                    .get("description")
                    .or_else(|| self.schemas.without_null(schema).get("description"))
                    .and_then(Value::as_str)
                    .map(|description| format!(" {}", first_sentence(description)))
                    .unwrap_or_default();
                let expected = self.schemas.expected(schema);
                diagnostic = diagnostic.help(format!("add `{name}: ...`, {expected}.{description}"));
            }
        }
        let depth = self.path.len();
        if let [only] = names {
            self.path.push((*only).to_owned());
        }
        self.report(diagnostic);
        self.path.truncate(depth);
    }

    /// The entry of a mapping of named entries that the entry being checked was probably meant to be.
    fn sibling(&self, holder: &Frame<'a>) -> Option<&'a str> {
        let named = holder.schema.get("additionalProperties").is_some_and(Value::is_object);
        let name = self.path.get(holder.depth).filter(|_| named)?;
        let others = holder.map.keys().map(String::as_str).filter(|other| other != name);
        nearest(name, others).into_iter().next()
    }

    /// Reports a key that is not among the options. Gives the missing option that it stands for, if there is one.
    fn unknown_key(
        &mut self,
        name: &str,
        member: &Member,
        properties: Option<&'a Map<String, Value>>,
        missing: &[&'a str],
    ) -> Option<&'a str> {
        let known: Vec<&'a str> =
            properties.into_iter().flat_map(|properties| properties.keys().map(String::as_str)).collect();
        let message = format!("unknown key {} in {}", quoted(name), self.holder());
        let mut diagnostic = Diagnostic::error(codes::UNKNOWN_KEY, message, self.place(&member.key));
        let slip = self.slip_of_key(name, member);
        let is_typing = slip.is_some();
        diagnostic.help.extend(slip);
        let bare = name.split([':', '\u{ff1a}', '\u{a0}']).next().unwrap_or(name);
        let mut near = nearest(if is_typing { bare } else { name }, known.iter().copied());
        let meant = match (missing, known.as_slice()) {
            // Nothing else can have been meant.
            (&[missing], [_]) => Some(missing),
            (&[missing], _) if name.contains("${") => Some(missing),
            _ => near.iter().copied().find(|near| missing.contains(near)),
        };
        if let Some(meant) = meant {
            near.retain(|near| *near != meant);
            near.insert(0, meant);
        }
        let is_slip = is_typing || meant.is_some() || near.first().is_some_and(|near| distance(name, near) <= 2);
        let component = self.frames.last().and_then(|frame| frame.component);
        let others: Vec<String> = match component {
            Some(entry) => self
                .registry
                .of_kind(entry.kind)
                .filter(|other| other.name != entry.name && self.has_option(other, name))
                .map(|other| other.name.to_owned())
                .collect(),
            None => Vec::new(),
        };
        if let (Some(entry), false) = (component, others.is_empty()) {
            let noun = if others.len() == 1 { entry.kind.name() } else { entry.kind.plural() };
            let others = list(&others, "and");
            diagnostic = diagnostic.help(format!("`{name}` is an option of the {noun} {others}"));
        } else if !is_slip {
            let homes = self.homes(name);
            for home in &homes {
                diagnostic = diagnostic.help(format!("`{name}` belongs {home}"));
            }
            if !homes.is_empty() {
                near.clear();
            }
        }
        if known.is_empty() {
            diagnostic = diagnostic.help(format!("{} takes no options", self.holder()));
        }
        self.report(diagnostic.allowing(near, known));
        meant
    }

    /// The usual reason for a key that nobody knows.
    fn slip_of_key(&self, name: &str, member: &Member) -> Option<String> {
        if name.contains("${") {
            return Some("a variable stands for a value, not for a key".to_owned());
        }
        if !matches!(member.value.content, Content::Null) {
            return None;
        }
        if let Some((_, help)) = key_slip(name) {
            return Some(help);
        }
        let place = member.key.place()?;
        let before = place.source.text().get(..place.span.start)?.strip_suffix(',')?;
        let whole: String = before.chars().rev().take_while(char::is_ascii_digit).collect();
        let is_fraction = !whole.is_empty() && name.chars().all(|c| c.is_ascii_digit());
        let whole: String = whole.chars().rev().collect();
        is_fraction.then(|| format!("a decimal point is a dot: {whole}.{name}"))
    }

    fn has_option(&self, entry: &Entry, option: &str) -> bool {
        self.schemas
            .component(entry.kind, entry.name)
            .and_then(|schema| schema.get("properties")?.get(option))
            .is_some()
    }

    /// Where in the document a key would be known, nearest enclosing mapping first.
    fn homes(&self, name: &str) -> Vec<String> {
        const SHOWN: usize = 3;
        let Some((current, enclosing)) = self.frames.split_last() else {
            return Vec::new();
        };
        let mut found = Vec::new();
        let path = &self.path[..current.depth];
        self.search(current.schema, Some(current.map), path, name, &mut found, 0);
        for frame in enclosing.iter().rev() {
            if !found.is_empty() {
                break;
            }
            let path = &self.path[..frame.depth];
            let known = frame.schema.get("properties").and_then(|properties| properties.get(name));
            if known.is_some() {
                found.push(home(path));
            }
            self.search(frame.schema, Some(frame.map), path, name, &mut found, 0);
        }
        found.dedup();
        found.truncate(SHOWN);
        found
    }

    /// Looks for a key below a mapping: in the structs and components that it holds.
    fn search(
        &self,
        schema: &Value,
        map: Option<&Mapping>,
        path: &[String],
        name: &str,
        found: &mut Vec<String>,
        depth: usize,
    ) {
        const DEEPEST: usize = 3;
        if depth > DEEPEST {
            return;
        }
        let mut visit = |key: &str, schema: &Value, node: Option<&Node>| {
            let mut path = path.to_vec();
            path.push(key.to_owned());
            self.search_value(schema, node, &path, name, found, depth);
        };
        let properties = schema.get("properties").and_then(Value::as_object);
        for (key, schema) in properties.into_iter().flatten() {
            visit(key, schema, map.and_then(|map| map.get(key)).map(|member| &member.value));
        }
        if let Some(schema @ Value::Object(_)) = schema.get("additionalProperties") {
            match map.filter(|map| !map.is_empty()) {
                Some(map) => {
                    for (key, member) in map {
                        if properties.is_none_or(|properties| !properties.contains_key(key)) {
                            visit(key, schema, Some(&member.value));
                        }
                    }
                }
                None => visit("NAME", schema, None),
            }
        }
    }

    fn search_value(
        &self,
        schema: &Value,
        node: Option<&Node>,
        path: &[String],
        name: &str,
        found: &mut Vec<String>,
        depth: usize,
    ) {
        let map = node.and_then(Node::as_map);
        let Some(kind) = self.schemas.slot(schema) else {
            let schema = self.schemas.without_null(schema);
            let holds = schema.get("properties").and_then(|properties| properties.get(name));
            if holds.is_some() && schema.get("x-expected").is_none() {
                found.push(home(path));
            } else {
                self.search(schema, map, path, name, found, depth + 1);
            }
            return;
        };
        let chosen =
            map.and_then(|map| map.get("type")?.value.as_str()).and_then(|chosen| self.registry.get(kind, chosen));
        match chosen {
            Some(entry) if self.has_option(entry, name) => found.push(home(path)),
            Some(entry) => {
                if let Some(schema) = self.schemas.component(kind, entry.name) {
                    self.search(schema, map, path, name, found, depth + 1);
                }
            }
            // A slot left empty: any component that could fill it.
            None => {
                let mut holders = self.registry.of_kind(kind).filter(|entry| self.has_option(entry, name));
                if let Some(entry) = holders.next() {
                    found.push(format!("{}, of type `{}`", home(path), entry.name));
                }
            }
        }
    }

    /// A component: `type` is looked up by hand, then its own options are checked.
    fn component(&mut self, node: &'a Node, kind: Kind, key: Option<&'a Origin>) -> Option<Value> {
        let Content::Map(map) = &node.content else {
            let message = format!(
                "expected {}: a mapping with `type` and options; found {}{}",
                with_article(kind.name()),
                node.content.describe(),
                from_variable(node)
            );
            let mut diagnostic = Diagnostic::error(codes::WRONG_TYPE, message, self.place(&node.origin));
            if let Content::Str(text) = &node.content {
                diagnostic = match self.registry.get(kind, text) {
                    Some(_) => diagnostic.help(format!("write {{ type: {text} }}")),
                    None => diagnostic.allowing(
                        self.registry.suggest(kind, text),
                        self.registry.of_kind(kind).map(|entry| entry.name),
                    ),
                };
            }
            self.report(diagnostic);
            return None;
        };
        let Some((selector, member)) = self.selector(map, kind) else {
            let name = self.path.last().cloned().unwrap_or_default();
            let message = format!("`{name}` lacks `type`: which {kind}?");
            let near = self.frames.last().and_then(|holder| self.sibling(holder));
            let diagnostic = Diagnostic::error(codes::MISSING_KEY, message, self.place(blamed(node, key)));
            let diagnostic = match near {
                Some(sibling) => diagnostic.allowing([sibling], []),
                None => diagnostic.allowing([], self.registry.of_kind(kind).map(|entry| entry.name)),
            };
            self.path.push("type".to_owned());
            self.report(diagnostic);
            self.path.pop();
            return None;
        };
        self.path.push(selector.to_owned());
        if selector != "type" {
            let holder = self.path.iter().rev().nth(1).map_or("the component", String::as_str);
            let message = format!("unknown key {} in {}", quoted(selector), quoted(holder));
            let diagnostic = Diagnostic::error(codes::UNKNOWN_KEY, message, self.place(&member.key));
            self.report(diagnostic.allowing(["type"], []));
        }
        let entry = self.component_type(&member.value, kind);
        self.path.pop();
        let entry = entry?;
        let schema = self.schemas.component(kind, entry.name)?;
        let before = self.diagnostics.len();
        let options = self.mapping(node, schema, map, key, Some(Chosen { entry, key: selector }));
        if self.diagnostics.len() > before {
            return None;
        }
        let Value::Object(options) = options? else {
            return None;
        };
        if let Err(refusal) = (entry.normalize)(Value::Object(options.clone())) {
            let mut path = self.path.clone();
            path.extend(refusal.path);
            let message = format!("{kind} `{}` refuses its options: {}", entry.name, refusal.message);
            let place = locate(self.root, &path, self.fallback).place;
            let mut diagnostic = Diagnostic::error(codes::REFUSED, message, place).at(&path);
            diagnostic.help.extend(refusal.help);
            self.diagnostics.push(diagnostic);
            return None;
        }
        let mut component = Map::new();
        component.insert("type".to_owned(), Value::String(entry.name.to_owned()));
        component.extend(options);
        Some(Value::Object(component))
    }

    /// The key that says which component a mapping is: `type`, or the key that was meant to be it.
    fn selector(&self, map: &'a Mapping, kind: Kind) -> Option<(&'a str, &'a Member)> {
        if let Some((_, name, member)) = map.get_full("type") {
            return Some((name, member));
        }
        let is_option = |name: &str| self.registry.of_kind(kind).any(|entry| self.has_option(entry, name));
        let is_selector = |(name, member): &(&'a String, &'a Member)| {
            let Some(value) = member.value.as_str().filter(|_| !is_option(name)) else {
                return false;
            };
            !nearest(name, ["type"]).is_empty() || self.registry.get(kind, value).is_some()
        };
        map.iter().find(is_selector).map(|(name, member)| (name.as_str(), member))
    }

    fn component_type(&mut self, node: &Node, kind: Kind) -> Option<&'static Entry> {
        let known = || self.registry.of_kind(kind).map(|entry| entry.name);
        match &node.content {
            Content::Unset { text, diagnostics } => {
                let schema = Value::Object(Map::from_iter([("enum".to_owned(), known().collect())]));
                self.unset(node, &schema, text, diagnostics);
                None
            }
            Content::Str(name) => {
                if let Some(entry) = self.registry.get(kind, name) {
                    return Some(entry);
                }
                let message = format!("there is no {kind} {}{}", quoted(name), from_variable(node));
                let mut diagnostic = Diagnostic::error(codes::UNKNOWN_TYPE, message, self.place(&node.origin));
                if let Some(other) = Kind::ALL.into_iter().find(|other| self.registry.get(*other, name).is_some()) {
                    let (other, kind) = (with_article(other.name()), with_article(kind.name()));
                    diagnostic = diagnostic.help(format!("`{name}` is {other}, not {kind}"));
                }
                let diagnostic = diagnostic.allowing(self.registry.suggest(kind, name), known());
                self.report(diagnostic);
                None
            }
            other => {
                let message = format!(
                    "expected the name of {}, found {}{}",
                    with_article(kind.name()),
                    other.describe(),
                    from_variable(node)
                );
                let diagnostic =
                    Diagnostic::error(codes::WRONG_TYPE, message, self.place(&node.origin)).allowing([], known());
                self.report(diagnostic);
                None
            }
        }
    }
}

/// Whether text is the name of a variable.
fn is_variable(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// How text that was meant as a number is written in YAML.
fn number_slip(text: &str) -> Option<String> {
    let is_number = |text: &str| matches!(resolve_plain(text), Content::Int(_) | Content::Float(_));
    let dotted = text.replacen(',', ".", 1);
    if text.contains(',') && is_number(&dotted) {
        return Some(format!("a decimal point is a dot: {dotted}"));
    }
    let joined = text.replace(['_', ' ', '\''], "");
    if joined != text && is_number(&joined) {
        return Some(format!("write the digits together: {joined}"));
    }
    let bare = text.trim_start_matches(['+', '-', '.']).to_lowercase();
    ["inf", "infinity", "nan"].contains(&bare.as_str()).then(|| "only finite numbers can be used".to_owned())
}

/// `under ...`, for the message that says where a key belongs.
fn home(path: &[String]) -> String {
    match path.last() {
        None => "at the top of the recipe".to_owned(),
        Some(last) if path.len() == 1 => format!("under `{last}`"),
        Some(last) if last == "NAME" => format!("under `{}`", path.join(".")),
        Some(last) => format!("under `{last}` ({})", path.join(".")),
    }
}

fn first_sentence(text: &str) -> &str {
    match text.find(". ") {
        Some(end) => &text[..=end],
        None => text,
    }
}

fn from_variable(node: &Node) -> String {
    match &node.origin {
        Origin::Variable { name, .. } => format!(" (from the variable `{name}`)"),
        _ => String::new(),
    }
}

/// What a quoted scalar that is one variable stands for, where the types admit no text.
fn retyped(names: &[&str], node: &Node) -> Option<Content> {
    match &node.content {
        Content::Str(text) if node.typing == Typing::Option && !names.contains(&"string") => {
            let content = resolve_plain(text);
            let is_scalar = matches!(content, Content::Bool(_) | Content::Int(_) | Content::Float(_));
            (is_scalar && admits_content(names, &content)).then_some(content)
        }
        _ => None,
    }
}

/// Whether one of the types admits the node's value.
fn admits(names: &[&str], node: &Node) -> bool {
    admits_content(names, &node.content) || retyped(names, node).is_some()
}

fn admits_content(names: &[&str], content: &Content) -> bool {
    let has = |name: &str| names.contains(&name);
    match content {
        Content::Null => has("null"),
        Content::Bool(_) => has("boolean"),
        Content::Int(_) => has("integer") || has("number"),
        // As in JSON Schema, 3.0 is a whole number. What is not finite is refused as a number.
        Content::Float(number) => has("number") || (has("integer") && number.fract() == 0.0),
        Content::Str(_) => has("string"),
        Content::Seq(_) => has("array"),
        Content::Map(_) => has("object"),
        Content::Unset { .. } => true,
    }
}

/// What stands for a node as a whole: the key of a collection, and the value otherwise. A component that a flag made
/// another one is blamed for what the flag chose, since the rest of it may stand elsewhere.
fn blamed<'n>(node: &'n Node, key: Option<&'n Origin>) -> &'n Origin {
    let own = match key {
        Some(key) if matches!(node.content, Content::Map(_) | Content::Seq(_)) => key,
        _ => &node.origin,
    };
    let chosen = node.as_map().and_then(|map| map.get("type")).map(|member| &member.value.origin);
    match chosen.and_then(|chosen| Some((chosen, chosen.place()?))) {
        Some((chosen, place)) if place.source.kind() == SourceKind::Flag => {
            let same = own.place().is_some_and(|own| Arc::ptr_eq(&own.source, &place.source));
            if same { own } else { chosen }
        }
        _ => own,
    }
}

/// Where a path leads in a document.
pub(crate) struct Located {
    /// The value's place; where it is absent, that of the nearest mapping above it.
    pub place: Place,
    /// How much of the path leads to the first key that is not there. A scalar stands for what it abbreviates.
    pub absent: Option<usize>,
}

/// The last part of an option that a flag set.
fn set_part(node: &Node) -> Option<&Origin> {
    let own = || (is_flag(&node.origin)).then_some(&node.origin);
    match &node.content {
        Content::Map(map) => map.values().rev().find_map(|member| set_part(&member.value)),
        Content::Seq(items) if own().is_none() => items.iter().rev().find_map(set_part),
        Content::Seq(_) => None,
        _ => own(),
    }
}

fn is_flag(origin: &Origin) -> bool {
    origin.place().is_some_and(|place| place.source.kind() == SourceKind::Flag)
}

/// Finds a path in a document.
pub(crate) fn locate(root: &Node, path: &[String], fallback: &Arc<Source>) -> Located {
    let mut node = root;
    let mut key: Option<&Origin> = None;
    let mut absent = None;
    for (depth, segment) in path.iter().enumerate() {
        if let Content::Map(map) = &node.content {
            let Some(member) = map.get(segment) else {
                absent = Some(depth + 1);
                break;
            };
            key = Some(&member.key);
            node = &member.value;
        } else {
            let Some(item) = node.child(segment) else {
                break;
            };
            key = None;
            node = item;
        }
    }
    let blamed = blamed(node, key);
    let is_option = absent.is_none() && node.as_map().is_none_or(|map| !map.contains_key("type"));
    let part = if is_option { set_part(node) } else { None };
    let place = part.unwrap_or(blamed).place().cloned();
    Located { place: place.unwrap_or_else(|| Place { source: Arc::clone(fallback), span: 0..0 }), absent }
}

/// Fills the defaults of a component and of all that it holds.
///
/// # Errors
/// The path and the refusal of a component that its holder put there by default.
pub(crate) fn fill(
    registry: &Registry,
    kind: Kind,
    value: &mut Value,
    path: &mut Vec<String>,
) -> Result<(), (Vec<String>, String)> {
    let Value::Object(object) = value else {
        return Err((path.clone(), format!("expected {}", with_article(kind.name()))));
    };
    let name = match object.shift_remove("type") {
        Some(Value::String(name)) => name,
        _ => return Err((path.clone(), format!("{} without `type`", with_article(kind.name())))),
    };
    let Some(entry) = registry.get(kind, &name) else {
        return Err((path.clone(), format!("there is no {kind} {}", quoted(&name))));
    };
    let options = Value::Object(std::mem::take(object));
    let mut options = (entry.normalize)(options).map_err(|refusal| {
        let mut path = path.clone();
        path.extend(refusal.path);
        (path, refusal.message)
    })?;
    if let Some(schema) = registry.schemas().component(kind, entry.name) {
        fill_slots(registry, schema, &mut options, path)?;
    }
    object.insert("type".to_owned(), Value::String(name));
    if let Value::Object(options) = options {
        object.extend(options);
    }
    Ok(())
}

fn fill_slots(
    registry: &Registry,
    schema: &Value,
    value: &mut Value,
    path: &mut Vec<String>,
) -> Result<(), (Vec<String>, String)> {
    let schemas = registry.schemas();
    if value.is_null() {
        return Ok(());
    }
    if let Some(kind) = schemas.slot(schema) {
        return fill(registry, kind, value, path);
    }
    let schema = schemas.without_null(schema);
    for keyword in ["anyOf", "oneOf", "allOf"] {
        if let Some(branches) = schema.get(keyword).and_then(Value::as_array) {
            for branch in branches {
                // Of several forms only mappings and lists hold slots.
                let is_slot = schemas.slot(branch).is_some();
                if !is_slot || value.get("type").is_some() {
                    fill_slots(registry, branch, value, path)?;
                }
            }
            return Ok(());
        }
    }
    match value {
        Value::Object(object) => {
            let properties = schema.get("properties").and_then(Value::as_object);
            for (name, member) in object.iter_mut() {
                let schema =
                    properties.and_then(|properties| properties.get(name)).or(schema.get("additionalProperties"));
                if let Some(schema) = schema {
                    path.push(name.clone());
                    fill_slots(registry, schema, member, path)?;
                    path.pop();
                }
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter_mut().enumerate() {
                let schema = match schema.get("items") {
                    Some(Value::Array(tuple)) => tuple.get(index),
                    other => other,
                };
                if let Some(schema) = schema {
                    path.push(index.to_string());
                    fill_slots(registry, schema, item, path)?;
                    path.pop();
                }
            }
        }
        _ => {}
    }
    Ok(())
}
