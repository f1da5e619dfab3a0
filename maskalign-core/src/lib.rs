//! Tensors, models, components and stages of MaskAlign: masked image modelling without reconstruction.
//!
//! A recipe names components; `maskalign-registry` finds them; this crate runs them as stages on dfdx tensors. See
//! ARCHITECTURE.md for the map, and [`prelude`] for what a plugin author imports.

// `#[component]` and `register!` name this crate by its path, here as in a plugin.
extern crate self as maskalign_core;

pub mod bench;
pub mod components;
pub mod conformance;
pub mod data;
pub mod embedded;
pub mod error;
pub mod nn;
pub mod pipeline;
pub mod plugin;
pub mod run;
pub mod stages;
pub mod verify;
pub mod weights;

pub use maskalign_engine::{
    Context, Device, DeviceChoice, Forms, Gradients, ImageBatch, Pool, Recompute, Tape, Tensor,
    images::resize_images_bicubic, keep_freed_memory, ops, random,
};
pub use maskalign_macros::component;
pub use maskalign_registry::Refusal;

/// What a plugin author imports: `use maskalign_core::prelude::*;`.
pub mod prelude {
    pub use crate::{
        components::{
            aligners::{AlignInput, AlignNeeds, AlignPlan, Aligner, AlignerModel},
            losses::Loss,
            maskers::{Counts, Mask, MaskInput, Masker},
            optimizers::{Optimizer, Update},
            schedules::Schedule,
            students::{Student, StudentModel},
            targets::{Target, TargetContext, TargetInput, TargetPlan},
            teachers::{Level, Pass, Teacher, TeacherModel, TowerTeacher, Wants},
            tokens::{Masks, TokenKind, Tokens},
            towers::{PlanContext, Tap, TowerShape},
        },
        data::{DataError, Dataset, Images, RgbImage, Transform},
        error::Error,
        nn::{
            Arch, Bias, BranchScales, Features, Grid, Init, Linear, Module, Norm, Param, Reach, Statistics, Vit,
            VitConfig,
        },
        register,
        stages::{Outcome, Stage, StageContext, StagePlan, StageRun},
        weights::Family,
    };
    pub use maskalign_engine::{
        Context, Gradients, ImageBatch, Recompute, Result, Role, Tape, Tensor,
        ops::{self, Act, AttentionShape, Distance},
        random::Stream,
    };
    pub use maskalign_macros::component;
    pub use maskalign_registry::{LevelRef, Levels, Refusal, Scalar as Ramp, Weights};
}

/// What the macros expand to; not for use by hand.
#[doc(hidden)]
pub mod __private {
    pub use inventory;
    pub use maskalign_registry::{
        AlignerTag, DatasetTag, Entry, Kind, LossTag, MaskerTag, OptimizerTag, ScheduleTag, StageTag, StudentTag,
        TargetTag, TeacherTag, TransformTag,
    };
    pub use schemars;
    pub use serde;
}
