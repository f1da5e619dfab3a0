//! The vision transformer, student and teacher alike. timm's names; "An Image is Worth 16x16 Words", arXiv 2010.11929.

use std::{collections::BTreeMap, ops::Range};

use maskalign_engine::{
    Context, ImageBatch, Result, Role, Tape, Tensor,
    images::{Patches, cut_patches, resize_images_bicubic},
    ops::{self, Act, Begun, BlockRun},
};
use maskalign_registry::Refusal;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Bias, Block, BlockConfig, Init, Linear, Module, Norm, Param, sincos_positions, statistics::Statistics};
use crate::component;

/// Sizes of a tower: a name such as `base_16` or the numbers themselves.
///
/// ```
/// # use maskalign_core::prelude::*;
/// let arch = Arch::named("base_16").expect("a name of the list");
/// assert_eq!((arch.dim, arch.grid(224)?.patches()), (768, 196));
/// assert!(Arch { heads: 5, ..arch }.check().is_err());
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arch {
    /// Channels.
    pub dim: usize,
    /// Blocks.
    pub depth: usize,
    /// Attention heads; `dim` is a multiple.
    pub heads: usize,
    /// Channels inside the MLP.
    pub mlp: usize,
    /// Side of a patch in pixels.
    pub patch: usize,
}

/// (name without the patch, dim, depth, heads); the MLP is four times as wide.
const NAMED: [(&str, usize, usize, usize); 5] = [
    ("tiny", 192, 12, 3),
    ("small", 384, 12, 6),
    ("base", 768, 12, 12),
    ("large", 1024, 24, 16),
    ("huge", 1280, 32, 16),
];
const PATCHES: [usize; 4] = [8, 14, 16, 32];
/// Attention over the square of more patches fits no machine.
const MOST_PATCHES_A_SIDE: usize = 256;

impl Arch {
    /// The sizes behind a name such as `large_14`.
    pub fn named(name: &str) -> Option<Self> {
        let (size, patch) = name.rsplit_once('_')?;
        let patch = patch.parse().ok().filter(|p| PATCHES.contains(p))?;
        let &(_, dim, depth, heads) = NAMED.iter().find(|named| named.0 == size)?;
        Some(Arch { dim, depth, heads, mlp: 4 * dim, patch })
    }

    /// All names.
    pub fn names() -> Vec<String> {
        NAMED.iter().flat_map(|n| PATCHES.map(|p| format!("{}_{p}", n.0))).collect()
    }

    /// The name, where the sizes have one.
    pub fn name(&self) -> Option<String> {
        Self::names().into_iter().find(|name| Self::named(name).as_ref() == Some(self))
    }

    /// Refuses sizes that no tower can have.
    ///
    /// # Errors
    /// Names the size at fault, in `arch`.
    pub fn check(&self) -> Result<(), Refusal> {
        if !self.dim.is_multiple_of(self.heads) {
            let message = format!("dim {} is not a multiple of heads {}", self.dim, self.heads);
            return Err(Refusal::new("heads", message).related(["dim"], "the channels").under("arch"));
        }
        Ok(())
    }

    /// Patches along a side of a square image.
    ///
    /// # Errors
    /// The image's side is no multiple of the patch's.
    pub fn grid(&self, image_size: usize) -> Result<Grid, Refusal> {
        if image_size == 0 || !image_size.is_multiple_of(self.patch) {
            let message = format!("{image_size} pixels are not a whole number of patches of {}", self.patch);
            let patch = Refusal::new("patch", message).under("arch");
            return Err(patch.related(["image_size"], "the side of the image"));
        }
        let side = image_size / self.patch;
        if side > MOST_PATCHES_A_SIDE {
            let message = format!("{side}x{side} patches: towers take at most {MOST_PATCHES_A_SIDE} along a side");
            return Err(Refusal::new("image_size", message).related(["arch", "patch"], "the side of a patch"));
        }
        Ok(Grid { rows: side, columns: side })
    }
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(inline)]
struct Sizes {
    /// Channels of a token.
    #[schemars(range(min = 4, max = 65536))]
    dim: usize,
    /// Transformer blocks.
    #[schemars(range(min = 1, max = 1024))]
    depth: usize,
    /// Attention heads; `dim` must be a multiple.
    #[schemars(range(min = 1, max = 1024))]
    heads: usize,
    /// Channels inside the MLP; absent: four times `dim`.
    #[serde(default)]
    #[schemars(range(min = 1, max = 1048576))]
    mlp: Option<usize>,
    /// Side of a patch in pixels.
    #[schemars(range(min = 1, max = 4096))]
    patch: usize,
}

