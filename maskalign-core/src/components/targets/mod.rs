//! What the student is to match.

mod assignments;
mod features;
mod hog;
mod pixels;
mod relations;

use std::collections::BTreeMap;

use maskalign_engine::{
    Context, ImageBatch, Result, Tape, Tensor,
    ops::{self, Standardize},
};
use maskalign_registry::{Kind, Refusal};

pub use assignments::Sharpening;

use crate::{
    component,
    components::{
        maskers::Counts,
        relations::Relations,
        teachers::{Level, TeacherModel},
        tokens::{Masks, Tokens},
        towers::{Tap, TowerShape},
    },
    nn::Norm,
};

/// What a target is asked before the first step.
///
/// ```
/// # use maskalign_core::prelude::*;
/// # let config = VitConfig::plain(Arch { dim: 8, depth: 2, heads: 2, mlp: 32, patch: 4 }, 8);
/// # let student = TowerShape::from(&config);
/// let teachers = [("clip".to_string(), student)].into();
/// let (tokens, counts) = (Tokens { visible: true, ..Tokens::default() }, Counts { visible: 4, masked: 0 });
/// let cx = TargetContext { student, teachers: &teachers, tokens, counts };
/// assert_eq!(cx.teachers["clip"].arch.depth, 2);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy)]
pub struct TargetContext<'a> {
    /// The student.
    pub student: TowerShape,
    /// The teachers, by name.
    pub teachers: &'a BTreeMap<String, TowerShape>,
    /// The tokens of the objective.
    pub tokens: Tokens,
    /// Visible and predicted patches of an image, about the most where they vary.
    pub counts: Counts,
}

impl TargetContext<'_> {
    /// The teacher that the option `teacher` names.
    ///
    /// # Errors
    /// There is none of that name; the known ones are listed.
    pub fn teacher(&self, name: &str) -> Result<&TowerShape, Refusal> {
        self.teachers.get(name).ok_or_else(|| {
            let known: Vec<&str> = self.teachers.keys().map(String::as_str).collect();
            let refusal = Refusal::new("teacher", format!("no teacher is named `{name}`"));
            refusal.unresolved(Kind::Teacher, name).help(match known.is_empty() {
                true => "the stage has no `teachers`".to_string(),
                false => format!("known teachers: {}", known.join(", ")),
            })
        })
    }

    /// Refuses a teacher whose patches are not the student's, or that lacks the class token that is compared.
    ///
    /// # Errors
    /// Names `teacher`.
    pub fn check_tokens(&self, name: &str, teacher: &TowerShape) -> Result<(), Refusal> {
        teacher.check_grid(name, &self.student)?;
        if self.tokens.cls && !teacher.cls_token {
            return Err(Refusal::new("teacher", format!("`{name}` has no class token to compare"))
                .beside(["tokens"], "`cls` is asked for here"));
        }
        Ok(())
    }
}

/// A target's options.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// The brightness of each patch.
/// #[component]
/// struct Brightness {}
///
/// impl Target for Brightness {
///     fn plan(&self, cx: &TargetContext) -> Result<PlannedTarget, Refusal> {
///         if cx.tokens.cls {
///             return Err(Refusal::whole("the class token has no brightness").help("leave `cls` out of `tokens`"));
///         }
///         let source = TargetSource::Images(Box::new(PlannedBrightness(cx.student)));
///         Ok(PlannedTarget { outputs: 1, depth: 1, levels: vec![0], width: 1, source })
///     }
/// }
///
/// register!(target "brightness" => Brightness, "the brightness of each patch", example: "{ type: brightness }");
/// # struct PlannedBrightness(TowerShape);
/// # impl ImageTarget for PlannedBrightness {
/// #     fn outputs(&self, _: &Context, _: &TargetInput) -> Result<Vec<Tensor>> { unimplemented!() }
/// # }
/// ```
pub trait Target: Send + Sync {
    /// Checks them, and gives what computes the target.
    ///
    /// # Errors
    /// Names the option that does not fit.
    fn plan(&self, cx: &TargetContext) -> Result<PlannedTarget, Refusal>;
}

