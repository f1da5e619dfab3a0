//! The student's side of relations.

use maskalign_engine::{Context, Recompute, Result, Tape, Tensor, ops};
use maskalign_registry::{LevelRef, Refusal, block_index};

use super::{AlignInput, AlignNeeds, AlignPlan, Aligner, AlignerModel, PlannedAligner};
use crate::{
    component,
    components::{relations::Relations, towers::Tap},
    nn::{Init, Module, Param},
    register,
};

fn last() -> i64 {
    -1
}

/// The relations that the target names, of the student's queries, keys and values in a block: nothing is trained but the
/// student. Of that block nothing else runs for it, and what is behind the block does not run unless another objective needs
/// it (MiniLM, arXiv 2002.10957; TinyMIM, arXiv 2301.01296).
#[component]
struct RelationsAligner {
    /// The student's block, counted from 0, or from the end where it is negative.
    #[serde(default = "last")]
    level: i64,
}

impl Aligner for RelationsAligner {
    fn relates(&self) -> bool {
        true
    }

    fn plan(&self, plan: &AlignPlan) -> Result<Box<dyn PlannedAligner>, Refusal> {
        let block = block_index(self.level, plan.student.arch.depth).map_err(|says| Refusal::new("level", says))?;
        let Some(relations) = &plan.relations else {
            return Err(Refusal::whole("there are no relations to match"));
        };
        plan.check_tokens("relations are there")?;
        let held = plan.student.held().count(plan.counts.visible, plan.counts.masked);
        Ok(Box::new(PlannedRelations {
            needs: AlignNeeds { levels: vec![LevelRef::Block(block)], tap: Tap::Block },
            kept: 7 * held * plan.student.arch.dim,
            relations: relations.clone(),
        }))
    }
}

/// Relations of a block that is there.
struct PlannedRelations {
    needs: AlignNeeds,
    relations: Relations,
    kept: usize,
}

impl PlannedAligner for PlannedRelations {
    fn needs(&self) -> &AlignNeeds {
        &self.needs
    }

    /// Queries, keys and values with their gradients, and what they are projected from. The logits' gradients take the place of
    /// the targets.
    fn kept(&self, _: Recompute) -> usize {
        self.kept
    }

    fn build(&self, _: &Init) -> Result<Box<dyn AlignerModel>> {
        Ok(Box::new(Related(self.relations.clone())))
    }
}

struct Related(Relations);

impl Module for Related {
    fn visit(&mut self, _: &mut dyn FnMut(&mut Param)) {}
}

impl AlignerModel for Related {
    fn forward(&self, cx: &Context, tape: &mut Tape, input: &AlignInput) -> Result<Vec<Tensor>> {
        let mut qkv = input.levels[0].clone();
        if let Some(rows) = input.masks.within(input.tokens, input.held) {
            qkv = ops::gather_rows(cx, tape, &[&qkv], &rows)?;
        }
        self.0.logits(cx, tape, &qkv, input.masks.batch)
    }
}

register!(aligner "relations" => RelationsAligner, "relations of the student's tokens inside a block",
    example: "{ type: relations, level: -1 }", paper: "MiniLM, arXiv 2002.10957; TinyMIM, arXiv 2301.01296");
