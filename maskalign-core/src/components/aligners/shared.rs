//! The alignment of another objective.

use maskalign_registry::Refusal;

use super::{AlignPlan, Aligner, PlannedAligner};
use crate::{component, register};

/// The map of another objective, with the same parameters: iBOT's head is one for class tokens and patches
/// (arXiv 2111.07832, section 3.2). The targets have equally many channels.
#[component]
struct Shared {
    /// The objective, by its name; its map is its own.
    objective: String,
}

impl Aligner for Shared {
    fn plan(&self, _: &AlignPlan) -> Result<Box<dyn PlannedAligner>, Refusal> {
        Err(Refusal::new("objective", "a shared map is planned by the objective whose it is"))
    }

    fn shares(&self) -> Option<&str> {
        Some(&self.objective)
    }
}

register!(aligner "shared" => Shared, "the map of another objective", example: "{ type: shared, objective: cls }",
    paper: "iBOT, arXiv 2111.07832");
