//! The tower that is trained. It sees images and a list of patches; masker, target, alignment and loss live outside.

mod vit;

use maskalign_registry::Refusal;

use crate::{
    components::towers::{PlanContext, TowerShape},
    context::Context,
    device::{Dev, Matrix},
    error::Result,
    images::ImageBatch,
    nn::{BranchScales, Features, Init, Module, Reach},
    plugin::kind,
    tape::Recorder,
};

/// A student, as its author writes it: for any device.
pub trait StudentPlugin: Send + Sync {
    /// The shape of the tower.
    ///
    /// # Errors
    /// Names the option that does not fit.
    fn plan(&self, cx: &PlanContext) -> Result<TowerShape, Refusal>;
    /// Builds the tower, from its initial values or from weights.
    ///
    /// # Errors
    /// Weights that are missing or do not fit; out of memory.
    fn build<D: Dev>(&self, plan: &PlanContext, init: &Init<D>) -> Result<Box<dyn Student<D>>>;
}

/// A student's options on one device, as stages call them; see [`StudentPlugin`].
#[allow(missing_docs)]
pub trait StudentBuilder<D: Dev> {
    fn plan(&self, cx: &PlanContext) -> Result<TowerShape, Refusal>;
    fn build(&self, plan: &PlanContext, init: &Init<D>) -> Result<Box<dyn Student<D>>>;
}

impl<P: StudentPlugin, D: Dev> StudentBuilder<D> for P {
    fn plan(&self, cx: &PlanContext) -> Result<TowerShape, Refusal> {
        StudentPlugin::plan(self, cx)
    }
    fn build(&self, plan: &PlanContext, init: &Init<D>) -> Result<Box<dyn Student<D>>> {
        StudentPlugin::build(self, plan, init)
    }
}

kind!(device StudentTag, StudentPlugin, StudentBuilder, student);

/// The tower that is trained.
pub trait Student<D: Dev>: Module<D> {
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
        cx: &Context<D>,
        r: &mut Recorder<D>,
        images: &ImageBatch,
        visible: Option<&[u32]>,
        scales: Option<&BranchScales>,
        keep: &dyn Fn(usize) -> bool,
    ) -> Result<Features<D>>;
    /// The final norm.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn norm(&self, cx: &Context<D>, r: &mut Recorder<D>, x: &Matrix<D>) -> Result<Matrix<D>>;
}