impl Serialize for Arch {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self.name() {
            Some(name) => name.serialize(s),
            None => {
                let Arch { dim, depth, heads, mlp, patch } = *self;
                Sizes { dim, depth, heads, mlp: Some(mlp), patch }.serialize(s)
            }
        }
    }
}

impl<'de> Deserialize<'de> for Arch {
    fn deserialize<De: Deserializer<'de>>(d: De) -> Result<Self, De::Error> {
        match serde_json::Value::deserialize(d)? {
            serde_json::Value::String(name) => {
                Arch::named(&name).ok_or_else(|| serde::de::Error::custom(format!("unknown architecture `{name}`")))
            }
            sizes => {
                let s: Sizes = serde_json::from_value(sizes).map_err(serde::de::Error::custom)?;
                let Sizes { dim, depth, heads, mlp, patch } = s;
                Ok(Arch { dim, depth, heads, mlp: mlp.unwrap_or(4 * dim), patch })
            }
        }
    }
}

impl JsonSchema for Arch {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Arch".into()
    }
    fn inline_schema() -> bool {
        true
    }
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let sizes = Sizes::json_schema(generator);
        json_schema!({
            "x-expected": "an architecture's name such as `base_16`, or {dim, depth, heads, patch}",
            "anyOf": [{ "type": "string", "enum": Arch::names() }, sizes],
        })
    }
}

/// Patches of an image.
///
/// ```
/// # use maskalign_core::prelude::*;
/// let grid = Grid { rows: 2, columns: 3 };
/// assert_eq!((grid.patches(), grid.to_string()), (6, "2x3".to_string()));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Patches from top to bottom.
    pub rows: usize,
    /// Patches from left to right.
    pub columns: usize,
}

impl Grid {
    /// All of them.
    pub fn patches(&self) -> usize {
        self.rows * self.columns
    }
}

impl std::fmt::Display for Grid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}", self.rows, self.columns)
    }
}

/// How many patches of an image a tower sees, and how many are to be predicted.
///
/// ```
/// # use maskalign_core::prelude::*;
/// let (grid, visible) = (Grid { rows: 7, columns: 7 }, 12);
/// let counts = Counts { visible, masked: grid.patches() - visible };
/// assert_eq!(counts.masked, 37);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Patches the student sees.
    pub visible: usize,
    /// Patches to be predicted.
    pub masked: usize,
}

/// What a tower makes of an image before it sees it.
#[derive(Clone, Copy, Debug)]
pub struct TowerInput {
    /// Side of the square image the tower runs at; another size is resized bicubically, without antialiasing.
    pub image_size: usize,
    /// Subtracted and divided by.
    pub statistics: Statistics,
}

impl TowerInput {
    /// Normalised patches as rows of channel, row, column: `[batch * K, 3 * patch * patch]`. `patches` holds the K
    /// wanted patch indices of each image; `None` takes all in order.
    pub fn patchify(&self, cx: &Context, images: &ImageBatch, patch: usize, patches: Option<&[u32]>) -> Vec<f32> {
        let resized;
        let (size, pixels) = if images.size == self.image_size {
            (images.size, &images.pixels)
        } else {
            resized = {
                let (from, to) = (images.size, self.image_size);
                resize_images_bicubic(cx.pool(), &images.pixels, [images.batch, 3, from, from], [to, to])
            };
            (self.image_size, &resized)
        };
        cut_patches(
            cx,
            Patches {
                images: pixels,
                batch: images.batch,
                height: size,
                width: size,
                patch,
                mean: self.statistics.mean,
                std: self.statistics.std,
            },
            patches,
        )
    }
}

