//! What a plugin is and what a recipe is: kinds, entries, composition, decoding, schema and
//! diagnostics. No tensors, no command line, no printing.

mod compose;
mod decode;
pub mod diagnostic;
pub mod plugin;
mod recipe;
mod refusal;
mod schema;
mod slot;
pub mod source;
mod values;

pub use compose::{Input, LoadRequest, NoRecipes, RecipeSource};
pub use diagnostic::{Diagnostic, Label, Place, Report};
pub use plugin::{
    AlignerTag, DatasetTag, DuplicatePlugin, Entry, Kind, KindTag, LossTag, MaskerTag, OptimizerTag, OptionDoc,
    Options, Registry, ScheduleTag, StageTag, StudentTag, TargetTag, TeacherTag, TransformTag, decode_options,
};
pub use recipe::{Loaded, Recipe, ShowOrigin, diff, fingerprint};
pub use refusal::{Refusal, Related};
pub use schema::{Schemas, recipe_schema};
pub use slot::Slot;
pub use source::Origin;
pub use values::{LevelIndex, LevelRef, Levels, Scalar, Shape, Weights};
