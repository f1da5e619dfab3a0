//! Tensors, models, components and stages of MaskAlign: masked image modelling without reconstruction.
//!
//! A recipe names components; `maskalign-registry` finds them; this crate runs them as stages on dfdx tensors. See
//! ARCHITECTURE.md for the map, and [`prelude`] for what a plugin author imports.

// `#[component]` and `register!` name this crate by its path, here as in a plugin.
extern crate self as maskalign_core;

pub mod bench;
pub mod components;
pub mod conformance;
pub mod context;
pub mod data;
pub mod device;
pub mod embedded;
pub mod error;
pub mod images;
pub mod kernels;
pub mod nn;
pub mod pipeline;
pub mod plugin;
pub mod random;
pub mod run;
pub mod stages;
pub mod tape;
pub mod verify;
pub mod weights;

pub use maskalign_kernels::keep_freed_memory;
pub use maskalign_macros::component;
pub use maskalign_registry::Refusal;

/// What a plugin author imports: `use maskalign_core::prelude::*;`.
pub mod prelude {
    pub use crate::{
        components::{
            aligners::{AlignInput, AlignNeeds, AlignPlan, Aligner, AlignerPlugin},
            losses::LossPlugin,
            maskers::{Counts, Mask, MaskInput, Masker},
            optimizers::{OptimizerPlugin, Update},
            schedules::Schedule,
            students::{Student, StudentPlugin},
            targets::{TargetContext, TargetInput, TargetPlan, TargetPlugin},
            teachers::{Level, Pass, Teacher, TeacherPlugin, TowerTeacher, Wants},
            tokens::{Masks, TokenKind, Tokens},
            towers::{PlanContext, Tap, TowerShape},
        },
        context::Context,
        data::{DataError, Dataset, Images, RgbImage, Transform},
        device::{Dev, Matrix, Scalar, Vector},
        error::{Error, Result},
        images::ImageBatch,
        kernels::{Act, AttentionShape, Distance},
        nn::{
            Arch, Bias, BranchScales, Features, Grid, Init, Linear, Module, Norm, Param, Reach, Statistics, Vit,
            VitConfig,
        },
        random::Stream,
        register,
        stages::{Outcome, StageContext, StagePlan, StagePlugin, StageRun},
        tape::Recorder,
        weights::Family,
    };
    pub use dfdx::prelude::Gradients;
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
