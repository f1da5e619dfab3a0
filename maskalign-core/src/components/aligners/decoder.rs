//! A transformer decoder over mask tokens.

use maskalign_engine::{
    Context, Recompute, Result, Tape, Tensor,
    ops::{self, Act, AttentionShape, BlockRun},
};
use maskalign_registry::{Levels, Refusal};

use super::{AlignInput, AlignNeeds, AlignPlan, Aligner, AlignerModel, PlannedAligner};
use crate::{
    component,
    components::{
        maskers::Counts,
        tokens::{Masks, Tokens},
        towers::{Tap, TowerShape},
    },
    nn::{Bias, Block, BlockConfig, Init, Linear, MaskedPatches, Module, Norm, Param, sincos_positions},
    register,
};

/// Who attends to whom in a decoder.
#[component]
#[derive(Copy, Default, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
enum DecoderAttention {
    /// Every token to every token (MAE); mask tokens of several blocks do not see each other (I-JEPA).
    #[default]
    Full,
    /// Mask tokens to every token; the student's own stay as they were embedded, and no block normalises them (MILAN).
    MaskedQueries,
    /// Mask tokens to the student's tokens, and not to each other (CrossMAE). Of several `levels`, every block has a
    /// learned mix of its own, with a LayerNorm; one level is attended to as it is.
    Cross,
}

fn last() -> Levels {
    Levels::Last(1)
}
fn after_norm() -> Tap {
    Tap::Norm
}
fn dim() -> usize {
    512
}
fn depth() -> usize {
    8
}
fn heads() -> usize {
    16
}
fn eps() -> f64 {
    1e-6
}

/// A decoder over the student's tokens and one learned mask token at each predicted patch (MAE, arXiv 2111.06377;
/// MILAN, arXiv 2208.06049; CrossMAE, arXiv 2401.14391). Its parameters have MAE's names: `decoder_embed`, `mask_token`,
/// `decoder_blocks.I`, `decoder_norm`, `decoder_pred`; with `attention: cross` there is no `decoder_embed`, and the mix of
/// levels is CrossMAE's `wfm.linear` and `dec_norms.I`.
#[component]
struct Decoder {
    /// The student's level that is decoded; one, but for `attention: cross`.
    #[serde(default = "last")]
    levels: Levels,
    /// Where it is taken.
    #[serde(default = "after_norm")]
    tap: Tap,
    /// Who attends to whom.
    #[serde(default)]
    attention: DecoderAttention,
    /// Channels.
    #[serde(default = "dim")]
    #[schemars(range(min = 4, max = 65536))]
    dim: usize,
    /// Blocks.
    #[serde(default = "depth")]
    #[schemars(range(min = 1, max = 1024))]
    depth: usize,
    /// Attention heads; `dim` must be a multiple.
    #[serde(default = "heads")]
    #[schemars(range(min = 1, max = 1024))]
    heads: usize,
    /// Channels inside the MLPs; absent: four times `dim`.
    #[serde(default)]
    #[schemars(range(min = 1, max = 1048576))]
    mlp: Option<usize>,
    /// Added to the variance in LayerNorms.
    #[serde(default = "eps")]
    #[schemars(range(min = 0.0))]
    eps: f64,
}

