//! `--set`: paths into a document, and what is set or deleted there.

use std::sync::Arc;

use super::{
    removals::{REPLACE, Vain},
    variables::substitute_variables,
};
use crate::{
    diagnostic::{Diagnostic, Place, Source, SourceKind, codes},
    wording::{nearest, quoted},
    yaml::{Content, MAX_DEPTH, Mapping, Member, Node, Origin, Typing, parse_from},
};

/// Applies one `--set`, whose text is the source. A `null` that removes nothing goes into `vain`.
pub(super) fn apply_flag(
    root: &mut Node,
    source: &Arc<Source>,
    env: &dyn Fn(&str) -> Option<String>,
    vain: &mut Vec<Vain>,
) -> Result<(), Vec<Diagnostic>> {
    let text = source.text();
    let place = |span| Place { source: Arc::clone(source), span };
    if text.starts_with('~') {
        let (segments, end) = parse_path(source, 1)?;
        if end < text.len() {
            let message = "`~path` deletes and takes no value";
            return Err(vec![
                Diagnostic::error(codes::BAD_OVERRIDE, message, place(end..text.len()))
                    .help("write `~path` to delete, or `path=VALUE` to set"),
            ]);
        }
        return delete(root, &segments).map_err(|diagnostic| vec![*diagnostic]);
    }
    let (segments, end) = parse_path(source, 0)?;
    if text.as_bytes().get(end) != Some(&b'=') {
        return Err(vec![
            Diagnostic::error(codes::BAD_OVERRIDE, "`=` is missing", place(end..text.len()))
                .help("write `path=VALUE` to set, or `~path` to delete"),
        ]);
    }
    if segments[0].name == "extends" {
        let span = segments[0].place.clone();
        return Err(vec![
            Diagnostic::error(codes::BAD_OVERRIDE, "`extends` cannot be set by a flag", span)
                .help("write a recipe that extends the other"),
        ]);
    }
    let parsed = parse_from(source, end + 1);
    if !parsed.diagnostics.is_empty() {
        return Err(parsed.diagnostics);
    }
    let mut value = parsed.root.unwrap_or_else(|| Node {
        content: Content::Null,
        origin: Origin::Flag(place(end + 1..text.len())),
        typing: Typing::Text,
    });
    substitute_variables(&mut value, env);
    set(root, &segments, value, vain).map_err(|diagnostic| vec![*diagnostic])
}

/// One segment of the path of a flag.
struct Segment {
    name: String,
    place: Place,
}

/// Splits `a.b."c.d"` from a byte offset up to `=` or the end; returns the offset where it stopped.
fn parse_path(source: &Arc<Source>, start: usize) -> Result<(Vec<Segment>, usize), Vec<Diagnostic>> {
    let text = source.text();
    let refuse =
        |span, message: &str| {
            let place = Place { source: Arc::clone(source), span };
            vec![Diagnostic::error(codes::BAD_OVERRIDE, message, place).help(
                "a path is keys joined by dots, such as stages.pretrain.masker.ratio; quote a key that has a dot",
            )]
        };
    let mut segments = Vec::new();
    let mut at = start;
    loop {
        let rest = &text[at..];
        let (name, length) = match rest.chars().next() {
            Some(quote @ ('"' | '\'')) => match rest[1..].find(quote) {
                Some(end) => (&rest[1..=end], end + 2),
                None => return Err(refuse(at..text.len(), "the quote is not closed")),
            },
            _ => {
                let length = rest.find(['.', '=']).unwrap_or(rest.len());
                (&rest[..length], length)
            }
        };
        if let Some((list, index)) = name.strip_suffix(']').and_then(|name| name.split_once('[')) {
            let place = Place { source: Arc::clone(source), span: at..at + length };
            return Err(vec![
                Diagnostic::error(codes::BAD_OVERRIDE, "the item of a list follows a dot", place)
                    .help(format!("write {list}.{index}")),
            ]);
        }
        if name.trim().is_empty() || name.trim() != name {
            let message = if name.trim().is_empty() { "a key is missing" } else { "a key has spaces around it" };
            return Err(refuse(at..at + length, message));
        }
        segments.push(Segment {
            name: name.to_owned(),
            place: Place { source: Arc::clone(source), span: at..at + length },
        });
        if segments.len() > MAX_DEPTH {
            return Err(refuse(at..at + length, "the path is deeper than any recipe"));
        }
        at += length;
        match text[at..].chars().next() {
            Some('.') => at += 1,
            None | Some('=') => return Ok((segments, at)),
            Some(_) => return Err(refuse(at..at + 1, "a dot or `=` must follow a quoted key")),
        }
    }
}

/// The list index that a segment names, checked against the list.
fn list_index(items: &[Node], segment: &Segment) -> Result<usize, Box<Diagnostic>> {
    // `00` and `+0` parse as 0, but an item has only one name.
    let index = segment.name.parse::<usize>().ok().filter(|index| index.to_string() == segment.name);
    let message = match index {
        Some(index) if index < items.len() => return Ok(index),
        Some(index) => format!("the list has no item {index}"),
        None => format!("{} is not the index of an item of this list", quoted(&segment.name)),
    };
    let help = match items.len() {
        0 => "the list is empty: set item 0 to add one".to_owned(),
        count => format!("items are counted from 0; there are {count}, and setting item {count} adds one"),
    };
    let diagnostic = Diagnostic::error(codes::BAD_OVERRIDE, message, segment.place.clone());
    Err(Box::new(diagnostic.help(help)))
}

