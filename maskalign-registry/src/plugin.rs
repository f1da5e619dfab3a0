//! What a plugin is: a closed set of [`Kind`]s, an open set of [`Entry`]s.
//!
//! A crate registers a component with `inventory::submit!`; [`Registry::global`] collects what the
//! linker found. The registry knows names, options, schemas and examples, never a component's
//! trait: the typed constructors travel in [`Entry::vtable`] and belong to the crate that defines
//! the traits.

use std::{any::Any, collections::BTreeSet, fmt, sync::OnceLock};

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use crate::{
    diagnostic::Report,
    recipe,
    refusal::Refusal,
    schema::{self, Schemas},
    source,
};

/// The closed set of places in a recipe that a plugin can fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A step of a recipe, such as pre-training or an evaluation.
    Stage,
    /// A source of images.
    Dataset,
    /// A change made to one image on the host.
    Transform,
    /// A tower that gives targets and is not trained by gradients.
    Teacher,
    /// The tower being trained.
    Student,
    /// The choice of the patches that the student sees.
    Masker,
    /// What the student is to match.
    Target,
    /// The map from the student's outputs to the target's shape.
    Aligner,
    /// The distance between an aligned output and its target.
    Loss,
    /// The rule that updates parameters.
    Optimizer,
    /// The learning rate over time.
    Schedule,
}

impl Kind {
    /// Every kind, in the order in which lists show them.
    pub const ALL: [Kind; 11] = [
        Kind::Stage,
        Kind::Dataset,
        Kind::Transform,
        Kind::Teacher,
        Kind::Student,
        Kind::Masker,
        Kind::Target,
        Kind::Aligner,
        Kind::Loss,
        Kind::Optimizer,
        Kind::Schedule,
    ];

    /// The kind's name in addresses such as `masker.attention`.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Stage => "stage",
            Kind::Dataset => "dataset",
            Kind::Transform => "transform",
            Kind::Teacher => "teacher",
            Kind::Student => "student",
            Kind::Masker => "masker",
            Kind::Target => "target",
            Kind::Aligner => "aligner",
            Kind::Loss => "loss",
            Kind::Optimizer => "optimizer",
            Kind::Schedule => "schedule",
        }
    }

    /// The plural of [`Kind::name`], for headings and folder names.
    pub const fn plural(self) -> &'static str {
        match self {
            Kind::Stage => "stages",
            Kind::Dataset => "datasets",
            Kind::Transform => "transforms",
            Kind::Teacher => "teachers",
            Kind::Student => "students",
            Kind::Masker => "maskers",
            Kind::Target => "targets",
            Kind::Aligner => "aligners",
            Kind::Loss => "losses",
            Kind::Optimizer => "optimizers",
            Kind::Schedule => "schedules",
        }
    }

    /// One sentence that says what components of this kind do.
    pub const fn description(self) -> &'static str {
        match self {
            Kind::Stage => "A step of the recipe: trains or evaluates.",
            Kind::Dataset => "Where the images come from; yields RGB in [0, 1].",
            Kind::Transform => "A change made to one image before it becomes a tensor.",
            Kind::Teacher => "A tower that sees the whole image and is not trained by gradients.",
            Kind::Student => "The tower that is trained.",
            Kind::Masker => "Chooses the patches that the student sees.",
            Kind::Target => "What the student is to match.",
            Kind::Aligner => "Maps the student's outputs to the shape of the target.",
            Kind::Loss => "The distance between an aligned output and its target.",
            Kind::Optimizer => "The rule that updates the parameters.",
            Kind::Schedule => "The learning rate over time.",
        }
    }

    /// The kind of that name, if there is one.
    pub fn from_name(name: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One registered component. Submitted with `inventory::submit!`, built with [`Entry::of`].
pub struct Entry {
    /// The place that the component can fill.
    pub kind: Kind,
    /// The value of `type` that selects it.
    pub name: &'static str,
    /// What it does, in one lower-case line.
    pub summary: &'static str,
    /// YAML flow text of one component, `type` included.
    pub example: &'static str,
    /// Where it is described, such as `arXiv 2211.08887, section 3.2`; empty where nowhere.
    pub paper: &'static str,
    /// The crate that registered it.
    pub package: &'static str,
    /// The schema of the options, `type` left out.
    pub schema: fn(&mut SchemaGenerator) -> Schema,
    /// Decodes options into the component's struct and writes them back, which fills defaults.
    pub normalize: fn(Value) -> Result<Value, Refusal>,
    /// The typed constructors; their type is known to the crate that defines the kind's trait.
    pub vtable: &'static (dyn Any + Send + Sync),
}

impl Entry {
    /// An entry whose options are the struct `T`, with no summary, example, paper or package yet.
    pub const fn of<T>(kind: Kind, name: &'static str, vtable: &'static (dyn Any + Send + Sync)) -> Entry
    where
        T: JsonSchema + Serialize + DeserializeOwned,
    {
        Entry {
            kind,
            name,
            summary: "",
            example: "",
            paper: "",
            package: "",
            schema: schema_of::<T>,
            normalize: normalize_as::<T>,
            vtable,
        }
    }

    /// Sets the one-line summary.
    pub const fn summary(mut self, summary: &'static str) -> Entry {
        self.summary = summary;
        self
    }

    /// Sets the example: YAML flow text of one component.
    pub const fn example(mut self, example: &'static str) -> Entry {
        self.example = example;
        self
    }

    /// Sets the paper or checkpoint family that the component follows.
    pub const fn paper(mut self, paper: &'static str) -> Entry {
        self.paper = paper;
        self
    }

    /// Sets the registering crate: pass `env!("CARGO_PKG_NAME")`.
    pub const fn package(mut self, package: &'static str) -> Entry {
        self.package = package;
        self
    }

    /// The address used by `explain` and in messages, such as `masker.attention`.
    pub fn address(&self) -> String {
        format!("{}.{}", self.kind, self.name)
    }

    /// The example, parsed by the recipe parser.
    ///
    /// # Errors
    /// What is wrong with the example's YAML.
    pub fn example_value(&self) -> Result<Value, String> {
        source::parse_value(self.example)
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("kind", &self.kind)
            .field("name", &self.name)
            .field("package", &self.package)
            .finish_non_exhaustive()
    }
}

inventory::collect!(Entry);

fn schema_of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    T::json_schema(generator)
}

