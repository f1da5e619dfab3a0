//! An aligner.

use maskalign_core::prelude::*;

/// One linear layer from the student's last level to the target, with LayerNorm before it.
#[component]
pub struct Pointwise {
    /// Whether LayerNorm comes first.
    #[serde(default)]
    norm: bool,
}

impl Aligner for Pointwise {
    fn plan(&self, plan: &AlignPlan) -> Result<Box<dyn PlannedAligner>, Refusal> {
        if plan.tokens.masked {
            return Err(
                Refusal::whole("there are outputs for the student's tokens only")
                    .help("leave `masked` out of `tokens`"),
            );
        }
        if plan.tokens.cls && !plan.student.cls_token {
            return Err(Refusal::whole("the student has no class token")
                .help("leave `cls` out of `tokens`"));
        }
        if plan.outputs != 1 {
            return Err(Refusal::whole(format!(
                "there is one output, the target has {}",
                plan.outputs
            ))
            .help("choose one level of the target, or `combine: mean`"));
        }
        Ok(Box::new(PlannedPointwise {
            needs: AlignNeeds {
                levels: vec![LevelRef::Block(plan.student.arch.depth - 1)],
                tap: Tap::Block,
            },
            norm: self.norm,
            from: plan.student.arch.dim,
            to: plan.width,
        }))
    }
}

/// A layer between two widths.
struct PlannedPointwise {
    needs: AlignNeeds,
    norm: bool,
    from: usize,
    to: usize,
}

impl PlannedAligner for PlannedPointwise {
    fn needs(&self) -> &AlignNeeds {
        &self.needs
    }

    fn build(&self, init: &Init) -> Result<Box<dyn AlignerModel>> {
        let norm = match self.norm {
            true => Some(Norm::new(init, "pointwise.norm", self.from, 1e-6)?),
            false => None,
        };
        let linear = Linear::new(init, "pointwise.linear", self.to, self.from, Bias::With)?;
        Ok(Box::new(Layers { norm, linear }))
    }
}

/// What is trained.
struct Layers {
    norm: Option<Norm>,
    linear: Linear,
}

impl Module for Layers {
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        self.norm.iter_mut().for_each(|norm| norm.visit(f));
        self.linear.visit(f);
    }
}

impl AlignerModel for Layers {
    fn forward(
        &self,
        cx: &Context,
        tape: &mut Tape,
        input: &AlignInput,
    ) -> Result<Vec<Tensor>> {
        let mut x = input.levels[0].clone();
        if let Some(rows) = input.masks.within(input.tokens, input.held) {
            x = ops::gather_rows(cx, tape, &[&x], &rows)?;
        }
        if let Some(norm) = &self.norm {
            x = norm.forward(cx, tape, &x)?;
        }
        Ok(vec![self.linear.forward(cx, tape, &x, Act::None)?])
    }
}

register!(aligner "pointwise" => Pointwise, "one linear layer from the last level",
    example: "{ type: pointwise, norm: true }");
