//! `extends`, `--set` and `${VARIABLE}`: from a request to one tree of nodes.
//!
//! The order is fixed: each text is parsed and its variables are put in; bases are merged from
//! left to right with the recipe on top; then the flags apply, in the order given. A variable
//! without a value is an error only where it survives that.

use std::{
    collections::HashMap,
    fs,
    io::Read as _,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use crate::{
    diagnostic::{Diagnostic, Place, codes, quoted},
    plugin::nearest,
    source::{
        Content, MAX_BYTES, MAX_DEPTH, MAX_NODES, Mapping, Member, Node, Origin, Source, SourceKind, Typing, parse,
        parse_from, resolve_plain,
    },
};

/// How many `extends` may follow each other.
const MAX_CHAIN: usize = 32;
/// How many values merging may copy in all.
const MAX_MERGED: usize = 10 * MAX_NODES;

/// Where the names of embedded recipes come from.
pub trait RecipeSource {
    /// The text of the embedded recipe of that name.
    fn builtin(&self, name: &str) -> Option<&str>;

    /// The names of all embedded recipes, for suggestions.
    fn names(&self) -> Vec<&str>;
}

/// No embedded recipes.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoRecipes;

impl RecipeSource for NoRecipes {
    fn builtin(&self, _: &str) -> Option<&str> {
        None
    }

    fn names(&self) -> Vec<&str> {
        Vec::new()
    }
}

/// The recipe to read.
#[derive(Clone, Debug)]
pub enum Input {
    /// A file; where there is none, the name of an embedded recipe.
    Path(PathBuf),
    /// Text in place of a file.
    Text {
        /// The name that messages show; bases are looked up relative to it.
        name: String,
        /// The YAML.
        text: String,
    },
}

/// All that decides what a recipe means, besides the registry.
pub struct LoadRequest<'a> {
    /// The recipe.
    pub input: Input,
    /// The values of `--set`, in order: `path=VALUE` or `~path`.
    pub sets: &'a [String],
    /// The environment.
    pub env: &'a dyn Fn(&str) -> Option<String>,
    /// The embedded recipes.
    pub builtins: &'a dyn RecipeSource,
}

/// The outcome of composition.
pub(crate) struct Composed {
    pub root: Option<Node>,
    /// Every text that was read, in the order in which reports list them.
    pub sources: Vec<Arc<Source>>,
    pub diagnostics: Vec<Diagnostic>,
    /// Whether a base is missing, so that keys may be missing too.
    pub incomplete: bool,
}

pub(crate) fn compose(request: &LoadRequest<'_>) -> Composed {
    let mut composer = Composer {
        request,
        sources: Vec::new(),
        diagnostics: Vec::new(),
        done: HashMap::new(),
        chain: Vec::new(),
        merged: 0,
        incomplete: false,
    };
    let mut root = composer.root();
    if let Some(root) = &mut root {
        for text in request.sets {
            composer.apply_flag(root, text);
        }
    }
    Composed { root, sources: composer.sources, diagnostics: composer.diagnostics, incomplete: composer.incomplete }
}

/// What tells one recipe from another, however it was named.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Identity {
    File(PathBuf),
    Builtin(String),
    Text,
}

/// A recipe found but not parsed.
struct Found {
    identity: Identity,
    /// The folder that bases are relative to; none for embedded recipes.
    folder: Option<PathBuf>,
    source: Arc<Source>,
}

struct Composer<'a> {
    request: &'a LoadRequest<'a>,
    sources: Vec<Arc<Source>>,
    diagnostics: Vec<Diagnostic>,
    /// Recipes already composed: a base that is named many times is read once.
    done: HashMap<Identity, Option<Node>>,
    chain: Vec<(Identity, String)>,
    merged: usize,
    incomplete: bool,
}

