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
///
/// ```
/// # use maskalign_core::prelude::*;
/// let tokens = Tokens { visible: true, ..Tokens::default() };
/// let wants = Wants { levels: [7, 11].into(), tokens, ..Wants::default() };
/// assert!(!wants.attention && wants.levels.contains(&11));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wants {
    /// Blocks whose outputs are compared.
    pub levels: BTreeSet<usize>,
    /// Blocks whose queries, keys and values are compared: what a teacher keeps of the blocks before them is in its pass.
    pub qkv: BTreeSet<usize>,
    /// Whether the masker asks for the attention of the last block.
    pub attention: bool,
    /// Whether a target needs every token of the last block (statistics over the whole tensor).
    pub whole: bool,
    /// The tokens that targets compare; other rows of the last block are not computed.
    pub tokens: Tokens,
}

/// A teacher's pass between attention and outputs, while the mask is drawn.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// A pass of a teacher that gives no attention, and computes the last block whole.
/// fn pass(features: Features) -> Pass {
///     Pass { attention: Vec::new(), features, begun: None }
/// }
/// ```
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
///
/// ```
/// # use maskalign_core::{Device, prelude::*};
/// # let cx = Context::new(Device::Cpu, 1);
/// // Of one image, the rows of all tokens: a class token and four patches.
/// let level = Level { x: cx.tensor(vec![0.0; 5 * 8], 5, 8)?, only: None };
/// assert_eq!(level.x.shape(), (5, 8));
/// # Ok::<(), Error>(())
/// ```
pub struct Level {
    /// `[batch * tokens, channels]`.
    pub x: Tensor,
    /// The tokens that the rows are, where only those were computed; else all tokens in order.
    pub only: Option<Tokens>,
}

/// A teacher's options.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// A tower of somebody's checkpoints.
/// #[component]
/// struct Theirs {
///     /// The file.
///     weights: Weights,
/// }
///
/// impl Teacher for Theirs {
///     fn plan(&self, cx: &PlanContext) -> Result<Box<dyn PlannedTeacher>, Refusal> {
///         let options = TowerOptions { arch: Arch::named("base_16"), image_size: None, weights: Some(&self.weights) };
///         let (arch, image_size) = options.resolve(cx)?;
///         let config = VitConfig { learned_positions: true, ..VitConfig::plain(arch, image_size) };
///         Ok(Box::new(PlannedTower::plan(cx, config, Some(&self.weights), Family::Vit)?))
///     }
/// }
///
/// register!(teacher "theirs" => Theirs, "a tower",
///     example: "{ type: theirs, weights: theirs.safetensors }");
/// # let students = Default::default();
/// # let cx = PlanContext {
/// #     data_size: 224, students: &students, student: None,
/// #     environment: Environment::Ignored, missing_weights: MissingWeights::Refused,
/// # };
///
/// let theirs = Theirs { weights: Weights::Path("theirs.safetensors".into()) };
/// assert_eq!(theirs.plan(&cx)?.shape().tokens(), 1 + 14 * 14);
/// # Ok::<(), Error>(())
/// ```
pub trait Teacher: Send + Sync {
    /// Checks them, and gives what builds the teacher.
    ///
    /// # Errors
    /// Names the option that does not fit.
    fn plan(&self, cx: &PlanContext) -> Result<Box<dyn PlannedTeacher>, Refusal>;
}

/// A teacher whose options fit.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// A teacher that begins as the student of its stage does.
/// struct Twin(TowerShape);
///
/// impl PlannedTeacher for Twin {
///     fn shape(&self) -> TowerShape {
///         self.0
///     }
///
///     fn gives_attention(&self) -> bool {
///         false
///     }
///
///     fn build(&self, build: &mut TeacherBuild) -> Result<Box<dyn TeacherModel>, Error> {
///         let Some((planned, _)) = &build.student else {
///             return Err(Refusal::whole("the stage trains no student").into());
///         };
///         let tower = planned.build(&Init::blank(build.cx.device()), build.trained)?;
///         Ok(twin(tower))
///     }
/// }
/// # fn twin(tower: Box<dyn StudentModel>) -> Box<dyn TeacherModel> { unimplemented!() }
/// ```
pub trait PlannedTeacher: Send + Sync {
    /// The shape of its tower.
    fn shape(&self) -> TowerShape;
    /// Whether it gives the attention of its class token, which a masker may draw by.
    fn gives_attention(&self) -> bool {
        self.shape().cls_token
    }
    /// Whether it gives queries, keys and values of its blocks, which relations are of.
    fn gives_qkv(&self) -> bool {
        false
    }
    /// Whether it follows the student, so that its values change in training: see [`TeacherModel::momentum`].
    fn moves(&self) -> bool {
        false
    }
    /// Builds the tower and reads its weights.
    ///
    /// # Errors
    /// Weights that are missing or do not fit; out of memory.
    fn build(&self, build: &mut TeacherBuild) -> Result<Box<dyn TeacherModel>, Error>;
}

