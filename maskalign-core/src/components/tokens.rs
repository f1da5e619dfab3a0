//! Which tokens an objective compares, and where they are among a tower's rows.

use maskalign_engine::Result;
use maskalign_registry::Refusal;

use crate::{
    component,
    components::maskers::{Counts, Mask},
    nn::SeenPatches,
};

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

/// The masks of a batch.
///
/// ```
/// # use maskalign_core::prelude::*;
/// let masks = Masks::join(&[
///     Mask { visible: vec![3], masked: vec![0, 1] },
///     Mask { visible: vec![2], masked: vec![1, 3] },
/// ]);
/// assert_eq!((masks.counts_of(0), masks.masked_of(1)), (Counts { visible: 1, masked: 2 }, &[1, 3][..]));
/// assert_eq!(masks.rows(Tokens { masked: true, ..Tokens::default() }, false), [0, 1, 1, 3]);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Masks {
    /// Images.
    pub batch: usize,
    /// Patch indices that the student sees, image after image, in that order.
    pub visible: Vec<u32>,
    /// Patch indices to predict, likewise.
    pub masked: Vec<u32>,
    /// How many of both each image has, where they are not equally many in each.
    pub uneven: Option<Vec<Counts>>,
}

impl Masks {
    /// Masks with equally many patches of each image: `[batch * visible]` and `[batch * masked]`.
    pub fn even(batch: usize, visible: Vec<u32>, masked: Vec<u32>) -> Self {
        Masks { batch, visible, masked, uneven: None }
    }

    /// Joins the masks of single images.
    pub fn join(masks: &[Mask]) -> Self {
        let counts = |mask: &Mask| Counts { visible: mask.visible.len(), masked: mask.masked.len() };
        let is_even = masks.windows(2).all(|pair| counts(&pair[0]) == counts(&pair[1]));
        Masks {
            batch: masks.len(),
            visible: masks.iter().flat_map(|m| m.visible.iter().copied()).collect(),
            masked: masks.iter().flat_map(|m| m.masked.iter().copied()).collect(),
            uneven: (!is_even).then(|| masks.iter().map(counts).collect()),
        }
    }

    /// Some of the images, in the order of their places; one may be taken many times.
    #[must_use]
    pub fn pick(&self, images: impl Iterator<Item = usize>) -> Self {
        let all: Vec<(&[u32], &[u32])> = self.images().collect();
        let mask = |image: usize| Mask { visible: all[image].0.to_vec(), masked: all[image].1.to_vec() };
        Masks::join(&images.map(mask).collect::<Vec<_>>())
    }

    /// Batch after batch.
    pub fn concat(batches: &[&Masks]) -> Self {
        let images = batches.iter().flat_map(|masks| masks.images());
        Masks::join(&images.map(|(v, m)| Mask { visible: v.to_vec(), masked: m.to_vec() }).collect::<Vec<_>>())
    }

    /// Every patch visible, none predicted.
    pub fn all_visible(batch: usize, patches: usize) -> Self {
        Masks::even(batch, (0..batch).flat_map(|_| 0..patches as u32).collect(), Vec::new())
    }

    /// What a tower sees of them.
    pub fn seen(&self) -> SeenPatches<'_> {
        SeenPatches { visible: &self.visible, masked: &self.masked, uneven: self.uneven.as_deref() }
    }

    /// How many patches of an image are visible and predicted.
    pub fn counts_of(&self, image: usize) -> Counts {
        match &self.uneven {
            Some(counts) => counts[image],
            None => Counts { visible: self.visible.len() / self.batch, masked: self.masked.len() / self.batch },
        }
    }

    /// The visible and the predicted patches of each image.
    pub fn images(&self) -> impl Iterator<Item = (&[u32], &[u32])> {
        let (mut visible, mut masked) = (&self.visible[..], &self.masked[..]);
        (0..self.batch).map(move |image| {
            let counts = self.counts_of(image);
            let (of_visible, of_masked);
            (of_visible, visible) = visible.split_at(counts.visible);
            (of_masked, masked) = masked.split_at(counts.masked);
            (of_visible, of_masked)
        })
    }

    /// Visible patches of one image.
    ///
    /// # Panics
    /// There is no such image, here and below.
    pub fn visible_of(&self, image: usize) -> &[u32] {
        self.images().nth(image).expect("an image of the batch").0
    }

    /// Predicted patches of one image.
    pub fn masked_of(&self, image: usize) -> &[u32] {
        self.images().nth(image).expect("an image of the batch").1
    }

    /// For each image, the token indices of `tokens` in a tower that sees every patch, its class token (if any) first.
    pub fn rows(&self, tokens: Tokens, class_token: bool) -> Vec<u32> {
        self.rows_among(tokens, class_token, 0)
    }

    /// As [`Masks::rows`], among the rows of all images together, of `each` tokens an image.
    pub fn rows_among(&self, tokens: Tokens, class_token: bool, each: usize) -> Vec<u32> {
        let shift = u32::from(class_token);
        let mut rows = Vec::new();
        for (image, (visible, masked)) in self.images().enumerate() {
            let start = (image * each) as u32;
            rows.extend(tokens.cls.then_some(start));
            if tokens.visible {
                rows.extend(visible.iter().map(|i| start + i + shift));
            }
            if tokens.masked {
                rows.extend(masked.iter().map(|i| start + i + shift));
            }
        }
        rows
    }

    /// How many rows of `tokens` each image has.
    pub fn lengths(&self, tokens: Tokens) -> Vec<usize> {
        (0..self.batch)
            .map(|image| {
                let counts = self.counts_of(image);
                tokens.count(counts.visible, counts.masked)
            })
            .collect()
    }

    /// Where the rows of `wanted` are among rows laid out as `held` (a superset), over the whole batch; `None` where
    /// they are the same.
    pub fn within(&self, wanted: Tokens, held: Tokens) -> Option<Vec<u32>> {
        if wanted == held {
            return None;
        }
        let mut rows = Vec::new();
        let mut start = 0;
        for image in 0..self.batch {
            let Counts { visible, masked } = self.counts_of(image);
            let after_cls = start + usize::from(held.cls);
            let after_visible = after_cls + if held.visible { visible } else { 0 };
            rows.extend(wanted.cls.then_some(start as u32));
            if wanted.visible {
                rows.extend((after_cls..after_cls + visible).map(|i| i as u32));
            }
            if wanted.masked {
                rows.extend((after_visible..after_visible + masked).map(|i| i as u32));
            }
            start += held.count(visible, masked);
        }
        Some(rows)
    }
}
