//! The table of kinds, expanded: what the components of each kind become, and [`register!`](crate::register).
//!
//! A kind is a row of `maskalign_registry::for_each_kind` and a trait of that name among [`traits`].

use std::any::Any;

use maskalign_registry::{Kind, Refusal, decode_options, for_each_kind};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::plugin::{Component, Constructor};

/// The trait of each kind, under the kind's name.
pub mod traits {
    pub use crate::{
        components::{
            aligners::Aligner, losses::Loss, maskers::Masker, optimizers::Optimizer, schedules::Schedule,
            students::Student, targets::Target, teachers::Teacher,
        },
        data::{Dataset, Transform},
        stages::Stage,
    };
}

macro_rules! kinds {
    ($($kind:ident $name:ident $tag:ident $plural:literal $description:literal;)*) => {
        $(
            impl Component for maskalign_registry::$tag {
                type Object = dyn traits::$kind;
            }
        )*

        /// The constructors of components, by the name of their kind, for [`register!`](crate::register).
        pub mod constructors {
            use super::*;
            $(
                #[doc = concat!("Of a ", stringify!($name), ".")]
                pub const fn $name<P>() -> Constructor<maskalign_registry::$tag>
                where
                    P: traits::$kind + DeserializeOwned + 'static,
                {
                    fn construct<P: traits::$kind + DeserializeOwned + 'static>(
                        options: Value,
                    ) -> Result<Box<dyn traits::$kind>, Refusal> {
                        Ok(Box::new(decode_options::<P>(options)?))
                    }
                    Constructor(construct::<P>)
                }
            )*
        }

        /// Checks that an entry was made by [`register!`](crate::register) of this crate's version: its constructor has
        /// the type that this crate calls.
        pub fn is_constructible(kind: Kind, vtable: &(dyn Any + Send + Sync)) -> bool {
            match kind {
                $(Kind::$kind => vtable.is::<Constructor<maskalign_registry::$tag>>(),)*
            }
        }
    };
}
for_each_kind!(kinds);

/// Registers a component: `register!(masker "lattice" => Lattice, "keeps one patch of every square",
/// example: "{ type: lattice, cell: 2 }", paper: "arXiv ...", sidecar: beside);`. `paper` may be left out, and so may
/// `sidecar`: a function that reads what stands beside the files that the options name, such as the `config.json` of weights
/// (see [`Beside`](crate::components::beside::Beside)).
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// Twice a constant loss.
/// #[component]
/// struct Twice {}
///
/// impl Loss for Twice {
///     fn term(&self, cx: &Context, tape: &mut Tape, prediction: &Tensor, target: &Tensor) -> Result<Tensor> {
///         let once = ops::distance(cx, tape, prediction, target, Distance::L1)?;
///         ops::scale(cx, tape, &once, 2.0)
///     }
/// }
///
/// register!(loss "twice" => Twice, "twice the absolute error", example: "{ type: twice }");
///
/// let registered = maskalign_registry::Registry::global().expect("no name is taken twice");
/// assert!(registered.get(maskalign_registry::Kind::Loss, "twice").is_some());
/// ```
#[macro_export]
macro_rules! register {
    (
        $kind:ident $name:literal => $options:ty, $summary:literal, example: $example:literal
        $(, paper: $paper:literal)? $(, sidecar: $sidecar:path)? $(,)?
    ) => {
        const _: () = {
            type Tag = $crate::__private::tag_named::$kind;
            static CONSTRUCTOR: $crate::plugin::Constructor<Tag> = $crate::kinds::constructors::$kind::<$options>();
            $crate::__private::inventory::submit! {
                $crate::__private::Entry::of::<$options>(
                    <Tag as $crate::__private::KindTag>::KIND, $name, &CONSTRUCTOR,
                )
                .summary($summary)
                .example($example)
                $(.paper($paper))?
                $(.sidecar($sidecar))?
                .package(env!("CARGO_PKG_NAME"))
            }
        };
    };
}
