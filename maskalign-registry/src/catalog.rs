//! The registered components of a binary, by kind and name.

use std::sync::OnceLock;

use crate::{
    plugin::{Entry, Kind},
    schema::{self, OptionDoc, Schemas},
    wording::nearest,
};

/// Two crates registered one name for one kind.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the {kind} `{name}` is registered twice, by the crates `{first}` and `{second}`: \
     rename one, or depend on only one of them"
)]
pub struct DuplicatePlugin {
    /// The kind of both.
    pub kind: Kind,
    /// The name of both.
    pub name: &'static str,
    /// The crate whose name sorts first.
    pub first: &'static str,
    /// The other crate.
    pub second: &'static str,
}

/// The components of this binary, sorted by kind and name.
#[derive(Debug)]
pub struct Registry {
    entries: Vec<&'static Entry>,
    schemas: OnceLock<Schemas>,
}

impl Registry {
    /// The registry of everything linked into this binary.
    ///
    /// # Errors
    /// Two components of one kind share a name.
    pub fn global() -> Result<&'static Registry, DuplicatePlugin> {
        static GLOBAL: OnceLock<Result<Registry, DuplicatePlugin>> = OnceLock::new();
        GLOBAL.get_or_init(|| Registry::from_entries(inventory::iter::<Entry>)).as_ref().map_err(Clone::clone)
    }

    /// A registry of the given entries alone.
    ///
    /// # Errors
    /// Two components of one kind share a name.
    pub fn from_entries(entries: impl IntoIterator<Item = &'static Entry>) -> Result<Registry, DuplicatePlugin> {
        let mut entries: Vec<&'static Entry> = entries.into_iter().collect();
        entries.sort_by_key(|entry| (entry.kind, entry.name, entry.package));
        for pair in entries.windows(2) {
            if let [first, second] = pair
                && (first.kind, first.name) == (second.kind, second.name)
            {
                return Err(DuplicatePlugin {
                    kind: first.kind,
                    name: first.name,
                    first: first.package,
                    second: second.package,
                });
            }
        }
        Ok(Registry { entries, schemas: OnceLock::new() })
    }

    /// Every entry, sorted by kind and name.
    pub fn entries(&self) -> impl Iterator<Item = &'static Entry> + '_ {
        self.entries.iter().copied()
    }

    /// The component of that kind and name.
    pub fn get(&self, kind: Kind, name: &str) -> Option<&'static Entry> {
        let position = self.entries.binary_search_by(|entry| (entry.kind, entry.name).cmp(&(kind, name)));
        position.ok().map(|position| self.entries[position])
    }

    /// The components of a kind, sorted by name.
    pub fn of_kind(&self, kind: Kind) -> impl Iterator<Item = &'static Entry> + '_ {
        self.entries().filter(move |entry| entry.kind == kind)
    }

    /// The names of a kind that are close to `name`, nearest first; empty if none is close.
    pub fn suggest(&self, kind: Kind, name: &str) -> Vec<&'static str> {
        nearest(name, self.of_kind(kind).map(|entry| entry.name))
    }

    /// The component at an address such as `masker.attention`, or with a name that only one kind has.
    ///
    /// # Errors
    /// The nearest addresses, nearest first.
    pub fn find(&self, address: &str) -> Result<&'static Entry, Vec<String>> {
        if let Some((kind, name)) = address.split_once('.')
            && let Some(kind) = Kind::from_name(kind)
            && let Some(entry) = self.get(kind, name)
        {
            return Ok(entry);
        }
        let mut bare = self.entries().filter(|entry| entry.name == address);
        match (bare.next(), bare.next()) {
            (Some(entry), None) => Ok(entry),
            (Some(first), Some(second)) => Err([first, second].into_iter().chain(bare).map(Entry::address).collect()),
            (None, _) => {
                let addresses: Vec<String> = self.entries().map(Entry::address).collect();
                let mut close = nearest(address, addresses.iter().map(String::as_str));
                if close.is_empty() {
                    let name = address.rsplit('.').next().unwrap_or(address);
                    let names = nearest(name, self.entries().map(|entry| entry.name));
                    close = addresses
                        .iter()
                        .map(String::as_str)
                        .filter(|a| names.iter().any(|n| a.split_once('.').is_some_and(|(_, b)| b == *n)))
                        .collect();
                }
                Err(close.into_iter().map(str::to_owned).collect())
            }
        }
    }

    /// The strict schemas of every component.
    pub fn schemas(&self) -> &Schemas {
        self.schemas.get_or_init(|| Schemas::build(&self.entries))
    }

    /// The options of a component as people read them, in the order of its struct.
    pub fn options(&self, entry: &Entry) -> Vec<OptionDoc> {
        schema::option_docs(self.schemas(), entry)
    }
}

/// One JSON Schema (draft-07) of every recipe that this binary reads, for editors.
pub fn recipe_schema(registry: &Registry) -> serde_json::Value {
    schema::document(registry.schemas(), &registry.entries)
}
