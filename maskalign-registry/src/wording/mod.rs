//! The building blocks of messages: quoted text, lists, articles, numbers, and suggestions by spelling.

mod phrases;
mod spelling;

pub(crate) use phrases::{list, quoted, visible, with_article};
pub use phrases::{number, visible_lines};
pub(crate) use spelling::distance;
pub use spelling::nearest;
