//! The crate's source: one program for all.

mod layers;
