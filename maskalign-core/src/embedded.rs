//! What travels inside the binary: the shipped recipes and the quickstart's teacher.

use crate::weights::{HostTensor, TensorMap};

/// The shipped recipes, by name, as YAML: what the build script finds in `recipes/`.
pub const RECIPES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/recipes.rs"));

/// The safetensors file of embedded weights.
pub fn weights_file(name: &str) -> Option<&'static [u8]> {
    WEIGHTS.iter().find(|(known, _)| *known == name).map(|(_, bytes)| *bytes)
}

/// Small weights that recipes name as `embedded://NAME`.
pub fn weights(name: &str) -> Option<TensorMap> {
    let file = safetensors::SafeTensors::deserialize(weights_file(name)?)
        .expect("an embedded file was written by this program");
    let tensor = |view: safetensors::tensor::TensorView| HostTensor {
        shape: view.shape().to_vec(),
        data: view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    };
    Some(file.tensors().into_iter().map(|(name, view)| (name, tensor(view))).collect())
}

const WEIGHTS: &[(&str, &[u8])] = &[("quickstart_teacher", include_bytes!("../data/quickstart_teacher.safetensors"))];
