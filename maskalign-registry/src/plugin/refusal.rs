//! A component's refusal of its own options.

use std::fmt;

use super::Kind;
use crate::wording::{visible, visible_lines};

/// A component's refusal of its options: which one, why, and what to do.
///
/// The path is relative to the component until callers prefix it with [`Refusal::under`];
/// [`Loaded::locate`](crate::Loaded::locate) maps a path from the recipe's root to a place.
///
/// ```
/// use maskalign_registry::Refusal;
///
/// let refusal = Refusal::new("cell", "a square of 9 patches in a grid of 7x7").help("lower `cell`");
/// assert_eq!(refusal.clone().under("masker").path, ["masker", "cell"]);
/// assert!(Refusal::whole("the student has no class token").path.is_empty());
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Keys and indices from the component down to the option at fault.
    pub path: Vec<String>,
    /// What is wrong: a lower-case fragment.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
    /// Other options that are part of the reason.
    pub related: Vec<Related>,
    // Boxed, since results that hold a refusal should stay small.
    code: Box<Code>,
}

/// What a refusal is, for programs: messages are for people, and may change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Code {
    /// An option is invalid, by itself or together with others.
    #[default]
    Invalid,
    /// An option refers by name to another part of the recipe, and there is none of that name, or none that can be
    /// used.
    Unresolved {
        /// What it refers to: a stage, or a teacher.
        kind: Kind,
        /// The name.
        name: String,
    },
    /// What is needed is in a file, and files are not looked at.
    Unread,
}

/// An option that conflicts with the refused one. Whichever of them was set last is blamed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Related {
    /// Keys and indices, starting where `base` says.
    pub path: Vec<String>,
    /// How it is part of the reason: a lower-case fragment.
    pub note: String,
    pub(crate) base: Base,
}

/// Where the path of a [`Related`] begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Base {
    /// Where the refusal's own path begins.
    Own,
    /// At the mapping that holds the component.
    Holder,
    /// At the stage.
    Stage,
}

impl Refusal {
    /// A refusal of one option.
    pub fn new(option: impl Into<String>, message: impl Into<String>) -> Refusal {
        Refusal { path: vec![option.into()], ..Refusal::whole(message) }
    }

    /// A refusal of the component as a whole.
    pub fn whole(message: impl Into<String>) -> Refusal {
        Refusal { path: Vec::new(), message: message.into(), help: None, related: Vec::new(), code: Box::default() }
    }

    /// Marks it as a reference that does not resolve: to something of a kind, by name.
    #[must_use]
    pub fn unresolved(mut self, kind: Kind, name: impl Into<String>) -> Refusal {
        *self.code = Code::Unresolved { kind, name: name.into() };
        self
    }

    /// Marks it as something that a file would tell, where files are not looked at.
    #[must_use]
    pub fn unread(mut self) -> Refusal {
        *self.code = Code::Unread;
        self
    }

    /// The code, for programs.
    pub fn code(&self) -> &Code {
        &self.code
    }

    /// Whether it only follows from another refusal: it refers to something of this kind that was itself refused.
    pub fn follows_from(&self, kind: Kind, was_refused: impl FnOnce(&str) -> bool) -> bool {
        match &*self.code {
            Code::Unresolved { kind: named, name } => *named == kind && was_refused(name),
            Code::Invalid | Code::Unread => false,
        }
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Refusal {
        self.help = Some(help.into());
        self
    }

    /// Adds another option of the component that is part of the reason. It is shown only if it is set.
    #[must_use]
    pub fn related<'s>(self, path: impl IntoIterator<Item = &'s str>, note: impl Into<String>) -> Refusal {
        self.relate(path, note.into(), Base::Own)
    }

    /// As [`Refusal::related`], for an option beside the component, in the mapping that holds it.
    #[must_use]
    pub fn beside<'s>(self, path: impl IntoIterator<Item = &'s str>, note: impl Into<String>) -> Refusal {
        self.relate(path, note.into(), Base::Holder)
    }

    /// As [`Refusal::related`], for an option of the stage that the component is in, at any depth.
    #[must_use]
    pub fn in_stage<'s>(self, path: impl IntoIterator<Item = &'s str>, note: impl Into<String>) -> Refusal {
        self.relate(path, note.into(), Base::Stage)
    }

    fn relate<'s>(mut self, path: impl IntoIterator<Item = &'s str>, note: String, base: Base) -> Refusal {
        let path = path.into_iter().map(str::to_owned).collect();
        self.related.push(Related { path, note, base });
        self
    }

    /// Prefixes the path with the key that holds the component.
    #[must_use]
    pub fn under(mut self, segment: impl Into<String>) -> Refusal {
        let segment = segment.into();
        for related in &mut self.related {
            match related.base {
                Base::Own => related.path.insert(0, segment.clone()),
                Base::Holder => related.base = Base::Own,
                Base::Stage => {}
            }
        }
        self.path.insert(0, segment);
        self
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.path.is_empty() {
            write!(f, "`{}`: ", visible(&self.path.join(".")))?;
        }
        f.write_str(&visible_lines(&self.message))?;
        if let Some(help) = &self.help {
            write!(f, " ({})", visible_lines(help))?;
        }
        Ok(())
    }
}

impl std::error::Error for Refusal {}
