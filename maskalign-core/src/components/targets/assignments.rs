//! A moving teacher's assignments of tokens to prototypes.

use maskalign_registry::Refusal;

use super::{PlannedTarget, Target, TargetContext, TargetSource};
use crate::{component, components::towers::Tap, register};

fn temperature() -> f64 {
    0.04
}
fn center_momentum() -> f64 {
    0.9
}

/// Logits of a moving teacher's tokens for prototypes: its last block goes through the final norm and a moving average of the
/// objective's own map; they are centred by a moving average of their mean and divided by a temperature, so that a loss such
/// as `cross_entropy` takes their softmax (DINO, arXiv 2104.14294, section 3.1; iBOT, arXiv 2111.07832, equation 2). The mean
/// is that of all class tokens, or of all patches, of the views that the teacher sees.
#[component]
struct Assignments {
    /// The teacher, by its name under `teachers`; it follows the student: `ema`.
    #[schemars(extend("x-reference" = "teacher"))]
    teacher: String,
    /// Prototypes: channels of the map.
    #[schemars(range(min = 2, max = 1048576))]
    prototypes: usize,
    /// What logits are divided by; below the student's, this sharpens them.
    #[serde(default = "temperature")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    temperature: f64,
    /// The temperature of the first epoch, where it changes; it reaches `temperature` in equal steps, one an epoch.
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0))]
    warmup_temperature: Option<f64>,
    /// Epochs in which it does, the first and the last of them included.
    #[serde(default)]
    warmup_epochs: u64,
    /// What is kept of the centre in an update; 0 centres by the last update's mean.
    #[serde(default = "center_momentum")]
    #[schemars(range(min = 0.0, max = 1.0))]
    center_momentum: f64,
}

/// How logits become a target.
///
/// ```
/// # use maskalign_core::components::targets::Sharpening;
/// let ibot = Sharpening { temperature: 0.07, warmup: Some((0.04, 30)), center_momentum: 0.9 };
/// assert_eq!([0, 29, 90].map(|epoch| ibot.temperature_at(epoch)), [0.04, 0.07, 0.07]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sharpening {
    /// What they are divided by.
    pub temperature: f64,
    /// Where the temperature changes at first: its first value, and the epochs in which it reaches its own.
    pub warmup: Option<(f64, u64)>,
    /// What is kept of the centre in an update.
    pub center_momentum: f64,
}

impl Sharpening {
    /// The temperature of an epoch, as numpy's `linspace` has it.
    pub fn temperature_at(&self, epoch: u64) -> f64 {
        match self.warmup {
            Some((from, epochs)) if epoch + 1 < epochs => {
                from + (self.temperature - from) * epoch as f64 / (epochs - 1) as f64
            }
            _ => self.temperature,
        }
    }
}

impl Target for Assignments {
    fn plan(&self, cx: &TargetContext) -> Result<PlannedTarget, Refusal> {
        let teacher = cx.teacher(&self.teacher)?;
        cx.check_tokens(&self.teacher, teacher)?;
        if cx.tokens.cls && (cx.tokens.visible || cx.tokens.masked) {
            return Err(Refusal::whole("class tokens and patches are centred apart")
                .beside(["tokens"], "both are asked for here")
                .help("give each an objective of its own, and the second the aligner `shared`"));
        }
        let warmup = match (self.warmup_temperature, self.warmup_epochs) {
            (None, 0) => None,
            (Some(from), epochs @ 1..) => Some((from, epochs)),
            (None, _) => {
                return Err(Refusal::new("warmup_epochs", "there is no temperature to start from")
                    .help("set `warmup_temperature` too"));
            }
            (Some(_), 0) => {
                return Err(Refusal::new("warmup_temperature", "it lasts no epoch").help("set `warmup_epochs` too"));
            }
        };
        let depth = teacher.arch.depth;
        let (temperature, center_momentum) = (self.temperature, self.center_momentum);
        Ok(PlannedTarget {
            outputs: 1,
            depth,
            levels: vec![depth - 1],
            width: self.prototypes,
            source: TargetSource::MovingHead {
                name: self.teacher.clone(),
                tap: Tap::Norm,
                sharpening: Sharpening { temperature, warmup, center_momentum },
            },
        })
    }
}

register!(target "assignments" => Assignments, "a moving teacher's soft assignments to prototypes",
    example: "{ type: assignments, teacher: ema, prototypes: 8192 }",
    paper: "DINO, arXiv 2104.14294; iBOT, arXiv 2111.07832");
