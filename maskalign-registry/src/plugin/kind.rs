//! The closed set of places in a recipe that a plugin can fill.

use std::fmt;

/// Calls a macro with the table of kinds. A row is the variant of [`Kind`], the name in recipes, the tag, the plural,
/// and what components of the kind do. The crate that defines the kinds' traits expands it too, so that a new kind is
/// one row here and one trait there.
#[doc(hidden)]
#[macro_export]
macro_rules! for_each_kind {
    ($callback:ident) => {
        $callback! {
            Stage stage StageTag "stages" "A step of the recipe: trains or evaluates.";
            Dataset dataset DatasetTag "datasets" "Where the images come from; yields RGB in [0, 1].";
            Transform transform TransformTag "transforms" "A change made to one image before it becomes a tensor.";
            Teacher teacher TeacherTag "teachers" "A tower that sees the whole image and is not trained by gradients.";
            Student student StudentTag "students" "The tower that is trained.";
            Masker masker MaskerTag "maskers" "Chooses the patches that the student sees.";
            Target target TargetTag "targets" "What the student is to match.";
            Aligner aligner AlignerTag "aligners" "Maps the student's outputs to the shape of the target.";
            Loss loss LossTag "losses" "The distance between an aligned output and its target.";
            Optimizer optimizer OptimizerTag "optimizers" "The rule that updates the parameters.";
            Schedule schedule ScheduleTag "schedules" "The learning rate over time.";
        }
    };
}

macro_rules! kinds {
    ($($kind:ident $name:ident $tag:ident $plural:literal $description:literal;)*) => {
        /// The closed set of places in a recipe that a plugin can fill.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Kind {
            $(#[doc = $description] $kind,)*
        }

        impl Kind {
            /// Every kind, in the order in which lists show them.
            pub const ALL: [Kind; [$(Kind::$kind),*].len()] = [$(Kind::$kind),*];

            /// The kind's name in addresses such as `masker.attention`.
            pub const fn name(self) -> &'static str {
                match self { $(Kind::$kind => stringify!($name),)* }
            }

            /// The plural of [`Kind::name`], for headings and folder names.
            pub const fn plural(self) -> &'static str {
                match self { $(Kind::$kind => $plural,)* }
            }

            /// One sentence that says what components of this kind do.
            pub const fn description(self) -> &'static str {
                match self { $(Kind::$kind => $description,)* }
            }
        }

        /// A type for each kind.
        pub mod tags {
            use super::{Kind, KindTag};
            $(
                #[doc = concat!("Stands for [`Kind::", stringify!($kind), "`], as in `Slot<", stringify!($tag), ">`.")]
                #[derive(Clone, Copy, Debug, PartialEq, Eq)]
                pub struct $tag;

                impl KindTag for $tag {
                    const KIND: Kind = Kind::$kind;
                }
            )*
        }

        /// The tags by the names in recipes, so that a macro that is given `masker` finds `MaskerTag`.
        #[doc(hidden)]
        #[allow(non_camel_case_types, reason = "a macro is given these names")]
        pub mod tag_named {
            $(pub type $name = super::tags::$tag;)*
        }
    };
}
for_each_kind!(kinds);

impl Kind {
    /// The kind of that name, if there is one.
    pub fn from_name(name: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Ties a zero-sized type to a [`Kind`], so that `Slot<MaskerTag>` says what it holds.
pub trait KindTag: 'static {
    /// The kind that the tag stands for.
    const KIND: Kind;
}
