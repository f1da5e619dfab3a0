//! What stands beside the files that a recipe names fills in what the recipe leaves open.

use std::{collections::BTreeMap, sync::Arc};

use serde_json::Value;

use crate::{
    catalog::Registry,
    check::{each_slot, locate},
    diagnostic::{Diagnostic, Place, Source, SourceKind, codes},
    plugin::{
        Kind, Refusal,
        sidecar::{Document, Sidecar, Statement, Verdict},
    },
    yaml::{Content, Mapping, Member, Node, Origin, Typing, parse},
};

/// Reads what stands beside the files of every component, and puts it where the recipe says nothing; `value` is the
/// recipe as JSON, with what is written in it alone. Says whether anything was put there.
///
/// # Errors
/// Every contradiction between the recipe and such a document, with its place in both.
pub(super) fn take_up(
    root: &mut Node,
    value: &Value,
    registry: &Registry,
    fallback: &Arc<Source>,
    sources: &mut Vec<Arc<Source>>,
) -> Result<bool, Vec<Diagnostic>> {
    let mut read = Vec::new();
    let mut path = vec!["stages".to_owned()];
    for (name, stage) in value.get("stages").and_then(Value::as_object).into_iter().flatten() {
        path.push(name.clone());
        sidecars(registry, Kind::Stage, &mut stage.clone(), &mut path, &mut read);
        path.pop();
    }
    let mut documents = Documents { read: BTreeMap::new(), sources };
    let mut changed = false;
    let mut diagnostics = Vec::new();
    for (path, sidecar) in read {
        let sidecar = match sidecar {
            Ok(sidecar) => sidecar,
            Err(refusal) => {
                let path = [path, refusal.path].concat();
                let place = locate(root, &path, fallback).place;
                let mut diagnostic = Diagnostic::error(codes::REFUSED, refusal.message, place).at(&path);
                diagnostic.help.extend(refusal.help);
                diagnostics.push(diagnostic);
                continue;
            }
        };
        for Statement { option, document, at, verdict } in sidecar.statements {
            let said_at = documents.place(&sidecar.documents[document], &at);
            let option = [path.clone(), option].concat();
            match verdict {
                Verdict::Fills(value) => {
                    put(root, &option, Node::of_json(&value, &Origin::File(said_at)));
                    changed = true;
                }
                Verdict::Contradicts { message, said, help } => {
                    let place = locate(root, &option, fallback).place;
                    let diagnostic = Diagnostic::error(codes::REFUSED, message, place).at(&option);
                    diagnostics.push(diagnostic.label(said_at, said).help(help));
                }
            }
        }
    }
    if diagnostics.is_empty() { Ok(changed) } else { Err(diagnostics) }
}

/// A component's path, and what stands beside its files.
type Read = (Vec<String>, Result<Sidecar, Refusal>);

/// Reads what stands beside the files of a component and of those in it.
fn sidecars(registry: &Registry, kind: Kind, value: &mut Value, path: &mut Vec<String>, read: &mut Vec<Read>) {
    let name = value.as_object_mut().and_then(|options| options.shift_remove("type"));
    let Some(entry) = name.as_ref().and_then(Value::as_str).and_then(|name| registry.get(kind, name)) else { return };
    if let Some(sidecar) = entry.sidecar {
        read.push((path.clone(), sidecar(value)));
    }
    let visited: Result<(), std::convert::Infallible> =
        each_slot(registry, entry, value, path, &mut |kind, value, path| {
            sidecars(registry, kind, value, path, read);
            Ok(())
        });
    let Ok(()) = visited;
}

/// The documents that were read, once each.
struct Documents<'s> {
    read: BTreeMap<String, (Arc<Source>, Option<Node>)>,
    sources: &'s mut Vec<Arc<Source>>,
}

impl Documents<'_> {
    /// Where something is said; the whole of a document that is past the limits of recipes.
    fn place(&mut self, document: &Document, at: &[String]) -> Place {
        let (source, node) = self.read.entry(document.name.clone()).or_insert_with(|| {
            let source = Arc::new(Source::new(&document.name, &document.text, SourceKind::File));
            self.sources.push(Arc::clone(&source));
            let node = parse(&source).root;
            (source, node)
        });
        match node {
            Some(node) => locate(node, at, source).place,
            None => Place { source: Arc::clone(source), span: 0..0 },
        }
    }
}

/// Puts a value into a document, with the mappings above it where they are not there yet.
fn put(root: &mut Node, path: &[String], value: Node) {
    let Some((option, holders)) = path.split_last() else { return };
    let mut node = root;
    for holder in holders {
        if node.child(holder).is_none()
            && let Content::Map(map) = &mut node.content
        {
            let origin = value.origin.clone();
            let empty = Node { content: Content::Map(Mapping::new()), origin: origin.clone(), typing: Typing::Fixed };
            map.insert(holder.clone(), Member { key: origin, value: empty });
        }
        match node.child_mut(holder) {
            Some(child) => node = child,
            None => return,
        }
    }
    if let Content::Map(map) = &mut node.content {
        map.insert(option.clone(), Member { key: value.origin.clone(), value });
    }
}
