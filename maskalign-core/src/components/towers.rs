//! What teachers and students have in common: shapes, taps, and where their weights come from.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use maskalign_engine::{Context, Result, Tape, Tensor, ops::Act};
use maskalign_registry::{Refusal, Slot, StudentTag, Weights};

use crate::{
    component,
    error::Error,
    nn::{Arch, Grid, Init, Module, Reach, Statistics, TowerInput, Vit, VitConfig},
    plugin::Build,
    weights::{self, Family, HostTensor, TensorMap},
};

/// The shape of a tower, as far as other components need it.
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
    /// Outputs of the projection after the final norm, where there is one.
    pub projection: Option<usize>,
    /// What the tower's input is normalised by.
    pub statistics: Statistics,
}

impl From<&VitConfig> for TowerShape {
    fn from(config: &VitConfig) -> Self {
        TowerShape {
            arch: config.arch,
            grid: config.grid(),
            image_size: config.input.image_size,
            cls_token: config.cls_token,
            learned_positions: config.learned_positions,
            projection: config.projection,
            statistics: config.input.statistics,
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

    /// Tokens of an image with every patch visible.
    pub fn tokens(&self) -> usize {
        self.grid.patches() + usize::from(self.cls_token)
    }
}

/// Where a tower's hidden states are taken.
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

/// The student that an earlier stage leaves.
#[derive(Clone, Debug)]
pub struct StudentRecord {
    /// The component that made it.
    pub slot: Slot<StudentTag>,
    /// Its shape.
    pub shape: TowerShape,
    /// What of it its training reached; the rest has its initial values.
    pub reach: Reach,
    /// Its parameters; absent while a recipe is only planned.
    pub weights: Option<Arc<TensorMap>>,
    /// Which of equally named initial values are its own: with the seed, this rebuilds the untrained student.
    pub init_scope: String,
}

/// What is known before the first step.
#[derive(Clone, Copy)]
pub struct PlanContext<'a> {
    /// Side of the square images that the stage's data yields.
    pub data_size: usize,
    /// The students of earlier stages, by stage.
    pub students: &'a BTreeMap<String, StudentRecord>,
    /// Whether files may be looked at.
    pub environment: bool,
    /// Whether a tower whose weights cannot be found gets random ones (timings alone).
    pub random_weights: bool,
}

impl<'a> PlanContext<'a> {
    /// Whether a tower that names `weights` gets random ones: they may, and those named cannot be found.
    pub fn invents(&self, weights: &Weights) -> bool {
        self.random_weights && (matches!(weights, Weights::Stage(_)) || locate(weights).is_err())
    }

    /// The student of an earlier stage.
    ///
    /// # Errors
    /// There is none of that name; the known ones are listed.
    pub fn student(&self, stage: &str) -> Result<&'a StudentRecord, Refusal> {
        self.students.get(stage).ok_or_else(|| {
            let known: Vec<&str> = self.students.keys().map(String::as_str).collect();
            let refusal = Refusal::new("stage", no_student(stage));
            match known.is_empty() {
                true => refusal.help("no earlier stage trains one"),
                false => refusal.help(format!("earlier stages with a student: {}", known.join(", "))),
            }
        })
    }
}

/// What is said of a stage that leaves no student.
pub(crate) fn no_student(stage: &str) -> String {
    format!("no earlier stage `{stage}` leaves a student")
}

/// A tower's options that every kind of tower has: sizes, resolution and weights.
pub(crate) struct TowerOptions<'a> {
    pub arch: Option<Arch>,
    pub image_size: Option<usize>,
    pub weights: Option<&'a Weights>,
}

