//! Tests and benchmarks for MaskAlign and its plugins: [`conformance`] checks what every component of a kind must do,
//! [`replay`] repeats steps that were recorded from another implementation, [`mod@bench`] times the stages' own steps.

pub mod bench;
pub mod conformance;
pub mod replay;
