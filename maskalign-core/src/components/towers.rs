//! What teachers and students have in common: shapes, taps, and where their weights come from; and what a student is to
//! those that read it, teachers and later stages among them.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use maskalign_engine::{Context, ImageBatch, Result, Tape, Tensor, ops::Act};
use maskalign_registry::{Kind, Refusal, Weights};
use serde_json::{Value, json};

use crate::{
    component,
    components::tokens::Tokens,
    error::Error,
    nn::{
        Arch, BranchScales, Features, FinalNorm, Grid, Init, MaskedPatches, Module, Reach, SeenPatches, Statistics,
        TowerInput, Vit, VitConfig,
    },
    weights::{self, Canonical, Family, HostTensor, TensorMap},
};

/// The shape of a tower, as far as other components need it.
///
/// ```
/// # use maskalign_core::prelude::*;
/// # let config = VitConfig::plain(Arch { dim: 8, depth: 2, heads: 2, mlp: 32, patch: 4 }, 8);
/// let shape = TowerShape::from(&config);
/// assert_eq!((shape.grid.patches(), shape.tokens()), (4, 5));
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TowerShape {
    /// Channels, blocks, heads, patch.
    pub arch: Arch,
    /// Patches of the image at the size the tower runs at.
    pub grid: Grid,
    /// That size, in pixels.
    pub image_size: usize,
    /// Whether a class token leads the patches.
    pub cls_token: bool,
    /// Whether positions are learned (else fixed sines and cosines).
    pub learned_positions: bool,
    /// What stands for masked patches.
    pub masked_patches: MaskedPatches,
    /// Initial value of learned scales of the branches, where there are any.
    pub layer_scale: Option<f64>,
    /// Whether the final norm is that of the weights.
    pub final_norm: FinalNorm,
    /// Outputs of the projection after the final norm, where there is one.
    pub projection: Option<usize>,
    /// What the tower's input is normalised by.
    pub statistics: Statistics,
    /// Added to the variance in its LayerNorms.
    pub eps: f64,
}

impl From<&VitConfig> for TowerShape {
    fn from(config: &VitConfig) -> Self {
        TowerShape {
            arch: config.arch,
            grid: config.grid(),
            image_size: config.input.image_size,
            cls_token: config.cls_token,
            learned_positions: config.learned_positions,
            masked_patches: config.masked_patches,
            layer_scale: config.layer_scale,
            final_norm: config.final_norm,
            projection: config.projection,
            statistics: config.input.statistics,
            eps: config.eps,
        }
    }
}

impl TowerShape {
    /// Refuses a teacher whose patches are not the student's; the option at fault is the teacher's `name`.
    pub(crate) fn check_grid(&self, name: &str, student: &TowerShape) -> Result<(), Refusal> {
        if self.grid == student.grid {
            return Ok(());
        }
        let message = format!(
            "`{name}` has {} patches at {} pixels, the student {} at {}",
            self.grid, self.image_size, student.grid, student.image_size
        );
        Err(Refusal::new("teacher", message)
            .in_stage(["teachers", name, "image_size"], "the teacher's size")
            .in_stage(["student", "image_size"], "the student's size")
            .help("set `image_size` of one of the towers so that the grids are equal"))
    }

    /// Refuses to read a tower called `whose` through a final norm that its weights do not have.
    ///
    /// # Errors
    /// Names `tap`.
    pub fn check_tap(&self, whose: &str, tap: Tap) -> Result<(), Refusal> {
        if tap != Tap::Block && self.final_norm == FinalNorm::Fresh {
            return Err(Refusal::new("tap", format!("the weights of {whose} have no final norm"))
                .help("a classifier of averaged tokens has `fc_norm` in its place; use `tap: block`"));
        }
        Ok(())
    }

    /// The tokens that are the rows of its hidden states, of each image in this order.
    pub fn held(&self) -> Tokens {
        Tokens { cls: self.cls_token, visible: true, masked: self.masked_patches == MaskedPatches::MaskToken }
    }

