//! Where images come from. One component a file; [`files`] and [`ListHash`] serve several.

pub mod files;
pub mod idx;
pub mod image_folder;
pub mod image_list;
mod list;
pub mod sample;

pub use self::idx::Idx;
pub use self::image_folder::ImageFolder;
pub use self::image_list::ImageList;
pub use self::sample::{Sample, Split};

/// The fingerprint of a list of images: BLAKE3 over names, labels and sizes, in order.
#[derive(Default)]
pub struct ListHash(blake3::Hasher);

impl ListHash {
    /// A list with nothing in it yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an image: its name without the folder that holds the data, its label, and its size in bytes.
    pub fn add(&mut self, name: &[u8], label: Option<u32>, bytes: u64) {
        self.0.update(&(name.len() as u64).to_le_bytes());
        self.0.update(name);
        self.0.update(&label.map_or(-1, i64::from).to_le_bytes());
        self.0.update(&bytes.to_le_bytes());
    }

    /// The fingerprint, 64 hexadecimal digits.
    pub fn finish(&self) -> String {
        self.0.finalize().to_hex().to_string()
    }
}

/// The first few of many, and how many more there are.
fn some_of(all: &[String]) -> String {
    first_of(all.iter().cloned(), all.len())
}

/// The same of so many that are not all made.
fn first_of(all: impl Iterator<Item = String>, count: usize) -> String {
    const SHOWN: usize = 5;
    let more = if count > SHOWN { format!(" and {} more", count - SHOWN) } else { String::new() };
    format!("{}{more}", all.take(SHOWN).collect::<Vec<_>>().join(", "))
}
