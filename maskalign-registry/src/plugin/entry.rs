//! One registered component.

use std::{any::Any, fmt};

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::{Kind, Refusal, decode_options, sidecar::ReadSidecar};
use crate::yaml::parse_value;

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
    /// Where it is described, such as `arXiv 2211.08887, section 3.2`; empty if nowhere.
    pub paper: &'static str,
    /// The crate that registered it.
    pub package: &'static str,
    /// The schema of the options, `type` left out.
    pub schema: fn(&mut SchemaGenerator) -> Schema,
    /// Decodes options into the component's struct and serializes them again, which fills in defaults.
    pub normalize: fn(Value) -> Result<Value, Refusal>,
    /// Reads what stands beside the files that the options name, where that says something of options.
    pub sidecar: Option<ReadSidecar>,
    /// The typed constructors, whose type only the crate that defines the kind's trait knows.
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
            sidecar: None,
            vtable,
        }
    }

    /// Sets the one-line summary.
    #[must_use]
    pub const fn summary(mut self, summary: &'static str) -> Entry {
        self.summary = summary;
        self
    }

    /// Sets the example: YAML flow text of one component.
    #[must_use]
    pub const fn example(mut self, example: &'static str) -> Entry {
        self.example = example;
        self
    }

    /// Sets the paper or checkpoint family that the component follows.
    #[must_use]
    pub const fn paper(mut self, paper: &'static str) -> Entry {
        self.paper = paper;
        self
    }

    /// Sets the registering crate: pass `env!("CARGO_PKG_NAME")`.
    #[must_use]
    pub const fn package(mut self, package: &'static str) -> Entry {
        self.package = package;
        self
    }

    /// Sets what reads the documents beside the files that the options name.
    #[must_use]
    pub const fn sidecar(mut self, read: ReadSidecar) -> Entry {
        self.sidecar = Some(read);
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
        parse_value(self.example)
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
