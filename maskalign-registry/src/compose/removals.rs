//! `null` and `$replace` in a recipe that extends another: what it does not take over.
//!
//! A `null` that meets an inherited value stays in the tree in its place, as [`Content::Removed`], until all bases and
//! flags are merged. So it wins over earlier bases as any other value does, and what a later one writes there starts anew.

use crate::{
    diagnostic::{Diagnostic, Place, SourceKind, codes},
    wording::{nearest, quoted},
    yaml::{Content, Mapping, Member, Node, Origin, Typing},
};

/// The key of a mapping that starts anew. No entry and no option can have this name.
pub(crate) const REPLACE: &str = "$replace";

/// What a recipe or a flag did not take over.
#[derive(Clone, Debug)]
pub struct Removal {
    /// Keys and indices from the recipe's root.
    pub path: Vec<String>,
    /// The `null`, the `$replace` or the flag.
    pub by: Origin,
    /// The key of what was inherited.
    pub was: Origin,
}

/// A `null` that met nothing.
pub(crate) struct Vain {
    pub place: Place,
    /// The keys that stood beside it.
    pub known: Vec<String>,
}

impl Vain {
    pub(super) fn new(place: Place, beside: &Mapping) -> Vain {
        let is_there = |(name, member): &(&String, &Member)| *name != REPLACE && !member.value.is_removed();
        Vain { place, known: beside.iter().filter(is_there).map(|(name, _)| name.clone()).collect() }
    }

    /// The mistake that this is where the value cannot be null.
    pub(crate) fn mistake(&self, found: &Diagnostic) -> Diagnostic {
        const SHOWN: usize = 12;
        let name = found.path.last().map_or("", String::as_str);
        let message = format!("{} is not inherited: there is nothing for `null` to remove", quoted(name));
        let known = || self.known.iter().map(String::as_str);
        Diagnostic::error(codes::NOTHING_TO_REMOVE, message, self.place.clone())
            .at(&found.path)
            .allowing(nearest(name, known()), known().take(SHOWN))
    }
}

impl Node {
    /// Whether it stands for what a `null` removed.
    pub(super) fn is_removed(&self) -> bool {
        matches!(self.content, Content::Removed { .. })
    }

    /// The place of a `null` that is written as such. Nothing at all is a slip, and a variable removes nothing.
    pub(super) fn written_null(&self) -> Option<&Place> {
        match (&self.content, &self.origin) {
            (Content::Null, Origin::File(place) | Origin::Flag(place)) if self.is_written(place) => Some(place),
            _ => None,
        }
    }

    /// The place where a value is missing.
    pub(super) fn blank(&self) -> Option<&Place> {
        match (&self.content, &self.origin) {
            (Content::Null, Origin::File(place)) if !self.is_written(place) => Some(place),
            _ => None,
        }
    }

    /// Whether a null is there as a word: where there is none, the parser gives the place before it.
    fn is_written(&self, place: &Place) -> bool {
        self.typing == Typing::Fixed || ["null", "Null", "NULL", "~"].contains(&place.text().trim())
    }
}

impl Member {
    /// What stands where a member was.
    pub(super) fn removed(&self, key: Origin, by: Origin) -> Member {
        let was = Box::new(self.key.clone());
        Member { key, value: Node { content: Content::Removed { was }, origin: by, typing: Typing::Fixed } }
    }
}

/// Marks `$replace: true` in a mapping as done; whether it is there.
pub(super) fn starts_anew(upper: &mut Content, base: &Origin) -> bool {
    let Content::Map(map) = upper else {
        return false;
    };
    let Some(marker) = map.get_mut(REPLACE) else {
        return false;
    };
    match marker.value.content {
        Content::Bool(true) => {
            marker.value.content = Content::Removed { was: Box::new(base.clone()) };
            true
        }
        Content::Removed { .. } => true,
        _ => false,
    }
}

/// What is wrong with a `$replace` that replaced nothing.
pub(super) fn unmet_marker(marker: &Member) -> Option<Diagnostic> {
    let key = marker.key.place()?.clone();
    if !matches!(marker.value.content, Content::Bool(true)) {
        let place = marker.value.origin.place().unwrap_or(&key).clone();
        let message = format!("`{REPLACE}` takes `true`, found {}", marker.value.content.describe());
        return Some(
            Diagnostic::error(codes::WRONG_TYPE, message, place).help("remove the key to take over what is inherited"),
        );
    }
    let help = match key.source.kind() {
        SourceKind::Flag => "leave it out: `--set PATH={...}` replaces what is there",
        _ => "remove the key: all that is here is new",
    };
    let message = format!("nothing is inherited here that `{REPLACE}` could replace");
    Some(Diagnostic::error(codes::NOTHING_TO_REMOVE, message, key).help(help))
}