impl Aligner for Decoder {
    fn plan(&self, plan: &AlignPlan) -> Result<Box<dyn PlannedAligner>, Refusal> {
        let levels = self.levels.resolve(plan.student.arch.depth).map_err(|r| r.under("levels"))?;
        let cross = self.attention == DecoderAttention::Cross;
        if levels.len() != 1 && !cross {
            return Err(Refusal::new("levels", format!("a decoder takes one level, not {}", levels.len()))
                .related(["attention"], "this takes one level")
                .help("choose one, or use `attention: cross`, which mixes several"));
        }
        if self.tap == Tap::Projection {
            return Err(Refusal::new("tap", "a student has no projection").help("use block or norm"));
        }
        if plan.outputs != 1 {
            return Err(Refusal::whole(format!("a decoder has one output, the target has {}", plan.outputs))
                .beside(["target", "levels"], "the target's levels")
                .help("choose one level of the target, or `combine: mean`"));
        }
        if !self.dim.is_multiple_of(self.heads) {
            return Err(Refusal::new("heads", format!("{} does not divide dim {}", self.heads, self.dim))
                .related(["dim"], "the channels"));
        }
        if !self.dim.is_multiple_of(4) {
            return Err(Refusal::new("dim", "sin-cos positions need a multiple of 4"));
        }
        if plan.tokens.cls && !plan.student.cls_token {
            return Err(Refusal::whole("the student has no class token to decode")
                .beside(["tokens"], "`cls` is asked for here")
                .in_stage(["student", "cls_token"], "left out here")
                .help("leave `cls` out of `tokens`"));
        }
        if self.attention == DecoderAttention::MaskedQueries && !plan.tokens.masked {
            return Err(Refusal::new(
                "attention",
                "`masked_queries` changes masked patches alone, which are not compared",
            )
            .beside(["tokens"], "what is compared")
            .help("add `masked` to `tokens`, or use `attention: full`"));
        }
        if cross && plan.tokens != predicted() {
            return Err(Refusal::new("attention", "`cross` decodes the masked patches and no other token")
                .beside(["tokens"], "what is compared")
                .help("use `tokens: [masked]`, or `attention: full`"));
        }
        if plan.student.masked_patches == MaskedPatches::MaskToken {
            return Err(Refusal::whole("the student shows mask tokens already, which a decoder would show again")
                .in_stage(["student", "masked_patches"], "set here")
                .help("use the aligner `dynamic`, or leave `masked_patches` out"));
        }
        if plan.counts.masked == 0 {
            return Err(Refusal::whole("there is no masked patch to decode")
                .in_stage(["masker"], "nothing is masked")
                .help("give the stage a `masker`, or raise its ratio"));
        }
        if plan.blocks > 1 && self.attention == DecoderAttention::MaskedQueries {
            return Err(Refusal::new("attention", "`masked_queries` decodes all masked patches together")
                .in_stage(["masker"], "its patches are predicted block by block")
                .help("use `attention: full` or `cross`"));
        }
        if plan.blocks > 1 && plan.tokens != predicted() {
            return Err(Refusal::whole("of blocks that are predicted one by one only the masked patches are decoded")
                .beside(["tokens"], "what is compared")
                .in_stage(["masker"], "its patches are predicted block by block")
                .help("use `tokens: [masked]`"));
        }
        Ok(Box::new(PlannedDecoder {
            needs: AlignNeeds { levels, tap: self.tap },
            attention: self.attention,
            depth: self.depth,
            block: BlockConfig {
                dim: self.dim,
                heads: self.heads,
                mlp: self.mlp.unwrap_or(4 * self.dim),
                eps: self.eps,
                act: Act::Gelu,
                layer_scale: None,
            },
            student: plan.student,
            counts: plan.counts,
            blocks: plan.blocks,
            width: plan.width,
        }))
    }
}

/// A decoder of a student's tokens.
struct PlannedDecoder {
    needs: AlignNeeds,
    attention: DecoderAttention,
    depth: usize,
    block: BlockConfig,
    student: TowerShape,
    counts: Counts,
    blocks: usize,
    /// Channels of the target.
    width: usize,
}

impl PlannedAligner for PlannedDecoder {
    fn needs(&self) -> &AlignNeeds {
        &self.needs
    }

    fn kept(&self, recompute: Recompute) -> usize {
        let BlockConfig { dim, mlp, .. } = self.block;
        let student = self.counts.visible + usize::from(self.student.cls_token);
        let tokens = self.blocks * student + self.counts.masked;
        match self.attention {
            DecoderAttention::Full if recompute == Recompute::Blocks => self.depth * tokens * dim,
            DecoderAttention::Full => self.depth * tokens * (6 * dim + mlp),
            // Every operator on its own: rows of all tokens, then of the queries.
            DecoderAttention::MaskedQueries => {
                self.depth * (tokens * 4 * dim + self.counts.masked * (8 * dim + 2 * mlp))
            }
            DecoderAttention::Cross => {
                let mixed = if self.needs.levels.len() > 1 { 2 * self.student.arch.dim } else { 0 };
                self.depth * (student * (2 * dim + mixed) + self.counts.masked * (8 * dim + 2 * mlp))
            }
        }
    }

