//! YAML text to [`Node`]s that know where they were written.
//!
//! Scalars follow the core schema of YAML 1.2, as editors read it: `yes` and `no` are text, `1e-3`
//! and `.75` are numbers. Anchors, aliases and merge keys are resolved here; duplicate keys are
//! errors; size, nesting and what aliases expand to are limited.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    sync::Arc,
};

use granit_parser::{Event, Parser, ScalarStyle, Span, StructureStyle};
use indexmap::IndexMap;
use serde_json::{Number, Value};

use crate::diagnostic::{Diagnostic, Place, codes, quoted};

/// The largest recipe file, in bytes.
pub const MAX_BYTES: usize = 1 << 20;
/// The deepest nesting.
pub const MAX_DEPTH: usize = 64;
/// The most values that a document may hold after aliases are expanded.
pub const MAX_NODES: usize = 100_000;

/// What a [`Source`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceKind {
    /// A file, or text given in place of one.
    File,
    /// A recipe embedded in the program.
    Builtin,
    /// The text of a flag.
    Flag,
}

/// Text that positions refer to.
#[derive(Debug)]
pub struct Source {
    name: String,
    text: String,
    kind: SourceKind,
}

impl Source {
    /// A source with the name that messages show.
    pub fn new(name: impl Into<String>, text: impl Into<String>, kind: SourceKind) -> Source {
        Source { name: name.into(), text: text.into(), kind }
    }

    /// The name that messages show: a path, or `--set`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The whole text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// What it is.
    pub fn kind(&self) -> SourceKind {
        self.kind
    }

    /// Line and column of a byte offset, both from 1, the column in characters.
    pub fn line_column(&self, offset: usize) -> (usize, usize) {
        let mut offset = offset.min(self.text.len());
        while !self.text.is_char_boundary(offset) {
            offset -= 1;
        }
        let line_start = self.line_range(offset).start;
        let breaks = |(at, byte): &(usize, u8)| is_break(self.text.as_bytes(), *at, *byte);
        let line = self.text.bytes().enumerate().take(offset).filter(breaks).count() + 1;
        let column = self.text[line_start..offset].chars().filter(|c| *c != '\u{feff}').count() + 1;
        (line, column)
    }

    /// The line that holds a byte offset.
    pub fn line(&self, offset: usize) -> &str {
        self.text.get(self.line_range(offset)).unwrap_or("")
    }

    /// The bytes of the line that holds an offset, without its line break.
    pub(crate) fn line_range(&self, offset: usize) -> Range<usize> {
        let bytes = self.text.as_bytes();
        let offset = offset.min(bytes.len());
        let start = (0..offset).rev().find(|&at| is_break(bytes, at, bytes[at])).map_or(0, |at| at + 1);
        let end = (offset..bytes.len()).find(|&at| matches!(bytes[at], b'\n' | b'\r'));
        start..end.unwrap_or(bytes.len()).max(start)
    }
}

/// Whether a line ends with this byte: a line feed, or a carriage return of its own, as YAML has it.
fn is_break(bytes: &[u8], at: usize, byte: u8) -> bool {
    byte == b'\n' || (byte == b'\r' && bytes.get(at + 1) != Some(&b'\n'))
}

/// Who set a value.
#[derive(Clone, Debug)]
pub enum Origin {
    /// A recipe file or an embedded recipe.
    File(Place),
    /// `--set`.
    Flag(Place),
    /// An environment variable, or the default written beside its name.
    Variable {
        /// The variable.
        name: String,
        /// Where `${...}` stands.
        at: Place,
    },
    /// Nobody: the component's default.
    Default,
}

impl Origin {
    /// Where it was written; nothing for defaults.
    pub fn place(&self) -> Option<&Place> {
        match self {
            Origin::File(place) | Origin::Flag(place) | Origin::Variable { at: place, .. } => Some(place),
            Origin::Default => None,
        }
    }

    pub(crate) fn new(place: Place) -> Origin {
        match place.source.kind {
            SourceKind::File | SourceKind::Builtin => Origin::File(place),
            SourceKind::Flag => Origin::Flag(place),
        }
    }
}

/// A value with its origin.
#[derive(Clone, Debug)]
pub struct Node {
    /// The value.
    pub content: Content,
    /// Who set it.
    pub origin: Origin,
    /// What decides the type of a scalar.
    pub(crate) typing: Typing,
}