impl TowerOptions<'_> {
    /// The sizes and the resolution, taken from an earlier stage's student where its weights are used.
    pub fn resolve(&self, cx: &PlanContext) -> Result<(Arch, usize), Refusal> {
        let arch = match (self.arch, self.weights) {
            (Some(arch), Some(Weights::Stage(stage))) => {
                let record = cx.student(stage).map_err(|r| r.under("weights"))?;
                if record.shape.arch != arch {
                    return Err(Refusal::new("arch", format!("differs from that of the student of stage `{stage}`"))
                        .help("leave `arch` out: it follows from `weights`"));
                }
                arch
            }
            (Some(arch), _) => arch,
            (None, Some(Weights::Stage(stage))) => cx.student(stage).map_err(|r| r.under("weights"))?.shape.arch,
            (None, _) => {
                return Err(Refusal::new("arch", "the sizes of the tower are not known")
                    .help("give `arch`: a name such as base_16, or {dim, depth, heads, patch}"));
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
        Weights::Stage(_) | Weights::Embedded(_) => Ok(None),
        file => match weights::locate(&file.to_string()) {
            Ok(path) if path.exists() => Ok(Some(path)),
            Ok(path) => Err(Refusal::new("weights", format!("there is no file `{}`", path.display()))
                .help("a path starts from the current folder; `hf://ORG/REPO` names a model in the local hub cache")),
            Err(error) => Err(Refusal::new("weights", error.to_string())),
        },
    }
}

/// The shape of a tower, once the weights it is to have are known to fit it: names and shapes are looked at here, values
/// when the stage begins.
pub(crate) fn plan_tower(
    cx: &PlanContext,
    config: VitConfig,
    source: Option<&Weights>,
    family: Family,
) -> Result<TowerShape, Refusal> {
    let Some(source) = source.filter(|_| cx.environment && !cx.random_weights) else {
        return Ok(TowerShape::from(&config));
    };
    let whole = |error: Error| match error {
        Error::Refused(refusal) => refusal,
        other => Refusal::whole(other.to_string()),
    };
    let tensors = match source {
        Weights::Stage(stage) => {
            let record = cx.student(stage).map_err(|r| r.under("weights"))?;
            let earlier = PlanContext { data_size: record.shape.image_size, ..*cx };
            let student = Build::build(&record.slot).map_err(Error::from);
            let mut student = student.and_then(|s| s.build(&earlier, &Init::shapes())).map_err(whole)?;
            student.shapes().into_iter().map(|(name, shape)| (name, HostTensor::shape_only(shape))).collect()
        }
        Weights::Embedded(name) => embedded(name, family)?,
        file => canonical(file, family, weights::read_shapes)?,
    };
    let mut tower = Vit::new(&Init::shapes(), config).map_err(|error| whole(error.into()))?;
    fit(&mut tower, tensors, source)?;
    Ok(TowerShape::from(&tower.config))
}

/// Reads a tower's weights under canonical names, positions resized to its grid, checked against its parameters.
pub(crate) fn load_tower(cx: &PlanContext, tower: &mut Vit, source: &Weights, family: Family) -> Result<(), Error> {
    let tensors: TensorMap = match source {
        Weights::Stage(stage) => {
            let record = cx.student(stage).map_err(|r| r.under("weights"))?;
            let weights = record.weights.as_ref().expect("a stage that ran leaves its student's weights");
            TensorMap::clone(weights)
        }
        Weights::Embedded(name) => embedded(name, family)?,
        file => canonical(file, family, |path| {
            tracing::info!("reading {}", path.display());
            weights::read(path)
        })?,
    };
    let tensors = fit(tower, tensors, source)?;
    Ok(tower.load(&tensors)?)
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
    source: &Weights,
    family: Family,
    read: impl Fn(&Path) -> Result<TensorMap, weights::WeightsError>,
) -> Result<TensorMap, Refusal> {
    let path = locate(source)?.expect("a file");
    let tensors = read(&path).map_err(refused)?;
    Ok(weights::to_canonical(tensors, family).map_err(|error| refused(error.of(&source.to_string())))?.tensors)
}

/// Makes tensors, or their shapes alone, those of a tower: positions are resized to its grid, and what the weights may
/// come with or without follows them.
fn fit(tower: &mut Vit, mut tensors: TensorMap, source: &Weights) -> Result<TensorMap, Refusal> {
    let side = tower.config.grid().rows;
    if !tower.config.cls_token
        && !tensors.contains_key("cls_token")
        && let Some(positions) = tensors.get("pos_embed").and_then(weights::with_class_row)
    {
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
        // CLIP files come with and without the projection; a target that taps it is refused where it is built.
        tower.head = None;
        tower.config.projection = None;
    }
    if tower.head.is_none() {
        tensors.retain(|name, _| !name.starts_with("head."));
    }
    if !tower.config.cls_token {
        tensors.remove("cls_token");
    }
    let whose = match source {
        Weights::Stage(stage) => format!("the weights of the student of stage `{stage}`"),
        file => format!("the weights in {file}"),
    };
    weights::check_against(&tower.shapes(), tensors, &whose).map_err(refused)
}

/// The tapped states of a tower.
pub(crate) fn tap(cx: &Context, tape: &mut Tape, tower: &Vit, x: &Tensor, tap: Tap) -> Result<Tensor> {
    match tap {
        Tap::Block => Ok(x.clone()),
        Tap::Norm => tower.final_norm(cx, tape, x),
        Tap::Projection => {
            let x = tower.final_norm(cx, tape, x)?;
            let head = tower.head.as_ref().expect("planned: a tower with a projection");
            head.forward(cx, tape, &x, Act::None)
        }
    }
}

/// An input of the given size with the given statistics.
pub(crate) fn input(image_size: usize, statistics: Statistics) -> TowerInput {
    TowerInput { image_size, statistics }
}
