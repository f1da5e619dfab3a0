//! A plain vision transformer under timm's names.

use maskalign_registry::{Refusal, Weights, plugin::sidecar::Sidecar};
use serde_json::Value;

use super::{PlannedTeacher, Teacher};
use crate::{
    component,
    components::{
        beside::Beside,
        towers::{PlanContext, PlannedTower, TowerOptions, input},
    },
    nn::{Arch, Statistics, VitConfig},
    register,
    weights::Family,
};

/// A plain vision transformer under timm's names. It may be the student of an earlier stage.
#[component]
struct VitTeacher {
    /// Sizes: a name such as `base_16`, or the numbers. Absent: those of the stage's student in `weights`, or
    /// of a configuration beside them.
    #[serde(default)]
    arch: Option<Arch>,
    /// A file, `hf://org/repo` in the local hub cache, `embedded://NAME`, or `{stage: NAME}`: an earlier stage's student.
    weights: Weights,
    /// Side in pixels of the image the tower runs at. Absent: what a configuration beside the weights says, else the data's;
    /// `null`: the data's. Positions are resized to it.
    #[serde(default)]
    #[schemars(range(min = 1, max = 65536))]
    image_size: Option<usize>,
    /// Whether a class token leads the patches. Absent: as for the stage's student in `weights`, or as a
    /// configuration beside them says, else `true`.
    #[serde(default)]
    cls_token: Option<bool>,
    /// Added to the variance in LayerNorms. Absent: as for `cls_token`, else 1e-6.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    eps: Option<f64>,
    /// What the input is normalised by: a name, or the values. Absent: as for `cls_token`, else `imagenet`.
    #[serde(default)]
    statistics: Option<Statistics>,
}

impl VitTeacher {
    fn config(&self, cx: &PlanContext) -> Result<VitConfig, Refusal> {
        let options = TowerOptions { arch: self.arch, image_size: self.image_size, weights: Some(&self.weights) };
        let (arch, image_size) = options.resolve(cx)?;
        let earlier = match &self.weights {
            Weights::Stage(stage) => Some(cx.student(stage).map_err(|r| r.under("weights"))?.shape()),
            _ => None,
        };
        let statistics = self.statistics.or(earlier.map(|shape| shape.statistics)).unwrap_or(Statistics::IMAGENET);
        Ok(VitConfig {
            input: input(image_size, statistics),
            cls_token: self.cls_token.or(earlier.map(|shape| shape.cls_token)).unwrap_or(true),
            learned_positions: true,
            layer_scale: earlier.and_then(|shape| shape.layer_scale),
            eps: self.eps.or(earlier.map(|shape| shape.eps)).unwrap_or(1e-6),
            ..VitConfig::plain(arch, image_size)
        })
    }
}

impl Teacher for VitTeacher {
    fn plan(&self, cx: &PlanContext) -> Result<Box<dyn PlannedTeacher>, Refusal> {
        Ok(Box::new(PlannedTower::plan(cx, self.config(cx)?, Some(&self.weights), Family::Vit)?))
    }
}

fn beside(options: &Value) -> Result<Sidecar, Refusal> {
    Ok(Beside::tower(options)?.image_size().gelu().cls_token().finish())
}

register!(teacher "vit" => VitTeacher, "a plain vision transformer, or an earlier stage's student",
    example: "{ type: vit, arch: small_16, weights: teacher.safetensors }",
    paper: "arXiv 2010.11929",
    sidecar: beside);
