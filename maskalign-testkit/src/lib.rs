//! What MaskAlign and its plugins are tested and timed with: [`conformance`] checks what every component of a kind must do,
//! [`replay`] repeats steps that another implementation recorded, [`mod@bench`] times the stages' own steps.

pub mod bench;
pub mod conformance;
pub mod replay;