impl Composer<'_> {
    fn root(&mut self) -> Option<Node> {
        let found = match &self.request.input {
            Input::Text { name, text } => {
                if text.len() > MAX_BYTES {
                    let start: String = text.chars().take(80).collect();
                    self.unreadable(name, &start, codes::TOO_LARGE, too_many_bytes(), 0);
                    return None;
                }
                let folder = Path::new(name).parent().map(Path::to_path_buf);
                Found {
                    identity: Identity::Text,
                    folder: Some(folder.unwrap_or_default()),
                    source: self.add_source(name, text, SourceKind::File),
                }
            }
            Input::Path(path) => {
                let name = path.display().to_string();
                match self.read(path) {
                    Read::Text(found) => found,
                    Read::Refused => return None,
                    Read::Absent => match self.embedded(&name) {
                        Some(found) => found,
                        None => {
                            self.unknown_recipe(&name, path);
                            return None;
                        }
                    },
                }
            }
        };
        self.compose(found)
    }

    fn unknown_recipe(&mut self, name: &str, path: &Path) {
        let source = self.add_source(name, "", SourceKind::File);
        let place = Place { source, span: 0..0 };
        let message = format!("there is no recipe {}: neither a file nor built in", quoted(name));
        let known = self.known_recipes(path.parent().unwrap_or(Path::new("")));
        let near = nearest_recipes(name, &known);
        self.diagnostics
            .push(Diagnostic::error(codes::UNREADABLE, message, place).allowing(near.iter().map(String::as_str), []));
    }

    fn add_source(&mut self, name: &str, text: &str, kind: SourceKind) -> Arc<Source> {
        let source = Arc::new(Source::new(name, text, kind));
        self.sources.push(Arc::clone(&source));
        source
    }

    fn unreadable(&mut self, name: &str, text: &str, code: &'static str, message: String, at: usize) {
        let source = self.add_source(name, text, SourceKind::File);
        let place = Place { source, span: at..at };
        self.diagnostics.push(Diagnostic::error(code, message, place));
    }

    /// Reads a file within the limits; a refusal is reported here.
    fn read(&mut self, path: &Path) -> Read {
        let name = path.display().to_string();
        let refuse = |composer: &mut Self, code, message| {
            composer.unreadable(&name, "", code, message, 0);
            Read::Refused
        };
        let metadata = match fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if is_absent(&error) => return Read::Absent,
            Err(error) => {
                return refuse(self, codes::UNREADABLE, format!("cannot be read: {error}"));
            }
        };
        if metadata.is_dir() && self.request.builtins.builtin(&name).is_some() {
            return Read::Absent;
        }
        if metadata.is_dir() {
            let message = "is a folder: a recipe is a file".to_owned();
            return refuse(self, codes::UNREADABLE, message);
        }
        if metadata.len() > MAX_BYTES as u64 {
            return refuse(self, codes::TOO_LARGE, too_many_bytes());
        }
        let mut bytes = Vec::new();
        let limit = MAX_BYTES as u64 + 1;
        let outcome = fs::File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes));
        if let Err(error) = outcome {
            return refuse(self, codes::UNREADABLE, format!("cannot be read: {error}"));
        }
        if bytes.len() > MAX_BYTES {
            return refuse(self, codes::TOO_LARGE, too_many_bytes());
        }
        match String::from_utf8(bytes) {
            Ok(text) => Read::Text(Found {
                identity: Identity::File(path.canonicalize().unwrap_or_else(|_| path.to_path_buf())),
                folder: Some(path.parent().map(Path::to_path_buf).unwrap_or_default()),
                source: self.add_source(&name, &text, SourceKind::File),
            }),
            Err(error) => {
                let at = error.utf8_error().valid_up_to();
                let message = format!("is not UTF-8: the byte at offset {at} begins no character");
                let text = String::from_utf8_lossy(error.as_bytes()).into_owned();
                self.unreadable(&name, &text, codes::UNREADABLE, message, at);
                Read::Refused
            }
        }
    }

    /// The embedded recipe of that name, which may carry a folder or `.yaml`.
    fn embedded(&mut self, name: &str) -> Option<Found> {
        let builtins = self.request.builtins;
        let stem = Path::new(name).file_stem().and_then(|stem| stem.to_str());
        let is_bare = !name.contains(['/', '\\']);
        let (name, text) = match builtins.builtin(name) {
            Some(text) => (name, text),
            None if is_bare => {
                let stem = stem?;
                (stem, builtins.builtin(stem)?)
            }
            None => return None,
        };
        Some(Found {
            identity: Identity::Builtin(name.to_owned()),
            folder: None,
            source: self.add_source(&format!("built-in:{name}"), text, SourceKind::Builtin),
        })
    }

    /// Names that `extends` could have meant: embedded recipes, and files of the folder.
    fn known_recipes(&self, folder: &Path) -> Vec<String> {
        const LOOKED_AT: usize = 1000;
        let mut known: Vec<String> = self.request.builtins.names().into_iter().map(str::to_owned).collect();
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        if let Ok(entries) = fs::read_dir(folder) {
            let files = entries.take(LOOKED_AT).flatten();
            known.extend(files.filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                (name.ends_with(".yaml") || name.ends_with(".yml")).then_some(name)
            }));
        }
        known.sort();
        known
    }

    /// Parses a recipe, composes its bases and puts it on top of them.
    fn compose(&mut self, found: Found) -> Option<Node> {
        let parsed = parse(&found.source);
        let broken = parsed.root.is_none() && !parsed.diagnostics.is_empty();
        self.diagnostics.extend(parsed.diagnostics);
        if broken {
            self.incomplete = true;
            return None;
        }
        let Some(mut root) = parsed.root.filter(|root| !matches!(root.content, Content::Null)) else {
            let place = Place { source: Arc::clone(&found.source), span: 0..0 };
            self.diagnostics.push(
                Diagnostic::error(codes::SYNTAX, "the recipe is empty", place)
                    .help("a recipe has a `name` and `stages`, or `extends` another"),
            );
            self.incomplete = true;
            return None;
        };
        self.put_variables(&mut root);
        let Content::Map(map) = &mut root.content else {
            return Some(root);
        };
        let Some(extends) = map.shift_remove("extends") else {
            return Some(root);
        };
        let name = found.source.name().to_owned();
        self.chain.push((found.identity.clone(), name));
        let mut base: Option<Node> = None;
        for (written, place) in self.base_names(&extends.value) {
            match self.base(&written, &place, found.folder.as_deref()) {
                Some(next) => {
                    base = Some(match base {
                        Some(base) => self.merge(base, next, &place),
                        None => next,
                    });
                }
                None => self.incomplete = true,
            }
        }
        self.chain.pop();
        let place = extends.key.place().cloned();
        Some(match (base, place) {
            (Some(base), Some(place)) => self.merge(base, root, &place),
            _ => root,
        })
    }

    /// The names under `extends` with their places.
    fn base_names(&mut self, extends: &Node) -> Vec<(String, Place)> {
        let items = match &extends.content {
            Content::Seq(items) => items.as_slice(),
            _ => std::slice::from_ref(extends),
        };
        let mut names = Vec::new();
        for item in items {
            let Some(place) = item.origin.place() else {
                continue;
            };
            match &item.content {
                Content::Str(text) if !text.is_empty() => names.push((text.clone(), place.clone())),
                Content::Unset { diagnostics, .. } => {
                    self.diagnostics.extend(diagnostics.iter().cloned());
                    self.incomplete = true;
                }
                _ => {
                    let message = format!(
                        "`extends` takes the path or the name of a recipe, or a list of them; found {}",
                        item.content.describe()
                    );
                    self.diagnostics.push(Diagnostic::error(codes::WRONG_TYPE, message, place.clone()));
                    self.incomplete = true;
                }
            }
        }
        names
    }

    /// One base, composed; a refusal is reported here.
    fn base(&mut self, written: &str, place: &Place, folder: Option<&Path>) -> Option<Node> {
        let path = folder.map(|folder| tidy(&folder.join(written)));
        let found = match &path {
            Some(path) => match self.identify(path) {
                Some(identity) => {
                    if let Some(node) = self.already(&identity, written, place) {
                        return node;
                    }
                    match self.read(path) {
                        Read::Text(found) => Some(found),
                        Read::Refused => {
                            self.blame_last(place);
                            return None;
                        }
                        Read::Absent => None,
                    }
                }
                None => None,
            },
            None => None,
        };
        let found = match found {
            Some(found) => found,
            None => match self.embedded(written) {
                Some(found) => {
                    if let Some(node) = self.already(&found.identity, written, place) {
                        self.sources.pop();
                        return node;
                    }
                    found
                }
                None => {
                    let looked = match &path {
                        Some(path) => format!("looked for {} and among the built-in recipes", path.display()),
                        None => "a built-in recipe extends built-in recipes".to_owned(),
                    };
                    let parent = path.as_deref().and_then(Path::parent);
                    let near = nearest_recipes(written, &self.known_recipes(parent.unwrap_or(Path::new(""))));
                    let message = format!("there is no recipe {} to extend", quoted(written));
                    self.diagnostics.push(
                        Diagnostic::error(codes::UNKNOWN_BASE, message, place.clone())
                            .help(looked)
                            .allowing(near.iter().map(String::as_str), []),
                    );
                    return None;
                }
            },
        };
        if self.chain.len() >= MAX_CHAIN {
            let message = format!("more than {MAX_CHAIN} recipes extend one another");
            self.diagnostics.push(Diagnostic::error(codes::TOO_LARGE, message, place.clone()));
            return None;
        }
        let identity = found.identity.clone();
        let node = self.compose(found);
        self.done.insert(identity, node.clone());
        node
    }

    fn identify(&self, path: &Path) -> Option<Identity> {
        path.canonicalize().ok().map(Identity::File)
    }

    /// A base that was composed before, or that is being composed: the latter is a cycle.
    fn already(&mut self, identity: &Identity, written: &str, place: &Place) -> Option<Option<Node>> {
        if let Some(start) = self.chain.iter().position(|(open, _)| open == identity) {
            let mut names: Vec<&str> = self.chain[start..].iter().map(|(_, name)| name.as_str()).collect();
            names.push(names[0]);
            let message = format!("{} extends itself: {}", quoted(written), names.join(" -> "));
            self.diagnostics.push(
                Diagnostic::error(codes::EXTENDS_CYCLE, message, place.clone())
                    .help("move what the recipes share into a third one that both extend"),
            );
            return Some(None);
        }
        self.done.get(identity).cloned()
    }

    /// Adds to the newest diagnostic, which is about a base, where the base was asked for.
    fn blame_last(&mut self, place: &Place) {
        if let Some(last) = self.diagnostics.pop() {
            self.diagnostics.push(last.label(place.clone(), "extended here"));
        }
    }

    /// Deep merge: mappings key by key, everything else replaced by the upper value; a component
    /// whose `type` changes is replaced whole.
    fn merge(&mut self, base: Node, upper: Node, at: &Place) -> Node {
        if self.merged > MAX_MERGED {
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
            let member = match merged.get_mut(&name) {
                Some(slot) => {
                    let below = Node {
                        content: std::mem::replace(&mut slot.value.content, Content::Null),
                        origin: slot.value.origin.clone(),
                        typing: slot.value.typing,
                    };
                    Member { key: member.key, value: self.merge(below, member.value, at) }
                }
                None => member,
            };
            merged.insert(name, member);
        }
        Node { content: Content::Map(merged), origin: upper.origin, typing: Typing::Fixed }
    }

    fn put_variables(&mut self, node: &mut Node) {
        put_variables(node, self.request.env);
    }

    /// Applies one `--set`.
    fn apply_flag(&mut self, root: &mut Node, text: &str) {
        let source = self.add_source("--set", text, SourceKind::Flag);
        if text.len() > MAX_BYTES {
            let place = Place { source, span: 0..0 };
            self.diagnostics.push(Diagnostic::error(codes::TOO_LARGE, too_many_bytes(), place));
            return;
        }
        if let Err(diagnostics) = self.try_flag(root, &source) {
            self.diagnostics.extend(diagnostics);
        }
    }

    fn try_flag(&mut self, root: &mut Node, source: &Arc<Source>) -> Result<(), Vec<Diagnostic>> {
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
        self.put_variables(&mut value);
        set(root, &segments, value).map_err(|diagnostic| vec![*diagnostic])
    }
}

