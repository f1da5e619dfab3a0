//! What optimizers do with parameters and gradients, in place.

use maskalign_kernels::optim as kernel;

use crate::{Context, Gradients, Result, Tensor, context::Form};

/// Everything an AdamW step needs to know besides the tensors.
#[derive(Clone, Copy, Debug)]
pub struct AdamStep {
    /// Learning rate.
    pub lr: f64,
    /// Decay rates of the moments.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// The number of this update, from 1.
    pub step: u64,
    /// What gradients are multiplied by first (clipping).
    pub gradient_scale: f32,
}

/// One AdamW update of a parameter and its two moments, in PyTorch's order of operations. A parameter that no loss reached
/// stays as it is: no decay either, as in PyTorch, whose gradient is `None` then.
///
/// # Errors
/// Out of memory on the device.
pub fn adamw(
    cx: &Context,
    parameter: &mut Tensor,
    moments: [&mut Tensor; 2],
    gradients: &Gradients,
    s: AdamStep,
) -> Result<()> {
    let [first, second] = moments;
    match cx.form("adamw", &[parameter, first, second])? {
        Form::Cpu => {
            let Some(grad) = gradients.cpu(parameter) else { return Ok(()) };
            let adam = kernel::AdamW {
                beta1: s.betas.0,
                beta2: s.betas.1,
                eps: s.eps,
                step: s.step,
                grad_scale: s.gradient_scale,
            };
            let tensor = kernel::AdamWTensor {
                param: parameter.cpu_mut()?,
                grad,
                exp_avg: first.cpu_mut()?,
                exp_avg_sq: second.cpu_mut()?,
                lr: s.lr,
                weight_decay: s.weight_decay,
            };
            kernel::adamw(cx.pool(), adam, &mut [tensor]);
            Ok(())
        }
        Form::Composed | Form::Gpu => {
            let correction = 1.0 - s.betas.0.powi(s.step as i32);
            let root_correction = (1.0 - s.betas.1.powi(s.step as i32)).sqrt();
            update(cx, "adamw", parameter, &mut [first, second], gradients, |p, g, state| {
                let g = f64::from(g * s.gradient_scale);
                let m = s.betas.0 * f64::from(state[0]) + (1.0 - s.betas.0) * g;
                let v = s.betas.1 * f64::from(state[1]) + (1.0 - s.betas.1) * g * g;
                (state[0], state[1]) = (m as f32, v as f32);
                let direction = m / (v.sqrt() / root_correction + s.eps);
                (f64::from(p) * (1.0 - s.lr * s.weight_decay) - s.lr / correction * direction) as f32
            })
        }
    }
}

/// One update of a parameter by a rule for each of its values: `rule(value, gradient, state)` gives the new value and
/// changes the value's state, one number from each of `state`. A parameter that no loss reached stays as it is.
///
/// It runs on the host, whatever the device: for optimizers of plugins and as the reference of the others.
///
/// # Errors
/// Out of memory on the device.
pub fn update(
    cx: &Context,
    op: &'static str,
    parameter: &mut Tensor,
    state: &mut [&mut Tensor],
    gradients: &Gradients,
    mut rule: impl FnMut(f32, f32, &mut [f32]) -> f32,
) -> Result<()> {
    let Some(gradient) = gradients.get(parameter) else { return Ok(()) };
    if cx.form(op, &[parameter])? == Form::Gpu {
        cx.count_fallback(op);
    }
    let mut values = parameter.to_vec();
    let mut states: Vec<Vec<f32>> = state.iter().map(|tensor| tensor.to_vec()).collect();
    let mut of_value = vec![0.0; states.len()];
    for (i, (value, gradient)) in values.iter_mut().zip(&gradient).enumerate() {
        of_value.iter_mut().zip(&states).for_each(|(one, all)| *one = all[i]);
        *value = rule(*value, *gradient, &mut of_value);
        of_value.iter().zip(&mut states).for_each(|(one, all)| all[i] = *one);
    }
    parameter.set(&values)?;
    state.iter_mut().zip(&states).try_for_each(|(tensor, values)| tensor.set(values))
}

/// Sum of squares of the gradients of the given parameters, in double precision; 0 for those that no loss reached.
///
/// # Errors
/// Out of memory on the device.
pub fn square_sum(cx: &Context, parameters: &[Tensor], gradients: &Gradients) -> Result<f64> {
    let inputs: Vec<&Tensor> = parameters.iter().collect();
    match cx.form("square_sum", &inputs)? {
        Form::Cpu => {
            let slices: Vec<&[f32]> = parameters.iter().filter_map(|p| gradients.cpu(p)).collect();
            let norm = kernel::grad_norm(cx.pool(), &slices);
            Ok(norm * norm)
        }
        form @ (Form::Composed | Form::Gpu) => {
            if form == Form::Gpu {
                cx.count_fallback("square_sum");
            }
            let squares = |p: &Tensor| -> f64 { gradients.to_vec(p).iter().map(|g| f64::from(*g).powi(2)).sum() };
            Ok(parameters.iter().map(squares).sum())
        }
    }
}
