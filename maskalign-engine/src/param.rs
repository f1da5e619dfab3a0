//! Named parameters, the modules that have them, and their initial values.

use std::collections::BTreeMap;

use crate::{device::Device, error::Result, random::Stream, tensor::Tensor};

/// A named tensor of a file or a model in the host's memory, or its shape alone.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    /// Length of each dimension; empty for a scalar.
    pub shape: Vec<usize>,
    /// The values.
    pub data: Vec<f32>,
}

impl HostTensor {
    /// A shape without values: the code that loads weights checks names and shapes long before it reads the values.
    pub fn shape_only(shape: Vec<usize>) -> HostTensor {
        HostTensor { shape, data: Vec::new() }
    }

    /// Whether it has no values.
    pub fn is_shape_only(&self) -> bool {
        self.data.is_empty()
    }
}

/// Tensors by name.
pub type TensorMap = BTreeMap<String, HostTensor>;

/// Whose a parameter is. Its role decides whether it is updated, saved, averaged and handed on.
///
/// ```
/// # use maskalign_engine::{Device, Error, Init, Role};
/// let init = Init::new(&Device::Cpu, 0, "decoder").of_role(Role::Head);
/// assert!(init.constant("mask_token", &[1, 1, 8], 0.0)?.is_trained());
/// assert!(Role::Moving.is_saved() && !Role::Moving.is_trained());
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// A student's: updated by the optimizer, saved, and taken by later stages and exports.
    Student,
    /// A head's, trained beside the student and used in this stage only: an alignment's, a decoder's, a classifier's.
    Head,
    /// A frozen teacher's: neither updated nor saved, since its file has it.
    Frozen,
    /// A moving average (EMA) of another parameter: changed after each update, and saved.
    Moving,
    /// Running statistics that a head updates in its forward pass (PyTorch's buffers), such as a BatchNorm's mean: saved,
    /// and part of what the stage leaves.
    Buffer,
}

impl Role {
    /// Whether an optimizer may update it.
    pub fn is_trained(self) -> bool {
        matches!(self, Role::Student | Role::Head)
    }

    /// Whether checkpoints hold it.
    pub fn is_saved(self) -> bool {
        self != Role::Frozen
    }

    /// Whether the weights that a finished stage leaves hold it. A moving average is used in its stage only.
    pub fn is_kept(self) -> bool {
        matches!(self, Role::Student | Role::Head | Role::Buffer)
    }
}

/// A named tensor of a model: a parameter, or a constant such as sin-cos positions.
///
/// ```
/// # use maskalign_engine::{Device, Error, Init};
/// let mut bias = Init::new(&Device::Cpu, 0, "student").constant("norm.bias", &[8], 0.0)?;
/// assert_eq!((bias.len(), bias.is_trained()), (8, true));
/// bias.load(&[1.0; 8])?;
/// assert_eq!(bias.value.to_vec(), [1.0; 8]);
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Param {
    /// The name in checkpoints, such as `blocks.0.attn.qkv.weight`.
    pub name: String,
    /// The shape in checkpoints.
    pub dims: Vec<usize>,
    /// The values: `[dims[0], rest]` for a convolution's weight of four dimensions, else `[rest, last dimension]`.
    pub value: Tensor,
    role: Role,
}

impl Param {
    /// A parameter with the given values, row-major, or without values where a plan needs none.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn new(device: &Device, role: Role, name: impl Into<String>, dims: &[usize], values: Vec<f32>) -> Result<Self> {
        let (rows, columns) = match (values.is_empty(), dims) {
            (true, _) => (0, 0),
            (_, [outputs, rest @ ..]) if rest.len() == 3 => (*outputs, rest.iter().product()),
            (_, [rest @ .., last]) => (rest.iter().product(), *last),
            (_, []) => (1, 1),
        };
        let value = Tensor::new(device, values, rows, columns)?;
        let value = if role.is_trained() { value.tracked() } else { value };
        Ok(Param { name: name.into(), dims: dims.to_vec(), value, role })
    }

    /// Its role.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Changes its role.
    pub fn set_role(&mut self, role: Role) {
        self.role = role;
        self.set_trained(role.is_trained());
    }

    /// Whether it takes a gradient and an optimizer updates it: its role says so, and it is not constant.
    pub fn is_trained(&self) -> bool {
        self.role.is_trained() && self.value.is_tracked()
    }

    /// Makes it constant, or trainable if its role allows. A constant parameter has no gradient and does not decay.
    pub fn set_trained(&mut self, trained: bool) {
        let value = self.value.clone();
        self.value = if trained && self.role.is_trained() { value.tracked() } else { value.detached() };
    }

    /// The number of values in its shape, even where it holds none.
    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    /// True for a tensor without values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A copy on the host.
    pub fn to_host(&self) -> HostTensor {
        HostTensor { shape: self.dims.clone(), data: self.value.to_vec() }
    }

    /// Replaces the values, not the identity that gradients are keyed by.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn load(&mut self, values: &[f32]) -> Result<()> {
        self.value.set(values)
    }
}

