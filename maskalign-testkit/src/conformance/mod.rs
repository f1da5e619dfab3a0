//! What every component must do, as checks that a plugin's own test can call.
//!
//! ```no_run
//! maskalign_testkit::conformance::check_all(Some("my-plugin")).unwrap();
//! ```
//!
//! Each check goes through the registry, as a recipe does: the component is named by kind and name, its example is
//! decoded, and what the constructor returns is tested at odd sizes. A check returns every fault it finds as a sentence.

mod aligner;
mod host;
mod loss;
mod optimizer;
mod stage;
mod target;
mod tower;

use maskalign_engine::{Context, Device, Forms, Tensor, random::Stream};
use maskalign_registry::{KindTag, Registry, Slot};

pub use maskalign_registry::Kind;

use maskalign_core::{
    components::towers::Environment,
    error::Result,
    plugin::{Build, Component},
};

/// Checks the component of that kind and name by its own example.
///
/// # Errors
/// Every fault, one sentence each.
pub fn check(kind: Kind, name: &str) -> Result<(), Vec<String>> {
    let registry = Registry::global().map_err(|error| vec![error.to_string()])?;
    let Some(entry) = registry.get(kind, name) else {
        return Err(vec![format!("no {kind} is named `{name}`: is its crate linked in (`use my_plugin as _;`)?")]);
    };
    let mut faults = Faults::new(entry.address());
    for fault in registry.faults(entry) {
        faults.0.push(fault);
    }
    if faults.0.is_empty() {
        run(kind, entry.example, Environment::Ignored, &mut faults);
    }
    faults.into_result()
}

/// Checks a component as configured by `text`, YAML such as `{ type: decoder, dim: 8, attention: masked_queries }`.
///
/// A dataset that reads files is opened here, and a stage runs. [`check`] does not need the files that an example names: a
/// stage without them is only planned. Wherever a stage names an earlier one, as `{stage: NAME}`, it is given a small
/// student with a class token, for images of 28 pixels; of the embedded images it is given a few.
///
/// # Errors
/// Every fault, one sentence each.
pub fn check_as(kind: Kind, text: &str) -> Result<(), Vec<String>> {
    let mut faults = Faults::new(format!("{kind} {text}"));
    if let Some(slot) = faults.slot(kind, text) {
        host::check_files(kind, &slot, &mut faults);
        run(kind, text, Environment::Checked, &mut faults);
    }
    faults.into_result()
}

/// Checks every component that `package` registers (`None`: every component in this binary).
///
/// # Errors
/// Every fault, one sentence each; or that the package registers nothing.
pub fn check_all(package: Option<&str>) -> Result<(), Vec<String>> {
    let registry = Registry::global().map_err(|error| vec![error.to_string()])?;
    let chosen: Vec<_> = registry.entries().filter(|entry| package.is_none_or(|p| p == entry.package)).collect();
    if chosen.is_empty() {
        let package = package.unwrap_or("any crate");
        return Err(vec![format!("{package} registers no component: is it linked in (`use my_plugin as _;`)?")]);
    }
    let faults: Vec<String> = chosen.iter().filter_map(|entry| check(entry.kind, entry.name).err()).flatten().collect();
    if faults.is_empty() { Ok(()) } else { Err(faults) }
}

/// `environment` says whether the files that the text names must be there.
fn run(kind: Kind, text: &str, environment: Environment, faults: &mut Faults) {
    match kind {
        Kind::Masker => host::masker(text, faults),
        Kind::Dataset => host::dataset(text, faults),
        Kind::Transform => host::transform(text, faults),
        Kind::Schedule => host::schedule(text, faults),
        Kind::Loss => loss::check(text, faults),
        Kind::Aligner => aligner::check(text, faults),
        Kind::Optimizer => optimizer::check(text, faults),
        Kind::Student => tower::student(text, faults),
        Kind::Target => target::check(text, faults),
        Kind::Teacher => tower::teacher(text, faults),
        Kind::Stage => stage::check(text, environment, faults),
    }
}

/// The faults of one component.
struct Faults(Vec<String>, String);

impl Faults {
    fn new(component: String) -> Self {
        Faults(Vec::new(), component)
    }

