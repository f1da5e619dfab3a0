//! The tower that is trained. It sees images and a list of patches; masker, target, alignment and loss live outside.

mod vit;

use maskalign_engine::{Context, ImageBatch, Result, Tape, Tensor};
use maskalign_registry::Refusal;

use crate::{
    components::towers::{PlanContext, TowerShape},
    error::Error,
    nn::{BranchScales, Features, Init, Module, Reach},
    plugin::kind,
};

/// A student.
pub trait Student: Send + Sync {
    /// The shape of the tower.
    ///
    /// # Errors
    /// Names the option that does not fit.
    fn plan(&self, cx: &PlanContext) -> Result<TowerShape, Refusal>;
    /// Builds the tower, from its initial values or from weights.
    ///
    /// # Errors
    /// Weights that are missing or do not fit; out of memory.
    fn build(&self, plan: &PlanContext, init: &Init) -> Result<Box<dyn StudentModel>, Error>;
}

kind!(StudentTag, Student, student);

/// The tower that is trained.
pub trait StudentModel: Module {
    /// The shape of the tower.
    fn shape(&self) -> TowerShape;
    /// Largest rate of stochastic depth, that of the last block.
    fn drop_path(&self) -> f64;
    /// Leaves out what no loss needs.
    fn set_reach(&mut self, reach: Reach);
    /// Hidden states of the visible patches (`K` indices an image; `None`: all), the class token first. `keep` says
    /// which levels are wanted besides the last.
    ///
    /// # Errors
    /// Out of memory on the device, as below.
    fn forward(
        &self,
        cx: &Context,
        tape: &mut Tape,
        images: &ImageBatch,
        visible: Option<&[u32]>,
        scales: Option<&BranchScales>,
        keep: &dyn Fn(usize) -> bool,
    ) -> Result<Features>;
    /// The final norm.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn norm(&self, cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor>;
}
