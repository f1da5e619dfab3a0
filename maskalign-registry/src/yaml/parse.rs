//! YAML text to nodes.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    sync::Arc,
};

use granit_parser::{Event, Parser, ScalarStyle, Span, StructureStyle};
use serde_json::Value;

use super::{
    Content, MAX_DEPTH, MAX_NODES, Mapping, Member, Node, Origin, Typing, resolve_plain,
    syntax::{not_yaml, too_deep},
};
use crate::{
    diagnostic::{Diagnostic, Place, Source, SourceKind, codes},
    wording::quoted,
};

/// Parses one value, such as a component's example.
///
/// # Errors
/// The first mistake, with its line and column.
pub fn parse_value(text: &str) -> Result<Value, String> {
    let source = Arc::new(Source::new("value", text, SourceKind::File));
    let parsed = parse(&source);
    if let Some(first) = parsed.diagnostics.first() {
        let place = first.place().map(Place::line_column);
        let (line, column) = place.unwrap_or((1, 1));
        return Err(format!("{} (line {line}, column {column})", first.message));
    }
    Ok(parsed.root.map_or(Value::Null, |root| root.to_json()))
}

/// The outcome of parsing.
pub(crate) struct Parsed {
    /// The document; absent where the text is not YAML, or empty.
    pub root: Option<Node>,
    /// What is wrong with it.
    pub diagnostics: Vec<Diagnostic>,
}

/// Parses a whole source.
pub(crate) fn parse(source: &Arc<Source>) -> Parsed {
    parse_from(source, 0)
}

/// Parses a source from a byte offset on, as one document.
pub(crate) fn parse_from(source: &Arc<Source>, offset: usize) -> Parsed {
    let mut builder = Builder {
        source,
        offset,
        stack: Vec::new(),
        root: None,
        anchors: HashMap::new(),
        nodes: 0,
        diagnostics: Vec::new(),
    };
    match builder.run() {
        Ok(()) => Parsed { root: builder.root.map(|built| built.node), diagnostics: builder.diagnostics },
        Err(fatal) => {
            builder.diagnostics.push(*fatal);
            Parsed { root: None, diagnostics: builder.diagnostics }
        }
    }
}

/// A finished node, with its size and depth for the limits.
#[derive(Clone)]
struct Built {
    node: Node,
    nodes: usize,
    depth: usize,
}

/// A scalar as it was written: keys are text whatever their value would be.
#[derive(Clone, Copy)]
struct Written<'a> {
    text: &'a str,
    plain: bool,
}

struct Frame {
    collection: Collection,
    style: StructureStyle,
    start: Span,
    anchor: usize,
    nodes: usize,
    depth: usize,
}

enum Collection {
    Seq(Vec<Node>),
    Map {
        members: Mapping,
        /// Keys that came in by `<<`, which an explicit key may still replace.
        merged: HashSet<String>,
        /// The key whose value comes next.
        key: Option<(Key, Place)>,
        /// Where `<<` stands, if there was one.
        merge_at: Option<Place>,
    },
}

enum Key {
    Name(String),
    Merge,
}

struct Builder<'a> {
    source: &'a Arc<Source>,
    offset: usize,
    stack: Vec<Frame>,
    root: Option<Built>,
    anchors: HashMap<usize, Built>,
    nodes: usize,
    diagnostics: Vec<Diagnostic>,
}

type Fatal = Box<Diagnostic>;

