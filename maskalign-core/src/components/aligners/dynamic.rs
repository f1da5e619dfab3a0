//! Dynamic Alignment.

use maskalign_engine::{
    Context, Recompute, Result, Tape, Tensor,
    ops::{self, Act},
};
use maskalign_registry::{LevelRef, Levels, Refusal};

use super::{AlignInput, AlignNeeds, AlignPlan, Aligner, AlignerModel, PlannedAligner};
use crate::{
    component,
    components::{tokens::Tokens, towers::Tap},
    nn::{Bias, Init, Linear, Module, Norm, Param},
    register,
};

/// How the student's levels are mixed for each level of the teacher.
#[component]
#[derive(Copy, Default, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Fusion {
    /// No mixing: the student's level i feeds head i.
    Simple,
    /// A square matrix, at first the identity plus 0.01 in every entry; as many student as teacher levels.
    #[default]
    Linear,
    /// A matrix of any shape, at first 1 / student levels.
    Sum,
}

/// What maps a mixed level to the teacher's channels.
#[component]
#[derive(Copy, Default, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Head {
    /// A linear layer.
    #[default]
    Linear,
    /// LayerNorm, then a linear layer.
    NormLinear,
    /// A linear layer, then LayerNorm.
    LinearNorm,
    /// Linear, GELU, linear.
    Mlp,
    /// Linear, LayerNorm, linear.
    Mlp2,
}

/// The paper's Dynamic Alignment: a learned matrix mixes the student's levels, then one head for each level of the
/// teacher (MaskAlign, arXiv 2211.08887, section 3.3).
///
/// The matrix `distill_weights` and the heads `distill_heads.I` are kept for every level, as in the official
/// checkpoints; those of levels that are not compared stay as they are.
#[component]
struct Dynamic {
    /// The student's levels: `all`, `{last: K}`, or a list; the matrix has one column for each.
    #[serde(default)]
    levels: Levels,
    /// Where the student's levels are taken: after the block, or after the final norm too.
    #[serde(default)]
    tap: Tap,
    /// How levels are mixed.
    #[serde(default)]
    fusion: Fusion,
    /// What each mixed level goes through.
    #[serde(default)]
    head: Head,
}

impl Aligner for Dynamic {
    fn plan(&self, plan: &AlignPlan) -> Result<Box<dyn PlannedAligner>, Refusal> {
        let all = self.levels.resolve(plan.student.arch.depth).map_err(|r| r.under("levels"))?;
        if self.tap == Tap::Projection {
            return Err(Refusal::new("tap", "a student has no projection").help("use block or norm"));
        }
        plan.check_tokens("the dynamic alignment has outputs")?;
        let unequal = |what: &str| {
            Refusal::new(
                "fusion",
                format!(
                    "`{what}` needs as many student levels as target levels, not {} and {}",
                    all.len(),
                    self.rows(plan)
                ),
            )
            .related(["levels"], "the student's levels")
            .beside(["target", "levels"], "the target's levels")
            .help("use `fusion: sum` for unequal depths")
        };
        let student_levels = all.len();
        let needed: Vec<LevelRef> = match self.fusion {
            Fusion::Linear if all.len() != self.rows(plan) => return Err(unequal("linear")),
            Fusion::Simple if all.len() != self.rows(plan) => return Err(unequal("simple")),
            // Level i feeds head i: the other levels do not reach the loss.
            Fusion::Simple => self.active(plan).into_iter().map(|row| all[row]).collect(),
            _ => all,
        };
        Ok(Box::new(PlannedDynamic {
            needs: AlignNeeds { levels: needed, tap: self.tap },
            fusion: self.fusion,
            head: self.head,
            rows: self.rows(plan),
            active: self.active(plan),
            student_levels,
            from: plan.student.arch.dim,
            to: plan.width,
            tokens: plan.tokens.count(plan.counts.visible, plan.counts.masked),
            held: plan.student.held(),
        }))
    }
}

/// An alignment of so many levels.
struct PlannedDynamic {
    needs: AlignNeeds,
    fusion: Fusion,
    head: Head,
    /// Rows of the matrix, and heads.
    rows: usize,
    /// The rows that are compared.
    active: Vec<usize>,
    student_levels: usize,
    /// Channels of the student and of the target.
    from: usize,
    to: usize,
    /// Tokens of an image that are compared.
    tokens: usize,
    /// The student's tokens.
    held: Tokens,
}

impl PlannedAligner for PlannedDynamic {
    fn needs(&self) -> &AlignNeeds {
        &self.needs
    }

    /// The mixes and their gradients, and the gradients of the levels.
    fn kept(&self, _: Recompute) -> usize {
        self.tokens * self.from * (self.needs.levels.len() + 2 * self.active.len())
    }

