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
///
/// ```
/// # use maskalign_core::prelude::*;
/// use std::sync::Arc;
///
/// /// A small vision transformer.
/// #[component]
/// struct Small {}
///
/// impl Student for Small {
///     fn plan(&self, cx: &PlanContext) -> Result<Arc<dyn PlannedStudent>, Refusal> {
///         let (arch, _) = TowerOptions { arch: Arch::named("tiny_16"), image_size: None, weights: None }.resolve(cx)?;
///         Ok(Arc::new(PlannedSmall { arch, image_size: cx.data_size }))
///     }
/// }
///
/// register!(student "small" => Small, "a small vision transformer", example: "{ type: small }");
/// # struct PlannedSmall { arch: Arch, image_size: usize }
/// # impl PlannedStudent for PlannedSmall {
/// #     fn shape(&self) -> TowerShape { unimplemented!() }
/// #     fn build(&self, _: &Init, _: &TrainedStudents) -> Result<Box<dyn StudentModel>, Error> { unimplemented!() }
/// # }
/// ```
pub trait Student: Send + Sync {
    /// Checks them, and gives what builds the student.
    ///
    /// # Errors
    /// Names the option that does not fit.
    fn plan(&self, cx: &PlanContext) -> Result<Arc<dyn PlannedStudent>, Refusal>;
}

/// A student whose options fit.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// A tower that is built by another student: what a stage is told of it is that student's.
/// struct Wrapped(Box<dyn PlannedStudent>);
///
/// impl PlannedStudent for Wrapped {
///     fn shape(&self) -> TowerShape {
///         self.0.shape()
///     }
///
///     fn build(&self, init: &Init, trained: &TrainedStudents) -> Result<Box<dyn StudentModel>, Error> {
///         self.0.build(init, trained)
///     }
/// }
/// ```
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
///
/// ```
/// # use maskalign_core::{Device, prelude::*};
/// struct Small(Vit);
///
/// impl Module for Small {
///     fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
///         self.0.visit(f);
///     }
/// }
///
/// impl StudentModel for Small {
///     fn shape(&self) -> TowerShape {
///         TowerShape::from(&self.0.config)
///     }
///     fn drop_path(&self) -> f64 {
///         0.0
///     }
///     fn set_reach(&mut self, reach: Reach) {
///         self.0.set_reach(reach);
///     }
///     fn forward(
///         &self,
///         cx: &Context,
///         tape: &mut Tape,
///         images: &ImageBatch,
///         visible: Option<&[u32]>,
///         scales: Option<&BranchScales>,
///         keep: &dyn Fn(usize) -> bool,
///     ) -> Result<Features> {
///         self.0.forward(cx, tape, images, visible, scales, keep)
///     }
///     fn norm(&self, cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
///         self.0.final_norm(cx, tape, x)
///     }
/// }
/// # let cx = Context::new(Device::Cpu, 1);
/// # let config = VitConfig::plain(Arch { dim: 8, depth: 2, heads: 2, mlp: 32, patch: 4 }, 8);
/// # let small = Small(Vit::new(&Init::new(cx.device(), 0, "x"), config)?);
/// # let images = ImageBatch { pixels: vec![0.5; 192], batch: 1, size: 8 };
/// # let features = small.forward(&cx, &mut Tape::inference(), &images, None, None, &|_| false)?;
/// # assert_eq!(features.last.shape(), (5, 8));
/// # Ok::<(), Error>(())
/// ```
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