/// What decides the type of a scalar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Typing {
    /// Its text: it is plain.
    Text,
    /// It is what it is: quoted, tagged, or a collection.
    Fixed,
    /// The option that it is given to: it is quoted, but one variable and nothing else. Inside
    /// `{ }` a variable cannot be written without quotes.
    Option,
}

/// What a [`Node`] holds.
#[derive(Clone, Debug)]
pub enum Content {
    /// `null`, `~`, or nothing.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A whole number between the least `i64` and the greatest `u64`.
    Int(i128),
    /// Any other number; may be infinite or not a number.
    Float(f64),
    /// Text.
    Str(String),
    /// A list.
    Seq(Vec<Node>),
    /// A mapping.
    Map(Mapping),
    /// A scalar whose `${...}` have no value; an error where it is read.
    Unset {
        /// The scalar, with `$NAME` where a value is missing.
        text: String,
        /// What is wrong with its variables.
        diagnostics: Vec<Diagnostic>,
    },
}

/// A mapping in the order in which it was written.
pub type Mapping = IndexMap<String, Member>;

/// A value of a mapping, with the origin of its key.
#[derive(Clone, Debug)]
pub struct Member {
    /// Where the key stands.
    pub key: Origin,
    /// The value.
    pub value: Node,
}

impl Content {
    /// What it is, for messages: ``the string `abc` ``, `a mapping`.
    pub(crate) fn describe(&self) -> String {
        match self {
            Content::Null => "nothing".to_owned(),
            Content::Bool(value) => format!("the boolean `{value}`"),
            Content::Int(value) => format!("the number `{value}`"),
            Content::Float(value) => format!("the number `{}`", number(*value)),
            Content::Str(text) => format!("the string {}", quoted(text)),
            Content::Seq(_) => "a list".to_owned(),
            Content::Map(_) => "a mapping".to_owned(),
            Content::Unset { .. } => "an unset variable".to_owned(),
        }
    }
}

impl Node {
    /// The mapping, where it is one.
    pub fn as_map(&self) -> Option<&Mapping> {
        match &self.content {
            Content::Map(map) => Some(map),
            _ => None,
        }
    }

    /// The text, where it is text.
    pub fn as_str(&self) -> Option<&str> {
        match &self.content {
            Content::Str(text) => Some(text),
            _ => None,
        }
    }

    /// The value under a key or an index.
    pub fn child(&self, segment: &str) -> Option<&Node> {
        match &self.content {
            Content::Map(map) => map.get(segment).map(|member| &member.value),
            Content::Seq(items) => items.get(segment.parse::<usize>().ok()?),
            _ => None,
        }
    }

    /// The value as JSON; numbers that JSON lacks and unset variables become null.
    pub fn to_json(&self) -> Value {
        match &self.content {
            Content::Null | Content::Unset { .. } => Value::Null,
            Content::Bool(value) => Value::Bool(*value),
            Content::Int(value) => integer(*value).map_or(Value::Null, Value::Number),
            Content::Float(value) => Number::from_f64(*value).map_or(Value::Null, Value::Number),
            Content::Str(text) => Value::String(text.clone()),
            Content::Seq(items) => items.iter().map(Node::to_json).collect(),
            Content::Map(map) => map.iter().map(|(key, member)| (key.clone(), member.value.to_json())).collect(),
        }
    }
}

/// A number for messages: in powers of ten where its digits would fill the line.
pub fn number(value: f64) -> String {
    const MANY: f64 = 1e15;
    const FEW: f64 = 1e-6;
    match value.abs() {
        size if size.is_finite() && size != 0.0 && !(FEW..MANY).contains(&size) => format!("{value:e}"),
        _ => value.to_string(),
    }
}

/// A whole number as JSON, where it fits 64 bits.
pub(crate) fn integer(value: i128) -> Option<Number> {
    i64::try_from(value).map(Number::from).or_else(|_| u64::try_from(value).map(Number::from)).ok()
}

