//! The building blocks of messages: quoted text, lists, articles, numbers, and suggestions by spelling.

mod phrases;
mod spelling;

pub use phrases::number;
pub(crate) use phrases::{list, quoted, visible, visible_lines, with_article};
pub(crate) use spelling::distance;
pub use spelling::nearest;