enum Read {
    Text(Found),
    Refused,
    Absent,
}

fn too_many_bytes() -> String {
    format!("is larger than {} KiB, the limit for a recipe", MAX_BYTES / 1024)
}

fn is_absent(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{InvalidInput, NotADirectory, NotFound};
    // A name with a NUL byte or past the length limit is no file either.
    matches!(error.kind(), NotFound | NotADirectory | InvalidInput)
        || error.kind() == std::io::ErrorKind::InvalidFilename
}

fn nearest_recipes(written: &str, known: &[String]) -> Vec<String> {
    let bare = Path::new(written).file_name().and_then(|name| name.to_str()).unwrap_or(written);
    let mut near = nearest(bare, known.iter().map(String::as_str));
    if near.is_empty() {
        let stem = bare.trim_end_matches(".yaml").trim_end_matches(".yml");
        near = nearest(stem, known.iter().map(String::as_str));
    }
    near.into_iter().map(str::to_owned).collect()
}

/// The path without `.` and with `a/..` folded, for display; symbolic links are left alone.
fn tidy(path: &Path) -> PathBuf {
    let mut tidy = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir if matches!(tidy.components().next_back(), Some(Component::Normal(_))) => {
                // `a/..` is the same folder only where `a` is no link; keep the name then.
                if tidy.is_symlink() {
                    tidy.push(component);
                } else {
                    tidy.pop();
                }
            }
            other => tidy.push(other),
        }
    }
    tidy
}