/// Anything with parameters. One visitor serves the optimizer's groups, checkpoints, freezing and averaging.
///
/// ```
/// # use maskalign_engine::{Device, Error, Init, Module, Param, Role};
/// struct Scale(Param);
///
/// impl Module for Scale {
///     fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
///         f(&mut self.0);
///     }
/// }
///
/// let mut scale = Scale(Init::new(&Device::Cpu, 0, "scale").constant("scale", &[4], 1.0)?);
/// assert_eq!(scale.shapes(), [("scale".to_string(), vec![4])]);
/// scale.set_role(Role::Frozen);
/// assert!(!scale.0.is_trained());
/// # Ok::<(), Error>(())
/// ```
pub trait Module {
    /// Calls `f` on every parameter, in a fixed order.
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param));

    /// Replaces the parameters that are in `weights`, by name; the caller has checked names and shapes.
    ///
    /// # Errors
    /// Out of memory on the device.
    fn load(&mut self, weights: &TensorMap) -> Result<()> {
        let mut outcome = Ok(());
        self.visit(&mut |p| {
            if let (Some(tensor), Ok(())) = (weights.get(&p.name), &outcome) {
                outcome = p.load(&tensor.data);
            }
        });
        outcome
    }

    /// All parameters on the host, by name.
    fn to_host(&mut self) -> TensorMap {
        let mut all = TensorMap::new();
        self.visit(&mut |p| {
            all.insert(p.name.clone(), p.to_host());
        });
        all
    }

    /// Names and shapes of all parameters.
    fn shapes(&mut self) -> Vec<(String, Vec<usize>)> {
        let mut all = Vec::new();
        self.visit(&mut |p| all.push((p.name.clone(), p.dims.clone())));
        all
    }

    /// Gives every parameter a role.
    fn set_role(&mut self, role: Role) {
        self.visit(&mut |p| p.set_role(role));
    }
}

/// Makes parameters with their initial values, each drawn from its own stream, so that adding a layer changes no other.
///
/// ```
/// # use maskalign_engine::{Device, Error, Init};
/// let init = Init::new(&Device::Cpu, 0, "student");
/// let (first, again) = (init.xavier("fc.weight", &[4, 8])?, init.xavier("fc.weight", &[4, 8])?);
/// assert_eq!(first.value.to_vec(), again.value.to_vec(), "drawn by seed, scope and name");
/// assert!(Init::shapes().xavier("fc.weight", &[4, 8])?.value.is_empty());
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Init {
    device: Device,
    role: Role,
    seed: u64,
    scope: String,
    values: Values,
}

/// What new parameters hold.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Values {
    /// Values drawn from a stream.
    Drawn,
    /// Zeros, which a checkpoint will replace.
    Zeros,
    /// Nothing: names and shapes are wanted for a plan.
    Shapes,
}

impl Init {
    /// Draws the values of a student's parameters from the run's seed; `scope` separates equal names in different models.
    pub fn new(device: &Device, seed: u64, scope: impl Into<String>) -> Self {
        Init { device: device.clone(), role: Role::Student, seed, scope: scope.into(), values: Values::Drawn }
    }

    /// Zeros everywhere, for weights that a checkpoint will replace.
    pub fn blank(device: &Device) -> Self {
        Init { values: Values::Zeros, ..Init::new(device, 0, "") }
    }

    /// Names and shapes alone: parameters without values, for plans, which must not allocate a model.
    pub fn shapes() -> Self {
        Init { values: Values::Shapes, ..Init::new(&Device::Cpu, 0, "") }
    }

