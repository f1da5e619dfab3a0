//! The namings of vision towers' tensors, each a table: what a checkpoint calls a tensor, what we call it, what changes.
//!
//! A plugin adds one with [`register_naming!`](crate::register_naming): files in it are then read wherever `weights` stands in
//! a recipe, and written by `export --format KEY`.

use std::sync::OnceLock;

/// A family of vision towers, as far as weights are concerned.
///
/// ```
/// # use maskalign_core::prelude::*;
/// assert_eq!(Family::Dinov2.name(), "dinov2");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// CLIP: no patch bias, a norm before the blocks, a projection.
    Clip,
    /// DINO's first version: a plain ViT.
    Dino,
    /// DINOv2: a ViT with LayerScale.
    Dinov2,
    /// A plain ViT: timm's, MAE's, a MaskAlign student's.
    Vit,
}

impl Family {
    /// The family's name in a recipe.
    pub fn name(self) -> &'static str {
        match self {
            Family::Clip => "clip",
            Family::Dino => "dino",
            Family::Dinov2 => "dinov2",
            Family::Vit => "vit",
        }
    }
}

/// What becomes of a tensor's values and shape between two namings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    Same,
    /// Dimensions of length one are put in front, up to this rank.
    ToRank(usize),
    /// `[A,B]` -> `[B,A]`.
    Transposed,
    /// A third of a tensor: 0 query, 1 key, 2 value, one after the other along the first dimension.
    Third(usize),
}
use Change::{Same, Third, ToRank, Transposed};

/// One row of a naming: theirs, ours, and what changes. A final `*` stands for both `weight` and `bias`.
pub type Row = (&'static str, &'static str, Change);

/// What a file of a naming may hold besides a tower where it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writes {
    /// Nothing.
    Tower,
    /// A classifier, by timm's conventions: `head.*`, and `fc_norm.*` in place of the final norm where tokens are averaged.
    Classifier,
}

/// A naming of a vision tower's tensors.
///
/// Our own names are timm's; the module `weights::families` lists them with their shapes.
#[derive(Debug)]
pub struct Naming {
    /// What `export --format` calls it.
    pub key: &'static str,
    /// What messages call it.
    pub name: &'static str,
    /// One line for `export --help`: what reads such files.
    pub about: &'static str,
    /// The families whose towers may be in it.
    pub families: &'static [Family],
    /// The end of a name that, with names of blocks, tells this naming.
    pub mark: &'static str,
    /// Another one, where namings share the first.
    pub second_mark: Option<&'static str>,
    /// The tensors before and after the blocks.
    pub tower: &'static [Row],
    /// What comes before a block's number, such as `blocks.`.
    pub blocks: &'static str,
    /// The tensors of a block, behind `NUMBER.`.
    pub block: &'static [Row],
    /// What stands before every name where such a file is written.
    pub prefix: &'static str,
    /// The family of the one model whose naming it is, which has all of its tensors and no other; `None` for a naming of
    /// towers of any kind.
    pub model: Option<Family>,
    /// What may be written beside the tower.
    pub writes: Writes,
    /// What is left out of such files besides what is left out of all, each with the reason. A name that ends in `.` or `_`
    /// stands for all that begin with it.
    pub beside: &'static [(&'static str, &'static str)],
}

inventory::collect!(Naming);

/// Registers a [`Naming`]: files in it are read like those of the built-in ones.
///
/// ```
/// use maskalign_core::{
///     prelude::*,
///     weights::{Change, Naming, Writes, naming},
/// };
///
/// register_naming!(Naming {
///     key: "stem",
///     name: "Stem",
///     about: "a program that calls the patch embedding `stem`",
///     families: &[Family::Vit],
///     mark: "stem.weight",
///     second_mark: None,
///     tower: &[("stem.*", "patch_embed.proj.*", Change::Same), ("norm.*", "norm.*", Change::Same)],
///     blocks: "blocks.",
///     block: &[("attn.qkv.*", "attn.qkv.*", Change::Same)],
///     prefix: "",
///     model: None,
///     writes: Writes::Tower,
///     beside: &[],
/// });
///
/// assert!(naming("stem").is_some());
/// ```
#[macro_export]
macro_rules! register_naming {
    ($naming:expr) => {
        $crate::__private::inventory::submit! { $naming }
    };
}