fn not_a_mapping(content: &Content, origin: &Origin, segment: &Segment) -> Diagnostic {
    let message = format!("{} cannot hold {}", content.describe(), quoted(&segment.name));
    let diagnostic = Diagnostic::error(codes::BAD_OVERRIDE, message, segment.place.clone());
    match origin.place() {
        Some(place) => diagnostic.label(place.clone(), "which was set here"),
        None => diagnostic,
    }
}

/// The collection that a segment of a path leads into.
enum Holder<'n> {
    Map(&'n mut Mapping),
    Item(&'n mut Vec<Node>, usize),
}

/// The collection in a node. Null, and what was removed, becomes an empty mapping; any other value is an error.
fn holder<'n>(node: &'n mut Node, segment: &Segment) -> Result<Holder<'n>, Box<Diagnostic>> {
    let Node { content, origin, .. } = node;
    if matches!(content, Content::Null | Content::Removed { .. }) {
        *content = Content::Map(Mapping::new());
    }
    match content {
        Content::Map(map) => Ok(Holder::Map(map)),
        Content::Seq(items) => {
            let index = list_index(items, segment)?;
            Ok(Holder::Item(items, index))
        }
        other => Err(Box::new(not_a_mapping(other, origin, segment))),
    }
}

/// Appends an empty item if a segment names the index after the last item of a list.
fn make_room(node: &mut Node, segment: &Segment) {
    if let Content::Seq(items) = &mut node.content
        && segment.name == items.len().to_string()
    {
        let origin = Origin::Flag(segment.place.clone());
        items.push(Node { content: Content::Null, origin, typing: Typing::Fixed });
    }
}

fn set(root: &mut Node, segments: &[Segment], value: Node, vain: &mut Vec<Vain>) -> Result<(), Box<Diagnostic>> {
    let Some((last, parents)) = segments.split_last() else {
        return Ok(());
    };
    let mut node = root;
    for segment in parents {
        make_room(node, segment);
        node = match holder(node, segment)? {
            Holder::Item(items, index) => &mut items[index],
            Holder::Map(map) => {
                let key = Origin::Flag(segment.place.clone());
                let member = map.entry(segment.name.clone()).or_insert_with(|| Member {
                    value: Node { content: Content::Null, origin: key.clone(), typing: Typing::Fixed },
                    key,
                });
                &mut member.value
            }
        };
    }
    make_room(node, last);
    match holder(node, last)? {
        Holder::Item(items, index) => items[index] = value,
        Holder::Map(map) => {
            if let Some(place) = value.written_null() {
                if remove(map, last) {
                    return Ok(());
                }
                vain.push(Vain::new(place.clone(), map));
            }
            let changes_type =
                last.name == "type" && map.get("type").is_some_and(|old| old.value.as_str() != value.as_str());
            if changes_type {
                // It is another component now: the old one's options go, except those that flags set.
                map.retain(|key, member| key == "type" || keeps_flags(&mut member.value));
            }
            if map.get(&last.name).is_some_and(|member| member.value.is_removed()) {
                // What comes back is new, and stands last.
                map.shift_remove(&last.name);
            }
            let key = Origin::Flag(last.place.clone());
            map.insert(last.name.clone(), Member { key, value });
        }
    }
    Ok(())
}

/// Removes a member; false if there is none.
fn remove(map: &mut Mapping, segment: &Segment) -> bool {
    let by = Origin::Flag(segment.place.clone());
    match map.get_mut(&segment.name).filter(|member| !member.value.is_removed()) {
        Some(member) => {
            *member = member.removed(by.clone(), by);
            true
        }
        None => false,
    }
}

/// Removes from a value what no flag set; false if nothing is left.
fn keeps_flags(node: &mut Node) -> bool {
    if node.origin.place().is_some_and(|place| place.source.kind() == SourceKind::Flag) {
        return true;
    }
    match &mut node.content {
        Content::Map(map) => {
            map.retain(|_, member| keeps_flags(&mut member.value));
            !map.is_empty()
        }
        _ => false,
    }
}

fn delete(root: &mut Node, segments: &[Segment]) -> Result<(), Box<Diagnostic>> {
    let Some((last, parents)) = segments.split_last() else {
        return Ok(());
    };
    let mut node = root;
    for segment in parents {
        node = match holder(node, segment)? {
            Holder::Item(items, index) => &mut items[index],
            Holder::Map(map) => match map.get_index_of(&segment.name).filter(|at| !map[*at].value.is_removed()) {
                Some(index) => &mut map[index].value,
                None => return Err(Box::new(nothing_to_delete(map, segment))),
            },
        };
    }
    match holder(node, last)? {
        Holder::Item(items, index) => {
            items.remove(index);
        }
        Holder::Map(map) => {
            if !remove(map, last) {
                return Err(Box::new(nothing_to_delete(map, last)));
            }
        }
    }
    Ok(())
}

fn nothing_to_delete(map: &Mapping, segment: &Segment) -> Diagnostic {
    const SHOWN: usize = 12;
    let message = format!("there is no {} to delete", quoted(&segment.name));
    let there = || {
        let is_there = |(name, member): &(&String, &Member)| *name != REPLACE && !member.value.is_removed();
        map.iter().filter(is_there).map(|(name, _)| name.as_str())
    };
    Diagnostic::error(codes::BAD_OVERRIDE, message, segment.place.clone())
        .allowing(nearest(&segment.name, there()), there().take(SHOWN))
}