    /// Tokens of an image with every patch visible.
    pub fn tokens(&self) -> usize {
        self.grid.patches() + usize::from(self.cls_token)
    }
}

/// A tower as timm's `config.json` describes it: what checkpoints note of a student, and exports have beside them.
///
/// ```
/// # use maskalign_core::prelude::*;
/// # let config = VitConfig::plain(Arch { dim: 8, depth: 2, heads: 2, mlp: 32, patch: 4 }, 8);
/// let noted = timm_config(&TowerShape::from(&config));
/// assert_eq!(noted["model_args"]["embed_dim"], 8);
/// ```
pub fn timm_config(tower: &TowerShape) -> Value {
    let Arch { dim, depth, heads, mlp, patch } = tower.arch;
    // timm takes the whole part of the product.
    let exact = mlp as f64 / dim as f64;
    let ratio = if (exact * dim as f64) as usize == mlp { exact } else { (mlp as f64 + 0.5) / dim as f64 };
    let mut arguments = json!({
        "img_size": tower.image_size, "patch_size": patch, "embed_dim": dim, "depth": depth, "num_heads": heads,
        "mlp_ratio": ratio, "class_token": tower.cls_token,
    });
    if !tower.cls_token {
        // The norm stays before the mean, where the tower has it.
        arguments["global_pool"] = "avg".into();
        arguments["fc_norm"] = false.into();
    }
    if let Some(scale) = tower.layer_scale {
        arguments["init_values"] = scale.into();
    }
    // As numbers are written: those of f32 have more digits in f64.
    let written = |values: [f32; 3]| values.map(|value| value.to_string().parse::<f64>().unwrap_or_default());
    let mut config = json!({
        "architecture": "vit_base_patch16_224", "num_classes": 0, "num_features": dim, "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, tower.image_size, tower.image_size], "fixed_input_size": true, "crop_pct": 1.0,
            "interpolation": "bicubic", "num_classes": 0, "first_conv": "patch_embed.proj", "classifier": "head",
            "mean": written(tower.statistics.mean), "std": written(tower.statistics.std),
        },
    });
    if tower.eps != TIMM_EPS {
        config["layer_norm_eps"] = tower.eps.into();
    }
    config
}

/// What timm adds to the variance in the LayerNorms of the architecture in [`timm_config`].
const TIMM_EPS: f64 = 1e-6;

/// Where a tower's hidden states are taken.
///
/// ```
/// # use maskalign_core::prelude::*;
/// # let config = VitConfig::plain(Arch { dim: 8, depth: 2, heads: 2, mlp: 32, patch: 4 }, 8);
/// # let student = TowerShape::from(&config);
/// /// Channels of what is read there.
/// fn width(tower: &TowerShape, tap: Tap) -> Option<usize> {
///     match tap {
///         Tap::Block | Tap::Norm => Some(tower.arch.dim),
///         Tap::Projection => tower.projection,
///     }
/// }
///
/// assert_eq!((width(&student, Tap::Norm), width(&student, Tap::Projection)), (Some(8), None));
/// ```
#[component]
#[derive(Copy, Default, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Tap {
    /// The residual stream after the block.
    #[default]
    Block,
    /// After the final norm.
    Norm,
    /// After the final norm and the projection.
    Projection,
}

/// A student whose options fit.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// A tower that is built by another student: what a stage is told of it is that student's.
/// struct Wrapped(Box<dyn PlannedStudent>);
///
/// impl PlannedStudent for Wrapped {
///     fn shape(&self) -> TowerShape {
///         self.0.shape()
///     }
///
///     fn build(&self, init: &Init, trained: &TrainedStudents) -> Result<Box<dyn StudentModel>, Error> {
///         self.0.build(init, trained)
///     }
/// }
/// ```
pub trait PlannedStudent: Send + Sync {
    /// The shape of its tower.
    fn shape(&self) -> TowerShape;
    /// Whether all its values are drawn: it starts from no weights.
    fn is_drawn(&self) -> bool {
        false
    }
    /// Whether its model gives attention: see [`StudentModel::forward_attending`].
    fn gives_attention(&self) -> bool {
        false
    }
    /// Whether its model runs at other sizes than its shape's: see [`StudentModel::forward_at`].
    fn sees_sizes(&self) -> bool {
        false
    }
    /// Whether it gives queries, keys and values of its blocks, which relations are of.
    fn gives_qkv(&self) -> bool {
        false
    }
    /// Builds the tower, from its initial values or from weights. Parameters are those of `init`'s role.
    ///
    /// # Errors
    /// Weights that are missing or do not fit; out of memory.
    fn build(&self, init: &Init, trained: &TrainedStudents) -> Result<Box<dyn StudentModel>, Error>;
}