/// Whether both are components and name different ones.
fn changes_type(base: &Mapping, upper: &Mapping) -> bool {
    match (base.get("type"), upper.get("type")) {
        (Some(base), Some(upper)) => match (base.value.as_str(), upper.value.as_str()) {
            (Some(base), Some(upper)) => base != upper,
            _ => false,
        },
        _ => false,
    }
}

/// One segment of the path of a flag.
struct Segment {
    name: String,
    place: Place,
}

/// Splits `a.b."c.d"` from a byte offset up to `=` or the end; gives the offset where it stopped.
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
                Some(end) => (&rest[1..1 + end], end + 2),
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
    // `00` and `+0` would be read as 0: one item has one name.
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

/// What a segment of a path goes into.
enum Holder<'n> {
    Map(&'n mut Mapping),
    Item(&'n mut Vec<Node>, usize),
}

/// The collection that a node is; nothing becomes an empty mapping, another value is refused.
fn holder<'n>(node: &'n mut Node, segment: &Segment) -> Result<Holder<'n>, Box<Diagnostic>> {
    let Node { content, origin, .. } = node;
    if matches!(content, Content::Null) {
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

/// Adds an empty item where a segment names the one after the last of a list.
fn make_room(node: &mut Node, segment: &Segment) {
    if let Content::Seq(items) = &mut node.content
        && segment.name == items.len().to_string()
    {
        let origin = Origin::Flag(segment.place.clone());
        items.push(Node { content: Content::Null, origin, typing: Typing::Fixed });
    }
}

fn set(root: &mut Node, segments: &[Segment], value: Node) -> Result<(), Box<Diagnostic>> {
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
            let changes_type =
                last.name == "type" && map.get("type").is_some_and(|old| old.value.as_str() != value.as_str());
            if changes_type {
                // Another component: the old one's options go, those that flags set stay.
                map.retain(|key, member| key == "type" || keeps_flags(&mut member.value));
            }
            let key = Origin::Flag(last.place.clone());
            map.insert(last.name.clone(), Member { key, value });
        }
    }
    Ok(())
}

