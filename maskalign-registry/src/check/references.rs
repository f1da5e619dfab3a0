//! References to teachers and stages.

use super::{
    checker::{Checker, Frame},
    scalar::from_variable,
};
use crate::{
    diagnostic::{Diagnostic, codes},
    plugin::Kind,
    wording::{nearest, quoted},
    yaml::{Content, Member, Node},
};

impl<'a> Checker<'a> {
    /// Notes a reference that does not resolve. It is not a mistake of structure, and planning refuses it as well.
    fn note_unresolved(&mut self, diagnostic: Diagnostic) {
        let diagnostic = diagnostic.at(&self.path);
        if !self.references.iter().any(|noted| noted.path == diagnostic.path) {
            self.references.push(diagnostic);
        }
    }

    /// Looks up a teacher in the enclosing stage. Always true: the value is known even if there is no such teacher.
    pub(super) fn teacher(&mut self, node: &Node, name: &str) -> bool {
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
            let diagnostic = diagnostic.allowing(nearest(name, teachers.iter().copied()), teachers);
            let stage = self.path.get(..holder.depth).unwrap_or_default();
            let missing = [stage, &["teachers".to_owned(), name.to_owned()]].concat();
            self.note_unresolved(self.showing_removal(diagnostic, &missing));
        }
        true
    }

    /// Looks up a stage among the earlier ones. False if that stage is left out.
    pub(super) fn stage(&mut self, node: &Node, name: &str) -> bool {
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
        let diagnostic = diagnostic.allowing(nearest(name, known.iter().copied()), known);
        let missing = ["stages".to_owned(), name.to_owned()];
        self.note_unresolved(self.showing_removal(diagnostic, &missing));
        true
    }
}