/// What a tower shows of the patches that are masked.
///
/// ```
/// use maskalign_core::prelude::*;
///
/// // A student that shows mask tokens has rows for the masked patches too.
/// fn rows(student: &dyn StudentModel, counts: Counts) -> usize {
///     let shown = match student.shape().masked_patches {
///         MaskedPatches::Drop => 0,
///         MaskedPatches::MaskToken => counts.masked,
///     };
///     usize::from(student.shape().cls_token) + counts.visible + shown
/// }
/// ```
#[component]
#[derive(Copy, Default, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum MaskedPatches {
    /// Nothing: it sees the visible patches alone (MAE, MaskAlign).
    #[default]
    Drop,
    /// One learned vector, with each one's position (BEiT, SimMIM, data2vec).
    MaskToken,
}

/// Where the values of a tower's final norm come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinalNorm {
    /// From where those of its blocks come.
    Own,
    /// From nowhere: the tower's weights have none, and it is 1 and 0.
    Fresh,
}

/// The patches of a batch, by their indices in each image.
///
/// ```
/// use maskalign_core::prelude::*;
///
/// let masks = Masks::even(1, vec![3, 0], vec![1]);
/// let SeenPatches { visible, masked, uneven } = masks.seen();
/// assert_eq!((visible, masked, uneven), (&[3, 0][..], &[1][..], None));
/// ```
#[derive(Clone, Copy, Debug)]
pub struct SeenPatches<'a> {
    /// Those that are seen, image after image, in the order of their rows.
    pub visible: &'a [u32],
    /// Those that are to be predicted, likewise: a tower shows a mask token at each, where it has one.
    pub masked: &'a [u32],
    /// How many each image has, where they are not equally many in each. Together they are, so that images have equally
    /// many rows in a tower that shows mask tokens; no other can see them.
    pub uneven: Option<&'a [Counts]>,
}

impl SeenPatches<'_> {
    /// How many each of `batch` images has.
    pub fn counts(&self, batch: usize) -> Vec<Counts> {
        let each = || Counts { visible: self.visible.len() / batch, masked: self.masked.len() / batch };
        self.uneven.map_or_else(|| vec![each(); batch], <[Counts]>::to_vec)
    }
}

/// Everything that fixes a tower's parameters and arithmetic.
///
/// ```
/// # use maskalign_core::prelude::*;
/// let arch = Arch { dim: 8, depth: 2, heads: 2, mlp: 32, patch: 4 };
/// let config = VitConfig { input: input(8, Statistics::CLIP), pre_norm: true, ..VitConfig::plain(arch, 8) };
/// assert_eq!(config.grid(), Grid { rows: 2, columns: 2 });
/// ```
#[derive(Clone, Copy, Debug)]
pub struct VitConfig {
    /// Sizes.
    pub arch: Arch,
    /// Resolution and normalisation.
    pub input: TowerInput,
    /// Whether a class token leads.
    pub cls_token: bool,
    /// Whether positions are learned (else fixed sin-cos).
    pub learned_positions: bool,
    /// LayerNorm before the first block (CLIP).
    pub pre_norm: bool,
    /// Bias of the patch embedding (all but CLIP).
    pub patch_bias: Bias,
    /// Initial value of learned scales of the branches (DINOv2, BEiT); absent: there are none.
    pub layer_scale: Option<f64>,
    /// What stands for masked patches.
    pub masked_patches: MaskedPatches,
    /// Of the MLPs.
    pub act: Act,
    /// Of the LayerNorms.
    pub eps: f64,
    /// Outputs of the projection after the final norm (CLIP).
    pub projection: Option<usize>,
    /// Whether the final norm is that of the weights.
    pub final_norm: FinalNorm,
}

