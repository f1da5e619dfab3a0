//! From a path to the place to blame.

use std::sync::Arc;

use crate::{
    diagnostic::{Place, Source, SourceKind},
    yaml::{Content, Node, Origin},
};

/// Where a path leads in a document.
pub(crate) struct Located {
    /// The place of the value, or of the nearest mapping above it if it is absent.
    pub place: Place,
    /// The length of the path up to the first absent key, if any. A scalar may abbreviate a mapping, whose keys are not
    /// absent.
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
    let part = if is_option { last_set_by_flag(node) } else { None };
    let place = part.unwrap_or(blamed).place().cloned();
    Located { place: place.unwrap_or_else(|| Place { source: Arc::clone(fallback), span: 0..0 }), absent }
}

/// What to blame for a node as a whole: the key of a collection, and any other value itself. For a component whose
/// `type` a flag changed, that is the flag, since the rest of it may come from elsewhere.
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

/// The last part of an option that was set by a flag.
fn last_set_by_flag(node: &Node) -> Option<&Origin> {
    let own = || (is_flag(&node.origin)).then_some(&node.origin);
    match &node.content {
        Content::Map(map) => map.values().rev().find_map(|member| last_set_by_flag(&member.value)),
        Content::Seq(items) if own().is_none() => items.iter().rev().find_map(last_set_by_flag),
        Content::Seq(_) => None,
        _ => own(),
    }
}

fn is_flag(origin: &Origin) -> bool {
    origin.place().is_some_and(|place| place.source.kind() == SourceKind::Flag)
}