impl Builder<'_> {
    fn place(&self, span: Range<usize>) -> Place {
        let limit = self.source.text().len();
        let start = (self.offset + span.start).min(limit);
        Place { source: Arc::clone(self.source), span: start..(self.offset + span.end).clamp(start, limit) }
    }

    fn span_place(&self, span: Span) -> Place {
        self.place(span.byte_range().unwrap_or(0..0))
    }

    fn run(&mut self) -> Result<(), Fatal> {
        let text = &self.source.text()[self.offset..];
        let options = granit_parser::options! {
            emit_comments: false,
            // More than allowed here, so that our message is the one shown.
            flow_nesting_limit: MAX_DEPTH + 2,
            block_nesting_limit: MAX_DEPTH + 2,
        };
        let mut documents = 0;
        for event in Parser::new_from_str_with_options(text, options) {
            let (event, span) = event
                .map_err(|error| Box::new(not_yaml(self.source, self.offset, &error, &|span| self.place(span))))?;
            match event {
                Event::DocumentStart(..) => {
                    documents += 1;
                    if documents > 1 {
                        let place = self.span_place(span);
                        return Err(Box::new(
                            Diagnostic::error(codes::SYNTAX, "a second document", place)
                                .help("a recipe is one YAML document: remove `---` and what follows"),
                        ));
                    }
                }
                Event::Scalar(text, style, anchor, tag) => {
                    let place = self.span_place(span);
                    let content = match style {
                        ScalarStyle::Plain => resolve_plain(&text),
                        _ => Content::Str(text.clone().into_owned()),
                    };
                    let (content, typing) = match tag {
                        None if style == ScalarStyle::Plain => (content, Typing::Text),
                        None => (content, Typing::Fixed),
                        Some(tag) => {
                            let suffix = tag.core_suffix().map(str::to_owned);
                            let original = tag.original();
                            let at = self.tag_place(&original, span);
                            (self.tagged(suffix.as_deref(), &original, &text, &at)?, Typing::Fixed)
                        }
                    };
                    let node = Node { content, origin: Origin::new(place), typing };
                    let written = Written { text: &text, plain: style == ScalarStyle::Plain };
                    self.charge(1, span)?;
                    let built = Built { node, nodes: 1, depth: 0 };
                    self.finish(built, anchor, span, Some(written))?;
                }
                Event::SequenceStart(style, anchor, tag) => {
                    self.collection_tag(tag.as_deref(), "seq", span)?;
                    self.open(Collection::Seq(Vec::new()), style, anchor, span)?;
                }
                Event::MappingStart(style, anchor, tag) => {
                    self.collection_tag(tag.as_deref(), "map", span)?;
                    let members = Mapping::new();
                    let map = Collection::Map { members, merged: HashSet::new(), key: None, merge_at: None };
                    self.open(map, style, anchor, span)?;
                }
                Event::SequenceEnd | Event::MappingEnd => self.close(span)?,
                Event::Alias(id) => self.alias(id, span)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn too_large(&self, message: String, span: Span) -> Fatal {
        let mut place = self.span_place(span);
        place.span.end = place.span.end.min(place.span.start + 1);
        Box::new(Diagnostic::error(codes::TOO_LARGE, message, place))
    }

    #[expect(clippy::unused_self, reason = "a rule of the parser, called like the others")]
    fn tagged(&self, suffix: Option<&str>, written: &str, text: &str, place: &Place) -> Result<Content, Fatal> {
        let refuse = |message: String| {
            Err(Box::new(
                Diagnostic::error(codes::SYNTAX, message, place.clone())
                    .help("recipes need no tags: quote a value to make it text"),
            ))
        };
        let resolved = resolve_plain(text);
        match (suffix, resolved) {
            (Some("str"), _) => Ok(Content::Str(text.to_owned())),
            (None, _) if written == "!" => Ok(Content::Str(text.to_owned())),
            (Some("int"), content @ Content::Int(_))
            | (Some("float"), content @ (Content::Float(_) | Content::Int(_)))
            | (Some("bool"), content @ Content::Bool(_))
            | (Some("null"), content @ Content::Null) => Ok(content),
            (Some("int" | "float" | "bool" | "null"), _) => {
                refuse(format!("{} is not of the type `{written}`", quoted(text)))
            }
            _ => refuse(format!("unknown tag {}", quoted(written))),
        }
    }

    fn collection_tag(&self, tag: Option<&granit_parser::Tag>, expected: &str, span: Span) -> Result<(), Fatal> {
        match tag {
            None => Ok(()),
            Some(tag) if tag.core_suffix() == Some(expected) => Ok(()),
            Some(tag) => Err(Box::new(
                Diagnostic::error(
                    codes::SYNTAX,
                    format!("unknown tag {}", quoted(&tag.original())),
                    self.tag_place(&tag.original(), span),
                )
                .help("recipes need no tags: remove it"),
            )),
        }
    }

    /// Where the tag of a value stands: the parser's span begins after it.
    fn tag_place(&self, written: &str, span: Span) -> Place {
        let mut place = self.span_place(span);
        let line = self.source.line_range(place.span.start).start;
        if let Some(at) = self.source.text()[line..place.span.start].rfind(written) {
            place.span = line + at..line + at + written.len();
        }
        place
    }

    /// Counts values against the limit before they are allocated.
    fn charge(&mut self, nodes: usize, span: Span) -> Result<(), Fatal> {
        self.nodes = self.nodes.saturating_add(nodes);
        if self.nodes > MAX_NODES {
            return Err(
                self.too_large(format!("more than {MAX_NODES} values, those that aliases expand to included"), span)
            );
        }
        Ok(())
    }

    fn open(&mut self, collection: Collection, style: StructureStyle, anchor: usize, span: Span) -> Result<(), Fatal> {
        self.charge(1, span)?;
        if self.stack.len() >= MAX_DEPTH {
            return Err(self.too_large(too_deep(), span));
        }
        self.stack.push(Frame { collection, style, start: span, anchor, nodes: 1, depth: 0 });
        Ok(())
    }

    fn close(&mut self, end: Span) -> Result<(), Fatal> {
        let Some(frame) = self.stack.pop() else {
            return Ok(());
        };
        let start = frame.start.byte_range().unwrap_or(0..0);
        let end_range = end.byte_range().unwrap_or(start.clone());
        // A block collection ends where the next token begins; only flow ones have a visible end.
        let flow = frame.style == StructureStyle::Flow;
        let stop = if flow { end_range.end } else { start.end };
        let content = match frame.collection {
            Collection::Seq(items) => Content::Seq(items),
            Collection::Map { members, .. } => Content::Map(members),
        };
        let origin = match &content {
            Content::Map(map) if !flow => map.first().map(|(_, member)| member.key.clone()),
            // Its first dash.
            Content::Seq(_) if !flow => Some(Origin::new(self.place(start.start..start.start + 1))),
            _ => None,
        };
        let node = Node {
            content,
            origin: origin.unwrap_or_else(|| Origin::new(self.place(start.start..stop))),
            typing: Typing::Fixed,
        };
        let built = Built { node, nodes: frame.nodes, depth: frame.depth + 1 };
        self.finish(built, frame.anchor, frame.start, None)
    }

    fn alias(&mut self, id: usize, span: Span) -> Result<(), Fatal> {
        let Some(built) = self.anchors.get(&id) else {
            return Err(Box::new(
                Diagnostic::error(codes::SYNTAX, "an alias of the value that contains it", self.span_place(span))
                    .help("a recipe cannot contain itself: write the value out"),
            ));
        };
        let (nodes, depth) = (built.nodes, built.depth);
        self.charge(nodes, span)?;
        if self.stack.len() + depth > MAX_DEPTH {
            return Err(self.too_large(format!("aliases expand to more than {MAX_DEPTH} levels"), span));
        }
        let Some(built) = self.anchors.get(&id).cloned() else {
            return Ok(());
        };
        self.finish(built, 0, span, None)
    }

    /// Adds a finished node to the collection that it belongs to.
    fn finish(&mut self, built: Built, anchor: usize, span: Span, written: Option<Written<'_>>) -> Result<(), Fatal> {
        if anchor != 0 {
            // The anchor keeps a copy, which counts too.
            self.charge(built.nodes, span)?;
            self.anchors.insert(anchor, built.clone());
        }
        let place = self.span_place(span);
        let Some(frame) = self.stack.last_mut() else {
            self.root = Some(built);
            return Ok(());
        };
        frame.nodes += built.nodes;
        frame.depth = frame.depth.max(built.depth);
        match &mut frame.collection {
            Collection::Seq(items) => {
                items.push(built.node);
                Ok(())
            }
            Collection::Map { members, merged, key, merge_at } => match key.take() {
                None => {
                    let Some(text) = written.map(|written| written.text).or(built.node.as_str()) else {
                        return Err(Box::new(
                            Diagnostic::error(codes::SYNTAX, "a key must be plain text", place)
                                .help("quote the key, or indent what follows it"),
                        ));
                    };
                    // For a missing key the parser emits `~` with an empty span.
                    let is_plain = written.is_some_and(|written| written.plain);
                    if is_plain && place.span.is_empty() {
                        let colon = place.span.start..(place.span.start + 1).min(self.source.text().len());
                        let place = Place { span: colon, ..place };
                        return Err(Box::new(Diagnostic::error(codes::SYNTAX, "a key is missing before `:`", place)));
                    }
                    if text.is_empty() {
                        return Err(Box::new(Diagnostic::error(codes::SYNTAX, "an empty key", place)));
                    }
                    let is_merge = text == "<<" && written.is_some_and(|written| written.plain);
                    *key = Some(if is_merge { (Key::Merge, place) } else { (Key::Name(text.to_owned()), place) });
                    Ok(())
                }
                Some((Key::Merge, at)) => {
                    if let Some(earlier) = merge_at.replace(at.clone()) {
                        self.diagnostics.push(duplicate("<<", at, earlier));
                        return Ok(());
                    }
                    merge(members, merged, built.node, at)
                }
                Some((Key::Name(name), at)) => {
                    let mut value = built.node;
                    // No value is written: the key is the place to show.
                    if matches!(value.content, Content::Null)
                        && value.origin.place().is_some_and(|place| place.span.is_empty())
                    {
                        value.origin = Origin::new(at.clone());
                    }
                    let member = Member { key: Origin::new(at.clone()), value };
                    if merged.remove(&name) {
                        members.insert(name, member);
                    } else if let Some(earlier) = members.get(&name) {
                        let earlier = earlier.key.place().cloned();
                        let diagnostic = duplicate(&name, at.clone(), earlier.unwrap_or(at));
                        self.diagnostics.push(diagnostic);
                    } else {
                        members.insert(name, member);
                    }
                    Ok(())
                }
            },
        }
    }
}

fn duplicate(key: &str, second: Place, first: Place) -> Diagnostic {
    Diagnostic::error(codes::DUPLICATE_KEY, format!("the key {} is set twice", quoted(key)), second)
        .label(first, "first set here")
        .help("keep one of the two")
}

/// Adds the members of `<<`: a mapping, or a list of mappings, of which earlier ones win.
fn merge(members: &mut Mapping, merged: &mut HashSet<String>, value: Node, at: Place) -> Result<(), Fatal> {
    let bases = match value.content {
        Content::Map(map) => vec![map],
        Content::Seq(items) => {
            let maps = items.into_iter().map(|item| match item.content {
                Content::Map(map) => Some(map),
                _ => None,
            });
            match maps.collect::<Option<Vec<Mapping>>>() {
                Some(maps) => maps,
                None => return Err(Box::new(bad_merge(at))),
            }
        }
        _ => return Err(Box::new(bad_merge(at))),
    };
    for (name, member) in bases.into_iter().flatten() {
        if !members.contains_key(&name) {
            merged.insert(name.clone());
            members.insert(name, member);
        }
    }
    Ok(())
}

fn bad_merge(at: Place) -> Diagnostic {
    Diagnostic::error(codes::SYNTAX, "`<<` takes the alias of a mapping, or a list of such aliases", at)
        .help("write `<<: *name` or `<<: [*first, *second]`")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn quotes_and_tags_decide_before_the_text_does() {
        for (text, expected) in [
            ("'3'", json!("3")),
            ("\"true\"", json!("true")),
            ("!!str 3", json!("3")),
            ("!!int 3", json!(3)),
            ("|\n  3\n", json!("3\n")),
            ("{ 1: a, true: b }", json!({ "1": "a", "true": "b" })),
        ] {
            assert_eq!(parse_value(text), Ok(expected), "{text:?}");
        }
        assert!(parse_value("!!int x").is_err());
        assert!(parse_value("!!python/object x").is_err());
        assert!(parse_value("{ [1]: a }").is_err());
    }

    #[test]
    fn an_alias_is_a_copy_and_cannot_hold_itself() {
        assert_eq!(parse_value("[&a { x: 1 }, *a]"), Ok(json!([{ "x": 1 }, { "x": 1 }])));
        let refusal = parse_value("&a [*a]").expect_err("a circle");
        assert!(refusal.contains("contains it"), "{refusal}");
    }
}
