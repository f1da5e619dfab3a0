//! What documents beside a component's files say of its options, such as the `config.json` of weights.

use serde_json::Value;

use super::Refusal;

/// Looks for the documents beside the files that a component's options name. It is given the options that are written,
/// without `type`. Files that are not there are no fault: planning refuses them.
pub type ReadSidecar = fn(&Value) -> Result<Sidecar, Refusal>;

/// What documents beside a component's files say of its options.
///
/// ```
/// use maskalign_registry::plugin::sidecar::{Document, Sidecar, Statement, Verdict};
///
/// // The first document says `patch_size: 16`, and the recipe says nothing of `patch`.
/// let sidecar = Sidecar {
///     documents: vec![Document { name: "config.json".into(), text: r#"{"patch_size": 16}"#.into() }],
///     statements: vec![Statement {
///         option: vec!["patch".into()],
///         document: 0,
///         at: vec!["patch_size".into()],
///         verdict: Verdict::Fills(16.into()),
///     }],
/// };
/// assert_eq!(sidecar.documents.len(), 1);
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sidecar {
    /// The documents, JSON or YAML.
    pub documents: Vec<Document>,
    /// What they say. An option that the recipe leaves open takes what is said of it.
    pub statements: Vec<Statement>,
}

/// A document, as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// The name that messages show: its path.
    pub name: String,
    /// The whole text.
    pub text: String,
}

/// What a document says of one option.
#[derive(Clone, Debug, PartialEq)]
pub struct Statement {
    /// Keys from the component down to the option.
    pub option: Vec<String>,
    /// Where it is said: the index of the document, and the keys and indices in it.
    pub document: usize,
    /// See `document`.
    pub at: Vec<String>,
    /// What follows from it.
    pub verdict: Verdict,
}

/// What follows from a statement.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// The recipe leaves the option open, and it takes this value.
    Fills(Value),
    /// What the recipe says of the option, or what the component is, contradicts it: what is wrong, what the document
    /// says, and what to do.
    Contradicts {
        /// A lower-case fragment.
        message: String,
        /// The note at the document's place.
        said: String,
        /// The way out.
        help: String,
    },
}
