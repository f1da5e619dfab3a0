//! The vision transformer as a student.

use std::sync::Arc;

use maskalign_engine::{Context, ImageBatch, Result, Tape, Tensor};
use maskalign_registry::{Refusal, Weights, plugin::sidecar::Sidecar};
use serde_json::Value;

use super::{PlannedStudent, Student, StudentModel};
use crate::{
    component,
    components::{
        beside::Beside,
        towers::{PlanContext, PlannedTower, TowerOptions, TowerShape, TrainedStudents, input},
    },
    error::Error,
    nn::{
        Arch, BranchScales, Features, Init, MaskedPatches, Module, Param, Reach, SeenPatches, Statistics, Vit,
        VitConfig,
    },
    register,
    weights::Family,
};

/// Positions of a student.
#[component]
#[derive(Copy, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
enum Positions {
    /// Fixed two-dimensional sines and cosines.
    Sincos,
    /// Learned, truncated normal .02 at first.
    Learned,
}

/// A vision transformer with exact GELU and Xavier-uniform initialisation (MAE's and
/// MaskAlign's).
#[component]
struct VitStudent {
    /// Sizes: a name such as `base_16`, or the numbers. Absent: those of the stage's student in `weights`, or
    /// of a configuration beside them.
    #[serde(default)]
    arch: Option<Arch>,
    /// Side in pixels of the image the tower runs at; absent: the data's.
    #[serde(default)]
    #[schemars(range(min = 1, max = 65536))]
    image_size: Option<usize>,
    /// Weights to start from (the optimizer starts afresh): an earlier stage's student, a run directory, a checkpoint, an
    /// exported folder, or a file. Absent: random.
    #[serde(default)]
    weights: Option<Weights>,
    /// Kind of positions. Absent: those of the stage's student in `weights`, else `sincos`.
    #[serde(default)]
    positions: Option<Positions>,
    /// Whether a class token leads the patches. Absent: as for the stage's student in `weights`, or as a
    /// configuration beside them says, else `true`.
    #[serde(default)]
    cls_token: Option<bool>,
    /// What stands for masked patches. A mask token is read from `weights` where these have one, else drawn. It serves
    /// pre-training alone: later stages and exports leave it out.
    #[serde(default)]
    masked_patches: MaskedPatches,
    /// Initial value of learned scales of each block's branches (LayerScale, arXiv 2103.17239). Absent: as for `cls_token`,
    /// else none.
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0))]
    layer_scale: Option<f64>,
    /// Stochastic depth: the rate of the last block; it grows linearly from 0 at the first.
    #[serde(default)]
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1))]
    drop_path: f64,
    /// Added to the variance in LayerNorms. Absent: as for `cls_token`, else 1e-6.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    eps: Option<f64>,
    /// What the input is normalised by: a name, or the values. Absent: as for `cls_token`, else `imagenet`.
    #[serde(default)]
    statistics: Option<Statistics>,
}

impl VitStudent {
    fn config(&self, cx: &PlanContext) -> Result<VitConfig, Refusal> {
        let options = TowerOptions { arch: self.arch, image_size: self.image_size, weights: self.weights.as_ref() };
        let (arch, image_size) = options.resolve(cx)?;
        let earlier = match &self.weights {
            Some(Weights::Stage(stage)) => Some(cx.student(stage).map_err(|r| r.under("weights"))?.shape()),
            _ => None,
        };
        let cls_token = self.cls_token.or(earlier.map(|shape| shape.cls_token)).unwrap_or(true);
        if cls_token && earlier.is_some_and(|shape| !shape.cls_token) {
            return Err(Refusal::new("cls_token", "the student in `weights` has no class token")
                .help("leave `cls_token` out: it follows from `weights`"));
        }
        let learned_positions = match (self.positions, earlier) {
            (Some(positions), _) => positions == Positions::Learned,
            (None, earlier) => earlier.is_some_and(|shape| shape.learned_positions),
        };
        if !learned_positions && arch.dim % 4 != 0 {
            return Err(Refusal::new("arch", format!("sin-cos positions need a dim that 4 divides, not {}", arch.dim)));
        }
        let statistics = self.statistics.or(earlier.map(|shape| shape.statistics)).unwrap_or(Statistics::IMAGENET);
        Ok(VitConfig {
            input: input(image_size, statistics),
            cls_token,
            learned_positions,
            layer_scale: self.layer_scale.or(earlier.and_then(|shape| shape.layer_scale)),
            masked_patches: self.masked_patches,
            eps: self.eps.or(earlier.map(|shape| shape.eps)).unwrap_or(1e-6),
            ..VitConfig::plain(arch, image_size)
        })
    }
}