/// The tower that is trained.
///
/// ```
/// # use maskalign_core::{Device, prelude::*};
/// struct Small(Vit);
///
/// impl Module for Small {
///     fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
///         self.0.visit(f);
///     }
/// }
///
/// impl StudentModel for Small {
///     fn shape(&self) -> TowerShape {
///         TowerShape::from(&self.0.config)
///     }
///     fn drop_path(&self) -> f64 {
///         0.0
///     }
///     fn set_reach(&mut self, reach: Reach) {
///         self.0.set_reach(reach);
///     }
///     fn forward(
///         &self,
///         cx: &Context,
///         tape: &mut Tape,
///         images: &ImageBatch,
///         seen: Option<SeenPatches>,
///         scales: Option<&BranchScales>,
///         keep: &dyn Fn(usize) -> bool,
///     ) -> Result<Features> {
///         self.0.forward(cx, tape, images, seen, scales, keep)
///     }
///     fn norm(&self, cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
///         self.0.final_norm(cx, tape, x)
///     }
/// }
/// # let cx = Context::new(Device::Cpu, 1);
/// # let config = VitConfig::plain(Arch { dim: 8, depth: 2, heads: 2, mlp: 32, patch: 4 }, 8);
/// # let small = Small(Vit::new(&Init::new(cx.device(), 0, "x"), config)?);
/// # let images = ImageBatch { pixels: vec![0.5; 192], batch: 1, size: 8 };
/// # let features = small.forward(&cx, &mut Tape::inference(), &images, None, None, &|_| false)?;
/// # assert_eq!(features.last.shape(), (5, 8));
/// # Ok::<(), Error>(())
/// ```
pub trait StudentModel: Module {
    /// The shape of the tower.
    fn shape(&self) -> TowerShape;
    /// Largest rate of stochastic depth, that of the last block.
    fn drop_path(&self) -> f64;
    /// Leaves out what no loss needs.
    fn set_reach(&mut self, reach: Reach);
    /// Hidden states of the patches (`None`: all are visible); the rows of an image are its [tokens](TowerShape::held).
    /// `keep` says which levels are wanted besides the last.
    ///
    /// # Errors
    /// Out of memory on the device, as below.
    fn forward(
        &self,
        cx: &Context,
        tape: &mut Tape,
        images: &ImageBatch,
        seen: Option<SeenPatches>,
        scales: Option<&BranchScales>,
        keep: &dyn Fn(usize) -> bool,
    ) -> Result<Features>;
    /// As [`StudentModel::forward`], running at `size` pixels instead of its shape's; for students that
    /// [see sizes](PlannedStudent::sees_sizes).
    ///
    /// # Errors
    /// As there.
    #[expect(clippy::too_many_arguments, reason = "what `forward` takes, and the size")]
    fn forward_at(
        &self,
        cx: &Context,
        tape: &mut Tape,
        images: &ImageBatch,
        _size: usize,
        seen: Option<SeenPatches>,
        scales: Option<&BranchScales>,
        keep: &dyn Fn(usize) -> bool,
    ) -> Result<Features> {
        self.forward(cx, tape, images, seen, scales, keep)
    }
    /// Without gradients and with every patch visible: hidden states, and how much the class token attends to each patch in
    /// the last block, mean over heads, `[batch, patches]`; for students that [give it](PlannedStudent::gives_attention).
    ///
    /// # Errors
    /// As for [`StudentModel::forward`].
    fn forward_attending(
        &self,
        cx: &Context,
        images: &ImageBatch,
        keep: &dyn Fn(usize) -> bool,
    ) -> Result<(Features, Vec<f32>)> {
        Ok((self.forward(cx, &mut Tape::inference(), images, None, None, keep)?, Vec::new()))
    }
    /// The final norm.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn norm(&self, cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor>;
    /// Queries, keys and values of a block, side by side, `[batch * held, 3 * dim]`, from a pass that kept what enters it.
    /// `None` where the tower does not give them.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn queries_keys_values(
        &self,
        _cx: &Context,
        _tape: &mut Tape,
        _features: &Features,
        _block: usize,
    ) -> Result<Option<Tensor>> {
        Ok(None)
    }
    /// How much the class token attends to each patch in the last block that runs, of each head by itself: `[batch, heads,
    /// patches]`, for people to look at. `None` where there is nothing to show.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn class_attention(&self, _cx: &Context, _images: &ImageBatch) -> Result<Option<Vec<f32>>> {
        Ok(None)
    }
}