/// What the text of a plain scalar means in the core schema.
pub(crate) fn resolve_plain(text: &str) -> Content {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Content::Null,
        "true" | "True" | "TRUE" => return Content::Bool(true),
        "false" | "False" | "FALSE" => return Content::Bool(false),
        ".nan" | ".NaN" | ".NAN" => return Content::Float(f64::NAN),
        _ => {}
    }
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    if matches!(unsigned, ".inf" | ".Inf" | ".INF") {
        let sign = if text.starts_with('-') { -1.0 } else { 1.0 };
        return Content::Float(sign * f64::INFINITY);
    }
    let digits = |text: &str, radix: u32| !text.is_empty() && text.chars().all(|c| c.is_digit(radix));
    let whole = |text: &str, radix: u32| match i128::from_str_radix(text, radix) {
        Ok(value) if integer(value).is_some() => Some(Content::Int(value)),
        _ => None,
    };
    for (prefix, radix) in [("0o", 8), ("0x", 16)] {
        if let Some(rest) = text.strip_prefix(prefix)
            && digits(rest, radix)
            && let Some(content) = whole(rest, radix)
        {
            return content;
        }
    }
    if digits(unsigned, 10) {
        if let Some(content) = whole(text, 10) {
            return content;
        }
        return text.parse().map_or_else(|_| Content::Str(text.to_owned()), Content::Float);
    }
    if is_float(unsigned)
        && let Ok(value) = text.parse()
    {
        return Content::Float(value);
    }
    Content::Str(text.to_owned())
}

/// Whether text without its sign is `(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?`.
fn is_float(unsigned: &str) -> bool {
    let (mantissa, exponent) = match unsigned.find(['e', 'E']) {
        Some(at) => (&unsigned[..at], Some(&unsigned[at + 1..])),
        None => (unsigned, None),
    };
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let mantissa_holds = match mantissa.split_once('.') {
        Some((whole, fraction)) => digits(whole) && digits(fraction) && !(whole.is_empty() && fraction.is_empty()),
        None => !mantissa.is_empty() && digits(mantissa),
    };
    let exponent_holds = exponent.is_none_or(|exponent| {
        let exponent = exponent.strip_prefix(['-', '+']).unwrap_or(exponent);
        !exponent.is_empty() && digits(exponent)
    });
    mantissa_holds && exponent_holds
}

/// Parses one value, such as a component's example.
///
/// # Errors
/// The first mistake, with its line and column.
pub fn parse_value(text: &str) -> Result<Value, String> {
    let source = Arc::new(Source::new("value", text, SourceKind::File));
    let parsed = parse(&source);
    if let Some(first) = parsed.diagnostics.first() {
        let place = first.place().map(|place| place.line_column());
        let (line, column) = place.unwrap_or((1, 1));
        return Err(format!("{} (line {line}, column {column})", first.message));
    }
    Ok(parsed.root.map_or(Value::Null, |root| root.to_json()))
}

/// What became of a text.
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

/// A finished node with what limits need to know.
#[derive(Clone)]
struct Built {
    node: Node,
    nodes: usize,
    depth: usize,
}

