//! A transformer decoder over mask tokens.

use dfdx::prelude::HasShape;
use maskalign_registry::{Levels, Refusal};

use super::{AlignInput, AlignNeeds, AlignPlan, Aligner, AlignerPlugin};
use crate::{
    component,
    components::{
        tokens::{Masks, Tokens},
        towers::Tap,
    },
    context::Context,
    device::{Dev, Matrix},
    error::Result,
    kernels::{Act, AttentionShape, BlockRun},
    nn::{Bias, Block, BlockConfig, Init, Linear, Module, Norm, Param, sincos_positions},
    register,
    tape::Recorder,
};

/// Who attends to whom in a decoder.
#[component]
#[derive(Copy, Default, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum DecoderAttention {
    /// Every token to every token (MAE).
    #[default]
    Full,
    /// Mask tokens to every token; the student's own stay as they were embedded (MILAN).
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
pub struct Decoder {
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

impl AlignerPlugin for Decoder {
    fn plan(&self, plan: &AlignPlan) -> Result<AlignNeeds, Refusal> {
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
        if plan.counts.masked == 0 {
            return Err(Refusal::whole("there is no masked patch to decode")
                .in_stage(["masker"], "nothing is masked")
                .help("give the stage a `masker`, or raise its ratio"));
        }
        Ok(AlignNeeds { levels, tap: self.tap })
    }

    fn kept(&self, plan: &AlignPlan, recompute: bool) -> usize {
        let (dim, mlp) = (self.dim, self.mlp.unwrap_or(4 * self.dim));
        let student = plan.counts.visible + usize::from(plan.student.cls_token);
        let tokens = student + plan.counts.masked;
        match self.attention {
            DecoderAttention::Full if recompute => self.depth * tokens * dim,
            DecoderAttention::Full => self.depth * tokens * (6 * dim + mlp),
            // Every operator on its own: rows of all tokens, then of the queries.
            DecoderAttention::MaskedQueries => {
                self.depth * (tokens * 4 * dim + plan.counts.masked * (8 * dim + 2 * mlp))
            }
            DecoderAttention::Cross => {
                let several = self.levels.resolve(plan.student.arch.depth).is_ok_and(|levels| levels.len() > 1);
                let mixed = if several { 2 * plan.student.arch.dim } else { 0 };
                self.depth * (student * (2 * dim + mixed) + plan.counts.masked * (8 * dim + 2 * mlp))
            }
        }
    }

    fn build<D: Dev>(&self, plan: &AlignPlan, init: &Init<D>) -> Result<Box<dyn Aligner<D>>> {
        let grid = plan.student.grid;
        let (dim, mlp) = (self.dim, self.mlp.unwrap_or(4 * self.dim));
        let mut positions = init.worked_out("decoder_pos_embed", &[1, 1 + grid.patches(), dim], || {
            sincos_positions(dim, grid.rows, grid.columns)
        })?;
        positions.trainable = false;
        let config = BlockConfig { dim, heads: self.heads, mlp, eps: self.eps, act: Act::Gelu, layer_scale: false };
        let name = |i: usize| format!("decoder_blocks.{i}");
        let embed = || Linear::new(init, "decoder_embed", dim, plan.student.arch.dim, Bias::With);
        let blocks = match self.attention {
            DecoderAttention::Full => Blocks::Full(
                embed()?,
                (0..self.depth).map(|i| Block::new(init, &name(i), config)).collect::<Result<_>>()?,
            ),
            DecoderAttention::MaskedQueries => Blocks::MaskedQueries(
                embed()?,
                (0..self.depth).map(|i| QueryBlock::new(init, &name(i), config)).collect::<Result<_>>()?,
            ),
            DecoderAttention::Cross => {
                let levels = self.levels.resolve(plan.student.arch.depth).map_err(|r| r.under("levels"))?.len();
                let from = plan.student.arch.dim;
                Blocks::Cross(
                    (levels > 1).then(|| LevelMix::new(init, self.depth, levels, from, self.eps)).transpose()?,
                    (0..self.depth).map(|i| CrossBlock::new(init, &name(i), from, config)).collect::<Result<_>>()?,
                )
            }
        };
        Ok(Box::new(DecoderModule {
            mask_token: init.normal("mask_token", &[1, 1, dim], 0.02)?,
            positions,
            blocks,
            norm: Norm::new(init, "decoder_norm", dim, self.eps)?,
            pred: Linear::new(init, "decoder_pred", plan.width, dim, Bias::With)?,
        }))
    }
}

register!(aligner "decoder" => Decoder, "a transformer decoder over mask tokens",
    example: "{ type: decoder, dim: 512, depth: 8, heads: 16 }", paper: "MAE, arXiv 2111.06377");

/// The second half of a block: LayerNorm, linear, GELU, linear, and what came in.
struct Mlp<D: Dev> {
    norm: Norm<D>,
    fc1: Linear<D>,
    fc2: Linear<D>,
}

impl<D: Dev> Mlp<D> {
    fn new(init: &Init<D>, name: &str, c: BlockConfig) -> Result<Self> {
        Ok(Mlp {
            norm: Norm::new(init, &format!("{name}.norm2"), c.dim, c.eps)?,
            fc1: Linear::new(init, &format!("{name}.mlp.fc1"), c.mlp, c.dim, Bias::With)?,
            fc2: Linear::new(init, &format!("{name}.mlp.fc2"), c.dim, c.mlp, Bias::With)?,
        })
    }