/// All namings, in the order in which they are tried: those that ask for more first.
pub fn namings() -> &'static [&'static Naming] {
    static ALL: OnceLock<Vec<&'static Naming>> = OnceLock::new();
    ALL.get_or_init(|| {
        let mut all: Vec<&Naming> = inventory::iter::<Naming>.into_iter().collect();
        all.sort_by_key(|naming| (naming.second_mark.is_none(), naming.name, naming.key));
        all
    })
}

/// The naming of that key.
pub fn naming(key: &str) -> Option<&'static Naming> {
    namings().iter().copied().find(|naming| naming.key == key)
}

const OPENAI: Naming = Naming {
    key: "openai",
    about: "the vision tower of OpenAI's and open_clip's CLIP",
    prefix: "visual.",
    model: Some(Family::Clip),
    writes: Writes::Tower,
    beside: &[],
    name: "OpenAI / open_clip",
    families: &[Family::Clip],
    mark: "conv1.weight",
    second_mark: None,
    tower: &[
        ("conv1.*", "patch_embed.proj.*", Same),
        ("class_embedding", "cls_token", ToRank(3)),
        ("positional_embedding", "pos_embed", ToRank(3)),
        ("ln_pre.*", "norm_pre.*", Same),
        ("ln_post.*", "norm.*", Same),
        ("proj", "head.weight", Transposed),
    ],
    blocks: "transformer.resblocks.",
    block: &[
        ("ln_1.*", "norm1.*", Same),
        ("attn.in_proj_weight", "attn.qkv.weight", Same),
        ("attn.in_proj_bias", "attn.qkv.bias", Same),
        ("attn.out_proj.*", "attn.proj.*", Same),
        ("ls_1.gamma", "ls1.gamma", Same),
        ("ln_2.*", "norm2.*", Same),
        ("mlp.c_fc.*", "mlp.fc1.*", Same),
        ("mlp.c_proj.*", "mlp.fc2.*", Same),
        ("ls_2.gamma", "ls2.gamma", Same),
    ],
};

const HF_CLIP: Naming = Naming {
    key: "hf_clip",
    about: "the vision tower of Hugging Face's CLIPModel",
    prefix: "vision_model.",
    model: Some(Family::Clip),
    writes: Writes::Tower,
    beside: &[],
    name: "Hugging Face CLIP",
    families: &[Family::Clip],
    mark: "embeddings.patch_embedding.weight",
    second_mark: None,
    tower: &[
        ("embeddings.patch_embedding.*", "patch_embed.proj.*", Same),
        ("embeddings.class_embedding", "cls_token", ToRank(3)),
        ("embeddings.position_embedding.weight", "pos_embed", ToRank(3)),
        // The misspelling is theirs.
        ("pre_layrnorm.*", "norm_pre.*", Same),
        ("post_layernorm.*", "norm.*", Same),
        ("visual_projection.weight", "head.weight", Same),
    ],
    blocks: "encoder.layers.",
    block: &[
        ("layer_norm1.*", "norm1.*", Same),
        ("self_attn.q_proj.*", "attn.qkv.*", Third(0)),
        ("self_attn.k_proj.*", "attn.qkv.*", Third(1)),
        ("self_attn.v_proj.*", "attn.qkv.*", Third(2)),
        ("self_attn.out_proj.*", "attn.proj.*", Same),
        ("layer_norm2.*", "norm2.*", Same),
        ("mlp.fc1.*", "mlp.fc1.*", Same),
        ("mlp.fc2.*", "mlp.fc2.*", Same),
    ],
};

