//! The operators against their definitions, finite differences and recorded results: one program for all.

mod attention;
mod block;
mod layers;
mod operators;
mod support;