/// A scalar as it was written, which is what a key is.
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
        /// Where `<<` stands, once it was seen.
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
        let limit = self.source.text.len();
        let start = (self.offset + span.start).min(limit);
        Place { source: Arc::clone(self.source), span: start..(self.offset + span.end).clamp(start, limit) }
    }

    fn span_place(&self, span: Span) -> Place {
        self.place(span.byte_range().unwrap_or(0..0))
    }

    fn run(&mut self) -> Result<(), Fatal> {
        let text = &self.source.text[self.offset..];
        let options = granit_parser::options! {
            emit_comments: false,
            // One more than allowed here, so that our message is the one shown.
            flow_nesting_limit: MAX_DEPTH + 2,
            block_nesting_limit: MAX_DEPTH + 2,
        };
        let mut documents = 0;
        for event in Parser::new_from_str_with_options(text, options) {
            let (event, span) = event.map_err(|error| self.syntax(&error))?;
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

    fn syntax(&self, error: &granit_parser::ScanError) -> Fatal {
        let text = &self.source.text[self.offset..];
        let at = error.marker().byte_offset().unwrap_or_else(|| {
            let index = error.marker().index();
            text.char_indices().nth(index).map_or(text.len(), |(at, _)| at)
        });
        let at = at.min(text.len());
        let here = self.place(at..at + text[at..].chars().next().map_or(0, char::len_utf8));
        if matches!(error.kind(), granit_parser::ErrorKind::RecursionLimitExceeded) {
            return Box::new(Diagnostic::error(codes::TOO_LARGE, too_deep(), here));
        }
        let info = error.info();
        // The parser says `while parsing a node, did not find ...`; the place says the first half.
        let message = match info.split_once(", ") {
            Some((context, rest)) if context.starts_with("while ") => rest,
            _ => info.as_str(),
        };
        let range = self.source.line_range(self.offset + at);
        let line_start = range.start.saturating_sub(self.offset);
        let line = &self.source.text[range.clone()];
        if let Some(tab) = tab_in_indentation(text, line_start) {
            let message = "not valid YAML: a tab in the indentation";
            return Box::new(
                Diagnostic::error(codes::SYNTAX, message, self.place(tab..tab + 1))
                    .help("YAML is indented with spaces: replace the tab"),
            );
        }
        // The parser stops at the line after a key that it took for the beginning of a text.
        let before = range.start.checked_sub(1).filter(|end| *end >= self.offset);
        let before = before.map(|end| self.source.line_range(end)).filter(|range| range.start >= self.offset);
        for range in [Some(range), before].into_iter().flatten() {
            if let Some((span, help)) = key_slip(&self.source.text[range.clone()]) {
                let start = range.start - self.offset;
                let place = self.place(start + span.start..start + span.end);
                let message = format!("not valid YAML: {message}");
                return Box::new(Diagnostic::error(codes::SYNTAX, message, place).help(help));
            }
        }
        let mut diagnostic = Diagnostic::error(codes::SYNTAX, format!("not valid YAML: {message}"), here);
        if line.contains("${") && line.contains(['[', '{']) {
            diagnostic = diagnostic.help("inside `{ }` and `[ ]` a variable needs quotes: \"${NAME}\"");
        } else if info.contains("mapping values are not allowed") {
            diagnostic =
                diagnostic.help("keys of one mapping stand in one column, and text that holds `: ` needs quotes");
        } else if info.contains("did not find expected key") {
            diagnostic = diagnostic.help("keys of one mapping stand in one column: check this line's indentation");
        } else if matches!(error.kind(), granit_parser::ErrorKind::UnknownAnchor) {
            diagnostic = diagnostic.help("define the anchor with `&name` above its first `*name`");
        } else if let Some(open) = open_bracket(&text[..line_start]) {
            diagnostic = diagnostic
                .label(self.place(open..open + 1), "opened here and not closed on its line")
                .help("close the bracket");
        }
        Box::new(diagnostic)
    }

    fn too_large(&self, message: String, span: Span) -> Fatal {
        let mut place = self.span_place(span);
        place.span.end = place.span.end.min(place.span.start + 1);
        Box::new(Diagnostic::error(codes::TOO_LARGE, message, place))
    }

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

    /// Where the tag of a value stands: the parser's span begins behind it.
    fn tag_place(&self, written: &str, span: Span) -> Place {
        let mut place = self.span_place(span);
        let line = self.source.line_range(place.span.start).start;
        if let Some(at) = self.source.text[line..place.span.start].rfind(written) {
            place.span = line + at..line + at + written.len();
        }
        place
    }

    /// Counts values against the limit before they are made.
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
        // A block collection ends where the next thing begins; only flow ones end visibly.
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
                    .help("a recipe cannot hold itself: write the value out"),
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

    /// Hands a finished node to the collection that waits for it.
    fn finish(&mut self, built: Built, anchor: usize, span: Span, written: Option<Written<'_>>) -> Result<(), Fatal> {
        if anchor != 0 {
            // What an anchor keeps is a copy.
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
                    // Of a key that is not written the parser makes `~`, at no place.
                    let is_plain = written.is_some_and(|written| written.plain);
                    if is_plain && place.span.is_empty() {
                        let colon = place.span.start..(place.span.start + 1).min(self.source.text.len());
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
                    // Nothing stands after the key: the key is the place to show.
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

fn too_deep() -> String {
    format!("nested deeper than {MAX_DEPTH} levels")
}

/// What keeps a line, or a key, from being `key: value` though it looks like it: where, and the way out.
pub(crate) fn key_slip(text: &str) -> Option<(Range<usize>, String)> {
    let comment = text.find(" #").unwrap_or(text.len());
    let text = &text[..comment];
    for (odd, name, plain) in [
        ('\u{ff1a}', "a full-width colon", "`: `"),
        ('\u{a0}', "a no-break space", "a space"),
        ('\u{3000}', "a full-width space", "a space"),
    ] {
        if let Some(at) = text.find(odd).filter(|at| !text[..*at].contains(['"', '\''])) {
            return Some((at..at + odd.len_utf8(), format!("this is {name}: write {plain}")));
        }
    }
    let key = text.trim_start_matches([' ', '-']);
    let start = text.len() - key.len();
    let (name, value) = key.split_once(':')?;
    let is_name = !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || c == '_');
    // Neither `a: b`, which is sound, nor an address such as `hf://a`.
    let glued = !value.is_empty() && !value.starts_with([' ', '/', ':', '\t']);
    (is_name && glued).then(|| {
        let end = key.trim_end().len();
        (start..start + end, format!("write a space behind the colon: `{name}: {}`", value.trim_end()))
    })
}

/// The first tab in the indentation of the line at an offset or of the one after it, which is
/// where a scalar that runs on stops.
fn tab_in_indentation(text: &str, line_start: usize) -> Option<usize> {
    let mut start = line_start;
    for line in text[line_start..].split_inclusive('\n').take(2) {
        let indent = line.len() - line.trim_start_matches([' ', '\t']).len();
        if let Some(tab) = line[..indent].find('\t') {
            return Some(start + tab);
        }
        start += line.len();
    }
    None
}

/// The innermost `[` or `{` that text leaves open, comments and one-line quotes left out.
fn open_bracket(text: &str) -> Option<usize> {
    let mut open = Vec::new();
    let mut start = 0;
    for line in text.split_inclusive('\n') {
        let mut quote = None;
        let mut before = ' ';
        for (at, c) in line.char_indices() {
            match (quote, c) {
                (Some(end), c) if c == end && before != '\\' => quote = None,
                (Some(_), _) => {}
                (None, '#') if before.is_whitespace() => break,
                (None, '"' | '\'') if !before.is_alphanumeric() => quote = Some(c),
                (None, '[' | '{') => open.push(start + at),
                (None, ']' | '}') => {
                    open.pop();
                }
                (None, _) => {}
            }
            before = c;
        }
        start += line.len();
    }
    open.pop()
}

fn duplicate(key: &str, second: Place, first: Place) -> Diagnostic {
    Diagnostic::error(codes::DUPLICATE_KEY, format!("the key {} is set twice", quoted(key)), second)
        .label(first, "first set here")
        .help("keep one of the two")
}

/// Takes in the members of `<<`: a mapping, or a list of them of which earlier ones win.
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

    /// What the `yaml` package of yaml-language-server makes of the same texts in its 1.2 core
    /// schema.
    #[test]
    fn plain_scalars_follow_the_core_schema() {
        for (text, expected) in [
            ("", json!(null)),
            ("~", json!(null)),
            ("NULL", json!(null)),
            ("nULL", json!("nULL")),
            ("True", json!(true)),
            ("yes", json!("yes")),
            ("off", json!("off")),
            ("007", json!(7)),
            ("+12", json!(12)),
            ("-0", json!(0)),
            ("0o17", json!(15)),
            ("0x1F", json!(31)),
            ("-0x1F", json!("-0x1F")),
            ("1_000", json!("1_000")),
            ("18446744073709551615", json!(u64::MAX)),
            ("1e-3", json!(1e-3)),
            ("1.5e-4", json!(1.5e-4)),
            (".75", json!(0.75)),
            ("-.5", json!(-0.5)),
            ("3.", json!(3.0)),
            ("1.0E+2", json!(100.0)),
            (".", json!(".")),
            ("e5", json!("e5")),
            ("1e", json!("1e")),
            ("1.2.3", json!("1.2.3")),
            ("12:30", json!("12:30")),
            ("2020-01-01", json!("2020-01-01")),
        ] {
            let content = resolve_plain(text);
            let node = Node { content, origin: Origin::Default, typing: Typing::Text };
            assert_eq!(node.to_json(), expected, "{text:?}");
        }
    }

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
