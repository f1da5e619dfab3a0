//! Weights of others: files, the local hub cache, and the names each family uses.
//!
//! A teacher's weights take three steps: [`locate`] turns a recipe's `weights:` into a path, [`read`] turns the file into
//! `f32` tensors by name, [`to_canonical`] gives them one naming (timm's, which is also the official MaskAlign student's).
//! [`check_against`] then holds them against the tensors a model needs. Every tensor of a file is accounted for: used,
//! left out by a rule that has a name, or an error that names it. [`read_shapes`] in place of [`read`] checks names and
//! shapes alone, before the first step.

mod beside;
mod checkpoint;
mod element;
mod error;
mod families;
mod fit;
mod head;
mod hub;
mod mismatch;
mod naming;
mod part;
mod pickle;
mod positions;
mod read;
mod tensor_file;
mod timm_names;
mod torch_file;

pub use beside::{Description, NOTED_TOWER, Said, TRAINED_BLOCKS, describe};
pub(crate) use checkpoint::Sealed;
pub use checkpoint::{Checkpoint, CheckpointHeader, Retention};
pub use error::WeightsError;
pub use families::{Canonical, to_canonical, to_family};
pub use fit::check_against;
pub use head::{Head, HeadTensors, head_file, heads_of_run};
pub use hub::{HubCache, locate};
pub use mismatch::Mismatch;
pub use naming::{Change, Family, Naming, Row, Writes, naming, namings};
pub use positions::{resize_positions, with_class_row};
pub use read::{files_of, read, read_part, read_part_shapes, read_shapes};
pub use tensor_file::{TensorData, TensorFile, TensorRef, write_safetensors};
pub use timm_names::{SaidActivation, TimmName, timm_name};

pub use maskalign_engine::{HostTensor, TensorMap};
