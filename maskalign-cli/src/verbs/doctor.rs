//! `maskalign doctor`: what this binary and this machine support, and which data and weights are there.

use std::{collections::BTreeSet, path::Path};

use maskalign_core::{Context, Device, DeviceChoice, embedded, instruction_sets, weights::HubCache};
use serde_json::Value;

use crate::{
    failure::Failure,
    output, recipes,
    session::{COMMIT, Session},
};

/// Where Debian's package puts the images that `quickstart_teacher` was trained on.
const FASHION_MNIST: &str = "/usr/share/datasets/fashion-mnist";

/// Show version, devices, and which data and weights are there
#[derive(clap::Args)]
pub(crate) struct Args {}

impl Args {
    #[expect(clippy::unused_self, reason = "every verb runs alike; this one takes no arguments")]
    pub(crate) fn run(self, session: &Session) -> Result<(), Failure> {
        let mut lines = vec![
            ("version", env!("CARGO_PKG_VERSION").to_string()),
            ("commit", COMMIT.unwrap_or("unknown").to_string()),
            ("cpu", cpu()),
            ("instruction sets", instruction_sets().join(" ")),
            ("gpu", gpu()),
            ("components", session.registry.entries().count().to_string()),
        ];
        let there = match Path::new(FASHION_MNIST).is_dir() {
            true => "",
            false => ": not there (Debian: apt install dataset-fashion-mnist); the embedded sample needs nothing",
        };
        lines.push(("fashion-mnist", format!("{FASHION_MNIST}{there}")));
        let hub = HubCache::from_environment();
        for address in hub_addresses(session) {
            let found = match hub.find(&address) {
                Ok(path) => format!("{address} is {}", path.display()),
                // The lines after the first say how to get them, which a run that needs them says too.
                Err(error) => error.to_string().lines().next().unwrap_or_default().to_string(),
            };
            lines.push(("weights", found));
        }
        let text: Vec<String> = lines.iter().map(|(name, value)| format!("{name:<17} {value}\n")).collect();
        Ok(output::print(&text.concat())?)
    }
}

fn cpu() -> String {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    if let Err(error) = DeviceChoice::Cpu.open() {
        return error.to_string();
    }
    let cx = Context::new(Device::Cpu, threads);
    format!("{} kernels, {} threads", cx.operators(), cx.threads())
}

fn gpu() -> String {
    match DeviceChoice::Cuda(0).open() {
        Ok(device) => device.name(),
        Err(error) => format!("none: {error}"),
    }
}

/// The weights that built-in recipes take from the hub.
fn hub_addresses(session: &Session) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (name, _) in embedded::RECIPES {
        let loaded = recipes::load_anywhere(session.registry, Path::new(name), &[]);
        let mut open: Vec<&Value> = loaded.iter().map(maskalign_registry::Loaded::resolved).collect();
        while let Some(value) = open.pop() {
            match value {
                Value::Object(map) => open.extend(map.values()),
                Value::Array(items) => open.extend(items),
                Value::String(text) if text.starts_with("hf://") => {
                    found.insert(text.clone());
                }
                _ => {}
            }
        }
    }
    found
}