/// What is known of the student that an earlier stage leaves, before it has run.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// What a later stage can say of a student that has not been trained yet.
/// fn blocks(plan: &StudentPlan) -> (usize, usize) {
///     (plan.reach.blocks, plan.shape().arch.depth)
/// }
/// ```
#[derive(Clone)]
pub struct StudentPlan {
    /// How it is built.
    pub tower: Arc<dyn PlannedStudent>,
    /// What of it its training reaches; the rest has its initial values.
    pub reach: Reach,
    /// Which of equally named initial values are its own: with the seed, this rebuilds the untrained student.
    pub init_scope: String,
}

impl StudentPlan {
    /// Its shape.
    pub fn shape(&self) -> TowerShape {
        self.tower.shape()
    }
}

/// The parameters of the students that stages have left, by stage.
///
/// ```
/// # use maskalign_core::prelude::*;
/// let mut trained = TrainedStudents::default();
/// trained.insert("pretrain", Default::default());
/// assert!(trained.get("pretrain").is_ok());
/// assert!(trained.get("finetune").is_err());
/// ```
#[derive(Clone, Debug, Default)]
pub struct TrainedStudents(BTreeMap<String, Arc<TensorMap>>);

impl TrainedStudents {
    /// Adds what a stage leaves.
    pub fn insert(&mut self, stage: &str, parameters: Arc<TensorMap>) {
        self.0.insert(stage.to_string(), parameters);
    }

    /// What a stage left.
    ///
    /// # Errors
    /// It has not run: stages run in the order in which they were planned.
    pub fn get(&self, stage: &str) -> Result<&Arc<TensorMap>, Error> {
        self.0.get(stage).ok_or_else(|| Error::Usage(format!("stage `{stage}` has not left its student yet")))
    }
}

/// Whether a plan looks at files.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// A file is missing where one looks for it.
/// fn check(file: &std::path::Path, environment: Environment) -> Result<(), Refusal> {
///     match environment {
///         Environment::Checked if !file.exists() => Err(Refusal::new("file", "there is no such file")),
///         _ => Ok(()),
///     }
/// }
///
/// assert!(check("nowhere".as_ref(), Environment::Ignored).is_ok());
/// assert!(check("nowhere".as_ref(), Environment::Checked).is_err());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Environment {
    /// Data and weights are opened and checked.
    Checked,
    /// The recipe alone is: `validate --no-environment`.
    Ignored,
}

/// What becomes of a tower whose weights cannot be found.
///
/// ```
/// # use maskalign_core::prelude::*;
/// /// Whether a tower whose weights were not found may be drawn.
/// fn may_be_drawn(cx: &PlanContext) -> bool {
///     cx.missing_weights == MissingWeights::Random
/// }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MissingWeights {
    /// The recipe is refused.
    Refused,
    /// The tower gets random weights: for timings, which do not depend on them.
    Random,
}

