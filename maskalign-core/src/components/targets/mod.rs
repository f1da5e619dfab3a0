//! What the student is to match.

mod features;
mod pixels;

use std::collections::BTreeMap;

use maskalign_engine::{
    Context, ImageBatch, Result, Tape, Tensor,
    ops::{self, Standardize},
};
use maskalign_registry::Refusal;

use crate::{
    component,
    components::{
        teachers::{Level, TeacherModel},
        tokens::{Masks, Tokens},
        towers::{Tap, TowerShape},
    },
    nn::Norm,
};

/// What a target is asked before the first step.
#[derive(Clone, Copy)]
pub struct TargetContext<'a> {
    /// The student.
    pub student: TowerShape,
    /// The teachers, by name.
    pub teachers: &'a BTreeMap<String, TowerShape>,
    /// The tokens of the objective.
    pub tokens: Tokens,
}

/// A target's options.
pub trait Target: Send + Sync {
    /// Checks them, and gives what computes the target.
    ///
    /// # Errors
    /// Names the option that does not fit.
    fn plan(&self, cx: &TargetContext) -> Result<PlannedTarget, Refusal>;
}

/// A target whose options fit: what it gives, and what it is computed from.
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
}

impl PlannedTarget {
    /// The teacher that it reads.
    pub fn teacher(&self) -> Option<&str> {
        match &self.source {
            TargetSource::Images(_) => None,
            TargetSource::Teacher { name, .. } => Some(name),
        }
    }
}

/// What every target is computed from.
pub struct TargetInput<'a> {
    /// The images.
    pub images: &'a ImageBatch,
    /// The masks.
    pub masks: &'a Masks,
    /// The tokens of the objective.
    pub tokens: Tokens,
}

/// A target that is computed from the images.
pub trait ImageTarget: Send + Sync {
    /// The targets, one matrix `[batch * tokens, width]` an output; the rows of an image are its class token, visible and
    /// masked patches, as far as [`TargetInput::tokens`] has them.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn outputs(&self, cx: &Context, input: &TargetInput) -> Result<Vec<Tensor>>;
}

/// A target that is computed from a teacher's hidden states.
pub trait TeacherTarget: Send + Sync {
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
