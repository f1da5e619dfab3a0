//! Where tensors live: the bound that model code is generic over, and the choice among devices.

use std::sync::Arc;

use dfdx::prelude::{Cpu, Device, Storage, Tensor};

use crate::{
    error::{Error, Result},
    kernels::{Kernels, fused::Fused},
};

/// A vector on a device.
pub type Vector<D, E = f32> = Tensor<(usize,), E, D>;
/// A matrix on a device: tokens of a batch are the rows, `[batch * tokens, channels]`.
pub type Matrix<D, E = f32> = Tensor<(usize, usize), E, D>;
/// A single value on a device, such as a loss.
pub type Scalar<D, E = f32> = Tensor<(), E, D>;
/// The storage behind a tensor or a gradient.
pub type Buffer<D, E = f32> = <D as Storage<E>>::Vec;

/// A device that MaskAlign trains on. Neither `Send` nor `Sync`: dfdx's CUDA device is not.
pub trait Dev: Device<f32> + Backend {}
impl<D: Device<f32> + Backend> Dev for D {}

/// What differs from device to device, implemented once for each: a registry entry cannot be generic, so it holds
/// one constructor per device and this trait picks.
pub trait Backend: Sized + 'static {
    /// The operators of this device; what runs on the host runs on `threads` threads.
    fn kernels(threads: usize) -> Arc<dyn Kernels<Self>>
    where
        Self: Dev;
    /// The value that belongs to this device out of one per device.
    fn pick<C>(per_device: &C) -> &C::Of<Self>
    where
        Self: Dev,
        C: PerDevice;
}

/// One value per device, such as the constructors of a component.
pub trait PerDevice {
    /// The value for one device.
    type Of<D: Dev>;
    /// The value for the CPU.
    fn cpu(&self) -> &Self::Of<Cpu>;
    /// The value for CUDA.
    #[cfg(feature = "cuda")]
    fn cuda(&self) -> &Self::Of<dfdx::prelude::Cuda>;
}

impl Backend for Cpu {
    fn kernels(threads: usize) -> Arc<dyn Kernels<Self>> {
        Arc::new(Fused::new(threads))
    }
    fn pick<C: PerDevice>(per_device: &C) -> &C::Of<Self> {
        per_device.cpu()
    }
}

#[cfg(feature = "cuda")]
impl Backend for dfdx::prelude::Cuda {
    fn kernels(threads: usize) -> Arc<dyn Kernels<Self>> {
        Arc::new(crate::kernels::composed::Composed::new(threads))
    }
    fn pick<C: PerDevice>(per_device: &C) -> &C::Of<Self> {
        per_device.cuda()
    }
}

/// The device of a run, as `--device` gives it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A GPU that works, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA device of this ordinal.
    Cuda(usize),
}

impl std::str::FromStr for DeviceChoice {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|n| n.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| "expected auto, cpu, cuda or cuda:N".to_string()),
        }
    }
}

/// A device that was opened.
pub enum Opened {
    /// The CPU.
    Cpu(Cpu),
    /// A CUDA device that answered.
    #[cfg(feature = "cuda")]
    Cuda(dfdx::prelude::Cuda, usize),
}

impl Opened {
    /// Name for manifests and messages: `cpu` or `cuda:N`.
    pub fn name(&self) -> String {
        match self {
            Opened::Cpu(_) => "cpu".into(),
            #[cfg(feature = "cuda")]
            Opened::Cuda(_, ordinal) => format!("cuda:{ordinal}"),
        }
    }
}

impl DeviceChoice {
    /// Opens the device. `Auto` takes a GPU that works and says so in the log.
    ///
    /// # Errors
    /// A CUDA device was asked for and this binary has none compiled in, or it does not answer.
    pub fn open(self) -> Result<Opened> {
        match self {
            DeviceChoice::Cpu => Ok(Opened::Cpu(Cpu::default())),
            DeviceChoice::Auto => {
                #[cfg(feature = "cuda")]
                match open_cuda(0) {
                    Ok(device) => {
                        tracing::info!("device: cuda:0 (auto)");
                        return Ok(Opened::Cuda(device, 0));
                    }
                    Err(error) => tracing::info!("device: cpu (auto; {error})"),
                }
                Ok(Opened::Cpu(Cpu::default()))
            }
            #[cfg(feature = "cuda")]
            DeviceChoice::Cuda(ordinal) => Ok(Opened::Cuda(open_cuda(ordinal)?, ordinal)),
            #[cfg(not(feature = "cuda"))]
            DeviceChoice::Cuda(_) => Err(Error::Usage(
                "this binary was built without CUDA: build with `--features cuda`, or use `--device cpu`".into(),
            )),
        }
    }
}

