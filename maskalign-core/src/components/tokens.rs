//! Which tokens an objective compares, and where they are among a tower's rows.

use maskalign_engine::Result;
use maskalign_registry::Refusal;

use crate::{component, components::maskers::Mask, nn::SeenPatches};

/// A group of tokens.
///
/// ```
/// # use maskalign_core::prelude::*;
/// let tokens = Tokens::from_list(&[TokenKind::Masked, TokenKind::Cls])?;
/// assert_eq!(tokens, Tokens { cls: true, visible: false, masked: true });
/// # Ok::<(), Error>(())
/// ```
#[component]
#[derive(Copy, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "snake_case")]
pub enum TokenKind {
    /// The class token.
    Cls,
    /// The patches that the student sees, in the masker's order.
    Visible,
    /// The patches that the masker asks to be predicted.
    Masked,
}

/// The tokens an objective compares, always in the order class token, visible, masked.
///
/// ```
/// # use maskalign_core::prelude::*;
/// let tokens = Tokens { visible: true, ..Tokens::default() }.union(Tokens { cls: true, ..Tokens::default() });
/// assert_eq!(tokens.count(49, 147), 50);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tokens {
    /// The class token.
    pub cls: bool,
    /// The visible patches.
    pub visible: bool,
    /// The predicted patches.
    pub masked: bool,
}

impl Tokens {
    /// From a recipe's list.
    ///
    /// # Errors
    /// The list is empty or names a group twice.
    pub fn from_list(list: &[TokenKind]) -> Result<Self, Refusal> {
        let mut tokens = Tokens::default();
        if list.is_empty() {
            return Err(Refusal::new("tokens", "expected at least one of cls, visible, masked"));
        }
        for (i, kind) in list.iter().enumerate() {
            let seen = match kind {
                TokenKind::Cls => &mut tokens.cls,
                TokenKind::Visible => &mut tokens.visible,
                TokenKind::Masked => &mut tokens.masked,
            };
            if std::mem::replace(seen, true) {
                return Err(Refusal::new(i.to_string(), "named twice").under("tokens"));
            }
        }
        Ok(tokens)
    }

    /// The tokens of either.
    #[must_use]
    pub fn union(self, other: Tokens) -> Tokens {
        Tokens {
            cls: self.cls || other.cls,
            visible: self.visible || other.visible,
            masked: self.masked || other.masked,
        }
    }

    /// Tokens of an image, given how many patches are visible and predicted.
    pub fn count(self, visible: usize, masked: usize) -> usize {
        usize::from(self.cls) + if self.visible { visible } else { 0 } + if self.masked { masked } else { 0 }
    }
}

/// The masks of a batch: equally many visible and equally many predicted patches in each image.
///
/// ```
/// # use maskalign_core::prelude::*;
/// let masks = Masks::join(&[
///     Mask { visible: vec![3], masked: vec![0, 1] },
///     Mask { visible: vec![2], masked: vec![1, 3] },
/// ]);
/// assert_eq!((masks.visible_each(), masks.masked_of(1)), (1, &[1, 3][..]));
/// assert_eq!(masks.rows(Tokens { masked: true, ..Tokens::default() }, false), [0, 1, 1, 3]);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Masks {
    /// Images.
    pub batch: usize,
    /// Patch indices that the student sees, in that order: `[batch * visible()]`.
    pub visible: Vec<u32>,
    /// Patch indices to predict: `[batch * masked()]`.
    pub masked: Vec<u32>,
}

impl Masks {
    /// Joins the masks of single images.
    pub fn join(masks: &[Mask]) -> Self {
        Masks {
            batch: masks.len(),
            visible: masks.iter().flat_map(|m| m.visible.iter().copied()).collect(),
            masked: masks.iter().flat_map(|m| m.masked.iter().copied()).collect(),
        }
    }

    /// Every patch visible, none predicted.
    pub fn all_visible(batch: usize, patches: usize) -> Self {
        Masks { batch, visible: (0..batch).flat_map(|_| 0..patches as u32).collect(), masked: Vec::new() }
    }

    /// What a tower sees of them.
    pub fn seen(&self) -> SeenPatches<'_> {
        SeenPatches { visible: &self.visible, masked: &self.masked }
    }

    /// Visible patches of an image.
    pub fn visible_each(&self) -> usize {
        self.visible.len() / self.batch
    }

    /// Predicted patches of an image.
    pub fn masked_each(&self) -> usize {
        self.masked.len() / self.batch
    }

    /// Visible patches of one image.
    pub fn visible_of(&self, image: usize) -> &[u32] {
        let each = self.visible_each();
        &self.visible[image * each..][..each]
    }

    /// Predicted patches of one image.
    pub fn masked_of(&self, image: usize) -> &[u32] {
        let each = self.masked_each();
        &self.masked[image * each..][..each]
    }

    /// For each image, the token indices of `tokens` in a tower that sees every patch, its class token (if any) first.
    pub fn rows(&self, tokens: Tokens, class_token: bool) -> Vec<u32> {
        let shift = u32::from(class_token);
        let mut rows = Vec::new();
        for image in 0..self.batch {
            rows.extend(tokens.cls.then_some(0));
            if tokens.visible {
                rows.extend(self.visible_of(image).iter().map(|i| i + shift));
            }
            if tokens.masked {
                rows.extend(self.masked_of(image).iter().map(|i| i + shift));
            }
        }
        rows
    }

    /// Where the rows of `wanted` are among rows laid out as `held` (a superset), over the whole batch; `None` where
    /// they are the same.
    pub fn within(&self, wanted: Tokens, held: Tokens) -> Option<Vec<u32>> {
        if wanted == held {
            return None;
        }
        let (visible, masked) = (self.visible_each(), self.masked_each());
        let width = held.count(visible, masked);
        let after_cls = usize::from(held.cls);
        let after_visible = after_cls + if held.visible { visible } else { 0 };
        let mut rows = Vec::new();
        for image in 0..self.batch {
            let start = image * width;
            rows.extend(wanted.cls.then_some(start as u32));
            if wanted.visible {
                rows.extend((start + after_cls..start + after_cls + visible).map(|i| i as u32));
            }
            if wanted.masked {
                rows.extend((start + after_visible..start + after_visible + masked).map(|i| i as u32));
            }
        }
        Some(rows)
    }
}