/// What a teacher is built from.
///
/// ```
/// # use maskalign_core::{Device, prelude::*};
/// /// A teacher whose values are those of an earlier stage's student.
/// fn values(build: &TeacherBuild, stage: &str) -> Result<usize, Error> {
///     Ok(build.trained.get(stage)?.len())
/// }
/// # let cx = Context::new(Device::Cpu, 1);
///
/// let build = TeacherBuild { cx: &cx, trained: &TrainedStudents::default(), student: None };
/// assert!(values(&build, "pretrain").is_err(), "that stage has not run");
/// ```
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
///
/// ```
/// # use maskalign_core::{Device, prelude::*};
/// use std::collections::BTreeMap;
///
/// struct Mine(Vit);
///
/// impl Module for Mine {
///     fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
///         self.0.visit(f);
///     }
/// }
///
/// impl TeacherModel for Mine {
///     fn shape(&self) -> TowerShape {
///         TowerShape::from(&self.0.config)
///     }
///     fn begin(&self, cx: &Context, images: &ImageBatch, wants: &Wants) -> Result<Pass> {
///         let keep = |level| wants.levels.contains(&level);
///         let features = self.0.forward(cx, &mut Tape::inference(), images, None, None, keep)?;
///         Ok(Pass { attention: Vec::new(), features, begun: None })
///     }
///     fn finish(&self, _: &Context, pass: Pass, _: &Wants, _: &Masks) -> Result<BTreeMap<usize, Level>> {
///         Ok(pass.features.hidden.into_iter().map(|(i, x)| (i, Level { x, only: None })).collect())
///     }
///     fn tap(&self, cx: &Context, x: &Tensor, tap: Tap) -> Result<Tensor> {
///         if tap == Tap::Block { Ok(x.clone()) } else { self.0.final_norm(cx, &mut Tape::inference(), x) }
///     }
/// }
/// # let cx = Context::new(Device::Cpu, 1);
/// # let config = VitConfig::plain(Arch { dim: 8, depth: 2, heads: 2, mlp: 32, patch: 4 }, 8);
/// # let teacher = Mine(Vit::new(&Init::new(cx.device(), 0, "x").of_role(Role::Frozen), config)?);
/// # let images = ImageBatch { pixels: vec![0.5; 192], batch: 1, size: 8 };
/// # let wants = Wants { levels: [1].into(), ..Wants::default() };
/// # let pass = teacher.begin(&cx, &images, &wants)?;
/// # let levels = teacher.finish(&cx, pass, &wants, &Masks::all_visible(1, 4))?;
/// # assert_eq!(levels[&1].x.shape(), (5, 8));
/// # Ok::<(), Error>(())
/// ```
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
    /// Queries, keys and values of a block in [`Wants::qkv`], side by side, of all tokens: `[batch * tokens, 3 * dim]`. `None`
    /// where the teacher does not give them.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn queries_keys_values(&self, _cx: &Context, _pass: &Pass, _block: usize) -> Result<Option<Tensor>> {
        Ok(None)
    }
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
    /// What a teacher that follows the student keeps of itself in an update; what belongs to it, such as a copy of an
    /// alignment, follows likewise. `None` for a teacher that does not.
    fn momentum(&self, _progress: f64) -> Option<f64> {
        None
    }
    /// How much the class token attends to each patch in the last block, of each head by itself: `[batch, heads, patches]`,
    /// for people to look at. `None` where there is nothing to show.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn class_attention(&self, _cx: &Context, _images: &ImageBatch) -> Result<Option<Vec<f32>>> {
        Ok(None)
    }
}
