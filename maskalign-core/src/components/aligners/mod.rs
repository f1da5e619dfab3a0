//! The map from the student's outputs to the shape of the target.

mod decoder;
mod dynamic;

use maskalign_engine::{Context, Recompute, Result, Tape, Tensor};
use maskalign_registry::{LevelRef, Refusal};

pub use dynamic::{Fusion, Head};

use crate::{
    components::{
        maskers::Counts,
        tokens::{Masks, Tokens},
        towers::{Tap, TowerShape},
    },
    nn::{Init, Module},
};

/// What an alignment is asked before the first step.
#[derive(Clone, Debug)]
pub struct AlignPlan {
    /// The student.
    pub student: TowerShape,
    /// Visible and predicted patches of an image.
    pub counts: Counts,
    /// Tokens that the objective compares.
    pub tokens: Tokens,
    /// Depth of the tower that the targets come from.
    pub target_depth: usize,
    /// Its levels that the target lists, in order.
    pub target_levels: Vec<usize>,
    /// Outputs of the target: one per level, or one where it combines them.
    pub outputs: usize,
    /// Which of the outputs have a weight: the alignment gives these, in order, and no other.
    pub wanted: Vec<usize>,
    /// Channels of the target.
    pub width: usize,
}

/// What an alignment needs of the student.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AlignNeeds {
    /// The student's levels, in the order in which the alignment is given them.
    pub levels: Vec<LevelRef>,
    /// Where they are taken.
    pub tap: Tap,
}

/// What an alignment is computed from.
pub struct AlignInput<'a> {
    /// The student's levels that it asked for, `[batch * held, dim]`; the rows of an image are its class token (where
    /// the student has one), its visible patches, and its masked ones (where the student shows mask tokens).
    pub levels: &'a [Tensor],
    /// The tokens that those rows are.
    pub held: Tokens,
    /// The masks.
    pub masks: &'a Masks,
    /// The tokens wanted.
    pub tokens: Tokens,
}

/// An alignment's options.
pub trait Aligner: Send + Sync {
    /// Checks them, and gives what builds the alignment.
    ///
    /// # Errors
    /// Names the option that does not fit the depths, tokens or widths.
    fn plan(&self, plan: &AlignPlan) -> Result<Box<dyn PlannedAligner>, Refusal>;
}

/// An alignment whose options fit.
pub trait PlannedAligner: Send + Sync {
    /// What it needs of the student.
    fn needs(&self) -> &AlignNeeds;
    /// About how many values of each image a step keeps for its backward pass, inside the alignment; for estimates of
    /// memory. With [`Recompute::Blocks`], blocks keep their input alone.
    fn kept(&self, _recompute: Recompute) -> usize {
        0
    }
    /// Makes its parameters. Those that no output reaches must be marked as not trained.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn build(&self, init: &Init) -> Result<Box<dyn AlignerModel>>;
}

/// A trained map from the student's outputs to the target's shape.
pub trait AlignerModel: Module {
    /// The predictions, `[batch * tokens, width]` each; the rows of an image are its class token, visible and masked
    /// patches, as far as [`AlignInput::tokens`] has them.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn forward(&self, cx: &Context, tape: &mut Tape, input: &AlignInput) -> Result<Vec<Tensor>>;
}
