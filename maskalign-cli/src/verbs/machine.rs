//! Flags that change how fast a run is and how much memory it takes, but not its results.

use std::{num::NonZeroUsize, str::FromStr};

use maskalign_core::{Context, DeviceChoice, Recompute};

use crate::failure::Failure;

/// Device, threads and memory.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Machine {
    /// auto, cpu, cuda or cuda:N; auto takes a GPU that works
    #[arg(long, default_value = "auto", value_parser = str::parse::<DeviceChoice>, help_heading = "Machine")]
    device: DeviceChoice,
    /// Threads that compute [default: all cores]
    #[arg(long, value_name = "N", value_parser = at_least_one::<NonZeroUsize>, help_heading = "Machine")]
    threads: Option<NonZeroUsize>,
    /// Compute blocks again in the backward pass in place of keeping what they need: less memory, the same results
    #[arg(long, help_heading = "Machine")]
    recompute: bool,
}

/// A number that is not 0.
pub(crate) fn at_least_one<T: FromStr>(text: &str) -> Result<T, &'static str> {
    text.parse().map_err(|_| "expected a whole number of at least 1")
}

impl Machine {
    pub(super) fn threads(&self) -> usize {
        self.threads.or_else(|| std::thread::available_parallelism().ok()).map_or(1, NonZeroUsize::get)
    }

    /// What blocks keep for the backward pass.
    pub(super) fn recompute(&self) -> Recompute {
        if self.recompute { Recompute::Blocks } else { Recompute::Never }
    }

    /// The device and the memory as flags, for another process.
    pub(super) fn flags(&self) -> Vec<String> {
        let device = match self.device {
            DeviceChoice::Auto => "auto".to_owned(),
            DeviceChoice::Cpu => "cpu".to_owned(),
            DeviceChoice::Cuda(ordinal) => format!("cuda:{ordinal}"),
        };
        let recompute = self.recompute.then(|| "--recompute".to_owned());
        ["--device".to_owned(), device].into_iter().chain(recompute).collect()
    }

    /// Opens the device, with these threads.
    ///
    /// # Errors
    /// It was requested by name, and this machine or this binary does not have it.
    pub(super) fn open(&self) -> Result<Context, Failure> {
        // The allocator is the process's: a library leaves it alone, a program may set it.
        maskalign_core::keep_freed_memory();
        let device = self.device.open().map_err(maskalign_core::error::Error::from)?;
        Ok(Context::new(device, self.threads()).with_recompute(self.recompute()))
    }
}