/// What is known before the first step.
///
/// ```
/// # use maskalign_core::prelude::*;
/// let students = Default::default();
/// let cx = PlanContext {
///     data_size: 224,
///     students: &students,
///     student: None,
///     environment: Environment::Ignored,
///     missing_weights: MissingWeights::Refused,
/// };
/// let refusal = cx.student("pretrain").err().expect("no stage trains a student");
/// assert_eq!(refusal.message, "no earlier stage `pretrain` leaves a student");
/// ```
#[derive(Clone, Copy)]
pub struct PlanContext<'a> {
    /// Side of the square images that the stage's data yields.
    pub data_size: usize,
    /// The students of earlier stages, by stage.
    pub students: &'a BTreeMap<String, StudentPlan>,
    /// The student of this stage, for teachers that depend on it; `None` where the stage trains none.
    pub student: Option<&'a Arc<dyn PlannedStudent>>,
    /// Whether files are looked at.
    pub environment: Environment,
    /// What becomes of a tower whose weights cannot be found.
    pub missing_weights: MissingWeights,
}

impl<'a> PlanContext<'a> {
    /// The student of an earlier stage.
    ///
    /// # Errors
    /// There is none of that name; the known ones are listed.
    pub fn student(&self, stage: &str) -> Result<&'a StudentPlan, Refusal> {
        self.students.get(stage).ok_or_else(|| {
            let known: Vec<&str> = self.students.keys().map(String::as_str).collect();
            let refusal = Refusal::new("stage", format!("no earlier stage `{stage}` leaves a student"))
                .unresolved(Kind::Stage, stage);
            match known.is_empty() {
                true => refusal.help("no earlier stage trains one"),
                false => refusal.help(format!("earlier stages with a student: {}", known.join(", "))),
            }
        })
    }
}

/// A tower's options that every kind of tower has: sizes, resolution and weights.
///
/// ```
/// # use maskalign_core::prelude::*;
/// # let students = Default::default();
/// # let cx = PlanContext {
/// #     data_size: 224, students: &students, student: None,
/// #     environment: Environment::Ignored, missing_weights: MissingWeights::Refused,
/// # };
/// let options = TowerOptions { arch: Arch::named("base_16"), image_size: None, weights: None };
/// let (arch, image_size) = options.resolve(&cx)?;
/// assert_eq!((arch.dim, image_size), (768, 224));
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct TowerOptions<'a> {
    /// Sizes, where they are given.
    pub arch: Option<Arch>,
    /// Side of the image in pixels, where it is given.
    pub image_size: Option<usize>,
    /// What the tower starts from.
    pub weights: Option<&'a Weights>,
}

impl TowerOptions<'_> {
    /// The sizes and the resolution, taken from an earlier stage's student where its weights are used.
    ///
    /// # Errors
    /// Sizes that are missing, contradict the weights, or fit no grid of patches.
    pub fn resolve(&self, cx: &PlanContext) -> Result<(Arch, usize), Refusal> {
        let arch = match (self.arch, self.weights) {
            (Some(arch), Some(Weights::Stage(stage))) => {
                let record = cx.student(stage).map_err(|r| r.under("weights"))?;
                if record.shape().arch != arch {
                    return Err(Refusal::new("arch", format!("differs from that of the student of stage `{stage}`"))
                        .help("leave `arch` out: it follows from `weights`"));
                }
                arch
            }
            (Some(arch), _) => arch,
            (None, Some(Weights::Stage(stage))) => cx.student(stage).map_err(|r| r.under("weights"))?.shape().arch,
            (None, Some(weights)) if cx.environment == Environment::Ignored && weights.file().is_some() => {
                let message = "the sizes of the tower are those of its weights, and files are not looked at";
                return Err(Refusal::new("arch", message).unread());
            }
            (None, weights) => {
                // Where the weights are missing, or are one of several stages' of a run, so is what stands beside them.
                if let Some(path) = weights.map_or(Ok(None), locate)? {
                    weights::files_of(&path).map_err(refused)?;
                }
                return Err(Refusal::new("arch", "the sizes of the tower are not known")
                    .help("give `arch`: a name such as base_16, or {dim, depth, heads, patch}; no configuration beside the weights says it"));
            }
        };
        arch.check()?;
        let image_size = self.image_size.unwrap_or(cx.data_size);
        arch.grid(image_size).map_err(|refusal| match self.image_size {
            Some(_) => refusal,
            None => {
                refusal.help(format!("the data yields {image_size} pixels; set `image_size` or change the transforms"))
            }
        })?;
        Ok((arch, image_size))
    }
}

