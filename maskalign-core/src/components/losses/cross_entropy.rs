//! Cross entropy of softened outputs.

use super::Loss;
use crate::{component, register};
use maskalign_engine::{Context, Result, Tape, Tensor, ops};

fn one() -> f32 {
    1.0
}

/// Cross entropy of softmax(prediction / temperature) with softmax(target / target_temperature) over channels, mean over
/// tokens: self-distillation (DINO, arXiv 2104.14294, equation 2; iBOT on patches). A lower temperature of the target's
/// sharpens it.
#[component]
struct CrossEntropy {
    /// What predictions are divided by.
    #[serde(default = "one")]
    #[schemars(range(min = 0.001))]
    temperature: f32,
    /// What targets are divided by.
    #[serde(default = "one")]
    #[schemars(range(min = 0.001))]
    target_temperature: f32,
}

impl Loss for CrossEntropy {
    fn term(&self, cx: &Context, tape: &mut Tape, prediction: &Tensor, target: &Tensor) -> Result<Tensor> {
        let logits = ops::scale(cx, tape, prediction, self.temperature.recip())?;
        let mut fixed = Tape::inference();
        let target = ops::scale(cx, &mut fixed, target, self.target_temperature.recip())?;
        let target = ops::softmax(cx, &mut fixed, &target)?;
        ops::cross_entropy(cx, tape, &logits, &target)
    }
}

register!(loss "cross_entropy" => CrossEntropy, "cross entropy of softened outputs, as self-distillation compares them",
    example: "{ type: cross_entropy, temperature: 0.1, target_temperature: 0.04 }");

#[cfg(test)]
mod tests {
    use maskalign_engine::Device;

    use super::*;

    /// ```python
    /// p = torch.tensor([[0.2, -0.1, 0.4], [1.0, 0.5, -0.3]], requires_grad=True)
    /// t = torch.tensor([[0.1, 0.0, 0.12], [-0.2, 0.3, 0.25]])
    /// loss = torch.nn.functional.cross_entropy(p / 0.1, (t / 0.04).softmax(-1))
    /// loss.backward(); print(loss.item(), p.grad)
    /// ```
    #[test]
    fn it_equals_pytorch() {
        let cx = Context::new(Device::Cpu, 1);
        let prediction = cx.tensor(vec![0.2, -0.1, 0.4, 1.0, 0.5, -0.3], 2, 3).unwrap().tracked();
        let target = cx.tensor(vec![0.1, 0.0, 0.12, -0.2, 0.3, 0.25], 2, 3).unwrap();
        let mut tape = Tape::training();
        let loss = CrossEntropy { temperature: 0.1, target_temperature: 0.04 };
        let term = loss.term(&cx, &mut tape, &prediction, &target).unwrap();
        assert!((term.value() - 3.901_911_5).abs() < 1e-5, "{}", term.value());
        let gradients = tape.backward(&term).unwrap().to_vec(&prediction);
        let expected = [-1.238_462_8, -0.120_795_68, 1.359_258_3, 4.966_510_3, -3.853_024_5, -1.113_485_8];
        assert!(gradients.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-4), "{gradients:?}");
    }
}
