//! The closed set of places in a recipe that a plugin can fill.

use std::fmt;

/// The closed set of places in a recipe that a plugin can fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A step of a recipe, such as pre-training or an evaluation.
    Stage,
    /// A source of images.
    Dataset,
    /// A change made to one image on the host.
    Transform,
    /// A tower that gives targets and is not trained by gradients.
    Teacher,
    /// The tower being trained.
    Student,
    /// The choice of the patches that the student sees.
    Masker,
    /// What the student is to match.
    Target,
    /// The map from the student's outputs to the target's shape.
    Aligner,
    /// The distance between an aligned output and its target.
    Loss,
    /// The rule that updates parameters.
    Optimizer,
    /// The learning rate over time.
    Schedule,
}

impl Kind {
    /// Every kind, in the order in which lists show them.
    pub const ALL: [Kind; 11] = [
        Kind::Stage,
        Kind::Dataset,
        Kind::Transform,
        Kind::Teacher,
        Kind::Student,
        Kind::Masker,
        Kind::Target,
        Kind::Aligner,
        Kind::Loss,
        Kind::Optimizer,
        Kind::Schedule,
    ];

    /// The kind's name in addresses such as `masker.attention`.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Stage => "stage",
            Kind::Dataset => "dataset",
            Kind::Transform => "transform",
            Kind::Teacher => "teacher",
            Kind::Student => "student",
            Kind::Masker => "masker",
            Kind::Target => "target",
            Kind::Aligner => "aligner",
            Kind::Loss => "loss",
            Kind::Optimizer => "optimizer",
            Kind::Schedule => "schedule",
        }
    }

    /// The plural of [`Kind::name`], for headings and folder names.
    pub const fn plural(self) -> &'static str {
        match self {
            Kind::Stage => "stages",
            Kind::Dataset => "datasets",
            Kind::Transform => "transforms",
            Kind::Teacher => "teachers",
            Kind::Student => "students",
            Kind::Masker => "maskers",
            Kind::Target => "targets",
            Kind::Aligner => "aligners",
            Kind::Loss => "losses",
            Kind::Optimizer => "optimizers",
            Kind::Schedule => "schedules",
        }
    }

    /// One sentence that says what components of this kind do.
    pub const fn description(self) -> &'static str {
        match self {
            Kind::Stage => "A step of the recipe: trains or evaluates.",
            Kind::Dataset => "Where the images come from; yields RGB in [0, 1].",
            Kind::Transform => "A change made to one image before it becomes a tensor.",
            Kind::Teacher => "A tower that sees the whole image and is not trained by gradients.",
            Kind::Student => "The tower that is trained.",
            Kind::Masker => "Chooses the patches that the student sees.",
            Kind::Target => "What the student is to match.",
            Kind::Aligner => "Maps the student's outputs to the shape of the target.",
            Kind::Loss => "The distance between an aligned output and its target.",
            Kind::Optimizer => "The rule that updates the parameters.",
            Kind::Schedule => "The learning rate over time.",
        }
    }

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

macro_rules! tags {
    ($($tag:ident => $kind:ident),* $(,)?) => {$(
        #[doc = concat!("Stands for [`Kind::", stringify!($kind), "`], as in `Slot<", stringify!($tag), ">`.")]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $tag;
        impl KindTag for $tag {
            const KIND: Kind = Kind::$kind;
        }
    )*};
}

tags! {
    StageTag => Stage,
    DatasetTag => Dataset,
    TransformTag => Transform,
    TeacherTag => Teacher,
    StudentTag => Student,
    MaskerTag => Masker,
    TargetTag => Target,
    AlignerTag => Aligner,
    LossTag => Loss,
    OptimizerTag => Optimizer,
    ScheduleTag => Schedule,
}
