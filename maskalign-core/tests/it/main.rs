//! Models and weights against oracles from outside, and the order of the sources: one binary, so that it is linked once.

mod ablations;
mod beside;
mod classifiers;
mod data2vec;
mod decoder;
mod dinov2;
mod few_shot;
mod finetune;
mod fuzz;
mod knn;
mod layers;
mod linear_probe;
mod optimizing;
mod papers;
mod prelude;
mod quality;
mod support;
mod timm;
mod towers;
mod weights;
