//! CLIP's image tower.

use maskalign_engine::ops::Act;
use maskalign_registry::{Refusal, Weights, plugin::sidecar::Sidecar};
use serde_json::Value;

use super::{PlannedTeacher, Teacher};
use crate::{
    component,
    components::{
        beside::Beside,
        towers::{PlanContext, PlannedTower, TowerOptions, input},
    },
    nn::{Arch, Bias, Statistics, VitConfig},
    register,
    weights::Family,
};

/// Activation of CLIP's MLPs; the weights do not tell.
#[component]
#[derive(Copy, Default)]
#[serde(rename_all = "snake_case")]
enum Activation {
    /// x sigmoid(1.702 x): OpenAI's weights.
    #[default]
    QuickGelu,
    /// The exact GELU: LAION's weights.
    Gelu,
}

fn eps() -> f64 {
    1e-5
}

/// CLIP's image tower (arXiv 2103.00020): OpenAI, open_clip, Hugging Face and timm files.
#[component]
struct Clip {
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
    /// Activation of the MLPs. Weights with no configuration beside them do not tell.
    #[serde(default)]
    activation: Activation,
    /// Outputs of the projection; absent: 512 for tiny to base, 768 for large, 1024 for huge.
    #[serde(default)]
    #[schemars(range(min = 1, max = 65536))]
    projection: Option<usize>,
    /// Added to the variance in LayerNorms.
    #[serde(default = "eps")]
    #[schemars(range(min = 0.0))]
    eps: f64,
    /// What the input is normalised by: a name, or the values.
    #[serde(default = "statistics")]
    statistics: Statistics,
}

impl Clip {
    fn config(&self, cx: &PlanContext) -> Result<VitConfig, Refusal> {
        let options = TowerOptions { arch: self.arch, image_size: self.image_size, weights: Some(&self.weights) };
        let (arch, image_size) = options.resolve(cx)?;
        let projection = self.projection.unwrap_or(match arch.dim {
            0..=768 => 512,
            769..=1024 => 768,
            _ => 1024,
        });
        Ok(VitConfig {
            input: input(image_size, self.statistics),
            learned_positions: true,
            pre_norm: true,
            patch_bias: Bias::Without,
            act: match self.activation {
                Activation::QuickGelu => Act::QuickGelu,
                Activation::Gelu => Act::Gelu,
            },
            eps: self.eps,
            projection: Some(projection),
            ..VitConfig::plain(arch, image_size)
        })
    }
}

impl Teacher for Clip {
    fn plan(&self, cx: &PlanContext) -> Result<Box<dyn PlannedTeacher>, Refusal> {
        Ok(Box::new(PlannedTower::plan(cx, self.config(cx)?, Some(&self.weights), Family::Clip)?))
    }
}

fn statistics() -> Statistics {
    Statistics::CLIP
}

fn beside(options: &Value) -> Result<Sidecar, Refusal> {
    Ok(Beside::tower(options)?.image_size().activation().projection().class_token().finish())
}

register!(teacher "clip" => Clip, "CLIP's image tower",
    example: r#"{ type: clip, arch: base_16, weights: "hf://openai/clip-vit-base-patch16" }"#,
    paper: "CLIP, arXiv 2103.00020",
    sidecar: beside);
