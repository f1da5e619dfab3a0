//! A device in the host's memory, for tests: it counts what it does and runs out of memory on demand.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

use crate::{Driver, Error, Gpu, Memory, Result};

/// Counts of what a pretended device did.
#[derive(Debug, Default)]
pub struct Counts {
    /// Copies to the device.
    pub uploads: AtomicUsize,
    /// Copies from the device.
    pub downloads: AtomicUsize,
    /// Kernels that were run.
    pub launches: AtomicUsize,
    /// Bytes in use.
    pub live: AtomicUsize,
    /// Allocations until one fails; with 0, none fails.
    pub fail_in: AtomicUsize,
}

#[derive(Debug)]
struct Device(Arc<Counts>);

#[derive(Debug)]
struct Cells {
    values: Vec<f32>,
    counts: Arc<Counts>,
}

/// A new device, and its counts.
pub fn open() -> (Gpu, Arc<Counts>) {
    let counts = Arc::new(Counts::default());
    (Gpu(Arc::new(Device(Arc::clone(&counts)))), counts)
}

impl Device {
    fn alloc(&self, values: Vec<f32>) -> Result<Box<dyn Memory>> {
        let bytes = size_of_val(values.as_slice());
        if self.0.fail_in.load(Relaxed) > 0 && self.0.fail_in.fetch_sub(1, Relaxed) == 1 {
            return Err(Error::OutOfMemory { device: self.name(), bytes });
        }
        self.0.live.fetch_add(bytes, Relaxed);
        Ok(Box::new(Cells { values, counts: Arc::clone(&self.0) }))
    }
}

impl Driver for Device {
    fn name(&self) -> String {
        "pretended".into()
    }

    fn upload(&self, values: &[f32]) -> Result<Box<dyn Memory>> {
        self.0.uploads.fetch_add(1, Relaxed);
        self.alloc(values.to_vec())
    }

    fn add(&self, x: &dyn Memory, y: &dyn Memory) -> Result<Box<dyn Memory>> {
        self.0.launches.fetch_add(1, Relaxed);
        let cells = |memory: &dyn Memory| -> Vec<f32> {
            let any: &dyn std::any::Any = memory;
            any.downcast_ref::<Cells>().expect("memory of this device").values.clone()
        };
        self.alloc(cells(x).iter().zip(cells(y)).map(|(x, y)| x + y).collect())
    }
}

impl Memory for Cells {
    fn len(&self) -> usize {
        self.values.len()
    }

    fn download(&self) -> Vec<f32> {
        self.counts.downloads.fetch_add(1, Relaxed);
        self.values.clone()
    }
}

impl Drop for Cells {
    fn drop(&mut self) {
        self.counts.live.fetch_sub(size_of_val(self.values.as_slice()), Relaxed);
    }
}
