//! Unknown keys: what was probably meant, and where the key belongs.

use serde_json::{Map, Value};

use super::checker::{Checker, Frame};
use crate::{
    diagnostic::{Diagnostic, codes},
    plugin::Entry,
    wording::{distance, list, nearest, quoted},
    yaml::{Mapping, Member, Node},
};

impl<'a> Checker<'a> {
    /// Reports a key that is not an option. Returns the missing option that it was meant to be, if there is one.
    pub(super) fn unknown_key(
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
        let typo = self.likely_key_typo(name, member);
        let is_typo = typo.is_some();
        diagnostic.help.extend(typo);
        let bare = name.split([':', '\u{ff1a}', '\u{a0}']).next().unwrap_or(name);
        let mut near = nearest(if is_typo { bare } else { name }, known.iter().copied());
        let meant = match (missing, known.as_slice()) {
            // There is only one option.
            (&[missing], [_]) => Some(missing),
            (&[missing], _) if name.contains("${") => Some(missing),
            _ => near.iter().copied().find(|near| missing.contains(near)),
        };
        if let Some(meant) = meant {
            near.retain(|near| *near != meant);
            near.insert(0, meant);
        }
        let is_misspelled = is_typo || meant.is_some() || near.first().is_some_and(|near| distance(name, near) <= 2);
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
        } else if !is_misspelled {
            let homes = self.known_elsewhere(name);
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

    pub(super) fn has_option(&self, entry: &Entry, option: &str) -> bool {
        self.schemas
            .component(entry.kind, entry.name)
            .and_then(|schema| schema.get("properties")?.get(option))
            .is_some()
    }

    /// In a mapping of named entries, the other entry that the checked one was probably meant to be part of.
    pub(super) fn sibling(&self, holder: &Frame<'a>) -> Option<&'a str> {
        let named = holder.schema.get("additionalProperties").is_some_and(Value::is_object);
        let name = self.path.get(holder.depth).filter(|_| named)?;
        let others = holder.map.keys().map(String::as_str).filter(|other| other != name);
        nearest(name, others).into_iter().next()
    }

    /// Where in the document a key would be an option, nearest enclosing mapping first.
    fn known_elsewhere(&self, name: &str) -> Vec<String> {
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

    /// Searches for an option below a mapping, in the structs and components that it holds.
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
            // An empty slot: any component that could fill it.
            None => {
                let mut holders = self.registry.of_kind(kind).filter(|entry| self.has_option(entry, name));
                if let Some(entry) = holders.next() {
                    found.push(format!("{}, of type `{}`", home(path), entry.name));
                }
            }
        }
    }
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
