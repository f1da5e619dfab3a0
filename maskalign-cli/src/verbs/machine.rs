//! What changes how fast a run is and how much memory it takes, and not its results.

use std::num::NonZeroUsize;

use maskalign_core::device::{DeviceChoice, Opened};

use crate::{failure::Failure, panics};

/// Device, threads and memory.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Machine")]
pub(crate) struct Machine {
    /// auto, cpu, cuda or cuda:N; auto takes a GPU that works
    #[arg(long, default_value = "auto", value_parser = str::parse::<DeviceChoice>)]
    device: DeviceChoice,
    /// Threads that compute [default: all cores]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Compute blocks again in the backward pass in place of keeping what they need: less memory, the same results
    #[arg(long)]
    pub recompute: bool,
}

impl Machine {
    pub fn threads(&self) -> usize {
        self.threads.or_else(|| std::thread::available_parallelism().ok()).map_or(1, NonZeroUsize::get)
    }

    /// Opens the device.
    ///
    /// # Errors
    /// It was asked for by name and is not there, or not in this binary.
    pub fn open(&self) -> Result<Opened, Failure> {
        let device = self.device;
        Ok(panics::expected(move || device.open())?)
    }
}
