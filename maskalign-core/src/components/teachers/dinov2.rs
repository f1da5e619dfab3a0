//! DINOv2's tower, with LayerScale.

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

fn eps() -> f64 {
    1e-6
}

/// DINOv2's tower, with LayerScale. Original files (arXiv 2304.07193), timm's and Hugging Face's.
#[component]
struct Dinov2 {
    /// Sizes: a name such as `base_16`, or the numbers. Absent: those of a configuration beside the weights.
    #[serde(default)]
    arch: Option<Arch>,
    /// A file, or `hf://org/repo` in the local hub cache.
    weights: Weights,
    /// Side in pixels of the image the tower runs at. Absent: what a configuration beside the weights says, else the data's;
    /// `null`: the data's. Positions are resized to it.
    #[serde(default)]
    #[schemars(range(min = 1, max = 65536))]
    image_size: Option<usize>,
    /// Added to the variance in LayerNorms.
    #[serde(default = "eps")]
    #[schemars(range(min = 0.0))]
    eps: f64,
    /// What the input is normalised by: a name, or the values.
    #[serde(default = "statistics")]
    statistics: Statistics,
}

impl Dinov2 {
    fn config(&self, cx: &PlanContext) -> Result<VitConfig, Refusal> {
        let options = TowerOptions { arch: self.arch, image_size: self.image_size, weights: Some(&self.weights) };
        let (arch, image_size) = options.resolve(cx)?;
        Ok(VitConfig {
            input: input(image_size, self.statistics),
            learned_positions: true,
            layer_scale: Some(1e-5),
            eps: self.eps,
            ..VitConfig::plain(arch, image_size)
        })
    }
}

impl Teacher for Dinov2 {
    fn plan(&self, cx: &PlanContext) -> Result<Box<dyn PlannedTeacher>, Refusal> {
        Ok(Box::new(PlannedTower::plan(cx, self.config(cx)?, Some(&self.weights), Family::Dinov2)?))
    }
}

fn statistics() -> Statistics {
    Statistics::IMAGENET
}

fn beside(options: &Value) -> Result<Sidecar, Refusal> {
    Ok(Beside::tower(options)?.image_size().gelu().class_token().finish())
}

register!(teacher "dinov2" => Dinov2, "DINOv2's tower, with LayerScale",
    example: r#"{ type: dinov2, arch: base_14, weights: "hf://facebook/dinov2-base", image_size: 196 }"#,
    paper: "DINOv2, arXiv 2304.07193",
    sidecar: beside);