/// A target whose options fit: what it gives, and what it is computed from.
///
/// ```
/// # use maskalign_core::prelude::*;
/// # fn planned(source: TargetSource) {
/// let target = PlannedTarget { outputs: 5, depth: 12, levels: vec![7, 8, 9, 10, 11], width: 768, source };
/// match target.teacher() {
///     Some(name) => assert!(!name.is_empty()),
///     None => assert_eq!(target.levels, [0], "a target of images"),
/// }
/// # }
/// ```
pub struct PlannedTarget {
    /// Outputs: one a level, or one where levels are combined.
    pub outputs: usize,
    /// Depth of the tower that the levels belong to: alignments keep one head for each level of it.
    pub depth: usize,
    /// The levels that it lists, in order; those of a target of images are `[0]`.
    pub levels: Vec<usize>,
    /// Channels.
    pub width: usize,
    /// What it is computed from.
    pub source: TargetSource,
}

/// What a target is computed from.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// A target of a teacher's last states, as they are.
/// fn of(name: &str, target: Box<dyn TeacherTarget>) -> TargetSource {
///     TargetSource::Teacher { name: name.to_string(), tap: Tap::Norm, whole: false, target }
/// }
/// ```
pub enum TargetSource {
    /// The images alone.
    Images(Box<dyn ImageTarget>),
    /// A teacher's hidden states.
    Teacher {
        /// The teacher's name.
        name: String,
        /// Where the teacher is read.
        tap: Tap,
        /// Whether every token is needed, not only those compared.
        whole: bool,
        /// The target.
        target: Box<dyn TeacherTarget>,
    },
    /// The last block of a teacher that follows the student, through a moving average of the objective's own alignment.
    MovingHead {
        /// The teacher's name.
        name: String,
        /// Where the teacher is read.
        tap: Tap,
        /// What becomes of the outputs.
        sharpening: Sharpening,
    },
}

impl PlannedTarget {
    /// The teacher that it reads.
    pub fn teacher(&self) -> Option<&str> {
        match &self.source {
            TargetSource::Images(_) => None,
            TargetSource::Teacher { name, .. } | TargetSource::MovingHead { name, .. } => Some(name),
        }
    }

    /// The relations that it is of, where it is of relations.
    pub fn relations(&self) -> Option<&Relations> {
        match &self.source {
            TargetSource::Images(_) | TargetSource::MovingHead { .. } => None,
            TargetSource::Teacher { target, .. } => target.relations(),
        }
    }
}

/// What every target is computed from.
///
/// ```
/// # use maskalign_core::prelude::*;
/// let images = ImageBatch { pixels: vec![0.5; 3 * 8 * 8], batch: 1, size: 8 };
/// let masks = Masks::even(1, vec![2], vec![0, 3]);
/// let tokens = Tokens { masked: true, ..Tokens::default() };
/// let input = TargetInput { images: &images, masks: &masks, tokens };
/// assert_eq!(input.masks.rows(input.tokens, true), [1, 4], "behind the class token of a tower that sees all patches");
/// ```
pub struct TargetInput<'a> {
    /// The images.
    pub images: &'a ImageBatch,
    /// The masks.
    pub masks: &'a Masks,
    /// The tokens of the objective.
    pub tokens: Tokens,
}

/// A target that is computed from the images.
///
/// ```
/// # use maskalign_core::{Device, prelude::*};
/// struct Index;
///
/// /// Each patch's own number.
/// impl ImageTarget for Index {
///     fn outputs(&self, cx: &Context, input: &TargetInput) -> Result<Vec<Tensor>> {
///         let rows = input.masks.rows(input.tokens, false);
///         let values: Vec<f32> = rows.iter().map(|&patch| patch as f32).collect();
///         Ok(vec![cx.tensor(values, rows.len(), 1)?])
///     }
/// }
/// # let cx = Context::new(Device::Cpu, 1);
///
/// let images = ImageBatch { pixels: vec![0.5; 3 * 8 * 8], batch: 1, size: 8 };
/// let masks = Masks::even(1, vec![2], vec![0, 3]);
/// let input = TargetInput { images: &images, masks: &masks, tokens: Tokens { masked: true, ..Tokens::default() } };
/// assert_eq!(Index.outputs(&cx, &input)?[0].to_vec(), [0.0, 3.0]);
/// # Ok::<(), Error>(())
/// ```
pub trait ImageTarget: Send + Sync {
    /// The targets, one matrix `[batch * tokens, width]` an output; the rows of an image are its class token, visible and
    /// masked patches, as far as [`TargetInput::tokens`] has them.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn outputs(&self, cx: &Context, input: &TargetInput) -> Result<Vec<Tensor>>;
}

