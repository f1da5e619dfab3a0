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
    /// The operators of this device, on `threads` threads where that means something.
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
    fn kernels(_: usize) -> Arc<dyn Kernels<Self>> {
        Arc::new(crate::kernels::composed::Composed)
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

/// Opens a CUDA device and runs one operator on it: the driver library, the device and the run-time compiler are each
/// found missing only at first use, some of them by a panic inside the bindings.
#[cfg(feature = "cuda")]
fn open_cuda(ordinal: usize) -> Result<dfdx::prelude::Cuda> {
    use dfdx::prelude::*;
    let attempt = std::panic::catch_unwind(|| {
        let device = Cuda::try_build(ordinal, 0).map_err(|e| e.to_string())?;
        let x: Tensor<(usize,), f32, Cuda> =
            device.try_tensor_from_vec(vec![1.0, 2.0], (2,)).map_err(|e| e.to_string())?;
        x.try_square().map_err(|e| e.to_string())?;
        Ok::<_, String>(device)
    });
    match attempt {
        Ok(Ok(device)) => Ok(device),
        Ok(Err(error)) => Err(Error::Device(format!("cuda:{ordinal} does not answer: {error}"))),
        Err(_) => Err(Error::Device(format!("cuda:{ordinal} does not answer: is the NVIDIA driver installed?"))),
    }
}
