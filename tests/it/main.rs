//! The end-to-end tests: one program, so that what they link is linked once.

mod bad_input;
mod classifiers;
mod cli;
mod clusters;
mod corpus;
mod docs;
mod evaluations;
mod exact;
mod failing;
mod files;
mod fork;
mod init;
#[cfg(feature = "failpoints")]
mod kill;
mod layers;
#[cfg(target_os = "linux")]
mod memory;
mod own_images;
mod papers;
mod recipes;
mod reference;
mod report;
mod robustness;
mod run_tables;
mod runs;
mod small;
mod sources;
mod state;
mod support;
mod sweep;
