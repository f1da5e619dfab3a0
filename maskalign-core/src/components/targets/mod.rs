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
    plugin::kind,
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

/// What a target answers.
#[derive(Clone, Debug)]
pub struct TargetPlan {
    /// The teacher it reads.
    pub teacher: Option<String>,
    /// Blocks of the teacher that it reads, in the order of its outputs.
    pub levels: Vec<usize>,
    /// Outputs: one per level, or one where levels are combined.
    pub outputs: usize,
    /// Depth of the tower that the levels belong to: alignments keep one head per level of it.
    pub depth: usize,
    /// Channels.
    pub width: usize,
    /// Where the teacher is read.
    pub tap: Tap,
    /// Whether every token is needed, not only those compared.
    pub whole: bool,
}

/// What a target is computed from.
pub struct TargetInput<'a> {
    /// The images.
    pub images: &'a ImageBatch,
    /// The masks.
    pub masks: &'a Masks,
    /// The tokens of the objective.
    pub tokens: Tokens,
    /// The student, whose statistics and patches pixels are given in.
    pub student: TowerShape,
    /// The teacher's levels, and the teacher, where the plan names one.
    pub teacher: Option<(&'a BTreeMap<usize, Level>, &'a dyn TeacherModel)>,
}

/// A target.
pub trait Target: Send + Sync {
    /// What it needs and gives.
    ///
    /// # Errors
    /// Names the option that does not fit.
    fn plan(&self, cx: &TargetContext) -> Result<TargetPlan, Refusal>;
    /// The targets, one matrix `[batch * tokens, width]` per output; the rows of an image are its class token, visible
    /// and masked patches, as far as [`TargetInput::tokens`] has them.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn outputs(&self, cx: &Context, plan: &TargetPlan, input: &TargetInput) -> Result<Vec<Tensor>>;
}

kind!(TargetTag, Target, target);

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
