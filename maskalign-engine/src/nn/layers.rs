//! Linear, LayerNorm and BatchNorm.

use crate::{
    context::Context,
    error::Result,
    ops::{self, Act, BatchStatistics, LinearWeights, NormWeights, Packed},
    param::{Init, Param, Role},
    tape::Tape,
    tensor::Tensor,
};

/// Whether a linear layer has a bias.
///
/// ```
/// # use maskalign_engine::{Error, Init, nn::{Bias, Linear}};
/// let layer = Linear::new(&Init::shapes(), "fc", 2, 4, Bias::Without)?;
/// assert!(layer.bias.is_none());
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bias {
    /// It has one, initially zero.
    With,
    /// It has none.
    Without,
}

/// A linear layer; its weight is `[out, in]`, as checkpoints store it.
///
/// ```
/// # use maskalign_engine::{Context, Device, Error, Init, Tape, nn::{Bias, Linear}, ops::Act};
/// # let cx = Context::new(Device::Cpu, 1);
/// let layer = Linear::new(&Init::new(cx.device(), 0, "student"), "fc", 2, 4, Bias::With)?;
/// let x = cx.tensor(vec![1.0; 3 * 4], 3, 4)?;
/// assert_eq!(layer.forward(&cx, &mut Tape::training(), &x, Act::Gelu)?.shape(), (3, 2));
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone)]
pub struct Linear {
    /// `NAME.weight`; `[out, in]`, or `[out, channels, patch, patch]` for a patch embedding.
    pub weight: Param,
    /// `NAME.bias`, `[out]`.
    pub bias: Option<Param>,
    /// The weight in the layout that is fastest on the device; it replaces the tensor.
    pub(super) packed: Option<Packed>,
}

impl Linear {
    /// Xavier-uniform weight and zero bias (METHOD: the official initialisation).
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn new(init: &Init, name: &str, outputs: usize, inputs: usize, bias: Bias) -> Result<Self> {
        Self::from_weight(init, name, init.xavier(format!("{name}.weight"), &[outputs, inputs])?, bias)
    }

    /// A layer around an existing weight.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn from_weight(init: &Init, name: &str, weight: Param, bias: Bias) -> Result<Self> {
        let bias = match bias {
            Bias::With => Some(init.constant(format!("{name}.bias"), &weight.dims[..1], 0.0)?),
            Bias::Without => None,
        };
        Ok(Linear { weight, bias, packed: None })
    }

    /// Columns of the result.
    pub fn outputs(&self) -> usize {
        self.weight.dims[0]
    }

    /// Columns of the input.
    pub fn inputs(&self) -> usize {
        self.weight.dims[1..].iter().product()
    }

    /// The layer as operators take it.
    pub fn weights(&self) -> LinearWeights {
        LinearWeights {
            weight: self.weight.value.clone(),
            bias: self.bias.as_ref().map(|bias| bias.value.clone()),
            packed: self.packed.clone(),
        }
    }

    /// `act(x W^T + b)`: `[rows, in] -> [rows, out]`.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn forward(&self, cx: &Context, tape: &mut Tape, x: &Tensor, act: Act) -> Result<Tensor> {
        ops::linear(cx, tape, x, &self.weights(), act)
    }

    /// Freezes the layer; where the device has a packed layout, the packed weight replaces the tensor.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn pack(&mut self, cx: &Context) -> Result<()> {
        self.visit(&mut |p| p.set_role(Role::Frozen));
        if let Some(packed) = ops::pack(cx, &self.weight.value, 0..self.outputs()) {
            self.weight.value = self.weight.value.emptied()?;
            self.packed = Some(packed);
        }
        Ok(())
    }

    /// Calls `f` on each parameter.
    pub fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        f(&mut self.weight);
        self.bias.iter_mut().for_each(f);
    }
}

/// LayerNorm over channels.
///
/// ```
/// # use maskalign_engine::{Context, Device, Error, Tape, nn::Norm};
/// # let cx = Context::new(Device::Cpu, 1);
/// let x = cx.tensor(vec![1.0, 3.0], 1, 2)?;
/// let normed = Norm::plain(0.0).forward(&cx, &mut Tape::inference(), &x)?;
/// assert_eq!(normed.to_vec(), [-1.0, 1.0]);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone)]
pub struct Norm {
    /// `NAME.weight` and `NAME.bias`, `[C]`; `None` for a norm without affine parameters.
    pub affine: Option<(Param, Param)>,
    /// Added to the variance.
    pub eps: f64,
}