    fn forward(&self, cx: &Context<D>, r: &mut Recorder<D>, x: &Matrix<D>) -> Result<Matrix<D>> {
        let k = &cx.kernels;
        let y = k.layer_norm(r, x, &self.norm)?;
        let y = k.linear(r, &y, &self.fc1, Act::Gelu)?;
        let y = k.linear(r, &y, &self.fc2, Act::None)?;
        k.add(r, x, &y)
    }

    fn each_mut(&mut self, f: &mut dyn FnMut(&mut Param<D>)) {
        self.norm.each_mut(f);
        self.fc1.each_mut(f);
        self.fc2.each_mut(f);
    }
}

/// A block whose queries are some of the tokens, and whose keys and values are all of them.
struct QueryBlock<D: Dev> {
    norm1: Norm<D>,
    q: Linear<D>,
    k: Linear<D>,
    v: Linear<D>,
    proj: Linear<D>,
    mlp: Mlp<D>,
    heads: usize,
}

impl<D: Dev> QueryBlock<D> {
    fn new(init: &Init<D>, name: &str, c: BlockConfig) -> Result<Self> {
        let linear = |part: &str| Linear::new(init, &format!("{name}.attn.{part}"), c.dim, c.dim, Bias::With);
        Ok(QueryBlock {
            norm1: Norm::new(init, &format!("{name}.norm1"), c.dim, c.eps)?,
            q: linear("q")?,
            k: linear("k")?,
            v: linear("v")?,
            proj: linear("proj")?,
            mlp: Mlp::new(init, name, c)?,
            heads: c.heads,
        })
    }

    /// `x` are the queries' tokens; `context` those that stay, `order` the rows of both that are attended to and
    /// `queries` the rows of `x` among them.
    fn forward(
        &self,
        cx: &Context<D>,
        r: &mut Recorder<D>,
        x: &Matrix<D>,
        context: &Matrix<D>,
        layout: &Layout,
    ) -> Result<Matrix<D>> {
        let k = &cx.kernels;
        let all = k.gather_rows(r, &[context.clone(), x.clone()], &layout.order)?;
        let all = k.layer_norm(r, &all, &self.norm1)?;
        let mine = k.gather_rows(r, std::slice::from_ref(&all), &layout.masked)?;
        let q = k.linear(r, &mine, &self.q, Act::None)?;
        let keys = k.linear(r, &all, &self.k, Act::None)?;
        let values = k.linear(r, &all, &self.v, Act::None)?;
        let shape = AttentionShape {
            batch: layout.batch,
            heads: self.heads,
            queries: layout.masked.len() / layout.batch,
            keys: layout.order.len() / layout.batch,
        };
        let y = k.attention(r, &q, &keys, &values, shape)?;
        let y = k.linear(r, &y, &self.proj, Act::None)?;
        let x = k.add(r, x, &y)?;
        self.mlp.forward(cx, r, &x)
    }

