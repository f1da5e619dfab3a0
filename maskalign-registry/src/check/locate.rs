//! Where a path leads in a document, and which place stands for what is there.

use std::sync::Arc;

use crate::{
    diagnostic::{Place, Source, SourceKind},
    yaml::{Content, Node, Origin},
};

/// Where a path leads in a document.
pub(crate) struct Located {
    /// The value's place; where it is absent, that of the nearest mapping above it.
    pub place: Place,
    /// How much of the path leads to the first key that is not there. A scalar stands for what it abbreviates.
    pub absent: Option<usize>,
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

/// What stands for a node as a whole: the key of a collection, and the value otherwise. A component that a flag made
/// another one is blamed for what the flag chose, since the rest of it may stand elsewhere.
pub(super) fn blamed<'n>(node: &'n Node, key: Option<&'n Origin>) -> &'n Origin {
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
