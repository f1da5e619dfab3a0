//! Devices, chosen at run time.

use maskalign_gpu::Gpu;

use crate::error::{Error, Result};

/// Where tensors lie and operators run. Clones are the same device.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Device {
    /// The host.
    Cpu,
    /// A GPU that was opened.
    Gpu(Gpu),
}

impl Device {
    /// Name for manifests and messages: `cpu` or `cuda:N`.
    pub fn name(&self) -> String {
        match self {
            Device::Cpu => "cpu".into(),
            Device::Gpu(gpu) => gpu.name(),
        }
    }
}

/// The device of a run, as `--device` gives it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A GPU if one works, otherwise the CPU.
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

impl DeviceChoice {
    /// Opens the device. `Auto` takes a GPU if one works, and silently falls back to the CPU.
    ///
    /// # Errors
    /// A GPU was asked for by name, and this binary or this machine has none; or `MASKALIGN_ISA` names an instruction set
    /// that the machine lacks.
    pub fn open(self) -> Result<Device> {
        maskalign_kernels::requested().map_err(|error| Error::NoDevice(error.to_string()))?;
        match self {
            DeviceChoice::Cpu => Ok(Device::Cpu),
            DeviceChoice::Auto => match Gpu::open(0) {
                Ok(gpu) => {
                    tracing::info!("device: {} (auto)", gpu.name());
                    Ok(Device::Gpu(gpu))
                }
                Err(error) => {
                    tracing::debug!("device: cpu (auto; {error})");
                    Ok(Device::Cpu)
                }
            },
            DeviceChoice::Cuda(ordinal) => Ok(Device::Gpu(Gpu::open(ordinal)?)),
        }
    }
}

/// The instruction sets that this machine has kernels for, as `MASKALIGN_ISA` names them, the best first.
///
/// ```
/// assert_eq!(maskalign_engine::instruction_sets().last(), Some(&"scalar"));
/// ```
pub fn instruction_sets() -> Vec<&'static str> {
    maskalign_kernels::Isa::all_available().map(maskalign_kernels::Isa::name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_that_is_not_there_is_refused_with_the_way_out() {
        assert_eq!(DeviceChoice::Auto.open(), Ok(Device::Cpu));
        let refusal = "cuda:1".parse::<DeviceChoice>().unwrap().open().unwrap_err().to_string();
        assert!(refusal.contains("no GPU support") && refusal.contains("--device cpu"), "{refusal}");
        assert!("cuda:x".parse::<DeviceChoice>().is_err());
    }
}
