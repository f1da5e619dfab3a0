//! A batch of images on its way into the towers.

/// Square RGB images in [0, 1], `[batch, 3, size, size]` row-major, on the host: each tower resizes and normalises for
/// itself.
#[derive(Clone, Debug)]
pub struct ImageBatch {
    /// The values.
    pub pixels: Vec<f32>,
    /// Images.
    pub batch: usize,
    /// Side in pixels.
    pub size: usize,
}
