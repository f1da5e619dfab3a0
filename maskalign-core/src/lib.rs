//! Tensors, models, components and stages of MaskAlign: masked image modelling without reconstruction.
//!
//! A recipe names components; `maskalign-registry` finds them; this crate runs them as stages on dfdx tensors. See
//! ARCHITECTURE.md for the map, and [`prelude`] for what a plugin author imports.

// `#[component]` and `register!` name this crate by its path, here as in a plugin.
extern crate self as maskalign_core;

pub mod chart;
pub mod components;

pub mod data;
pub mod embedded;
pub mod error;
pub mod events;
mod files;
pub mod fork;
pub mod kinds;
pub mod nn;
pub mod pipeline;
pub mod plugin;
pub mod run;
pub mod stages;

pub mod weights;

pub use maskalign_engine::{
    Context, Device, DeviceChoice, Forms, Gradients, ImageBatch, Pool, Recompute, Tape, Tensor, available_memory_mib,
    images::resize_images_bicubic, instruction_sets, keep_freed_memory, ops, random,
};
/// What a component reads from a recipe is a struct with this attribute; what it does is the trait of its kind.
///
/// ```
/// use maskalign_core::prelude::*;
///
/// fn share() -> f32 {
///     0.5
/// }
///
/// /// The absolute error, with a share of the squared error mixed in.
/// #[component]
/// struct Blend {
///     /// Share of the squared error.
///     #[serde(default = "share")]
///     #[schemars(range(min = 0.0, max = 1.0))]
///     squared: f32,
/// }
///
/// let blend: Blend = serde_json::from_str("{}").expect("it has a default");
/// assert_eq!(blend.squared, 0.5);
/// assert!(serde_json::from_str::<Blend>(r#"{ "square": 0.5 }"#).is_err(), "unknown keys are refused");
/// ```
pub use maskalign_macros::component;
pub use maskalign_registry::Refusal;
/// What stages leave as results: numbers by name.
///
/// ```
/// use maskalign_core::prelude::*;
///
/// let results: Value = json!({ "accuracy": 0.5, "images": 64 });
/// assert_eq!(results["images"], 64);
/// ```
pub use serde_json::Value;
/// Makes a [`Value`].
///
/// ```
/// use maskalign_core::prelude::*;
///
/// let outcome = Outcome { results: json!({ "rank": 3.5 }), student: None };
/// assert!(outcome.results["rank"].is_number());
/// ```
pub use serde_json::json;

/// What a plugin author imports: `use maskalign_core::prelude::*;`.
pub mod prelude {
    pub use crate::{
        Value,
        components::{
            aligners::{AlignInput, AlignNeeds, AlignPlan, Aligner, AlignerModel, PlannedAligner},
            beside::Beside,
            losses::Loss,
            maskers::{Counts, Mask, MaskInput, Masker, PlannedMasker, counts, split},
            optimizers::{Optimizer, Update},
            relations::{Relation, Relations},
            schedules::Schedule,
            students::{PlannedStudent, Student, StudentModel},
            targets::{
                ImageTarget, Normalize, PlannedTarget, Target, TargetContext, TargetInput, TargetSource, TeacherTarget,
            },
            teachers::{Level, Pass, PlannedTeacher, Teacher, TeacherBuild, TeacherModel, TowerTeacher, Wants},
            tokens::{Masks, TokenKind, Tokens},
            towers::{
                Environment, MissingWeights, PlanContext, PlannedTower, StudentPlan, Tap, TowerOptions, TowerShape,
                TrainedStudents, input, timm_config,
            },
        },
        data::{DataError, Dataset, Images, Position, RgbImage, Transform},
        error::Error,
        events::{Event, Events, Mark, Sink},
        json,
        nn::{
            Arch, BatchNorm, Bias, BranchScales, Features, Grid, Init, Linear, MaskedPatches, Module, Norm, Param,
            Reach, SeenPatches, Statistics, Vit, VitConfig,
        },
        register, register_naming,
        stages::{
            Bank, Classify, Data, FeatureTap, ImageView, Loop, MicroBatch, OpenData, Outcome, PlannedClasses,
            PlannedClassifier, PlannedData, PlannedJudge, PlannedStage, PlannedTraining, Pooling, Stage, StageContext,
            StageRun, StageSummary, Task, Tower, Training, View, accuracy, class_targets, count_parameters, extract,
            finish, image_batch, keep, train,
        },
        weights::Family,
    };
    pub use maskalign_engine::{
        Context, Gradients, ImageBatch, Recompute, Result, Role, Tape, Tensor,
        ops::{self, Act, AttentionShape, Distance},
        random::Stream,
    };
    pub use maskalign_macros::component;
    pub use maskalign_registry::{LevelRef, Levels, Refusal, Scalar as Ramp, Weights, plugin::sidecar::Sidecar};
}

/// What the macros expand to; not for use by hand.
#[doc(hidden)]
pub mod __private {
    pub use inventory;
    pub use maskalign_registry::{Entry, KindTag, tag_named};
    pub use schemars;
    pub use serde;
}
