//! The `#[component]` attribute.
//!
//! A plugin's options struct needs four derives whose crate paths all point through `maskalign_core`, so that a
//! plugin crate depends on nothing else. `macro_rules` cannot be an attribute, hence this crate of one macro.

use proc_macro::TokenStream;

/// Makes a struct (or an enum used inside one) the options of a component: clonable, decodable from a recipe with
/// unknown keys refused, printable with its defaults, and described in the schema.
///
/// Doc comments of the fields become the descriptions that `maskalign explain` and editors show; defaults are given
/// by `#[serde(default = "...")]`, ranges by `#[schemars(range(min = .., max = ..))]`.
#[proc_macro_attribute]
pub fn component(_: TokenStream, item: TokenStream) -> TokenStream {
    let derives = "#[derive(\
            ::std::clone::Clone, ::std::fmt::Debug, \
            ::maskalign_core::__private::serde::Serialize, \
            ::maskalign_core::__private::serde::Deserialize, \
            ::maskalign_core::__private::schemars::JsonSchema)]\
        #[serde(crate = \"::maskalign_core::__private::serde\", deny_unknown_fields)]\
        #[schemars(crate = \"::maskalign_core::__private::schemars\")]";
    let mut out: TokenStream = derives.parse().expect("the attribute text is fixed and valid");
    out.extend(item);
    out
}
