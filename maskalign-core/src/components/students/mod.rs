//! The tower that is trained. It sees images and a list of patches; masker, target, alignment and loss live outside.

mod vit;

use std::sync::Arc;

use maskalign_engine::Result;
use maskalign_registry::Refusal;

use crate::components::towers::PlanContext;
pub use crate::components::towers::{PlannedStudent, StudentModel};

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
