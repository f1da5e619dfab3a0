//! A teacher: a vision transformer without a class token, as classifiers of averaged patches are.

use maskalign_core::prelude::*;

fn eps() -> f64 {
    1e-6
}
fn statistics() -> Statistics {
    Statistics::IMAGENET
}

/// A vision transformer without a class token.
#[component]
pub struct Patchwise {
    /// Sizes. Absent: those of a configuration beside the weights.
    #[serde(default)]
    arch: Option<Arch>,
    /// A file, or `hf://org/repo` in the local hub cache.
    weights: Weights,
    /// Added to the variance in LayerNorms.
    #[serde(default = "eps")]
    #[schemars(range(min = 0.0))]
    eps: f64,
    /// What the input is normalised by.
    #[serde(default = "statistics")]
    statistics: Statistics,
}

impl Teacher for Patchwise {
    fn plan(&self, cx: &PlanContext) -> Result<Box<dyn PlannedTeacher>, Refusal> {
        let options = TowerOptions {
            arch: self.arch,
            image_size: None,
            weights: Some(&self.weights),
        };
        let (arch, image_size) = options.resolve(cx)?;
        let config = VitConfig {
            input: input(image_size, self.statistics),
            cls_token: false,
            learned_positions: true,
            eps: self.eps,
            ..VitConfig::plain(arch, image_size)
        };
        let tower = PlannedTower::plan(cx, config, Some(&self.weights), Family::Vit)?;
        Ok(Box::new(tower))
    }
}

fn beside(options: &Value) -> Result<Sidecar, Refusal> {
    Ok(Beside::tower(options)?.gelu().no_class_token().finish())
}

register!(teacher "patchwise" => Patchwise, "a vision transformer without a class token",
    example: "{ type: patchwise, arch: small_16, weights: teacher.safetensors }",
    sidecar: beside);