impl VitConfig {
    /// The tower of the paper, as MAE's students are: a class token, fixed positions, ImageNet's statistics, exact GELU and
    /// nothing that a family adds. A checkpoint's own tower is this but for what it has otherwise, which stays so when
    /// towers learn something new.
    pub fn plain(arch: Arch, image_size: usize) -> Self {
        VitConfig {
            arch,
            input: TowerInput { image_size, statistics: Statistics::IMAGENET },
            cls_token: true,
            learned_positions: false,
            pre_norm: false,
            patch_bias: Bias::With,
            layer_scale: None,
            masked_patches: MaskedPatches::Drop,
            act: Act::Gelu,
            eps: 1e-6,
            projection: None,
            final_norm: FinalNorm::Own,
        }
    }

    /// Patches of the square image the tower runs at.
    pub fn grid(&self) -> Grid {
        let side = self.input.image_size / self.arch.patch;
        Grid { rows: side, columns: side }
    }
}

/// The outputs of a tower.
///
/// ```
/// # use maskalign_core::{Device, prelude::*};
/// # let cx = Context::new(Device::Cpu, 1);
/// # let config = VitConfig::plain(Arch { dim: 8, depth: 2, heads: 2, mlp: 32, patch: 4 }, 8);
/// # let vit = Vit::new(&Init::new(cx.device(), 0, "x"), config)?;
/// # let images = ImageBatch { pixels: vec![0.5; 192], batch: 1, size: 8 };
/// let features: Features = vit.forward(&cx, &mut Tape::inference(), &images, None, None, |block| block == 0)?;
/// assert_eq!((features.tokens, features.last.shape()), (5, (5, 8)));
/// assert!(features.hidden.contains_key(&0) && !features.hidden.contains_key(&1));
/// # Ok::<(), Error>(())
/// ```
pub struct Features {
    /// Images.
    pub batch: usize,
    /// Tokens of an image, the class token included.
    pub tokens: usize,
    /// The embedded tokens before the first block, `[batch * tokens, dim]`.
    pub embed: Tensor,
    /// The residual stream after the last block that ran, `[batch * tokens, dim]`; no final norm.
    pub last: Tensor,
    /// The same after each block that was to be kept, by index.
    pub hidden: BTreeMap<usize, Tensor>,
}

/// How much of a tower a loss depends on.
///
/// ```
/// # use maskalign_core::prelude::*;
/// # let config = VitConfig::plain(Arch { dim: 8, depth: 2, heads: 2, mlp: 32, patch: 4 }, 8);
/// let mut vit = Vit::new(&Init::shapes(), config)?;
/// vit.set_reach(Reach { blocks: 1, ..Reach::default() });
/// let mut trained = Vec::new();
/// vit.visit(&mut |p| trained.extend(p.is_trained().then(|| p.name.clone())));
/// assert!(trained.iter().all(|name| !name.starts_with("blocks.1.") && !name.starts_with("norm.")));
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// Blocks that run, from the first.
    pub blocks: usize,
    /// Whether queries, keys and values of the block behind those are used.
    pub qkv: bool,
    /// Whether the final norm is used.
    pub norm: bool,
}

/// Factors of stochastic depth: for each block, of each sample, on the attention and on the MLP branch.
///
/// ```
/// # use maskalign_core::prelude::*;
/// // Two blocks, one image: the second block's MLP is left out.
/// let scales: BranchScales = vec![([1.0].into(), [1.0].into()), ([1.0].into(), [0.0].into())];
/// assert_eq!(scales[1].1[0], 0.0);
/// ```
pub type BranchScales = Vec<(std::sync::Arc<[f32]>, std::sync::Arc<[f32]>)>;

