//! Mappings: keys that are unknown, missing, or badly named.

use serde_json::{Map, Value};

use super::{
    checker::{Checker, Frame},
    locate::blamed,
};
use crate::{
    diagnostic::{Diagnostic, codes},
    plugin::Entry,
    schema::required,
    wording::{list, quoted},
    yaml::{Mapping, Node, Origin},
};

/// The component that a mapping describes, and the key that selected it.
#[derive(Clone, Copy)]
pub(super) struct Chosen<'a> {
    pub(super) entry: &'static Entry,
    pub(super) key: &'a str,
}

impl<'a> Checker<'a> {
    /// A mapping of options; `chosen` says of which component, if any.
    pub(super) fn mapping(
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
        let mut missing: Vec<&str> = required(schema).chain(called_for(schema, map)).collect();
        missing.retain(|name| !map.contains_key(*name));
        let mut meant = Vec::new();
        let mut sound = true;
        let mut object = Map::new();
        // A stage with an unknown value is left out, and so is an option at the top of the recipe, which has a default.
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
        // A misspelled key is one mistake: unknown, and not missing as well.
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
        let most = schema.get("maxProperties").and_then(Value::as_u64).unwrap_or(u64::MAX);
        if sound && (map.len() as u64) > most {
            let name = self.path.last().map_or("the mapping", String::as_str);
            let message = format!("{} must be {}", quoted(name), self.schemas.expected(schema));
            self.report(Diagnostic::error(codes::OUT_OF_RANGE, message, self.place(blamed(node, key))));
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

    /// The mapping being checked, for messages: ``masker `random` ``.
    pub(super) fn holder(&self) -> String {
        match self.frames.last() {
            Some(Frame { component: Some(entry), .. }) => format!("{} `{}`", entry.kind, entry.name),
            Some(frame) if frame.depth > 0 => format!("`{}`", self.path[..frame.depth].join(".")),
            _ => "the recipe".to_owned(),
        }
    }

    /// Reports the required keys that a mapping lacks: one message, however many they are.
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
                let schema = self.schemas.option(schema);
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
        for name in names {
            let missing = [self.path.as_slice(), &[(*name).to_owned()]].concat();
            diagnostic = self.showing_removal(diagnostic, &missing);
        }
        let depth = self.path.len();
        if let [only] = names {
            self.path.push((*only).to_owned());
        }
        self.report(diagnostic);
        self.path.truncate(depth);
    }
}

/// The keys that keys of a mapping call for (`dependencies`).
fn called_for<'s>(schema: &'s Value, map: &Mapping) -> impl Iterator<Item = &'s str> {
    let dependencies = schema.get("dependencies").and_then(Value::as_object);
    let given = dependencies.into_iter().flatten().filter(|(name, _)| map.contains_key(*name));
    let called: Vec<&str> =
        given.filter_map(|(_, names)| names.as_array()).flatten().filter_map(Value::as_str).collect();
    called.into_iter()
}

fn first_sentence(text: &str) -> &str {
    match text.find(". ") {
        Some(end) => &text[..=end],
        None => text,
    }
}