impl Student for VitStudent {
    fn plan(&self, cx: &PlanContext) -> Result<Arc<dyn PlannedStudent>, Refusal> {
        let config = self.config(cx)?;
        let family = if config.layer_scale.is_some() { Family::Dinov2 } else { Family::Vit };
        let tower = PlannedTower::plan(cx, config, self.weights.as_ref(), family)?;
        Ok(Arc::new(PlannedVit { tower, drop_path: self.drop_path }))
    }
}

/// A tower whose sizes and weights fit, and its rate of stochastic depth.
struct PlannedVit {
    tower: PlannedTower,
    drop_path: f64,
}

impl PlannedStudent for PlannedVit {
    fn shape(&self) -> TowerShape {
        self.tower.shape()
    }

    fn is_drawn(&self) -> bool {
        self.tower.is_drawn()
    }

    fn gives_attention(&self) -> bool {
        self.tower.shape().cls_token
    }

    fn sees_sizes(&self) -> bool {
        true
    }

    fn gives_qkv(&self) -> bool {
        true
    }

    fn build(&self, init: &Init, trained: &TrainedStudents) -> Result<Box<dyn StudentModel>, Error> {
        Ok(Box::new(Tower { vit: self.tower.build(init, trained)?, drop_path: self.drop_path }))
    }
}

/// A student sees what the data yields: fine-tuning at another size than that of pre-training is common.
fn beside(options: &Value) -> Result<Sidecar, Refusal> {
    Ok(Beside::tower(options)?.gelu().cls_token().layer_scale().finish())
}

register!(student "vit" => VitStudent, "a vision transformer",
    example: "{ type: vit, arch: base_16, drop_path: 0.1 }", paper: "arXiv 2010.11929; MAE's initialisation",
    sidecar: beside);

struct Tower {
    vit: Vit,
    drop_path: f64,
}

impl Module for Tower {
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        self.vit.visit(f);
    }
}

impl StudentModel for Tower {
    fn shape(&self) -> TowerShape {
        TowerShape::from(&self.vit.config)
    }

    fn drop_path(&self) -> f64 {
        self.drop_path
    }

    fn set_reach(&mut self, reach: Reach) {
        self.vit.set_reach(reach);
    }

    fn forward(
        &self,
        cx: &Context,
        tape: &mut Tape,
        images: &ImageBatch,
        seen: Option<SeenPatches>,
        scales: Option<&BranchScales>,
        keep: &dyn Fn(usize) -> bool,
    ) -> Result<Features> {
        self.vit.forward(cx, tape, images, seen, scales, keep)
    }

    fn forward_at(
        &self,
        cx: &Context,
        tape: &mut Tape,
        images: &ImageBatch,
        size: usize,
        seen: Option<SeenPatches>,
        scales: Option<&BranchScales>,
        keep: &dyn Fn(usize) -> bool,
    ) -> Result<Features> {
        self.vit.forward_at(cx, tape, images, size, seen, scales, keep)
    }

    fn forward_attending(
        &self,
        cx: &Context,
        images: &ImageBatch,
        keep: &dyn Fn(usize) -> bool,
    ) -> Result<(Features, Vec<f32>)> {
        self.vit.forward_attending(cx, images, keep)
    }

    fn norm(&self, cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
        self.vit.final_norm(cx, tape, x)
    }

    fn queries_keys_values(
        &self,
        cx: &Context,
        tape: &mut Tape,
        features: &Features,
        block: usize,
    ) -> Result<Option<Tensor>> {
        self.vit.queries_keys_values(cx, tape, features, block).map(Some)
    }

    fn class_attention(&self, cx: &Context, images: &ImageBatch) -> Result<Option<Vec<f32>>> {
        self.vit.class_attention(cx, images)
    }
}
