//! What is said of a stage when it starts.

use serde::Serialize;

use crate::{components::towers::StudentPlan, nn::Role};

/// What is known of a stage before its first step.
///
/// ```
/// # use maskalign_core::prelude::*;
/// let mut summary = StageSummary { epochs: Some(20.0), ..StageSummary::default() };
/// summary.warnings.push("3 images were left out".into());
/// assert_eq!(summary.steps, None);
/// ```
#[derive(Clone, Default, Serialize)]
pub struct StageSummary {
    /// Images of the data, where they may be looked at.
    pub images: Option<usize>,
    /// Parameters of the models: all, and those an optimizer updates.
    pub parameters: usize,
    /// Parameters that are trained.
    pub trainable: usize,
    /// Tokens of an image that the student sees, the class token included, and all it could see.
    pub tokens: Option<(usize, usize)>,
    /// Epochs.
    pub epochs: Option<f64>,
    /// Optimizer steps.
    pub steps: Option<u64>,
    /// Estimated peak memory in bytes.
    pub memory: u64,
    /// What is no mistake, but may not be meant: a sentence each.
    pub warnings: Vec<String>,
    /// The data that is read: what for, how many images, and the fingerprint of the list.
    #[serde(skip)]
    pub data: Vec<(String, usize, String)>,
    /// The student that the stage leaves.
    #[serde(skip)]
    pub student: Option<StudentPlan>,
    /// What its checkpoints hold of the models.
    #[serde(skip)]
    pub saved: Vec<SavedParameter>,
}

/// A parameter that checkpoints hold.
#[derive(Clone, Debug)]
pub struct SavedParameter {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub dims: Vec<usize>,
    /// Whose it is.
    pub role: Role,
    /// Whether an optimizer updates it: positions may be fixed.
    pub is_trained: bool,
}

impl std::fmt::Debug for StageSummary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StageSummary").field("images", &self.images).field("steps", &self.steps).finish_non_exhaustive()
    }
}
