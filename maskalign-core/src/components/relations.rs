//! Relations of tokens: what a target and an aligner of them have in common.

use maskalign_engine::{
    Context, Result, Tape, Tensor,
    ops::{self, RelationShape, Third},
};

use crate::component;

/// Which parts of a block's projection are compared with each other.
///
/// ```
/// # use maskalign_core::prelude::*;
/// let relations = Relations { of: vec![Relation::Qk, Relation::Vv], heads: 12 };
/// assert_eq!(relations.of.len(), 2, "an output for each");
/// ```
#[component]
#[derive(Copy, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Relation {
    /// Queries with keys: the block's own attention.
    Qk,
    /// Queries with queries.
    Qq,
    /// Keys with keys.
    Kk,
    /// Values with values.
    Vv,
    /// Values with keys.
    Vk,
}

impl Relation {
    fn parts(self) -> [Third; 2] {
        match self {
            Relation::Qk => [Third::Queries, Third::Keys],
            Relation::Qq => [Third::Queries; 2],
            Relation::Kk => [Third::Keys; 2],
            Relation::Vv => [Third::Values; 2],
            Relation::Vk => [Third::Values, Third::Keys],
        }
    }
}

/// Relations of the compared tokens, which two towers may have whatever their widths: of each token to all of them, in so many
/// heads, before the softmax.
///
/// ```
/// # use maskalign_core::{Device, prelude::*};
/// # let cx = Context::new(Device::Cpu, 1);
/// // Queries, keys and values of two images' three tokens, in four channels each.
/// let qkv = cx.tensor(vec![1.0; 6 * 12], 6, 12)?;
/// let relations = Relations { of: vec![Relation::Vv], heads: 2 };
/// let logits = relations.logits(&cx, &mut Tape::inference(), &qkv, 2)?;
/// assert_eq!(logits[0].shape(), (6 * 2, 3), "a row for each token and head");
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relations {
    /// An output each.
    pub of: Vec<Relation>,
    /// Heads that the channels of queries, keys and values are cut into.
    pub heads: usize,
}

impl Relations {
    /// The logits of each relation, `[batch * tokens * heads, tokens]`, from queries, keys and values of the compared tokens,
    /// `[batch * tokens, 3 * dim]`.
    ///
    /// # Errors
    /// Out of memory on the device.
    ///
    /// # Panics
    /// The heads do not divide the channels: planning refuses that.
    pub fn logits(&self, cx: &Context, tape: &mut Tape, qkv: &Tensor, batch: usize) -> Result<Vec<Tensor>> {
        let shape = RelationShape { batch, tokens: qkv.rows() / batch, heads: self.heads };
        self.of.iter().map(|relation| ops::relation(cx, tape, qkv, relation.parts(), shape)).collect()
    }
}
