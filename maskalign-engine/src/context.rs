//! What every operator is given besides its inputs.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use maskalign_kernels::{Arena, Pool, fma_peak_gflops, isa};

use crate::{
    device::Device,
    error::{Error, Result},
    tape::Recompute,
    tensor::Tensor,
    watch::Watch,
};

/// Which forms of the operators run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Forms {
    /// The fastest form that the device has.
    #[default]
    Best,
    /// The composed references, on the host, which the other forms are checked against.
    Composed,
}

/// The device of a run and how its operators run there. Clones share the threads and the counts.
///
/// ```
/// # use maskalign_engine::{Context, Device, Error};
/// let cx = Context::new(Device::Cpu, 2);
/// let x = cx.tensor(vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2, 3)?;
/// assert_eq!((x.shape(), cx.threads()), ((2, 3), 2));
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone)]
pub struct Context {
    device: Device,
    forms: Forms,
    recompute: Recompute,
    watch: Option<Watch>,
    host: Arc<Host>,
}

/// The host's threads, idle buffers, and counts.
struct Host {
    pool: Arc<Pool>,
    arena: Arena,
    fallbacks: Mutex<BTreeMap<&'static str, usize>>,
}

/// Where an operator is to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// Its composed form, on the host.
    Composed,
    /// The CPU's own.
    Cpu,
    /// A GPU's own, or the CPU's with copies where the GPU has none.
    Gpu,
}

impl Context {
    /// A context with the device's own operators; the host uses `threads` threads. Nothing is recomputed.
    pub fn new(device: Device, threads: usize) -> Self {
        let host = Host { pool: Pool::new(threads.max(1)), arena: Arena::new(), fallbacks: Mutex::default() };
        Context { device, forms: Forms::Best, recompute: Recompute::Never, watch: None, host: Arc::new(host) }
    }

    /// The same, with other forms of the operators.
    #[must_use]
    pub fn with_forms(self, forms: Forms) -> Self {
        Context { forms, ..self }
    }

    /// The same, with blocks recomputed in the backward pass or not.
    #[must_use]
    pub fn with_recompute(self, recompute: Recompute) -> Self {
        Context { recompute, ..self }
    }

    /// The same, with every tensor shown to a watch.
    #[must_use]
    pub fn with_watch(self, watch: &Watch) -> Self {
        Context { watch: Some(watch.clone()), ..self }
    }

    /// What every tensor is shown to, for tapes.
    pub fn watch(&self) -> Option<&Watch> {
        self.watch.as_ref()
    }

    /// The device on which tensors are made.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether blocks keep only their input and are computed again in the backward pass: less memory, the same numbers.
    pub fn recompute(&self) -> Recompute {
        self.recompute
    }

    /// The host's threads. The CPU's operators run on them and, whatever the device, so does the work on images before they
    /// are copied to it.
    pub fn pool(&self) -> &Pool {
        &self.host.pool
    }

    /// The number of the host's threads.
    pub fn threads(&self) -> usize {
        self.pool().threads()
    }

    /// The name of the forms in use, for manifests: `composed`, or `fused` with the CPU's instruction set.
    pub fn operators(&self) -> String {
        match self.forms {
            Forms::Composed => "composed".into(),
            Forms::Best => format!("fused, {}", isa().name()),
        }
    }

    /// The machine's peak throughput of fused multiply-adds in GFLOP/s, measured now on the host's threads; `None` on a GPU.
    pub fn peak_gflops(&self) -> Option<f64> {
        (self.device == Device::Cpu && self.forms == Forms::Best).then(|| fma_peak_gflops(self.threads(), self.pool()))
    }

    /// Gives idle buffers back to the system: worth it between stages, whose sizes differ.
    pub fn trim(&self) {
        self.host.arena.trim();
    }

    /// How often each operator ran on the host because the device has no form of it.
    pub fn fallbacks(&self) -> BTreeMap<&'static str, usize> {
        self.host.fallbacks.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A tensor on the device: `values` row by row, without a gradient.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn tensor(&self, values: Vec<f32>, rows: usize, columns: usize) -> Result<Tensor> {
        let given = Tensor::new(&self.device, values, rows, columns)?;
        if let Some(watch) = &self.watch {
            watch.given(&given);
        }
        Ok(given)
    }

    /// A tensor that the operator makes which began last.
    pub(crate) fn output(&self, values: Vec<f32>, rows: usize, columns: usize) -> Result<Tensor> {
        Tensor::new(&self.device, values, rows, columns).inspect(|made| self.made(made))
    }

    /// Shows what the operator made which began last.
    pub(crate) fn made(&self, y: &Tensor) {
        if let Some(watch) = &self.watch {
            watch.made(y);
        }
    }

    pub(crate) fn count_fallback(&self, op: &'static str) {
        *self.host.fallbacks.lock().unwrap_or_else(PoisonError::into_inner).entry(op).or_default() += 1;
    }

    /// The same context on the host.
    pub(crate) fn on_host(&self) -> Context {
        Context { device: Device::Cpu, ..self.clone() }
    }

    pub(crate) fn handles(&self) -> (Arc<Pool>, Arena) {
        (Arc::clone(&self.host.pool), self.host.arena.clone())
    }

    pub(crate) fn arena(&self) -> &Arena {
        &self.host.arena
    }

    /// The form of an operator that runs; its inputs must all lie on this device.
    pub(crate) fn form(&self, op: &'static str, inputs: &[&Tensor]) -> Result<Form> {
        if inputs.iter().any(|x| !x.is_on(&self.device)) {
            return Err(Error::Devices { op });
        }
        if let Some(watch) = &self.watch {
            watch.begin(op, inputs);
        }
        Ok(match (self.forms, &self.device) {
            (Forms::Composed, _) => Form::Composed,
            (Forms::Best, Device::Cpu) => Form::Cpu,
            (Forms::Best, Device::Gpu(_)) => Form::Gpu,
        })
    }
}