fn normalize_as<T: Serialize + DeserializeOwned>(options: Value) -> Result<Value, Refusal> {
    let options: T = decode_options(options)?;
    serde_json::to_value(&options).map_err(|error| Refusal::whole(error.to_string()))
}

/// Decodes a component's options into its struct; the refusal names the option at fault.
///
/// # Errors
/// A [`Refusal`] whose path is where decoding stopped.
pub fn decode_options<T: DeserializeOwned>(options: Value) -> Result<T, Refusal> {
    serde_path_to_error::deserialize(options).map_err(|error| {
        let path = error
            .path()
            .iter()
            .filter_map(|segment| match segment {
                serde_path_to_error::Segment::Seq { index } => Some(index.to_string()),
                serde_path_to_error::Segment::Map { key } => Some(key.clone()),
                serde_path_to_error::Segment::Enum { variant } => Some(variant.clone()),
                serde_path_to_error::Segment::Unknown => None,
            })
            .collect();
        Refusal { path, ..Refusal::whole(error.inner().to_string()) }
    })
}

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

    /// The names of a kind that are close to `name`, nearest first; empty where none is close.
    pub fn suggest(&self, kind: Kind, name: &str) -> Vec<&'static str> {
        nearest(name, self.of_kind(kind).map(|entry| entry.name))
    }

    /// The component at an address such as `masker.attention`, or at a name that only one kind has.
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
        self.schemas.get_or_init(|| Schemas::build(self))
    }

    /// The options of a component as a person reads them, in the order of its struct.
    pub fn options(&self, entry: &Entry) -> Vec<OptionDoc> {
        schema::option_docs(self.schemas(), entry)
    }
}

impl Registry {
    /// One component written as YAML, checked and with every default filled in.
    ///
    /// # Errors
    /// Every mistake in it; `name` stands for the file in their places.
    pub fn component(&self, kind: Kind, name: &str, text: &str) -> Result<Value, Report> {
        recipe::component(self, kind, name, text)
    }