/// A target that is computed from a teacher's hidden states.
///
/// ```
/// # use maskalign_core::prelude::*;
/// struct Levels;
///
/// /// The states of the teacher, where it computed those tokens alone that are compared.
/// impl TeacherTarget for Levels {
///     fn outputs(
///         &self,
///         cx: &Context,
///         input: &TargetInput,
///         teacher: &dyn TeacherModel,
///         levels: &[&Level],
///     ) -> Result<Vec<Tensor>> {
///         let off = &mut Tape::inference();
///         let gather = |level: &&Level| match level.only.and_then(|held| input.masks.within(input.tokens, held)) {
///             Some(rows) => ops::gather_rows(cx, off, &[&level.x], &rows),
///             None => Ok(level.x.clone()),
///         };
///         let rows: Vec<Tensor> = levels.iter().map(gather).collect::<Result<_>>()?;
///         rows.iter().map(|x| teacher.tap(cx, x, Tap::Norm)).collect()
///     }
/// }
/// ```
pub trait TeacherTarget: Send + Sync {
    /// The relations of tokens that it gives in place of tokens' channels. Its `levels` are then queries, keys and values of
    /// the blocks that it lists, `[batch * tokens, 3 * dim]` of all tokens, and outputs have a row for each token and head:
    /// `[batch * tokens * heads, tokens]`.
    fn relations(&self) -> Option<&Relations> {
        None
    }
    /// The targets as [`ImageTarget::outputs`] gives them, from the teacher's `levels` in the order of the plan; levels
    /// that no loss compares are left out of them and of the outputs.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn outputs(
        &self,
        cx: &Context,
        input: &TargetInput,
        teacher: &dyn TeacherModel,
        levels: &[&Level],
    ) -> Result<Vec<Tensor>>;
}

/// How targets are normalised, before tokens are gathered.
///
/// ```
/// # use maskalign_core::{Device, prelude::*};
/// # let cx = Context::new(Device::Cpu, 1);
/// let x = cx.tensor(vec![3.0, 4.0], 1, 2)?;
/// assert_eq!(Normalize::L2.apply(&cx, &x)?.to_vec(), [0.6, 0.8]);
/// assert!(Normalize::StandardizeBatch.needs_every_token());
/// # Ok::<(), Error>(())
/// ```
#[component]
#[derive(Copy, Default, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Normalize {
    /// Not at all.
    #[default]
    None,
    /// To length 1, each token (eps 1e-12).
    L2,
    /// LayerNorm without affine parameters, each token: biased variance, eps 1e-5.
    Whiten,
    /// Each token by its mean and unbiased variance, eps 1e-6 (MAE's `norm_pix_loss`).
    Standardize,
    /// All tokens of the micro-batch by one mean and one unbiased variance, eps 1e-6 (the official `bn`): accumulated
    /// micro-batches are not quite one batch then.
    StandardizeBatch,
}

impl Normalize {
    /// Whether a token's value depends on all the others: nothing may be left out before it is applied.
    pub fn needs_every_token(self) -> bool {
        self == Normalize::StandardizeBatch
    }

    /// The normalised values, `[rows, channels]`.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn apply(self, cx: &Context, x: &Tensor) -> Result<Tensor> {
        match self {
            Normalize::None => Ok(x.clone()),
            Normalize::Whiten => Norm::plain(1e-5).forward(cx, &mut Tape::inference(), x),
            Normalize::L2 => ops::standardize(cx, x, Standardize::Length),
            Normalize::Standardize => ops::standardize(cx, x, Standardize::Rows),
            Normalize::StandardizeBatch => ops::standardize(cx, x, Standardize::All),
        }
    }
}
