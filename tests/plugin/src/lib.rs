//! A masker, a loss, an aligner, a dataset, a teacher and a naming of weights for MaskAlign, one file each.

mod bars;
mod blend;
mod lattice;
mod naming;
mod pointwise;
mod tower;
