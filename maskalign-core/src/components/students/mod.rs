//! The tower that is trained. It sees images and a list of patches; masker, target, alignment and loss live outside.

mod vit;

use std::sync::Arc;

use maskalign_engine::{Context, ImageBatch, Result, Tape, Tensor};
use maskalign_registry::Refusal;

use crate::{
    components::towers::{PlanContext, TowerShape, TrainedStudents},
    error::Error,
    nn::{BranchScales, Features, Init, Module, Reach, SeenPatches},
};

/// A student's options.
pub trait Student: Send + Sync {
    /// Checks them, and gives what builds the student.
    ///
    /// # Errors
    /// Names the option that does not fit.
    fn plan(&self, cx: &PlanContext) -> Result<Arc<dyn PlannedStudent>, Refusal>;
}

/// A student whose options fit.
pub trait PlannedStudent: Send + Sync {
    /// The shape of its tower.
    fn shape(&self) -> TowerShape;
    /// Whether all its values are drawn: it starts from no weights.
    fn is_drawn(&self) -> bool {
        false
    }
    /// Builds the tower, from its initial values or from weights. Parameters are those of `init`'s role.
    ///
    /// # Errors
    /// Weights that are missing or do not fit; out of memory.
    fn build(&self, init: &Init, trained: &TrainedStudents) -> Result<Box<dyn StudentModel>, Error>;
}

/// The tower that is trained.
pub trait StudentModel: Module {
    /// The shape of the tower.
    fn shape(&self) -> TowerShape;
    /// Largest rate of stochastic depth, that of the last block.
    fn drop_path(&self) -> f64;
    /// Leaves out what no loss needs.
    fn set_reach(&mut self, reach: Reach);
    /// Hidden states of the patches (`None`: all are visible); the rows of an image are its [tokens](TowerShape::held).
    /// `keep` says which levels are wanted besides the last.
    ///
    /// # Errors
    /// Out of memory on the device, as below.
    fn forward(
        &self,
        cx: &Context,
        tape: &mut Tape,
        images: &ImageBatch,
        seen: Option<SeenPatches>,
        scales: Option<&BranchScales>,
        keep: &dyn Fn(usize) -> bool,
    ) -> Result<Features>;
    /// The final norm.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn norm(&self, cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor>;
}
