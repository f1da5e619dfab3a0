//! A component's refusal of its own options.

use std::fmt;

/// A component that refuses its options: which one, why, and the way out.
///
/// The path is relative to the component until callers prefix it with [`Refusal::under`];
/// [`Loaded::locate`](crate::Loaded::locate) maps a path from the recipe's root to a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Keys and indices from the component down to the option at fault.
    pub path: Vec<String>,
    /// What is wrong: a lower-case fragment.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
}

impl Refusal {
    /// A refusal of one option.
    pub fn new(option: impl Into<String>, message: impl Into<String>) -> Refusal {
        Refusal { path: vec![option.into()], message: message.into(), help: None }
    }

    /// A refusal of the component as a whole.
    pub fn whole(message: impl Into<String>) -> Refusal {
        Refusal { path: Vec::new(), message: message.into(), help: None }
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Refusal {
        self.help = Some(help.into());
        self
    }

    /// Prefixes the path with the key that holds the component.
    #[must_use]
    pub fn under(mut self, segment: impl Into<String>) -> Refusal {
        self.path.insert(0, segment.into());
        self
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.path.is_empty() {
            write!(f, "`{}`: ", self.path.join("."))?;
        }
        f.write_str(&self.message)?;
        if let Some(help) = &self.help {
            write!(f, " ({help})")?;
        }
        Ok(())
    }
}

impl std::error::Error for Refusal {}
