//! A recipe and the recipes that it extends, read and merged.

use std::{
    collections::HashMap,
    fs,
    io::Read as _,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use super::{
    Input, LoadRequest,
    flags::apply_flag,
    merge::Merger,
    removals::{REPLACE, Removal, Vain},
    variables::substitute_variables,
};
use crate::{
    diagnostic::{Diagnostic, Place, Source, SourceKind, codes},
    wording::{nearest, quoted},
    yaml::{Content, MAX_BYTES, Node, parse},
};

/// The longest chain of `extends`.
const MAX_CHAIN: usize = 32;

/// The outcome of composition.
pub(crate) struct Composed {
    pub root: Option<Node>,
    /// Every text that was read, in the order in which reports list them.
    pub sources: Vec<Arc<Source>>,
    pub diagnostics: Vec<Diagnostic>,
    /// Whether a base could not be read, so that keys may be missing that it would have given.
    pub incomplete: bool,
    /// What was not taken over.
    pub removals: Vec<Removal>,
    /// Every `null` that met nothing.
    pub vain: Vec<Vain>,
}

pub(crate) fn compose(request: &LoadRequest<'_>) -> Composed {
    let mut composer = Composer {
        request,
        sources: Vec::new(),
        diagnostics: Vec::new(),
        done: HashMap::new(),
        chain: Vec::new(),
        merger: Merger::default(),
        incomplete: false,
    };
    let mut root = composer.root();
    let mut removals = Vec::new();
    if let Some(root) = &mut root {
        for text in request.sets {
            composer.apply_flag(root, text);
        }
        removals = composer.merger.prune(root, composer.incomplete);
    }
    let Composer { sources, mut diagnostics, incomplete, merger, .. } = composer;
    diagnostics.extend(merger.diagnostics);
    let vain = merger.vain;
    Composed { root, sources, diagnostics, incomplete, removals, vain }
}

/// The identity of a recipe, however it was named.
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
    /// Recipes already composed, so that a base named many times is read once.
    done: HashMap<Identity, Option<Node>>,
    chain: Vec<(Identity, String)>,
    merger: Merger,
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
                let extension = Path::new(&name).extension()?;
                (extension == "yaml" || extension == "yml").then_some(name)
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
        substitute_variables(&mut root, self.request.env);
        let Content::Map(map) = &mut root.content else {
            return Some(root);
        };
        let Some(extends) = map.shift_remove("extends") else {
            return Some(root);
        };
        if let Some(place) = map.shift_remove(REPLACE).and_then(|marker| marker.key.place().cloned()) {
            let message = format!("`{REPLACE}` at the top of a recipe would leave nothing of what it extends");
            self.diagnostics.push(
                Diagnostic::error(codes::UNKNOWN_KEY, message, place)
                    .help("leave `extends` out, or write it into the mapping that is to start anew"),
            );
        }
        let name = found.source.name().to_owned();
        self.chain.push((found.identity.clone(), name));
        let mut base: Option<Node> = None;
        for (written, place) in self.base_names(&extends.value) {
            match self.base(&written, &place, found.folder.as_deref()) {
                Some(next) => {
                    base = Some(match base {
                        Some(base) => self.merger.merge_roots(base, next, &place),
                        None => next,
                    });
                }
                None => self.incomplete = true,
            }
        }
        self.chain.pop();
        let place = extends.key.place().cloned();
        Some(match (base, place) {
            (Some(base), Some(place)) => self.merger.merge_roots(base, root, &place),
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

    #[expect(clippy::unused_self, reason = "a question to the composition, asked like the others")]
    fn identify(&self, path: &Path) -> Option<Identity> {
        path.canonicalize().ok().map(Identity::File)
    }

    /// A base that was composed before, or one that is still being composed, which is a cycle.
    #[expect(clippy::option_option, reason = "known or not; and if known, a base or a cycle that was told")]
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

    /// Adds to the newest diagnostic, which is about a base, the place that extends it.
    fn blame_last(&mut self, place: &Place) {
        if let Some(last) = self.diagnostics.pop() {
            self.diagnostics.push(last.label(place.clone(), "extended here"));
        }
    }

    /// Applies one `--set`.
    fn apply_flag(&mut self, root: &mut Node, text: &str) {
        let source = self.add_source("--set", text, SourceKind::Flag);
        if text.len() > MAX_BYTES {
            let place = Place { source, span: 0..0 };
            self.diagnostics.push(Diagnostic::error(codes::TOO_LARGE, too_many_bytes(), place));
            return;
        }
        if let Err(diagnostics) = apply_flag(root, &source, self.request.env, &mut self.merger.vain) {
            self.diagnostics.extend(diagnostics);
        }
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
    // Nor can a name with a NUL byte, or one that is too long, be a file.
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

/// The path without `.` and `a/..`, for display, except through symbolic links.
fn tidy(path: &Path) -> PathBuf {
    let mut tidy = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir if matches!(tidy.components().next_back(), Some(Component::Normal(_))) => {
                // `a/..` is the same folder only if `a` is not a link.
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