    /// The same, for parameters of another role.
    #[must_use]
    pub fn of_role(&self, role: Role) -> Self {
        Init { role, ..self.clone() }
    }

    /// Whether the parameters get initial values that will be used.
    pub fn draws(&self) -> bool {
        self.values == Values::Drawn
    }

    /// Whether the parameters have values at all.
    pub fn has_values(&self) -> bool {
        self.values != Values::Shapes
    }

    /// The device that the parameters are made on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    fn stream(&self, name: &str) -> Stream {
        Stream::new(self.seed, &format!("init {} {name}", self.scope), 0, 0)
    }

    /// The given values, computed only if parameters have values at all, so that planning a large model stays cheap.
    ///
    /// # Errors
    /// Out of memory on the device, here and below.
    pub fn values(&self, name: impl Into<String>, dims: &[usize], values: impl FnOnce() -> Vec<f32>) -> Result<Param> {
        let values = if self.values == Values::Shapes { Vec::new() } else { values() };
        Param::new(&self.device, self.role, name, dims, values)
    }

    /// One value everywhere.
    ///
    /// # Errors
    /// As [`Init::values`].
    pub fn constant(&self, name: impl Into<String>, dims: &[usize], value: f32) -> Result<Param> {
        self.values(name, dims, || vec![value; dims.iter().product()])
    }

    /// Xavier-uniform: the fan-out is `dims[0]`, the fan-in the product of the rest (a convolution counts as a matrix).
    ///
    /// # Errors
    /// As [`Init::values`].
    pub fn xavier(&self, name: impl Into<String>, dims: &[usize]) -> Result<Param> {
        let name = name.into();
        let inputs: usize = dims[1..].iter().product();
        let bound = (6.0 / (dims[0] + inputs) as f64).sqrt();
        self.draw(name, dims, |s| (s.uniform() * 2.0 - 1.0) * bound)
    }

    /// Normally distributed with mean 0.
    ///
    /// # Errors
    /// As [`Init::values`].
    pub fn normal(&self, name: impl Into<String>, dims: &[usize], std: f64) -> Result<Param> {
        self.draw(name.into(), dims, |s| s.normal() * std)
    }

    /// Truncated normal with mean 0: values beyond two standard deviations are drawn again.
    ///
    /// # Errors
    /// As [`Init::values`].
    pub fn truncated_normal(&self, name: impl Into<String>, dims: &[usize], std: f64) -> Result<Param> {
        self.draw(name.into(), dims, |s| {
            loop {
                let z = s.normal();
                if z.abs() <= 2.0 {
                    return z * std;
                }
            }
        })
    }

    fn draw(&self, name: String, dims: &[usize], f: impl Fn(&mut Stream) -> f64) -> Result<Param> {
        let len = dims.iter().product();
        let values = || match self.values {
            Values::Drawn => {
                let mut stream = self.stream(&name);
                (0..len).map(|_| f(&mut stream) as f32).collect()
            }
            _ => vec![0.0; len],
        };
        self.values(name.clone(), dims, values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_trained_follows_from_role_and_reach() {
        let init = Init::new(&Device::Cpu, 0, "test");
        let mut p = init.constant("w", &[2, 3], 1.0).unwrap();
        assert_eq!((p.is_trained(), p.value.shape()), (true, (2, 3)));
        p.set_trained(false);
        assert!(!p.is_trained());
        p.set_trained(true);
        assert!(p.is_trained());
        for role in [Role::Frozen, Role::Moving, Role::Buffer] {
            p.set_role(role);
            p.set_trained(true);
            assert!(!p.is_trained(), "{role:?}");
        }
    }

    #[test]
    fn shapes_are_matrices_of_the_last_dimension_or_of_filters() {
        let shape = |dims: &[usize]| Init::blank(&Device::Cpu).constant("w", dims, 0.0).unwrap().value.shape();
        assert_eq!([shape(&[5]), shape(&[1, 7, 4]), shape(&[6, 3, 2, 2])], [(1, 5), (7, 4), (6, 12)]);
        assert_eq!(Init::shapes().constant("w", &[5], 0.0).unwrap().value.len(), 0);
    }
}
