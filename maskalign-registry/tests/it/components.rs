//! A set of components that has every form a real one has: nested slots, ranges, words, levels.
//! None of them computes anything.

use indexmap::IndexMap;
use maskalign_registry::{
    Entry, Kind, Levels, Registry, Scalar, Slot, Weights,
    plugin::{
        AlignerTag, DatasetTag, LossTag, MaskerTag, OptimizerTag, ScheduleTag, StudentTag, TargetTag, TeacherTag,
        TransformTag,
    },
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

macro_rules! options {
    ($(#[$attr:meta])* $name:ident { $($body:tt)* }) => {
        $(#[$attr])*
        #[derive(Serialize, Deserialize, JsonSchema)]
        #[serde(deny_unknown_fields)]
        pub(crate) struct $name { $($body)* }
    };
}

macro_rules! words {
    ($name:ident { $($(#[$attr:meta])* $word:ident),* $(,)? }) => {
        #[derive(Default, Serialize, Deserialize, JsonSchema)]
        #[serde(rename_all = "snake_case")]
        pub(crate) enum $name { $($(#[$attr])* $word),* }
    };
}

fn truth() -> bool {
    true
}
fn one() -> Scalar {
    Scalar::Constant(1.0)
}

options!(Data {
    /// Where the images come from.
    dataset: Slot<DatasetTag>,
    /// What is done to each image, in order.
    #[serde(default)]
    transforms: Vec<Slot<TransformTag>>,
});

options!(Objective {
    /// What the student is to match.
    target: Slot<TargetTag>,
    /// The tokens that take part.
    #[schemars(length(min = 1))]
    tokens: Vec<Tokens>,
    /// Maps the student's outputs to the target's shape.
    aligner: Slot<AlignerTag>,
    /// The distance between the two.
    loss: Slot<LossTag>,
    /// The share of this objective in the sum.
    #[serde(default = "one")]
    #[schemars(range(min = 0))]
    weight: Scalar,
    /// How the levels are weighed against each other.
    #[serde(default)]
    level_weights: LevelWeights,
});

words!(Tokens {
    /// The class token.
    #[default]
    Cls,
    /// The patches that the student sees.
    Visible,
    /// The patches that the masker predicts.
    Masked,
});

words!(LevelWeights {
    /// All alike.
    #[default]
    Uniform,
    /// Level i weighs i / sum i.
    Linear,
});

options!(Batch {
    /// Images in one optimizer step.
    #[schemars(range(min = 1))]
    effective: u32,
    /// Images in one pass; the rest accumulates.
    #[schemars(range(min = 1))]
    micro: u32,
});

options!(
    /// Trains a student against objectives.
    Pretrain {
    /// How often each image is seen.
    #[schemars(extend("exclusiveMinimum" = 0))]
    epochs: f64,
    /// Images and what is done to them.
    data: Data,
    /// The tower that is trained.
    student: Slot<StudentTag>,
    /// Towers that give targets, by name.
    #[serde(default)]
    teachers: IndexMap<String, Slot<TeacherTag>>,
    /// Chooses the patches that the student sees; all of them when absent.
    #[serde(default)]
    masker: Option<Slot<MaskerTag>>,
    /// What the student learns, by name.
    #[schemars(extend("minProperties" = 1))]
    objectives: IndexMap<String, Objective>,
    /// The rule that updates parameters.
    optimizer: Slot<OptimizerTag>,
    /// The learning rate over time.
    schedule: Slot<ScheduleTag>,
    /// Batch sizes.
    batch: Batch,
    /// Runs k-NN every so many epochs.
    #[serde(default)]
    #[schemars(range(min = 1))]
    knn_every: Option<u32>,
});

fn neighbours() -> Vec<u32> {
    vec![10, 20]
}
fn evaluation_transforms() -> Vec<Slot<TransformTag>> {
    vec![Slot::new("resize")]
}

options!(Knn {
    /// Images that vote and images that are voted on.
    dataset: Slot<DatasetTag>,
    /// What is done to each image.
    #[serde(default = "evaluation_transforms")]
    transforms: Vec<Slot<TransformTag>>,
    /// Numbers of neighbours.
    #[serde(default = "neighbours")]
    #[schemars(length(min = 1), inner(range(min = 1)))]
    neighbours: Vec<u32>,
    /// Divides the similarities.
    #[serde(default = "temperature")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    temperature: f64,
});
fn temperature() -> f64 {
    0.07
}

options!(ImageFolder {
    /// A folder with one folder per class.
    root: String,
    /// What to do about an image that cannot be read.
    #[serde(default)]
    on_error: OnError,
});
words!(OnError {
    /// Stop.
    #[default]
    Fail,
    /// Leave it out and count it.
    Skip,
});
options!(Sample {});
options!(Crop {
    /// Side of the crop in pixels.
    #[schemars(range(min = 1))]
    size: u32,
    /// Least and greatest share of the area.
    #[schemars(inner(range(min = 0, max = 1)))]
    scale: [f64; 2],
});
options!(Flip {
    /// How likely.
    #[serde(default = "half")]
    #[schemars(range(min = 0, max = 1))]
    probability: f64,
});
fn half() -> f64 {
    0.5
}
options!(Resize {
    /// Side in pixels.
    #[serde(default = "side")]
    size: u32,
});
fn side() -> u32 {
    224
}

options!(Tower {
    /// Sizes of the tower.
    arch: Arch,
    /// Where its parameters come from.
    weights: Weights,
    /// Side of its input in pixels; the data's when absent.
    #[serde(default)]
    image_size: Option<u32>,
});
words!(Arch {
    #[default]
    Tiny16,
    #[serde(rename = "base_16")]
    Base16,
    #[serde(rename = "large_16")]
    Large16,
    #[serde(rename = "huge_14")]
    Huge14,
});
options!(Ema {
    /// Share of the old average that is kept at each step.
    #[schemars(range(min = 0, max = 1))]
    momentum: Scalar,
});
options!(Staged {
    /// Copies the student so often.
    #[schemars(range(min = 1))]
    every_epochs: u32,
    /// Starts the student anew then.
    #[serde(default)]
    reset_student: bool,
});
options!(Vit {
    /// Sizes of the tower.
    arch: Arch,
    /// Share of residual branches dropped at the last block.
    #[serde(default)]
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    drop_path: f64,
    /// How positions enter.
    #[serde(default)]
    positions: Positions,
    /// What becomes of masked patches.
    #[serde(default)]
    masked_patches: MaskedPatches,
    /// Whether there is a class token.
    #[serde(default = "truth")]
    cls_token: bool,
    /// Parameters to start from; random when absent.
    #[serde(default)]
    weights: Option<Weights>,
});
words!(Positions {
    #[default]
    Sincos,
    Learned,
    SharedRelative
});
words!(MaskedPatches {
    #[default]
    Drop,
    MaskToken
});

options!(RandomMasker {
    /// Share of patches hidden.
    #[serde(default)]
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    ratio: Option<Scalar>,
    /// Patches shown; in place of `ratio`.
    #[serde(default)]
    #[schemars(range(min = 1))]
    visible: Option<u32>,
    /// Side in patches of what is hidden together.
    #[serde(default = "cell")]
    #[schemars(range(min = 1))]
    cell: u32,
    /// Share of patches predicted; all hidden ones when absent.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1))]
    predict_ratio: Option<f64>,
});
fn cell() -> u32 {
    1
}
options!(AttentionMasker {
    /// The teacher whose attention decides.
    #[schemars(extend("x-reference" = "teacher"))]
    teacher: String,
    /// Share of patches hidden.
    #[serde(default)]
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    ratio: Option<Scalar>,
    /// Patches shown; in place of `ratio`.
    #[serde(default)]
    #[schemars(range(min = 1))]
    visible: Option<u32>,
});
options!(BlockMasker {
    /// Patches hidden.
    #[schemars(range(min = 1))]
    masked: u32,
});
options!(MultiBlock {
    /// How many blocks are predicted.
    #[schemars(range(min = 1))]
    blocks: u32,
    /// Least and greatest share of a block.
    scale: [f64; 2],
    /// Least and greatest aspect ratio.
    aspect: [f64; 2],
    /// Least and greatest share of the context.
    context_scale: [f64; 2],
    /// Patches shown at least.
    min_visible: u32,
});
options!(Features {
    /// The teacher that gives them.
    #[schemars(extend("x-reference" = "teacher"))]
    teacher: String,
    /// The teacher's levels.
    #[serde(default)]
    levels: Levels,
    /// Where in the block they are taken.
    #[serde(default)]
    tap: Tap,
    /// How they are normalised.
    #[serde(default)]
    normalize: Normalize,
    /// How the levels are joined.
    #[serde(default)]
    combine: Combine,
});
words!(Tap {
    #[default]
    Block,
    Norm,
    Projection
});
words!(Normalize {
    #[default]
    None,
    L2,
    Whiten,
    Standardize,
    StandardizeBatch
});
words!(Combine {
    #[default]
    None,
    Mean
});
options!(Pixels {
    /// How they are normalised.
    #[serde(default)]
    normalize: Normalize,
});
options!(Dynamic {
    /// The student's levels.
    #[serde(default)]
    levels: Levels,
    /// Where in the block they are taken.
    #[serde(default)]
    tap: Tap,
    /// How levels are mixed.
    fusion: Fusion,
    /// What follows the mix.
    head: Head,
});
words!(Fusion {
    #[default]
    Simple,
    Linear,
    Sum
});
words!(Head {
    #[default]
    Linear,
    NormLinear,
    LinearNorm,
    Mlp,
    Mlp2
});
options!(Decoder {
    #[serde(default)]
    levels: Levels,
    #[serde(default)]
    tap: Tap,
    #[serde(default)]
    attention: DecoderAttention,
    /// Width.
    #[schemars(range(min = 1))]
    dim: u32,
    /// Blocks.
    #[schemars(range(min = 1))]
    depth: u32,
    /// Heads; must divide the width.
    #[schemars(range(min = 1))]
    heads: u32,
});
words!(DecoderAttention {
    #[default]
    Full,
    MaskedQueries,
    Cross
});
options!(SmoothL1 {
    /// Where the square becomes a line.
    #[serde(default = "beta")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    beta: f64,
});
fn beta() -> f64 {
    1.0
}
options!(Mse {});
options!(AdamW {
    /// Rate at a batch of `base_batch`.
    #[schemars(extend("exclusiveMinimum" = 0))]
    base_lr: f64,
    /// The batch that `base_lr` is meant for.
    #[serde(default = "base_batch")]
    base_batch: u32,
    /// Decay of weights.
    #[schemars(range(min = 0))]
    weight_decay: Scalar,
    /// Decays of the two moments.
    #[schemars(inner(range(min = 0, max = 1)))]
    betas: [f64; 2],
    /// Greatest norm of the gradient.
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0))]
    clip_norm: Option<f64>,
    /// Parameters that do not decay.
    #[serde(default)]
    no_decay: Vec<String>,
});
fn base_batch() -> u32 {
    256
}
options!(CosineSchedule {
    /// Epochs of linear warm-up.
    #[serde(default)]
    #[schemars(range(min = 0))]
    warmup_epochs: f64,
    /// Rate at the start.
    #[serde(default)]
    warmup_lr: f64,
    /// Rate at the end.
    #[serde(default)]
    min_lr: f64,
    /// Epochs until the end; the stage's when absent.
    #[serde(default)]
    length_epochs: Option<f64>,
});
options!(Multistep {
    #[serde(default)]
    warmup_epochs: f64,
    #[serde(default)]
    warmup_lr: f64,
    /// Epochs at which the rate falls.
    milestones: Vec<f64>,
    /// Factor by which it falls.
    gamma: f64,
});

macro_rules! register {
    ($($kind:ident $name:literal => $options:ty, $summary:literal, $example:literal;)*) => {$(
        inventory::submit! {
            Entry::of::<$options>(Kind::$kind, $name, &())
                .summary($summary)
                .example($example)
                .package("fakes")
        }
    )*};
}

register! {
    Stage "pretrain" => Pretrain, "trains a student against objectives", "{
        type: pretrain,
        epochs: 1,
        data: { dataset: { type: sample } },
        student: { type: vit, arch: tiny16 },
        objectives: { pixels: { target: { type: pixels }, tokens: [visible], aligner: { type: dynamic, fusion: simple, head: linear }, loss: { type: mse } } },
        optimizer: { type: adamw, base_lr: 1.5e-4, weight_decay: 0.05, betas: [0.9, 0.95] },
        schedule: { type: cosine },
        batch: { effective: 8, micro: 8 }
    }";
    Stage "knn" => Knn, "votes among neighbours", "{ type: knn, dataset: { type: sample } }";
    Dataset "image_folder" => ImageFolder, "one folder per class", "{ type: image_folder, root: images }";
    Dataset "sample" => Sample, "images that come with the program", "{ type: sample }";
    Transform "random_resized_crop" => Crop, "crops and resizes", "{ type: random_resized_crop, size: 224, scale: [0.2, 1.0] }";
    Transform "horizontal_flip" => Flip, "mirrors half of the images", "{ type: horizontal_flip }";
    Transform "resize" => Resize, "resizes", "{ type: resize, size: 224 }";
    Teacher "clip" => Tower, "CLIP's image tower", "{ type: clip, arch: base_16, weights: clip.safetensors }";
    Teacher "dino" => Tower, "DINO's tower", "{ type: dino, arch: base_16, weights: dino.safetensors }";
    Teacher "ema" => Ema, "a moving average of the student", "{ type: ema, momentum: 0.996 }";
    Teacher "staged" => Staged, "an earlier state of the student", "{ type: staged, every_epochs: 100 }";
    Student "vit" => Vit, "a vision transformer", "{ type: vit, arch: base_16 }";
    Masker "random" => RandomMasker, "hides patches at random", "{ type: random, ratio: 0.75 }";
    Masker "attention" => AttentionMasker, "shows what a teacher attends to", "{ type: attention, teacher: clip, ratio: 0.7 }";
    Masker "block" => BlockMasker, "hides blocks", "{ type: block, masked: 75 }";
    Masker "multi_block" => MultiBlock, "hides several blocks", "{ type: multi_block, blocks: 4, scale: [0.15, 0.2], aspect: [0.75, 1.5], context_scale: [0.85, 1.0], min_visible: 10 }";
    Target "features" => Features, "a teacher's features", "{ type: features, teacher: clip, levels: { last: 5 } }";
    Target "pixels" => Pixels, "the image itself", "{ type: pixels, normalize: standardize }";
    Aligner "dynamic" => Dynamic, "mixes levels", "{ type: dynamic, fusion: linear, head: linear }";
    Aligner "decoder" => Decoder, "predicts masked patches", "{ type: decoder, dim: 512, depth: 8, heads: 16 }";
    Loss "smooth_l1" => SmoothL1, "a square that becomes a line", "{ type: smooth_l1, beta: 2.0 }";
    Loss "mse" => Mse, "the mean square", "{ type: mse }";
    Loss "l1" => Mse, "the mean absolute difference", "{ type: l1 }";
    Loss "cosine" => Mse, "one minus the cosine", "{ type: cosine }";
    Optimizer "adamw" => AdamW, "Adam with decoupled decay", "{ type: adamw, base_lr: 1.5e-4, weight_decay: 0.05, betas: [0.9, 0.95] }";
    Schedule "cosine" => CosineSchedule, "warm-up, then half a cosine", "{ type: cosine, warmup_epochs: 40 }";
    Schedule "multistep" => Multistep, "falls at milestones", "{ type: multistep, milestones: [700], gamma: 0.1 }";
}

/// The registry of the components above.
pub(crate) fn registry() -> &'static Registry {
    Registry::global().expect("names are unique")
}
