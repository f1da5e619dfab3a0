//! Merging a recipe into what it extends.

use super::removals::{REPLACE, Removal, Vain, starts_anew, unmet_marker};
use crate::{
    diagnostic::{Diagnostic, Place, codes},
    wording::quoted,
    yaml::{Content, MAX_NODES, Mapping, Member, Node, Origin, Typing},
};

/// The most values that merging may copy in total.
const MAX_MERGED: usize = 10 * MAX_NODES;

/// Merges the recipes of one request.
#[derive(Default)]
pub(super) struct Merger {
    /// Values that were merged so far.
    merged: usize,
    /// What is wrong.
    pub diagnostics: Vec<Diagnostic>,
    /// Every `null` that met nothing.
    pub vain: Vec<Vain>,
}

impl Merger {
    /// Puts a recipe on top of another; `at` is where that one is named.
    pub(super) fn merge_roots(&mut self, base: Node, upper: Node, at: &Place) -> Node {
        let key = base.origin.clone();
        self.merge(base, &key, upper, at)
    }

    /// Deep merge: mappings key by key; everything else, a component whose `type` changes, and a mapping that starts anew
    /// is replaced as a whole. `key` is where the base's value is named.
    fn merge(&mut self, base: Node, key: &Origin, mut upper: Node, at: &Place) -> Node {
        if self.merged > MAX_MERGED || starts_anew(&mut upper.content, key) {
            return upper;
        }
        let (base_map, upper_map) = match (base.content, upper.content) {
            (Content::Map(base_map), Content::Map(upper_map)) if !changes_type(&base_map, &upper_map) => {
                (base_map, upper_map)
            }
            (_, content) => {
                return Node { content, ..upper };
            }
        };
        self.merged += base_map.len() + upper_map.len() + 1;
        if self.merged > MAX_MERGED {
            let message = format!("bases hold more than {MAX_MERGED} values together");
            self.diagnostics.push(Diagnostic::error(codes::TOO_LARGE, message, at.clone()));
        }
        let mut merged = base_map;
        for (name, member) in upper_map {
            self.merge_member(&mut merged, name, member, at);
        }
        Node { content: Content::Map(merged), origin: upper.origin, typing: Typing::Fixed }
    }

    /// Puts a member of a recipe into what it extends.
    fn merge_member(&mut self, merged: &mut Mapping, name: String, upper: Member, at: &Place) {
        let null = upper.value.written_null().cloned();
        let Some(slot) = merged.get_mut(&name).filter(|slot| !slot.value.is_removed()) else {
            if let Some(place) = null {
                self.vain.push(Vain::new(place, merged));
            }
            // What comes back after it was removed is new, and stands last.
            merged.shift_remove(&name);
            merged.insert(name, upper);
            return;
        };
        if null.is_some() {
            *slot = slot.removed(upper.key, upper.value.origin);
        } else if let Some(place) = upper.value.blank() {
            let message = format!("{} has no value", quoted(&name));
            let place = upper.key.place().unwrap_or(place).clone();
            let inherited = slot.key.place().cloned();
            let diagnostic = Diagnostic::error(codes::WRONG_TYPE, message, place)
                .help("write `null` to remove what is inherited, or remove the key to keep it");
            self.diagnostics.push(match inherited {
                Some(inherited) => diagnostic.label(inherited, "inherited from here"),
                None => diagnostic,
            });
        } else {
            let below = Node {
                content: std::mem::replace(&mut slot.value.content, Content::Null),
                origin: slot.value.origin.clone(),
                typing: slot.value.typing,
            };
            let base_key = std::mem::replace(&mut slot.key, upper.key);
            slot.value = self.merge(below, &base_key, upper.value, at);
        }
    }

    /// Takes what stands for the removed out of the composed tree, and reports markers that met nothing, unless what
    /// they would have met could not be read.
    pub(super) fn prune(&mut self, root: &mut Node, incomplete: bool) -> Vec<Removal> {
        let mut unmet = Vec::new();
        let removals = prune(root, &mut Vec::new(), &mut unmet);
        if !incomplete {
            self.diagnostics.extend(unmet);
        }
        removals
    }
}

/// Gives what was removed at and below a path, and adds to `unmet` what is wrong with markers.
fn prune(node: &mut Node, path: &mut Vec<String>, unmet: &mut Vec<Diagnostic>) -> Vec<Removal> {
    let mut removals = Vec::new();
    match &mut node.content {
        Content::Seq(items) => {
            for (index, item) in items.iter_mut().enumerate() {
                path.push(index.to_string());
                removals.extend(prune(item, path, unmet));
                path.pop();
            }
        }
        Content::Map(map) => {
            if let Some(marker) = map.shift_remove(REPLACE) {
                match marker.value.content {
                    Content::Removed { was } => {
                        removals.push(Removal { path: path.clone(), by: marker.key, was: *was });
                    }
                    _ => unmet.extend(unmet_marker(&marker).map(|found| found.at(path))),
                }
            }
            for (name, member) in map.iter_mut() {
                path.push(name.clone());
                match &member.value.content {
                    Content::Removed { was } => removals.push(Removal {
                        path: path.clone(),
                        by: member.value.origin.clone(),
                        was: (**was).clone(),
                    }),
                    _ => removals.extend(prune(&mut member.value, path, unmet)),
                }
                path.pop();
            }
            map.retain(|_, member| !member.value.is_removed());
        }
        _ => {}
    }
    removals
}

/// Whether both are components and name different ones. A variable without a value names another.
fn changes_type(base: &Mapping, upper: &Mapping) -> bool {
    match (base.get("type"), upper.get("type")) {
        (Some(base), Some(upper)) => upper.value.as_str().is_some_and(|upper| base.value.as_str() != Some(upper)),
        _ => false,
    }
}
