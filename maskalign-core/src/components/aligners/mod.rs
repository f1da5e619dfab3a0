//! The map from the student's outputs to the shape of the target.

mod decoder;
mod dynamic;

use maskalign_registry::{LevelRef, Refusal};

pub use dynamic::{Fusion, Head};

use crate::{
    components::{
        maskers::Counts,
        tokens::{Masks, Tokens},
        towers::{Tap, TowerShape},
    },
    context::Context,
    device::{Dev, Matrix},
    error::Result,
    nn::{Init, Module},
    plugin::kind,
    tape::Recorder,
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
pub struct AlignInput<'a, D: Dev> {
    /// The student's levels that it asked for, `[batch * held, dim]`; the rows of an image are its class token (where
    /// the student has one) and its visible patches.
    pub levels: &'a [Matrix<D>],
    /// The tokens that those rows are.
    pub held: Tokens,
    /// The masks.
    pub masks: &'a Masks,
    /// The tokens wanted.
    pub tokens: Tokens,
}

/// An alignment, as its author writes it: for any device.
pub trait AlignerPlugin: Send + Sync {
    /// What it needs of the student.
    ///
    /// # Errors
    /// Names the option that does not fit the depths, tokens or widths.
    fn plan(&self, plan: &AlignPlan) -> Result<AlignNeeds, Refusal>;
    /// About how many values of each image a step keeps for its backward pass, inside the alignment; for estimates of
    /// memory. With `recompute`, blocks keep their input alone.
    fn kept(&self, _plan: &AlignPlan, _recompute: bool) -> usize {
        0
    }
    /// Makes its parameters. Those that no output reaches must be marked as not trainable.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn build<D: Dev>(&self, plan: &AlignPlan, init: &Init<D>) -> Result<Box<dyn Aligner<D>>>;
}

/// An alignment's options on one device, as stages call them; see [`AlignerPlugin`].
#[allow(missing_docs)]
pub trait AlignerBuilder<D: Dev> {
    fn plan(&self, plan: &AlignPlan) -> Result<AlignNeeds, Refusal>;
    fn kept(&self, plan: &AlignPlan, recompute: bool) -> usize;
    fn build(&self, plan: &AlignPlan, init: &Init<D>) -> Result<Box<dyn Aligner<D>>>;
}

impl<P: AlignerPlugin, D: Dev> AlignerBuilder<D> for P {
    fn plan(&self, plan: &AlignPlan) -> Result<AlignNeeds, Refusal> {
        AlignerPlugin::plan(self, plan)
    }
    fn kept(&self, plan: &AlignPlan, recompute: bool) -> usize {
        AlignerPlugin::kept(self, plan, recompute)
    }
    fn build(&self, plan: &AlignPlan, init: &Init<D>) -> Result<Box<dyn Aligner<D>>> {
        AlignerPlugin::build(self, plan, init)
    }
}

kind!(device AlignerTag, AlignerPlugin, AlignerBuilder, aligner);

/// A trained map from the student's outputs to the target's shape.
pub trait Aligner<D: Dev>: Module<D> {
    /// The predictions, `[batch * tokens, width]` each; the rows of an image are its class token, visible and masked
    /// patches, as far as [`AlignInput::tokens`] has them.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn forward(&self, cx: &Context<D>, r: &mut Recorder<D>, input: &AlignInput<D>) -> Result<Vec<Matrix<D>>>;
}
