//! Frozen towers that see the whole image.

mod clip;
mod dino;
mod dinov2;
mod tower;
mod vit;

use std::collections::{BTreeMap, BTreeSet};

use maskalign_registry::Refusal;

pub use tower::TowerTeacher;

use crate::{
    components::{
        tokens::{Masks, Tokens},
        towers::{PlanContext, Tap, TowerShape},
    },
    context::Context,
    device::{Dev, Matrix},
    error::Result,
    images::ImageBatch,
    kernels::Begun,
    nn::{Features, Module},
    plugin::kind,
};

/// What the objectives and the masker need of a teacher, known before the first step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wants {
    /// Blocks whose outputs are compared.
    pub levels: BTreeSet<usize>,
    /// Whether the masker asks for the attention of the last block.
    pub attention: bool,
    /// Whether a target needs every token of the last block (statistics over the whole tensor).
    pub whole: bool,
    /// The tokens that targets compare; other rows of the last block are not computed.
    pub tokens: Tokens,
}

/// A teacher's pass between attention and outputs, while the mask is drawn.
pub struct Pass<D: Dev> {
    /// Attention of the class token to each patch in the last block, mean over heads: `[batch, patches]`; empty where
    /// [`Wants::attention`] is false.
    pub attention: Vec<f32>,
    /// What the blocks gave so far; a teacher keeps its wanted levels in `hidden`.
    pub features: Features<D>,
    /// The last block, where its rows wait for the mask.
    pub begun: Option<Begun<D>>,
}

/// One level of a teacher.
pub struct Level<D: Dev> {
    /// `[batch * tokens, channels]`.
    pub x: Matrix<D>,
    /// The tokens that the rows are, where only those were computed; else all tokens in order.
    pub only: Option<Tokens>,
}

/// A teacher, as its author writes it: for any device.
pub trait TeacherPlugin: Send + Sync {
    /// The shape of the tower.
    ///
    /// # Errors
    /// Names the option that does not fit.
    fn plan(&self, cx: &PlanContext) -> Result<TowerShape, Refusal>;
    /// Builds the tower and reads its weights.
    ///
    /// # Errors
    /// Weights that are missing or do not fit; out of memory.
    fn build<D: Dev>(&self, plan: &PlanContext, cx: &Context<D>) -> Result<Box<dyn Teacher<D>>>;
}

/// A teacher's options on one device, as stages call them; see [`TeacherPlugin`].
#[allow(missing_docs)]
pub trait TeacherBuilder<D: Dev> {
    fn plan(&self, cx: &PlanContext) -> Result<TowerShape, Refusal>;
    fn build(&self, plan: &PlanContext, cx: &Context<D>) -> Result<Box<dyn Teacher<D>>>;
}

impl<P: TeacherPlugin, D: Dev> TeacherBuilder<D> for P {
    fn plan(&self, cx: &PlanContext) -> Result<TowerShape, Refusal> {
        TeacherPlugin::plan(self, cx)
    }
    fn build(&self, plan: &PlanContext, cx: &Context<D>) -> Result<Box<dyn Teacher<D>>> {
        TeacherPlugin::build(self, plan, cx)
    }
}

kind!(device TeacherTag, TeacherPlugin, TeacherBuilder, teacher);

/// A frozen tower. It runs in two halves: the first gives the attention that a masker may draw by, the second only the
/// rows of the last block that are compared once the mask is known.
pub trait Teacher<D: Dev>: Module<D> {
    /// The shape of the tower.
    fn shape(&self) -> TowerShape;
    /// Up to where the mask is drawn.
    ///
    /// # Errors
    /// Out of memory on the device, as below.
    fn begin(&self, cx: &Context<D>, images: &ImageBatch, wants: &Wants) -> Result<Pass<D>>;
    /// The wanted levels.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn finish(&self, cx: &Context<D>, pass: Pass<D>, wants: &Wants, masks: &Masks)
    -> Result<BTreeMap<usize, Level<D>>>;
    /// Hidden states after the final norm, or after it and the projection.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn tap(&self, cx: &Context<D>, x: &Matrix<D>, tap: Tap) -> Result<Matrix<D>>;
}
