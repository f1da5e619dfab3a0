//! Decoding options into a component's struct, with the path of what failed.

use std::cell::RefCell;

use serde::de::{DeserializeOwned, Error};
use serde_json::Value;
use serde_path_to_error::Segment;

use super::Refusal;

thread_local! {
    /// Where decoding stopped inside a part that was decoded separately. serde's errors carry only a message, and the
    /// path that is tracked around the part ends there.
    static INSIDE_PART: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// Decodes a component's options into its struct; the refusal names the option at fault.
///
/// # Errors
/// A [`Refusal`] whose path is where decoding stopped.
pub fn decode_options<T: DeserializeOwned>(options: Value) -> Result<T, Refusal> {
    INSIDE_PART.take();
    serde_path_to_error::deserialize(options).map_err(|error| {
        let around = error.path().iter().filter_map(|segment| match segment {
            Segment::Seq { index } => Some(index.to_string()),
            Segment::Map { key } => Some(key.clone()),
            Segment::Enum { variant } => Some(variant.clone()),
            Segment::Unknown => None,
        });
        let mut refusal = Refusal::whole(error.inner().to_string());
        refusal.path = around.chain(INSIDE_PART.take()).collect();
        refusal
    })
}

/// Decodes part of the options inside a `Deserialize`. If that fails, the surrounding [`decode_options`] adds the path
/// inside the part to its own.
pub(crate) fn decode_part<T: DeserializeOwned, E: Error>(options: Value) -> Result<T, E> {
    decode_options(options).map_err(|refusal| {
        INSIDE_PART.replace(refusal.path);
        E::custom(refusal.message)
    })
}