    fn add(&mut self, fault: impl std::fmt::Display) {
        self.0.push(format!("{}: {fault}", self.1));
    }

    fn unless(&mut self, holds: bool, fault: impl std::fmt::Display) {
        if !holds {
            self.add(fault);
        }
    }

    /// The value, or its error as a fault.
    fn expect<T, E: std::fmt::Display>(&mut self, doing: &str, result: Result<T, E>) -> Option<T> {
        result.map_err(|error| self.add(format_args!("{doing} fails: {error}"))).ok()
    }

    /// The component that a text configures, defaults filled in.
    fn slot(&mut self, kind: Kind, text: &str) -> Option<serde_json::Value> {
        let registry = self.expect("collecting components", Registry::global())?;
        let component = registry.component(kind, "example", text).map_err(|report| report.render());
        self.expect("reading its options", component)
    }

    fn into_result(self) -> Result<(), Vec<String>> {
        if self.0.is_empty() { Ok(()) } else { Err(self.0) }
    }
}

/// The component built on the CPU; `None` and a fault where it refuses.
fn built<K: Component + KindTag>(text: &str, faults: &mut Faults) -> Option<Box<K::Object>> {
    let value = faults.slot(K::KIND, text)?;
    let slot: Result<Slot<K>, _> = serde_json::from_value(value);
    let slot = faults.expect("filling its defaults", slot)?;
    faults.expect("building it on the CPU", slot.build())
}

/// The device's own operators, on one thread.
fn fused() -> Context {
    Context::new(Device::Cpu, 1)
}

/// The composed forms of the operators, which a component must agree with.
fn composed() -> Context {
    Context::new(Device::Cpu, 1).with_forms(Forms::Composed)
}

/// Normally distributed values, keyed by their purpose.
fn normal(purpose: &str, len: usize) -> Vec<f32> {
    let mut stream = Stream::new(0, &format!("conformance {purpose}"), 0, 0);
    (0..len).map(|_| stream.normal() as f32).collect()
}

fn matrix(rows: usize, columns: usize, values: Vec<f32>) -> Tensor {
    Tensor::new(&Device::Cpu, values, rows, columns).expect("memory")
}

/// The largest difference, divided by the largest magnitude in either.
fn relative_difference(a: &[f32], b: &[f32]) -> f64 {
    let largest = |values: &mut dyn Iterator<Item = f64>| {
        values.fold(0.0, |m: f64, v| if v.is_nan() { f64::INFINITY } else { m.max(v) })
    };
    let difference = largest(&mut a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs()));
    let scale = largest(&mut a.iter().chain(b).map(|v| f64::from(*v).abs()));
    if difference == 0.0 { 0.0 } else { difference / scale.max(1e-6) }
}

/// The largest relative difference between CPU and composed forms that counts as round-off.
const ROUND_OFF: f64 = 1e-4;

/// The relative error of a gradient of length `norm` against finite differences: `loss_at(t)` is the loss after all values
/// have moved by `t` along the gradient's direction.
fn slope_error(norm: f64, mut loss_at: impl FnMut(f64) -> Result<f32>) -> Result<f64> {
    let mut least = f64::INFINITY;
    // Single precision favours long steps and curvature short ones: one of them has to agree.
    for step in [3e-2, 1e-2, 3e-3] {
        let slope = (f64::from(loss_at(step)?) - f64::from(loss_at(-step)?)) / (2.0 * step);
        least = least.min((slope / norm - 1.0).abs());
    }
    Ok(least)
}

/// Values moved by `distance` along a direction of length `norm`.
fn moved(values: &[f32], direction: &[f32], distance: f64, norm: f64) -> Vec<f32> {
    let by = |(v, d): (&f32, &f32)| (f64::from(*v) + distance * f64::from(*d) / norm) as f32;
    values.iter().zip(direction).map(by).collect()
}

fn square_sum(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(*v).powi(2)).sum()
}

/// Parameters of a component that takes seconds to build: an example may be as large as a paper's. Checks that take many
/// passes are left to [`check_as`] at small sizes.
const LARGE: usize = 1_000_000;

/// The number of values in the parameters.
fn count(shapes: &[(String, Vec<usize>)]) -> usize {
    shapes.iter().map(|(_, dims)| dims.iter().product::<usize>()).sum()
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}