/// The file that `weights` names; `None` for a stage's student or embedded weights.
fn locate(weights: &Weights) -> Result<Option<PathBuf>, Refusal> {
    match weights {
        Weights::Embedded(name) if crate::embedded::weights_file(name).is_none() => {
            Err(Refusal::new("weights", format!("no weights named `{name}` are embedded")))
        }
        _ => weights.file().map_or(Ok(None), |(file, _)| match weights::locate(&file.to_string()) {
            Ok(path) if path.exists() => Ok(Some(path)),
            Ok(path) => Err(Refusal::new("weights", format!("there is no file `{}`", path.display()))
                .help("a path starts from the current folder; `hf://ORG/REPO` names a model in the local hub cache")),
            Err(error) => Err(Refusal::new("weights", error.to_string())),
        }),
    }
}

/// A vision transformer whose sizes and weights fit: what students and teachers of that kind are built from.
///
/// ```
/// # use maskalign_core::prelude::*;
/// # let students = Default::default();
/// # let cx = PlanContext {
/// #     data_size: 224, students: &students, student: None,
/// #     environment: Environment::Ignored, missing_weights: MissingWeights::Refused,
/// # };
/// # let config = VitConfig::plain(Arch { dim: 8, depth: 2, heads: 2, mlp: 32, patch: 4 }, 8);
/// let planned = PlannedTower::plan(&cx, config, None, Family::Vit)?;
/// assert!(planned.is_drawn());
/// let tower = planned.build(&Init::shapes(), &TrainedStudents::default())?;
/// assert_eq!(tower.blocks.len(), 2);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct PlannedTower {
    config: VitConfig,
    source: Source,
    family: Family,
}

/// Where a tower's values come from.
#[derive(Clone, Debug, PartialEq)]
enum Source {
    /// Drawn.
    Initial,
    /// The student of an earlier stage.
    Stage(String),
    /// Weights inside the binary.
    Embedded(String),
    /// A file, located while planning where files are looked at.
    File { spec: Weights, path: Option<PathBuf> },
}

impl PlannedTower {
    /// Checks that the weights fit: names and shapes are looked at here, values are read when the stage begins. Without
    /// `weights` the values are drawn.
    ///
    /// # Errors
    /// Weights that cannot be found or do not fit; names the option.
    pub fn plan(
        cx: &PlanContext,
        config: VitConfig,
        weights: Option<&Weights>,
        family: Family,
    ) -> Result<PlannedTower, Refusal> {
        let source = match weights {
            None => Source::Initial,
            Some(weights) if cx.missing_weights == MissingWeights::Random => match (weights, locate(weights)) {
                (Weights::Stage(_), _) | (_, Err(_)) => Source::Initial,
                (weights, Ok(path)) => Source::of(weights, path),
            },
            Some(weights) => Source::of(weights, None),
        };
        let mut planned = PlannedTower { config, source, family };
        if cx.environment == Environment::Checked && cx.missing_weights == MissingWeights::Refused {
            if let Source::File { spec, path } = &mut planned.source {
                *path = locate(spec)?;
            }
            planned.check(cx)?;
        }
        Ok(planned)
    }

