//! Towers that see the whole image and are not trained by gradients.

mod clip;
mod dino;
mod dinov2;
mod ema;
mod tower;
mod vit;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use maskalign_engine::{Context, ImageBatch, Result, Tensor, ops::Begun};
use maskalign_registry::Refusal;

pub use tower::TowerTeacher;

use crate::{
    components::{
        students::{PlannedStudent, StudentModel},
        tokens::{Masks, Tokens},
        towers::{PlanContext, Tap, TowerShape, TrainedStudents},
    },
    error::Error,
    nn::{Features, Module},
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
pub struct Pass {
    /// Attention of the class token to each patch in the last block, mean over heads: `[batch, patches]`; empty where
    /// [`Wants::attention`] is false.
    pub attention: Vec<f32>,
    /// What the blocks gave so far; a teacher keeps its wanted levels in `hidden`.
    pub features: Features,
    /// The last block, where its rows wait for the mask.
    pub begun: Option<Begun>,
}

/// One level of a teacher.
pub struct Level {
    /// `[batch * tokens, channels]`.
    pub x: Tensor,
    /// The tokens that the rows are, where only those were computed; else all tokens in order.
    pub only: Option<Tokens>,
}

/// A teacher's options.
pub trait Teacher: Send + Sync {
    /// Checks them, and gives what builds the teacher.
    ///
    /// # Errors
    /// Names the option that does not fit.
    fn plan(&self, cx: &PlanContext) -> Result<Box<dyn PlannedTeacher>, Refusal>;
}

/// A teacher whose options fit.
pub trait PlannedTeacher: Send + Sync {
    /// The shape of its tower.
    fn shape(&self) -> TowerShape;
    /// Whether it gives the attention of its class token, which a masker may draw by.
    fn gives_attention(&self) -> bool {
        self.shape().cls_token
    }
    /// Builds the tower and reads its weights.
    ///
    /// # Errors
    /// Weights that are missing or do not fit; out of memory.
    fn build(&self, build: &mut TeacherBuild) -> Result<Box<dyn TeacherModel>, Error>;
}

/// What a teacher is built from.
pub struct TeacherBuild<'a> {
    /// Device and operators.
    pub cx: &'a Context,
    /// The parameters of earlier stages' students.
    pub trained: &'a TrainedStudents,
    /// The student that the stage trains, with its values at the beginning, and how it was built; `None` where the stage
    /// trains none.
    pub student: Option<(&'a Arc<dyn PlannedStudent>, &'a mut dyn StudentModel)>,
}

/// A teacher. It runs in two halves: the first gives the attention that a masker may draw by, the second only the rows of
/// the last block that are compared once the mask is known.
///
/// Its parameters have the role [`Frozen`](maskalign_engine::Role::Frozen), or
/// [`Moving`](maskalign_engine::Role::Moving) where they change after each update: those are saved in checkpoints.
pub trait TeacherModel: Module {
    /// The shape of the tower.
    fn shape(&self) -> TowerShape;
    /// Up to where the mask is drawn.
    ///
    /// # Errors
    /// Out of memory on the device, as below.
    fn begin(&self, cx: &Context, images: &ImageBatch, wants: &Wants) -> Result<Pass>;
    /// The wanted levels.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn finish(&self, cx: &Context, pass: Pass, wants: &Wants, masks: &Masks) -> Result<BTreeMap<usize, Level>>;
    /// Hidden states after the final norm, or after it and the projection.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn tap(&self, cx: &Context, x: &Tensor, tap: Tap) -> Result<Tensor>;
    /// Called after each update of the student, the only time at which a teacher may change. `progress` is the update's
    /// own, the share of the stage that was done before it, in 0..1.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn after_update(&mut self, _cx: &Context, _student: &mut dyn StudentModel, _progress: f64) -> Result<()> {
        Ok(())
    }
}