/// A vision transformer.
///
/// ```
/// # use maskalign_core::{Device, prelude::*};
/// # let cx = Context::new(Device::Cpu, 1);
/// # let config = VitConfig::plain(Arch { dim: 8, depth: 2, heads: 2, mlp: 32, patch: 4 }, 8);
/// let vit = Vit::new(&Init::new(cx.device(), 0, "student"), config)?;
/// let images = ImageBatch { pixels: vec![0.5; 3 * 8 * 8], batch: 1, size: 8 };
/// let features = vit.forward(&cx, &mut Tape::training(), &images, None, None, |_| false)?;
/// assert_eq!(features.last.shape(), (5, 8), "the class token and four patches");
/// # Ok::<(), Error>(())
/// ```
pub struct Vit {
    /// What it was built from.
    pub config: VitConfig,
    /// `cls_token`, `[1, 1, C]`.
    pub cls_token: Option<Param>,
    /// `mask_token`, `[1, 1, C]`.
    pub mask_token: Option<Param>,
    /// `pos_embed`, `[1, 1 + N, C]`; without a class token its first row is unused.
    pub pos_embed: Param,
    /// `patch_embed.proj`, `[C, 3, p, p]`.
    pub patch_embed: Linear,
    /// `norm_pre` (CLIP's `pre_layrnorm`).
    pub norm_pre: Option<Norm>,
    /// `blocks.I`.
    pub blocks: Vec<Block>,
    /// `norm`; not applied to hidden states.
    pub norm: Norm,
    /// `head`: CLIP's projection, without bias.
    pub head: Option<Linear>,
    /// Blocks that run: the loss may not need the last ones.
    reach: usize,
}