    fn build(&self, init: &Init) -> Result<Box<dyn AlignerModel>> {
        let (rows, levels) = (self.rows, self.student_levels);
        let matrix = match self.fusion {
            Fusion::Simple => None,
            Fusion::Linear => {
                let values = || (0..rows * rows).map(|i| if i % (rows + 1) == 0 { 1.01 } else { 0.01 }).collect();
                Some(init.values("distill_weights", &[rows, rows], values)?)
            }
            Fusion::Sum => Some(init.constant("distill_weights", &[rows, levels], 1.0 / levels as f32)?),
        };
        let mut heads = (0..rows)
            .map(|i| LevelHead::new(init, &format!("distill_heads.{i}"), self.head, self.from, self.to))
            .collect::<Result<Vec<_>>>()?;
        for (i, head) in heads.iter_mut().enumerate() {
            head.visit(&mut |p| p.set_trained(self.active.contains(&i)));
        }
        Ok(Box::new(DynamicAlignment { matrix, heads, active: self.active.clone(), held: self.held }))
    }
}

impl Dynamic {
    /// Rows of the matrix: the teacher's depth, or the outputs where the levels of both towers are chosen one to one
    /// (or combined), so that nothing is left of the depth.
    fn rows(&self, plan: &AlignPlan) -> usize {
        if self.one_to_one(plan) { plan.outputs } else { plan.target_depth }
    }

    /// The rows that are compared.
    fn active(&self, plan: &AlignPlan) -> Vec<usize> {
        match self.one_to_one(plan) {
            true => plan.wanted.clone(),
            false => plan.wanted.iter().map(|&i| plan.target_levels[i]).collect(),
        }
    }

    fn one_to_one(&self, plan: &AlignPlan) -> bool {
        self.levels != Levels::All || plan.outputs != plan.target_levels.len()
    }
}

register!(aligner "dynamic" => Dynamic, "the paper's Dynamic Alignment: a learned mix of levels, then heads",
    example: "{ type: dynamic, fusion: linear, head: linear }", paper: "MaskAlign, arXiv 2211.08887, section 3.3");

/// One head; its parameters are named as the official `nn.Sequential` numbers them.
enum Layer {
    Linear(Linear),
    LinearGelu(Linear),
    Norm(Norm),
}

struct LevelHead(Vec<Layer>);

impl LevelHead {
    fn new(init: &Init, name: &str, head: Head, from: usize, to: usize) -> Result<Self> {
        let linear =
            |part: &str, outputs, inputs| Linear::new(init, &format!("{name}{part}"), outputs, inputs, Bias::With);
        let norm = |part: &str, width| Norm::new(init, &format!("{name}{part}"), width, 1e-6);
        Ok(LevelHead(match head {
            Head::Linear => vec![Layer::Linear(linear("", to, from)?)],
            Head::NormLinear => vec![Layer::Norm(norm(".0", from)?), Layer::Linear(linear(".1", to, from)?)],
            Head::LinearNorm => vec![Layer::Linear(linear(".0", to, from)?), Layer::Norm(norm(".1", to)?)],
            Head::Mlp => vec![Layer::LinearGelu(linear(".0", from, from)?), Layer::Linear(linear(".2", to, from)?)],
            Head::Mlp2 => vec![
                Layer::Linear(linear(".0", from, from)?),
                Layer::Norm(norm(".1", from)?),
                Layer::Linear(linear(".2", to, from)?),
            ],
        }))
    }

    fn forward(&self, cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        for layer in &self.0 {
            x = match layer {
                Layer::Linear(linear) => linear.forward(cx, tape, &x, Act::None)?,
                Layer::LinearGelu(linear) => linear.forward(cx, tape, &x, Act::Gelu)?,
                Layer::Norm(norm) => norm.forward(cx, tape, &x)?,
            };
        }
        Ok(x)
    }

    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        for layer in &mut self.0 {
            match layer {
                Layer::Linear(linear) | Layer::LinearGelu(linear) => linear.visit(f),
                Layer::Norm(norm) => norm.visit(f),
            }
        }
    }
}

struct DynamicAlignment {
    matrix: Option<Param>,
    heads: Vec<LevelHead>,
    active: Vec<usize>,
    held: Tokens,
}

impl Module for DynamicAlignment {
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        self.matrix.iter_mut().for_each(&mut *f);
        self.heads.iter_mut().for_each(|h| h.visit(f));
    }
}

impl AlignerModel for DynamicAlignment {
    fn forward(&self, cx: &Context, tape: &mut Tape, input: &AlignInput) -> Result<Vec<Tensor>> {
        debug_assert_eq!(input.held, self.held);
        let mixed = match &self.matrix {
            Some(w) => ops::mix(cx, tape, &input.levels.iter().collect::<Vec<_>>(), &w.value, &self.active)?,
            None => input.levels.to_vec(),
        };
        let rows = input.masks.within(input.tokens, input.held);
        let mut outputs = Vec::with_capacity(mixed.len());
        for (x, &head) in mixed.into_iter().zip(&self.active) {
            let x = match &rows {
                Some(rows) => ops::gather_rows(cx, tape, &[&x], rows)?,
                None => x,
            };
            outputs.push(self.heads[head].forward(cx, tape, &x)?);
        }
        Ok(outputs)
    }
}
