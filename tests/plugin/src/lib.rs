//! A masker, a loss, an aligner and a dataset for MaskAlign, one file each.

mod bars;
mod blend;
mod lattice;
mod pointwise;