    fn each_mut(&mut self, f: &mut dyn FnMut(&mut Param<D>)) {
        self.norm1.each_mut(f);
        for linear in [&mut self.q, &mut self.k, &mut self.v, &mut self.proj] {
            linear.each_mut(f);
        }
        self.mlp.each_mut(f);
    }
}

/// A block whose queries are the mask tokens, and whose keys and values are the student's, in the student's width.
struct CrossBlock<D: Dev> {
    norm1: Norm<D>,
    q: Linear<D>,
    kv: Linear<D>,
    proj: Linear<D>,
    mlp: Mlp<D>,
    heads: usize,
}

impl<D: Dev> CrossBlock<D> {
    fn new(init: &Init<D>, name: &str, from: usize, c: BlockConfig) -> Result<Self> {
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

    fn forward(
        &self,
        cx: &Context<D>,
        r: &mut Recorder<D>,
        x: &Matrix<D>,
        context: &Matrix<D>,
        batch: usize,
    ) -> Result<Matrix<D>> {
        let k = &cx.kernels;
        let y = k.layer_norm(r, x, &self.norm1)?;
        let q = k.linear(r, &y, &self.q, Act::None)?;
        let kv = k.linear(r, context, &self.kv, Act::None)?;
        let shape =
            AttentionShape { batch, heads: self.heads, queries: x.shape().0 / batch, keys: context.shape().0 / batch };
        let y = k.cross_attention(r, &q, &kv, shape)?;
        let y = k.linear(r, &y, &self.proj, Act::None)?;
        let x = k.add(r, x, &y)?;
        self.mlp.forward(cx, r, &x)
    }

    fn each_mut(&mut self, f: &mut dyn FnMut(&mut Param<D>)) {
        self.norm1.each_mut(f);
        for linear in [&mut self.q, &mut self.kv, &mut self.proj] {
            linear.each_mut(f);
        }
        self.mlp.each_mut(f);
    }
}

/// What each block attends to: a linear mix of the student's levels and a LayerNorm, learned for each (CrossMAE's
/// weighted feature maps).
struct LevelMix<D: Dev> {
    weight: Param<D>,
    norms: Vec<Norm<D>>,
}

impl<D: Dev> LevelMix<D> {
    fn new(init: &Init<D>, blocks: usize, levels: usize, width: usize, eps: f64) -> Result<Self> {
        Ok(LevelMix {
            // The official code draws it from a normal and then, as every linear layer, from Xavier's uniform.
            weight: init.xavier("wfm.linear.weight", &[blocks, levels])?,
            norms: (0..blocks)
                .map(|i| Norm::new(init, &format!("dec_norms.{i}"), width, eps))
                .collect::<Result<_>>()?,
        })
    }

    fn forward(&self, cx: &Context<D>, r: &mut Recorder<D>, levels: &[Matrix<D>]) -> Result<Vec<Matrix<D>>> {
        let blocks: Vec<usize> = (0..self.norms.len()).collect();
        let mixed = cx.kernels.mix(r, levels, &self.weight.matrix(blocks.len()), &blocks)?;
        mixed.iter().zip(&self.norms).map(|(x, norm)| cx.kernels.layer_norm(r, x, norm)).collect()
    }

    fn each_mut(&mut self, f: &mut dyn FnMut(&mut Param<D>)) {
        f(&mut self.weight);
        self.norms.iter_mut().for_each(|norm| norm.each_mut(f));
    }
}

/// What comes between mask tokens and prediction. The first two embed the student's tokens in the decoder's width.
enum Blocks<D: Dev> {
    Full(Linear<D>, Vec<Block<D>>),
    MaskedQueries(Linear<D>, Vec<QueryBlock<D>>),
    Cross(Option<LevelMix<D>>, Vec<CrossBlock<D>>),
}

struct DecoderModule<D: Dev> {
    mask_token: Param<D>,
    positions: Param<D>,
    blocks: Blocks<D>,
    norm: Norm<D>,
    pred: Linear<D>,
}

/// Where tokens are among the rows of a decoder.
struct Layout {
    batch: usize,
    /// Rows of (student's tokens, mask tokens) image by image: the student's first.
    order: Vec<u32>,
    /// Rows of the mask tokens in that order.
    masked: Vec<u32>,
}

impl Layout {
    fn new(masks: &Masks, held_each: usize) -> Self {
        let (batch, masked_each) = (masks.batch, masks.masked_each());
        let mut layout = Layout { batch, order: Vec::new(), masked: Vec::new() };
        for image in 0..batch {
            layout.order.extend((image * held_each..(image + 1) * held_each).map(|i| i as u32));
            layout.masked.extend((0..masked_each).map(|i| (layout.order.len() + i) as u32));
            let first = batch * held_each + image * masked_each;
            layout.order.extend((first..first + masked_each).map(|i| i as u32));
        }
        layout
    }
}

impl<D: Dev> Module<D> for DecoderModule<D> {
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param<D>)) {
        if let Blocks::Full(embed, _) | Blocks::MaskedQueries(embed, _) = &mut self.blocks {
            embed.each_mut(f);
        }
        f(&mut self.mask_token);
        f(&mut self.positions);
        match &mut self.blocks {
            Blocks::Full(_, blocks) => blocks.iter_mut().for_each(|b| b.each_mut(f)),
            Blocks::MaskedQueries(_, blocks) => blocks.iter_mut().for_each(|b| b.each_mut(f)),
            Blocks::Cross(mix, blocks) => {
                mix.iter_mut().for_each(|m| m.each_mut(f));
                blocks.iter_mut().for_each(|b| b.each_mut(f));
            }
        }
        self.norm.each_mut(f);
        self.pred.each_mut(f);
    }
}