    /// Holds the weights' names and shapes against the tower's, and takes up what the weights lack and may lack.
    fn check(&mut self, cx: &PlanContext) -> Result<(), Refusal> {
        let tensors = match &self.source {
            Source::Initial => return Ok(()),
            Source::Stage(stage) => {
                let earlier = cx.student(stage).map_err(|r| r.under("weights"))?;
                let mut student =
                    earlier.tower.build(&Init::shapes(), &TrainedStudents::default()).map_err(Error::into_refusal)?;
                student.shapes().into_iter().map(|(name, shape)| (name, HostTensor::shape_only(shape))).collect()
            }
            Source::Embedded(name) => embedded(name, self.family)?,
            Source::File { spec, path: Some(path) } => canonical(spec, path, self.family, weights::read_part_shapes)?,
            Source::File { path: None, .. } => return Ok(()),
        };
        let mut tower = Vit::new(&Init::shapes(), self.config).map_err(|error| Error::from(error).into_refusal())?;
        self.fit(&mut tower, tensors)?;
        self.config = tower.config;
        Ok(())
    }

    /// Whether its values are drawn.
    pub fn is_drawn(&self) -> bool {
        self.source == Source::Initial
    }

    /// Its shape.
    pub fn shape(&self) -> TowerShape {
        TowerShape::from(&self.config)
    }

    /// The tower with its values: drawn by `init`, or read.
    ///
    /// # Errors
    /// Weights that have gone or changed since they were planned; out of memory.
    pub fn build(&self, init: &Init, trained: &TrainedStudents) -> Result<Vit, Error> {
        let mut tower = Vit::new(init, self.config)?;
        if !init.has_values() {
            return Ok(tower);
        }
        let tensors: TensorMap = match &self.source {
            Source::Initial => return Ok(tower),
            Source::Stage(stage) => TensorMap::clone(trained.get(stage)?),
            Source::Embedded(name) => embedded(name, self.family)?,
            Source::File { spec, path } => {
                let path = match path {
                    Some(path) => path.clone(),
                    None => locate(spec)?.ok_or_else(|| Refusal::new("weights", format!("{spec} is no file")))?,
                };
                tracing::info!("reading {}", path.display());
                canonical(spec, &path, self.family, weights::read_part)?
            }
        };
        let tensors = self.fit(&mut tower, tensors)?;
        tower.load(&tensors)?;
        Ok(tower)
    }

    /// Makes tensors, or their shapes alone, those of a tower: positions are resized to its grid, and what the weights
    /// may come with or without follows them.
    fn fit(&self, tower: &mut Vit, mut tensors: TensorMap) -> Result<TensorMap, Refusal> {
        let side = tower.config.grid().rows;
        if tower.config.cls_token && !tensors.contains_key("cls_token") {
            return Err(Refusal::new("weights", format!("{} hold a tower without a class token", self.whose()))
                .related(["cls_token"], "a class token is asked for here")
                .help("set `cls_token: false` where the tower has that option"));
        }
        // Positions of patches alone (a tower without a class token, or timm's `no_embed_class`): a class token gets none.
        if let Some(positions) = tensors.get("pos_embed").and_then(weights::with_class_row) {
            tensors.insert("pos_embed".into(), positions);
        }
        if let Some(positions) = tensors.get("pos_embed")
            && positions.shape.len() == 3
            && positions.shape[1] != 1 + side * side
        {
            let resized = weights::resize_positions(positions, side).map_err(refused)?;
            if !resized.is_shape_only() {
                tracing::info!("positions resized from {} to {side}x{side}", positions.shape[1] - 1);
            }
            tensors.insert("pos_embed".into(), resized);
        }
        if !tensors.contains_key("head.weight") {
            // CLIP files come with and without the projection; a target that taps it is refused with the place.
            tower.head = None;
            tower.config.projection = None;
        }
        if tower.head.is_none() {
            tensors.retain(|name, _| !name.starts_with("head."));
        }
        if !tower.config.cls_token {
            tensors.remove("cls_token");
        }
        if !tensors.contains_key("norm.weight") && !tensors.contains_key("norm.bias") {
            // A classifier of averaged tokens has a norm behind the average in its place (`fc_norm`).
            tower.config.final_norm = FinalNorm::Fresh;
            tower.norm.visit(&mut |p| {
                tensors.insert(p.name.clone(), p.to_host());
            });
        }
        match &tower.mask_token {
            // Weights of towers that saw no mask token have none: it begins as it was drawn.
            Some(token) if !tensors.contains_key("mask_token") => {
                let host = token.to_host();
                if !host.is_shape_only() {
                    tracing::info!("{} have no mask token: it begins as it is drawn", self.whose());
                }
                tensors.insert("mask_token".into(), host);
            }
            Some(_) => {}
            None => {
                tensors.remove("mask_token");
            }
        }
        weights::check_against(&tower.shapes(), tensors, &self.whose()).map_err(refused)
    }