    /// What is wrong with how a component is registered, one sentence each: its name, summary,
    /// example, and the descriptions and patterns of its options. Empty for a sound component.
    pub fn faults(&self, entry: &Entry) -> Vec<String> {
        let address = entry.address();
        let mut faults = Vec::new();
        let is_snake = entry.name.starts_with(|c: char| c.is_ascii_lowercase())
            && entry.name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
        if !is_snake {
            faults.push(format!("{address}: the name is not snake_case"));
        }
        if entry.summary.is_empty() {
            faults.push(format!("{address}: there is no summary"));
        }
        if entry.package.is_empty() {
            faults.push(format!("{address}: the registering crate is not named"));
        }
        for option in self.options(entry) {
            if option.name == "type" {
                faults.push(format!("{address}: an option cannot be called `type`"));
            }
            if option.description.is_empty() {
                faults.push(format!("{address}: `{}` has no description", option.name));
            }
        }
        for pattern in self.schemas().unread_patterns(entry) {
            faults.push(format!("{address}: the pattern `{pattern}` cannot be read"));
        }
        match entry.example_value() {
            Ok(example) if example.get("type") != Some(&Value::from(entry.name)) => {
                faults.push(format!("{address}: the example is not of this type"));
            }
            Ok(_) => {
                if let Err(report) = self.component(entry.kind, &address, entry.example) {
                    faults.push(format!("{address}: the example is refused\n{report}"));
                }
            }
            Err(error) => faults.push(format!("{address}: the example is not YAML: {error}")),
        }
        faults
    }
}

/// One option of a component, for `explain` and for the reference.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OptionDoc {
    /// The key in the recipe.
    pub name: String,
    /// What may be written, in words: `a number of at least 0`.
    pub expected: String,
    /// Whether it must be given.
    pub required: bool,
    /// What holds when it is absent.
    pub default: Option<Value>,
    /// The doc comment of the field.
    pub description: String,
    /// The kind of component that fills it, where it is a slot.
    pub kind: Option<&'static str>,
}

/// The candidates close enough to `name` to be meant by it, nearest first, at most three.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let written = name.to_lowercase();
    let length = written.chars().count();
    let mut scored: Vec<(usize, &str)> = Vec::new();
    for candidate in candidates {
        let distance = strsim::osa_distance(&written, &candidate.to_lowercase());
        let longest = length.max(candidate.chars().count());
        let contains = length >= 3
            && candidate.len() >= 3
            && (candidate.contains(written.as_str()) || written.contains(candidate));
        if distance * 3 <= longest.max(3) {
            scored.push((distance * 2, candidate));
        } else if contains || is_short_for(&written, candidate) {
            scored.push((longest + distance, candidate));
        }
    }
    scored.sort();
    scored.dedup();
    scored.into_iter().take(3).map(|(_, candidate)| candidate).collect()
}

/// How many letters two names differ by; capitals are no difference.
pub(crate) fn distance(a: &str, b: &str) -> usize {
    strsim::osa_distance(&a.to_lowercase(), &b.to_lowercase())
}

/// Whether a name is short for another, or the same words in another order: `lr` for `base_lr`.
fn is_short_for(written: &str, candidate: &str) -> bool {
    let split = |name: &str| -> BTreeSet<String> { name.split(['_', '-', ' ']).map(str::to_owned).collect() };
    split(written).is_subset(&split(candidate))
}

/// Ties a zero-sized type to a [`Kind`], so that `Slot<MaskerTag>` says what it holds.
pub trait KindTag: 'static {
    /// The kind that the tag stands for.
    const KIND: Kind;
}

macro_rules! tags {
    ($($tag:ident => $kind:ident),* $(,)?) => {$(
        #[doc = concat!("Stands for [`Kind::", stringify!($kind), "`] in a [`Slot`](crate::Slot).")]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $tag;
        impl KindTag for $tag {
            const KIND: Kind = Kind::$kind;
        }
    )*};
}

tags! {
    StageTag => Stage,
    DatasetTag => Dataset,
    TransformTag => Transform,
    TeacherTag => Teacher,
    StudentTag => Student,
    MaskerTag => Masker,
    TargetTag => Target,
    AlignerTag => Aligner,
    LossTag => Loss,
    OptimizerTag => Optimizer,
    ScheduleTag => Schedule,
}

/// The options of a component as a map; `type` is not among them.
pub type Options = Map<String, Value>;
