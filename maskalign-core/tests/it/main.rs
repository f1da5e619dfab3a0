//! Everything that maskalign-core promises, against oracles from outside: one binary, so that it is linked once.

mod bench;
mod conformance;
mod decoder;
mod dinov2;
mod timm;
mod verify;
mod weights;