/// Leaves of a value what flags set; false where that is nothing.
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
            Holder::Map(map) => match map.get_index_of(&segment.name) {
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
            if map.shift_remove(&last.name).is_none() {
                return Err(Box::new(nothing_to_delete(map, last)));
            }
        }
    }
    Ok(())
}

fn nothing_to_delete(map: &Mapping, segment: &Segment) -> Diagnostic {
    const SHOWN: usize = 12;
    let message = format!("there is no {} to delete", quoted(&segment.name));
    Diagnostic::error(codes::BAD_OVERRIDE, message, segment.place.clone())
        .allowing(nearest(&segment.name, map.keys().map(String::as_str)), map.keys().take(SHOWN).map(String::as_str))
}

/// Puts the variables into every scalar below a node.
fn put_variables(node: &mut Node, env: &dyn Fn(&str) -> Option<String>) {
    match &mut node.content {
        Content::Seq(items) => items.iter_mut().for_each(|item| put_variables(item, env)),
        Content::Map(map) => map.values_mut().for_each(|member| put_variables(&mut member.value, env)),
        Content::Str(text) if text.contains('$') => {
            let Some(place) = node.origin.place().cloned() else {
                return;
            };
            match expand(text, &place, env) {
                Ok(expanded) => {
                    node.content = match (expanded.whole, node.typing) {
                        (true, Typing::Text) => resolve_plain(&expanded.text),
                        (true, Typing::Fixed) => {
                            node.typing = Typing::Option;
                            Content::Str(expanded.text)
                        }
                        _ => Content::Str(expanded.text),
                    };
                    if let Some(name) = expanded.variable {
                        node.origin = Origin::Variable { name, at: place };
                    }
                }
                Err((text, diagnostics)) => node.content = Content::Unset { text, diagnostics },
            }
        }
        _ => {}
    }
}