impl<D: Dev> DecoderModule<D> {
    /// The fixed positions of some tokens of each image.
    fn positions(&self, cx: &Context<D>, masks: &Masks, tokens: Tokens) -> Result<Matrix<D>> {
        let table = self.positions.matrix(self.positions.dims[1]);
        // The class token's row is the first of the table, whether the student has one or not.
        let rows = masks.rows(tokens, true);
        cx.kernels.gather_rows(&mut Recorder::inference(), &[table], &rows)
    }

    /// The student's tokens in the decoder's width.
    fn embed(
        &self,
        cx: &Context<D>,
        r: &mut Recorder<D>,
        input: &AlignInput<D>,
        embed: &Linear<D>,
    ) -> Result<Matrix<D>> {
        let x = cx.kernels.linear(r, &input.levels[0], embed, Act::None)?;
        cx.kernels.add_constant(r, &x, &self.positions(cx, input.masks, input.held)?)
    }
}

impl<D: Dev> Aligner<D> for DecoderModule<D> {
    fn forward(&self, cx: &Context<D>, r: &mut Recorder<D>, input: &AlignInput<D>) -> Result<Vec<Matrix<D>>> {
        let (k, masks) = (&cx.kernels, input.masks);
        let tokens = k.gather_rows(r, &[self.mask_token.matrix(1)], &vec![0; masks.masked.len()])?;
        let tokens = k.add_constant(r, &tokens, &self.positions(cx, masks, predicted())?)?;
        let layout = || Layout::new(masks, input.held.count(masks.visible_each(), 0));
        let every = Tokens { masked: true, ..input.held };
        let (x, decoded) = match &self.blocks {
            Blocks::Full(embed, blocks) => {
                let (student, layout) = (self.embed(cx, r, input, embed)?, layout());
                let mut x = k.gather_rows(r, &[student, tokens], &layout.order)?;
                let run = BlockRun {
                    batch: masks.batch,
                    tokens: layout.order.len() / masks.batch,
                    branch_scale: None,
                    recompute: cx.recompute,
                };
                for block in blocks {
                    x = k.block(r, &x, block, &run)?;
                }
                (x, every)
            }
            Blocks::MaskedQueries(embed, blocks) => {
                let (student, layout) = (self.embed(cx, r, input, embed)?, layout());
                let mut x = tokens;
                for block in blocks {
                    x = block.forward(cx, r, &x, &student, &layout)?;
                }
                (k.gather_rows(r, &[student, x], &layout.order)?, every)
            }
            Blocks::Cross(mix, blocks) => {
                let mixed = mix.as_ref().map(|mix| mix.forward(cx, r, input.levels)).transpose()?;
                let mut x = tokens;
                for (i, block) in blocks.iter().enumerate() {
                    let context = mixed.as_ref().map_or(&input.levels[0], |mixed| &mixed[i]);
                    x = block.forward(cx, r, &x, context, masks.batch)?;
                }
                (x, predicted())
            }
        };
        let x = match masks.within(input.tokens, decoded) {
            Some(rows) => k.gather_rows(r, &[x], &rows)?,
            None => x,
        };
        let x = k.layer_norm(r, &x, &self.norm)?;
        Ok(vec![k.linear(r, &x, &self.pred, Act::None)?])
    }
}

/// The predicted patches alone.
fn predicted() -> Tokens {
    Tokens { masked: true, ..Tokens::default() }
}