/// Opens a CUDA device that computes what the CPU does.
///
/// What may be missing is found only at first use, some of it by a panic inside the bindings: a device and a driver that
/// fit, and for the operators that dfdx compiles at run time the toolkit's headers and dfdx's own build folder, both
/// where they were at the build.
#[cfg(feature = "cuda")]
fn open_cuda(ordinal: usize) -> Result<dfdx::prelude::Cuda> {
    let refuse = |why: String| Error::Device(format!("cuda:{ordinal} does not answer: {why}"));
    let attempt = std::panic::catch_unwind(|| {
        let device = dfdx::prelude::Cuda::try_build(ordinal, 0).map_err(|e| refuse(e.to_string()))?;
        let found = probe(&device).map_err(|error| match error {
            Error::Device(why) => refuse(why),
            other => other,
        })?;
        let expected = probe(&Cpu::default())?;
        match far_apart(&found, &expected) {
            Some((found, expected)) => Err(refuse(format!("it computes {found} where the CPU computes {expected}"))),
            None => Ok(device),
        }
    });
    attempt.unwrap_or_else(|payload| {
        let text = payload.downcast_ref::<String>().map(String::as_str).or(payload.downcast_ref::<&str>().copied());
        Err(refuse(format!(
            "{}; it needs the NVIDIA driver, and the CUDA toolkit and the folder that this binary was built with",
            text.unwrap_or("the bindings panicked")
        )))
    })
}

/// A small pass, forward and backward: the values and the gradients. Besides a product and sums it has all that dfdx
/// compiles at run time for CUDA (`reshape_to` of a permuted tensor, `concat_along`, the gradient of `stack`), in the
/// operators that use it.
#[cfg(any(feature = "cuda", test))]
fn probe<D: Dev>(dev: &D) -> Result<Vec<f32>> {
    use crate::{
        kernels::{AttentionShape, Distance, composed},
        tape::{Recorder, gradient},
    };
    let matrix = |rows: usize, columns: usize, phase: f32| -> Result<Matrix<D>> {
        let values = (0..rows * columns).map(|i| (i as f32 + phase).sin()).collect();
        dev.try_tensor_from_vec(values, (rows, columns)).map_err(crate::error::device)
    };
    let (x, y, w, target) = (matrix(4, 4, 0.0)?, matrix(2, 4, 0.3)?, matrix(1, 2, 0.6)?, matrix(4, 4, 0.9)?);
    let mut r = Recorder::training();
    let rows = composed::gather_rows(&mut r, &[x.clone(), y.clone()], &[5, 0, 2, 1])?;
    let shape = AttentionShape { batch: 2, heads: 2, queries: 2, keys: 2 };
    let attended = composed::attention(&mut r, &rows, &rows, &rows, shape)?;
    let mixed = composed::mix(&mut r, &[rows, attended], &w, &[0])?;
    let loss = composed::distance(&mut r, &mixed[0], &target, Distance::Mse)?;
    let mut gradients = r.backward(&loss)?;
    let mut values = [mixed[0].as_vec(), loss.as_vec()].concat();
    for input in [&x, &y, &w] {
        values.extend(gradient(&mut gradients, input)?.as_vec());
    }
    Ok(values)
}

/// The first two values that rounding does not explain.
#[cfg(any(feature = "cuda", test))]
fn far_apart(found: &[f32], expected: &[f32]) -> Option<(f32, f32)> {
    let mut pairs = found.iter().copied().zip(expected.iter().copied());
    // TF32 products have 10 bits.
    pairs.find(|(found, expected)| found.is_nan() || (found - expected).abs() > 1e-2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_tells_a_wrong_value_from_rounding() {
        let expected = probe(&Cpu::default()).unwrap();
        assert_eq!(expected.len(), 16 + 1 + 16 + 8 + 2);
        assert!(expected.iter().all(|v| v.is_finite()) && expected.iter().filter(|v| v.abs() > 0.02).count() > 30);
        for (i, wrong) in [(3, 0.0), (16, f32::NAN), (42, 7.0)] {
            let mut found: Vec<f32> = expected.iter().map(|v| v + 1e-4).collect();
            assert_eq!(far_apart(&found, &expected), None);
            found[i] = wrong;
            assert!(far_apart(&found, &expected).is_some_and(|(_, e)| e == expected[i]));
        }
    }
}
