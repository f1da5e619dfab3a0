//! Linear and LayerNorm.

use super::{Init, Param};
use crate::{
    device::{Dev, Matrix, Vector},
    error::{Result, device},
    kernels::{Kernels, Packed},
};

/// Whether a linear layer adds a learned vector to its product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bias {
    /// It does; the vector starts at zero.
    With,
    /// It does not.
    Without,
}

/// A linear layer, `[out, in]` as checkpoints store it.
#[derive(Clone)]
pub struct Linear<D: Dev> {
    /// `NAME.weight`; `[out, in]`, or `[out, channels, patch, patch]` for a patch embedding.
    pub weight: Param<D>,
    /// `NAME.bias`, `[out]`.
    pub bias: Option<Param<D>>,
    /// The weight in the layout the kernels multiply fastest by; it replaces the tensor.
    pub packed: Option<Packed>,
}

impl<D: Dev> Linear<D> {
    /// Xavier-uniform weight and zero bias (METHOD: the official initialisation).
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn new(init: &Init<D>, name: &str, outputs: usize, inputs: usize, bias: Bias) -> Result<Self> {
        Self::from_weight(init, name, init.xavier(format!("{name}.weight"), &[outputs, inputs])?, bias)
    }

    /// A layer around a weight that was made otherwise.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn from_weight(init: &Init<D>, name: &str, weight: Param<D>, bias: Bias) -> Result<Self> {
        let bias = match bias {
            Bias::With => Some(init.constant(format!("{name}.bias"), &weight.dims[..1], 0.0)?),
            Bias::Without => None,
        };
        Ok(Linear { weight, bias, packed: None })
    }

    /// Rows of the result.
    pub fn outputs(&self) -> usize {
        self.weight.dims[0]
    }

    /// Columns of the input.
    pub fn inputs(&self) -> usize {
        self.weight.dims[1..].iter().product()
    }

    /// The weight as `[out, in]`. Empty once packed.
    pub fn weight(&self) -> Matrix<D> {
        self.weight.matrix(self.weight.dims[0])
    }

    /// Freezes the layer; the packed weight replaces the tensor where the kernels have such a form.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn pack(&mut self, kernels: &dyn Kernels<D>) -> Result<()> {
        self.each_mut(&mut |p| p.trainable = false);
        if let Some(packed) = kernels.pack(&self.weight(), 0..self.outputs()) {
            self.weight.value = dev_empty(&self.weight.value)?;
            self.packed = Some(packed);
        }
        Ok(())
    }

    /// Calls `f` on each parameter.
    pub fn each(&self, f: &mut dyn FnMut(&Param<D>)) {
        f(&self.weight);
        self.bias.iter().for_each(f);
    }

    /// Calls `f` on each parameter.
    pub fn each_mut(&mut self, f: &mut dyn FnMut(&mut Param<D>)) {
        f(&mut self.weight);
        self.bias.iter_mut().for_each(f);
    }
}

/// No values, in the place of those that were packed.
pub(super) fn dev_empty<D: Dev>(x: &Vector<D>) -> Result<Vector<D>> {
    x.device().try_tensor_from_vec(Vec::new(), (0,)).map_err(device)
}

/// LayerNorm over channels.
#[derive(Clone)]
pub struct Norm<D: Dev> {
    /// `NAME.weight` and `NAME.bias`, `[C]`; `None` only whitens.
    pub affine: Option<(Param<D>, Param<D>)>,
    /// Added to the variance.
    pub eps: f64,
}

impl<D: Dev> Norm<D> {
    /// Ones and zeros.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn new(init: &Init<D>, name: &str, width: usize, eps: f64) -> Result<Self> {
        let weight = init.constant(format!("{name}.weight"), &[width], 1.0)?;
        let bias = init.constant(format!("{name}.bias"), &[width], 0.0)?;
        Ok(Norm { affine: Some((weight, bias)), eps })
    }

    /// Without affine parameters.
    pub fn plain(eps: f64) -> Self {
        Norm { affine: None, eps }
    }

    /// Calls `f` on each parameter.
    pub fn each(&self, f: &mut dyn FnMut(&Param<D>)) {
        if let Some((weight, bias)) = &self.affine {
            f(weight);
            f(bias);
        }
    }

    /// Calls `f` on each parameter.
    pub fn each_mut(&mut self, f: &mut dyn FnMut(&mut Param<D>)) {
        if let Some((weight, bias)) = &mut self.affine {
            f(weight);
            f(bias);
        }
    }
}
