//! This crate's components do what components of their kinds must do.

use lattice_plugin as _;
use maskalign_testkit::conformance::{Kind, check_all, check_as};

#[test]
fn every_component_conforms() {
    check_all(Some("lattice-plugin")).unwrap_or_else(|faults| panic!("{}", faults.join("\n")));
}

#[test]
fn other_options_conform() {
    for text in ["{ type: pointwise }", "{ type: pointwise, norm: true }"] {
        check_as(Kind::Aligner, text).unwrap_or_else(|faults| panic!("{}", faults.join("\n")));
    }
}