struct Expanded {
    text: String,
    /// The first variable that took part.
    variable: Option<String>,
    /// Whether the scalar is one variable and nothing else.
    whole: bool,
}

/// Puts in the variables of a scalar; the refusal comes with the text as far as it is known.
fn expand(
    text: &str,
    place: &Place,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<Expanded, (String, Vec<Diagnostic>)> {
    let mut out = String::with_capacity(text.len());
    let mut variable = None;
    let mut diagnostics = Vec::new();
    let mut rest = text;
    // Where to look for the next `${` in the source, so that equal variables get their own place.
    let mut searched = place.span.start;
    let mut pieces = 0;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        pieces += usize::from(at > 0);
        rest = &rest[at..];
        if let Some(after) = rest.strip_prefix("$$") {
            out.push('$');
            pieces += 1;
            rest = after;
            continue;
        }
        let Some(inner) = rest.strip_prefix("${") else {
            out.push('$');
            pieces += 1;
            rest = &rest[1..];
            continue;
        };
        pieces += 1;
        let (inner, after) = match inner.find('}') {
            Some(end) => (&inner[..end], &inner[end + 1..]),
            None => (inner, ""),
        };
        let closed = rest.len() > inner.len() + 2;
        let written = &rest[..inner.len() + 2 + usize::from(closed)];
        let spot = locate(place, &mut searched, written);
        rest = after;
        let (name, default) = match inner.split_once(":-") {
            Some((name, default)) => (name, Some(default)),
            None => (inner, None),
        };
        let is_name = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        if !closed || !is_name || default.is_some_and(|default| default.contains("${")) {
            let message = if !closed {
                "`${` without `}`".to_owned()
            } else if !is_name {
                format!("{} is not the name of a variable", quoted(name))
            } else {
                "a default cannot hold another variable".to_owned()
            };
            diagnostics.push(
                Diagnostic::error(codes::BAD_VARIABLE, message, spot)
                    .help("write ${NAME} or ${NAME:-default}; a literal dollar is `$$`"),
            );
            continue;
        }
        variable.get_or_insert_with(|| name.to_owned());
        match (env(name), default) {
            (Some(value), None) => out.push_str(&value),
            (Some(value), Some(_)) if !value.is_empty() => out.push_str(&value),
            (_, Some(default)) => out.push_str(default),
            (None, None) => {
                out.push_str(&format!("${name}"));
                diagnostics.push(
                    Diagnostic::error(codes::UNSET_VARIABLE, format!("the variable `{name}` is not set"), spot).help(
                        format!(
                            "set it in the environment, as in `{name}=... maskalign ...`, or give a default: ${{{name}:-default}}"
                        ),
                    ),
                );
            }
        }
    }
    pieces += usize::from(!rest.is_empty());
    out.push_str(rest);
    if diagnostics.is_empty() {
        Ok(Expanded { text: out, whole: variable.is_some() && pieces == 1, variable })
    } else {
        Err((out, diagnostics))
    }
}

/// The place of `${...}` in the source text of a scalar; the whole scalar where escapes hide it.
fn locate(scalar: &Place, searched: &mut usize, written: &str) -> Place {
    let found = scalar.source.text().get(*searched..scalar.span.end).and_then(|text| text.find(written));
    match found {
        Some(at) => {
            let start = *searched + at;
            *searched = start + written.len();
            Place { source: Arc::clone(&scalar.source), span: start..start + written.len() }
        }
        None => scalar.clone(),
    }
}