const TIMM: Naming = Naming {
    key: "timm",
    about: "timm's, which the official MaskAlign checkpoints use too; the only one with a classifier",
    prefix: "",
    model: None,
    writes: Writes::Classifier,
    beside: &[],
    name: "timm",
    families: &[Family::Clip, Family::Dino, Family::Dinov2, Family::Vit],
    mark: "patch_embed.proj.weight",
    second_mark: None,
    tower: &[
        ("patch_embed.proj.*", "patch_embed.proj.*", Same),
        ("cls_token", "cls_token", Same),
        ("pos_embed", "pos_embed", Same),
        ("norm_pre.*", "norm_pre.*", Same),
        ("norm.*", "norm.*", Same),
    ],
    blocks: "blocks.",
    block: &[
        ("norm1.*", "norm1.*", Same),
        ("attn.qkv.*", "attn.qkv.*", Same),
        ("attn.proj.*", "attn.proj.*", Same),
        ("ls1.gamma", "ls1.gamma", Same),
        ("norm2.*", "norm2.*", Same),
        ("mlp.fc1.*", "mlp.fc1.*", Same),
        ("mlp.fc2.*", "mlp.fc2.*", Same),
        ("ls2.gamma", "ls2.gamma", Same),
    ],
};

const HF_TOWER: &[Row] = &[
    ("embeddings.patch_embeddings.projection.*", "patch_embed.proj.*", Same),
    ("embeddings.cls_token", "cls_token", Same),
    ("embeddings.position_embeddings", "pos_embed", Same),
    ("layernorm.*", "norm.*", Same),
];

const HF_VIT: Naming = Naming {
    key: "hf_vit",
    about: "Hugging Face's ViTModel",
    prefix: "",
    model: Some(Family::Vit),
    writes: Writes::Tower,
    beside: &[],
    name: "Hugging Face ViT",
    families: &[Family::Dino, Family::Vit],
    mark: "embeddings.patch_embeddings.projection.weight",
    second_mark: None,
    tower: HF_TOWER,
    blocks: "encoder.layer.",
    block: &[
        ("layernorm_before.*", "norm1.*", Same),
        ("attention.attention.query.*", "attn.qkv.*", Third(0)),
        ("attention.attention.key.*", "attn.qkv.*", Third(1)),
        ("attention.attention.value.*", "attn.qkv.*", Third(2)),
        ("attention.output.dense.*", "attn.proj.*", Same),
        ("layernorm_after.*", "norm2.*", Same),
        ("intermediate.dense.*", "mlp.fc1.*", Same),
        ("output.dense.*", "mlp.fc2.*", Same),
    ],
};

const HF_DINOV2: Naming = Naming {
    key: "hf_dinov2",
    about: "Hugging Face's Dinov2Model",
    prefix: "",
    model: Some(Family::Dinov2),
    writes: Writes::Tower,
    beside: &[],
    name: "Hugging Face DINOv2",
    families: &[Family::Dinov2],
    mark: "embeddings.patch_embeddings.projection.weight",
    second_mark: Some("encoder.layer.0.layer_scale1.lambda1"),
    tower: HF_TOWER,
    blocks: "encoder.layer.",
    block: &[
        ("norm1.*", "norm1.*", Same),
        ("attention.attention.query.*", "attn.qkv.*", Third(0)),
        ("attention.attention.key.*", "attn.qkv.*", Third(1)),
        ("attention.attention.value.*", "attn.qkv.*", Third(2)),
        ("attention.output.dense.*", "attn.proj.*", Same),
        ("layer_scale1.lambda1", "ls1.gamma", Same),
        ("norm2.*", "norm2.*", Same),
        ("mlp.fc1.*", "mlp.fc1.*", Same),
        ("mlp.fc2.*", "mlp.fc2.*", Same),
        ("layer_scale2.lambda1", "ls2.gamma", Same),
    ],
};

register_naming!(OPENAI);
register_naming!(HF_CLIP);
register_naming!(TIMM);
register_naming!(HF_VIT);
register_naming!(HF_DINOV2);