    /// What messages call the weights.
    fn whose(&self) -> String {
        match &self.source {
            Source::Stage(stage) => format!("the weights of the student of stage `{stage}`"),
            Source::Embedded(name) => format!("the weights in embedded://{name}"),
            Source::File { spec, .. } => format!("the weights in {spec}"),
            Source::Initial => "the initial weights".to_string(),
        }
    }
}

impl Source {
    fn of(weights: &Weights, path: Option<PathBuf>) -> Self {
        match weights {
            Weights::Stage(stage) => Source::Stage(stage.clone()),
            Weights::Embedded(name) => Source::Embedded(name.clone()),
            file => Source::File { spec: file.clone(), path },
        }
    }
}

fn refused(error: weights::WeightsError) -> Refusal {
    Refusal::new("weights", error.to_string())
}

fn embedded(name: &str, family: Family) -> Result<TensorMap, Refusal> {
    let tensors = crate::embedded::weights(name)
        .ok_or_else(|| Refusal::new("weights", format!("no weights named `{name}` are embedded")))?;
    Ok(weights::to_canonical(tensors, family).map_err(refused)?.tensors)
}

/// A file's tensors under canonical names, read with or without their values.
fn canonical(
    spec: &Weights,
    path: &Path,
    family: Family,
    read: impl Fn(&Path, Option<&str>) -> Result<TensorMap, weights::WeightsError>,
) -> Result<TensorMap, Refusal> {
    let key = spec.file().and_then(|(_, key)| key);
    let tensors = read(path, key).map_err(refused)?;
    let Canonical { mut tensors, mask_token, naming, prefix, others, ignored } =
        weights::to_canonical(tensors, family).map_err(|error| refused(error.of(&spec.to_string())))?;
    // Said where values are read, not where shapes are checked.
    if tensors.values().any(|tensor| !tensor.is_shape_only()) {
        let at = if prefix.is_empty() { String::new() } else { format!(", under `{prefix}`") };
        let rest = match others.is_empty() {
            true => String::new(),
            false => format!(
                "; its other towers are left out, `weights: {{path: FILE, key: NAME}}` takes them: `{}`",
                others.join("`, `")
            ),
        };
        tracing::info!(
            "{spec}: a tower in {naming} naming{at}; {} tensors beside it are left out{rest}",
            ignored.len()
        );
    }
    // A tower that shows no mask token leaves it out.
    tensors.extend(mask_token.map(|token| ("mask_token".to_owned(), token)));
    Ok(tensors)
}

/// The tapped states of a tower.
pub(crate) fn tap(cx: &Context, tape: &mut Tape, tower: &Vit, x: &Tensor, tap: Tap) -> Result<Tensor> {
    match tap {
        Tap::Block => Ok(x.clone()),
        Tap::Norm => tower.final_norm(cx, tape, x),
        Tap::Projection => {
            let x = tower.final_norm(cx, tape, x)?;
            match &tower.head {
                Some(head) => head.forward(cx, tape, &x, Act::None),
                // CLIP's files come with and without it; targets that tap it are refused without.
                None => Ok(x),
            }
        }
    }
}

/// An input of the given size with the given statistics.
///
/// ```
/// # use maskalign_core::prelude::*;
/// assert_eq!(input(224, Statistics::CLIP).image_size, 224);
/// ```
pub fn input(image_size: usize, statistics: Statistics) -> TowerInput {
    TowerInput { image_size, statistics }
}