    fn build(&self, init: &Init) -> Result<Box<dyn AlignerModel>> {
        let (grid, from, dim) = (self.student.grid, self.student.arch.dim, self.block.dim);
        let mut positions = init.values("decoder_pos_embed", &[1, 1 + grid.patches(), dim], || {
            sincos_positions(dim, grid.rows, grid.columns)
        })?;
        positions.set_trained(false);
        let name = |i: usize| format!("decoder_blocks.{i}");
        let embed = || Linear::new(init, "decoder_embed", dim, from, Bias::With);
        let blocks = match self.attention {
            DecoderAttention::Full => Blocks::Full(
                embed()?,
                (0..self.depth).map(|i| Block::new(init, &name(i), self.block)).collect::<Result<_>>()?,
            ),
            DecoderAttention::MaskedQueries => Blocks::MaskedQueries(
                embed()?,
                (0..self.depth).map(|i| QueryBlock::new(init, &name(i), self.block)).collect::<Result<_>>()?,
            ),
            DecoderAttention::Cross => {
                let levels = self.needs.levels.len();
                let mix = || LevelMix::new(init, self.depth, levels, from, self.block.eps);
                Blocks::Cross(
                    (levels > 1).then(mix).transpose()?,
                    (0..self.depth)
                        .map(|i| CrossBlock::new(init, &name(i), from, self.block))
                        .collect::<Result<_>>()?,
                )
            }
        };
        Ok(Box::new(DecoderModule {
            mask_token: init.normal("mask_token", &[1, 1, dim], 0.02)?,
            positions,
            blocks,
            apart: self.blocks,
            norm: Norm::new(init, "decoder_norm", dim, self.block.eps)?,
            pred: Linear::new(init, "decoder_pred", self.width, dim, Bias::With)?,
        }))
    }
}

register!(aligner "decoder" => Decoder, "a transformer decoder over mask tokens",
    example: "{ type: decoder, dim: 512, depth: 8, heads: 16 }", paper: "MAE, arXiv 2111.06377");

/// The second half of a block: LayerNorm, linear, GELU, linear, and what came in.
struct Mlp {
    norm: Norm,
    fc1: Linear,
    fc2: Linear,
}

impl Mlp {
    fn new(init: &Init, name: &str, c: BlockConfig) -> Result<Self> {
        Ok(Mlp {
            norm: Norm::new(init, &format!("{name}.norm2"), c.dim, c.eps)?,
            fc1: Linear::new(init, &format!("{name}.mlp.fc1"), c.mlp, c.dim, Bias::With)?,
            fc2: Linear::new(init, &format!("{name}.mlp.fc2"), c.dim, c.mlp, Bias::With)?,
        })
    }

    fn forward(&self, cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
        let y = self.norm.forward(cx, tape, x)?;
        let y = self.fc1.forward(cx, tape, &y, Act::Gelu)?;
        let y = self.fc2.forward(cx, tape, &y, Act::None)?;
        ops::add(cx, tape, x, &y)
    }

    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        self.norm.visit(f);
        self.fc1.visit(f);
        self.fc2.visit(f);
    }
}

/// A block whose queries are some of the tokens, and whose keys and values are all of them. Those that stay are attended
/// to as they were embedded: the norm is the queries' alone.
struct QueryBlock {
    norm1: Norm,
    q: Linear,
    kv: Linear,
    proj: Linear,
    mlp: Mlp,
    heads: usize,
}

impl QueryBlock {
    fn new(init: &Init, name: &str, c: BlockConfig) -> Result<Self> {
        let linear =
            |part: &str, outputs| Linear::new(init, &format!("{name}.attn.{part}"), outputs, c.dim, Bias::With);
        Ok(QueryBlock {
            norm1: Norm::new(init, &format!("{name}.norm1"), c.dim, c.eps)?,
            q: linear("q", c.dim)?,
            kv: linear("kv", 2 * c.dim)?,
            proj: linear("proj", c.dim)?,
            mlp: Mlp::new(init, name, c)?,
            heads: c.heads,
        })
    }

    /// `x` are the queries' tokens; `context` those that stay, `order` the rows of both that are attended to.
    fn forward(&self, cx: &Context, tape: &mut Tape, x: &Tensor, context: &Tensor, layout: &Layout) -> Result<Tensor> {
        let mine = self.norm1.forward(cx, tape, x)?;
        let all = ops::gather_rows(cx, tape, &[context, &mine], &layout.order)?;
        let q = self.q.forward(cx, tape, &mine, Act::None)?;
        let kv = self.kv.forward(cx, tape, &all, Act::None)?;
        let shape = AttentionShape {
            batch: layout.batch,
            heads: self.heads,
            queries: x.rows() / layout.batch,
            keys: layout.order.len() / layout.batch,
        };
        let y = ops::cross_attention(cx, tape, &q, &kv, shape)?;
        let y = self.proj.forward(cx, tape, &y, Act::None)?;
        let x = ops::add(cx, tape, x, &y)?;
        self.mlp.forward(cx, tape, &x)
    }

    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        self.norm1.visit(f);
        for linear in [&mut self.q, &mut self.kv, &mut self.proj] {
            linear.visit(f);
        }
        self.mlp.visit(f);
    }
}

