//! Components: `type` selects whose options are checked.

use serde_json::{Map, Value};

use super::{
    checker::Checker,
    locate::{blamed, locate},
    mapping::Chosen,
    scalar::from_variable,
};
use crate::{
    diagnostic::{Diagnostic, codes},
    plugin::{Entry, Kind},
    wording::{nearest, quoted, with_article},
    yaml::{Content, Mapping, Member, Node, Origin},
};

impl<'a> Checker<'a> {
    /// Looks up `type`, then checks the options of that component.
    pub(super) fn component(&mut self, node: &'a Node, kind: Kind, key: Option<&'a Origin>) -> Option<Value> {
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
            let diagnostic = self.showing_removal(diagnostic, &self.path);
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

    /// The key that selects the component: `type`, or the key that was probably meant to be it.
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
