//! The projection head of self-distillation.

use maskalign_engine::{
    Context, Recompute, Result, Tape, Tensor,
    ops::{self, Act},
};
use maskalign_registry::{LevelRef, Refusal};

use super::{AlignInput, AlignNeeds, AlignPlan, Aligner, AlignerModel, PlannedAligner};
use crate::{
    component,
    components::towers::Tap,
    nn::{Bias, Init, Linear, Module, Param},
    register,
};

fn layers() -> usize {
    3
}
fn hidden() -> usize {
    2048
}
fn bottleneck() -> usize {
    256
}
fn norm_last_layer() -> bool {
    true
}

/// An MLP with GELU, a bottleneck scaled to unit length, and a weight-normalised layer to the target's channels, the
/// prototypes (DINO, arXiv 2104.14294, section 3.2; iBOT, arXiv 2111.07832). It reads the last block through the final norm.
#[component]
struct ProjectionHead {
    /// Linear layers of the MLP, the bottleneck's among them.
    #[serde(default = "layers")]
    #[schemars(range(min = 1, max = 16))]
    layers: usize,
    /// Channels inside the MLP.
    #[serde(default = "hidden")]
    #[schemars(range(min = 1, max = 65536))]
    hidden: usize,
    /// Channels before the last layer.
    #[serde(default = "bottleneck")]
    #[schemars(range(min = 1, max = 65536))]
    bottleneck: usize,
    /// Whether each prototype has length 1; else its length is learned.
    #[serde(default = "norm_last_layer")]
    norm_last_layer: bool,
    /// For how many epochs the last layer stays as it began (DINO's `freeze_last_layer`).
    #[serde(default)]
    #[schemars(range(min = 0))]
    freeze_last_layer: f64,
}

impl Aligner for ProjectionHead {
    fn plan(&self, plan: &AlignPlan) -> Result<Box<dyn PlannedAligner>, Refusal> {
        if plan.outputs != 1 {
            return Err(Refusal::whole(format!("a projection head has one output, the target has {}", plan.outputs))
                .beside(["target"], "the target")
                .help("choose one level of the target, or `combine: mean`"));
        }
        plan.check_tokens("a projection head has outputs")?;
        Ok(Box::new(PlannedHead {
            needs: AlignNeeds { levels: vec![LevelRef::Block(plan.student.arch.depth - 1)], tap: Tap::Norm },
            options: self.clone(),
            from: plan.student.arch.dim,
            to: plan.width,
            tokens: plan.tokens.count(plan.counts.visible, plan.counts.masked),
        }))
    }
}

/// A head for so many prototypes.
struct PlannedHead {
    needs: AlignNeeds,
    options: ProjectionHead,
    /// Channels of the student and of the target.
    from: usize,
    to: usize,
    /// Tokens of an image that are compared.
    tokens: usize,
}

const LAST: &str = "last_layer";

impl PlannedAligner for PlannedHead {
    fn needs(&self) -> &AlignNeeds {
        &self.needs
    }

    /// What goes into each layer, and the logits with their softened copies.
    fn kept(&self, _: Recompute) -> usize {
        let ProjectionHead { layers, hidden, bottleneck, .. } = self.options;
        self.tokens * (self.from + 2 * (layers - 1) * hidden + 2 * bottleneck + 2 * self.to)
    }

    fn held_epochs(&self, parameter: &str) -> f64 {
        if parameter.starts_with(LAST) { self.options.freeze_last_layer } else { 0.0 }
    }

    fn build(&self, init: &Init) -> Result<Box<dyn AlignerModel>> {
        let ProjectionHead { layers, hidden, bottleneck, norm_last_layer, .. } = self.options;
        let linear = |layer: usize| {
            let inputs = if layer == 0 { self.from } else { hidden };
            let outputs = if layer + 1 == layers { bottleneck } else { hidden };
            // As the official `nn.Sequential` numbers them, activations included.
            let name = format!("mlp.{}", 2 * layer);
            let weight = init.truncated_normal(format!("{name}.weight"), &[outputs, inputs], 0.02)?;
            Linear::from_weight(init, &name, weight, Bias::With)
        };
        // PyTorch's linear layers are uniform within 1 / sqrt(inputs): this has their spread.
        let spread = (3.0 * bottleneck as f64).sqrt().recip();
        let direction = init.normal(format!("{LAST}.weight_v"), &[self.to, bottleneck], spread)?;
        let length = (!norm_last_layer).then(|| init.constant(format!("{LAST}.weight_g"), &[self.to, 1], 1.0));
        Ok(Box::new(HeadModel {
            mlp: (0..layers).map(linear).collect::<Result<_>>()?,
            direction,
            length: length.transpose()?,
        }))
    }
}

/// The head; parameters are named as the official ones.
struct HeadModel {
    mlp: Vec<Linear>,
    /// `last_layer.weight_v`, `[prototypes, bottleneck]`.
    direction: Param,
    /// `last_layer.weight_g`, `[prototypes, 1]`, where it is learned.
    length: Option<Param>,
}

impl Module for HeadModel {
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        self.mlp.iter_mut().for_each(|linear| linear.visit(f));
        self.length.iter_mut().for_each(&mut *f);
        f(&mut self.direction);
    }
}

impl AlignerModel for HeadModel {
    fn forward(&self, cx: &Context, tape: &mut Tape, input: &AlignInput) -> Result<Vec<Tensor>> {
        let mut x = input.levels[0].clone();
        if let Some(rows) = input.masks.within(input.tokens, input.held) {
            x = ops::gather_rows(cx, tape, &[&x], &rows)?;
        }
        let (last, before) = self.mlp.split_last().expect("there is a layer");
        for linear in before {
            x = linear.forward(cx, tape, &x, Act::Gelu)?;
        }
        x = last.forward(cx, tape, &x, Act::None)?;
        x = ops::normalize_rows(cx, tape, &x)?;
        let mut prototypes = ops::normalize_rows(cx, tape, &self.direction.value)?;
        if let Some(length) = &self.length {
            let lengths = ops::broadcast_column(cx, tape, &length.value, prototypes.columns())?;
            prototypes = ops::mul(cx, tape, &prototypes, &lengths)?;
        }
        Ok(vec![ops::matmul_transposed(cx, tape, &x, &prototypes)?])
    }
}

register!(aligner "projection_head" => ProjectionHead, "an MLP, a bottleneck of unit length, and prototypes",
    example: "{ type: projection_head, norm_last_layer: false }", paper: "DINO, arXiv 2104.14294; iBOT, arXiv 2111.07832");