/// A block whose queries are the mask tokens, and whose keys and values are the student's, in the student's width.
struct CrossBlock {
    norm1: Norm,
    q: Linear,
    kv: Linear,
    proj: Linear,
    mlp: Mlp,
    heads: usize,
}

impl CrossBlock {
    fn new(init: &Init, name: &str, from: usize, c: BlockConfig) -> Result<Self> {
        let linear = |part: &str, outputs, inputs| {
            Linear::new(init, &format!("{name}.cross_attn.{part}"), outputs, inputs, Bias::With)
        };
        Ok(CrossBlock {
            norm1: Norm::new(init, &format!("{name}.norm1"), c.dim, c.eps)?,
            q: linear("q", c.dim, c.dim)?,
            kv: linear("kv", 2 * c.dim, from)?,
            proj: linear("proj", c.dim, c.dim)?,
            mlp: Mlp::new(init, name, c)?,
            heads: c.heads,
        })
    }

    fn forward(&self, cx: &Context, tape: &mut Tape, x: &Tensor, context: &Tensor, batch: usize) -> Result<Tensor> {
        let y = self.norm1.forward(cx, tape, x)?;
        let q = self.q.forward(cx, tape, &y, Act::None)?;
        let kv = self.kv.forward(cx, tape, context, Act::None)?;
        let shape =
            AttentionShape { batch, heads: self.heads, queries: x.rows() / batch, keys: context.rows() / batch };
        let y = ops::cross_attention(cx, tape, &q, &kv, shape)?;
        let y = self.proj.forward(cx, tape, &y, Act::None)?;
        let x = ops::add(cx, tape, x, &y)?;
        self.mlp.forward(cx, tape, &x)
    }

    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        self.norm1.visit(f);
        for linear in [&mut self.q, &mut self.kv, &mut self.proj] {
            linear.visit(f);
        }
        self.mlp.visit(f);
    }
}

/// What each block attends to: a linear mix of the student's levels and a LayerNorm, learned for each (CrossMAE's
/// weighted feature maps).
struct LevelMix {
    weight: Param,
    norms: Vec<Norm>,
}

impl LevelMix {
    fn new(init: &Init, blocks: usize, levels: usize, width: usize, eps: f64) -> Result<Self> {
        Ok(LevelMix {
            // The official code draws it from a normal and then, as every linear layer, from Xavier's uniform.
            weight: init.xavier("wfm.linear.weight", &[blocks, levels])?,
            norms: (0..blocks)
                .map(|i| Norm::new(init, &format!("dec_norms.{i}"), width, eps))
                .collect::<Result<_>>()?,
        })
    }

    fn forward(&self, cx: &Context, tape: &mut Tape, levels: &[Tensor]) -> Result<Vec<Tensor>> {
        let blocks: Vec<usize> = (0..self.norms.len()).collect();
        let mixed = ops::mix(cx, tape, &levels.iter().collect::<Vec<_>>(), &self.weight.value, &blocks)?;
        mixed.iter().zip(&self.norms).map(|(x, norm)| norm.forward(cx, tape, x)).collect()
    }

    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        f(&mut self.weight);
        self.norms.iter_mut().for_each(|norm| norm.visit(f));
    }
}

/// What comes between mask tokens and prediction. The first two embed the student's tokens in the decoder's width.
enum Blocks {
    Full(Linear, Vec<Block>),
    MaskedQueries(Linear, Vec<QueryBlock>),
    Cross(Option<LevelMix>, Vec<CrossBlock>),
}

struct DecoderModule {
    mask_token: Param,
    positions: Param,
    blocks: Blocks,
    /// Blocks of mask tokens that do not see each other.
    apart: usize,
    norm: Norm,
    pred: Linear,
}

/// Where tokens are among the rows of a decoder.
struct Layout {
    /// Sequences: one for each block of each image.
    batch: usize,
    /// Rows of (student's tokens, mask tokens) sequence by sequence: the student's first.
    order: Vec<u32>,
}

impl Layout {
    fn new(masks: &Masks, held_each: usize, blocks: usize) -> Self {
        let (batch, masked_each) = (masks.batch * blocks, masks.counts_of(0).masked / blocks);
        let mut order = Vec::new();
        for sequence in 0..batch {
            let image = sequence / blocks;
            order.extend((image * held_each..(image + 1) * held_each).map(|i| i as u32));
            let first = masks.batch * held_each + sequence * masked_each;
            order.extend((first..first + masked_each).map(|i| i as u32));
        }
        Layout { batch, order }
    }

