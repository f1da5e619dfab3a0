//! Named parameters.

use crate::{
    device::{Dev, Matrix, Vector},
    error::{Result, device},
    random::Stream,
    weights::{HostTensor, TensorMap},
};

/// A named tensor of a model: a parameter, or a fixed one such as sin-cos positions.
///
/// The value is stored as a vector and viewed as a matrix at use; views keep the tensor's id, so that all gradients
/// meet in one buffer.
#[derive(Clone)]
pub struct Param<D: Dev> {
    /// The checkpoint's name, such as `blocks.0.attn.qkv.weight`.
    pub name: String,
    /// The checkpoint's shape.
    pub dims: Vec<usize>,
    /// The values, row-major.
    pub value: Vector<D>,
    /// Whether an optimizer updates it. False for fixed tensors and for those that the loss does not reach: these have
    /// no gradient and do not decay.
    pub trainable: bool,
}

impl<D: Dev> Param<D> {
    /// A trainable parameter with the given values, row-major.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn new(dev: &D, name: impl Into<String>, dims: &[usize], values: Vec<f32>) -> Result<Self> {
        let len = values.len();
        debug_assert!(len == 0 || len == dims.iter().product::<usize>());
        let value = dev.try_tensor_from_vec(values, (len,)).map_err(device)?;
        Ok(Param { name: name.into(), dims: dims.to_vec(), value, trainable: true })
    }

    /// The values as a vector.
    pub fn vector(&self) -> Vector<D> {
        self.value.clone()
    }

    /// The values as a matrix of `rows` rows.
    pub fn matrix(&self, rows: usize) -> Matrix<D> {
        use dfdx::prelude::{HasShape, ReshapeTo};
        let len = self.value.shape().0;
        self.value.clone().reshape_like(&(rows, len / rows))
    }

    /// How many values it has.
    pub fn len(&self) -> usize {
        self.dims.iter().product()
    }

    /// True for a tensor without values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A copy on the host.
    pub fn to_host(&self) -> HostTensor {
        let mut data = vec![0.0; self.len()];
        self.value.copy_into(&mut data);
        HostTensor { shape: self.dims.clone(), data }
    }

    /// Replaces the values, keeping the tensor's identity.
    pub fn load(&mut self, values: &[f32]) {
        self.value.copy_from(values);
    }
}

/// Anything with parameters. One visitor serves optimizer groups, checkpoints, freezing and averaging.
pub trait Module<D: Dev> {
    /// Calls `f` on every parameter, in a fixed order.
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param<D>));

    /// Replaces the parameters that `weights` has by name; the caller has checked names and shapes.
    fn load(&mut self, weights: &TensorMap) {
        self.visit(&mut |p| {
            if let Some(tensor) = weights.get(&p.name) {
                p.load(&tensor.data);
            }
        });
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

    /// Marks every parameter as fixed.
    fn freeze(&mut self) {
        self.visit(&mut |p| p.trainable = false);
    }
}

/// The number of values in all parameters of a module, and in those an optimizer updates.
pub fn count<D: Dev>(module: &mut dyn Module<D>) -> (usize, usize) {
    let (mut all, mut trainable) = (0, 0);
    module.visit(&mut |p| {
        all += p.len();
        trainable += if p.trainable { p.len() } else { 0 };
    });
    (all, trainable)
}

/// Makes parameters with their initial values, each drawn from a stream of its own: adding a layer changes no other.
pub struct Init<'a, D: Dev> {
    dev: &'a D,
    seed: u64,
    scope: String,
    values: Values,
}

/// What new parameters hold.
#[derive(Clone, Copy, PartialEq)]
enum Values {
    /// Draws.
    Drawn,
    /// Zeros, which a checkpoint will replace.
    Zeros,
    /// Nothing: names and shapes are wanted for a plan.
    Shapes,
}

impl<'a, D: Dev> Init<'a, D> {
    /// Draws values from the run's seed; `scope` tells equal names of different models apart.
    pub fn new(dev: &'a D, seed: u64, scope: impl Into<String>) -> Self {
        Init { dev, seed, scope: scope.into(), values: Values::Drawn }
    }

    /// Zeros everywhere, for weights that a checkpoint will replace.
    pub fn blank(dev: &'a D) -> Self {
        Init { dev, seed: 0, scope: String::new(), values: Values::Zeros }
    }

    /// Names and shapes alone: parameters without values, for plans that must not allocate a model.
    pub fn shapes(dev: &'a D) -> Self {
        Init { dev, seed: 0, scope: String::new(), values: Values::Shapes }
    }

    /// Whether the parameters get values that count.
    pub fn draws(&self) -> bool {
        self.values == Values::Drawn
    }

    /// The device the parameters are made on.
    pub fn dev(&self) -> &'a D {
        self.dev
    }

    fn stream(&self, name: &str) -> Stream {
        Stream::new(self.seed, &format!("init {} {name}", self.scope), 0, 0)
    }

    /// Given values.
    ///
    /// # Errors
    /// Out of memory on the device, here and below.
    pub fn values(&self, name: impl Into<String>, dims: &[usize], values: Vec<f32>) -> Result<Param<D>> {
        let values = if self.values == Values::Shapes { Vec::new() } else { values };
        Param::new(self.dev, name, dims, values)
    }

    /// As [`Init::values`], worked out only where parameters have values: a plan of a large model stays cheap.
    ///
    /// # Errors
    /// As there.
    pub fn worked_out(
        &self,
        name: impl Into<String>,
        dims: &[usize],
        values: impl FnOnce() -> Vec<f32>,
    ) -> Result<Param<D>> {
        let values = if self.values == Values::Shapes { Vec::new() } else { values() };
        self.values(name, dims, values)
    }

    /// One value everywhere.
    pub fn constant(&self, name: impl Into<String>, dims: &[usize], value: f32) -> Result<Param<D>> {
        match self.values {
            Values::Shapes => self.values(name, dims, Vec::new()),
            _ => self.values(name, dims, vec![value; dims.iter().product()]),
        }
    }

    /// Xavier-uniform, `dims[0]` outputs and the product of the rest inputs (a convolution counts as a matrix).
    pub fn xavier(&self, name: impl Into<String>, dims: &[usize]) -> Result<Param<D>> {
        let name = name.into();
        let inputs: usize = dims[1..].iter().product();
        let bound = (6.0 / (dims[0] + inputs) as f64).sqrt();
        self.draw(name, dims, |s| (s.uniform() * 2.0 - 1.0) * bound)
    }

    /// Normal with mean 0.
    pub fn normal(&self, name: impl Into<String>, dims: &[usize], std: f64) -> Result<Param<D>> {
        self.draw(name.into(), dims, |s| s.normal() * std)
    }

    /// Normal with mean 0, drawn again beyond two standard deviations.
    pub fn truncated_normal(&self, name: impl Into<String>, dims: &[usize], std: f64) -> Result<Param<D>> {
        self.draw(name.into(), dims, |s| {
            loop {
                let z = s.normal();
                if z.abs() <= 2.0 {
                    return z * std;
                }
            }
        })
    }

    fn draw(&self, name: String, dims: &[usize], f: impl Fn(&mut Stream) -> f64) -> Result<Param<D>> {
        let len = dims.iter().product();
        let values = match self.values {
            Values::Shapes => Vec::new(),
            Values::Zeros => vec![0.0; len],
            Values::Drawn => {
                let mut stream = self.stream(&name);
                (0..len).map(|_| f(&mut stream) as f32).collect()
            }
        };
        self.values(name, dims, values)
    }
}
