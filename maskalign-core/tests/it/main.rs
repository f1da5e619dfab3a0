//! Models and weights against oracles from outside: one binary, so that it is linked once.

mod data2vec;
mod decoder;
mod dinov2;
mod layers;
mod linear_probe;
mod support;
mod timm;
mod weights;