impl Norm {
    /// A norm whose scale is ones and whose shift is zeros.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn new(init: &Init, name: &str, width: usize, eps: f64) -> Result<Self> {
        let weight = init.constant(format!("{name}.weight"), &[width], 1.0)?;
        let bias = init.constant(format!("{name}.bias"), &[width], 0.0)?;
        Ok(Norm { affine: Some((weight, bias)), eps })
    }

    /// A norm without affine parameters.
    pub fn plain(eps: f64) -> Self {
        Norm { affine: None, eps }
    }

    /// The layer as operators take it.
    pub fn weights(&self) -> NormWeights {
        let affine = self.affine.as_ref().map(|(weight, bias)| (weight.value.clone(), bias.value.clone()));
        NormWeights { affine, eps: self.eps }
    }

    /// `[rows, C] -> [rows, C]`.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn forward(&self, cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
        ops::layer_norm(cx, tape, x, &self.weights())
    }

    /// Calls `f` on each parameter.
    pub fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        if let Some((weight, bias)) = &mut self.affine {
            f(weight);
            f(bias);
        }
    }
}

/// BatchNorm of each column over all rows, without affine parameters: PyTorch's `BatchNorm1d(affine=False)`.
///
/// ```
/// # use maskalign_engine::{Context, Device, Error, Init, Tape, nn::BatchNorm};
/// # let cx = Context::new(Device::Cpu, 1);
/// let mut norm = BatchNorm::plain(&Init::new(&Device::Cpu, 0, "probe"), "head.0", 1, 0.0)?;
/// let x = cx.tensor(vec![1.0, 3.0], 2, 1)?;
/// assert_eq!(norm.train(&cx, &mut Tape::training(), &x)?.to_vec(), [-1.0, 1.0]);
/// // A tenth of the way from 0 to the batch's mean of 2.
/// assert_eq!(norm.running_mean.value.to_vec(), [0.2]);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone)]
pub struct BatchNorm {
    /// `NAME.running_mean`, `[C]`.
    pub running_mean: Param,
    /// `NAME.running_var`, `[C]`, which follows the unbiased variances.
    pub running_var: Param,
    /// Added to the variance.
    pub eps: f64,
    /// How far the running statistics move towards those of each batch.
    pub momentum: f64,
}

impl BatchNorm {
    /// Running statistics that start at 0 and 1, with a momentum of 0.1 (PyTorch's default).
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn plain(init: &Init, name: &str, width: usize, eps: f64) -> Result<Self> {
        let init = init.of_role(Role::Buffer);
        Ok(BatchNorm {
            running_mean: init.constant(format!("{name}.running_mean"), &[width], 0.0)?,
            running_var: init.constant(format!("{name}.running_var"), &[width], 1.0)?,
            eps,
            momentum: 0.1,
        })
    }

    fn running(&self) -> BatchStatistics {
        BatchStatistics { mean: self.running_mean.value.clone(), variance: self.running_var.value.clone() }
    }

    /// Normalises by the statistics of these rows, of which there must be at least two, and updates the running statistics.
    /// `[rows, C] -> [rows, C]`.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn train(&mut self, cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
        let (y, batch) = ops::batch_norm(cx, tape, x, self.eps)?;
        let mut running = self.running();
        running.follow(cx, &batch, x.rows(), self.momentum)?;
        (self.running_mean.value, self.running_var.value) = (running.mean, running.variance);
        Ok(y)
    }

    /// Normalises by the running statistics. `[rows, C] -> [rows, C]`.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn evaluate(&self, cx: &Context, tape: &mut Tape, x: &Tensor) -> Result<Tensor> {
        ops::batch_norm_by(cx, tape, x, &self.running(), self.eps)
    }

    /// Calls `f` on each parameter.
    pub fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        f(&mut self.running_mean);
        f(&mut self.running_var);
    }
}