impl Vit {
    /// A tower with its initial values: Xavier-uniform for every linear layer and for the patch embedding as a
    /// matrix, zero biases, class token normal .02, norms 1 and 0.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn new(init: &Init, config: VitConfig) -> Result<Self> {
        let Arch { dim, depth, heads, mlp, patch } = config.arch;
        let grid = config.grid();
        let patch_weight = init.xavier("patch_embed.proj.weight", &[dim, 3, patch, patch])?;
        let mut pos_embed = if config.learned_positions {
            init.truncated_normal("pos_embed", &[1, 1 + grid.patches(), dim], 0.02)?
        } else {
            let values = || sincos_positions(dim, grid.rows, grid.columns);
            init.values("pos_embed", &[1, 1 + grid.patches(), dim], values)?
        };
        pos_embed.set_trained(config.learned_positions);
        let block = BlockConfig { dim, heads, mlp, eps: config.eps, act: config.act, layer_scale: config.layer_scale };
        Ok(Vit {
            cls_token: config.cls_token.then(|| init.normal("cls_token", &[1, 1, dim], 0.02)).transpose()?,
            mask_token: (config.masked_patches == MaskedPatches::MaskToken)
                .then(|| init.normal("mask_token", &[1, 1, dim], 0.02))
                .transpose()?,
            pos_embed,
            patch_embed: Linear::from_weight(init, "patch_embed.proj", patch_weight, config.patch_bias)?,
            norm_pre: config.pre_norm.then(|| Norm::new(init, "norm_pre", dim, config.eps)).transpose()?,
            blocks: (0..depth).map(|i| Block::new(init, &format!("blocks.{i}"), block)).collect::<Result<_>>()?,
            norm: Norm::new(init, "norm", dim, config.eps)?,
            head: config
                .projection
                .map(|outputs| Linear::new(init, "head", outputs, dim, Bias::Without))
                .transpose()?,
            reach: depth,
            config,
        })
    }

    /// Leaves out what the loss does not need.
    /// Their parameters stay as they are: no gradient, no update, no decay.
    pub fn set_reach(&mut self, reach: Reach) {
        self.reach = reach.blocks;
        for (i, block) in self.blocks.iter_mut().enumerate() {
            block.visit(&mut |p| p.set_trained(i < reach.blocks));
        }
        if let Some(block) = self.blocks.get_mut(reach.blocks).filter(|_| reach.qkv) {
            block.norm1.visit(&mut |p| p.set_trained(true));
            block.qkv.visit(&mut |p| p.set_trained(true));
        }
        self.norm.visit(&mut |p| p.set_trained(reach.norm));
    }

    /// Freezes the tower and packs its weights.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn pack(&mut self, cx: &Context) -> Result<()> {
        self.set_role(Role::Frozen);
        self.patch_embed.pack(cx)?;
        self.head.as_mut().map_or(Ok(()), |head| head.pack(cx))?;
        let (last, before) = self.blocks.split_last_mut().expect("a tower has at least one block");
        before.iter_mut().try_for_each(|block| block.pack(cx))?;
        last.pack_split(cx)
    }

    /// Tokens before the first block, `[batch * tokens, C]`; the rows of an image are its class token, the visible patches
    /// in the order given, and mask tokens at the masked ones, as far as the tower has them. `None`: every patch is visible.
    ///
    /// # Errors
    /// Out of memory on the device, as below.
    pub fn embed(
        &self,
        cx: &Context,
        tape: &mut Tape,
        images: &ImageBatch,
        seen: Option<SeenPatches>,
    ) -> Result<Features> {
        self.embed_at(cx, tape, images, self.config.input.image_size, seen)
    }

    /// As [`Vit::embed`], running at `size` pixels, a multiple of the patch's: positions are resized bicubically from the
    /// tower's own, as those of files are.
    ///
    /// # Errors
    /// As there.
    pub fn embed_at(
        &self,
        cx: &Context,
        tape: &mut Tape,
        images: &ImageBatch,
        size: usize,
        seen: Option<SeenPatches>,
    ) -> Result<Features> {
        let Arch { dim, patch, .. } = self.config.arch;
        let batch = images.batch;
        let patches = (size / patch).pow(2);
        let input = TowerInput { image_size: size, ..self.config.input };
        let counts = seen.map_or(vec![Counts { visible: patches, masked: 0 }; batch], |seen| seen.counts(batch));
        let pixels = match seen {
            Some(SeenPatches { visible, uneven: Some(_), .. }) => {
                patchify_uneven(cx, &input, images, patch, visible, &counts)
            }
            _ => input.patchify(cx, images, patch, seen.map(|seen| seen.visible)),
        };
        let shown: usize = counts.iter().map(|counts| counts.visible).sum();
        let columns = pixels.len() / shown;
        let x = self.patch_embed.forward(cx, tape, &cx.tensor(pixels, shown, columns)?, Act::None)?;

        let resized =
            (size != self.config.input.image_size).then(|| self.positions_at(cx, tape, size / patch)).transpose()?;
        let table = resized.as_ref().unwrap_or(&self.pos_embed.value);
        let rows: Vec<u32> = match seen {
            Some(seen) => seen.visible.iter().map(|i| i + 1).collect(),
            None => (0..batch).flat_map(|_| 1..=patches as u32).collect(),
        };
        let add_positions = |tape: &mut Tape, x: &Tensor, rows: &[u32]| {
            let positions = ops::gather_rows(cx, tape, &[table], rows)?;
            ops::add(cx, tape, x, &positions)
        };
        let mut x = add_positions(tape, &x, &rows)?;
        let cls = self.cls_token.as_ref().map(|cls| add_positions(tape, &cls.value, &[0])).transpose()?;
        let masks = match (&self.mask_token, seen) {
            (Some(token), Some(seen)) if !seen.masked.is_empty() => {
                let repeated = ops::gather_rows(cx, tape, &[&token.value], &vec![0; seen.masked.len()])?;
                let rows: Vec<u32> = seen.masked.iter().map(|i| i + 1).collect();
                Some(add_positions(tape, &repeated, &rows)?)
            }
            _ => None,
        };
        let lead = usize::from(cls.is_some());
        let rows_of = |counts: &Counts| lead + counts.visible + if masks.is_some() { counts.masked } else { 0 };
        let tokens = rows_of(&counts[0]);
        debug_assert!(counts.iter().all(|counts| rows_of(counts) == tokens), "images have equally many rows");
        if cls.is_some() || masks.is_some() {
            let mut order = Vec::with_capacity(batch * tokens);
            let (mut start, mut end) = (lead, lead + shown);
            for Counts { visible, masked } in &counts {
                order.extend((0..lead).chain(start..start + visible).map(|row| row as u32));
                start += visible;
                if masks.is_some() {
                    order.extend((end..end + masked).map(|row| row as u32));
                    end += masked;
                }
            }
            let parts: Vec<&Tensor> = cls.iter().chain([&x]).chain(&masks).collect();
            x = ops::gather_rows(cx, tape, &parts, &order)?;
        }
        if let Some(norm) = &self.norm_pre {
            x = norm.forward(cx, tape, &x)?;
        }
        debug_assert_eq!(dim, x.columns());
        Ok(Features { batch, tokens, last: x.clone(), embed: x, hidden: BTreeMap::new() })
    }

    /// Positions of a grid of `side` by `side` patches, the class token's first: `[1 + side * side, C]`.
    fn positions_at(&self, cx: &Context, tape: &mut Tape, side: usize) -> Result<Tensor> {
        let own = self.config.grid();
        let (from, to) = (own.patches(), side * side);
        // What each patch's position gives to each of the others': the image of a single one.
        let single: Vec<f32> = (0..from * from).map(|i| if i % (from + 1) == 0 { 1.0 } else { 0.0 }).collect();
        let planes = resize_images_bicubic(cx.pool(), &single, [1, from, own.rows, own.columns], [side, side]);
        let mut matrix = vec![0.0; (1 + to) * (1 + from)];
        matrix[0] = 1.0;
        for row in 0..to {
            for column in 0..from {
                matrix[(1 + row) * (1 + from) + 1 + column] = planes[column * to + row];
            }
        }
        ops::matmul(cx, tape, &cx.tensor(matrix, 1 + to, 1 + from)?, &self.pos_embed.value)
    }

    /// The whole tower, up to the blocks that the loss needs; `keep` says whose outputs are wanted.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn forward(
        &self,
        cx: &Context,
        tape: &mut Tape,
        images: &ImageBatch,
        seen: Option<SeenPatches>,
        scales: Option<&BranchScales>,
        keep: impl Fn(usize) -> bool,
    ) -> Result<Features> {
        self.forward_at(cx, tape, images, self.config.input.image_size, seen, scales, keep)
    }

    /// As [`Vit::forward`], running at `size` pixels: see [`Vit::embed_at`].
    ///
    /// # Errors
    /// As there.
    #[expect(clippy::too_many_arguments, reason = "what `forward` takes, and the size")]
    pub fn forward_at(
        &self,
        cx: &Context,
        tape: &mut Tape,
        images: &ImageBatch,
        size: usize,
        seen: Option<SeenPatches>,
        scales: Option<&BranchScales>,
        keep: impl Fn(usize) -> bool,
    ) -> Result<Features> {
        let mut features = self.embed_at(cx, tape, images, size, seen)?;
        self.run_blocks(cx, tape, &mut features, 0..self.reach, scales, keep)?;
        Ok(features)
    }

    /// The whole tower without gradients, and how much the class token attends to each patch in the last block, mean over
    /// heads: `[batch, patches]`. The tower has a class token.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn forward_attending(
        &self,
        cx: &Context,
        images: &ImageBatch,
        keep: impl Fn(usize) -> bool,
    ) -> Result<(Features, Vec<f32>)> {
        let tape = &mut Tape::inference();
        let last = self.blocks.len() - 1;
        let mut features = self.embed(cx, tape, images, None)?;
        self.run_blocks(cx, tape, &mut features, 0..last, None, &keep)?;
        let run = BlockRun { batch: features.batch, tokens: features.tokens, ..Default::default() };
        let by_head = self.blocks[last].class_attention_by_head(cx, &features.last, &run)?;
        let (heads, patches) = (self.config.arch.heads, features.tokens - 1);
        let mean = |image: &[f32]| -> Vec<f32> {
            let sum = |patch: usize| -> f32 { (0..heads).map(|head| image[head * patches + patch]).sum() };
            (0..patches).map(|patch| sum(patch) / heads as f32).collect()
        };
        let attention = by_head.chunks_exact(heads * patches).flat_map(mean).collect();
        self.run_blocks(cx, tape, &mut features, last..last + 1, None, keep)?;
        Ok((features, attention))
    }

    /// Runs some blocks on from where `features` are.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn run_blocks(
        &self,
        cx: &Context,
        tape: &mut Tape,
        features: &mut Features,
        blocks: Range<usize>,
        scales: Option<&BranchScales>,
        keep: impl Fn(usize) -> bool,
    ) -> Result<()> {
        for i in blocks {
            let run = BlockRun {
                batch: features.batch,
                tokens: features.tokens,
                branch_scale: scales.map(|scales| scales[i].clone()),
                recompute: cx.recompute(),
            };
            features.last = self.blocks[i].forward(cx, tape, &features.last, &run)?;
            if keep(i) {
                features.hidden.insert(i, features.last.clone());
            }
        }
        Ok(())
    }

    /// What the attention of a block is computed from: queries, keys and values, side by side, `[batch * tokens, 3 * C]`, from
    /// features that hold what enters the block.
    ///
    /// # Errors
    /// Out of memory on the device.
    ///
    /// # Panics
    /// The block before it was not kept.
    pub fn queries_keys_values(
        &self,
        cx: &Context,
        tape: &mut Tape,
        features: &Features,
        block: usize,
    ) -> Result<Tensor> {
        let x = block.checked_sub(1).map_or(&features.embed, |before| &features.hidden[&before]);
        self.blocks[block].queries_keys_values(cx, tape, x)
    }

    /// A frozen tower up to its last block, whose attention is wanted before its rows are; `keep` as above.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn begin(&self, cx: &Context, images: &ImageBatch, keep: impl Fn(usize) -> bool) -> Result<(Features, Begun)> {
        let mut tape = Tape::inference();
        let mut features = self.embed(cx, &mut tape, images, None)?;
        let run = BlockRun { batch: features.batch, tokens: features.tokens, ..Default::default() };
        let (last, before) = self.blocks.split_last().expect("a tower has at least one block");
        self.run_blocks(cx, &mut tape, &mut features, 0..before.len(), None, keep)?;
        let begun = last.begin(cx, &features.last, &run)?;
        Ok((features, begun))
    }

    /// The rest of [`Vit::begin`]: the last block's output for the wanted token rows of each image.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn finish(&self, cx: &Context, features: &Features, begun: Begun, rows: Option<&[u32]>) -> Result<Tensor> {
        let run = BlockRun { batch: features.batch, tokens: features.tokens, ..Default::default() };
        let last = self.blocks.last().expect("a tower has at least one block");
        last.finish(cx, &features.last, &run, begun, rows)
    }

    /// How much the class token attends to each patch in the last block that runs, of each head by itself: `[batch, heads,
    /// patches]`, for people to look at. `None` without a class token, or where no block runs.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn class_attention(&self, cx: &Context, images: &ImageBatch) -> Result<Option<Vec<f32>>> {
        let (Some(last), true) = (self.reach.checked_sub(1), self.config.cls_token) else { return Ok(None) };
        let tape = &mut Tape::inference();
        let mut features = self.embed(cx, tape, images, None)?;
        self.run_blocks(cx, tape, &mut features, 0..last, None, |_| false)?;
        let run = BlockRun { batch: features.batch, tokens: features.tokens, ..Default::default() };
        self.blocks[last].class_attention_by_head(cx, &features.last, &run).map(Some)
    }

    /// The final norm.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn final_norm(&self, cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
        self.norm.forward(cx, tape, x)
    }
}

/// The normalised patches of images that do not show equally many.
fn patchify_uneven(
    cx: &Context,
    input: &TowerInput,
    images: &ImageBatch,
    patch: usize,
    visible: &[u32],
    counts: &[Counts],
) -> Vec<f32> {
    let each = images.pixels.len() / images.batch;
    let mut first = 0;
    let mut rows = Vec::new();
    for (pixels, counts) in images.pixels.chunks_exact(each).zip(counts) {
        let image = ImageBatch { pixels: pixels.to_vec(), batch: 1, size: images.size };
        rows.extend(input.patchify(cx, &image, patch, Some(&visible[first..first + counts.visible])));
        first += counts.visible;
    }
    rows
}

impl Module for Vit {
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        self.cls_token.iter_mut().for_each(&mut *f);
        self.mask_token.iter_mut().for_each(&mut *f);
        f(&mut self.pos_embed);
        self.patch_embed.visit(f);
        self.norm_pre.iter_mut().for_each(|n| n.visit(f));
        self.blocks.iter_mut().for_each(|b| b.visit(f));
        self.norm.visit(f);
        self.head.iter_mut().for_each(|h| h.visit(f));
    }
}
