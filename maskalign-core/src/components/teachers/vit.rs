//! A plain vision transformer under timm's names.

use maskalign_registry::{Refusal, Weights};

use super::{PlannedTeacher, Teacher};
use crate::{
    component,
    components::towers::{PlanContext, PlannedTower, TowerOptions},
    nn::{Arch, VitConfig},
    register,
    weights::Family,
};

fn eps() -> f64 {
    1e-6
}

/// A plain vision transformer under timm's names. It may be the student of an earlier stage.
#[component]
struct VitTeacher {
    /// Sizes: a name such as `base_16`, or the numbers. Absent: those of the stage's student in `weights`.
    #[serde(default)]
    arch: Option<Arch>,
    /// A file, `hf://org/repo` in the local hub cache, `embedded://NAME`, or `{stage: NAME}`: an earlier stage's student.
    weights: Weights,
    /// Side in pixels of the image the tower runs at; absent: the data's. Positions are resized to it.
    #[serde(default)]
    #[schemars(range(min = 1, max = 65536))]
    image_size: Option<usize>,
    /// Whether a class token leads the patches. Absent: as for the stage's student in `weights`, else `true`.
    #[serde(default)]
    cls_token: Option<bool>,
    /// Added to the variance in LayerNorms.
    #[serde(default = "eps")]
    #[schemars(range(min = 0.0))]
    eps: f64,
}

impl VitTeacher {
    fn config(&self, cx: &PlanContext) -> Result<VitConfig, Refusal> {
        let options = TowerOptions { arch: self.arch, image_size: self.image_size, weights: Some(&self.weights) };
        let (arch, image_size) = options.resolve(cx)?;
        let earlier = match &self.weights {
            Weights::Stage(stage) => Some(cx.student(stage).map_err(|r| r.under("weights"))?.shape()),
            _ => None,
        };
        Ok(VitConfig {
            cls_token: self.cls_token.or(earlier.map(|shape| shape.cls_token)).unwrap_or(true),
            learned_positions: true,
            layer_scale: earlier.and_then(|shape| shape.layer_scale),
            eps: self.eps,
            ..VitConfig::plain(arch, image_size)
        })
    }
}

impl Teacher for VitTeacher {
    fn plan(&self, cx: &PlanContext) -> Result<Box<dyn PlannedTeacher>, Refusal> {
        Ok(Box::new(PlannedTower::plan(cx, self.config(cx)?, Some(&self.weights), Family::Vit)?))
    }
}

register!(teacher "vit" => VitTeacher, "a plain vision transformer, or an earlier stage's student",
    example: "{ type: vit, arch: small_16, weights: teacher.safetensors }",
    paper: "arXiv 2010.11929");