    /// The rows of the mask tokens of every sequence.
    fn predicted(&self, held_each: usize) -> Vec<u32> {
        let each = self.order.len() / self.batch;
        let of = |sequence: usize| (sequence * each + held_each..(sequence + 1) * each).map(|row| row as u32);
        (0..self.batch).flat_map(of).collect()
    }
}

impl Module for DecoderModule {
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        if let Blocks::Full(embed, _) | Blocks::MaskedQueries(embed, _) = &mut self.blocks {
            embed.visit(f);
        }
        f(&mut self.mask_token);
        f(&mut self.positions);
        match &mut self.blocks {
            Blocks::Full(_, blocks) => blocks.iter_mut().for_each(|b| b.visit(f)),
            Blocks::MaskedQueries(_, blocks) => blocks.iter_mut().for_each(|b| b.visit(f)),
            Blocks::Cross(mix, blocks) => {
                if let Some(mix) = mix {
                    mix.visit(f);
                }
                for b in blocks {
                    b.visit(f);
                }
            }
        }
        self.norm.visit(f);
        self.pred.visit(f);
    }
}

impl DecoderModule {
    /// The fixed positions of some tokens of each image.
    fn positions(&self, cx: &Context, masks: &Masks, tokens: Tokens) -> Result<Tensor> {
        // The class token's row is the first of the table, whether the student has one or not.
        let rows = masks.rows(tokens, true);
        ops::gather_rows(cx, &mut Tape::inference(), &[&self.positions.value], &rows)
    }

    /// The student's tokens in the decoder's width.
    fn embed(&self, cx: &Context, tape: &mut Tape, input: &AlignInput, embed: &Linear) -> Result<Tensor> {
        let x = embed.forward(cx, tape, &input.levels[0], Act::None)?;
        ops::add(cx, tape, &x, &self.positions(cx, input.masks, input.held)?)
    }
}

impl AlignerModel for DecoderModule {
    fn forward(&self, cx: &Context, tape: &mut Tape, input: &AlignInput) -> Result<Vec<Tensor>> {
        let masks = input.masks;
        let tokens = ops::gather_rows(cx, tape, &[&self.mask_token.value], &vec![0; masks.masked.len()])?;
        let tokens = ops::add(cx, tape, &tokens, &self.positions(cx, masks, predicted())?)?;
        let held_each = input.held.count(masks.counts_of(0).visible, 0);
        let layout = || Layout::new(masks, held_each, self.apart);
        let every = Tokens { masked: true, ..input.held };
        let (x, decoded) = match &self.blocks {
            Blocks::Full(embed, blocks) => {
                let (student, layout) = (self.embed(cx, tape, input, embed)?, layout());
                let mut x = ops::gather_rows(cx, tape, &[&student, &tokens], &layout.order)?;
                let run = BlockRun {
                    batch: layout.batch,
                    tokens: layout.order.len() / layout.batch,
                    branch_scale: None,
                    recompute: cx.recompute(),
                };
                for block in blocks {
                    x = block.forward(cx, tape, &x, &run)?;
                }
                match self.apart {
                    1 => (x, every),
                    _ => (ops::gather_rows(cx, tape, &[&x], &layout.predicted(held_each))?, predicted()),
                }
            }
            Blocks::MaskedQueries(embed, blocks) => {
                let (student, layout) = (self.embed(cx, tape, input, embed)?, layout());
                let mut x = tokens;
                for block in blocks {
                    x = block.forward(cx, tape, &x, &student, &layout)?;
                }
                (ops::gather_rows(cx, tape, &[&student, &x], &layout.order)?, every)
            }
            Blocks::Cross(mix, blocks) => {
                let mixed = mix.as_ref().map(|mix| mix.forward(cx, tape, input.levels)).transpose()?;
                let mut x = tokens;
                for (i, block) in blocks.iter().enumerate() {
                    let context = mixed.as_ref().map_or(&input.levels[0], |mixed| &mixed[i]);
                    x = block.forward(cx, tape, &x, context, masks.batch)?;
                }
                (x, predicted())
            }
        };
        let x = match masks.within(input.tokens, decoded) {
            Some(rows) => ops::gather_rows(cx, tape, &[&x], &rows)?,
            None => x,
        };
        let x = self.norm.forward(cx, tape, &x)?;
        Ok(vec![self.pred.forward(cx, tape, &x, Act::None)?])
    }
}

/// The predicted patches alone.
fn predicted() -> Tokens {
    Tokens { masked: true, ..Tokens::default() }
}
