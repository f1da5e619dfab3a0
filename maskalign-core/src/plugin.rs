//! From a slot of a recipe to a component: the constructors that the registry stores without knowing them.

use std::any::Any;

use maskalign_registry::{Kind, KindTag, Refusal, Registry, Slot};
use serde_json::Value;

/// A kind of plugin and the trait object that its components become.
pub trait Component: KindTag + Sized {
    /// What a decoded component is.
    type Object: ?Sized;
}

/// The constructor of a component: options of the recipe to the component.
pub struct Constructor<K: Component>(pub fn(Value) -> Result<Box<K::Object>, Refusal>);

/// Building the component that a slot names.
pub trait Build<K: Component> {
    /// The component.
    ///
    /// # Errors
    /// The component refuses its options, or no component of that name is registered in this binary.
    fn build(&self) -> Result<Box<K::Object>, Refusal>;
}

impl<K: Component> Build<K> for Slot<K> {
    fn build(&self) -> Result<Box<K::Object>, Refusal> {
        let registry = Registry::global().map_err(|e| Refusal::whole(e.to_string()))?;
        let entry = registry
            .get(K::KIND, &self.name)
            .ok_or_else(|| Refusal::new("type", format!("no {} is named `{}`", K::KIND, self.name)))?;
        let Constructor::<K>(construct) =
            entry.vtable.downcast_ref().expect("register! pairs every kind with its own constructor");
        construct(self.options_value())
    }
}

/// Checks that an entry was made by [`register!`](crate::register) of this crate's version: its constructor has the type
/// that this crate calls.
pub fn is_constructible(kind: Kind, vtable: &(dyn Any + Send + Sync)) -> bool {
    macro_rules! any {
        ($($kind:ident => $tag:ident),*) => {
            match kind { $(Kind::$kind => vtable.is::<Constructor<maskalign_registry::$tag>>(),)* }
        };
    }
    any!(
        Stage => StageTag, Dataset => DatasetTag, Transform => TransformTag, Teacher => TeacherTag,
        Student => StudentTag, Masker => MaskerTag, Target => TargetTag, Aligner => AlignerTag,
        Loss => LossTag, Optimizer => OptimizerTag, Schedule => ScheduleTag
    )
}

/// Defines what the components of a kind become: objects of one trait.
macro_rules! kind {
    ($tag:ident, $trait:path, $construct:ident) => {
        impl $crate::plugin::Component for maskalign_registry::$tag {
            type Object = dyn $trait;
        }
        /// The constructor of a component of this kind, for [`register!`](crate::register).
        pub const fn $construct<P>() -> $crate::plugin::Constructor<maskalign_registry::$tag>
        where
            P: $trait + serde::de::DeserializeOwned + 'static,
        {
            fn construct<P: $trait + serde::de::DeserializeOwned + 'static>(
                options: serde_json::Value,
            ) -> Result<Box<dyn $trait>, maskalign_registry::Refusal> {
                Ok(Box::new(maskalign_registry::decode_options::<P>(options)?))
            }
            $crate::plugin::Constructor(construct::<P>)
        }
    };
}
pub(crate) use kind;

/// Registers a component: `register!(masker "lattice" => Lattice, "keeps one patch of every square",
/// example: "{ type: lattice, cell: 2 }", paper: "arXiv ...");` (`paper` may be left out).
#[macro_export]
macro_rules! register {
    ($kind:ident $name:literal => $options:ty, $summary:literal, example: $example:literal $(,)?) => {
        $crate::register!($kind $name => $options, $summary, example: $example, paper: "");
    };
    ($kind:ident $name:literal => $options:ty, $summary:literal, example: $example:literal, paper: $paper:literal $(,)?) => {
        const _: () = {
            static CONSTRUCTOR: $crate::register!(@type $kind) = $crate::register!(@of $kind $options);
            $crate::__private::inventory::submit! {
                $crate::__private::Entry::of::<$options>($crate::register!(@kind $kind), $name, &CONSTRUCTOR)
                    .summary($summary)
                    .example($example)
                    .paper($paper)
                    .package(env!("CARGO_PKG_NAME"))
            }
        };
    };
    (@type stage) => { $crate::plugin::Constructor<$crate::__private::StageTag> };
    (@type dataset) => { $crate::plugin::Constructor<$crate::__private::DatasetTag> };
    (@type transform) => { $crate::plugin::Constructor<$crate::__private::TransformTag> };
    (@type teacher) => { $crate::plugin::Constructor<$crate::__private::TeacherTag> };
    (@type student) => { $crate::plugin::Constructor<$crate::__private::StudentTag> };
    (@type masker) => { $crate::plugin::Constructor<$crate::__private::MaskerTag> };
    (@type target) => { $crate::plugin::Constructor<$crate::__private::TargetTag> };
    (@type aligner) => { $crate::plugin::Constructor<$crate::__private::AlignerTag> };
    (@type loss) => { $crate::plugin::Constructor<$crate::__private::LossTag> };
    (@type optimizer) => { $crate::plugin::Constructor<$crate::__private::OptimizerTag> };
    (@type schedule) => { $crate::plugin::Constructor<$crate::__private::ScheduleTag> };
    (@of stage $options:ty) => { $crate::stages::stage::<$options>() };
    (@of dataset $options:ty) => { $crate::components::dataset::<$options>() };
    (@of transform $options:ty) => { $crate::components::transform::<$options>() };
    (@of teacher $options:ty) => { $crate::components::teachers::teacher::<$options>() };
    (@of student $options:ty) => { $crate::components::students::student::<$options>() };
    (@of masker $options:ty) => { $crate::components::maskers::masker::<$options>() };
    (@of target $options:ty) => { $crate::components::targets::target::<$options>() };
    (@of aligner $options:ty) => { $crate::components::aligners::aligner::<$options>() };
    (@of loss $options:ty) => { $crate::components::losses::loss::<$options>() };
    (@of optimizer $options:ty) => { $crate::components::optimizers::optimizer::<$options>() };
    (@of schedule $options:ty) => { $crate::components::schedules::schedule::<$options>() };
    (@kind stage) => { $crate::__private::Kind::Stage };
    (@kind dataset) => { $crate::__private::Kind::Dataset };
    (@kind transform) => { $crate::__private::Kind::Transform };
    (@kind teacher) => { $crate::__private::Kind::Teacher };
    (@kind student) => { $crate::__private::Kind::Student };
    (@kind masker) => { $crate::__private::Kind::Masker };
    (@kind target) => { $crate::__private::Kind::Target };
    (@kind aligner) => { $crate::__private::Kind::Aligner };
    (@kind loss) => { $crate::__private::Kind::Loss };
    (@kind optimizer) => { $crate::__private::Kind::Optimizer };
    (@kind schedule) => { $crate::__private::Kind::Schedule };
}
